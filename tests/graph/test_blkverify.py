"""The blkverify driver: what it finds, what it says, and what reaches which side."""

from __future__ import annotations

import errno
import json
import logging
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support import READ_WRITE, Memory, memory_of, read, root_of, write

from fusebd.block.child import FUA
from fusebd.block.filename import options_for
from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.errors import BlockIOError, FusebdError, OptionError, ReadOnlyError

LENGTH = 65536
MEMORY = {"driver": "test-memory", "size": LENGTH}
Event = tuple[str, dict[str, Any]]


async def add(graph: Graph, *, test: Any = None, raw: Any = None) -> tuple[Root, Memory, Memory]:
    """A node ``v`` over the memory nodes ``t`` (test) and ``r`` (raw), of which *test* and *raw* are more options."""
    await graph.blockdev_add({**MEMORY, "node-name": "t", **(test or {})})
    await graph.blockdev_add({**MEMORY, "node-name": "r", **(raw or {})})
    await graph.blockdev_add({"driver": "blkverify", "node-name": "v", "test": "t", "raw": "r", "discard": "unmap"})
    return root_of(graph, "v", READ_WRITE), memory_of(graph, "t"), memory_of(graph, "r")


def failing(image: Any, **rule: Any) -> dict[str, Any]:
    """A blkdebug node over *image* whose requests fail as *rule* says."""
    return {"driver": "blkdebug", "image": image, "inject-error": [{"event": "none", **rule}]}


@pytest.fixture
def events(graph: Graph) -> list[Event]:
    """Mismatches that are announced."""
    found: list[Event] = []
    graph.event_listeners.append(lambda name, data: found.append((name, data)))
    return found


def mismatches(events: list[Event]) -> list[dict[str, Any]]:
    return [data for name, data in events if name == "BLKVERIFY_MISMATCH"]


# --- reads that differ ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length", "changed", "where"),
    [
        (0, 512, 0, 0),
        (0, 512, 511, 511),
        (0, 512, 512, None),
        (512, 512, 511, None),
        (4096, 8192, 5000, 5000),
        (100, 33, 132, 132),
        (0, LENGTH, LENGTH - 1, LENGTH - 1),
        (LENGTH - 1, 1, LENGTH - 1, LENGTH - 1),
    ],
)
async def test_a_byte_that_differs_is_found_where_it_is(
    graph: Graph,
    events: list[Event],
    caplog: pytest.LogCaptureFixture,
    offset: int,
    length: int,
    changed: int,
    where: int | None,
) -> None:
    root, test, raw = await add(graph)
    test.data[:] = raw.data[:] = random.Random(1).randbytes(LENGTH)
    test.data[changed] ^= 1
    if where is None:
        assert await read(root, offset, length) == test.data[offset : offset + length]
        return
    with pytest.raises(BlockIOError) as failed:
        await read(root, offset, length)
    reason = f"contents mismatch at offset {where}"
    assert (failed.value.errno, failed.value.reason) == (errno.EIO, reason)
    # QEMU's line
    line = f"blkverify: read offset={offset} bytes={length} {reason}"
    assert caplog.record_tuples[0] == ("fusebd.block.mismatch", logging.ERROR, line)
    end = min(where + 16, offset + length)
    assert mismatches(events) == [
        {
            "node-name": "v",
            "operation": "read",
            "offset": offset,
            "length": length,
            "reason": reason,
            "mismatch-offset": where,
            "test-data": test.data[where:end].hex(),
            "raw-data": raw.data[where:end].hex(),
        }
    ]


async def test_the_first_of_several_differences_is_shown(graph: Graph, events: list[Event]) -> None:
    root, test, _ = await add(graph)
    for changed in (7000, 3000, 65000):
        test.data[changed] = 1
    with pytest.raises(BlockIOError, match="contents mismatch at offset 3000"):
        await read(root, 0, LENGTH)
    assert len(mismatches(events)) == 1


@pytest.mark.parametrize("changed", [0, 99, 100, 101, 4095, 9999])
async def test_a_difference_is_found_in_any_of_several_buffers(graph: Graph, changed: int) -> None:
    root, test, _ = await add(graph)
    test.data[1000 + changed] = 1
    found = memoryview(bytearray(10000))
    with pytest.raises(BlockIOError, match=f"contents mismatch at offset {1000 + changed}$"):
        await root.preadv(1000, (found[:100], found[100:100], found[100:4096], found[4096:]))


