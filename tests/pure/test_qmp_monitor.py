"""The states of a QMP conversation, and the rate at which events go out."""

from __future__ import annotations

from typing import Any

import pytest

from fusebd.errors import BlockIOError, CommandError, GraphError
from fusebd.qmp import events
from fusebd.qmp.commands import COMMANDS
from fusebd.qmp.monitor import Monitor
from fusebd.qmp.table import CommandTable, Context, NoArguments

TABLE = CommandTable(COMMANDS)


@TABLE.command("hurry", allow_oob=True)
async def hurry(context: Context, arguments: NoArguments) -> None:
    """Can be asked for out of band."""


def monitor(*, negotiated: bool = True, oob: bool = False) -> Monitor:
    made = Monitor(TABLE)
    if negotiated:
        made.negotiate(["oob"] if oob else [])
    return made


def refused(made: Monitor, value: Any) -> tuple[str, str]:
    with pytest.raises(CommandError) as caught:
        made.request(value)
    return caught.value.qmp_class, str(caught.value)


MALFORMED = [
    ([], "QMP input must be a JSON object"),
    (5, "QMP input must be a JSON object"),
    (None, "QMP input must be a JSON object"),
    ({}, "QMP input lacks member 'execute'"),
    ({"id": 1}, "QMP input lacks member 'execute'"),
    ({"execute": 5}, "QMP input member 'execute' must be a string"),
    ({"execute": "quit", "arguments": 5}, "QMP input member 'arguments' must be an object"),
    ({"execute": "quit", "arguments": None}, "QMP input member 'arguments' must be an object"),
    ({"execute": "quit", "argument": {}}, "QMP input member 'argument' is unexpected"),
    ({"exec": "quit"}, "QMP input member 'exec' is unexpected"),
    ({"exec-oob": "hurry"}, "QMP input member 'exec-oob' is unexpected"),
]


@pytest.mark.parametrize(("value", "message"), MALFORMED)
@pytest.mark.parametrize("negotiated", [False, True])
def test_a_malformed_request_is_refused(value: Any, message: str, negotiated: bool) -> None:
    assert refused(monitor(negotiated=negotiated), value) == ("GenericError", message)


def test_the_greeting_has_a_version_and_the_capability() -> None:
    greeting = Monitor.greeting()["QMP"]
    assert greeting["version"]["qemu"] == {"major": 10, "minor": 0, "micro": 2}
    assert greeting["version"]["package"].startswith("fusebd-")
    assert greeting["capabilities"] == ["oob"]


def test_before_the_negotiation_no_other_command_is_found() -> None:
    expected = ("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'")
    assert refused(monitor(negotiated=False), {"execute": "quit"}) == expected
    assert refused(monitor(negotiated=False), {"execute": "nonsense"}) == expected


def test_the_negotiation_is_a_command() -> None:
    found = monitor(negotiated=False).request({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})
    assert (found.command.name, found.arguments) == ("qmp_capabilities", {"enable": ["oob"]})


def test_the_negotiation_is_done_once() -> None:
    expected = ("CommandNotFound", "Capabilities negotiation is already complete, command ignored")
    assert refused(monitor(), {"execute": "qmp_capabilities"}) == expected


def test_an_unknown_command_is_not_found() -> None:
    assert refused(monitor(), {"execute": "foo"}) == ("CommandNotFound", "The command foo has not been found")


def test_arguments_may_be_left_out() -> None:
    found = monitor().request({"execute": "query-version"})
    assert (found.command.name, found.arguments) == ("query-version", {})


def test_no_events_before_the_negotiation() -> None:
    assert not monitor(negotiated=False).wants_events
    assert monitor().wants_events


def test_out_of_band_execution_needs_the_capability() -> None:
    found = monitor(oob=True).request({"exec-oob": "hurry"})
    assert found.command.name == "hurry"


