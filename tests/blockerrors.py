"""The kernel's own count of failed requests.

The messages in its log are limited in number; the trace event that goes with each of them is not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mounting import run


class BlockError(NamedTuple):
    """A request to a block device that failed: *kind* has R or W in it, places are in bytes."""

    kind: str
    offset: int
    length: int
    errno: int


class BlockErrors:
    """Those of one block device since the beginning of the trace *instance*."""

    def __init__(self, instance: Path) -> None:
        self._trace = instance / "trace"

    def __call__(self) -> list[BlockError]:
        rows = re.findall(
            r"block_rq_error: \d+,\d+ (\w+) \(.*?\) (\d+) \+ (\d+) \S* \[-(\d+)\]", self._trace.read_text()
        )
        found = [BlockError(kind, int(start) * 512, int(count) * 512, int(code)) for kind, start, count, code in rows]
        # A write with a flush goes through steps, and the end of these is reported again, with no bytes left.
        return [error for error in found if error.length or "W" not in error.kind]


@contextmanager
def block_errors(device: str, directory: Path) -> Iterator[BlockErrors]:
    """Have the kernel record the failed requests of the block device *device*; *directory* is for files meanwhile."""
    point = directory / "tracing"
    point.mkdir()
    number = os.stat(device).st_rdev
    run("mount", "-t", "tracefs", "tracefs", point)
    try:
        instance = point / "instances" / f"fusebd-{os.getpid()}"
        instance.mkdir()
        try:
            event = instance / "events" / "block" / "block_rq_error"
            (event / "filter").write_text(f"dev == {os.major(number) << 20 | os.minor(number)}")
            (event / "enable").write_text("1")
            yield BlockErrors(instance)
        finally:
            instance.rmdir()
    finally:
        run("umount", point)