async def test_a_mismatch_leaves_the_node_usable(graph: Graph) -> None:
    root, test, _ = await add(graph)
    test.data[0] = 1
    with pytest.raises(BlockIOError):
        await read(root, 0, 512)
    assert await read(root, 512, 512) == bytes(512)
    await write(root, 0, b"\0")
    assert await read(root, 0, 512) == bytes(512)


async def test_what_is_announced_as_a_failed_request_is_the_mismatch(graph: Graph, events: list[Event]) -> None:
    root, test, _ = await add(graph)
    test.data[0] = 1
    with pytest.raises(BlockIOError):
        await read(root, 0, 512)
    assert [name for name, _ in events] == ["BLKVERIFY_MISMATCH", "BLOCK_IO_ERROR"]


# --- results that differ -------------------------------------------------------------------------

EIO, ENOSPC = errno.EIO, errno.ENOSPC


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize(
    ("test_errno", "raw_errno"), [(EIO, 0), (0, EIO), (ENOSPC, EIO), (errno.ENOTSUP, 0), (ENOSPC, ENOSPC)]
)
async def test_results_that_differ_are_a_mismatch(
    graph: Graph,
    events: list[Event],
    caplog: pytest.LogCaptureFixture,
    operation: str,
    test_errno: int,
    raw_errno: int,
) -> None:
    await graph.blockdev_add(
        {
            "driver": "blkverify",
            "node-name": "v",
            "test": failing(MEMORY, errno=test_errno),
            "raw": failing(MEMORY, errno=raw_errno),
        }
    )
    root = root_of(graph, "v", READ_WRITE)
    with pytest.raises(BlockIOError) as failed:
        await (read(root, 512, 1024) if operation == "read" else write(root, 512, bytes(1024)))
    if test_errno == raw_errno:
        # both sides agree that it fails: nothing to find (QEMU compares what was not read, too)
        assert (failed.value.errno, mismatches(events), caplog.record_tuples) == (test_errno, [], [])
        return
    reason = f"return value mismatch {-test_errno} != {-raw_errno}"
    assert (failed.value.errno, failed.value.reason) == (EIO, reason)
    assert [message for _, _, message in caplog.record_tuples] == [
        f"blkverify: {operation} offset=512 bytes=1024 {reason}"
    ]
    assert mismatches(events) == [
        {
            "node-name": "v",
            "operation": operation,
            "offset": 512,
            "length": 1024,
            "reason": reason,
            "test-errno": test_errno,
            "raw-errno": raw_errno,
        }
    ]


def qemu_io(options: dict[str, Any], *commands: str) -> str:
    """What qemu-io says; blkverify ends it at a mismatch."""
    words = [word for command in commands for word in ("-c", command)]
    name = "json:" + json.dumps(options)
    done = subprocess.run(["qemu-io", "-t", "writeback", *words, name], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("test_rule", "raw_rule", "command"),
    [
        ({"iotype": "flush"}, {"iotype": "flush"}, "read 0 4096"),
        ({"iotype": "flush"}, {"iotype": "flush"}, "read 5000 24"),
        ({"iotype": "read"}, {"iotype": "flush"}, "read 512 512"),
        ({"iotype": "flush"}, {"iotype": "read", "errno": ENOSPC}, "read 512 512"),
        ({"iotype": "write", "errno": ENOSPC}, {"iotype": "flush"}, "write 512 1024"),
        ({"iotype": "write", "errno": ENOSPC}, {"iotype": "write"}, "write 512 1024"),
    ],
)
async def test_the_words_are_those_of_qemu_io(
    graph: Graph,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    test_rule: dict[str, Any],
    raw_rule: dict[str, Any],
    command: str,
) -> None:
    (tmp_path / "raw").write_bytes(bytes(LENGTH))
    (tmp_path / "test").write_bytes(bytes(3000) + b"\1" + bytes(2007) + b"\1" + bytes(LENGTH - 5009))
    test, raw = ({"driver": "file", "filename": str(tmp_path / name)} for name in ("test", "raw"))
    options = {"driver": "blkverify", "test": failing(test, **test_rule), "raw": failing(raw, **raw_rule)}
    said = qemu_io(options, command)
    await graph.blockdev_add({**options, "node-name": "v"})
    root = root_of(graph, "v", READ_WRITE)
    verb, offset, length = command.split()
    with pytest.raises(BlockIOError):
        await (read(root, int(offset), int(length)) if verb == "read" else write(root, int(offset), bytes(int(length))))
    assert caplog.messages[0] == said.strip()


