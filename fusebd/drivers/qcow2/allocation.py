"""Writes that change the mapping: new clusters, copy on write, zero clusters that get data.

A write takes three steps.  Under the lock it looks at the mapping, allocates host clusters, and enters itself among
the allocations in flight.  Without the lock it writes the data, with what surrounds it in its first and last
cluster.  Under the lock again it links the clusters into the L2 table, frees those that they replace, and wakes who
waited for it.  Two writes that allocate in the same guest cluster never overlap: the second waits and looks again.

Whatever fails before the last step leaves the mapping as it was; the new clusters are given back.
Behaviour and events: QEMU qcow2_co_pwritev_part, qcow2_alloc_host_offset, perform_cow (block/qcow2*.c).
"""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable

import trio

from fusebd.block.child import MAY_UNMAP, NO_FALLBACK, Buffers, slice_buffers
from fusebd.block.shield import shielded
from fusebd.drivers.qcow2 import mapping, subclusters
from fusebd.drivers.qcow2.image import Image, hexadecimal
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.drivers.qcow2.tables import Slice, Tables
from fusebd.errors import BlockIOError, NotSupported
from fusebd.ondisk import qcow2 as ondisk

#: the most that one step writes, in bytes: what a file takes in one request
_MAX_BYTES = 1 << 30
#: one read serves both ends of a copy on write if the data between them is no longer than this (QEMU)
_MERGE_READS = 16384
_SECTOR = bytes(512)


class InFlight:
    """Guest clusters *first* up to *end* that one write is about to link to host clusters."""

    __slots__ = ("_done", "end", "first")

    def __init__(self, first: int, end: int) -> None:
        self.first, self.end = first, end
        self._done: trio.Event | None = None

    async def wait(self) -> None:
        """Wait until the write has linked its clusters, or failed."""
        if self._done is None:
            self._done = trio.Event()
        await self._done.wait()

    def finish(self) -> None:
        if self._done is not None:
            self._done.set()


class Piece:
    """A part of a write that goes to one place: *length* bytes from *guest_offset* on, to *host_offset*.

    ``in_flight`` is None if the clusters are mapped already; ``fresh`` says whether they are newly allocated
    (then they are given back after a failure), ``preallocated`` that none of their subclusters gets data.
    ``first``, ``last`` are the old entries at the ends, with their bitmaps.  ``head`` and ``tail`` are the bytes
    before and behind that have to be written with it.
    """

    __slots__ = (
        "first",
        "fresh",
        "guest_offset",
        "head",
        "host_offset",
        "in_flight",
        "last",
        "length",
        "preallocated",
        "tail",
    )

    def __init__(self, guest_offset: int, host_offset: int, length: int, in_flight: InFlight | None) -> None:
        self.guest_offset, self.host_offset, self.length = guest_offset, host_offset, length
        self.in_flight = in_flight
        self.fresh = False
        self.first = self.last = 0, 0
        self.head = self.tail = 0
        self.preallocated = False

    @classmethod
    def of_new(cls, guest_offset: int, host_offset: int, length: int, in_flight: InFlight) -> Piece:
        """One in a newly allocated cluster, with nothing to be written around it."""
        piece = cls(guest_offset, host_offset, length, in_flight)
        piece.fresh = True
        return piece


