"""Finishing what was begun, though the task is cancelled."""

from __future__ import annotations

import types
from collections.abc import Coroutine, Generator
from functools import partial
from typing import Any, TypeVar, cast

import trio

T = TypeVar("T")


@types.coroutine
def shielded(coro: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """*coro*, shielded from cancellation.

    The scope that this takes is entered at the first suspension, if there is one: it costs as much as ten calls.
    """
    try:
        trap = coro.send(None)
    except StopIteration as stop:
        return cast(T, stop.value)
    with trio.CancelScope(shield=True):  # noqa: ASYNC100 - it is left by a yield
        result = yield from _rest(coro, trap)
    return result


def _rest(coro: Coroutine[Any, Any, T], trap: Any) -> Generator[Any, Any, T]:
    """Run *coro*, which has suspended with *trap*, to its end."""
    while True:
        try:
            resume = partial(coro.send, (yield trap))
        except BaseException as error:
            resume = partial(coro.throw, error)
        try:
            trap = resume()
        except StopIteration as stop:
            return cast(T, stop.value)
