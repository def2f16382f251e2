"""The layout of qcow2 images: declarations against bytes, against qemu-img, and the masks of the fast path."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import create, info, u32
from mounting import run

from fusebd.ondisk import qcow2 as ondisk

WORDS = st.integers(0, 2**64 - 1)
#: words that have few bits set, as real entries do
SPARSE_WORDS = st.builds(
    lambda bits, flags: sum({1 << bit for bit in bits}) | flags,
    st.sets(st.integers(0, 63), max_size=6),
    st.sampled_from([0, 1, 1 << 62, 1 << 63, 1 << 63 | 1]),
)
every_cluster_size = pytest.mark.parametrize("cluster_bits", range(9, 22))

V2_FIELDS = {
    "version": 2,
    "backing_file_offset": 0x0102030405060708,
    "backing_file_size": 0x090A0B0C,
    "cluster_bits": 16,
    "size": 0x1112131415161718,
    "crypt_method": 1,
    "l1_size": 0x191A1B1C,
    "l1_table_offset": 0x2122232425262728,
    "refcount_table_offset": 0x3132333435363738,
    "refcount_table_clusters": 0x393A3B3C,
    "nb_snapshots": 0x3D3E3F40,
    "snapshots_offset": 0x4142434445464748,
}
V2_BYTES = b"QFI\xfb" + struct.pack(
    ">IQIIQIIQQIIQ",
    *(V2_FIELDS[name] for name in list(V2_FIELDS)),
)
V3_FIELDS = {
    **V2_FIELDS,
    "version": 3,
    "incompatible_features": 0x5152535455565758,
    "compatible_features": 0x6162636465666768,
    "autoclear_features": 0x7172737475767778,
    "refcount_order": 6,
}
V3_BYTES = V2_BYTES[:4] + u32(3) + V2_BYTES[8:] + struct.pack(">QQQI", *list(V3_FIELDS.values())[-4:])

HEADERS = {
    "v2": ({**V2_FIELDS, **ondisk.V3_DEFAULTS, "compression_type": 0}, V2_BYTES),
    "v3": ({**V3_FIELDS, "header_length": 104, "compression_type": 0}, V3_BYTES + u32(104)),
    "v3-long": ({**V3_FIELDS, "header_length": 112, "compression_type": 1}, V3_BYTES + u32(112) + b"\1" + bytes(7)),
}

STRUCTS: list[tuple[Any, dict[str, Any], bytes]] = [
    (ondisk.EXTENSION_HEADER, {"type": 0xE2792ACA, "length": 5}, bytes.fromhex("e2792aca 00000005")),
    (ondisk.FEATURE_NAME, {"type": 2, "bit": 7, "name": b"x" * 46}, b"\2\7" + b"x" * 46),
    (
        ondisk.BITMAPS,
        {"nb_bitmaps": 1, "reserved": 2, "bitmap_directory_size": 3, "bitmap_directory_offset": 4},
        struct.pack(">IIQQ", 1, 2, 3, 4),
    ),
    (
        ondisk.SNAPSHOT,
        {
            "l1_table_offset": 1,
            "l1_size": 2,
            "id_str_size": 3,
            "name_size": 4,
            "date_sec": 5,
            "date_nsec": 6,
            "vm_clock_nsec": 7,
            "vm_state_size": 8,
            "extra_data_size": 9,
        },
        struct.pack(">QIHHIIQII", *range(1, 10)),
    ),
    (
        ondisk.BITMAP_ENTRY,
        {
            "bitmap_table_offset": 1,
            "bitmap_table_size": 2,
            "flags": 3,
            "type": 4,
            "granularity_bits": 5,
            "name_size": 6,
            "extra_data_size": 7,
        },
        struct.pack(">QIIBBHI", *range(1, 8)),
    ),
    (ondisk.L1_FIELDS, {"l1_size": 1, "l1_table_offset": 2}, struct.pack(">IQ", 1, 2)),
    (
        ondisk.REFCOUNT_TABLE_FIELDS,
        {"refcount_table_offset": 1, "refcount_table_clusters": 2},
        struct.pack(">QI", 1, 2),
    ),
    (
        ondisk.L1_ENTRY,
        {"copied": True, "reserved_high": 0, "offset": 0x50000 >> 9, "reserved": 0},
        bytes.fromhex("8000000000050000"),
    ),
    (
        ondisk.L2_STANDARD_ENTRY,
        {"copied": True, "compressed": False, "reserved_high": 0, "offset": 0x60000 >> 9, "reserved": 0, "zero": True},
        bytes.fromhex("8000000000060001"),
    ),
    (
        ondisk.l2_compressed_entry(16),
        {"copied": False, "compressed": True, "additional_sectors": 3, "offset": 0x50123},
        bytes.fromhex("40c0000000050123"),
    ),
    (ondisk.REFCOUNT_TABLE_ENTRY, {"offset": 0x20000 >> 9, "reserved": 0}, bytes.fromhex("0000000000020000")),
]
STRUCT_NAMES = [
    "extension", "feature", "bitmaps", "snapshot", "bitmap", "l1-fields", "refcount-table-fields", "l1-entry",
    "l2-entry", "l2-compressed", "refcount-table-entry",
]  # fmt: skip


def values(container: Any) -> dict[str, Any]:
    return {name: value for name, value in container.items() if name != "_io"}


# --- declarations against bytes ------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_parsed(name: str) -> None:
    fields, data = HEADERS[name]
    assert ondisk.parse_header(data.ljust(ondisk.HEADER_FULL_LENGTH, b"\0")) == {"magic": b"QFI\xfb", **fields}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_built(name: str) -> None:
    fields, data = HEADERS[name]
    assert ondisk.build_header({"magic": b"QFI\xfb", **fields}) == data


@pytest.mark.parametrize(("declaration", "fields", "data"), STRUCTS, ids=STRUCT_NAMES)
def test_a_structure_is_parsed_and_built(declaration: Any, fields: dict[str, Any], data: bytes) -> None:
    assert values(declaration.parse(data)) == fields
    assert declaration.build(fields) == data


@given(st.binary(min_size=112, max_size=112))
@settings(deadline=None, derandomize=True)
def test_any_bytes_are_a_header_that_is_built_again(data: bytes) -> None:
    for version, length in ((2, 72), (3, 104), (3, 112)):
        given_bytes = data[:4] + u32(version) + data[8:100] + u32(length) + data[104:105] + bytes(7)
        fields = ondisk.parse_header(given_bytes)
        assert ondisk.build_header(fields) == given_bytes[: fields["header_length"]]
        assert fields["header_length"] == length


def test_the_lengths_are_those_of_the_declarations() -> None:
    assert ondisk.HEADER_V2.sizeof() == ondisk.HEADER_V2_LENGTH
    assert ondisk.HEADER_V2.sizeof() + ondisk.HEADER_V3.sizeof() == ondisk.HEADER_V3_LENGTH
    assert ondisk.HEADER_V3_LENGTH + ondisk.HEADER_ADDITIONAL.sizeof() == ondisk.HEADER_FULL_LENGTH
    assert ondisk.EXTENSION_HEADER.sizeof() == ondisk.EXTENSION_HEADER_LENGTH
    assert ondisk.FEATURE_NAME.sizeof() == ondisk.FEATURE_NAME_LENGTH
    assert ondisk.BITMAPS.sizeof() == ondisk.BITMAPS_LENGTH
    assert ondisk.SNAPSHOT.sizeof() == ondisk.SNAPSHOT_LENGTH
    assert ondisk.BITMAP_ENTRY.sizeof() == ondisk.BITMAP_ENTRY_LENGTH


@pytest.mark.parametrize(
    ("offset", "data", "changed"),
    [
        (ondisk.SIZE_OFFSET, bytes([1] * 8), {"size": 0x0101010101010101}),
        (
            ondisk.L1_FIELDS_OFFSET,
            ondisk.L1_FIELDS.build({"l1_size": 7, "l1_table_offset": 9}),
            {"l1_size": 7, "l1_table_offset": 9},
        ),
        (
            ondisk.REFCOUNT_TABLE_FIELDS_OFFSET,
            ondisk.REFCOUNT_TABLE_FIELDS.build({"refcount_table_offset": 7, "refcount_table_clusters": 9}),
            {"refcount_table_offset": 7, "refcount_table_clusters": 9},
        ),
        (ondisk.INCOMPATIBLE_OFFSET, bytes([1] * 8), {"incompatible_features": 0x0101010101010101}),
        (ondisk.AUTOCLEAR_OFFSET, bytes([1] * 8), {"autoclear_features": 0x0101010101010101}),
    ],
    ids=["size", "l1", "refcount-table", "incompatible", "autoclear"],
)
def test_a_field_rewritten_in_place_is_the_one_meant(offset: int, data: bytes, changed: dict[str, int]) -> None:
    fields, header = HEADERS["v3-long"]
    patched = header[:offset] + data + header[offset + len(data) :]
    assert ondisk.parse_header(patched) == {"magic": b"QFI\xfb", **fields, **changed}


# --- declarations against images made by qemu-img ------------------------------------------------


@every_cluster_size
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_headers_that_qemu_img_writes_say_what_was_asked(tmp_path: Path, compat: str, cluster_bits: int) -> None:
    size = (3 << 20) + 512
    path = create(tmp_path / "image", size, compat=compat, cluster_size=1 << cluster_bits, refcount_bits=16)
    data = path.read_bytes()
    header = ondisk.parse_header(data[: ondisk.HEADER_FULL_LENGTH])
    assert (header["magic"], header["version"]) == (ondisk.MAGIC, {"0.10": 2, "1.1": 3}[compat])
    assert (header["cluster_bits"], header["size"], header["refcount_order"]) == (cluster_bits, size, 4)
    assert header["header_length"] == {"0.10": 72, "1.1": 112}[compat]
    assert header["l1_size"] * 8 <= len(data) - header["l1_table_offset"]
    # The refcount table's first entry leads to a block that counts the header's cluster.
    table = header["refcount_table_offset"]
    block = ondisk.REFCOUNT_TABLE_ENTRY.parse(data[table : table + 8]).offset << 9
    assert data[block : block + 2] == b"\0\1"
    assert ondisk.build_header(header) == data[: header["header_length"]]


@pytest.mark.parametrize("order", range(7))
def test_the_refcount_order_is_read(tmp_path: Path, order: int) -> None:
    data = create(tmp_path / "image", "1M", refcount_bits=1 << order).read_bytes()
    assert ondisk.parse_header(data[: ondisk.HEADER_FULL_LENGTH])["refcount_order"] == order


def test_the_lazy_refcounts_bit_is_the_one_that_qemu_sets(tmp_path: Path) -> None:
    data = create(tmp_path / "image", "1M", lazy_refcounts="on").read_bytes()
    header = ondisk.parse_header(data[: ondisk.HEADER_FULL_LENGTH])
    assert header["compatible_features"] == ondisk.COMPAT_LAZY_REFCOUNTS


def test_the_extended_l2_bit_is_the_one_that_qemu_sets(tmp_path: Path) -> None:
    data = create(tmp_path / "image", "1M", extended_l2="on").read_bytes()
    header = ondisk.parse_header(data[: ondisk.HEADER_FULL_LENGTH])
    assert header["incompatible_features"] == ondisk.INCOMPAT_EXTENDED_L2


def test_the_data_file_bits_are_those_that_qemu_sets(tmp_path: Path) -> None:
    data = create(tmp_path / "image", "1M", data_file=tmp_path / "data", data_file_raw="on").read_bytes()
    header = ondisk.parse_header(data[: ondisk.HEADER_FULL_LENGTH])
    assert header["incompatible_features"] == ondisk.INCOMPAT_DATA_FILE
    assert header["autoclear_features"] == ondisk.AUTOCLEAR_DATA_FILE_RAW


def test_the_compression_type_is_the_one_that_qemu_sets(tmp_path: Path) -> None:
    data = create(tmp_path / "image", "1M", compression_type="zstd").read_bytes()
    header = ondisk.parse_header(data[: ondisk.HEADER_FULL_LENGTH])
    assert header["incompatible_features"] == ondisk.INCOMPAT_COMPRESSION
    assert header["compression_type"] == ondisk.COMPRESSION_ZSTD


def extensions(data: bytes) -> dict[int, bytes]:
    at = ondisk.parse_header(data[: ondisk.HEADER_FULL_LENGTH])["header_length"]
    found: dict[int, bytes] = {}
    while True:
        head = ondisk.EXTENSION_HEADER.parse(data[at : at + ondisk.EXTENSION_HEADER_LENGTH])
        if head.type == ondisk.EXT_END:
            return found
        at += ondisk.EXTENSION_HEADER_LENGTH
        found[head.type] = data[at : at + head.length]
        at += (head.length + 7) & ~7


def test_the_feature_table_that_qemu_img_writes_names_the_known_bits(tmp_path: Path) -> None:
    table = extensions(create(tmp_path / "image", "1M").read_bytes())[ondisk.EXT_FEATURE_TABLE]
    names = {}
    for at in range(0, len(table), ondisk.FEATURE_NAME_LENGTH):
        part = table[at : at + ondisk.FEATURE_NAME_LENGTH]
        entry = ondisk.FEATURE_NAME.parse(part)
        assert ondisk.FEATURE_NAME.build(entry) == part
        names[entry.type, 1 << entry.bit] = entry.name.rstrip(b"\0").decode()
    assert names == {
        (ondisk.FEATURE_INCOMPATIBLE, ondisk.INCOMPAT_DIRTY): "dirty bit",
        (ondisk.FEATURE_INCOMPATIBLE, ondisk.INCOMPAT_CORRUPT): "corrupt bit",
        (ondisk.FEATURE_INCOMPATIBLE, ondisk.INCOMPAT_DATA_FILE): "external data file",
        (ondisk.FEATURE_INCOMPATIBLE, ondisk.INCOMPAT_COMPRESSION): "compression type",
        (ondisk.FEATURE_INCOMPATIBLE, ondisk.INCOMPAT_EXTENDED_L2): "extended L2 entries",
        (ondisk.FEATURE_COMPATIBLE, ondisk.COMPAT_LAZY_REFCOUNTS): "lazy refcounts",
        (ondisk.FEATURE_AUTOCLEAR, ondisk.AUTOCLEAR_BITMAPS): "bitmaps",
        (ondisk.FEATURE_AUTOCLEAR, ondisk.AUTOCLEAR_DATA_FILE_RAW): "raw external data",
    }


def test_the_backing_format_is_an_extension(tmp_path: Path) -> None:
    create(tmp_path / "base", "1M")
    data = create(tmp_path / "image", "1M", backing="base").read_bytes()
    assert extensions(data)[ondisk.EXT_BACKING_FORMAT] == b"qcow2"
    header = ondisk.parse_header(data[: ondisk.HEADER_FULL_LENGTH])
    start = header["backing_file_offset"]
    assert data[start : start + header["backing_file_size"]] == b"base"


def test_bitmaps_that_qemu_img_adds_are_read(tmp_path: Path) -> None:
    path = create(tmp_path / "image", "1M")
    run("qemu-img", "bitmap", "--add", "-g", "32k", path, "first")
    run("qemu-img", "bitmap", "--add", "--disable", path, "second-one")
    data = path.read_bytes()
    header = ondisk.parse_header(data[: ondisk.HEADER_FULL_LENGTH])
    assert header["autoclear_features"] == ondisk.AUTOCLEAR_BITMAPS
    bitmaps = ondisk.BITMAPS.parse(extensions(data)[ondisk.EXT_BITMAPS])
    assert (bitmaps.nb_bitmaps, bitmaps.reserved) == (2, 0)
    start = at = bitmaps.bitmap_directory_offset
    found = []
    for _ in range(bitmaps.nb_bitmaps):
        entry = ondisk.BITMAP_ENTRY.parse(data[at : at + ondisk.BITMAP_ENTRY_LENGTH])
        assert ondisk.BITMAP_ENTRY.build(entry) == data[at : at + ondisk.BITMAP_ENTRY_LENGTH]
        name = data[at + ondisk.BITMAP_ENTRY_LENGTH + entry.extra_data_size :][: entry.name_size].decode()
        found.append((name, entry.type, 1 << entry.granularity_bits, entry.flags))
        at += (ondisk.BITMAP_ENTRY_LENGTH + entry.extra_data_size + entry.name_size + 7) & ~7
    assert sorted(found) == [("first", 1, 32768, ondisk.BITMAP_AUTO), ("second-one", 1, 65536, 0)]
    assert at - start == bitmaps.bitmap_directory_size


def test_snapshots_that_qemu_img_takes_are_read(tmp_path: Path) -> None:
    path = create(tmp_path / "image", "1M")
    for name in ("one", "two"):
        run("qemu-img", "snapshot", "-c", name, path)
    data = path.read_bytes()
    header = ondisk.parse_header(data[: ondisk.HEADER_FULL_LENGTH])
    expected = info(path)["snapshots"]
    at = header["snapshots_offset"]
    assert header["nb_snapshots"] == len(expected) == 2
    for shown in expected:
        part = data[at : at + ondisk.SNAPSHOT_LENGTH]
        entry = ondisk.SNAPSHOT.parse(part)
        assert ondisk.SNAPSHOT.build(entry) == part
        at += ondisk.SNAPSHOT_LENGTH + entry.extra_data_size
        assert data[at : at + entry.id_str_size].decode() == shown["id"]
        assert data[at + entry.id_str_size :][: entry.name_size].decode() == shown["name"]
        assert (entry.date_sec, entry.date_nsec) == (shown["date-sec"], shown["date-nsec"])
        assert entry.vm_state_size == shown["vm-state-size"]
        at = (at + entry.id_str_size + entry.name_size + 7) & ~7


# --- masks against declarations ------------------------------------------------------------------


@given(WORDS | SPARSE_WORDS)
@settings(deadline=None, derandomize=True)
def test_the_masks_of_l1_entries_agree_with_the_declaration(word: int) -> None:
    entry = ondisk.L1_ENTRY.parse(word.to_bytes(8, "big"))
    assert word & ondisk.OFFSET_MASK == entry.offset << 9
    assert bool(word & ondisk.COPIED) == entry.copied
    parts = ondisk.L1_ENTRY.parse((word & (ondisk.OFFSET_MASK | ondisk.COPIED)).to_bytes(8, "big"))
    assert (parts.reserved_high, parts.reserved) == (0, 0)


@given(WORDS | SPARSE_WORDS)
@settings(deadline=None, derandomize=True)
def test_the_masks_of_l2_entries_agree_with_the_declaration(word: int) -> None:
    entry = ondisk.L2_STANDARD_ENTRY.parse(word.to_bytes(8, "big"))
    assert word & ondisk.OFFSET_MASK == entry.offset << 9
    assert bool(word & ondisk.COPIED) == entry.copied
    assert bool(word & ondisk.COMPRESSED) == entry.compressed
    assert bool(word & ondisk.ZERO) == entry.zero


@given(WORDS | SPARSE_WORDS)
@settings(deadline=None, derandomize=True)
def test_the_mask_of_refcount_table_entries_agrees_with_the_declaration(word: int) -> None:
    entry = ondisk.REFCOUNT_TABLE_ENTRY.parse(word.to_bytes(8, "big"))
    assert word & ondisk.REFCOUNT_TABLE_OFFSET_MASK == entry.offset << 9


@given(st.integers(9, 21), WORDS | SPARSE_WORDS)
@settings(deadline=None, derandomize=True)
def test_the_shifts_of_compressed_entries_agree_with_the_declaration(cluster_bits: int, word: int) -> None:
    entry = ondisk.l2_compressed_entry(cluster_bits).parse(word.to_bytes(8, "big"))
    offset, length = ondisk.parse_compressed(word, cluster_bits)
    assert offset == entry.offset
    # The data ends with the last of the sectors that the entry counts.
    assert offset + length == (offset // 512 + 1 + entry.additional_sectors) * 512


@given(st.integers(9, 21), st.data())
@settings(deadline=None, derandomize=True)
def test_a_compressed_entry_that_is_built_has_room_for_the_data(cluster_bits: int, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, 2 ** (62 - (cluster_bits - 8)) - 1))
    length = data.draw(st.integers(1, (1 << cluster_bits) - 1))
    entry = ondisk.build_compressed(offset, length, cluster_bits)
    assert entry & (ondisk.COMPRESSED | ondisk.COPIED) == ondisk.COMPRESSED
    found, room = ondisk.parse_compressed(entry, cluster_bits)
    assert found == offset
    assert length <= room < length + 512


@every_cluster_size
def test_compressed_entries_that_qemu_img_writes_lead_to_the_data(tmp_path: Path, cluster_bits: int) -> None:
    source = tmp_path / "source"
    cluster = 1 << cluster_bits
    source.write_bytes(b"".join(bytes([number]) * cluster for number in range(1, 4)))
    run(
        "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={cluster}", source,
        tmp_path / "image",
    )  # fmt: skip
    data = (tmp_path / "image").read_bytes()
    header = ondisk.parse_header(data[: ondisk.HEADER_FULL_LENGTH])
    l1 = int.from_bytes(data[header["l1_table_offset"] :][:8], "big") & ondisk.OFFSET_MASK
    starts = []
    for index in range(3):
        entry = int.from_bytes(data[l1 + 8 * index :][:8], "big")
        assert entry & ondisk.COMPRESSED
        starts.append(ondisk.parse_compressed(entry, cluster_bits)[0])
    # They lie one after the other, packed: the next begins where the one before ends at the latest.
    assert starts == sorted(set(starts))
    first, length = ondisk.parse_compressed(int.from_bytes(data[l1:][:8], "big"), cluster_bits)
    assert first < starts[1] <= first + length
