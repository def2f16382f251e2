"""A lock for the request path: unlike ``trio.Lock`` it does not suspend when it is free."""

from __future__ import annotations

from collections import deque
from types import TracebackType

import trio


class Mutex:
    """A lock that does not suspend when it is free.  ``async with mutex``.

    Who comes while it is free has it, even if others have been woken for it and not got their turn yet; these go on
    waiting, ahead of all others.  Were it handed to them instead, everybody who came meanwhile would have to wait as
    well, and so on for as long as requests come: a convoy, in which each request takes a trip through the scheduler.
    """

    __slots__ = ("_held", "_waiting")

    def __init__(self) -> None:
        self._held = False
        self._waiting: deque[trio.Event] = deque()

    @property
    def held(self) -> bool:
        """Whether somebody has it."""
        return self._held

    async def __aenter__(self) -> None:
        place = len(self._waiting)
        while self._held:
            turn = trio.Event()
            self._waiting.insert(place, turn)
            place = 0
            try:
                await turn.wait()
            except BaseException:
                if turn.is_set():
                    self._wake()  # in place of this one
                else:
                    self._waiting.remove(turn)
                raise
        self._held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """It is free; who waits longest may try."""
        self._held = False
        self._wake()

    def _wake(self) -> None:
        if self._waiting and not self._held:
            self._waiting.popleft().set()
