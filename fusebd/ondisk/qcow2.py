"""The layout of qcow2 images: header, header extensions, snapshot table, bitmap directory, table entries.

Structures that are read once, at open, are declared in construct.  Table entries, which every request reads, have
masks and shifts beside the declaration; a test proves that both agree.

Specification: QEMU docs/interop/qcow2.txt.  All numbers are big-endian.
"""

from __future__ import annotations

from typing import Any

import construct as cs

MAGIC = b"QFI\xfb"

# --- limits: QEMU's, so that what it opens is opened, and what it refuses is refused ------------------

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MAX_REFCOUNT_ORDER = 6
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_TABLE_BYTES = 1024 * MAX_SNAPSHOTS
MAX_SNAPSHOT_EXTRA_DATA = 1024
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY_BYTES = MAX_BITMAPS * 1024
MIN_BITMAP_GRANULARITY_BITS, MAX_BITMAP_GRANULARITY_BITS = 9, 31
MAX_BITMAP_TABLE_ENTRIES = 0x8000000
MAX_BITMAP_BYTES = 0x20000000
MAX_BITMAP_NAME = 1023
MAX_BACKING_NAME = 1023
MAX_BACKING_FORMAT = 15
#: host offsets have 56 bits
MAX_CLUSTER_OFFSET = (1 << 56) - 1
#: the entries of a refcount table have 64 bits; no file is as long as the highest would be
MAX_FILE_OFFSET = (1 << 62) - 1

# --- header ------------------------------------------------------------------------------------------

INCOMPAT_DIRTY, INCOMPAT_CORRUPT, INCOMPAT_DATA_FILE, INCOMPAT_COMPRESSION, INCOMPAT_EXTENDED_L2 = (
    1 << bit for bit in range(5)
)
INCOMPAT_KNOWN = 0b11111
COMPAT_LAZY_REFCOUNTS = 1
AUTOCLEAR_BITMAPS, AUTOCLEAR_DATA_FILE_RAW = 1, 2
AUTOCLEAR_KNOWN = 0b11

HEADER_V2 = cs.Struct(
    "magic" / cs.Bytes(4),
    "version" / cs.Int32ub,
    "backing_file_offset" / cs.Int64ub,
    "backing_file_size" / cs.Int32ub,
    "cluster_bits" / cs.Int32ub,
    "size" / cs.Int64ub,
    "crypt_method" / cs.Int32ub,
    "l1_size" / cs.Int32ub,
    "l1_table_offset" / cs.Int64ub,
    "refcount_table_offset" / cs.Int64ub,
    "refcount_table_clusters" / cs.Int32ub,
    "nb_snapshots" / cs.Int32ub,
    "snapshots_offset" / cs.Int64ub,
)
#: what version 3 adds; version 2 means the defaults of ``V3_DEFAULTS``
HEADER_V3 = cs.Struct(
    "incompatible_features" / cs.Int64ub,
    "compatible_features" / cs.Int64ub,
    "autoclear_features" / cs.Int64ub,
    "refcount_order" / cs.Int32ub,
    "header_length" / cs.Int32ub,
)
#: version 3, header_length of 112 and more
HEADER_ADDITIONAL = cs.Struct("compression_type" / cs.Int8ub, "padding" / cs.Bytes(7))

HEADER_V2_LENGTH, HEADER_V3_LENGTH, HEADER_FULL_LENGTH = 72, 104, 112
V3_DEFAULTS = {
    "incompatible_features": 0,
    "compatible_features": 0,
    "autoclear_features": 0,
    "refcount_order": 4,
    "header_length": HEADER_V2_LENGTH,
}
COMPRESSION_ZLIB, COMPRESSION_ZSTD = 0, 1
COMPRESSION_NAMES = {COMPRESSION_ZLIB: "zlib", COMPRESSION_ZSTD: "zstd"}

