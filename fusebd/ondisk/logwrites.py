"""The layout of write logs: a superblock, and entries that are followed by what was written.

All of it is in log sectors, whose size the superblock says.  Sector 0 has the superblock, zeroes after it.  An entry
takes a sector of its own, zeroes after it; the data of a write follows in as many sectors as were written, nothing
follows for a discard.  A mark's text is in the sector of its entry, with at least one zero byte after it.

Specification: Linux Documentation/admin-guide/device-mapper/log-writes.rst, whose kernel target wrote such logs first;
also written by QEMU block/blklogwrites.c, and read by xfstests' replay-log.  All numbers are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import construct as cs

from fusebd.errors import ImageError

MAGIC = 0x6A736677736872
VERSION = 1
DEFAULT_SECTOR_SIZE = 512
MIN_SECTOR_SIZE, MAX_SECTOR_SIZE = 32, 1 << 23

SUPERBLOCK = cs.Struct(
    "magic" / cs.Int64ul,
    "version" / cs.Int64ul,
    "nr_entries" / cs.Int64ul,
    "sectorsize" / cs.Int32ul,
)
SUPERBLOCK_LENGTH = 28

ENTRY = cs.Struct(
    "sector" / cs.Int64ul,
    "nr_sectors" / cs.Int64ul,
    "flags" / cs.Int64ul,
    "data_len" / cs.Int64ul,
)
ENTRY_LENGTH = 32

# Flags of entries.  METADATA, what the kernel was told to be a filesystem's own data, is written by the kernel alone.
FLUSH, FUA, DISCARD, MARK, METADATA = (1 << bit for bit in range(5))
FLAGS_KNOWN = 0b11111
FLAG_NAMES = {FLUSH: "flush", FUA: "fua", DISCARD: "discard", MARK: "mark", METADATA: "metadata"}

# The declarations once more, for what is done for every request.
PACKED_SUPERBLOCK = struct.Struct("<QQQI")
PACKED_ENTRY = struct.Struct("<QQQQ")


@dataclass(frozen=True, slots=True)
class Superblock:
    """What the superblock of a log says, checked."""

    nr_entries: int
    sector_size: int

    def pack(self) -> bytes:
        return PACKED_SUPERBLOCK.pack(MAGIC, VERSION, self.nr_entries, self.sector_size)


def is_sector_size(size: int) -> bool:
    """Whether log sectors can have *size* bytes."""
    return MIN_SECTOR_SIZE <= size <= MAX_SECTOR_SIZE and not size & (size - 1)


def parse_superblock(data: bytes) -> Superblock:
    """The superblock in *data*, SUPERBLOCK_LENGTH bytes.  Raises ImageError in QEMU's words."""
    fields = SUPERBLOCK.parse(data)
    if fields.magic != MAGIC:
        raise ImageError("Invalid log superblock magic")
    if fields.version != VERSION:
        raise ImageError(f"Unsupported log version {fields.version}")
    if not is_sector_size(fields.sectorsize):
        raise ImageError(f"Invalid log sector size {fields.sectorsize}")
    return Superblock(fields.nr_entries, fields.sectorsize)


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry as it stands in the log.

    ``sector`` and ``nr_sectors`` are log sectors of the disk that was written; ``data_len`` is the length of a mark's
    text in bytes, and of no importance otherwise.
    """

    sector: int
    nr_sectors: int
    flags: int
    data_len: int = 0

    def pack(self) -> bytes:
        return PACKED_ENTRY.pack(self.sector, self.nr_sectors, self.flags, self.data_len)

    @property
    def data_sectors(self) -> int:
        """How many sectors of data follow the entry's own."""
        return 0 if self.flags & DISCARD else self.nr_sectors


def parse_entry(data: bytes, number: int) -> Entry:
    """Entry *number* of a log, in *data*, ENTRY_LENGTH bytes.  Raises ImageError, about flags in QEMU's words."""
    entry = Entry(*PACKED_ENTRY.unpack(data))
    if entry.flags & ~FLAGS_KNOWN:
        raise ImageError(f"Invalid flags {entry.flags:#x} in log entry {number}")
    return entry


def max_mark_length(sector_size: int) -> int:
    """How many bytes a mark's text has at most; the zero byte that ends it is not counted.  Below 1: there are none."""
    return sector_size - ENTRY_LENGTH - 1
