"""The fault filter's rules without any I/O: which requests they choose, what they plan, and that all of it repeats."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusebd.block.caller import Asked, current_request
from fusebd.block.child import FUA
from fusebd.block.options import convert
from fusebd.drivers.fault.actions import Medium, Part, Plan
from fusebd.drivers.fault.chance import Dice, distribution
from fusebd.drivers.fault.damage import Damage
from fusebd.drivers.fault.options import KINDS, OPERATIONS, FaultRule
from fusebd.drivers.fault.ranges import Ranges
from fusebd.drivers.fault.rules import RuleSet, Verdict
from fusebd.errors import CommandError, OptionError

LENGTH = 1 << 20
K = 1024

always = settings(derandomize=True, deadline=None, max_examples=150)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def rule_set(*rules: dict[str, Any], seed: int = 0, length: int = LENGTH, clock: Clock | None = None) -> RuleSet:
    """Rules by what they say; ``error`` unless they say what to do."""
    made = RuleSet(seed, 1, Medium(length), clock=clock or Clock(), same=lambda pid, tid: pid == tid // 100)
    for members in rules:
        made.add(convert({"action": "error", **members}, FaultRule))
    return made


def plan_of(verdict: Verdict | None) -> Plan:
    assert verdict is not None
    assert verdict.plan is not None
    return verdict.plan


def decided(rules: RuleSet, *requests: tuple[Any, ...]) -> list[bool]:
    """Of each of *requests* (operation, offset, length, flags) whether any rule was hit."""
    return [rules.decide(*request) is not None for request in requests]


# --- which requests ------------------------------------------------------------------------------

READ_0, READ_4K, WRITE_0, WRITE_4K = (
    ("read", 0, 4 * K),
    ("read", 4 * K, 4 * K),
    ("write", 0, 4 * K),
    ("write", 4 * K, 4 * K),
)
FLUSH, STATUS = ("flush", 0, 0), ("block-status", 0, 4 * K)

MATCHES: dict[str, tuple[dict[str, Any], list[tuple[Any, ...]], str]] = {
    "everything but block status": ({}, [READ_0, WRITE_4K, FLUSH, STATUS, ("discard", 0, 1)], "xxx-x"),
    "one operation": ({"operations": ["write"]}, [READ_0, WRITE_0, FLUSH], "-x-"),
    "block status if it is said": ({"operations": ["block-status"]}, [READ_0, STATUS], "-x"),
    "an offset and all behind it": ({"offset": 5000}, [READ_0, READ_4K, ("read", 1 << 19, 1)], "-xx"),
    "a length from the beginning": ({"length": 4 * K}, [READ_0, READ_4K], "x-"),
    "a range that is touched": (
        {"offset": 4 * K, "length": 512},
        [("read", 4 * K - 1, 1), ("read", 4 * K - 1, 2), ("read", 4 * K + 511, 9), ("read", 4 * K + 512, 9)],
        "-xx-",
    ),
    "no range holds a flush": ({"offset": 0}, [WRITE_0, FLUSH], "x-"),
    "a sector": ({"sector": 8}, [("read", 4 * K - 1, 1), ("read", 4 * K, 1), ("read", 4 * K + 512, 1)], "-x-"),
    "sectors": (
        {"sector": 8, "sectors": 2},
        [("read", 4 * K - 1, 1), ("read", 4 * K + 1023, 1), ("read", 5 * K, 1)],
        "-x-",
    ),
    "several ranges": (
        {"ranges": [{"start": 8 * K, "length": 1}, {"start": 0, "length": 10}, {"start": 5, "length": 10}]},
        [("read", 14, 1), ("read", 15, 8 * K - 15), ("read", 8 * K, 1), ("read", 8 * K + 1, K)],
        "x-x-",
    ),
    "the smallest size": ({"min-size": 512}, [("read", 0, 511), ("read", 0, 512)], "-x"),
    "the largest size": ({"max-size": 512}, [("read", 0, 512), ("read", 0, 513)], "x-"),
    "the third": ({"nth": 3}, [READ_0] * 7, "--x----"),
    "every third": ({"every": 3}, [READ_0] * 7, "--x--x-"),
    "every second from the third on": ({"nth": 3, "every": 2}, [READ_0] * 8, "--x-x-x-"),
    "only those that match are counted": (
        {"nth": 2, "operations": ["read"]},
        [READ_0, WRITE_0, WRITE_0, READ_0],
        "---x",
    ),
    "at most twice": ({"times": 2}, [READ_0] * 4, "xx--"),
    "twice, and every second": ({"times": 2, "every": 2}, [READ_0] * 7, "-x-x---"),
    "never by chance": ({"probability": 0}, [READ_0] * 4, "----"),
    "surely by chance": ({"probability": 1}, [READ_0] * 4, "xxxx"),
    "another state": ({"state": 2}, [READ_0], "-"),
    "the state": ({"state": 1}, [READ_0], "x"),
    "any state": ({"state": 0}, [READ_0], "x"),
    "an event that has not been": ({"event": "l2_load"}, [READ_0], "-"),
    "the event that always was": ({"event": "none"}, [READ_0], "x"),
    "the state after it was set": ({"state": 1, "set-state": 2, "operations": ["write"]}, [WRITE_0, WRITE_0], "x-"),
    "writes with FUA are flushes": (
        {"action": "lying-flush"},
        [WRITE_0, (*WRITE_0, FUA), FLUSH, READ_0, ("write-zeroes", 0, 1, FUA)],
        "-xx-x",
    ),
    "what crosses the end of the disk": (
        {"action": "disk-full", "at-offset": 4 * K},
        [WRITE_0, ("write", 4 * K - 1, 2), WRITE_4K, READ_4K],
        "-xx-",
    ),
    "what is beyond the capacity": (
        {"action": "wrap", "capacity": 4 * K},
        [READ_0, ("read", 1, 4 * K), WRITE_4K, FLUSH],
        "-xx-",
    ),
    "a single sector is not torn": (
        {"action": "torn-write"},
        [("write", 512, 512), ("write", 512, 513), ("write", 700, 300), ("write", 0, 0)],
        "-x--",
    ),
    "a byte more than gets through": (
        {"action": "torn-write", "bytes": 100},
        [("write", 0, 100), ("write", 0, 101)],
        "-x",
    ),
    "a target outside of the node": (
        {"action": "misdirect", "delta": -4096},
        [READ_0, READ_4K, ("read", 4095, 1), ("read", LENGTH - 1, 1)],
        "-x-x",
    ),
    "no place to be misdirected to": (
        {"action": "misdirect", "target-offset": 0, "target-length": 4 * K},
        [READ_0, READ_4K, ("read", 4 * K, 4 * K + 1)],
        "-x-",
    ),
}


@pytest.mark.parametrize(("members", "requests", "expected"), MATCHES.values(), ids=MATCHES)
def test_a_rule_is_hit_by(members: dict[str, Any], requests: list[tuple[Any, ...]], expected: str) -> None:
    hits = decided(rule_set(members), *requests)
    assert "".join("x" if hit else "-" for hit in hits) == expected


def test_all_that_a_rule_says_must_hold() -> None:
    members = {"operations": ["write"], "offset": 4096, "length": 4096, "min-size": 1024, "max-size": 4096, "state": 1}
    fitting = ("write", 4096, 2048)
    assert decided(rule_set(members), fitting) == [True]
    for other in (("read", 4096, 2048), ("write", 0, 2048), ("write", 4096, 512), ("write", 4096, 8192)):
        assert decided(rule_set(members), other) == [False]


def test_times_are_seconds_since_the_rule_was_added() -> None:
    clock = Clock()
    rules = rule_set({"after": 2, "until": 5}, clock=clock)
    seen = []
    for now in (100.0, 101.9, 102.0, 104.9, 105.0, 103.0):
        clock.now = now
        seen += decided(rules, READ_0)
    # once it is over, it is over
    assert seen == [False, False, True, True, False, False]
    assert not rules.by_operation["read"]


@dataclass
class Caller:
    pid: int
    uid: int

    def identity(self) -> dict[str, Any]:
        return {}

    def asked(self) -> Asked:
        return Asked("read")


@pytest.mark.parametrize(
    ("members", "expected"), [({"pid": 7}, "x-x-"), ({"uid": 5}, "xx--"), ({"pid": 7, "uid": 5}, "x---")]
)
def test_a_caller_is_a_process_with_all_its_threads_or_a_user(members: dict[str, Any], expected: str) -> None:
    rules = rule_set(members)
    seen = []
    for caller in (Caller(701, 5), Caller(801, 5), Caller(702, 6), None):
        token = current_request.set(caller)
        seen += decided(rules, READ_0)
        current_request.reset(token)
    assert "".join("x" if hit else "-" for hit in seen) == expected


def test_the_first_terminal_action_decides_and_what_waits_comes_on_top() -> None:
    rules = rule_set(
        {"action": "delay", "seconds": 1},
        {"action": "hang"},
        {"errno": "ENOSPC", "nth": 2},
        {"action": "delay", "seconds": 2},
        {"errno": "EIO"},
        {"errno": "EROFS"},
    )
    first, second = rules.decide(*READ_0), rules.decide(*READ_0)
    assert first is not None
    assert [hit.rule.id for hit in first.hits] == ["1", "2", "4", "5"]
    assert plan_of(first).errno == 5
    assert second is not None
    assert [hit.rule.id for hit in second.hits] == ["1", "2", "3"]
    assert plan_of(second).errno == 28


def test_a_hang_with_an_errno_is_the_end() -> None:
    rules = rule_set({"action": "hang", "errno": "ETIMEDOUT"}, {"errno": "EIO"})
    verdict = rules.decide(*READ_0)
    assert verdict is not None
    assert [hit.outcome.waits for hit in verdict.hits] == [True]
    assert plan_of(verdict).errno == 110


def test_a_request_without_a_hit_that_matters_goes_on() -> None:
    verdict = rule_set({"action": "set-state", "set-state": 4}).decide(*READ_0)
    assert verdict is not None
    assert verdict.plan is None


# --- states and events ---------------------------------------------------------------------------


def test_a_state_holds_from_the_next_request_on() -> None:
    rules = rule_set(
        {"action": "set-state", "state": 1, "set-state": 2, "operations": ["write"]},
        {"state": 2, "operations": ["read"], "set-state": 3},
    )
    assert decided(rules, READ_0, WRITE_0, READ_0, READ_0) == [False, True, True, False]
    assert rules.state == 3


def test_an_event_arms_its_rules_and_disarms_those_of_others() -> None:
    rules = rule_set({"event": "l2_load", "errno": 5}, {"event": "read_aio", "errno": 28}, {"operations": ["flush"]})
    assert decided(rules, READ_0) == [False]
    rules.announce("l2_load")
    assert plan_of(rules.decide(*READ_0)).errno == 5
    rules.announce("cluster_alloc")  # nobody's
    assert plan_of(rules.decide(*READ_0)).errno == 5
    rules.announce("read_aio")
    assert plan_of(rules.decide(*READ_0)).errno == 28
    assert decided(rules, FLUSH) == [True]


def test_the_state_of_a_rule_with_an_event_counts_when_that_is_announced() -> None:
    rules = rule_set(
        {"event": "l2_load", "state": 2}, {"action": "set-state", "set-state": 2, "operations": ["discard"]}
    )
    rules.announce("l2_load")
    assert decided(rules, READ_0, ("discard", 0, 1), READ_0) == [False, True, False]
    rules.announce("l2_load")
    rules.state = 7
    assert decided(rules, READ_0) == [True]


def test_a_state_can_be_set_by_an_event_itself() -> None:
    rules = rule_set({"action": "set-state", "event": "l2_load", "set-state": 9, "nth": 2})
    assert rules.events == {"l2_load"}
    rules.announce("l2_load")
    assert (rules.state, decided(rules, READ_0)) == (1, [False])
    rules.announce("l2_load")
    assert rules.state == 9
    assert not rules.events


# --- coming and going ----------------------------------------------------------------------------


def test_rules_without_an_id_are_numbered_and_ids_are_unique() -> None:
    rules = rule_set({"id": "mine"}, {}, {"id": "2"}, {})
    assert [rule.id for rule in rules] == ["mine", "1", "2", "3"]
    with pytest.raises(OptionError, match="Duplicate ID 'mine' for fault rule"):
        rules.add(convert({"action": "error", "id": "mine"}, FaultRule))


def test_a_removed_rule_does_nothing_any_more() -> None:
    rules = rule_set({"id": "a"})
    rules.remove("a")
    assert decided(rules, READ_0) == [False]
    with pytest.raises(CommandError, match="No fault rule with id 'a'"):
        rules.remove("a")


def test_counts_say_what_a_rule_has_done() -> None:
    rules = rule_set({"every": 2, "times": 2, "operations": ["read"]})
    decided(rules, *[READ_0] * 3, *[WRITE_0] * 3)
    (rule,) = rules
    assert rule.describe() == {
        "id": "1", "matches": 3, "hits": 1, "active": True,
        "action": "error", "every": 2, "times": 2, "operations": ["read"],
    }  # fmt: skip
    decided(rules, *[READ_0] * 3)
    assert (rule.matches, rule.hits, rule.describe()["active"]) == (4, 2, False)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_only_rules_for_an_operation_are_asked(operation: str) -> None:
    rules = rule_set({"operations": [operation]})
    assert [name for name, asked in rules.by_operation.items() if asked] == [operation]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown action": ({"action": "explode"}, "Parameter 'action' does not accept value 'explode'"),
    "unknown member": ({"colour": 1}, "Parameter 'colour' is unexpected"),
    "unknown operation": ({"operations": ["eat"]}, "Parameter 'null' does not accept value 'eat'"),
    "no operation": ({"operations": []}, "Parameter 'operations' is empty"),
    "foreign operation": ({"action": "short-read", "operations": ["write"]}, "Action 'short-read' is not for 'write'"),
    "foreign member": ({"seconds": 1}, "Parameter 'seconds' is not for action 'error'"),
    "empty id": ({"id": ""}, "Parameter 'id' expects an identifier"),
    "id of two lines": ({"id": "a\nb"}, "Parameter 'id' expects an identifier"),
    "unknown errno": ({"errno": "EWHAT"}, "Parameter 'errno' does not accept value 'EWHAT'"),
    "no errno": ({"errno": "errorcode"}, "Parameter 'errno' does not accept value 'errorcode'"),
    "errno 0": ({"errno": 0}, "Parameter 'errno' does not accept value '0'"),
    "errno too large": ({"errno": 512}, "Parameter 'errno' does not accept value '512'"),
    "nth 0": ({"nth": 0}, "Parameter 'nth' expects a positive number"),
    "every 0": ({"every": 0}, "Parameter 'every' expects a positive number"),
    "times 0": ({"times": 0}, "Parameter 'times' expects a positive number"),
    "probability": ({"probability": 1.5}, "Parameter 'probability' expects a number from 0 to 1"),
    "probability is no number": ({"probability": math.nan}, "Parameter 'probability' expects a number from 0 to 1"),
    "negative time": ({"after": -1}, "Parameter 'after' expects a number from 0 to 1000000000"),
    "two places": ({"offset": 0, "sector": 1}, "Parameters 'offset' and 'sector' exclude each other"),
    "sectors from where": ({"sectors": 1}, "Parameter 'sector' is missing"),
    "no range": ({"ranges": []}, "Parameter 'ranges' is empty"),
    "half a range": ({"ranges": [{"start": 1}]}, "Parameter 'ranges[0].length' is missing"),
    "no state": ({"action": "set-state"}, "Parameter 'set-state' is missing for action 'set-state'"),
    "state on event and request": (
        {"action": "set-state", "set-state": 2, "event": "l2_load", "operations": ["read"]},
        "Parameter 'operations' is not for a state that an event sets",
    ),
    "unknown event": ({"event": "party"}, "Parameter 'event' does not accept value 'party'"),
    "no delay": ({"action": "delay"}, "Parameter 'seconds' is missing for action 'delay'"),
    "half a distribution": (
        {"action": "delay", "distribution": "normal", "seconds": 1},
        "Parameter 'deviation' is missing for action 'delay'",
    ),
    "foreign to the distribution": (
        {"action": "delay", "distribution": "uniform", "minimum": 0, "maximum": 1, "sigma": 1},
        "Parameter 'sigma' is not for distribution 'uniform'",
    ),
    "bounds": (
        {"action": "delay", "distribution": "uniform", "minimum": 2, "maximum": 1},
        "Parameter 'minimum' is larger than 'maximum'",
    ),
    "percentiles in disorder": (
        {
            "action": "delay",
            "distribution": "percentiles",
            "percentiles": [{"percentile": 50, "seconds": 2}, {"percentile": 40, "seconds": 3}],
        },
        "Parameter 'percentiles' expects points in ascending order",
    ),
    "percentiles that fall": (
        {
            "action": "delay",
            "distribution": "percentiles",
            "percentiles": [{"percentile": 50, "seconds": 2}, {"percentile": 60, "seconds": 1}],
        },
        "Parameter 'percentiles' expects points in ascending order",
    ),
    "a percentile": (
        {"action": "delay", "distribution": "percentiles", "percentiles": [{"percentile": 101, "seconds": 2}]},
        "Parameter 'percentile' expects a number from 0 to 100",
    ),
    "old data of a read": (
        {"action": "short-read", "fill": "old"},
        "Action 'short-read' has nothing old to fill with",
    ),
    "bytes of a pattern": (
        {"action": "torn-write", "pattern": "random", "bytes": 5},
        "Parameter 'bytes' is not for pattern 'random'",
    ),
    "torn too finely": (
        {"action": "torn-write", "pattern": "interleaved", "unit": 1},
        "Parameter 'unit' expects 512 or more for pattern 'interleaved'",
    ),
    "delta and drawn": (
        {"action": "misdirect", "delta": 1, "target-offset": 1},
        "Parameters 'delta' and 'target-offset' exclude each other",
    ),
    "delta 0": ({"action": "duplicate", "delta": 0}, "Parameter 'delta' expects a number other than 0"),
    "too many bits": ({"action": "bit-flip", "count": 65537}, "Parameter 'count' expects 65536 at most"),
    "bit 8": ({"action": "bit-flip", "bit": 8}, "Parameter 'bit' expects a number from 0 to 7"),
    "transient writes": (
        {"action": "bit-flip", "transient": True, "operations": ["write"]},
        "Only reads can have transient flips",
    ),
    "transient at rest": (
        {"action": "bit-flip", "transient": True, "at-rest": True},
        "Parameters 'transient' and 'at-rest' exclude each other",
    ),
    "at rest with requests": (
        {"action": "latent", "at-rest": True, "nth": 2},
        "Parameter 'nth' is not for what is at rest",
    ),
    "half a sector": ({"action": "latent", "unit": 256}, "Parameter 'unit' expects a multiple of 512"),
    "full when": ({"action": "disk-full"}, "Action 'disk-full' needs one of 'at-offset' and 'after-bytes'"),
    "full twice": (
        {"action": "disk-full", "at-offset": 1, "after-bytes": 1},
        "Action 'disk-full' needs one of 'at-offset' and 'after-bytes'",
    ),
    "more than there is": (
        {"action": "wrap", "capacity": LENGTH + 1},
        "The capacity 1048577 is more than the node has, 1048576",
    ),
}


@pytest.mark.parametrize(("members", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_rule_that_cannot_be_is_refused(members: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as refusal:
        rule_set(members)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("errno", "number"), [("EIO", 5), ("ENOSPC", 28), (28, 28), ("28", 28), ("EROFS", 30), (511, 511)]
)
def test_an_errno_is_a_name_or_a_number(errno: object, number: int) -> None:
    assert plan_of(rule_set({"errno": errno}).decide(*READ_0)).errno == number


# --- what repeats --------------------------------------------------------------------------------

EVERY_ACTION = [
    {"action": "delay", "distribution": "lognormal", "seconds": 0.01, "sigma": 1.5, "probability": 0.5},
    {"action": "bit-flip", "count": 3, "probability": 0.2},
    {"action": "short-read", "fill": "random", "probability": 0.3},
    {"action": "latent", "count": 2, "probability": 0.2},
    {"action": "misdirect", "probability": 0.2},
    {"action": "torn-write", "pattern": "random", "fill": "random", "probability": 0.5},
    {"action": "duplicate", "probability": 0.3},
    {"action": "lost-write", "probability": 0.3},
    {"action": "error", "probability": 0.3},
]


def story(rules: RuleSet, seed: int) -> list[tuple[Any, ...]]:
    """What becomes of a few hundred requests, which follow from *seed*."""
    dice = Dice(seed, "requests")
    told = []
    for _ in range(400):
        request = (OPERATIONS[dice.below(5)], dice.below(LENGTH // 512 - 64) * 512, (1 + dice.below(64)) * 512)
        verdict = rules.decide(*request)
        if verdict is not None:
            told.append((request, [(hit.rule.id, hit.outcome.details) for hit in verdict.hits], verdict.plan))
    return told


def test_the_same_seed_and_requests_give_the_same_faults() -> None:
    first, again, other = (story(rule_set(*EVERY_ACTION, seed=seed), 1) for seed in (7, 7, 8))
    assert first == again
    assert len(first) > 100
    assert first != other


def test_a_rule_draws_the_same_whatever_other_rules_there_are() -> None:
    flips = {"id": "flip", "action": "bit-flip", "transient": True, "probability": 0.5}
    alone = story(rule_set(flips), 1)
    among = story(rule_set({"action": "delay", "distribution": "uniform", "minimum": 0, "maximum": 1}, flips), 1)
    mine = [(request, [hit for hit in hits if hit[0] == "flip"], plan) for request, hits, plan in among]
    assert [entry for entry in mine if entry[1]] == alone


def test_the_sequence_of_a_seed_is_the_same_everywhere() -> None:
    """If this fails, recorded seeds mean something else on this machine, or since this change."""
    dice = Dice(42, "rule")
    assert [dice.below(1000) for _ in range(6)] == SEQUENCE
    assert dice.distinct(4, 100) == DISTINCT
    assert [round(dice.normal(), 12) for _ in range(3)] == NORMAL
    assert dice.bytes(8).hex() == BYTES


SEQUENCE = [857, 122, 408, 39, 123, 669]
DISTINCT = [9, 56, 93, 99]
NORMAL = [1.301443115943, 1.449161242991, -0.652209460593]
BYTES = "027bffbdb3175ccc"


# --- distributions -------------------------------------------------------------------------------


def delays(count: int = 20000, **members: Any) -> list[float]:
    """*count* draws of a delay, in order of size."""
    draw = distribution(convert({"action": "delay", **members}, FaultRule))
    dice = Dice(5, "delays")
    return sorted(draw(dice) for _ in range(count))


def test_a_fixed_delay_is_fixed() -> None:
    assert set(delays(seconds=0.25)) == {0.25}


def test_a_uniform_delay_is_uniform() -> None:
    drawn = delays(distribution="uniform", minimum=1, maximum=3)
    assert 1 <= drawn[0] < 1.001 < 2.999 < drawn[-1] < 3
    for tenth in range(1, 10):
        assert drawn[2000 * tenth] == pytest.approx(1 + tenth / 5, abs=0.03)


def test_a_normal_delay_has_its_mean_and_deviation() -> None:
    drawn = delays(distribution="normal", seconds=10, deviation=2)
    assert statistics.fmean(drawn) == pytest.approx(10, abs=0.06)
    assert statistics.stdev(drawn) == pytest.approx(2, abs=0.04)
    expected = statistics.NormalDist(10, 2)
    for percent in (1, 25, 50, 75, 99):
        assert drawn[200 * percent] == pytest.approx(expected.inv_cdf(percent / 100), abs=0.15)


def test_a_lognormal_delay_has_its_median_and_tail() -> None:
    drawn = delays(distribution="lognormal", seconds=0.001, sigma=1)
    for percent in (10, 50, 90, 99):
        expected = 0.001 * math.exp(statistics.NormalDist().inv_cdf(percent / 100))
        assert drawn[200 * percent] == pytest.approx(expected, rel=0.08)


def test_a_delay_stays_within_its_bounds_and_is_never_negative() -> None:
    drawn = delays(distribution="normal", seconds=1, deviation=2)
    assert drawn[0] == 0
    drawn = delays(distribution="normal", seconds=1, deviation=2, minimum=0.5, maximum=2)
    assert (drawn[0], drawn[-1]) == (0.5, 2)


def test_percentiles_are_those_of_the_table() -> None:
    table = [(50, 0.001), (90, 0.01), (99, 0.1), (99.9, 1)]
    drawn = delays(
        100000,
        distribution="percentiles",
        percentiles=[{"percentile": percentile, "seconds": seconds} for percentile, seconds in table],
    )
    for percentile, seconds in table[:-1]:
        assert drawn[int(1000 * percentile)] == pytest.approx(seconds, rel=0.1)
    assert (drawn[0], drawn[-1]) == (0.001, 1)
    assert drawn[70000] == pytest.approx(0.0055, rel=0.05)  # between the points it is a straight line


def test_chance_has_its_probability() -> None:
    rules = rule_set({"probability": 0.1, "operations": ["read"]})
    hits = sum(decided(rules, *[READ_0] * 20000))
    assert hits == pytest.approx(2000, abs=4 * math.sqrt(20000 * 0.1 * 0.9))


# --- plans ---------------------------------------------------------------------------------------

offsets = st.integers(0, LENGTH - 1)
lengths = st.integers(1, 70000)


def whole(request: tuple[str, int, int]) -> tuple[str, int, int]:
    """*request* cut at the end of the node."""
    operation, offset, length = request
    return operation, offset, min(length, LENGTH - offset)


def covered(parts: list[Part]) -> list[tuple[int, int]]:
    return Ranges((part.start, part.end) for part in parts).all()


@always
@given(offsets, lengths, st.sampled_from(["prefix", "suffix", "interleaved", "random"]), st.sampled_from([512, 4096]))
def test_a_torn_write_is_a_part_of_it_in_whole_units(offset: int, length: int, pattern: str, unit: int) -> None:
    request = whole(("write", offset, length))
    verdict = rule_set({"action": "torn-write", "pattern": pattern, "unit": unit}, seed=offset).decide(*request)
    end = offset + request[2]
    if offset // unit == (end - 1) // unit:
        assert verdict is None
        return
    parts = plan_of(verdict).parts
    assert all(part.offset == offset + part.start and part.data is None for part in parts)
    written = covered(parts)
    assert sum(part.end - part.start for part in parts) == sum(stop - start for start, stop in written) < request[2]
    for start, stop in written:
        assert start == 0 or (offset + start) % unit == 0
        assert stop == request[2] or (offset + stop) % unit == 0
    if pattern == "prefix":
        assert [start for start, _ in written] == [0]
    if pattern == "suffix":
        assert [stop for _, stop in written] == [request[2]]
    if pattern == "interleaved":
        edges = [0, *(at - offset for at in range((offset // unit + 1) * unit, end, unit)), request[2]]
        assert written == list(itertools.pairwise(edges))[::2]


@always
@given(offsets, lengths, st.sampled_from(["prefix", "suffix"]), st.integers(0, 70000))
def test_a_torn_write_is_cut_at_the_byte_that_was_asked_for(offset: int, length: int, pattern: str, got: int) -> None:
    request = whole(("write", offset, length))
    verdict = rule_set({"action": "torn-write", "pattern": pattern, "bytes": got}).decide(*request)
    if got >= request[2]:
        assert verdict is None
    else:
        expected = (0, got) if pattern == "prefix" else (request[2] - got, request[2])
        assert covered(plan_of(verdict).parts) == ([expected] if got else [])


@always
@given(offsets, lengths, st.sampled_from(["prefix", "suffix", "interleaved", "random"]), st.booleans())
def test_what_a_torn_write_leaves_out_can_be_filled(offset: int, length: int, pattern: str, garbage: bool) -> None:
    request = whole(("write", offset, length))
    fill = "random" if garbage else "zeroes"
    verdict = rule_set({"action": "torn-write", "pattern": pattern, "fill": fill}).decide(*request)
    if verdict is None:
        return
    parts = plan_of(verdict).parts
    assert covered(parts) == [(0, request[2])]
    assert sum(part.end - part.start for part in parts) == request[2]
    for part in parts:
        assert part.data is None or len(part.data) == part.end - part.start
        if part.data is not None and not garbage:
            assert not any(part.data)


@always
@given(offsets, lengths, st.integers(1, 5000))
def test_a_short_read_has_a_beginning_from_the_medium_and_an_end_of_nothing(
    offset: int, length: int, unit: int
) -> None:
    request = whole(("read", offset, length))
    verdict = rule_set({"action": "short-read", "unit": unit}).decide(*request)
    if verdict is None:
        assert offset // unit == (offset + request[2] - 1) // unit
        return
    parts = plan_of(verdict).parts
    *beginning, end = parts
    assert covered(parts) == [(0, request[2])]
    assert end.data == bytes(end.end - end.start)
    assert (offset + end.start) % unit == 0
    assert [(part.start, part.offset, part.data) for part in beginning] == [(0, offset, None)]


@always
@given(offsets, lengths, st.integers(1, LENGTH))
def test_a_wrapped_request_reaches_its_places_modulo_the_capacity(offset: int, length: int, capacity: int) -> None:
    verdict = rule_set({"action": "wrap", "capacity": capacity, "advertised": 2 * LENGTH}).decide(
        "read", offset, length
    )
    if offset + length <= capacity:
        assert verdict is None
        return
    parts = plan_of(verdict).parts
    places = [place for part in parts for place in range(part.offset, part.offset + part.end - part.start)]
    assert places == [at % capacity for at in range(offset, offset + length)]


@always
@given(offsets, lengths, st.integers(-LENGTH, LENGTH).filter(bool), st.sampled_from(["misdirect", "duplicate"]))
def test_a_delta_leads_elsewhere_inside_of_the_node(offset: int, length: int, delta: int, action: str) -> None:
    request = whole(("write", offset, length))
    verdict = rule_set({"action": action, "delta": delta}).decide(*request)
    if not 0 <= offset + delta <= LENGTH - request[2]:
        assert verdict is None
        return
    expected = [Part(0, request[2], offset + delta)]
    assert plan_of(verdict).parts == ([Part(0, request[2], offset)] if action == "duplicate" else []) + expected


@always
@given(offsets, lengths, st.integers(0, LENGTH), st.integers(1, LENGTH), st.sampled_from([1, 512, 4096]))
def test_a_drawn_place_is_inside_of_the_target_and_another(
    offset: int, length: int, start: int, extent: int, unit: int
) -> None:
    request = whole(("write", offset, length))
    members = {"action": "misdirect", "target-offset": start, "target-length": extent, "unit": unit}
    verdict = rule_set(members, seed=length).decide(*request)
    choices = range(-(-start // unit) * unit, min(start + extent, LENGTH) - request[2] + 1, unit)
    if verdict is None:
        assert not choices or list(choices) == [offset]
        return
    (part,) = plan_of(verdict).parts
    assert part.offset in choices
    assert part.offset != offset


@always
@given(offsets, lengths, offsets, lengths, st.integers(1, 40), st.none() | st.integers(0, 7))
def test_bits_are_flipped_where_request_and_range_overlap(
    offset: int, length: int, start: int, extent: int, count: int, bit: int | None
) -> None:
    request = whole(("read", offset, length))
    members: dict[str, Any] = {"action": "bit-flip", "offset": start, "length": extent, "count": count}
    if bit is not None:
        members["bit"] = bit
    verdict = rule_set(members).decide(*request)
    inside = range(max(offset, start), min(offset + request[2], start + extent))
    if verdict is None:
        assert not inside
        return
    plan = plan_of(verdict)
    assert len(plan.flips) == len(set(plan.flips)) == min(count, len(inside) * (8 if bit is None else 1))
    assert all(flipped >> 3 in inside for flipped in plan.flips)
    assert bit is None or all(flipped & 7 == bit for flipped in plan.flips)
    assert plan.parts == [Part(0, request[2], offset)]


@always
@given(offsets, lengths, st.integers(1, 40), st.sampled_from([512, 4096]))
def test_bad_sectors_are_among_those_that_were_touched(offset: int, length: int, count: int, unit: int) -> None:
    request = whole(("read", offset, length))
    plan = plan_of(rule_set({"action": "latent", "count": count, "unit": unit}).decide(*request))
    touched = range(offset // unit, -(-(offset + request[2]) // unit))
    assert {sector * 512 // unit for sector in plan.spoiled} <= set(touched)
    assert len(set(plan.spoiled)) == len(plan.spoiled) == min(count, len(touched)) * (unit // 512)
    assert plan.errno == 5


@always
@given(st.lists(st.integers(1, 5000), max_size=40), st.integers(0, 60000))
def test_a_disk_that_is_full_after_so_many_bytes_takes_exactly_these(sizes: list[int], limit: int) -> None:
    rules = rule_set({"action": "disk-full", "after-bytes": limit})
    taken, offered = 0, 0
    for size in sizes:
        verdict = rules.decide("write", 0, size)
        offered += size
        if verdict is None:
            taken += size
        else:
            plan = plan_of(verdict)
            assert plan.errno == 28
            taken += sum(part.end - part.start for part in plan.parts)
        assert taken == min(offered, limit)


def test_a_disk_that_is_full_at_an_offset_takes_what_is_before_it() -> None:
    rules = rule_set({"action": "disk-full", "at-offset": 1000})
    assert plan_of(rules.decide("write", 600, 600)).parts == [Part(0, 400, 600)]
    assert plan_of(rules.decide("write", 1000, 600)).parts == []
    assert rules.decide("write", 400, 600) is None


def test_every_action_has_operations_and_none_is_forgotten() -> None:
    for name, kind in KINDS.items():
        assert kind.usual, name
        assert set(kind.usual) <= set(kind.possible)


# --- damage --------------------------------------------------------------------------------------

SMALL = 8 * 512
damages = st.one_of(
    st.tuples(st.just("flip"), st.lists(st.integers(0, SMALL * 8 - 1), max_size=5), st.sampled_from("ab")),
    st.tuples(st.just("spoil"), st.lists(st.integers(0, 7), max_size=3), st.sampled_from("ab")),
    st.tuples(st.just("overwritten"), st.integers(0, SMALL), st.integers(0, 2000)),
    st.tuples(st.just("heal"), st.integers(0, SMALL), st.integers(0, 2000), st.sampled_from(["a", "b", None])),
    st.tuples(st.just("cut"), st.integers(0, SMALL)),
)


@always
@given(st.lists(damages, max_size=25), st.integers(0, SMALL - 1), st.integers(1, 3000))
def test_damage_is_what_a_table_of_bits_and_sectors_says(steps: list[Any], offset: int, length: int) -> None:
    damage = Damage()
    bits: dict[int, str] = {}
    sectors: dict[int, str] = {}
    for what, *values in steps:
        if what == "flip":
            damage.flip(*values)
            bits = {**dict.fromkeys(values[0], values[1]), **bits}
        elif what == "spoil":
            damage.spoil(values[0], values[1], 5)
            sectors = {**dict.fromkeys(values[0], values[1]), **sectors}
        elif what == "cut":
            damage.cut(values[0])
            bits = {bit: rule for bit, rule in bits.items() if bit >> 3 < values[0]}
            sectors = {sector: rule for sector, rule in sectors.items() if sector * 512 < values[0]}
        else:
            start, end, ruled = values[0], values[0] + values[1], values[2] if what == "heal" else None
            before = len(bits), len(sectors)
            bits = {b: r for b, r in bits.items() if not (start <= b >> 3 < end and ruled in (None, r))}
            if what == "heal":
                sectors = {
                    s: r
                    for s, r in sectors.items()
                    if not (s * 512 < end and start < (s + 1) * 512 and start < end and ruled in (None, r))
                }
                assert damage.heal(start, end, ruled) == (before[0] - len(bits), before[1] - len(sectors))
            else:
                sectors = {s: r for s, r in sectors.items() if not (start <= s * 512 and (s + 1) * 512 <= end)}
                assert damage.overwritten(start, end) is (before != (len(bits), len(sectors)))
    assert bool(damage) is bool(bits or sectors)
    assert damage.flipped_bits() == [{"offset": b >> 3, "bit": b & 7, "rule": bits[b]} for b in sorted(bits)]
    listed = {
        number: run["rule"]
        for run in damage.bad_sectors()
        for number in range(run["offset"] // 512, (run["offset"] + run["length"]) // 512)
    }
    assert listed == sectors
    end = min(offset + length, SMALL)
    bad = next((s for s in sorted(sectors) if s * 512 < end and offset < (s + 1) * 512), None)
    found = damage.first_bad(offset, end)
    assert (found[0] if found else None) == bad
    expected = bytearray(end - offset)
    for bit in bits:
        if offset <= bit >> 3 < end:
            expected[(bit >> 3) - offset] ^= 1 << (bit & 7)
    buf = bytearray(end - offset)
    cut = len(buf) // 3
    damage.invert(offset, (memoryview(buf)[:cut], memoryview(buf)[cut:]))
    assert buf == expected
    prefix, flipped = damage.uniform_prefix(offset, end - offset)
    assert 0 < prefix <= end - offset
    kinds = [any(bit >> 12 == at // 512 for bit in bits) for at in range(offset, end)]
    assert set(kinds[:prefix]) == {flipped}
    assert prefix == end - offset or kinds[prefix] is not flipped


@always
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=8), st.integers(0, 70), st.integers(0, 30))
def test_ranges_are_sets_of_bytes(pieces: list[tuple[int, int]], start: int, length: int) -> None:
    ranges = Ranges((at, at + extent) for at, extent in pieces)
    members = {byte for at, extent in pieces for byte in range(at, at + extent)}
    window = members & set(range(start, start + length))
    if length:
        assert ranges.touches(start, start + length) is bool(window)
    assert {byte for a, b in ranges.clip(start, start + length) for byte in range(a, b)} == window
    assert {byte for a, b in ranges.all() for byte in range(a, b)} == members
    assert all(a < b < c for (a, b), (c, _) in itertools.pairwise(ranges.all()))


@always
@given(st.integers(0, 30), st.integers(1, 30), st.integers(0, 100))
def test_distinct_draws_are_distinct(count: int, total: int, seed: int) -> None:
    drawn = Dice(seed, "x").distinct(count, total)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == min(count, total)
    assert set(drawn) <= set(range(total))
