"""What tests of ``fusebd.faults.targets`` share: looking at what lies where a structure is said to be, and images."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from mounting import run

from fusebd.errors import FusebdError
from fusebd.faults.layout import MAX_RANGES, Range
from fusebd.faults.targets import LAYOUTS, find, names

MIB = 1 << 20
BIG = random.Random(1).randbytes(3 * MIB + 1000)
SMALL = b"small file " * 700


def read(path: Path, *ranges: Range) -> bytes:
    with path.open("rb") as file:
        return b"".join(os.pread(file.fileno(), length, start) for start, length in ranges)


def found(path: Path, target: str) -> bytes:
    """What lies where *target* is."""
    return read(path, *find(str(path), target))


def mistake(path: Path, target: str | None = None) -> str:
    """The error for *target* (None: the listing), without the path in front."""
    with pytest.raises(FusebdError) as error:
        find(str(path), target) if target is not None else names(str(path))
    message = error.value.with_hint_in_line()
    assert message.startswith(f"{path}: "), message
    return message.removeprefix(f"{path}: ").removeprefix(f"{target}: ")


def ranges_or_none(path: Path, target: str) -> list[Range]:
    """Where *target* is; nowhere, if it takes no bytes."""
    try:
        return find(str(path), target)
    except FusebdError as error:
        if str(error).endswith("it takes no bytes"):
            return []
        raise


def everything(path: Path, layout: str) -> None:
    """Ask for all targets of *layout*: each is a line that says what is wrong, or is inside of the file."""
    parameters = {"PATH": "=/big", "PATH|NUMBER": "=12", "NUMBER": "=1", "OFFSET+LENGTH": "=0+1M"}
    for target in LAYOUTS[layout].targets:
        try:
            ranges = find(str(path), f"{layout}:{target.name}{parameters.get(target.parameter, '')}")
        except FusebdError as error:
            message = str(error)
        else:
            message = ""
            assert 0 < len(ranges) <= MAX_RANGES
            assert all(0 <= start < start + length <= path.stat().st_size for start, length in ranges)
        assert "\n" not in message


def sparse(path: Path, length: int) -> Path:
    with path.open("wb") as file:
        file.truncate(length)
    return path


def tree(top: Path) -> Path:
    """What mkfs.ext4 -d puts into a file system."""
    top.mkdir()
    (top / "big").write_bytes(BIG)
    (top / "dir").mkdir()
    (top / "dir" / "small").write_bytes(SMALL)
    (top / "dir" / 'a "b" c').write_bytes(SMALL[::-1])
    (top / "empty").touch()
    (top / "link").symlink_to("big")
    return top


def make_ext4(directory: Path, *options: str, length: int = 16 * MIB) -> Path:
    """An image of an ext4 file system with ``tree`` in it."""
    path = sparse(directory / "image", length)
    run("mkfs.ext4", "-q", "-F", "-d", tree(directory / "tree"), *options, path)
    return path
