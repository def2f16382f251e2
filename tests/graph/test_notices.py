"""Notices for the kernel: none is lost, and who waits for them waits as long as it takes."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterable

import pytest
import trio
import trio.testing

from fusebd.fuse.notices import Notices


class Kernel:
    """Takes what it is told while ``gate`` is open."""

    def __init__(self) -> None:
        self.told: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.notices = Notices(self._prepare)

    def _prepare(self, notices: Iterable[str]) -> Callable[[], None]:
        def tell() -> None:
            self.gate.wait()
            self.told.append(list(notices))

        return tell


@pytest.fixture
async def kernel() -> AsyncIterator[Kernel]:
    kernel = Kernel()
    scope = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kernel.notices.send, scope)
        yield kernel
        kernel.gate.set()
        scope.cancel()


async def test_what_is_given_is_told_once_and_in_order(kernel: Kernel) -> None:
    for notice in ("a", "b", "a"):
        kernel.notices.give(notice)
    assert await kernel.notices.wait_taken()
    assert kernel.told == [["a", "b"]]


async def test_what_is_given_again_while_it_is_told_is_told_again(kernel: Kernel) -> None:
    kernel.gate.clear()
    kernel.notices.give("a")
    await trio.testing.wait_all_tasks_blocked()
    kernel.notices.give("a")
    kernel.gate.set()
    assert await kernel.notices.wait_taken()
    assert kernel.told == [["a"], ["a"]]


async def test_waiting_ends_with_what_was_given_before_it(kernel: Kernel) -> None:
    results: list[bool] = []

    async def wait() -> None:
        results.append(await kernel.notices.wait_taken())

    async with trio.open_nursery() as nursery:
        kernel.gate.clear()
        kernel.notices.give("a")
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert results == []
        kernel.notices.give("b")
        kernel.gate.set()
    assert results == [False]
    assert await kernel.notices.wait_taken()


async def test_nothing_to_wait_for_is_no_wait(kernel: Kernel) -> None:
    with trio.testing.assert_no_checkpoints():
        assert await kernel.notices.wait_taken()


async def test_the_end_lets_go_who_waits() -> None:
    kernel = Kernel()
    kernel.notices.give("a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kernel.notices.wait_taken)
        await trio.testing.wait_all_tasks_blocked()
        kernel.notices.end()
    assert kernel.told == []
