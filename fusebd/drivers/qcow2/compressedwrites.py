"""Compressed writes: clusters that are stored one behind the other, in as many bytes as they take.

A host cluster that has several of them has a reference for each.  Nothing that is allocated already is overwritten.

Behaviour: QEMU qcow2_co_pwritev_compressed_part (block/qcow2.c), qcow2_alloc_compressed_cluster_offset
(block/qcow2-cluster.c).
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from fusebd.block.child import Buffers, nbytes, slice_buffers
from fusebd.block.shield import shielded
from fusebd.drivers.qcow2.allocation import Allocator, InFlight
from fusebd.drivers.qcow2.compression import compress_in_thread
from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.drivers.qcow2.tables import Tables
from fusebd.errors import BlockIOError
from fusebd.ondisk import qcow2 as ondisk


class CompressedWriter:
    """*written* is called when there are compressed data in a place where others may have been before."""

    def __init__(
        self,
        image: Image,
        tables: Tables,
        refcounts: Refcounts,
        allocator: Allocator,
        written: Callable[[], None],
    ) -> None:
        self._image, self._tables, self._refcounts, self._allocator = image, tables, refcounts, allocator
        self._written = written

    async def pwritev(self, offset: int, bufs: Buffers, length: int) -> None:
        """Write *bufs*, which are whole clusters unless the disk, of *length* bytes, ends in them.

        A cluster that does not become shorter is written as it is.  Suspends while worker threads compress, and where
        the file does.  Raises EINVAL, EIO for what has been written before, ENOTSUP.
        """
        image, size = self._image, nbytes(bufs)
        if image.data_file is not None:
            raise image.error("write", code=errno.ENOTSUP, offset=offset)
        if offset & image.cluster_mask or (size & image.cluster_mask and offset + size != length):
            raise image.error("write", code=errno.EINVAL, offset=offset)
        for at in range(0, size, image.cluster_size):
            part = slice_buffers(bufs, at, min(at + image.cluster_size, size))
            cluster = b"".join(part).ljust(image.cluster_size, b"\0")
            data = await compress_in_thread(image.header.compression_type, cluster)
            if data is None:
                await self._allocator.pwritev(offset + at, part, nbytes(part))
            else:
                await self._store(offset + at, data)

    async def _store(self, offset: int, data: bytes) -> None:
        """Make *data* the compressed content of the cluster at the guest *offset*."""
        image = self._image
        async with image.lock:
            in_flight, host_offset = await self._allocate(offset, len(data))
            epoch = image.epoch
            epoch.count += 1
        try:
            await image.announce("write_compressed")
            await image.data.pwritev(host_offset, (memoryview(data),))
        except BaseException:
            await shielded(self._give_up(in_flight, host_offset, len(data)))
            raise
        finally:
            epoch.count -= 1
        await shielded(self._link(in_flight, offset, host_offset, len(data)))

    async def _allocate(self, offset: int, size: int) -> tuple[InFlight, int]:
        """*size* bytes of the file for the cluster at the guest *offset*: (what is under way, host offset)."""
        image, bits = self._image, self._image.cluster_bits
        cluster = offset >> bits
        await self._allocator.wait_free(cluster, cluster + 1)
        item = await self._tables.find_writable(offset)
        if item.entries[cluster & self._tables.entry_mask] & (ondisk.OFFSET_MASK | ondisk.COMPRESSED):
            raise image.error("write", offset=offset)
        host_offset = await self._refcounts.allocate_bytes(size)
        try:
            await image.check_data_overlap(host_offset, size)
        except BlockIOError:
            if image.usable:
                await self._refcounts.abandon_bytes(host_offset, size)
            raise
        self._written()
        return self._allocator.begin(cluster, cluster + 1), host_offset

    async def _give_up(self, in_flight: InFlight, host_offset: int, size: int) -> None:
        async with self._image.lock:
            if self._image.usable:
                await self._refcounts.abandon_bytes(host_offset, size)
            self._allocator.end(in_flight)

    async def _link(self, in_flight: InFlight, offset: int, host_offset: int, size: int) -> None:
        image, tables = self._image, self._tables
        linked = False
        async with image.lock:
            try:
                item = await tables.find_writable(offset)
                await image.announce("l2_update_compressed")
                entry = ondisk.build_compressed(host_offset, size, image.cluster_bits)
                item.put((offset >> image.cluster_bits) & tables.entry_mask, entry)
                item.dirty = True
                self._refcounts.needs_flush = True
                linked = True
            finally:
                if not linked and image.usable:
                    await self._refcounts.abandon_bytes(host_offset, size)
                self._allocator.end(in_flight)
