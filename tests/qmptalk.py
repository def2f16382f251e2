"""A QMP client for tests: over memory streams to a server in the same process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
import trio.testing

from fusebd.block.graph import Graph
from fusebd.qmp.server import QmpServer

Json = Any


class Talk:
    """One conversation.  Messages are read one by one; events stay in ``events`` when an answer is waited for."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.events: list[Json] = []
        self._data = b""

    async def read(self) -> Json:
        """The next message; None at the end."""
        while b"\r\n" not in self._data:
            more = await self.stream.receive_some(65536)
            if not more:
                return None
            self._data += more
        line, _, self._data = self._data.partition(b"\r\n")
        return json.loads(line)

    async def answer(self) -> Json:
        """The next message that is no event."""
        while "event" in (message := await self.read()):
            self.events.append(message)
        return message

    async def send(self, request: Json) -> None:
        await self.stream.send_all(request if isinstance(request, bytes) else json.dumps(request).encode())

    async def ask(self, request: Json) -> Json:
        """The whole answer to *request*."""
        await self.send(request)
        return await self.answer()

    async def execute(self, command: str, **arguments: Json) -> Json:
        """What *command* returns; a failure is an AssertionError.  ``_`` in argument names stands for ``-``."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        answer = await self.ask({"execute": command, "arguments": given})
        assert "return" in answer, answer
        return answer["return"]

    async def fail(self, command: str, **arguments: Json) -> str:
        """The description of the error that *command* ends with."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        answer = await self.ask({"execute": command, "arguments": given})
        return str(answer["error"]["desc"])

    async def negotiate(self, *enable: str) -> None:
        greeting = await self.read()
        assert "QMP" in greeting
        assert await self.execute("qmp_capabilities", enable=list(enable)) == {}


@asynccontextmanager
async def talking(server: QmpServer, *enable: str, negotiate: bool = True) -> AsyncIterator[Talk]:
    """A client of *server* for as long as the context lasts."""
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs)
        talk = Talk(ours)
        if negotiate:
            await talk.negotiate(*enable)
        yield talk
        await ours.aclose()


def disk(path: Path, **options: Json) -> Json:
    """The qcow2 image *path* as node ``disk``, as blockdev-add takes it."""
    return {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": str(path)}, **options}


@asynccontextmanager
async def monitor(path: Path, **options: Json) -> AsyncIterator[tuple[Graph, Talk]]:
    """A graph that has the image as node ``disk``, and its monitor."""
    graph = Graph()
    try:
        await graph.blockdev_add(disk(path, **options))
        async with talking(QmpServer(graph, lambda: None)) as talk:
            yield graph, talk
    finally:
        await graph.close()
