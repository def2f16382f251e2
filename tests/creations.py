"""Images made by blockdev-create, of fusebd and of a qemu-storage-daemon, and jobs followed to their end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from mounting import Qmp
from qmptalk import Talk, talking

from fusebd.block.graph import Graph
from fusebd.block.jobs import Jobs
from fusebd.qmp.server import QmpServer

Json = Any


@asynccontextmanager
async def daemon() -> AsyncIterator[tuple[Graph, Talk]]:
    """A graph without nodes, and its monitor, which knows jobs."""
    graph = Graph()
    try:
        async with trio.open_nursery() as nursery:
            server = QmpServer(graph, lambda: None, services={Jobs: Jobs(nursery, graph.emit)})
            async with talking(server) as talk:
                yield graph, talk
            nursery.cancel_scope.cancel()
    finally:
        await graph.close()


async def finished(talk: Talk, job: str) -> Json:
    """What query-jobs says of *job* once it has concluded; it is dismissed then."""
    while (found := next(j for j in await talk.execute("query-jobs") if j["id"] == job))["status"] != "concluded":
        await trio.sleep(0.01)
    await talk.execute("job-dismiss", id=job)
    return found


async def create(talk: Talk, **options: Json) -> Json:
    """The error of the job that makes what *options* say, None if it makes it."""
    await talk.execute("blockdev-create", job_id="making", options=options)
    return (await finished(talk, "making")).get("error")


#: what QEMU says where it fails to measure how many iterations a password of LUKS gets: on a busy machine
_BUSY = "Unable to get accurate CPU usage"


def job_by_qemu(monitor: Qmp, command: str, **arguments: Json) -> str | None:
    """The error of *command*, or of the job that it starts."""
    while True:
        answer = monitor.ask({"execute": command, "arguments": {"job-id": "working", **arguments}})
        if "error" in answer:
            error: str | None = answer["error"]["desc"]
            return error
        while (job := monitor("query-jobs")[0])["status"] != "concluded":
            pass
        monitor("job-dismiss", {"id": "working"})
        error = job.get("error")
        if error != _BUSY:
            return error


def node(path: Path, name: str = "image") -> Json:
    return {"driver": "file", "node-name": name, "filename": path.name}
