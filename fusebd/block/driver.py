"""What a driver is, and how it is found.

A driver is a class registered under its QAPI name together with the declaration of its options.
The graph calls ``open``; from then on requests arrive through the edges (``fusebd.block.child``),
which have already checked bounds, split what is too long, padded what is unaligned and applied
discard, detect-zeroes and permissions.  A driver only drives.

Buffers are sequences of writable (read) or readable (write) byte memoryviews; all offsets and lengths
are bytes.  No method suspends on its own account unless its docstring says so: it suspends where
a child does, or where the host has to wait.

The operations and their semantics are those of QEMU's BlockDriver (include/block/block_int-common.h).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from fusebd.block.child import COMPRESSED, FUA, MAY_UNMAP, NO_FALLBACK, Buffers, Child, nbytes
from fusebd.block.naming import format_filename
from fusebd.block.node import Node
from fusebd.block.options import (
    BlockdevOptions,
    Json,
    OptionStruct,
    convert,
    declared_options,
    parse_keyval,
    references,
    type_keyval,
)
from fusebd.block.perms import Perm, Role, default_perms
from fusebd.block.qjson import loads
from fusebd.block.queueing import QueueRead
from fusebd.block.reopening import Reopening
from fusebd.block.status import BlockStatus, Status
from fusebd.block.straight import Bypass, Concerns
from fusebd.errors import NotSupported, OptionError

if TYPE_CHECKING:
    from fusebd.block.creation import Creator
    from fusebd.block.dirtybitmaps import BitmapStore
    from fusebd.block.opening import Opening
    from fusebd.block.snapshots import SnapshotStore

__all__ = [
    "COMPRESSED",
    "FUA",
    "MAY_UNMAP",
    "NO_FALLBACK",
    "BlockStatus",
    "Buffers",
    "Bypass",
    "Child",
    "Driver",
    "FilterDriver",
    "FormatDriver",
    "Limits",
    "Node",
    "Preallocation",
    "ProtocolDriver",
    "Status",
    "best_format",
    "driver_class",
    "driver_command",
    "driver_names",
    "nbytes",
    "parse_blockdev",
    "parse_blockdev_text",
    "prefix_driver",
    "register",
]

Preallocation = Literal["off", "metadata", "falloc", "full"]
D = TypeVar("D", bound="Driver")
C = TypeVar("C", bound=Callable[..., Awaitable[Any]])


@dataclass(frozen=True, slots=True)
class DriverCommand:
    """A command that a driver carries out: *method*, called with an instance of *arguments*, answers it."""

    name: str
    arguments: type[OptionStruct]
    method: Callable[[Any, Any], Awaitable[Json]]
    inserts: bool = False
    allow_oob: bool = False


def driver_command(
    name: str, arguments: type[OptionStruct], *, inserts: bool = False, allow_oob: bool = False
) -> Callable[[C], C]:
    """Decorator of a driver's method: it answers the QMP command *name*, which takes a ``node-name``, too.

    The driver of that node, or the first one of its kind below it, is asked.  With *inserts* only that node, and
    filters that were inserted above it, are looked at; if the driver is not among them, it is inserted.
    *allow_oob*: also out of band, so it must never suspend.
    """

    def mark(method: C) -> C:
        command = DriverCommand(name, arguments, method, inserts, allow_oob)
        method.driver_command = command  # type: ignore[attr-defined]
        return method

    return mark


@dataclass(slots=True)
class Limits:
    """What requests a driver takes; the edge above makes them fit.  0 = no limit, all in bytes.

    ``request_alignment`` (a power of two) holds for offset and length of every read and write.  Zero writes and
    discards are handed over in pieces aligned to ``pwrite_zeroes_alignment``/``pdiscard_alignment`` as far as
    possible; an unaligned head or tail still arrives, and may be answered with NotSupported.
    """

    request_alignment: int = 1
    max_transfer: int = 0
    pwrite_zeroes_alignment: int = 0
    max_pwrite_zeroes: int = 0
    pdiscard_alignment: int = 0
    max_pdiscard: int = 0


class Driver:
    """Base of all drivers.

    Subclasses set ``length`` (bytes; a plain attribute, because every request reads it) and ``limits``
    in ``open`` or ``__init__``; ``node`` is set by the graph before ``open`` is called.
    """

    name: ClassVar[str]
    options_class: ClassVar[type[BlockdevOptions]]
    is_filter: ClassVar[bool] = False
    is_format: ClassVar[bool] = False
    #: the module whose CREATOR makes images of this kind; most daemons never make one, and do not load it
    creation_module: ClassVar[str] = ""
    #: the options of ``amend``; None: an image of this kind cannot be changed
    amend_options: ClassVar[type[OptionStruct] | None] = None
    #: whether writes may have the flag COMPRESSED
    can_compress: ClassVar[bool] = False
    #: options, by their QAPI names, that decide what the node contains: they are part of a ``json:`` name
    strong_options: ClassVar[frozenset[str]] = frozenset()
    #: file-name prefix that names this driver (``blkdebug:``), None if it has none
    protocol_prefix: ClassVar[str | None] = None

    #: options of children whose format is probed where a file name leaves it out (not for blockdev-add)
    probed_children: ClassVar[frozenset[str]] = frozenset()

    #: whether children come and go while the node is open: see ``fusebd.block.membership``
    changes_children: ClassVar[bool] = False

    #: own options, by their QAPI names, that ``blockdev-reopen`` can change; None: it cannot reopen the node at all
    changeable: ClassVar[frozenset[str] | None] = None
    #: those that it may leave out even if they were given before: they have their default then
    resettable: ClassVar[frozenset[str]] = frozenset()
    #: the driver's part in that
    reopening: ClassVar[type[Reopening]] = Reopening

    #: what the monitor can have a node of this driver do, by the commands' names
    commands: ClassVar[dict[str, DriverCommand]] = {}

    node: Node
    length: int = 0
    limits: Limits
    #: those of ``fusebd.block.debugevents`` that the driver wants to hear of; the edges above go by it
    listens: frozenset[str] = frozenset()

    def __init__(self, node: Node) -> None:
        self.node = node
        self.limits = Limits()

    @classmethod
    async def open(cls: type[D], opening: Opening, options: Any) -> D:
        """Open a node: open its children through *opening*, read what has to be read.

        *options* is an instance of ``options_class``.  Whatever *opening* opened is closed by the graph if
        this raises; what the driver itself opened (a descriptor) it has to close itself then.
        """
        raise NotImplementedError

    @classmethod
    def parse_filename(cls, name: str) -> dict[str, Json]:
        """The options meant by the file name *name*, which begins with ``protocol_prefix``."""
        raise OptionError(f"Driver '{cls.name}' cannot be named by a file name")

    @classmethod
    def probe(cls, data: bytes, name: str) -> int:
        """How surely an image that begins with *data* and is called *name* is of this format: 0 not, 100 surely."""
        return 0

    @classmethod
    def creator(cls) -> Creator | None:
        """What makes image files of this kind; None: nothing."""
        if not cls.creation_module:
            return None
        made: Creator = importlib.import_module(cls.creation_module).CREATOR
        return made

    def was_probed(self) -> None:
        """It was chosen by the look of the image's first bytes, not by a user."""

    async def close(self) -> None:
        """Let go of what the driver itself holds.  The node was flushed; its children close after it."""

    # -- data -----------------------------------------------------------------------------------

    @property
    def supports_fua(self) -> bool:
        """Whether ``pwritev`` and ``pwrite_zeroes`` honour the FUA flag; otherwise the edge flushes after them."""
        return False

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        """Fill *bufs* with the bytes from byte *offset* on: all of them, or raise BlockIOError."""
        raise NotSupported(node_name=self.node.name, operation="read")

    def read_queue(self) -> QueueRead | None:
        """What takes reads without a task, as long as ``Node.refresh_edges`` is not called; None: nothing."""
        return None

    def read_bypass(self) -> Bypass | None:
        """Where reads need not come here for, as long as ``Node.refresh_edges`` is not called; None: nowhere."""
        return None

    def write_bypass(self) -> Bypass | None:
        """The same for writes without flags, inside the node."""
        return None

    def announcing(self, event: str, operation: str) -> Concerns | None:
        """What announces *event* and says whether the driver wants to see the ``read`` or ``write`` that it is of.

        None: there is nothing that could stand for both.  Where it says yes, the event is announced once more.
        """
        return None

    def announced(self, event: str) -> Awaitable[None] | None:
        """The parent's driver or the edge to it announces *event*, one that it listens for; what to wait for then."""
        return None

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        """Write all of *bufs* from byte *offset* on.  *flags*: FUA (if ``supports_fua``), COMPRESSED."""
        raise NotSupported(node_name=self.node.name, operation="write")

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """Make *length* bytes read as zeroes.  *flags*: MAY_UNMAP (deallocate), NO_FALLBACK (only if fast), FUA.

        NotSupported makes the edge write buffers of zeroes instead (not under NO_FALLBACK).
        """
        raise NotSupported(node_name=self.node.name, operation="write zeroes")

    async def pdiscard(self, offset: int, length: int) -> None:
        """The content of *length* bytes is not needed any more.  NotSupported is ignored by the edge."""
        raise NotSupported(node_name=self.node.name, operation="discard")

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """What the range is made of in this layer: for a prefix of it, of one kind."""
        return BlockStatus(Status.DATA | Status.ALLOCATED, length)

    async def truncate(
        self, length: int, *, exact: bool = False, prealloc: Preallocation = "off", zero: bool = False
    ) -> None:
        """Change the length to *length* bytes and set ``self.node.set_length``.

        *exact*: not longer than asked (a device may be larger).  *zero*: new bytes must read as zeroes even where
        something below would show through.  New bytes of a file read as zeroes anyway.
        """
        reason = "Image format driver does not support resize"
        raise NotSupported(node_name=self.node.name, operation="resize", reason=reason)

    async def flush(self) -> None:
        """Make completed writes durable: own caches (flush_to_os), then the disk, then children.

        Drivers override ``flush_to_os`` and ``flush_to_disk``; only one with a different order of things
        overrides this.
        """
        node = self.node
        primary = node.primary_child
        if primary is not None:
            await primary.announce("flush_to_os")
        await self.flush_to_os()
        generation = node.write_generation
        if not node.no_flush and node.flushed_generation != generation:
            if primary is not None:
                await primary.announce("flush_to_disk")
            await self.flush_to_disk()
        for child in list(node.children.values()):
            if child.perm & (Perm.WRITE | Perm.WRITE_UNCHANGED):
                await child.flush()
        node.flushed_generation = generation

    async def write_out(self) -> None:
        """Keep nothing in memory alone that was written, or belongs to it: the children may be exchanged next."""
        await self.flush()

    async def give_up_write(self) -> None:
        """The node becomes read-only: put away what is kept for as long as it can be written.  Raises FusebdError."""

    async def take_back_write(self) -> None:
        """The node stays writable after all, although ``give_up_write`` was carried out.  Raises FusebdError."""

    async def flush_to_os(self) -> None:
        """Write own caches out to the children."""

    async def flush_to_disk(self) -> None:
        """Have the host make durable what was written (fdatasync)."""

    @property
    def shows_child(self) -> bool:
        """Whether the content is that of the primary child, from the first byte to the last."""
        return self.is_filter

    async def amend(self, options: Any, *, force: bool = False) -> None:
        """Change what the image is, as *options*, of ``amend_options``, say, durably; no request is under way.

        *force*: also where that makes the content unreadable.  Raises FusebdError; nothing has changed then.
        """
        raise NotSupported(node_name=self.node.name, operation="amend")

    # -- the host's file ------------------------------------------------------------------------

    def backing_descriptor(self) -> int:
        """What ``Node.backing_descriptor`` gives, as far as it is the driver's to say."""
        reason = f"driver '{self.name}' is in the way"
        raise NotSupported(node_name=self.node.name, operation="passthrough", reason=reason)

    def refresh_length(self) -> None:
        """Take over the length that the host's file has by now, for others may have written to it."""

    # -- states that the image keeps ------------------------------------------------------------

    @property
    def snapshot_store(self) -> SnapshotStore | None:
        """The internal snapshots of the image; None if it cannot have any."""
        return None

    @property
    def bitmap_store(self) -> BitmapStore | None:
        """Where persistent dirty bitmaps are kept; None if they cannot be."""
        return None

    # -- the graph ------------------------------------------------------------------------------

    def drain_begin(self) -> None:
        """The requests on this node are waited for: let none wait on purpose until ``drain_end``.  Nests."""

    def drain_end(self) -> None:
        """The end of one ``drain_begin``."""

    @classmethod
    def child_perm(cls, node: Node, child: str, role: Role, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Permissions (taken, shared) of *node* on its child named *child*, given those of all parents.

        Also asked while *node* is still opening: only its options and ``read_only`` can be relied on.
        """
        return default_perms(role, perm, shared, writable=not node.read_only)

    def set_perm(self, perm: Perm, shared: Perm) -> None:
        """All parents together now take *perm* and share *shared*; raise PermissionConflict to refuse."""

    def child_resized(self, child: Child) -> None:
        """The node below *child* has a new length."""

    def child_refreshed(self, child: Child) -> None:
        """*child* leads to another node now, or its node listens for other events or other limits."""

    def new_child(self, below: Node) -> tuple[str, Role]:
        """What name and role *below* gets as one more child; raise GraphError to refuse it."""
        raise NotImplementedError

    def check_removal(self, child: Child) -> None:
        """Raise GraphError if *child* may not be taken away."""
        raise NotImplementedError

    def child_added(self, child: Child) -> None:
        """*child* is there now; no request is under way."""
        raise NotImplementedError

    def child_removed(self, child: Child) -> None:
        """*child* is not there any more; no request is under way."""
        raise NotImplementedError

    # -- what is shown --------------------------------------------------------------------------

    @property
    def filename(self) -> str:
        """A plain name that would open the same thing (a path, a legacy spelling), or ""."""
        return ""

    def allocated_bytes(self) -> int | None:
        """Bytes that the node takes on the host, its own files only; None if unknown."""
        child = self.node.primary_child
        return child.node.driver.allocated_bytes() if child is not None else None

    def format_info(self) -> dict[str, Json]:
        """Members of QAPI ImageInfo that only this driver knows (cluster-size, format-specific, ...)."""
        return {}

    def specific_stats(self) -> dict[str, Json]:
        """QAPI BlockStatsSpecific without its ``driver``, where the driver counts something of its own."""
        return {}


class ProtocolDriver(Driver):
    """A driver with no child: it talks to the host."""


class FormatDriver(Driver):
    """A driver that gives the bytes of its ``file`` child a structure."""

    is_format = True
    probed_children = frozenset({"backing"})

    @property
    def filename(self) -> str:
        return format_filename(self.node)


class FilterDriver(Driver):
    """A driver whose content is that of one child, unless it changes a request on its way.

    Everything is passed on as it is; a filter overrides what it treats differently.
    """

    is_filter = True
    changeable: ClassVar[frozenset[str] | None] = frozenset()

    def __init__(self, node: Node, file: Child) -> None:
        super().__init__(node)
        self.file = file
        self.length = file.node.driver.length

    @property
    def supports_fua(self) -> bool:
        return self.file.driver.supports_fua

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        await self.file.preadv(offset, bufs)

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        await self.file.pwritev(offset, bufs, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self.file.pwrite_zeroes(offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        await self.file.pdiscard(offset, length)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        return BlockStatus(Status.RAW | Status.OFFSET_VALID, length, offset, self.file.node)

    async def truncate(
        self, length: int, *, exact: bool = False, prealloc: Preallocation = "off", zero: bool = False
    ) -> None:
        await self.file.truncate(length, exact=exact, prealloc=prealloc, zero=zero)

    def child_resized(self, child: Child) -> None:
        if child is self.file:
            self.node.set_length(child.node.driver.length)


# --- registry ------------------------------------------------------------------------------------

_REGISTRY: dict[str, type[Driver]] = {}


def register(name: str, options: type[BlockdevOptions]) -> Callable[[type[D]], type[D]]:
    """Class decorator: *name* is the driver's name in QAPI, *options* the declaration of its options."""

    def enter(driver: type[D]) -> type[D]:
        # One class may serve two names (null-co, null-aio): each gets a class of its own.
        made: type[Driver] = driver if "name" not in driver.__dict__ else type(driver.__name__, (driver,), {})
        made.name, made.options_class = name, options
        members = [member for base in reversed(driver.__mro__) for member in vars(base).values()]
        marked = [getattr(member, "driver_command", None) for member in members]
        made.commands = {command.name: command for command in marked if command is not None}
        _REGISTRY[name] = made
        return driver

    return enter


def _modules() -> list[str]:
    import fusebd.drivers

    return sorted(module.name for module in pkgutil.iter_modules(fusebd.drivers.__path__))


def driver_class(name: str) -> type[Driver]:
    """The driver called *name*; its module is imported when it is first asked for.  Raises OptionError."""
    if name not in _REGISTRY:
        modules = _modules()
        wanted = name.replace("-", "_")
        for module in [wanted] if wanted in modules else modules:
            importlib.import_module(f"fusebd.drivers.{module}")
    if name not in _REGISTRY:
        raise OptionError(f"Parameter 'driver' does not accept value '{name}'")
    return _REGISTRY[name]


def driver_names() -> list[str]:
    """The names of all drivers there are, in alphabetical order."""
    for module in _modules():
        importlib.import_module(f"fusebd.drivers.{module}")
    return sorted(_REGISTRY)


def best_format(data: bytes, name: str) -> str:
    """The format that an image most likely has that begins with *data* and is called *name*; ``raw`` if no other."""
    scores = {driver: driver_class(driver).probe(data, name) for driver in driver_names()}
    return max(scores, key=lambda driver: scores[driver])


def prefix_driver(prefix: str) -> type[Driver] | None:
    """The driver that file names beginning with ``prefix:`` mean, if there is one."""
    return next((d for d in map(driver_class, driver_names()) if d.protocol_prefix == prefix), None)


def parse_blockdev(value: Json, prefix: str = "") -> BlockdevOptions:
    """*value*, the JSON object of a blockdev-add or of an inline child, validated with all it contains.

    *prefix* is its place in the whole (``file.``), for messages.  Raises OptionError.
    """
    if not isinstance(value, dict):
        raise OptionError(f"Invalid parameter type for '{prefix.rstrip('.')}', expected: object")
    if "driver" not in value:
        raise OptionError(f"Parameter '{prefix}driver' is missing")
    if not isinstance(value["driver"], str):
        raise OptionError(f"Invalid parameter type for '{prefix}driver', expected: string")
    options = convert(value, driver_class(value["driver"]).options_class, prefix)
    options.keep_given(value)
    for name, ref in references(options):
        if ref.raw is not None:
            ref.options = parse_blockdev(ref.raw, f"{prefix}{name}.")
    return options


def parse_blockdev_text(text: str) -> dict[str, Json]:
    """The JSON object for blockdev-add that *text* spells, as ``--blockdev`` takes it: JSON, or key=value.

    The strings of key=value have the types that the drivers declare; otherwise nothing is validated.
    Raises OptionError.
    """
    if text.startswith("{"):
        value = loads(text)
        assert isinstance(value, dict)
        return value
    if "help" in text.replace(",,", "").split(","):  # a doubled comma is part of a value
        raise OptionError("Help is not available for this option")
    return type_blockdev(parse_keyval(text, implied_key="driver"))


def type_blockdev(tree: dict[str, Json], prefix: str = "") -> dict[str, Json]:
    """*tree* from ``parse_keyval`` with its strings, and those of nested devices, made the JSON types declared.

    *prefix* is its place in the whole (``file.``), for messages.  Raises OptionError.
    """
    if not isinstance(tree.get("driver"), str):
        return tree
    options = declared_options(driver_class(tree["driver"]).options_class)
    typed = type_keyval(tree, options, prefix)
    for option in options:
        value = typed.get(option.name)
        name = f"{prefix}{option.name}."
        if option.type_name.startswith("BlockdevRef") and isinstance(value, dict):
            typed[option.name] = type_blockdev(value, name)
        elif not option.members and isinstance(value, list):
            typed[option.name] = [
                type_blockdev(item, f"{name}{index}.") if isinstance(item, dict) else item
                for index, item in enumerate(value)
            ]
    return typed
