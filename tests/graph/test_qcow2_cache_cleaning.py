"""cache-clean-interval: metadata that is not used does not stay in memory."""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing
from images import create
from support import READ_WRITE, memory_of, read, root_of, write

from fusebd.block.graph import Graph
from fusebd.drivers.qcow2.driver import Qcow2


async def test_what_is_not_used_goes_and_is_read_again(
    autojump_clock: trio.testing.MockClock, graph: Graph, tmp_path: Path
) -> None:
    image = create(tmp_path / "image", "4M", cluster_size=512).read_bytes()
    await graph.blockdev_add({"driver": "test-memory", "node-name": "memory", "size": 0})
    memory = memory_of(graph, "memory")
    memory.data[:] = image
    memory.node.set_length(len(image))
    options = {"driver": "qcow2", "file": "memory", "cache-clean-interval": 10}
    await graph.blockdev_add({**options, "node-name": "disk", "l2-cache-entry-size": 512})
    root = root_of(graph, "disk", READ_WRITE)
    for at in range(0, 1 << 20, 65536):
        await write(root, at, b"x" * 512)
    driver = root.driver
    assert isinstance(driver, Qcow2)
    tables, refcounts = driver._tables, driver._refcounts
    await trio.sleep(35)
    assert len(tables.slices) >= 16  # dirty
    await root.flush()
    await trio.sleep(7)
    await read(root, 0, 512)
    await trio.sleep(11)
    assert list(tables.slices) == [0]
    await trio.sleep(21)
    assert not tables.slices
    assert not refcounts.blocks
    assert await read(root, 65536, 1024) == b"x" * 512 + bytes(512)
    await write(root, 1 << 20, b"y")
    await graph.detach_root(root)
    await graph.blockdev_del("disk")
    await graph.blockdev_add({**options, "node-name": "other", "cache-clean-interval": 0})
    root = root_of(graph, "other", READ_WRITE)
    await read(root, 0, 512)
    await trio.sleep(1000)
    other = root.driver
    assert isinstance(other, Qcow2)
    assert other._tables.slices
    assert await read(root, 1 << 20, 1) == b"y"
