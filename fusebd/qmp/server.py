"""QMP for clients: on Unix and TCP sockets, and on standard input and output.

Each client has three tasks: one reads requests, one carries them out in turn, one sends.  The reader stops when
``REQUEST_QUEUE`` requests wait; the next request is carried out when the answer to the one before is sent; a client
that leaves ``EVENT_QUEUE`` events unread is dropped.  So no client holds up another, or takes memory without end.

Behaviour: QEMU monitor/qmp.c.  A socket gives whoever can connect the rights of the daemon: Unix sockets are made
with mode 0600.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import trio
from msgspec import UNSET

from fusebd.block.graph import Graph
from fusebd.block.options import Json
from fusebd.errors import CommandError, FusebdError, OpenError, UsageError
from fusebd.qmp import events
from fusebd.qmp.codec import Decoder, encode
from fusebd.qmp.commands import COMMANDS
from fusebd.qmp.monitor import Monitor
from fusebd.qmp.table import CommandTable, Context

log = logging.getLogger(__name__)

#: requests of a client that may wait for their turn (QEMU: QMP_REQ_QUEUE_LEN_MAX)
REQUEST_QUEUE = 8
#: events that may wait for a client to read them
EVENT_QUEUE = 4096
#: bytes read at a time: parsing them holds up the other tasks
_READ_SIZE = 16384
#: seconds that clients get to take what is still to be sent when the daemon ends
_GOODBYE = 1.0
#: connections that may wait to be accepted: clients that do not wait for a connection are refused at once beyond it
_BACKLOG = 128


class QmpServer:
    """Answers QMP clients about *graph*, and tells them of its events.

    *quit* is called, once the client has its answer, when one asks the daemon to end.  *table* has the commands,
    *services* what they need beside the graph, by type.
    """

    def __init__(
        self,
        graph: Graph,
        quit: Callable[[], None],  # noqa: A002 - the command's name
        *,
        table: CommandTable = COMMANDS,
        services: Mapping[type, Any] | None = None,
    ) -> None:
        self.graph = graph
        self.table = table
        self.services = services or {}
        self._quit = quit
        self._clients: set[_Client] = set()
        self._shutdown_announced = False
        graph.event_listeners.append(self.broadcast)

    # -- events ---------------------------------------------------------------------------------

    def broadcast(self, event: str, data: dict[str, Any]) -> None:
        """Send *event* to every client that has negotiated capabilities.  Never waits."""
        message = events.message(event, data)
        for client in list(self._clients):
            client.offer_event(message)

    def _shutdown_event(self, reason: str) -> None:
        if not self._shutdown_announced:
            self._shutdown_announced = True
            self.broadcast("SHUTDOWN", {"guest": False, "reason": reason})

    async def announce_shutdown(self, reason: str = "host-signal") -> None:
        """Tell all clients that the daemon ends, and let them take what is still to be sent, for a second at most.

        *reason* is a word of QAPI's ShutdownCause.  The first announcement counts.
        """
        self._shutdown_event(reason)
        with trio.move_on_after(_GOODBYE):
            for client in list(self._clients):
                await client.outbox.wait_sent()

    # -- ways in --------------------------------------------------------------------------------

    async def listen(self, address: str, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve clients at *address*, ``unix:PATH`` or ``HOST:PORT``, until cancelled.

        Reports the address as started (with the port that was taken, if 0 was asked for); a socket file is removed
        at the end.  Raises OpenError, UsageError.
        """
        if address.startswith("unix:"):
            path = address.removeprefix("unix:")
            if not path:
                raise UsageError(f"'{address}' is not an address: expected unix:PATH or HOST:PORT")
            with unix_listener(path, address) as listening:
                await trio.serve_listeners(
                    self.serve_stream, [trio.SocketListener(listening)], task_status=_Started(task_status, address)
                )
        host, port = parse_host_port(address)
        try:
            listeners = await trio.open_tcp_listeners(port, host=host)
        except OSError as error:
            raise OpenError(f"{address}: {error.strerror or error}", errno=error.errno) from None
        taken = listeners[0].socket.getsockname()[1]
        name = f"[{host}]:{taken}" if ":" in host else f"{host}:{taken}"
        await trio.serve_listeners(self.serve_stream, listeners, task_status=_Started(task_status, name))

    async def serve_stdio(self) -> None:
        """Serve the one client at standard input and output, until its end of file."""
        await self.serve_stream(StdioStream())

    async def serve_stream(self, stream: trio.abc.Stream, *, pretty: bool = False) -> None:
        """Serve the client at the other end of *stream*, until it goes away; closes *stream*.

        *pretty*: what is sent is for people to read, too.
        """
        client = _Client(self, stream, pretty=pretty)
        self._clients.add(client)
        try:
            await client.serve()
        finally:
            self._clients.discard(client)
            await trio.aclose_forcefully(stream)

    # -- commands -------------------------------------------------------------------------------

    async def answer(self, client: _Client, value: Json) -> None:
        """Carry out the request *value* (an OptionError where it was malformed) and send the answer."""
        quitting = False

        def on_quit() -> None:
            nonlocal quitting
            quitting = True
            self._shutdown_event("host-qmp-quit")

        context = Context(self.graph, self.table, client.monitor, on_quit, self.services)
        try:
            if isinstance(value, FusebdError):
                value, malformed = UNSET, value
                raise malformed
            request = client.monitor.request(value)
            reply = client.monitor.success(value, await request.command.run(context, request.arguments))
        except FusebdError as error:
            reply = client.monitor.failure(value, error)
        except RecursionError:
            reply = client.monitor.failure(value, CommandError("JSON nesting depth limit exceeded"))
        except Exception as error:
            log.exception("QMP command failed unexpectedly: %.1000r", value)
            reply = client.monitor.failure(value, CommandError(f"Internal error: {type(error).__name__}: {error}"))
        await client.outbox.send(client.encode(reply))
        if quitting:
            self._quit()