# --- what reaches which side ---------------------------------------------------------------------


async def test_reads_and_writes_go_to_both(graph: Graph) -> None:
    root, test, raw = await add(graph)
    await write(root, 1000, b"data")
    await read(root, 500, 1000)
    assert test.log == raw.log == [("write", 1000, 4), ("read", 500, 1000)]
    assert test.data == raw.data == bytes(1000) + b"data" + bytes(LENGTH - 1004)


async def test_a_flush_goes_to_test_alone(graph: Graph) -> None:
    root, test, raw = await add(graph)
    await write(root, 0, b"data")
    await root.flush()
    assert test.log == [("write", 0, 4), ("flush", 0, 0)]
    assert raw.log == [("write", 0, 4)]


async def test_a_write_through_to_the_disk_flushes_test_alone(graph: Graph) -> None:
    root, test, raw = await add(graph)
    await root.pwritev(0, (memoryview(b"data"),), FUA)
    assert (test.log[-1], raw.log[-1]) == (("flush", 0, 0), ("write", 0, 4))


async def test_a_failing_flush_of_test_fails(graph: Graph) -> None:
    await graph.blockdev_add(
        {
            "driver": "blkverify",
            "node-name": "v",
            "test": failing(MEMORY, iotype="flush", errno=ENOSPC),
            "raw": failing(MEMORY, iotype="flush"),
        }
    )
    root = root_of(graph, "v", READ_WRITE)
    await write(root, 0, b"data")
    with pytest.raises(BlockIOError) as failed:
        await root.flush()
    assert failed.value.errno == ENOSPC


async def test_zero_writes_reach_both_as_writes(graph: Graph) -> None:
    root, test, raw = await add(graph)
    await write(root, 0, b"x" * 8192)
    await root.pwrite_zeroes(100, 4000)
    assert test.log == raw.log == [("write", 0, 8192), ("write", 100, 4000)]
    assert test.data == raw.data == b"x" * 100 + bytes(4000) + b"x" * 4092 + bytes(LENGTH - 8192)


async def test_discards_reach_neither(graph: Graph) -> None:
    root, test, raw = await add(graph, test={"discard": "unmap"}, raw={"discard": "unmap"})
    await root.pdiscard(0, 4096)
    assert test.log == raw.log == []


async def test_block_status_is_that_of_raw(graph: Graph) -> None:
    root, _, raw = await add(graph)
    status = await root.node.driver.block_status(4096, 512)
    assert (status.file, status.host_offset, status.length) == (raw.node, 4096, 512)


# --- lengths -------------------------------------------------------------------------------------


async def test_the_length_is_that_of_test(graph: Graph) -> None:
    root, _, _ = await add(graph, test={"size": 4096}, raw={"size": 8192})
    assert root.length == 4096


async def test_a_longer_raw_is_not_looked_at_behind_the_end(graph: Graph) -> None:
    root, _, raw = await add(graph, test={"size": 4096}, raw={"size": 8192})
    raw.data[4096:] = b"x" * 4096
    assert await read(root, 0, 4096) == bytes(4096)
    with pytest.raises(BlockIOError):
        await read(root, 4000, 97)


async def test_a_shorter_raw_counts_as_zeroes_behind_its_end(graph: Graph) -> None:
    root, test, _ = await add(graph, test={"size": 8192}, raw={"size": 4096})
    assert await read(root, 4000, 4192) == bytes(4192)
    test.data[5000] = 1
    with pytest.raises(BlockIOError, match="contents mismatch at offset 5000"):
        await read(root, 4000, 4192)


