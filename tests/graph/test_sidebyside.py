"""Requests in turn, and side by side when they wait."""

from __future__ import annotations

import errno

import pytest
import trio
import trio.testing

from fusebd.block.sidebyside import SideBySide
from fusebd.errors import BlockIOError, NotSupported


class Requests:
    """Makes requests that wait until ``opened``, or fail, or both; ``trace`` says what they did."""

    def __init__(self) -> None:
        self.opened = trio.Event()
        self.trace: list[str] = []

    async def make(self, name: str, *, waits: bool = False, error: Exception | None = None) -> None:
        self.trace.append(f"begin {name}")
        try:
            if waits:
                await self.opened.wait()
            if error is not None:
                raise error
        finally:
            self.trace.append(f"end {name}")


async def make_wait(side_by_side: SideBySide, requests: Requests) -> None:
    """Have *side_by_side* find out that requests wait."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(side_by_side.outcomes, [requests.make(name, waits=True) for name in "xy"])
        await trio.testing.wait_all_tasks_blocked()
        requests.opened.set()
    requests.opened = trio.Event()
    requests.trace.clear()


async def test_each_has_an_outcome_of_its_own() -> None:
    requests, side_by_side = Requests(), SideBySide()
    failing = BlockIOError(errno.ENOSPC), None, NotSupported(), BlockIOError()
    with trio.testing.assert_no_checkpoints():
        found = await side_by_side.outcomes([requests.make(str(i), error=error) for i, error in enumerate(failing)])
    assert found == [errno.ENOSPC, 0, errno.ENOTSUP, errno.EIO]
    assert requests.trace == [f"{what} {i}" for i in range(4) for what in ("begin", "end")]


async def test_those_that_wait_have_an_outcome_of_their_own() -> None:
    requests, side_by_side = Requests(), SideBySide()
    await make_wait(side_by_side, requests)
    failing = BlockIOError(errno.ENOSPC), None, NotSupported(), BlockIOError()
    found: list[list[int]] = []

    async def carry_out() -> None:
        made = [requests.make(str(i), waits=i != 1, error=error) for i, error in enumerate(failing)]
        found.append(await side_by_side.outcomes(made))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(carry_out)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(requests.trace) == ["begin 0", "begin 1", "begin 2", "begin 3", "end 1"]
        requests.opened.set()
    assert found == [[errno.ENOSPC, 0, errno.ENOTSUP, errno.EIO]]


@pytest.mark.parametrize(("waiting", "at_once"), [("", False), ("a", False), ("c", False), ("ac", True), ("abc", True)])
async def test_two_that_wait_are_a_reason_to_go_side_by_side(waiting: str, at_once: bool) -> None:
    requests, side_by_side = Requests(), SideBySide()
    for round_ in range(2):
        requests.opened = trio.Event()
        requests.trace.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side_by_side.outcomes, [requests.make(name, waits=name in waiting) for name in "abc"])
            await trio.testing.wait_all_tasks_blocked()
            begun = sum(line.startswith("begin") for line in requests.trace)
            in_turn = "abc".index(min(waiting)) + 1 if waiting else 3
            assert begun == (3 if round_ and at_once else in_turn)
            requests.opened.set()


async def test_when_they_do_not_wait_any_more_they_go_in_turn_again() -> None:
    requests, side_by_side = Requests(), SideBySide()
    await make_wait(side_by_side, requests)
    await side_by_side.outcomes([requests.make(name) for name in "ab"])
    with trio.testing.assert_no_checkpoints():
        await side_by_side.outcomes([requests.make(name) for name in "ab"])


@pytest.mark.parametrize("waited", [False, True])
async def test_what_is_no_failed_request_is_raised_as_itself(waited: bool) -> None:
    requests, side_by_side = Requests(), SideBySide()
    if waited:
        await make_wait(side_by_side, requests)
    broken = requests.make("b", error=ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        await side_by_side.outcomes([requests.make("a"), broken, requests.make("c", waits=True)])
    assert "begin b" in requests.trace
    assert requests.trace.count("begin c") == requests.trace.count("end c")


@pytest.mark.parametrize("waited", [False, True])
async def test_cancelled_they_have_all_ended(waited: bool) -> None:
    requests, side_by_side = Requests(), SideBySide()
    if waited:
        await make_wait(side_by_side, requests)
    with trio.move_on_after(0) as scope:
        await side_by_side.outcomes([requests.make(name, waits=True) for name in "ab"])
    assert scope.cancelled_caught
    assert requests.trace.count("begin a") == requests.trace.count("end a") == 1
    assert requests.trace.count("begin b") == requests.trace.count("end b") == waited
