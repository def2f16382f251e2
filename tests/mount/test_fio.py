"""fio writes with many requests of mixed sizes in flight, and reads back what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, check_image, qcow2, raw, run

LENGTH = 48 << 20


def _raw(directory: Path) -> Any:
    (directory / "disk.raw").write_bytes(bytes(LENGTH))
    return raw("disk", directory / "disk.raw")


def _qcow2(directory: Path) -> Any:
    run("qemu-img", "create", "-q", "-f", "qcow2", directory / "disk.qcow2", str(LENGTH))
    return qcow2("disk", directory / "disk.qcow2")


def _direct(directory: Path) -> Any:
    options = _qcow2(directory)
    return {**options, "file": {**options["file"], "cache": {"direct": True}}}


def _blkdebug(directory: Path) -> Any:
    options = _qcow2(directory)
    return {**options, "file": {"driver": "blkdebug", "image": options["file"]}}


def _blkverify(directory: Path) -> Any:
    (directory / "twin.raw").write_bytes(bytes(LENGTH))
    twin = {"driver": "file", "filename": str(directory / "twin.raw")}
    test = {key: value for key, value in _qcow2(directory).items() if key != "node-name"}
    return {"driver": "blkverify", "node-name": "disk", "test": test, "raw": twin}


STACKS = {"raw": _raw, "qcow2": _qcow2, "direct": _direct, "blkdebug": _blkdebug, "blkverify": _blkverify}


def _fio_verify(path: Path, depth: int) -> None:
    run(
        "fio", "--name=verify", f"--filename={path}", f"--size={LENGTH}", "--allow_file_create=0", "--rw=randwrite",
        "--bssplit=512/10:1k/5:4k/45:8k/10:20k/10:64k/15:256k/4:1m/1", "--blockalign=512", "--ioengine=libaio",
        "--direct=1", f"--iodepth={depth}", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_dump=0",
        "--fsync=500", "--randseed=7",
        cwd=path.parent.parent,
    )  # fmt: skip


@pytest.mark.parametrize("depth", [16, 64])
@pytest.mark.parametrize("stack", list(STACKS))
def test_fio_verifies_what_it_wrote_at_depth(
    mount: Callable[..., Mount], tmp_path: Path, stack: str, depth: int, transport: str
) -> None:
    mounted = mount(STACKS[stack](tmp_path))
    _fio_verify(mounted / "disk", depth)
    mounted.umount()
    image = tmp_path / "disk.qcow2"
    if image.exists():
        check_image(image)
    if stack == "blkverify":
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / "twin.raw", image)
    assert "mismatch" not in mounted.log.read_text()