class _Started(trio.TaskStatus[Any]):
    """Passes "started" on with the address instead of trio's listeners."""

    def __init__(self, task_status: trio.TaskStatus[str], address: str) -> None:
        self._task_status, self._address = task_status, address

    def started(self, value: Any = None) -> None:
        self._task_status.started(self._address)


# --- one client ----------------------------------------------------------------------------------


class _Outbox:
    """What is to be sent to one client, in order."""

    def __init__(self) -> None:
        self.closed = False
        self._waiting: deque[bytes] = deque()
        self._sending = False
        self._filled = trio.Event()
        self._sent = trio.Event()
        self._sent.set()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, data: bytes) -> None:
        """Add *data*; never waits."""
        if self.closed:
            return
        self._waiting.append(data)
        self._filled.set()
        if self._sent.is_set():
            self._sent = trio.Event()

    async def send(self, data: bytes) -> None:
        """Add *data*, and wait until all there is has been sent, or cannot be any more."""
        self.put(data)
        await self.wait_sent()

    async def wait_sent(self) -> None:
        """Wait until all there is has been sent, or cannot be any more."""
        await self._sent.wait()

    async def run(self, stream: trio.abc.SendStream) -> None:
        """Send to *stream* whatever is added, until it breaks or ``close``."""
        try:
            while True:
                await self._filled.wait()
                data = b"".join(self._waiting)
                self._waiting.clear()
                self._filled = trio.Event()
                await stream.send_all(data)
                if not self._waiting:
                    self._sent.set()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client has gone; the reader notices too
        finally:
            self.close()

    def close(self) -> None:
        """Nothing will be sent any more."""
        self.closed = True
        self._waiting.clear()
        self._sent.set()


