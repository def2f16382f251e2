"""What every driver owes its callers, whatever it drives: one suite over all that are registered.

Drivers with children stand on memory that never suspends, and on memory that always does.  A new driver needs
an entry in RECIPES.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support import READ_WRITE, Suspends, memory_of, read, root_of, write

from fusebd.block.blockstatus import block_status
from fusebd.block.driver import driver_class, driver_names
from fusebd.block.graph import Graph
from fusebd.block.options import tree_from_dotted
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.block.status import Status
from fusebd.errors import BlockIOError, ReadOnlyError

LENGTH = 1 << 20
ALL = READ_WRITE | Perm.RESIZE


def blank(path: Path) -> bytes:
    return bytes(LENGTH)


def blank_qcow2(path: Path) -> bytes:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", str(path / "blank"), str(LENGTH)],
        check=True,
    )
    return (path / "blank").read_bytes()


@cache
def zeroed_luks() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        luks, secret = f"{directory}/luks", ["--object", "secret,id=key,data=x"]
        made = ["qemu-img", "create", "-q", *secret, "-f", "luks", "-o", "key-secret=key,iter-time=10"]
        # qemu-img may fail to measure how long a password takes
        while subprocess.run([*made, luks, str(LENGTH)], check=False).returncode:
            pass
        zeroes = ["--image-opts", f"driver=luks,file.filename={luks},key-secret=key", "-c", f"write -P 0 0 {LENGTH}"]
        subprocess.run(["qemu-io", *secret, *zeroes], check=True, stdout=subprocess.DEVNULL)
        return Path(luks).read_bytes()


def plain_file(path: Path) -> dict[str, Any]:
    (path / "disk").write_bytes(bytes(LENGTH))
    return {"filename": str(path / "disk")}


def loop_device(path: Path) -> dict[str, Any]:
    (path / "disk").write_bytes(bytes(LENGTH))
    made = subprocess.run(
        ["losetup", "--find", "--show", str(path / "disk")], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    return {"filename": made.stdout.strip()}


@dataclass(frozen=True)
class Recipe:
    """How to build a node of LENGTH bytes of zeroes: over memory nodes with *content*, or from *options* alone."""

    children: tuple[str, ...] = ()
    content: Callable[[Path], bytes] = blank
    options: Callable[[Path], dict[str, Any]] = lambda path: {}
    stores: bool = True  #: what was written can be read
    objects: tuple[dict[str, Any], ...] = ()  #: what the options refer to beside nodes
    suspends: bool = False  #: on its own account: the host, or by design
    undo: Callable[[dict[str, Any]], None] = field(default=lambda options: None)


def detach_loop(options: dict[str, Any]) -> None:
    subprocess.run(["losetup", "--detach", options["filename"]], check=True)


RECIPES = {
    "blkdebug": Recipe(("image",)),
    "blklogwrites": Recipe(("file", "log")),
    "blkverify": Recipe(("test", "raw")),
    "fault": Recipe(("file",)),
    "file": Recipe(options=plain_file, suspends=True),
    "host_device": Recipe(options=loop_device, suspends=True, undo=detach_loop),
    "luks": Recipe(
        ("file",),
        content=lambda path: zeroed_luks(),
        options=lambda path: {"key-secret": "key"},
        objects=({"qom-type": "secret", "id": "key", "data": "x"},),
        suspends=True,
    ),
    "null-aio": Recipe(options=lambda path: {"size": LENGTH}, stores=False, suspends=True),
    "null-co": Recipe(options=lambda path: {"size": LENGTH}, stores=False),
    "qcow2": Recipe(("file",), content=blank_qcow2),
    "quorum": Recipe(
        ("children.0", "children.1", "children.2"),
        options=lambda path: {"vote-threshold": 2, "rewrite-corrupted": True},
    ),
    "raw": Recipe(("file",)),
    "test-memory": Recipe(options=lambda path: {"size": LENGTH}),
    "test-recorder": Recipe(("file",)),
    "test-suspends": Recipe(("file",), suspends=True),
    "throttle": Recipe(
        ("file",),
        options=lambda path: {"throttle-group": "group"},
        # limits that nothing here reaches
        objects=({"qom-type": "throttle-group", "id": "group", "limits": {"iops-total": 10**9, "bps-total": 10**12}},),
    ),
    "volatile-cache": Recipe(("file",)),
}
#: drivers that only show what is in an image: nothing can be written to them
READ_ONLY = frozenset({"internal-snapshot", "qed", "vdi", "vhdx", "vmdk", "vpc"})
#: a driver by which nothing can be written twice
WRITES_ONCE = frozenset({"compress"})
NAMES = [name for name in driver_names() if name not in READ_ONLY | WRITES_ONCE]


class Stack:
    """A driver under test as node ``top``, in a graph of its own."""

    def __init__(self, graph: Graph, path: Path, name: str, suspending: bool) -> None:
        if name not in RECIPES:
            pytest.fail(f"driver {name} has no entry in RECIPES")
        self.graph, self.path, self.name, self.suspending = graph, path, name, suspending
        self.recipe = RECIPES[name]
        self._given: dict[str, Any] | None = None

    async def add(self, **more: Any) -> None:
        """Build the stack; *more* are options of the top node."""
        options: dict[str, Any] = {"driver": self.name, "node-name": "top", "discard": "unmap", **more}
        for described in self.recipe.objects:
            await self.graph.objects.add(described)
        for child in self.recipe.children:
            content = self.recipe.content(self.path)
            await self.graph.blockdev_add({"driver": "test-memory", "node-name": f"{child}-memory", "size": 4096})
            memory = memory_of(self.graph, f"{child}-memory")
            memory.data[:] = content
            memory.node.set_length(len(content))
            options[child] = f"{child}-memory"
            if self.suspending:
                await self.graph.blockdev_add(
                    {"driver": "test-suspends", "node-name": f"{child}-suspends", "file": f"{child}-memory"}
                )
                options[child] = f"{child}-suspends"
        self._given = self.recipe.options(self.path)
        await self.graph.blockdev_add(tree_from_dotted({**options, **self._given}))

    async def root(self, perm: Perm = READ_WRITE) -> Root:
        await self.add()
        return root_of(self.graph, "top", perm)

    def undo(self) -> None:
        if self._given is not None:
            self.recipe.undo(self._given)

    def written(self, data: bytes) -> bytes:
        """What is read where *data* was written."""
        return data if self.recipe.stores else bytes(len(data))


def over_both() -> Iterator[Any]:
    for name in NAMES:
        yield pytest.param(name, False, id=name)
        if name in RECIPES and RECIPES[name].children:
            yield pytest.param(name, True, id=f"{name}-over-suspending")


@pytest.fixture
async def stack(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stack]:
    name, suspending = request.param
    graph = Graph()
    stack = Stack(graph, tmp_path, name, suspending)
    try:
        yield stack
    finally:
        await graph.close()
        stack.undo()


every_driver = pytest.mark.parametrize("stack", [pytest.param(p.values, id=p.id) for p in over_both()], indirect=True)

RANGES = ((0, 512), (0, 1), (511, 2), (4095, 4098), (70000, 65536), (LENGTH - 1, 1), (LENGTH - 4096, 4096), (12345, 0))


def pattern(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


@every_driver
async def test_the_length_is_the_one_that_was_given(stack: Stack) -> None:
    root = await stack.root()
    assert root.length == root.node.driver.length == LENGTH


@every_driver
async def test_a_new_node_reads_as_zeroes(stack: Stack) -> None:
    root = await stack.root()
    assert await read(root, 0, LENGTH) == bytes(LENGTH)


@every_driver
async def test_what_was_written_is_read_at_any_offset(stack: Stack) -> None:
    root = await stack.root()
    model = bytearray(LENGTH)
    for seed, (offset, length) in enumerate(RANGES):
        data = pattern(seed, length)
        await write(root, offset, data)
        model[offset : offset + length] = stack.written(data)
        start, end = max(offset - 700, 0), min(offset + length + 700, LENGTH)
        assert await read(root, start, end - start) == model[start:end]
    assert await read(root, 0, LENGTH) == model


@every_driver
async def test_requests_may_consist_of_several_buffers(stack: Stack) -> None:
    root = await stack.root()
    data = pattern(1, 20000)
    cuts = [0, 1, 1, 513, 4096, 4097, 19999, 20000]
    pieces = [memoryview(data)[a:b] for a, b in itertools.pairwise(cuts)]
    await root.pwritev(3000, pieces)
    found = bytearray(b"\xff" * 20000)
    cuts = [0, 7000, 7001, 15000, 20000]
    await root.preadv(3000, [memoryview(found)[a:b] for a, b in itertools.pairwise(cuts)])
    assert found == stack.written(data)


@every_driver
async def test_an_edge_reads_zeroes_past_the_end(stack: Stack) -> None:
    root = await stack.root(ALL)
    data = pattern(2, 100)
    await write(root, LENGTH - 100, data)
    await stack.graph.detach_root(root)
    above = await stack.graph.blockdev_add({"driver": "test-suspends", "node-name": "above", "file": "top"})
    assert isinstance(above.driver, Suspends)
    found = bytearray(b"\xff" * 5000)
    await above.driver.file.preadv(LENGTH - 100, (memoryview(found)[:150], memoryview(found)[150:]))
    assert found == stack.written(data) + bytes(4900)


@every_driver
async def test_a_root_refuses_what_is_past_the_end(stack: Stack) -> None:
    root = await stack.root()
    for request in (read(root, LENGTH - 1, 2), read(root, LENGTH, 1), write(root, LENGTH - 1, b"ab")):
        with pytest.raises(BlockIOError):
            await request
    assert root.length == LENGTH


@every_driver
async def test_a_flush_after_writes_succeeds(stack: Stack) -> None:
    root = await stack.root()
    await root.flush()
    await write(root, 1000, b"data")
    await root.flush()
    await root.flush()
    assert await read(root, 1000, 4) == stack.written(b"data")


@every_driver
@pytest.mark.parametrize(("offset", "length"), [(0, LENGTH), (65536, 131072), (1000, 1), (4000, 70001)])
async def test_a_zero_write_zeroes_its_range_and_no_more(stack: Stack, offset: int, length: int) -> None:
    root = await stack.root()
    data = pattern(3, LENGTH)
    await write(root, 0, data)
    await root.pwrite_zeroes(offset, length)
    model = bytearray(stack.written(data))
    model[offset : offset + length] = bytes(length)
    assert await read(root, 0, LENGTH) == model


@every_driver
async def test_a_discard_touches_nothing_outside_its_range(stack: Stack) -> None:
    root = await stack.root()
    data = pattern(4, LENGTH)
    await write(root, 0, data)
    await root.pdiscard(5000, 200000)
    data = stack.written(data)
    assert await read(root, 0, 5000) == data[:5000]
    assert await read(root, 205000, LENGTH - 205000) == data[205000:]
    assert root.length == LENGTH


@every_driver
async def test_truncate_changes_the_length_or_is_not_supported(stack: Stack) -> None:
    root = await stack.root(ALL)
    data = pattern(5, LENGTH)
    await write(root, 0, data)
    try:
        await root.truncate(LENGTH + 65536)
        await root.truncate(LENGTH // 2)
        await root.truncate(LENGTH)
    except BlockIOError:
        assert root.length == LENGTH
        assert await read(root, 0, LENGTH) == stack.written(data)
        return
    assert root.length == LENGTH
    assert await read(root, 0, LENGTH) == stack.written(data)[: LENGTH // 2] + bytes(LENGTH // 2)


@every_driver
async def test_block_status_covers_the_node_and_says_zero_only_of_zeroes(stack: Stack) -> None:
    root = await stack.root()
    await write(root, 300000, pattern(6, 100000))
    at = 0
    while at < LENGTH:
        status = await block_status(root.node, at, LENGTH - at)
        assert 0 < status.length <= LENGTH - at
        if status.flags & Status.ZERO:
            assert await read(root, at, status.length) == bytes(status.length)
        at += status.length
    assert status.flags & Status.EOF


@every_driver
async def test_a_read_only_node_has_no_writers(stack: Stack) -> None:
    await stack.add(**{"read-only": True})
    with pytest.raises(ReadOnlyError):
        root_of(stack.graph, "top", READ_WRITE)
    assert await read(root_of(stack.graph, "top", Perm.CONSISTENT_READ), 0, 4096) == bytes(4096)


@every_driver
async def test_closing_leaves_no_descriptors_and_no_nodes(stack: Stack) -> None:
    # what the first use of a worker thread opens stays, and is none of the driver's
    await trio.to_thread.run_sync(os.getpid)
    before = os.listdir("/proc/self/fd")
    root = await stack.root()
    await write(root, 0, b"data")
    await stack.graph.detach_root(root)
    await stack.graph.blockdev_del("top")
    await stack.graph.close()
    assert stack.graph.nodes == {}
    assert sorted(os.listdir("/proc/self/fd")) == sorted(before)


@pytest.mark.parametrize(
    "stack", [pytest.param((n, False), id=n) for n in NAMES if n in RECIPES and not RECIPES[n].suspends], indirect=True
)
async def test_nothing_suspends_over_children_that_do_not(stack: Stack) -> None:
    root = await stack.root()
    with trio.testing.assert_no_checkpoints():
        await write(root, 3000, pattern(7, 10000))
        found = await read(root, 0, 65536)
        await root.pwrite_zeroes(4096, 4096)
        await root.pdiscard(8192, 4096)
        await block_status(root.node, 0, LENGTH)
        await root.flush()
    assert found[3000:13000] == stack.written(pattern(7, 10000))


@every_driver
async def test_many_requests_at_once_do_not_mix(stack: Stack) -> None:
    root = await stack.root()

    async def client(number: int) -> None:
        # areas are neither aligned nor apart, so that neighbours share clusters and sectors
        offset, rng = number * 15001, random.Random(number)
        model = bytearray(15001)
        for _ in range(8):
            at, length = rng.randrange(14000), rng.randrange(1, 1001)
            data = rng.randbytes(length)
            await write(root, offset + at, data)
            model[at : at + length] = stack.written(data)
            assert await read(root, offset, 15001) == model

    async with trio.open_nursery() as nursery:
        for number in range(64):
            nursery.start_soon(client, number)
    assert root.in_flight == 0


@every_driver
async def test_a_cancelled_request_leaves_the_node_usable(stack: Stack) -> None:
    root = await stack.root()
    await write(root, 0, b"before")
    with trio.CancelScope() as scope:
        scope.cancel()
        await read(root, 0, 4096)
        await write(root, 0, b"before")
    await write(root, 6, b"after")
    assert root.in_flight == 0
    assert await read(root, 0, 11) == stack.written(b"beforeafter")


def test_every_driver_has_a_recipe() -> None:
    assert set(NAMES) - set(RECIPES) == set()
    assert all(driver_class(name).name == name for name in NAMES)
