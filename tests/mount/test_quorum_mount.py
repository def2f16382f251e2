"""Quorums through a mount: images that somebody damaged, file systems over children that fail, changes while in use.

qemu-io damages, cmp and qemu-img judge; where QEMU's own quorum can do the same, it is given copies of the images.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, check_image, file_system, fusebd, loop_device, run

Json = Any
Mounting = Callable[..., Mount]
LENGTH = 8 << 20
on_devfuse = pytest.mark.parametrize("transport", ["devfuse"])


def child(name: str, path: Path, image_format: str = "raw") -> Json:
    return {"driver": image_format, "node-name": name, "file": {"driver": "file", "filename": str(path)}}


def quorum(children: list[Json], threshold: int = 2, **options: Json) -> Json:
    """The options of the quorum ``disk``."""
    more = {name.replace("_", "-"): value for name, value in options.items()}
    return {"driver": "quorum", "node-name": "disk", "children": children, "vote-threshold": threshold, **more}


def damage(path: Path, *commands: str, image_format: str = "raw") -> None:
    """Change an image behind everybody's back."""
    run("qemu-io", "-f", image_format, *(word for command in commands for word in ("-c", command)), path)


def same(*paths: Path) -> bool:
    """Whether cmp finds all of *paths* the same."""
    return all(run("cmp", paths[0], path, expect=(0, 1)) == "" for path in paths[1:])


def reports(events: list[Json]) -> set[tuple[str, str]]:
    """The event and the node of all that a quorum has announced."""
    return {
        (event["event"], event["data"].get("node-name", event["data"].get("reference")))
        for event in events
        if event["event"].startswith("QUORUM_")
    }


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """``original`` and three copies of it."""
    (tmp_path / "original").write_bytes(random.Random(1).randbytes(LENGTH))
    return [Path(shutil.copy(tmp_path / "original", tmp_path / name)) for name in ("one", "two", "three")]


#: what is wrong with the second image; no request is as long as these are apart
DAMAGE = ["write -P 1 0 4k", "write -P 2 3000000 1000000", f"write -P 3 {LENGTH - 512} 512"]


def test_an_image_that_was_damaged_is_outvoted(mount: Mounting, tmp_path: Path, images: list[Path]) -> None:
    damage(images[1], *DAMAGE)
    damaged = images[1].read_bytes()
    mounted = mount(quorum([child(path.name, path) for path in images]))
    assert mounted.qmp("query-version")
    assert same(tmp_path / "original", mounted / "disk")
    assert mounted.qmp("query-version")
    assert reports(mounted.qmp.events) == {("QUORUM_REPORT_BAD", "two")}
    first = next(event["data"] for event in mounted.qmp.events if event["event"] == "QUORUM_REPORT_BAD")
    assert (first["type"], first["sector-num"]) == ("read", 0)
    assert "QUORUM_REPORT_BAD: type=read node-name=two" in mounted.log.read_text()
    mounted.umount()
    assert same(tmp_path / "original", images[0], images[2])
    assert images[1].read_bytes() == damaged


def test_a_damaged_image_is_healed_by_reading(mount: Mounting, tmp_path: Path, images: list[Path]) -> None:
    damage(images[1], *DAMAGE)
    damage(images[2], "write -P 4 5M 64k")
    mounted = mount(quorum([child(path.name, path) for path in images], rewrite_corrupted=True))
    assert mounted.qmp("query-version")
    assert same(tmp_path / "original", mounted / "disk")
    assert mounted.qmp("query-version")
    assert reports(mounted.qmp.events) == {("QUORUM_REPORT_BAD", "two"), ("QUORUM_REPORT_BAD", "three")}
    mounted.umount()
    assert same(tmp_path / "original", *images)


def test_qcow2_images_are_healed_and_stay_sound(mount: Mounting, tmp_path: Path, images: list[Path]) -> None:
    for path in images:
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", path, path.with_suffix(".qcow2"))
    qcow2s = [path.with_suffix(".qcow2") for path in images]
    damage(qcow2s[0], "write -P 1 64k 1M", "write -z 5M 300k", image_format="qcow2")
    mounted = mount(quorum([child(path.stem, path, "qcow2") for path in qcow2s], rewrite_corrupted=True))
    assert same(tmp_path / "original", mounted / "disk")
    mounted.umount()
    for path in qcow2s:
        check_image(path)
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / "original", path)


