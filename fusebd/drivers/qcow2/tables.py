"""The active L1 table and the cache of slices of L2 tables, written back in the order that a crash asks for.

A slice is found by the guest range that it maps, so that a request looks into one dict.  Slices are changed only
under ``Image.lock``.  Before a slice is written, the refcounts that it relies on are, and the data in clusters that
are new in it; the file is flushed in between.

Order of writes, events, messages: QEMU block/qcow2-cache.c, l2_allocate and get_cluster_table in qcow2-cluster.c.
"""

from __future__ import annotations

from array import array
from functools import cache
from typing import TypeAlias

from fusebd.drivers.qcow2 import mapping, subclusters
from fusebd.drivers.qcow2.data import MisplacedCluster, shift_in, shift_out
from fusebd.drivers.qcow2.image import Image, hexadecimal
from fusebd.drivers.qcow2.options import OL_ACTIVE_L1, OL_ACTIVE_L2
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.errors import BlockIOError
from fusebd.ondisk import qcow2 as ondisk

#: L2 entries in host byte order, and the bitmaps of those that have the flag MIXED, by index
Entries: TypeAlias = "tuple[array[int], dict[int, int]]"


class Slice:
    """A cached part of an L2 table, *number* counting from guest offset 0 on.

    Each entry is one word; where clusters have subclusters, some of them have a bitmap beside it.
    """

    __slots__ = ("bitmaps", "dirty", "entries", "host_offset", "number", "used")

    def __init__(self, number: int, host_offset: int, entries: Entries) -> None:
        self.number, self.host_offset = number, host_offset
        self.entries, self.bitmaps = entries
        self.dirty = False
        self.used = True

    def bitmap(self, index: int) -> int:
        """The bitmap of the cluster with entry *index*."""
        return subclusters.bitmap_of(self.entries[index], self.bitmaps, index)

    def invalid_entry(self, index: int) -> str:
        """What is said of entry *index*, which cannot be."""
        return f"Invalid cluster entry found  (L2 offset: {self.host_offset:#x}, L2 index: {hexadecimal(index)})"

    def put(self, index: int, entry: int) -> None:
        """Make *entry*, which is not mixed, entry *index*."""
        self.entries[index] = entry
        self.bitmaps.pop(index, None)

    def put_mixed(self, index: int, entry: int, bitmap: int) -> None:
        """Make *entry*, with *bitmap*, entry *index*."""
        self.put(index, subclusters.with_bitmap(entry, bitmap))
        if mapping.is_mixed(self.entries[index]):
            self.bitmaps[index] = bitmap


@cache
def _mixed_mask(entries: int) -> int:
    """The flag MIXED of so many entries in a row, as a number."""
    return int.from_bytes(mapping.MIXED.to_bytes(8, "big") * entries, "big")


def _unaligned(table_offset: int, l1_index: int) -> str:
    return f"L2 table offset {table_offset:#x} unaligned (L1 index: {hexadecimal(l1_index)})"


