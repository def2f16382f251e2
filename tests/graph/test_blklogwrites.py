"""blklogwrites over memory: what is logged, in what order, what of it the superblock counts, and what fails."""

from __future__ import annotations

import random
import struct

import pytest
import trio
import trio.testing
from support import READ_WRITE, memory_of, read, root_of, write
from writelogs import (
    DISCARD,
    FLUSH,
    FUA_FLAG,
    LENGTH,
    MAGIC,
    MARK,
    MEM,
    Found,
    failing,
    log_of,
    logged,
    parse,
    set_mark,
    whole_log,
)

from fusebd.block.child import FUA, MAY_UNMAP, NO_FALLBACK
from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.errors import BlockIOError, FusebdError, OptionError, ReadOnlyError


def pattern(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


# --- entries -------------------------------------------------------------------------------------


async def test_every_kind_of_request_has_its_entry(graph: Graph) -> None:
    root = await logged(graph)
    data = pattern(1, 1024)
    await write(root, 4096, data)
    await root.pwrite_zeroes(8192, 1024)
    await root.pdiscard(65536, 131072)
    await read(root, 0, 4096)
    await root.flush()
    assert log_of(graph) == Found(
        4,
        512,
        [(8, 2, 0, data), (16, 2, 0, bytes(1024)), (128, 256, DISCARD, b""), (0, 0, FLUSH, b"")],
    )


async def test_the_log_is_byte_for_byte_as_described(graph: Graph) -> None:
    root = await logged(graph)
    await write(root, 1024, b"x" * 512)
    await root.flush()
    superblock = struct.pack("<QQQI", MAGIC, 1, 2, 512).ljust(512, b"\0")
    entry = struct.pack("<QQQQ", 2, 1, 0, 0).ljust(512, b"\0")
    flush = struct.pack("<QQQQ", 0, 0, 1, 0).ljust(512, b"\0")
    assert memory_of(graph, "log-memory").data == superblock + entry + b"x" * 512 + flush


async def test_requests_reach_the_file(graph: Graph) -> None:
    root = await logged(graph)
    await write(root, 4096, b"x" * 512)
    await root.pwrite_zeroes(4096, 512)
    await root.pdiscard(8192, 512)
    await root.flush()
    assert memory_of(graph, "file-memory").log == [
        ("write", 4096, 512), ("zero", 4096, 512), ("discard", 8192, 512), ("flush", 0, 0),
    ]  # fmt: skip


async def test_data_in_several_buffers_is_one_entry(graph: Graph) -> None:
    root = await logged(graph)
    data = pattern(2, 4096)
    await root.pwritev(512, [memoryview(data)[:5], memoryview(data)[5:5], memoryview(data)[5:]])
    assert parse(whole_log(graph)).entries == [(1, 8, 0, data)]


async def test_reads_and_flushes_of_nothing_are_not_logged(graph: Graph) -> None:
    root = await logged(graph)
    await read(root, 0, 4096)
    await root.flush()
    await root.flush()
    assert memory_of(graph, "log-memory").data == b""
    await write(root, 0, bytes(512))
    await root.flush()
    await root.flush()
    assert [flags for _, _, flags, _ in log_of(graph).entries] == [0, FLUSH]


async def test_an_unaligned_write_is_logged_with_its_whole_sectors(graph: Graph) -> None:
    root = await logged(graph)
    before = pattern(3, 2048)
    await write(root, 0, before)
    await write(root, 1000, b"ab" * 50)
    expected = before[:1000] + b"ab" * 50 + before[1100:]
    assert parse(whole_log(graph)).entries[1:] == [(1, 2, 0, expected[512:1536])]


async def test_an_unaligned_zero_write_is_a_write_and_a_zero_write(graph: Graph) -> None:
    root = await logged(graph)
    await write(root, 0, b"x" * 1536)
    await root.pwrite_zeroes(100, 1436)
    assert parse(whole_log(graph)).entries[1:] == [(0, 1, 0, b"x" * 100 + bytes(412)), (1, 2, 0, bytes(1024))]


@pytest.mark.parametrize("size", [32, 4096, 1 << 16])
async def test_the_sector_size_is_the_unit_of_the_log_and_of_requests(graph: Graph, size: int) -> None:
    root = await logged(graph, log_sector_size=size)
    assert root.driver.limits.request_alignment == size
    await write(root, size + 10, b"x")
    await root.flush()
    data = bytes(10) + b"x" + bytes(size - 11)
    assert log_of(graph) == Found(2, size, [(1, 1, 0, data), (0, 0, FLUSH, b"")])


async def test_fua_is_in_the_entry_and_reaches_the_file(graph: Graph) -> None:
    root = await logged(graph)
    await root.pwritev(0, (memoryview(b"x" * 512),), FUA)
    await root.pwrite_zeroes(512, 512, FUA)
    assert log_of(graph) == Found(2, 512, [(0, 1, FUA_FLAG, b"x" * 512), (1, 1, FUA_FLAG, bytes(512))])
    # test-memory knows no FUA: the edge to it flushes
    assert [name for name, _, _ in memory_of(graph, "file-memory").log] == ["write", "flush", "zero", "flush"]


async def test_a_zero_write_that_is_to_be_fast_and_cannot_is_not_logged(graph: Graph) -> None:
    root = await logged(graph)
    memory_of(graph, "file-memory").zeroes_supported = False
    with pytest.raises(BlockIOError):
        await root.pwrite_zeroes(0, 4096, MAY_UNMAP | NO_FALLBACK)
    assert memory_of(graph, "log-memory").data == b""
    await root.pwrite_zeroes(0, 4096, MAY_UNMAP)
    assert parse(whole_log(graph)).entries == [(0, 8, 0, bytes(4096))]


async def test_zeroes_are_written_into_the_log_as_zeroes_where_it_had_data(graph: Graph) -> None:
    root = await logged(graph)
    memory_of(graph, "log-memory").data[:] = b"\xff" * 8192
    graph.find("log-memory").set_length(8192)
    await root.pwrite_zeroes(0, 1024, MAY_UNMAP)
    assert memory_of(graph, "log-memory").data[1024:2048] == bytes(1024)


async def test_a_new_length_is_that_of_the_file_and_is_not_logged(graph: Graph) -> None:
    await logged(graph)
    root = root_of(graph, "top", READ_WRITE | Perm.RESIZE)
    await root.truncate(2 * LENGTH)
    assert root.length == memory_of(graph, "file-memory").length == 2 * LENGTH
    assert memory_of(graph, "log-memory").data == b""


async def test_with_no_flush_nothing_is_flushed_nor_logged(graph: Graph) -> None:
    root = await logged(graph, cache={"no-flush": True})
    await write(root, 0, bytes(512))
    await root.flush()
    assert len(memory_of(graph, "log-memory").data) == 1536


# --- the superblock ------------------------------------------------------------------------------


async def test_the_superblock_counts_what_is_there_at_every_flush(graph: Graph) -> None:
    root = await logged(graph)
    await write(root, 0, bytes(512))
    await write(root, 0, bytes(512))
    assert memory_of(graph, "log-memory").data[:512] == bytes(512)
    await root.flush()
    assert log_of(graph).count == 3
    await write(root, 0, bytes(512))
    assert log_of(graph).count == 3
    await root.flush()
    assert log_of(graph).count == 5


async def test_the_log_is_flushed_behind_the_superblock(graph: Graph) -> None:
    root = await logged(graph)
    await write(root, 0, bytes(512))
    await root.flush()
    assert memory_of(graph, "log-memory").log == [
        ("write", 512, 1024), ("write", 1536, 512), ("write", 0, 512), ("flush", 0, 0),
    ]  # fmt: skip


async def test_the_file_is_flushed_before_the_flush_is_logged(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "file-memory", "size": LENGTH})
    await graph.blockdev_add({**MEM, "node-name": "log-memory", "size": 0})
    order: list[str] = []
    for name in ("file-memory", "log-memory"):
        memory_of(graph, name).log = Told(name, order)
    root = await logged(graph)
    await write(root, 0, bytes(512))
    await root.flush()
    assert order == [
        "file-memory write", "log-memory write",
        "file-memory flush", "log-memory write", "log-memory write", "log-memory flush",
    ]  # fmt: skip


