"""The header of a GUID partition table (GPT).  All numbers are little-endian.

Specification: UEFI 2.10, section 5.3.2.
"""

from __future__ import annotations

import zlib
from typing import Any

import construct as cs

SIGNATURE = b"EFI PART"
PRIMARY_LBA = 1
#: where the primary entry array has to begin if no header says so
PRIMARY_ENTRIES_LBA = 2
SECTOR_SIZES = (512, 4096)
#: an entry array of more is nonsense
MAX_ENTRIES_BYTES = 1 << 24

HEADER = cs.Struct(
    "signature" / cs.Bytes(8),
    "revision" / cs.Int32ul,
    "header_size" / cs.Int32ul,
    "header_crc32" / cs.Int32ul,
    "reserved" / cs.Int32ul,
    "my_lba" / cs.Int64ul,
    "alternate_lba" / cs.Int64ul,
    "first_usable_lba" / cs.Int64ul,
    "last_usable_lba" / cs.Int64ul,
    "disk_guid" / cs.Bytes(16),
    "partition_entry_lba" / cs.Int64ul,
    "number_of_partition_entries" / cs.Int32ul,
    "size_of_partition_entry" / cs.Int32ul,
    "partition_entry_array_crc32" / cs.Int32ul,
)
HEADER_LENGTH = 92
_CRC_AT = 16


def parse_header(sector: bytes) -> dict[str, Any] | None:
    """The header in *sector*, as field -> value; None unless its signature, size and checksum are right."""
    if len(sector) < HEADER_LENGTH:
        return None
    fields: dict[str, Any] = dict(HEADER.parse(sector[:HEADER_LENGTH]))
    length = fields["header_size"]
    if fields["signature"] != SIGNATURE or not HEADER_LENGTH <= length <= len(sector):
        return None
    summed = sector[:_CRC_AT] + bytes(4) + sector[_CRC_AT + 4 : length]
    return fields if zlib.crc32(summed) == fields["header_crc32"] else None