class Allocator:
    """Carries out the writes of one image.  *read_guest* reads guest data for copy on write."""

    def __init__(
        self,
        image: Image,
        tables: Tables,
        refcounts: Refcounts,
        read_guest: Callable[[int, Buffers], Awaitable[None]],
        reads_zero: Callable[[int, int], bool],
    ) -> None:
        self.image, self.tables, self.refcounts = image, tables, refcounts
        self._read_guest = read_guest
        self._reads_zero = reads_zero
        self._in_flight: list[InFlight] = []
        self._file_zeroes = True  #: the file has not refused a fast zero write yet

    # -- waiting for others ---------------------------------------------------------------------

    def _conflict(self, first: int, end: int) -> InFlight | None:
        """The allocation in flight in the guest clusters *first* up to *end* that begins first."""
        if not self._in_flight:
            return None
        found = [other for other in self._in_flight if other.first < end and first < other.end]
        return min(found, key=lambda other: other.first, default=None)

    def is_under_way(self, cluster: int) -> bool:
        """Whether an allocation is in flight in the guest *cluster*."""
        return bool(self._in_flight) and self._conflict(cluster, cluster + 1) is not None

    async def wait_free(self, first: int, end: int) -> None:
        """Wait, under the lock, until no allocation is in flight in the clusters.  The lock is let go meanwhile."""
        while conflict := self._conflict(first, end):
            self.image.lock.release()
            try:
                await conflict.wait()
            finally:
                await shielded(self.image.lock.__aenter__())

    def begin(self, first: int, end: int) -> InFlight:
        """Under the lock: an allocation in flight in the guest clusters *first* up to *end*."""
        in_flight = InFlight(first, end)
        self._in_flight.append(in_flight)
        return in_flight

    def end(self, in_flight: InFlight) -> None:
        """Under the lock: it has been linked, or failed."""
        self._in_flight.remove(in_flight)
        in_flight.finish()

    # -- the three steps ------------------------------------------------------------------------

    async def pwritev(self, guest_offset: int, bufs: Buffers, size: int) -> None:
        """Write the *size* bytes of *bufs*; what has been linked stays if a later part fails."""

        async def write(piece: Piece, at: int) -> None:
            await self._write(piece, bufs if piece.length == size else slice_buffers(bufs, at, at + piece.length))

        await self._in_pieces(guest_offset, size, write)

    async def preallocate(self, guest_offset: int, length: int, *, sparse: bool) -> None:
        """Give whole clusters that are not mapped yet host clusters that read as zeroes.

        *sparse*: the file may have holes there.
        """

        async def zero(piece: Piece, _: int) -> None:
            # an external data file was made long enough before, and what is new in it is zero
            if piece.in_flight is None or self.image.data_file is not None:
                return
            file = self.image.file
            inside = piece.length
            if sparse:
                inside = min(max(file.node.driver.length - piece.host_offset, 0), inside)
            if inside:
                await file.pwrite_zeroes(piece.host_offset, inside, MAY_UNMAP if sparse else 0)
            if inside < piece.length:  # what is behind the end of the file reads as zeroes once it is inside
                await file.pwritev(piece.host_offset + piece.length - len(_SECTOR), (memoryview(_SECTOR),))

        await self._in_pieces(guest_offset, length, zero, preallocate=True)

    async def _in_pieces(
        self,
        guest_offset: int,
        size: int,
        write: Callable[[Piece, int], Awaitable[None]],
        *,
        preallocate: bool = False,
    ) -> None:
        """Have *write* put the data of each piece, from byte *at* of the whole on, where it belongs, and link it.

        *preallocate*: subclusters stay what they are.
        """
        image = self.image
        at = 0
        while at < size:
            async with image.lock:
                piece = await self._prepare(guest_offset + at, size - at)
                piece.preallocated = preallocate
                epoch = image.epoch
                epoch.count += 1
            try:
                await write(piece, at)
            except BaseException:
                if piece.in_flight is not None:
                    await shielded(self.undo(piece))
                raise
            finally:
                epoch.count -= 1
            at += piece.length
            if piece.in_flight is not None:
                await shielded(self.link(piece))

    async def _prepare(self, guest_offset: int, size: int) -> Piece:
        image, bits = self.image, self.image.cluster_bits
        size = min(size, _MAX_BYTES)
        first = guest_offset >> bits
        while True:
            end = ((guest_offset + size - 1) >> bits) + 1
            conflict = self._conflict(first, end)
            if conflict is None:
                break
            if conflict.first > first:
                size = (conflict.first << bits) - guest_offset
            else:
                await self.wait_free(first, first + 1)
        item = await self.tables.find_writable(guest_offset)
        entries = item.entries
        at = first & self.tables.entry_mask
        limit = min(self.tables.slice_entries, at + end - first)
        kind, host_offset, number = mapping.extent(entries, at, limit, image.cluster_size)
        entry = entries[at]
        if kind in (mapping.ZERO_PLAIN, mapping.ZERO_ALLOCATED) and image.header.version < 3:
            raise await image.corrupt(
                f"Zero cluster entry found in pre-v3 image (L2 offset: {item.host_offset:#x},"
                f" L2 index: {hexadecimal(at)})"
            )
        keep = not mapping.needs_allocation(entry)
        if keep:
            if host_offset & image.cluster_mask:
                name = "Preallocated zero" if entry & ondisk.ZERO else "Data"
                raise await image.corrupt(
                    f"{name} cluster offset {host_offset:#x} unaligned (guest offset: {hexadecimal(guest_offset)})"
                )
            number = self._copied_run(entries, at, number)
        else:
            number = mapping.allocation_run(entries, at, limit)
        first_entry, last_entry = entry, entries[at + number - 1]
        first_bitmap = last_bitmap = 0
        if self.tables.words == 2:
            first_bitmap = await self._valid_bitmap(item, at)
            last_bitmap = await self._valid_bitmap(item, at + number - 1)
        if not keep:
            host_offset = await self._take(first, number)
        in_cluster = guest_offset & image.cluster_mask
        length = min(size, (number << bits) - in_cluster)
        piece = Piece(guest_offset, host_offset + in_cluster, length, None)
        try:
            await image.check_data_overlap(piece.host_offset, length)
        except BlockIOError:
            if not keep and image.usable:
                await self._give_back(host_offset, number)
            raise
        if kind == mapping.SEVERAL and keep:
            touched = subclusters.bits(
                in_cluster >> image.granule_bits, ((in_cluster + length - 1) >> image.granule_bits) + 1
            )
            if not touched & ~first_bitmap:
                return piece  # all of it is allocated
        if not keep or kind != mapping.DATA:
            piece.fresh = not keep
            piece.first, piece.last = (first_entry, first_bitmap), (last_entry, last_bitmap)
            piece.head, piece.tail = self._head(piece), self._tail(piece)
            piece.in_flight = self.begin(first, first + number)
        return piece

    async def _valid_bitmap(self, item: Slice, index: int) -> int:
        """The bitmap of the cluster with entry *index*.  Corruption if there can be no such."""
        bitmap = item.bitmap(index)
        if not subclusters.is_valid(item.entries[index], bitmap):
            raise await self.image.corrupt(item.invalid_entry(index))
        return bitmap

    def _head(self, piece: Piece) -> int:
        """How many bytes before *piece*, in its first cluster, its host cluster does not have yet but is to have."""
        image = self.image
        entry, bitmap = piece.first
        in_cluster = piece.guest_offset & image.cluster_mask
        if self.tables.words == 1:
            return in_cluster
        number = in_cluster >> image.granule_bits
        if piece.fresh:
            return in_cluster - (subclusters.copied_from(entry, bitmap, number) << image.granule_bits)
        return 0 if bitmap >> number & 1 else in_cluster & image.granule_mask

    def _tail(self, piece: Piece) -> int:
        """The same behind *piece*, in its last cluster."""
        image = self.image
        entry, bitmap = piece.last
        last = (piece.guest_offset + piece.length - 1) & image.cluster_mask
        if self.tables.words == 1:
            return image.cluster_mask - last
        number = last >> image.granule_bits
        if piece.fresh:
            return (subclusters.copied_until(entry, bitmap, number) << image.granule_bits) - last - 1
        return 0 if bitmap >> number & 1 else image.granule_mask - (last & image.granule_mask)

    async def _take(self, first: int, number: int) -> int:
        """Host clusters for *number* guest clusters from *first* on: the host offset of the first one."""
        if self.image.data_file is None:
            return await self.refcounts.allocate(number)
        return (first << self.image.cluster_bits) + self.image.data_shift

    async def _give_back(self, host_offset: int, number: int) -> None:
        """The clusters have not been linked."""
        if self.image.data_file is None:
            await self.refcounts.abandon(host_offset, number)

    @staticmethod
    def _copied_run(entries: array[int], at: int, number: int) -> int:
        """How many of the *number* entries from *at* on may be written in place."""
        for index in range(at, at + number):
            if not entries[index] & ondisk.COPIED:
                return index - at
        return number

    async def _write(self, piece: Piece, bufs: Buffers) -> None:
        image = self.image
        if piece.in_flight is not None and (piece.head or piece.tail):
            await self._write_with_surroundings(piece, bufs, piece.head, piece.tail)
            return
        await image.announce("write_aio")
        await self._put(piece.host_offset, piece.guest_offset, bufs)

    async def _put(self, host_offset: int, guest_offset: int, bufs: Buffers) -> None:
        """Write *bufs*, the guest's bytes from *guest_offset* on, to *host_offset*."""
        image = self.image
        if image.encryption is not None:
            bufs = await image.encryption.encrypted(host_offset - image.data_shift, guest_offset, bufs)
        await image.data.pwritev(host_offset, bufs)

    async def _write_with_surroundings(self, piece: Piece, bufs: Buffers, head: int, tail: int) -> None:
        """Write *bufs* and the *head* and *tail* bytes around them."""
        image = self.image
        start, end = piece.guest_offset, piece.guest_offset + piece.length
        host_start = piece.host_offset - head
        zero_head = not head or self._is_zero(piece.first, start - head, head)
        zero_tail = not tail or self._is_zero(piece.last, end, tail)
        if zero_head and zero_tail and await self._zero_space(piece, host_start, head + piece.length + tail):
            await image.announce("write_aio")
            await self._put(piece.host_offset, start, bufs)
            return
        before, after = memoryview(bytearray(head)), memoryview(bytearray(tail))
        if head and tail and not (zero_head and zero_tail) and piece.length <= _MERGE_READS:
            whole = memoryview(bytearray(head + piece.length + tail))
            await image.announce("cow_read")
            await self._read_guest(start - head, (whole,))
            before, after = whole[:head], whole[head + piece.length :]
        else:
            if head and not zero_head:
                await image.announce("cow_read")
                await self._read_guest(start - head, (before,))
            if tail and not zero_tail:
                await image.announce("cow_read")
                await self._read_guest(end, (after,))
        await image.announce("write_aio")
        await image.announce("cow_write")
        await self._put(host_start, start - head, [part for part in (before, *bufs, after) if len(part)])

    def _is_zero(self, cluster: tuple[int, int], guest_offset: int, length: int) -> bool:
        """Whether the bytes, in the *cluster* of an old entry and bitmap, are known to read as zeroes."""
        entry, bitmap = cluster
        kind = mapping.kind_of(entry)
        if kind == mapping.UNALLOCATED:
            return self._reads_zero(guest_offset, length)
        if kind == mapping.SEVERAL:
            image = self.image
            first = (guest_offset & image.cluster_mask) >> image.granule_bits
            end = (((guest_offset & image.cluster_mask) + length - 1) >> image.granule_bits) + 1
            if subclusters.bits(first, end) & bitmap:
                return False
            zero = not subclusters.bits(first, end) & ~(bitmap >> subclusters.NUMBER)
            return zero or self._reads_zero(guest_offset, length)
        return kind in (mapping.ZERO_PLAIN, mapping.ZERO_ALLOCATED)

    async def _zero_space(self, piece: Piece, host_offset: int, length: int) -> bool:
        """Make the space of *piece* zero without writing buffers; False if that cannot be done."""
        file = self.image.data
        if self.image.encryption is not None:
            return False  # what is zero in the file is not so for the guest
        if not piece.fresh and piece.first[1] & ondisk.ALL_ALLOCATED:
            return False  # subclusters in between are seen already
        if not self.image.file.events and host_offset >= self.image.data_end:
            return True  # past the end of the file all is zero
        if not self._file_zeroes:
            return False
        await self.image.check_data_overlap(host_offset, length)
        await self.image.announce("cluster_alloc_space")
        try:
            await file.pwrite_zeroes(host_offset, length, NO_FALLBACK)
        except NotSupported:
            self._file_zeroes = False
            return False
        return True

    async def link(self, piece: Piece) -> None:
        """Enter the clusters of *piece* into the L2 table."""
        image, in_flight = self.image, piece.in_flight
        assert in_flight is not None
        linked = False
        async with image.lock:
            try:
                item = await self.tables.find_writable(piece.guest_offset)
                item.dirty = True
                self.refcounts.needs_flush = True
                freed = self._enter(item, piece, in_flight)
                linked = True
                if freed:
                    await image.announce("cluster_free")
            finally:
                if not linked and piece.fresh and image.usable:
                    await self._give_back(piece.host_offset & ~image.cluster_mask, in_flight.end - in_flight.first)
                self.end(in_flight)

    def _enter(self, item: Slice, piece: Piece, in_flight: InFlight) -> bool:
        """Whether clusters were freed."""
        image, entries = self.image, item.entries
        freed = False
        entry = piece.host_offset & ~image.cluster_mask | ondisk.COPIED
        at = in_flight.first & self.tables.entry_mask
        for index in range(at, at + in_flight.end - in_flight.first):
            old = entries[index]
            if self.tables.words == 1:
                entries[index] = entry
            else:
                item.put_mixed(index, entry, self._new_bitmap(item.bitmap(index), piece, in_flight.first + index - at))
            if piece.fresh and old & (ondisk.OFFSET_MASK | ondisk.COMPRESSED):
                self.free_entry(old)
                freed = True
            entry += image.cluster_size
        return freed

    def _new_bitmap(self, old: int, piece: Piece, cluster: int) -> int:
        """The bitmap, *old* before, of the guest *cluster* of *piece*."""
        image = self.image
        if piece.preallocated:
            return old
        begin = cluster << image.cluster_bits
        start = max(piece.guest_offset - piece.head - begin, 0) >> image.granule_bits
        end = min(piece.guest_offset + piece.length + piece.tail - begin, image.cluster_size)
        return subclusters.written(old, start, end >> image.granule_bits)

    async def undo(self, piece: Piece) -> None:
        """The data of *piece* could not be written: give its clusters back and let others try."""
        image, in_flight = self.image, piece.in_flight
        assert in_flight is not None
        async with image.lock:
            if piece.fresh and image.usable:
                await self._give_back(piece.host_offset & ~image.cluster_mask, in_flight.end - in_flight.first)
            self.end(in_flight)

    # -- giving up clusters ---------------------------------------------------------------------

    def free_entry(self, entry: int, *, discard: bool = False) -> None:
        """The L2 *entry* is not in its table any more: free what it referred to."""
        image = self.image
        if image.data_file is not None:
            return
        kind = mapping.kind_of(entry)
        if kind == mapping.COMPRESSED:
            self.refcounts.free(*ondisk.parse_compressed(entry, image.cluster_bits), discard=discard)
        elif host_offset := entry & ondisk.OFFSET_MASK:
            if host_offset & image.cluster_mask:
                image.note_corruption(f"Cannot free unaligned cluster {hexadecimal(host_offset)}")
            else:
                self.refcounts.free(host_offset, image.cluster_size, discard=discard)
