"""The file of a node as programs see it: reading and writing up to the end, errors, and its length."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, check_image, failing, qcow2, raw, run

LENGTH = 1 << 20
Mounting = Callable[..., Mount]


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


def null(name: str, size: int = 4096, **options: Any) -> dict[str, Any]:
    return {"driver": "null-co", "node-name": name, "size": size, "read-zeroes": True, **options}


@pytest.fixture
def image(scratch: Path) -> Path:
    """A raw file of LENGTH bytes, no two sectors of which are alike."""
    path = scratch / "disk.raw"
    path.write_bytes(b"".join(number.to_bytes(4, "big") * 128 for number in range(LENGTH // 512)))
    return path


def file(path: Path) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path)}


# --- reading and writing -------------------------------------------------------------------------------


def test_what_is_read_is_what_is_in_the_image(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    run("cmp", mounted / "disk", image)
    for size in ("512", "4k", "64k", "1M", "3M", "1000"):
        run("dd", f"if={mounted / 'disk'}", f"of={image}.copy", f"bs={size}", "status=none")
        assert Path(f"{image}.copy").read_bytes() == image.read_bytes(), size
    mounted.umount()


def test_reading_ends_at_the_end(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    with opened(mounted / "disk", os.O_RDONLY) as disk:
        assert os.pread(disk, 100, LENGTH - 10) == image.read_bytes()[-10:]
        for offset in (LENGTH, LENGTH + 1, LENGTH + 4096, 1 << 62):
            assert os.pread(disk, 100, offset) == b""
        assert os.pread(disk, 0, 0) == b""
    output = run("dd", f"if={mounted / 'disk'}", "of=/dev/null", "bs=512", f"skip={LENGTH // 512 - 1}", "count=9")
    assert "1+0 records in" in output
    mounted.umount()


def test_writing_ends_at_the_end(mount: Mounting, image: Path) -> None:
    before = image.read_bytes()
    mounted = mount(raw("disk", image))
    with opened(mounted / "disk", os.O_RDWR) as disk:
        assert os.pwrite(disk, b"x" * 100, LENGTH - 10) == 10
        for offset in (LENGTH, LENGTH + 1, 1 << 40):
            with fails(errno.ENOSPC):
                os.pwrite(disk, b"x", offset)
        assert os.fstat(disk).st_size == LENGTH
    assert image.read_bytes() == before[:-10] + b"x" * 10
    # Without notrunc, dd would cut the file where it begins to write.
    words = [f"of={mounted / 'disk'}", "bs=512", f"seek={LENGTH // 512 - 1}", "count=9", "conv=notrunc"]
    output = run("dd", "if=/dev/zero", *words, expect=[1])
    assert "No space left on device" in output
    assert "1+0 records out" in output
    mounted.umount()


def test_appending_has_no_room(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    with opened(mounted / "disk", os.O_WRONLY | os.O_APPEND) as disk, fails(errno.ENOSPC):
        os.write(disk, b"x")
    mounted.umount()


@pytest.mark.parametrize("length", [1, 511, 513, 4095, 4097, 100_001])
def test_a_length_of_no_whole_sectors_is_kept(mount: Mounting, scratch: Path, length: int) -> None:
    data = bytes(number % 251 for number in range(length))
    (scratch / "odd").write_bytes(data)
    mounted = mount(raw("disk", scratch / "odd"))
    assert (mounted / "disk").stat().st_size == length
    assert (mounted / "disk").read_bytes() == data
    with opened(mounted / "disk", os.O_RDWR) as disk:
        assert os.pwrite(disk, b"xyz", length - 1) == 1
        assert os.pread(disk, 100, length - 1) == b"x"
    mounted.umount()
    assert (scratch / "odd").read_bytes() == data[:-1] + b"x"


@pytest.mark.parametrize("flags", [os.O_DIRECT, os.O_SYNC, os.O_DSYNC, os.O_DIRECT | os.O_SYNC])
def test_direct_and_synchronous_writes_arrive(mount: Mounting, image: Path, flags: int) -> None:
    mounted = mount(raw("disk", image))
    block = mmap.mmap(-1, 65536)
    block.write(b"data" * 16384)
    with opened(mounted / "disk", os.O_RDWR | flags) as disk:
        assert os.pwritev(disk, [block], 4096) == 65536
        assert os.preadv(disk, [block], 4096) == 65536
    assert image.read_bytes()[4096 : 4096 + 65536] == b"data" * 16384
    mounted.umount()


def test_every_read_reaches_the_node(mount: Mounting, image: Path) -> None:
    # A fault hidden by the page cache is a fault not tested.
    mounted = mount(raw("disk", image))
    with opened(mounted / "disk", os.O_RDONLY) as disk:
        for _ in range(5):
            os.pread(disk, 4096, 0)
    (stats,) = (entry for entry in mounted.qmp("query-blockstats") if entry["node-name"] == "disk")
    assert stats["stats"]["rd_operations"] == 5
    assert stats["stats"]["rd_bytes"] == 5 * 4096
    mounted.umount()


def test_a_large_request_arrives_in_pieces_of_a_mebibyte(mount: Mounting, scratch: Path) -> None:
    mounted = mount(null("disk", 64 << 20))
    with opened(mounted / "disk", os.O_RDONLY) as disk:
        assert os.preadv(disk, [mmap.mmap(-1, 16 << 20)], 0) == 16 << 20
    (stats,) = (entry for entry in mounted.qmp("query-blockstats") if entry["node-name"] == "disk")
    assert stats["stats"]["rd_operations"] == 16
    mounted.umount()


def test_a_file_can_be_mapped(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    with open(mounted / "disk", "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
        assert mapped[:] == image.read_bytes()
    mounted.umount()


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ENODATA, errno.ETIMEDOUT, errno.EREMOTEIO])
def test_an_injected_error_arrives_as_it_is(mount: Mounting, image: Path, code: int) -> None:
    mounted = mount(failing("disk", file(image), event="read_aio", errno=code, sector=8))
    with opened(mounted / "disk", os.O_RDONLY) as disk:
        with fails(code):
            os.pread(disk, 512, 4096)
        with fails(code):
            os.pread(disk, 8192, 0)
        assert len(os.pread(disk, 4096, 0)) == 4096
    mounted.umount()


def test_an_injected_error_arrives_in_dd(mount: Mounting, image: Path) -> None:
    mounted = mount(failing("disk", file(image), event="write_aio", sector=8, once=True))
    command = ["dd", "if=/dev/zero", f"of={mounted / 'disk'}", "bs=512", "count=16", "oflag=direct"]
    output = run(*command, expect=[1])
    assert "Input/output error" in output
    assert "8+0 records out" in output
    assert "16+0 records out" in run(*command)
    mounted.umount()


def test_a_flush_that_fails_is_reported_by_fsync(mount: Mounting, image: Path) -> None:
    mounted = mount(failing("disk", file(image), event="flush_to_disk", once=True))
    with opened(mounted / "disk", os.O_WRONLY) as disk:
        os.pwrite(disk, b"x", 0)
        with fails(errno.EIO):
            os.fsync(disk)
        os.fsync(disk)
    mounted.umount()


def test_a_flush_that_fails_is_reported_by_close(mount: Mounting, image: Path) -> None:
    mounted = mount(failing("disk", file(image), event="flush_to_disk", once=True))
    disk = os.open(mounted / "disk", os.O_WRONLY)
    os.pwrite(disk, b"x", 0)
    with fails(errno.EIO):
        os.close(disk)
    mounted.umount()


def test_a_flush_that_fails_at_close_arrives_in_cp(mount: Mounting, image: Path, scratch: Path) -> None:
    mounted = mount(failing("disk", file(image), event="flush_to_disk", once=True))
    (scratch / "source").write_bytes(bytes(4096))
    assert "Input/output error" in run("cp", scratch / "source", mounted / "disk", expect=[1])
    run("cp", scratch / "source", mounted / "disk")
    mounted.umount()


def test_closing_a_reader_flushes_nothing(mount: Mounting, image: Path) -> None:
    mounted = mount(failing("disk", file(image), event="flush_to_disk"))
    (mounted / "disk").read_bytes()
    mounted.umount()


@pytest.mark.parametrize("flags", [os.O_SYNC, os.O_DSYNC])
def test_a_synchronous_write_reports_its_flush(mount: Mounting, image: Path, flags: int) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    mounted = mount(failing("disk", file(image), event="flush_to_disk", once=True) | {"driver": "qcow2"})
    with opened(mounted / "disk", os.O_WRONLY | flags) as disk:
        with fails(errno.EIO):
            os.pwrite(disk, b"x", 0)
        assert os.pwrite(disk, b"x", 0) == 1
    mounted.umount()


# --- the length --------------------------------------------------------------------------------------------


def test_truncate_resizes_the_image(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    run("truncate", "--size=2M", mounted / "disk")
    assert ((mounted / "disk").stat().st_size, image.stat().st_size) == (2 << 20, 2 << 20)
    with opened(mounted / "disk", os.O_RDWR) as disk:
        assert os.pread(disk, 100, LENGTH) == bytes(100)
        assert os.pwrite(disk, b"end", (2 << 20) - 3) == 3
        os.ftruncate(disk, 4096)
        assert os.fstat(disk).st_size == 4096
        assert os.pread(disk, 8192, 0) == image.read_bytes()[:8192]
        with fails(errno.ENOSPC):
            os.pwrite(disk, b"x", 4096)
    assert image.stat().st_size == 4096
    mounted.umount()


def test_truncate_resizes_a_qcow2_image(mount: Mounting, scratch: Path) -> None:
    image = scratch / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    mounted = mount(qcow2("disk", image))
    run("truncate", "--size=8M", mounted / "disk")
    with opened(mounted / "disk", os.O_WRONLY) as disk:
        assert os.pwrite(disk, b"end", (8 << 20) - 3) == 3
    with fails(errno.EINVAL):  # no whole sectors
        os.truncate(mounted / "disk", 1000)
    mounted.umount()
    check_image(image)
    assert json.loads(run("qemu-img", "info", "--output=json", image))["virtual-size"] == 8 << 20


def test_a_node_that_has_a_fixed_length_keeps_it(mount: Mounting) -> None:
    mounted = mount(null("disk"))
    for length in (0, 512, 8192):
        with fails(errno.ENOTSUP):
            os.truncate(mounted / "disk", length)
    assert (mounted / "disk").stat().st_size == 4096
    mounted.umount()


def test_truncating_needs_a_writer(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    with opened(mounted / "disk", os.O_RDONLY) as disk, fails(errno.EINVAL):  # says the kernel
        os.ftruncate(disk, 0)
    assert image.stat().st_size == LENGTH
    mounted.umount()


def test_a_length_beyond_what_the_host_has_is_refused(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    with fails(errno.EFBIG):
        os.truncate(mounted / "disk", (1 << 63) - 1)
    assert (mounted / "disk").stat().st_size == LENGTH
    mounted.umount()


def test_a_resize_by_qmp_is_seen_at_once(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    with opened(mounted / "disk", os.O_RDWR) as disk:
        for length in (2 << 20, 4096, LENGTH):
            mounted.qmp("block_resize", {"node-name": "disk", "size": length})
            assert os.fstat(disk).st_size == length
            assert (mounted / "disk").stat().st_size == length
            assert os.lseek(disk, 0, os.SEEK_END) == length
            assert os.pread(disk, 4096, length) == b""
    mounted.umount()