@on_devfuse
def test_images_that_do_not_agree_cannot_be_read_where_they_do_not(
    mount: Mounting, tmp_path: Path, images: list[Path]
) -> None:
    damage(images[0], "write -P 1 4M 4k")
    damage(images[1], "write -P 2 4M 4k")
    mounted = mount(quorum([child(path.name, path) for path in images]))
    assert mounted.qmp("query-version")
    descriptor = os.open(mounted / "disk", os.O_RDONLY)
    with pytest.raises(OSError, match="Input/output error") as failed:
        os.pread(descriptor, 4096, 4 << 20)
    assert failed.value.errno == errno.EIO
    original = (tmp_path / "original").read_bytes()
    assert os.pread(descriptor, 4096, (4 << 20) + 4096) == original[(4 << 20) + 4096 : (4 << 20) + 8192]
    os.close(descriptor)
    assert mounted.qmp("query-version")
    assert reports(mounted.qmp.events) == {("QUORUM_FAILURE", "disk")}
    mounted.umount()


@on_devfuse
@pytest.mark.parametrize(("threshold", "rewrite"), [(1, False), (2, True), (3, True)])
def test_what_is_read_and_healed_is_what_qemu_reads_and_heals(
    mount: Mounting, tmp_path: Path, threshold: int, rewrite: bool
) -> None:
    """Every 64 KiB of five images is damaged in another way; each is read by itself."""
    rng = random.Random(threshold)
    areas = 32
    ours = [tmp_path / f"ours{index}" for index in range(5)]
    theirs = [tmp_path / f"theirs{index}" for index in range(5)]
    contents = [bytearray(areas << 16) for _ in ours]
    for area in range(areas):
        versions = [rng.randbytes(1 << 16) for _ in range(3)]
        for data in contents:
            data[area << 16 : (area + 1) << 16] = versions[min(int(rng.expovariate(1)), 2)]
    for paths in (ours, theirs):
        for path, data in zip(paths, contents, strict=True):
            path.write_bytes(data)

    def options(paths: list[Path]) -> Json:
        return quorum([child(path.name, path) for path in paths], threshold, rewrite_corrupted=rewrite)

    commands = [word for area in range(areas) for word in ("-c", f"read -v {area << 16} 64k")]

    def said(name: Path | str) -> list[str]:
        lines = run("qemu-io", "-f", "raw", *commands, name, expect=(0, 1)).splitlines()
        return [line for line in lines if " ops; " not in line]

    mounted = mount(options(ours))
    found = said(mounted / "disk")
    mounted.umount()
    expected = said("json:" + json.dumps({"driver": "raw", "file": options(theirs)}))
    assert found == expected
    # of three versions, one has two votes of five at least
    failed = "read failed: Input/output error" in found
    assert failed == (threshold == 3)
    for our, their in zip(ours, theirs, strict=True):
        assert same(our, their)
    assert same(*ours) == (rewrite and not failed)


# --- in use --------------------------------------------------------------------------------------


@on_devfuse
def test_a_file_system_lives_on_while_a_child_fails(mount: Mounting, tmp_path: Path) -> None:
    images = [tmp_path / name for name in ("one", "two", "three")]
    for path in images:
        run("truncate", "-s", "64M", path)
    failing = {
        "driver": "blkdebug", "node-name": "two", "image": {"driver": "file", "filename": str(images[1])},
        "inject-error": [
            {"event": "none", "iotype": iotype, "errno": errno.ENOSPC} for iotype in ("write", "write-zeroes")
        ],
    }  # fmt: skip
    mounted = mount(quorum([child("one", images[0]), failing, child("three", images[2])]))
    with loop_device(mounted / "disk") as device:
        run("mkfs.ext4", "-q", device)
        with file_system(device, tmp_path / "fs") as top:
            for number in range(50):
                (top / str(number)).write_bytes(random.Random(number).randbytes(10000 * number))
            run("sync", "-f", top)
        with file_system(device, tmp_path / "fs", "-o", "ro") as top:
            for number in range(50):
                assert (top / str(number)).read_bytes() == random.Random(number).randbytes(10000 * number)
        run("e2fsck", "-f", "-n", device)
    mounted.umount()
    assert same(images[0], images[2])
    run("e2fsck", "-f", "-n", images[0])


