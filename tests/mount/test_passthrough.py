"""Passthrough: the kernel reads and writes the host's file below a node by itself, where nothing else is in the way."""

from __future__ import annotations

import errno
import mmap
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, loop_device, qcow2, raw, refusal, run

from fusebd.drivers.file.syscalls import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate

LENGTH = 1 << 20
Mounting = Callable[..., Mount]

pytestmark = pytest.mark.parametrize("transport", ["devfuse"])


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


@pytest.fixture
def image(scratch: Path) -> Path:
    path = scratch / "disk.raw"
    path.write_bytes(b"".join(number.to_bytes(4, "big") * 128 for number in range(LENGTH // 512)))
    return path


def file(name: str, path: Path, **options: Any) -> dict[str, Any]:
    return {"driver": "file", "node-name": name, "filename": str(path), **options}


def passed(mount: Mounting, *nodes: Any, options: tuple[str, ...] = ()) -> Mount:
    """A mount in which the node ``disk`` is passed through."""
    return mount(*nodes, options=["--cache", "disk=passthrough", *options])


def counted(mounted: Mount) -> list[int]:
    """The reads and writes that any node has counted."""
    stats = [entry["stats"] for entry in mounted.qmp("query-blockstats", {"query-nodes": True})]
    return [entry[name] for entry in stats for name in ("rd_operations", "wr_operations", "rd_bytes", "wr_bytes")]


def mode(mounted: Mount) -> str:
    return os.getxattr(mounted / "disk", "user.fusebd.cache").decode()


def closed(mounted: Mount) -> None:
    """Wait until the daemon has heard that no file is open any more, which close(2) does not wait for."""
    while any(entry["open-files"] for entry in mounted.qmp("query-fuse-files")):
        time.sleep(0.01)


def complaint(mounted: Mount, command: str, arguments: Any) -> str:
    """The description of the error with which *command* is refused."""
    text: str = mounted.qmp.ask({"execute": command, "arguments": arguments})["error"]["desc"]
    return text


# --- reading and writing ---------------------------------------------------------------------------


@pytest.mark.parametrize("node", [file, raw], ids=["file", "raw"])
def test_data_goes_past_every_node(mount: Mounting, image: Path, node: Callable[..., Any]) -> None:
    mounted = passed(mount, node("disk", image))
    before = counted(mounted)
    assert (mounted / "disk").read_bytes() == image.read_bytes()
    with opened(mounted / "disk", os.O_RDWR) as disk, opened(mounted / "disk", os.O_RDONLY) as reader:
        assert os.pwrite(disk, b"through", 1000) == 7
        assert os.pread(reader, 9, 999) == b"\1through\1"
        assert image.read_bytes()[999:1008] == b"\1through\1"
        mapped = mmap.mmap(disk, LENGTH)
        mapped[5000:5006] = b"mapped"
        assert os.pread(reader, 6, 5000) == b"mapped"
        os.pwrite(disk, b"written", 6000)
        assert mapped[6000:6007] == b"written"
        mapped.close()
        os.fsync(disk)
    assert counted(mounted) == before
    mounted.umount()
    assert image.read_bytes()[6000:6007] == b"written"


def test_a_read_only_node_is_passed_through_to_readers_alone(mount: Mounting, image: Path) -> None:
    mounted = passed(mount, raw("disk", image, **{"read-only": True}))
    before = counted(mounted)
    assert (mounted / "disk").read_bytes() == image.read_bytes()
    assert counted(mounted) == before
    with fails(errno.EROFS):
        os.open(mounted / "disk", os.O_RDWR)
    mounted.umount()


def test_a_writer_is_shown_the_length_and_time_of_what_it_writes(mount: Mounting, image: Path) -> None:
    mounted = passed(mount, raw("disk", image))
    with opened(mounted / "disk", os.O_RDWR) as disk:
        before = os.fstat(disk).st_mtime_ns
        time.sleep(0.02)
        os.pwrite(disk, b"x", 0)
        assert os.fstat(disk).st_mtime_ns > before
        os.pwrite(disk, b"past the end", LENGTH)  # the kernel asks nobody
        assert os.fstat(disk).st_size == LENGTH + 12
    closed(mounted)
    (node,) = (node for node in mounted.qmp("query-named-block-nodes") if node["node-name"] == "disk")
    assert node["image"]["virtual-size"] == LENGTH + 512
    mounted.umount()
    assert image.stat().st_size == LENGTH + 12


def test_the_length_can_be_changed(mount: Mounting, image: Path) -> None:
    mounted = passed(mount, raw("disk", image))
    with opened(mounted / "disk", os.O_RDWR) as disk:
        for length in (LENGTH * 2, 1000, LENGTH):
            os.ftruncate(disk, length)
            assert (os.fstat(disk).st_size, image.stat().st_size) == (length, length)
        for length in (LENGTH * 2, 1000, LENGTH):
            mounted.qmp("block_resize", {"node-name": "disk", "size": length})
            assert os.fstat(disk).st_size == length
            assert len(os.pread(disk, 4 * LENGTH, 0)) == length
        with opened(mounted / "disk", os.O_RDWR | os.O_TRUNC):
            assert os.fstat(disk).st_size == LENGTH
    mounted.umount()


def test_holes_are_punched_and_found(mount: Mounting, image: Path) -> None:
    mounted = passed(mount, raw("disk", image, discard="unmap"))
    with opened(mounted / "disk", os.O_RDWR) as disk:
        fallocate(disk, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 65536, 65536)
        assert os.pread(disk, 65536, 65536) == bytes(65536)
        assert os.lseek(disk, 0, os.SEEK_HOLE) == 65536
        assert os.lseek(disk, 65536, os.SEEK_DATA) == 131072
    mounted.umount()


def test_what_is_passed_through_is_seen_by_who_keeps_pages_of_another_node_after_fsync_and_close(
    mount: Mounting, image: Path
) -> None:
    upper = {"driver": "raw", "node-name": "upper", "file": "disk"}
    mounted = passed(mount, raw("disk", image), upper, options=("--cache", "upper=page"))
    with opened(mounted / "upper", os.O_RDONLY) as reader:
        assert os.pread(reader, 4, 0) == bytes(4)
        with opened(mounted / "disk", os.O_RDWR) as disk:
            os.pwrite(disk, b"sync", 0)
            os.fsync(disk)
            assert os.pread(reader, 4, 0) == b"sync"
            os.pwrite(disk, b"shut", 0)
        assert os.pread(reader, 4, 0) == b"shut"
    mounted.umount()


# --- where it cannot be ----------------------------------------------------------------------------


def blkdebug(path: Path) -> dict[str, Any]:
    return {"driver": "raw", "node-name": "disk", "file": {"driver": "blkdebug", "image": file("f", path)}}


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (lambda path: qcow2("disk", path.with_suffix(".qcow2")), "driver 'qcow2' is in the way"),
        (blkdebug, "driver 'blkdebug' is in the way"),
        (lambda path: {"driver": "null-co", "node-name": "disk"}, "driver 'null-co' is in the way"),
        (lambda path: raw("disk", path, offset=512), "raw has an offset or a size"),
        (lambda path: raw("disk", path, size=512), "raw has an offset or a size"),
        (lambda path: raw("disk", path, **{"detect-zeroes": "on"}), "detect-zeroes is 'on'"),
        (
            lambda path: {"driver": "raw", "node-name": "disk", "file": file("f", path, **{"detect-zeroes": "on"})},
            "detect-zeroes is 'on'",
        ),
        (lambda path: file("disk", path, cache={"direct": True}), "cache.direct is on"),
    ],
)
def test_what_is_not_plain_is_not_passed_through(
    mount: Mounting, image: Path, node: Callable[[Path], Any], reason: str
) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", image.with_suffix(".qcow2"), "1M")
    mounted = mount(node(image))
    text = f"Node 'disk' cannot have cache mode 'passthrough': {reason}"
    assert complaint(mounted, "fuse-set-cache", {"node-name": "disk", "cache": "passthrough"}) == text
    assert mode(mounted) == "direct"
    mounted.umount()


def test_a_mount_that_would_have_to_is_refused(scratch: Path, transport: str) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", scratch / "disk.qcow2", "1M")
    (scratch / "mnt").mkdir()
    words: list[str | Path] = [
        "mount", "--transport", transport, "--cache", "disk=passthrough",
        "--blockdev", f"qcow2,node-name=disk,file.driver=file,file.filename={scratch}/disk.qcow2", scratch / "mnt",
    ]  # fmt: skip
    assert refusal(*words) == (
        f"{scratch}/mnt: Node 'disk' cannot have cache mode 'passthrough': driver 'qcow2' is in the way"
    )
    assert not os.path.ismount(scratch / "mnt")


def test_a_device_is_not_passed_through(mount: Mounting, image: Path) -> None:
    with loop_device(image) as device:
        mounted = mount({"driver": "host_device", "node-name": "disk", "filename": device})
        assert complaint(mounted, "fuse-set-cache", {"node-name": "disk", "cache": "passthrough"}) == (
            "Node 'disk' cannot have cache mode 'passthrough': the kernel passes through to regular files only"
        )
        mounted.umount()


def test_pyfuse3_cannot_do_it(scratch: Path, image: Path, transport: str) -> None:
    (scratch / "mnt").mkdir()
    words: list[str | Path] = [
        "--cache",
        "disk=passthrough",
        "--blockdev",
        f"file,node-name=disk,filename={image}",
        scratch / "mnt",
    ]
    assert refusal("mount", "--transport", "pyfuse3", *words) == (
        f"{scratch}/mnt: Node 'disk' cannot have cache mode 'passthrough': it takes the devfuse transport"
    )


def test_a_mount_that_writes_back_cannot_do_it(scratch: Path, image: Path, transport: str) -> None:
    (scratch / "mnt").mkdir()
    words: list[str | Path] = ["--cache", "disk=passthrough", "--cache", "other=writeback", scratch / "mnt"]
    assert refusal("mount", "--transport", transport, *words) == (
        f"{scratch}/mnt: Node 'disk' cannot have cache mode 'passthrough': in one mount, "
        "the kernel has this or 'writeback'"
    )


def test_a_file_of_a_file_system_that_is_stacked_itself_is_refused_by_the_kernel(
    mount: Mounting, image: Path, scratch: Path, transport: str
) -> None:
    first = passed(mount, raw("disk", image))
    again = Mount(scratch / "again", transport, [raw("disk", first / "disk")])
    try:
        asked = {"node-name": "disk", "cache": "passthrough"}
        text = "Node 'disk' cannot have cache mode 'passthrough': the kernel refuses it: "
        assert complaint(again, "fuse-set-cache", asked).startswith(text)
        again.umount()
    finally:
        again.sweep()
    first.umount()


def test_users_other_than_root_cannot_do_it(transport: str) -> None:
    helper = shutil.which("fusermount3")
    if os.geteuid() != 0 or helper is None or not os.stat(helper).st_mode & stat.S_ISUID:
        pytest.skip("needs root, and fusermount3 for users")
    top = Path("/tmp") / f"fusebd-passthrough-{os.getpid()}"
    for path in (top, top / "mnt"):
        path.mkdir()
        shutil.chown(path, "nobody")
    program = (
        "import os, sys; from fusebd.cli import main; import fusebd.run, fusebd.serve, fusebd.drivers.file; "
        "from fusebd.fuse import devfuse; os.setgroups([]); "
        f"os.setgid({pwd.getpwnam('nobody').pw_gid}); os.setuid({pwd.getpwnam('nobody').pw_uid}); "
        "sys.exit(main(sys.argv[1:]))"
    )
    node = f"file,node-name=disk,filename={top}/disk"
    (top / "disk").write_bytes(bytes(4096))
    shutil.chown(top / "disk", "nobody")
    words = ["mount", "--transport", "devfuse", "--cache", "disk=passthrough", "--blockdev", node, str(top / "mnt")]
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            env={**os.environ, "FUSEBD_RUNTIME_DIR": str(top / "run")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == (
            f"fusebd: {top}/mnt: Node 'disk' cannot have cache mode 'passthrough': "
            "the kernel refuses it: Operation not permitted (it takes root)\n"
        )
    finally:
        run("umount", "-l", top / "mnt", expect=(0, 1, 32))
        shutil.rmtree(top)


# --- while the file is open ------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["direct", "page"])
def test_open_files_are_passed_through_all_or_none(mount: Mounting, image: Path, other: str) -> None:
    mounted = passed(mount, raw("disk", image))
    reason = "it is open, and the kernel passes through all of its open files or none"
    for mine, wanted in (("passthrough", other), (other, "passthrough")):
        assert mode(mounted) == mine
        asked = {"node-name": "disk", "cache": wanted}
        with opened(mounted / "disk", os.O_RDWR) as disk:
            text = f"Node 'disk' cannot have cache mode '{wanted}': {reason}"
            assert complaint(mounted, "fuse-set-cache", asked) == text
            os.pwrite(disk, mine.encode(), 0)
            with opened(mounted / "disk", os.O_RDWR) as again:
                assert os.pread(again, len(mine), 0) == mine.encode()
        closed(mounted)
        mounted.qmp("fuse-set-cache", asked)
    mounted.umount()


def test_a_filter_is_not_inserted_below_an_open_file_that_is_passed_through(mount: Mounting, image: Path) -> None:
    mounted = passed(mount, raw("disk", image))
    insertion = {"node-name": "disk", "filter": {"driver": "blkdebug", "node-name": "debug"}}
    with opened(mounted / "disk", os.O_RDONLY):
        assert complaint(mounted, "block-filter-insert", insertion) == (
            "Node 'disk' is open, and the kernel passes it through to a file below, "
            "and does not let go of that before it is closed"
        )
        assert "debug" not in [node["node-name"] for node in mounted.qmp("query-named-block-nodes")]
    mounted.umount()


def test_a_filter_that_is_inserted_takes_it_back_as_long_as_it_is_there(mount: Mounting, image: Path) -> None:
    mounted = passed(mount, raw("disk", image))
    with opened(mounted / "disk", os.O_RDONLY) as disk:
        assert os.pread(disk, 4, 0) == bytes(4)
    closed(mounted)
    rule = {"event": "none", "iotype": "read", "errno": 5}
    debug = {"driver": "blkdebug", "node-name": "debug", "inject-error": [rule]}
    mounted.qmp("block-filter-insert", {"node-name": "disk", "filter": debug})
    assert mode(mounted) == "direct"
    (entry,) = (entry for entry in mounted.qmp("query-fuse-files") if entry["node-name"] == "disk")
    assert (entry["cache"], entry["wanted-cache"]) == ("direct", "passthrough")
    with opened(mounted / "disk", os.O_RDONLY) as disk, fails(errno.EIO):
        os.pread(disk, 4, 0)
    closed(mounted)
    mounted.qmp("block-filter-remove", {"node-name": "debug"})
    assert mode(mounted) == "passthrough"
    before = counted(mounted)
    with opened(mounted / "disk", os.O_RDONLY) as disk:
        assert os.pread(disk, 4, 0) == bytes(4)
    assert counted(mounted) == before
    mounted.umount()
    assert mounted.log.read_text().count("disk is not passed through: driver 'blkdebug' is in the way") == 1


def test_what_was_opened_below_a_filter_keeps_later_openings_from_being_passed_through(
    mount: Mounting, image: Path
) -> None:
    mounted = passed(mount, raw("disk", image))
    mounted.qmp("block-filter-insert", {"node-name": "disk", "filter": {"driver": "blkdebug", "node-name": "debug"}})
    with opened(mounted / "disk", os.O_RDWR) as before:
        mapped = mmap.mmap(before, LENGTH)  # with this, the kernel would not have another one passed through
        mounted.qmp("block-filter-remove", {"node-name": "debug"})
        assert mode(mounted) == "direct"
        with opened(mounted / "disk", os.O_RDWR) as after:
            os.pwrite(after, b"both", 0)
            assert mapped[:4] == os.pread(before, 4, 0) == b"both"
        mapped.close()
    closed(mounted)
    assert mode(mounted) == "passthrough"
    mounted.umount()


def test_a_node_that_comes_later_and_is_not_plain_is_served_all_the_same(mount: Mounting, image: Path) -> None:
    mounted = passed(mount)
    mounted.qmp("blockdev-add", raw("disk", image, offset=512))
    assert mode(mounted) == "direct"
    assert (mounted / "disk").read_bytes() == image.read_bytes()[512:]
    mounted.umount()
    assert "disk is not passed through: raw has an offset or a size" in mounted.log.read_text()
