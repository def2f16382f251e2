"""The graph of block nodes: adding and removing them, their edges, permissions, drain.

A change either takes effect as a whole or leaves the graph as it was, with everything closed that it opened.
Changes are made one at a time, under ``Graph.lock``.

Rules and messages: QEMU block.c (bdrv_open_inherit, bdrv_refresh_perms, bdrv_attach_child), blockdev.c.
"""

from __future__ import annotations

import errno
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from typing import Any

import trio
from msgspec import UNSET

from fusebd.block.child import Child
from fusebd.block.driver import best_format, driver_class, parse_blockdev
from fusebd.block.fileviews import FileViews
from fusebd.block.identifiers import is_well_formed
from fusebd.block.ledger import Ledger
from fusebd.block.node import Inherited, Node
from fusebd.block.objects import Objects
from fusebd.block.opening import Opening, resolve_options
from fusebd.block.options import BlockdevOptions, Json
from fusebd.block.perms import Perm, Role, perm_names
from fusebd.block.root import UNNAMED, Root
from fusebd.errors import BlockIOError, FusebdError, GraphError, PermissionConflict, ReadOnlyError

log = logging.getLogger(__name__)

#: the longest node-name, in characters (QEMU: sizeof(BlockDriverState.node_name) - 1)
NODE_NAME_LENGTH = 31
#: how much of a file is looked at to find its format, in bytes
PROBE_LENGTH = 2048

EventListener = Callable[[str, dict[str, Any]], None]


