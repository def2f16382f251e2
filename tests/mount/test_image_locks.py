"""Image locks: a mount and QEMU's programs keep out of each other's way, with the same locks and the same words."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, Qmp, fusebd, qcow2, raw, run, sweep
from qemuprograms import held_by_qemu_io, storage_daemon

Json = Any
MIB = 1 << 20


def make_images(directory: Path) -> None:
    """A raw image, a qcow2 image and an overlay of it."""
    (directory / "raw").write_bytes(b"data" * (MIB // 4))
    run("qemu-img", "create", "-q", "-f", "qcow2", directory / "qcow2", "1M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "qcow2", directory / "overlay")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    make_images(tmp_path)
    return tmp_path


def file(path: Path, **more: Json) -> Json:
    return {"driver": "file", "node-name": "disk", "filename": str(path), **more}


def qemu_io(*words: str | Path) -> str:
    """What qemu-io says, whether it succeeds or not."""
    return run("qemu-io", *words, expect=(0, 1))


def locked(path: Path) -> set[int]:
    """The bytes of *path* on which anybody holds an open file description lock."""
    inode = path.stat().st_ino
    found = set()
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] == "OFDLCK" and words[5].rpartition(":")[2] == str(inode):
            assert words[3] == "READ"
            found |= set(range(int(words[6]), int(words[7]) + 1))
    return found


# --- the same locks ------------------------------------------------------------------------------


class Both:
    """The monitors of a qemu-storage-daemon and of a mount, and the directory of the images for both."""

    def __init__(self, qemu: Qmp, mount: Qmp, images: Path) -> None:
        self.qemu, self.mount, self.images = qemu, mount, images


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs root and /dev/fuse")
    images, directory = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("mount")
    make_images(images)
    with pytest.MonkeyPatch.context() as patch, storage_daemon() as qemu:
        patch.setenv("FUSEBD_RUNTIME_DIR", str(directory / "run"))
        mount = Mount(directory / "mnt", "devfuse", [])
        try:
            yield Both(qemu, mount.qmp, images)
            mount.umount()
        finally:
            sweep(directory)


RAW, QCOW2 = {"driver": "file", "filename": "DIR/raw"}, {"driver": "file", "filename": "DIR/qcow2"}
OVERLAY = {"driver": "qcow2", "file": {"driver": "file", "filename": "DIR/overlay"}}


def blkdebug(take: str = "", unshare: str = "") -> Json:
    return {
        "driver": "blkdebug",
        "image": RAW,
        "take-child-perms": take.split(),
        "unshare-child-perms": unshare.split(),
    }


STACKS: dict[str, Json] = {
    "file": RAW,
    "raw": {"driver": "raw", "file": RAW},
    "raw window": {"driver": "raw", "size": 512, "file": RAW},
    "qcow2": {"driver": "qcow2", "file": QCOW2},
    "read-only qcow2": {"driver": "qcow2", "read-only": True, "file": QCOW2},
    "shared qcow2": {"driver": "qcow2", "read-only": True, "force-share": True, "file": QCOW2},
    "qcow2 without locks": {"driver": "qcow2", "file": {**QCOW2, "locking": "off"}},
    "overlay": OVERLAY,
    "blkdebug": {"driver": "blkdebug", "image": RAW},
    "blkdebug that takes": blkdebug("write resize"),
    "blkdebug that keeps": blkdebug("", "consistent-read write"),
    "blkdebug that takes and keeps all": blkdebug(*["consistent-read write write-unchanged resize"] * 2),
    "qcow2 over blkdebug": {"driver": "qcow2", "file": {"driver": "blkdebug", "image": QCOW2}},
    "blkverify": {"driver": "blkverify", "raw": RAW, "test": {"driver": "qcow2", "file": QCOW2}},
}


@pytest.mark.parametrize("name", STACKS)
def test_an_idle_node_holds_the_locks_that_qemu_holds(both: Both, name: str) -> None:
    node = {"node-name": "disk", **json.loads(json.dumps(STACKS[name]).replace("DIR", str(both.images)))}
    node = {key: value for key, value in node.items() if value != []}
    paths = [both.images / image for image in ("raw", "qcow2", "overlay")]
    found = []
    for monitor in (both.qemu, both.mount):
        monitor("blockdev-add", node)
        found.append([sorted(locked(path)) for path in paths])
        monitor("blockdev-del", {"node-name": "disk"})
        assert [locked(path) for path in paths] == [set(), set(), set()]
    assert found[1] == found[0]


# 100 + n: taken, 200 + n: not shared; 0 consistent read, 1 write, 2 write unchanged, 3 resize
def test_a_node_file_takes_what_it_needs_while_it_is_open(mount: Callable[..., Mount], images: Path) -> None:
    mounted = mount(file(images / "raw"))
    assert locked(images / "raw") == set()
    with open(mounted / "disk", "rb"):
        assert locked(images / "raw") == {100}
        with open(mounted / "disk", "r+b"):
            assert locked(images / "raw") == {100, 101}
    mounted.umount()
    assert locked(images / "raw") == set()


# --- QEMU first ----------------------------------------------------------------------------------

HELD = 'Failed to get "write" lock'


def refused(*blockdevs: Json, point: Path) -> str:
    """The line with which ``fusebd mount`` ends."""
    point.mkdir(exist_ok=True)
    words = [word for blockdev in blockdevs for word in ("--blockdev", json.dumps(blockdev))]
    return fusebd("mount", *words, point, expect=(1,)).strip()


@pytest.mark.usefixtures("scratch")
def test_an_image_that_a_storage_daemon_holds_is_not_mounted(images: Path) -> None:
    with storage_daemon() as monitor:
        monitor("blockdev-add", qcow2("theirs", images / "qcow2"))
        said = refused(qcow2("disk", images / "qcow2"), point=images / "mnt")
    assert said.endswith(f"{HELD} (Is another process using the image [{images}/qcow2]?)")
    assert not os.path.ismount(images / "mnt")


@pytest.mark.usefixtures("scratch")
def test_an_image_that_qemu_io_holds_is_not_mounted(images: Path) -> None:
    with held_by_qemu_io("-f", "qcow2", images / "qcow2"):
        said = refused(qcow2("disk", images / "qcow2"), point=images / "mnt")
    assert said.endswith(f"{HELD} (Is another process using the image [{images}/qcow2]?)")


def test_a_node_of_a_held_image_is_refused_and_leaves_nothing(mount: Callable[..., Mount], images: Path) -> None:
    mounted = mount()
    options = qcow2("disk", images / "qcow2")
    options["file"]["node-name"] = "inner"
    with held_by_qemu_io("-f", "qcow2", images / "qcow2"):
        theirs = locked(images / "qcow2")
        answer = mounted.qmp.ask({"execute": "blockdev-add", "arguments": options})
        # the hint is for people
        assert answer["error"] == {"class": "GenericError", "desc": HELD}
        assert mounted.qmp("query-named-block-nodes") == []
        assert locked(images / "qcow2") == theirs
    mounted.qmp("blockdev-add", options)
    mounted.umount()


def test_reading_beside_a_writer_is_refused_too(mount: Callable[..., Mount], images: Path) -> None:
    mounted = mount()
    with held_by_qemu_io("-f", "qcow2", images / "qcow2"):
        answer = mounted.qmp.ask(
            {"execute": "blockdev-add", "arguments": qcow2("disk", images / "qcow2", **{"read-only": True})}
        )
        assert answer["error"]["desc"] == 'Failed to get shared "write" lock'
    mounted.umount()


def test_readers_share_an_image(mount: Callable[..., Mount], images: Path) -> None:
    read_only = {"read-only": True}
    with held_by_qemu_io("-r", "-f", "qcow2", images / "qcow2"), storage_daemon() as monitor:
        monitor("blockdev-add", qcow2("theirs", images / "qcow2", **read_only))
        mounted = mount(qcow2("disk", images / "qcow2", **read_only))
        assert (mounted / "disk").read_bytes() == bytes(MIB)
        mounted.umount()


@pytest.mark.parametrize(
    "options", [{"read-only": True, "force-share": True}, {"read-only": True, "locking": "off"}], ids=str
)
def test_a_held_image_can_be_read_if_one_insists(
    mount: Callable[..., Mount], images: Path, options: dict[str, Json]
) -> None:
    with held_by_qemu_io("-f", "raw", images / "raw"):
        mounted = mount(file(images / "raw", **options))
        assert (mounted / "disk").read_bytes() == (images / "raw").read_bytes()
        mounted.umount()


def test_a_file_that_is_held_shows_it_when_it_is_opened(mount: Callable[..., Mount], images: Path) -> None:
    # the node itself takes nothing; who opens its file for writing does
    mounted = mount(file(images / "raw"))
    image = {"driver": "file", "filename": str(images / "raw")}
    with storage_daemon() as monitor:
        monitor(
            "blockdev-add",
            {"driver": "blkdebug", "node-name": "n", "image": image, "unshare-child-perms": ["write"]},
        )
        os.close(os.open(mounted / "disk", os.O_RDONLY))
        with pytest.raises(OSError, match="Device or resource busy"):
            os.open(mounted / "disk", os.O_RDWR)
    os.close(os.open(mounted / "disk", os.O_RDWR))
    mounted.umount()


# --- a mount first -------------------------------------------------------------------------------


def test_an_image_that_is_mounted_is_refused_to_qemu(mount: Callable[..., Mount], images: Path) -> None:
    image = images / "qcow2"
    mounted = mount(qcow2("disk", image))
    hint = f"Is another process using the image [{image}]?"
    for words, lock in (((), HELD), (("-r",), 'Failed to get shared "write" lock')):
        said = qemu_io(*words, "-f", "qcow2", "-c", "read 0 512", image)
        assert lock in said
        assert hint in said
    with storage_daemon() as monitor:
        answer = monitor.ask({"execute": "blockdev-add", "arguments": qcow2("theirs", image)})
        assert answer["error"]["desc"] == HELD
    # -U is force-share
    assert "read 512/512" in qemu_io("-r", "-U", "-f", "qcow2", "-c", "read 0 512", image)
    mounted.umount()
    assert "wrote 512/512" in qemu_io("-f", "qcow2", "-c", "write 0 512", image)


def test_a_second_mount_of_an_image_is_refused_and_a_second_reader_is_not(
    mount: Callable[..., Mount], images: Path
) -> None:
    writer = mount(qcow2("disk", images / "qcow2"))
    said = refused(qcow2("disk", images / "qcow2"), point=images / "second")
    assert said.endswith(f"{HELD} (Is another process using the image [{images}/qcow2]?)")
    writer.umount()
    readers = [mount(qcow2("disk", images / "qcow2", **{"read-only": True}), name=name) for name in ("a", "b")]
    for reader in readers:
        reader.umount()


def test_the_backing_file_of_a_mounted_overlay_may_be_read_but_not_written(
    mount: Callable[..., Mount], images: Path
) -> None:
    mounted = mount(qcow2("disk", images / "overlay"))
    assert "read 512/512" in qemu_io("-r", "-f", "qcow2", "-c", "read 0 512", images / "qcow2")
    assert HELD in qemu_io("-f", "qcow2", "-c", "write 0 512", images / "qcow2")
    mounted.umount()


def test_an_image_with_locking_off_is_nobodys(mount: Callable[..., Mount], images: Path) -> None:
    options = qcow2("disk", images / "qcow2")
    options["file"]["locking"] = "off"
    mounted = mount(options)
    assert locked(images / "qcow2") == set()
    assert "read 512/512" in qemu_io("-f", "qcow2", "-r", "-c", "read 0 512", images / "qcow2")
    mounted.umount()


@pytest.mark.parametrize(
    ("unshared", "words", "lock"),
    [
        ("write", (), 'Failed to get "write" lock'),
        ("consistent-read", ("-r",), 'Failed to get "consistent read" lock'),
        ("consistent-read", ("-r", "-U"), 'Failed to get "consistent read" lock'),
        ("resize", ("-r",), None),
    ],
)
def test_what_blkdebug_does_not_share_nobody_else_gets(
    mount: Callable[..., Mount], images: Path, unshared: str, words: tuple[str, ...], lock: str | None
) -> None:
    image = {"driver": "file", "filename": str(images / "raw")}
    mounted = mount({"driver": "blkdebug", "node-name": "disk", "image": image, "unshare-child-perms": [unshared]})
    said = qemu_io(*words, "-f", "raw", "-c", "read 0 512", images / "raw")
    assert (lock or "read 512/512") in said
    mounted.umount()


def test_what_blkdebug_takes_must_be_shared_by_others(mount: Callable[..., Mount], images: Path) -> None:
    image = {"driver": "file", "filename": str(images / "qcow2")}
    mounted = mount({"driver": "blkdebug", "node-name": "disk", "image": image, "take-child-perms": ["write"]})
    # a format does not share writing
    assert 'Failed to get shared "write" lock' in qemu_io("-f", "qcow2", "-r", "-c", "read 0 512", images / "qcow2")
    mounted.umount()


def test_a_killed_daemon_holds_no_locks(mount: Callable[..., Mount], images: Path) -> None:
    mounted = mount(qcow2("disk", images / "qcow2"))
    assert locked(images / "qcow2")
    mounted.kill()
    assert locked(images / "qcow2") == set()
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 512", images / "qcow2"], check=True, capture_output=True)


def test_a_node_that_is_removed_holds_no_locks(mount: Callable[..., Mount], images: Path) -> None:
    mounted = mount(qcow2("disk", images / "qcow2"), raw("other", images / "raw"))
    mounted.qmp("blockdev-del", {"node-name": "disk"})
    assert locked(images / "qcow2") == set()
    assert "wrote 512/512" in qemu_io("-f", "qcow2", "-c", "write 0 512", images / "qcow2")
    mounted.umount()
