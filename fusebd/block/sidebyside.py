"""Requests to several nodes: in turn while they are answered at once, at the same time when they have to wait.

Nodes that wait for the host should do so together, but a nursery costs some ten microseconds, several times a request
that is served from memory.  So at first the requests are carried out one after the other in the task that they came
in.  When two of them had to wait, the next ones run side by side, until there are some of which no two had to.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator, Sequence
from types import coroutine
from typing import Any

import trio

from fusebd.errors import BlockIOError, single_error

Request = Coroutine[Any, Any, None]


class SideBySide:
    """Carries out requests of one kind, to the same nodes each time, and keeps in mind whether these wait."""

    __slots__ = ("_at_once",)

    def __init__(self) -> None:
        self._at_once = False

    async def outcomes(self, requests: Sequence[Request]) -> list[int]:
        """Carry out *requests*, coroutines that nobody has started: the errno that each fails with, 0 if it does not.

        Suspends where they do.  Raises what is no BlockIOError; every request has ended or is cancelled then.
        """
        if self._at_once:
            results = await _at_the_same_time(requests)
        else:
            results = []
            try:
                for request in requests:
                    results.append(await _watched(_outcome(request)))
            except BaseException:
                for request in requests:
                    request.close()  # those that were not reached yet
                raise
        self._at_once = sum(waited for _, waited in results) > 1
        return [errno for errno, _ in results]


async def _at_the_same_time(requests: Sequence[Request]) -> list[tuple[int, bool]]:
    """Carry out *requests*: of each the errno, and whether it suspended."""
    results = [(0, False)] * len(requests)

    async def carry_out(index: int) -> None:
        results[index] = await _watched(_outcome(requests[index]))

    with single_error():
        async with trio.open_nursery() as nursery:
            for index in range(1, len(requests)):
                nursery.start_soon(carry_out, index)
            await carry_out(0)
    return results


async def _outcome(request: Request) -> int:
    try:
        await request
    except BlockIOError as error:
        return error.errno
    return 0


@coroutine
def _watched(work: Coroutine[Any, Any, int]) -> Generator[Any, Any, tuple[int, bool]]:
    """Carry out *work*: its result, and whether it suspended."""
    try:
        trap = work.send(None)
    except StopIteration as done:
        return done.value, False
    while True:
        thrown: BaseException | None = None
        try:
            answer = yield trap
        except BaseException as error:
            thrown = error
        try:
            trap = work.send(answer) if thrown is None else work.throw(thrown)
        except StopIteration as done:
            return done.value, True
