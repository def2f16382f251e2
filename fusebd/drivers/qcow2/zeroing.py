"""Zero writes and discards of whole clusters: changes of L2 entries, without data.

Meaning: QEMU qcow2_subcluster_zeroize, zero_in_l2_slice and discard_in_l2_slice (block/qcow2-cluster.c).
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import UNSET

from fusebd.block.child import MAY_UNMAP
from fusebd.drivers.qcow2 import mapping, subclusters
from fusebd.drivers.qcow2.allocation import Allocator
from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.options import Qcow2Options
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.drivers.qcow2.tables import Slice, Tables
from fusebd.errors import NotSupported
from fusebd.ondisk import qcow2 as ondisk


class Zeroer:
    """Offsets and lengths are of whole clusters; those of zero writes may be of whole subclusters."""

    def __init__(
        self, image: Image, tables: Tables, refcounts: Refcounts, allocator: Allocator, options: Qcow2Options
    ) -> None:
        self._image, self._tables, self._refcounts, self._allocator = image, tables, refcounts, allocator
        given = options.pass_discard_request
        #: whether the file is told about clusters that a request frees
        self._pass_on = image.node.unmap if given is UNSET else bool(given)
        self._keep_reference = options.discard_no_unref

    @property
    def passes_on(self) -> bool:
        """Whether the file is told about what a request frees."""
        return self._pass_on

    def refuse(self, operation: str) -> NotSupported:
        """What a request on part of a cluster gets."""
        return NotSupported(node_name=self._image.node.name, operation=operation)

    async def zeroize(self, offset: int, length: int, flags: int, *, without_data: bool = False) -> None:
        """Make the clusters read as zeroes; with MAY_UNMAP their host clusters are freed.

        *without_data*: part of them was found to be zero before; NotSupported if data has come there since then.
        """
        if self._image.header.version < 3:
            raise self.refuse("write zeroes")

        def zeroed(old: int) -> int:
            kind = mapping.kind_of(old)
            if without_data and kind in (mapping.DATA, mapping.COMPRESSED, mapping.SEVERAL):
                raise self.refuse("write zeroes")
            old &= ~mapping.MIXED
            if kind == mapping.COMPRESSED or (flags & MAY_UNMAP and old & ondisk.OFFSET_MASK):
                keep = self._keep_reference and kind != mapping.COMPRESSED
                return (old if keep else 0) | ondisk.ZERO
            return old | ondisk.ZERO

        mask = self._image.cluster_mask
        end = offset + length
        start, stop = (offset + mask) & ~mask, end & ~mask
        if start > stop:  # within one cluster
            start = stop = end
        await self._zero_part(offset, start, without_data=without_data)
        await self._change(start, stop - start, zeroed)
        await self._zero_part(stop, end, without_data=without_data)

    async def _zero_part(self, start: int, end: int, *, without_data: bool) -> None:
        """Make the bytes *start* up to *end*, some but not all subclusters of a cluster, read as zeroes."""
        if start == end:
            return
        image, tables = self._image, self._tables
        cluster = start >> image.cluster_bits
        index = cluster & tables.entry_mask
        first = (start & image.cluster_mask) >> image.granule_bits
        stop = first + (end - start >> image.granule_bits)
        async with image.lock:
            await self._allocator.wait_free(cluster, cluster + 1)
            item = await tables.find(start)
            bitmap = 0 if item is None else item.bitmap(index)
            if item is not None and not subclusters.is_valid(item.entries[index], bitmap):
                raise await image.corrupt(item.invalid_entry(index))
            has_data = bitmap & subclusters.bits(first, stop)
            if (item is not None and item.entries[index] & ondisk.COMPRESSED) or (without_data and has_data):
                raise self.refuse("write zeroes")
            new = subclusters.zeroed(bitmap, first, stop)
            if new != bitmap:
                item = await tables.find_writable(start)
                item.put_mixed(index, item.entries[index], new)
                item.dirty = True

    async def discard(self, offset: int, length: int, *, has_backing: bool) -> None:
        """Free the host clusters; zeroes are read then.  NotSupported where the backing file would show instead."""
        zero = ondisk.ZERO if self._image.header.version >= 3 else 0
        if has_backing and not zero:
            raise self.refuse("discard")

        def discarded(old: int) -> int:
            kind = mapping.kind_of(old)
            if kind == mapping.UNALLOCATED:
                return zero if has_backing else old
            if kind == mapping.ZERO_PLAIN:
                return old
            old &= ~mapping.MIXED
            if kind == mapping.SEVERAL and not old & ondisk.OFFSET_MASK and not has_backing:
                return old | mapping.MIXED
            if self._keep_reference and kind != mapping.COMPRESSED:
                return old | zero
            return zero

        await self._change(offset, length, discarded)

    async def forget(self, offset: int, length: int) -> None:
        """Free the clusters and leave them unallocated: nobody reads them any more."""
        tables, end = self._tables, offset + length
        for index in range(offset >> tables.l1_shift, min(len(tables.l1), -(-end >> tables.l1_shift))):
            if tables.l1[index]:
                start = max(offset, index << tables.l1_shift)
                await self._change(start, min(end, index + 1 << tables.l1_shift) - start, lambda _: 0)

    async def _change(self, offset: int, length: int, new_entry: Callable[[int], int]) -> None:
        """Replace the entries of the clusters by what *new_entry* makes of them, slice by slice."""
        image, tables, bits = self._image, self._tables, self._image.cluster_bits
        cluster, end = offset >> bits, (offset + length) >> bits
        while cluster < end:
            stop = min(end, (cluster | tables.entry_mask) + 1)
            async with image.lock:
                await self._allocator.wait_free(cluster, stop)
                item = await tables.find(cluster << bits)
                at = cluster & tables.entry_mask
                limit = at + stop - cluster
                if item is None:
                    entries = None if not new_entry(0) else (await tables.find_writable(cluster << bits)).entries
                elif any(new_entry(entry) != entry for entry in item.entries[at:limit]):
                    entries = (await tables.find_writable(cluster << bits)).entries
                else:
                    entries = None
                if entries is not None:
                    item = tables.slices[cluster >> (tables.slice_shift - bits)]
                    if self._replace(item, at, limit, new_entry):
                        await image.announce("cluster_free")
            cluster = stop

    def _replace(self, item: Slice, at: int, limit: int, new_entry: Callable[[int], int]) -> bool:
        """Whether clusters were freed."""
        entries = item.entries
        freed = False
        for index in range(at, limit):
            old = entries[index]
            new = new_entry(old)
            if new == old:
                continue
            item.dirty = True
            item.put(index, new)
            if not new & ondisk.OFFSET_MASK and old & ondisk.OFFSET_MASK:
                self._allocator.free_entry(old, discard=self._pass_on)
                freed = True
        return freed
