"""Quorum nodes over memory, and the events that they are expected to send."""

from __future__ import annotations

import errno
import os
from collections.abc import Coroutine
from typing import Any

import trio
from support import READ_WRITE, Memory, memory_of, root_of

from fusebd.block.graph import Graph
from fusebd.block.root import Root
from fusebd.errors import BlockIOError

LENGTH = 65536
MEMORY = {"driver": "test-memory", "size": LENGTH}
Event = tuple[str, dict[str, Any]]
#: letters that stand for a child that fails
ERRNOS = {"E": errno.EIO, "N": errno.ENOMEM}


async def add(
    graph: Graph, children: str = "aaa", threshold: int = 2, *, fails: str = "read", **options: Any
) -> tuple[Root, list[Memory]]:
    """A node ``q`` over ``c0``, ``c1``, ...: a lower-case letter of *children* is what one is full of.

    An upper-case one is a child (full of ``a``) whose requests of the kind *fails* end with the errno it stands for.
    """
    memories = []
    for index, letter in enumerate(children):
        memory = f"m{index}" if letter in ERRNOS else f"c{index}"
        await graph.blockdev_add({**MEMORY, "node-name": memory})
        memories.append(memory_of(graph, memory))
        memories[-1].data[:] = content(letter)
        if letter in ERRNOS:
            await graph.blockdev_add({**failing(ERRNOS[letter], fails), "node-name": f"c{index}", "image": memory})
    names = [f"c{index}" for index in range(len(children))]
    quorum = {"driver": "quorum", "node-name": "q", "children": names, "vote-threshold": threshold}
    await graph.blockdev_add(quorum | {name.replace("_", "-"): value for name, value in options.items()})
    return root_of(graph, "q", READ_WRITE), memories


def content(letter: str) -> bytes:
    """What the child that *letter* stands for is full of."""
    return (b"a" if letter in ERRNOS else letter.encode()) * LENGTH


def failing(code: int, iotype: str) -> dict[str, Any]:
    """A blkdebug node, but for its image, whose requests of a kind fail."""
    return {"driver": "blkdebug", "inject-error": [{"event": "none", "iotype": iotype, "errno": code}]}


def listen(graph: Graph) -> list[Event]:
    """The events about quorums and mismatches that *graph* sends from now on."""
    found: list[Event] = []

    def listener(name: str, data: dict[str, Any]) -> None:
        if name.startswith(("QUORUM_", "BLKVERIFY_")):
            found.append((name, data))

    graph.event_listeners.append(listener)
    return found


def bad(index: int, operation: str = "read", sector: int = 0, sectors: int = 8, error: str | None = None) -> Event:
    """The event that reports the child *index*, which failed if *error* is given."""
    data: dict[str, Any] = {"type": operation, "node-name": f"c{index}", "sector-num": sector, "sectors-count": sectors}
    if error is not None:
        data["error"] = os.strerror(ERRNOS[error])
    return "QUORUM_REPORT_BAD", data


def failure(sector: int = 0, sectors: int = 8) -> Event:
    """The event that says that there is no quorum."""
    return "QUORUM_FAILURE", {"reference": "q", "sector-num": sector, "sectors-count": sectors}


async def outcome(request: Coroutine[Any, Any, None]) -> int:
    """The errno that *request* fails with, 0 if it does not."""
    try:
        await request
    except BlockIOError as error:
        return error.errno
    return 0


class Gate:
    """Makes requests of one kind on a memory node wait, ahead of their work, and counts those that do."""

    def __init__(self, memory: Memory, operation: str) -> None:
        self.waiting, self.opened = 0, trio.Event()
        self._carry_out = getattr(memory, operation)
        setattr(memory, operation, self._wait)
        memory.node.refresh_edges()

    async def _wait(self, *arguments: Any) -> None:
        self.waiting += 1
        await self.opened.wait()
        self.waiting -= 1
        await self._carry_out(*arguments)

    def open(self) -> None:
        """Let those that wait go on; the next ones wait again."""
        self.opened.set()
        self.opened = trio.Event()
