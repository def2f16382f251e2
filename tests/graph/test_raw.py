"""The raw driver: windows of a node."""

from __future__ import annotations

from typing import Any

import pytest
from support import READ_WRITE, memory_of, read, root_of, write

from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
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
