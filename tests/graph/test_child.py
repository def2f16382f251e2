"""The edge: bounds, splitting, padding, zero writes, discard, counting, against a driver that records."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from support import READ_WRITE, Memory, memory_of, read, root_of, write

from fusebd.block.child import FUA, MAY_UNMAP, NO_FALLBACK, nbytes, slice_buffers
from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.errors import BlockIOError, NotSupported

RESIZE = READ_WRITE | Perm.RESIZE


async def stack(graph: Graph, perm: Perm = READ_WRITE, **options: Any) -> tuple[Root, Memory]:
    options = {name.replace("_", "-"): value for name, value in options.items()}
    await graph.blockdev_add({"driver": "test-memory", "node-name": "m", **options})
    memory = memory_of(graph, "m")
    memory.data[:] = bytes(i * 7 % 251 for i in range(len(memory.data)))
    return root_of(graph, "m", perm), memory


@given(st.lists(st.binary(max_size=9), min_size=1, max_size=6), st.data())
def test_a_slice_of_buffers_is_the_slice_of_their_bytes(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    bufs = [memoryview(part) for part in parts]
    assert b"".join(bytes(b) for b in slice_buffers(bufs, start, end)) == whole[start:end]
    assert nbytes(bufs) == len(whole)


async def test_requests_outside_of_the_node_fail(graph: Graph) -> None:
    root, memory = await stack(graph, size=4096)
    for request in (read(root, 4000, 97), write(root, 4000, bytes(97)), read(root, -1, 1), write(root, -1, b"x")):
        with pytest.raises(BlockIOError):
            await request
    assert memory.log == []


async def test_a_write_past_the_end_grows_a_node_that_may_resize(graph: Graph) -> None:
    root, memory = await stack(graph, RESIZE, size=4096)
    await write(root, 5000, b"end")
    assert root.length == memory.length == 5003
    assert await read(root, 4096, 907) == bytes(904) + b"end"


async def test_a_node_that_was_cut_grows_again_by_a_write_that_ends_where_there_has_been_one(graph: Graph) -> None:
    root, memory = await stack(graph, RESIZE, size=4096)
    await write(root, 5000, b"end")
    await root.truncate(100)
    await write(root, 200, b"again")
    assert root.length == memory.length == 205


@pytest.mark.parametrize("align", [1, 512, 4096])
@pytest.mark.parametrize("max_transfer", [0, 8192])
async def test_any_range_can_be_read_and_written_whatever_the_limits(
    graph: Graph, align: int, max_transfer: int
) -> None:
    root, memory = await stack(graph, size=65536, align=align, max_transfer=max_transfer)
    model = bytearray(memory.data)
    for offset, length in ((0, 1), (511, 2), (4095, 4098), (100, 30000), (65535, 1), (512, 512), (8192, 16384), (5, 0)):
        data = bytes((offset + i) % 256 for i in range(length))
        half = length // 3
        await root.pwritev(offset, (memoryview(data)[:half], memoryview(data)[half:]))
        model[offset : offset + length] = data
        assert await read(root, max(offset - 3, 0), min(length + 3, 65536 - offset)) == bytes(
            model[max(offset - 3, 0) : max(offset - 3, 0) + min(length + 3, 65536 - offset)]
        )
    assert memory.data == model


async def test_overlapping_unaligned_writes_do_not_lose_each_other(graph: Graph) -> None:
    root, memory = await stack(graph, size=4096, align=512)
    original = memory.preadv

    async def slow(offset: int, bufs: Any) -> None:
        await original(offset, bufs)
        await trio.lowlevel.checkpoint()

    memory.preadv = slow  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        for at in range(0, 512, 8):
            nursery.start_soon(write, root, at, bytes([at // 8 + 1]) * 8)
    assert memory.data[:512] == b"".join(bytes([i + 1]) * 8 for i in range(64))


async def test_an_aligned_write_waits_for_a_read_modify_write_in_the_same_block(graph: Graph) -> None:
    root, memory = await stack(graph, size=4096, align=512)
    original = memory.preadv
    reading = trio.Event()
    go_on = trio.Event()

    async def slow(offset: int, bufs: Any) -> None:
        await original(offset, bufs)
        reading.set()
        await go_on.wait()

    memory.preadv = slow  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, root, 1, b"small")
        await reading.wait()
        nursery.start_soon(write, root, 0, b"B" * 512)
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
    assert memory.data[:512] == b"B" * 512


async def test_a_zero_write_falls_back_to_plain_writes(graph: Graph) -> None:
    root, memory = await stack(graph, size=4 << 20, max_transfer=65536)
    memory.zeroes_supported = False
    await root.pwrite_zeroes(1000, 3 << 20)
    assert memory.data[1000 : 1000 + (3 << 20)] == bytes(3 << 20)
    assert memory.data[999] == 999 * 7 % 251
    with pytest.raises(NotSupported):
        await root.pwrite_zeroes(0, 512, NO_FALLBACK)


async def test_a_zero_write_is_cut_at_the_drivers_alignment(graph: Graph) -> None:
    root, memory = await stack(graph, size=65536, zero_align=4096)
    await root.pwrite_zeroes(1000, 20000)
    assert memory.log == [("write", 1000, 3096), ("zero", 4096, 16384), ("write", 20480, 520)]
    assert memory.data[1000:21000] == bytes(20000)


async def test_a_zero_write_without_alignment_of_the_driver_keeps_its_neighbours(graph: Graph) -> None:
    root, memory = await stack(graph, size=65536, align=512)
    model = bytearray(memory.data)
    for offset, length in ((100, 50), (500, 600), (1024, 2048), (4000, 9000)):
        await root.pwrite_zeroes(offset, length)
        model[offset : offset + length] = bytes(length)
    assert memory.data == model


async def test_detect_zeroes_turns_a_write_of_zeroes_into_a_zero_write(graph: Graph) -> None:
    root, memory = await stack(graph, size=65536, detect_zeroes="on")
    await write(root, 0, bytes(4096))
    await write(root, 4096, bytes(4095) + b"x")
    assert [entry[0] for entry in memory.log] == ["zero", "write"]


async def test_discard_is_ignored_unless_asked_for(graph: Graph) -> None:
    root, memory = await stack(graph, size=65536)
    await root.pdiscard(0, 4096)
    assert memory.log == []


async def test_discard_is_cut_at_alignment_and_at_the_end(graph: Graph) -> None:
    root, memory = await stack(graph, size=65536, discard="unmap", discard_align=4096)
    await root.pdiscard(60000, 10000)
    assert memory.log == [("discard", 60000, 1440), ("discard", 61440, 4096)]


async def test_fua_flushes_after_the_write(graph: Graph) -> None:
    root, memory = await stack(graph)
    await root.pwritev(0, (memoryview(b"x"),), FUA)
    assert memory.log == [("write", 0, 1), ("flush", 0, 0)]


async def test_a_flush_without_a_write_before_it_does_nothing(graph: Graph) -> None:
    root, memory = await stack(graph)
    await root.flush()
    await write(root, 0, b"x")
    await root.flush()
    await root.flush()
    assert [entry[0] for entry in memory.log] == ["write", "flush"]


async def test_cache_no_flush_keeps_flushes_from_the_disk(graph: Graph) -> None:
    root, memory = await stack(graph, cache={"no-flush": True})
    await write(root, 0, b"x")
    await root.flush()
    assert [entry[0] for entry in memory.log] == ["write"]


async def test_requests_are_counted(graph: Graph) -> None:
    root, _ = await stack(graph, size=65536, discard="unmap")
    await read(root, 0, 100)
    await write(root, 50, bytes(10))
    await root.pwrite_zeroes(100, 28, MAY_UNMAP)
    await root.pdiscard(0, 512)
    await root.flush()
    counted = graph.find("m").counted()
    assert (counted.rd_operations, counted.rd_bytes) == (1, 100)
    assert (counted.wr_operations, counted.wr_bytes, counted.wr_highest_offset) == (2, 38, 128)
    assert (counted.unmap_operations, counted.unmap_bytes, counted.flush_operations) == (1, 512, 1)
    assert counted.rd_total_time_ns > 0


async def test_the_fast_path_does_not_reach_the_scheduler(graph: Graph) -> None:
    root, _ = await stack(graph)
    with trio.testing.assert_no_checkpoints():
        await read(root, 0, 4096)
        await write(root, 0, bytes(4096))
