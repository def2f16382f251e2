"""blockdev-reopen: what can be changed and what cannot, as QEMU answers; a failure leaves everything as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reopens
import trio
import trio.testing
from reopens import SCENARIOS, Scenario, node, null, raw, refusal, throttle
from support import READ_WRITE, memory_of, read, root_of, snapshot, write

from fusebd.block.driver import driver_class, driver_names
from fusebd.block.graph import Graph
from fusebd.block.insertion import insert_filter, remove_filter
from fusebd.block.naming import node_filename
from fusebd.block.perms import Perm
from fusebd.block.reopen import reopen
from fusebd.errors import BlockIOError, ReadOnlyError
from fusebd.qmp.queries import named_block_nodes

Json = Any
MIB = 1 << 20
READ = Perm.CONSISTENT_READ


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the images of ``reopens`` in it."""
    reopens.make_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


async def add_groups(graph: Graph) -> None:
    for name in ("g1", "g2"):
        await graph.objects.add({"qom-type": "throttle-group", "id": name})


def memory(name: str, **options: Json) -> Json:
    return node("test-memory", name, **options)


# --- what QEMU answers ---------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name.replace(" ", "-"))
async def test_requests_are_answered_as_by_qemu(graph: Graph, images: Path, scenario: Scenario) -> None:
    await add_groups(graph)
    for options in scenario.nodes:
        await graph.blockdev_add(options)
    for step in scenario.steps:
        if step.error is None:
            await reopen(graph, step.options)
        else:
            assert await refusal(graph, *step.options) == step.error


async def test_an_empty_list_changes_nothing(graph: Graph) -> None:
    await graph.blockdev_add(null("n"))
    before = snapshot(graph)
    await reopen(graph, [])
    assert snapshot(graph) == before


# --- where QEMU does something else --------------------------------------------------------------


async def test_discard_has_its_default_when_it_is_left_out(graph: Graph) -> None:
    await graph.blockdev_add(raw(null(None)))
    await reopen(graph, [raw(null(None, discard="unmap"), discard="unmap")])
    assert graph.find("r").unmap
    await reopen(graph, [raw(null(None))])
    assert not graph.find("r").unmap
    # an inline child discards what its parent has it discard
    assert graph.find("r").children["file"].node.unmap


async def test_force_share_may_be_given_again(graph: Graph, images: Path) -> None:
    shared = raw(read_only=True, force_share=True)
    await graph.blockdev_add(shared)
    await reopen(graph, [{**shared, "detect-zeroes": "on"}])
    assert graph.find("rf").force_share
    assert await refusal(graph, raw(force_share=True)) == "force-share=on can only be used with read-only images"
    assert await refusal(graph, raw(read_only=True)) == "Option 'force-share' cannot be reset to its default value"


async def test_a_window_must_fit_the_file_that_is_there_afterwards(graph: Graph) -> None:
    for options in (null("short", 1024), null("long", 8192), raw("short")):
        await graph.blockdev_add(options)
    await reopen(graph, [raw("long", offset=2048, size=4096)])
    assert graph.find("r").driver.length == 4096
    refused = await refusal(graph, raw("short", offset=2048))
    assert refused == "Offset (2048) cannot be greater than size of the containing file (1024)"
    # what was asked for before is kept as far as there is room for it
    await reopen(graph, [raw("short", offset=2048, size=4096)])
    assert graph.find("r").driver.length == 0


async def test_empty_objects_and_arrays_are_nothing(graph: Graph) -> None:
    await graph.blockdev_add(null("n"))
    await graph.blockdev_add(node("blkdebug", "bd", image="n"))
    await reopen(graph, [node("blkdebug", "bd", image="n", inject_error=[], cache={})])


# --- options that children inherit ---------------------------------------------------------------


def flags(graph: Graph, *names: str) -> list[tuple[bool, bool, bool]]:
    """Of each node, whether it is read-only, direct, and not flushed."""
    nodes = [graph.find(name) for name in names]
    return [(found.read_only, found.cache_direct, found.no_flush) for found in nodes]