# Byte offsets of the fields that are rewritten while an image is open, and how they are laid out.
BACKING_FILE_OFFSET = 8
SIZE_OFFSET = 24
L1_FIELDS_OFFSET = 36
L1_FIELDS = cs.Struct("l1_size" / cs.Int32ub, "l1_table_offset" / cs.Int64ub)
REFCOUNT_TABLE_FIELDS_OFFSET = 48
REFCOUNT_TABLE_FIELDS = cs.Struct("refcount_table_offset" / cs.Int64ub, "refcount_table_clusters" / cs.Int32ub)
SNAPSHOT_FIELDS_OFFSET = 60
SNAPSHOT_FIELDS = cs.Struct("nb_snapshots" / cs.Int32ub, "snapshots_offset" / cs.Int64ub)
#: from SIZE_OFFSET on, within one sector: the disk as a whole
DISK_FIELDS = cs.Struct(
    "size" / cs.Int64ub, "crypt_method" / cs.Int32ub, "l1_size" / cs.Int32ub, "l1_table_offset" / cs.Int64ub
)
INCOMPATIBLE_OFFSET = 72
AUTOCLEAR_OFFSET = 88


def parse_header(data: bytes) -> dict[str, Any]:
    """The header in *data*, which is HEADER_FULL_LENGTH bytes (zeroes where the file is shorter), as field -> value.

    Nothing is checked.  A version other than 3 gets the defaults of version 2 for what only version 3 has.
    """
    fields: dict[str, Any] = dict(HEADER_V2.parse(data[:HEADER_V2_LENGTH]))
    fields.update(V3_DEFAULTS)
    fields["compression_type"] = COMPRESSION_ZLIB
    if fields["version"] >= 3:
        fields.update(HEADER_V3.parse(data[HEADER_V2_LENGTH:HEADER_V3_LENGTH]))
        if fields["header_length"] > HEADER_V3_LENGTH:
            fields.update(HEADER_ADDITIONAL.parse(data[HEADER_V3_LENGTH:HEADER_FULL_LENGTH]))
    return {name: value for name, value in fields.items() if name not in ("_io", "padding")}


def build_header(fields: dict[str, Any]) -> bytes:
    """The inverse of ``parse_header``, as long as ``header_length`` says (at most HEADER_FULL_LENGTH)."""
    data: bytes = HEADER_V2.build(fields)
    if fields["version"] >= 3:
        data += HEADER_V3.build(fields) + HEADER_ADDITIONAL.build({**fields, "padding": bytes(7)})
    return data[: fields["header_length"]]


# --- header extensions -------------------------------------------------------------------------------

EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_TABLE = 0x6803F857
EXT_CRYPTO_HEADER = 0x0537BE77
EXT_BITMAPS = 0x23852875
EXT_DATA_FILE = 0x44415441

EXTENSION_HEADER = cs.Struct("type" / cs.Int32ub, "length" / cs.Int32ub)
EXTENSION_HEADER_LENGTH = 8

FEATURE_INCOMPATIBLE, FEATURE_COMPATIBLE, FEATURE_AUTOCLEAR = range(3)
FEATURE_NAME = cs.Struct("type" / cs.Int8ub, "bit" / cs.Int8ub, "name" / cs.Bytes(46))
FEATURE_NAME_LENGTH = 48
#: the names of the features there are, as QEMU writes them: (type, bit, name)
FEATURES = (
    (FEATURE_INCOMPATIBLE, 0, "dirty bit"),
    (FEATURE_INCOMPATIBLE, 1, "corrupt bit"),
    (FEATURE_INCOMPATIBLE, 2, "external data file"),
    (FEATURE_INCOMPATIBLE, 3, "compression type"),
    (FEATURE_INCOMPATIBLE, 4, "extended L2 entries"),
    (FEATURE_COMPATIBLE, 0, "lazy refcounts"),
    (FEATURE_AUTOCLEAR, 0, "bitmaps"),
    (FEATURE_AUTOCLEAR, 1, "raw external data"),
)


def build_feature_table() -> bytes:
    """The content of the feature name table."""
    return b"".join(
        FEATURE_NAME.build({"type": kind, "bit": bit, "name": name.encode().ljust(46, b"\0")})
        for kind, bit, name in FEATURES
    )


CRYPT_NONE, CRYPT_AES, CRYPT_LUKS = range(3)
#: where the LUKS header is in the file, in bytes
CRYPTO_HEADER = cs.Struct("offset" / cs.Int64ub, "length" / cs.Int64ub)
CRYPTO_HEADER_LENGTH = 16

BITMAPS = cs.Struct(
    "nb_bitmaps" / cs.Int32ub,
    "reserved" / cs.Int32ub,
    "bitmap_directory_size" / cs.Int64ub,
    "bitmap_directory_offset" / cs.Int64ub,
)
BITMAPS_LENGTH = 24

