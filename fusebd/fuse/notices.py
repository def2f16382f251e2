"""What the kernel is told without having asked, in the order in which it comes up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class Notices(Generic[T]):
    """A queue of notices, which a thread hands to the kernel: that may need answers from us before it has taken one.

    *prepare* gets notices, without repetitions, and returns what that thread has to do.
    """

    def __init__(self, prepare: Callable[[Iterable[T]], Callable[[], None]]) -> None:
        self._prepare = prepare
        self._waiting: dict[T, None] = {}
        self._arrived = trio.Event()
        self._given = self._taken = 0
        self._progress = trio.Event()
        #: a thread is at it, perhaps one that nobody waits for any more
        self.under_way = False

    def give(self, notice: T) -> None:
        """Have the kernel told; returns at once."""
        self._waiting[notice] = None
        self._given += 1
        self._arrived.set()

    async def wait_taken(self) -> bool:
        """Wait until the kernel has dealt with what was given up to now; whether nothing came after it."""
        given = self._given
        while self._taken < given:
            await self._progress.wait()
        return self._taken == self._given

    async def send(self, scope: trio.CancelScope) -> None:
        """Tell the kernel whatever is given, until *scope* is cancelled."""
        limiter = trio.CapacityLimiter(1)
        with scope:
            while True:
                await self._arrived.wait()
                self._arrived = trio.Event()
                notices, self._waiting = self._waiting, {}
                given = self._given
                await trio.lowlevel.checkpoint_if_cancelled()  # from here on, the thread is sure to start
                self.under_way = True
                await trio.to_thread.run_sync(
                    self._tell, self._prepare(notices), abandon_on_cancel=True, limiter=limiter
                )
                self._advance(given)

    def _tell(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        finally:
            self.under_way = False

    def end(self) -> None:
        """Nobody takes notices any more: let go who waits for that."""
        self._advance(self._given)

    def _advance(self, taken: int) -> None:
        self._taken = taken
        progress, self._progress = self._progress, trio.Event()
        progress.set()
