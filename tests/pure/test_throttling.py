"""The arithmetic of I/O limits, with a clock that is moved by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusebd.block.options import convert
from fusebd.block.throttling import NO_LIMITS, READ, WRITE, ThrottleLimits, ThrottleState, changed_limits
from fusebd.errors import OptionError

Limits = dict[str, int]


def limits_of(**given: int) -> Limits:
    """Complete limits with those *given*; QAPI's names with ``_`` for ``-``."""
    return changed_limits(NO_LIMITS, ThrottleLimits(**given))


def schedule(state: ThrottleState, requests: list[tuple[int, int]], start: float = 0.0) -> list[float]:
    """The times at which *requests* (direction, size) go if each comes when the one before has gone."""
    now, times = start, []
    for direction, size in requests:
        while delay := state.wait(direction, now):
            now += delay
        state.charge(direction, size, now)
        times.append(now)
    return times


def rates(times: list[float], length: float) -> list[int]:
    """How many of *times* there are in each stretch of *length* seconds."""
    return [sum(1 for time in times if n * length <= time < (n + 1) * length) for n in range(int(times[-1] / length))]


# --- one limit -----------------------------------------------------------------------------------


def test_without_limits_every_request_goes() -> None:
    state = ThrottleState(dict(NO_LIMITS))
    assert not state.is_limited(READ)
    assert not state.is_limited(WRITE)
    assert schedule(state, [(READ, 1 << 40)] * 3) == [0.0, 0.0, 0.0]


def test_a_rate_allows_a_tenth_of_a_second_at_once_and_one_more_request() -> None:
    # a request goes if there is no more in the bucket than fits, whatever the request adds
    assert schedule(ThrottleState(limits_of(iops_total=10)), [(READ, 512)] * 5) == pytest.approx([0, 0, 0.1, 0.2, 0.3])


def test_a_large_request_is_paid_for_by_the_next_one() -> None:
    state = ThrottleState(limits_of(bps_read=1000))
    assert schedule(state, [(READ, 5000), (READ, 1), (READ, 1)]) == pytest.approx([0, 4.9, 4.901])


def test_a_bucket_that_is_left_alone_runs_empty_and_no_further() -> None:
    state = ThrottleState(limits_of(iops_total=10))
    schedule(state, [(READ, 1)] * 4)
    assert schedule(state, [(READ, 1)] * 3, start=1000.0) == pytest.approx([1000, 1000, 1000.1])


def test_max_is_what_may_go_at_once() -> None:
    times = schedule(ThrottleState(limits_of(iops_total=10, iops_total_max=50)), [(READ, 1)] * 53)
    assert times[50] == 0.0
    assert times[51:] == pytest.approx([0.1, 0.2])


def test_a_longer_burst_goes_at_the_burst_rate_and_then_at_the_rate() -> None:
    state = ThrottleState(limits_of(iops_total=10, iops_total_max=100, iops_total_max_length=5))
    times = schedule(state, [(READ, 1)] * 700)
    by_second = rates(times, 1)
    # 500 operations fit into the bucket; while it is filled at 100 a second, ten a second leak out of it
    assert all(95 <= count <= 111 for count in by_second[:5])
    assert all(9 <= count <= 11 for count in by_second[6:])


def test_a_burst_can_be_had_again_after_a_pause() -> None:
    state = ThrottleState(limits_of(iops_total=10, iops_total_max=100, iops_total_max_length=2))
    schedule(state, [(READ, 1)] * 300)
    times = schedule(state, [(READ, 1)] * 150, start=10_000.0)
    assert times[-1] - times[0] < 2


def test_iops_size_makes_a_long_request_count_as_several() -> None:
    state = ThrottleState(limits_of(iops_total=10, iops_size=4096))
    # 1, then 2.5, then 1 operations
    assert schedule(state, [(READ, 4096), (READ, 10240), (READ, 0), (READ, 0)]) == pytest.approx([0, 0, 0.25, 0.35])


