"""Refcounts and COPIED flags that do not agree with the tables, found and mended.

How COPIED flags follow from refcounts: QEMU docs/interop/qcow2.txt.  What is mended, and what is counted as which kind
of mistake: qcow2_check_refcounts (block/qcow2-refcount.c), qcow2_co_check (block/qcow2.c).
"""

from __future__ import annotations

import logging
from array import array
from dataclasses import dataclass

import trio

from fusebd.block.options import Json
from fusebd.drivers.qcow2.counting import Allocation, ReferenceCounts, count_references, in_a_row
from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.drivers.qcow2.references import from_big_endian, to_big_endian
from fusebd.drivers.qcow2.snapshots import Snapshot
from fusebd.drivers.qcow2.tables import Tables
from fusebd.errors import BlockIOError, ImageError
from fusebd.ondisk import qcow2 as ondisk

log = logging.getLogger(__name__)

#: entries that are looked at together, for most of them are in a row
_PART = 64


@dataclass(slots=True)
class CheckResult:
    """QAPI ImageCheck, without the image's name."""

    corruptions: int = 0
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    allocation: Allocation | None = None
    total_clusters: int = 0
    image_end: int = 0  #: bytes

    def info(self) -> dict[str, Json]:
        allocation = self.allocation or Allocation()
        told = {
            "corruptions": self.corruptions,
            "leaks": self.leaks,
            "corruptions-fixed": self.corruptions_fixed,
            "leaks-fixed": self.leaks_fixed,
            "image-end-offset": self.image_end,
            "total-clusters": self.total_clusters,
            "allocated-clusters": allocation.allocated,
            "fragmented-clusters": allocation.fragmented,
            "compressed-clusters": allocation.compressed,
        }
        return {"check-errors": 0, **{name: value for name, value in told.items() if value}}


