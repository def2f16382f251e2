"""One daemon from its start to its end: graph, mount, QMP and signals in one nursery.

Start: the nodes are added, the QMP sockets listen, the directory is mounted; any failure undoes what was there.
End, whatever the cause: clients hear of it (SHUTDOWN), the directory is unmounted, every node is flushed and closed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
from collections.abc import Callable, Iterator
from functools import partial

import trio

from fusebd import __version__
from fusebd.block.driver import parse_blockdev
from fusebd.block.graph import Graph
from fusebd.errors import FusebdError, UsageError
from fusebd.eventlog import EventLog
from fusebd.fuse.mount import run_mount
from fusebd.fuse.mountpoint import check
from fusebd.qmp.server import QmpServer
from fusebd.settings import MountSettings

log = logging.getLogger(__name__)

#: called once, with the addresses where QMP clients are served
Ready = Callable[[list[str]], None]

#: why a daemon ends, in the words of QAPI's ShutdownCause
QUIT, SIGNAL, UNMOUNTED = "host-qmp-quit", "host-signal", "host-ui"


class _Stop:
    """The wish to end, and its first cause.  A start that is under way is given up."""

    def __init__(self) -> None:
        self.event = trio.Event()
        self.starting = trio.CancelScope()
        self.reason = UNMOUNTED

    def __call__(self, reason: str) -> None:
        if not self.event.is_set():
            self.reason = reason
            self.event.set()
            self.starting.cancel()


async def serve(settings: MountSettings, socket: str, ready: Ready) -> str | None:
    """Serve *settings* until told to end; QMP is on *socket* too.  What went wrong at the end, None if nothing.

    Calls *ready* with the QMP addresses when requests are served.  Raises FusebdError if it does not get that far;
    nothing is mounted then.
    """
    check(settings.mountpoint)
    _raise_descriptor_limit()
    graph = Graph()
    try:
        with _single_error():
            await _serve(settings, socket, ready, graph)
    finally:
        with trio.CancelScope(shield=True):
            await graph.close()
    return "; ".join(graph.close_failures) or None


async def _serve(settings: MountSettings, socket: str, ready: Ready, graph: Graph) -> None:
    stop = _Stop()
    EventLog(graph)
    qmp = QmpServer(graph, quit=partial(stop, QUIT))
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch_signals, stop, settings.foreground)
        async with trio.open_nursery() as mounting:
            with stop.starting:
                await _add_nodes(graph, settings)
                addresses = [await nursery.start(qmp.listen, f"unix:{socket}")]
                for address in settings.qmp:
                    if address == "stdio":
                        nursery.start_soon(qmp.serve_stdio)
                    else:
                        addresses.append(await nursery.start(qmp.listen, address))
                info = {"qmp": addresses[0], "pid": str(os.getpid()), "version": __version__}
                await mounting.start(partial(_mount, graph, settings, info, stop))
            if stop.starting.cancelled_caught:
                raise UsageError("ended by a signal before it served")
            log.info("%s: mounted", settings.mountpoint)
            ready(addresses)
            await stop.event.wait()
            log.info("%s: ending (%s)", settings.mountpoint, stop.reason)
            await qmp.announce_shutdown(stop.reason)
            mounting.cancel_scope.cancel()
        log.info("%s: unmounted", settings.mountpoint)
        nursery.cancel_scope.cancel()


async def _mount(
    graph: Graph,
    settings: MountSettings,
    info: dict[str, str],
    stop: _Stop,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """Serve the mount; where it ends by itself (it was unmounted from outside), the daemon ends."""
    await run_mount(
        graph,
        settings.mountpoint,
        transport=settings.transport,
        read_only=settings.read_only,
        allow_other=settings.allow_other,
        info=info,
        task_status=task_status,
    )
    stop(UNMOUNTED)


async def _add_nodes(graph: Graph, settings: MountSettings) -> None:
    for blockdev in settings.blockdevs:
        try:
            await graph.add(parse_blockdev(blockdev.parse()))
        except FusebdError as error:
            raise error.prefixed(blockdev.where(str(error))) from None


async def _watch_signals(stop: _Stop, foreground: bool, *, task_status: trio.TaskStatus[None]) -> None:
    """SIGTERM and SIGINT end the daemon; SIGHUP does in the foreground, where the terminal has gone away."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            if number != signal.SIGHUP or foreground:
                log.info("%s received", signal.Signals(number).name)
                stop(SIGNAL)


@contextlib.contextmanager
def _single_error() -> Iterator[None]:
    """Raise what a nursery packed into a group of one as itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None


def _raise_descriptor_limit() -> None:
    """Every node needs a descriptor or more; the soft limit is a default for programs that use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
