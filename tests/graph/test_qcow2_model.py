"""qcow2 against a bytearray: whatever is done to an image, it has what the model has, and qemu-img finds it sound.

One machine, over two kinds of storage: the ``file`` driver, and memory whose every request makes some trips through
the scheduler, so that requests overlap in all ways.
"""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import pytest
import trio
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from images import check_image, content, create, io
from mounting import run
from support import READ_WRITE, memory_of, read, root_of, write

from fusebd.block.blockstatus import block_status_above
from fusebd.block.child import MAY_UNMAP
from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.block.status import Status
from fusebd.errors import BlockIOError

T = TypeVar("T")


class Loop:
    """A trio loop in a thread of its own, for code that is not async itself."""

    def __init__(self) -> None:
        self._token: SimpleQueue[trio.lowlevel.TrioToken] = SimpleQueue()
        self._thread = threading.Thread(target=trio.run, args=(self._serve,))
        self._thread.start()
        self.token = self._token.get()

    async def _serve(self) -> None:
        self._end = trio.Event()
        self._token.put(trio.lowlevel.current_trio_token())
        await self._end.wait()

    def __call__(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        result: T = trio.from_thread.run(function, *args, trio_token=self.token)
        return result

    def close(self) -> None:
        self.token.run_sync_soon(lambda: self._end.set())
        self._thread.join()


# --- the images to begin with --------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """How an image is made.  ``backing``: length of the backing file, relative to the image's."""

    cluster_bits: int
    compat: str = "1.1"
    refcount_bits: int = 16
    backing: str = ""
    snapshot: bool = False
    compressed: bool = False
    extended: bool = False

    @property
    def size(self) -> int:
        """Of the disk, in bytes; some L2 tables of the smallest clusters, and not a whole number of clusters."""
        return {9: 140 << 10, 10: 300 << 10, 12: 600 << 10, 14: 700 << 10, 16: 1500 << 10}[self.cluster_bits] + 1536


GEOMETRIES = [
    Geometry(9),
    Geometry(9, "0.10"),
    Geometry(9, refcount_bits=64, backing="shorter"),
    Geometry(9, refcount_bits=1, backing="longer"),
    Geometry(9, snapshot=True),
    Geometry(9, "0.10", backing="longer", snapshot=True),
    Geometry(10, refcount_bits=8, snapshot=True, compressed=True),
    Geometry(10, refcount_bits=32, backing="shorter", compressed=True),
    Geometry(12, backing="longer"),
    Geometry(12, "0.10", backing="shorter"),
    Geometry(12, refcount_bits=2, backing="shorter", snapshot=True),
    Geometry(12, refcount_bits=4, compressed=True),
    Geometry(16),
    Geometry(16, "0.10", backing="longer"),
    Geometry(16, backing="shorter", snapshot=True, compressed=True),
    Geometry(14, extended=True),
    Geometry(14, extended=True, backing="longer", refcount_bits=1),
    Geometry(14, extended=True, backing="shorter", snapshot=True, compressed=True),
    Geometry(16, extended=True, backing="longer", snapshot=True),
]


@cache
def template(directory: Path, geometry: Geometry) -> tuple[Path, bytes]:
    """An image of *geometry* that is used already, and what is in it; it is in *directory*."""
    number = GEOMETRIES.index(geometry)
    path = directory / f"{number}.qcow2"
    size, cluster = geometry.size, 1 << geometry.cluster_bits
    options: dict[str, Any] = {"cluster_size": cluster, "compat": geometry.compat}
    if geometry.extended:
        options["extended_l2"] = "on"
    if geometry.compat != "0.10":
        options["refcount_bits"] = geometry.refcount_bits
    backing = None
    if geometry.backing:
        backing = path.with_suffix(".backing")
        length = size * 3 // 4 // 512 * 512 if geometry.backing == "shorter" else size * 5 // 4 // 512 * 512
        data = random.Random(number).randbytes(length // 2)
        backing.write_bytes(data.ljust(length - 512, b"\0") + b"e" * 512)
    create(path, size, backing=backing, backing_format="raw", **options)
    if geometry.compressed:
        io(path, *(f"write -c -P {16 + at} {at * 2 * cluster} {cluster}" for at in range(6)))
    io(path, f"write -P 1 {cluster + 700} {3 * cluster}", f"write -P 2 {size // 2} {cluster + 1}")
    if geometry.snapshot:
        run("qemu-img", "snapshot", "-c", "one", path)
        io(path, f"write -P 3 {2 * cluster} {cluster // 2}", f"write -P 4 {size - 3000} 1000")
    return path, content(path)


# --- the machine ---------------------------------------------------------------------------------

cluster_counts = st.integers(0, 12)
#: offsets and lengths near multiples of clusters, as (clusters, bytes more), and anywhere
near = st.tuples(cluster_counts, st.sampled_from([0, 0, 0, 1, -1, 512, -512, 77]))
anywhere = st.tuples(st.just(-1), st.integers(0, 1 << 20))
offsets = near | anywhere
lengths = st.tuples(st.integers(0, 5), st.sampled_from([0, 0, 0, 1, -1, 512, 300])) | st.tuples(
    st.just(0), st.integers(1, 2000)
)
seeds = st.integers(0, 2**32)


@dataclass
class Request:
    """Something done to a part of the disk."""

    kind: str
    offset: int
    length: int
    seed: int = 0


class ImageMachine(RuleBasedStateMachine):
    """``suspending`` says what is below: memory that suspends, or a file."""

    suspending = False
    directory: Path  #: for all images

    def __init__(self) -> None:
        super().__init__()
        self.loop = Loop()
        self.graph = Graph()
        self.root: Root | None = None

    @initialize(
        geometry=st.sampled_from(GEOMETRIES),
        caches=st.sampled_from([{}, {}, {"cache-size": 0}, {"l2-cache-entry-size": 512, "cache-size": 0}]),
        others=st.sampled_from(
            [
                {},
                {},
                {"overlap-check": "all"},
                {"overlap-check": "none"},
                {"discard-no-unref": True},
                {"discard": "ignore"},
            ]
        ),
        seed=seeds,
    )
    def start(self, geometry: Geometry, caches: dict[str, Any], others: dict[str, Any], seed: int) -> None:
        self.geometry = geometry
        self.cluster = 1 << geometry.cluster_bits
        self.options = {"discard": "unmap", **caches, **others}
        if geometry.compat == "0.10":
            self.options.pop("discard-no-unref", None)
        source, data = template(self.directory, geometry)
        self.model = bytearray(data)
        self.path = Path(tempfile.mkdtemp(dir=self.directory)) / "image"
        shutil.copy(source, self.path)
        self.loop(self._start, seed)

    async def _start(self, seed: int) -> None:
        if self.suspending:
            await self.graph.blockdev_add({"driver": "test-memory", "node-name": "memory", "size": 0})
            memory = memory_of(self.graph, "memory")
            memory.data[:] = self.path.read_bytes()
            memory.node.set_length(len(memory.data))
            await self.graph.blockdev_add(
                {"driver": "test-suspends", "node-name": "below", "file": "memory", "most": 3, "seed": seed}
            )
        await self._open()

    async def _open(self) -> None:
        # no power is cut here, so that the disk need not be waited for
        file: Any = {"driver": "file", "filename": str(self.path), "cache": {"no-flush": True}}
        if self.suspending:
            file = "below"
        await self.graph.blockdev_add({"driver": "qcow2", "node-name": "disk", "file": file, **self.options})
        self.root = root_of(self.graph, "disk", READ_WRITE | Perm.RESIZE)

    async def _close(self) -> None:
        assert self.root is not None
        await self.graph.detach_root(self.root)
        self.root = None
        await self.graph.blockdev_del("disk")
        assert not self.graph.close_failures
        if self.suspending:
            self.path.write_bytes(memory_of(self.graph, "memory").data)

    def _range(self, offset: tuple[int, int], length: tuple[int, int]) -> tuple[int, int]:
        """What the two drawn pairs mean for this image: (offset, length)."""
        clusters, more = offset
        start = more if clusters < 0 else clusters * self.cluster + more
        start %= max(len(self.model), 1)
        return start, max(0, min(length[0] * self.cluster + length[1], len(self.model) - start))

    # -- what is done ---------------------------------------------------------------------------

    async def _do(self, request: Request, model: bytearray) -> None:
        """Carry out *request*, in *model* too."""
        root, offset, length = self.root, request.offset, request.length
        assert root is not None
        if request.kind == "write":
            data = random.Random(request.seed).randbytes(length)
            model[offset : offset + length] = data
            await write(root, offset, data)
        elif request.kind in ("zero", "unmap"):
            model[offset : offset + length] = bytes(length)
            await root.pwrite_zeroes(offset, length, MAY_UNMAP if request.kind == "unmap" else 0)
        elif request.kind == "discard":
            self._discard_in(model, offset, length)
            await root.pdiscard(offset, length)
        elif request.kind == "read":
            expected = bytes(model[offset : offset + length])
            assert await read(root, offset, length) == expected
        else:
            await root.flush()

    def _discard_in(self, model: bytearray, offset: int, length: int) -> None:
        """Whole clusters read as zeroes after a discard."""
        if self.options["discard"] == "ignore" or (self.geometry.compat == "0.10" and self.geometry.backing):
            return
        end = offset + length
        start = -(-offset // self.cluster) * self.cluster
        if end < len(model):
            end = end // self.cluster * self.cluster
        if start < end:
            model[start:end] = bytes(end - start)

    kinds = st.sampled_from(["write", "write", "write", "zero", "unmap", "discard", "read", "flush"])

    @rule(kind=kinds, offset=offsets, length=lengths, seed=seeds)
    def request(self, kind: str, offset: tuple[int, int], length: tuple[int, int], seed: int) -> None:
        self.loop(self._do, Request(kind, *self._range(offset, length), seed), self.model)

    @rule(
        cuts=st.lists(offsets, min_size=1, max_size=7),
        kinds=st.lists(st.lists(kinds, min_size=1, max_size=4), min_size=8, max_size=8),
        seed=seeds,
    )
    def concurrent_requests(self, cuts: list[tuple[int, int]], kinds: list[list[str]], seed: int) -> None:
        """Tasks work on parts of the disk that do not overlap, but meet in the middle of clusters."""
        places = sorted({self._range(cut, (0, 0))[0] for cut in cuts} | {0, len(self.model)})
        self.loop(self._concurrently, places, kinds, random.Random(seed))

    async def _concurrently(self, places: list[int], kinds: list[list[str]], rng: random.Random) -> None:
        async def work(requests: list[Request]) -> None:
            for request in requests:
                await self._do(request, self.model)

        async with trio.open_nursery() as nursery:
            for (start, end), mine in zip(itertools.pairwise(places), kinds, strict=False):
                requests = []
                for kind in mine:
                    # near one of the ends mostly: that is where neighbours are
                    length = min(end - start, rng.choice([1, 100, 512, self.cluster, 3 * self.cluster]))
                    offset = rng.choice([start, end - length, rng.randint(start, end - length)])
                    requests.append(Request(kind, offset, length, rng.randrange(2**32)))
                nursery.start_soon(work, requests)

    @rule(kind=kinds, offset=offsets, length=lengths, seed=seeds, patience=st.integers(0, 12))
    def cancelled_request(
        self, kind: str, offset: tuple[int, int], length: tuple[int, int], seed: int, patience: int
    ) -> None:
        self.loop(self._cancelled, Request(kind, *self._range(offset, length), seed), patience)

    async def _cancelled(self, request: Request, patience: int) -> None:
        """Each byte is the old one or the new one then."""
        new = bytearray(self.model)
        done = False

        async def work() -> None:
            nonlocal done
            await self._do(request, new)
            done = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            for _ in range(patience):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert self.root is not None
        found = await read(self.root, 0, len(new))
        assert found == new if done else all(f in (o, n) for f, o, n in zip(found, self.model, new, strict=True))
        self.model[:] = found

    @rule(size=offsets)
    def resize(self, size: tuple[int, int]) -> None:
        clusters, more = size
        new = (more if clusters < 0 else clusters * self.cluster + more) // 512 * 512
        self.loop(self._resize, min(max(new, 0), self.geometry.size * 2))

    async def _resize(self, size: int) -> None:
        assert self.root is not None
        try:
            await self.root.truncate(size)
        except BlockIOError:
            assert self.geometry.compat == "0.10"
            assert self.geometry.snapshot or self.geometry.backing  # which would show behind the old end
            return
        assert self.root.length == size
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    @rule(offset=offsets)
    def status(self, offset: tuple[int, int]) -> None:
        self.loop(self._status, self._range(offset, (0, 0))[0])

    async def _status(self, offset: int) -> None:
        """What is said to be zero is."""
        assert self.root is not None
        while offset < len(self.model):
            status = await block_status_above(self.root.node, offset, len(self.model) - offset)
            assert status.length > 0
            if status.flags & Status.ZERO:
                assert not any(self.model[offset : offset + status.length])
            offset += status.length

    @rule()
    def reopen(self) -> None:
        self.loop(self._reopen)

    async def _reopen(self) -> None:
        await self._close()
        await self._open()
        await self._do(Request("read", 0, len(self.model)), self.model)

    def teardown(self) -> None:
        try:
            if self.root is not None:
                self.loop(self._finish)
                check_image(self.path)
                assert content(self.path) == self.model
        finally:
            self.loop(self.graph.close)
            self.loop.close()
        if hasattr(self, "path"):
            shutil.rmtree(self.path.parent)

    async def _finish(self) -> None:
        await self._do(Request("read", 0, len(self.model)), self.model)
        await self._close()


class SuspendingImageMachine(ImageMachine):
    suspending = True


@pytest.mark.parametrize("machine", [ImageMachine, SuspendingImageMachine], ids=["file", "suspending-memory"])
def test_an_image_contains_what_the_model_does(machine: type[ImageMachine], tmp_path: Path) -> None:
    machine.directory = tmp_path
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=120,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # shrinking what fails takes minutes: add Phase.shrink when that is wanted
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("cluster_bits", [12, 16])
async def test_a_zero_write_takes_nothing_from_a_neighbour_in_the_same_cluster(
    tmp_path: Path, cluster_bits: int
) -> None:
    """The cluster may get its first data after it was found to be empty."""
    half = 1 << cluster_bits >> 1
    image = create(tmp_path / "image", 1 << 20, cluster_size=2 * half).read_bytes()
    for seed in range(30):
        graph = Graph()
        await graph.blockdev_add({"driver": "test-memory", "node-name": "memory", "size": 0})
        memory = memory_of(graph, "memory")
        memory.data[:] = image
        memory.node.set_length(len(image))
        below = {"driver": "test-suspends", "file": "memory", "most": 4, "seed": seed}
        await graph.blockdev_add({"driver": "qcow2", "node-name": "disk", "file": below})
        root = root_of(graph, "disk")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, root, 0, b"x" * half)
            nursery.start_soon(root.pwrite_zeroes, half, half)
        assert await read(root, 0, 2 * half) == b"x" * half + bytes(half)
        await graph.close()
