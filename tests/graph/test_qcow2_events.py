"""The blkdebug events of qcow2: which operation announces what, and what an error injected at each of them leaves."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from images import after_power_cut, check_image, content, create, io
from mounting import run
from support import READ_WRITE, read, recorder_of, root_of, write

from fusebd.block.child import MAY_UNMAP
from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.errors import BlockIOError

K = 1024
Step = Callable[[Root, bytearray], Awaitable[None]]


def writes(offset: int, length: int) -> Step:
    async def step(root: Root, model: bytearray) -> None:
        model[offset : offset + length] = b"w" * length
        await write(root, offset, b"w" * length)

    return step


def zeroes(offset: int, length: int, flags: int = 0) -> Step:
    async def step(root: Root, model: bytearray) -> None:
        model[offset : offset + length] = bytes(length)
        await root.pwrite_zeroes(offset, length, flags)

    return step


def discards(offset: int, length: int) -> Step:
    async def step(root: Root, model: bytearray) -> None:
        model[offset : offset + length] = bytes(length)
        await root.pdiscard(offset, length)

    return step


def reads(offset: int, length: int) -> Step:
    async def step(root: Root, model: bytearray) -> None:
        expected = model[offset : offset + length]
        assert await read(root, offset, len(expected)) == expected

    return step


def resizes(length: int) -> Step:
    async def step(root: Root, model: bytearray) -> None:
        del model[length:]
        model.extend(bytes(length - len(model)))
        await root.truncate(length)

    return step


async def flushes(root: Root, model: bytearray) -> None:
    await root.flush()


# --- images --------------------------------------------------------------------------------------


def empty(path: Path) -> None:
    create(path, "1M")


def used(path: Path) -> None:
    create(path, "1M")
    io(path, "write -P 1 512k 64k")


def backed(path: Path) -> None:
    path.with_suffix(".raw").write_bytes(b"b" * (1 << 20))
    create(path, "1M", backing=path.with_suffix(".raw"), backing_format="raw")
    io(path, "write -P 1 512k 64k")


def compressed(path: Path) -> None:
    create(path, "1M")
    io(path, "write -c -P 1 0 64k", "write -c -P 2 64k 64k", "write -P 3 512k 64k")


def shared(path: Path) -> None:
    create(path, "1M")
    io(path, "write -P 1 0 64k")
    run("qemu-img", "snapshot", "-c", "one", path)


def small(path: Path) -> None:
    create(path, "64k", cluster_size=512)
    io(path, "write -P 1 0 512", "write -P 2 33k 512")


def block_full(path: Path) -> None:
    """The first refcount block, of 64 clusters, is nearly used up."""
    create(path, "4M", cluster_size=512, refcount_bits=64)
    io(path, "write -P 1 0 20k")


def table_full(path: Path) -> None:
    """The refcount table, one cluster, covers the 4096 clusters of the file and few more."""
    create(path, "4M", cluster_size=512, refcount_bits=64)
    io(path, "write -P 1 0 1980k")


@dataclass(frozen=True)
class Operation:
    """Steps on an image.

    ``announces`` is what our driver announces, in this order, after the image was opened, not counting what any edge
    does (pwritev and its like); ``qemu`` what QEMU 10.0.2 announces there, where it is in another order or different.
    """

    image: Callable[[Path], None]
    steps: tuple[Step, ...]
    announces: str
    qemu: str = ""


_ALLOCATE = "cluster_alloc refblock_alloc refblock_load"
_NEW_TABLE = f"{_ALLOCATE} refblock_update_part l2_alloc_write l2_update l1_update"
_NEW_BLOCK = (
    "refblock_alloc refblock_alloc refblock_load refblock_update_part refblock_alloc_write refblock_update_part"
    " refblock_alloc_hookup refblock_alloc refblock_load"
)
OPERATIONS = {
    "first write into an empty image": Operation(
        empty, (writes(64 * K, 512),), f"{_NEW_TABLE} {_ALLOCATE} cluster_alloc_space write_aio"
    ),
    "second write": Operation(used, (writes(0, 512),), f"l2_load {_ALLOCATE} cluster_alloc_space write_aio"),
    "write of a whole cluster": Operation(used, (writes(0, 64 * K),), f"l2_load {_ALLOCATE} write_aio"),
    "write in place": Operation(used, (writes(512 * K, 512),), "l2_load write_aio"),
    "read": Operation(used, (reads(512 * K, 512),), "l2_load read_aio"),
    "read of nothing": Operation(used, (reads(0, 512),), "l2_load"),
    "read from backing": Operation(backed, (reads(0, 512),), "l2_load read_backing_aio"),
    "copy on write": Operation(
        backed, (writes(K, 512),), f"l2_load {_ALLOCATE} cow_read read_backing_aio write_aio cow_write"
    ),
    "copy on write far apart": Operation(
        backed,
        (writes(512, 120 * K),),
        f"l2_load {_ALLOCATE} cow_read read_backing_aio cow_read read_backing_aio write_aio cow_write",
    ),
    "compressed read": Operation(compressed, (reads(0, 64 * K),), "l2_load read_compressed"),
    "write over compressed": Operation(
        compressed,
        (writes(512, 512), flushes),
        f"l2_load {_ALLOCATE} cow_read read_compressed write_aio cow_write cluster_free"
        " flush_to_os refblock_update_part l2_update flush_to_disk refblock_alloc refblock_load",
        qemu=f"l2_load {_ALLOCATE} cow_read read_compressed write_aio cow_write cluster_free refblock_update_part"
        " refblock_alloc refblock_load flush_to_os refblock_update_part l2_update flush_to_disk",
    ),
    "write into a snapshot's cluster": Operation(
        shared,
        (writes(0, 512),),
        f"{_ALLOCATE} refblock_update_part l2_alloc_cow_read l2_load l2_alloc_write l2_update l1_update cluster_free"
        f" {_ALLOCATE} cow_read read_aio write_aio cow_write cluster_free",
    ),
    "discard": Operation(
        used,
        (discards(512 * K, 64 * K), flushes),
        "l2_load cluster_free flush_to_os l2_update flush_to_disk refblock_alloc refblock_load",
        qemu="l2_load cluster_free refblock_alloc refblock_load flush_to_os l2_update refblock_update_part"
        " flush_to_disk",
    ),
    "zero write": Operation(used, (zeroes(512 * K, 64 * K), flushes), "l2_load flush_to_os l2_update flush_to_disk"),
    "zero write that unmaps": Operation(
        used,
        (zeroes(512 * K, 64 * K, MAY_UNMAP), flushes),
        "l2_load cluster_free flush_to_os l2_update flush_to_disk refblock_alloc refblock_load",
        qemu="l2_load cluster_free refblock_alloc refblock_load flush_to_os l2_update refblock_update_part"
        " flush_to_disk",
    ),
    "flush after a write": Operation(
        used,
        (writes(0, 512), flushes),
        f"l2_load {_ALLOCATE} cluster_alloc_space write_aio flush_to_os refblock_update_part l2_update flush_to_disk",
    ),
    "flush after nothing": Operation(used, (flushes,), "flush_to_os"),
    "growth of the L1 table": Operation(
        small,
        (resizes(4 << 20), flushes),
        f"l1_grow_alloc_table {_ALLOCATE} refblock_update_part l1_grow_write_table l1_grow_activate_table cluster_free"
        " flush_to_os flush_to_disk refblock_alloc refblock_load",
        qemu=f"l1_grow_alloc_table {_ALLOCATE} refblock_update_part l1_grow_write_table l1_grow_activate_table"
        " cluster_free refblock_alloc refblock_load refblock_update_part",
    ),
    "shrinking": Operation(
        small,
        (resizes(16 * K), flushes),
        "l2_load l2_load cluster_free l1_shrink_write_table l1_shrink_free_l2_clusters cluster_free"
        " flush_to_os flush_to_disk refblock_alloc refblock_load refblock_alloc refblock_load",
        qemu="l2_load cluster_free refblock_alloc refblock_load l1_shrink_write_table l1_shrink_free_l2_clusters"
        " cluster_free refblock_alloc refblock_load refblock_update_part",
    ),
    "a new refcount block": Operation(
        block_full,
        (writes(20 * K, 12 * K),),
        f"l2_load cluster_alloc refblock_alloc refblock_load {_NEW_BLOCK} refblock_alloc refblock_load write_aio",
        qemu="l2_load cluster_alloc refblock_alloc refblock_load refblock_alloc refblock_alloc_write"
        " refblock_update_part refblock_update_part refblock_alloc_hookup refblock_alloc refblock_load",
    ),
    "growth of the refcount table": Operation(
        table_full,
        (writes(1980 * K, 10 * K), flushes),
        "",
        qemu=f"l2_load {_NEW_TABLE} write_aio refblock_alloc_write reftable_grow"
        " refblock_alloc_write_blocks refblock_alloc_write_table refblock_alloc_switch_table cluster_free",
    ),
}
every_operation = pytest.mark.parametrize("name", OPERATIONS)
every_pinned_operation = pytest.mark.parametrize("name", [name for name in OPERATIONS if OPERATIONS[name].announces])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Path], None]], tuple[Path, bytes]]:
    """An image as one of the functions above makes it, and what is in it."""
    directory = tmp_path_factory.mktemp("images")

    @cache
    def image(make: Callable[[Path], None]) -> tuple[Path, bytes]:
        path = directory / f"{make.__name__}.qcow2"
        make(path)
        return path, content(path)

    return image


Images = Callable[[Callable[[Path], None]], tuple[Path, bytes]]


async def open_image(graph: Graph, path: Path, filter_options: dict[str, object]) -> Root:
    # no power is cut here, so that the disk need not be waited for
    file = {"driver": "file", "filename": str(path), "cache": {"no-flush": True}}
    child = "image" if filter_options["driver"] == "blkdebug" else "file"
    await graph.blockdev_add({**filter_options, "node-name": "filter", child: file})
    await graph.blockdev_add({"driver": "qcow2", "node-name": "disk", "file": "filter", "discard": "unmap"})
    return root_of(graph, "disk", READ_WRITE | Perm.RESIZE)


async def announced_by(operation: Operation, path: Path, model: bytearray) -> list[str]:
    """The events of the steps, without those that any edge announces."""
    graph = Graph()
    try:
        root = await open_image(graph, path, {"driver": "test-recorder"})
        events = recorder_of(graph, "filter").events
        assert events == ["reftable_load"]
        for step in operation.steps:
            await step(root, model)
        return [event for event in events[1:] if not event.startswith("pwritev")]
    finally:
        await graph.close()


@every_pinned_operation
async def test_an_operation_announces_what_it_does_in_order(name: str, images: Images, tmp_path: Path) -> None:
    operation = OPERATIONS[name]
    source, data = images(operation.image)
    path = Path(shutil.copy(source, tmp_path / "image"))
    model = bytearray(data)
    assert " ".join(await announced_by(operation, path, model)) == operation.announces
    check_image(path)
    assert content(path) == model


@every_operation
async def test_an_operation_announces_all_that_it_does_in_qemu(name: str, images: Images, tmp_path: Path) -> None:
    operation = OPERATIONS[name]
    source, data = images(operation.image)
    path = Path(shutil.copy(source, tmp_path / "image"))
    graph = Graph()
    root = await open_image(graph, path, {"driver": "test-recorder"})
    events = recorder_of(graph, "filter").events
    for step in operation.steps:
        await step(root, bytearray(data))
    await root.flush()
    await graph.close()
    assert set((operation.qemu or operation.announces).split()) <= set(events)


# --- errors --------------------------------------------------------------------------------------


async def done_with_patience(root: Root, steps: Sequence[Step], model: bytearray, code: int) -> None:
    """Do *steps*, and do one that fails again; all of *model* is there then."""
    for step in (*steps, flushes, reads(0, len(model))):
        found = await fails(step, root, model)
        if found is not None:
            assert found == code
            await step(root, model)


async def fails(step: Step, root: Root, model: bytearray) -> int | None:
    """The errno with which *step* fails, if it does."""
    try:
        await step(root, model)
    except BlockIOError as error:
        return error.errno
    return None


@every_operation
async def test_an_error_at_any_moment_leaves_an_image_that_works_on(name: str, images: Images, tmp_path: Path) -> None:
    """A step that fails works when it is done again; nothing is lost, and qemu-img finds no errors."""
    operation = OPERATIONS[name]
    source, data = images(operation.image)
    moment = total = 1
    while moment <= total:
        path = Path(shutil.copy(source, tmp_path / "image"))
        model = bytearray(data)
        graph = Graph()
        root = await open_image(graph, path, {"driver": "test-recorder"})
        recorder = recorder_of(graph, "filter")
        recorder.fail_at = moment
        await done_with_patience(root, operation.steps, model, errno.EIO)
        await graph.close()
        check_image(path, leaks=True)
        assert content(path) == model, f"event {moment}, {recorder.events[moment]}"
        moment, total = moment + 1, len(recorder.events) - 1


@every_operation
async def test_a_full_disk_at_any_event_leaves_an_image_that_works_on(
    name: str, images: Images, tmp_path: Path
) -> None:
    """The same by blkdebug, as a user has it."""
    operation = OPERATIONS[name]
    source, data = images(operation.image)
    events = await announced_by(operation, Path(shutil.copy(source, tmp_path / "image")), bytearray(data))
    for event in dict.fromkeys(["flush_to_os", "flush_to_disk", *events]):
        path = Path(shutil.copy(source, tmp_path / "image"))
        model = bytearray(data)
        graph = Graph()
        rule = {"event": event, "errno": errno.ENOSPC, "once": True, "immediately": True}
        root = await open_image(graph, path, {"driver": "blkdebug", "inject-error": [rule]})
        await done_with_patience(root, operation.steps, model, errno.ENOSPC)
        await graph.close()
        check_image(path, leaks=True)
        assert content(path) == model, event


async def test_an_error_while_the_refcount_table_is_read_refuses_the_image(images: Images, tmp_path: Path) -> None:
    path = Path(shutil.copy(images(used)[0], tmp_path / "image"))
    graph = Graph()
    rule = {"event": "reftable_load", "errno": errno.EIO, "immediately": True}
    with pytest.raises(BlockIOError, match="Could not initialize refcount handling"):
        await open_image(graph, path, {"driver": "blkdebug", "inject-error": [rule]})
    await graph.close()


@every_operation
async def test_a_disk_that_dies_at_any_event_leaves_a_sound_image(name: str, images: Images, tmp_path: Path) -> None:
    """From the event on, all requests fail; what is on the disk then has no errors, and opens."""
    operation = OPERATIONS[name]
    source, data = images(operation.image)
    events = await announced_by(operation, Path(shutil.copy(source, tmp_path / "image")), bytearray(data))
    for event in dict.fromkeys(["flush_to_os", "flush_to_disk", *events]):
        path = Path(shutil.copy(source, tmp_path / "image"))
        graph = Graph()
        root = await open_image(
            graph, path, {"driver": "blkdebug", "inject-error": [{"event": event, "immediately": True}]}
        )
        model = bytearray(data)
        for step in (*operation.steps, flushes):
            assert await fails(step, root, model) in (None, errno.EIO)
        await graph.close()
        check_image(path, leaks=True)
        found = content(path)
        assert len(found) in (len(data), len(model))
        for at in range(0, len(found), 512):
            assert found[at : at + 512] in (data[at : at + 512], model[at : at + 512])


# --- power cuts ----------------------------------------------------------------------------------


@every_operation
async def test_a_power_cut_at_any_moment_leaves_a_sound_image(name: str, images: Images, tmp_path: Path) -> None:
    operation = OPERATIONS[name]
    source, data = images(operation.image)
    path = Path(shutil.copy(source, tmp_path / "image"))
    model = bytearray(data)
    graph = Graph()
    root = await open_image(graph, path, {"driver": "test-recorder"})
    journal = recorder_of(graph, "filter").journal
    for step in (*operation.steps, flushes):
        await step(root, model)
    finished = len(journal)
    await graph.close()
    rng = random.Random(1)
    disk = source.read_bytes()
    for moment in range(len(journal) + 1):
        path.write_bytes(after_power_cut(disk, journal[:moment], rng))
        check_image(path, leaks=True)
        found = content(path)
        if moment >= finished:
            assert found == model
            continue
        assert len(found) in (len(data), len(model))
        for at in range(0, len(found), 512):
            assert found[at : at + 512] in (data[at : at + 512], model[at : at + 512])