class Tables:
    """All methods that suspend need ``Image.lock`` to be held by the caller."""

    def __init__(self, image: Image, refcounts: Refcounts, *, slice_bytes: int, max_slices: int) -> None:
        self.image = image
        self.refcounts = refcounts
        self.slice_bytes = slice_bytes
        self.max_slices = max_slices
        self.words = 2 if image.header.extended_l2 else 1  #: 64-bit words of an L2 entry
        self.slice_entries = slice_bytes // (8 * self.words)
        self.entry_mask = self.slice_entries - 1
        self._mixed = _mixed_mask(self.slice_entries)
        self.slice_shift = image.cluster_bits + self.slice_entries.bit_length() - 1
        self.slices_per_table = image.cluster_size // slice_bytes
        self.l1_shift = self.slice_shift + self.slices_per_table.bit_length() - 1
        self.l1: array[int] = array("Q")
        self.l1_offset = image.header.l1_table_offset
        self.slices: dict[int, Slice] = {}
        image.on_unusable.append(self.slices.clear)

    async def load(self) -> None:
        """Read the L1 table."""
        image = self.image
        length = image.header.l1_size * 8
        try:
            self.l1 = array("Q", bytes(await image.read(self.l1_offset, length)))
        except BlockIOError as error:
            raise error.prefixed("Could not read L1 table") from None
        self.l1.byteswap()
        self.protect()

    def protect(self) -> None:
        """Enter all tables into the map of metadata."""
        image = self.image
        image.metadata.add(OL_ACTIVE_L1, self.l1_offset, 8 * len(self.l1))
        for entry in filter(None, self.l1):  # which is quick: most of a large table is often empty
            if offset := entry & ondisk.OFFSET_MASK:
                image.metadata.add(OL_ACTIVE_L2, offset, image.cluster_size)

    def drop(self) -> None:
        """Let go of all that is cached: the image is closed."""
        self.slices.clear()
        self.l1 = array("Q")

    # -- finding slices -------------------------------------------------------------------------

    async def find(self, guest_offset: int) -> Slice | None:
        """The slice that maps *guest_offset*; None where there is no L2 table.  Raises EIO; corruption."""
        number = guest_offset >> self.slice_shift
        found = self.slices.get(number)
        if found is not None:
            found.used = True
            return found
        image = self.image
        image.check_usable()
        l1_index = guest_offset >> self.l1_shift
        table_offset = self.l1[l1_index] & ondisk.OFFSET_MASK if l1_index < len(self.l1) else 0
        if not table_offset:
            return None
        if table_offset & image.cluster_mask:
            raise await image.corrupt(_unaligned(table_offset, l1_index))
        host_offset = table_offset + number % self.slices_per_table * self.slice_bytes
        await self._make_room()
        await image.announce("l2_load")
        found = Slice(number, host_offset, await self._read_entries(number, host_offset))
        self.slices[number] = found
        return found

    async def _read_entries(self, number: int, host_offset: int) -> Entries:
        """The entries of slice *number*, which is at *host_offset*."""
        image = self.image
        data = bytes(await image.read(host_offset, self.slice_bytes))
        entries = array("Q", data)
        entries.byteswap()
        bitmaps: array[int] | None = None
        if self.words == 2:
            entries, bitmaps = subclusters.first_words(entries[::2]), entries[1::2]
        elif int.from_bytes(data, "big") & self._mixed:  # a bit that means nothing in the file
            entries = array("Q", (entry & ~mapping.MIXED if mapping.is_mixed(entry) else entry for entry in entries))
        if image.data_file is not None:
            try:
                shift_in(entries, number << self.slice_shift, image.cluster_bits)
            except MisplacedCluster as error:
                where = f"(L2 offset: {host_offset:#x}, L2 index: {hexadecimal(error.index)})"
                raise await image.corrupt(f"{error.text} {where}") from None
        mixed: dict[int, int] = {}
        for index, bitmap in enumerate(bitmaps or ()):
            entry = entries[index] = subclusters.with_bitmap(entries[index], bitmap)
            if mapping.is_mixed(entry):
                mixed[index] = bitmap
        return entries, mixed

    def _stored(self, given: Entries) -> bytes:
        """The entries as they are in the file."""
        entries, mixed = given
        stored = array("Q", entries)
        bitmaps: array[int] | None = None
        if self.words == 2:
            bitmaps = array("Q", (subclusters.bitmap_of(entry, mixed, at) for at, entry in enumerate(entries)))
            stored = subclusters.first_words(entries)
        if self.image.data_file is not None:
            shift_out(stored, self.image.cluster_bits)
        if bitmaps is not None:
            stored = subclusters.interleaved(stored, bitmaps)
        stored.byteswap()
        return stored.tobytes()

    async def find_writable(self, guest_offset: int) -> Slice:
        """Like ``find``, with an L2 table that nobody else refers to: made, or copied, if need be."""
        image = self.image
        image.check_usable()
        l1_index = guest_offset >> self.l1_shift
        entry = self.l1[l1_index]
        if (entry & ondisk.OFFSET_MASK) & image.cluster_mask:
            raise await image.corrupt(_unaligned(entry & ondisk.OFFSET_MASK, l1_index))
        if not entry & ondisk.COPIED or not entry & ondisk.OFFSET_MASK:
            await self._allocate_table(l1_index, entry & ondisk.OFFSET_MASK, guest_offset >> self.slice_shift)
        found = await self.find(guest_offset)
        assert found is not None
        return found

    async def _make_room(self) -> None:
        """Drop slices that were not used lately until one more fits."""
        while len(self.slices) >= self.max_slices:
            oldest = next(iter(self.slices.values()))
            if oldest.used:
                oldest.used = False
                self.slices[oldest.number] = self.slices.pop(oldest.number)
                continue
            if oldest.dirty:
                await self.refcounts.secure()
                await self._write_slice(oldest)
            self.slices.pop(oldest.number, None)

    def drop_unused(self) -> None:
        """Drop the slices that are not dirty and were not used since the last call."""
        for number, item in list(self.slices.items()):
            if not item.used and not item.dirty:
                del self.slices[number]
            item.used = False

    # -- writing back ---------------------------------------------------------------------------

    async def _write_slice(self, item: Slice) -> None:
        image = self.image
        await image.check_overlap(item.host_offset, self.slice_bytes, OL_ACTIVE_L2)
        await image.announce("l2_update")
        await image.write(item.host_offset, self._stored((item.entries, item.bitmaps)))
        item.dirty = False

    async def write_back(self) -> None:
        """Write all metadata that has changed, refcounts first; what was freed is sealed.  Not durable yet."""
        dirty = [item for item in self.slices.values() if item.dirty]
        if dirty:
            await self.refcounts.secure()
        elif not self.refcounts.postponed:
            await self.refcounts.write_back()
        first_error: BlockIOError | None = None
        for item in dirty:
            try:
                await self._write_slice(item)
            except BlockIOError as error:
                first_error = first_error or error
        if first_error is not None:
            raise first_error
        self.refcounts.seal()

    # -- tables ---------------------------------------------------------------------------------

    async def drop_from(self, l1_index: int) -> None:
        """Free the L2 tables of L1 entry *l1_index* and of those after it; nothing is mapped there any more."""
        image = self.image
        dropped = [entry & ondisk.OFFSET_MASK for entry in self.l1[l1_index:] if entry & ondisk.OFFSET_MASK]
        if not dropped:
            return
        at, length = self.l1_offset + 8 * l1_index, 8 * (len(self.l1) - l1_index)
        await image.check_overlap(at, length, OL_ACTIVE_L1)
        await image.announce("l1_shrink_write_table")
        old = self.l1[l1_index:]
        old.byteswap()

        async def undo() -> None:
            """Nothing was allocated."""

        await image.switch(at, bytes(length), old.tobytes(), undo, durable=False)
        self.l1[l1_index:] = array("Q", bytes(length))
        for number in [number for number in self.slices if number >= l1_index * self.slices_per_table]:
            del self.slices[number]
        for offset in dropped:
            image.metadata.remove(OL_ACTIVE_L2, offset, image.cluster_size)
            if not offset & image.cluster_mask:
                self.refcounts.free(offset, image.cluster_size)
        self.refcounts.needs_flush = True
        await image.announce("l1_shrink_free_l2_clusters")
        await image.announce("cluster_free")

    async def _allocate_table(self, l1_index: int, old_offset: int, wanted: int) -> None:
        """Give L1 entry *l1_index* an L2 table of its own, a copy of that at *old_offset* if that is not 0.

        Slice *wanted* of it is in the cache then.
        """
        await self._make_room()
        image, refcounts = self.image, self.refcounts
        host_offset = await refcounts.allocate(1, "L2 table")
        try:
            await refcounts.secure()
            await image.check_overlap(host_offset, image.cluster_size)
            first = l1_index * self.slices_per_table
            for number in range(first, first + self.slices_per_table):
                at = (number - first) * self.slice_bytes
                entries = await self._copied_entries(number, old_offset and old_offset + at)
                if number == wanted:
                    found = Slice(number, host_offset + at, entries)
                await image.announce("l2_alloc_write")
                await image.announce("l2_update")
                await image.write(host_offset + at, self._stored(entries))
            await image.file.flush()
        except BaseException:
            await refcounts.abandon(host_offset, 1)
            raise
        await self._replace_l1_entry(l1_index, host_offset)
        image.metadata.add(OL_ACTIVE_L2, host_offset, image.cluster_size)
        for number in range(first, first + self.slices_per_table):
            cached = self.slices.get(number)
            if cached is not None:
                cached.host_offset = host_offset + (number - first) * self.slice_bytes
        self.slices.setdefault(wanted, found)
        if old_offset:
            image.metadata.remove(OL_ACTIVE_L2, old_offset, image.cluster_size)
            refcounts.free(old_offset, image.cluster_size)
            await image.announce("cluster_free")

    async def _copied_entries(self, number: int, old_offset: int) -> Entries:
        """The entries of slice *number*, read at the host offset *old_offset* if they are not cached; zeroes if 0."""
        if not old_offset:
            return array("Q", bytes(8 * self.slice_entries)), {}
        await self.image.announce("l2_alloc_cow_read")
        cached = self.slices.get(number)
        if cached is not None:
            return cached.entries, cached.bitmaps
        await self.image.announce("l2_load")
        return await self._read_entries(number, old_offset)

    async def _replace_l1_entry(self, l1_index: int, host_offset: int) -> None:
        """Make L1 entry *l1_index* refer to the table at *host_offset*, which is durable already."""
        image = self.image
        at = self.l1_offset + 8 * l1_index
        old = self.l1[l1_index]
        entry = host_offset | ondisk.COPIED
        await image.check_overlap(at, 8, OL_ACTIVE_L1)

        async def undo() -> None:
            await self.refcounts.abandon(host_offset, 1)

        try:
            await image.announce("l1_update")
        except BaseException:
            await undo()
            raise
        await image.switch(at, entry.to_bytes(8, "big"), old.to_bytes(8, "big"), undo, durable=False)
        self.l1[l1_index] = entry
        self.refcounts.needs_flush = True
