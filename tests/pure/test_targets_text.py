"""Names of structures without any image: the syntax, ranges, and what programs print, from samples of it."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusebd.errors import FusebdError, ImageError, OptionError
from fusebd.faults import tools
from fusebd.faults.layout import MAX_RANGES, merged, number, size
from fusebd.faults.layouts import ext4, xfs
from fusebd.faults.layouts.partitions import parse_sfdisk
from fusebd.faults.layouts.qcow2 import parse_entries, parse_refcounts
from fusebd.faults.targets import in_sectors, parse
from fusebd.faults.tools import find_tool, run_tool
from fusebd.ondisk import gpt

# --- the syntax ---

TARGETS = [
    ("ext4:journal", [("ext4", "journal", "")]),
    ("ext4:inode-tables", [("ext4", "inode-tables", "")]),
    ("ext4:inode-tables=3", [("ext4", "inode-tables", "3")]),
    ("ext4:file=/etc/passwd", [("ext4", "file", "/etc/passwd")]),
    ("xfs:file=/a=b/xfs:log", [("xfs", "file", "/a=b/xfs:log")]),
    ("qcow2:guest=1M+64k", [("qcow2", "guest", "1M+64k")]),
    ("gpt:partition=1", [("gpt", "partition", "1")]),
    ("gpt:partition=1/ext4:journal", [("gpt", "partition", "1"), ("ext4", "journal", "")]),
    ("gpt:partition=2/ext4:file=/a/b", [("gpt", "partition", "2"), ("ext4", "file", "/a/b")]),
    (
        "mbr:partition=1/gpt:partition=2/xfs:log",
        [("mbr", "partition", "1"), ("gpt", "partition", "2"), ("xfs", "log", "")],
    ),
]


@pytest.mark.parametrize(("text", "steps"), TARGETS)
def test_a_target_has_steps_with_parameters(text: str, steps: list[tuple[str, str, str]]) -> None:
    assert [(step.layout.name, step.target.name, step.value) for step in parse(text)] == steps


MISTAKES = [
    ("", "'' is no target: it would be LAYOUT:NAME or LAYOUT:NAME=VALUE"),
    ("journal", "'journal' is no target"),
    ("ext4:", "'ext4:' is no target"),
    ("ext4:journal ", "'ext4:journal ' is no target"),
    ("ntfs:mft", "there is no layout 'ntfs' (there are: gpt, mbr, ext4, xfs, qcow2)"),
    ("xfs:journal", "xfs has no target 'journal' (it has: superblock, backup-superblocks,"),
    ("ext4:journal=1", "ext4:journal takes no parameter"),
    ("ext4:journal=", "ext4:journal takes no parameter"),
    ("ext4:file", "ext4:file needs a parameter: ext4:file=PATH"),
    ("ext4:file=", "ext4:file needs a parameter: ext4:file=PATH"),
    ("ext4:inode-tables=", "ext4:inode-tables needs a parameter: ext4:inode-tables[=GROUP]"),
    ("gpt:partition", "gpt:partition needs a parameter: gpt:partition=NUMBER"),
    ("gpt:partition/ext4:journal", "gpt:partition needs a parameter: gpt:partition=NUMBER"),
    ("gpt:partition=1/", "'' is no target"),
    ("gpt:partition=1/2", "'2' is no target"),
    ("ext4:journal/ext4:journal", "ext4:journal has no other layout inside of it"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_mistake_in_a_target_is_named(text: str, message: str) -> None:
    with pytest.raises(OptionError) as error:
        parse(text)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("512", 512), ("0x1F", 31), ("64k", 65536), ("1M", 1 << 20), ("2g", 2 << 30)]
)
def test_sizes_have_suffixes(text: str, value: int) -> None:
    assert size(text, "a size") == value


@pytest.mark.parametrize("text", ["", "k", "-1", "1.5M", "1Z", " 1", "1_000", "0x", "0x1k", "9" * 30, "²", "1kk"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="is not a size"):
        size(text, "a size")


@pytest.mark.parametrize("text", ["", "1k", "+1", "٣"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="is not a number"):
        number(text, "a number")


# --- ranges ---


def test_ranges_are_sorted_and_merged() -> None:
    assert merged([(30, 5), (0, 10), (10, 5), (12, 1), (5, 15), (90, 10)], 100) == [(0, 20), (30, 5), (90, 10)]


@pytest.mark.parametrize("bad", [(-1, 5), (0, 0), (5, -2), (96, 5), (1 << 70, 1)])
def test_a_range_that_is_not_inside_is_refused(bad: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="are not inside of it, it has 100"):
        merged([(0, 10), bad], 100)


def test_no_range_at_all_is_an_error() -> None:
    with pytest.raises(FusebdError, match="it takes no bytes"):
        merged([], 100)


def test_too_many_ranges_are_refused_before_they_fill_the_memory() -> None:
    def ranges() -> Iterator[tuple[int, int]]:
        for start in range(MAX_RANGES + 1):
            yield 2 * start, 1
        raise AssertionError("they are all asked for")

    with pytest.raises(FusebdError, match="in more than 1048576 places"):
        merged(ranges(), 1 << 40)


def test_sectors_are_all_of_which_a_range_takes_a_part() -> None:
    assert in_sectors([(0, 512), (1000, 100), (2048, 1024), (4095, 1)]) == [(0, 3), (4, 2), (7, 1)]


# --- ext4 ---

DUMPE2FS_H = """\
Filesystem volume name:   <none>
Last mounted on:          /mnt/a:b
Filesystem features:      has_journal ext_attr resize_inode dir_index
Inode count:              16384
First block:              1
Block size:               1024
Inode blocks per group:   512
Inode size:	          256
Journal inode:            8
Journal sequence:         0x00000001
"""

DUMPE2FS_G = """\