class Graph:
    """All nodes of one daemon.

    ``nodes`` has every node by name, those being opened and anonymous ones too.  Listeners in
    ``event_listeners`` get (event name, data) of every event; those in ``node_listeners`` are called when named
    nodes have come or gone, those in ``failure_listeners`` by ``fail``.  ``close_failures`` says which nodes could not
    be flushed or closed when they ended.  ``objects`` has what options can refer to beside nodes; ``ledger`` keeps what
    failed and what was made to; ``views`` are those who show nodes as files.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.objects = Objects()
        self.ledger = Ledger(self.emit)
        self.views = FileViews()
        self.roots: set[Root] = set()
        self.lock = trio.Lock()
        self.event_listeners: list[EventListener] = []
        self.node_listeners: list[Callable[[], None]] = []
        self.failure_listeners: list[Callable[[str], None]] = []
        self.close_failures: list[str] = []
        self.name_numbers = count()
        self._anonymous = 0
        #: nodes that are writable already, but are not ready to be written
        self.unready: set[Node] = set()
        self._drains: list[tuple[set[Node], set[Root]]] = []

    def emit(self, event: str, data: dict[str, Any]) -> None:
        """Tell every listener of *event*."""
        for listener in self.event_listeners:
            listener(event, data)

    def fail(self, reason: str) -> None:
        """Have the program end, because of *reason*: a user asked for that in this case."""
        for listener in self.failure_listeners:
            listener(reason)

    # -- finding nodes --------------------------------------------------------------------------

    def named_nodes(self) -> dict[str, Node]:
        """The nodes that are open and that a user has named, in the order in which they were added."""
        return {name: node for name, node in self.nodes.items() if node.is_open and not name.startswith("#")}

    def find(self, name: str) -> Node:
        """The open node *name*; raises GraphError in the words of block_resize, block-export-add."""
        node = self.nodes.get(name)
        if node is None or not node.is_open:
            raise GraphError(f"Cannot find device='' nor node-name='{name}'")
        return node

    def find_for_reference(self, name: str) -> Node:
        """The node that a BlockdevRef string names; it may still be opening (then ``attach`` finds the cycle)."""
        node = self.nodes.get(name)
        if node is None or not node.has_name:
            raise GraphError(f"Cannot find device='{name}' nor node-name='{name}'")
        return node

    # -- adding and removing --------------------------------------------------------------------

    async def blockdev_add(self, value: Json) -> Node:
        """Add the node that the JSON object *value* describes, with its inline children.

        The monitor owns it until ``blockdev_del``.  Suspends while files are opened and read.
        Raises FusebdError; the graph is then as it was.
        """
        return await self.add(parse_blockdev(value))

    async def add(self, options: BlockdevOptions) -> Node:
        """``blockdev_add`` for options that are validated already."""
        async with self.lock:
            if options.node_name is UNSET:
                raise GraphError("'node-name' must be specified for the root node")
            node = await self.open_node(options)
            node.monitor_owned = True
        self.nodes_changed()
        return node

    async def blockdev_del(self, name: str) -> None:
        """Remove the node *name*, and its children that nothing else uses.

        Waits for the lock and until files are flushed and closed.  Raises GraphError in QEMU's words.
        """
        async with self.lock:
            node = self.nodes.get(name)
            if node is None or not node.is_open:
                raise GraphError(f"Failed to find node with node-name='{name}'")
            if any(isinstance(edge, Root) for edge in node.parents):
                raise GraphError(f"Node {name} is in use", errno=errno.EBUSY)
            if node.inserted_over is not None:
                raise GraphError(f"Node {name} was inserted as a filter: block-filter-remove takes it out")
            if not node.monitor_owned:
                raise GraphError(f"Node {name} is not owned by the monitor")
            if node.parents:
                raise GraphError(f"Block device {name} is in use")
            node.monitor_owned = False
            await self.release(node)
        self.nodes_changed()

    async def open_node(
        self,
        options: BlockdevOptions,
        *,
        inherit: Inherited | None = None,
        role: Role = Role.DATA,
        described_as: tuple[str, ...] = (),
    ) -> Node:
        """Open a node and what is inline in it.  For ``Opening`` and ``add``: the caller attaches or owns it.

        *inherit* is what an inline child takes over from its parent, None at the top, and *described_as* where in
        the options of the node that is added it stands.
        Raises FusebdError; everything that was opened for it is closed again then.
        """
        own, effective = resolve_options(options, inherit, role)
        name = self._assign_name(options)
        cls = driver_class(options.driver)
        node = Node(self, name, options, own, effective)
        if cls.protocol_prefix is not None:
            node.take_name()
        node.described_as = described_as
        self.nodes[name] = node
        try:
            node.driver = await cls.open(Opening(self, node), options)
            node.is_open = True
            node.take_name()
            self.refresh_perms([node])
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.release(node)
            raise
        return node

    def _assign_name(self, options: BlockdevOptions) -> str:
        if options.node_name is UNSET:
            # Not a name that a user can give, and not guessable, so that nobody comes to rely on it.
            self._anonymous += 1
            return f"#block{self._anonymous}{random.randrange(100):02d}"
        name = str(options.node_name)
        if not is_well_formed(name):
            raise GraphError(f"Invalid node-name: '{name}'")
        if name in self.nodes:
            raise GraphError(f"Duplicate nodes with node-name='{name}'")
        if len(name) > NODE_NAME_LENGTH:
            raise GraphError("Node name too long")
        return name

    async def release(self, node: Node, above: str = "") -> None:
        """Close *node* if nothing uses it any more, and then its children likewise.

        *above* names the nodes that it was below, for messages: many nodes have no name that a user knows.
        """
        name = f"{above}{node.name}"
        if node.in_use:
            return
        if node.is_open:
            with self._undelayed(self.subtree(node)):
                await self._close(node, name)
        node.settle_tallies()
        node.is_open = False
        self.nodes.pop(node.name, None)
        children = [edge.node for edge in node.children.values()]
        for child in children:
            if child.inherits_from is node:
                child.inherits_from = None
        for edge in node.children.values():
            edge.node.parents.remove(edge)
        node.children.clear()
        for child in dict.fromkeys(children):
            if child.in_use:
                self.loosen_perms(child)
            await self.release(child, f"{name}: ")

    async def _close(self, node: Node, name: str) -> None:
        """Flush and close *node*, which messages call *name*."""
        if not node.read_only:
            try:
                await node.driver.flush()
            except BlockIOError as error:
                self._close_failed(f"{name}: flush at close failed: {error.reason}")
        try:
            await node.driver.close()
        except BlockIOError as error:
            self._close_failed(f"{name}: close failed: {error.reason}")

    def _close_failed(self, message: str) -> None:
        log.error("%s", message)
        self.close_failures.append(message)

    async def close(self) -> None:
        """Close every node, parents before children; failures are logged and kept, not raised."""
        async with self.lock:
            for root in list(self.roots):
                await self.detach_root_locked(root)
            for node in list(self.nodes.values()):
                node.monitor_owned = False
            while tops := [node for node in self.nodes.values() if not node.parents]:
                for node in tops:
                    await self.release(node)

    async def probe(self, options: BlockdevOptions) -> str:
        """The name of the image format found in the node that *options* describe; ``raw`` if no other.

        Opens the node for reading, looks at its first bytes, and closes it again.
        """
        node = await self.open_node(options, inherit=Inherited(read_only=True, force_share=True))
        try:
            data = memoryview(bytearray(min(PROBE_LENGTH, node.driver.length)))
            await node.driver.preadv(0, (data,))
        except BlockIOError as error:
            raise error.prefixed("Could not read image for determining its format") from None
        finally:
            with trio.CancelScope(shield=True):
                await self.release(node)
        return best_format(bytes(data), node.driver.filename)

    # -- edges ----------------------------------------------------------------------------------

    def attach(self, parent: Node, name: str, role: Role, below: Node) -> Child:
        """Make *below* the child *name* of *parent*, with the permissions that the role asks for.

        Raises GraphError for a cycle, PermissionConflict, ReadOnlyError; *below* is then not attached.
        """
        # a node that is found while it is still opening is one that this opening began with
        if not below.is_open or parent in self.subtree(below):
            raise GraphError(f"Making '{below.name}' a {name} child of '{parent.name}' would create a cycle")
        edge = Child(parent, name, role, below)
        parent.children[name] = edge
        below.parents.append(edge)
        try:
            self.refresh_perms([parent])
        except BaseException:
            del parent.children[name]
            below.parents.remove(edge)
            raise
        return edge

    async def attach_opened(self, parent: Node, name: str, role: Role, below: Node) -> Child:
        """``attach`` a node that was opened for *parent*: if that fails, nobody has it, and it is closed again."""
        try:
            return self.attach(parent, name, role, below)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.release(below)
            raise

    @staticmethod
    def subtree(node: Node) -> set[Node]:
        found = {node}
        todo = [node]
        while todo:
            for edge in todo.pop().children.values():
                if edge.node not in found:
                    found.add(edge.node)
                    todo.append(edge.node)
        return found

    def attach_root(
        self, node: Node, description: str, perm: Perm, shared: Perm = Perm.ALL, *, report_errors: bool = True
    ) -> Root:
        """A way in from outside the graph to *node*; it ends with ``detach_root``.

        Raises PermissionConflict, ReadOnlyError.
        """
        self._check_ready(node, perm)
        root = Root(node, description, report_errors=report_errors)
        root.perm, root.shared = perm, shared
        node.parents.append(root)
        try:
            self.refresh_perms([node])
        except BaseException:
            node.parents.remove(root)
            raise
        self.roots.add(root)
        for drained, roots in self._drains:
            if not drained.isdisjoint(self.subtree(node)):
                root.begin_drain()
                roots.add(root)
        return root

    def set_root_perms(self, root: Root, perm: Perm, shared: Perm) -> None:
        """Change what *root* takes and shares.  Raises PermissionConflict, ReadOnlyError; nothing is changed then."""
        before = root.perm, root.shared
        self._check_ready(root.node, perm & ~root.perm)
        root.perm, root.shared = perm, shared
        try:
            self.refresh_perms([root.node])
        except BaseException:
            root.perm, root.shared = before
            raise

    def _check_ready(self, node: Node, perm: Perm) -> None:
        """Refuse writing to nodes that would still be read-only if preparing them for it failed."""
        if self.unready and perm & Perm.WRITE and not self.unready.isdisjoint(self.subtree(node)):
            raise ReadOnlyError("Block node is read-only")

    async def detach_root(self, root: Root) -> None:
        """End *root*; its node is closed if nothing else uses it.  Waits for *root*'s requests."""
        async with self.lock:
            await self.detach_root_locked(root)

    async def detach_root_locked(self, root: Root) -> None:
        """``detach_root`` for who holds ``lock``."""
        if root.in_flight:  # else nothing is waited for, and what others have under way is not to be hurried
            with self._undelayed(self.subtree(root.node)):
                await root.wait_idle()
        self.roots.discard(root)
        if root in root.node.parents:
            root.node.parents.remove(root)
            self.loosen_perms(root.node)
            await self.release(root.node)

    # -- permissions ----------------------------------------------------------------------------

    def _topological(self, tops: Iterable[Node]) -> list[Node]:
        """*tops* and everything below them, parents first."""
        order: list[Node] = []
        seen: set[Node] = set()

        def visit(node: Node) -> None:
            if node not in seen:
                seen.add(node)
                for edge in node.children.values():
                    visit(edge.node)
                order.append(node)

        for node in tops:
            visit(node)
        return order[::-1]

    def refresh_perms(self, tops: Iterable[Node]) -> None:
        """Work out the permissions of all edges below *tops* anew; all of it takes effect, or nothing.

        A node that is still opening has no parents yet; what it needs of its children counts all the same.
        """
        undo_edges: list[tuple[Child, Perm, Perm]] = []
        undo_nodes: list[Node] = []
        try:
            for node in self._topological(tops):
                _check_conflicts(node)
                perm, shared = node.cumulative_perms()
                if node.is_open:
                    _check_writable(node, perm)
                    if (perm, shared) != (node.perm, node.shared):
                        node.driver.set_perm(perm, shared)
                        undo_nodes.append(node)
                for edge in node.children.values():
                    undo_edges.append((edge, edge.perm, edge.shared))
                    edge.perm, edge.shared = self._child_perm(node, edge, perm, shared)
        except BaseException:
            for edge, perm, shared in reversed(undo_edges):
                edge.perm, edge.shared = perm, shared
            for node in undo_nodes:
                node.driver.set_perm(node.perm, node.shared)
            raise
        for node in undo_nodes:
            node.perm, node.shared = node.cumulative_perms()

    @staticmethod
    def _child_perm(node: Node, edge: Child, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        taken, given = driver_class(node.driver_name).child_perm(node, edge.name, edge.role, perm, shared)
        return (taken, Perm.ALL) if edge.node.force_share else (taken, given)

    def loosen_perms(self, node: Node) -> None:
        """Work out permissions after a user went away; what cannot be loosened stays, and is logged."""
        try:
            self.refresh_perms([node])
        except FusebdError as error:
            log.warning("%s: permissions could not be loosened: %s", node.name, error)

    # -- drain ----------------------------------------------------------------------------------

    @asynccontextmanager
    async def drained(self, *nodes: Node) -> AsyncIterator[None]:
        """While in this context, no request is under way on *nodes*; new ones wait at the roots above them.

        The caller holds ``lock``.
        """
        trees = {root: tree for root in self.roots if not (tree := self.subtree(root.node)).isdisjoint(nodes)}
        for root in trees:
            root.begin_drain()
        held = set(nodes), set(trees)  # and roots that come meanwhile
        self._drains.append(held)
        try:
            with self._undelayed(set(nodes).union(*trees.values())):
                for root in trees:
                    await root.wait_idle()
                yield
        finally:
            self._drains.remove(held)
            for root in held[1]:
                root.end_drain()

    @staticmethod
    @contextmanager
    def _undelayed(nodes: Iterable[Node]) -> Iterator[None]:
        """While in this context, the drivers of *nodes* hold no request back on purpose."""
        drivers = [node.driver for node in nodes if node.is_open]
        for driver in drivers:
            driver.drain_begin()
        try:
            yield
        finally:
            for driver in drivers:
                driver.drain_end()

    def stop_delaying(self) -> None:
        """From now on, for good, no driver holds a request back on purpose: whoever serves clients wants to end."""
        for node in self.nodes.values():
            if node.is_open:
                node.driver.drain_begin()

    # -- commands on nodes ----------------------------------------------------------------------

    async def block_resize(self, name: str, size: int) -> None:
        """Give the node *name* *size* bytes, with its requests held back meanwhile.  Raises FusebdError."""
        async with self.lock:
            node = self.find(name)
            if size < 0:
                raise GraphError("Parameter 'size' expects a >0 size")
            root = self.attach_root(node, UNNAMED, Perm.RESIZE, report_errors=False)
            try:
                async with self.drained(node):
                    root.end_drain()
                    await root.truncate(size)
            finally:
                await self.detach_root_locked(root)

    def nodes_changed(self) -> None:
        for listener in self.node_listeners:
            listener()


def _check_conflicts(node: Node) -> None:
    """Refuse if one parent of *node* takes what another does not share; the latest are looked at first."""
    for a in reversed(node.parents):
        for b in reversed(node.parents):
            if a is b or not b.perm & ~a.shared:
                continue
            raise PermissionConflict(
                f"Permission conflict on node '{node.name}': permissions '{perm_names(b.perm & ~a.shared)}' are both "
                f"required by {b.parent_description} (uses node '{node.name}' as '{b.name}' child) and unshared by "
                f"{a.parent_description} (uses node '{node.name}' as '{a.name}' child)."
            )


def _check_writable(node: Node, perm: Perm) -> None:
    """Refuse writing to a read-only node, and writing with an unaligned end that may not move."""
    if perm & (Perm.WRITE | Perm.WRITE_UNCHANGED) and node.read_only:
        if node.losing_write is not None:
            # who has it open may be about to close it: then it is worth another try
            reason = f"Read-only block node '{node.losing_write.name}' cannot support read-write users"
            raise ReadOnlyError(reason, errno=errno.EBUSY)
        raise ReadOnlyError("Block node is read-only")
    alignment = node.driver.limits.request_alignment
    if perm & Perm.WRITE and not perm & Perm.RESIZE and node.driver.length % alignment:
        raise GraphError(
            "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment"
        )
