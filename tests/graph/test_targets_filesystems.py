"""Names of structures in ext4 and xfs, on plain files that mkfs made.

What is found is judged by what lies there (magic numbers, content that is known), and by other programs or other
commands of them: debugfs icheck, dumpe2fs's list for people, xfs_db's own addresses.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import images
import pytest
from mounting import run
from structures import BIG, MIB, SMALL, everything, found, make_ext4, mistake, ranges_or_none, read, sparse, tree

from fusebd.faults.layout import Range
from fusebd.faults.targets import find, names


@pytest.fixture(scope="module", autouse=True)
def system_directories() -> Iterator[None]:
    """mkfs and its kind are not in every user's PATH."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
        yield


# --- ext4 ---

EXT4_KINDS = {
    "4k": ["-b", "4096"],
    "1k": ["-b", "1024"],
    "meta_bg": ["-b", "1024", "-O", "meta_bg,^resize_inode"],
    "small inodes": ["-b", "1024", "-I", "128"],
    "no flex_bg": ["-b", "1024", "-O", "^flex_bg,^metadata_csum"],
    "bigalloc": ["-b", "4096", "-O", "bigalloc", "-C", "16384"],
    "ext3": ["-t", "ext3", "-b", "1024"],
}


@pytest.fixture(scope="module", params=EXT4_KINDS)
def ext4(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ext4 file systems of several kinds, all with a journal."""
    # more than one block group of the largest kind, and sparse
    length = (1200 if request.param == "bigalloc" else 160) * MIB
    return make_ext4(tmp_path_factory.mktemp("ext4"), *EXT4_KINDS[request.param], length=length)


def debugfs(path: Path, request: str) -> str:
    return run("debugfs", "-c", "-R", request, path)


def block_size(path: Path) -> int:
    return int(re.findall(r"^Block size: +(\d+)", run("dumpe2fs", "-h", path), re.MULTILINE)[0])


def owners(path: Path, ranges: list[Range]) -> set[str]:
    """The inodes that the first, the last and a middle block of each range belong to, by debugfs icheck."""
    size = block_size(path)
    blocks = []
    for start, length in ranges:
        assert start % size == length % size == 0
        first, last = start // size, (start + length) // size - 1
        blocks += [first, (first + last) // 2, last]
    listing = debugfs(path, "icheck " + " ".join(map(str, blocks)))
    return {line.split("\t")[1] for line in listing.splitlines()[2:]}


def groups_for_people(path: Path, what: str) -> list[int]:
    """The block numbers that dumpe2fs shows behind *what*."""
    return [int(block) for block in re.findall(rf"{what} at (\d+)", run("dumpe2fs", path))]


def test_the_ext4_journal_begins_with_its_magic_and_belongs_to_inode_8(ext4: Path) -> None:
    ranges = find(str(ext4), "ext4:journal")
    # of the journal's first block, whatever lies in front of it: mke2fs writes one extent
    assert read(ext4, ranges[0])[:8] == struct.pack(">II", 0xC03B3998, 4)
    assert owners(ext4, ranges) == {"8"}
    blocks = int(re.findall(r"Total journal blocks: +(\d+)", run("dumpe2fs", "-h", ext4))[0])
    assert sum(length for _, length in ranges) == blocks * block_size(ext4)


@pytest.mark.parametrize(("name", "content"), [("/big", BIG), ("/dir/small", SMALL), ('/dir/a "b" c', SMALL[::-1])])
def test_the_blocks_of_an_ext4_file_have_its_content(ext4: Path, name: str, content: bytes) -> None:
    size = block_size(ext4)
    padded = content + bytes(-len(content) % size)
    assert found(ext4, f"ext4:file={name}") == padded


def test_the_blocks_of_an_ext4_directory_have_its_names(ext4: Path) -> None:
    data = found(ext4, "ext4:directory=/dir")
    assert b"small" in data
    assert b'a "b" c' in data
    assert len(data) == block_size(ext4)


@pytest.mark.parametrize("name", ["/big", "/dir/small", "/dir"])
def test_the_inode_of_an_ext4_file_has_its_size(ext4: Path, name: str) -> None:
    entry = found(ext4, f"ext4:inode={name}")
    shown = debugfs(ext4, f"stat {name}")
    number, size = re.findall(r"Inode: (\d+) ", shown)[0], int(re.findall(r"Size: (\d+)$", shown, re.MULTILINE)[0])
    assert struct.unpack_from("<I", entry, 4)[0] == size
    assert find(str(ext4), f"ext4:inode={number}") == find(str(ext4), f"ext4:inode={name}")
    assert len(entry) == int(re.findall(r"Inode size:\s+(\d+)", run("dumpe2fs", "-h", ext4))[0])


def test_ext4_inode_tables_have_the_root_directory_second(ext4: Path) -> None:
    ((start, _),) = find(str(ext4), "ext4:inode-tables=0")
    size = find(str(ext4), "ext4:inode=2")[0][1]
    assert find(str(ext4), "ext4:inode=2") == [(start + size, size)]
    assert struct.unpack("<H", read(ext4, (start + size, 2)))[0] & 0o170000 == 0o040000
    assert start == groups_for_people(ext4, "Inode table")[0] * block_size(ext4)


def test_ext4_inode_tables_have_all_inodes(ext4: Path) -> None:
    header = run("dumpe2fs", "-h", ext4)
    count = int(re.findall(r"Inode count: +(\d+)", header)[0])
    assert (
        sum(length for _, length in find(str(ext4), "ext4:inode-tables"))
        == count * find(str(ext4), "ext4:inode=1")[0][1]
    )


@pytest.mark.parametrize(("target", "shown"), [("block-bitmaps", "Block bitmap"), ("inode-bitmaps", "Inode bitmap")])
def test_ext4_bitmaps_are_where_dumpe2fs_shows_them(ext4: Path, target: str, shown: str) -> None:
    size = block_size(ext4)
    blocks = groups_for_people(ext4, shown)
    for group in (0, len(blocks) - 1):
        assert find(str(ext4), f"ext4:{target}={group}") == [(blocks[group] * size, size)]
    everything = find(str(ext4), f"ext4:{target}")
    assert sum(length for _, length in everything) == len(set(blocks)) * size


def test_ext4_superblocks_have_magic_and_group(ext4: Path) -> None:
    assert find(str(ext4), "ext4:superblock") == [(1024, 1024)]
    size = block_size(ext4)
    shown = sorted(int(block) for block in re.findall(r"Backup superblock at (\d+)", run("dumpe2fs", ext4)))
    ranges = find(str(ext4), "ext4:backup-superblocks")
    assert ranges == [(block * size, 1024) for block in shown]
    for start, _ in ranges:
        magic, group = struct.unpack("<H32xH", read(ext4, (start + 56, 36)))
        assert magic == 0xEF53
        assert group == (start // size) // (8 * size * (4 if "bigalloc" in run("dumpe2fs", "-h", ext4) else 1))


def test_ext4_group_descriptors_begin_with_the_block_bitmaps(ext4: Path) -> None:
    data = found(ext4, "ext4:group-descriptors")
    header = run("dumpe2fs", "-h", ext4)
    length = int((re.findall(r"Group descriptor size: +(\d+)", header) or ["32"])[0])
    bitmaps = groups_for_people(ext4, "Block bitmap")
    assert [struct.unpack_from("<I", data, length * group)[0] for group in range(len(bitmaps))] == bitmaps
    backups = found(ext4, "ext4:backup-group-descriptors")
    assert struct.unpack_from("<I", backups)[0] == bitmaps[0]


def test_ext4_names_say_what_is_there(ext4: Path) -> None:
    assert list(names(str(ext4))) == [
        "ext4:superblock",
        "ext4:backup-superblocks",
        "ext4:group-descriptors",
        "ext4:backup-group-descriptors",
        "ext4:block-bitmaps[=GROUP]",
        "ext4:inode-bitmaps[=GROUP]",
        "ext4:inode-tables[=GROUP]",
        "ext4:journal",
        "ext4:inode=PATH|NUMBER",
        "ext4:file=PATH",
        "ext4:directory=PATH",
        "ext4:mapping=PATH",
    ]


def test_ext4_mistakes_are_named(ext4: Path) -> None:
    assert mistake(ext4, "ext4:file=/none") == "the file system has no '/none'"
    assert mistake(ext4, "ext4:file=/dir/<8>") == "the file system has no '/dir/<8>'"
    assert mistake(ext4, "ext4:file=/a\nb\t'c") == "the file system has no '/a\nb\t'c'"
    assert mistake(ext4, "ext4:file=big") == "'big' is not an absolute path in the file system"
    assert mistake(ext4, "ext4:file=<8>") == "'<8>' is not an absolute path in the file system"
    assert mistake(ext4, "ext4:file=/a\0b") == "'/a\0b' is not an absolute path in the file system"
    assert mistake(ext4, "ext4:file=/dir") == "'/dir' is no regular file (it is of type directory)"
    assert mistake(ext4, "ext4:file=/link") == "'/link' is no regular file (it is of type symlink)"
    assert mistake(ext4, "ext4:directory=/big") == "'/big' is no directory (it is of type regular file)"
    assert mistake(ext4, "ext4:file=/empty") == "'/empty' has no blocks: it is empty, a hole, or inside of its inode"
    assert mistake(ext4, "ext4:inode=/none") == "the file system has no '/none'"
    assert mistake(ext4, "ext4:inode=x") == "'x' is not an inode's number or an absolute path"
    assert mistake(ext4, "ext4:inode=0").startswith("there is no inode 0, there are ")
    assert mistake(ext4, "ext4:inode=4000000000").startswith("there is no inode 4000000000, there are ")
    assert mistake(ext4, "ext4:block-bitmaps=999").startswith("there is no block group 999, there are ")
    assert mistake(ext4, "xfs:log") == "there is no xfs file system"


@pytest.fixture(scope="module")
def ext2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ext2: no journal, no extents."""
    return make_ext4(tmp_path_factory.mktemp("ext2"), "-t", "ext2", "-b", "1024")


@pytest.fixture(scope="module")
def small_ext4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ext4(tmp_path_factory.mktemp("small"), "-b", "1024")


def test_the_mapping_of_an_ext2_file_has_its_block_numbers(ext2: Path) -> None:
    ranges = find(str(ext2), "ext4:mapping=/big")
    blocks = [start // 1024 + i for start, length in find(str(ext2), "ext4:file=/big") for i in range(length // 1024)]
    mapped = [number for (number,) in struct.iter_unpack("<I", read(ext2, *ranges)) if number]
    # the first 12 are in the inode; the others, and the indirect blocks below the double indirect one, are here
    assert set(blocks[12:]) <= set(mapped)
    assert found(ext2, "ext4:file=/big")[: len(BIG)] == BIG
    assert owners(ext2, ranges) == owners(ext2, find(str(ext2), "ext4:file=/big"))


def test_a_file_system_without_a_journal_has_no_such_target(ext2: Path) -> None:
    assert mistake(ext2, "ext4:journal") == "the file system has no journal"
    assert "ext4:journal" not in names(str(ext2))


def test_the_extent_tree_of_a_fragmented_file_has_its_magic(tmp_path: Path) -> None:
    path = sparse(tmp_path / "image", 16 * MIB)
    run("mkfs.ext4", "-q", "-F", "-b", "1024", path)
    with (tmp_path / "holes").open("wb") as file:
        for number in range(100):
            file.seek(number * 4096)
            file.write(b"data" * 256)
    run("debugfs", "-w", "-R", f"write {tmp_path / 'holes'} holes", path)
    ranges = find(str(path), "ext4:mapping=/holes")
    assert read(path, ranges[0])[:2] == b"\x0a\xf3"
    assert found(path, "ext4:file=/holes") == b"data" * 256 * 100


def test_ext4_is_found_at_an_offset(small_ext4: Path, tmp_path: Path) -> None:
    path = tmp_path / "with ? and * in its name"
    with path.open("wb") as target:
        target.write(b"\xff" * 5000 * 512)
        target.write(small_ext4.read_bytes())
        target.write(b"\xff" * 1000)
    shift = 5000 * 512
    for target_name in ("journal", "file=/big", "inode=/big", "block-bitmaps"):
        name = f"ext4:{target_name}"
        expected = [(start + shift, length) for start, length in find(str(small_ext4), name)]
        assert find(str(path), name, shift) == expected
        assert find(str(path), name, shift, small_ext4.stat().st_size) == expected


def test_ranges_past_the_end_of_a_truncated_image_are_refused(small_ext4: Path, tmp_path: Path) -> None:
    path = tmp_path / "truncated"
    shutil.copyfile(small_ext4, path)
    (start, length), *_ = find(str(path), "ext4:backup-superblocks")[::-1]
    os.truncate(path, start + length - 1)
    message = mistake(path, "ext4:backup-superblocks")
    assert message == f"bytes {start} to {start + length} are not inside of it, it has {start + length - 1}"
    assert find(str(path), "ext4:superblock") == [(1024, 1024)]


def test_damaged_ext4_is_said_by_the_tools_words(small_ext4: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    shutil.copyfile(small_ext4, path)
    images.patch(path, (1024 + 4, b"\xff" * 4))
    assert mistake(path) == "dumpe2fs: The ext2 superblock is corrupt"
    # a superblock is there all the same
    assert find(str(path), "ext4:superblock") == [(1024, 1024)]


# --- xfs ---

XFS_KINDS = {
    "4k": [],
    "1k": ["-b", "size=1024"],
    "v4": ["-m", "crc=0", "-i", "sparse=0"],
    "sectors": ["-s", "size=4096", "-i", "size=1024"],
    "odd groups": ["-d", "agcount=7"],
}
XFS_LENGTH = 640 * MIB
PROTO = """\
/boot
4096 0
d--755 0 0
dir d--755 0 0
small ---644 0 0 {tree}/dir/small
$
big ---644 0 0 {tree}/big
empty ---644 0 0 {tree}/empty
link l--777 0 0 big
many d--755 0 0
{many}
$
$
"""


@pytest.fixture(scope="module", params=XFS_KINDS)
def xfs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """xfs file systems of several kinds, with a few hundred files."""
    directory = tmp_path_factory.mktemp("xfs")
    source = tree(directory / "tree")
    many = "\n".join(f"file{number} ---644 0 0 {source}/empty" for number in range(300))
    (directory / "proto").write_text(PROTO.format(tree=source, many=many))
    path = sparse(directory / "image", XFS_LENGTH)
    run("mkfs.xfs", "-q", "-p", directory / "proto", *XFS_KINDS[request.param], path)
    return path


def xfs_db(path: Path, *commands: str) -> str:
    return run("xfs_db", "-r", "-f", *(word for command in commands for word in ("-c", command)), path)


def xfs_field(path: Path, name: str) -> int:
    return int(re.findall(rf"^{name} = (\d+)$", xfs_db(path, "sb 0", f"print {name}"), re.MULTILINE)[0])


XFS_MAGICS = [("agf", b"XAGF"), ("agi", b"XAGI"), ("agfl", b"XAFL")]


@pytest.mark.parametrize(("target", "magic"), XFS_MAGICS)
def test_xfs_headers_have_their_magics_and_xfs_dbs_addresses(xfs: Path, target: str, magic: bytes) -> None:
    sector = xfs_field(xfs, "sectsize")
    ranges = find(str(xfs), f"xfs:{target}")
    assert len(ranges) == xfs_field(xfs, "agcount")
    version = re.findall(r"versionnum = 0x\w*(\w)", xfs_db(xfs, "sb 0", "print versionnum"))[0]
    for ag, (start, length) in enumerate(ranges):
        daddr = re.findall(r"current daddr is (\d+)", xfs_db(xfs, f"{target} {ag}", "daddr"))[0]
        assert (start, length) == (int(daddr) * 512, sector)
        if target != "agfl" or version == "5":  # before, it was a bare array
            assert read(xfs, (start, 4)) == magic
        assert find(str(xfs), f"xfs:{target}={ag}") == [(start, length)]


def test_xfs_superblocks_have_their_magic(xfs: Path) -> None:
    count = xfs_field(xfs, "agcount")
    backups = find(str(xfs), "xfs:backup-superblocks")
    assert find(str(xfs), "xfs:superblock") == [(0, xfs_field(xfs, "sectsize"))]
    assert len(backups) == count - 1
    for start, _ in backups:
        assert read(xfs, (start, 4)) == b"XFSB"


def test_xfs_ag_headers_are_all_four(xfs: Path) -> None:
    size = xfs_field(xfs, "sectsize")
    starts = [start for start, _ in find(str(xfs), "xfs:ag-headers")]
    assert find(str(xfs), "xfs:ag-headers") == [(start, 4 * size) for start in starts]
    assert starts[1:] == [start for start, _ in find(str(xfs), "xfs:backup-superblocks")]


def test_the_xfs_log_begins_with_a_record(xfs: Path) -> None:
    ((start, length),) = find(str(xfs), "xfs:log")
    assert read(xfs, (start, 4)) == b"\xfe\xed\xba\xbe"
    assert length == xfs_field(xfs, "logblocks") * xfs_field(xfs, "blocksize")
    daddr = re.findall(r"\d+", xfs_db(xfs, f"convert fsblock {xfs_field(xfs, 'logstart')} daddr").split("(")[1])[0]
    assert start == int(daddr) * 512


@pytest.mark.parametrize(("name", "content"), [("/big", BIG), ("/dir/small", SMALL)])
def test_the_blocks_of_an_xfs_file_have_its_content(xfs: Path, name: str, content: bytes) -> None:
    size = xfs_field(xfs, "blocksize")
    assert found(xfs, f"xfs:file={name}") == content + bytes(-len(content) % size)
    daddr = re.findall(r"current daddr is (\d+)", xfs_db(xfs, f"path {name}", "dblock 0", "daddr"))[0]
    assert find(str(xfs), f"xfs:file={name}")[0][0] == int(daddr) * 512


def test_the_blocks_of_an_xfs_directory_have_its_names(xfs: Path) -> None:
    data = found(xfs, "xfs:directory=/many")
    assert all(b"file%d" % number in data for number in range(300))


@pytest.mark.parametrize("name", ["/", "/big", "/many/file299"])
def test_the_inode_of_an_xfs_file_is_that_of_xfs_db(xfs: Path, name: str) -> None:
    number = int(re.findall(r"inode number is (\d+)", xfs_db(xfs, f"path {name}", "inode"))[0])
    entry = found(xfs, f"xfs:inode={name}")
    assert entry[:2] == b"IN"
    assert len(entry) == xfs_field(xfs, "inodesize")
    if entry[4] == 3:  # di_version: only this one has its number
        assert struct.unpack_from(">Q", entry, 152)[0] == number
    assert find(str(xfs), f"xfs:inode={number}") == find(str(xfs), f"xfs:inode={name}")


def test_xfs_inode_chunks_have_all_inodes(xfs: Path) -> None:
    ranges = find(str(xfs), "xfs:inodes")
    size = xfs_field(xfs, "inodesize")
    data = read(xfs, *ranges)
    assert len(data) == xfs_field(xfs, "icount") * size
    assert all(data[start : start + 2] == b"IN" for start in range(0, len(data), size))
    parts = [part for ag in range(xfs_field(xfs, "agcount")) for part in ranges_or_none(xfs, f"xfs:inodes={ag}")]
    assert parts == ranges


def test_xfs_names_say_what_is_there(xfs: Path) -> None:
    assert list(names(str(xfs))) == [
        "xfs:superblock",
        "xfs:backup-superblocks",
        "xfs:ag-headers[=AG]",
        "xfs:agf[=AG]",
        "xfs:agi[=AG]",
        "xfs:agfl[=AG]",
        "xfs:inodes[=AG]",
        "xfs:log",
        "xfs:inode=PATH|NUMBER",
        "xfs:file=PATH",
        "xfs:directory=PATH",
    ]


def test_xfs_mistakes_are_named(xfs: Path) -> None:
    count = xfs_field(xfs, "agcount")
    assert mistake(xfs, "xfs:file=/none") == "the file system has no '/none'"
    assert mistake(xfs, "xfs:file=/dir/no ne") == "the file system has no '/dir/no ne'"
    assert mistake(xfs, "xfs:file=big") == "'big' is not an absolute path in the file system"
    assert mistake(xfs, "xfs:file=/dir") == "'/dir' is no regular file (it is of type directory)"
    assert mistake(xfs, "xfs:file=/link") == "'/link' is no regular file (it is of type symbolic link)"
    assert mistake(xfs, "xfs:directory=/big") == "'/big' is no directory (it is of type regular file)"
    assert mistake(xfs, "xfs:file=/empty") == "'/empty' has no blocks: it is empty, a hole, or inside of its inode"
    assert mistake(xfs, "xfs:file=/big/x") == "'/big' cannot be listed: xfs_db: Not a directory"
    assert mistake(xfs, "xfs:inode=99999") == "there is no inode 99999"
    assert mistake(xfs, f"xfs:inode={1 << 63}") == f"there is no inode {1 << 63}"
    assert mistake(xfs, "xfs:agf=99") == f"there is no allocation group 99, there are {count}"
    assert mistake(xfs, "xfs:agf=x") == "'x' is not the number of an allocation group"
    assert mistake(xfs, "ext4:journal") == "there is no ext2, ext3 or ext4 file system"


@pytest.fixture(scope="module")
def small_xfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = sparse(tmp_path_factory.mktemp("xfs") / "image", 300 * MIB)
    run("mkfs.xfs", "-q", path)
    return path


def test_an_xfs_superblock_that_is_damaged_is_refused(small_xfs: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    shutil.copyfile(small_xfs, path)
    images.patch(path, (84, b"\xff\xff\xff\xff"))  # sb_agblocks
    assert re.match(r"xfs_db: |the superblock contradicts itself", mistake(path))


def test_a_truncated_xfs_is_refused(small_xfs: Path, tmp_path: Path) -> None:
    path = tmp_path / "truncated"
    shutil.copyfile(small_xfs, path)
    os.truncate(path, 100 * MIB)
    assert mistake(path) == f"the file system has {300 * MIB} bytes, and there are only {100 * MIB}"


# --- anything ---


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("layout", "source", "first"), [("ext4", "small_ext4", 1024), ("xfs", "small_xfs", 0)])
def test_garbage_is_an_error_or_in_bounds(
    request: pytest.FixtureRequest, tmp_path: Path, layout: str, source: str, first: int, seed: int
) -> None:
    rng = random.Random(seed)
    path = tmp_path / "image"
    shutil.copyfile(request.getfixturevalue(source), path)
    spots = [rng.randrange(first, first + 4096) for _ in range(rng.randrange(1, 40))]
    images.patch(path, *((spot, rng.randbytes(rng.choice([1, 4]))) for spot in spots))
    everything(path, layout)
