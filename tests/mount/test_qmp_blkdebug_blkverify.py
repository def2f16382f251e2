"""blkdebug and blkverify through a mount and QMP: the sequences of QEMU's iotest 071, and the names of 099.

qemu-io and dd are the clients of the node files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, check_image, fusebd, qcow2, run
from qemuprograms import storage_daemon

Json = Any
LENGTH = 64 << 20


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A qcow2 image ``test`` and a raw file ``base`` of the same length, both empty."""
    run("qemu-img", "create", "-q", "-f", "raw", tmp_path / "base", str(LENGTH))
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "test", str(LENGTH))
    return tmp_path


def file(path: Path) -> Json:
    return {"driver": "file", "filename": str(path)}


def io(path: Path, *commands: str) -> list[str]:
    """What happens to each of qemu-io's *commands* on the raw disk *path*: its line without what follows the offset."""
    words = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", "-f", "raw", "-t", "writeback", *words, path, expect=(0, 1))
    return [line for line in said.splitlines() if " ops; " not in line]


def dd(path: Path, sector: int) -> str:
    """What dd says to reading a sector of *path*."""
    return run("dd", f"if={path}", "of=/dev/null", "bs=512", "count=1", f"skip={sector}", expect=(0, 1))


def change(image: Path) -> None:
    """Write to the qcow2 *image* alone."""
    run("qemu-io", "-f", "qcow2", "-c", "write -P 42 0 512", image)


def mismatches(mounted: Mount) -> list[str]:
    """The lines of the log about blkverify."""
    return [line.partition(" ERROR ")[2] for line in mounted.log.read_text().splitlines() if "blkverify:" in line]


READ_0 = "read 512/512 bytes at offset 0"
WROTE = "wrote 512/512 bytes at offset 229376"
READ = "read 512/512 bytes at offset 229376"
WRITTEN = [READ_0, WROTE, READ]
FAILED = ["read failed: Input/output error"]
MISMATCH = "blkverify: read offset=0 bytes=512 contents mismatch at offset 0"


# --- blkverify -----------------------------------------------------------------------------------


def verify_and_change(mount: Callable[..., Mount], images: Path, *blockdevs: Json) -> None:
    """Both sides agree, and still do after a write; after one to the image alone, the difference is found."""
    mounted = mount(*blockdevs)
    assert io(mounted / "disk", "read 0 512", "write -P 42 0x38000 512", "read -P 42 0x38000 512") == WRITTEN
    mounted.umount()
    assert mismatches(mounted) == []
    check_image(images / "test")
    change(images / "test")
    mounted = mount(*blockdevs)
    mounted.qmp("query-version")
    assert io(mounted / "disk", "read -P 42 0 512") == FAILED
    assert mismatches(mounted) == [MISMATCH]
    assert "Input/output error" in dd(mounted / "disk", 0)
    assert "1+0 records in" in dd(mounted / "disk", 1)
    mounted.qmp("query-version")
    found = next(event for event in mounted.qmp.events if event["event"] == "BLKVERIFY_MISMATCH")
    assert {name: found["data"][name] for name in ("operation", "offset", "length", "mismatch-offset")} == {
        "operation": "read",
        "offset": 0,
        "length": 512,
        "mismatch-offset": 0,
    }
    assert found["data"]["test-data"] == "2a" * 16
    assert found["data"]["raw-data"] == "00" * 16
    mounted.hang_up()
    fusebd("umount", mounted.point)


def test_blkverify_with_both_sides_inline(mount: Callable[..., Mount], images: Path) -> None:
    verify = {"driver": "blkverify", "raw": file(images / "base"), "test": qcow2("image", images / "test")}
    verify_and_change(mount, images, {"driver": "raw", "node-name": "disk", "file": verify})


def test_blkverify_whose_test_is_an_existing_node(mount: Callable[..., Mount], images: Path) -> None:
    verify = {"driver": "blkverify", "node-name": "disk", "test": "drive0", "raw": file(images / "base")}
    verify_and_change(mount, images, qcow2("drive0", images / "test"), verify)


def test_blkverify_whose_raw_is_an_existing_node(mount: Callable[..., Mount], images: Path) -> None:
    verify = {"driver": "blkverify", "node-name": "disk", "raw": "drive0", "test": qcow2("image", images / "test")}
    verify_and_change(mount, images, {"node-name": "drive0", **file(images / "base")}, verify)


def test_blkverify_by_its_legacy_name(mount: Callable[..., Mount], images: Path) -> None:
    # the name stands in an image, and the image under test is found out to be qcow2
    name = f"blkverify:{images}/base:{images}/test"
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", name, images / "top", str(LENGTH))
    mounted = mount(qcow2("disk", images / "top"))
    assert io(mounted / "disk", "read 0 512", "write -P 42 0x38000 512", "read -P 42 0x38000 512") == WRITTEN
    mounted.umount()
    change(images / "test")
    mounted = mount(qcow2("disk", images / "top"))
    assert io(mounted / "disk", "read 0 512") == FAILED
    assert mismatches(mounted) == [MISMATCH]
    fusebd("umount", mounted.point)


