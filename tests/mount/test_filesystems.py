"""File systems on a loop device over a node, checked by their own fsck; a database on one of them."""

from __future__ import annotations

import hashlib
import os
import random
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import KernelLog, Mount, check_image, file_system, loop_device, qcow2, raw, run

LENGTH = 400 << 20  # the least that mkfs.xfs accepts is 300 MiB
FILES = 2000
MKFS = {"ext4": ["mkfs.ext4", "-q"], "xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"]}
FSCK = {"ext4": ["e2fsck", "-f", "-n"], "xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check"]}


def _populate(top: Path) -> str:
    """Make and delete a few thousand files; a digest of what is left."""
    rng = random.Random(3)
    for number in range(FILES):
        directory = top / str(number % 40)
        directory.mkdir(exist_ok=True)
        (directory / str(number)).write_bytes(rng.randbytes(int(2 ** rng.uniform(0, 15))))
    for number in range(0, FILES, 3):
        (top / str(number % 40) / str(number)).unlink()
    (top / "large").write_bytes(rng.randbytes(24 << 20))
    return _digest(top)


def _digest(top: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in top.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(top)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(LENGTH))
    return path


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("kind", list(MKFS))
def test_a_file_system_keeps_its_files_and_its_fsck_is_content(
    mount: Callable[..., Mount], tmp_path: Path, image: Path, kind: str, direct: bool
) -> None:
    mounted = mount(qcow2("disk", image, discard="unmap"))
    with loop_device(mounted / "disk", direct=direct) as device:
        run(*MKFS[kind], device)
        with file_system(device, tmp_path / "fs") as top:
            expected = _populate(top)
        with file_system(device, tmp_path / "fs", "-o", "ro") as top:
            assert _digest(top) == expected
        run(*FSCK[kind], device)
    mounted.umount()
    check_image(image)


def test_a_file_system_is_the_same_after_the_daemon_was_started_anew(
    mount: Callable[..., Mount], tmp_path: Path, image: Path
) -> None:
    mounted = mount(qcow2("disk", image))
    with loop_device(mounted / "disk") as device:
        run(*MKFS["ext4"], device)
        with file_system(device, tmp_path / "fs") as top:
            expected = _populate(top)
    mounted.umount()
    mounted = mount(qcow2("disk", image), name="again")
    with loop_device(mounted / "disk") as device, file_system(device, tmp_path / "fs") as top:
        assert _digest(top) == expected
    mounted.umount()
    check_image(image)


def test_a_database_on_a_file_system_is_intact(mount: Callable[..., Mount], tmp_path: Path, image: Path) -> None:
    mounted = mount(qcow2("disk", image))
    with loop_device(mounted / "disk") as device:
        run(*MKFS["ext4"], device)
        with file_system(device, tmp_path / "fs") as top:
            database = sqlite3.connect(top / "database")
            database.execute("pragma journal_mode = wal")
            database.execute("create table numbers (number integer primary key, text text)")
            for start in range(0, 4000, 100):
                with database:
                    rows = [(number, str(number) * 20) for number in range(start, start + 100)]
                    database.executemany("insert into numbers values (?, ?)", rows)
            database.close()
        with file_system(device, tmp_path / "fs") as top:
            database = sqlite3.connect(top / "database")
            assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
            assert database.execute("select count(*), sum(number) from numbers").fetchone() == (4000, 7998000)
            database.close()
    mounted.umount()
    check_image(image)


@pytest.fixture
def kernel_log() -> Iterator[KernelLog]:
    log = KernelLog()
    yield log
    log.close()


def test_the_kernel_reports_the_error_of_a_blkdebug_rule(
    mount: Callable[..., Mount], tmp_path: Path, kernel_log: KernelLog
) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    rule = {"event": "read_aio", "sector": 1024, "errno": 5}
    faulty = {
        "driver": "raw",
        "node-name": "disk",
        "file": {
            "driver": "blkdebug",
            "image": {"driver": "file", "filename": str(tmp_path / "disk.raw")},
            "inject-error": [rule],
        },
    }
    mounted = mount(faulty)
    with loop_device(mounted / "disk") as device:
        read = ["dd", f"if={device}", "of=/dev/null", "bs=512", "count=1", "iflag=direct"]
        assert "Input/output error" in run(*read, "skip=1024", expect=(1,))
        text = f"I/O error, dev {os.path.basename(device)}, sector 1024"
        if not kernel_log.wait_for(text):
            # The kernel keeps quiet for some seconds after many errors, as other tests may have caused.
            run(*read, "skip=1024", expect=(1,))
            assert kernel_log.wait_for(text)
        run(*read, "skip=1025")
    mounted.umount()


def test_a_file_system_passes_on_the_error_of_a_blkdebug_rule(mount: Callable[..., Mount], tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"")
    os.truncate(path, 64 << 20)
    mounted = mount(raw("disk", path))
    with loop_device(mounted / "disk") as device:
        run(*MKFS["ext4"], "-b", "4096", device)
        with file_system(device, tmp_path / "fs") as top:
            (top / "good").write_bytes(b"good" * 5000)
            (top / "bad").write_bytes(b"bad." * 5000)
    mounted.umount()
    found = re.search(r"\d+", run("debugfs", "-R", "blocks /bad", path).splitlines()[-1])
    assert found is not None
    image = {"driver": "file", "filename": str(path)}
    rule = {"event": "read_aio", "sector": int(found[0]) * 8, "errno": 5}
    faulty = {"driver": "blkdebug", "image": image, "inject-error": [rule]}
    mounted = mount({"driver": "raw", "node-name": "disk", "file": faulty}, name="faulty")
    with loop_device(mounted / "disk") as device, file_system(device, tmp_path / "fs", "-o", "ro") as top:
        assert (top / "good").read_bytes() == b"good" * 5000
        with pytest.raises(OSError, match="Input/output error"):
            (top / "bad").read_bytes()
    mounted.umount()
    run(*FSCK["ext4"], path)
