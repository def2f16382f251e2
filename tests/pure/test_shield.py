"""Finishing what was begun."""

from __future__ import annotations

import outcome
import pytest
import trio

from fusebd.block.shield import shielded


async def steps(number: int, done: list[int]) -> str:
    for step in range(number):
        await trio.lowlevel.checkpoint()
        done.append(step)
    return "end"


@pytest.mark.parametrize("number", [0, 1, 3])
async def test_what_is_shielded_is_finished(number: int) -> None:
    done: list[int] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        assert await shielded(steps(number, done)) == "end"
        assert done == list(range(number))
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


async def test_a_wait_that_would_be_cancelled_at_once_is_not() -> None:
    event = trio.Event()
    with trio.move_on_after(0) as scope:
        async with trio.open_nursery() as nursery:
            with trio.CancelScope(shield=True):
                nursery.start_soon(set_later, event)
            await shielded(event.wait())
            assert event.is_set()
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


async def set_later(event: trio.Event) -> None:
    with trio.CancelScope(shield=True):
        await trio.sleep(0.01)
    event.set()


async def test_what_does_not_suspend_does_not() -> None:
    with trio.testing.assert_no_checkpoints():
        assert await shielded(steps(0, [])) == "end"


async def test_errors_come_out_and_the_scope_is_left() -> None:
    async def fail(number: int) -> None:
        await steps(number, [])
        raise ValueError("no")

    for number in (0, 2):
        with pytest.raises(ValueError, match="no"):
            await shielded(fail(number))
    with trio.move_on_after(0) as scope:
        await trio.sleep(1)
    assert scope.cancelled_caught


async def test_an_error_in_a_wait_reaches_what_waits() -> None:
    async def wait() -> str:
        try:
            await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        except KeyError:
            return "caught"
        return "not"

    task = trio.lowlevel.current_task()
    trio.lowlevel.current_trio_token().run_sync_soon(trio.lowlevel.reschedule, task, outcome.Error(KeyError()))
    assert await shielded(wait()) == "caught"
