"""blockdev-reopen on a mount: open files go on working, the directory follows, caches are not out of date."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, check_image, fusebd, run
from qemuprograms import held_by_qemu_io
from reopens import file, node

Json = Any
Mounting = Callable[..., Mount]
MIB = 1 << 20
by_devfuse = pytest.mark.parametrize("transport", ["devfuse"])


@contextmanager
def fails(code: int) -> Iterator[None]:
    """A block that fails with the errno *code*."""
    with pytest.raises(OSError, match=re.escape(os.strerror(code))) as caught:
        yield
    assert caught.value.errno == code


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def reopen(mounted: Mount, *options: Json) -> None:
    mounted.qmp("blockdev-reopen", {"options": list(options)})


def refusal(mounted: Mount, *options: Json) -> str:
    answer = mounted.qmp.ask({"execute": "blockdev-reopen", "arguments": {"options": list(options)}})
    error: str = answer["error"]["desc"]
    return error


@pytest.fixture
def image(scratch: Path) -> Path:
    path = scratch / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(4 * MIB))
    return path


@contextmanager
def fio(path: Path, size: int) -> Iterator[None]:
    """fio writes to the open file *path* and verifies it meanwhile; AssertionError if it had an error."""
    stop = threading.Event()

    def work() -> int:
        runs = 0
        while not runs or not stop.is_set():
            run(
                "fio", "--name=load", f"--filename={path}", f"--size={size}", "--io_size=16m", "--rw=randwrite",
                "--bssplit=4k/70:16k/20:64k/10", "--ioengine=libaio", "--direct=1", "--iodepth=16", "--verify=crc32c",
                "--verify_fatal=1", "--allow_file_create=0", "--verify_state_save=0", f"--randseed={runs}",
                cwd=path.parent.parent,
            )  # fmt: skip
            runs += 1
        return runs

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        try:
            yield
        finally:
            stop.set()
        assert done.result() > 0


# --- files that are open -------------------------------------------------------------------------


def test_a_filter_comes_and_goes_below_a_file_that_is_written(mount: Mounting, image: Path) -> None:
    top = node("raw", "disk", file="f")
    mounted = mount(file("f", str(image)), node("blkdebug", "bd", image="f"), top)
    # fio itself has the file open only now and then
    with fio(mounted / "disk", 4 * MIB), opened(mounted / "disk", os.O_RDWR):
        for below in ["bd", "f"] * 20:
            reopen(mounted, {**top, "file": below})
            assert refusal(mounted, {**top, "file": below, "read-only": True}) == (
                "Read-only block node 'disk' cannot support read-write users"
            )
            time.sleep(0.02)
    stats = {entry["node-name"]: entry["stats"] for entry in mounted.qmp("query-blockstats", {"query-nodes": True})}
    assert 0 < stats["bd"]["wr_operations"] < stats["disk"]["wr_operations"]
    # what fio has closed just now is no reason to refuse it
    reopen(mounted, {**top, "read-only": True})
    with fails(errno.EROFS):
        os.open(mounted / "disk", os.O_RDWR)
    reopen(mounted, top)
    mounted.umount()


def test_a_file_is_reopened_while_it_is_written(mount: Mounting, image: Path) -> None:
    options = node("raw", "disk", file=file("f", str(image)))
    mounted = mount(options)
    with fio(mounted / "disk", 4 * MIB):
        for round_ in range(30):
            reopen(mounted, {**options, "cache": {"direct": round_ % 2 == 0}, "detect-zeroes": "on"})
            time.sleep(0.02)
    mounted.umount()


def test_an_image_is_reopened_while_it_is_written(mount: Mounting, scratch: Path) -> None:
    path = scratch / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    options = node("qcow2", "disk", file=file("f", str(path)))
    mounted = mount(options)
    with fio(mounted / "disk", 4 * MIB):
        for round_ in range(30):
            reopen(mounted, {**options, "discard": "unmap", "cache-size": (1 + round_ % 2) * MIB})
            time.sleep(0.02)
    mounted.umount()
    check_image(path)


def test_errors_are_there_as_long_as_the_filter_is(mount: Mounting, image: Path) -> None:
    top = node("raw", "disk", file="f")
    failing = node("blkdebug", "bd", image="f", inject_error=[{"event": "none", "iotype": "read"}])
    mounted = mount(file("f", str(image)), failing, top)
    with opened(mounted / "disk", os.O_RDWR) as descriptor:
        before = os.pread(descriptor, 4096, 0)
        reopen(mounted, {**top, "file": "bd"})
        with fails(errno.EIO):
            os.pread(descriptor, 4096, 0)
        assert os.pwrite(descriptor, b"goes through", MIB) == 12
        reopen(mounted, top)
        assert os.pread(descriptor, 4096, 0) == before == image.read_bytes()[:4096]
    assert image.read_bytes()[MIB : MIB + 12] == b"goes through"
    mounted.umount()


def test_readers_see_a_node_become_writable_and_read_only_again(mount: Mounting, image: Path) -> None:
    options = node("raw", "disk", file=file("f", str(image)))
    mounted = mount(options)
    with opened(mounted / "disk", os.O_RDONLY) as reader:
        for round_ in range(10):
            reopen(mounted, {**options, "read-only": True})
            assert stat.S_IMODE((mounted / "disk").stat().st_mode) == 0o400
            with fails(errno.EROFS):
                os.open(mounted / "disk", os.O_RDWR)
            reopen(mounted, options)
            assert stat.S_IMODE(os.fstat(reader).st_mode) == 0o600
            with opened(mounted / "disk", os.O_RDWR) as writer:
                os.pwrite(writer, b"%4d" % round_, 0)
            assert os.pread(reader, 4, 0) == b"%4d" % round_
    mounted.umount()


# --- what the directory shows --------------------------------------------------------------------


def test_the_directory_follows(mount: Mounting, image: Path) -> None:
    top = node("raw", "disk", file=node("null-co", "inline", size=8192))
    mounted = mount(top, file("f", str(image)))
    assert sorted(os.listdir(mounted.point)) == ["disk", "f", "inline"]
    with opened(mounted / "disk", os.O_RDONLY) as descriptor:
        reopen(mounted, {**top, "file": "f", "offset": MIB})
        assert os.fstat(descriptor).st_size == (mounted / "disk").stat().st_size == 3 * MIB
        assert os.pread(descriptor, 100, 0) == image.read_bytes()[MIB : MIB + 100]
        assert sorted(os.listdir(mounted.point)) == ["disk", "f"]
    details = json.loads(os.getxattr(mounted / "disk", "user.fusebd.details"))
    assert (details["length"], details["children"]) == (3 * MIB, {"file": "f"})
    assert details["options"]["offset"] == MIB
    assert (mounted / "disk").stat().st_blocks == image.stat().st_blocks
    mounted.umount()


def test_it_is_said_from_the_shell(mount: Mounting, image: Path) -> None:
    mounted = mount(node("raw", "disk", file=file("f", str(image))))
    fusebd(
        "qmp", mounted.point, "blockdev-reopen",
        "options.0.driver=raw", "options.0.node-name=disk", "options.0.file=f", "options.0.size=512",
    )  # fmt: skip
    assert (mounted / "disk").stat().st_size == 512
    mounted.umount()


def test_an_image_is_shared_with_qemu_while_it_is_read_only(mount: Mounting, scratch: Path) -> None:
    path = scratch / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    options = node("qcow2", "disk", file=file("f", str(path)))
    mounted = mount(options)
    (mounted / "disk").write_bytes(b"written")
    assert 'Failed to get shared "write" lock' in run("qemu-io", "-r", "-f", "qcow2", path, "-c", "quit", expect=(1,))
    reopen(mounted, {**options, "read-only": True})
    with held_by_qemu_io("-r", "-f", "qcow2", path):
        assert refusal(mounted, options) == 'Failed to get "write" lock'
        assert (mounted / "disk").read_bytes()[:7] == b"written"
    reopen(mounted, options)
    (mounted / "disk").write_bytes(b"changed")
    mounted.umount()
    assert (
        b"63 68 61 6e 67 65 64"
        in subprocess.run(
            ["qemu-io", "-r", "-f", "qcow2", "-c", "read -v 0 16", path], capture_output=True, check=True
        ).stdout
    )


# --- what the kernel keeps -----------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "transport"), [("page", "devfuse"), ("page", "pyfuse3"), ("writeback", "devfuse")])
def test_the_kernel_forgets_what_is_not_shown_any_more(mount: Mounting, image: Path, mode: str) -> None:
    options = node("raw", "disk", file=file("f", str(image)), read_only=True)
    mounted = mount(options, options=["--cache", f"disk={mode}"])
    data = image.read_bytes()
    with opened(mounted / "disk", os.O_RDONLY) as descriptor:
        for offset in (0, MIB, 2 * MIB, 0):
            reopen(mounted, {**options, "offset": offset, "size": MIB})
            assert os.pread(descriptor, MIB, 0) == data[offset : offset + MIB]
            assert os.pread(descriptor, MIB, 0) == data[offset : offset + MIB]
    mounted.umount()


@by_devfuse
def test_attributes_that_the_kernel_keeps_are_asked_for_again(mount: Mounting, image: Path) -> None:
    options = node("raw", "disk", file=file("f", str(image)))
    mounted = mount(options, options=["--cache", "disk=writeback"])
    for round_ in range(20):
        reopen(mounted, {**options, "read-only": round_ % 2 == 0})
        deadline = time.monotonic() + 0.9  # sooner than they would be out of date by themselves
        wanted = 0o400 if round_ % 2 == 0 else 0o600
        while stat.S_IMODE((mounted / "disk").stat().st_mode) != wanted:
            assert time.monotonic() < deadline
    mounted.umount()


@by_devfuse
def test_what_the_kernel_passes_through_is_not_changed_below_it(mount: Mounting, image: Path) -> None:
    options = node("raw", "disk", file=file("f", str(image)))
    mounted = mount(options, node("null-co", "n"), options=["--cache", "disk=passthrough"])
    with opened(mounted / "disk", os.O_RDONLY) as descriptor:
        for changed in (
            {"read-only": True},
            {"cache": {"direct": True}},
            {"offset": 512},
            {"file": "n"},
            {"detect-zeroes": "on"},
        ):
            assert "the kernel passes it through" in refusal(mounted, {**options, **changed})
        reopen(mounted, options)
        assert os.pread(descriptor, 4096, 0) == image.read_bytes()[:4096]
    reopen(mounted, {**options, "offset": 512})
    with opened(mounted / "disk", os.O_RDONLY) as descriptor:
        assert os.pread(descriptor, 4096, 0) == image.read_bytes()[512:4608]
    mounted.umount()
