"""internal-snapshot: a snapshot that an image contains, as a read-only node of its own.

``image`` is the node whose snapshot it is, in use itself or not; the snapshot is named by ``snapshot-id``,
``snapshot-name`` or both, as where it is deleted.  While the node is there, the snapshot cannot be deleted.

fusebd's own: QEMU shows a snapshot only in place of the image (``qemu-img convert -l``).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import UNSET, Meta, UnsetType

from fusebd.block.driver import BlockStatus, Buffers, Child, Driver, Node, register
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef
from fusebd.block.perms import Perm, Role
from fusebd.block.snapshots import READER, SnapshotStore, find, store_of
from fusebd.errors import BlockIOError, ImageError, OptionError, ReadOnlyError


class InternalSnapshotOptions(BlockdevOptions, frozen=True, kw_only=True):
    image: Annotated[BlockdevRef, Meta(description="the node that has the snapshot")]
    snapshot_id: Annotated[str | UnsetType, Meta(description="the snapshot's ID")] = UNSET
    snapshot_name: Annotated[str | UnsetType, Meta(description="the snapshot's name")] = UNSET


@register(READER, InternalSnapshotOptions)
class InternalSnapshot(Driver):
    """Requests suspend where the image's driver does, and once more after that was replaced."""

    strong_options = frozenset({"snapshot-id", "snapshot-name"})
    probed_children: ClassVar[frozenset[str]] = frozenset({"image"})

    def __init__(self, node: Node, image: Child, store: SnapshotStore, snapshot_id: str) -> None:
        super().__init__(node)
        self.image = image
        self._id = snapshot_id
        self._store = store
        self._view: Driver | None = None
        store.users[snapshot_id] += 1

    @classmethod
    async def open(cls, opening: Opening, options: InternalSnapshotOptions) -> InternalSnapshot:
        opening.fall_back_to_read_only(ReadOnlyError("Internal snapshots are read-only"))
        by_id = None if options.snapshot_id is UNSET else str(options.snapshot_id)
        by_name = None if options.snapshot_name is UNSET else str(options.snapshot_name)
        if by_id is None and by_name is None:
            raise OptionError("Name or id must be provided")
        image = await opening.child("image", options.image, Role.DATA | Role.PRIMARY)
        store = store_of(image.node)
        if store is None:
            raise OptionError(f"Block format '{image.node.driver_name}' does not support internal snapshots")
        found = find(store.entries, by_id, by_name)
        if found is None:
            raise OptionError("Can't find snapshot")
        driver = cls(opening.node, image, store, found.id)
        try:
            driver.length = (await driver._current()).length
        except BaseException:
            driver._let_go()
            raise
        return driver

    async def close(self) -> None:
        self._let_go()

    def _let_go(self) -> None:
        self._view = None
        self._store.users[self._id] -= 1

    @classmethod
    def child_perm(cls, node: Node, child: str, role: Role, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        # whatever others do to the image, its snapshot does not change
        return perm & Perm.CONSISTENT_READ, Perm.ALL

    def child_refreshed(self, child: Child) -> None:
        store = store_of(child.node)
        if store is not None and store is not self._store:
            self._store.users[self._id] -= 1
            store.users[self._id] += 1
            self._store, self._view = store, None

    async def _current(self) -> Driver:
        view = self._view
        if view is None:
            snapshot = find(self._store.entries, self._id, None)
            if snapshot is None:
                raise BlockIOError(node_name=self.node.name, operation="read", reason="Can't find snapshot")
            try:
                view = self._view = await self._store.view(snapshot)
            except ImageError as error:
                raise BlockIOError(node_name=self.node.name, operation="read", reason=str(error)) from error
        return view

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        await (self._view or await self._current()).preadv(offset, bufs)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        return await (self._view or await self._current()).block_status(offset, length)
