"""Refcounts made anew from the tables, for an image whose dirty bit says that they were not kept.

What is counted, and how COPIED flags follow from it: QEMU docs/interop/qcow2.txt, qcow2_check_refcounts
(block/qcow2-refcount.c).
"""

from __future__ import annotations

import logging
from array import array

from fusebd.drivers.qcow2 import mapping
from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.drivers.qcow2.snapshots import Snapshot
from fusebd.drivers.qcow2.tables import Tables
from fusebd.errors import ImageError
from fusebd.ondisk import qcow2 as ondisk

log = logging.getLogger(__name__)


async def rebuild_refcounts(
    image: Image, tables: Tables, refcounts: Refcounts, snapshots: list[Snapshot], snapshot_table_length: int
) -> None:
    """Make refcounts and COPIED flags agree with what the tables refer to, durably.

    Suspends while tables are read.  Raises ImageError where references cannot be right, BlockIOError.
    """
    log.warning("%s: image was not closed cleanly, rebuilding its refcounts", image.node.name)
    async with image.lock:
        count = _Counter(image, refcounts)
        count.add(0, image.cluster_size)
        count.add(refcounts.table_offset, len(refcounts.table) * 8)
        for index in range(len(refcounts.table)):
            if offset := refcounts.block_offset(index):
                count.add_cluster(offset)
        count.add(image.header.snapshots_offset, snapshot_table_length)
        await count.add_tables(tables.l1, tables.l1_offset)
        for snapshot in snapshots:
            l1 = _words(await image.read(snapshot.l1_table_offset, snapshot.l1_size * 8))
            await count.add_tables(l1, snapshot.l1_table_offset)
        await _store(count, refcounts)
        await refcounts.write_back()
        await image.file.flush()
        await _fix_copied(image, tables, count)
        await image.file.flush()


def _words(data: bytearray) -> array[int]:
    words = array("Q", bytes(data))
    words.byteswap()
    return words


class _Counter:
    """Counts references; ``counts`` has an array for each refcount block that should be there."""

    def __init__(self, image: Image, refcounts: Refcounts) -> None:
        self._image = image
        self._per_block = refcounts.per_block
        self.counts: dict[int, array[int]] = {}

    def of(self, cluster: int) -> int:
        counts = self.counts.get(cluster // self._per_block)
        return counts[cluster % self._per_block] if counts is not None else 0

    def add(self, offset: int, length: int) -> None:
        """One reference to each cluster that the bytes touch."""
        if not length:
            return
        bits = self._image.cluster_bits
        if offset + length - 1 > ondisk.MAX_CLUSTER_OFFSET:
            raise ImageError(f"reference to offset {offset:#x}, which cannot be")
        for cluster in range(offset >> bits, ((offset + length - 1) >> bits) + 1):
            index, at = divmod(cluster, self._per_block)
            counts = self.counts.get(index)
            if counts is None:
                counts = self.counts[index] = array("I", bytes(4 * self._per_block))
            counts[at] += 1

    def add_cluster(self, offset: int) -> None:
        """One reference to the cluster at *offset*, which has to be the beginning of one."""
        if offset & self._image.cluster_mask:
            raise ImageError(f"cluster offset {offset:#x} is unaligned")
        self.add(offset, 1)

    async def add_tables(self, l1: array[int], l1_offset: int) -> None:
        """The references to an L1 table, to its L2 tables, and from those to data."""
        image = self._image
        self.add(l1_offset, len(l1) * 8)
        for l1_entry in l1:
            offset = l1_entry & ondisk.OFFSET_MASK
            if not offset:
                continue
            self.add_cluster(offset)
            for entry in _words(await image.read(offset, image.cluster_size)):
                if not entry:
                    continue
                kind = mapping.kind_of(entry)
                if kind == mapping.COMPRESSED:
                    self.add(*ondisk.parse_compressed(entry, image.cluster_bits))
                elif kind in (mapping.DATA, mapping.ZERO_ALLOCATED):
                    self.add_cluster(entry & ondisk.OFFSET_MASK)


async def _store(count: _Counter, refcounts: Refcounts) -> None:
    """Put the counts into the refcount blocks, all of which have to exist."""
    width = refcounts.width
    for index in sorted(count.counts):
        if not refcounts.block_offset(index):
            raise ImageError(f"refcount block {index} is missing")
    for index in range(len(refcounts.table)):
        if not refcounts.block_offset(index):
            continue
        counts = count.counts.get(index)
        block = await refcounts.block(index)
        for at in range(refcounts.per_block):
            value = counts[at] if counts is not None else 0
            if value > width.maximum:
                raise ImageError(f"cluster {index * refcounts.per_block + at} has too many references")
            if width.get(block.data, at) != value:
                width.set(block.data, at, value)
                block.dirty = True


async def _fix_copied(image: Image, tables: Tables, count: _Counter) -> None:
    """Set COPIED in the active tables just where the refcount is one."""
    bits = image.cluster_bits
    changed = False
    for index, l1_entry in enumerate(tables.l1):
        offset = l1_entry & ondisk.OFFSET_MASK
        if not offset:
            continue
        wanted = offset | (ondisk.COPIED if count.of(offset >> bits) == 1 else 0)
        if wanted != l1_entry:
            tables.l1[index] = wanted
            changed = True
        entries = _words(await image.read(offset, image.cluster_size))
        if _fix_entries(entries, count, bits):
            entries.byteswap()
            await image.write(offset, entries.tobytes())
    if changed:
        swapped = array("Q", tables.l1)
        swapped.byteswap()
        await image.write(tables.l1_offset, swapped.tobytes())


def _fix_entries(entries: array[int], count: _Counter, cluster_bits: int) -> bool:
    changed = False
    for index, entry in enumerate(entries):
        if mapping.kind_of(entry) not in (mapping.DATA, mapping.ZERO_ALLOCATED):
            continue
        wanted = entry & ~ondisk.COPIED
        if count.of((entry & ondisk.OFFSET_MASK) >> cluster_bits) == 1:
            wanted |= ondisk.COPIED
        if wanted != entry:
            entries[index] = wanted
            changed = True
    return changed
