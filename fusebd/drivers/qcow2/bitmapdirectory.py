"""The bitmap directory and the tables of bitmaps: what is in them, checked before it is used.

Layout: QEMU docs/interop/qcow2.txt, "Bitmaps".  Limits and messages: bitmap_list_load, check_dir_entry, load_bitmap
(block/qcow2-bitmap.c).
"""

from __future__ import annotations

import errno
import os
from array import array
from dataclasses import dataclass
from typing import Any

import trio

from fusebd.block.options import Json
from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.references import from_big_endian
from fusebd.errors import BlockIOError, CommandError, ImageError
from fusebd.ondisk import qcow2 as ondisk

_INVALID = os.strerror(errno.EINVAL)
#: of all bitmaps together: an image may say that many have one and the same large table
_MOST_TABLE_ENTRIES = 1 << 22


@dataclass
class StoredBitmap:
    """One entry of the directory."""

    name_bytes: bytes
    table_offset: int
    table_size: int
    flags: int
    granularity_bits: int

    @property
    def name(self) -> str:
        """The name for people."""
        return self.name_bytes.decode("utf-8", "replace")

    @property
    def in_use(self) -> bool:
        """Whether what is stored cannot be relied on."""
        return bool(self.flags & ondisk.BITMAP_IN_USE)

    def info(self) -> dict[str, Json]:
        """QAPI Qcow2BitmapInfo."""
        flags = [
            name for bit, name in ((ondisk.BITMAP_IN_USE, "in-use"), (ondisk.BITMAP_AUTO, "auto")) if self.flags & bit
        ]
        return {"flags": flags, "name": self.name, "granularity": 1 << self.granularity_bits}

    def build(self) -> bytes:
        """The entry as it is in the directory."""
        head: bytes = ondisk.BITMAP_ENTRY.build(
            {
                "bitmap_table_offset": self.table_offset,
                "bitmap_table_size": self.table_size,
                "flags": self.flags,
                "type": ondisk.BITMAP_DIRTY_TRACKING,
                "granularity_bits": self.granularity_bits,
                "name_size": len(self.name_bytes),
                "extra_data_size": 0,
            }
        )
        data = head + self.name_bytes
        return data.ljust((len(data) + 7) & ~7, b"\0")


def check_constraints(name: str, granularity: int, length: int, cluster_size: int) -> None:
    """Raise CommandError if a bitmap of a disk of *length* bytes cannot be stored."""
    bits = granularity.bit_length() - 1
    if bits > ondisk.MAX_BITMAP_GRANULARITY_BITS:
        raise CommandError(f"Granularity exceeds maximum ({1 << ondisk.MAX_BITMAP_GRANULARITY_BITS} bytes)")
    if bits < ondisk.MIN_BITMAP_GRANULARITY_BITS:
        raise CommandError(f"Granularity is under minimum ({1 << ondisk.MIN_BITMAP_GRANULARITY_BITS} bytes)")
    nb_bytes = (length + 8 * granularity - 1) // (8 * granularity)
    if nb_bytes > min(ondisk.MAX_BITMAP_BYTES, ondisk.MAX_BITMAP_TABLE_ENTRIES * cluster_size):
        raise CommandError("Too much space will be occupied by the bitmap. Use larger granularity")
    if len(name.encode("utf-8", "surrogateescape")) > ondisk.MAX_BITMAP_NAME:
        raise CommandError(f"Name length exceeds maximum ({ondisk.MAX_BITMAP_NAME} characters)")


