"""The raw driver: windows of a node."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from support import READ_WRITE, memory_of, read, root_of, write

from fusebd.block.blockstatus import block_status
from fusebd.block.child import FUA
from fusebd.block.driver import driver_class
from fusebd.block.graph import Graph
from fusebd.block.perms import Perm, Role
from fusebd.block.status import Status
from fusebd.errors import BlockIOError, FusebdError

MEM = {"driver": "test-memory", "node-name": "m", "size": 8192}


# The messages are those of qemu-storage-daemon 10.0.2.
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 100}, "Specified size is not multiple of 512"),
        ({"size": -1}, "Value '-1' is out of range for parameter 'size'"),
        ({"offset": 8193}, "Offset (8193) cannot be greater than size of the containing file (8192)"),
        (
            {"offset": 4096, "size": 8192},
            "The sum of offset (4096) and size (8192) has to be smaller or equal to the  actual size of the "
            "containing file (8192)",
        ),
    ],
)
async def test_a_window_that_does_not_fit_is_refused(graph: Graph, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FusebdError) as refused:
        await graph.blockdev_add({"driver": "raw", "node-name": "r", "file": MEM, **options})
    assert str(refused.value) == message


async def test_a_window_shows_and_changes_its_part_only(graph: Graph) -> None:
    await graph.blockdev_add({"driver": "raw", "node-name": "r", "offset": 100, "size": 512, "file": MEM})
    memory = memory_of(graph, "m")
    memory.data[:] = b"." * 8192
    root = root_of(graph, "r")
    assert root.length == 512
    await write(root, 0, b"A" * 512)
    assert memory.data == b"." * 100 + b"A" * 512 + b"." * 7580
    assert await read(root, 500, 12) == b"A" * 12
    with pytest.raises(BlockIOError):
        await write(root, 511, b"xx")


async def test_a_window_of_fixed_size_does_not_grow(graph: Graph) -> None:
    await graph.blockdev_add({"driver": "raw", "node-name": "r", "offset": 0, "size": 512, "file": MEM})
    with pytest.raises(BlockIOError, match="Cannot resize fixed-size raw disks"):
        await graph.block_resize("r", 1024)
    root = root_of(graph, "r", READ_WRITE | Perm.RESIZE)
    with pytest.raises(BlockIOError):
        await write(root, 510, b"xxxx")
    assert root.length == 512


async def test_an_open_ended_window_grows_with_its_file(graph: Graph) -> None:
    await graph.blockdev_add({"driver": "raw", "node-name": "r", "offset": 512, "file": MEM})
    await graph.block_resize("r", 9000)
    assert memory_of(graph, "m").length == 9512
    assert graph.find("r").driver.length == 9000


async def test_zeroes_behind_a_window_of_fixed_size_are_refused(graph: Graph) -> None:
    await graph.blockdev_add({"driver": "raw", "node-name": "r", "offset": 0, "size": 512, "file": MEM})
    memory = memory_of(graph, "m")
    memory.data[:] = b"." * 8192
    root = root_of(graph, "r", READ_WRITE | Perm.RESIZE)
    with pytest.raises(BlockIOError) as failed:
        await root.pwrite_zeroes(500, 100)
    assert failed.value.errno == errno.ENOSPC
    assert memory.data == b"." * 8192


async def test_zero_writes_and_discards_are_moved_by_the_offset(graph: Graph) -> None:
    file = {**MEM, "discard": "unmap"}
    await graph.blockdev_add({"driver": "raw", "node-name": "r", "offset": 1024, "discard": "unmap", "file": file})
    root = root_of(graph, "r")
    await root.pwrite_zeroes(512, 100)
    await root.pdiscard(2048, 512)
    await root.pdiscard(7000, 5000)
    assert memory_of(graph, "m").log == [("zero", 1536, 100), ("discard", 3072, 512), ("discard", 8024, 168)]


async def test_block_status_is_that_of_the_file_at_the_offset(graph: Graph) -> None:
    file = {"driver": "null-co", "node-name": "n", "read-zeroes": True}
    await graph.blockdev_add({"driver": "raw", "node-name": "r", "offset": 1024, "file": file})
    status = await block_status(graph.find("r"), 512, 1000)
    assert (status.file, status.host_offset, status.length) == (graph.find("n"), 1536, 1000)
    assert status.flags & Status.ZERO


async def test_a_write_through_to_the_disk_is_passed_on_where_the_file_can(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    await graph.blockdev_add({"driver": "raw", "node-name": "a", "file": {"driver": "null-co"}})
    await graph.blockdev_add({"driver": "raw", "node-name": "b", "file": MEM})
    assert [graph.find(name).driver.supports_fua for name in "ab"] == [True, False]
    root = root_of(graph, "b")
    await root.pwritev(0, (memoryview(b"x"),), FUA)
    assert memory_of(graph, "m").log == [("write", 0, 1), ("flush", 0, 0)]


# The messages are those of qemu-storage-daemon 10.0.2.
async def test_lengths_that_cannot_be_are_refused(graph: Graph) -> None:
    await graph.blockdev_add({"driver": "raw", "node-name": "r", "offset": 512, "file": MEM})
    with pytest.raises(BlockIOError, match=r"offset\(9223372036854775807\) exceeds maximum\(9223372035781033984\)"):
        await graph.block_resize("r", 2**63 - 1)
    with pytest.raises(BlockIOError, match=r"offset\(9223372035781034496\) exceeds maximum\(9223372035781033984\)"):
        await graph.block_resize("r", 2**63 - 2**30)
    file = {"driver": "null-co", "size": 2**40}
    await graph.blockdev_add({"driver": "raw", "node-name": "far", "offset": 2**39, "file": file})
    with pytest.raises(BlockIOError, match="Disk size too large for the chosen offset"):
        await graph.block_resize("far", 2**63 - 2**30)


@pytest.mark.parametrize(
    ("window", "data", "shared"),
    [
        ({}, False, Perm.ALL),
        ({"offset": 0}, False, Perm.ALL),
        ({"offset": 512}, True, ~Perm.RESIZE),
        ({"size": 512}, True, ~Perm.RESIZE),
    ],
    ids=str,
)
async def test_a_window_does_not_share_resizing_and_the_whole_does(
    graph: Graph, window: dict[str, int], data: bool, shared: Perm
) -> None:
    await graph.blockdev_add({"driver": "raw", "node-name": "r", "file": MEM, **window})
    edge = graph.find("r").children["file"]
    assert bool(edge.role & Role.DATA) == data
    assert edge.shared == Perm.ALL & shared


async def test_anything_can_be_raw(graph: Graph) -> None:
    await graph.blockdev_add(MEM)
    memory_of(graph, "m").data[:] = bytes(range(256)) * 32
    assert driver_class("raw").probe(bytes(memory_of(graph, "m").data), "m") > 0