class Told(list[tuple[str, int, int]]):
    """A test-memory node's log, told to a list that several of them share."""

    def __init__(self, name: str, order: list[str]) -> None:
        super().__init__()
        self._name, self._order = name, order

    def append(self, item: tuple[str, int, int]) -> None:
        self._order.append(f"{self._name} {item[0]}")


@pytest.mark.parametrize("interval", [1, 3])
async def test_the_superblock_is_rewritten_after_so_many_entries(graph: Graph, interval: int) -> None:
    root = await logged(graph, log_super_update_interval=interval)
    counts = []
    for _ in range(7):
        await write(root, 0, bytes(512))
        data = memory_of(graph, "log-memory").data
        counts.append(struct.unpack("<Q", data[16:24])[0])
    assert counts == [n - n % interval for n in range(1, 8)]


async def test_the_default_interval_is_4096(graph: Graph) -> None:
    root = await logged(graph)
    for _ in range(4095):
        await write(root, 0, bytes(512))
    assert not any(memory_of(graph, "log-memory").data[:512])
    await write(root, 0, bytes(512))
    assert log_of(graph).count == 4096


async def test_closing_the_node_leaves_the_log_complete(graph: Graph) -> None:
    root = await logged(graph)
    await write(root, 0, bytes(512))
    await graph.detach_root(root)
    await graph.blockdev_del("top")
    assert log_of(graph).count == len(log_of(graph).entries) == 2