def parse_directory(data: bytes, nb_bitmaps: int, *, length: int, cluster_size: int) -> list[StoredBitmap]:
    """The entries in *data*, for a disk of *length* bytes.  Raises ImageError."""
    found: list[StoredBitmap] = []
    at = 0
    while at < len(data):
        if at + ondisk.BITMAP_ENTRY_LENGTH > len(data):
            raise ImageError("Broken bitmap directory")
        if len(found) == nb_bitmaps:
            raise ImageError("More bitmaps found than specified in header extension")
        entry: Any = ondisk.BITMAP_ENTRY.parse(data[at : at + ondisk.BITMAP_ENTRY_LENGTH])
        end = (at + ondisk.BITMAP_ENTRY_LENGTH + entry.extra_data_size + entry.name_size + 7) & ~7
        if end > len(data):
            raise ImageError("Broken bitmap directory")
        if entry.extra_data_size:
            raise ImageError("Bitmap extra data is not supported")
        name = data[at + ondisk.BITMAP_ENTRY_LENGTH :][: entry.name_size]
        stored = StoredBitmap(
            name, entry.bitmap_table_offset, entry.bitmap_table_size, entry.flags, entry.granularity_bits
        )
        if entry.type != ondisk.BITMAP_DIRTY_TRACKING or not _is_sound(stored, length, cluster_size):
            raise ImageError(f"Bitmap '{stored.name}' doesn't satisfy the constraints")
        found.append(stored)
        at = end
    if len(found) != nb_bitmaps:
        raise ImageError("Less bitmaps found than specified in header extension")
    return found


def _is_sound(stored: StoredBitmap, length: int, cluster_size: int) -> bool:
    space = stored.table_size * cluster_size
    return bool(
        stored.table_size
        and stored.table_offset
        and not stored.table_offset % cluster_size
        and stored.table_offset <= ondisk.MAX_CLUSTER_OFFSET
        and ondisk.MIN_BITMAP_GRANULARITY_BITS <= stored.granularity_bits <= ondisk.MAX_BITMAP_GRANULARITY_BITS
        and not stored.flags & ~(ondisk.BITMAP_IN_USE | ondisk.BITMAP_AUTO)
        and len(stored.name_bytes) <= ondisk.MAX_BITMAP_NAME
        and space <= ondisk.MAX_BITMAP_BYTES
        and (stored.in_use or length <= space * 8 << stored.granularity_bits)
    )


async def read_directory(image: Image) -> list[StoredBitmap]:
    """The bitmaps that the image has.  Suspends while it is read.  Raises ImageError, BlockIOError."""
    header = image.header
    if not header.nb_bitmaps:
        return []
    if not header.bitmap_directory_size:
        raise ImageError("Requested bitmap directory size is zero")
    try:
        data = await image.read(header.bitmap_directory_offset, header.bitmap_directory_size)
    except BlockIOError as error:
        raise error.prefixed("Failed to read bitmap directory") from None
    found = parse_directory(bytes(data), header.nb_bitmaps, length=header.size, cluster_size=image.cluster_size)
    if sum(stored.table_size for stored in found) > _MOST_TABLE_ENTRIES:
        raise ImageError("Bitmap tables too large", errno=errno.EFBIG)
    return found


async def read_table(image: Image, stored: StoredBitmap) -> array[int]:
    """The table of *stored*: host offsets of clusters, 0 where there is none and 1 where all bits are one.

    Suspends while it is read.  Raises ImageError, BlockIOError.
    """
    failure = f"Could not read bitmap_table table from image for bitmap '{stored.name}'"
    try:
        table = from_big_endian(await image.read(stored.table_offset, 8 * stored.table_size))
    except BlockIOError as error:
        raise error.prefixed(failure) from None
    for entry in set(table):
        offset = entry & ondisk.OFFSET_MASK
        if entry & ~(ondisk.OFFSET_MASK | ondisk.BITMAP_ALL_ONES) or (
            offset and (entry & ondisk.BITMAP_ALL_ONES or offset & image.cluster_mask)
        ):
            raise ImageError(f"{failure}: {_INVALID}")
    return table


async def used_areas(image: Image) -> list[tuple[int, int]]:
    """What the bitmaps take of the file: (offset, length) of each reference.  Raises ImageError, BlockIOError."""
    header = image.header
    if not header.nb_bitmaps:
        return []
    areas = [(header.bitmap_directory_offset, header.bitmap_directory_size)]
    for stored in await read_directory(image):
        areas.append((stored.table_offset, 8 * stored.table_size))
        table = await read_table(image, stored)
        await trio.lowlevel.checkpoint()
        areas += [(entry, image.cluster_size) for entry in table if entry & ondisk.OFFSET_MASK]
    return areas