@pytest.fixture
async def tower(graph: Graph) -> Json:
    """Options of the raw node ``t`` over ``m`` over ``b``, all in one, as they were added."""
    options = node("raw", "t", file=node("raw", "m", file=null("b")))
    await graph.blockdev_add(options)
    return options


async def test_an_inline_child_takes_over_what_it_is_not_given(graph: Graph, tower: Json) -> None:
    await reopen(graph, [{**tower, "read-only": True, "cache": {"direct": True, "no-flush": True}}])
    assert flags(graph, "t", "m", "b") == [(True, True, True)] * 3
    await reopen(graph, [tower])
    assert flags(graph, "t", "m", "b") == [(False, False, False)] * 3


async def test_what_a_child_is_given_counts_more(graph: Graph, tower: Json) -> None:
    given = node("raw", "t", read_only=True, file=node("raw", "m", read_only=False, file="b"))
    await reopen(graph, [given])
    assert flags(graph, "t", "m", "b") == [(True, False, False), (False, False, False), (False, False, False)]


async def test_a_child_by_its_name_keeps_what_it_has(graph: Graph, tower: Json) -> None:
    await reopen(graph, [node("raw", "m", file="b", cache={"no-flush": True})])
    assert flags(graph, "t", "m", "b") == [(False, False, False), (False, False, True), (False, False, True)]
    await reopen(graph, [node("raw", "t", file="m", read_only=True, cache={"no-flush": False})])
    # m was given no-flush, b has it from m
    assert flags(graph, "t", "m", "b") == [(True, False, False), (True, False, True), (True, False, True)]
    await reopen(graph, [node("raw", "t", file="m")])
    assert flags(graph, "t", "m", "b") == [(False, False, False), (True, False, True), (True, False, True)]
    await reopen(graph, [tower])
    assert flags(graph, "t", "m", "b") == [(False, False, False)] * 3


async def test_a_child_by_reference_inherits_nothing(graph: Graph) -> None:
    await graph.blockdev_add(null("n"))
    await graph.blockdev_add(raw("n"))
    await reopen(graph, [raw("n", read_only=True, cache={"direct": True})])
    assert flags(graph, "r", "n") == [(True, True, False), (False, False, False)]


async def test_a_node_given_twice_has_what_both_say(graph: Graph) -> None:
    await graph.blockdev_add(null("n"))
    await reopen(graph, [null("n", read_only=True), null("n", detect_zeroes="on")])
    assert (graph.find("n").read_only, graph.find("n").detect_zeroes) == (True, "on")


async def test_what_a_parent_has_its_child_keep_is_kept(graph: Graph) -> None:
    await graph.blockdev_add(raw(node("raw", "in", file=null("n", 8192), offset=512)))
    # alone, that would be the default again
    await reopen(graph, [node("raw", "in", file="n"), raw("in")])
    assert graph.find("r").driver.length == 8192 - 512
    await reopen(graph, [node("raw", "in", file="n")])
    assert graph.find("r").driver.length == 8192


async def test_detected_zeroes_are_detected_from_then_on(graph: Graph) -> None:
    await graph.blockdev_add(memory("disk"))
    root = root_of(graph, "disk")
    await write(root, 0, bytes(512))
    await reopen(graph, [memory("disk", detect_zeroes="on")])
    await write(root, 512, bytes(512))
    assert memory_of(graph, "disk").log == [("write", 0, 512), ("flush", 0, 0), ("zero", 512, 512)]
    await graph.detach_root(root)


# --- read-only -----------------------------------------------------------------------------------


async def test_what_is_open_for_writing_stays_writable(graph: Graph) -> None:
    await graph.blockdev_add(raw(memory("disk")))
    root = root_of(graph, "r")
    for options in (raw(memory("disk"), read_only=True), raw("disk", read_only=True)):
        assert await refusal(graph, options) == "Read-only block node 'r' cannot support read-write users"
    assert await refusal(graph, memory("disk", read_only=True)) == (
        "Read-only block node 'disk' cannot support read-write users"
    )
    await write(root, 0, b"still")
    await graph.detach_root(root)


