"""VMware disk images (VMDK): sparse extents, and the descriptor that says which extents a disk consists of.

All numbers are little-endian.  A sparse extent has a directory of grain tables (sectors, 32 bits each), and tables of
grains (sectors).  In a compressed extent, a grain is a deflate stream behind a marker.

Specification: VMware, Virtual Disk Format 5.0; for COWD and seSparse: QEMU block/vmdk.c.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import construct as cs

SECTOR_SIZE = 512
SPARSE_MAGIC, COWD_MAGIC = b"KDMV", b"COWD"

FLAG_ZERO_GRAIN, FLAG_MARKERS = 1 << 2, 1 << 17
COMPRESSION_DEFLATE = 1
#: the directory's offset is in the footer, in the last sector but one
DIRECTORY_AT_END = (1 << 64) - 1
MARKER_FOOTER, MARKER_END_OF_STREAM = 3, 0
#: a grain that reads as zeroes, where the header has FLAG_ZERO_GRAIN
ZEROED_GRAIN = 1
MAX_VERSION = 3
MAX_TABLE_ENTRIES = 512
MAX_DIRECTORY_ENTRIES = 32 << 20
MAX_GRAIN_SECTORS = 0x200000
MAX_DESCRIPTOR = (1 << 20) - 1

SPARSE_HEADER = cs.Struct(
    "magic" / cs.Bytes(4),
    "version" / cs.Int32ul,
    "flags" / cs.Int32ul,
    "capacity" / cs.Int64ul,
    "granularity" / cs.Int64ul,
    "descriptor_offset" / cs.Int64ul,
    "descriptor_size" / cs.Int64ul,
    "entries_per_table" / cs.Int32ul,
    "redundant_directory_offset" / cs.Int64ul,
    "directory_offset" / cs.Int64ul,
    "grain_offset" / cs.Int64ul,
    "unclean_shutdown" / cs.Int8ul,
    "line_ends" / cs.Bytes(4),
    "compression" / cs.Int16ul,
)
SPARSE_HEADER_LENGTH = 79

MARKER = cs.Struct("value" / cs.Int64ul, "size" / cs.Int32ul, "type" / cs.Int32ul)
MARKER_LENGTH = 16
#: before the data of a compressed grain: its first sector, and the length of the data
GRAIN_MARKER = cs.Struct("sector" / cs.Int64ul, "size" / cs.Int32ul)
GRAIN_MARKER_LENGTH = 12

COWD_HEADER = cs.Struct(
    "magic" / cs.Bytes(4),
    "version" / cs.Int32ul,
    "flags" / cs.Int32ul,
    "disk_sectors" / cs.Int32ul,
    "granularity" / cs.Int32ul,
    "directory_offset" / cs.Int32ul,
    "directory_size" / cs.Int32ul,
    "file_sectors" / cs.Int32ul,
    "cylinders" / cs.Int32ul,
    "heads" / cs.Int32ul,
    "sectors_per_track" / cs.Int32ul,
)
COWD_HEADER_LENGTH = 44
COWD_TABLE_ENTRIES = 4096

SESPARSE_MAGIC, SESPARSE_VOLATILE_MAGIC = 0xCAFEBABE, 0xCAFECAFE
SESPARSE_VERSION = 0x0000000200000001
SESPARSE_GRAIN_SECTORS, SESPARSE_TABLE_SECTORS = 8, 64
SESPARSE_HEADER = cs.Struct(
    "magic" / cs.Int64ul,
    "version" / cs.Int64ul,
    "capacity" / cs.Int64ul,
    "grain_size" / cs.Int64ul,
    "grain_table_size" / cs.Int64ul,
    "flags" / cs.Int64ul,
    "reserved" / cs.Array(4, cs.Int64ul),
    "volatile_header_offset" / cs.Int64ul,
    "volatile_header_size" / cs.Int64ul,
    "journal_header_offset" / cs.Int64ul,
    "journal_header_size" / cs.Int64ul,
    "journal_offset" / cs.Int64ul,
    "journal_size" / cs.Int64ul,
    "directory_offset" / cs.Int64ul,
    "directory_size" / cs.Int64ul,
    "tables_offset" / cs.Int64ul,
    "tables_size" / cs.Int64ul,
    "free_bitmap_offset" / cs.Int64ul,
    "free_bitmap_size" / cs.Int64ul,
    "backmap_offset" / cs.Int64ul,
    "backmap_size" / cs.Int64ul,
    "grains_offset" / cs.Int64ul,
    "grains_size" / cs.Int64ul,
    "padding" / cs.Bytes(304),
)
SESPARSE_VOLATILE_HEADER = cs.Struct(
    "magic" / cs.Int64ul,
    "free_table_number" / cs.Int64ul,
    "next_transaction" / cs.Int64ul,
    "replay_journal" / cs.Int64ul,
    "padding" / cs.Bytes(480),
)
SESPARSE_HEADER_LENGTH = 512

#: the types that a descriptor can name and that are read here
CREATE_TYPES = frozenset(
    ("monolithicFlat", "vmfs", "vmfsSparse", "seSparse", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat")
)
FLAT_TYPES = frozenset(("FLAT", "VMFS"))
EXTENT_TYPES = FLAT_TYPES | {"SPARSE", "VMFSSPARSE", "SESPARSE"}

_EXTENT = re.compile(rb'\s*(\S{1,10})\s+([+-]?\d+)\s+(\S{1,10})\s+"([^\n\r"]{1,511})"(?:\s+([+-]?\d+))?')


@dataclass(frozen=True, slots=True)
class ExtentLine:
    """One extent of a disk: *sectors* of it, from sector *start* of the file *name* on if it is flat."""

    sectors: int
    type: str
    name: bytes
    start: int = 0


def described(descriptor: bytes, key: str) -> bytes | None:
    """What *descriptor* says in ``key="value"``; None if it does not."""
    at = descriptor.find(key.encode())
    if at < 0:
        return None
    value, quote, _ = descriptor[at + len(key) + 2 :].partition(b'"')
    return value if quote else None


def extent_lines(descriptor: bytes) -> list[ExtentLine]:
    """The extents that *descriptor* lists; lines that are none are left out.  Raises ValueError: a malformed line."""
    found = []
    for line in descriptor.partition(b"\0")[0].split(b"\n"):
        match = _EXTENT.match(line)
        if match is None or match[1] != b"RW":
            continue
        sectors, kind, start = int(match[2]), match[3].decode("ascii", "replace"), match[5]
        wants_start = kind == "FLAT"
        if wants_start != (start is not None) or (start is not None and int(start) < 0):
            raise ValueError(line.decode(errors="replace").rstrip("\r"))
        if sectors <= 0 or kind not in EXTENT_TYPES:
            continue
        found.append(ExtentLine(sectors, kind, match[4], int(start or 0)))
    return found
