"""Throttle nodes over memory: what waits, for how long, in which order, and what does not.

Time is the autojump clock's: it stands still while a task can run.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from support import READ_WRITE, memory_of, read, root_of, write

from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.block.throttlegroup import READ, WRITE, ThrottleGroup
from fusebd.errors import CommandError, OptionError

MEM = {"driver": "test-memory", "size": 1 << 20, "discard": "unmap"}
#: seconds that make no difference
TICK = 1e-6


async def group_of(graph: Graph, name: str = "g", **limits: int) -> ThrottleGroup:
    """A new throttle group; QAPI's names with ``_`` for ``-``."""
    given = {limit.replace("_", "-"): value for limit, value in limits.items()}
    await graph.objects.add({"qom-type": "throttle-group", "id": name, "limits": given})
    return graph.objects.throttle_group(name)


async def throttled(graph: Graph, name: str = "t", group: str = "g") -> Root:
    """A way in to a new throttle node over memory; the memory node is *name* with ``-memory``."""
    below = {**MEM, "node-name": f"{name}-memory"}
    await graph.blockdev_add(
        {"driver": "throttle", "node-name": name, "throttle-group": group, "file": below, "discard": "unmap"}
    )
    return root_of(graph, name, READ_WRITE | Perm.RESIZE)


async def times_of(*requests: Callable[[], Awaitable[object]]) -> list[float]:
    """Seconds from now after which each of *requests*, which are started in this order, has ended."""
    began = trio.current_time()
    ended = [0.0] * len(requests)

    async def run(number: int) -> None:
        await requests[number]()
        ended[number] = trio.current_time() - began

    async with trio.open_nursery() as nursery:
        for number in range(len(requests)):
            nursery.start_soon(run, number)
            await trio.testing.wait_all_tasks_blocked()
    return ended


def reads(root: Root, count: int, length: int = 512) -> list[Callable[[], Awaitable[object]]]:
    return [lambda: read(root, 0, length)] * count


def writes(root: Root, count: int) -> list[Callable[[], Awaitable[object]]]:
    return [lambda: write(root, 0, b"data")] * count


# --- limits --------------------------------------------------------------------------------------


async def test_under_the_limit_nothing_suspends(graph: Graph) -> None:
    await group_of(graph, iops_total=1000, bps_total=1 << 20)
    root = await throttled(graph)
    with trio.testing.assert_no_checkpoints():
        for _ in range(40):
            await read(root, 0, 512)
            await write(root, 0, b"data")
        await root.pwrite_zeroes(0, 4096)
        await root.pdiscard(0, 4096)


async def test_without_limits_nothing_suspends(graph: Graph) -> None:
    await group_of(graph)
    root = await throttled(graph)
    with trio.testing.assert_no_checkpoints():
        for _ in range(1000):
            await read(root, 0, 512)


async def test_over_the_limit_requests_wait(graph: Graph, autojump_clock: trio.testing.MockClock) -> None:
    await group_of(graph, iops_total=10)
    root = await throttled(graph)
    assert await times_of(*reads(root, 12)) == pytest.approx([0, 0, *(n / 10 for n in range(1, 11))], abs=TICK)


async def test_bytes_are_limited_whatever_the_size_of_requests(
    graph: Graph, autojump_clock: trio.testing.MockClock
) -> None:
    await group_of(graph, bps_total=100_000)
    root = await throttled(graph)
    times = await times_of(*reads(root, 3, 100_000), *reads(root, 10, 10_000), *reads(root, 1))
    assert max(times) == pytest.approx(3.9, abs=TICK)


async def test_zero_writes_and_discards_count_as_writes_and_flushes_not_at_all(
    graph: Graph, autojump_clock: trio.testing.MockClock
) -> None:
    await group_of(graph, iops_write=10)
    root = await throttled(graph)
    with trio.testing.assert_no_checkpoints():
        await root.pwrite_zeroes(0, 4096)
        await root.pdiscard(0, 4096)
        for _ in range(100):
            await root.flush()
            await read(root, 0, 512)
    assert await times_of(lambda: write(root, 0, b"data")) == pytest.approx([0.1], abs=TICK)
    assert await times_of(lambda: root.pwrite_zeroes(0, 512)) == pytest.approx([0.1], abs=TICK)
    assert await times_of(lambda: root.pdiscard(0, 512)) == pytest.approx([0.1], abs=TICK)