def test_not_every_command_can_be_executed_out_of_band() -> None:
    expected = ("GenericError", "The command query-version does not support OOB")
    assert refused(monitor(oob=True), {"exec-oob": "query-version"}) == expected


def test_the_two_ways_to_execute_exclude_each_other() -> None:
    _, message = refused(monitor(oob=True), {"execute": "quit", "exec-oob": "quit"})
    assert message == "QMP input member 'exec-oob' clashes with 'execute'"


def test_what_is_out_of_band_is_known_before_it_is_checked() -> None:
    assert Monitor.is_out_of_band({"exec-oob": 5})
    assert not Monitor.is_out_of_band({"exec-oob": "hurry", "execute": "quit"})
    assert not Monitor.is_out_of_band(["exec-oob"])


@pytest.mark.parametrize("identifier", [None, 0, "x", {"a": [1]}, False])
def test_the_id_is_echoed(identifier: Any) -> None:
    assert Monitor.success({"execute": "quit", "id": identifier}, {}) == {"return": {}, "id": identifier}
    failure = Monitor.failure({"nonsense": 1, "id": identifier}, CommandError("no"))
    assert failure == {"error": {"class": "GenericError", "desc": "no"}, "id": identifier}


def test_without_an_id_the_answer_has_none() -> None:
    assert Monitor.success({"execute": "quit"}, 5) == {"return": 5}


@pytest.mark.parametrize("error", [GraphError("no"), BlockIOError(5, reason="no"), CommandError("no")])
def test_every_error_of_ours_has_an_answer(error: Any) -> None:
    assert Monitor.failure({}, error)["error"] == {"class": "GenericError", "desc": str(error)}


# --- events --------------------------------------------------------------------------------------


def failed(node: str, operation: str = "read", count: int = 0) -> Any:
    return events.message("BLOCK_IO_ERROR", {"node-name": node, "operation": operation, "count": count})


def test_an_event_has_a_timestamp_and_data_only_if_there_is_some() -> None:
    message = events.message("STOP", {})
    assert message.keys() == {"event", "timestamp"}
    assert 0 <= message["timestamp"]["microseconds"] < 1_000_000
    assert message["timestamp"]["seconds"] > 1_600_000_000
    assert events.message("STOP", {"a": 1})["data"] == {"a": 1}


def test_most_events_all_go_out() -> None:
    limiter = events.RateLimiter()
    assert all(limiter.offer(events.message("BLOCK_EXPORT_DELETED", {"id": "x"}), 0.0) for _ in range(100))
    assert limiter.next_time is None


def test_of_failures_one_goes_out_a_second_and_then_the_last() -> None:
    limiter = events.RateLimiter()
    assert limiter.offer(failed("a", count=0), 10.0)
    assert not any(limiter.offer(failed("a", count=count), 10.5) for count in range(1, 50))
    assert limiter.next_time == 11.0
    assert limiter.due(10.9) == []
    assert [event["data"]["count"] for event in limiter.due(11.0)] == [49]
    assert not limiter.offer(failed("a", count=50), 11.5)
    assert [event["data"]["count"] for event in limiter.due(12.0)] == [50]


def test_after_a_quiet_second_a_failure_goes_out_at_once() -> None:
    limiter = events.RateLimiter()
    assert limiter.offer(failed("a"), 10.0)
    assert limiter.next_time is None
    assert limiter.due(11.0) == []
    assert limiter.offer(failed("a"), 11.1)


def test_failures_of_other_nodes_and_operations_are_not_held_back() -> None:
    limiter = events.RateLimiter()
    assert limiter.offer(failed("a"), 10.0)
    assert limiter.offer(failed("b"), 10.0)
    assert limiter.offer(failed("a", "write"), 10.0)


def test_what_is_not_told_apart_takes_no_memory_for_ever() -> None:
    limiter = events.RateLimiter()
    for number in range(1000):
        limiter.offer(failed(f"node{number}"), number * 2.0)
        limiter.due(number * 2.0)
    assert len(limiter._held) <= 2
