"""Reads without a task: what is queued is read all the same, and what is not plain is not queued."""

from __future__ import annotations

import mmap
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import read, root_of, write

from fusebd.block.graph import Graph
from fusebd.block.insertion import insert_filter, remove_filter
from fusebd.block.queueing import Batch
from fusebd.block.reopen import reopen
from fusebd.block.root import Root
from fusebd.drivers.file.aio import DEPTH

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A MiB of bytes that differ from place to place."""
    path = tmp_path / "image"
    path.write_bytes(bytes(i // 512 % 255 + 1 for i in range(MIB)))
    return path


def file(path: Path | str) -> dict[str, Any]:
    return {"driver": "file", "node-name": "f", "filename": str(path), "cache": {"direct": True}}


def queue(root: Root, offset: int, length: int) -> tuple[memoryview, list[int]]:
    """Queue a read and submit it: the memory that it goes to, and what becomes of it."""
    memory = memoryview(mmap.mmap(-1, length))
    results: list[int] = []
    batch = root.queue_read(offset, memory, results.append)
    assert batch is not None
    batch.submit()
    assert not results
    return memory, results


async def test_direct_reads_need_no_task(graph: Graph, image: Path) -> None:
    await graph.blockdev_add({"driver": "raw", "node-name": "r", "file": file(image)})
    root, data = root_of(graph, "r"), image.read_bytes()
    assert root.queues_reads
    queued = [(at, *queue(root, at, 4096)) for at in range(0, 64 * 4096, 4096)]
    assert root.in_flight == 64
    await root.wait_idle()
    assert all(memory == data[at : at + 4096] and results == [4096] for at, memory, results in queued)
    for name in ("r", "f"):
        counted = graph.find(name).counted()
        assert (counted.rd_operations, counted.rd_bytes) == (64, 64 * 4096)


async def test_a_queued_read_that_fails_comes_back_uncounted(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(file(image))
    root = root_of(graph, "f")
    os.truncate(image, 4096 + 512)
    _, short = queue(root, 4096, 4096)
    await root.wait_idle()
    assert len(short) == 1
    assert short[0] < 4096
    assert await read(root, 4096, 4096) == image.read_bytes()[4096:] + bytes(4096 - 512)
    counted = graph.find("f").counted()
    assert (counted.rd_operations, counted.failed_rd_operations) == (1, 0)


async def test_reads_that_are_not_plain_are_not_queued(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(file(image))
    root, memory = root_of(graph, "f"), memoryview(mmap.mmap(-1, 8192))
    done: list[int] = []
    assert root.queue_read(1, memory[:512], done.append) is None
    assert root.queue_read(0, memory[:100], done.append) is None
    assert root.queue_read(0, memory[1:513], done.append) is None
    assert root.queue_read(0, memory[:0], done.append) is None
    assert root.queue_read(MIB - 512, memory[:1024], done.append) is None
    root.begin_drain()
    assert root.queue_read(0, memory[:512], done.append) is None
    root.end_drain()
    batches: list[Batch] = []
    while batch := root.queue_read(0, memory[:512], done.append):
        batches.append(batch)
    assert len(batches) == DEPTH
    assert await read(root, 0, 512) == bytes([1]) * 512  # by a thread, as the kernel takes no more
    assert not done
    batches[0].submit()
    await root.wait_idle()
    assert done == [512] * DEPTH


async def test_reads_of_data_in_a_qcow2_image_are_queued(graph: Graph, image: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "2M"], check=True)
    await graph.blockdev_add({"driver": "qcow2", "node-name": "q", "file": file(disk)})
    root, data = root_of(graph, "q"), image.read_bytes()
    await write(root, 0, data)
    assert await read(root, 0, 512) == data[:512]
    queued = [(at, *queue(root, at, 4096)) for at in range(0, 64 * 4096, 4096)]
    await root.wait_idle()
    assert all(memory == data[at : at + 4096] and results == [4096] for at, memory, results in queued)
    memory = memoryview(mmap.mmap(-1, 1 << 17))
    assert root.queue_read(MIB, memory[:4096], lambda _: None) is None  # not allocated
    assert root.queue_read(0, memory, lambda _: None) is None  # two clusters
    await root.pwrite_zeroes(0, 65536)
    assert root.queue_read(0, memory[:4096], lambda _: None) is None


async def test_a_filter_that_wants_to_see_reads_ends_queueing_until_it_is_gone(graph: Graph, image: Path) -> None:
    await graph.blockdev_add({"driver": "raw", "node-name": "r", "file": file(image)})
    root = root_of(graph, "r")
    assert root.queues_reads
    rules = [{"action": "error", "operations": ["read"], "offset": 8192, "length": 512}]
    await insert_filter(graph, {"driver": "fault", "node-name": "x", "rules": rules}, "f")
    memory = memoryview(mmap.mmap(-1, 4096))
    assert root.queue_read(8192, memory, lambda _: None) is None
    await remove_filter(graph, "x")
    memory, results = queue(root, 8192, 4096)
    await root.wait_idle()
    assert results == [4096]
    assert memory == image.read_bytes()[8192:12288]


async def test_a_file_that_is_reopened_without_direct_io_queues_nothing(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(file(image))
    root = root_of(graph, "f")
    memory, _ = queue(root, 0, 512)
    await root.wait_idle()
    await reopen(graph, [{**file(image), "cache": {"direct": False}}])
    assert root.queue_read(0, memory, lambda _: None) is None
    await reopen(graph, [file(image)])
    memory, results = queue(root, 512, 512)
    await root.wait_idle()
    assert results == [512]
    assert memory == image.read_bytes()[512:1024]
