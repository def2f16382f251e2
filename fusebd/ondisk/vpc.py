"""Virtual PC and Hyper-V disk images (VHD).  All numbers are big-endian.

The footer is the last sector of the file; a dynamic image has a copy of it at the beginning, a header behind that, and
a table of the blocks' places in sectors.  A block begins with a bitmap of its sectors.

Specification: Microsoft, Virtual Hard Disk Image Format Specification, version 1.0.
"""

from __future__ import annotations

import construct as cs

COOKIE, DYNAMIC_COOKIE = b"conectix", b"cxsparse"
TYPE_FIXED, TYPE_DYNAMIC, TYPE_DIFFERENCING = 2, 3, 4
SECTOR_SIZE = 512
UNALLOCATED = 0xFFFFFFFF
#: the largest geometry: 65535 cylinders, 16 heads, 255 sectors
MAX_GEOMETRY = 65535 * 16 * 255
#: 2040 GiB
MAX_SECTORS = 2040 * (1 << 30) // SECTOR_SIZE
#: programs that mean the geometry to be the size
GEOMETRY_APPS = (b"vpc ", b"qemu")

FOOTER = cs.Struct(
    "creator" / cs.Bytes(8),
    "features" / cs.Int32ub,
    "version" / cs.Int32ub,
    "data_offset" / cs.Int64ub,
    "timestamp" / cs.Int32ub,
    "creator_app" / cs.Bytes(4),
    "major" / cs.Int16ub,
    "minor" / cs.Int16ub,
    "creator_os" / cs.Bytes(4),
    "orig_size" / cs.Int64ub,
    "current_size" / cs.Int64ub,
    "cylinders" / cs.Int16ub,
    "heads" / cs.Int8ub,
    "sectors_per_cylinder" / cs.Int8ub,
    "type" / cs.Int32ub,
    "checksum" / cs.Int32ub,
    "uuid" / cs.Bytes(16),
    "in_saved_state" / cs.Int8ub,
    "reserved" / cs.Bytes(427),
)
FOOTER_LENGTH = 512
_CHECKSUM_AT = 64

DYNAMIC_HEADER = cs.Struct(
    "magic" / cs.Bytes(8),
    "data_offset" / cs.Int64ub,
    "table_offset" / cs.Int64ub,
    "version" / cs.Int32ub,
    "max_table_entries" / cs.Int32ub,
    "block_size" / cs.Int32ub,
    "checksum" / cs.Int32ub,
    "parent_uuid" / cs.Bytes(16),
    "parent_timestamp" / cs.Int32ub,
    "reserved" / cs.Int32ub,
    "parent_name" / cs.Bytes(512),
    "parent_locators" / cs.Bytes(8 * 24),
    "reserved2" / cs.Bytes(256),
)
DYNAMIC_HEADER_LENGTH = 1024


def checksum(footer: bytes | bytearray) -> int:
    """What the checksum of the *footer* should be: the one's complement of the sum of its other bytes."""
    return ~(sum(footer) - sum(footer[_CHECKSUM_AT : _CHECKSUM_AT + 4])) & 0xFFFFFFFF
