"""The header of VirtualBox disk images (VDI), version 1.1.  All numbers are little-endian.

A map of 32-bit numbers follows, one for each block of the disk: the place of its data, counted in blocks, or one of
two special values.  Described in QEMU block/vdi.c; VirtualBox publishes no specification.
"""

from __future__ import annotations

import construct as cs

SIGNATURE = 0xBEDA107F
SIGNATURE_OFFSET = 0x40
VERSION_1_1 = 0x00010001
SECTOR_SIZE = 512
#: the image type of which all blocks were there from the beginning
TYPE_STATIC = 2
BLOCK_SIZE = 1 << 20
#: what the map can have in place of a block: never written, or given back
UNALLOCATED, DISCARDED = 0xFFFFFFFF, 0xFFFFFFFE
MAX_BLOCKS = 0x7FFFFFFF // 2
MAX_DISK_SIZE = MAX_BLOCKS * BLOCK_SIZE

HEADER = cs.Struct(
    "text" / cs.Bytes(0x40),
    "signature" / cs.Int32ul,
    "version" / cs.Int32ul,
    "header_size" / cs.Int32ul,
    "image_type" / cs.Int32ul,
    "image_flags" / cs.Int32ul,
    "description" / cs.Bytes(256),
    "offset_bmap" / cs.Int32ul,
    "offset_data" / cs.Int32ul,
    "cylinders" / cs.Int32ul,
    "heads" / cs.Int32ul,
    "sectors" / cs.Int32ul,
    "sector_size" / cs.Int32ul,
    "unused1" / cs.Int32ul,
    "disk_size" / cs.Int64ul,
    "block_size" / cs.Int32ul,
    "block_extra" / cs.Int32ul,
    "blocks_in_image" / cs.Int32ul,
    "blocks_allocated" / cs.Int32ul,
    "uuid_image" / cs.Bytes(16),
    "uuid_last_snap" / cs.Bytes(16),
    "uuid_link" / cs.Bytes(16),
    "uuid_parent" / cs.Bytes(16),
    "unused2" / cs.Bytes(56),
)
HEADER_LENGTH = 512