group:block:super:gdt:bbitmap:ibitmap:itable
0:1:1:2-2:259:267:275
1:8193:8193:8194-8194:260:268:787
2:16385:-1:-1:261:269:1299
15:122881:-1:122881:18:34:7625
"""

STAT = """\
Inode: {inode}   Type: {kind}    Mode:  0600   Flags: 0x80000
Generation: 0    Version: 0x00000000:00000000
User:     0   Group:     0   Project:     0   Size: 4194304
Links: 1   Blockcount: 8192
 ctime: 0x6b076d2b:00000000 -- Wed Nov 25 23:20:11 2026
Inode checksum: 0xa786c3b4
{rest}
"""


def test_dumpe2fs_header_has_fields() -> None:
    header = ext4.parse_header(DUMPE2FS_H)
    assert (header["Block size"], header["Inode size"], header["Journal inode"]) == ("1024", "256", "8")
    assert header["Last mounted on"] == "/mnt/a:b"


def test_dumpe2fs_groups_may_lack_superblock_and_descriptors() -> None:
    groups = ext4.parse_groups(DUMPE2FS_G)
    assert groups == [
        ext4.Group(0, 1, (2, 2), 259, 267, 275),
        ext4.Group(1, 8193, (8194, 8194), 260, 268, 787),
        ext4.Group(2, None, None, 261, 269, 1299),
        ext4.Group(15, None, (122881, 122881), 18, 34, 7625),
    ]


STATS = [
    ("EXTENTS:\n(0-4095):16385-20480", [(16385, 20480)], []),
    ("EXTENTS:\n(0):4421", [(4421, 4421)], []),
    ("EXTENTS:\n(0-1023[u]):9217-10240, (2000[u]):7", [(9217, 10240), (7, 7)], []),
    (
        "EXTENTS:\n(ETB0):8455, (ETB1):8451, (0-3):10241-10244, (8):2",
        [(10241, 10244), (2, 2)],
        [(8455, 8455), (8451, 8451)],
    ),
    (
        "BLOCKS:\n(0-11):300-311, (IND):312, (12-267):313-568, (DIND):569, (IND):570, (268):571\nTOTAL: 272",
        [(300, 311), (313, 568), (571, 571)],
        [(312, 312), (569, 569), (570, 570)],
    ),
    ('Fast link dest: "/etc/hostname"', [], []),
    ('Fast link dest: "\nEXTENTS:\n(0):99\n"\nEXTENTS:\n(0):5', [(5, 5)], []),
    ("Size of inline data: 60", [], []),
]


@pytest.mark.parametrize(("rest", "blocks", "mapping"), STATS)
def test_debugfs_stat_tells_content_from_what_maps_it(
    rest: str, blocks: list[tuple[int, int]], mapping: list[tuple[int, int]]
) -> None:
    found = ext4.parse_stat(STAT.format(inode=8, kind="regular", rest=rest))
    assert found == ext4.Stat("regular file", blocks, mapping)


def test_debugfs_stat_has_a_type() -> None:
    found = ext4.parse_stat(STAT.format(inode=8, kind="character special", rest="Device major/minor number: 01:03"))
    assert found is not None
    assert found.kind == "character special"


def test_debugfs_without_an_inode_is_recognised() -> None:
    assert ext4.parse_stat("") is None
    assert ext4.parse_imap("") is None


def test_debugfs_imap_has_block_and_byte() -> None:
    assert ext4.parse_imap("Inode 12 is part of block group 0\n\tlocated at block 277, offset 0x0b00\n") == (277, 0xB00)


def test_names_are_quoted_for_debugfs() -> None:
    assert ext4.quoted('/a "b" c') == '"/a ""b"" c"'


# --- xfs ---

XFS_SB = """\
magicnum = 0x58465342
blocksize = 4096
dblocks = 102400
uuid = 8506ba63-f859-4bd4-bbaf-c270eda9c278
logstart = 65542
rootino = 128
agblocks = 25600
agcount = 4
logblocks = 16384
sectsize = 512
inodesize = 512
fname = "\\000\\000"
inopblog = 3
agblklog = 15
crc = 0xe19cffc9 (correct)
"""
XFS_GEOMETRY = {
    "blocksize": 4096, "sectsize": 512, "inodesize": 512, "inopblog": 3, "agblocks": 25600, "agblklog": 15,
    "agcount": 4, "dblocks": 102400, "logstart": 65542, "logblocks": 16384, "rootino": 128,
}  # fmt: skip
XFS_LENGTH = 102400 * 4096


def test_xfs_db_prints_fields() -> None:
    fields = xfs.parse_fields(XFS_SB)
    assert {name: fields[name] for name in XFS_GEOMETRY} == XFS_GEOMETRY
    assert fields["magicnum"] == 0x58465342


def test_xfs_db_prints_modes_in_octal() -> None:
    assert xfs.parse_fields("core.magic = 0x494e\ncore.mode = 0100644\ncore.format = 2 (extents)\n") == {
        "core.magic": 0x494E,
        "core.mode": 0o100644,
        "core.format": 2,
    }


def test_xfs_numbers_have_the_allocation_group_in_their_upper_bits() -> None:
    geometry = xfs.Geometry(**XFS_GEOMETRY)
    geometry.check(XFS_LENGTH)
    assert geometry.block(65542) == (2 * 25600 + 6) * 4096
    assert geometry.inode(262272) == (25600 + 16) * 4096
    assert geometry.inode(131) == 16 * 4096 + 3 * 512
    assert geometry.ag_inode(1, 128) == geometry.inode(262272)


XFS_NONSENSE = [
    {"agcount": 5},
    {"agcount": 1 << 32},
    {"agcount": 0},
    {"agblocks": 0},
    {"agblklog": 14},
    {"agblklog": 1 << 40},
    {"blocksize": 0},
    {"blocksize": 1 << 20},
    {"sectsize": 8192},
    {"inodesize": 0},
    {"inopblog": 200},
    {"dblocks": 1 << 63},
]


@pytest.mark.parametrize("change", XFS_NONSENSE, ids=str)
def test_an_xfs_superblock_that_contradicts_itself_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(ImageError, match="the superblock contradicts itself"):
        xfs.Geometry(**{**XFS_GEOMETRY, **change}).check(XFS_LENGTH)


def test_an_xfs_larger_than_its_file_is_refused() -> None:
    with pytest.raises(ImageError, match="has 419430400 bytes, and there are only 419430399"):
        xfs.Geometry(**XFS_GEOMETRY).check(XFS_LENGTH - 1)


def test_xfs_db_bmap_has_extents() -> None:
    text = (
        "data offset 0 startblock 24 (0/24) count 500 flag 0\n"
        "data offset 8388608 startblock 32774 (1/6) count 1 flag 1\n"
    )
    assert xfs.parse_bmap(text) == [(24, 500), (32774, 1)]


BTDUMP = """\
seqno = 0
inobt level 1 block 1 daddr 24
keys[1-2] = [startino] 1:[128] 2:[4096]
ptrs[1-2] = 1:5 2:9
inobt level 0 block 5 daddr 40
recs[1-2] = [startino,holemask,count,freecount,free]
1:[128,0,64,0,0]
2:[192,0xff00,32,11,0xffe0000000000000]\x20
seqno = 1
inobt level 0 block 1 daddr 204824
field recs not found
seqno = 2
recs[1] = [startino,freecount,free]
1:[96,61,0xfffffffffffffff8]
"""


def test_xfs_db_btdump_has_inode_chunks_of_both_kinds() -> None:
    assert xfs.parse_chunks(BTDUMP) == [xfs.Chunk(0, 128, 0), xfs.Chunk(0, 192, 0xFF00), xfs.Chunk(2, 96, 0)]


def test_xfs_db_ls_has_names_of_any_kind() -> None:
    listing = (
        b"8          128                directory      0x0000002e   1 . (good)\n"
        b"14         432                regular        0x00185062   4 a  b (good)\n"
        b"16         433                regular        0x00185062  56 "
        b"x (good)\n16         666                regular        0x0   1 y (good)\n"
        b"16         435                symlink        0x0018506f   2 \xff\xfe (good)\n"
    )
    tricky = b"x (good)\n16         666                regular        0x0   1 y"[:56]
    entries = dict(xfs.parse_ls(listing))
    assert (entries[b"."], entries[b"a  b"], entries[b"\xff\xfe"]) == (128, 432, 435)
    assert entries[tricky] == 433
    assert 666 not in entries.values()


# --- partition tables ---


def sfdisk(device: str, *nodes: str, label: str = "gpt") -> str:
    entries = ",".join(f'{{"node": "{node}", "start": {2048 * i}, "size": 100}}' for i, node in enumerate(nodes, 1))
    return f'{{"partitiontable": {{"label": "{label}", "device": "{device}", "partitions": [{entries}]}}}}'


@pytest.mark.parametrize(
    ("device", "nodes"),
    [
        ("/dev/sda", ["/dev/sda1", "/dev/sda12"]),
        ("/dev/loop0", ["/dev/loop0p1", "/dev/loop0p12"]),
        ("/proc/self/fd/3", ["/proc/self/fd/3p1", "/proc/self/fd/3p12"]),
    ],
)
def test_sfdisk_numbers_partitions_in_their_names(device: str, nodes: list[str]) -> None:
    expected = {1: (2048 * 512, 51200), 12: (4096 * 512, 51200)}
    assert parse_sfdisk(sfdisk(device, *nodes)) == ("gpt", expected)


def test_sfdisk_says_how_large_sectors_are() -> None:
    text = sfdisk("d", "d1").replace('"label"', '"sectorsize": 4096, "label"')
    assert parse_sfdisk(text)[1] == {1: (2048 * 4096, 100 * 4096)}


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"partitiontable": 5}', sfdisk("d", "x"), sfdisk("d", "d1")[:-3]])
def test_what_is_no_answer_of_sfdisk_is_refused(text: str) -> None:
    with pytest.raises(ImageError, match="sfdisk prints no partition table"):
        parse_sfdisk(text)


def gpt_header(**changes: int) -> bytes:
    fields = {"size": 92, "my": 1, "alternate": 199, "entries": 2, "number": 128, "entry": 128} | changes
    header = struct.pack(
        "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, fields["size"], 0, 0, fields["my"], fields["alternate"], 34, 166,
        bytes(16), fields["entries"], fields["number"], fields["entry"], 0,
    )  # fmt: skip
    return header[:16] + struct.pack("<I", zlib.crc32(header)) + header[20:]


def test_a_gpt_header_has_fields() -> None:
    header = gpt.parse_header(gpt_header().ljust(512, b"\0"))
    assert header is not None
    assert (header["alternate_lba"], header["partition_entry_lba"]) == (199, 2)


@pytest.mark.parametrize(
    "sector",
    [b"", gpt_header()[:91], bytes(512), gpt_header(size=91), gpt_header(size=1 << 31), b"X" + gpt_header()[1:]],
    ids=["empty", "short", "zeroes", "small", "large", "signature"],
)
def test_a_damaged_gpt_header_is_none(sector: bytes) -> None:
    assert gpt.parse_header(sector) is None


def test_a_gpt_header_with_a_wrong_checksum_is_none() -> None:
    damaged = bytearray(gpt_header())
    damaged[40] ^= 1
    assert gpt.parse_header(bytes(damaged)) is None


# --- qcow2 ---

REFCOUNTS = [
    (0, b"\x05\x80", [1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
    (1, b"\x1b", [3, 2, 1, 0]),
    (2, b"\x0f\xa0", [15, 0, 0, 10]),
    (3, b"\x01\x00\xff", [1, 0, 255]),
    (4, b"\x00\x01\x01\x00", [1, 256]),
    (5, b"\x00\x00\x00\x01\x01\x00\x00\x00", [1, 1 << 24]),
    (6, b"\x00\x00\x00\x00\x00\x00\x00\x02", [2]),
]


@pytest.mark.parametrize(("order", "block", "refcounts"), REFCOUNTS)
def test_refcounts_have_any_width(order: int, block: bytes, refcounts: list[int]) -> None:
    assert list(parse_refcounts(block, order)) == refcounts


def test_table_entries_are_big_endian_and_whole() -> None:
    assert list(parse_entries(bytes(7) + b"\x05" + b"\x80" + bytes(7) + b"rest")) == [5, 1 << 63]


# --- running programs ---


@pytest.fixture
def descriptor() -> Iterator[int]:
    opened = os.open("/dev/null", os.O_RDONLY)
    yield opened
    os.close(opened)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program named debugfs that runs the shell script in this file."""
    program = tmp_path / "debugfs"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return program