def test_a_negative_iops_size_is_beyond_every_request() -> None:
    # QEMU takes it, as an unsigned number
    state = ThrottleState(limits_of(iops_total=10, iops_size=-4096))
    assert schedule(state, [(READ, 1 << 40)] * 3) == pytest.approx([0, 0, 0.1])


# --- several limits ------------------------------------------------------------------------------


def test_reads_and_writes_fill_a_total_together() -> None:
    state = ThrottleState(limits_of(iops_total=10))
    assert schedule(state, [(READ, 1), (WRITE, 1), (READ, 1), (WRITE, 1)]) == pytest.approx([0, 0, 0.1, 0.2])


def test_a_limit_of_reads_leaves_writes_alone() -> None:
    state = ThrottleState(limits_of(iops_read=10, bps_write=1 << 40))
    schedule(state, [(READ, 1)] * 20)
    assert state.wait(READ, 0.0) > 0
    assert not state.wait(WRITE, 0.0)
    assert ThrottleState(limits_of(iops_read=10)).is_limited(READ)
    assert not ThrottleState(limits_of(iops_read=10)).is_limited(WRITE)


def test_the_fullest_bucket_decides() -> None:
    state = ThrottleState(limits_of(iops_total=10, bps_total=1000))
    state.charge(READ, 2000, 0.0)
    assert state.wait(READ, 0.0) == pytest.approx(1.9)
    for _ in range(50):
        state.charge(READ, 0, 0.0)
    assert state.wait(READ, 0.0) == pytest.approx(5.0)


# --- properties ----------------------------------------------------------------------------------


@st.composite
def one_limit(draw: st.DrawFn) -> Limits:
    name = draw(st.sampled_from(["iops_total", "bps_total"]))
    rate = draw(st.integers(1, 10**6))
    given = {name: rate}
    if draw(st.booleans()):
        given[f"{name}_max"] = rate * draw(st.integers(1, 20))
        given[f"{name}_max_length"] = draw(st.integers(1, 30))
    return limits_of(**given)


#: direction, size, and how long after the one before it comes (as a part of what the rate lets through in a second)
_ARRIVALS = st.lists(
    st.tuples(st.sampled_from([READ, WRITE]), st.integers(0, 1 << 20), st.sampled_from([0.0, 0.0, 0.001, 0.7, 90.0])),
    max_size=60,
)


def passed(limits: Limits, arrivals: list[tuple[int, int, float]], start: float) -> list[tuple[float, float]]:
    """When each of *arrivals* goes, and what it costs."""
    state, now, found = ThrottleState(limits), start, []
    for direction, size, pause in arrivals:
        now += pause
        while delay := state.wait(direction, now):
            now += delay
        state.charge(direction, size, now)
        found.append((now, float(size) if limits["bps-total"] else 1.0))
    return found


@settings(derandomize=True, deadline=None, max_examples=300)
@given(one_limit(), _ARRIVALS, st.sampled_from([0.0, 1e6]))
def test_no_stretch_of_time_lets_more_through_than_the_rate_and_one_burst(
    limits: Limits, arrivals: list[tuple[int, int, float]], start: float
) -> None:
    name = "bps-total" if limits["bps-total"] else "iops-total"
    rate, maximum, length = limits[name], limits[f"{name}-max"], limits[f"{name}-max-length"]
    allowances = [(rate, maximum * length if maximum else rate / 10)]
    if length > 1:
        allowances.append((maximum, maximum / 10))
    found = passed(limits, arrivals, start)
    for first in range(len(found)):
        total = 0.0
        for time, cost in found[first:]:
            # what went before this request, which may itself be of any size
            for per_second, at_once in allowances:
                allowed = at_once + per_second * (time - found[first][0])
                assert total <= allowed * (1 + 1e-9) + per_second * 1e-6
            total += cost


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(1, 10**6), st.lists(st.integers(0, 1 << 20), min_size=1, max_size=60))
def test_nobody_waits_longer_than_the_rate_asks_for(rate: int, sizes: list[int]) -> None:
    times = schedule(ThrottleState(limits_of(bps_total=rate)), [(READ, size) for size in sizes])
    for index, time in enumerate(times):
        assert time == pytest.approx(max(sum(sizes[:index]) / rate - 0.1, 0.0), rel=1e-6, abs=1e-6)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(one_limit(), _ARRIVALS, st.sampled_from([0.0, 1e6]))