async def test_a_write_behind_the_end_of_a_shorter_raw_is_a_mismatch(graph: Graph) -> None:
    # an assertion fails in QEMU
    root, _, _ = await add(graph, test={"size": 8192}, raw={"size": 4096})
    with pytest.raises(BlockIOError, match="return value mismatch 0 != -5"):
        await write(root, 4096, b"data")


async def test_a_resize_changes_both(graph: Graph) -> None:
    # QEMU resizes raw alone
    root, test, raw = await add(graph)
    lengths: list[int] = []
    root.on_resize = lambda: lengths.append(root.length)
    for size in (LENGTH + 512, 4096):
        await graph.block_resize("v", size)
        assert (root.length, test.length, raw.length) == (size, size, size)
        assert await read(root, 0, size) == bytes(size)
    assert lengths == [LENGTH + 512, 4096]


async def test_a_resize_of_test_is_noticed_and_one_of_raw_is_not(graph: Graph) -> None:
    root, _, _ = await add(graph)
    await graph.block_resize("r", 4096)
    assert root.length == LENGTH
    with pytest.raises(FusebdError, match="unshared by node 'v'"):
        # a data child may not be resized by anybody else
        await graph.block_resize("t", 4096)


async def test_a_node_that_cannot_be_resized_refuses(graph: Graph) -> None:
    await graph.blockdev_add(
        {"driver": "blkverify", "node-name": "v", "test": {"driver": "null-co"}, "raw": {"driver": "null-co"}}
    )
    with pytest.raises(BlockIOError, match="Image format driver does not support resize"):
        await graph.block_resize("v", 4096)


# --- stacks and references -----------------------------------------------------------------------


def create(path: Path, *options: str) -> dict[str, Any]:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), str(LENGTH)], check=True)
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}


