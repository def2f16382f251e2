"""One daemon from its start to its end: graph, exports, QMP and signals in one nursery.

Start: whatever the program asks for is set up; any failure undoes what was there.  End, whatever the cause: clients
hear of it (SHUTDOWN), everything is unmounted, every node is flushed and closed.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import resource
import signal
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from fusebd.block.export import Exports
from fusebd.block.graph import Graph
from fusebd.block.jobs import Jobs
from fusebd.errors import UsageError, single_error
from fusebd.eventlog import EventLog
from fusebd.qmp.server import QmpServer

log = logging.getLogger(__name__)

#: why a daemon ends, in the words of QAPI's ShutdownCause
QUIT, SIGNAL, UNMOUNTED, FAILED = "host-qmp-quit", "host-signal", "host-ui", "host-error"

#: what a daemon listens to
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Engine:
    """What a program that serves nodes consists of, once it runs.

    Its tasks are of two kinds: clients in ``nursery`` hear of the end, servers in ``serving`` are ended then.
    """

    def __init__(self, graph: Graph, nursery: trio.Nursery, serving: trio.Nursery) -> None:
        self.graph = graph
        self.nursery = nursery
        self.serving = serving
        self.exports = Exports(graph, serving)
        self.jobs = Jobs(serving, graph.emit)
        services = {Exports: self.exports, Jobs: self.jobs}
        self.qmp = QmpServer(graph, quit=partial(self.stop, QUIT), services=services)
        self.reason = UNMOUNTED
        self.failure: str | None = None
        self._stopped = trio.Event()
        self._starting = trio.CancelScope()
        EventLog(graph)
        graph.failure_listeners.append(self.fail)

    def stop(self, reason: str) -> None:
        """End; the first *reason* counts.  A start that is under way is given up."""
        if not self._stopped.is_set():
            self.reason = reason
            self._stopped.set()
            self._starting.cancel()

    def fail(self, failure: str) -> None:
        """End, and say that *failure* went wrong."""
        if not self._stopped.is_set():
            self.failure = failure
        self.stop(FAILED)

    async def _run(self, start: Start) -> None:
        with self._starting:
            await start(self)
        if self._starting.cancelled_caught:
            raise UsageError(self.failure or "ended by a signal before it served")
        # What is there now stays: without it, the collector comes early and quickly for nodes that have been removed.
        gc.collect()
        gc.freeze()
        await self._stopped.wait()
        log.info("ending (%s)", self.reason)
        self.jobs.dismiss_all()
        await self.qmp.announce_shutdown(self.reason)

    async def _watch_signals(self, *, hangup: bool, task_status: trio.TaskStatus[None]) -> None:
        """SIGTERM and SIGINT end the daemon; SIGHUP does with *hangup*: the terminal has gone away.

        They may be blocked until then, and are so afterwards: a second one must not cut short what the first began.
        """
        with trio.open_signal_receiver(*SIGNALS) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            task_status.started()
            try:
                async for number in signals:
                    if number != signal.SIGHUP or hangup:
                        log.info("%s received", signal.Signals(number).name)
                        self.stop(SIGNAL)
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


Start = Callable[[Engine], Awaitable[None]]


async def run_engine(start: Start, *, hangup: bool) -> str | None:
    """Have *start* set up an engine, and run that until it is told to end.

    The result is what went wrong at the end, None if nothing.  *hangup*: end at SIGHUP, too.  Raises FusebdError if
    *start* does; nothing is mounted then.
    """
    _raise_descriptor_limit()
    graph = Graph()
    try:
        with single_error():
            async with trio.open_nursery() as nursery:
                async with trio.open_nursery() as serving:
                    engine = Engine(graph, nursery, serving)
                    await nursery.start(partial(engine._watch_signals, hangup=hangup))
                    await engine._run(start)
                    graph.stop_delaying()
                    serving.cancel_scope.cancel()
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await graph.close()
    failures = [engine.failure] if engine.failure else []
    return "; ".join([*failures, *graph.close_failures]) or None


def _raise_descriptor_limit() -> None:
    """Every node needs a descriptor or more; the soft limit is a default for programs that use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
