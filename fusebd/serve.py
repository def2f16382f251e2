"""``fusebd mount``: the nodes of one daemon as the files of one directory."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from fusebd import __version__
from fusebd.block.graph import Graph
from fusebd.block.options import Json
from fusebd.engine import UNMOUNTED, Engine, run_engine
from fusebd.errors import FusebdError
from fusebd.fuse.mount import run_mount
from fusebd.fuse.mountpoint import check
from fusebd.settings import Addition, MountSettings

log = logging.getLogger(__name__)

#: called once, with the addresses where QMP clients are served
Ready = Callable[[list[str]], None]


async def serve(settings: MountSettings, socket: str, ready: Ready) -> str | None:
    """Serve *settings* until told to end; QMP is on *socket* too.  What went wrong at the end, None if nothing.

    The nodes are added, the QMP sockets listen, the directory is mounted; then *ready* is called with the QMP
    addresses.  Raises FusebdError if it does not get that far; nothing is mounted then.
    """
    check(settings.mountpoint)

    async def start(engine: Engine) -> None:
        await _add(settings.objects, engine.graph.objects.add)
        await _add(settings.blockdevs, _adding(engine.graph, settings))
        addresses = [await engine.nursery.start(engine.qmp.listen, f"unix:{socket}")]
        for address in settings.qmp:
            if address == "stdio":
                engine.nursery.start_soon(engine.qmp.serve_stdio)
            else:
                addresses.append(await engine.nursery.start(engine.qmp.listen, address))
        info = {"qmp": addresses[0], "pid": str(os.getpid()), "version": __version__}
        await engine.serving.start(partial(_mount, engine, settings, info))
        log.info("%s: mounted", settings.mountpoint)
        ready(addresses)

    failure = await run_engine(start, hangup=settings.foreground)
    log.info("%s: unmounted", settings.mountpoint)
    return failure


async def _mount(
    engine: Engine, settings: MountSettings, info: dict[str, str], *, task_status: trio.TaskStatus[None]
) -> None:
    """Serve the mount; where it ends by itself (it was unmounted from outside), the daemon ends."""
    await run_mount(
        engine.graph,
        settings.mountpoint,
        transport=settings.transport,
        read_only=settings.read_only,
        allow_other=settings.allow_other,
        info=info,
        caches=settings.caches,
        task_status=task_status,
    )
    engine.stop(UNMOUNTED)


def _adding(graph: Graph, settings: MountSettings) -> Callable[[Json], Awaitable[object]]:
    """What adds a node."""
    if not settings.snapshot:
        return graph.blockdev_add
    from fusebd.block.throwaway import add_throwaway  # few mounts are such

    return partial(add_throwaway, graph)


async def _add(additions: list[Addition], add: Callable[[Json], Awaitable[object]]) -> None:
    for addition in additions:
        try:
            await add(addition.parse())
        except FusebdError as error:
            raise error.prefixed(addition.where(str(error))) from None
