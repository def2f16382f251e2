"""The requests that breakpoints of one blkdebug node hold, and who waits for one to be held.

A breakpoint that is reached gives the request one *stop*, under the breakpoint's tag; the request goes on when all of
its stops have been resumed.  Whoever waits for a tag gets the stop, even if somebody else resumes it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import trio

from fusebd.block.caller import Asked, current_request
from fusebd.block.options import Json
from fusebd.errors import CommandError


@dataclass(slots=True, eq=False)
class Stop:
    """A request that is held as *tag*; *number* is that of the stop among all of the node, *since* in seconds.

    *asked* and *pid* are those of the client's request; None and 0 if none is known.
    """

    number: int
    tag: str
    event: str
    asked: Asked | None
    pid: int
    since: float
    resumed: trio.Event = field(default_factory=trio.Event)

    def describe(self) -> dict[str, Json]:
        """What is held, and where."""
        asked = {} if self.asked is None else self.asked._asdict()
        return {"request": self.number, "tag": self.tag, "event": self.event, **asked, "pid": self.pid}


@dataclass(slots=True, eq=False)
class _Waiter:
    tag: str
    woken: trio.Event = field(default_factory=trio.Event)
    stop: Stop | None = None
    reason: str = ""


class Stops:
    """*announce* is told of each stop."""

    def __init__(self, announce: Callable[[Stop], None]) -> None:
        #: those that have not been resumed, the oldest first
        self.held: list[Stop] = []
        self._announce = announce
        self._numbered = 0
        self._waiters: list[_Waiter] = []

    async def hold(self, event: str, tags: Iterable[str]) -> None:
        """Suspend the request that announces *event* until it has been resumed as each of *tags*."""
        caller = current_request.get()
        asked, pid = (None, 0) if caller is None else (caller.asked(), caller.pid)
        stops = []
        for tag in tags:
            self._numbered += 1
            stops.append(Stop(self._numbered, tag, event, asked, pid, trio.current_time()))
        self.held += stops
        for stop in stops:
            self._announce(stop)
            for waiter in self._waiters:
                if waiter.tag == stop.tag and waiter.stop is None:
                    waiter.stop = stop
                    waiter.woken.set()
        try:
            for stop in stops:
                await stop.resumed.wait()
        finally:
            self.held = [stop for stop in self.held if stop not in stops]

    def find(self, tag: str, number: int | None = None) -> Stop | None:
        """The latest stop as *tag*, or the one with that *number*."""
        return next((s for s in reversed(self.held) if s.tag == tag and number in (None, s.number)), None)

    def resume(self, stop: Stop) -> None:
        """Let the request go, unless another stop holds it."""
        self.held.remove(stop)
        stop.resumed.set()

    def resume_all(self) -> None:
        """Let all requests go."""
        while self.held:
            self.resume(self.held[-1])

    async def wait(self, tag: str) -> Stop:
        """Suspend until a request is held as *tag*; the stop.  Raises CommandError if ``give_up`` is called."""
        stop = self.find(tag)
        if stop is not None:
            return stop
        waiter = _Waiter(tag)
        self._waiters.append(waiter)
        try:
            await waiter.woken.wait()
        finally:
            self._waiters.remove(waiter)
        if waiter.stop is None:
            raise CommandError(waiter.reason)
        return waiter.stop

    def give_up(self, reason: str, tag: str | None = None) -> None:
        """Nothing will be held any more as *tag* (None: as any): nobody is to wait for it."""
        for waiter in self._waiters:
            if tag in (None, waiter.tag) and waiter.stop is None:
                waiter.reason = reason
                waiter.woken.set()
