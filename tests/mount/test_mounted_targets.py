"""Names of structures of nodes of a mount, of loop devices, and inside of partitions."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from mounting import KernelLog, Mount, file_system, fusebd, loop_device, mounts_below, qcow2, raw, run
from structures import BIG, MIB, SMALL, found, make_ext4, mistake, sparse

from fusebd.faults.layout import Range
from fusebd.faults.targets import find, names

XFS_LENGTH = 300 * MIB


@pytest.fixture(autouse=True)
def system_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    """mkfs and its kind are not in every user's PATH."""
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")


@pytest.fixture
def windows(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where parts of files are mounted for programs that take whole files; nothing may be left of them."""
    directory = scratch / "tmp"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    yield
    assert os.listdir(directory) == mounts_below(directory) == os.listdir(scratch / "run") == []


def make_xfs(path: Path, *options: str) -> Path:
    sparse(path, XFS_LENGTH)
    run("mkfs.xfs", "-q", *options, path)
    return path


def partitioned(path: Path, length: int, *lines: str) -> Path:
    sparse(path, length)
    sfdisk(path, *lines)
    return path


def sfdisk(path: Path | str, *lines: str) -> None:
    subprocess.run(["sfdisk", "-q", path], input="\n".join(lines), text=True, check=True, capture_output=True)


def insert(path: Path, offset: int, content: Path) -> None:
    """Put the file *content* into *path*, with its holes."""
    run("dd", f"if={content}", f"of={path}", "bs=1M", f"seek={offset // MIB}", "conv=notrunc,sparse", "status=none")


def extents(path: Path) -> list[Range]:
    """Where the kernel says that the file is on its device, in bytes."""
    listing = run("filefrag", "-s", "-b512", "-e", path)
    rows = re.findall(r"^ +\d+: +\d+\.\. +\d+: +(\d+)\.\. +\d+: +(\d+):", listing, re.MULTILINE)
    return sorted((int(start) * 512, int(count) * 512) for start, count in rows)


# --- nodes ---


@pytest.mark.parametrize("format_driver", ["raw", "qcow2"])
def test_a_node_has_the_structures_of_its_disk(mount: Callable[..., Mount], tmp_path: Path, format_driver: str) -> None:
    image = make_ext4(tmp_path, "-b", "1024")
    nodes = {"raw": raw("disk", image)}
    if format_driver == "qcow2":
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, tmp_path / "qcow2")
        nodes["qcow2"] = qcow2("disk", tmp_path / "qcow2")
    mounted = mount(nodes[format_driver])
    for target in ("ext4:journal", "ext4:file=/big", "ext4:inode=/dir/small", "ext4:backup-superblocks"):
        assert find(str(mounted / "disk"), target) == find(str(image), target)
    assert names(str(mounted / "disk")) == names(str(image))
    lines = fusebd("targets", mounted / "disk", "ext4:journal").splitlines()
    assert lines == [f"{start} {length}" for start, length in find(str(image), "ext4:journal")]
    mounted.umount()


def test_the_node_below_a_qcow2_node_has_the_structures_of_the_image(
    mount: Callable[..., Mount], tmp_path: Path
) -> None:
    image = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write 0 1M", image)
    mounted = mount({"driver": "file", "node-name": "image", "filename": str(image), "read-only": True})
    for target in ("header", "l1-table", "l2-tables", "refcount-table", "refcount-blocks", "guest=64k+1k"):
        assert find(str(mounted / "image"), f"qcow2:{target}") == find(str(image), f"qcow2:{target}")
    mounted.umount()


def test_faults_aimed_at_a_file_leave_the_others_alone(mount: Callable[..., Mount], tmp_path: Path) -> None:
    mounted = mount(raw("disk", make_ext4(tmp_path, "-b", "1024")))
    lines = fusebd("targets", "--sectors", mounted / "disk", "ext4:file=/dir/small").splitlines()
    rules = [
        {"event": "read_aio", "iotype": "read", "sector": sector}
        for start, count in (map(int, line.split()) for line in lines)
        for sector in range(start, start + count)
    ]
    bad = {"driver": "raw", "node-name": "bad", "file": {"driver": "blkdebug", "image": "disk", "inject-error": rules}}
    mounted.qmp("blockdev-add", bad)
    assert "Input/output error" in run("debugfs", "-c", "-R", "cat /dir/small", mounted / "bad")
    run("debugfs", "-c", "-R", f"dump /big {tmp_path / 'big'}", mounted / "bad")
    assert (tmp_path / "big").read_bytes() == BIG
    mounted.umount()


def test_faults_aimed_at_the_journal_abort_it(mount: Callable[..., Mount], tmp_path: Path) -> None:
    mounted = mount(raw("disk", make_ext4(tmp_path, "-b", "1024")))
    kernel_log = KernelLog()
    with loop_device(mounted / "disk") as device, file_system(device, tmp_path / "top") as top:
        fusebd("fault", "add", mounted.point, "disk", "action=error", "operations=write", "target=ext4:journal")
        (top / "new").touch()
        os.sync()
        assert kernel_log.wait_for("Aborting journal on device")
        kernel_log.close()
        assert (top / "big").read_bytes() == BIG
    mounted.umount()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_what_a_mounted_file_system_has_written_is_where_the_kernel_says(
    mount: Callable[..., Mount], tmp_path: Path, kind: str
) -> None:
    image = make_ext4(tmp_path) if kind == "ext4" else make_xfs(tmp_path / "image")
    mounted = mount(raw("disk", image))
    with loop_device(mounted / "disk") as device, file_system(device, tmp_path / "top") as top:
        (top / "sp  ace").mkdir()
        file = top / "sp  ace" / 'a "quoted" \\name\' \xe9'
        for number in range(0, 40, 2):
            with file.open("r+b" if number else "wb") as opened:
                opened.seek(number * 8192)
                opened.write(b"%04d" % number * 1024)
                os.fsync(opened.fileno())
        # A journalling file system writes things to their places when it likes, but has to before it is frozen.
        run("fsfreeze", "--freeze", top)
        run("fsfreeze", "--unfreeze", top)
        target = f"{kind}:file=/sp  ace/{file.name}"
        for path in (str(mounted / "disk"), device):
            assert find(path, target) == merged_extents(extents(file))
    mounted.umount()


def merged_extents(ranges: Sequence[Range]) -> list[Range]:
    result: list[Range] = []
    for start, length in ranges:
        if result and sum(result[-1]) == start:
            result[-1] = result[-1][0], result[-1][1] + length
        else:
            result.append((start, length))
    return result


# --- partitions that a program has to be shown alone ---


def test_xfs_inside_of_a_partition_is_found(scratch: Path, windows: None) -> None:
    image = partitioned(scratch / "image", 400 * MIB, "label: gpt", "start=2048,size=40M", "size=320M")
    make_xfs(scratch / "xfs")
    with loop_device(scratch / "xfs") as device, file_system(device, scratch / "top") as top:
        (top / "a").mkdir()
        (top / "a" / "big").write_bytes(BIG)
    insert(image, 41 * MIB, scratch / "xfs")
    for target in ("superblock", "agf", "log", "inodes", "file=/a/big", "inode=/a/big"):
        inside = find(str(scratch / "xfs"), f"xfs:{target}")
        shifted = [(start + 41 * MIB, length) for start, length in inside]
        assert find(str(image), f"gpt:partition=2/xfs:{target}") == shifted
    assert found(image, "gpt:partition=2/xfs:file=/a/big")[: len(BIG)] == BIG
    assert "gpt:partition=2/xfs:log" in names(str(image))
    assert mistake(image, "gpt:partition=2/xfs:file=/none") == "the file system has no '/none'"


def test_xfs_inside_of_a_partition_of_a_device_is_found(scratch: Path, windows: None) -> None:
    image = partitioned(scratch / "image", 400 * MIB, "label: gpt", "start=2048,size=320M")
    insert(image, MIB, make_xfs(scratch / "xfs"))
    with loop_device(image) as device:
        assert find(device, "gpt:partition=1/xfs:log") == find(str(image), "gpt:partition=1/xfs:log")


def test_xfs_inside_of_a_partition_of_a_node_is_found(
    mount: Callable[..., Mount], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = partitioned(scratch / "image", 400 * MIB, "label: gpt", "start=2048,size=320M")
    insert(image, MIB, make_xfs(scratch / "xfs"))
    mounted = mount(raw("disk", image))
    assert find(str(mounted / "disk"), "gpt:partition=1/xfs:log") == find(str(image), "gpt:partition=1/xfs:log")
    mounted.umount()


def test_a_partition_table_inside_of_a_partition_is_found(scratch: Path, windows: None) -> None:
    inner = partitioned(scratch / "inner", 40 * MIB, "label: gpt", "start=2048,size=16M")
    (scratch / "ext4").mkdir()
    insert(inner, MIB, make_ext4(scratch / "ext4", "-b", "1024"))
    image = partitioned(scratch / "outer", 64 * MIB, "label: dos", "start=4096,size=40M")
    insert(image, 2 * MIB, inner)
    target = "mbr:partition=1/gpt:partition=1/ext4:file=/dir/small"
    assert found(image, target)[: len(SMALL)] == SMALL
    assert found(image, "mbr:partition=1/gpt:backup-header")[:8] == b"EFI PART"
    assert "mbr:partition=1/gpt:partition=1/ext4:journal" in names(str(image))


def test_a_part_that_cannot_be_mounted_is_said_so(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = partitioned(scratch / "image", 400 * MIB, "label: gpt", "start=2048,size=320M")
    insert(image, MIB, make_xfs(scratch / "xfs"))
    (scratch / "file").touch()
    monkeypatch.setenv("FUSEBD_RUNTIME_DIR", str(scratch / "file"))
    message = mistake(image, "gpt:partition=1/xfs:log")
    assert message.startswith("its bytes cannot be mounted as a file: ")
    assert "\n" not in message


# --- devices ---


def test_a_partition_table_for_large_sectors_is_read_on_a_device_of_such(scratch: Path) -> None:
    image = sparse(scratch / "image", 64 * MIB)
    device = run("losetup", "--find", "--show", "--sector-size", "4096", image).strip()
    try:
        sfdisk(device, "label: gpt", "start=512,size=4096")
        ranges = find(device, "gpt:partition=1")
        headers = [find(device, f"gpt:{which}-header") for which in ("primary", "backup")]
    finally:
        run("losetup", "-d", device)
    assert ranges == [(512 * 4096, 4096 * 4096)]
    assert headers == [[(4096, 4096)], [(64 * MIB - 4096, 4096)]]
    assert [find(str(image), f"gpt:{which}-header") for which in ("primary", "backup")] == headers
    assert find(str(image), "gpt:primary-entries") == [(2 * 4096, 16384)]
    assert mistake(image, "gpt:partition=1") == (
        "it is made for sectors of 4096 bytes, and sfdisk knows those of devices only "
        "(losetup --sector-size 4096 makes one)"
    )


def test_a_journal_on_another_device_is_said_so(scratch: Path) -> None:
    with loop_device(sparse(scratch / "journal", 16 * MIB)) as journal:
        run("mkfs.ext4", "-q", "-F", "-O", "journal_dev", "-b", "1024", journal)
        image = scratch / "image"
        sparse(image, 64 * MIB)
        with loop_device(image) as device:
            run("mkfs.ext4", "-q", "-F", "-b", "1024", "-J", f"device={journal}", device)
    assert mistake(image, "ext4:journal") == "the journal is on another device"
    assert "ext4:journal" not in names(str(image))
    assert mistake(scratch / "journal", "ext4:superblock") == "there is no ext2, ext3 or ext4 file system"


def test_an_xfs_log_on_another_device_is_said_so(scratch: Path) -> None:
    image = sparse(scratch / "image", XFS_LENGTH)
    log = sparse(scratch / "log", 100 * MIB)
    run("mkfs.xfs", "-q", "-l", f"logdev={log}", image)
    assert mistake(image, "xfs:log") == "the log is on another device"
    assert "xfs:log" not in names(str(image))


def test_sparse_inode_chunks_leave_out_what_is_none(scratch: Path) -> None:
    image = make_xfs(scratch / "image", "-i", "size=2048")
    with loop_device(image) as device, file_system(device, scratch / "top") as top:
        # No space is kept back for emergencies; when the last 2 MiB are used, there is room for parts of chunks only.
        run("xfs_io", "-x", "-c", "resblks 0", top)
        fill = top / "fill"
        with fill.open("wb") as opened:
            os.posix_fallocate(opened.fileno(), 0, os.statvfs(top).f_bavail * 4096 - 2 * MIB)
        for number in range(50):
            run("fallocate", "--punch-hole", "--offset", f"{number}MiB", "--length", "64KiB", fill)
        run("sh", "-c", f"for i in $(seq 5000); do : > {top}/$i || exit; done", expect=(2,))
    size = int(xfs_field(image, "inodesize"))
    data = found(image, "xfs:inodes")
    assert len(data) == int(xfs_field(image, "icount")) * size
    assert all(data[start : start + 2] == b"IN" for start in range(0, len(data), size))
    chunk = 64 * size
    assert any(length % chunk for _, length in find(str(image), "xfs:inodes")), "no chunk is sparse"


def xfs_field(path: Path, name: str) -> str:
    return run("xfs_db", "-r", "-f", "-c", "sb 0", "-c", f"print {name}", path).split()[2]
