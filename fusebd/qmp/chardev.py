"""Character devices for monitors: a socket that is listened at or connected to, or standard input and output.

Options: qemu(1), ``-chardev``; their text form has QEMU's older syntax, in which ``server`` is ``server=on``.
Behaviour and messages: QEMU chardev/char.c, chardev/char-socket.c.
"""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Annotated, Any, ClassVar

import trio
from msgspec import UNSET, Meta, UnsetType

from fusebd.block.identifiers import is_well_formed
from fusebd.block.options import OptionStruct, convert, declared_options, parse_keyval, type_keyval
from fusebd.errors import OpenError, OptionError, UsageError
from fusebd.qmp.server import StdioStream, unix_listener

#: talks to one client on a stream until that goes away, and closes the stream
Conversation = Callable[[trio.abc.Stream], Awaitable[None]]


class ChardevOptions(OptionStruct, frozen=True, kw_only=True):
    backend: str
    id: str


class StdioOptions(ChardevOptions, frozen=True, kw_only=True):
    signal: Annotated[bool, Meta(description="accepted, not used")] = True


class SocketOptions(ChardevOptions, frozen=True, kw_only=True):
    path: Annotated[str | UnsetType, Meta(description="path of a Unix socket")] = UNSET
    host: Annotated[str | UnsetType, Meta(description="address of a TCP socket")] = UNSET
    port: Annotated[str | UnsetType, Meta(description="port of a TCP socket")] = UNSET
    fd: Annotated[str | UnsetType, Meta(description="number of a descriptor that is a socket already")] = UNSET
    server: Annotated[bool, Meta(description="listen, instead of connecting")] = False
    wait: Annotated[bool | UnsetType, Meta(description="with server: wait for a client before going on")] = UNSET
    nodelay: Annotated[bool, Meta(description="accepted, not used")] = False


class Chardev(ABC):
    """A character device; ``in_use`` once a monitor has it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.in_use = False

    @abstractmethod
    async def open(self) -> None:
        """Get ready to talk.  Raises FusebdError."""

    @abstractmethod
    async def serve(self, conversation: Conversation) -> None:
        """Have *conversation* with whoever is at the other end, and with those who come after, one at a time."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what ``open`` made."""


class Stdio(Chardev):
    _taken: ClassVar[bool] = False

    def __init__(self, options: StdioOptions, *, daemonize: bool) -> None:
        super().__init__(options.id)
        if daemonize:
            raise UsageError("cannot use stdio with -daemonize")
        if Stdio._taken:
            raise UsageError("cannot use stdio by multiple character devices")
        Stdio._taken = True

    async def open(self) -> None:
        """Nothing: the descriptors are there."""

    async def serve(self, conversation: Conversation) -> None:
        await conversation(StdioStream())

    def close(self) -> None:
        """Nothing: the descriptors stay the program's."""


class Client(Chardev):
    """Connects when it is opened; there is one conversation."""

    def __init__(self, options: SocketOptions) -> None:
        super().__init__(options.id)
        self._options = options
        self._stream: trio.SocketStream | None = None

    async def open(self) -> None:
        options = self._options
        if options.fd is not UNSET:
            self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(_inherited(str(options.fd))))
            return
        try:
            if options.path is not UNSET:
                where = f"'{options.path}'"
                self._stream = await trio.open_unix_socket(str(options.path))
            else:
                where = f"'{options.host}:{options.port}'"
                self._stream = await trio.open_tcp_stream(str(options.host), int(str(options.port)))
        except OSError as error:
            raise OpenError(f"Failed to connect to {where}: {_reason(error)}", errno=error.errno) from None

    async def serve(self, conversation: Conversation) -> None:
        assert self._stream is not None
        await conversation(self._stream)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.socket.close()


