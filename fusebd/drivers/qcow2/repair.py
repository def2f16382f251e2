"""Refcounts made anew from the tables, for an image whose dirty bit says that they were not kept.

What is counted, and how COPIED flags follow from it: QEMU docs/interop/qcow2.txt, qcow2_check_refcounts
(block/qcow2-refcount.c).
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import groupby

import trio

from fusebd.drivers.qcow2.bitmapdirectory import used_areas
from fusebd.drivers.qcow2.header import check_table
from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.drivers.qcow2.snapshots import Snapshot
from fusebd.drivers.qcow2.tables import Tables
from fusebd.errors import ImageError
from fusebd.ondisk import qcow2 as ondisk

log = logging.getLogger(__name__)

#: clusters that are counted in one array: few, because an image may refer to anywhere
_AREA = 64


async def rebuild_refcounts(
    image: Image, tables: Tables, refcounts: Refcounts, snapshots: list[Snapshot], snapshot_table_length: int
) -> None:
    """Make refcounts and COPIED flags agree with what the tables refer to, durably.

    Suspends while tables are read, and after each.  Raises ImageError where references cannot be right, BlockIOError.
    """
    log.warning("%s: image was not closed cleanly, rebuilding its refcounts", image.node.name)
    async with image.lock:
        count = _Counter(image)
        count.add(0, image.cluster_size)
        count.add(refcounts.table_offset, len(refcounts.table) * 8)
        blocks = [index for index in range(len(refcounts.table)) if refcounts.block_offset(index)]
        for offset, number in Counter(map(refcounts.block_offset, blocks)).items():
            if number > 1:
                raise ImageError(f"refcount block at offset {offset:#x} is used twice")
            count.add_table(offset)
        count.add(image.header.snapshots_offset, snapshot_table_length)
        count.add(image.header.crypto_header_offset, image.header.crypto_header_length)
        for offset, length in await used_areas(image):
            count.add(offset, length)
        await _count_data(image, tables, snapshots, count)
        await _store(count, refcounts, blocks)
        await refcounts.write_back()
        await image.file.flush()
        await _fix_copied(image, tables, count)
        await image.file.flush()


def _words(data: bytearray) -> array[int]:
    words = array("Q", bytes(data))
    words.byteswap()
    return words


class _Counter:
    """Counts references to host clusters, in arrays for areas in which there are any."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._areas: dict[int, array[int]] = {}

    def of(self, cluster: int) -> int:
        """The references to one cluster."""
        counts = self._areas.get(cluster // _AREA)
        return counts[cluster % _AREA] if counts is not None else 0

    def all(self) -> Iterator[tuple[int, int]]:
        """All clusters that have references, with their number, in order."""
        for area in sorted(self._areas):
            for at, value in enumerate(self._areas[area]):
                if value:
                    yield area * _AREA + at, value

    def add(self, offset: int, length: int, number: int = 1) -> None:
        """*number* references to each cluster that the bytes touch."""
        if not length:
            return
        bits = self._image.cluster_bits
        if offset + length - 1 > ondisk.MAX_CLUSTER_OFFSET:
            raise ImageError(f"reference to offset {offset:#x}, which cannot be")
        for cluster in range(offset >> bits, ((offset + length - 1) >> bits) + 1):
            area, at = divmod(cluster, _AREA)
            counts = self._areas.get(area)
            if counts is None:
                counts = self._areas[area] = array("Q", bytes(8 * _AREA))
            counts[at] += number

    def add_cluster(self, offset: int, number: int = 1) -> None:
        """*number* references to the cluster at *offset*, which has to be the beginning of one."""
        if offset & self._image.cluster_mask:
            raise ImageError(f"cluster offset {offset:#x} is unaligned")
        self.add(offset, 1, number)

    def add_table(self, offset: int, number: int = 1) -> None:
        """The same for a cluster of metadata, which has to be in the file."""
        if offset >= self._image.file.node.driver.length:
            raise ImageError(f"table offset {offset:#x} is past the end of the file")
        self.add_cluster(offset, number)


async def _count_data(image: Image, tables: Tables, snapshots: list[Snapshot], count: _Counter) -> None:
    """The references to L1 tables, to their L2 tables, and from those to data.

    However often tables refer to the same one, it is read once.
    """
    for snapshot in snapshots:
        check_table(
            snapshot.l1_table_offset, snapshot.l1_size, 8, ondisk.MAX_L1_BYTES, image.cluster_size, "Snapshot L1 table"
        )
    l1_tables = Counter((s.l1_table_offset, s.l1_size * 8) for s in snapshots)
    l1_tables[tables.l1_offset, len(tables.l1) * 8] += 1
    l2_tables: Counter[int] = Counter()
    for (offset, length), number in l1_tables.items():
        count.add(offset, length, number)
        l1 = _words(await image.read(offset, length))
        for l1_entry, times in Counter(l1).items():
            if l2_offset := l1_entry & ondisk.OFFSET_MASK:
                l2_tables[l2_offset] += number * times
        await trio.lowlevel.checkpoint()
    for offset, number in l2_tables.items():
        count.add_table(offset, number)
        if image.data_file is not None:
            continue
        for entry in _words(await image.read(offset, image.cluster_size))[:: tables.words]:
            if not entry:
                continue
            if entry & ondisk.COMPRESSED:
                count.add(*ondisk.parse_compressed(entry, image.cluster_bits), number)
            elif entry & ondisk.OFFSET_MASK:
                count.add_cluster(entry & ondisk.OFFSET_MASK, number)
        await trio.lowlevel.checkpoint()


async def _store(count: _Counter, refcounts: Refcounts, blocks: list[int]) -> None:
    """Put the counts into the refcount blocks, of which those with the indexes *blocks* exist."""
    width, per_block = refcounts.width, refcounts.per_block
    counted = groupby(count.all(), lambda item: item[0] // per_block)
    index, counts = next(counted, (-1, iter(())))
    for existing in blocks:
        if 0 <= index < existing:
            break
        data = bytearray(refcounts.image.cluster_size)
        if index == existing:
            for cluster, value in counts:
                if value > width.maximum:
                    raise ImageError(f"cluster {cluster} has too many references")
                width.set(data, cluster % per_block, value)
            index, counts = next(counted, (-1, iter(())))
        block = await refcounts.block(existing)
        if block.data != data:
            block.data, block.dirty = data, True
        await trio.lowlevel.checkpoint()
    if index >= 0:
        raise ImageError(f"refcount block {index} is missing")


async def _fix_copied(image: Image, tables: Tables, count: _Counter) -> None:
    """Set COPIED in the active tables just where the refcount is one."""
    bits = image.cluster_bits
    changed = False
    l2_offsets = set()
    for index, l1_entry in enumerate(tables.l1):
        offset = l1_entry & ondisk.OFFSET_MASK
        if not offset:
            continue
        l2_offsets.add(offset)
        wanted = offset | (ondisk.COPIED if count.of(offset >> bits) == 1 else 0)
        if wanted != l1_entry:
            tables.l1[index] = wanted
            changed = True
    for offset in sorted(l2_offsets):
        if image.data_file is not None:
            continue
        entries = _words(await image.read(offset, image.cluster_size))
        if _fix_entries(entries, count, bits, tables.words):
            entries.byteswap()
            await image.write(offset, entries.tobytes())
        await trio.lowlevel.checkpoint()
    if changed:
        swapped = array("Q", tables.l1)
        swapped.byteswap()
        await image.write(tables.l1_offset, swapped.tobytes())


def _fix_entries(entries: array[int], count: _Counter, cluster_bits: int, words: int) -> bool:
    """Whether anything has changed; *words* is how many an entry has."""
    changed = False
    for index in range(0, len(entries), words):
        entry = entries[index]
        if entry & ondisk.COMPRESSED or not entry & ondisk.OFFSET_MASK:
            continue
        wanted = entry & ~ondisk.COPIED
        if count.of((entry & ondisk.OFFSET_MASK) >> cluster_bits) == 1:
            wanted |= ondisk.COPIED
        if wanted != entry:
            entries[index] = wanted
            changed = True
    return changed
