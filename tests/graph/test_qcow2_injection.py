"""Errors injected by blkdebug at each event that qcow2 announces, once and until they are taken away, at all work.

The request that meets one fails; the image has no errors then, if the daemon dies, and none later; and once the fault
is gone the request succeeds, and so does all that follows.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from images import check_image, content, io, is_dirty
from support import READ_WRITE, recorder_of, root_of
from test_qcow2_events import (
    K,
    Step,
    backed,
    block_full,
    compressed,
    discards,
    flushes,
    reads,
    resizes,
    shared,
    small,
    table_full,
    writes,
    zeroes,
)

from fusebd.block.child import COMPRESSED, MAY_UNMAP
from fusebd.block.debugevents import EDGE_EVENTS, EVENTS
from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.block.snapshots import find, store_of
from fusebd.drivers.blkdebug import Blkdebug
from fusebd.drivers.blkdebug.rules import InjectErrorOptions
from fusebd.errors import BlockIOError, FusebdError

# --- work ----------------------------------------------------------------------------------------


class Snapshots:
    """Steps that make, delete and return to snapshots."""

    def __init__(self) -> None:
        self.states: dict[str, bytes] = {}

    def takes(self, name: str) -> Step:
        async def step(root: Root, model: bytearray) -> None:
            self.states[name] = bytes(model)
            await _store(root).create(name, 0)

        return step

    def returns_to(self, name: str) -> Step:
        async def step(root: Root, model: bytearray) -> None:
            store = _store(root)
            found = find(store.entries, None, name)
            assert found is not None
            await store.apply(found)
            model[:] = self.states[name]

        return step

    def deletes(self, name: str) -> Step:
        async def step(root: Root, model: bytearray) -> None:
            store = _store(root)
            found = find(store.entries, None, name)
            if found is not None:  # it may be gone though the request failed
                await store.delete(found)

        return step


def _store(root: Root) -> Any:
    store = store_of(root.node)
    assert store is not None
    return store


def snapshot_work() -> Iterator[Step]:
    snapshots = Snapshots()
    yield snapshots.takes("one")
    yield writes(3 * K, 20 * K)
    yield snapshots.takes("two")
    yield discards(16 * K, 16 * K)
    yield snapshots.returns_to("one")
    yield writes(0, 40 * K)
    yield snapshots.deletes("one")
    yield writes(1 * K, 2 * K)
    yield flushes
    yield snapshots.returns_to("two")
    yield snapshots.deletes("two")


def compresses(offset: int, letter: bytes) -> Step:
    """A write of a cluster of 512 bytes that has no place yet, or had none when it was tried first."""

    async def step(root: Root, model: bytearray) -> None:
        model[offset : offset + 512] = letter * 512
        await root.pwritev(offset, (memoryview(letter * 512),), COMPRESSED)

    return step


@dataclass(frozen=True)
class Workload:
    """Steps on an image."""

    image: Callable[[Path], None]
    steps: Callable[[], Iterator[Step]]


def fixed(*steps: Step) -> Callable[[], Iterator[Step]]:
    return lambda: iter(steps)


WORKLOADS = {
    "write": Workload(small, fixed(writes(1 * K, 700), writes(20 * K, 9 * K), reads(0, 64 * K), writes(1 * K, 100))),
    "write over a backing file": Workload(backed, fixed(writes(K, 512), writes(200 * K, 90 * K), reads(0, 1024 * K))),
    "write over compressed clusters": Workload(
        compressed, fixed(writes(512, 512), flushes, writes(64 * K, 64 * K), flushes, reads(0, 1024 * K))
    ),
    "write compressed": Workload(
        small,
        fixed(
            *(compresses(8 * K + 512 * number, b"%c" % (97 + number)) for number in range(20)),
            flushes,
            discards(8 * K, 4 * K),
            flushes,
            compresses(9 * K, b"z"),
            writes(9 * K, 30),
            compresses(10 * K, b"y"),
        ),
    ),
    "write to a snapshot's clusters": Workload(shared, fixed(writes(0, 512), writes(70 * K, 60 * K))),
    "write until there is no refcount": Workload(block_full, fixed(writes(20 * K, 90 * K), flushes, writes(0, 512))),
    "write until the refcount table is full": Workload(table_full, fixed(writes(1980 * K, 20 * K), flushes)),
    "discard": Workload(
        small,
        fixed(discards(0, 512), writes(4 * K, 4 * K), discards(4 * K, 2 * K), flushes, zeroes(6 * K, 600, MAY_UNMAP)),
    ),
    "discard compressed clusters": Workload(
        compressed, fixed(discards(0, 64 * K), flushes, zeroes(64 * K, 64 * K), flushes, writes(0, 64 * K))
    ),
    "snapshot": Workload(small, snapshot_work),
    "resize": Workload(
        small,
        fixed(
            resizes(4096 * K), writes(3000 * K, 9 * K), resizes(16 * K), flushes, resizes(64 * K), writes(30 * K, 512)
        ),
    ),
    "flush": Workload(
        small, fixed(writes(0, 512), flushes, writes(40 * K, 5 * K), flushes, discards(40 * K, 512), flushes, flushes)
    ),
}

#: the events that qcow2 announces in QEMU, and the edge to its file does for it: no other driver has more
ANNOUNCED = frozenset(EVENTS) - EDGE_EVENTS - {"cor_write", "refblock_update", "none"}
#: those that belong to what fusebd's qcow2 does not do
NOT_DONE = {
    "the state of a virtual machine": {"vmstate_load", "vmstate_save"},
    "emptying an image after a commit": {"empty_image_prepare", "reftable_update"},
}
AT_OPEN = "reftable_load"


# --- images, opened ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Path], None]], tuple[Path, bytes]]:
    """An image as one of the functions makes it, and what is in it."""
    directory = tmp_path_factory.mktemp("images")

    @cache
    def image(make: Callable[[Path], None]) -> tuple[Path, bytes]:
        path = directory / f"{make.__name__}.qcow2"
        make(path)
        return path, content(path)

    return image


Images = Callable[[Callable[[Path], None]], tuple[Path, bytes]]


async def open_image(graph: Graph, path: Path, below: dict[str, Any]) -> Root:
    """A way in to a qcow2 node over the filter *below*, with caches that are too small for anything."""
    # no power is cut here, so that the disk need not be waited for
    file = {"driver": "file", "filename": str(path), "cache": {"no-flush": True}}
    child = "image" if below["driver"] == "blkdebug" else "file"
    await graph.blockdev_add({**below, "node-name": "filter", child: file})
    options = {"discard": "unmap", "cache-size": 0}
    await graph.blockdev_add({"driver": "qcow2", "node-name": "disk", "file": "filter", **options})
    return root_of(graph, "disk", READ_WRITE | Perm.RESIZE)


async def events_of(workload: Workload, path: Path, model: bytearray) -> frozenset[str]:
    """What *workload* announces, and the opening and closing of the image."""
    graph = Graph()
    root = await open_image(graph, path, {"driver": "test-recorder"})
    events = recorder_of(graph, "filter").events
    for step in (*workload.steps(), flushes):
        await step(root, model)
    await graph.close()
    return ANNOUNCED & set(events)


async def test_every_event_that_qcow2_announces_is_met(images: Images, tmp_path: Path) -> None:
    met: frozenset[str] = frozenset()
    for workload in WORKLOADS.values():
        source, data = images(workload.image)
        path = Path(shutil.copy(source, tmp_path / "image"))
        model = bytearray(data)
        met |= await events_of(workload, path, model)
        check_image(path)
        assert content(path) == model
    assert met == ANNOUNCED - set().union(*NOT_DONE.values())


# --- faults --------------------------------------------------------------------------------------

#: how often, and with what
FAULTS = [(once, code) for once in (True, False) for code in (errno.EIO, errno.ENOSPC)]
faults = pytest.mark.parametrize(
    ("once", "code"), FAULTS, ids=[f"{'once' if once else 'on'}-{errno.errorcode[code]}" for once, code in FAULTS]
)


@dataclass
class Fault:
    """A rule of the blkdebug node below the image."""

    graph: Graph
    event: str
    once: bool
    code: int

    def __post_init__(self) -> None:
        driver = self.graph.find("filter").driver
        assert isinstance(driver, Blkdebug)
        self.driver = driver
        options = InjectErrorOptions(event=self.event, errno=self.code, once=self.once)  # type: ignore[arg-type]
        self.rule = driver.add_rule(options)

    @property
    def only_discards(self) -> bool:
        """Whether no request failed but those by which the file may forget what was freed."""
        entries = [entry for entry in self.graph.ledger if entry["kind"] == "fault"]
        return all(entry["operation"] == "discard" for entry in entries)

    def end(self) -> None:
        if self.rule in self.driver.list_rules():
            self.driver.remove_rule(self.rule.id)


async def failure_of(step: Step, root: Root, model: bytearray) -> int | None:
    """The errno with which *step* fails, if it does."""
    try:
        await step(root, model)
    except FusebdError as error:
        return error.errno
    return None


def check_when_opened(path: Path) -> None:
    """AssertionError if the image at *path*, as it is now, has errors; if it is dirty: when QEMU has repaired it."""
    copy = Path(shutil.copy(path, path.with_name("copy")))
    if is_dirty(copy):
        io(copy, "read 0 512", options=("-t", "unsafe"))
    check_image(copy, leaks=True)


@faults
@pytest.mark.parametrize("name", WORKLOADS)
async def test_work_goes_on_when_a_fault_is_gone(
    images: Images, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, once: bool, code: int
) -> None:
    workload = WORKLOADS[name]
    source, data = images(workload.image)
    events = await events_of(workload, Path(shutil.copy(source, tmp_path / "image")), bytearray(data))
    for event in sorted(events - {AT_OPEN}):
        path = Path(shutil.copy(source, tmp_path / "image"))
        model = bytearray(data)
        graph = Graph()
        root = await open_image(graph, path, {"driver": "blkdebug"})
        fault, failed = Fault(graph, event, once, code), False
        for step in (*workload.steps(), flushes, reads(0, 1 << 20)):
            found = await failure_of(step, root, model)
            if found is None:
                continue
            assert found == code, event
            assert not failed or not once, f"{event}: a second failure"
            failed = True
            check_when_opened(path)
            if not once:
                again = await failure_of(step, root, model)
                assert again in (None, code), event
                fault.end()
            assert await failure_of(step, root, model) is None, event
        # What is freed is freed after the request, so that it only leaks.
        assert failed or fault.only_discards or "qcow2_free_clusters failed" in caplog.text, f"{event}: nothing failed"
        caplog.clear()
        fault.end()
        await graph.close()
        assert not graph.close_failures
        check_when_opened(path)
        # What a change of snapshots had done could not be undone before the fault was gone.
        assert not is_dirty(path) or (name == "snapshot" and not once), event
        assert content(path) == model, event


@pytest.mark.parametrize("changed_again", [False, True])
async def test_a_failed_snapshot_leaves_no_dirty_image(images: Images, tmp_path: Path, changed_again: bool) -> None:
    path = Path(shutil.copy(images(small)[0], tmp_path / "image"))
    graph = Graph()
    root = await open_image(graph, path, {"driver": "blkdebug"})
    fault = Fault(graph, "cluster_alloc", False, errno.EIO)
    with pytest.raises(BlockIOError):
        await Snapshots().takes("one")(root, bytearray())
    assert is_dirty(path)  # it could not say that all is as it was
    fault.end()
    if changed_again:
        await Snapshots().takes("two")(root, bytearray())
        assert not is_dirty(path)
    await graph.close()
    assert not is_dirty(path)
    check_image(path)


@faults
async def test_an_image_opens_when_its_fault_is_gone(images: Images, tmp_path: Path, once: bool, code: int) -> None:
    path = Path(shutil.copy(images(small)[0], tmp_path / "image"))
    graph = Graph()
    rule = {"event": AT_OPEN, "errno": code, "once": once}
    for _ in range(2):
        with pytest.raises(BlockIOError, match=os.strerror(code)):
            await open_image(graph, path, {"driver": "blkdebug", "inject-error": [rule]})
        await graph.close()
    await open_image(graph, path, {"driver": "blkdebug"})
    await graph.close()
    check_image(path)
