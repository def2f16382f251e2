"""Hearing of changes on other ways: which writes are told of, and which are of the watcher's own doing."""

from __future__ import annotations

from typing import Any

import pytest
from support import READ_WRITE, memory_of, root_of, write

from fusebd.block.contentwatch import ContentWatch
from fusebd.block.graph import Graph
from fusebd.block.insertion import insert_filter, remove_filter
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.block.straight import is_plain
from fusebd.errors import BlockIOError, FusebdError, NotSupported

NODES = ("disk", "middle", "upper")


@pytest.fixture
async def stack(graph: Graph) -> Graph:
    """raw over raw over memory: upper, middle, disk."""
    await graph.blockdev_add({"driver": "test-memory", "node-name": "disk", "discard": "unmap"})
    await graph.blockdev_add({"driver": "raw", "node-name": "middle", "file": "disk", "discard": "unmap"})
    await graph.blockdev_add({"driver": "raw", "node-name": "upper", "file": "middle", "discard": "unmap"})
    return graph


class Watcher:
    """A way in that watches, and what it has heard."""

    def __init__(self, graph: Graph, name: str, perm: Perm = READ_WRITE) -> None:
        self.root = root_of(graph, name, perm)
        self.heard: list[tuple[int, int]] = []
        self.watch = ContentWatch(self.root, lambda offset, length: self.heard.append((offset, length)))


async def test_one_s_own_writes_are_not_told_of(stack: Graph) -> None:
    for name in NODES:
        watcher = Watcher(stack, name)
        await write(watcher.root, 100, b"data")
        await watcher.root.pwrite_zeroes(0, 4096)
        await watcher.root.pdiscard(0, 4096)
        assert watcher.heard == []
        watcher.watch.close()


@pytest.mark.parametrize("written", NODES)
@pytest.mark.parametrize("watched", NODES)
async def test_every_other_way_is_told_of(stack: Graph, watched: str, written: str) -> None:
    watcher = Watcher(stack, watched)
    await write(root_of(stack, written), 100, b"data")
    # what is changed below may be anywhere
    below = NODES.index(written) < NODES.index(watched)
    assert watcher.heard == [(0, 0) if below else (100, 4)]


async def test_zeroes_and_discards_are_told_of(stack: Graph) -> None:
    watcher = Watcher(stack, "disk")
    other = root_of(stack, "upper")
    await other.pwrite_zeroes(4096, 8192)
    await other.pdiscard(512, 1024)
    assert watcher.heard == [(4096, 8192), (512, 1024)]


