"""Cutting the power below a file system again and again, in one mount: what tests of crash consistency share."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mounting import Mount, file_system, loop_device

#: FUSEBD_LONG=1 asks for many more seeds than fit into a run of the whole suite, or into pytest's ``--timeout``
LONG = bool(os.environ.get("FUSEBD_LONG"))


def rounds(few: int, many: int) -> range:
    """The numbers of the rounds of a test: *few*, or *many* if the run may be long."""
    return range(many if LONG else few)


def cached(path: Path, **options: Any) -> dict[str, Any]:
    """The options of a node named ``disk`` with a volatile cache over the raw image *path*."""
    return {
        "driver": "volatile-cache",
        "node-name": "disk",
        "discard": "unmap",
        **options,
        "file": {"driver": "file", "filename": str(path)},
    }


def cut_later(mounted: Mount, requests: int, *, keep: float = 0.5, torn: float = 0.3, operation: str = "any") -> None:
    """Cut the power of ``disk`` when *requests* requests of the kind *operation* have come."""
    arguments = {"node-name": "disk", "nth": requests, "operation": operation, "keep": keep, "torn": torn}
    mounted.qmp("power-cut", arguments)


def cut_now(mounted: Mount, *, keep: float = 0.5, torn: float = 0.3) -> None:
    """Cut the power of ``disk``, unless it is off already."""
    if mounted.qmp("query-volatile-cache", {"node-name": "disk"})["power"]:
        mounted.qmp("power-cut", {"node-name": "disk", "keep": keep, "torn": torn})


def tell(*words: object) -> None:
    """Say what a test has seen, for ``pytest -rP``."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")


@contextmanager
def until_the_power_is_off(mounted: Mount, point: Path, *options: str) -> Iterator[Path]:
    """The file system on ``disk``, mounted at *point*.  The power is cut in the end, or before; then it is on."""
    with loop_device(mounted / "disk") as device, file_system(device, point, *options) as top:
        try:
            yield top
        finally:
            cut_now(mounted)  # before the file system is unmounted, which would write all of it out
    mounted.qmp("power-on", {"node-name": "disk"})


def drawn(seed: int, least: int, most: int) -> int:
    """A number that follows from *seed*."""
    return random.Random(seed).randrange(least, most)
