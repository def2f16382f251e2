"""``fusebd mount --snapshot``: images stay as they are, and what was written is gone afterwards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, failing, file_system, loop_device, qcow2, raw, refusal, run

Mounting = Callable[..., Mount]
M = 1 << 20


@pytest.fixture
def temporary(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files are made; at the end there must be none."""
    path = scratch / "temporary"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_system_is_changed_and_the_image_is_not(mount: Mounting, scratch: Path, temporary: Path) -> None:
    image, link = scratch / "disk.qcow2", scratch / "disk.raw"
    run("truncate", "-s", "32M", link)
    run("mkfs.ext4", "-q", link)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", link, image)
    before = digest(image)
    image.chmod(0o444)
    served = mount(qcow2("disk", image), options=["--snapshot"])
    assert os.listdir(temporary) == []
    with loop_device(served / "disk") as device, file_system(device, scratch / "fs") as point:
        (point / "new").write_bytes(b"new" * M)
    with loop_device(served / "disk") as device, file_system(device, scratch / "fs") as point:
        assert (point / "new").read_bytes() == b"new" * M
    served.umount()
    assert digest(image) == before
    assert os.listdir(temporary) == []


def test_an_odd_length_is_rounded_up_and_the_rest_reads_as_before(
    mount: Mounting, scratch: Path, temporary: Path
) -> None:
    image = scratch / "disk.raw"
    image.write_bytes(b"x" * 1000)
    served = mount(raw("disk", image), options=["--snapshot"])
    assert (served / "disk").read_bytes() == b"x" * 1000 + bytes(24)
    with open(served / "disk", "r+b", buffering=0) as file:
        file.write(b"y" * 100)
    assert (served / "disk").read_bytes()[:200] == b"y" * 100 + b"x" * 100
    served.umount()
    assert image.read_bytes() == b"x" * 1000


def test_filters_are_above_the_overlay_and_nodes_that_are_named_below_others(
    mount: Mounting, scratch: Path, temporary: Path
) -> None:
    image = scratch / "disk.raw"
    image.write_bytes(bytes(M))
    nodes: list[Any] = [
        raw("disk", image),
        {
            "driver": "blkdebug",
            "node-name": "failing",
            "image": "disk",
            "inject-error": [{"event": "none", "sector": 0}],
        },
        failing("inline", raw("below", image), event="none", sector=8, iotype="write"),
    ]
    served = mount(*nodes, options=["--snapshot"])
    with open(served / "failing", "r+b", buffering=0) as file:
        with pytest.raises(OSError, match="Input/output error"):
            file.write(b"x" * 512)
        file.seek(4096)
        file.write(b"x" * 512)
    assert (served / "disk").read_bytes()[4096:4608] == b"x" * 512
    with open(served / "inline", "r+b", buffering=0) as file:
        file.write(b"y" * 512)
    assert (served / "inline").read_bytes()[:512] == b"y" * 512
    served.umount()
    assert image.read_bytes() == bytes(M)


def test_what_is_read_only_stays_so(mount: Mounting, scratch: Path, temporary: Path) -> None:
    image = scratch / "disk.raw"
    image.write_bytes(b"x" * M)
    served = mount(raw("disk", image, **{"read-only": True}), options=["--snapshot"])
    assert (served / "disk").stat().st_mode & 0o222 == 0
    nodes = served.qmp("query-named-block-nodes")
    assert {node["drv"] for node in nodes} == {"raw", "file"}
    served.umount()


def test_mistakes_are_reported_as_ever_and_leave_nothing(scratch: Path, temporary: Path) -> None:
    point = scratch / "point"
    point.mkdir()
    option = "driver=qcow2,node-name=disk,file.driver=file,file.filename=nowhere"
    assert refusal("mount", "--snapshot", "--blockdev", option, point) == (
        f"--blockdev {option}: Could not open 'nowhere': No such file or directory"
    )
    option = "driver=raw,node-name=disk,file=nowhere"
    assert refusal("mount", "--snapshot", "--blockdev", option, point) == (
        f"--blockdev {option}: Cannot find device='nowhere' nor node-name='nowhere'"
    )
    option = "driver=null-co,node-name=bad name"
    assert refusal("mount", "--snapshot", "--blockdev", option, point) == (
        f"--blockdev {option}: Invalid node-name: 'bad name'"
    )
    assert os.listdir(temporary) == []
    os.rmdir(temporary)
    assert refusal("mount", "--snapshot", "--blockdev", "driver=null-co,node-name=disk", point) == (
        f"--blockdev driver=null-co,node-name=disk: Could not create a temporary file in '{temporary}': "
        "No such file or directory"
    )
