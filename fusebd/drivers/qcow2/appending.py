"""The plain case of a write that allocates: part of one cluster that is not mapped, into a new one past the file's end.

Nothing is to be read or zeroed around it, and what is needed of the metadata is in memory, so that it can be taken and
linked without suspending.  The steps and their order are those of ``fusebd.drivers.qcow2.allocation``, which is the way
of all other writes, at a third of the cost.
"""

from __future__ import annotations

from fusebd.block.child import Buffers
from fusebd.block.shield import shielded
from fusebd.drivers.qcow2.allocation import Allocator, Piece
from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.drivers.qcow2.tables import Slice, Tables
from fusebd.ondisk import qcow2 as ondisk


class Appender:
    """Carries out such writes of one image, on behalf of *allocator*."""

    def __init__(self, image: Image, tables: Tables, refcounts: Refcounts, allocator: Allocator) -> None:
        self._image, self._tables, self._refcounts, self._allocator = image, tables, refcounts, allocator
        #: images that this is for; nobody may have to be told of the steps (blkdebug) either
        self._suits = image.data_file is None and image.encryption is None and tables.words == 1

    def take(self, guest_offset: int) -> int:
        """A new cluster for the one at *guest_offset*, which is not mapped, for ``write``; 0 where that cannot be.

        The L2 slice is in the cache, there is no backing node, and overlaps with metadata are looked up by clusters.
        """
        image, tables = self._image, self._tables
        if (
            not self._suits
            or image.lock.held
            or image.file.events
            or not tables.l1[guest_offset >> tables.l1_shift] & ondisk.COPIED
            or self._allocator.is_under_way(guest_offset >> image.cluster_bits)
        ):
            return 0
        return self._refcounts.take_from(image.file.driver.length)

    async def write(self, item: Slice, guest_offset: int, host_offset: int, bufs: Buffers, size: int) -> None:
        """Write *bufs* to the new cluster at *host_offset*, and link it into *item*.  Suspends where the file does."""
        image, tables, allocator = self._image, self._tables, self._allocator
        cluster = guest_offset >> image.cluster_bits
        place = host_offset + (guest_offset & image.cluster_mask)
        in_flight = allocator.begin(cluster, cluster + 1)
        epoch = image.epoch
        epoch.count += 1
        try:
            await image.file.pwritev(place, bufs)
        except BaseException:
            await shielded(allocator.undo(Piece.of_new(guest_offset, place, size, in_flight)))
            raise
        finally:
            epoch.count -= 1
        if (
            image.lock.held
            or not image.usable
            or tables.slices.get(item.number) is not item
            or not tables.l1[guest_offset >> tables.l1_shift] & ondisk.COPIED
        ):
            await shielded(allocator.link(Piece.of_new(guest_offset, place, size, in_flight)))
            return
        item.entries[cluster & tables.entry_mask] = host_offset | ondisk.COPIED
        item.dirty = item.used = True
        self._refcounts.needs_flush = True
        allocator.end(in_flight)
