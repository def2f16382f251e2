"""What an L1 table refers to, by way of its L2 tables: counted up and down as a whole, and COPIED flags that follow.

One L2 table is in memory at a time, and other tasks get their turn after each.  The caller holds ``Image.lock``, no
request is under way, and no slice of an L2 table is cached.

Order of references, messages: QEMU qcow2_update_snapshot_refcount (block/qcow2-refcount.c).
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Awaitable, Callable, Iterator

import trio

from fusebd.drivers.qcow2.image import Image, hexadecimal
from fusebd.drivers.qcow2.options import OL_ACTIVE_L1, OL_ACTIVE_L2, OL_INACTIVE_L2
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.drivers.qcow2.tables import Tables
from fusebd.ondisk import qcow2 as ondisk

#: called with the first cluster and the number of clusters of a run that has one reference each
Change = Callable[[int, int], Awaitable[None]]


def from_big_endian(data: bytes | bytearray) -> array[int]:
    """The 64-bit words in *data*."""
    words = array("Q", bytes(data))
    words.byteswap()
    return words


def to_big_endian(words: array[int]) -> bytes:
    """The inverse of ``from_big_endian``."""
    swapped = array("Q", words)
    swapped.byteswap()
    return swapped.tobytes()


def without_copied(words: array[int]) -> array[int]:
    """L1 entries like *words*, none of which says that nobody else refers to its table."""
    return array("Q", (word & ~ondisk.COPIED for word in words))


class References:
    """Offsets that cannot be are corruption, as for any request."""

    def __init__(self, image: Image, tables: Tables, refcounts: Refcounts) -> None:
        self._image, self._tables, self._refcounts = image, tables, refcounts

    async def read_l1(self, offset: int, entries: int) -> array[int]:
        """The L1 table of so many *entries* at the host *offset*."""
        return from_big_endian(await self._image.read(offset, 8 * entries))

    async def raise_all(self, l1: array[int]) -> None:
        """Count one reference more to everything that *l1* refers to; after an error, to nothing.

        Raises EINVAL where a refcount would be too large, BlockIOError; what cannot be undone is logged, and leaks.
        """
        done = 0

        async def up(first: int, count: int) -> None:
            nonlocal done
            await self._raise(first, count)
            done += count

        try:
            await self._walk(l1, up)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.lower_all(l1, most=done)
            raise

    async def _raise(self, first: int, count: int) -> None:
        """The clusters are of one refcount block."""
        refcounts = self._refcounts
        index, at = divmod(first, refcounts.per_block)
        if refcounts.block_offset(index):
            data, width = (await refcounts.block(index)).data, refcounts.width
            for position in range(at, at + count):
                if width.get(data, position) == width.maximum:
                    raise self._image.error("update refcount", code=errno.EINVAL)
        await refcounts.update(first, count, 1)

    async def lower_all(self, l1: array[int], *, discard: bool = False, most: int | None = None) -> None:
        """Count one reference less to the first *most* clusters that *l1* refers to, or to all.

        *discard*: tell the file about those that nobody refers to then.
        """
        left = most

        async def down(first: int, count: int) -> None:
            nonlocal left
            if left is not None:
                count = min(count, left)
                left -= count
            if count:
                await self._refcounts.lower(first, count, discard=discard)

        await self._walk(l1, down)

    async def _walk(self, l1: array[int], change: Change) -> None:
        """Call *change* for everything that *l1* refers to, in an order that is always the same."""
        image, per_block = self._image, self._refcounts.per_block
        for index, l1_entry in enumerate(l1):
            offset = l1_entry & ondisk.OFFSET_MASK
            if not offset:
                continue
            entries = await self._read_l2(offset, index)
            for first, count in self._runs(entries):
                done = 0
                while done < count:
                    part = min(count - done, per_block - (first + done) % per_block)
                    await change(first + done, part)
                    done += part
            await change(offset >> image.cluster_bits, 1)
            await trio.lowlevel.checkpoint()

    async def _read_l2(self, offset: int, l1_index: int) -> array[int]:
        image = self._image
        if offset & image.cluster_mask:
            raise await image.corrupt(f"L2 table offset {offset:#x} unaligned (L1 index: {hexadecimal(l1_index)})")
        await image.announce("l2_load")
        entries = from_big_endian(await image.read(offset, image.cluster_size))
        for at, entry in enumerate(entries[:: self._tables.words]):
            if entry & ondisk.OFFSET_MASK & image.cluster_mask and not entry & ondisk.COMPRESSED:
                raise await image.corrupt(
                    f"Cluster allocation offset {entry & ondisk.OFFSET_MASK:#x} unaligned (L2 offset: {offset:#x},"
                    f" L2 index: {hexadecimal(at)})"
                )
        return entries

    def _runs(self, entries: array[int]) -> Iterator[tuple[int, int]]:
        """The clusters that L2 *entries* refer to: (first, number) of each run."""
        bits = self._image.cluster_bits
        first = end = 0
        for entry in entries[:: self._tables.words]:
            if entry & ondisk.COMPRESSED:
                offset, length = ondisk.parse_compressed(entry, bits)
                start, stop = offset >> bits, ((offset + length - 1) >> bits) + 1
            elif entry & ondisk.OFFSET_MASK:
                start = (entry & ondisk.OFFSET_MASK) >> bits
                stop = start + 1
            else:
                continue
            if start != end:
                if end > first:
                    yield first, end - first
                first = start
            end = stop
        if end > first:
            yield first, end - first

    async def set_copied(self) -> None:
        """Have the active tables say COPIED just where the refcount is one.  Written, but not durable yet."""
        image, tables, refcounts = self._image, self._tables, self._refcounts
        bits, changed = image.cluster_bits, False
        for index, l1_entry in enumerate(tables.l1):
            offset = l1_entry & ondisk.OFFSET_MASK
            if not offset:
                continue
            entries = await self._read_l2(offset, index)
            if await self._set_copied_in(entries):
                await image.check_overlap(offset, image.cluster_size, OL_ACTIVE_L2 | OL_INACTIVE_L2)
                await image.announce("l2_update")
                await image.write(offset, to_big_endian(entries))
            wanted = offset | (ondisk.COPIED if await refcounts.get(offset >> bits) == 1 else 0)
            if wanted != l1_entry:
                tables.l1[index] = wanted
                changed = True
            await trio.lowlevel.checkpoint()
        if changed:
            await image.check_overlap(tables.l1_offset, 8 * len(tables.l1), OL_ACTIVE_L1)
            await image.announce("l1_update")
            await image.write(tables.l1_offset, to_big_endian(tables.l1))

    async def _set_copied_in(self, entries: array[int]) -> bool:
        """Whether anything in the L2 *entries* has changed."""
        bits, changed = self._image.cluster_bits, False
        for at in range(0, len(entries), self._tables.words):
            entry = entries[at]
            host_offset = entry & ondisk.OFFSET_MASK
            if not host_offset or entry & ondisk.COMPRESSED:
                continue
            wanted = entry & ~ondisk.COPIED
            if await self._refcounts.get(host_offset >> bits) == 1:
                wanted |= ondisk.COPIED
            if wanted != entry:
                entries[at] = wanted
                changed = True
        return changed
