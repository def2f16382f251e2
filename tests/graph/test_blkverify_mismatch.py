"""What becomes of a mismatch: the choice of on-mismatch, the dump of the difference, and how much is logged."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest
from support import READ_WRITE, Memory, memory_of, read, root_of, write

from fusebd.block.graph import Graph
from fusebd.block.mismatch import dump_difference, first_difference
from fusebd.block.root import Root
from fusebd.errors import BlockIOError, OptionError
from fusebd.eventlog import EventLog

LENGTH = 65536
MEMORY = {"driver": "test-memory", "size": LENGTH}
EIO, ENOSPC = errno.EIO, errno.ENOSPC


async def add(graph: Graph, action: str | None = None) -> tuple[Root, Memory, Memory]:
    """A node ``v`` over the memory nodes ``t`` (test) and ``r`` (raw), which are the same."""
    for name in "tr":
        await graph.blockdev_add({**MEMORY, "node-name": name})
    options = {} if action is None else {"on-mismatch": action}
    await graph.blockdev_add({"driver": "blkverify", "node-name": "v", "test": "t", "raw": "r", **options})
    return root_of(graph, "v", READ_WRITE), memory_of(graph, "t"), memory_of(graph, "r")


async def add_failing(graph: Graph, action: str, test_errno: int, raw_errno: int) -> tuple[Root, Memory, Memory]:
    """The same, with every read and write of either side ending with its errno, if that is not 0."""
    for name, code in (("test", test_errno), ("raw", raw_errno)):
        await graph.blockdev_add({**MEMORY, "node-name": f"{name}-memory"})
        rules = [{"event": "none", "iotype": iotype, "errno": code} for iotype in ("read", "write")]
        failing = {"driver": "blkdebug", "node-name": name, "image": f"{name}-memory"}
        # one request is made; the first active rule of its type decides
        await graph.blockdev_add({**failing, "inject-error": rules} if code else failing)
    await graph.blockdev_add(
        {"driver": "blkverify", "node-name": "v", "test": "test", "raw": "raw", "on-mismatch": action}
    )
    return root_of(graph, "v", READ_WRITE), memory_of(graph, "test-memory"), memory_of(graph, "raw-memory")


@pytest.fixture
def events(graph: Graph) -> list[str]:
    """The names of what is announced, but for the faults that make the sides fail."""
    found: list[str] = []
    graph.event_listeners.append(lambda name, data: found.append(name) if name != "FAULT_INJECTED" else None)
    return found


@pytest.fixture
def failures(graph: Graph) -> list[str]:
    """Why the program would end."""
    found: list[str] = []
    graph.failure_listeners.append(found.append)
    return found


async def outcome(request: Any) -> int:
    try:
        await request
    except BlockIOError as error:
        return error.errno
    return 0


# --- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [None, "error"])
async def test_by_itself_a_mismatch_fails_the_read(
    graph: Graph, events: list[str], failures: list[str], action: str | None
) -> None:
    root, test, _ = await add(graph, action)
    test.data[100] = 1
    assert await outcome(read(root, 0, 512)) == EIO
    assert events == ["BLKVERIFY_MISMATCH", "BLOCK_IO_ERROR"]
    assert failures == []


async def test_what_is_just_reported_is_read_as_the_side_under_test_has_it(
    graph: Graph, events: list[str], failures: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    root, test, _ = await add(graph, "report")
    test.data[100:104] = b"data"
    assert await read(root, 0, 512) == bytes(100) + b"data" + bytes(408)
    assert events == ["BLKVERIFY_MISMATCH"]
    assert failures == []
    assert caplog.messages[0] == "blkverify: read offset=0 bytes=512 contents mismatch at offset 100"


async def test_what_is_just_reported_may_be_in_any_of_several_buffers(graph: Graph, events: list[str]) -> None:
    root, test, _ = await add(graph, "report")
    test.data[:] = random.Random(1).randbytes(LENGTH)
    found = memoryview(bytearray(4096))
    await root.preadv(0, (found[:100], found[100:100], found[100:]))
    assert found == test.data[:4096]
    assert events == ["BLKVERIFY_MISMATCH"]


async def test_a_mismatch_can_end_the_program(graph: Graph, events: list[str], failures: list[str]) -> None:
    root, test, _ = await add(graph, "stop")
    test.data[100] = 1
    assert await outcome(read(root, 0, 512)) == EIO
    assert events == ["BLKVERIFY_MISMATCH", "BLOCK_IO_ERROR"]
    assert failures == ["v: blkverify: read offset=0 bytes=512 contents mismatch at offset 100"]


async def test_nothing_happens_while_both_sides_are_the_same(
    graph: Graph, events: list[str], failures: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    root, _, _ = await add(graph, "stop")
    await write(root, 0, b"data")
    assert await read(root, 0, LENGTH) == b"data" + bytes(LENGTH - 4)
    assert events == failures == caplog.messages == []


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize(
    ("action", "test_errno", "raw_errno", "result"),
    [
        ("error", 0, ENOSPC, EIO),
        ("error", ENOSPC, 0, EIO),
        ("report", 0, ENOSPC, 0),
        ("report", ENOSPC, 0, ENOSPC),
        ("report", ENOSPC, EIO, ENOSPC),
        ("stop", 0, ENOSPC, EIO),
    ],
)
async def test_results_that_differ_are_treated_alike(
    graph: Graph,
    events: list[str],
    failures: list[str],
    operation: str,
    action: str,
    test_errno: int,
    raw_errno: int,
    result: int,
) -> None:
    root, test, _ = await add_failing(graph, action, test_errno, raw_errno)
    test.data[0] = 1
    found = memoryview(bytearray(512))
    request = root.preadv(0, (found,)) if operation == "read" else root.pwritev(0, (found,))
    assert await outcome(request) == result
    assert events[0] == "BLKVERIFY_MISMATCH"
    assert events.count("BLKVERIFY_MISMATCH") == 1
    line = f"v: blkverify: {operation} offset=0 bytes=512 return value mismatch {-test_errno} != {-raw_errno}"
    assert failures == ([line] if action == "stop" else [])
    if not result:
        assert found == test.data[:512]


@pytest.mark.parametrize("action", ["error", "report", "stop"])
async def test_sides_that_fail_alike_are_no_mismatch(
    graph: Graph, events: list[str], failures: list[str], action: str
) -> None:
    root, _, _ = await add_failing(graph, action, ENOSPC, ENOSPC)
    assert await outcome(read(root, 0, 512)) == ENOSPC
    assert events == ["BLOCK_IO_ERROR"]
    assert failures == []


async def test_another_word_is_refused(graph: Graph) -> None:
    with pytest.raises(OptionError, match=r"^Parameter 'on-mismatch' does not accept value 'exit'$"):
        await add(graph, "exit")


# --- the dump ------------------------------------------------------------------------------------

SIDES = ("test", "raw")


def dump(offset: int, a: bytes, b: bytes) -> list[str]:
    return dump_difference(offset, first_difference(a, b), a, b, SIDES)


def test_a_dump_shows_both_sides_where_they_differ() -> None:
    right = bytes(range(48))
    wrong = right[:20] + b"AB" + right[22:]
    assert dump(0x1000, wrong, right) == [
        "00001000  both  00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f  |................|",
        "00001010  test  10 11 12 13 41 42 16 17 18 19 1a 1b 1c 1d 1e 1f  |....AB..........|",
        "00001010  raw   10 11 12 13 14 15 16 17 18 19 1a 1b 1c 1d 1e 1f  |................|",
        """00001020  both  20 21 22 23 24 25 26 27 28 29 2a 2b 2c 2d 2e 2f  | !"#$%&'()*+,-./|""",
    ]