async def test_what_is_open_for_reading_may_become_read_only(graph: Graph) -> None:
    await graph.blockdev_add(raw(memory("disk")))
    reader = root_of(graph, "r", READ)
    await reopen(graph, [raw(memory("disk"), read_only=True)])
    assert await read(reader, 0, 512) == bytes(512)
    with pytest.raises(ReadOnlyError, match=r"^Block node is read-only$"):
        root_of(graph, "r")
    await reopen(graph, [raw(memory("disk"))])
    writer = root_of(graph, "r")
    await write(writer, 0, b"again")
    assert await read(reader, 0, 5) == b"again"
    await graph.detach_root(reader)
    await graph.detach_root(writer)


# --- other children ------------------------------------------------------------------------------


async def test_requests_go_to_the_other_file(graph: Graph) -> None:
    for name in ("one", "other"):
        await graph.blockdev_add(memory(name))
    await graph.blockdev_add(raw("one"))
    root = root_of(graph, "r")
    await write(root, 0, b"one")
    await reopen(graph, [raw("other")])
    assert await read(root, 0, 3) == bytes(3)
    await write(root, 0, b"two")
    await reopen(graph, [raw("one")])
    assert await read(root, 0, 3) == b"one"
    assert memory_of(graph, "other").data[:3] == b"two"
    await graph.detach_root(root)


@pytest.mark.parametrize("driver", ["raw", "throttle", "fault", "volatile-cache", "test-suspends"])
async def test_the_length_is_that_of_the_other_file(graph: Graph, driver: str) -> None:
    await add_groups(graph)
    given = {"throttle-group": "g1"} if driver == "throttle" else {}
    await graph.blockdev_add(memory("short", size=4096))
    await graph.blockdev_add(memory("long", size=8192))
    await graph.blockdev_add({"driver": driver, "node-name": "over", "file": "short", **given})
    await graph.blockdev_add(node("raw", "top", file="over"))
    root = root_of(graph, "top", READ)
    told = []
    root.on_resize = lambda: told.append(root.length)
    await reopen(graph, [{"driver": driver, "node-name": "over", "file": "long", **given}])
    assert (root.length, told) == (8192, [8192])
    assert len(await read(root, 4096, 4096)) == 4096
    await reopen(graph, [{"driver": driver, "node-name": "over", "file": "short", **given}])
    assert (root.length, told) == (4096, [8192, 4096])
    await graph.detach_root(root)


async def test_what_is_shown_follows(graph: Graph) -> None:
    for name, size in (("one", 4096), ("other", 8192)):
        await graph.blockdev_add(null(name, size))
    await graph.blockdev_add(raw("one"))
    await reopen(graph, [raw("other", offset=512, read_only=True, detect_zeroes="on", cache={"no-flush": True})])
    shown = next(found for found in named_block_nodes(graph, flat=True) if found["node-name"] == "r")
    assert (shown["ro"], shown["detect_zeroes"], shown["cache"]["no-flush"]) == (True, "on", True)
    assert shown["image"]["virtual-size"] == 8192 - 512
    name = 'json:{"offset": 512, "driver": "raw", "file": {"driver": "null-co", "size": 8192}}'
    assert shown["file"] == name
    await reopen(graph, [raw("one")])
    assert node_filename(graph.find("r")) == 'json:{"driver": "raw", "file": {"driver": "null-co", "size": 4096}}'


async def test_nodes_are_listed_in_the_order_in_which_they_came(graph: Graph) -> None:
    await graph.blockdev_add(raw(null("in")))
    await graph.blockdev_add(null("last"))
    await graph.blockdev_add(node("blkdebug", "bd", image="in"))
    await reopen(graph, [raw("bd")])
    assert [found["node-name"] for found in named_block_nodes(graph, flat=True)] == ["bd", "last", "r", "in"]


async def test_a_file_that_only_its_parent_used_is_closed(graph: Graph) -> None:
    await graph.blockdev_add(raw(memory("in")))
    await graph.blockdev_add(null("n"))
    left = memory_of(graph, "in")
    root = root_of(graph, "r")
    await write(root, 0, b"kept")
    await reopen(graph, [raw("n")])
    assert list(graph.nodes) == ["r", "n"]
    assert left.log[-1] == ("flush", 0, 0)
    await graph.detach_root(root)


