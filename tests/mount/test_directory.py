"""The mounted directory as programs see it: names, attributes, extended attributes, opening."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, check_image, qcow2, raw, run

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


# --- names -------------------------------------------------------------------------------------------


def test_the_directory_has_the_named_nodes(mount: Mounting, image: Path) -> None:
    disk = raw("disk", image)
    disk["file"]["node-name"] = "storage"
    mounted = mount(null("one"), disk, {"driver": "raw", "node-name": "two", "file": null("three")})
    names = run("ls", "-A", mounted.point).split()
    assert sorted(names) == ["disk", "one", "storage", "three", "two"]
    assert run("find", mounted.point, "-type", "f").split() != []
    mounted.umount()


def test_what_is_no_node_is_not_there(mount: Mounting) -> None:
    mounted = mount(null("disk"), {"driver": "raw", "node-name": "upper", "file": {"driver": "null-co"}})
    anonymous = [node["node-name"] for node in mounted.qmp("query-named-block-nodes") if "#" in node["node-name"]]
    assert len(anonymous) == 1
    for name in ("none", "Disk", "disk2", "#block000", anonymous[0], "x" * 255):
        with fails(errno.ENOENT):
            (mounted / name).stat()
    with fails(errno.ENOTDIR):
        (mounted / "disk" / "x").stat()
    mounted.umount()


def test_nodes_come_and_go(mount: Mounting) -> None:
    mounted = mount()
    assert os.listdir(mounted.point) == []
    for size in (512, 1024, 2048):
        with fails(errno.ENOENT):  # the kernel does not remember what there was, or was not
            (mounted / "disk").stat()
        mounted.qmp("blockdev-add", null("disk", size))
        assert os.listdir(mounted.point) == ["disk"]
        assert (mounted / "disk").stat().st_size == size
        assert (mounted / "disk").read_bytes() == bytes(size)
        mounted.qmp("blockdev-del", {"node-name": "disk"})
        assert os.listdir(mounted.point) == []
    mounted.umount()


def test_a_node_that_comes_again_is_another_file(mount: Mounting) -> None:
    mounted = mount(null("disk"))
    first = (mounted / "disk").stat().st_ino
    mounted.qmp("blockdev-del", {"node-name": "disk"})
    mounted.qmp("blockdev-add", null("disk"))
    assert (mounted / "disk").stat().st_ino != first
    mounted.umount()


def test_the_directory_changes_its_time_with_its_nodes(mount: Mounting) -> None:
    mounted = mount(null("disk"))
    before = mounted.point.stat().st_mtime_ns
    time.sleep(0.01)
    mounted.qmp("blockdev-add", null("more"))
    between = mounted.point.stat().st_mtime_ns
    time.sleep(0.01)
    mounted.qmp("blockdev-del", {"node-name": "more"})
    assert before < between < mounted.point.stat().st_mtime_ns
    mounted.umount()


def test_a_long_listing_is_complete(mount: Mounting) -> None:
    names = [f"node{number:027d}" for number in range(400)]
    mounted = mount()
    for name in names:
        mounted.qmp("blockdev-add", null(name))
    assert os.listdir(mounted.point) == names
    assert len(run("ls", "-l", mounted.point).splitlines()) == 401
    mounted.umount()


def test_a_listing_under_way_survives_nodes_that_go(mount: Mounting) -> None:
    names = [f"node{number:027d}" for number in range(400)]
    mounted = mount()
    for name in names:
        mounted.qmp("blockdev-add", null(name))
    with os.scandir(mounted.point) as entries:
        found = [next(entries).name]
        for name in names[:200]:
            mounted.qmp("blockdev-del", {"node-name": name})
        found += [entry.name for entry in entries]
    assert len(found) == len(set(found))
    assert set(names[200:]) <= set(found) <= set(names)
    mounted.umount()


@pytest.mark.parametrize(
    "change",
    [
        lambda point: os.open(point / "new", os.O_CREAT | os.O_WRONLY),
        lambda point: os.mknod(point / "new"),
        lambda point: os.mkdir(point / "new"),
        lambda point: os.symlink("disk", point / "new"),
        lambda point: os.link(point / "disk", point / "new"),
        lambda point: os.rename(point / "disk", point / "new"),
        lambda point: os.unlink(point / "disk"),
    ],
    ids=["create", "mknod", "mkdir", "symlink", "link", "rename", "unlink"],
)
def test_names_are_made_and_removed_by_qmp_alone(mount: Mounting, change: Callable[[Path], Any]) -> None:
    mounted = mount(null("disk"))
    with fails(errno.EPERM):
        change(mounted.point)
    assert os.listdir(mounted.point) == ["disk"]
    mounted.umount()


# --- attributes ----------------------------------------------------------------------------------------


def test_the_attributes_of_a_node(mount: Mounting, image: Path) -> None:
    os.truncate(image, 4 * LENGTH)
    now = time.time()
    mounted = mount(raw("disk", image))
    found = (mounted / "disk").stat()
    assert (stat.filemode(found.st_mode), found.st_nlink) == ("-rw-------", 1)
    assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())
    assert found.st_size == 4 * LENGTH
    assert found.st_blocks == image.stat().st_blocks
    assert found.st_blocks * 512 < 2 * LENGTH
    for moment in (found.st_atime, found.st_mtime, found.st_ctime):
        assert now - 60 < moment < now + 60
    mounted.umount()


def test_the_attributes_of_the_directory(mount: Mounting) -> None:
    mounted = mount(null("disk"))
    found = mounted.point.stat()
    assert (stat.filemode(found.st_mode), found.st_uid, found.st_gid) == ("drwx------", os.geteuid(), os.getegid())
    assert os.path.ismount(mounted.point)
    mounted.umount()


def test_allocated_clusters_count_as_blocks(mount: Mounting, scratch: Path) -> None:
    image = scratch / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
    mounted = mount(qcow2("disk", image))
    before = (mounted / "disk").stat().st_blocks
    run("dd", "if=/dev/urandom", f"of={mounted / 'disk'}", "bs=1M", "count=4", "status=none")
    assert 4 << 20 <= ((mounted / "disk").stat().st_blocks - before) * 512 < 8 << 20
    mounted.umount()


def test_writing_changes_the_time(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    before = (mounted / "disk").stat().st_mtime_ns
    time.sleep(0.01)
    with opened(mounted / "disk", os.O_WRONLY) as disk:
        os.pwrite(disk, b"x", 0)
    assert (mounted / "disk").stat().st_mtime_ns > before
    mounted.umount()


def test_times_can_be_set(mount: Mounting) -> None:
    mounted = mount(null("disk"))
    os.utime(mounted / "disk", ns=(10**18 + 1, 10**18 + 2))
    found = (mounted / "disk").stat()
    assert (found.st_atime_ns, found.st_mtime_ns) == (10**18 + 1, 10**18 + 2)
    run("touch", mounted / "disk")
    assert (mounted / "disk").stat().st_mtime > time.time() - 60
    mounted.umount()


def test_the_mode_says_what_can_be_done(mount: Mounting) -> None:
    mounted = mount(null("disk"), null("fixed", **{"read-only": True}))
    assert stat.filemode((mounted / "fixed").stat().st_mode) == "-r--------"
    for mode in (0o400, 0o000, 0o700, 0o600):
        (mounted / "disk").chmod(mode)
        assert stat.S_IMODE((mounted / "disk").stat().st_mode) == mode
    with fails(errno.EPERM):  # nobody else is let in
        (mounted / "disk").chmod(0o644)
    with fails(errno.EROFS):
        (mounted / "fixed").chmod(0o600)
    (mounted / "fixed").chmod(0o000)
    mounted.umount()


def test_the_owner_stays_where_nobody_else_is_let_in(mount: Mounting) -> None:
    mounted = mount(null("disk"))
    with fails(errno.EPERM):
        os.chown(mounted / "disk", 65534, 65534)
    mounted.umount()


def test_the_file_system_is_full_and_as_large_as_its_nodes(mount: Mounting) -> None:
    mounted = mount(null("one", 5 * 4096), null("two", 4097))
    found = os.statvfs(mounted.point)
    assert (found.f_bsize, found.f_frsize, found.f_namemax) == (4096, 4096, 31)
    assert (found.f_blocks, found.f_bfree, found.f_bavail) == (5 + 2, 0, 0)
    assert (found.f_files, found.f_ffree) == (2, 0)
    assert run("df", "--output=fstype,pcent", mounted.point).split()[-2:] == ["fuse.fusebd", "100%"]
    mounted.umount()


# --- extended attributes -------------------------------------------------------------------------------


def test_extended_attributes_tell_what_a_node_is(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image, offset=512, **{"read-only": True}))
    found = {name: os.getxattr(mounted / "disk", name).decode() for name in os.listxattr(mounted / "disk")}
    details = json.loads(found.pop("user.fusebd.details"))
    assert found == {"user.fusebd.cache": "direct", "user.fusebd.driver": "raw", "user.fusebd.node-name": "disk"}
    assert (details["driver"], details["node-name"], details["length"]) == ("raw", "disk", LENGTH - 512)
    assert details["read-only"] is True
    assert details["options"]["file"] == {"driver": "file", "filename": str(image)}
    assert set(details["children"]) == {"file"}
    mounted.umount()


def test_getfattr_shows_them(mount: Mounting) -> None:
    mounted = mount(null("disk"))
    text = run("getfattr", "--absolute-names", "--dump", mounted / "disk")
    assert 'user.fusebd.driver="null-co"\n' in text
    assert f'user.fusebd.pid="{mounted.pid}"\n' in run("getfattr", "--absolute-names", "--dump", mounted.point)
    mounted.umount()


def test_extended_attributes_cannot_be_changed(mount: Mounting) -> None:
    mounted = mount(null("disk"))
    for path in (mounted / "disk", mounted.point):
        with fails(errno.ENOTSUP):
            os.setxattr(path, "user.something", b"x")
        with fails(errno.ENOTSUP):
            os.setxattr(path, "user.fusebd.driver", b"x")
        with fails(errno.ENOTSUP):
            os.removexattr(path, "user.fusebd.driver")
        with fails(errno.ENODATA):
            os.getxattr(path, "user.something")
        with fails(errno.ENODATA):
            os.getxattr(path, "security.capability")
    mounted.umount()


# --- opening -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND])
def test_a_read_only_node_is_not_opened_for_writing(mount: Mounting, image: Path, flags: int) -> None:
    mounted = mount(raw("disk", image, **{"read-only": True}))
    with fails(errno.EROFS):
        os.open(mounted / "disk", flags)
    with opened(mounted / "disk", os.O_RDONLY) as disk:
        assert os.pread(disk, LENGTH, 0) == image.read_bytes()
        with fails(errno.EBADF):
            os.pwrite(disk, b"x", 0)
    with fails(errno.EROFS):
        os.truncate(mounted / "disk", 0)
    assert "Read-only file system" in run("dd", "if=/dev/zero", f"of={mounted / 'disk'}", "count=1", expect=[1])
    mounted.umount()


def test_a_node_below_a_format_is_busy_for_writers(mount: Mounting, scratch: Path) -> None:
    image = scratch / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    disk = qcow2("disk", image)
    disk["file"]["node-name"] = "storage"
    mounted = mount(disk)
    with fails(errno.EBUSY):
        os.open(mounted / "storage", os.O_RDWR)
    with fails(errno.EBUSY):
        os.truncate(mounted / "storage", 0)
    assert (mounted / "storage").read_bytes()[:4] == b"QFI\xfb"
    mounted.umount()
    check_image(image)


def test_a_node_that_is_open_for_writing_is_not_put_below_a_format(mount: Mounting, scratch: Path) -> None:
    image = scratch / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    mounted = mount({"driver": "file", "node-name": "storage", "filename": str(image)})
    request = {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "disk", "file": "storage"}}
    with opened(mounted / "storage", os.O_RDWR):
        answer = mounted.qmp.ask(request)
        assert answer["error"]["desc"].startswith(
            "Permission conflict on node 'storage': permissions 'write' are both "
        )
    with opened(mounted / "storage", os.O_RDONLY):
        assert mounted.qmp.ask(request) == {"return": {}}
    mounted.umount()


def test_a_node_can_be_open_several_times(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    with opened(mounted / "disk", os.O_RDWR) as one, opened(mounted / "disk", os.O_RDWR) as two:
        os.pwrite(one, b"one", 0)
        os.pwrite(two, b"two", 100)
        assert (os.pread(two, 3, 0), os.pread(one, 3, 100)) == (b"one", b"two")
    mounted.umount()


def test_truncating_at_the_opening_changes_nothing_as_on_a_disk(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    before = image.read_bytes()
    with opened(mounted / "disk", os.O_RDWR | os.O_TRUNC) as disk:
        assert os.fstat(disk).st_size == LENGTH
    run("dd", "if=/dev/zero", f"of={mounted / 'disk'}", "bs=4k", "count=1", "status=none")
    run("sh", "-c", f"printf xyz > {mounted / 'disk'}")
    assert image.read_bytes() == b"xyz" + bytes(4093) + before[4096:]
    mounted.umount()


def test_the_directory_is_not_opened_as_a_file(mount: Mounting) -> None:
    mounted = mount(null("disk"))
    with fails(errno.EISDIR):
        os.open(mounted.point, os.O_RDWR)
    with fails(errno.ENOTDIR):
        os.listdir(mounted / "disk")
    mounted.umount()


def test_an_open_file_keeps_its_node(mount: Mounting) -> None:
    mounted = mount(null("disk"))
    with opened(mounted / "disk", os.O_RDONLY) as disk:
        answer = mounted.qmp.ask({"execute": "blockdev-del", "arguments": {"node-name": "disk"}})
        assert answer["error"]["desc"] == "Node disk is in use"
        assert os.pread(disk, 4096, 0) == bytes(4096)
    mounted.qmp("blockdev-del", {"node-name": "disk"})
    mounted.umount()


def test_a_read_only_mount_refuses_every_write(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image), options=["--read-only"])
    assert stat.filemode(mounted.point.stat().st_mode) == "dr-x------"
    assert stat.filemode((mounted / "disk").stat().st_mode) == "-r--------"
    for change in (
        lambda: os.open(mounted / "disk", os.O_RDWR),
        lambda: os.truncate(mounted / "disk", 0),
        lambda: (mounted / "disk").chmod(0o600),
        lambda: os.utime(mounted / "disk"),
        lambda: os.mkdir(mounted / "x"),
    ):
        with fails(errno.EROFS):
            change()
    assert (mounted / "disk").read_bytes() == image.read_bytes()
    mounted.umount()