@on_devfuse
def test_fio_finds_its_data_again_and_the_images_are_the_same(mount: Mounting, images: list[Path]) -> None:
    mounted = mount(quorum([child(path.name, path) for path in images], 3))
    assert mounted.qmp("query-version")
    run(
        "fio", "--name=verify", f"--filename={mounted / 'disk'}", "--rw=randrw", "--bs=512-64k", "--size=8M",
        "--direct=1", "--ioengine=libaio", "--iodepth=16", "--verify=crc32c", "--verify_backlog=64", "--randseed=3",
        "--allow_file_create=0", "--io_size=32M", cwd=images[0].parent,
    )  # fmt: skip
    assert mounted.qmp("query-version")
    assert reports(mounted.qmp.events) == set()
    mounted.umount()
    assert same(*images)


def test_children_come_and_go_under_an_open_file(mount: Mounting, tmp_path: Path, images: list[Path]) -> None:
    new = Path(shutil.copy(tmp_path / "original", tmp_path / "new"))
    mounted = mount(quorum([child(path.name, path) for path in images]))
    descriptor = os.open(mounted / "disk", os.O_RDWR)
    os.pwrite(descriptor, b"before", 0)
    fusebd("qmp", mounted.point, "x-blockdev-change", "parent=disk", "child=children.1")
    os.pwrite(descriptor, b"during", 100)
    os.fsync(descriptor)
    assert sorted(os.listdir(mounted.point)) == ["disk", "one", "three"]
    shutil.copy(images[0], new)
    fusebd(
        "qmp", mounted.point, "blockdev-add", "driver=raw", "node-name=new", "file.driver=file", f"file.filename={new}"
    )
    fusebd("qmp", mounted.point, "x-blockdev-change", "parent=disk", "node=new")
    os.pwrite(descriptor, b"after", 200)
    assert os.pread(descriptor, 5, 200) == b"after"
    os.close(descriptor)
    mounted.umount()
    assert same(images[0], images[2], new)
    content = images[0].read_bytes()
    assert (content[:6], content[100:106], content[200:205]) == (b"before", b"during", b"after")
    assert images[1].read_bytes()[:6] == b"before"
    assert images[1].read_bytes()[6:] == (tmp_path / "original").read_bytes()[6:]


@on_devfuse
def test_a_child_whose_file_is_open_cannot_be_added(mount: Mounting, tmp_path: Path, images: list[Path]) -> None:
    mounted = mount(quorum([child("one", images[0])], 1), child("two", images[1]))
    with (mounted / "two").open("rb"):
        said = fusebd("qmp", mounted.point, "x-blockdev-change", "parent=disk", "node=two", expect=(1,))
        assert "The node two already has a parent" in said
    fusebd("qmp", mounted.point, "x-blockdev-change", "parent=disk", "node=two")
    with pytest.raises(OSError, match="busy"):
        (mounted / "two").open("r+b")
    mounted.umount()


# --- json: names ---------------------------------------------------------------------------------


@on_devfuse
def test_a_quorum_is_the_backing_file_of_an_image(mount: Mounting, tmp_path: Path, images: list[Path]) -> None:
    damage(images[2], *DAMAGE)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", images[1], tmp_path / "two.qcow2")
    # formats are found out, as they are in QEMU
    files = [images[0], tmp_path / "two.qcow2", images[2]]
    children = ", ".join(f'{{"file": {{"driver": "file", "filename": "{path}"}}}}' for path in files)
    below = f'{{"driver": "quorum", "vote-threshold": 2, "children": [{children}]}}'
    name = f'json:{{"driver": "raw", "file": {below}}}'
    top = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", name, top, str(LENGTH))
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / "original", top)
    mounted = mount(child("top", top, "qcow2"))
    assert same(tmp_path / "original", mounted / "top")
    mounted.umount()
