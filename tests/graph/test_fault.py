"""The fault filter over memory: what each action does, that the ledger has it, and rules that come and go."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from qmptalk import Talk, talking
from support import Memory, memory_of, read, recorder_of, root_of, write

from fusebd.block.blockstatus import block_status
from fusebd.block.child import FUA, MAY_UNMAP, NO_FALLBACK
from fusebd.block.driver import Buffers, parse_blockdev_text
from fusebd.block.graph import Graph
from fusebd.block.insertion import insert_filter, remove_filter
from fusebd.block.naming import node_filename
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.block.status import Status
from fusebd.drivers.fault import Fault, FaultRule
from fusebd.drivers.fault.commands import FaultHeal, FaultRelease, FaultRuleAdd, FaultRuleRemove, QueryFaultRules
from fusebd.errors import BlockIOError, CommandError, NotSupported, OptionError
from fusebd.qmp.server import QmpServer

LENGTH = 1 << 16
K = 1024
OLD = bytes(range(256)) * (LENGTH // 256)
#: seconds that make no difference
TICK = 1e-6


@pytest.fixture(params=["", "over-suspending"])
def suspending(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def faulty(graph: Graph, *rules: dict[str, Any], suspending: bool = False, **options: Any) -> Root:
    """A way in to the fault node ``disk`` over the memory node ``medium``, which has OLD."""
    memory = {"driver": "test-memory", "node-name": "medium", "size": LENGTH, "discard": "unmap"}
    below = {"driver": "test-suspends", "file": memory, "discard": "unmap"} if suspending else memory
    named = {"driver": "fault", "node-name": "disk", "discard": "unmap"}
    await graph.blockdev_add({**named, "file": below, "rules": list(rules), **options})
    memory_of(graph, "medium").data[:] = OLD
    return root_of(graph, "disk", Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE)


def fault(graph: Graph) -> Fault:
    driver = graph.find("disk").entrance.driver
    assert isinstance(driver, Fault)
    return driver


async def add(graph: Graph, **members: Any) -> str:
    """Add a rule to ``disk``; ``_`` in names stands for ``-``.  Its id."""
    added = await fault(graph).add_rule(FaultRuleAdd(rule=FaultRule(**members)))
    return str(added["id"])


async def shown(graph: Graph) -> dict[str, Any]:
    found = await fault(graph).list_rules(QueryFaultRules())
    assert isinstance(found, dict)
    return found


def medium(graph: Graph) -> bytearray:
    return memory_of(graph, "medium").data


def faults(graph: Graph) -> list[dict[str, Any]]:
    """What the ledger has of faults, without what is the same of all."""
    left_out = ("id", "kind", "node-name", "time")
    return [{k: v for k, v in e.items() if k not in left_out} for e in graph.ledger if e["kind"] == "fault"]


NEW = b"N" * 4096


# --- errors, delays, hangs -----------------------------------------------------------------------


async def test_an_error_reaches_who_asked_and_the_ledger(graph: Graph, suspending: bool) -> None:
    root = await faulty(graph, {"action": "error", "errno": "ENOSPC", "nth": 2}, suspending=suspending)
    await write(root, 0, NEW)
    with pytest.raises(BlockIOError) as failure:
        await write(root, 4096, NEW)
    assert (failure.value.errno, failure.value.operation, failure.value.offset) == (28, "write", 4096)
    assert medium(graph) == NEW + OLD[4096:]
    assert faults(graph) == [
        {"rule": "1", "action": "error", "operation": "write", "offset": 4096, "length": 4096, "errno": 28}
    ]
    (error,) = (entry for entry in graph.ledger if entry["kind"] == "error")
    assert (error["operation"], error["offset"], error["errno"]) == ("write", 4096, 28)


@pytest.mark.parametrize("operation", ["read", "write", "write-zeroes", "discard", "flush", "block-status"])
async def test_every_operation_can_fail(graph: Graph, operation: str) -> None:
    root = await faulty(graph, {"action": "error", "operations": [operation]})
    requests: dict[str, Callable[[], Awaitable[object]]] = {
        "read": lambda: read(root, 0, 512),
        "write": lambda: write(root, 0, bytes(range(10))),
        "write-zeroes": lambda: root.pwrite_zeroes(0, 512),
        "discard": lambda: root.pdiscard(0, 512),
        "flush": root.flush,
        "block-status": lambda: block_status(root.node, 0, 512),
    }
    for name, request in requests.items():
        if name == operation:
            with pytest.raises(BlockIOError, match="Input/output error"):
                await request()
        else:
            await request()
    assert [entry["operation"] for entry in faults(graph)] == [operation]


async def test_an_operation_that_is_not_supported_has_its_fallback(graph: Graph) -> None:
    root = await faulty(graph, {"action": "error", "errno": "ENOTSUP", "operations": ["write-zeroes", "discard"]})
    await root.pwrite_zeroes(0, 4096)
    await root.pdiscard(8192, 512)
    assert memory_of(graph, "medium").log == [("write", 0, 4096)]
    with pytest.raises(NotSupported):
        await root.pwrite_zeroes(0, 4096, MAY_UNMAP | NO_FALLBACK)


async def test_delays_add_up_and_come_before_what_follows(
    graph: Graph, autojump_clock: trio.testing.MockClock, suspending: bool
) -> None:
    rules = [{"action": "delay", "seconds": 2}, {"action": "delay", "seconds": 3}, {"action": "error", "nth": 2}]
    root = await faulty(graph, *rules, suspending=suspending)
    began = trio.current_time()
    assert await read(root, 0, 512) == OLD[:512]
    assert trio.current_time() - began == pytest.approx(5, abs=TICK)
    with pytest.raises(BlockIOError):
        await read(root, 0, 512)
    assert trio.current_time() - began == pytest.approx(10, abs=TICK)
    assert [entry.get("seconds") for entry in faults(graph)] == [2, 3, 2, 3, None]


async def test_requests_are_delayed_side_by_side(graph: Graph, autojump_clock: trio.testing.MockClock) -> None:
    root = await faulty(graph, {"action": "delay", "seconds": 10})
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(read, root, 0, 512)
    assert trio.current_time() - began == pytest.approx(10, abs=TICK)


async def test_times_of_rules_run_by_the_clock_of_the_scheduler(
    graph: Graph, autojump_clock: trio.testing.MockClock
) -> None:
    root = await faulty(graph)
    await add(graph, action="error", after=10, until=20)
    for wait, fails in ((0, False), (10.5, True), (9, True), (1, False)):
        await trio.sleep(wait)
        if fails:
            with pytest.raises(BlockIOError):
                await read(root, 0, 512)
        else:
            await read(root, 0, 512)
    assert [rule["active"] for rule in (await shown(graph))["rules"]] == [False]


@pytest.fixture
async def nursery() -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


class Client:
    """A task that makes one request; ``state`` says how that ended, ``waits`` until then."""

    def __init__(self, nursery: trio.Nursery, root: Root, offset: int = 0) -> None:
        self.state = "waits"
        self.scope = trio.CancelScope()
        nursery.start_soon(self._run, root, offset)

    async def _run(self, root: Root, offset: int) -> None:
        with self.scope:
            try:
                await read(root, offset, 512)
                self.state = "done"
            except BlockIOError as error:
                self.state = error.reason
        if self.scope.cancelled_caught:
            self.state = "cancelled"


async def test_a_request_hangs_until_it_is_released(graph: Graph, nursery: trio.Nursery) -> None:
    root = await faulty(graph, {"action": "hang", "id": "stuck", "operations": ["read"]})
    clients = [Client(nursery, root, offset) for offset in (0, 512, 1024)]
    await trio.testing.wait_all_tasks_blocked()
    await write(root, 0, NEW)  # others go on
    held = (await shown(graph))["held"]
    assert [(entry["rule"], entry["operation"], entry["length"]) for entry in held] == [("stuck", "read", 512)] * 3
    by_offset = {entry["offset"]: entry["request"] for entry in held}
    assert await fault(graph).release(FaultRelease(request=by_offset[512])) == {"released": 1}
    await trio.testing.wait_all_tasks_blocked()
    assert [client.state for client in clients] == ["waits", "done", "waits"]
    assert await fault(graph).release(FaultRelease(id="stuck")) == {"released": 2}
    await trio.testing.wait_all_tasks_blocked()
    assert [client.state for client in clients] == ["done"] * 3
    assert (await shown(graph))["held"] == []
    assert [entry["action"] for entry in faults(graph)] == ["hang"] * 3


async def test_a_request_that_hung_may_fail_in_the_end(graph: Graph, nursery: trio.Nursery) -> None:
    root = await faulty(graph, {"action": "hang", "errno": "ETIMEDOUT"})
    client = Client(nursery, root)
    await trio.testing.wait_all_tasks_blocked()
    await fault(graph).release(FaultRelease())
    await trio.testing.wait_all_tasks_blocked()
    assert client.state == "Connection timed out"


async def test_requests_go_on_when_the_rule_is_removed(
    graph: Graph, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    root = await faulty(graph, {"action": "hang", "id": "stuck", "nth": 1}, {"action": "delay", "seconds": 1000})
    stuck = Client(nursery, root)
    await trio.sleep(1)
    late = Client(nursery, root)
    await trio.sleep(1)
    await fault(graph).remove_rule(FaultRuleRemove(id="1"))
    await trio.sleep(1)
    assert (stuck.state, late.state) == ("waits", "done")
    await fault(graph).remove_rule(FaultRuleRemove(id="stuck"))
    await trio.sleep(1)
    assert stuck.state == "done"


async def test_a_cancelled_request_is_not_held_any_more(graph: Graph, nursery: trio.Nursery) -> None:
    root = await faulty(graph, {"action": "hang"})
    client = Client(nursery, root)
    await trio.testing.wait_all_tasks_blocked()
    client.scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert client.state == "cancelled"
    assert root.in_flight == 0
    assert (await shown(graph))["held"] == []


async def test_what_hangs_goes_on_when_the_graph_changes(graph: Graph, nursery: trio.Nursery) -> None:
    root = await faulty(graph, {"action": "hang"}, {"action": "delay", "seconds": 10**6})
    client = Client(nursery, root)
    await trio.testing.wait_all_tasks_blocked()
    await insert_filter(graph, {"driver": "blkdebug", "node-name": "other"}, "disk")
    await trio.testing.wait_all_tasks_blocked()
    assert client.state == "done"
    assert root.node.name == "other"
    await graph.detach_root(root)


async def test_what_hangs_goes_on_hanging_when_another_user_goes(graph: Graph, nursery: trio.Nursery) -> None:
    root = await faulty(graph, {"action": "hang"})
    client = Client(nursery, root)
    await graph.detach_root(root_of(graph, "disk"))
    await trio.testing.wait_all_tasks_blocked()
    assert client.state == "waits"


async def test_the_end_of_the_graph_waits_for_nobody_that_hangs(graph: Graph, nursery: trio.Nursery) -> None:
    root = await faulty(graph, {"action": "hang"})
    client = Client(nursery, root)
    await trio.testing.wait_all_tasks_blocked()
    await graph.close()
    assert client.state == "done"


# --- data that is not what it should be ----------------------------------------------------------


async def test_a_short_read_has_no_more_than_it_has(graph: Graph, suspending: bool) -> None:
    root = await faulty(graph, {"action": "short-read", "bytes": 700}, suspending=suspending)
    assert await read(root, 256, 4096) == OLD[256:956] + bytes(3396)
    assert await read(root, 0, 700) == OLD[:700]
    assert [entry["bytes"] for entry in faults(graph)] == [700]


async def test_a_short_read_may_fail(graph: Graph) -> None:
    root = await faulty(graph, {"action": "short-read", "bytes": 512, "errno": "EIO"})
    with pytest.raises(BlockIOError):
        await read(root, 0, 4096)
    assert memory_of(graph, "medium").log == [("read", 0, 512)]


async def test_a_short_read_reaches_into_several_buffers(graph: Graph) -> None:
    root = await faulty(graph, {"action": "short-read", "bytes": 1000})
    found = bytearray(b"\xff" * 2048)
    await root.preadv(0, (memoryview(found)[:600], memoryview(found)[600:1200], memoryview(found)[1200:]))
    assert found == OLD[:1000] + bytes(1048)


@pytest.mark.parametrize(
    ("members", "written", "other"),
    [
        ({"bytes": 1000}, [[0, 1000]], OLD),
        ({"bytes": 1000, "pattern": "suffix"}, [[3096, 1000]], OLD),
        ({"bytes": 1000, "fill": "zeroes"}, [[0, 1000]], bytes(4096)),
        ({"pattern": "interleaved", "unit": 1024}, [[0, 1024], [2048, 1024]], OLD),
    ],
    ids=["prefix", "suffix", "zeroes", "interleaved"],
)
async def test_a_torn_write(
    graph: Graph, suspending: bool, members: dict[str, Any], written: list[list[int]], other: bytes
) -> None:
    root = await faulty(graph, {"action": "torn-write", **members}, suspending=suspending)
    await write(root, 0, NEW)
    expected = bytearray(other[:4096] + OLD[4096:])
    for offset, length in written:
        expected[offset : offset + length] = NEW[:length]
    assert medium(graph) == expected
    assert [entry["written"] for entry in faults(graph)] == [written]


async def test_a_torn_write_may_fail_and_may_leave_garbage(graph: Graph) -> None:
    root = await faulty(graph, {"action": "torn-write", "bytes": 512, "fill": "random", "errno": "EIO"})
    with pytest.raises(BlockIOError):
        await write(root, 0, NEW)
    assert medium(graph)[:512] == NEW[:512]
    assert medium(graph)[512:4096] not in (OLD[512:4096], NEW[512:], bytes(3584))
    assert medium(graph)[4096:] == OLD[4096:]


async def test_a_zero_write_is_torn_like_any_other(graph: Graph) -> None:
    root = await faulty(graph, {"action": "torn-write", "bytes": 512})
    await root.pwrite_zeroes(0, 4096)
    assert medium(graph) == bytes(512) + OLD[512:]


async def test_a_lost_write_succeeds(graph: Graph, suspending: bool) -> None:
    root = await faulty(graph, {"action": "lost-write"}, suspending=suspending)
    await write(root, 0, NEW)
    await root.pwrite_zeroes(0, 4096)
    assert medium(graph) == OLD
    await root.pdiscard(0, 512)
    assert medium(graph) == bytes(512) + OLD[512:]
    assert [entry["operation"] for entry in faults(graph)] == ["write", "write-zeroes"]


async def test_a_lost_discard_leaves_what_was_there(graph: Graph) -> None:
    root = await faulty(graph, {"action": "lost-write", "operations": ["discard"]})
    await root.pdiscard(0, 512)
    assert medium(graph) == OLD


async def test_a_lying_flush_flushes_nothing_and_the_next_one_all(graph: Graph, suspending: bool) -> None:
    root = await faulty(graph, {"action": "lying-flush", "times": 1}, suspending=suspending)
    await write(root, 0, NEW)
    await root.flush()
    assert ("flush", 0, 0) not in memory_of(graph, "medium").log
    await root.flush()
    assert ("flush", 0, 0) in memory_of(graph, "medium").log
    assert [entry["action"] for entry in faults(graph)] == ["lying-flush"]


async def test_a_lying_flush_lies_about_fua_too(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = Memory.pwritev

    async def pwritev(self: Memory, offset: int, bufs: Buffers, flags: int = 0) -> None:
        seen.append(flags)
        await plain(self, offset, bufs)

    monkeypatch.setattr(Memory, "supports_fua", True)
    monkeypatch.setattr(Memory, "pwritev", pwritev)
    root = await faulty(graph, {"action": "lying-flush", "nth": 2})
    for _ in range(3):
        await root.pwritev(0, (memoryview(NEW),), FUA)
    await write(root, 0, NEW)
    assert seen == [FUA, 0, FUA, 0]
    assert medium(graph)[:4096] == NEW


async def test_a_misdirected_write_is_somewhere_else(graph: Graph, suspending: bool) -> None:
    root = await faulty(graph, {"action": "misdirect", "delta": 8192}, suspending=suspending)
    await write(root, 0, NEW)
    assert medium(graph) == OLD[:8192] + NEW + OLD[12288:]
    assert [entry["to"] for entry in faults(graph)] == [8192]


async def test_a_misdirected_read_has_what_is_somewhere_else(graph: Graph) -> None:
    root = await faulty(graph, {"action": "misdirect", "operations": ["read"], "unit": 100})
    found = await read(root, 0, 512)
    (entry,) = faults(graph)
    assert entry["to"] % 100 == 0 < entry["to"]
    assert found == OLD[entry["to"] : entry["to"] + 512] != OLD[:512]


async def test_a_duplicated_write_is_there_twice(graph: Graph, suspending: bool) -> None:
    root = await faulty(graph, {"action": "duplicate", "delta": 8192}, suspending=suspending)
    await write(root, 0, NEW)
    assert medium(graph) == NEW + OLD[4096:8192] + NEW + OLD[12288:]


async def test_a_full_disk_takes_what_it_has_room_for(graph: Graph, suspending: bool) -> None:
    root = await faulty(graph, {"action": "disk-full", "at-offset": 5000}, suspending=suspending)
    await write(root, 0, NEW)
    with pytest.raises(BlockIOError, match="No space left"):
        await write(root, 4096, NEW)
    assert medium(graph) == NEW + NEW[:904] + OLD[5000:]
    assert [(entry["bytes"], entry["errno"]) for entry in faults(graph)] == [(904, 28)]


async def test_a_disk_with_less_than_it_says_wraps_around(graph: Graph, suspending: bool) -> None:
    rule = {"action": "wrap", "capacity": 16 * K, "advertised": 4 * LENGTH, "id": "fake"}
    root = await faulty(graph, rule, suspending=suspending)
    assert root.length == 4 * LENGTH
    await write(root, 4 * LENGTH - 4096, NEW)
    assert medium(graph) == OLD[: 12 * K] + NEW + OLD[16 * K :]
    assert await read(root, 30 * K, 4096) == NEW[:2048] + OLD[:2048]
    status = await root.node.driver.block_status(15 * K, 4 * K)
    assert (status.host_offset, status.length) == (15 * K, K)
    await fault(graph).remove_rule(FaultRuleRemove(id="fake"))
    assert root.length == LENGTH


async def test_an_advertised_length_comes_with_its_rule(graph: Graph) -> None:
    root = await faulty(graph)
    lengths: list[int] = []
    root.on_resize = lambda: lengths.append(root.length)
    ident = await add(graph, action="wrap", advertised=1 << 40)
    await write(root, (1 << 40) - 512, NEW[:512])
    await fault(graph).remove_rule(FaultRuleRemove(id=ident))
    assert lengths == [1 << 40, LENGTH]
    assert medium(graph) == OLD[:-512] + NEW[:512]


# --- damage --------------------------------------------------------------------------------------


def flipped(data: bytes, offset: int, bits: list[list[int]]) -> bytes:
    """*data*, which is at byte *offset*, with *bits* (byte, bit) inverted."""
    changed = bytearray(data)
    for byte, bit in bits:
        changed[byte - offset] ^= 1 << bit
    return bytes(changed)


async def test_flipped_bits_are_read_until_they_are_healed(graph: Graph, suspending: bool) -> None:
    root = await faulty(graph, {"action": "bit-flip", "count": 5, "nth": 1}, suspending=suspending)
    first = await read(root, 4096, 4096)
    (entry,) = faults(graph)
    assert len(entry["bits"]) == 5
    assert first == flipped(OLD[4096:8192], 4096, entry["bits"])
    assert await read(root, 4096, 4096) == first
    assert await read(root, 0, LENGTH) == OLD[:4096] + first + OLD[8192:]
    assert medium(graph) == OLD
    listed = (await shown(graph))["flipped-bits"]
    assert [[one["offset"], one["bit"]] for one in listed] == entry["bits"]
    assert {one["rule"] for one in listed} == {"1"}
    assert await fault(graph).heal(FaultHeal()) == {"bits": 5, "sectors": 0}
    assert await read(root, 0, LENGTH) == OLD
    assert len(faults(graph)) == 1


async def test_flips_of_a_write_are_over_what_was_written(graph: Graph) -> None:
    root = await faulty(graph, {"action": "bit-flip", "operations": ["write", "write-zeroes"]})
    await write(root, 0, NEW)
    await root.pwrite_zeroes(8192, 4096)
    first, second = faults(graph)
    assert medium(graph) == NEW + OLD[4096:8192] + bytes(4096) + OLD[12288:]
    assert await read(root, 0, 4096) == flipped(NEW, 0, first["bits"])
    assert await read(root, 8192, 4096) == flipped(bytes(4096), 8192, second["bits"])


async def test_a_transient_flip_is_in_one_read_alone(graph: Graph) -> None:
    root = await faulty(graph, {"action": "bit-flip", "transient": True, "nth": 1, "offset": 100, "length": 1})
    found = bytearray(512)
    await root.preadv(0, (memoryview(found)[:100], memoryview(found)[100:]))
    (entry,) = faults(graph)
    assert found == flipped(OLD[:512], 0, entry["bits"])
    assert [byte for byte, _ in entry["bits"]] == [100]
    assert await read(root, 0, 512) == OLD[:512]
    assert (await shown(graph))["flipped-bits"] == []


async def test_damage_at_rest_is_done_when_the_rule_is_added(graph: Graph) -> None:
    root = await faulty(graph)
    await add(graph, action="bit-flip", at_rest=True, count=16, offset=0, length=2)
    await add(graph, action="latent", at_rest=True, count=100, sector=8, sectors=2)
    assert await read(root, 0, 4) == bytes([255, 254, 2, 3])
    found = await shown(graph)
    assert len(found["flipped-bits"]) == 16
    assert found["bad-sectors"] == [{"offset": 4096, "length": 1024, "rule": "2", "errno": 5}]
    assert [entry["operation"] for entry in faults(graph)] == ["none", "none"]
    assert faults(graph)[1]["bad"] == [[4096, 1024]]
    assert [rule["active"] for rule in found["rules"]] == [False, False]


async def test_damage_at_rest_can_be_there_from_the_beginning(graph: Graph) -> None:
    root = await faulty(graph, {"action": "latent", "at-rest": True, "sector": 1})
    with pytest.raises(BlockIOError):
        await read(root, 0, 4096)


async def test_a_bad_sector_fails_reads_until_it_is_written_as_a_whole(graph: Graph, suspending: bool) -> None:
    root = await faulty(graph, {"action": "latent", "sector": 8, "nth": 1, "errno": "ENODATA"}, suspending=suspending)
    with pytest.raises(BlockIOError, match="No data available"):
        await read(root, 0, 8192)
    with pytest.raises(BlockIOError) as failure:
        await read(root, 4200, 1)
    assert (failure.value.errno, failure.value.offset) == (61, 4200)
    assert await read(root, 0, 4096) + await read(root, 4608, 512) == OLD[:4096] + OLD[4608:5120]
    await write(root, 4100, NEW[:508])
    with pytest.raises(BlockIOError):
        await read(root, 4096, 512)
    await write(root, 4096, NEW[:512])
    assert await read(root, 0, 8192) == OLD[:4096] + NEW[:512] + OLD[4608:8192]
    assert (await shown(graph))["bad-sectors"] == []
    assert [(entry["action"], entry["errno"]) for entry in faults(graph)] == [("latent", 61)] * 3
    assert sum(entry["kind"] == "error" for entry in graph.ledger) == 3


async def test_a_sector_may_turn_bad_when_it_is_written(graph: Graph) -> None:
    root = await faulty(graph, {"action": "latent", "operations": ["write"], "nth": 1, "unit": 4096})
    await write(root, 8192, NEW)
    with pytest.raises(BlockIOError):
        await read(root, 12287, 1)
    assert (await shown(graph))["bad-sectors"] == [{"offset": 8192, "length": 4096, "rule": "1", "errno": 5}]
    await root.pwrite_zeroes(8192, 4096)
    assert await read(root, 8192, 4096) == bytes(4096)


async def test_the_list_of_bad_sectors_grows(graph: Graph) -> None:
    root = await faulty(graph, {"action": "latent", "id": "wear", "every": 2})
    for _ in range(8):
        for sector in range(16):
            try:
                await read(root, sector * 512, 512)
            except BlockIOError:
                continue
    # the first pass fails every second; in those that follow, bad ones fail whether they match or not
    listed = {
        number
        for run in (await shown(graph))["bad-sectors"]
        for number in range(run["offset"] // 512, (run["offset"] + run["length"]) // 512)
    }
    named = {start // 512 for entry in faults(graph) for start, _ in entry.get("bad", [])}
    failed = {entry["offset"] // 512 for entry in graph.ledger if entry["kind"] == "error"}
    assert listed == named == failed


async def test_damage_can_be_healed_by_rule_and_by_place(graph: Graph) -> None:
    await faulty(graph)
    for ident, sector in (("a", 0), ("b", 1), ("a2", 2)):
        await add(graph, action="latent", at_rest=True, id=ident, sector=sector)
        await add(graph, action="bit-flip", at_rest=True, sector=sector, id=f"flip-{ident}")
    heal = fault(graph).heal
    assert await heal(FaultHeal(id="a")) == {"bits": 0, "sectors": 1}
    assert await heal(FaultHeal(offset=512, length=512)) == {"bits": 1, "sectors": 1}
    assert await heal(FaultHeal(id="flip-a2")) == {"bits": 1, "sectors": 0}
    assert await heal(FaultHeal()) == {"bits": 1, "sectors": 1}
    assert await heal(FaultHeal()) == {"bits": 0, "sectors": 0}


async def test_damage_stays_when_its_rule_goes(graph: Graph) -> None:
    root = await faulty(graph, {"action": "latent", "at-rest": True, "sector": 1})
    await fault(graph).remove_rule(FaultRuleRemove(id="1"))
    with pytest.raises(BlockIOError):
        await read(root, 512, 512)


async def test_damage_behind_the_end_is_gone_when_the_node_shrinks(graph: Graph) -> None:
    root = await faulty(graph, {"action": "bit-flip", "at-rest": True, "offset": 8192, "length": 1})
    await root.truncate(8192)
    await root.truncate(LENGTH)
    assert await read(root, 0, LENGTH) == OLD[:8192] + bytes(LENGTH - 8192)
    assert (await shown(graph))["flipped-bits"] == []


async def test_flipped_bits_are_no_hole(graph: Graph) -> None:
    await graph.blockdev_add({"driver": "null-co", "node-name": "zeroes", "size": LENGTH, "read-zeroes": True})
    rule = {"action": "bit-flip", "at-rest": True, "offset": 4096, "length": 1}
    await graph.blockdev_add({"driver": "fault", "node-name": "disk", "file": "zeroes", "rules": [rule]})
    root = root_of(graph, "disk")
    at, seen = 0, []
    while at < LENGTH:
        status = await block_status(root.node, at, LENGTH - at)
        seen.append((at, status.length, bool(status.flags & Status.ZERO)))
        if status.flags & Status.ZERO:
            assert await read(root, at, status.length) == bytes(status.length)
        at += status.length
    assert seen == [(0, 4096, True), (4096, 512, False), (4608, LENGTH - 4608, True)]
    await graph.detach_root(root)


small = 4096
steps = st.one_of(
    st.tuples(st.just("write"), st.integers(0, small - 1), st.integers(1, 2000)),
    st.tuples(st.just("zero"), st.integers(0, small - 1), st.integers(1, 2000)),
    st.tuples(st.just("read"), st.integers(0, small - 1), st.integers(1, small)),
    st.tuples(st.just("heal"), st.integers(0, small - 1), st.integers(1, 2000)),
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(steps, max_size=30), st.integers(0, 1000))
def test_damage_is_an_overlay_over_intact_data(steps: list[tuple[str, int, int]], seed: int) -> None:
    """A model: the data, the bits that are flipped and the sectors that are bad, by what the ledger says was done."""

    async def run() -> None:
        graph = Graph()
        rules = [
            {"action": "bit-flip", "operations": ["read", "write", "write-zeroes"], "count": 2, "probability": 0.3},
            {"action": "latent", "operations": ["read", "write"], "probability": 0.2},
        ]
        root = await faulty(graph, *rules, seed=seed)
        data, bits, bad = bytearray(OLD), set[tuple[int, int]](), set[int]()
        known = 0
        rng = random.Random(seed)
        for what, start, length in steps:
            end = start + length if what == "heal" else min(start + length, small)
            failed = False
            found = b""
            try:
                if what == "write":
                    new = rng.randbytes(end - start)
                    await write(root, start, new)
                    data[start:end] = new
                elif what == "zero":
                    await root.pwrite_zeroes(start, end - start)
                    data[start:end] = bytes(end - start)
                elif what == "heal":
                    await fault(graph).heal(FaultHeal(offset=start, length=length))
                else:
                    found = await read(root, start, end - start)
            except BlockIOError:
                failed = True
            entries = [entry for entry in graph.ledger if entry["kind"] == "fault"][known:]
            known += len(entries)
            if what == "heal":
                bad -= {sector for sector in bad if sector * 512 < end and start < (sector + 1) * 512}
            if what in ("write", "zero"):
                bad -= {sector for sector in bad if start <= sector * 512 and (sector + 1) * 512 <= end}
            if what != "read":
                bits -= {(byte, bit) for byte, bit in bits if start <= byte < end}
            bits |= {(byte, bit) for entry in entries for byte, bit in entry.get("bits", [])}
            for entry in entries:
                for first, extent in entry.get("bad", []):
                    bad |= set(range(first // 512, (first + extent) // 512))
            if what == "read":
                assert failed is any(sector * 512 < end and start < (sector + 1) * 512 for sector in bad)
                if not failed:
                    inverted = [[byte, bit] for byte, bit in bits if start <= byte < end]
                    assert found == flipped(bytes(data[start:end]), start, inverted)
            assert medium(graph) == data
        listed = (await shown(graph))["flipped-bits"]
        assert {(one["offset"], one["bit"]) for one in listed} == bits
        await graph.close()

    trio.run(run)


# --- repeating -----------------------------------------------------------------------------------

MIXED = [
    {"action": "bit-flip", "probability": 0.1, "operations": ["write"]},
    {"action": "torn-write", "probability": 0.2, "pattern": "random", "fill": "random"},
    {"action": "misdirect", "probability": 0.1, "operations": ["write"]},
    {"action": "lost-write", "probability": 0.1},
    {"action": "latent", "probability": 0.05},
    {"action": "error", "probability": 0.1},
    {"action": "delay", "distribution": "lognormal", "seconds": 0.01, "sigma": 1},
]


async def mixed_run(seed: int) -> tuple[bytes, list[dict[str, Any]]]:
    """What is left of the medium, and the ledger, of some hundred requests."""
    graph = Graph()
    root = await faulty(graph, *MIXED, seed=seed)
    rng = random.Random(1)
    for _ in range(300):
        offset, length = rng.randrange(LENGTH // 512 - 16) * 512, rng.randrange(1, 17) * 512
        try:
            if rng.random() < 0.5:
                await write(root, offset, rng.randbytes(length))
            else:
                await read(root, offset, length)
        except BlockIOError:
            continue
    left, entries = bytes(medium(graph)), [{k: v for k, v in e.items() if k != "time"} for e in graph.ledger]
    await graph.close()
    return left, entries


async def test_the_same_seed_gives_the_same_medium_and_ledger(autojump_clock: trio.testing.MockClock) -> None:
    first, again, other = await mixed_run(3), await mixed_run(3), await mixed_run(4)
    assert first == again
    assert len(first[1]) > 200
    assert first[0] != other[0]
    assert first[1] != other[1]


# --- events --------------------------------------------------------------------------------------


async def test_an_event_of_the_node_above_arms_a_rule(graph: Graph) -> None:
    await graph.blockdev_add({"driver": "test-memory", "node-name": "medium", "size": LENGTH})
    await graph.blockdev_add({"driver": "fault", "node-name": "disk", "file": "medium"})
    await graph.blockdev_add({"driver": "raw", "node-name": "top", "file": "disk"})
    root = root_of(graph, "top")
    assert graph.find("disk").driver.listens == frozenset()
    ident = await add(graph, action="error", event="write_aio", operations=["read"], times=1)
    assert await read(root, 0, 512) == bytes(512)
    await write(root, 0, NEW)
    with pytest.raises(BlockIOError):
        await read(root, 0, 512)
    assert graph.find("disk").driver.listens == frozenset()  # it is spent, and nobody else listens
    await fault(graph).remove_rule(FaultRuleRemove(id=ident))
    await graph.detach_root(root)


async def events_below(graph: Graph, *between: dict[str, Any]) -> list[str]:
    """What a recorder hears below raw and *between*, which are from below to above, of some requests."""
    await graph.blockdev_add({"driver": "test-memory", "node-name": "medium", "size": LENGTH, "align": 512})
    await graph.blockdev_add({"driver": "test-recorder", "node-name": "recorder", "file": "medium"})
    name = "recorder"
    for number, options in enumerate(between):
        await graph.blockdev_add({"node-name": f"between{number}", "file": name, **options})
        name = f"between{number}"
    await graph.blockdev_add({"driver": "raw", "node-name": "top", "file": name, "discard": "unmap"})
    root = root_of(graph, "top")
    await write(root, 100, b"unaligned")
    await write(root, 0, NEW)
    await read(root, 0, 4096)
    await root.pwrite_zeroes(0, 4096)
    await root.flush()
    await root.flush()
    await graph.detach_root(root)
    heard = recorder_of(graph, "recorder").events
    await graph.close()
    return heard


async def test_blkdebug_below_hears_the_same_as_without_the_filter() -> None:
    alone = await events_below(Graph())
    assert alone.count("write_aio") == 2
    fault_filter = {"driver": "fault"}
    listening = {"driver": "fault", "rules": [{"action": "error", "event": "l2_load"}]}
    assert await events_below(Graph(), fault_filter) == alone
    assert await events_below(Graph(), fault_filter, listening, fault_filter) == alone


async def test_events_find_a_listener_that_was_inserted_later(graph: Graph) -> None:
    await graph.blockdev_add({"driver": "test-memory", "node-name": "medium", "size": LENGTH})
    await graph.blockdev_add({"driver": "fault", "node-name": "disk", "file": "medium"})
    await graph.blockdev_add({"driver": "raw", "node-name": "top", "file": "disk"})
    root = root_of(graph, "top")
    inserted = await insert_filter(
        graph, {"driver": "blkdebug", "inject-error": [{"event": "read_aio"}]}, "disk", "file"
    )
    with pytest.raises(BlockIOError):
        await read(root, 0, 512)
    await remove_filter(graph, inserted.name)
    assert await read(root, 0, 512) == bytes(512)
    assert graph.find("disk").driver.listens == frozenset()
    await graph.detach_root(root)


async def test_a_rule_in_the_lower_of_two_filters_hears_of_events(graph: Graph) -> None:
    await graph.blockdev_add({"driver": "test-memory", "node-name": "medium", "size": LENGTH})
    await graph.blockdev_add({"driver": "fault", "node-name": "disk", "file": "medium"})
    await graph.blockdev_add({"driver": "fault", "node-name": "upper", "file": "disk"})
    await graph.blockdev_add({"driver": "raw", "node-name": "top", "file": "upper"})
    root = root_of(graph, "top")
    await add(graph, action="error", event="read_aio")
    with pytest.raises(BlockIOError):
        await read(root, 0, 512)
    await graph.detach_root(root)


# --- a filter like others ------------------------------------------------------------------------


async def test_without_rules_everything_passes_as_it_is(graph: Graph) -> None:
    root = await faulty(graph)
    with trio.testing.assert_no_checkpoints():
        await write(root, 100, b"0123456789")
        await root.pwrite_zeroes(102, 3)
        assert await read(root, 100, 10) == b"01\0\0\0" + b"56789"
        await root.pdiscard(0, 50)
        await root.flush()
        status = await root.node.driver.block_status(0, LENGTH)
    assert status.file is graph.find("medium")
    operations = [operation for operation, _, _ in memory_of(graph, "medium").log]
    assert operations == ["write", "zero", "read", "discard", "flush"]
    assert list(graph.ledger) == []


async def test_rules_that_do_not_match_change_nothing_and_do_not_suspend(graph: Graph) -> None:
    root = await faulty(graph, {"action": "hang", "offset": 8192, "length": 512}, {"action": "delay", "seconds": 0})
    with trio.testing.assert_no_checkpoints():
        await write(root, 0, NEW)
        assert await read(root, 0, 8192) == NEW + OLD[4096:8192]


async def test_only_operations_that_rules_are_for_are_looked_at(graph: Graph) -> None:
    await faulty(graph)
    disk = fault(graph)
    looked_at = ("_reads", "_writes", "_zeroes", "_discards", "_flushes", "_statuses")

    def watched() -> list[str]:
        return [name for name in looked_at if getattr(disk, name)]

    assert watched() == []
    ident = await add(graph, action="error", operations=["write"], times=1)
    assert watched() == ["_writes"]
    await disk.remove_rule(FaultRuleRemove(id=ident))
    assert watched() == []
    await add(graph, action="bit-flip", at_rest=True)
    assert watched() == ["_reads", "_writes", "_zeroes", "_statuses"]
    await disk.heal(FaultHeal())
    assert watched() == []


async def test_the_length_is_that_of_the_node_below(graph: Graph) -> None:
    root = await faulty(graph)
    await root.truncate(LENGTH // 2)
    assert (root.length, fault(graph).medium.length) == (LENGTH // 2, LENGTH // 2)
    assert len(medium(graph)) == LENGTH // 2


async def test_rules_can_be_spelt_as_key_value(graph: Graph) -> None:
    text = (
        "driver=fault,node-name=disk,seed=-3,file.driver=null-co,rules.0.action=delay,rules.0.seconds=0.5,"
        "rules.0.operations.0=read,rules.0.operations.1=flush,rules.1.action=error,rules.1.errno=ENOSPC,"
        "rules.1.ranges.0.start=0x1000,rules.1.ranges.0.length=512,rules.2.action=bit-flip,rules.2.at-rest=on"
    )
    await graph.blockdev_add(parse_blockdev_text(text))
    told = [{k: v for k, v in rule.items() if k not in COUNTED} for rule in (await shown(graph))["rules"]]
    assert told == [
        {"id": "1", "action": "delay", "seconds": 0.5, "operations": ["read", "flush"]},
        {"id": "2", "action": "error", "errno": "ENOSPC", "ranges": [{"start": 4096, "length": 512}]},
        {"id": "3", "action": "bit-flip", "at-rest": True},
    ]
    assert fault(graph).rules.seed == -3


COUNTED = ("matches", "hits", "active")


async def test_the_options_are_in_the_name_of_the_node(graph: Graph) -> None:
    await graph.blockdev_add(
        {"driver": "fault", "node-name": "disk", "file": {"driver": "null-co"}, "rules": [{"action": "hang"}]}
    )
    name = node_filename(graph.find("disk"))
    assert name.startswith("json:")
    options = parse_blockdev_text(name.removeprefix("json:"))
    assert (options["driver"], options["rules.0.action"]) == ("fault", "hang")


async def test_a_mistake_in_a_rule_opens_nothing(graph: Graph) -> None:
    await graph.blockdev_add({"driver": "test-memory", "node-name": "medium"})
    for members, message in (
        ({"action": "error", "errno": "X"}, "rules.0: Parameter 'errno' does not accept value 'X'"),
        ({}, r"Parameter 'rules\[0\].action' is missing"),
    ):
        with pytest.raises(OptionError, match=message):
            await graph.blockdev_add({"driver": "fault", "node-name": "disk", "file": "medium", "rules": [members]})
    assert list(graph.nodes) == ["medium"]
    assert graph.find("medium").parents == []


# --- by QMP --------------------------------------------------------------------------------------


@pytest.fixture
async def talk(graph: Graph) -> AsyncIterator[Talk]:
    await graph.blockdev_add({"driver": "test-memory", "node-name": "disk", "size": LENGTH})
    async with talking(QmpServer(graph, lambda: None)) as talk:
        yield talk


ERROR = {"action": "error", "operations": ["read"]}


async def test_the_first_rule_brings_the_filter_and_others_go_there(graph: Graph, talk: Talk) -> None:
    root = root_of(graph, "disk")
    first = await talk.execute("fault-rule-add", node_name="disk", rule=ERROR)
    second = await talk.execute("fault-rule-add", node_name="disk", rule={**ERROR, "id": "other"})
    assert first == {"node-name": root.node.name, "id": "1"}
    assert second == {"node-name": root.node.name, "id": "other"}
    with pytest.raises(BlockIOError):
        await read(root, 0, 512)
    found = await talk.execute("query-fault-rules", node_name="disk")
    assert [(rule["id"], rule["hits"]) for rule in found["rules"]] == [("1", 1), ("other", 0)]
    await talk.execute("fault-rule-remove", node_name="disk", id="1")
    await talk.execute("fault-rule-remove", node_name=root.node.name, id="other")
    assert await read(root, 0, 512) == bytes(512)
    await talk.execute("block-filter-remove", node_name=found["node-name"])
    assert root.node.name == "disk"
    events = [event["event"] for event in talk.events]
    assert events.count("FAULT_INJECTED") == 1
    await graph.detach_root(root)


async def test_a_rule_that_is_refused_brings_no_filter(graph: Graph, talk: Talk) -> None:
    root = root_of(graph, "disk")
    message = await talk.fail("fault-rule-add", node_name="disk", rule={**ERROR, "nth": 0})
    assert message == "Parameter 'nth' expects a positive number"
    assert await talk.fail("fault-rule-add", node_name="disk", rule={}) == "Parameter 'rule.action' is missing"
    assert root.node.name == "disk"
    assert list(graph.nodes) == ["disk"]
    await graph.detach_root(root)


async def test_a_rule_for_a_format_goes_above_it_and_not_to_a_filter_below(graph: Graph, talk: Talk) -> None:
    await graph.blockdev_add({"driver": "fault", "node-name": "below", "file": "disk"})
    await graph.blockdev_add({"driver": "raw", "node-name": "top", "file": "below", "offset": 512})
    added = await talk.execute("fault-rule-add", node_name="top", rule=ERROR)
    assert added["node-name"] not in ("below", "top")
    assert (await talk.execute("query-fault-rules", node_name="top"))["node-name"] == added["node-name"]
    assert (await talk.execute("query-fault-rules", node_name="below"))["rules"] == []


async def test_commands_find_a_filter_below_if_there_is_no_other(graph: Graph, talk: Talk) -> None:
    await graph.blockdev_add({"driver": "fault", "node-name": "below", "file": "disk"})
    await graph.blockdev_add({"driver": "raw", "node-name": "top", "file": "below"})
    assert (await talk.execute("query-fault-rules", node_name="top"))["node-name"] == "below"


async def test_hangs_are_released_and_damage_healed_by_command(graph: Graph, talk: Talk) -> None:
    root = root_of(graph, "disk")
    await talk.execute("fault-rule-add", node_name="disk", rule={"action": "hang", "id": "stuck"})
    await talk.execute("fault-rule-add", node_name="disk", rule={"action": "latent", "at-rest": True, "sector": 3})
    async with trio.open_nursery() as nursery:
        client = Client(nursery, root)
        await trio.testing.wait_all_tasks_blocked()
        assert await talk.fail("fault-release", node_name="disk", request=99) == "No request 99 is held"
        assert await talk.fail("fault-release", node_name="disk", id="x") == "No fault rule with id 'x'"
        assert await talk.execute("fault-release", node_name="disk", id="stuck") == {"released": 1}
    assert client.state == "done"
    assert await talk.execute("fault-heal", node_name="disk") == {"bits": 0, "sectors": 1}
    await graph.detach_root(root)


@pytest.mark.parametrize("command", ["query-fault-rules", "fault-release", "fault-heal"])
async def test_a_node_without_a_fault_filter_is_said_to_be_so(talk: Talk, command: str) -> None:
    assert await talk.fail(command, node_name="disk") == "Node 'disk' has no fault driver"
    assert await talk.fail(command, node_name="none") == "Cannot find device='' nor node-name='none'"


async def test_a_rule_that_is_not_there_is_not_removed(graph: Graph) -> None:
    await faulty(graph)
    with pytest.raises(CommandError, match="No fault rule with id '7'"):
        await fault(graph).remove_rule(FaultRuleRemove(id="7"))
