"""A node of the block graph: a driver, its name, its edges, and what is counted about it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import trio

from fusebd.block.dirtybitmaps import DirtyBitmaps
from fusebd.block.perms import Perm, Role
from fusebd.errors import NotSupported

if TYPE_CHECKING:
    from fusebd.block.child import Child
    from fusebd.block.contentwatch import ContentWatch
    from fusebd.block.driver import Driver
    from fusebd.block.flatoptions import Flat
    from fusebd.block.graph import Graph
    from fusebd.block.options import BlockdevOptions


@dataclass(slots=True, eq=False)
class Counters:
    """What went through a node since it was opened: requests, bytes, failures, nanoseconds.

    The names are those of QAPI BlockDeviceStats, but for ``changes``: writes and the like that have ended, well or not.
    """

    rd_operations: int = 0
    rd_bytes: int = 0
    rd_total_time_ns: int = 0
    failed_rd_operations: int = 0
    wr_operations: int = 0
    wr_bytes: int = 0
    wr_total_time_ns: int = 0
    failed_wr_operations: int = 0
    flush_operations: int = 0
    flush_total_time_ns: int = 0
    failed_flush_operations: int = 0
    unmap_operations: int = 0
    unmap_bytes: int = 0
    unmap_total_time_ns: int = 0
    failed_unmap_operations: int = 0
    wr_highest_offset: int = 0
    changes: int = 0

    def as_dict(self) -> dict[str, int]:
        """All but ``changes``."""
        return {name: getattr(self, name) for name in _COUNTED}

    def add(self, other: Counters) -> None:
        """Count what *other* has counted, too."""
        highest = max(self.wr_highest_offset, other.wr_highest_offset)
        for name in (*_COUNTED, "changes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.wr_highest_offset = highest


_COUNTED = tuple(field.name for field in fields(Counters) if field.name != "changes")


class Tally(Counters):
    """What went through several nodes at once, the *nodes* of a straight path (``fusebd.block.straight``)."""

    __slots__ = ("nodes",)

    def __init__(self, nodes: tuple[Node, ...]) -> None:
        super().__init__()
        self.nodes = nodes
        for node in nodes:
            node.tallies.append(self)

    def settle(self) -> None:
        """Enter the count with each of the nodes.  Nothing is under way on the path, nor will be again."""
        for node in self.nodes:
            node.counters.add(self)
            node.tallies.remove(self)


@dataclass(slots=True)
class Inherited:
    """Option values that an inline child takes over where its own say nothing."""

    read_only: bool = False
    auto_read_only: bool = False
    force_share: bool = False
    cache_direct: bool = False
    cache_no_flush: bool = False

    @classmethod
    def of(cls, options: Flat) -> Inherited:
        """Those of a node with *options*."""
        return cls(*(bool(options.get(name, False)) for name in _INHERITED))

    def as_options(self) -> Flat:
        """The options; of those that are off by default, only what is on."""
        values = (getattr(self, field.name) for field in fields(self))
        found = dict(zip(_INHERITED, values, strict=True))
        return {name: value for name, value in found.items() if value or name not in ("auto-read-only", "force-share")}


#: the options of Inherited, in its order
_INHERITED = ("read-only", "auto-read-only", "force-share", "cache.direct", "cache.no-flush")


class RangeLock:
    """Keeps overlapping writes apart where one of them reads, modifies and writes back.

    Used only on nodes whose request alignment is more than one byte.
    """

    def __init__(self) -> None:
        self._held: list[tuple[int, int, bool, trio.Event]] = []

    async def acquire(self, start: int, end: int, *, exclusive: bool) -> tuple[int, int, bool, trio.Event]:
        """Wait until nothing held overlaps bytes *start* to *end*, or only shared holders do.

        Suspends only while there is a conflict.  The result is given to ``release``.
        """
        while conflict := next((h for h in self._held if h[0] < end and start < h[1] and (exclusive or h[2])), None):
            await conflict[3].wait()
        token = (start, end, exclusive, trio.Event())
        self._held.append(token)
        return token

    def release(self, token: tuple[int, int, bool, trio.Event]) -> None:
        self._held.remove(token)
        token[3].set()


class Node:
    """One block node.  Made and ended by the graph alone.

    ``read_only`` is what holds now (an option, inherited, or fallen back to); ``unmap`` whether
    discards are carried out.  ``driver`` exists once the node is open (``is_open``).  ``has_name`` says whether
    references find it: as in QEMU, a node that is no protocol gets its name only when its ``file`` has been opened.
    ``name_number`` is its place in the order in which nodes got theirs.
    """

    driver: Driver

    def __init__(self, graph: Graph, name: str, options: BlockdevOptions, own: Flat, effective: Flat) -> None:
        self.graph = graph
        self.name = name
        self.configure(options, own, effective)
        #: it is being made read-only: because of which node, itself or one that it was inserted above
        self.losing_write: Node | None = None
        self.is_open = False
        self.name_number: int | None = None
        self.described_as: tuple[str, ...] = ()  # the names of children from the node that was added down to it
        self.monitor_owned = False
        #: for a filter that was inserted above a node: that node, and the name by which it is its child
        self.inserted_over: tuple[Node, str] | None = None
        #: the filter that was inserted above this node, through which all who use it go
        self.inserted_above: Node | None = None
        #: the node in whose options this one was described, as long as that is above it
        self.inherits_from: Node | None = None
        #: under what name the backing node was opened that the image names
        self.opened_backing = ""
        self.parents: list[Child] = []
        self.children: dict[str, Child] = {}
        #: what came to this node alone; ``counted`` is all
        self.counters = Counters()
        self.tallies: list[Tally] = []
        self.ranges = RangeLock()
        self.flushed_generation = 0
        self.watches: list[ContentWatch | DirtyBitmaps] = []
        self.dirty_bitmaps = DirtyBitmaps(self)
        self.perm, self.shared = Perm.NONE, Perm.ALL  # what the driver was last told

    def __repr__(self) -> str:
        return f"<node {self.name} ({self.options.driver})>"

    def configure(self, options: BlockdevOptions, own: Flat, effective: Flat) -> None:
        """Be as *options* say.  *own* are those that were given, *effective* those together with what is inherited."""
        self.options = options
        self.own_options, self.effective_options = own, effective
        self.inherited = inherited = Inherited.of(effective)
        self.read_only = inherited.read_only
        self.force_share = inherited.force_share
        self.no_flush = inherited.cache_no_flush
        self.cache_direct = inherited.cache_direct
        self.unmap: bool = effective.get("discard") == "unmap"
        self.detect_zeroes: str = effective.get("detect-zeroes", "off")

    @property
    def driver_name(self) -> str:
        return self.options.driver

    @property
    def has_name(self) -> bool:
        return self.name_number is not None

    def take_name(self) -> None:
        """Let references find it from now on."""
        if self.name_number is None:
            self.name_number = next(self.graph.name_numbers)

    @property
    def in_use(self) -> bool:
        return bool(self.parents) or self.monitor_owned

    @property
    def public_name(self) -> str:
        """The name that users know: that of the node itself, or of what it was inserted over if it has none."""
        node = self
        while node.name.startswith("#") and node.inserted_over is not None:
            node = node.inserted_over[0]
        return node.name

    @property
    def entrance(self) -> Node:
        """Where users outside the graph enter when they want this node: the topmost filter inserted above it."""
        node = self
        while node.inserted_above is not None:
            node = node.inserted_above
        return node

    @property
    def primary_child(self) -> Child | None:
        """The child that holds this node's data, or that it filters."""
        return next((c for c in self.children.values() if c.role & Role.PRIMARY), None)

    @property
    def content_node(self) -> Node:
        """The node whose content this one has: what is below filters."""
        node = self
        while node.driver.shows_child and (child := node.primary_child) is not None:
            node = child.node
        return node

    @property
    def backing(self) -> Child | None:
        """The copy-on-write child, if there is one."""
        return self.children.get("backing")

    def cumulative_perms(self) -> tuple[Perm, Perm]:
        """What all parents together take, and what every one of them shares."""
        perm, shared = Perm.NONE, Perm.ALL
        for edge in self.parents:
            perm |= edge.perm
            shared &= edge.shared
        return perm, shared

    def set_length(self, length: int) -> None:
        """The driver's content now has *length* bytes: tell every parent."""
        if length == self.driver.length:
            return
        self.driver.length = length
        self._tell_length()

    def _tell_length(self) -> None:
        self.dirty_bitmaps.resize()
        for edge in self.parents:
            edge.child_resized()

    def replace_driver(self, driver: Driver) -> None:
        """Requests go to *driver* from now on: the content anew, of another length perhaps.  None is under way."""
        before, self.driver = self.driver, driver
        self.refresh_edges()
        if driver.length != before.length:
            self._tell_length()

    def refresh_edges(self) -> None:
        """Have all parents take over what their requests need to know of this node."""
        for edge in self.parents:
            edge.refresh()

    def counted(self) -> Counters:
        """What went through the node."""
        total = Counters()
        for part in (self.counters, *self.tallies):
            total.add(part)
        return total

    @property
    def write_generation(self) -> int:
        """Another number after each write: where it is that of the last flush, there is nothing to flush."""
        return self.counters.changes + sum(tally.changes for tally in self.tallies)

    def settle_tallies(self) -> None:
        """No request will come through the node any more: nobody has to remember it for the sake of a count."""
        for tally in list(self.tallies):
            tally.settle()

    def backing_descriptor(self) -> int:
        """The host's file that holds the node's bytes, just them and where they are, for who goes past the block layer.

        Raises NotSupported; its reason says what is in the way.
        """
        if self.detect_zeroes != "off":
            reason = f"detect-zeroes is '{self.detect_zeroes}'"
            raise NotSupported(node_name=self.name, operation="passthrough", reason=reason)
        if self.dirty_bitmaps:
            raise NotSupported(node_name=self.name, operation="passthrough", reason="the node has dirty bitmaps")
        return self.driver.backing_descriptor()

    def changed_aside(self) -> None:
        """The content may have changed otherwise than by a request through an edge: the next flush matters."""
        self.counters.changes += 1
        for watch in self.watches:
            watch.changed(self, 0, 0)

    def emit(self, event: str, data: dict[str, Any]) -> None:
        self.graph.emit(event, data)