async def test_a_log_that_is_not_appended_to_is_begun_anew(graph: Graph) -> None:
    root = await logged(graph)
    await write(root, 0, b"a" * 1024)
    await graph.detach_root(root)
    await graph.blockdev_del("top")
    root = await logged(graph)
    await write(root, 0, b"b" * 512)
    await root.flush()
    assert log_of(graph).count == 2
    assert log_of(graph).entries[:2] == [(0, 1, 0, b"b" * 512), (0, 0, FLUSH, b"")]


# --- several at once -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
async def test_entries_of_requests_at_the_same_time_do_not_mix(graph: Graph, seed: int) -> None:
    await graph.blockdev_add({**MEM, "node-name": "file-memory", "size": LENGTH})
    await graph.blockdev_add({**MEM, "node-name": "log-memory", "size": 0})
    slow = {"driver": "test-suspends", "most": 5, "seed": seed, "discard": "unmap"}
    root = await logged(graph, file={**slow, "file": "file-memory"}, log={**slow, "file": "log-memory"})
    rng = random.Random(seed)

    async def client(number: int) -> None:
        # every client has an area of its own, for what overlaps has no order
        for _ in range(10):
            sector, count = number * 64 + rng.randrange(56), rng.randrange(1, 9)
            kind = rng.choice(["write", "write", "zero", "discard", "flush"])
            if kind == "write":
                await write(root, sector * 512, rng.randbytes(count * 512))
            elif kind == "zero":
                await root.pwrite_zeroes(sector * 512, count * 512)
            elif kind == "discard":
                await root.pdiscard(sector * 512, count * 512)
            else:
                await root.flush()

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(client, number)
    await write(root, 0, bytes(512))
    await root.flush()
    found = log_of(graph)
    assert found.count == len(found.entries)
    model = bytearray(LENGTH)
    for sector, nr_sectors, flags, data in found.entries:
        model[sector * 512 : (sector + nr_sectors) * 512] = bytes(nr_sectors * 512) if flags & DISCARD else data
    assert model == memory_of(graph, "file-memory").data


