"""blklogwrites below a real file system: what the log replays to is judged by e2fsck, and by QEMU's own log."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, file_system, fusebd, loop_device, refusal, run

from fusebd.faults.writelog import Selection, Target, WriteLog, find
from fusebd.ondisk.logwrites import FLUSH, FUA, MARK

LENGTH = 48 << 20


def logging(path: Path, **options: Any) -> dict[str, Any]:
    """The options of a node over ``path/disk`` that logs to ``path/log``."""
    disk, log = ({"driver": "file", "filename": str(path / name)} for name in ("disk", "log"))
    return {"driver": "blklogwrites", "node-name": "disk", "discard": "unmap", "file": disk, "log": log, **options}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A new ext4, of which there is a copy as ``base``; the log is empty."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(LENGTH)
    run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", path)
    _copy(path, tmp_path / "base")
    (tmp_path / "log").write_bytes(b"")
    return path


def _copy(source: Path, target: Path) -> Path:
    run("cp", "--sparse=always", source, target)
    return target


def _work(top: Path, seed: int) -> None:
    """Make, change, move and delete files, some of them durable at once."""
    rng = random.Random(seed)
    for number in range(120):
        path = top / str(number % 7) / str(number)
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.write(rng.randbytes(int(2 ** rng.uniform(0, 16))))
            if number % 12 == 0:
                file.flush()
                os.fsync(file.fileno())
        if number % 5 == 0:
            path.rename(path.with_suffix(".moved"))
        elif number % 3 == 0:
            path.unlink()
    os.sync()


def _check_recovered(image: Path) -> None:
    """AssertionError if e2fsck, after it has replayed the journal of a copy, finds anything to complain of."""
    copy = _copy(image, image.with_suffix(".recovered"))
    run("e2fsck", "-E", "journal_only", "-y", copy, expect=(0, 1))
    run("e2fsck", "-f", "-n", copy)


def test_ext4_recovers_at_every_flush_and_the_whole_log_is_the_disk(
    mount: Callable[..., Mount], tmp_path: Path, disk: Path
) -> None:
    mounted = mount(logging(tmp_path))
    with loop_device(mounted / "disk") as device:
        with file_system(device, tmp_path / "fs", "-o", "discard") as top:
            _work(top, 1)
            shutil.rmtree(top / "3")
        run("e2fsck", "-f", "-n", device)
    mounted.umount()
    image = _copy(tmp_path / "base", tmp_path / "image")
    boundaries = 0
    with WriteLog(str(tmp_path / "log")) as log, Target(str(image)) as target:
        for entry in log.entries():
            target.apply(log, entry)
            if entry.flags & FLUSH:
                _check_recovered(image)
                boundaries += 1
    assert boundaries > 10
    assert image.read_bytes() == disk.read_bytes()


def test_a_mark_set_from_the_shell_is_where_a_replay_stops_and_starts(
    mount: Callable[..., Mount], tmp_path: Path, disk: Path
) -> None:
    log = str(tmp_path / "log")
    mounted = mount(logging(tmp_path))
    with loop_device(mounted / "disk") as device, file_system(device, tmp_path / "fs") as top:
        (top / "early").write_bytes(b"early" * 1000)
        os.sync()
        assert fusebd("log", "mark", mounted.point, "disk", "half way = 50 %").split() == ["{}"]
        (top / "late").write_bytes(b"late" * 1000)
        mounted.qmp("blklogwrites-mark", {"node-name": "disk", "mark": "the end"})
    mounted.umount()
    image = _copy(tmp_path / "base", tmp_path / "image")
    fusebd("log", "replay", log, image, "--end-mark", "half way = 50 %")
    recovered = _copy(image, tmp_path / "recovered")
    run("e2fsck", "-E", "journal_only", "-y", recovered, expect=(0, 1))
    names = run("debugfs", "-R", "ls -p /", recovered)
    assert ("early" in names, "late" in names) == (True, False)
    fusebd("log", "replay", log, image, "--start-mark", "half way = 50 %")
    assert image.read_bytes() == disk.read_bytes()


def test_a_mark_is_of_no_use_where_nothing_is_logged(mount: Callable[..., Mount], tmp_path: Path) -> None:
    mounted = mount({"driver": "null-co", "node-name": "disk"})
    assert refusal("log", "mark", mounted.point, "disk", "m") == "Node 'disk' has no blklogwrites driver"
    assert refusal("log", "mark", mounted.point, "none", "m") == "Cannot find device='' nor node-name='none'"
    mounted.umount()


def test_a_log_that_begins_and_ends_while_a_file_is_open_has_what_was_written_meanwhile(
    mount: Callable[..., Mount], tmp_path: Path, disk: Path
) -> None:
    before = disk.read_bytes()
    mounted = mount({"driver": "file", "node-name": "disk", "filename": str(disk)})
    descriptor = os.open(mounted / "disk", os.O_RDWR)
    os.pwrite(descriptor, b"before", 4096)
    log = {"driver": "file", "filename": str(tmp_path / "log")}
    mounted.qmp(
        "block-filter-insert",
        {"node-name": "disk", "filter": {"driver": "blklogwrites", "node-name": "logging", "log": log}},
    )
    os.pwrite(descriptor, b"meanwhile", 8000)
    mounted.qmp("blklogwrites-mark", {"node-name": "disk", "mark": "here"})
    mounted.qmp("block-filter-remove", {"node-name": "logging"})
    os.pwrite(descriptor, b"after", 12288)
    os.close(descriptor)
    mounted.umount()
    with WriteLog(str(tmp_path / "log")) as found:
        entries = list(found.entries())
        assert [entry.flags for entry in entries] == [0, MARK, FLUSH]
        assert (entries[0].offset, entries[0].length) == (7680, 512)
        ((_, data),) = found.read_data(entries[0])
    assert data == before[7680:8000] + b"meanwhile" + before[8009:8192]


def test_a_write_that_is_to_be_durable_is_logged_with_fua(
    mount: Callable[..., Mount], tmp_path: Path, disk: Path
) -> None:
    mounted = mount(logging(tmp_path))
    descriptor = os.open(mounted / "disk", os.O_RDWR | os.O_DSYNC)
    os.pwrite(descriptor, bytes(512), 0)
    os.close(descriptor)
    # it is counted before anything is flushed or closed
    with WriteLog(str(tmp_path / "log")) as log:
        assert [(entry.length, entry.flags) for entry in log.entries()][:1] == [(512, FUA)]
    mounted.umount()


def _write_until_refused(descriptor: int) -> tuple[int, int]:
    """Write at most some megabytes: how many bytes were written, and the errno that ended it, 0 if there was none."""
    written, rng = 0, random.Random(5)
    try:
        for _ in range(100):
            written += os.pwrite(descriptor, rng.randbytes(65536), written)
    except OSError as error:
        return written, error.errno or -1
    return written, 0


def test_a_log_on_a_full_file_system_fails_requests_and_leaves_what_can_be_read(
    mount: Callable[..., Mount], tmp_path: Path, disk: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1M", "none", small)
    try:
        log = {"driver": "file", "filename": str(small / "log")}
        (small / "log").write_bytes(b"")
        mounted = mount(logging(tmp_path, log=log))
        descriptor = os.open(mounted / "disk", os.O_RDWR)
        written, code = _write_until_refused(descriptor)
        assert code == errno.ENOSPC
        with contextlib.suppress(OSError):
            os.close(descriptor)
        fusebd("umount", mounted.point, expect=(0, 1))
        with WriteLog(str(small / "log")) as found:
            lengths = [entry.length for entry in found.entries()]
        assert sum(lengths) <= written
    finally:
        run("umount", "-l", small)


# --- qemu-storage-daemon -------------------------------------------------------------------------


@pytest.fixture
def qemu(scratch: Path, disk: Path) -> Iterator[Path]:
    """A directory like ours, with ``disk`` and ``log``, and ``export``, a file that qemu-storage-daemon serves."""
    place = scratch / "qemu"
    place.mkdir()
    _copy(disk, place / "disk")
    (place / "log").write_bytes(b"")
    (place / "export").write_bytes(b"")
    files = f"file.driver=file,file.filename={place}/disk,log.driver=file,log.filename={place}/log"
    daemon = subprocess.Popen(
        [
            "qemu-storage-daemon", "--blockdev", f"driver=blklogwrites,node-name=disk,discard=unmap,{files}",
            "--export", f"type=fuse,id=e,node-name=disk,mountpoint={place}/export,writable=on",
            "--pidfile", str(place / "pid"),
        ],
    )  # fmt: skip
    while not (place / "pid").exists():
        assert daemon.poll() is None
        time.sleep(0.01)
    yield place
    daemon.terminate()
    daemon.wait(60)


def _write_some(path: Path) -> None:
    """Writes with flushes in between, not larger than what either daemon is given in one piece."""
    rng = random.Random(11)
    descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
    for number in range(60):
        length = rng.randrange(1, 17) * 4096
        with _aligned(rng.randbytes(length)) as buffer:
            os.pwrite(descriptor, buffer, rng.randrange((LENGTH - length) // 4096) * 4096)
        if number % 10 == 9:
            os.fsync(descriptor)
    os.close(descriptor)


@contextlib.contextmanager
def _aligned(data: bytes) -> Iterator[memoryview]:
    """*data* where O_DIRECT takes it from."""
    with mmap.mmap(-1, len(data)) as memory:
        memory.write(data)
        with memoryview(memory) as view:
            yield view


def test_the_same_work_gives_the_log_that_qemu_storage_daemon_writes(
    mount: Callable[..., Mount], tmp_path: Path, disk: Path, qemu: Path
) -> None:
    mounted = mount(logging(tmp_path))
    _write_some(mounted / "disk")
    mounted.umount()
    _write_some(qemu / "export")
    assert (tmp_path / "log").read_bytes() == (qemu / "log").read_bytes()
    assert disk.read_bytes() == (qemu / "disk").read_bytes()


def test_ext4_on_a_node_of_qemu_storage_daemon_gives_a_log_that_recovers_too(
    tmp_path: Path, disk: Path, qemu: Path
) -> None:
    with loop_device(qemu / "export", direct=False) as device, file_system(device, tmp_path / "fs") as top:
        _work(top, 2)
    image = _copy(tmp_path / "base", tmp_path / "image")
    with WriteLog(str(qemu / "log")) as log:
        boundary = find(log, Selection(start_entry=log.nr_entries // 2, stop_flags=FLUSH))
    fusebd("log", "replay", qemu / "log", image, "--limit", str(boundary.number + 1))
    _check_recovered(image)
    fusebd("log", "replay", qemu / "log", image, "--start-entry", str(boundary.number + 1))
    assert image.read_bytes() == (qemu / "disk").read_bytes()