def test_a_dump_keeps_bytes_in_their_columns() -> None:
    assert dump(0x1005, b"abcdef", b"abcxyz") == [
        "00001000  test                 61 62 63 64 65 66                 |     abcdef|",
        "00001000  raw                  61 62 63 78 79 7a                 |     abcxyz|",
    ]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 1 << 20])
@pytest.mark.parametrize("offset", [0, 7, 512, 1 << 40])
def test_a_dump_is_short_and_begins_a_line_before_the_first_difference(offset: int, length: int) -> None:
    rng = random.Random(length)
    a = rng.randbytes(length)
    b = bytes(byte ^ 255 for byte in a)
    for first in {0, length // 2, length - 1}:
        lines = dump(offset, a, a[:first] + b[first:])
        assert len(lines) <= 16
        where = offset + first
        numbers = [int(line.split()[0], 16) for line in lines]
        assert numbers[0] in (where // 16 * 16 - 16, where // 16 * 16)
        assert where // 16 * 16 in numbers
        assert all(offset - 16 < number < offset + length for number in numbers)


def test_the_first_difference_is_found_wherever_it_is() -> None:
    data = random.Random(2).randbytes(1000)
    for at in (0, 1, 499, 500, 501, 998, 999):
        for also in (at, 999):
            other = bytearray(data)
            other[at] ^= 1
            other[also] ^= 2
            assert first_difference(data, bytes(other)) == at


# --- the log -------------------------------------------------------------------------------------


async def test_the_log_shows_the_difference(graph: Graph, caplog: pytest.LogCaptureFixture) -> None:
    root, test, raw = await add(graph)
    test.data[4096:8192] = raw.data[4096:8192] = b"same" * 1024
    test.data[5000:5004] = b"left"
    raw.data[5000:5005] = b"right"
    with pytest.raises(BlockIOError):
        await read(root, 4096, 4096)
    same = "73 61 6d 65 73 61 6d 65 73 61 6d 65 73 61 6d 65  |samesamesamesame|"
    assert caplog.messages[1:5] == [
        f"00001370  both  {same}",
        "00001380  test  73 61 6d 65 73 61 6d 65 6c 65 66 74 73 61 6d 65  |samesameleftsame|",
        "00001380  raw   73 61 6d 65 73 61 6d 65 72 69 67 68 74 61 6d 65  |samesamerightame|",
        f"00001390  both  {same}",
    ]
    assert len(caplog.messages) <= 17


async def test_many_mismatches_are_all_announced_and_few_are_logged(
    graph: Graph, events: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    EventLog(graph)
    now = 100.0
    monkeypatch.setattr("fusebd.block.quiet.monotonic", lambda: now)
    root, test, _ = await add(graph, "report")
    test.data[:] = b"x" * LENGTH
    caplog.clear()
    for at in range(50):
        await read(root, at * 512, 512)
    assert events == ["BLKVERIFY_MISMATCH"] * 50
    line = "blkverify: read offset=0 bytes=512 contents mismatch at offset 0"
    assert [message for message in caplog.messages if "offset=" in message] == [line, caplog.messages[-1]]
    assert caplog.messages[-1].startswith("BLKVERIFY_MISMATCH: node-name=v operation=read offset=0 ")
    now += 1
    caplog.clear()
    await read(root, 0, 512)
    assert caplog.messages[0] == f"{line} (49 more since the last line)"