def test_sleeping_as_long_as_told_is_enough(
    limits: Limits, arrivals: list[tuple[int, int, float]], start: float
) -> None:
    state, now = ThrottleState(limits), start
    for direction, size, _ in arrivals:
        # once for the rate, once for what limits bursts
        for _ in range(2):
            now += state.wait(direction, now)
        assert not state.wait(direction, now)
        state.charge(direction, size, now)


# --- what limits may be --------------------------------------------------------------------------

TOGETHER = "bps/iops/max total values and read/write values cannot be used at the same time"
REFUSED = [
    ({"iops-total": 1, "iops-read": 1}, TOGETHER),
    ({"iops-total": 1, "iops-write": 1}, TOGETHER),
    ({"bps-total": 1, "bps-write": 1}, TOGETHER),
    ({"bps-total-max": 1, "bps-read-max": 1}, TOGETHER),
    ({"iops-total": -1, "iops-read": -1}, TOGETHER),
    ({"iops-size": 4096, "bps-total": 1}, "iops size requires an iops value to be set"),
    ({"iops-total": -1}, "bps/iops/max values must be within [0, 1000000000000000]"),
    ({"iops-total": 10**15 + 1}, "bps/iops/max values must be within [0, 1000000000000000]"),
    ({"iops-total": 1, "iops-total-max": 10**15 + 1}, "bps/iops/max values must be within [0, 1000000000000000]"),
    ({"iops-total": 1, "iops-total-max-length": 0}, "the burst length cannot be 0"),
    ({"iops-total": 1, "iops-total-max-length": 2}, "burst length set without burst rate"),
    ({"iops-total": 1, "iops-total-max-length": -1}, "burst length set without burst rate"),
    (
        {"iops-total": 1, "iops-total-max": 2, "iops-total-max-length": 2**32},
        "iops-total-max-length value must be in the range [0, 4294967295]",
    ),
    (
        {"iops-total": 1, "iops-total-max": 2, "iops-total-max-length": -1},
        "burst length too high for this burst rate",
    ),
    (
        {"iops-total": 1, "iops-total-max": 10**10, "iops-total-max-length": 100001},
        "burst length too high for this burst rate",
    ),
    ({"bps-read-max": 1}, "bps_max/iops_max require corresponding bps/iops values"),
    ({"bps-read": 2, "bps-read-max": 1}, "bps_max/iops_max cannot be lower than bps/iops"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=str)
def test_limits_that_contradict_each_other_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError) as refused:
        changed_limits(NO_LIMITS, convert(change, ThrottleLimits))
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"iops_total": 10**15},
        {"iops_read": 1, "iops_write": 2, "bps_total": 3},
        {"iops_total": 1, "iops_total_max": 1, "iops_total_max_length": 2**32 - 1},
        {"iops_total": 1, "iops_total_max": 10**10, "iops_total_max_length": 100000},
        {"iops_total": 1, "iops_size": 1},
    ],
    ids=str,
)
def test_limits_that_make_sense_are_taken(given: dict[str, Any]) -> None:
    limits = limits_of(**given)
    assert limits == {**NO_LIMITS, **{name.replace("_", "-"): value for name, value in given.items()}}


def test_what_a_change_leaves_out_stays() -> None:
    limits = changed_limits(limits_of(iops_total=10, iops_total_max=20), ThrottleLimits(bps_total=5))
    assert {name: limits[name] for name in ("iops-total", "iops-total-max", "bps-total")} == {
        "iops-total": 10,
        "iops-total-max": 20,
        "bps-total": 5,
    }


def test_a_refused_change_changes_nothing() -> None:
    limits = limits_of(iops_total=10)
    with pytest.raises(OptionError):
        changed_limits(limits, ThrottleLimits(iops_read=1))
    assert limits == limits_of(iops_total=10)
