"""The shared way in of all who have a file open."""

from __future__ import annotations

import pytest
import trio
from support import root_of

from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.errors import PermissionConflict, ReadOnlyError
from fusebd.fuse.entry import Entry, Needs

READER = Needs(Perm.CONSISTENT_READ)
WRITER = Needs(Perm.CONSISTENT_READ | Perm.WRITE)
#: keeps what it writes for a while
KEEPER = Needs(Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL & ~(Perm.WRITE | Perm.RESIZE))


@pytest.fixture
async def entry(graph: Graph) -> Entry:
    await graph.blockdev_add({"driver": "test-memory", "node-name": "disk"})
    return Entry(graph.find("disk"), lambda: None)


async def test_it_is_there_as_long_as_somebody_needs_it(graph: Graph, entry: Entry) -> None:
    root = entry.take(READER)
    assert entry.take(WRITER) is root
    assert entry.take(WRITER) is root
    for needs in (WRITER, READER, WRITER):
        assert graph.roots == {root}
        await entry.give_back(needs)
    assert graph.roots == set()
    assert entry.root is None
    await graph.blockdev_del("disk")


async def test_it_takes_and_shares_what_all_need_together(entry: Entry) -> None:
    root = entry.take(READER)
    assert (root.perm, root.shared) == READER
    entry.take(KEEPER)
    entry.take(KEEPER)
    entry.take(WRITER)
    assert (root.perm, root.shared) == KEEPER
    await entry.give_back(KEEPER)
    assert (root.perm, root.shared) == KEEPER
    await entry.give_back(KEEPER)
    assert (root.perm, root.shared) == WRITER
    await entry.give_back(WRITER)
    assert (root.perm, root.shared) == READER


async def test_needs_that_cannot_be_met_change_nothing(graph: Graph, entry: Entry) -> None:
    root = entry.take(READER)
    other = root_of(graph, "disk")
    with pytest.raises(PermissionConflict):
        entry.take(KEEPER)
    assert (root.perm, root.shared) == READER
    await graph.detach_root(other)
    entry.take(KEEPER)
    with pytest.raises(PermissionConflict):
        root_of(graph, "disk")


async def test_a_read_only_node_has_no_writers(graph: Graph) -> None:
    await graph.blockdev_add({"driver": "test-memory", "node-name": "fixed", "read-only": True})
    entry = Entry(graph.find("fixed"), lambda: None)
    with pytest.raises(ReadOnlyError):
        entry.take(WRITER)
    assert entry.root is None
    entry.take(READER)


async def test_who_opens_while_the_last_one_is_still_leaving_is_in_no_conflict_with_him(
    graph: Graph, entry: Entry
) -> None:
    entry.take(KEEPER)
    async with trio.open_nursery() as nursery, graph.lock:
        nursery.start_soon(entry.give_back, KEEPER)
        await trio.testing.wait_all_tasks_blocked()
        root = entry.take(KEEPER)
    assert graph.roots == {root}


async def test_a_way_in_that_is_given_stays_as_it_is(graph: Graph, entry: Entry) -> None:
    root = root_of(graph, "disk", Perm.CONSISTENT_READ)
    fixed = Entry(graph.find("disk"), lambda: None, root)
    assert fixed.take(KEEPER) is root
    assert root.perm == Perm.CONSISTENT_READ
    await fixed.give_back(KEEPER)
    assert fixed.root is root
    assert root in graph.roots
