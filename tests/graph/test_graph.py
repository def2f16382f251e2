"""Adding and removing nodes: names, ownership, references, cycles, permissions, atomicity, drain."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trio
from support import READ_WRITE, memory_of, read, root_of, write

from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.errors import BlockIOError, FusebdError, GraphError, PermissionConflict, ReadOnlyError

MEM = {"driver": "test-memory"}


def raw(name: str, file: Any, **more: Any) -> dict[str, Any]:
    return {"driver": "raw", "node-name": name, "file": file, **more}


async def refusal(graph: Graph, value: Any) -> str:
    before = dict(graph.nodes)
    with pytest.raises(FusebdError) as refused:
        await graph.blockdev_add(value)
    assert graph.nodes == before
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("1x", "Invalid node-name: '1x'"),
        ("#block1", "Invalid node-name: '#block1'"),
        ("a/b", "Invalid node-name: 'a/b'"),
        ("", "Invalid node-name: ''"),
        ("x" * 32, "Node name too long"),
        ("taken", "Duplicate nodes with node-name='taken'"),
    ],
)
async def test_a_bad_node_name_is_refused(graph: Graph, name: str, message: str) -> None:
    await graph.blockdev_add({**MEM, "node-name": "taken"})
    assert await refusal(graph, {**MEM, "node-name": name}) == message


async def test_the_longest_name_is_taken(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "x" * 31})
    assert "x" * 31 in graph.named_nodes()


async def test_a_top_node_needs_a_name(graph: Graph) -> None:
    assert await refusal(graph, MEM) == "'node-name' must be specified for the root node"


async def test_a_string_refers_to_an_existing_node_and_an_object_makes_one(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "base"})
    await graph.blockdev_add(raw("by-name", "base"))
    await graph.blockdev_add(raw("inline", MEM))
    assert graph.find("by-name").children["file"].node is graph.find("base")
    anonymous = graph.find("inline").children["file"].node
    assert anonymous.name.startswith("#block")
    assert anonymous.name not in graph.named_nodes()


async def test_an_unknown_reference_is_refused(graph: Graph) -> None:
    assert await refusal(graph, raw("a", "nope")) == "Cannot find device='nope' nor node-name='nope'"


def blkdebug(name: str, image: Any) -> dict[str, Any]:
    return {"driver": "blkdebug", "node-name": name, "image": image}


async def test_a_node_cannot_be_its_own_child(graph: Graph) -> None:
    assert await refusal(graph, blkdebug("a", "a")) == "Making 'a' a image child of 'a' would create a cycle"


async def test_a_node_cannot_be_below_itself(graph: Graph) -> None:
    message = await refusal(graph, blkdebug("a", raw("b", blkdebug("c", "a"))))
    assert message == "Making 'a' a image child of 'c' would create a cycle"


@pytest.mark.parametrize("file", ["a", raw("b", "a"), blkdebug("b", "a")], ids=str)
async def test_a_node_that_is_no_protocol_has_no_name_before_its_file_is_open(graph: Graph, file: Any) -> None:
    # as in QEMU: what would be a cycle refers to nothing
    assert await refusal(graph, raw("a", file)) == "Cannot find device='a' nor node-name='a'"


async def test_an_inline_child_that_cannot_be_attached_is_closed_again(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    descriptors = len(os.listdir("/proc/self/fd"))
    inner = {"driver": "file", "node-name": "inner", "filename": str(tmp_path / "image")}
    options = {"driver": "blkdebug", "node-name": "a", "image": {**inner, "read-only": True}}
    assert await refusal(graph, {**options, "take-child-perms": ["write"]}) == "Block node is read-only"
    assert len(os.listdir("/proc/self/fd")) == descriptors
    await graph.blockdev_add(options)


async def test_a_failed_add_leaves_nothing_behind(graph: Graph, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    descriptors = len(os.listdir("/proc/self/fd"))
    inline = {"driver": "file", "node-name": "inner", "filename": str(image)}
    assert "Offset (8192)" in await refusal(graph, raw("a", inline, offset=8192))
    assert len(os.listdir("/proc/self/fd")) == descriptors
    await graph.blockdev_add(raw("a", inline))


async def test_removing_a_node_removes_the_inline_children_but_not_the_referenced_ones(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "kept"})
    await graph.blockdev_add(raw("a", raw("inner", "kept")))
    await graph.blockdev_del("a")
    assert list(graph.nodes) == ["kept"]


async def test_nodes_that_are_used_cannot_be_removed(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "base"})
    await graph.blockdev_add(raw("top", raw("inner", "base")))
    for name, message in (
        ("nope", "Failed to find node with node-name='nope'"),
        ("inner", "Node inner is not owned by the monitor"),
        ("base", "Block device base is in use"),
    ):
        with pytest.raises(GraphError) as refused:
            await graph.blockdev_del(name)
        assert str(refused.value) == message
    root = root_of(graph, "top")
    with pytest.raises(GraphError, match=r"^Node top is in use$"):
        await graph.blockdev_del("top")
    await graph.detach_root(root)
    await graph.blockdev_del("top")


async def test_contradicting_options_are_refused(graph: Graph) -> None:
    assert "detect-zeroes to unmap is not allowed" in await refusal(
        graph, {**MEM, "node-name": "a", "detect-zeroes": "unmap"}
    )
    assert "force-share=on can only be used with read-only images" in await refusal(
        graph, {**MEM, "node-name": "a", "force-share": True}
    )


# --- read-only and inheritance -------------------------------------------------------------------


async def test_a_read_only_node_refuses_a_writer(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "a", "read-only": True})
    with pytest.raises(ReadOnlyError, match=r"^Block node is read-only$"):
        root_of(graph, "a")
    assert await read(root_of(graph, "a", Perm.CONSISTENT_READ), 0, 4) == bytes(4)


async def test_an_inline_child_inherits_and_a_reference_does_not(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "base"})
    await graph.blockdev_add(
        raw("a", {**MEM, "node-name": "inner"}, **{"read-only": True, "cache": {"no-flush": True}})
    )
    await graph.blockdev_add(raw("b", "base", **{"read-only": True}))
    assert graph.find("inner").read_only
    assert graph.find("inner").no_flush
    assert not graph.find("base").read_only


async def test_an_inline_child_unmaps_unless_told_otherwise(graph: Graph) -> None:
    await graph.blockdev_add(raw("a", {**MEM, "node-name": "x"}))
    await graph.blockdev_add(raw("b", {**MEM, "node-name": "y", "discard": "ignore"}))
    assert (graph.find("a").unmap, graph.find("x").unmap, graph.find("y").unmap) == (False, True, False)


async def test_auto_read_only_falls_back_where_the_host_refuses(graph: Graph) -> None:
    options = {"driver": "file", "node-name": "a", "filename": "/sys/devices/system/cpu/online"}
    # a file that even root cannot open for writing
    assert "Permission denied" in await refusal(graph, options)
    await graph.blockdev_add({**options, "auto-read-only": True})
    assert graph.find("a").read_only


# --- permissions ---------------------------------------------------------------------------------


async def test_a_user_that_shares_nothing_keeps_writers_away(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "a"})
    graph.attach_root(graph.find("a"), "block device 'one'", Perm.CONSISTENT_READ, Perm.CONSISTENT_READ)
    with pytest.raises(PermissionConflict) as refused:
        graph.attach_root(graph.find("a"), "block device 'two'", READ_WRITE)
    assert str(refused.value) == (
        "Permission conflict on node 'a': permissions 'write' are both required by block device 'two' (uses node 'a' "
        "as 'root' child) and unshared by block device 'one' (uses node 'a' as 'root' child)."
    )
    assert len(graph.find("a").parents) == 1


async def test_permissions_pass_through_a_filterlike_node(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "base"})
    await graph.blockdev_add(raw("top", "base"))
    graph.attach_root(graph.find("base"), "a reader", Perm.CONSISTENT_READ, Perm.CONSISTENT_READ)
    with pytest.raises(PermissionConflict, match=r"required by node 'top' \(uses node 'base' as 'file' child\)"):
        root_of(graph, "top")


async def test_permissions_given_up_can_be_taken_by_others(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "a"})
    first = graph.attach_root(graph.find("a"), "first", Perm.CONSISTENT_READ, Perm.CONSISTENT_READ)
    graph.set_root_perms(first, Perm.CONSISTENT_READ, Perm.ALL)
    second = root_of(graph, "a")
    with pytest.raises(PermissionConflict):
        graph.set_root_perms(first, Perm.CONSISTENT_READ, Perm.CONSISTENT_READ)
    assert first.shared == Perm.ALL
    await graph.detach_root(second)
    graph.set_root_perms(first, Perm.CONSISTENT_READ, Perm.CONSISTENT_READ)


async def test_an_unaligned_length_refuses_writers_that_may_not_resize(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "a", "size": 1000, "align": 512})
    with pytest.raises(GraphError, match="Cannot get 'write' permission without 'resize'"):
        root_of(graph, "a")
    assert root_of(graph, "a", READ_WRITE | Perm.RESIZE).length == 1000


# --- events, resize, drain -----------------------------------------------------------------------


async def test_a_failed_request_is_announced(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "a", "size": 4096})
    events: list[tuple[str, dict[str, Any]]] = []
    graph.event_listeners.append(lambda name, data: events.append((name, data)))
    with pytest.raises(BlockIOError):
        await read(root_of(graph, "a"), 4096, 1)
    assert events == [
        (
            "BLOCK_IO_ERROR",
            {
                "device": "",
                "node-name": "a",
                "operation": "read",
                "action": "report",
                "nospace": False,
                "reason": "Input/output error",
            },
        )
    ]


async def test_block_resize_reaches_every_node_above(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "base", "size": 4096})
    await graph.blockdev_add(raw("top", "base"))
    lengths: list[int] = []
    root = root_of(graph, "top")
    root.on_resize = lambda: lengths.append(root.length)
    await graph.block_resize("base", 8192)
    await graph.block_resize("top", 1024)
    assert lengths == [8192, 1024]
    assert memory_of(graph, "base").length == 1024


async def test_a_drained_node_holds_requests_back_until_the_drain_ends(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "base"})
    await graph.blockdev_add(raw("top", "base"))
    root = root_of(graph, "top")
    log = memory_of(graph, "base").log
    async with trio.open_nursery() as nursery, graph.lock, graph.drained(graph.find("base")):
        nursery.start_soon(write, root, 0, b"late")
        await trio.testing.wait_all_tasks_blocked()
        assert log == []
    assert log == [("write", 0, 4)]


async def test_closing_the_graph_flushes_and_closes_everything(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "base"})
    await graph.blockdev_add(raw("top", "base"))
    memory = memory_of(graph, "base")
    await write(root_of(graph, "top"), 0, b"data")
    await graph.close()
    assert memory.log[-1] == ("flush", 0, 0)
    assert not graph.nodes