@pytest.mark.parametrize("tool", ["dumpe2fs", "debugfs", "xfs_db", "sfdisk"])
def test_a_program_that_is_missing_is_named_with_its_package(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(tools, "SYSTEM_DIRECTORIES", "/nonexistent")
    with pytest.raises(FusebdError) as error:
        find_tool(tool)
    package = tools.PACKAGES[tool]
    assert error.value.with_hint_in_line() == f"{tool} is not installed (it is in Debian's package {package})"


def test_a_program_gets_neither_terminal_nor_environment(
    fake: Path, descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGER", "less")
    fake.write_text('#!/bin/sh\ncat\necho "$1 ${PAGER-none} $LC_ALL $(pwd)"\n')
    assert run_tool("debugfs", "a b; c", descriptor=descriptor).text == "a b; c none C /\n"


def test_a_program_can_open_the_file_behind_the_descriptor(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "-content").write_text("content")
    fake.write_text('#!/bin/sh\ncat "$1"\n')
    with open(tmp_path / "-content", "rb") as file:
        assert run_tool("debugfs", tools.fd_path(file.fileno()), descriptor=file.fileno()).stdout == b"content"


def test_a_program_that_takes_too_long_is_ended(fake: Path, descriptor: int, tmp_path: Path) -> None:
    fake.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 1000\n")
    with pytest.raises(FusebdError, match=r"^debugfs has not ended after 0\.5 s$"):
        run_tool("debugfs", descriptor=descriptor, timeout=0.5)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_a_program_that_prints_too_much_is_ended(fake: Path, descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "MAX_OUTPUT", 100000)
    fake.write_text("#!/bin/sh\nexec yes\n")
    with pytest.raises(FusebdError, match=r"^debugfs was ended by signal 25 \(it printed \d+ bytes\)$"):
        run_tool("debugfs", descriptor=descriptor)


COMPLAINTS = [
    ("", "debugfs 1.47.0 (5-Feb-2023)\n", "exit status 3, and no word"),
    (
        "",
        "debugfs 1.47.0 (5-Feb-2023)\n/none: File not found by ext2_lookup \n",
        "/none: File not found by ext2_lookup",
    ),
    (
        "",
        "debugfs: Bad magic number in super-block while trying to open /proc/self/fd/3\n",
        "Bad magic number in super-block",
    ),
    ("", "debugfs: It is corrupt while trying to open /proc/self/fd/3?offset=512\n", "It is corrupt"),
    ("", "debugfs: /proc/self/fd/12: does not contain it\n", "does not contain it"),
    ("on standard output\n", "", "on standard output"),
]


@pytest.mark.parametrize(("stdout", "stderr", "complaint"), COMPLAINTS)
def test_a_complaint_is_one_line_without_names(stdout: str, stderr: str, complaint: str) -> None:
    assert tools.Output("debugfs", 3, stdout.encode(), stderr).complaint == complaint
