"""volatile-cache: what was flushed survives a power cut, and nothing else has to."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import memory_of, read, root_of, write

from fusebd.block.child import FUA
from fusebd.block.graph import Graph
from fusebd.block.insertion import find_driver
from fusebd.block.root import Root
from fusebd.drivers.volatilecache.driver import NoOptions, PowerCutOptions, VolatileCache
from fusebd.drivers.volatilecache.pending import WRITE, WriteLog, decide
from fusebd.errors import BlockIOError, CommandError, GraphError, OptionError

LENGTH = 1 << 16
SECTOR = 512


async def make(graph: Graph, **options: Any) -> tuple[Root, VolatileCache]:
    await graph.blockdev_add({"driver": "test-memory", "node-name": "medium", "size": LENGTH, "discard": "unmap"})
    await graph.blockdev_add({"driver": "volatile-cache", "node-name": "disk", "file": "medium", **options})
    return root_of(graph, "disk"), find_driver(graph, "disk", VolatileCache)


def medium(graph: Graph) -> bytearray:
    return memory_of(graph, "medium").data


async def test_writes_are_in_the_cache_until_they_are_flushed(graph: Graph) -> None:
    root, _ = await make(graph)
    await write(root, 0, b"x" * SECTOR)
    assert await read(root, 0, SECTOR) == b"x" * SECTOR
    assert medium(graph)[:SECTOR] == bytes(SECTOR)
    await root.flush()
    assert medium(graph)[:SECTOR] == b"x" * SECTOR
    assert memory_of(graph, "medium").log[-1][0] == "flush"
    await graph.detach_root(root)


async def test_reads_see_the_cache_over_the_medium(graph: Graph) -> None:
    root, _ = await make(graph)
    await write(root, 0, b"a" * 4 * SECTOR)
    await root.flush()
    await write(root, SECTOR, b"b" * SECTOR)
    await root.pwrite_zeroes(3 * SECTOR, SECTOR)
    expected = b"a" * SECTOR + b"b" * SECTOR + b"a" * SECTOR + bytes(SECTOR)
    assert await read(root, 0, 4 * SECTOR) == expected
    assert await read(root, 100, 1000) == expected[100:1100]
    await graph.detach_root(root)


async def test_a_cut_that_keeps_nothing_leaves_what_was_flushed(graph: Graph) -> None:
    root, cache = await make(graph)
    await write(root, 0, b"flushed!" * 64)
    await root.flush()
    await write(root, 0, b"not yet." * 64)
    await cache.power_cut(PowerCutOptions(keep=0))
    await cache.power_on(NoOptions())
    assert await read(root, 0, SECTOR) == b"flushed!" * 64
    await graph.detach_root(root)


async def test_a_cut_that_keeps_everything_loses_nothing(graph: Graph) -> None:
    root, cache = await make(graph)
    for number in range(8):
        await write(root, number * SECTOR, bytes([number]) * SECTOR)
    report = await cache.power_cut(PowerCutOptions(keep=1))
    assert [decision["outcome"] for decision in report["last-cut"]] == ["kept"] * 8
    assert bytes(medium(graph)[: 8 * SECTOR]) == b"".join(bytes([number]) * SECTOR for number in range(8))
    await cache.power_on(NoOptions())
    await graph.detach_root(root)


async def test_every_request_fails_while_the_power_is_off(graph: Graph) -> None:
    root, cache = await make(graph)
    await cache.power_cut(PowerCutOptions())
    for attempt in (read(root, 0, SECTOR), write(root, 0, bytes(SECTOR)), root.flush(), root.pwrite_zeroes(0, SECTOR)):
        with pytest.raises(BlockIOError, match="power is off") as failure:
            await attempt
        assert failure.value.errno == 5
    with pytest.raises(CommandError, match="off already"):
        await cache.power_cut(PowerCutOptions())
    await cache.power_on(NoOptions())
    with pytest.raises(CommandError, match="on already"):
        await cache.power_on(NoOptions())
    await write(root, 0, bytes(SECTOR))
    await graph.detach_root(root)


async def test_a_write_with_fua_is_durable_when_it_returns(graph: Graph) -> None:
    root, _ = await make(graph)
    await write(root, 0, b"old." * 128 * 2)
    await root.pwritev(SECTOR, (memoryview(b"fua." * 128),), FUA)
    assert medium(graph)[SECTOR : 2 * SECTOR] == b"fua." * 128
    assert medium(graph)[:SECTOR] == bytes(SECTOR)
    await root.flush()
    assert medium(graph)[: 2 * SECTOR] == b"old." * 128 + b"fua." * 128
    await graph.detach_root(root)


async def test_an_older_write_that_survives_a_cut_does_not_hide_a_newer_one_with_fua(graph: Graph) -> None:
    root, cache = await make(graph)
    await write(root, 0, b"old." * 128 * 3)
    await root.pwritev(SECTOR, (memoryview(b"fua." * 128),), FUA)
    await cache.power_cut(PowerCutOptions(keep=1))
    assert medium(graph)[: 3 * SECTOR] == b"old." * 128 + b"fua." * 128 + b"old." * 128
    await cache.power_on(NoOptions())
    await graph.detach_root(root)


async def test_torn_writes_keep_whole_sectors(graph: Graph) -> None:
    root, cache = await make(graph, seed=3)
    await write(root, 0, b"n" * 64 * SECTOR)
    report = await cache.power_cut(PowerCutOptions(keep=1, torn=1))
    (decision,) = report["last-cut"]
    assert decision["outcome"] == "torn"
    kept = decision["kept-sectors"]
    assert 0 < len(kept) < 64
    for number in range(64):
        expected = b"n" * SECTOR if number in kept else bytes(SECTOR)
        assert medium(graph)[number * SECTOR : (number + 1) * SECTOR] == expected
    await cache.power_on(NoOptions())
    await graph.detach_root(root)


async def test_the_power_goes_when_the_nth_request_comes(graph: Graph) -> None:
    root, cache = await make(graph, **{"power-cut": {"operation": "write", "nth": 3, "keep": 0.0}})
    await write(root, 0, bytes(SECTOR))
    await read(root, 0, SECTOR)
    await write(root, 0, bytes(SECTOR))
    assert cache.report()["scheduled"]["left"] == 1
    with pytest.raises(BlockIOError, match="power is off"):
        await write(root, 0, b"x" * SECTOR)
    assert cache.report()["power"] is False
    await cache.power_on(NoOptions())
    assert await read(root, 0, SECTOR) == bytes(SECTOR)
    await graph.detach_root(root)


async def test_a_cut_during_a_flush_fails_the_flush(graph: Graph) -> None:
    root, cache = await make(graph, **{"power-cut": {"operation": "flush", "nth": 1}})
    await write(root, 0, b"x" * SECTOR)
    with pytest.raises(BlockIOError, match="power is off"):
        await root.flush()
    await cache.power_on(NoOptions())
    await graph.detach_root(root)


async def test_a_full_cache_writes_out_its_oldest(graph: Graph) -> None:
    root, cache = await make(graph, size=4 * SECTOR)
    for number in range(6):
        await write(root, number * SECTOR, bytes([number + 1]) * SECTOR)
    assert cache.report()["pending-bytes"] == 4 * SECTOR
    assert cache.report()["settled"] == 2
    assert bytes(medium(graph)[: 6 * SECTOR]) == b"\1" * SECTOR + b"\2" * SECTOR + bytes(4 * SECTOR)
    await graph.detach_root(root)


async def test_the_ledger_has_what_was_lost(graph: Graph) -> None:
    root, cache = await make(graph)
    events: list[tuple[str, dict[str, Any]]] = []
    graph.event_listeners.append(lambda event, data: events.append((event, data)))
    await write(root, SECTOR, bytes(2 * SECTOR))
    await cache.power_cut(PowerCutOptions(keep=0))
    (entry,) = graph.ledger
    assert {key: entry[key] for key in entry.keys() - {"time"}} == {
        "id": 1, "kind": "fault", "node-name": "disk", "rule": "power-cut-1", "action": "dropped",
        "operation": "write", "offset": SECTOR, "length": 2 * SECTOR, "sequence": 1,
    }  # fmt: skip
    assert events[-1] == ("POWER_CUT", {"node-name": "disk", "number": 1, "kept": 0, "dropped": 1, "torn": 0})
    await cache.power_on(NoOptions())
    await graph.detach_root(root)


async def test_a_node_closed_in_peace_loses_nothing(graph: Graph) -> None:
    root, _ = await make(graph)
    await write(root, 0, b"kept" * 128)
    data = medium(graph)
    await graph.detach_root(root)
    await graph.blockdev_del("disk")
    assert data[:SECTOR] == b"kept" * 128
    assert not graph.close_failures


async def test_discards_and_zero_writes_wait_for_the_flush_too(graph: Graph) -> None:
    root, _ = await make(graph, discard="unmap")
    await write(root, 0, b"a" * 2 * SECTOR)
    await root.flush()
    await root.pwrite_zeroes(0, SECTOR)
    await root.pdiscard(SECTOR, SECTOR)
    assert medium(graph)[: 2 * SECTOR] == b"a" * 2 * SECTOR
    await root.flush()
    assert [entry[0] for entry in memory_of(graph, "medium").log[-3:]] == ["zero", "discard", "flush"]
    await graph.detach_root(root)


@pytest.mark.parametrize("size", [0, 3, 2 << 20])
async def test_a_sector_size_that_cannot_be_is_refused(graph: Graph, size: int) -> None:
    with pytest.raises(OptionError, match="sector-size must be a power of two"):
        await make(graph, **{"sector-size": size})


async def test_a_node_without_a_cache_has_no_power(graph: Graph) -> None:
    await graph.blockdev_add({"driver": "test-memory", "node-name": "disk"})
    with pytest.raises(GraphError, match="Node 'disk' has no volatile-cache driver"):
        find_driver(graph, "disk", VolatileCache)


# --- any history ---------------------------------------------------------------------------------

Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["write", "fua", "zero", "flush"]), st.integers(0, 15), st.integers(1, 4)), max_size=30
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(steps=STEPS, seed=st.integers(0, 1000), torn=st.sampled_from([0.0, 0.5, 1.0]))
async def test_after_any_cut_each_sector_has_its_durable_content_or_a_later_one(
    steps: list[Step], seed: int, torn: float
) -> None:
    graph = Graph()
    root, cache = await make(graph, seed=seed)
    durable = [bytes(SECTOR)] * 20
    later: list[list[bytes]] = [[] for _ in range(20)]
    rng = random.Random(seed)
    for kind, first, count in steps:
        data = bytes(count * SECTOR) if kind == "zero" else rng.randbytes(count * SECTOR)
        if kind == "flush":
            await root.flush()
            durable = [contents[-1] if contents else kept for kept, contents in zip(durable, later, strict=True)]
            later = [[] for _ in range(20)]
            continue
        if kind == "zero":
            await root.pwrite_zeroes(first * SECTOR, count * SECTOR)
        else:
            await root.pwritev(first * SECTOR, (memoryview(data),), FUA if kind == "fua" else 0)
        for index in range(count):
            content = data[index * SECTOR : (index + 1) * SECTOR]
            if kind == "fua":
                durable[first + index], later[first + index] = content, []
            else:
                later[first + index].append(content)
    assert await read(root, 0, 20 * SECTOR) == b"".join(
        contents[-1] if contents else kept for kept, contents in zip(durable, later, strict=True)
    )
    await cache.power_cut(PowerCutOptions(keep=0.5, torn=torn))
    await cache.power_on(NoOptions())
    found = await read(root, 0, 20 * SECTOR)
    for index in range(20):
        assert found[index * SECTOR : (index + 1) * SECTOR] in [durable[index], *later[index]]
    assert found == medium(graph)[: 20 * SECTOR]
    await graph.detach_root(root)
    await graph.close()


def test_the_same_seed_decides_alike() -> None:
    def outcomes(seed: int) -> list[tuple[str, frozenset[int]]]:
        log = WriteLog(SECTOR)
        for number in range(50):
            log.add(WRITE, number * 8 * SECTOR, 8 * SECTOR, bytes(8 * SECTOR))
        return [(d.outcome, d.kept) for d in decide(log, random.Random(seed), keep=0.5, torn=0.5)]

    assert outcomes(1) == outcomes(1)
    assert outcomes(1) != outcomes(2)
    assert {outcome for outcome, _ in outcomes(1)} == {"kept", "dropped", "torn"}
