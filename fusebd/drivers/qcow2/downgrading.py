"""What an image loses that becomes one of version 2: zero clusters, which are made data, or nothing at all.

Each L2 table is rewritten in one piece, after the data and refcounts that the new one relies on are durable, and
before those that only the old one did are given up.  A crash leaves an image of version 3 with the same content.

Behaviour and messages: QEMU qcow2_downgrade (block/qcow2.c), expand_zero_clusters_in_l1 (block/qcow2-cluster.c); other
than there, a cluster that a snapshot shows is not written when the disk has zeroes in its place.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.options import OL_ACTIVE_L2, OL_INACTIVE_L2
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.drivers.qcow2.references import References, from_big_endian, to_big_endian
from fusebd.drivers.qcow2.snapshots import Snapshot
from fusebd.drivers.qcow2.tables import Tables
from fusebd.errors import BlockIOError, CommandError
from fusebd.ondisk import qcow2 as ondisk

_MOST_VM_STATE = 2**32 - 1


def check_downgrade(image: Image, snapshots: Sequence[Snapshot], features: int, order: int) -> None:
    """Raise CommandError unless the image can be one of version 2.

    *features* are the incompatible features that it has, *order* is the width of its refcounts.
    """
    header = image.header
    reason = ""
    if order != ondisk.V3_DEFAULTS["refcount_order"]:
        reason = "compat=0.10 requires refcount_bits=16"
    elif image.data_file is not None:
        reason = "Cannot downgrade an image with a data file"
    elif any(s.vm_state_size > _MOST_VM_STATE or s.disk_size != header.size for s in snapshots):
        reason = "Internal snapshots prevent downgrade of image"
    elif others := features & ~ondisk.INCOMPAT_COMPRESSION:
        reason = f"Cannot downgrade an image with incompatible features {others:#x} set"
    elif header.nb_bitmaps:
        reason = "Cannot downgrade an image with persistent bitmaps"
    if reason:
        raise CommandError(reason, errno=errno.ENOTSUP)


@dataclass(frozen=True, slots=True)
class _Table:
    """An L2 table: where it is, what it is the first of whose L1 entries, and whether the disk has it."""

    offset: int
    l1_index: int
    active: bool


class Downgrader:
    """The caller holds ``Image.lock``; no request is under way, nothing is cached that was not written.

    All methods suspend while tables are read, and after each.
    """

    def __init__(
        self, image: Image, tables: Tables, refcounts: Refcounts, snapshots: Sequence[Snapshot], *, backed: bool
    ) -> None:
        """*backed*: what is not allocated may read as something else than zeroes."""
        self._image, self._tables, self._refcounts, self._snapshots = image, tables, refcounts, snapshots
        self._backed = backed

    async def check_compression(self) -> None:
        """Raise CommandError if clusters are compressed with something that version 2 does not have."""
        if self._image.header.compression_type == ondisk.COMPRESSION_ZLIB:
            return
        for table in await self._l2_tables():
            entries = from_big_endian(await self._image.read(table.offset, self._image.cluster_size))
            if any(entry & ondisk.COMPRESSED for entry in entries):
                raise CommandError(
                    "Cannot downgrade an image with zstd compression type and existing compressed clusters",
                    errno=errno.ENOTSUP,
                )
            await trio.lowlevel.checkpoint()

    async def expand_zeroes(self) -> None:
        """Have no entry say of itself that it reads as zeroes, in the tables of the disk and of all snapshots.

        Raises CommandError; the content of the image is the same then.
        """
        try:
            for table in await self._l2_tables():
                await self._expand(table)
                await trio.lowlevel.checkpoint()
            await self._refcounts.write_back()
            await self._image.file.flush()
        except BlockIOError as error:
            raise CommandError(f"Failed to turn zero into data clusters: {error.reason}", errno=error.errno) from None

    async def _l2_tables(self) -> list[_Table]:
        """All L2 tables, each once."""
        references = References(self._image, self._tables, self._refcounts)
        found: dict[int, _Table] = {}
        l1_tables = [(self._tables.l1, True)]
        l1_tables += [(await references.read_l1(s.l1_table_offset, s.l1_size), False) for s in self._snapshots]
        for l1, active in l1_tables:
            for index, entry in enumerate(l1):
                if offset := entry & ondisk.OFFSET_MASK:
                    found.setdefault(offset, _Table(offset, index, active))
        return list(found.values())

    async def _expand(self, table: _Table) -> None:
        image, refcounts, bits = self._image, self._refcounts, self._image.cluster_bits
        entries = from_big_endian(await image.read(table.offset, image.cluster_size))
        before = bytes(to_big_endian(entries))
        references = await refcounts.get(table.offset >> bits)
        taken: list[int] = []
        given_up: list[int] = []
        try:
            for at, entry in enumerate(entries):
                if entry & ondisk.COMPRESSED or not entry & ondisk.ZERO:
                    continue
                host_offset = entry & ondisk.OFFSET_MASK
                entries[at] = 0
                if self._backed:
                    # one that others refer to, too, may show something else there
                    own = host_offset and await refcounts.get(host_offset >> bits) == references
                    place = host_offset if own else await self._allocate(references, taken)
                    await self._write_zeroes(place, (table.l1_index * len(entries) + at) << bits)
                    entries[at] = place | (ondisk.COPIED if references == 1 and table.active else 0)
                if host_offset and entries[at] & ondisk.OFFSET_MASK != host_offset:
                    given_up.append(host_offset)
            data = to_big_endian(entries)
            if data == before:
                return
            await refcounts.write_back()
            await image.file.flush()
            await image.check_overlap(table.offset, image.cluster_size, OL_ACTIVE_L2 | OL_INACTIVE_L2)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._abandon(taken, references)
            raise

        async def undo() -> None:
            await self._abandon(taken, references)

        await image.switch(table.offset, data, before, undo)
        for host_offset in given_up:
            await refcounts.update(host_offset >> bits, 1, -references)

    async def _allocate(self, references: int, taken: list[int]) -> int:
        """A cluster with so many *references*, which is also put into *taken*."""
        refcounts = self._refcounts
        offset = await refcounts.allocate(1)
        try:
            await refcounts.update(offset >> self._image.cluster_bits, 1, references - 1)
        except BaseException:
            await refcounts.abandon(offset, 1)
            raise
        taken.append(offset)
        return offset

    async def _abandon(self, taken: list[int], references: int) -> None:
        for offset in taken:
            for _ in range(references):
                await self._refcounts.abandon(offset, 1)

    async def _write_zeroes(self, host_offset: int, guest_offset: int) -> None:
        image = self._image
        await image.check_overlap(host_offset, image.cluster_size)
        if image.encryption is None:
            await image.file.pwrite_zeroes(host_offset, image.cluster_size)
        else:
            zeroes = (memoryview(bytes(image.cluster_size)),)
            await image.file.pwritev(host_offset, await image.encryption.encrypted(host_offset, guest_offset, zeroes))
