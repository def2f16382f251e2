"""qcow2 images for tests, made and judged by QEMU's own programs."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mounting import check_image, run

from fusebd.ondisk import qcow2

__all__ = [
    "SECRET",
    "after_power_cut",
    "check_image",
    "content",
    "create",
    "create_encrypted",
    "info",
    "io",
    "is_dirty",
    "patch",
    "u16",
    "u32",
    "u64",
]

#: what QEMU's programs have to be told to open an encrypted image
SECRET = ("--object", "secret,id=key,data=open sesame")


def create(
    path: Path, size: int | str, *, backing: str | Path | None = None, backing_format: str = "qcow2", **options: Any
) -> Path:
    """A new image at *path*; *options* are those of ``qemu-img create -o``."""
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    if backing is not None:
        words += ["-b", str(backing), "-F", backing_format]
    run("qemu-img", "create", "-q", "-f", "qcow2", *words, path, str(size))
    return path


def create_encrypted(
    path: Path, size: int | str, *words: str | Path, image_format: str = "qcow2", **options: Any
) -> Path:
    """A new image at *path*, encrypted with the secret ``key``; *options* are those of ``qemu-img create -o``.

    QEMU measures how many iterations a password of LUKS gets, for seconds, and may fail in that on a busy machine.
    """
    given = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    command = ["qemu-img", "create", "-q", *SECRET, "-f", image_format, *given, *words, path, str(size)]
    while "Unable to get accurate CPU usage" in (said := run(*command, expect=(0, 1))):
        pass
    assert not said, said
    return path


def io(path: str | Path, *commands: str, options: Sequence[str] = (), expect: Sequence[int] = (0,)) -> str:
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


def is_dirty(path: Path) -> bool:
    """Whether whoever opens the image *path* has to repair it."""
    with path.open("rb") as file:
        header = file.read(qcow2.INCOMPATIBLE_OFFSET + 8)
    return header[7] >= 3 and bool(int.from_bytes(header[-8:], "big") & qcow2.INCOMPAT_DIRTY)


def patch(path: Path, *edits: tuple[int, bytes]) -> Path:
    """Overwrite bytes of the file: (offset, bytes) each."""
    with path.open("r+b") as file:
        for offset, data in edits:
            file.seek(offset)
            file.write(data)
    return path


def after_power_cut(disk: bytes, journal: Sequence[tuple[int, bytes] | None], rng: random.Random) -> bytes:
    """What is on the disk if power fails at the end of *journal*: all up to the last flush, of the rest any sectors."""
    flushed = max((at for at, entry in enumerate(journal) if entry is None), default=0)
    changed = bytearray(disk)
    for at, entry in enumerate(journal):
        if entry is None:
            continue
        offset, data = entry
        changed.extend(bytes(max(0, offset + len(data) - len(changed))))
        if at < flushed:
            changed[offset : offset + len(data)] = data
            continue
        kept = rng.choice([0.0, 0.5, 1.0])
        for start in range(0, len(data), 512):
            if rng.random() < kept:
                sector = data[start : start + 512]
                changed[offset + start : offset + start + len(sector)] = sector
    return bytes(changed)


def u16(value: int) -> bytes:
    return struct.pack(">H", value)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)
