"""Straight paths: drivers with nothing to do are passed by, and nothing else is different."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from support import READ_WRITE, Memory, memory_of, read, root_of, write

from fusebd.block.graph import Graph
from fusebd.block.insertion import insert_filter, remove_filter
from fusebd.block.node import Node
from fusebd.drivers.blkdebug.driver import Blkdebug
from fusebd.drivers.fault.commands import FaultRecord
from fusebd.drivers.fault.driver import Fault
from fusebd.drivers.raw import Raw
from fusebd.drivers.throttle import Throttle
from fusebd.errors import BlockIOError

MEMORY = {"driver": "test-memory", "node-name": "disk", "size": 1 << 20}
FAR = 512 * 100


async def chain(graph: Graph, *filters: dict[str, Any]) -> Memory:
    """``disk``, and above it the *filters*, ``filter0`` the lowest, and ``top`` a raw."""
    await graph.blockdev_add(MEMORY)
    below = "disk"
    for number, options in enumerate(filters):
        child = "image" if options["driver"] == "blkdebug" else "file"
        await graph.blockdev_add({**options, "node-name": f"filter{number}", child: below})
        below = f"filter{number}"
    await graph.blockdev_add({"driver": "raw", "node-name": "top", "file": below})
    return memory_of(graph, "disk")


def counts(node: Node) -> tuple[int, ...]:
    counted = node.counted()
    return (
        counted.rd_operations,
        counted.rd_bytes,
        counted.wr_operations,
        counted.wr_bytes,
        counted.wr_highest_offset,
        counted.failed_rd_operations,
    )


def on_the_way(graph: Graph, monkeypatch: pytest.MonkeyPatch, *drivers: type[Any]) -> list[str]:
    """The names of the nodes that see a request themselves."""
    seen: list[str] = []
    for driver in drivers:
        for operation in ("preadv", "pwritev"):
            original = getattr(driver, operation)

            async def watch(self: Any, *args: Any, original: Any = original) -> None:
                seen.append(self.node.name)
                await original(self, *args)

            monkeypatch.setattr(driver, operation, watch)
    for node in graph.nodes.values():
        node.refresh_edges()
    return seen


async def test_filters_without_rules_are_passed_by_and_counted(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    await chain(graph, {"driver": "blkdebug"}, {"driver": "fault"})
    seen = on_the_way(graph, monkeypatch, Blkdebug, Fault)
    root = root_of(graph, "top")
    await write(root, 100, b"data")
    assert await read(root, 98, 8) == b"\0\0data\0\0"
    assert seen == []
    assert {name: counts(node) for name, node in graph.nodes.items()} == dict.fromkeys(
        ("disk", "filter0", "filter1", "top"), (1, 8, 1, 4, 104, 0)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"driver": "blkdebug", "inject-error": [{"event": "none", "sector": FAR // 512, "errno": 28}]},
        {"driver": "fault", "rules": [{"action": "error", "offset": FAR, "length": 512, "errno": 28}]},
    ],
    ids=lambda options: options["driver"],
)
async def test_a_rule_sees_the_requests_that_it_concerns_alone(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    await chain(graph, {"driver": "fault"}, options, {"driver": "blkdebug"})
    seen = on_the_way(graph, monkeypatch, Blkdebug, Fault)
    root = root_of(graph, "top")
    await write(root, FAR - 512, bytes(512))
    await write(root, FAR + 512, bytes(512))
    await read(root, 0, FAR)
    assert seen == []
    for request in (read(root, FAR, 1), write(root, FAR - 1, b"ab")):
        with pytest.raises(BlockIOError, match="No space left"):
            await request
    assert "filter1" in seen
    assert counts(graph.find("disk")) == (1, FAR, 2, 1024, FAR + 1024, 0)
    assert counts(graph.find("top")) == (1, FAR, 2, 1024, FAR + 1024, 1)


async def test_limits_on_the_way_hold(graph: Graph) -> None:
    memory = await chain(graph, {"driver": "blkdebug", "align": 512, "max-transfer": 4096}, {"driver": "fault"})
    root = root_of(graph, "top")
    await write(root, 10, b"x" * 6000)
    assert await read(root, 10, 6000) == b"x" * 6000
    assert all(not (offset | length) % 512 and length <= 4096 for _, offset, length in memory.log)


async def test_what_is_written_past_filters_is_flushed(graph: Graph) -> None:
    flushed = []
    memory = await chain(graph, {"driver": "blkdebug"})
    root = root_of(graph, "top")

    async def flush_to_disk() -> None:
        flushed.append(len(memory.log))

    memory.flush_to_disk = flush_to_disk  # type: ignore[method-assign]
    for _ in range(2):
        await write(root, 0, b"x")
        await root.flush()
        await root.flush()
    assert len(flushed) == 2


async def test_nothing_is_counted_twice_or_lost_when_a_filter_comes_and_goes(graph: Graph) -> None:
    await graph.blockdev_add(MEMORY)
    root = root_of(graph, "disk")
    for _ in range(3):
        await write(root, 4000, b"x" * 96)
        inserted = await insert_filter(graph, {"driver": "fault"}, "disk")
        await read(root, 0, 100)
        assert counts(inserted)[:2] == (1, 100)
        await remove_filter(graph, inserted.name)
    assert counts(graph.find("disk")) == (3, 300, 3, 288, 4096, 0)
    assert graph.find("disk").tallies == []


async def test_a_request_that_is_under_way_while_the_path_changes_is_counted_once(graph: Graph) -> None:
    memory = await chain(graph, {"driver": "fault"})
    gate, original = trio.Event(), memory.preadv

    async def slow(offset: int, bufs: Any) -> None:
        await gate.wait()
        await original(offset, bufs)

    memory.preadv = slow  # type: ignore[method-assign]
    memory.node.refresh_edges()
    root = root_of(graph, "top")
    fault = graph.find("filter0").driver
    assert isinstance(fault, Fault)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, root, 0, 512)
        await trio.testing.wait_all_tasks_blocked()
        before = fault.read_bypass()
        await fault.record(FaultRecord(filename="/dev/null"))
        assert fault.read_bypass() != before
        gate.set()
    await read(root, 0, 512)
    assert {counts(node)[:2] for node in graph.nodes.values()} == {(2, 1024)}


async def test_a_throttle_is_passed_by_as_long_as_its_group_has_no_limits(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    await graph.objects.add({"qom-type": "throttle-group", "id": "group"})
    await chain(graph, {"driver": "throttle", "throttle-group": "group"})
    seen = on_the_way(graph, monkeypatch, Throttle)
    root = root_of(graph, "top")
    await read(root, 0, 512)
    assert seen == []
    graph.objects.throttle_group("group").put("limits", {"iops-read": 1000})
    await read(root, 0, 512)
    await write(root, 0, b"x")
    assert seen == ["filter0"]


async def test_reads_and_writes_at_the_same_offset_reach_a_raw_with_a_window(graph: Graph) -> None:
    memory = await chain(graph)
    await graph.blockdev_add({"driver": "raw", "node-name": "window", "file": "disk", "offset": 4096})
    root = root_of(graph, "window", READ_WRITE)
    await write(root, 0, b"moved")
    assert memory.data[4096:4101] == b"moved"


async def test_rules_that_every_read_arms_are_asked_on_the_way(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [{"event": "read_aio", "sector": FAR // 512}, {"event": "write_aio", "sector": FAR // 512}]
    await chain(graph, {"driver": "blkdebug", "inject-error": rules})
    seen = on_the_way(graph, monkeypatch, Blkdebug, Raw)
    root = root_of(graph, "top", READ_WRITE)
    driver = graph.nodes["filter0"].driver
    assert isinstance(driver, Blkdebug)
    await read(root, 0, 512)
    assert seen == []
    assert [rule["active"] for rule in driver.rules.describe()] == [True, False]
    await write(root, 0, b"x" * 512)
    assert seen == []
    assert [rule["active"] for rule in driver.rules.describe()] == [False, True]
    with pytest.raises(BlockIOError):
        await read(root, FAR, 512)
    with pytest.raises(BlockIOError):
        await write(root, FAR, b"x" * 512)
    assert [rule["hits"] for rule in driver.rules.describe()] == [1, 1]
    assert seen == ["top", "filter0", "top", "filter0"]


async def test_events_that_do_more_than_inject_are_announced_as_ever(graph: Graph) -> None:
    settings = [{"event": "read_aio", "state": 1, "new_state": 2}]
    errors = [{"event": "read_aio", "state": 2}]
    await chain(graph, {"driver": "blkdebug", "inject-error": errors, "set-state": settings})
    root = root_of(graph, "top", READ_WRITE)
    await read(root, 0, 512)
    with pytest.raises(BlockIOError):
        await read(root, 0, 512)