async def test_one_superblock_is_enough_for_those_who_wait_for_it(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "log-memory", "size": 0})
    slow = {"driver": "test-suspends", "most": 20, "seed": 1, "file": "log-memory"}
    root = await logged(graph, log=slow)
    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(root.pwritev, number * 512, (memoryview(bytes(512)),), FUA)
    assert log_of(graph).count == 50
    assert memory_of(graph, "log-memory").log.count(("write", 0, 512)) < 50


async def test_nothing_suspends_over_children_that_do_not(graph: Graph) -> None:
    root = await logged(graph, log_super_update_interval=1)
    with trio.testing.assert_no_checkpoints():
        await write(root, 100, pattern(4, 5000))
        await root.pwritev(0, (memoryview(b"x" * 512),), FUA)
        await root.pwrite_zeroes(100, 5000)
        await root.pdiscard(0, 4096)
        await root.flush()


async def test_a_request_that_is_cancelled_leaves_the_log_whole(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "log-memory", "size": 0})
    root = await logged(graph, log={"driver": "test-suspends", "file": "log-memory"})
    with trio.CancelScope() as scope:
        scope.cancel()
        await write(root, 0, b"a" * 512)
    await write(root, 512, b"b" * 512)
    await root.flush()
    assert log_of(graph) == Found(2, 512, [(1, 1, 0, b"b" * 512), (0, 0, FLUSH, b"")])


# --- failures ------------------------------------------------------------------------------------


async def test_a_write_that_failed_is_logged_and_fails(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "file-memory", "size": LENGTH})
    root = await logged(graph, file=failing("file-memory", "pwritev", errno=28))
    with pytest.raises(BlockIOError) as caught:
        await write(root, 0, b"a" * 512)
    assert caught.value.errno == 28
    assert parse(whole_log(graph)).entries == [(0, 1, 0, b"a" * 512)]


async def test_a_request_that_cannot_be_logged_fails(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "log-memory", "size": 0})
    root = await logged(graph, log=failing("log-memory", "pwritev", errno=28))
    with pytest.raises(BlockIOError) as caught:
        await write(root, 0, b"a" * 4096)
    assert caught.value.errno == 28
    await write(root, 512, b"b" * 512)
    await root.flush()
    assert log_of(graph) == Found(2, 512, [(1, 1, 0, b"b" * 512), (0, 0, FLUSH, b"")])


async def test_zeroes_that_cannot_be_logged_fail_and_leave_no_entry(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "log-memory", "size": 0})
    root = await logged(graph, log=failing("log-memory", "pwritev_zero"))
    with pytest.raises(BlockIOError):
        await root.pwrite_zeroes(0, 4096)
    await root.flush()
    assert log_of(graph) == Found(1, 512, [(0, 0, FLUSH, b"")])


@pytest.mark.parametrize("event", ["pwritev", "flush_to_disk"])
async def test_a_flush_fails_whose_superblock_cannot_be_written(graph: Graph, event: str) -> None:
    await graph.blockdev_add({**MEM, "node-name": "log-memory", "size": 0})
    rule = {"sector": 0} if event == "pwritev" else {}
    broken = failing("log-memory", event, **rule)
    root = await logged(graph, log={"driver": "raw", "file": broken} if event == "flush_to_disk" else broken)
    await write(root, 0, b"a" * 512)
    with pytest.raises(BlockIOError):
        await root.flush()
    await root.flush()
    found = log_of(graph)
    assert found.count == len(found.entries) == 3


async def test_a_flush_of_the_file_that_fails_fails(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "file-memory", "size": LENGTH})
    root = await logged(graph, file={"driver": "raw", "file": failing("file-memory", "flush_to_disk")})
    await write(root, 0, b"a" * 512)
    with pytest.raises(BlockIOError):
        await root.flush()