async def test_zero_writes_and_discards_are_as_large_as_their_range(
    graph: Graph, autojump_clock: trio.testing.MockClock
) -> None:
    await group_of(graph, bps_write=65536)
    root = await throttled(graph)
    await root.pwrite_zeroes(0, 65536)
    assert await times_of(lambda: root.pdiscard(0, 65536)) == pytest.approx([0.9], abs=TICK)
    assert await times_of(lambda: write(root, 0, b"")) == pytest.approx([1.0], abs=TICK)


async def test_what_passes_is_unchanged(graph: Graph, autojump_clock: trio.testing.MockClock) -> None:
    await group_of(graph, iops_total=10)
    root = await throttled(graph)
    await write(root, 1000, b"0123456789")
    await root.pwrite_zeroes(1002, 3)
    assert await read(root, 1000, 10) == b"01\0\0\0" + b"56789"
    await root.flush()
    log = memory_of(graph, "t-memory").log
    assert log == [("write", 1000, 10), ("zero", 1002, 3), ("read", 1000, 10), ("flush", 0, 0)]


# --- order ---------------------------------------------------------------------------------------


async def test_requests_of_one_node_go_in_their_order(graph: Graph, autojump_clock: trio.testing.MockClock) -> None:
    await group_of(graph, iops_read=10)
    root = await throttled(graph)
    times = await times_of(*reads(root, 30))
    assert times == sorted(times)


async def test_nodes_of_one_group_take_turns(graph: Graph, autojump_clock: trio.testing.MockClock) -> None:
    await group_of(graph, iops_total=10)
    roots = [await throttled(graph, name) for name in ("a", "b", "c")]
    done = dict.fromkeys("abc", 0)

    async def client(name: str, root: Root) -> None:
        while True:
            await read(root, 0, 512)
            done[name] += 1

    with trio.move_on_after(60):
        async with trio.open_nursery() as nursery:
            # one client against sixteen against four
            for name, root, depth in zip("abc", roots, (1, 16, 4), strict=True):
                for _ in range(depth):
                    nursery.start_soon(client, name, root)
    assert sum(done.values()) == pytest.approx(601, abs=1)
    # the first two went without waiting, whoever they were from
    assert max(done.values()) - min(done.values()) <= 4


async def test_reads_and_writes_take_turns_under_a_total(graph: Graph, autojump_clock: trio.testing.MockClock) -> None:
    await group_of(graph, iops_total=10)
    root = await throttled(graph)
    times = await times_of(*reads(root, 22), *writes(root, 20))
    # the reads that go at once, then one of each in turn
    assert times[2:22] == pytest.approx([0.1 + n / 5 for n in range(20)], abs=TICK)
    assert times[22:] == pytest.approx([0.2 + n / 5 for n in range(20)], abs=TICK)


async def test_an_arriving_request_does_not_overtake_one_that_waits(
    graph: Graph, autojump_clock: trio.testing.MockClock
) -> None:
    await group_of(graph, iops_total=10)
    root = await throttled(graph)

    async def late_write() -> None:
        # arrives at the moment at which the read may go
        await trio.sleep(0.1)
        await write(root, 0, b"data")

    times = await times_of(*reads(root, 3), late_write)
    assert times[2:] == pytest.approx([0.1, 0.2], abs=TICK)


async def test_reads_do_not_wait_for_writes_that_are_limited_alone(
    graph: Graph, autojump_clock: trio.testing.MockClock
) -> None:
    await group_of(graph, iops_write=1, iops_read=1000)
    root = await throttled(graph)
    times = await times_of(*writes(root, 5), *reads(root, 50))
    assert max(times[5:]) == pytest.approx(0)
    assert max(times[:5]) == pytest.approx(3.9, abs=TICK)


async def test_a_busy_direction_does_not_starve_the_other(graph: Graph, autojump_clock: trio.testing.MockClock) -> None:
    # the reads have a limit of their own beside the total that the writes use up
    await group_of(graph, iops_total=10, bps_read=5120)
    root = await throttled(graph)
    done = 0

    async def reader() -> None:
        nonlocal done
        while True:
            await read(root, 0, 512)
            done += 1

    async def writer() -> None:
        while True:
            await write(root, 0, b"data")

    with trio.move_on_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            for _ in range(8):
                nursery.start_soon(writer)
    assert done == pytest.approx(300, abs=5)


# --- changes while requests wait -----------------------------------------------------------------


