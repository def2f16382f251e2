"""A mismatch that is just reported, and one that ends the daemon, as users of a real mount see it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mounting import FUSEBD, Mount, check_image, fusebd, left_behind, mounts_below, run

Json = Any
Mounting = Callable[..., Mount]
LENGTH = 1 << 20
LINE = "blkverify: read offset=131072 bytes=4096 contents mismatch at offset 131172"
on_devfuse = pytest.mark.parametrize("transport", ["devfuse"])


@pytest.fixture
def disk(tmp_path: Path) -> Json:
    """The options of ``disk``: blkverify over a qcow2 image and a raw file, which differ at byte 131172."""
    (tmp_path / "raw").write_bytes(b"same" * (LENGTH // 4))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "raw", tmp_path / "test.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", f"write -P {ord('x')} 131172 2", tmp_path / "test.qcow2")
    test = {"driver": "qcow2", "file": {"driver": "file", "filename": str(tmp_path / "test.qcow2")}}
    raw = {"driver": "file", "filename": str(tmp_path / "raw")}
    return {"driver": "blkverify", "node-name": "disk", "test": test, "raw": raw}


def read(path: Path, offset: int) -> bytes:
    """4096 bytes of *path* from *offset* on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, 4096, offset)
    finally:
        os.close(descriptor)


def test_what_is_just_reported_is_read_and_logged(mount: Mounting, disk: Json) -> None:
    mounted = mount({**disk, "on-mismatch": "report"})
    assert mounted.qmp("query-version")
    assert read(mounted / "disk", 131072) == b"same" * 25 + b"xx" + b"me" + b"same" * 998
    assert read(mounted / "disk", 0) == b"same" * 1024
    assert mounted.qmp("query-version")
    events = [event["event"] for event in mounted.qmp.events]
    assert events == ["BLKVERIFY_MISMATCH"]
    mounted.hang_up()
    fusebd("umount", mounted.point)
    lines = [line.partition(" ERROR ")[2] for line in mounted.log.read_text().splitlines() if " ERROR " in line]
    same = "73 61 6d 65 73 61 6d 65 73 61 6d 65 73 61 6d 65  |samesamesamesame|"
    assert lines[:4] == [
        LINE,
        f"00020050  both  {same}",
        "00020060  test  73 61 6d 65 78 78 6d 65 73 61 6d 65 73 61 6d 65  |samexxmesamesame|",
        f"00020060  raw   {same}",
    ]


def test_a_mismatch_ends_the_daemon_and_unmounts(mount: Mounting, scratch: Path, disk: Json) -> None:
    mounted = mount({**disk, "on-mismatch": "stop"})
    descriptor = os.open(mounted / "disk", os.O_WRONLY)
    os.pwrite(descriptor, b"written", 0)
    os.close(descriptor)
    assert mounted.qmp("query-version")
    with pytest.raises(OSError, match="Input/output error") as failed:
        read(mounted / "disk", 131072)
    assert failed.value.errno == errno.EIO
    mounted.qmp.wait_end()
    events = mounted.qmp.events
    assert [event["event"] for event in events] == ["BLKVERIFY_MISMATCH", "BLOCK_IO_ERROR", "SHUTDOWN"]
    assert events[-1]["data"] == {"guest": False, "reason": "host-error"}
    mounted.wait_end()
    assert mounts_below(scratch) == []
    assert f"ERROR {LINE}\n" in mounted.log.read_text()
    # the user who unmounts hears of it
    said = fusebd("umount", mounted.point, expect=(1,))
    assert said == f"fusebd: {mounted.point}: disk: {LINE} (the log is {mounted.log})\n"
    assert left_behind(scratch) == []
    # what was written before is there
    assert (scratch / "raw").read_bytes()[:8] == b"writtene"
    check_image(scratch / "test.qcow2")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", scratch / "test.qcow2", scratch / "copy")
    assert (scratch / "copy").read_bytes()[:8] == b"writtene"


@on_devfuse
def test_in_the_foreground_the_exit_status_is_1(scratch: Path, transport: str, disk: Json) -> None:
    point = scratch / "mnt"
    point.mkdir()
    options = json.dumps({**disk, "on-mismatch": "stop"})
    with subprocess.Popen(
        [*FUSEBD, "mount", "--foreground", "--transport", transport, "--blockdev", options, str(point)],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as daemon:  # fmt: skip
        assert daemon.stderr is not None
        said = ""
        while f"{point}: mounted" not in said:
            line = daemon.stderr.readline()
            assert line, said
            said += line
        with pytest.raises(OSError, match="Input/output error"):
            read(point / "disk", 131072)
        said = daemon.stderr.read()
    assert daemon.returncode == 1
    assert f" ERROR {LINE}\n" in said
    assert said.splitlines()[-1] == f"fusebd: {point}: disk: {LINE}"
    assert mounts_below(scratch) == []


@on_devfuse
def test_a_mismatch_at_the_start_is_why_there_is_no_mount(scratch: Path, transport: str) -> None:
    for name in ("one", "two"):
        run("qemu-img", "create", "-q", "-f", "qcow2", scratch / name, "1M")
    run("qemu-io", "-f", "raw", "-c", "write -P 1 100 1", scratch / "two")
    test, raw = ({"driver": "file", "filename": str(scratch / name)} for name in ("one", "two"))
    file = {"driver": "blkverify", "node-name": "v", "test": test, "raw": raw, "on-mismatch": "stop"}
    options = json.dumps({"driver": "qcow2", "node-name": "disk", "file": file})
    point = scratch / "mnt"
    point.mkdir()
    log = scratch / "log"
    said = fusebd("mount", "--transport", transport, "--log-file", log, "--blockdev", options, point, expect=(1,))
    assert said.count("\n") == 1
    assert "blkverify: read offset=0 bytes=" in log.read_text()
    assert mounts_below(scratch) == []


@on_devfuse
def test_a_storage_daemon_ends_as_qemu_does(scratch: Path, transport: str, disk: Json) -> None:
    shutil.copy(scratch / "raw", scratch / "file")
    words = ["--blockdev", json.dumps({**disk, "on-mismatch": "stop"}), "--pidfile", "pid"]
    words += ["--export", "fuse,id=e,node-name=disk,mountpoint=file"]
    with subprocess.Popen(
        [*FUSEBD, "storage-daemon", *words],
        cwd=scratch, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as daemon:  # fmt: skip
        while not (scratch / "pid").exists():
            assert daemon.poll() is None
            time.sleep(0.01)
        with pytest.raises(OSError, match="Input/output error"):
            read(scratch / "file", 131072)
        assert daemon.stderr is not None
        said = daemon.stderr.read().splitlines()
    assert daemon.returncode == 1
    assert said[0] == LINE
    assert said[-1] == f"fusebd: disk: {LINE}"
    assert mounts_below(scratch) == []
