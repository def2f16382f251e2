"""The quorum driver: votes, events, and what reaches which child."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from qemuprograms import storage_daemon
from quorums import ERRNOS, LENGTH, MEMORY, Event, add, bad, content, failing, failure, listen, outcome
from support import READ_WRITE, Memory, memory_of, read, root_of, write

from fusebd.block.blockstatus import block_status
from fusebd.block.child import FUA, MAY_UNMAP, NO_FALLBACK
from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.block.status import BlockStatus, Status
from fusebd.errors import BlockIOError, NotSupported
from fusebd.eventlog import EventLog

EIO, ENOMEM = errno.EIO, errno.ENOMEM


@pytest.fixture
def events(graph: Graph) -> list[Event]:
    return listen(graph)


# --- reads are voted on ----------------------------------------------------------------------------

#: children, threshold, what a read gives (a content, or an error's letter), and whom it reports, in this order
VOTES = [
    ("a", 1, "a", ""),
    ("E", 1, "E", "E0"),
    ("aaa", 2, "a", ""),
    ("aab", 2, "a", "2"),
    ("aba", 2, "a", "1"),
    ("baa", 2, "a", "0"),
    ("abc", 2, "E", ""),
    ("ab", 2, "E", ""),
    ("aab", 3, "E", ""),
    # as many votes for each: the version that came up last wins
    ("ab", 1, "b", "0"),
    ("abc", 1, "c", "10"),
    ("aabb", 2, "b", "10"),
    ("abab", 2, "b", "20"),
    ("abaab", 2, "a", "41"),
    ("abcabcb", 3, "b", "5230"),
    # children that fail have no vote
    ("Eaa", 2, "a", "E0"),
    ("aEa", 2, "a", "E1"),
    ("Eab", 2, "E", "E0"),
    ("Ebba", 2, "b", "E03"),
    ("EaN", 1, "a", "E0N2"),
    # too few are left: the error that most have, the one that came up last if there are several such
    ("aEE", 2, "E", "E1E2"),
    ("aEN", 2, "N", "E1N2"),
    ("aNE", 2, "E", "N1E2"),
    ("NENa", 2, "N", "N0E1N2"),
    ("EbN", 2, "N", "E0N2"),
]


def verdict(children: str, result: str, reports: str) -> list[Event]:
    """The events of a read whose row in VOTES this is."""
    expected = []
    letters = iter(reports)
    for letter in letters:
        error = letter if letter in ERRNOS else None
        expected.append(bad(int(next(letters) if error else letter), error=error))
    return [*expected, failure()] if result in ERRNOS else expected


@pytest.mark.parametrize(("children", "threshold", "result", "reports"), VOTES)
async def test_a_read_is_voted_on(
    graph: Graph, events: list[Event], children: str, threshold: int, result: str, reports: str
) -> None:
    root, _ = await add(graph, children, threshold)
    found = memoryview(bytearray(4096))
    code = await outcome(root.preadv(0, (found[:100], found[100:100], found[100:])))
    assert code == ERRNOS.get(result, 0)
    if not code:
        assert found == result.encode() * 4096
    assert events == verdict(children, result, reports)


def qemu_io(image: str, command: str) -> str:
    """What qemu-io says to *command* on the read-only *image*."""
    words = ["qemu-io", "-f", "raw", "-r", "-c", command, image]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize(("children", "threshold", "result", "reports"), VOTES)
def test_the_verdict_is_that_of_qemu(tmp_path: Path, children: str, threshold: int, result: str, reports: str) -> None:
    nodes = []
    for index, letter in enumerate(children):
        (tmp_path / str(index)).write_bytes(content(letter))
        file: dict[str, Any] = {"driver": "file", "filename": str(tmp_path / str(index))}
        if letter in ERRNOS:
            file = {**failing(ERRNOS[letter], "read"), "image": file}
        nodes.append({**file, "node-name": f"c{index}"})
    quorum = {"driver": "quorum", "node-name": "q", "children": nodes, "vote-threshold": threshold}
    command = f"read -P {ord(result)} 0 4096"
    said = qemu_io("json:" + json.dumps({"driver": "raw", "file": quorum}), command)
    if result in ERRNOS:
        assert said == f"read failed: {os.strerror(ERRNOS[result])}\n"
    else:
        assert said.startswith("read 4096/4096 bytes")
    with storage_daemon() as qmp:
        qmp("blockdev-add", quorum)
        qmp("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}})
        qmp("block-export-add", {"type": "nbd", "id": "e", "node-name": "q"})
        qmp.events.clear()
        qemu_io(f"nbd+unix:///q?socket={tmp_path}/nbd", command)
        qmp("query-version")
        found = [(event["event"], event["data"]) for event in qmp.events if event["event"].startswith("QUORUM")]
    assert found == verdict(children, result, reports)


async def test_events_count_sectors_that_the_request_touches(graph: Graph, events: list[Event]) -> None:
    root, _ = await add(graph, "aab")
    await read(root, 1000, 100)
    await read(root, 511, 2)
    await read(root, 1024, 512)
    assert events == [bad(2, sector=1, sectors=2), bad(2, sector=0, sectors=2), bad(2, sector=2, sectors=1)]


async def test_the_log_has_one_line_for_reports_of_the_same_kind(
    graph: Graph, events: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    EventLog(graph)
    root, _ = await add(graph, "abEa")
    caplog.clear()
    for at in range(50):
        await read(root, at * 512, 512)
    assert len(events) == 100
    reported = "QUORUM_REPORT_BAD: type=read "
    assert caplog.messages == [
        f"{reported}error=Input/output error node-name=c2 sector-num=0 sectors-count=1",
        f"{reported}node-name=c1 sector-num=0 sectors-count=1",
    ]


async def test_the_place_of_a_difference_does_not_matter(graph: Graph, events: list[Event]) -> None:
    root, memories = await add(graph)
    content = random.Random(3).randbytes(LENGTH)
    for memory in memories:
        memory.data[:] = content
    for at in (0, 4095, 4096, LENGTH - 1):
        for memory in memories:
            memory.data[at] ^= 1
            assert await read(root, 0, LENGTH) == content
            memory.data[at] ^= 1
    assert [data["node-name"] for _, data in events] == ["c0", "c1", "c2"] * 4


async def test_children_that_differ_elsewhere_do_not_matter(graph: Graph, events: list[Event]) -> None:
    root, memories = await add(graph)
    for index, memory in enumerate(memories):
        memory.data[8192 + index] = 0
    assert await read(root, 0, 8192) == b"a" * 8192
    assert events == []
    with pytest.raises(BlockIOError):
        await read(root, 8192, 3)
    assert events == [failure(16, 1)]


async def test_a_request_too_long_for_a_child_is_voted_on_in_pieces(graph: Graph, events: list[Event]) -> None:
    for index in range(3):
        await graph.blockdev_add({**MEMORY, "node-name": f"c{index}", "max-transfer": 4096 * (3 - index)})
        memory_of(graph, f"c{index}").data[index * 4096] = 1
    children = [f"c{index}" for index in range(3)]
    await graph.blockdev_add({"driver": "quorum", "node-name": "q", "children": children, "vote-threshold": 2})
    assert await read(root_of(graph, "q"), 0, LENGTH) == bytes(LENGTH)
    assert events == [bad(0), bad(1, sector=8), bad(2, sector=16)]


# --- what is wrong is rewritten --------------------------------------------------------------------


@pytest.mark.parametrize("rewrite", [False, True])
async def test_children_without_the_winning_content_get_it_if_wanted(graph: Graph, rewrite: bool) -> None:
    root, memories = await add(graph, "baaac", 3, rewrite_corrupted=rewrite)
    assert await read(root, 4096, 8192) == b"a" * 8192
    for memory, letter in ((memories[0], b"b"), (memories[4], b"c")):
        healed = letter * 4096 + b"a" * 8192 + letter * (LENGTH - 12288)
        assert memory.data == (healed if rewrite else letter * LENGTH)
        assert ("write" in {name for name, _, _ in memory.log}) == rewrite
    assert all(name == "read" for memory in memories[1:4] for name, _, _ in memory.log)


async def test_after_a_rewrite_nothing_is_reported_any_more(graph: Graph, events: list[Event]) -> None:
    root, _ = await add(graph, "aab", rewrite_corrupted=True)
    for _ in range(3):
        assert await read(root, 0, LENGTH) == b"a" * LENGTH
    assert events == [bad(2, sectors=128)]


async def test_a_reader_alone_has_children_rewritten(graph: Graph) -> None:
    root, memories = await add(graph, "aab", rewrite_corrupted=True)
    await graph.detach_root(root)
    await read(root_of(graph, "q", Perm.CONSISTENT_READ), 0, LENGTH)
    assert memories[2].data == b"a" * LENGTH


async def test_a_rewrite_that_fails_leaves_the_read_right(graph: Graph, events: list[Event]) -> None:
    root, memories = await add(graph, "Eaa", fails="write", rewrite_corrupted=True)
    memories[0].data[:] = b"b" * LENGTH
    for _ in range(2):
        assert await read(root, 0, 4096) == b"a" * 4096
    assert events == [bad(0)] * 2


async def test_a_child_that_cannot_be_read_is_not_rewritten(graph: Graph) -> None:
    root, memories = await add(graph, "Eaab", rewrite_corrupted=True)
    await read(root, 0, 4096)
    assert [[name for name, _, _ in memory.log] for memory in memories] == [[], ["read"], ["read"], ["read", "write"]]


async def test_without_a_quorum_nothing_is_rewritten(graph: Graph) -> None:
    root, memories = await add(graph, "abc", rewrite_corrupted=True)
    with pytest.raises(BlockIOError):
        await read(root, 0, 4096)
    assert [memory.log for memory in memories] == [[("read", 0, 4096)]] * 3


# --- one after the other ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("children", "result", "reports"),
    [("abc", "a", ""), ("Eab", "a", "E0"), ("ENa", "a", "E0N1"), ("EEN", "N", "E0E1N2"), ("NNE", "E", "N0N1E2")],
)
async def test_fifo_asks_until_one_answers(
    graph: Graph, events: list[Event], children: str, result: str, reports: str
) -> None:
    root, memories = await add(graph, children, read_pattern="fifo")
    found = memoryview(bytearray(4096))
    code = await outcome(root.preadv(0, (found,)))
    assert code == ERRNOS.get(result, 0)
    assert code or found == result.encode() * 4096
    # no quorum is asked for, so none can fail
    assert events == [event for event in verdict(children, result, reports) if event[0] != "QUORUM_FAILURE"]
    answers = [letter not in ERRNOS for letter in children]
    asked = answers.index(True) if any(answers) else len(children)
    assert all(memory.log == [] for memory in memories[asked + 1 :])


async def test_fifo_takes_no_notice_of_options_for_votes(graph: Graph, events: list[Event]) -> None:
    root, memories = await add(graph, "abc", read_pattern="fifo", rewrite_corrupted=True, blkverify=True)
    assert await read(root, 0, 4096) == b"a" * 4096
    assert memories[1].log == []
    assert events == []
    assert graph.find("q").children["children.0"].perm == READ_WRITE
    await graph.detach_root(root)
    assert graph.find("q").children["children.0"].perm == Perm.NONE


# --- writes and flushes ----------------------------------------------------------------------------

#: children, threshold, what a write or a flush ends with, whom it reports
OUTCOMES = [
    ("aaa", 3, 0, ""),
    ("aEa", 2, 0, "E1"),
    ("aEa", 3, EIO, "E1"),
    ("ENa", 1, 0, "E0N1"),
    ("ENa", 2, ENOMEM, "E0N1"),
    ("NEN", 1, ENOMEM, "N0E1N2"),
    ("NEE", 1, EIO, "N0E1E2"),
]


@pytest.mark.parametrize("operation", ["write", "write-zeroes"])
@pytest.mark.parametrize(("children", "threshold", "result", "reports"), OUTCOMES)
async def test_a_write_fails_if_too_few_children_carry_it_out(
    graph: Graph, events: list[Event], operation: str, children: str, threshold: int, result: int, reports: str
) -> None:
    root, memories = await add(graph, children, threshold, fails=operation)
    request = root.pwritev(512, (memoryview(b"w" * 1000),)) if operation == "write" else root.pwrite_zeroes(512, 1000)
    assert await outcome(request) == result
    expected = [bad(int(i), "write", 1, 2, letter) for letter, i in zip(reports[::2], reports[1::2], strict=True)]
    assert events == ([*expected, failure(1, 2)] if result else expected)
    byte = b"w" if operation == "write" else b"\0"
    for letter, memory in zip(children, memories, strict=True):
        assert memory.data[512:1512] == (b"a" if letter in ERRNOS else byte) * 1000


@pytest.mark.parametrize(("children", "threshold", "result", "reports"), OUTCOMES)
async def test_a_flush_fails_if_too_few_children_carry_it_out(
    graph: Graph, events: list[Event], children: str, threshold: int, result: int, reports: str
) -> None:
    root, memories = await add(graph, children, threshold, fails="flush")
    await write(root, 0, b"data")
    assert await outcome(root.flush()) == result
    # a flush is about no sectors, and there is no event for too few
    assert events == [bad(int(i), "flush", 0, 0, letter) for letter, i in zip(reports[::2], reports[1::2], strict=True)]
    flushed = [("flush", 0, 0) in memory.log for memory in memories]
    assert flushed == [letter not in ERRNOS for letter in children]


async def test_a_write_reaches_all_children(graph: Graph) -> None:
    root, memories = await add(graph)
    await write(root, 1000, b"data")
    assert all(memory.log == [("write", 1000, 4)] for memory in memories)
    assert all(memory.data[1000:1004] == b"data" for memory in memories)


async def test_a_write_through_to_the_disk_flushes_all_children(graph: Graph) -> None:
    root, memories = await add(graph)
    await root.pwritev(0, (memoryview(b"data"),), FUA)
    assert all(memory.log == [("write", 0, 4), ("flush", 0, 0)] for memory in memories)


async def test_zero_writes_are_zero_writes_of_the_children(graph: Graph) -> None:
    root, memories = await add(graph)
    memories[1].zeroes_supported = False
    await root.pwrite_zeroes(4096, 8192, MAY_UNMAP)
    assert [memory.log for memory in memories] == [
        [("zero", 4096, 8192)],
        [("write", 4096, 8192)],
        [("zero", 4096, 8192)],
    ]


async def test_zeroes_that_no_child_can_write_fast_are_not_supported(graph: Graph, events: list[Event]) -> None:
    root, memories = await add(graph)
    for memory in memories:
        memory.zeroes_supported = False
    with pytest.raises(NotSupported):
        await root.pwrite_zeroes(0, 4096, NO_FALLBACK)
    assert events == []
    assert all(memory.log == [] for memory in memories)


async def test_where_some_children_have_zeroed_fast_the_others_follow(graph: Graph, events: list[Event]) -> None:
    # in QEMU, these keep what they had
    root, memories = await add(graph, threshold=1)
    memories[0].zeroes_supported = memories[2].zeroes_supported = False
    await root.pwrite_zeroes(0, 4096, NO_FALLBACK)
    assert events == []
    assert all(memory.data[:4097] == bytes(4096) + b"a" for memory in memories)


async def test_discards_reach_no_child(graph: Graph) -> None:
    root, memories = await add(graph, discard="unmap")
    await root.pdiscard(0, 4096)
    assert all(memory.log == [] for memory in memories)


async def test_it_cannot_be_resized(graph: Graph) -> None:
    await add(graph)
    with pytest.raises(NotSupported) as refused:
        await graph.block_resize("q", 4096)
    assert refused.value.reason == "Image format driver does not support resize"


# --- block status ----------------------------------------------------------------------------------


class Map:
    """Makes a memory node say that it consists of pieces: (zeroes or not, length)."""

    def __init__(self, memory: Memory, *pieces: tuple[bool, int]) -> None:
        self._pieces = pieces
        memory.block_status = self.block_status  # type: ignore[method-assign]

    async def block_status(self, offset: int, length: int) -> Any:
        at = 0
        for zero, size in self._pieces:
            if offset < at + size:
                return BlockStatus(Status.ZERO if zero else Status.DATA, min(at + size - offset, length))
            at += size
        raise AssertionError


@pytest.mark.parametrize(
    ("zero", "lengths", "expected"),
    [
        ((True, True, True), (8192, 4096, 12288), (Status.ZERO, 4096)),
        ((True, False, True), (8192, 4096, 12288), (Status.DATA, 4096)),
        ((False, False, True), (8192, 4096, 12288), (Status.DATA, 8192)),
        ((False, False, False), (512, 4096, 1024), (Status.DATA, 4096)),
    ],
)
async def test_a_range_is_zero_as_far_as_it_is_in_all_children(
    graph: Graph, zero: tuple[bool, ...], lengths: tuple[int, ...], expected: tuple[Status, int]
) -> None:
    root, memories = await add(graph)
    for memory, is_zero, length in zip(memories, zero, lengths, strict=True):
        Map(memory, (is_zero, length), (not is_zero, LENGTH - length))
    status = await block_status(root.node, 0, LENGTH)
    assert (status.flags, status.length) == (expected[0] | Status.ALLOCATED, expected[1])


async def test_a_child_whose_status_is_unknown_is_reported_and_counts_as_data(
    graph: Graph, events: list[Event]
) -> None:
    root, _ = await add(graph, "aEa", fails="block-status")
    status = await block_status(root.node, 4096, 8192)
    assert (status.flags, status.length) == (Status.DATA | Status.ALLOCATED, 8192)
    assert events == [bad(1, sector=8, sectors=16, error="E")]


# --- blkverify -------------------------------------------------------------------------------------


async def test_with_blkverify_a_difference_fails_the_read(
    graph: Graph, events: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    root, memories = await add(graph, "aa", blkverify=True)
    memories[0].data[5000] = ord("b")
    with pytest.raises(BlockIOError, match=r"contents mismatch at offset 5000$"):
        await read(root, 4096, 4096)
    # QEMU's line
    assert caplog.messages[0] == "quorum: offset=4096 bytes=4096 contents mismatch at offset 5000"
    data = {"node-name": "q", "operation": "read", "offset": 4096, "length": 4096}
    details = {"mismatch-offset": 5000, "test-data": "62" + "61" * 15, "raw-data": "61" * 16}
    reason = "contents mismatch at offset 5000"
    assert events == [("BLKVERIFY_MISMATCH", {**data, "reason": reason, **details})]


async def test_with_blkverify_a_mismatch_may_just_be_reported(graph: Graph, events: list[Event]) -> None:
    root, _ = await add(graph, "ab", blkverify=True, on_mismatch="report")
    assert await read(root, 0, 512) == b"a" * 512
    assert [name for name, _ in events] == ["BLKVERIFY_MISMATCH"]


async def test_with_blkverify_a_mismatch_may_end_the_daemon(graph: Graph) -> None:
    failures: list[str] = []
    graph.failure_listeners.append(failures.append)
    root, _ = await add(graph, "ab", blkverify=True, on_mismatch="stop")
    with pytest.raises(BlockIOError):
        await read(root, 0, 512)
    assert failures == ["q: quorum: offset=0 bytes=512 contents mismatch at offset 0"]


async def test_with_blkverify_a_child_that_fails_is_an_error_and_no_mismatch(graph: Graph, events: list[Event]) -> None:
    root, _ = await add(graph, "aN", blkverify=True)
    with pytest.raises(BlockIOError) as failed:
        await read(root, 0, 4096)
    assert failed.value.errno == ENOMEM
    assert events == [bad(1, error="N"), failure()]