async def test_an_inline_grandchild_becomes_a_child(graph: Graph) -> None:
    await graph.blockdev_add(raw(node("blkdebug", "bd", image=memory("disk"))))
    await reopen(graph, [raw("disk")])
    assert list(graph.nodes) == ["r", "disk"]
    # and is reopened together with its parent
    await reopen(graph, [raw(memory("disk"), read_only=True)])
    assert graph.find("disk").read_only


async def test_permissions_belong_to_the_nodes_that_are_used(graph: Graph) -> None:
    for name in ("one", "other"):
        await graph.blockdev_add(memory(name))
    await graph.blockdev_add(node("blkdebug", "greedy", image="other", unshare_child_perms=["write"]))
    await graph.blockdev_add(raw("one"))
    writer = root_of(graph, "r")
    assert (await refusal(graph, raw("other"))).startswith("Permission conflict on node 'other': permissions 'write'")
    await graph.blockdev_del("greedy")
    await reopen(graph, [raw("other")])
    assert graph.find("one").cumulative_perms() == (Perm.NONE, Perm.ALL)
    assert graph.find("other").cumulative_perms()[0] == READ_WRITE
    await graph.detach_root(writer)


async def test_a_throttle_group_limits_only_those_who_are_in_it(
    graph: Graph, autojump_clock: trio.testing.MockClock
) -> None:
    for name, limit in (("g1", 1), ("g2", 10**6)):
        await graph.objects.add({"qom-type": "throttle-group", "id": name, "limits": {"iops-total": limit}})
    await graph.blockdev_add(null("n"))
    await graph.blockdev_add(throttle("g1", "n"))
    root = root_of(graph, "th")

    async def seconds() -> float:
        began = trio.current_time()
        for _ in range(4):
            await read(root, 0, 512)
        return trio.current_time() - began

    assert await seconds() > 1
    await reopen(graph, [throttle("g2", "n")])
    assert await seconds() < 0.1
    await reopen(graph, [throttle("g1", "n")])
    assert await seconds() > 1
    await graph.detach_root(root)
    group = graph.objects.throttle_group("g2")
    assert not group.in_use


# --- filters that were inserted ------------------------------------------------------------------

FAILING = {"driver": "blkdebug", "node-name": "f", "inject-error": [{"event": "none", "iotype": "write"}]}


@pytest.mark.parametrize("below", ["disk", memory("disk"), "f"], ids=["name", "options", "filter"])
async def test_an_inserted_filter_is_not_seen(graph: Graph, below: Json) -> None:
    await graph.blockdev_add(raw(memory("disk")))
    await insert_filter(graph, FAILING, "r", "file")
    await reopen(graph, [raw(below, detect_zeroes="on")])
    root = root_of(graph, "r")
    with pytest.raises(BlockIOError):
        await write(root, 0, b"fails")
    await remove_filter(graph, "f")
    await write(root, 0, b"works")
    await graph.detach_root(root)


async def test_the_child_below_an_inserted_filter_is_not_exchanged(graph: Graph) -> None:
    await graph.blockdev_add(raw(memory("disk")))
    await graph.blockdev_add(null("n"))
    await insert_filter(graph, FAILING, "r", "file")
    assert await refusal(graph, raw("n")) == "Cannot replace implicit file child of r"


async def test_a_filter_inserted_above_a_node_is_writable_when_the_node_is(graph: Graph) -> None:
    await graph.blockdev_add(memory("disk", read_only=True))
    await insert_filter(graph, FAILING, "disk")
    await insert_filter(graph, {"driver": "fault", "node-name": "g"}, "disk")
    await reopen(graph, [memory("disk")])
    assert [graph.find(name).read_only for name in ("disk", "f", "g")] == [False] * 3
    root = graph.attach_root(graph.find("disk").entrance, "a test", READ_WRITE)
    assert await refusal(graph, memory("disk", read_only=True)) == (
        "Read-only block node 'disk' cannot support read-write users"
    )
    await graph.detach_root(root)
    await reopen(graph, [memory("disk", read_only=True)])
    assert [graph.find(name).read_only for name in ("disk", "f", "g")] == [True] * 3