async def test_new_limits_hold_at_once_for_requests_that_wait(
    graph: Graph, autojump_clock: trio.testing.MockClock
) -> None:
    group = await group_of(graph, bps_total=1)
    root = await throttled(graph)

    async def lift() -> None:
        await trio.sleep(5)
        group.set("limits", {"bps-total": 0})

    assert await times_of(*reads(root, 10), lift) == pytest.approx([0, *[5] * 10], abs=TICK)


async def test_lower_limits_hold_for_requests_that_wait(graph: Graph, autojump_clock: trio.testing.MockClock) -> None:
    group = await group_of(graph, iops_total=10)
    root = await throttled(graph)

    async def lower() -> None:
        await trio.sleep(0.35)
        group.set("limits", {"iops-total": 1})

    # new limits begin with an empty bucket, so that two may go
    times = await times_of(*reads(root, 9), lower)
    assert times[:9] == pytest.approx([0, 0, 0.1, 0.2, 0.3, 0.35, 1.25, 2.25, 3.25], abs=TICK)


async def test_limits_can_be_set_on_a_group_that_had_none(graph: Graph, autojump_clock: trio.testing.MockClock) -> None:
    group = await group_of(graph)
    root = await throttled(graph)
    assert max(await times_of(*reads(root, 100))) == pytest.approx(0)
    group.set("limits", {"iops-total": 10})
    assert max(await times_of(*reads(root, 12))) == pytest.approx(1, abs=TICK)


async def test_a_cancelled_request_charges_nothing_and_lets_the_next_one_go(
    graph: Graph, autojump_clock: trio.testing.MockClock
) -> None:
    await group_of(graph, iops_total=10, bps_total=10_000)
    root = await throttled(graph)

    async def impatient() -> None:
        with trio.move_on_after(0.05):
            await read(root, 0, 100_000)

    times = await times_of(*reads(root, 2), impatient, *reads(root, 2))
    assert times == pytest.approx([0, 0, 0.05, 0.1, 0.2], abs=TICK)
    assert root.in_flight == 0


async def test_cancelling_a_request_behind_the_first_changes_nothing_for_the_others(
    graph: Graph, autojump_clock: trio.testing.MockClock
) -> None:
    await group_of(graph, iops_total=10)
    root = await throttled(graph)

    async def impatient() -> None:
        with trio.move_on_after(0.05):
            await read(root, 0, 512)

    times = await times_of(*reads(root, 3), impatient, *reads(root, 2))
    assert times == pytest.approx([0, 0, 0.1, 0.05, 0.2, 0.3], abs=TICK)


async def test_a_request_cancelled_at_the_moment_it_may_go_is_either_charged_and_done_or_neither(
    graph: Graph, autojump_clock: trio.testing.MockClock
) -> None:
    await group_of(graph, iops_total=10)
    root = await throttled(graph)
    log = memory_of(graph, "t-memory").log

    async def impatient() -> None:
        with trio.move_on_after(0.1):
            await read(root, 4096, 512)

    times = await times_of(*reads(root, 2), impatient, *reads(root, 1))
    done = ("read", 4096, 512) in log
    assert times[3] == pytest.approx(0.2 if done else 0.1, abs=TICK)


# --- drain ---------------------------------------------------------------------------------------


async def test_limits_are_off_while_a_node_is_drained(graph: Graph, autojump_clock: trio.testing.MockClock) -> None:
    await group_of(graph, iops_total=1)
    root = await throttled(graph)

    async def drain() -> None:
        async with graph.lock, graph.drained(graph.find("t")):
            assert root.in_flight == 0

    assert max(await times_of(*reads(root, 20), drain)) == pytest.approx(0)
    # they hold again afterwards, and what went meanwhile was charged for
    assert await times_of(*reads(root, 1)) == pytest.approx([19.9], abs=TICK)


@pytest.mark.parametrize("drained", ["t-memory", "above", "t"])
async def test_a_drain_of_any_node_in_the_way_does_not_wait_for_limits(
    graph: Graph, autojump_clock: trio.testing.MockClock, drained: str
) -> None:
    await group_of(graph, iops_total=1)
    await graph.detach_root(await throttled(graph))
    await graph.blockdev_add({"driver": "raw", "node-name": "above", "file": "t"})
    root = root_of(graph, "above")

    async def drain() -> None:
        async with graph.lock, graph.drained(graph.find(drained)):
            pass

    assert max(await times_of(*reads(root, 20), drain)) == pytest.approx(0)


