"""Filters inserted into a graph that is in use, and taken out of it."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from support import READ_WRITE, memory_of, read, root_of, write

from fusebd.block.graph import Graph
from fusebd.block.insertion import insert_filter, remove_filter
from fusebd.block.perms import Perm
from fusebd.errors import BlockIOError, FusebdError, GraphError

MEMORY = {"driver": "test-memory", "node-name": "disk", "size": 1 << 20}
LEFT_OUT = "Just one child of the filter must be left out, not {}: it is what is there"
FAILING = {"driver": "blkdebug", "inject-error": [{"event": "none", "iotype": "write"}]}


async def test_a_filter_inserted_above_a_node_sees_the_requests_of_those_who_had_it_open(graph: Graph) -> None:
    await graph.blockdev_add(MEMORY)
    root = root_of(graph, "disk")
    await write(root, 0, b"before")
    await insert_filter(graph, FAILING, "disk")
    with pytest.raises(BlockIOError, match="Input/output"):
        await write(root, 0, b"during")
    assert await read(root, 0, 6) == b"before"
    await graph.detach_root(root)


async def test_after_its_removal_everything_is_as_it_was(graph: Graph) -> None:
    await graph.blockdev_add(MEMORY)
    root = root_of(graph, "disk")
    inserted = await insert_filter(graph, FAILING, "disk")
    await remove_filter(graph, inserted.name)
    assert root.node is graph.find("disk")
    assert list(graph.nodes) == ["disk"]
    await write(root, 0, b"after")
    await graph.detach_root(root)
    await graph.blockdev_del("disk")


async def test_who_comes_later_enters_by_the_filter(graph: Graph) -> None:
    await graph.blockdev_add(MEMORY)
    inserted = await insert_filter(graph, FAILING, "disk")
    assert graph.find("disk").entrance is inserted
    await remove_filter(graph, inserted.name)
    assert graph.find("disk").entrance is graph.find("disk")


async def test_a_filter_goes_between_a_node_and_its_child(graph: Graph) -> None:
    await graph.blockdev_add(MEMORY)
    await graph.blockdev_add({"driver": "raw", "node-name": "top", "file": "disk"})
    top, below = root_of(graph, "top"), root_of(graph, "disk", Perm.CONSISTENT_READ)
    failing = {"driver": "blkdebug", "inject-error": [{"event": "read_aio"}]}
    inserted = await insert_filter(graph, failing, "top", "file")
    with pytest.raises(BlockIOError, match="Input/output"):
        await read(top, 0, 512)
    assert await read(below, 0, 512) == bytes(512)
    assert graph.find("top").entrance is graph.find("top")
    await remove_filter(graph, inserted.name)
    assert await read(top, 0, 512) == bytes(512)
    await graph.detach_root(top)
    await graph.detach_root(below)


async def test_filters_above_each_other_are_taken_out_in_any_order(graph: Graph) -> None:
    await graph.blockdev_add(MEMORY)
    root = root_of(graph, "disk")
    names = [(await insert_filter(graph, {"driver": "blkdebug", "node-name": n}, "disk")).name for n in ("a", "b", "c")]
    assert names == ["a", "b", "c"]
    assert graph.find("disk").entrance.name == "c"
    await remove_filter(graph, "b")
    assert [graph.find("c").children["image"].node.name, graph.find("disk").entrance.name] == ["a", "c"]
    await remove_filter(graph, "c")
    assert graph.find("disk").entrance.name == root.node.name == "a"
    await remove_filter(graph, "a")
    assert root.node.name == "disk"
    await graph.detach_root(root)


async def test_a_filter_that_was_there_from_the_beginning_can_be_taken_out(graph: Graph) -> None:
    await graph.blockdev_add({"driver": "raw", "node-name": "top", "file": {**FAILING, "image": {"driver": "null-co"}}})
    root = root_of(graph, "top")
    filter_name = graph.find("top").children["file"].node.name
    await remove_filter(graph, filter_name)
    await write(root, 0, b"works")
    assert graph.find("top").children["file"].node.driver_name == "null-co"
    await graph.detach_root(root)


async def test_requests_under_way_end_before_the_filter_is_there(graph: Graph) -> None:
    await graph.blockdev_add({"driver": "null-co", "node-name": "disk", "latency-ns": 50_000_000})
    root = root_of(graph, "disk")
    events: list[str] = []

    async def reading() -> None:
        await read(root, 0, 512)
        events.append("read")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reading)
        await trio.testing.wait_all_tasks_blocked()
        await insert_filter(graph, {"driver": "blkdebug", "node-name": "filter"}, "disk")
        events.append("inserted")
    assert events == ["read", "inserted"]
    await graph.detach_root(root)


async def test_a_second_child_is_given_and_the_other_is_what_is_there(graph: Graph) -> None:
    await graph.blockdev_add(MEMORY)
    await graph.blockdev_add({**MEMORY, "node-name": "twin"})
    root = root_of(graph, "disk")
    await insert_filter(graph, {"driver": "blkverify", "raw": "twin", "node-name": "verify"}, "disk")
    await write(root, 100, b"both")
    assert memory_of(graph, "twin").data[100:104] == b"both"
    memory_of(graph, "disk").data[101] = 0
    with pytest.raises(BlockIOError, match="mismatch"):
        await read(root, 0, 512)
    await graph.detach_root(root)


@pytest.mark.parametrize(
    ("value", "name", "child", "message"),
    [
        (FAILING, "none", None, "Cannot find device='' nor node-name='none'"),
        (FAILING, "disk", "file", "Node 'disk' has no child 'file'"),
        ({"driver": "raw"}, "disk", None, "Driver 'raw' is not a filter"),
        ({"driver": "null-co"}, "disk", None, LEFT_OUT.format(0)),
        ({"driver": "blkverify"}, "disk", None, LEFT_OUT.format(2)),
        ({"driver": "zork"}, "disk", None, "Parameter 'driver' does not accept value 'zork'"),
        ({"driver": "blkdebug", "align": 3}, "disk", None, "Cannot meet constraints with align 3"),
        ({"driver": "blkdebug", "node-name": "disk"}, "disk", None, "Duplicate nodes with node-name='disk'"),
    ],
)  # fmt: skip
async def test_what_cannot_be_inserted_leaves_the_graph_as_it_was(
    graph: Graph, value: dict[str, Any], name: str, child: str | None, message: str
) -> None:
    await graph.blockdev_add(MEMORY)
    root = root_of(graph, "disk")
    with pytest.raises(FusebdError) as failure:
        await insert_filter(graph, value, name, child)
    assert str(failure.value) == message
    assert list(graph.nodes) == ["disk"]
    assert graph.find("disk").parents == [root]
    await write(root, 0, b"still")
    await graph.detach_root(root)


async def test_a_conflict_of_permissions_refuses_the_insertion(graph: Graph) -> None:
    await graph.blockdev_add(MEMORY)
    writer = root_of(graph, "disk")
    greedy = {"driver": "blkdebug", "unshare-child-perms": ["write"]}
    await graph.blockdev_add({"driver": "raw", "node-name": "other", "file": "disk"})
    other = root_of(graph, "other", READ_WRITE)
    with pytest.raises(FusebdError, match="Permission conflict on node 'disk'"):
        await insert_filter(graph, greedy, "other", "file")
    assert "#" not in "".join(graph.nodes)
    await write(writer, 0, b"1")
    await write(other, 0, b"2")
    await graph.detach_root(writer)
    await graph.detach_root(other)


async def test_an_inserted_filter_is_not_deleted_like_a_node(graph: Graph) -> None:
    await graph.blockdev_add(MEMORY)
    await insert_filter(graph, {"driver": "blkdebug", "node-name": "filter"}, "disk")
    with pytest.raises(GraphError, match="block-filter-remove takes it out"):
        await graph.blockdev_del("filter")
    with pytest.raises(GraphError, match="Block device disk is in use"):
        await graph.blockdev_del("disk")


async def test_only_filters_are_taken_out(graph: Graph) -> None:
    await graph.blockdev_add(MEMORY)
    await graph.blockdev_add({"driver": "raw", "node-name": "top", "file": "disk"})
    for name in ("disk", "top"):
        with pytest.raises(GraphError, match=f"Node '{name}' is not a filter"):
            await remove_filter(graph, name)


async def test_errors_are_put_down_to_the_node_that_has_a_name(graph: Graph) -> None:
    await graph.blockdev_add(MEMORY)
    root = root_of(graph, "disk")
    await insert_filter(graph, FAILING, "disk")
    events: list[tuple[str, dict[str, Any]]] = []
    graph.event_listeners.append(lambda event, data: events.append((event, data)))
    with pytest.raises(BlockIOError):
        await write(root, 512, bytes(1024))
    assert [(event, data["node-name"]) for event, data in events] == [
        ("FAULT_INJECTED", "disk"),
        ("BLOCK_IO_ERROR", "disk"),
    ]
    entries = list(graph.ledger)
    assert all(entry.pop("time") > 0 for entry in entries)
    where = {"node-name": "disk", "operation": "write", "offset": 512, "length": 1024, "errno": 5}
    assert entries == [
        {"id": 1, "kind": "fault", "rule": "1", "action": "error", **where},
        {"id": 2, "kind": "error", **where},
    ]
    await graph.detach_root(root)
