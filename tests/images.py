"""qcow2 images for tests, made and judged by QEMU's own programs."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mounting import check_image, run

__all__ = ["check_image", "content", "create", "info", "io", "patch", "u16", "u32", "u64"]


def create(
    path: Path, size: int | str, *, backing: str | Path | None = None, backing_format: str = "qcow2", **options: object
) -> Path:
    """A new image at *path*; *options* are those of ``qemu-img create -o``."""
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    if backing is not None:
        words += ["-b", str(backing), "-F", backing_format]
    run("qemu-img", "create", "-q", "-f", "qcow2", *words, path, str(size))
    return path


def io(path: Path, *commands: str, options: Sequence[str] = (), expect: Sequence[int] = (0,)) -> str:
    """Run qemu-io *commands* on the qcow2 image *path*; what they print."""
    words = [word for command in commands for word in ("-c", command)]
    return run("qemu-io", "-f", "qcow2", "-d", "unmap", *options, *words, path, expect=expect)


def content(path: Path, image_format: str = "qcow2") -> bytes:
    """What the disk in the image *path* contains, by qemu-img."""
    copy = path.with_name(path.name + ".content")
    run("qemu-img", "convert", "-f", image_format, "-O", "raw", path, copy)
    data = copy.read_bytes()
    copy.unlink()
    return data


def info(path: Path) -> Any:
    """What qemu-img info says of the image *path*."""
    said = run("qemu-img", "info", "-U", "--output=json", "-f", "qcow2", path)
    return json.loads(said[said.index("{") :])  # warnings come first


def patch(path: Path, *edits: tuple[int, bytes]) -> Path:
    """Overwrite bytes of the file: (offset, bytes) each."""
    with path.open("r+b") as file:
        for offset, data in edits:
            file.seek(offset)
            file.write(data)
    return path


def u16(value: int) -> bytes:
    return struct.pack(">H", value)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)