async def test_a_write_that_fails_is_told_of_because_a_part_may_be_in(
    stack: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = Watcher(stack, "disk")
    other = root_of(stack, "middle")

    async def fail(*arguments: Any) -> None:
        raise BlockIOError()

    monkeypatch.setattr(memory_of(stack, "disk"), "pwritev", fail)
    with pytest.raises(BlockIOError):
        await write(other, 100, b"data")
    assert watcher.heard == [(100, 4)]


async def test_a_user_who_comes_later_is_told_of(stack: Graph) -> None:
    watcher = Watcher(stack, "disk")
    await stack.blockdev_add({"driver": "raw", "node-name": "second", "file": "disk"})
    await write(root_of(stack, "second"), 0, b"x")
    assert watcher.heard == [(0, 1)]


async def test_nothing_is_told_after_the_end(stack: Graph) -> None:
    watcher = Watcher(stack, "upper")
    watcher.watch.close()
    await write(root_of(stack, "disk"), 0, b"x")
    assert watcher.heard == []
    assert all(not node.watches for node in stack.nodes.values())


async def test_the_plain_way_is_left_only_by_who_has_to_tell(stack: Graph) -> None:
    other = root_of(stack, "disk")
    ways = [*stack.find("middle").children.values(), *stack.find("upper").children.values()]
    watcher = Watcher(stack, "upper")
    assert [is_plain(way) for way in (*ways, watcher.root, other)] == [True, True, True, False]
    watcher.watch.close()
    assert is_plain(other)


async def test_a_filter_that_comes_or_goes_is_a_change_and_one_s_own_way(stack: Graph) -> None:
    watcher = Watcher(stack, "disk")
    stack.node_listeners.append(watcher.watch.renew)
    await insert_filter(stack, {"driver": "blkdebug", "node-name": "debug"}, "disk")
    assert watcher.heard == [(0, 0)]
    await write(watcher.root, 0, b"x")
    assert watcher.heard == [(0, 0)]
    await write(root_of(stack, "disk"), 100, b"below")
    assert watcher.heard == [(0, 0), (0, 0)]
    await remove_filter(stack, "debug")
    assert watcher.heard == [(0, 0)] * 3
    await write(watcher.root, 0, b"x")
    assert watcher.heard == [(0, 0)] * 3
    assert stack.find("disk").watches == [watcher.watch]


async def test_what_was_changed_aside_is_told_of_and_flushed(stack: Graph) -> None:
    watcher = Watcher(stack, "upper")
    memory = memory_of(stack, "disk")
    await write(watcher.root, 0, b"x")
    await watcher.root.flush()
    await watcher.root.flush()
    assert memory.log.count(("flush", 0, 0)) == 1
    stack.find("disk").changed_aside()
    assert watcher.heard == [(0, 0)]
    await watcher.root.flush()
    assert memory.log.count(("flush", 0, 0)) == 2


async def test_a_change_of_the_chain_is_prevented_by_any_view(stack: Graph) -> None:
    class View:
        def chain_changing(self, node: Any) -> None:
            raise FusebdError(f"not {node.name}")

    stack.views.all.append(View())  # type: ignore[arg-type]
    before = set(stack.nodes)
    with pytest.raises(FusebdError, match="not disk"):
        await insert_filter(stack, {"driver": "blkdebug", "node-name": "debug"}, "disk")
    assert set(stack.nodes) == before
    await write(root_of(stack, "upper"), 0, b"still works")


# --- the host's file below -------------------------------------------------------------------------


def _reason(graph: Graph, name: str) -> str:
    with pytest.raises(NotSupported) as caught:
        graph.find(name).backing_descriptor()
    return caught.value.reason


async def test_a_plain_chain_has_the_host_s_file(graph: Graph, tmp_path: Any) -> None:
    (tmp_path / "disk").write_bytes(b"x" * 4096)
    await graph.blockdev_add({"driver": "file", "node-name": "disk", "filename": str(tmp_path / "disk")})
    await graph.blockdev_add({"driver": "raw", "node-name": "upper", "file": "disk"})
    await graph.blockdev_add({"driver": "raw", "node-name": "window", "file": "disk", "offset": 512})
    await graph.blockdev_add({"driver": "raw", "node-name": "detecting", "file": "disk", "detect-zeroes": "on"})
    await graph.blockdev_add({"driver": "raw", "node-name": "above", "file": "detecting"})
    assert graph.find("upper").backing_descriptor() == graph.find("disk").backing_descriptor() >= 0
    assert _reason(graph, "window") == "raw has an offset or a size"
    assert _reason(graph, "detecting") == _reason(graph, "above") == "detect-zeroes is 'on'"
    await insert_filter(graph, {"driver": "blkdebug", "node-name": "debug"}, "disk")
    assert _reason(graph, "upper") == "driver 'blkdebug' is in the way"


async def test_a_length_that_was_changed_behind_is_taken_over(graph: Graph, tmp_path: Any) -> None:
    (tmp_path / "disk").write_bytes(b"x" * 4096)
    await graph.blockdev_add({"driver": "file", "node-name": "disk", "filename": str(tmp_path / "disk")})
    await graph.blockdev_add({"driver": "raw", "node-name": "upper", "file": "disk"})
    lengths: list[int] = []
    root: Root = root_of(graph, "upper")
    root.on_resize = lambda: lengths.append(root.length)
    (tmp_path / "disk").write_bytes(b"x" * 8192)
    graph.find("disk").driver.refresh_length()
    graph.find("disk").driver.refresh_length()
    assert lengths == [8192]
