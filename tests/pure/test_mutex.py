"""The lock of the request path."""

from __future__ import annotations

import random

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from fusebd.block.mutex import Mutex


async def test_a_free_one_is_taken_without_suspending() -> None:
    mutex = Mutex()
    for _ in range(3):
        with trio.testing.assert_no_checkpoints():
            async with mutex:
                pass


async def test_who_waits_gets_it_in_the_order_of_arrival() -> None:
    mutex, order = Mutex(), []

    async def user(number: int) -> None:
        async with mutex:
            order.append(number)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery, mutex:
        for number in range(5):
            nursery.start_soon(user, number)
            await trio.testing.wait_all_tasks_blocked()
    assert order == list(range(5))


async def test_nobody_waits_in_line_for_a_lock_that_is_free() -> None:
    """The one that was woken has not come to itself yet, and is still the next one."""
    mutex, order = Mutex(), []

    async def user() -> None:
        async with mutex:
            order.append("woken")

    async with trio.open_nursery() as nursery:
        await mutex.__aenter__()
        nursery.start_soon(user)
        await trio.testing.wait_all_tasks_blocked()
        mutex.release()
        for _ in range(3):
            with trio.testing.assert_no_checkpoints():
                async with mutex:
                    order.append("in passing")
        await mutex.__aenter__()
        await trio.testing.wait_all_tasks_blocked()
        assert order == ["in passing"] * 3
        mutex.release()
    assert order[-1] == "woken"


@pytest.mark.parametrize("released_first", [False, True])
async def test_one_that_is_cancelled_leaves_the_others_their_turn(released_first: bool) -> None:
    mutex, order, scope = Mutex(), [], trio.CancelScope()

    async def cancelled() -> None:
        with scope:
            async with mutex:
                order.append("cancelled")

    async def user() -> None:
        async with mutex:
            order.append("user")

    async with trio.open_nursery() as nursery:
        await mutex.__aenter__()
        for task in (cancelled, user):
            nursery.start_soon(task)
            await trio.testing.wait_all_tasks_blocked()
        if released_first:
            mutex.release()
            scope.cancel()
        else:
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            mutex.release()
    assert "user" in order


@given(st.integers(0, 1 << 32))
def test_it_excludes_and_lets_everybody_in(seed: int) -> None:
    dice, mutex = random.Random(seed), Mutex()
    inside, done = [0], []

    async def user(number: int) -> None:
        for _ in range(dice.randrange(4)):
            await trio.lowlevel.checkpoint()
        with trio.move_on_after(dice.choice([0, 0.001, 9])):
            async with mutex:
                inside[0] += 1
                assert inside[0] == 1
                try:
                    for _ in range(dice.randrange(3)):
                        await trio.lowlevel.checkpoint()
                finally:
                    inside[0] -= 1
        done.append(number)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(user, number)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert sorted(done) == list(range(12))
    assert not mutex._held
    assert not mutex._waiting