def test_blkverify_nodes_are_added_by_qmp(mount: Callable[..., Mount], images: Path) -> None:
    change(images / "test")
    mounted = mount()
    mounted.qmp("blockdev-add", qcow2("drive0", images / "test"))
    mounted.qmp(
        "blockdev-add",
        {"driver": "blkverify", "node-name": "drive0-verify", "test": "drive0", "raw": file(images / "base")},
    )
    assert io(mounted / "drive0", "read -P 42 0 512") == [READ_0]
    assert io(mounted / "drive0-verify", "read 0 512") == FAILED
    assert mismatches(mounted) == [MISMATCH]
    mounted.qmp("blockdev-del", {"node-name": "drive0-verify"})
    assert os.listdir(mounted.point) == ["drive0"]
    mounted.hang_up()
    fusebd("umount", mounted.point)


# --- blkdebug ------------------------------------------------------------------------------------

ON_L2_LOAD = {"inject-error": [{"event": "l2_load"}]}


@pytest.fixture
def with_l2_table(images: Path) -> Path:
    """As *images*, but ``test`` has an L2 table to load."""
    change(images / "test")
    return images


def test_blkdebug_inline(mount: Callable[..., Mount], with_l2_table: Path) -> None:
    mounted = mount()
    debug = {"driver": "blkdebug", "image": file(with_l2_table / "test"), **ON_L2_LOAD}
    mounted.qmp("blockdev-add", {"driver": "qcow2", "node-name": "disk", "file": debug})
    assert io(mounted / "disk", "read -P 42 0x38000 512") == FAILED
    assert "Input/output error" in dd(mounted / "disk", 0)
    mounted.umount()


def test_blkdebug_over_an_existing_node(mount: Callable[..., Mount], with_l2_table: Path) -> None:
    mounted = mount()
    mounted.qmp("blockdev-add", {"node-name": "drive0", **file(with_l2_table / "test")})
    mounted.qmp(
        "blockdev-add",
        {
            "driver": "qcow2",
            "node-name": "drive0-debug",
            "file": {"driver": "blkdebug", "image": "drive0", **ON_L2_LOAD},
        },
    )
    assert io(mounted / "drive0-debug", "read 0 512") == FAILED
    failures = [event["data"] for event in _events(mounted) if event["event"] == "BLOCK_IO_ERROR"]
    assert {(data["node-name"], data["operation"], data["reason"]) for data in failures} == {
        ("drive0-debug", "read", "Input/output error")
    }
    mounted.umount()


def _events(mounted: Mount) -> list[Json]:
    """The events so far; a command's answer comes after those before it."""
    mounted.qmp("query-version")
    return mounted.qmp.events


def test_blkdebug_by_its_legacy_name(mount: Callable[..., Mount], with_l2_table: Path) -> None:
    (with_l2_table / "rules").write_text('[inject-error]\nevent = "l2_load"\n')
    name = f"blkdebug:{with_l2_table}/rules:{with_l2_table}/test"
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", name, with_l2_table / "top", str(LENGTH))
    mounted = mount(qcow2("disk", with_l2_table / "top"))
    assert io(mounted / "disk", "read 0 512") == FAILED
    mounted.umount()


def test_a_state_decides_whether_a_read_fails(mount: Callable[..., Mount], images: Path) -> None:
    mounted = mount()
    mounted.qmp("blockdev-add", {"node-name": "drive0", **file(images / "test")})
    rules = {
        "inject-error": [{"event": "read_aio", "state": 42}],
        "set-state": [{"event": "write_aio", "new_state": 42}],
    }
    debug = {"driver": "blkdebug", "image": "drive0", **rules}
    mounted.qmp("blockdev-add", {"driver": "qcow2", "node-name": "drive0-debug", "file": debug})
    disk = mounted / "drive0-debug"
    descriptor = os.open(disk, os.O_RDWR)
    assert os.pread(descriptor, 512, 0) == bytes(512)
    assert os.pwrite(descriptor, b"x" * 512, 0) == 512
    with pytest.raises(OSError, match="Input/output error"):
        os.pread(descriptor, 512, 0)
    # the rule stays active, and fails the flush at the end as well: close(2) says so, and so does the unmount
    with pytest.raises(OSError, match="Input/output error"):
        os.close(descriptor)
    mounted.hang_up()
    assert "flush at close failed" in fusebd("umount", mounted.point, expect=(1,))
    check_image(images / "test", leaks=True)


def test_a_state_decides_for_qemu_io_too(mount: Callable[..., Mount], images: Path) -> None:
    # the same, with a rule for reads alone, so that everything else goes well
    rules = {
        "inject-error": [{"event": "read_aio", "state": 42, "iotype": "read"}],
        "set-state": [{"event": "write_aio", "new_state": 42}],
    }
    debug = {"driver": "blkdebug", "image": file(images / "test"), **rules}
    mounted = mount({"driver": "qcow2", "node-name": "disk", "file": debug})
    said = io(mounted / "disk", "read 0 512", "write 0 512", "read 0 512")
    assert said == [READ_0, "wrote 512/512 bytes at offset 0", *FAILED]
    mounted.umount()
    check_image(images / "test")


