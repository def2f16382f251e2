"""A lock for the request path: unlike ``trio.Lock`` it does not suspend when it is free."""

from __future__ import annotations

from collections import deque
from types import TracebackType

import trio


class Mutex:
    """A fair lock that does not suspend when it is free.

    ``async with mutex``.  Only the task that waits can be woken, in the order of arrival.
    """

    __slots__ = ("_held", "_waiting")

    def __init__(self) -> None:
        self._held = False
        self._waiting: deque[trio.Event] = deque()

    async def __aenter__(self) -> None:
        if not self._held:
            self._held = True
            return
        turn = trio.Event()
        self._waiting.append(turn)
        try:
            await turn.wait()
        except BaseException:
            if turn.is_set():
                self.release()
            else:
                self._waiting.remove(turn)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let the next in turn have it: the lock is never free while somebody waits."""
        if self._waiting:
            self._waiting.popleft().set()
        else:
            self._held = False
