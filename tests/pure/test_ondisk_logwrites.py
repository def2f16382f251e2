"""The layout of write logs: declarations against bytes, and the packing of the fast path against the declarations."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusebd.errors import ImageError
from fusebd.ondisk import logwrites as ondisk

WORDS = st.integers(0, 2**64 - 1)

SUPERBLOCK = bytes.fromhex("72687377 66736a00 01000000 00000000 05000000 00000000 00020000")
TABLE: list[tuple[Any, dict[str, int], bytes]] = [
    (
        ondisk.SUPERBLOCK,
        {"magic": ondisk.MAGIC, "version": 1, "nr_entries": 5, "sectorsize": 512},
        SUPERBLOCK,
    ),
    (
        ondisk.ENTRY,
        {"sector": 0x0102030405060708, "nr_sectors": 8, "flags": 2, "data_len": 0},
        bytes.fromhex("0807060504030201 0800000000000000 0200000000000000 0000000000000000"),
    ),
]


@pytest.mark.parametrize(("declared", "fields", "data"), TABLE, ids=["superblock", "entry"])
def test_declarations_and_bytes_agree(declared: Any, fields: dict[str, int], data: bytes) -> None:
    assert declared.build(fields) == data
    parsed = declared.parse(data)
    assert {name: parsed[name] for name in fields} == fields


def test_lengths_are_those_of_the_declarations() -> None:
    assert ondisk.SUPERBLOCK.sizeof() == ondisk.PACKED_SUPERBLOCK.size == ondisk.SUPERBLOCK_LENGTH
    assert ondisk.ENTRY.sizeof() == ondisk.PACKED_ENTRY.size == ondisk.ENTRY_LENGTH


def test_the_magic_is_the_one_of_dm_log_writes() -> None:
    assert struct.pack("<Q", ondisk.MAGIC) == b"rhswfsj\0"


@settings(derandomize=True, deadline=None)
@given(WORDS, st.integers(0, 2**32 - 1))
def test_packed_superblocks_are_as_declared(nr_entries: int, sector_size: int) -> None:
    fields = {"magic": ondisk.MAGIC, "version": 1, "nr_entries": nr_entries, "sectorsize": sector_size}
    assert ondisk.Superblock(nr_entries, sector_size).pack() == ondisk.SUPERBLOCK.build(fields)


@settings(derandomize=True, deadline=None)
@given(WORDS, WORDS, st.integers(0, ondisk.FLAGS_KNOWN), WORDS)
def test_packed_entries_are_as_declared(sector: int, nr_sectors: int, flags: int, data_len: int) -> None:
    data = ondisk.ENTRY.build({"sector": sector, "nr_sectors": nr_sectors, "flags": flags, "data_len": data_len})
    entry = ondisk.Entry(sector, nr_sectors, flags, data_len)
    assert entry.pack() == data
    assert ondisk.parse_entry(data, 0) == entry


@pytest.mark.parametrize("size", [1 << bits for bits in range(5, 24)])
def test_a_superblock_with_any_valid_sector_size_is_parsed(size: int) -> None:
    superblock = ondisk.Superblock(7, size)
    assert ondisk.parse_superblock(superblock.pack()) == superblock


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes(28), "Invalid log superblock magic"),
        (b"x" + SUPERBLOCK[1:], "Invalid log superblock magic"),
        (SUPERBLOCK[:8] + struct.pack("<Q", 2) + SUPERBLOCK[16:], "Unsupported log version 2"),
        (SUPERBLOCK[:8] + bytes(8) + SUPERBLOCK[16:], "Unsupported log version 0"),
        *(
            (ondisk.PACKED_SUPERBLOCK.pack(ondisk.MAGIC, 1, 0, size), f"Invalid log sector size {size}")
            for size in (0, 1, 16, 31, 33, 48, 513, 1 << 24, 2**31, 2**32 - 1)
        ),
    ],
)
def test_a_malformed_superblock_is_refused_in_the_words_of_qemu(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=f"^{message}$"):
        ondisk.parse_superblock(data)


@pytest.mark.parametrize("flags", [0x20, 0x30, 1 << 63])
def test_unknown_flags_are_refused_in_the_words_of_qemu(flags: int) -> None:
    with pytest.raises(ImageError, match=rf"^Invalid flags {flags:#x} in log entry 3$"):
        ondisk.parse_entry(ondisk.Entry(0, 0, flags).pack(), 3)


@pytest.mark.parametrize(
    ("flags", "sectors"),
    [
        (0, 8),
        (ondisk.FUA, 8),
        (ondisk.FLUSH | ondisk.METADATA, 8),
        (ondisk.DISCARD, 0),
        (ondisk.DISCARD | ondisk.FUA, 0),
    ],
)
def test_data_follows_every_entry_but_a_discard(flags: int, sectors: int) -> None:
    assert ondisk.Entry(100, 8, flags).data_sectors == sectors


def test_a_mark_leaves_room_for_the_byte_that_ends_it() -> None:
    assert ondisk.max_mark_length(512) == 479
    assert ondisk.max_mark_length(32) < 1