@pytest.fixture
def sides(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """An empty qcow2 image to test, and a raw file of the same length."""
    (tmp_path / "raw").write_bytes(bytes(LENGTH))
    test = create(tmp_path / "test.qcow2", "-o", "cluster_size=512")
    return test, {"driver": "file", "filename": str(tmp_path / "raw")}


@pytest.mark.parametrize("referenced", ["", "test", "raw", "test raw"])
async def test_a_side_may_be_a_reference_or_inline(
    graph: Graph, sides: tuple[dict[str, Any], dict[str, Any]], referenced: str
) -> None:
    test, raw = ({**side, "node-name": name} for side, name in zip(sides, ("t", "r"), strict=True))
    options: dict[str, Any] = {"driver": "blkverify", "node-name": "v", "test": test, "raw": raw}
    for name in referenced.split():
        await graph.blockdev_add(options[name])
        options[name] = options[name]["node-name"]
    await graph.blockdev_add(options)
    root = root_of(graph, "v", READ_WRITE)
    await write(root, 0x8000, b"\x2a" * 512)
    assert await read(root, 0, LENGTH) == bytes(0x8000) + b"\x2a" * 512 + bytes(LENGTH - 0x8200)
    await graph.detach_root(root)
    await graph.blockdev_del("v")
    assert list(graph.named_nodes()) == [{"test": "t", "raw": "r"}[name] for name in referenced.split()]


async def test_random_requests_over_qcow2_and_raw_agree(
    graph: Graph, sides: tuple[dict[str, Any], dict[str, Any]], events: list[Event]
) -> None:
    test, raw = sides
    await graph.blockdev_add({"driver": "blkverify", "node-name": "v", "test": test, "raw": raw})
    root = root_of(graph, "v", READ_WRITE)
    rng, model = random.Random(3), bytearray(LENGTH)

    async def request() -> None:
        offset = rng.randrange(LENGTH - 1)
        length = rng.randrange(1, min(9000, LENGTH - offset) + 1)
        end = offset + length
        match rng.randrange(4):
            case 0:
                model[offset:end] = bytes(length)
                await root.pwrite_zeroes(offset, length)
            case 1:
                data = rng.randbytes(length)
                model[offset:end] = data
                await write(root, offset, data)
            case 2:
                assert await read(root, offset, length) == model[offset:end]
            case _:
                await root.flush()

    for _ in range(300):
        await request()
    assert await read(root, 0, LENGTH) == model
    assert events == []


async def test_a_change_behind_its_back_is_found(
    graph: Graph, tmp_path: Path, sides: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 42 0 512", str(tmp_path / "test.qcow2")],
        check=True,
        capture_output=True,
    )
    await graph.blockdev_add({"driver": "blkverify", "node-name": "v", "test": sides[0], "raw": sides[1]})
    with pytest.raises(BlockIOError, match=r"contents mismatch at offset 0$"):
        await read(root_of(graph, "v"), 0, 512)


async def test_blkverify_below_a_format_and_above_blkdebug(graph: Graph, tmp_path: Path) -> None:
    create(tmp_path / "a.qcow2")
    (tmp_path / "b.qcow2").write_bytes((tmp_path / "a.qcow2").read_bytes())
    test, raw = ({"driver": "file", "filename": str(tmp_path / name)} for name in ("a.qcow2", "b.qcow2"))
    below = {"driver": "blkverify", "test": failing(test, iotype="read", sector=2000), "raw": raw}
    await graph.blockdev_add({"driver": "qcow2", "node-name": "q", "file": below})
    root = root_of(graph, "q", READ_WRITE)
    await write(root, 0, b"data" * 1000)
    assert await read(root, 0, 4000) == b"data" * 1000
    await graph.detach_root(root)
    await graph.blockdev_del("q")
    assert (tmp_path / "a.qcow2").read_bytes() == (tmp_path / "b.qcow2").read_bytes()


async def test_one_node_can_be_both_sides(graph: Graph) -> None:
    await graph.blockdev_add({**MEMORY, "node-name": "m"})
    await graph.blockdev_add({"driver": "blkverify", "node-name": "v", "test": "m", "raw": "m"})
    root = root_of(graph, "v", Perm.CONSISTENT_READ)
    assert await read(root, 0, 512) == bytes(512)


async def test_a_read_only_side_refuses_a_writer(graph: Graph) -> None:
    await graph.blockdev_add({**MEMORY, "node-name": "t", "read-only": True})
    await graph.blockdev_add({"driver": "blkverify", "node-name": "v", "test": "t", "raw": MEMORY})
    with pytest.raises(ReadOnlyError, match=r"^Block node is read-only$"):
        root_of(graph, "v", READ_WRITE)


# The messages are those of qemu-storage-daemon 10.0.2.
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Parameter 'test' is missing"),
        ({"test": MEMORY}, "Parameter 'raw' is missing"),
        ({"test": MEMORY, "raw": None}, "Invalid parameter type for 'raw', expected: BlockdevRef"),
        ({"test": MEMORY, "raw": "nope"}, "Cannot find device='nope' nor node-name='nope'"),
        ({"test": MEMORY, "raw": MEMORY, "file": MEMORY}, "Parameter 'file' is unexpected"),
        ({"test": "v", "raw": MEMORY}, "Making 'v' a test child of 'v' would create a cycle"),
        ({"test": MEMORY, "raw": "v"}, "Making 'v' a raw child of 'v' would create a cycle"),
    ],
)
async def test_bad_options_are_refused(graph: Graph, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FusebdError) as refused:
        await graph.blockdev_add({"driver": "blkverify", "node-name": "v", **options})
    assert str(refused.value) == message
    assert not graph.nodes


# --- legacy names --------------------------------------------------------------------------------


async def test_the_legacy_name_means_both_sides(graph: Graph, tmp_path: Path) -> None:
    create(tmp_path / "test")
    (tmp_path / "raw").write_bytes(bytes(LENGTH))
    options = await options_for(f"blkverify:{tmp_path}/raw:{tmp_path}/test", "raw", graph.probe)
    node = await graph.open_node(options)
    node.monitor_owned = True
    verify = node.children["file"].node
    assert (node.driver_name, verify.driver_name) == ("raw", "blkverify")
    # the test side is an image whose format is found out, the raw side a file
    assert {name: child.node.driver_name for name, child in verify.children.items()} == {"raw": "file", "test": "qcow2"}


@pytest.mark.parametrize("name", ["blkverify:", "blkverify:/tmp/raw"])
async def test_a_legacy_name_without_both_sides_is_refused(graph: Graph, name: str) -> None:
    with pytest.raises(OptionError, match=r"^blkverify requires raw copy and original image path$"):
        await options_for(name, "raw", graph.probe)


