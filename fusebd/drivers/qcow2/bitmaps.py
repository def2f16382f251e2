"""Persistent dirty bitmaps: loaded when an image is opened, stored when it is closed.

While an image is open for writing, its bitmaps are marked as in use: after a crash they are known to be of no use.
The autoclear bit is off whenever directory and header extension may not be right, so that a crash then loses all
bitmaps; a program that does not know them clears it, too.

Behaviour and messages: QEMU block/qcow2-bitmap.c.
"""

from __future__ import annotations

import errno
import logging
import os
from array import array

import trio

from fusebd.block.dirtybitmaps import BitmapStore, DirtyBitmap
from fusebd.drivers.qcow2.bitmapdirectory import (
    StoredBitmap,
    check_constraints,
    read_directory,
    read_table,
)
from fusebd.drivers.qcow2.extensions import drop_extension, put_extension, set_autoclear
from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.options import OL_BITMAP_DIRECTORY
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.drivers.qcow2.references import to_big_endian
from fusebd.errors import BlockIOError, CommandError, FusebdError, ImageError
from fusebd.ondisk import qcow2 as ondisk

log = logging.getLogger(__name__)

#: the most memory that all bitmaps of an image may take, in bytes
_MOST_MEMORY = 1 << 30


class Qcow2Bitmaps(BitmapStore):
    """The bitmaps of one open image: those in its directory, beside those of the node in memory."""

    def __init__(self, image: Image, refcounts: Refcounts) -> None:
        self._image, self._refcounts = image, refcounts
        self._stored: list[StoredBitmap] = []
        self._undecided = False  #: whether the image may refer to a directory that was given up

    def info(self) -> list[dict[str, object]]:
        """QAPI Qcow2BitmapInfo of each bitmap that is in the image."""
        return [stored.info() for stored in self._stored]

    # -- loading --------------------------------------------------------------------------------

    async def load(self) -> None:
        """Give the node the bitmaps that are in the image; mark them as in use if it can be written.

        Those that it has already, because it is being reopened, stay as they are.
        Suspends while they are read.  Raises ImageError, BlockIOError; the node has got none then.
        """
        image, node = self._image, self._image.node
        bitmaps = node.dirty_bitmaps
        self._stored = await read_directory(image)
        added: list[DirtyBitmap] = []
        marked = False
        for stored in self._stored:
            known = bitmaps.find(stored.name)
            if known is None:
                added.append(await self._load(stored))
            elif not stored.in_use and not known.read_only:
                raise ImageError(
                    f"Corruption: bitmap '{stored.name}' is not marked IN_USE in the image "
                    "and not marked readonly in RAM"
                )
            if not stored.in_use and not node.read_only:
                stored.flags |= ondisk.BITMAP_IN_USE
                marked = True
            self._check_memory(*added)
        if marked:
            await self._write_in_place()
        for bitmap in added:
            bitmaps.add(bitmap)
        for bitmap in bitmaps if not node.read_only else added:
            bitmap.read_only = node.read_only

    @staticmethod
    def _check_memory(*bitmaps: DirtyBitmap) -> None:
        if sum(bitmap.bits.memory for bitmap in bitmaps) > _MOST_MEMORY:
            raise ImageError("The bitmaps of the image take too much memory", errno=errno.EFBIG)

    async def _load(self, stored: StoredBitmap) -> DirtyBitmap:
        bitmap = DirtyBitmap(stored.name, 1 << stored.granularity_bits, self._image.header.size)
        bitmap.persistent = True
        bitmap.inconsistent = stored.in_use
        bitmap.enabled = bool(stored.flags & ondisk.BITMAP_AUTO) and not stored.in_use
        if not stored.in_use:
            await self._load_bits(stored, bitmap)
        return bitmap

    async def _load_bits(self, stored: StoredBitmap, bitmap: DirtyBitmap) -> None:
        image, bits = self._image, bitmap.bits
        size = image.cluster_size
        table = await read_table(image, stored)
        failure = f"Could not read bitmap '{stored.name}' from image"
        if len(table) != -(-bits.nb_bytes // size):
            raise ImageError(f"{failure}: {os.strerror(errno.EINVAL)}")
        for index, entry in enumerate(table):
            if entry == ondisk.BITMAP_ALL_ONES:
                bits.set(index * size * 8, (index + 1) * size * 8)
            elif entry:
                try:
                    bits.write(index * size, bytes(await image.read(entry, size)))
                except BlockIOError as error:
                    raise error.prefixed(failure) from None
            if index % 64 == 63:
                await trio.lowlevel.checkpoint()

    async def _write_in_place(self) -> None:
        """Write the directory over what it was: only flags have changed."""
        image = self._image
        header = image.header
        data = b"".join(stored.build() for stored in self._stored)
        async with image.lock:
            try:
                await image.check_overlap(header.bitmap_directory_offset, len(data), OL_BITMAP_DIRECTORY)
                await set_autoclear(image, header.autoclear_features & ~ondisk.AUTOCLEAR_BITMAPS)
                await image.write(header.bitmap_directory_offset, data)
                await image.file.flush()
                await set_autoclear(image, header.autoclear_features | ondisk.AUTOCLEAR_BITMAPS)
            except BlockIOError as error:
                raise error.prefixed("Can't update bitmap directory") from None

    # -- new bitmaps, and removed ones ----------------------------------------------------------

    def check_new(self, name: str, granularity: int) -> None:
        image = self._image
        try:
            if image.header.version < 3:
                raise CommandError("Cannot store dirty bitmaps in qcow2 v2 files")
            check_constraints(name, granularity, image.header.size, image.cluster_size)
            names = [bitmap.name for bitmap in image.node.dirty_bitmaps if bitmap.persistent]
            if len(names) >= ondisk.MAX_BITMAPS:
                raise CommandError("Maximum number of persistent bitmaps is already reached")
            if sum(map(_entry_size, (*names, name))) > ondisk.MAX_BITMAP_DIRECTORY_BYTES:
                raise CommandError("Not enough space in the bitmap directory")
        except CommandError as error:
            raise error.prefixed(f"Can't make bitmap '{name}' persistent in '{image.node.name}'") from None

    async def remove(self, name: str) -> None:
        stored = self._find(self._stored, name)
        if stored is None:
            return
        async with self._image.lock:
            try:
                await self._replace_directory([entry for entry in self._stored if entry is not stored])
            except BlockIOError as error:
                raise CommandError(f"Failed to update bitmap extension: {os.strerror(error.errno)}") from error
            await self._free_table(stored)

    @staticmethod
    def _find(entries: list[StoredBitmap], name: str) -> StoredBitmap | None:
        return next((stored for stored in entries if stored.name == name), None)

    def check_resize(self) -> None:
        """Raise CommandError if the disk cannot get another length because of a bitmap."""
        for stored in self._stored:
            bitmap = self._image.node.dirty_bitmaps.find(stored.name)
            if bitmap is None:
                raise CommandError("Cannot resize qcow2 with persistent bitmaps that were not loaded into memory")
            bitmap.check()

    # -- storing --------------------------------------------------------------------------------

    async def give_up_write(self) -> None:
        """Store all bitmaps: from now on nobody writes to the image, and they stay as they are."""
        async with self._image.lock:
            await self._store()
            await self._refcounts.write_back()
            await self._image.file.flush()
        for bitmap in self._image.node.dirty_bitmaps:
            if bitmap.persistent and not bitmap.inconsistent:
                bitmap.read_only = True

    async def take_back_write(self) -> None:
        """After ``give_up_write``, the image is written all the same: what it keeps is in use again."""
        for stored in self._stored:
            stored.flags |= ondisk.BITMAP_IN_USE
        if self._stored:
            await self._write_in_place()
        for bitmap in self._image.node.dirty_bitmaps:
            bitmap.read_only = False

    async def store_at_end(self) -> None:
        """Store all bitmaps, in the end; an error is logged, and loses them."""
        image = self._image
        try:
            async with image.lock:
                await self._store()
        except FusebdError as error:
            reason = error.reason if isinstance(error, BlockIOError) else error
            log.error("Lost persistent bitmaps during inactivation of node '%s': %s", image.node.name, reason)

    async def _store(self) -> None:
        image = self._image
        wanted = [
            bitmap
            for bitmap in image.node.dirty_bitmaps
            if bitmap.persistent and not bitmap.inconsistent and not bitmap.read_only
        ]
        if not wanted:
            return
        if image.node.read_only:
            raise CommandError("No write access")
        entries = list(self._stored)
        for bitmap in wanted:
            try:
                check_constraints(bitmap.name, bitmap.granularity, image.header.size, image.cluster_size)
            except CommandError as error:
                raise error.prefixed(f"Bitmap '{bitmap.name}' doesn't satisfy the constraints") from None
            old = self._find(entries, bitmap.name)
            if old is not None and not old.in_use:
                raise CommandError(f"Bitmap '{bitmap.name}' already exists in the image")
        made: list[StoredBitmap] = []
        replaced: list[StoredBitmap] = []
        try:
            for bitmap in wanted:
                old = self._find(entries, bitmap.name)
                new = await self._store_bits(bitmap, old)
                made.append(new)
                if old is None:
                    entries.append(new)
                else:
                    entries[entries.index(old)] = new
                    replaced.append(old)
            if len(entries) > ondisk.MAX_BITMAPS:
                raise CommandError("Too many persistent bitmaps")
            try:
                await self._replace_directory(entries)
            except BlockIOError as error:
                raise CommandError(f"Failed to update bitmap extension: {os.strerror(error.errno)}") from error
        except BaseException:
            if not self._undecided:
                with trio.CancelScope(shield=True):
                    for new in made:
                        await self._free_table(new)
            raise
        for old in replaced:
            await self._free_table(old)

    async def _store_bits(self, bitmap: DirtyBitmap, old: StoredBitmap | None) -> StoredBitmap:
        """Write the bits of *bitmap*, and the table that says where they are, to new clusters."""
        image, refcounts, bits = self._image, self._refcounts, bitmap.bits
        size = image.cluster_size
        table = array("Q", bytes(8 * max(-(-bits.nb_bytes // size), 1)))
        allocated: list[tuple[int, int]] = []
        try:
            for index in range(len(table)):
                data = bits.read(index * size, size)
                if data.count(0) != size:
                    table[index] = await self._write_new(data, allocated)
                if index % 64 == 63:
                    await trio.lowlevel.checkpoint()
            offset = await self._write_new(to_big_endian(table), allocated)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                for at, clusters in allocated:
                    await refcounts.abandon(at, clusters)
            if isinstance(error, BlockIOError):
                raise CommandError(
                    f"Failed to write bitmap '{bitmap.name}' to file: {os.strerror(error.errno)}"
                ) from error
            raise
        return StoredBitmap(
            name_bytes=bitmap.name.encode("utf-8", "surrogateescape") if old is None else old.name_bytes,
            table_offset=offset,
            table_size=len(table),
            flags=ondisk.BITMAP_AUTO if bitmap.enabled else 0,
            granularity_bits=bitmap.granularity.bit_length() - 1,
        )

    async def _write_new(self, data: bytes, allocated: list[tuple[int, int]]) -> int:
        """Write *data* to new clusters, which are entered in *allocated*; their host offset."""
        image = self._image
        clusters = -(-len(data) >> image.cluster_bits)
        offset = await self._refcounts.allocate(clusters, "bitmap")
        allocated.append((offset, clusters))
        await image.check_overlap(offset, len(data))
        await image.write(offset, data.ljust(clusters << image.cluster_bits, b"\0"))
        return offset

    async def _replace_directory(self, entries: list[StoredBitmap]) -> None:
        """Have the image say that its bitmaps are *entries*, durably."""
        image, refcounts = self._image, self._refcounts
        header = image.header
        old_offset, old_length = header.bitmap_directory_offset, header.bitmap_directory_size
        data = b"".join(stored.build() for stored in entries)
        offset = 0
        allocated: list[tuple[int, int]] = []
        try:
            if data:
                offset = await self._write_new(data, allocated)
            await refcounts.write_back()
            await image.file.flush()
            await set_autoclear(image, header.autoclear_features & ~ondisk.AUTOCLEAR_BITMAPS)
        except BaseException:
            with trio.CancelScope(shield=True):
                for at, clusters in allocated:
                    await refcounts.abandon(at, clusters)
            raise
        if data:
            extension: bytes = ondisk.BITMAPS.build(
                {
                    "nb_bitmaps": len(entries),
                    "reserved": 0,
                    "bitmap_directory_size": len(data),
                    "bitmap_directory_offset": offset,
                }
            )
            await put_extension(image, ondisk.EXT_BITMAPS, extension)
            self._undecided = True
            await set_autoclear(image, header.autoclear_features | ondisk.AUTOCLEAR_BITMAPS)
            self._undecided = False
        else:
            await drop_extension(image, ondisk.EXT_BITMAPS)
        header.nb_bitmaps = len(entries)
        header.bitmap_directory_offset, header.bitmap_directory_size = offset, len(data)
        self._stored = entries
        image.metadata.remove(OL_BITMAP_DIRECTORY, old_offset, old_length)
        image.metadata.add(OL_BITMAP_DIRECTORY, offset, len(data))
        await self._free(old_offset, old_length)

    async def _free_table(self, stored: StoredBitmap) -> None:
        """Nothing refers to the table of *stored* any more; an error leaks clusters, and is logged."""
        try:
            table = await read_table(self._image, stored)
        except FusebdError as error:
            log.error("%s: clusters of a bitmap leak: %s", self._image.node.name, error)
            return
        for entry in table:
            if entry & ondisk.OFFSET_MASK:
                await self._free(entry & ondisk.OFFSET_MASK, self._image.cluster_size)
        await self._free(stored.table_offset, 8 * stored.table_size)

    async def _free(self, offset: int, length: int) -> None:
        if not length:
            return
        bits = self._image.cluster_bits
        first = offset >> bits
        try:
            await self._refcounts.lower(first, ((offset + length - 1) >> bits) + 1 - first, discard=False)
        except BlockIOError as error:
            log.error("%s: qcow2_free_clusters failed: %s", self._image.node.name, error)


def _entry_size(name: str) -> int:
    return (ondisk.BITMAP_ENTRY_LENGTH + len(name.encode("utf-8", "surrogateescape")) + 7) & ~7
