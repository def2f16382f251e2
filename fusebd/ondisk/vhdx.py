"""Hyper-V disk images of the newer kind (VHDX).  All numbers are little-endian.

The first mebibyte has an identifier, two headers of which the one with the higher sequence number holds, and two
copies of the region table; that says where the block allocation table (BAT) and the metadata are.

Specification: Microsoft, MS-VHDX.
"""

from __future__ import annotations

import construct as cs

SIGNATURE = b"vhdxfile"
HEADER_OFFSETS = (64 << 10, 128 << 10)
HEADER_CHECKED = 4096
REGION_TABLE_OFFSET, REGION_TABLE_LENGTH = 192 << 10, 64 << 10
REGION_ENTRY_REQUIRED = 1
MAX_REGIONS = MAX_METADATA = 2047
METADATA_TABLE_LENGTH = 32 * (MAX_METADATA + 1)
METADATA_REQUIRED = 4
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 1 << 20, 256 << 20
MAX_DISK_SIZE = 64 << 40
SECTOR_SIZE = 512
MAX_SECTORS_PER_BLOCK = 1 << 23
HAS_PARENT = 2
LOG_SECTOR = 4096

BAT_STATE_MASK, BAT_OFFSET_MASK = 7, 0xFFFFFFFFFFF00000
NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, UNMAPPED_0_95, FULLY_PRESENT, PARTIALLY_PRESENT = 0, 1, 2, 3, 5, 6, 7
#: states of blocks that read as zeroes
EMPTY_STATES = frozenset((NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, UNMAPPED_0_95))

HEADER = cs.Struct(
    "signature" / cs.Bytes(4),
    "checksum" / cs.Int32ul,
    "sequence_number" / cs.Int64ul,
    "file_write_guid" / cs.Bytes(16),
    "data_write_guid" / cs.Bytes(16),
    "log_guid" / cs.Bytes(16),
    "log_version" / cs.Int16ul,
    "version" / cs.Int16ul,
    "log_length" / cs.Int32ul,
    "log_offset" / cs.Int64ul,
)
HEADER_SIGNATURE = b"head"

REGION_HEADER = cs.Struct(
    "signature" / cs.Bytes(4), "checksum" / cs.Int32ul, "entry_count" / cs.Int32ul, "reserved" / cs.Int32ul
)
REGION_HEADER_LENGTH = 16
REGION_SIGNATURE = b"regi"
REGION_ENTRY = cs.Struct(
    "guid" / cs.Bytes(16), "file_offset" / cs.Int64ul, "length" / cs.Int32ul, "data_bits" / cs.Int32ul
)
REGION_ENTRY_LENGTH = 32

METADATA_HEADER = cs.Struct(
    "signature" / cs.Bytes(8), "reserved" / cs.Int16ul, "entry_count" / cs.Int16ul, "reserved2" / cs.Bytes(20)
)
METADATA_HEADER_LENGTH = 32
METADATA_SIGNATURE = b"metadata"
METADATA_ENTRY = cs.Struct(
    "item_id" / cs.Bytes(16),
    "offset" / cs.Int32ul,
    "length" / cs.Int32ul,
    "data_bits" / cs.Int32ul,
    "reserved" / cs.Int32ul,
)
METADATA_ENTRY_LENGTH = 32

LOG_HEADER = cs.Struct(
    "signature" / cs.Bytes(4),
    "checksum" / cs.Int32ul,
    "entry_length" / cs.Int32ul,
    "tail" / cs.Int32ul,
    "sequence_number" / cs.Int64ul,
    "descriptor_count" / cs.Int32ul,
    "reserved" / cs.Int32ul,
    "log_guid" / cs.Bytes(16),
    "flushed_file_offset" / cs.Int64ul,
    "last_file_offset" / cs.Int64ul,
)
LOG_HEADER_LENGTH = 64
LOG_SIGNATURE = b"loge"


def _guid(text: str) -> bytes:
    """A GUID as it is stored: the first three groups are little-endian numbers."""
    first, second, third, *rest = text.split("-")
    head = b"".join(bytes.fromhex(group)[::-1] for group in (first, second, third))
    return head + bytes.fromhex("".join(rest))


BAT = _guid("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA = _guid("8B7CA206-4790-4B9A-B8FE-575F050F886E")
FILE_PARAMETERS = _guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
DISK_SIZE = _guid("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
PAGE_83 = _guid("BECA12AB-B2E6-4523-93EF-C309E000C746")
LOGICAL_SECTOR = _guid("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PHYSICAL_SECTOR = _guid("CDA348C7-445D-4471-9CC9-E9885251C556")
PARENT_LOCATOR = _guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
#: what every image has
ITEMS = frozenset((FILE_PARAMETERS, DISK_SIZE, PAGE_83, LOGICAL_SECTOR, PHYSICAL_SECTOR))


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for number in range(256):
        value = number
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC32C = _crc32c_table()


def checksum(data: bytes) -> int:
    """The CRC-32C of *data* with the checksum field, bytes 4 to 8, taken as zeroes."""
    crc, table = 0xFFFFFFFF, _CRC32C
    for byte in data[:4] + bytes(4) + data[8:]:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