async def test_the_failure_of_the_file_is_the_one_that_is_told(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "file-memory", "size": LENGTH})
    await graph.blockdev_add({**MEM, "node-name": "log-memory", "size": 0})
    root = await logged(
        graph, file=failing("file-memory", "pwritev", errno=28), log=failing("log-memory", "pwritev", errno=5)
    )
    with pytest.raises(BlockIOError) as caught:
        await write(root, 0, b"a" * 512)
    assert caught.value.errno == 28


# --- marks ---------------------------------------------------------------------------------------


async def test_a_mark_is_an_entry_with_its_text_and_counted_at_once(graph: Graph) -> None:
    root = await logged(graph)
    await write(root, 0, bytes(512))
    await set_mark(graph, "made the file system")
    await write(root, 0, bytes(512))
    found = log_of(graph)
    assert found.count == 2
    assert found.entries[1:] == [(0, 0, MARK, b"made the file system"), (0, 1, 0, bytes(512))]


async def test_a_mark_may_fill_its_sector_but_for_the_last_byte(graph: Graph) -> None:
    await logged(graph)
    await set_mark(graph, "m" * 479)
    await set_mark(graph, "ä" * 239)
    assert log_of(graph).entries == [(0, 0, MARK, b"m" * 479), (0, 0, MARK, "ä".encode() * 239)]


@pytest.mark.parametrize("text", ["", "m" * 480, "ä" * 240, "a\0b"])
async def test_a_mark_that_cannot_be_read_again_is_refused(graph: Graph, text: str) -> None:
    await logged(graph)
    with pytest.raises(OptionError) as caught:
        await set_mark(graph, text)
    assert str(caught.value) == "Parameter 'mark' expects a text of 1 to 479 bytes without NUL"


async def test_small_sectors_have_no_room_for_marks(graph: Graph) -> None:
    await logged(graph, log_sector_size=32)
    with pytest.raises(OptionError, match="There is no room for marks in log sectors of 32 bytes"):
        await set_mark(graph, "m")


async def test_a_node_that_is_read_only_takes_no_marks(graph: Graph) -> None:
    memories = {"file": {**MEM, "size": LENGTH}, "log": {**MEM, "size": 0}}
    await graph.blockdev_add({"driver": "blklogwrites", "node-name": "top", "read-only": True, **memories})
    with pytest.raises(ReadOnlyError, match="Block node is read-only"):
        await set_mark(graph, "m")


async def test_a_node_that_nobody_has_open_takes_marks_and_stays(graph: Graph) -> None:
    root = await logged(graph)
    await graph.detach_root(root)
    await set_mark(graph, "m")
    assert graph.find("top").parents == []
    assert graph.roots == set()
    assert log_of(graph).count == 1


async def test_a_mark_waits_while_the_node_is_drained(graph: Graph) -> None:
    await logged(graph)
    async with trio.open_nursery() as nursery:
        async with graph.lock, graph.drained(graph.find("top")):
            nursery.start_soon(set_mark, graph, "early")
            await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
    assert log_of(graph).count == 1


async def test_a_node_is_not_removed_while_a_mark_is_set(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "log-memory", "size": 0})
    slow = {"driver": "test-suspends", "most": 10, "seed": 3, "file": "log-memory"}
    root = await logged(graph, log=slow)
    await graph.detach_root(root)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(set_mark, graph, "m")
        await trio.lowlevel.checkpoint()
        with pytest.raises(FusebdError, match="Node top is in use"):
            await graph.blockdev_del("top")
    assert log_of(graph).count == 1


async def test_a_mark_that_cannot_be_written_fails_and_leaves_nothing(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "log-memory", "size": 0})
    root = await logged(graph, log=failing("log-memory", "pwritev"))
    with pytest.raises(BlockIOError):
        await set_mark(graph, "lost")
    await write(root, 0, b"a" * 512)
    await root.flush()
    assert log_of(graph).entries == [(0, 1, 0, b"a" * 512), (0, 0, FLUSH, b"")]
