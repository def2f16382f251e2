"""Changing the length of an image, and preallocating what is new.

Behaviour and messages: QEMU qcow2_co_truncate, qcow2_grow_l1_table (block/qcow2*.c).  Unlike there, what is new reads
as zeroes before the header says that the image is longer, and an image that became shorter keeps its L1 table,
emptied behind its end.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Awaitable, Callable

import trio

from fusebd.block.child import Buffers
from fusebd.block.driver import Preallocation
from fusebd.drivers.qcow2.allocation import Allocator
from fusebd.drivers.qcow2.header import l1_entries_for
from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.options import OL_ACTIVE_L1
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.drivers.qcow2.tables import Tables
from fusebd.drivers.qcow2.zeroing import Zeroer
from fusebd.errors import BlockIOError
from fusebd.ondisk import qcow2 as ondisk

_SECTOR = 512
_PIECE = 1 << 20


class Resizer:
    """*write* writes guest data, whatever the length is."""

    def __init__(
        self,
        image: Image,
        tables: Tables,
        refcounts: Refcounts,
        allocator: Allocator,
        zeroer: Zeroer,
        write: Callable[[int, Buffers], Awaitable[None]],
    ) -> None:
        self._image, self._tables, self._refcounts = image, tables, refcounts
        self._allocator, self._zeroer, self._write = allocator, zeroer, write

    async def truncate(
        self, old: int, new: int, prealloc: Preallocation, *, exact: bool, zero: bool, nb_snapshots: int
    ) -> None:
        """Go from *old* to *new* bytes; *zero* makes new bytes zeroes where a backing file would show.

        *exact* holds for an external data file, which gets the same length.

        Raises BlockIOError; the length in the header is then the old one.
        """
        if new % _SECTOR:
            raise self._refuse(f"The new size must be a multiple of {_SECTOR}", errno.EINVAL)
        if nb_snapshots and self._image.header.version < 3:
            raise self._refuse("Can't resize a v2 image which has snapshots")
        if new < old:
            if prealloc != "off":
                raise self._refuse("Preallocation can't be used for shrinking an image", errno.EINVAL)
            await self._set_size(new)
            mask = self._image.cluster_mask
            start, end = (new + mask) & ~mask, (old + mask) & ~mask
            await self._zeroer.forget(start, end - start)
            async with self._image.lock:
                await self._tables.drop_from(l1_entries_for(self._image.header, new))
            if self._image.data_file is not None:
                await self._image.data_file.truncate(new, exact=exact)
            return
        if zero and self._image.header.version < 3 and new > old + (-old & self._image.cluster_mask):
            # there are no zero clusters, and data for all of it might be more than the disk holds
            raise self._refuse("Failed to zero out new clusters: Operation not supported")
        await self._grow_l1(l1_entries_for(self._image.header, new))
        if self._image.data_file is not None:
            await self._image.data_file.truncate(
                new, exact=exact, prealloc=prealloc if prealloc in ("falloc", "full") else "off"
            )
            if self._image.is_raw and prealloc == "off":
                prealloc = "metadata"  # both have to read the same
        await self._fill(old, new, prealloc, zero=zero)
        await self._set_size(new)

    def _refuse(self, reason: str, code: int = errno.ENOTSUP) -> BlockIOError:
        return self._image.error("resize", code=code, reason=reason)

    async def _fill(self, old: int, new: int, prealloc: Preallocation, *, zero: bool) -> None:
        """Make the bytes from *old* up to *new* what they are to be."""
        mask = self._image.cluster_mask
        start = (old + mask) & ~mask
        # Behind the end of an image that was longer once, or in a cluster copied from a longer backing file, may be
        # anything.
        await self._write_zeroes(old, min(start, new))
        if new <= start:
            return
        end = (new + mask) & ~mask
        # where a crash has interrupted shrinking, clusters are left behind the end
        await self._zeroer.forget(start, end - start)
        if prealloc != "off":
            await self._allocator.preallocate(start, end - start, sparse=prealloc == "metadata")
        # what is there is not what zeroes are encrypted as
        encrypted = prealloc != "off" and self._image.encryption is not None
        if encrypted and self._image.header.version < 3:
            await self._write_zeroes(start, new)
        elif zero or encrypted:
            await self._zeroer.zeroize(start, end - start, 0)

    async def _write_zeroes(self, start: int, end: int) -> None:
        for at in range(start, end, _PIECE):
            await self._write(at, (memoryview(bytes(min(_PIECE, end - at))),))

    async def _set_size(self, size: int) -> None:
        """Make *size* the durable length, with all that it relies on durable before."""
        image = self._image
        async with image.lock:
            await self._tables.write_back()
            await image.file.flush()
            with trio.CancelScope(shield=True):
                await image.write(ondisk.SIZE_OFFSET, size.to_bytes(8, "big"))
                await image.file.flush()
            image.header.size = size
        image.node.set_length(size)

    async def _grow_l1(self, entries: int) -> None:
        """Give the L1 table room for *entries* entries: a new table, and then the header that points to it."""
        image, tables, refcounts = self._image, self._tables, self._refcounts
        async with image.lock:
            if entries <= len(tables.l1):
                return
            if entries * 8 > ondisk.MAX_L1_BYTES:
                raise self._refuse("Failed to grow the L1 table: File too large", errno.EFBIG)
            table = array("Q", bytes(entries * 8))
            table[: len(tables.l1)] = tables.l1
            clusters = -(-entries * 8 // image.cluster_size)
            await image.announce("l1_grow_alloc_table")
            offset = await refcounts.allocate(clusters, "L1 table")

            async def undo() -> None:
                await refcounts.abandon(offset, clusters)

            try:
                await refcounts.write_back()
                await refcounts.flush_file()
                await image.check_overlap(offset, entries * 8)
                await image.announce("l1_grow_write_table")
                swapped = array("Q", table)
                swapped.byteswap()
                await image.write(offset, swapped.tobytes().ljust(clusters * image.cluster_size, b"\0"))
                await image.file.flush()
                await image.announce("l1_grow_activate_table")
            except BaseException:
                await undo()
                raise
            old_offset, old_length = tables.l1_offset, len(tables.l1) * 8
            new_fields = ondisk.L1_FIELDS.build({"l1_size": entries, "l1_table_offset": offset})
            old_fields = ondisk.L1_FIELDS.build({"l1_size": len(tables.l1), "l1_table_offset": old_offset})
            await image.switch(ondisk.L1_FIELDS_OFFSET, new_fields, old_fields, undo)
            tables.l1, tables.l1_offset = table, offset
            image.header.l1_size, image.header.l1_table_offset = entries, offset
            image.metadata.remove(OL_ACTIVE_L1, old_offset, old_length)
            image.metadata.add(OL_ACTIVE_L1, offset, entries * 8)
            if old_length:
                refcounts.free(old_offset, old_length)
                await image.announce("cluster_free")