async def test_the_legacy_name_is_understood_in_a_backing_file_field(graph: Graph, tmp_path: Path) -> None:
    create(tmp_path / "test")
    (tmp_path / "raw").write_bytes(b"x" * LENGTH)
    backing = f"blkverify:{tmp_path}/raw:{tmp_path}/test"
    create(tmp_path / "top", "-u", "-F", "raw", "-b", backing)
    top = {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": str(tmp_path / "top")}}
    await graph.blockdev_add(top)
    with pytest.raises(BlockIOError, match="contents mismatch at offset 512"):
        await read(root_of(graph, "top", Perm.CONSISTENT_READ), 512, 512)


# --- at the same time ----------------------------------------------------------------------------


async def test_nothing_suspends_over_memory(graph: Graph) -> None:
    root, _, _ = await add(graph)
    with trio.testing.assert_no_checkpoints():
        await write(root, 0, b"data")
        await read(root, 0, 512)
        await root.flush()


class Gate:
    """Makes a memory node's reads wait, and says how many do."""

    def __init__(self, memory: Memory) -> None:
        self.waiting, self.opened = 0, trio.Event()
        self._read = memory.preadv
        memory.preadv = self.preadv  # type: ignore[method-assign]
        memory.node.refresh_edges()

    async def preadv(self, offset: int, bufs: Any) -> None:
        self.waiting += 1
        await self.opened.wait()
        self.waiting -= 1
        await self._read(offset, bufs)


async def test_sides_that_wait_are_at_work_at_the_same_time(graph: Graph) -> None:
    root, test, raw = await add(graph)
    gates = Gate(test), Gate(raw)
    async with trio.open_nursery() as nursery:
        # the first request finds out that test waits
        nursery.start_soon(read, root, 0, 512)
        await trio.testing.wait_all_tasks_blocked()
        gates[0].opened.set()
        await trio.testing.wait_all_tasks_blocked()
        gates[0].opened = trio.Event()
        gates[1].opened.set()
        await trio.testing.wait_all_tasks_blocked()
        gates[1].opened = trio.Event()
        nursery.start_soon(read, root, 0, 512)
        await trio.testing.wait_all_tasks_blocked()
        assert [gate.waiting for gate in gates] == [1, 1]
        for gate in gates:
            gate.opened.set()


@pytest.mark.parametrize("side", ["test", "raw"])
async def test_a_cancelled_request_leaves_nothing_behind(graph: Graph, side: str) -> None:
    root, test, raw = await add(graph)
    gate = Gate(test if side == "test" else raw)
    for _ in range(2):  # the second time, the sides are at work at the same time if test waited
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, root, 0, 512)
            await trio.testing.wait_all_tasks_blocked()
            assert gate.waiting == 1
            nursery.cancel_scope.cancel()
        assert root.in_flight == 0
        gate.waiting = 0
    gate.opened.set()
    assert await read(root, 0, 512) == bytes(512)


async def test_many_requests_at_once_are_each_compared(graph: Graph, events: list[Event]) -> None:
    await graph.blockdev_add({**MEMORY, "node-name": "t"})
    await graph.blockdev_add({**MEMORY, "node-name": "r"})
    suspends = {"driver": "test-suspends", "most": 4}
    await graph.blockdev_add(
        {
            "driver": "blkverify",
            "node-name": "v",
            "test": {**suspends, "file": "t", "seed": 1},
            "raw": {**suspends, "file": "r", "seed": 2},
        }
    )
    root = root_of(graph, "v", READ_WRITE)
    memory_of(graph, "t").data[:] = memory_of(graph, "r").data[:] = random.Random(5).randbytes(LENGTH)
    memory_of(graph, "t").data[30 * 1024 + 17] ^= 1
    failed: list[int] = []

    async def one(number: int) -> None:
        try:
            await read(root, number * 1024, 1024)
        except BlockIOError:
            failed.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(64):
            nursery.start_soon(one, number)
    assert failed == [30]
    assert [data["mismatch-offset"] for data in mismatches(events)] == [30 * 1024 + 17]
