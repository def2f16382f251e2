"""Quorum nodes in the graph: options, names, permissions, and children that come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from quorums import LENGTH, MEMORY, Event, Gate, add, bad, listen
from support import READ_WRITE, memory_of, read, root_of, write

from fusebd.block.graph import Graph
from fusebd.block.insertion import insert_filter
from fusebd.block.membership import change_children
from fusebd.block.naming import node_filename
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.errors import FusebdError, GraphError, OpenError, PermissionConflict


@pytest.fixture
def events(graph: Graph) -> list[Event]:
    return listen(graph)


# --- options ---------------------------------------------------------------------------------------

IN_BLKVERIFY = "blkverify=on can only be set if there are exactly two files and vote-threshold is 2"
M = MEMORY


# The messages are those of qemu-storage-daemon 10.0.2, but for the ones on on-mismatch.
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Parameter 'children' is missing"),
        ({"children": [M]}, "Parameter 'vote-threshold' is missing"),
        ({"children": [], "vote-threshold": 1}, "Number of provided children must be 1 or more"),
        ({"children": M, "vote-threshold": 1}, "Invalid parameter type for 'children', expected: array"),
        ({"children": [M, 5], "vote-threshold": 1}, "Invalid parameter type for 'null', expected: BlockdevRef"),
        ({"children": [M, None], "vote-threshold": 1}, "Invalid parameter type for 'null', expected: BlockdevRef"),
        ({"children": [M, {"driver": "raw"}], "vote-threshold": 1}, "Parameter 'children[1].file' is missing"),
        ({"children": [{"file": M}], "vote-threshold": 1}, "Parameter 'children[0].driver' is missing"),
        (
            {"children": [{"driver": "raw", "file": {"driver": "raw"}}], "vote-threshold": 1},
            "Parameter 'children[0].file.file' is missing",
        ),
        ({"children": [M], "vote-threshold": "1"}, "Invalid parameter type for 'vote-threshold', expected: integer"),
        ({"children": [M], "vote-threshold": 0}, "Parameter 'vote-threshold' expects a value >= 1"),
        ({"children": [M], "vote-threshold": -1}, "Parameter 'vote-threshold' expects a value >= 1"),
        ({"children": [M], "vote-threshold": 2}, "threshold may not exceed children count"),
        ({"children": [M, M], "vote-threshold": 3, "blkverify": True}, "threshold may not exceed children count"),
        ({"children": [M, M], "vote-threshold": 1, "blkverify": True}, IN_BLKVERIFY),
        ({"children": [M, M, M], "vote-threshold": 2, "blkverify": True}, IN_BLKVERIFY),
        (
            {"children": [M, M], "vote-threshold": 2, "blkverify": True, "rewrite-corrupted": True},
            "rewrite-corrupted=on cannot be used with blkverify=on",
        ),
        (
            {"children": [M], "vote-threshold": 1, "read-pattern": "lifo"},
            "Parameter 'read-pattern' does not accept value 'lifo'",
        ),
        ({"children": [M, "nope"], "vote-threshold": 1}, "Cannot find device='nope' nor node-name='nope'"),
        ({"children": [M, "q"], "vote-threshold": 1}, "Making 'q' a children.1 child of 'q' would create a cycle"),
        ({"children": [M], "vote-threshold": 1, "file": M}, "Parameter 'file' is unexpected"),
        (
            {"children": [M, {**M, "size": 512}], "vote-threshold": 1},
            "Could not refresh total sector count: Input/output error",
        ),
        (
            {"children": [M, M], "vote-threshold": 2, "rewrite-corrupted": True, "read-only": True},
            "Block node is read-only",
        ),
        (
            {"children": [M], "vote-threshold": 1, "on-mismatch": "stop"},
            "on-mismatch can only be set with blkverify=on",
        ),
        (
            {"children": [M, M], "vote-threshold": 2, "blkverify": True, "on-mismatch": "exit"},
            "Parameter 'on-mismatch' does not accept value 'exit'",
        ),
    ],
)
async def test_bad_options_are_refused(graph: Graph, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FusebdError) as refused:
        await graph.blockdev_add({"driver": "quorum", "node-name": "q", **options})
    assert str(refused.value) == message
    assert not graph.nodes


async def test_the_lengths_that_do_not_agree_are_named(graph: Graph) -> None:
    children = [MEMORY, {**MEMORY, "size": 512}]
    with pytest.raises(OpenError) as refused:
        await graph.blockdev_add({"driver": "quorum", "node-name": "q", "children": children, "vote-threshold": 1})
    assert refused.value.hint == "the children have different lengths: 65536, 512 bytes"


# The names are those of qemu-storage-daemon 10.0.2.
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, '"driver": "quorum", "vote-threshold": 2'),
        (
            {"read-pattern": "fifo", "blkverify": True, "rewrite-corrupted": True, "discard": "unmap"},
            '"driver": "quorum", "blkverify": true, "rewrite-corrupted": true, "vote-threshold": 2',
        ),
        (
            {"read-pattern": "quorum", "blkverify": False, "rewrite-corrupted": False},
            '"driver": "quorum", "blkverify": false, "rewrite-corrupted": false, "vote-threshold": 2',
        ),
        ({"blkverify": True, "on-mismatch": "stop"}, '"driver": "quorum", "blkverify": true, "vote-threshold": 2'),
    ],
)
async def test_its_name_is_made_of_the_options_that_were_given(
    graph: Graph, tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    children = []
    for letter in "ab":
        (tmp_path / letter).write_bytes(bytes(512))
        children.append({"driver": "file", "filename": str(tmp_path / letter)})
    await graph.blockdev_add(
        {"driver": "quorum", "node-name": "q", "children": children, "vote-threshold": 2, **options}
    )
    pattern = f'"read-pattern": "{options["read-pattern"]}", ' if "read-pattern" in options else ""
    files = [f'{{"driver": "file", "filename": "{tmp_path}/{letter}"}}' for letter in "ab"]
    assert node_filename(graph.find("q")) == f'json:{{{pattern}"children": [{", ".join(files)}], {name}}}'


# --- permissions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rewrite", [False, True])
async def test_children_are_not_shared_with_writers(graph: Graph, rewrite: bool) -> None:
    root, _ = await add(graph, rewrite_corrupted=rewrite)
    await graph.detach_root(root)
    edges = graph.find("q").children
    assert list(edges) == ["children.0", "children.1", "children.2"]
    shared = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
    always = Perm.WRITE if rewrite else Perm.NONE
    assert {(edge.perm, edge.shared) for edge in edges.values()} == {(always, shared)}
    root_of(graph, "q", Perm.CONSISTENT_READ | Perm.RESIZE)
    assert {edge.perm for edge in edges.values()} == {always | Perm.CONSISTENT_READ | Perm.RESIZE}
    with pytest.raises(PermissionConflict, match="permissions 'write' are both required by"):
        root_of(graph, "c1", READ_WRITE)


async def test_one_node_can_be_several_children_for_readers_alone(graph: Graph) -> None:
    await graph.blockdev_add({**MEMORY, "node-name": "m"})
    await graph.blockdev_add({"driver": "quorum", "node-name": "q", "children": ["m", "m"], "vote-threshold": 2})
    with pytest.raises(PermissionConflict) as refused:
        root_of(graph, "q", READ_WRITE)
    assert str(refused.value) == (
        "Permission conflict on node 'm': permissions 'write' are both required by node 'q' (uses node 'm' as "
        "'children.0' child) and unshared by node 'q' (uses node 'm' as 'children.1' child)."
    )
    assert await read(root_of(graph, "q", Perm.CONSISTENT_READ), 0, 512) == bytes(512)


# --- children that come and go ---------------------------------------------------------------------


async def test_a_child_that_was_added_takes_part(graph: Graph, events: list[Event]) -> None:
    root, _ = await add(graph, "aa")
    await graph.blockdev_add({**MEMORY, "node-name": "c2"})
    new = memory_of(graph, "c2")
    new.data[:] = b"b" * LENGTH
    # the node that was opened for a file is in use by its reader
    await change_children(graph, "q", node_name="c2")
    assert list(graph.find("q").children) == ["children.0", "children.1", "children.2"]
    assert await read(root, 0, 4096) == b"a" * 4096
    assert events == [bad(2)]
    await write(root, 0, b"data")
    assert new.data[:5] == b"datab"


async def test_a_child_that_was_taken_away_is_left_alone(graph: Graph, events: list[Event]) -> None:
    root, memories = await add(graph, "aab")
    await change_children(graph, "q", child_name="children.2")
    assert await read(root, 0, 4096) == b"a" * 4096
    await write(root, 0, b"data")
    assert events == []
    assert memories[2].log == []
    await write(root_of(graph, "c2", READ_WRITE), 0, b"own")


async def test_a_child_that_nothing_else_uses_is_closed(graph: Graph) -> None:
    children = [{**MEMORY, "node-name": f"c{index}"} for index in range(3)]
    await graph.blockdev_add({"driver": "quorum", "node-name": "q", "children": children, "vote-threshold": 2})
    gone: list[str] = []
    graph.node_listeners.append(lambda: gone.extend({"c0", "c1", "c2"} - graph.named_nodes().keys()))
    await change_children(graph, "q", child_name="children.1")
    assert gone == ["c1"]
    assert list(graph.find("q").children) == ["children.0", "children.2"]


async def test_the_number_of_the_last_child_alone_is_given_again(graph: Graph) -> None:
    await add(graph, "aaa", 1)
    for name in "xyz":
        await graph.blockdev_add({**MEMORY, "node-name": name})

    async def change(**what: str) -> str:
        await change_children(graph, "q", **what)
        return ",".join(f"{name[9:]}:{edge.node.name}" for name, edge in graph.find("q").children.items())

    assert await change(child_name="children.1") == "0:c0,2:c2"
    assert await change(node_name="x") == "0:c0,2:c2,3:x"
    assert await change(child_name="children.3") == "0:c0,2:c2"
    assert await change(node_name="y") == "0:c0,2:c2,3:y"
    assert await change(child_name="children.0") == "2:c2,3:y"
    assert await change(node_name="z") == "2:c2,3:y,4:z"


# The messages are those of qemu-storage-daemon 10.0.2, but for the one on the length, which it does not look at.
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"parent_name": "nope"}, "Cannot find device='nope' nor node-name='nope'"),
        ({}, "Either child or node must be specified"),
        ({"node_name": "free", "child_name": "children.0"}, "The parameters child and node are in conflict"),
        ({"node_name": "nope"}, "Node 'nope' not found"),
        ({"child_name": "nope"}, "Node 'q' does not have child 'nope'"),
        ({"child_name": "children.0"}, "The number of children cannot be lower than the vote threshold 3"),
        ({"node_name": "c0"}, "The node c0 already has a parent"),
        ({"node_name": "q"}, "The node q already has a parent"),
        ({"node_name": "fixed"}, "Block node is read-only"),
        ({"node_name": "longer"}, "The node longer has 131072 bytes, and the children of the node q have 65536"),
        ({"parent_name": "free", "child_name": "nope"}, "Node 'free' does not have child 'nope'"),
        ({"parent_name": "raw", "child_name": "file"}, "The node raw does not support removing a child"),
        ({"parent_name": "raw", "node_name": "free"}, "The node raw does not support adding a child"),
        ({"parent_name": "v", "node_name": "free"}, "Cannot add a child to a quorum in blkverify mode"),
        (
            {"parent_name": "v", "child_name": "children.1"},
            "The number of children cannot be lower than the vote threshold 2",
        ),
        (
            {"parent_name": "lone", "node_name": "lone"},
            "Making 'lone' a children.1 child of 'lone' would create a cycle",
        ),
    ],
)
async def test_a_change_that_cannot_be_is_refused_and_changes_nothing(
    graph: Graph, what: dict[str, str], message: str
) -> None:
    root, memories = await add(graph, "aaa", 3)
    await graph.blockdev_add({**MEMORY, "node-name": "free"})
    await graph.blockdev_add({**MEMORY, "node-name": "fixed", "read-only": True})
    await graph.blockdev_add({**MEMORY, "node-name": "longer", "size": 131072})
    await graph.blockdev_add({"driver": "raw", "node-name": "raw", "file": MEMORY})
    verifying = {"driver": "quorum", "node-name": "v", "children": [M, M], "vote-threshold": 2, "blkverify": True}
    await graph.blockdev_add(verifying)
    await graph.blockdev_add({"driver": "quorum", "node-name": "lone", "children": [M], "vote-threshold": 1})
    nodes, edges = dict(graph.nodes), dict(graph.find("q").children)
    with pytest.raises(GraphError) as refused:
        await change_children(graph, **{"parent_name": "q", **what})
    assert str(refused.value) == message
    assert (graph.nodes, graph.find("q").children) == (nodes, edges)
    await write(root, 0, b"data")
    assert all(memory.log == [("write", 0, 4)] for memory in memories)


async def test_a_change_waits_for_requests_and_holds_back_new_ones(graph: Graph) -> None:
    root, memories = await add(graph, "aaa")
    gate = Gate(memories[2], "preadv")
    done: list[str] = []

    async def reading(name: str, root: Root) -> None:
        await read(root, 0, 512)
        done.append(name)

    async def changing() -> None:
        await change_children(graph, "q", child_name="children.2")
        done.append("change")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reading, "before", root)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(changing)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(reading, "during", root)
        # a file that is opened meanwhile is held back, too
        nursery.start_soon(reading, "opened", root_of(graph, "q", Perm.CONSISTENT_READ))
        await trio.testing.wait_all_tasks_blocked()
        assert done == []
        gate.open()
    assert done[:2] == ["before", "change"]
    assert sorted(done[2:]) == ["during", "opened"]
    assert memories[2].log == [("read", 0, 512)]


async def test_a_filter_inserted_below_it_has_the_name_of_its_child(graph: Graph, events: list[Event]) -> None:
    root, _ = await add(graph, "aab")
    inserted = await insert_filter(graph, {"driver": "blkdebug"}, "q", "children.2")
    assert graph.find("q").children["children.2"].node is inserted
    assert await read(root, 0, 4096) == b"a" * 4096
    assert events == [bad(2)]


async def test_a_child_with_a_limit_takes_it_along(graph: Graph) -> None:
    root, _ = await add(graph, "aa", 1)
    await graph.blockdev_add({**MEMORY, "node-name": "c2", "max-transfer": 4096})
    memory_of(graph, "c2").data[:] = b"a" * LENGTH
    await change_children(graph, "q", node_name="c2")
    await read(root, 0, 8192)
    assert memory_of(graph, "c0").log == [("read", 0, 4096), ("read", 4096, 4096)]
    await change_children(graph, "q", child_name="children.2")
    await read(root, 0, 8192)
    assert memory_of(graph, "c0").log[2:] == [("read", 0, 8192)]