def test_dd_fails_on_the_sector_of_a_rule_once(mount: Callable[..., Mount], images: Path) -> None:
    rule = {"event": "read_aio", "sector": 100, "once": True}
    debug = {"driver": "blkdebug", "image": file(images / "base"), "inject-error": [rule]}
    mounted = mount({"driver": "raw", "node-name": "disk", "file": debug})
    assert "1+0 records in" in dd(mounted / "disk", 99)
    assert "Input/output error" in dd(mounted / "disk", 100)
    assert "1+0 records in" in dd(mounted / "disk", 100)
    mounted.umount()


# --- names ---------------------------------------------------------------------------------------

#: the stacks of 099 and what they are called there, by qemu-system 10.0.2; without a format on top, the last are
#: those of qemu-storage-daemon 10.0.2
NAMES: dict[str, tuple[Json, str]] = {
    "blkverify of two files": (
        {"driver": "raw", "file": {"driver": "blkverify", "raw": "BASE", "test": {"driver": "qcow2", "file": "TEST"}}},
        "blkverify:DIR/base:DIR/test",
    ),
    "blkdebug with a rule": (
        {"driver": "qcow2", "file": {"driver": "blkdebug", "image": "TEST", "inject-error": [{"event": "l1_update"}]}},
        'json:{"driver": "qcow2", "file": {"image": {"driver": "file", "filename": "DIR/test"}, "driver": "blkdebug", '
        '"inject-error.0.event": "l1_update"}}',
    ),
    "blkverify with a rule inside": (
        {
            "driver": "raw",
            "file": {
                "driver": "blkverify",
                "raw": "BASE",
                "test": {
                    "driver": "qcow2",
                    "file": {"driver": "blkdebug", "image": "TEST", "inject-error": [{"event": "l1_update"}]},
                },
            },
        },
        'json:{"driver": "raw", "file": {"test": {"driver": "qcow2", "file": {"image": {"driver": "file", "filename": '
        '"DIR/test"}, "driver": "blkdebug", "inject-error.0.event": "l1_update"}}, "driver": "blkverify", "raw": '
        '{"driver": "file", "filename": "DIR/base"}}}',
    ),
    "blkdebug with a file of rules": (
        {"driver": "qcow2", "file": {"driver": "blkdebug", "config": "DIR/rules", "image": "TEST"}},
        "blkdebug:DIR/rules:DIR/test",
    ),
    "blkdebug without anything": (
        {"driver": "qcow2", "file": {"driver": "blkdebug", "image": "TEST"}},
        "blkdebug::DIR/test",
    ),
    "blkdebug over blkverify": (
        {"driver": "blkdebug", "image": {"driver": "blkverify", "raw": "BASE", "test": "TEST"}},
        "blkdebug::blkverify:DIR/base:DIR/test",
    ),
    "blkverify over blkdebug": (
        {"driver": "blkverify", "raw": {"driver": "blkdebug", "image": "BASE"}, "test": "TEST"},
        "blkverify:blkdebug::DIR/base:DIR/test",
    ),
    "blkdebug over a format": (
        {"driver": "blkdebug", "image": {"driver": "qcow2", "file": "TEST"}},
        "blkdebug::DIR/test",
    ),
    "blkdebug over a window": (
        {"driver": "blkdebug", "image": {"driver": "raw", "size": 512, "file": "BASE"}},
        'json:{"image": {"driver": "raw", "size": 512, "file": {"driver": "file", "filename": "DIR/base"}}, '
        '"driver": "blkdebug"}',
    ),
}


def _place(value: Json, directory: Path) -> Json:
    """*value* with the nodes of the images in place of their names."""
    if isinstance(value, dict):
        return {key: _place(item, directory) for key, item in value.items()}
    if isinstance(value, list):
        return [_place(item, directory) for item in value]
    if value in ("BASE", "TEST"):
        return file(directory / value.lower())
    return value.replace("DIR", str(directory)) if isinstance(value, str) else value


@pytest.mark.parametrize("name", NAMES)
def test_nodes_are_called_as_by_qemu(mount: Callable[..., Mount], images: Path, name: str) -> None:
    stack, expected = NAMES[name]
    (images / "rules").touch()
    node = {"node-name": "drv0", **_place(stack, images)}
    with storage_daemon() as qemu:
        qemu("blockdev-add", node)
        theirs = qemu("query-named-block-nodes")
    mounted = mount(node)
    ours = mounted.qmp("query-named-block-nodes")
    mounted.umount()
    named = [[node["file"] for node in nodes if node["node-name"] == "drv0"] for nodes in (theirs, ours)]
    assert named == [[expected.replace("DIR", str(images))]] * 2
    assert [node["file"] for node in ours] == [node["file"] for node in theirs]
    assert [node["image"]["filename"] for node in ours] == [node["image"]["filename"] for node in theirs]
