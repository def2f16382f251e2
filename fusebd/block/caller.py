"""Who asked: the request from outside on whose behalf the block layer is at work, as far as the way in knows it.

A way in (a FUSE transport) sets ``current_request`` once for the task that serves requests, to an object that knows
about the one at hand; so that a request costs nothing where nobody asks.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol


class Asked(NamedTuple):
    """What a request is for: an operation, in the ledger's words, and the bytes that it is about."""

    operation: str
    offset: int = 0
    length: int = 0


class Request(Protocol):
    """A request from outside."""

    @property
    def pid(self) -> int:
        """The process that made the request; 0 for the kernel itself, or if that is not known."""

    @property
    def uid(self) -> int:
        """The user of that process; -1 if that is not known."""

    def identity(self) -> dict[str, Any]:
        """What a record of the request says about it, as far as it is known: ``request`` (an id), ``pid``."""

    def asked(self) -> Asked:
        """What it is for, as the client has put it."""


current_request: ContextVar[Request | None] = ContextVar("current_request", default=None)
