"""Names of structures in partition tables and qcow2 images, anything else's, and the command line that shows them.

What is found is judged by what lies there, by sfdisk --dump, by qemu-img map, and by whether every byte has one use.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import images
import pytest
from mounting import fusebd, refusal, run
from structures import BIG, MIB, everything, found, make_ext4, mistake, ranges_or_none, sparse

from fusebd.faults.layout import Range
from fusebd.faults.targets import LAYOUTS, find, names


@pytest.fixture(scope="module", autouse=True)
def system_directories() -> Iterator[None]:
    """mkfs and its kind are not in every user's PATH."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
        yield


# --- partition tables ---


def partitioned(path: Path, length: int, *lines: str) -> Path:
    sparse(path, length)
    subprocess.run(["sfdisk", "-q", path], input="\n".join(lines), text=True, check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpt")
    path = partitioned(
        directory / "image", 64 * MIB + 512, "label: gpt", "start=2048,size=16M", "start=40000,size=20M", "size=1M"
    )
    inner = make_ext4(tmp_path_factory.mktemp("inner"), "-b", "1024")
    return images.patch(path, (MIB, inner.read_bytes()))


def test_gpt_headers_have_their_signature_and_name_each_other(gpt: Path) -> None:
    primary, backup = found(gpt, "gpt:primary-header"), found(gpt, "gpt:backup-header")
    assert (primary[:8], backup[:8]) == (b"EFI PART", b"EFI PART")
    assert (len(primary), len(backup)) == (512, 512)
    assert find(str(gpt), "gpt:backup-header") == [(gpt.stat().st_size - 512, 512)]
    assert struct.unpack_from("<QQ", primary, 24) == struct.unpack_from("<QQ", backup, 24)[::-1]


@pytest.mark.parametrize("which", ["primary", "backup"])
def test_gpt_entries_have_the_checksum_of_their_header(gpt: Path, which: str) -> None:
    entries = found(gpt, f"gpt:{which}-entries")
    assert zlib.crc32(entries) == struct.unpack_from("<I", found(gpt, f"gpt:{which}-header"), 88)[0]
    assert len(entries) == 128 * 128


def test_the_protective_mbr_has_its_signature_and_type(gpt: Path) -> None:
    record = found(gpt, "gpt:protective-mbr")
    assert (record[510:], record[446 + 4]) == (b"\x55\xaa", 0xEE)


def test_gpt_partitions_are_those_of_sfdisk(gpt: Path) -> None:
    dump = run("sfdisk", "--dump", gpt)
    entries = re.findall(r"(\d) : start= *(\d+), size= *(\d+)", dump)
    assert [entry[0] for entry in entries] == ["1", "2", "3"]
    for number, start, size in entries:
        assert find(str(gpt), f"gpt:partition={number}") == [(int(start) * 512, int(size) * 512)]


def test_a_target_inside_of_a_partition_is_found(gpt: Path) -> None:
    assert found(gpt, "gpt:partition=1/ext4:file=/big")[: len(BIG)] == BIG
    assert found(gpt, "gpt:partition=1/ext4:journal")[:4] == b"\xc0\x3b\x39\x98"
    assert find(str(gpt), "gpt:partition=1/ext4:superblock") == [(MIB + 1024, 1024)]


def test_a_structure_is_not_looked_for_outside_of_its_partition(gpt: Path, tmp_path: Path) -> None:
    path = tmp_path / "image"
    shutil.copyfile(gpt, path)
    images.patch(path, (20000 * 512 + 1024 + 56, b"\x53\xef"))
    assert mistake(path, "gpt:partition=2/ext4:superblock") == "there is no ext2, ext3 or ext4 file system"


def test_gpt_names_go_down_into_partitions(gpt: Path) -> None:
    listed = list(names(str(gpt)))
    assert listed[:5] == [
        "gpt:protective-mbr",
        "gpt:primary-header",
        "gpt:primary-entries",
        "gpt:backup-header",
        "gpt:backup-entries",
    ]
    assert "gpt:partition=1/ext4:journal" in listed
    assert listed[-2:] == ["gpt:partition=2", "gpt:partition=3"]


def test_a_damaged_partition_does_not_hide_the_others(
    gpt: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "image"
    shutil.copyfile(gpt, path)
    images.patch(path, (MIB + 1024 + 4, b"\xff" * 4))
    listed = names(str(path))
    assert "gpt:partition=2" in listed
    assert not any("ext4" in name for name in listed)
    assert caplog.messages == ["gpt:partition=1: dumpe2fs: The ext2 superblock is corrupt"]


@pytest.mark.parametrize("damaged", ["primary", "backup"])
def test_one_damaged_gpt_header_is_enough(gpt: Path, tmp_path: Path, damaged: str) -> None:
    targets = ["primary-header", "primary-entries", "backup-header", "backup-entries", "partition=3"]
    expected = [find(str(gpt), f"gpt:{target}") for target in targets]
    path = tmp_path / "image"
    shutil.copyfile(gpt, path)
    images.patch(path, (find(str(gpt), f"gpt:{damaged}-header")[0][0], bytes(512)))
    assert [find(str(path), f"gpt:{target}") for target in targets] == expected


def test_gpt_mistakes_are_named(gpt: Path) -> None:
    assert mistake(gpt, "gpt:partition=4") == "there is no partition 4 (there are: 1, 2, 3)"
    assert mistake(gpt, "gpt:partition=x") == "'x' is not the number of a partition"
    assert mistake(gpt, "mbr:boot-record") == "there is no MBR partition table"
    assert mistake(gpt, "gpt:partition=2/xfs:log") == "there is no xfs file system"


@pytest.fixture(scope="module")
def mbr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return partitioned(
        tmp_path_factory.mktemp("mbr") / "image",
        64 * MIB,
        "label: dos",
        "start=2048,size=8M",
        "size=30M,type=5",
        "size=4M",
        "size=4M,type=L",
    )


def test_mbr_partitions_are_those_of_sfdisk(mbr: Path) -> None:
    entries = re.findall(r"(\d) : start= *(\d+), size= *(\d+)", run("sfdisk", "--dump", mbr))
    assert len(entries) == 4
    for number, start, size in entries:
        assert find(str(mbr), f"mbr:partition={number}") == [(int(start) * 512, int(size) * 512)]


def test_the_boot_record_has_its_signature(mbr: Path) -> None:
    record = found(mbr, "mbr:boot-record")
    assert (len(record), record[510:], record[446 + 4]) == (512, b"\x55\xaa", 0x83)
    assert mistake(mbr, "gpt:primary-header") == "there is no GUID partition table"


# --- qcow2 ---

QCOW2_KINDS: dict[str, dict[str, Any]] = {
    "v2": {"compat": "0.10"},
    "v3": {},
    "512": {"cluster_size": 512},
    "2M": {"cluster_size": 2 * MIB},
    "extended L2": {"extended_l2": "on", "cluster_size": "16k"},
    "preallocated": {"preallocation": "metadata", "cluster_size": "4k"},
    **{f"refcounts of {1 << order} bits": {"refcount_bits": 1 << order, "cluster_size": "4k"} for order in range(7)},
}
DISK = 8 * MIB


@pytest.fixture(params=QCOW2_KINDS)
def qcow2(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Images with data here and there, and discarded clusters in the middle of the file."""
    path = images.create(tmp_path / "image", DISK, **QCOW2_KINDS[request.param])
    images.io(
        path, "write -P 1 0 1M", "write -P 2 5M 700k", "write -P 3 3M 4k", "write -z -u 0 64k", "discard 256k 256k"
    )
    return path


def mapped(path: Path) -> list[tuple[int, int, int]]:
    """Guest offset, length and host offset of what qemu-img map says is in the file."""
    extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", path))
    return [(extent["start"], extent["length"], extent["offset"]) for extent in extents if "offset" in extent]


def test_guest_ranges_are_where_qemu_img_maps_them(qcow2: Path) -> None:
    cluster = images.info(qcow2)["cluster-size"]
    extents = mapped(qcow2)
    assert extents
    for start, length, host in extents:
        if host >= qcow2.stat().st_size:
            continue  # a part of its cluster that is not in the file yet
        ((first, extent),) = find(str(qcow2), f"qcow2:guest={start}+{min(length, cluster - start % cluster)}")
        assert first <= host < first + extent
        assert first == host // cluster * cluster
        last = start + length - 1
        ((first, extent),) = find(str(qcow2), f"qcow2:guest={last}+1")
        assert first <= host + length - 1 < first + cluster


def test_the_data_of_a_qcow2_image_is_what_qemu_img_maps(qcow2: Path) -> None:
    covered = find(str(qcow2), "qcow2:data")
    for _, length, host in mapped(qcow2):
        end = min(host + length, qcow2.stat().st_size)
        assert any(start <= host and end <= start + extent for start, extent in covered)


def test_every_byte_of_a_qcow2_image_has_one_use(qcow2: Path) -> None:
    kinds = ["header", "l1-table", "l2-tables", "refcount-table", "refcount-blocks", "data", "unused"]
    cluster = images.info(qcow2)["cluster-size"]
    size = qcow2.stat().st_size
    used: list[Range] = []
    for kind in kinds:
        ranges = ranges_or_none(qcow2, f"qcow2:{kind}")
        assert ranges or kind == "unused"
        # the L1 table alone does not fill its clusters
        used += [(start, min(length + -length % cluster, size - start)) for start, length in ranges]
    used.sort()
    position = 0
    for start, length in used:
        assert start == position
        position += length
    assert position == size


def test_qcow2_tables_are_where_the_header_says(qcow2: Path) -> None:
    header = qcow2.read_bytes()[:72]
    l1_size, l1_offset, table_offset, table_clusters = struct.unpack_from(">IQQI", header, 36)
    assert found(qcow2, "qcow2:header")[:4] == b"QFI\xfb"
    assert find(str(qcow2), "qcow2:l1-table") == [(l1_offset, l1_size * 8)]
    cluster = images.info(qcow2)["cluster-size"]
    assert find(str(qcow2), "qcow2:refcount-table") == [(table_offset, table_clusters * cluster)]


def test_damage_to_l2_tables_is_what_qemu_img_check_reports(qcow2: Path) -> None:
    start, _ = find(str(qcow2), "qcow2:l2-tables")[0]
    images.check_image(qcow2)
    images.patch(qcow2, (start, b"\xff" * 8))
    assert "ERROR" in run("qemu-img", "check", "-f", "qcow2", qcow2, expect=(1, 2))


def test_snapshots_have_a_table_and_l1_tables(tmp_path: Path) -> None:
    path = images.create(tmp_path / "image", DISK)
    images.io(path, "write 0 1M")
    for name in ("first", "second snapshot"):
        run("qemu-img", "snapshot", "-c", name, path)
        images.io(path, "write 0 64k")
    table = found(path, "qcow2:snapshot-table")
    assert b"first" in table
    assert b"second snapshot" in table
    offsets = [struct.unpack_from(">QI", table)[0]]
    tables = find(str(path), "qcow2:snapshot-l1-tables")
    assert offsets[0] in [start for start, _ in tables]
    assert sum(length for _, length in tables) == 2 * 8
    assert find(str(path), "qcow2:l1-table")[0] not in tables


def test_an_image_without_snapshots_has_no_table_of_them(qcow2: Path) -> None:
    assert mistake(qcow2, "qcow2:snapshot-table") == "the image has no snapshots"
    assert "qcow2:snapshot-table" not in names(str(qcow2))


def test_a_compressed_cluster_is_found(tmp_path: Path) -> None:
    content = b"".join(b"%07d\n" % number for number in range(100000))
    (tmp_path / "raw").write_bytes(content)
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", tmp_path / "raw", tmp_path / "image")
    for cluster in (0, 3):
        compressed = found(tmp_path / "image", f"qcow2:guest={cluster * 65536}+1")
        plain = zlib.decompressobj(-12).decompress(compressed, 65536)
        assert plain == content[cluster * 65536 : (cluster + 1) * 65536]


def test_an_external_data_file_has_the_data_and_the_image_the_tables(tmp_path: Path) -> None:
    path = images.create(tmp_path / "image", DISK, data_file=tmp_path / "data")
    images.io(path, "write 0 1M")
    assert mistake(path, "qcow2:data") == "the clusters are in the external data file"
    assert "qcow2:guest=OFFSET+LENGTH" not in names(str(path))
    assert find(str(path), "qcow2:l2-tables")


def test_qcow2_mistakes_are_named(tmp_path: Path) -> None:
    path = images.create(tmp_path / "image", DISK)
    assert mistake(path, "qcow2:data") == "the image has no cluster for it"
    assert mistake(path, "qcow2:guest=0+64k") == "the image has no cluster for it"
    assert mistake(path, "qcow2:guest=0") == "'0' is not a range like 1M+64k, offset and length"
    assert mistake(path, "qcow2:guest=-1+5") == "'-1' is not a range like 1M+64k, offset and length"
    assert mistake(path, "qcow2:guest=8M+1") == f"the disk has no 1 bytes from byte {DISK} on, its size is {DISK}"
    assert mistake(path, "qcow2:guest=0+0") == f"the disk has no 0 bytes from byte 0 on, its size is {DISK}"


QCOW2_DAMAGE: dict[str, tuple[int, bytes, str, str]] = {
    "version": (4, images.u32(4), "header", "unsupported qcow2 version 4"),
    "cluster bits": (20, images.u32(63), "header", "unsupported cluster size 2^63"),
    "features": (72, images.u64(1 << 40), "header", "unknown incompatible features 0x10000000000"),
    "refcount order": (96, images.u32(7), "unused", "refcounts of more than 64 bits"),
    "L1 size": (36, images.u32(1 << 31), "l1-table", "L1 table too large"),
    "L1 offset": (40, images.u64(512), "l1-table", "the L1 table cannot be the 8 bytes at 0x200"),
    "L1 far away": (40, images.u64(1 << 40), "l2-tables", "the L1 table cannot be the 8 bytes at 0x10000000000"),
    "no L1": (36, images.u32(0), "l1-table", "the L1 table is empty"),
    "refcount table size": (56, images.u32(1 << 31), "unused", "refcount table too large"),
    "refcount table": (
        48,
        images.u64(1 << 63),
        "unused",
        "the refcount table cannot be the 65536 bytes at 0x8000000000000000",
    ),
    "snapshots": (60, images.u32(1 << 31), "header", "2147483648 snapshots"),
    "snapshot table": (60, images.u32(5) + images.u64(1 << 16), "snapshot-table", ""),
    "L1 entry": (
        0x30000,
        images.u64(1 << 63 | 0x50200),
        "data",
        "the L2 table at 0x50200 does not begin with a cluster",
    ),
    "L2 entry": (
        0x40000,
        images.u64(1 << 63 | 1 << 40),
        "data",
        "the cluster at 0x10000000000 is past the end of the file",
    ),
    "compressed": (
        0x40000,
        images.u64(1 << 62 | 1 << 40),
        "data",
        "the compressed cluster at 0x10000000000 is past the end of the file",
    ),
    "refcount entry": (
        0x10000,
        images.u64(0x200),
        "unused",
        "the refcount block at 0x200 does not begin with a cluster",
    ),
}


@pytest.mark.parametrize("damage", QCOW2_DAMAGE)
def test_damage_in_a_qcow2_image_is_named(tmp_path: Path, damage: str) -> None:
    offset, data, target, message = QCOW2_DAMAGE[damage]
    path = images.create(tmp_path / "image", DISK)
    images.io(path, "write 0 64k")
    images.patch(path, (offset, data))
    if message:
        assert mistake(path, f"qcow2:{target}") == message
    else:
        # whatever is there is taken for entries, inside of the file
        ((start, length),) = find(str(path), f"qcow2:{target}")
        assert start + length <= path.stat().st_size


# --- anything ---


@pytest.mark.parametrize("seed", range(60))
def test_garbage_in_a_qcow2_image_is_an_error_or_in_bounds(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = images.create(tmp_path / "image", DISK, cluster_size=rng.choice([512, 4096, 65536]))
    images.io(path, "write 0 1M")
    size = path.stat().st_size
    spots = [rng.randrange(4, 112) if rng.random() < 0.5 else rng.randrange(size) for _ in range(rng.randrange(1, 30))]
    images.patch(path, *((spot, rng.choice([b"\xff", b"\0", rng.randbytes(1), rng.randbytes(8)])) for spot in spots))
    everything(path, "qcow2")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("layout", "first", "length"), [("gpt", 512, 4096), ("mbr", 446, 64)])
def test_garbage_in_a_partition_table_is_an_error_or_in_bounds(
    request: pytest.FixtureRequest, tmp_path: Path, layout: str, first: int, length: int, seed: int
) -> None:
    rng = random.Random(seed)
    path = tmp_path / "image"
    shutil.copyfile(request.getfixturevalue(layout), path)
    spots = [rng.randrange(first, first + length) for _ in range(rng.randrange(1, 40))]
    images.patch(path, *((spot, rng.randbytes(rng.choice([1, 4]))) for spot in spots))
    everything(path, layout)


@pytest.mark.parametrize("signature", [(0, b"QFI\xfb"), (0, b"XFSB"), (1080, b"\x53\xef"), (512, b"EFI PART")])
def test_a_signature_alone_is_not_enough(tmp_path: Path, signature: tuple[int, bytes]) -> None:
    path = tmp_path / "image"
    data = bytearray(random.Random(2).randbytes(MIB))
    data[510:512] = b"\x55\xaa"
    data[signature[0] : signature[0] + len(signature[1])] = signature[1]
    path.write_bytes(data)
    assert "\n" not in mistake(path)


@pytest.mark.parametrize("length", [0, 1, 511, 512, 1081, MIB])
def test_there_is_nothing_in_zeroes(tmp_path: Path, length: int) -> None:
    path = sparse(tmp_path / "image", length)
    assert mistake(path) == "none of gpt, mbr, ext4, xfs, qcow2 is in it"
    for layout, kind in LAYOUTS.items():
        assert mistake(path, f"{layout}:{kind.targets[0].name}") == f"there is no {kind.noun}"


# --- the command line ---


def test_the_command_prints_names(gpt: Path) -> None:
    lines = fusebd("targets", gpt).splitlines()
    assert lines[0].split(None, 1) == ["gpt:protective-mbr", "the protective master boot record"]
    listed = json.loads(fusebd("targets", "--json", gpt))
    assert [line.split()[0] for line in lines] == [entry["name"] for entry in listed] == list(names(str(gpt)))


def test_the_command_prints_ranges(gpt: Path) -> None:
    target = "gpt:partition=1/ext4:backup-superblocks"
    ranges = find(str(gpt), target)
    assert fusebd("targets", gpt, target) == "".join(f"{start} {length}\n" for start, length in ranges)
    in_json = json.loads(fusebd("targets", gpt, target, "--json"))
    assert in_json == [{"start": start, "length": length} for start, length in ranges]


def test_the_command_prints_sectors_that_are_touched(gpt: Path) -> None:
    target = "gpt:partition=1/ext4:inode=/big"
    ((start, length),) = find(str(gpt), target)
    assert length == 256
    assert fusebd("targets", "--sectors", gpt, target) == f"{start // 512} 1\n"
    assert json.loads(fusebd("targets", "--sectors", "--json", gpt, target)) == [{"start": start // 512, "length": 1}]


def test_the_command_says_a_mistake_in_one_line(gpt: Path, tmp_path: Path) -> None:
    none = tmp_path / "none"
    assert refusal("targets", none) == f"Could not open '{none}': No such file or directory\n".rstrip()
    assert refusal("targets", tmp_path) == f"Could not open '{tmp_path}': neither a regular file nor a block device"
    assert refusal("targets", gpt, "gpt:x").startswith("gpt has no target 'x' (it has: protective-mbr, ")
    assert refusal("targets", gpt, "gpt:partition=9").endswith("there is no partition 9 (there are: 1, 2, 3)")
    assert refusal("targets").startswith("the following arguments are required: PATH")


def test_a_pipe_does_not_block_the_command(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refusal("targets", tmp_path / "pipe").endswith("neither a regular file nor a block device")


def test_the_package_of_a_missing_program_is_named(gpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("fusebd.faults.tools.SYSTEM_DIRECTORIES", "/nonexistent")
    assert mistake(gpt, "gpt:partition=1") == "sfdisk is not installed (it is in Debian's package fdisk)"
