"""Snapshots made, forgotten, applied and read.

Refcounts are raised before anything new refers to a cluster, and lowered when nothing does any more; one sector of the
header, written when all that it relies on is durable, turns from the one to the other.  Between the two, refcounts
and COPIED flags do not agree, which harms no data: COPIED with a refcount that is too high is right still.  The dirty
bit is set meanwhile (version 2 has none), so that after a crash whoever opens the image sets that right, too.

An image that was applied gets a new L1 table together with its new length, in one write.

Behaviour and messages: QEMU block/qcow2-snapshot.c.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import trio

from fusebd.block.snapshots import SnapshotInfo, SnapshotStore
from fusebd.drivers.qcow2.header import check_table, l1_entries_for
from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.options import OL_ACTIVE_L1, OL_ACTIVE_L2, OL_SNAPSHOT_TABLE
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.drivers.qcow2.references import References, to_big_endian, without_copied
from fusebd.drivers.qcow2.snapshots import Snapshot, protect_snapshots
from fusebd.drivers.qcow2.tables import Tables
from fusebd.errors import BlockIOError, CommandError, FusebdError
from fusebd.ondisk import qcow2 as ondisk

if TYPE_CHECKING:
    from fusebd.drivers.qcow2.driver import Qcow2

log = logging.getLogger(__name__)

_LEADING_NUMBER = re.compile(r"\s*\+?([0-9]+)")


class Qcow2Snapshots(SnapshotStore):
    """*entries* is the driver's list, changed in place; *discard* is the option pass-discard-snapshot."""

    def __init__(
        self,
        driver: Qcow2,
        image: Image,
        tables: Tables,
        refcounts: Refcounts,
        entries: list[Snapshot],
        *,
        discard: bool,
    ) -> None:
        super().__init__()
        self._driver, self._image, self._tables, self._refcounts = driver, image, tables, refcounts
        self._entries = entries
        self._discard = discard
        self._references = References(image, tables, refcounts)
        self._restored = True  #: refcounts and flags are as they were before the change that has failed
        self._sound = True  #: and they were right before it

    @property
    def entries(self) -> Sequence[Snapshot]:
        return self._entries

    # -- the three changes ----------------------------------------------------------------------

    async def create(self, name: str, time_ns: int) -> SnapshotInfo:
        image, tables = self._image, self._tables
        header = image.header
        if len(self._entries) >= ondisk.MAX_SNAPSHOTS:
            raise image.error("create snapshot", code=errno.EFBIG)
        async with self._changing():
            l1 = without_copied(tables.l1)
            offset = await self._store_l1(l1)
            highest = max((int(m[1]) for s in self._entries if (m := _LEADING_NUMBER.match(s.id))), default=0)
            number = str(highest + 1)
            snapshot = Snapshot(
                id=number,
                name=name,
                date_sec=time_ns // 10**9,
                date_nsec=time_ns % 10**9,
                vm_clock_nsec=time_ns,
                l1_table_offset=offset,
                l1_size=len(l1),
                disk_size=header.size,
                extra_data=b"",
                id_str=number.encode(),
                name_str=name.encode(),
            )

            async def undo() -> None:
                await self._abandon_l1(offset, len(l1))

            await self._add_references(l1, undo)
            take_back = self._undoing(l1, undo)
            try:
                await self._references.set_copied()
                await image.file.flush()
            except BaseException:
                with trio.CancelScope(shield=True):
                    await take_back()
                raise
            await self._replace_table([*self._entries, snapshot], take_back)
        return snapshot

    async def delete(self, snapshot: SnapshotInfo) -> None:
        image, refcounts = self._image, self._refcounts
        assert isinstance(snapshot, Snapshot)
        _check_l1(snapshot, image)
        async with self._changing():
            l1 = await self._references.read_l1(snapshot.l1_table_offset, snapshot.l1_size)

            async def undo() -> None:
                """Nothing was changed before."""

            try:
                await self._replace_table([entry for entry in self._entries if entry is not snapshot], undo)
            except BlockIOError as error:
                raise _failed("Failed to remove snapshot from snapshot list", error) from error
            self._restored = False
            try:
                await self._references.lower_all(l1, discard=self._discard)
                await self._lower(snapshot.l1_table_offset, 8 * snapshot.l1_size)
                await refcounts.write_back()
                await image.file.flush()
            except BlockIOError as error:
                raise _failed("Failed to free the cluster and L1 table", error) from error
            try:
                await self._references.set_copied()
                await image.file.flush()
            except BlockIOError as error:
                raise _failed("Failed to update snapshot status in disk", error) from error
            self._restored = True

    async def apply(self, snapshot: SnapshotInfo) -> None:
        image, tables, refcounts = self._image, self._tables, self._refcounts
        assert isinstance(snapshot, Snapshot)
        _check_l1(snapshot, image)
        header = image.header
        size = snapshot.disk_size - snapshot.disk_size % 512
        entries = max(snapshot.l1_size, l1_entries_for(header, size))
        if entries > ondisk.MAX_L1_BYTES // 8:
            raise image.error("apply snapshot", code=errno.EFBIG)
        async with self._changing():
            l1 = without_copied(await self._references.read_l1(snapshot.l1_table_offset, snapshot.l1_size))
            l1.extend([0] * (entries - len(l1)))
            offset = await self._store_l1(l1)

            async def undo() -> None:
                await self._abandon_l1(offset, len(l1))

            await self._add_references(l1, undo)
            take_back = self._undoing(l1, undo)
            new, old = (
                ondisk.DISK_FIELDS.build(
                    {"size": length, "crypt_method": header.crypt_method, "l1_size": number, "l1_table_offset": at}
                )
                for length, number, at in ((size, len(l1), offset), (header.size, len(tables.l1), tables.l1_offset))
            )
            await image.switch(ondisk.SIZE_OFFSET, new, old, take_back)
            before, before_offset = tables.l1, tables.l1_offset
            self._show(l1, offset, size)
            self._restored = False
            await self._references.lower_all(before, discard=self._discard)
            await self._lower(before_offset, 8 * len(before))
            await refcounts.write_back()
            await image.file.flush()
            await self._references.set_copied()
            await image.file.flush()
            self._restored = True

    async def rewrite(self) -> None:
        """Write the table anew, with all that entries can have; ``Image.lock`` is held.  Raises BlockIOError."""

        async def undo() -> None:
            """Nothing else has changed."""

        await self._replace_table(list(self._entries), undo)

    def _show(self, l1: array[int], offset: int, size: int) -> None:
        """The active L1 table is *l1* at the host *offset* now, the disk has *size* bytes."""
        image, tables = self._image, self._tables
        tables.l1, tables.l1_offset = l1, offset
        image.header.size, image.header.l1_size, image.header.l1_table_offset = size, len(l1), offset
        image.metadata.forget(OL_ACTIVE_L1 | OL_ACTIVE_L2)
        tables.protect()
        self._driver.content_replaced(size)

    # -- their parts ----------------------------------------------------------------------------

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[None]:
        """All is written back and nothing cached or waiting; the dirty bit is set until all is right again."""
        image = self._image
        image.check_usable()
        if image.header.incompatible_features & ondisk.INCOMPAT_DATA_FILE:
            raise image.error("snapshot", code=errno.ENOTSUP)
        await self._driver.write_out()
        async with image.lock:
            self._tables.slices.clear()
            self._sound = self._sound and self._restored
            self._restored = True
            await image.set_incompatible(image.header.incompatible_features | ondisk.INCOMPAT_DIRTY)
            try:
                yield
            finally:
                with trio.CancelScope(shield=True):
                    await self.clean()

    async def clean(self) -> None:
        """Take the dirty bit away if the image is as it should be; with ``Image.lock`` held.

        An error is logged: who opens the image next repairs it without need.
        """
        image = self._image
        dirty = image.header.incompatible_features & ondisk.INCOMPAT_DIRTY
        if not (dirty and self._sound and self._restored and image.usable):
            return
        try:
            await self._refcounts.write_back()
            await image.file.flush()
            await image.set_incompatible(image.header.incompatible_features & ~ondisk.INCOMPAT_DIRTY)
        except BlockIOError as error:
            log.error("%s: could not clear the dirty bit: %s", image.node.name, error)

    async def _store_l1(self, l1: array[int]) -> int:
        """Write a new L1 table *l1*; its host offset, 0 if it is empty."""
        image = self._image
        length = 8 * len(l1)
        if not length:
            return 0
        clusters = -(-length >> image.cluster_bits)
        offset = await self._refcounts.allocate(clusters, "L1 table")
        try:
            await image.check_overlap(offset, length)
            await image.write(offset, to_big_endian(l1).ljust(clusters << image.cluster_bits, b"\0"))
        except BaseException:
            await self._refcounts.abandon(offset, clusters)
            raise
        return offset

    async def _abandon_l1(self, offset: int, entries: int) -> None:
        if entries:
            await self._refcounts.abandon(offset, -(-8 * entries >> self._image.cluster_bits))

    async def _add_references(self, l1: array[int], undo: Callable[[], Awaitable[None]]) -> None:
        """Raise the refcounts of all that *l1* refers to, durably; *undo* if that fails."""
        self._restored = False
        try:
            await self._references.raise_all(l1)
            try:
                await self._refcounts.write_back()
                await self._image.file.flush()
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._references.lower_all(l1)
                raise
        except BaseException:
            with trio.CancelScope(shield=True):
                await undo()
            self._restored = True
            raise
        self._restored = True

    def _undoing(self, l1: array[int], undo: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        """What takes back the references that *l1* has added, and then does *undo*."""

        async def take_back() -> None:
            self._restored = False
            with suppress(BlockIOError):
                await self._references.lower_all(l1)
                await undo()
                await self._refcounts.write_back()
                await self._image.file.flush()
                await self._references.set_copied()
                self._restored = True

        return take_back

    async def _replace_table(self, entries: list[Snapshot], undo: Callable[[], Awaitable[None]]) -> None:
        """Have the header refer to a new table of *entries*, durably; *undo* if the old one is there still."""
        image, refcounts = self._image, self._refcounts
        header = image.header
        try:
            parts = [entry.build() for entry in entries]
            data = b"".join(part.ljust(-(-len(part) // 8) * 8, b"\0") for part in parts[:-1]) + b"".join(parts[-1:])
            if len(data) > ondisk.MAX_SNAPSHOT_TABLE_BYTES:
                raise image.error("write snapshot table", code=errno.EFBIG)
            clusters = -(-len(data) >> image.cluster_bits)
            offset = await refcounts.allocate(clusters, "snapshot table") if data else 0
        except BaseException:
            with trio.CancelScope(shield=True):
                await undo()
            raise

        async def undo_all() -> None:
            if data:
                await refcounts.abandon(offset, clusters)
            await undo()

        try:
            if data:
                await image.check_overlap(offset, len(data))
                await image.write(offset, data)
            await refcounts.write_back()
            await image.file.flush()
        except BaseException:
            with trio.CancelScope(shield=True):
                await undo_all()
            raise
        new, old = (
            ondisk.SNAPSHOT_FIELDS.build({"nb_snapshots": number, "snapshots_offset": at})
            for number, at in ((len(entries), offset), (header.nb_snapshots, header.snapshots_offset))
        )
        before_offset, before_length = header.snapshots_offset, header.snapshots_length
        await image.switch(ondisk.SNAPSHOT_FIELDS_OFFSET, new, old, undo_all)
        header.nb_snapshots, header.snapshots_offset, header.snapshots_length = len(entries), offset, len(data)
        self._entries[:] = entries
        image.metadata.remove(OL_SNAPSHOT_TABLE, before_offset, before_length)
        image.metadata.add(OL_SNAPSHOT_TABLE, offset, len(data))
        try:
            await self._lower(before_offset, before_length)
            await protect_snapshots(image, self._entries)
        except BlockIOError as error:
            log.error("%s: after a change of the snapshot table: %s", image.node.name, error)

    async def _lower(self, offset: int, length: int) -> None:
        """Nobody refers to the table of *length* bytes at the host *offset* any more."""
        if length:
            bits = self._image.cluster_bits
            first = offset >> bits
            count = ((offset + length - 1) >> bits) + 1 - first
            await self._refcounts.lower(first, count, discard=self._discard)

    # -- reading --------------------------------------------------------------------------------

    async def view(self, snapshot: SnapshotInfo) -> Qcow2:
        assert isinstance(snapshot, Snapshot)
        image, active = self._image, self._tables
        image.check_usable()
        _check_l1(snapshot, image)
        tables = Tables(image, self._refcounts, slice_bytes=active.slice_bytes, max_slices=active.max_slices)
        try:
            tables.l1 = await self._references.read_l1(snapshot.l1_table_offset, snapshot.l1_size)
        except BlockIOError as error:
            raise error.prefixed("Failed to read l1 table for snapshot") from None
        tables.l1_offset = snapshot.l1_table_offset
        return self._driver.showing(tables, snapshot.disk_size - snapshot.disk_size % 512)


def _check_l1(snapshot: Snapshot, image: Image) -> None:
    """Raise ImageError unless the L1 table of *snapshot* can be where it is said to be."""
    check_table(
        snapshot.l1_table_offset, snapshot.l1_size, 8, ondisk.MAX_L1_BYTES, image.cluster_size, "Snapshot L1 table"
    )


def _failed(what: str, error: FusebdError) -> CommandError:
    return CommandError(f"{what}: {os.strerror(error.errno)}", errno=error.errno)
