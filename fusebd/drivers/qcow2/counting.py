"""What the tables of an image refer to, counted for each cluster of the file.

What is counted: QEMU docs/interop/qcow2.txt.  What is wrong, in which words: qcow2_check_refcounts
(block/qcow2-refcount.c).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import trio

from fusebd.drivers.qcow2.bitmapdirectory import used_areas
from fusebd.drivers.qcow2.header import check_table
from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.refblock import RefcountWidth
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.drivers.qcow2.references import from_big_endian
from fusebd.drivers.qcow2.snapshots import Snapshot
from fusebd.drivers.qcow2.tables import Tables
from fusebd.errors import ImageError
from fusebd.ondisk import qcow2 as ondisk

#: clusters that are counted in one array: few, because an image may refer to anywhere, and no more than any block has
_AREA = 64
_ONES = array("Q", [1]) * _AREA
#: entries that are looked at together, for most of them are in a row
_PART = 64


@dataclass(slots=True)
class Allocation:
    """How many clusters of the disk have a place in the file, and how."""

    allocated: int = 0
    fragmented: int = 0  #: not behind the one before
    compressed: int = 0


class ReferenceCounts:
    """References to host clusters, in arrays for areas in which there are any.

    *problem* is called with what is wrong with a reference, which is not counted then if it returns; *limit* is how far
    references may reach, in bytes of the file.
    """

    def __init__(self, image: Image, problem: Callable[[str], None], limit: int) -> None:
        self._image = image
        self.problem = problem
        self._limit = limit
        self._areas: dict[int, array[int]] = {}

    def of(self, cluster: int) -> int:
        """The references to one cluster."""
        counts = self._areas.get(cluster // _AREA)
        return counts[cluster % _AREA] if counts is not None else 0

    def blocks(self, per_block: int) -> set[int]:
        """Which refcount blocks, of *per_block* entries each, would have something in them."""
        return {area * _AREA // per_block for area in self._areas}

    def block(self, index: int, width: RefcountWidth, cluster_size: int) -> bytearray | None:
        """What refcount block *index* should have in it; None if one of its counts is more than *width* can hold."""
        per_block = cluster_size * 8 >> width.order
        data = bytearray(cluster_size)
        first = index * per_block // _AREA
        for area in range(first, first + per_block // _AREA):
            counts, at = self._areas.get(area), (area - first) * _AREA
            if counts is None:
                continue
            if counts == _ONES:
                width.set_ones(data, at, at + _AREA)
                continue
            if max(counts) > width.maximum:
                return None
            for number, value in enumerate(counts):
                if value:
                    width.set(data, at + number, value)
        return data

    def all(self) -> Iterator[tuple[int, int]]:
        """All clusters that have references, with their number, in order."""
        for area in sorted(self._areas):
            for at, value in enumerate(self._areas[area]):
                if value:
                    yield area * _AREA + at, value

    def add(self, offset: int, length: int, number: int = 1) -> bool:
        """*number* references to each cluster that the bytes touch; whether there can be such."""
        if not length:
            return True
        bits = self._image.cluster_bits
        if offset + length > self._limit:
            self.problem(
                "counting reference for region exceeding the end of the file by one cluster or more:"
                f" offset {offset:#x} size {length:#x}"
            )
            return False
        for cluster in range(offset >> bits, ((offset + length - 1) >> bits) + 1):
            area, at = divmod(cluster, _AREA)
            counts = self._areas.get(area)
            if counts is None:
                counts = self._areas[area] = array("Q", bytes(8 * _AREA))
            counts[at] += number
        return True

    def add_run(self, offset: int, clusters: int, number: int) -> bool:
        """``add`` for *clusters* from *offset* on, where one begins; past the limit, False and nothing counted."""
        if offset + (clusters << self._image.cluster_bits) > self._limit:
            return False
        cluster = offset >> self._image.cluster_bits
        end = cluster + clusters
        while cluster < end:
            area, at = divmod(cluster, _AREA)
            stop = min(_AREA, at + end - cluster)
            counts = self._areas.get(area)
            if counts is None:
                counts = self._areas[area] = array("Q", bytes(8 * _AREA))
            if any(counts[at:stop]):
                for index in range(at, stop):
                    counts[index] += number
            else:
                counts[at:stop] = array("Q", [number]) * (stop - at)
            cluster += stop - at
        return True

    def add_cluster(self, offset: int, what: str, number: int = 1) -> bool:
        """``add`` for the cluster at *offset*, which has to be the beginning of one."""
        if offset & self._image.cluster_mask:
            self.problem(f"{what} offset {offset:#x} is unaligned")
        return self.add(offset, self._image.cluster_size, number)

    def add_table(self, offset: int, what: str, number: int = 1) -> bool:
        """``add_cluster`` for one that is to be read; whether it can be."""
        if not self.add_cluster(offset, what, number) or offset & self._image.cluster_mask:
            return False
        if offset >= self._image.file.node.driver.length:
            self.problem(f"{what} offset {offset:#x} is past the end of the file")
            return False
        return True


async def count_references(
    image: Image, tables: Tables, refcounts: Refcounts, snapshots: list[Snapshot], count: ReferenceCounts
) -> Allocation:
    """Count all references that there are.  No request is under way, and nothing cached is not in the file.

    Suspends while tables are read, and after each.  Raises BlockIOError, what *count*'s ``problem`` does.
    """
    header = image.header
    count.add(0, image.cluster_size)
    count.add(refcounts.table_offset, len(refcounts.table) * 8)
    blocks = [offset for index in range(len(refcounts.table)) if (offset := refcounts.block_offset(index))]
    for offset, number in Counter(blocks).items():
        if number > 1:
            count.problem(f"refcount block at offset {offset:#x} is used {number} times")
        count.add_table(offset, "refcount block", number)
    count.add(header.snapshots_offset, header.snapshots_length)
    count.add(header.crypto_header_offset, header.crypto_header_length)
    try:
        for offset, length in await used_areas(image):
            count.add(offset, length)
    except ImageError as error:
        count.problem(str(error))
    return await _count_data(image, tables, snapshots, count)


async def _count_data(image: Image, tables: Tables, snapshots: list[Snapshot], count: ReferenceCounts) -> Allocation:
    """The references to L1 tables, to their L2 tables, and from those to data.

    However often tables refer to the same one, it is read once.
    """
    l1_tables = Counter({(tables.l1_offset, len(tables.l1) * 8): 1})
    for snapshot in snapshots:
        try:
            check_table(
                snapshot.l1_table_offset,
                snapshot.l1_size,
                8,
                ondisk.MAX_L1_BYTES,
                image.cluster_size,
                "Snapshot L1 table",
            )
        except ImageError as error:
            count.problem(str(error))
            continue
        l1_tables[snapshot.l1_table_offset, snapshot.l1_size * 8] += 1
    l2_tables: Counter[int] = Counter()
    for (offset, length), number in l1_tables.items():
        count.add(offset, length, number)
        l1 = from_big_endian(await image.read(offset, length))
        for entry, times in Counter(l1).items():
            if l2_offset := entry & ondisk.OFFSET_MASK:
                l2_tables[l2_offset] += number * times
        await trio.lowlevel.checkpoint()
    active = {entry & ondisk.OFFSET_MASK for entry in tables.l1}
    allocation = Allocation()
    for offset, number in l2_tables.items():
        if count.add_table(offset, "L2 table", number):
            entries = from_big_endian(await image.read(offset, image.cluster_size))[:: tables.words]
            _count_entries(image, entries, number, count, allocation if offset in active else Allocation())
        await trio.lowlevel.checkpoint()
    return allocation


def _count_entries(
    image: Image, entries: array[int], number: int, count: ReferenceCounts, allocation: Allocation
) -> None:
    """The references from one L2 table, to which there are *number*."""
    expected = 0
    for start in range(0, len(entries), _PART):
        part = entries[start : start + _PART]
        offset = part[0] & ondisk.OFFSET_MASK
        if image.data_file is None and in_a_row(part, image.cluster_size) and count.add_run(offset, len(part), number):
            allocation.allocated += len(part)
            allocation.fragmented += bool(expected) and offset != expected
            expected = offset + len(part) * image.cluster_size
        else:
            expected = _count_each(image, part, number, count, allocation, expected)


def in_a_row(entries: array[int], cluster_size: int) -> bool:
    """Whether L2 *entries* are of plain clusters, one behind the other in the file."""
    first = entries[0]
    offset = first & ondisk.OFFSET_MASK
    return (
        offset > 0
        and not first & ~(ondisk.OFFSET_MASK | ondisk.COPIED)
        and not offset & (cluster_size - 1)
        and entries == array("Q", range(first, first + len(entries) * cluster_size, cluster_size))
    )


def _count_each(
    image: Image, entries: array[int], number: int, count: ReferenceCounts, allocation: Allocation, expected: int
) -> int:
    """The same entry by entry; *expected* is where the cluster before them ends, the result where the last does."""
    for entry in entries:
        if not entry:
            continue
        offset = entry & ondisk.OFFSET_MASK
        if entry & ondisk.COMPRESSED:
            if entry & ondisk.COPIED:
                count.problem(f"compressed cluster with entry {entry:#x} has the copied flag, which it must never have")
            if image.data_file is not None:
                count.problem(f"compressed cluster with entry {entry:#x} in an image with an external data file")
                continue
            count.add(*ondisk.parse_compressed(entry, image.cluster_bits), number)
            allocation.allocated += 1
            allocation.compressed += 1
            allocation.fragmented += 1
        elif offset or (image.data_file is not None and entry & ondisk.COPIED):
            allocation.allocated += 1
            if expected and offset != expected:
                allocation.fragmented += 1
            expected = offset + image.cluster_size
            if image.data_file is None:
                count.add_cluster(offset, "data cluster", number)
    return expected