class Server(Chardev):
    """Listens when it is opened, and waits for the first client then if it is told to."""

    def __init__(self, options: SocketOptions) -> None:
        super().__init__(options.id)
        self._options = options
        self._listener: trio.SocketListener | None = None
        self._first: trio.SocketStream | None = None
        self._files = ExitStack()

    async def open(self) -> None:
        options = self._options
        if options.fd is not UNSET:
            listening = trio.socket.from_stdlib_socket(_inherited(str(options.fd)))
        elif options.path is not UNSET:
            failure = f"Failed to bind socket to {options.path}"
            listening = self._files.enter_context(unix_listener(str(options.path), failure))
        else:
            listening = await self._bind_tcp(str(options.host), int(str(options.port)))
        self._listener = trio.SocketListener(listening)
        if options.wait is UNSET or options.wait:
            self._first = await self._listener.accept()

    @staticmethod
    async def _bind_tcp(host: str, port: int) -> trio.socket.SocketType:
        try:
            return (await trio.open_tcp_listeners(port, host=host or None))[0].socket
        except OSError as error:
            raise OpenError(f"Failed to bind socket: {_reason(error)}", errno=error.errno) from None

    async def serve(self, conversation: Conversation) -> None:
        assert self._listener is not None
        while True:
            stream = self._first or await self._listener.accept()
            self._first = None
            await conversation(stream)

    def close(self) -> None:
        for stream in (self._listener, self._first):
            if stream is not None:
                stream.socket.close()
        self._files.close()


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def _inherited(text: str) -> socket.socket:
    """The socket whose descriptor has the number *text*."""
    if not text.isdecimal():
        raise OptionError(f"Unable to parse FD number {text}")
    try:
        return socket.socket(fileno=int(text))
    except OSError:
        raise UsageError(f"File descriptor '{text}' is not a socket") from None


def _make_socket(options: SocketOptions) -> Chardev:
    given = [options.path, options.host, options.fd]
    if sum(value is not UNSET for value in given) != 1:
        raise OptionError("None or one of 'path', 'fd' or 'host' option required.")
    if options.host is not UNSET and (options.port is UNSET or not str(options.port).isdecimal()):
        raise OptionError("chardev: socket: no port given")
    if options.server:
        return Server(options)
    if options.wait is not UNSET:
        raise OptionError("'wait' option is incompatible with socket in client connect mode")
    return Client(options)


_BACKENDS: dict[str, type[ChardevOptions]] = {"socket": SocketOptions, "stdio": StdioOptions}


def backends() -> list[str]:
    """The kinds of character devices that there are."""
    return sorted(_BACKENDS)


def make_chardev(text: str, *, daemonize: bool) -> Chardev:
    """The character device that *text*, the value of a ``--chardev``, describes; not open yet.

    *daemonize*: it will have to do without a terminal.  Raises OptionError, UsageError.
    """
    tree = parse_keyval(_with_values(text), implied_key="backend")
    name = tree.get("id")
    if name is None:
        raise OptionError("chardev: no id specified")
    if not isinstance(name, str) or not is_well_formed(name):
        raise OptionError("Parameter 'id' expects an identifier")
    backend = tree.get("backend")
    if backend is None:
        raise OptionError(f'chardev: "{name}" missing backend')
    if backend not in _BACKENDS:
        raise OptionError(f"'{backend}' is not a valid char driver name")
    declared = declared_options(_BACKENDS[backend])
    for key in tree.keys() - {option.name for option in declared}:
        raise OptionError(f"Invalid parameter '{key}'")
    options: Any = convert(type_keyval(tree, declared), _BACKENDS[backend])
    return Stdio(options, daemonize=daemonize) if backend == "stdio" else _make_socket(options)


def _with_values(text: str) -> str:
    """*text* with the old short forms spelt out: ``server`` is ``server=on``, ``nowait`` is ``wait=off``."""
    first, *rest = text.split(",")
    spelt = [first]
    for part in rest:
        if part in ("server", "wait", "nodelay"):
            spelt.append(f"{part}=on")
        elif part in ("noserver", "nowait"):
            spelt.append(f"{part[2:]}=off")
        else:
            spelt.append(part)
    return ",".join(spelt)