class Checker:
    """Looks at one image.  The caller holds ``Image.lock``; no request is under way, and no L2 slice is cached."""

    def __init__(self, image: Image, tables: Tables, refcounts: Refcounts, snapshots: list[Snapshot]) -> None:
        self._image, self._tables, self._refcounts, self._snapshots = image, tables, refcounts, snapshots
        self.result = CheckResult()

    def _corruption(self, text: str) -> None:
        self.result.corruptions += 1
        log.error("%s: %s", self._image.node.name, text)

    async def check(self, *, fix_leaks: bool, fix_errors: bool) -> CheckResult:
        """Find what is wrong, and mend what is asked for, durably.

        Suspends while tables are read, and after each.  Raises BlockIOError.
        """
        image, result = self._image, self.result
        # the last cluster may be there in part
        limit = image.file.node.driver.length + image.cluster_size - 1
        count = ReferenceCounts(image, self._corruption, limit)
        result.total_clusters = -(-image.header.size >> image.cluster_bits)
        result.allocation = await count_references(image, self._tables, self._refcounts, self._snapshots, count)
        await self._compare(count, fix_leaks=fix_leaks, fix_errors=fix_errors)
        await self._refcounts.write_back()
        await image.file.flush()
        flags = await _fix_copied(image, self._tables, self._refcounts, fix=fix_errors)
        if fix_errors:
            result.corruptions_fixed += flags
            await image.file.flush()
        else:
            result.corruptions += flags
        return result

    async def _compare(self, count: ReferenceCounts, *, fix_leaks: bool, fix_errors: bool) -> None:
        """Refcounts with references."""
        image, refcounts, result = self._image, self._refcounts, self.result
        clusters = -(-image.file.node.driver.length >> image.cluster_bits)
        highest = -1
        for index in range(len(refcounts.table)):
            first = index * refcounts.per_block
            if not refcounts.block_offset(index):
                continue
            block = await refcounts.block(index)
            if block.data == count.block(index, refcounts.width, image.cluster_size):
                if (last := refcounts.width.last(block.data)) >= 0:
                    highest = first + last
                await trio.lowlevel.checkpoint()
                continue
            for at in range(refcounts.per_block):
                stored, right = refcounts.width.get(block.data, at), count.of(first + at)
                if not stored and not right:
                    continue
                highest = first + at
                if stored == right:
                    continue
                leak = stored > right
                log.error("%s: cluster %d refcount=%d reference=%d", image.node.name, first + at, stored, right)
                if right <= refcounts.width.maximum and (fix_leaks if leak else fix_errors):
                    refcounts.width.set(block.data, at, right)
                    block.dirty = True
                    result.leaks_fixed += leak
                    result.corruptions_fixed += not leak
                else:
                    result.leaks += leak
                    result.corruptions += not leak
            await trio.lowlevel.checkpoint()
        refcounts.free_hint = 0  # what has leaked is free now
        # now that the others are right, new blocks can be allocated for these
        absent = {index for index in count.blocks(refcounts.per_block) if not refcounts.block_offset(index)}
        missing = [found for found in count.all() if found[0] // refcounts.per_block in absent] if absent else []
        end = max([clusters, *(cluster + 1 for cluster, _ in missing)])
        for cluster, right in missing:
            highest = max(highest, cluster)
            log.error("%s: cluster %d has no refcount, and %d references", image.node.name, cluster, right)
            mended = fix_errors and await self._count_again(cluster, right, end)
            result.corruptions_fixed += mended
            result.corruptions += not mended
        result.image_end = highest + 1 << image.cluster_bits

    async def _count_again(self, cluster: int, right: int, end: int) -> bool:
        """Give *cluster* a refcount block, from *end* on, that says *right*; whether that can be."""
        refcounts = self._refcounts
        refcounts.free_hint = max(refcounts.free_hint, end)
        try:
            while not await refcounts.cover(cluster, 1):
                pass
            await refcounts.update(cluster, 1, right)
        except BlockIOError as error:
            log.error("%s: cluster %d: %s", self._image.node.name, cluster, error.reason)
            return False
        return True


def _refuse(text: str) -> None:
    raise ImageError(text)


async def rebuild_refcounts(image: Image, tables: Tables, refcounts: Refcounts, snapshots: list[Snapshot]) -> None:
    """Make refcounts and COPIED flags of an image that was not closed agree with what its tables refer to, durably.

    Suspends while tables are read, and after each.  Raises ImageError where references cannot be right, BlockIOError.
    """
    log.warning("%s: image was not closed cleanly, rebuilding its refcounts", image.node.name)
    async with image.lock:
        # data that was allocated may not have been written
        count = ReferenceCounts(image, _refuse, ondisk.MAX_CLUSTER_OFFSET + 1)
        await count_references(image, tables, refcounts, snapshots, count)
        await _store(count, refcounts)
        await refcounts.write_back()
        await image.file.flush()
        await _fix_copied(image, tables, refcounts, fix=True)
        await image.file.flush()


async def _store(count: ReferenceCounts, refcounts: Refcounts) -> None:
    """Put the counts into the refcount blocks."""
    blocks = [index for index in range(len(refcounts.table)) if refcounts.block_offset(index)]
    if missing := count.blocks(refcounts.per_block) - set(blocks):
        raise ImageError(f"refcount block {min(missing)} is missing")
    for index in blocks:
        data = count.block(index, refcounts.width, refcounts.image.cluster_size)
        if data is None:
            raise ImageError(f"a cluster that refcount block {index} counts has too many references")
        block = await refcounts.block(index)
        if block.data != data:
            block.data, block.dirty = data, True
        await trio.lowlevel.checkpoint()


async def _fix_copied(image: Image, tables: Tables, refcounts: Refcounts, *, fix: bool) -> int:
    """How many entries of the active tables have COPIED and should not, or the other way round.

    It should be where the refcount is one.  *fix*: it is there, and only there, then.
    """
    bits = image.cluster_bits
    wrong = wrong_l1 = 0
    l2_offsets = set()
    for index, l1_entry in enumerate(tables.l1):
        offset = l1_entry & ondisk.OFFSET_MASK
        if not offset or offset & image.cluster_mask:
            continue
        l2_offsets.add(offset)
        wanted = offset | (ondisk.COPIED if await refcounts.get(offset >> bits) == 1 else 0)
        if wanted != l1_entry:
            wrong_l1 += 1
            if fix:
                tables.l1[index] = wanted
    for offset in sorted(l2_offsets):
        if image.data_file is not None or offset >= image.file.node.driver.length:
            continue
        entries = from_big_endian(await image.read(offset, image.cluster_size))
        found = await _fix_entries(image, entries, refcounts, tables.words)
        wrong += found
        if found and fix:
            await image.write(offset, to_big_endian(entries))
        await trio.lowlevel.checkpoint()
    if wrong_l1 and fix:
        await image.write(tables.l1_offset, to_big_endian(tables.l1))
    return wrong + wrong_l1


async def _fix_entries(image: Image, entries: array[int], refcounts: Refcounts, words: int) -> int:
    """Set the flags of the L2 *entries* right, which have so many *words* each; how many were wrong."""
    wrong = 0
    for start in range(0, len(entries), _PART):
        part = entries[start : start + _PART]
        first = (part[0] & ondisk.OFFSET_MASK) >> image.cluster_bits
        usual = words == 1 and part[0] & ondisk.COPIED and in_a_row(part, image.cluster_size)
        if usual and await refcounts.are_ones(first, len(part)):
            continue
        wrong += await _fix_each(image, entries, range(start, start + len(part), words), refcounts)
    return wrong


async def _fix_each(image: Image, entries: array[int], indices: range, refcounts: Refcounts) -> int:
    wrong = 0
    for index in indices:
        entry = entries[index]
        offset = entry & ondisk.OFFSET_MASK
        if entry & ondisk.COMPRESSED or not offset or offset & image.cluster_mask:
            continue
        wanted = entry & ~ondisk.COPIED
        if await refcounts.get(offset >> image.cluster_bits) == 1:
            wanted |= ondisk.COPIED
        if wanted != entry:
            entries[index] = wanted
            wrong += 1
    return wrong