class _Client:
    """One client's conversation and its tasks."""

    def __init__(self, server: QmpServer, stream: trio.abc.Stream, *, pretty: bool) -> None:
        self.monitor = Monitor(server.table)
        self.encode = partial(encode, pretty=pretty)
        self.outbox = _Outbox()
        self._server = server
        self._stream = stream
        self._limiter = events.RateLimiter()
        self._limited = trio.Event()
        self._io = trio.CancelScope()
        self._queue_in: trio.MemorySendChannel[Json]
        self._queue_out: trio.MemoryReceiveChannel[Json]
        self._queue_in, self._queue_out = trio.open_memory_channel(REQUEST_QUEUE)

    async def serve(self) -> None:
        """Until the client's end of file, when all its requests are answered; or until it is gone or dropped.

        A command that is under way then is carried out to its end.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._do_io)
            self.outbox.put(self.encode(self.monitor.greeting()))
            async for value in self._queue_out:
                await self._server.answer(self, value)
            self._io.cancel()

    async def _do_io(self) -> None:
        try:
            with self._io:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.outbox.run, self._stream)
                    nursery.start_soon(self._release_events)
                    await self._read()
                    self._queue_in.close()
                    await trio.sleep_forever()
        finally:
            self._queue_in.close()
            self.outbox.close()

    async def _read(self) -> None:
        decoder = Decoder()
        while True:
            try:
                data = await self._stream.receive_some(_READ_SIZE)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._io.cancel()
                return
            if not data:
                return
            for value in decoder.feed(bytes(data)):
                if self.monitor.oob and self.monitor.is_out_of_band(value):
                    await self._server.answer(self, value)
                else:
                    await self._queue_in.send(value)

    # -- events ---------------------------------------------------------------------------------

    def offer_event(self, message: Json) -> None:
        """Send the event *message*, now or later or, where others like it come after it, not at all."""
        if not self.monitor.wants_events or self.outbox.closed:
            return
        if self._limiter.offer(message, trio.current_time()):
            self._put_event(message)
        else:
            self._limited.set()

    def _put_event(self, message: Json) -> None:
        if len(self.outbox) >= EVENT_QUEUE:
            log.warning("QMP client dropped: it does not read its events")
            self._io.cancel()
            self.outbox.close()
            return
        self.outbox.put(self.encode(message))

    async def _release_events(self) -> None:
        while True:
            await self._limited.wait()
            self._limited = trio.Event()
            while (time := self._limiter.next_time) is not None:
                await trio.sleep_until(time)
                for message in self._limiter.due(trio.current_time()):
                    self._put_event(message)


# --- addresses and streams -----------------------------------------------------------------------


def parse_host_port(address: str) -> tuple[str, int]:
    """The host and port of ``HOST:PORT`` (``[::1]:4444`` for IPv6).  Raises UsageError."""
    host, colon, port = address.removeprefix("tcp:").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"'{address}' is not an address: expected unix:PATH or HOST:PORT")
    return host, int(port)


@contextmanager
def unix_listener(path: str, failure: str) -> Iterator[trio.socket.SocketType]:
    """A socket listening at *path*, for its owner alone.  What a daemon that was killed left there is replaced.

    Raises OpenError, whose text begins with *failure*.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # On Linux the socket's own mode becomes the file's, so there is no moment at which others can connect.
        os.fchmod(listening.fileno(), 0o600)
        try:
            _bind(listening, path)
            made = os.lstat(path)
            listening.listen(_BACKLOG)
        except OSError as error:
            # a name that is too long never reaches the kernel, and has no error number
            raise OpenError(f"{failure}: {error.strerror or error}", errno=error.errno) from None
        try:
            yield trio.socket.from_stdlib_socket(listening)
        finally:
            _remove(path, made)
    finally:
        listening.close()


def _bind(listening: socket.socket, path: str) -> None:
    try:
        listening.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or not _is_stale(path):
            raise
        os.unlink(path)
        listening.bind(path)


def _is_stale(path: str) -> bool:
    """Whether *path* is a socket that nobody listens at."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False  # a full backlog: somebody is there
        return False


def _remove(path: str, made: os.stat_result) -> None:
    """Remove the socket file *path*, unless somebody else's is there by now."""
    try:
        found = os.lstat(path)
        if (found.st_dev, found.st_ino) == (made.st_dev, made.st_ino):
            os.unlink(path)
    except FileNotFoundError:
        log.debug("%s: removed already", path)
    except OSError as error:
        log.warning("%s: could not be removed: %s", path, os.strerror(error.errno or 0))


class StdioStream(trio.abc.Stream):
    """Standard input and output, of whatever kind they are (a terminal, a pipe, a file).

    In threads, because making them non-blocking would do so for the other programs that have them open too.
    """

    def __init__(self, descriptor_in: int = 0, descriptor_out: int = 1) -> None:
        self._in, self._out = descriptor_in, descriptor_out

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Bytes of input, waiting for some; b"" at its end."""
        size = max_bytes or _READ_SIZE
        try:
            return await trio.to_thread.run_sync(os.read, self._in, size, abandon_on_cancel=True)
        except OSError as error:
            raise trio.BrokenResourceError from error

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of *data*, waiting as long as its reader takes."""
        rest = bytes(data)
        try:
            while rest:
                written = await trio.to_thread.run_sync(os.write, self._out, rest, abandon_on_cancel=True)
                rest = rest[written:]
        except OSError as error:
            raise trio.BrokenResourceError from error

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Nothing: the descriptors stay the program's."""
        await trio.lowlevel.checkpoint()