# --- snapshots and bitmaps ---------------------------------------------------------------------------

SNAPSHOT = cs.Struct(
    "l1_table_offset" / cs.Int64ub,
    "l1_size" / cs.Int32ub,
    "id_str_size" / cs.Int16ub,
    "name_size" / cs.Int16ub,
    "date_sec" / cs.Int32ub,
    "date_nsec" / cs.Int32ub,
    "vm_clock_nsec" / cs.Int64ub,
    "vm_state_size" / cs.Int32ub,
    "extra_data_size" / cs.Int32ub,
)
SNAPSHOT_LENGTH = 40
#: what follows, as far as it is known; what the image has beyond that is kept
SNAPSHOT_EXTRA_DATA = cs.Struct("vm_state_size_large" / cs.Int64ub, "disk_size" / cs.Int64ub, "icount" / cs.Int64ub)

BITMAP_ENTRY = cs.Struct(
    "bitmap_table_offset" / cs.Int64ub,
    "bitmap_table_size" / cs.Int32ub,
    "flags" / cs.Int32ub,
    "type" / cs.Int8ub,
    "granularity_bits" / cs.Int8ub,
    "name_size" / cs.Int16ub,
    "extra_data_size" / cs.Int32ub,
)
BITMAP_ENTRY_LENGTH = 24
BITMAP_IN_USE, BITMAP_AUTO = 1, 2
BITMAP_DIRTY_TRACKING = 1
#: of a bitmap table's entry without an offset: all bits are one
BITMAP_ALL_ONES = 1

# --- table entries -----------------------------------------------------------------------------------

L1_ENTRY = cs.BitStruct(
    "copied" / cs.Flag,
    "reserved_high" / cs.BitsInteger(7),
    "offset" / cs.BitsInteger(47),
    "reserved" / cs.BitsInteger(9),
)
L2_STANDARD_ENTRY = cs.BitStruct(
    "copied" / cs.Flag,
    "compressed" / cs.Flag,
    "reserved_high" / cs.BitsInteger(6),
    "offset" / cs.BitsInteger(47),
    "reserved" / cs.BitsInteger(8),
    "zero" / cs.Flag,
)
REFCOUNT_TABLE_ENTRY = cs.BitStruct("offset" / cs.BitsInteger(55), "reserved" / cs.BitsInteger(9))


def l2_compressed_entry(cluster_bits: int) -> Any:
    """The declaration of a compressed cluster's L2 entry in images with clusters of 2**cluster_bits bytes."""
    offset_bits = compressed_offset_bits(cluster_bits)
    return cs.BitStruct(
        "copied" / cs.Flag,
        "compressed" / cs.Flag,
        "additional_sectors" / cs.BitsInteger(62 - offset_bits),
        "offset" / cs.BitsInteger(offset_bits),
    )


COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
#: of L1 and L2 entries: the host offset of the table or cluster
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
REFCOUNT_TABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00

# Extended L2 entries have a second word: bit n says that subcluster n is allocated, bit 32 + n that it is zero.
SUBCLUSTERS = 32
ALL_ALLOCATED = 0xFFFF_FFFF
ALL_ZERO = 0xFFFF_FFFF_0000_0000

COMPRESSED_SECTOR = 512


def compressed_offset_bits(cluster_bits: int) -> int:
    """How many bits a compressed cluster's L2 entry has for the host offset, in bytes."""
    return 62 - (cluster_bits - 8)


def parse_compressed(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Where the compressed cluster of the L2 *entry* is: host offset, and the bytes that it may take at most."""
    shift = compressed_offset_bits(cluster_bits)
    offset = entry & ((1 << shift) - 1)
    additional_sectors = (entry >> shift) & ((1 << (cluster_bits - 8)) - 1)
    return offset, (additional_sectors + 1) * COMPRESSED_SECTOR - offset % COMPRESSED_SECTOR


def build_compressed(offset: int, length: int, cluster_bits: int) -> int:
    """The L2 entry of a compressed cluster of *length* bytes at the host *offset*."""
    shift = compressed_offset_bits(cluster_bits)
    additional_sectors = (offset + length - 1) // COMPRESSED_SECTOR - offset // COMPRESSED_SECTOR
    return COMPRESSED | additional_sectors << shift | offset
