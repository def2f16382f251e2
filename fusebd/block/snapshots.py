"""Internal snapshots: states of a disk that its image keeps beside the present one.

A driver that keeps some has a ``SnapshotStore``.  What is here finds the store of a node and has it work while no
request is under way.

Rules and messages: QEMU blockdev.c (internal_snapshot_action, qmp_blockdev_snapshot_delete_internal_sync),
block/snapshot.c.
"""

from __future__ import annotations

import errno
import os
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusebd.block.options import Json
from fusebd.block.perms import Perm
from fusebd.block.root import UNNAMED, Root
from fusebd.errors import CommandError, FusebdError, GraphError

if TYPE_CHECKING:
    from fusebd.block.driver import Driver
    from fusebd.block.graph import Graph
    from fusebd.block.node import Node

#: the driver that shows a snapshot as a node
READER = "internal-snapshot"
#: the longest name, in bytes (QEMU: sizeof(QEMUSnapshotInfo.name) - 1)
_NAME_LENGTH = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotInfo:
    """What a snapshot is called, and when it was made."""

    id: str
    name: str
    vm_state_size: int = 0
    date_sec: int = 0
    date_nsec: int = 0
    vm_clock_nsec: int = 0
    icount: int | None = None

    def info(self) -> dict[str, Json]:
        """QAPI SnapshotInfo."""
        info: dict[str, Json] = {
            "id": self.id,
            "name": self.name,
            "vm-state-size": self.vm_state_size,
            "date-sec": self.date_sec,
            "date-nsec": self.date_nsec,
            "vm-clock-sec": self.vm_clock_nsec // 10**9,
            "vm-clock-nsec": self.vm_clock_nsec % 10**9,
        }
        if self.icount is not None:
            info["icount"] = self.icount
        return info


class SnapshotStore(ABC):
    """The snapshots of one image.  While it changes them, no request is under way on the node.

    ``users`` counts, by their ids, those that somebody reads.
    """

    def __init__(self) -> None:
        self.users: Counter[str] = Counter()

    @property
    @abstractmethod
    def entries(self) -> Sequence[SnapshotInfo]:
        """All there are, the oldest first."""

    @abstractmethod
    async def create(self, name: str, time_ns: int) -> SnapshotInfo:
        """Keep the present state, as of *time_ns* (nanoseconds since 1970).  Durable when it returns.

        Raises FusebdError; nothing has changed then.
        """

    @abstractmethod
    async def delete(self, snapshot: SnapshotInfo) -> None:
        """Forget *snapshot*.  An error after that was made durable only wastes space."""

    @abstractmethod
    async def apply(self, snapshot: SnapshotInfo) -> None:
        """Make the present state that of *snapshot*, with its length.  Durable when it returns."""

    @abstractmethod
    async def view(self, snapshot: SnapshotInfo) -> Driver:
        """A driver that reads *snapshot*, of the same node; it is not opened, and not to be closed but let go."""


def find(entries: Sequence[SnapshotInfo], id: str | None, name: str | None) -> SnapshotInfo | None:  # noqa: A002
    """The first that has the *id* and the *name*; None leaves either open."""
    return next((s for s in entries if id in (None, s.id) and name in (None, s.name)), None)


def store_of(node: Node) -> SnapshotStore | None:
    """The store that snapshots of *node* are kept in: its own, or that of the one node that holds its data."""
    while (store := node.driver.snapshot_store) is None:
        child = node.primary_child
        if child is None or len(node.children) > 1:
            return None
        node = child.node
    return store


async def create(graph: Graph, device: str, name: str) -> SnapshotInfo:
    """Have the node *device*, on which no request is under way, keep its present state as the snapshot *name*."""
    node = root_node(graph, device)
    if node.read_only:
        raise CommandError(f"Device '{device}' is read only")
    store = store_of(node)
    if store is None:
        raise CommandError(
            f"Block format '{node.driver_name}' used by device '{device}' does not support internal snapshots"
        )
    if not name:
        raise CommandError("Name is empty")
    if find(store.entries, None, name) is not None:
        raise CommandError(f"Snapshot with name '{name}' already exists on device '{device}'")
    name = name.encode("utf-8", "surrogateescape")[:_NAME_LENGTH].decode("utf-8", "ignore")
    try:
        return await store.create(name, time.time_ns() // 1000 * 1000)
    except FusebdError as error:
        reason = os.strerror(error.errno)
        raise CommandError(f"Failed to create snapshot '{name}' on device '{device}': {reason}") from error


async def delete(graph: Graph, device: str, id: str | None, name: str | None) -> SnapshotInfo:  # noqa: A002
    """Have the node *device* forget the snapshot that has the *id* and the *name*, of which one may be None."""
    async with graph.lock:
        node = root_node(graph, device)
        if id is None and name is None:
            raise CommandError("Name or id must be provided")
        store, found = _find(node, device, id, name)
        _check_unused(store, found)
        async with graph.drained(node):
            await store.delete(found)
        return found


async def apply(graph: Graph, device: str, id: str | None, name: str | None) -> SnapshotInfo:  # noqa: A002
    """Make the content of the node *device* that of a snapshot, as a write of all of it would.

    Raises PermissionConflict where such a write was refused, and what the store raises.
    """
    async with graph.lock:
        node = root_node(graph, device)
        if id is None and name is None:
            raise CommandError("Name or id must be provided")
        store, found = _find(node, device, id, name)
        if node.dirty_bitmaps:
            raise CommandError("Device has active dirty bitmaps")
        root = graph.attach_root(node, UNNAMED, Perm.WRITE | Perm.RESIZE, report_errors=False)
        try:
            async with graph.drained(node):
                await store.apply(found)
                node.changed_aside()
        finally:
            await graph.detach_root_locked(root)
        return found


async def remove_again(graph: Graph, device: str, snapshot: SnapshotInfo) -> None:
    """Undo ``create``: the transaction that it was part of has failed."""
    store = store_of(root_node(graph, device))
    assert store is not None
    await store.delete(snapshot)


def root_node(graph: Graph, device: str) -> Node:
    """The node *device*, which no other is built on but filters that were inserted, and those who read snapshots."""
    node = graph.nodes.get(device)
    if node is None or not node.is_open:
        raise GraphError(f"Cannot find device='{device}' nor node-name='{device}'")
    for edge in node.parents:
        parent = edge.parent
        if isinstance(edge, Root) or parent is None or parent.driver_name == READER:
            continue
        if parent.inserted_over is None:
            raise GraphError("Need a root block node")
    return node


def _find(node: Node, device: str, id: str | None, name: str | None) -> tuple[SnapshotStore, SnapshotInfo]:  # noqa: A002
    store = store_of(node)
    if store is None:
        raise CommandError(f"Failed to get a snapshot list: {os.strerror(errno.ENOTSUP)}", errno=errno.ENOTSUP)
    found = find(store.entries, id, name)
    if found is None:
        words = ["null" if word is None else word for word in (id, name)]
        raise CommandError(f"Snapshot with id '{words[0]}' and name '{words[1]}' does not exist on device '{device}'")
    return store, found


def _check_unused(store: SnapshotStore, snapshot: SnapshotInfo) -> None:
    if store.users[snapshot.id]:
        raise CommandError(f"Snapshot with id '{snapshot.id}' and name '{snapshot.name}' is in use", errno=errno.EBUSY)
