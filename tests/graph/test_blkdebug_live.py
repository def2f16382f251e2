"""blkdebug steered while it is in use, over QMP: rules that come and go, breakpoints, and what the ledger has of it."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing
from qmptalk import Talk, talking
from support import memory_of, read, root_of, write

from fusebd.block.caller import Asked, current_request
from fusebd.block.child import NO_FALLBACK
from fusebd.block.graph import Graph
from fusebd.block.insertion import insert_filter, remove_filter
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.drivers.blkdebug import Blkdebug
from fusebd.errors import BlockIOError, NotSupported
from fusebd.qmp.server import QmpServer

Json = Any
LENGTH = 1 << 16
ALL = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE


@pytest.fixture
async def root(graph: Graph) -> Root:
    """A way in to ``disk``, which is raw over the blkdebug node ``debug`` over the memory node ``medium``."""
    medium = {"driver": "test-memory", "node-name": "medium", "size": LENGTH}
    debug = {"driver": "blkdebug", "node-name": "debug", "image": medium}
    await graph.blockdev_add({"driver": "raw", "node-name": "disk", "discard": "unmap", "file": debug})
    return root_of(graph, "disk", ALL)


@pytest.fixture
async def talk(graph: Graph) -> AsyncIterator[Talk]:
    async with talking(QmpServer(graph, lambda: None), "oob") as talk:
        yield talk


@pytest.fixture
async def nursery() -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


def debug_of(graph: Graph) -> Blkdebug:
    driver = graph.find("debug").driver
    assert isinstance(driver, Blkdebug)
    return driver


async def shown(talk: Talk, node_name: str = "disk") -> Json:
    return await talk.execute("query-blkdebug", node_name=node_name)


async def inject(talk: Talk, ident: str = "", **members: Json) -> str:
    """Add an inject-error rule for ``read_aio`` or what *members* say; its id."""
    rule = {"inject-error": {"event": "read_aio", **members}, **({"id": ident} if ident else {})}
    return str((await talk.execute("blkdebug-rule-add", node_name="disk", rule=rule))["id"])


def faults(graph: Graph) -> list[Json]:
    """What the ledger has of faults, without numbers and times."""
    return [
        {name: value for name, value in entry.items() if name not in ("id", "kind", "time")}
        for entry in graph.ledger
        if entry["kind"] == "fault"
    ]


# --- rules ---------------------------------------------------------------------------------------


async def test_a_rule_that_is_added_holds_until_it_is_removed(root: Root, talk: Talk) -> None:
    assert await read(root, 0, 512) == bytes(512)
    rule = {"inject-error": {"event": "read_aio", "iotype": "read", "errno": errno.ENXIO}}
    added = await talk.execute("blkdebug-rule-add", node_name="disk", rule=rule)
    assert added == {"node-name": "debug", "id": "1"}
    for _ in range(3):
        with pytest.raises(BlockIOError, match="No such device"):
            await read(root, 0, 512)
    await write(root, 0, b"others go on")
    assert (await shown(talk))["rules"] == [{"id": "1", "hits": 3, "active": True, **rule}]
    await talk.execute("blkdebug-rule-remove", node_name="disk", id="1")
    assert (await shown(talk))["rules"] == []
    assert await read(root, 0, 12) == b"others go on"


async def test_rules_are_listed_in_order_with_those_of_the_options(graph: Graph, talk: Talk) -> None:
    options = {
        "inject-error": [{"event": "read_aio", "sector": 5, "once": True}],
        "set-state": [{"event": "write_aio", "new_state": 3}],
    }
    debug = {"driver": "blkdebug", "node-name": "debug", "image": {"driver": "null-co"}, **options}
    await graph.blockdev_add({"driver": "raw", "node-name": "disk", "file": debug})
    await inject(talk, "mine", event="l2_load", immediately=True)
    await inject(talk)
    assert [
        (rule["id"], rule.get("inject-error") or rule["set-state"]) for rule in (await shown(talk, "debug"))["rules"]
    ] == [
        ("1", {"event": "read_aio", "sector": 5, "once": True}),
        ("2", {"event": "write_aio", "new_state": 3}),
        ("mine", {"event": "l2_load", "immediately": True}),
        ("3", {"event": "read_aio"}),
    ]


async def test_active_rules_are_those_that_the_last_event_has_armed(root: Root, talk: Talk) -> None:
    await inject(talk, "reads", iotype="flush")
    await inject(talk, "writes", event="write_aio", iotype="flush")
    seen = []
    for request in (read(root, 0, 512), write(root, 0, b"x"), read(root, 0, 512)):
        seen.append([rule["id"] for rule in (await shown(talk))["rules"] if rule["active"]])
        await request
    seen.append([rule["id"] for rule in (await shown(talk))["rules"] if rule["active"]])
    assert seen == [[], ["reads"], ["writes"], ["reads"]]


async def test_the_state_is_set_by_rules_and_by_command(root: Root, talk: Talk) -> None:
    await inject(talk, state=42)
    rule = {"id": "arm", "set-state": {"event": "write_aio", "state": 1, "new_state": 42}}
    await talk.execute("blkdebug-rule-add", node_name="disk", rule=rule)
    await read(root, 0, 512)
    await write(root, 0, b"x")
    found = await shown(talk)
    assert (found["state"], found["rules"][1]) == (42, {**rule, "hits": 1})
    with pytest.raises(BlockIOError):
        await read(root, 0, 512)
    await talk.execute("blkdebug-rule-remove", node_name="disk", id="1")
    await talk.execute("blkdebug-set-state", node_name="disk", state=1)
    await inject(talk, state=42)
    await read(root, 0, 512)
    await talk.execute("blkdebug-set-state", node_name="disk", state=42)
    with pytest.raises(BlockIOError):
        await read(root, 0, 512)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "Parameter 'rule' expects one of 'inject-error' and 'set-state'"),
        (
            {"inject-error": {"event": "none"}, "set-state": {"event": "none", "new_state": 2}},
            "Parameter 'rule' expects one of 'inject-error' and 'set-state'",
        ),
        ({"inject-error": {"event": "none"}, "id": "taken"}, "Duplicate ID 'taken' for blkdebug rule"),
        ({"inject-error": {"event": "none"}, "id": "7"}, "Parameter 'id' expects an identifier"),
        ({"inject-error": {"event": "none"}, "id": ""}, "Parameter 'id' expects an identifier"),
        ({"inject-error": {}}, "Parameter 'rule.inject-error.event' is missing"),
        ({"inject-error": {"event": "nope"}}, "Parameter 'event' does not accept value 'nope'"),
        ({"set-state": {"event": "none"}}, "Parameter 'rule.set-state.new_state' is missing"),
        ({"inject-error": {"event": "none", "errno": 512}}, "Value '512' is out of range for parameter 'errno'"),
    ],
)
async def test_a_rule_that_cannot_be_is_refused(root: Root, talk: Talk, rule: Json, message: str) -> None:
    await inject(talk, "taken")
    assert await talk.fail("blkdebug-rule-add", node_name="disk", rule=rule) == message
    assert [rule["id"] for rule in (await shown(talk))["rules"]] == ["taken"]


async def test_what_is_not_there_is_not_removed(root: Root, talk: Talk) -> None:
    await talk.execute("blkdebug-break", node_name="disk", event="read_aio", tag="A")
    for ident in ("7", ""):
        message = await talk.fail("blkdebug-rule-remove", node_name="disk", id=ident)
        assert message == f"No blkdebug rule with id '{ident}'"
    assert len((await shown(talk))["breakpoints"]) == 1


async def test_the_first_blkdebug_below_a_node_is_asked(graph: Graph, root: Root, talk: Talk) -> None:
    assert (await shown(talk, "disk"))["node-name"] == "debug"
    await insert_filter(graph, {"driver": "blkdebug", "node-name": "upper"}, "disk")
    assert (await shown(talk, "disk"))["node-name"] == "upper"
    assert (await shown(talk, "debug"))["node-name"] == "debug"
    for command in ("query-blkdebug", "blkdebug-rule-remove"):
        message = await talk.fail(command, node_name="medium", **({} if command.startswith("query") else {"id": "1"}))
        assert message == "Node 'medium' has no blkdebug driver"


async def test_events_are_announced_only_while_there_are_rules(graph: Graph, root: Root, talk: Talk) -> None:
    edge = graph.find("disk").children["file"]

    def announced() -> bool:
        assert edge.events == edge.driver.listens
        return bool(edge.events)

    seen = [announced()]
    await inject(talk, "a", once=True)
    await set_breaks(talk, "A", event="l2_load")
    seen.append(announced())
    with pytest.raises(BlockIOError):
        await read(root, 0, 512)
    seen.append(announced())
    await talk.execute("blkdebug-remove-break", node_name="disk", tag="A")
    seen.append(announced())
    await inject(talk, "a", once=True)
    with pytest.raises(BlockIOError):
        await read(root, 0, 512)
    seen.append(announced())
    assert seen == [False, True, True, False, False]


# --- the ledger ----------------------------------------------------------------------------------


async def test_every_injected_error_is_in_the_ledger(graph: Graph, root: Root, talk: Talk) -> None:
    await inject(talk, "every", event="none", errno=errno.ENOSPC)
    for request in (read(root, 512, 1024), write(root, 0, b"x"), root.pwrite_zeroes(0, 4096), root.pdiscard(0, 4096)):
        with pytest.raises(BlockIOError):
            await request
    with pytest.raises(BlockIOError):
        await root.flush()
    told = {"node-name": "debug", "rule": "every", "action": "error", "errno": errno.ENOSPC}
    assert faults(graph) == [
        {**told, "operation": "read", "offset": 512, "length": 1024},
        {**told, "operation": "write", "offset": 0, "length": 1},
        {**told, "operation": "write-zeroes", "offset": 0, "length": 4096},
        {**told, "operation": "discard", "offset": 0, "length": 4096},
        {**told, "operation": "flush", "offset": 0, "length": 0},
    ]
    assert (await shown(talk))["rules"][0]["hits"] == 5
    assert [event["event"] for event in talk.events].count("FAULT_INJECTED") == 5


async def test_an_error_that_the_layer_above_makes_good_is_in_the_ledger_too(
    graph: Graph, root: Root, talk: Talk
) -> None:
    await inject(talk, "unsupported", event="none", iotype="write-zeroes", errno=errno.ENOTSUP)
    await root.pwrite_zeroes(0, 4096)
    with pytest.raises(NotSupported):
        await root.pwrite_zeroes(0, 4096, NO_FALLBACK)
    assert [entry["rule"] for entry in faults(graph)] == ["unsupported"] * 2


async def test_a_rule_that_lets_requests_through_injects_nothing(graph: Graph, root: Root, talk: Talk) -> None:
    await inject(talk, errno=0)
    await inject(talk)
    await read(root, 0, 512)
    assert faults(graph) == []
    assert [rule["hits"] for rule in (await shown(talk))["rules"]] == [1, 0]


# --- breakpoints ---------------------------------------------------------------------------------


class Client:
    """A task that makes a request of a process with the number *pid*."""

    def __init__(self, nursery: trio.Nursery, root: Root, data: bytes = b"x" * 512, offset: int = 0, pid: int = 0):
        self.pid, self.uid = pid, 0
        self.done = False
        self.failure = ""
        self._asked = Asked("write", offset, len(data))
        nursery.start_soon(self._write, root, offset, data)

    async def _write(self, root: Root, offset: int, data: bytes) -> None:
        if self.pid:
            current_request.set(self)
        try:
            await write(root, offset, data)
        except BlockIOError as error:
            self.failure = error.reason
        self.done = True

    def identity(self) -> dict[str, Any]:
        return {"request": 1000 + self.pid, "pid": self.pid}

    def asked(self) -> Asked:
        return self._asked


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def set_breaks(talk: Talk, *tags: str, event: str = "write_aio") -> None:
    for tag in tags:
        await talk.execute("blkdebug-break", node_name="disk", event=event, tag=tag)


async def test_a_stopped_request_is_announced_listed_and_resumed(
    root: Root, talk: Talk, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    await set_breaks(talk, "A")
    assert (await shown(talk))["breakpoints"] == [{"tag": "A", "event": "write_aio"}]
    client = Client(nursery, root, b"data" * 128, 1024, pid=4711)
    held = await talk.execute("blkdebug-wait-break", node_name="disk", tag="A")
    where = {"request": 1, "tag": "A", "event": "write_aio", "operation": "write", "offset": 1024, "length": 512}
    assert held == {**where, "pid": 4711}
    (event,) = [event for event in talk.events if event["event"] == "BLKDEBUG_BREAK"]
    assert event["data"] == {"node-name": "debug", **held}
    await trio.sleep(2.5)
    found = await shown(talk)
    assert (found["breakpoints"], found["held"]) == ([], [{**held, "seconds": 2.5}])
    await talk.execute("blkdebug-resume", node_name="disk", tag="A")
    await settle()
    assert client.done
    assert (await shown(talk))["held"] == []
    assert await read(root, 1024, 4) == b"data"


async def test_a_request_from_nowhere_has_no_caller(root: Root, talk: Talk, nursery: trio.Nursery) -> None:
    await set_breaks(talk, "A")
    Client(nursery, root)
    held = await talk.execute("blkdebug-wait-break", node_name="disk", tag="A")
    assert held == {"request": 1, "tag": "A", "event": "write_aio", "pid": 0}


@pytest.mark.parametrize("order", ["ABC", "CBA", "BAC"])
async def test_requests_are_released_in_any_order_and_the_last_data_wins(
    root: Root, talk: Talk, nursery: trio.Nursery, order: str
) -> None:
    clients = {}
    for tag in "ABC":
        await set_breaks(talk, tag)
        clients[tag] = Client(nursery, root, tag.encode() * 512)
        await settle()
    for number, tag in enumerate(order):
        assert [clients[other].done for other in order[number:]] == [False] * (3 - number)
        await talk.execute("blkdebug-resume", node_name="disk", tag=tag)
        await settle()
        assert clients[tag].done
        assert await read(root, 0, 512) == tag.encode() * 512


async def test_one_of_several_requests_with_the_same_tag_is_told_by_its_number(
    root: Root, talk: Talk, nursery: trio.Nursery
) -> None:
    clients = []
    for number in range(3):
        await set_breaks(talk, "A")
        clients.append(Client(nursery, root, offset=512 * number))
        await settle()
    assert await talk.fail("blkdebug-resume", node_name="disk", tag="A", request=9) == (
        "Could not resume request: No such file or directory"
    )
    await talk.execute("blkdebug-resume", node_name="disk", tag="A", request=2)
    await talk.execute("blkdebug-resume", node_name="disk", tag="A")  # the latest
    await settle()
    assert [client.done for client in clients] == [False, True, True]
    assert [held["request"] for held in (await shown(talk))["held"]] == [1]


async def test_removing_a_breakpoint_lets_its_requests_go(root: Root, talk: Talk, nursery: trio.Nursery) -> None:
    await set_breaks(talk, "A")
    client = Client(nursery, root)
    await settle()
    await set_breaks(talk, "A")
    await talk.execute("blkdebug-remove-break", node_name="disk", tag="A")
    await settle()
    assert client.done
    found = await shown(talk)
    assert (found["breakpoints"], found["held"]) == ([], [])


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("blkdebug-break", {"event": "nope", "tag": "A"}, "Parameter 'event' does not accept value 'nope'"),
        ("blkdebug-resume", {"tag": "A"}, "Could not resume request: No such file or directory"),
        ("blkdebug-remove-break", {"tag": "A"}, "Could not remove breakpoint A: No such file or directory"),
        ("blkdebug-wait-break", {"tag": "A"}, "No breakpoint 'A'"),
        (
            "blkdebug-wait-break",
            {"tag": "A", "timeout": -1},
            "Parameter 'timeout' expects a number from 0 to 1000000000",
        ),
    ],
)
async def test_what_cannot_be_done_is_said(root: Root, talk: Talk, command: str, arguments: Json, message: str) -> None:
    assert await talk.fail(command, node_name="disk", **arguments) == message


async def test_a_rule_of_the_event_decides_about_the_request_that_is_stopped_there(
    graph: Graph, root: Root, talk: Talk, nursery: trio.Nursery
) -> None:
    await inject(talk, event="write_aio", once=True)
    await set_breaks(talk, "A")
    client = Client(nursery, root)
    await talk.execute("blkdebug-wait-break", node_name="disk", tag="A")
    assert faults(graph) == []
    await talk.execute("blkdebug-resume", node_name="disk", tag="A")
    await settle()
    assert client.failure == "Input/output error"
    assert len(faults(graph)) == 1


async def test_a_rule_that_is_removed_does_not_fail_a_request_that_is_stopped(
    root: Root, talk: Talk, nursery: trio.Nursery
) -> None:
    ident = await inject(talk, event="write_aio")
    await set_breaks(talk, "A")
    client = Client(nursery, root)
    await talk.execute("blkdebug-wait-break", node_name="disk", tag="A")
    await talk.execute("blkdebug-rule-remove", node_name="disk", id=ident)
    await talk.execute("blkdebug-resume", node_name="disk", tag="A")
    await settle()
    assert (client.done, client.failure) == (True, "")


# --- waiting -------------------------------------------------------------------------------------


async def test_waiting_ends_when_the_time_is_over(
    root: Root, talk: Talk, autojump_clock: trio.testing.MockClock
) -> None:
    await set_breaks(talk, "A")
    began = trio.current_time()
    message = await talk.fail("blkdebug-wait-break", node_name="disk", tag="A", timeout=7.5)
    assert message == "No request has reached breakpoint 'A' in 7.5 seconds"
    assert trio.current_time() - began == pytest.approx(7.5)
    assert len((await shown(talk))["breakpoints"]) == 1


async def test_who_waits_can_do_everything_else_out_of_band(root: Root, talk: Talk, nursery: trio.Nursery) -> None:
    await set_breaks(talk, "A")
    waits = {"execute": "blkdebug-wait-break", "arguments": {"node-name": "disk", "tag": "A"}, "id": "waits"}
    await talk.send(waits)
    rule = {"inject-error": {"event": "read_aio"}, "id": "r"}
    commands: list[tuple[str, Json]] = [
        ("query-blkdebug", {}),
        ("blkdebug-rule-add", {"rule": rule}),
        ("blkdebug-rule-remove", {"id": "r"}),
        ("blkdebug-set-state", {"state": 2}),
        ("blkdebug-break", {"event": "write_aio", "tag": "B"}),
    ]
    for command, arguments in commands:
        answer = await talk.ask({"exec-oob": command, "arguments": {"node-name": "disk", **arguments}, "id": command})
        assert answer["id"] == command
        assert "return" in answer, answer
    clients = [Client(nursery, root)]
    assert (await talk.answer())["id"] == "waits"
    await talk.send({**waits, "arguments": {"node-name": "disk", "tag": "B"}, "id": "waits again"})
    # both breakpoints hold the request: B from the beginning
    answers = [await talk.answer()]
    for command, tag in (("blkdebug-resume", "A"), ("blkdebug-remove-break", "B")):
        answers.append(await talk.ask({"exec-oob": command, "arguments": {"node-name": "disk", "tag": tag}, "id": tag}))
    assert [answer["id"] for answer in answers] == ["waits again", "A", "B"]
    await settle()
    assert clients[0].done


async def test_waiting_itself_is_not_done_out_of_band(root: Root, talk: Talk) -> None:
    await set_breaks(talk, "A")
    answer = await talk.ask({"exec-oob": "blkdebug-wait-break", "arguments": {"node-name": "disk", "tag": "A"}})
    assert answer["error"]["desc"] == "The command blkdebug-wait-break does not support OOB"


async def test_one_client_waits_and_another_goes_on(
    graph: Graph, root: Root, talk: Talk, nursery: trio.Nursery
) -> None:
    await set_breaks(talk, "A")
    await talk.send({"execute": "blkdebug-wait-break", "arguments": {"node-name": "disk", "tag": "A"}})
    async with talking(QmpServer(graph, lambda: None)) as other:
        assert len((await shown(other))["breakpoints"]) == 1
        client = Client(nursery, root)
        await settle()
        await other.execute("blkdebug-resume", node_name="disk", tag="A")
    await settle()
    assert client.done
    assert (await talk.answer())["return"]["tag"] == "A"


async def test_who_waits_is_told_though_the_request_goes_on_at_once(
    graph: Graph, root: Root, nursery: trio.Nursery
) -> None:
    debug = debug_of(graph)
    debug.set_break("write_aio", "A")
    graph.event_listeners.append(lambda event, data: debug.resume("A") if event == "BLKDEBUG_BREAK" else None)
    found = []

    async def wait() -> None:
        found.append(await debug.wait_break("A"))

    nursery.start_soon(wait)
    await settle()
    client = Client(nursery, root)
    await settle()
    assert [stop.tag for stop in found] == ["A"]
    assert client.done


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("blkdebug-remove-break", {"node-name": "disk", "tag": "A"}, "Breakpoint 'A' was removed"),
        ("blockdev-del", {"node-name": "disk"}, "Node 'debug' was removed"),
    ],
)
async def test_waiting_ends_when_there_is_nothing_left_to_wait_for(
    graph: Graph, root: Root, talk: Talk, command: str, arguments: Json, message: str
) -> None:
    await graph.detach_root(root)
    await set_breaks(talk, "A")
    await talk.send({"execute": "blkdebug-wait-break", "arguments": {"node-name": "disk", "tag": "A"}})
    await settle()
    async with talking(QmpServer(graph, lambda: None)) as other:
        await other.execute(command, **arguments)
    assert (await talk.answer())["error"]["desc"] == message


async def test_a_client_that_goes_away_while_it_waits_leaves_everything_in_order(
    graph: Graph, root: Root, talk: Talk, nursery: trio.Nursery
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    nursery.start_soon(QmpServer(graph, lambda: None).serve_stream, theirs)
    other = Talk(ours)
    await other.negotiate()
    await set_breaks(talk, "A")
    await other.send({"execute": "blkdebug-wait-break", "arguments": {"node-name": "disk", "tag": "A"}})
    await settle()
    await ours.aclose()
    await settle()
    client = Client(nursery, root)
    await talk.execute("blkdebug-wait-break", node_name="disk", tag="A")
    await talk.execute("blkdebug-resume", node_name="disk", tag="A")
    await settle()
    assert client.done


# --- the graph changes ---------------------------------------------------------------------------


async def test_stopped_requests_go_on_when_a_filter_is_inserted_and_breakpoints_stay(
    graph: Graph, root: Root, talk: Talk, nursery: trio.Nursery
) -> None:
    await set_breaks(talk, "A", "B")
    client = Client(nursery, root)
    await settle()
    await set_breaks(talk, "C", event="pwritev_done")
    inserted = await insert_filter(graph, {"driver": "test-recorder"}, "disk", "file")
    assert client.done
    found = await shown(talk)
    assert (found["held"], found["breakpoints"]) == ([], [{"tag": "C", "event": "pwritev_done"}])
    await remove_filter(graph, inserted.name)
    client = Client(nursery, root)
    await talk.execute("blkdebug-wait-break", node_name="disk", tag="C")
    await talk.execute("blkdebug-resume", node_name="disk", tag="C")
    await settle()
    assert client.done


async def test_resizing_a_node_does_not_wait_for_stopped_requests(
    graph: Graph, root: Root, talk: Talk, nursery: trio.Nursery
) -> None:
    await set_breaks(talk, "A")
    client = Client(nursery, root)
    await settle()
    await talk.execute("block_resize", node_name="disk", size=2 * LENGTH)
    assert client.done
    assert len(memory_of(graph, "medium").data) == 2 * LENGTH


async def test_a_node_is_removed_though_its_flush_has_a_breakpoint(graph: Graph, root: Root, talk: Talk) -> None:
    await write(root, 0, b"x")
    await graph.detach_root(root)
    await set_breaks(talk, "A", event="flush_to_disk")
    await talk.execute("blockdev-del", node_name="disk")
    assert not graph.nodes


async def test_the_end_of_the_graph_waits_for_no_breakpoint(
    graph: Graph, root: Root, talk: Talk, nursery: trio.Nursery
) -> None:
    await set_breaks(talk, "A")
    await set_breaks(talk, "B", event="flush_to_os")
    client = Client(nursery, root)
    await settle()
    await graph.close()
    assert client.done


async def test_nothing_is_stopped_any_more_at_the_end(
    graph: Graph, root: Root, talk: Talk, nursery: trio.Nursery
) -> None:
    await set_breaks(talk, "A")
    client = Client(nursery, root)
    await settle()
    graph.stop_delaying()
    await set_breaks(talk, "B")
    other = Client(nursery, root)
    await settle()
    assert (client.done, other.done) == (True, True)