async def test_a_filter_that_is_taken_out_leaves_an_inline_child(graph: Graph) -> None:
    await graph.blockdev_add(raw(node("blkdebug", "bd", image=memory("disk"))))
    await remove_filter(graph, "bd")
    await reopen(graph, [raw(memory("disk"), read_only=True)])
    assert graph.find("disk").read_only


# --- all or nothing, and nobody in between -------------------------------------------------------


async def test_nothing_has_changed_if_flushing_fails(graph: Graph) -> None:
    rule = {"event": "none", "iotype": "flush", "errno": 28}
    await graph.blockdev_add(raw(node("blkdebug", "bd", image=memory("disk"), inject_error=[rule])))
    root = root_of(graph, "r")
    await write(root, 0, b"dirty")
    assert await refusal(graph, raw("disk")) == "Error flushing drive: No space left on device"
    await graph.detach_root(root)


async def test_nothing_has_changed_if_the_last_of_many_cannot(graph: Graph) -> None:
    await add_groups(graph)
    for options in (memory("one"), memory("other", size=4096), raw("one"), throttle("g1", "one")):
        await graph.blockdev_add(options)
    root = root_of(graph, "r")
    wanted = [raw("other", offset=512, detect_zeroes="on"), throttle("g2", "other", read_only=True)]
    assert await refusal(graph, *wanted, memory("other", size=4096, read_only=True)) == (
        "Read-only block node 'other' cannot support read-write users"
    )
    assert await refusal(graph, *wanted, memory("one", size=1)) == "Cannot change the option 'size'"
    await graph.detach_root(root)
    await reopen(graph, wanted)


async def test_requests_under_way_end_before_and_others_wait_until_after(graph: Graph) -> None:
    await graph.blockdev_add(null("slow", MIB, latency_ns=50_000_000))
    await graph.blockdev_add(memory("other"))
    await graph.blockdev_add(raw("slow"))
    root = root_of(graph, "r")
    done: list[str] = []

    async def reading(what: str) -> None:
        await read(root, 0, 512)
        done.append(what)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reading, "before")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(reopen, graph, [raw("other")])
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(reading, "after")
        await trio.testing.wait_all_tasks_blocked()
        assert (done, graph.find("r").children["file"].node.name) == ([], "slow")
    assert done == ["before", "after"]
    # the second one did not go to the slow node
    assert graph.find("slow").counted().rd_operations == 1
    assert graph.find("other").counted().rd_operations == 1
    await graph.detach_root(root)


async def test_a_reopening_that_is_cancelled_changes_nothing(graph: Graph) -> None:
    await graph.blockdev_add(null("slow", MIB, latency_ns=10**9))
    await graph.blockdev_add(null("other", MIB))
    await graph.blockdev_add(raw("slow"))
    root = root_of(graph, "r")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, root, 0, 512)
        await trio.testing.wait_all_tasks_blocked()
        before = snapshot(graph)
        with trio.move_on_after(0.01) as scope:
            await reopen(graph, [raw("other", read_only=True)])
        assert scope.cancelled_caught
        assert snapshot(graph) == before
        nursery.cancel_scope.cancel()
    await graph.detach_root(root)


async def test_only_one_graph_change_is_made_at_a_time(graph: Graph) -> None:
    for options in (memory("one"), memory("other"), raw("one")):
        await graph.blockdev_add(options)
    async with trio.open_nursery() as nursery:
        for name in ("other", "one", "other"):
            nursery.start_soon(reopen, graph, [raw(name)])
        nursery.start_soon(graph.blockdev_add, node("raw", "late", file="r"))
    assert graph.find("r").children["file"].node.name in ("one", "other")
    assert len(graph.find("one").parents) + len(graph.find("other").parents) == 1


async def test_drivers_say_what_they_can_change() -> None:
    """A driver whose options can be changed has to declare them."""
    for name in driver_names():
        found = driver_class(name)
        declared = frozenset(found.options_class.__struct_encode_fields__)
        assert (found.changeable or frozenset()) <= declared, name
        assert found.resettable <= (found.changeable or frozenset()), name
