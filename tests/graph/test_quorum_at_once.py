"""The quorum driver with many requests at once: over children that wait, and that take turns in any order."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from quorums import MEMORY, Event, Gate, add, listen
from support import memory_of, read, root_of, write

from fusebd.block.graph import Graph


@pytest.fixture
def events(graph: Graph) -> list[Event]:
    return listen(graph)


async def test_nothing_suspends_over_memory_even_where_children_differ(graph: Graph) -> None:
    root, _ = await add(graph, "aab", rewrite_corrupted=True)
    with trio.testing.assert_no_checkpoints():
        await read(root, 0, 4096)
        await write(root, 0, b"data")
        await root.pwrite_zeroes(0, 4096)
        await root.flush()


@pytest.mark.parametrize("operation", ["preadv", "pwritev", "flush"])
async def test_children_that_wait_are_at_work_at_the_same_time(graph: Graph, operation: str) -> None:
    root, memories = await add(graph)
    requests = {"preadv": lambda: read(root, 0, 9), "pwritev": lambda: write(root, 0, b"a"), "flush": root.flush}
    gates = [Gate(memory, operation) for memory in memories]
    async with trio.open_nursery() as nursery:
        # the first request finds out that they wait
        nursery.start_soon(requests[operation])
        for index, gate in enumerate(gates):
            await trio.testing.wait_all_tasks_blocked()
            assert [gate.waiting for gate in gates] == [i == index for i in range(3)]
            gate.open()
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(requests[operation])
        await trio.testing.wait_all_tasks_blocked()
        assert [gate.waiting for gate in gates] == [1, 1, 1]
        for gate in gates:
            gate.opened.set()


async def test_a_read_during_a_write_finds_no_difference(graph: Graph, events: list[Event]) -> None:
    # QEMU fails it: one child has the new content, one the old
    root, memories = await add(graph, "aa", rewrite_corrupted=True)
    gate = Gate(memories[1], "pwritev")
    found = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, root, 1000, b"new")
        await trio.testing.wait_all_tasks_blocked()

        async def reading() -> None:
            found.append(await read(root, 999, 5))

        nursery.start_soon(reading)
        await trio.testing.wait_all_tasks_blocked()
        assert found == []
        # what the write does not touch is no reason to wait
        assert await read(root, 1003, 100) == b"a" * 100
        gate.open()
    assert found == [b"anewa"]
    assert events == []


async def test_a_write_that_begins_during_a_read_makes_no_difference(graph: Graph, events: list[Event]) -> None:
    root, memories = await add(graph, "aa", rewrite_corrupted=True)
    gate = Gate(memories[1], "preadv")
    found = []
    async with trio.open_nursery() as nursery:

        async def reading() -> None:
            found.append(await read(root, 0, 512))

        nursery.start_soon(reading)
        await trio.testing.wait_all_tasks_blocked()
        await write(root, 0, b"b" * 512)
        gate.open()
        await trio.testing.wait_all_tasks_blocked()
        gate.open()
    assert found == [b"b" * 512]
    assert memories[0].data == memories[1].data
    assert events == []


async def test_a_write_waits_for_a_rewrite_of_the_same_bytes(graph: Graph) -> None:
    root, memories = await add(graph, "aab", rewrite_corrupted=True)
    gate = Gate(memories[2], "pwritev")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, root, 0, 4096)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(write, root, 100, b"later")
        await trio.testing.wait_all_tasks_blocked()
        assert gate.waiting == 1
        gate.open()
        await trio.testing.wait_all_tasks_blocked()
        gate.open()
    assert all(memory.data[:4096] == b"a" * 100 + b"later" + b"a" * 3991 for memory in memories)


async def test_after_overlapping_writes_all_children_are_the_same(graph: Graph, events: list[Event]) -> None:
    for index in range(3):
        await graph.blockdev_add({**MEMORY, "node-name": f"m{index}"})
        suspends = {"driver": "test-suspends", "most": 5, "seed": index, "file": f"m{index}"}
        await graph.blockdev_add({**suspends, "node-name": f"c{index}"})
    children = [f"c{index}" for index in range(3)]
    await graph.blockdev_add({"driver": "quorum", "node-name": "q", "children": children, "vote-threshold": 3})
    root = root_of(graph, "q")

    async def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(20):
            offset = rng.randrange(4000)
            await write(root, offset, bytes([rng.randrange(256)]) * rng.randrange(1, 1000))
            await read(root, rng.randrange(4000), rng.randrange(1, 1000))

    async with trio.open_nursery() as nursery:
        for number in range(16):
            nursery.start_soon(client, number)
    memories = [memory_of(graph, f"m{index}").data for index in range(3)]
    assert memories[0] == memories[1] == memories[2]
    assert events == []


@pytest.mark.parametrize("child", [0, 1, 2])
@pytest.mark.parametrize("operation", ["preadv", "pwritev"])
async def test_a_cancelled_request_leaves_nothing_behind(graph: Graph, operation: str, child: int) -> None:
    root, memories = await add(graph)
    gate = Gate(memories[child], operation)
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            if operation == "preadv":
                nursery.start_soon(read, root, 0, 1)
            else:
                nursery.start_soon(write, root, 0, b"a")
            await trio.testing.wait_all_tasks_blocked()
            assert gate.waiting == 1
            nursery.cancel_scope.cancel()
        assert root.in_flight == 0
        gate.waiting = 0
    gate.opened.set()
    await write(root, 0, b"x")
    assert await read(root, 0, 2) == b"xa"