async def test_a_drain_leaves_the_limits_of_other_nodes_on(
    graph: Graph, autojump_clock: trio.testing.MockClock
) -> None:
    await group_of(graph, iops_total=1)
    a, b = await throttled(graph, "a"), await throttled(graph, "b")

    async def drain() -> None:
        async with graph.lock, graph.drained(graph.find("a")):
            pass

    times = await times_of(*reads(a, 2), *reads(b, 1), *reads(a, 1), drain)
    assert times[3] == pytest.approx(0)
    # three requests of the one went, and charged
    assert times[2] == pytest.approx(2.9, abs=TICK)


async def test_a_resize_does_not_wait_for_limits(graph: Graph, autojump_clock: trio.testing.MockClock) -> None:
    await group_of(graph, iops_total=1)
    root = await throttled(graph)
    assert max(await times_of(*reads(root, 20), lambda: graph.block_resize("t", 4096))) == pytest.approx(0)
    assert root.length == memory_of(graph, "t-memory").length == 4096


async def test_detaching_a_user_does_not_wait_for_limits(graph: Graph, autojump_clock: trio.testing.MockClock) -> None:
    await group_of(graph, iops_total=1)
    root = await throttled(graph)
    assert max(await times_of(*reads(root, 20), lambda: graph.detach_root(root))) == pytest.approx(0)


# --- groups and nodes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"throttle-group": "nope", "file": MEM}, "Throttle group 'nope' does not exist"),
        ({"throttle-group": "t", "file": MEM}, "Throttle group 't' does not exist"),
        ({"throttle-group": "", "file": MEM}, "Throttle group '' does not exist"),
        ({"throttle-group": 5, "file": MEM}, "Invalid parameter type for 'throttle-group', expected: string"),
        ({"throttle-group": "g"}, "Parameter 'file' is missing"),
        ({"file": MEM}, "Parameter 'throttle-group' is missing"),
        ({"throttle-group": "g", "file": MEM, "limits": 1}, "Parameter 'limits' is unexpected"),
    ],
    ids=str,
)
async def test_an_impossible_throttle_node_is_refused(graph: Graph, options: dict[str, object], message: str) -> None:
    await graph.objects.add({"qom-type": "iothread", "id": "t"})
    await group_of(graph)
    with pytest.raises(OptionError) as refused:
        await graph.blockdev_add({"driver": "throttle", "node-name": "x", **options})
    assert str(refused.value) == message
    assert not graph.nodes
    graph.objects.remove("g")


async def test_a_group_is_in_use_as_long_as_it_has_nodes(graph: Graph) -> None:
    await group_of(graph)
    await graph.detach_root(await throttled(graph, "a"))
    await graph.detach_root(await throttled(graph, "b"))
    await graph.blockdev_del("a")
    with pytest.raises(CommandError, match=r"^object 'g' is in use, can not be deleted$"):
        graph.objects.remove("g")
    await graph.blockdev_del("b")
    graph.objects.remove("g")


async def test_a_node_that_failed_to_open_is_no_member(graph: Graph) -> None:
    await group_of(graph)
    await graph.blockdev_add({**MEM, "node-name": "m", "read-only": True})
    await graph.blockdev_add(
        {"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "m", "read-only": True}
    )
    with pytest.raises(OptionError):
        await graph.blockdev_add(
            {
                "driver": "raw",
                "node-name": "x",
                "size": 5,
                "file": {"driver": "throttle", "throttle-group": "g", "file": "m", "read-only": True},
            }
        )
    await graph.blockdev_del("t")
    graph.objects.remove("g")


async def test_groups_do_not_share_limits(graph: Graph, autojump_clock: trio.testing.MockClock) -> None:
    await group_of(graph, "slow", iops_total=1)
    await group_of(graph, "fast", iops_total=1000)
    slow, fast = await throttled(graph, "a", "slow"), await throttled(graph, "b", "fast")
    times = await times_of(*reads(slow, 3), *reads(fast, 100))
    assert times[2] == pytest.approx(1.9, abs=TICK)
    assert max(times[3:]) == pytest.approx(0)


async def test_a_node_that_leaves_takes_nothing_from_the_others(
    graph: Graph, autojump_clock: trio.testing.MockClock
) -> None:
    group = await group_of(graph, iops_total=10)
    gone, stays = await throttled(graph, "gone"), await throttled(graph, "stays")
    await times_of(*reads(gone, 5), *reads(stays, 5))
    await graph.detach_root(gone)
    await graph.blockdev_del("gone")
    await times_of(*reads(stays, 5))
    assert group.in_use
    assert not group.state.wait(READ, trio.current_time() + 1)
    assert group.state.wait(WRITE, trio.current_time()) >= 0
