"""Bits that rot below one half of a btrfs mirror: scrub finds and heals as many as the ledger says."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, file_system, fusebd, loop_device, raw, run

LENGTH = 256 << 20
BLOCK = 4096
CONTENT = random.Random(1).randbytes(16 << 20)

#: nothing here depends on how requests reach the daemon
pytestmark = pytest.mark.parametrize("transport", ["devfuse"])


@contextmanager
def _mirror(mounted: Mount, point: Path) -> Iterator[tuple[Path, str, str]]:
    """btrfs, mounted at *point*, with all its data on the nodes ``a`` and ``b``, and the devices of these."""
    try:
        with loop_device(mounted / "a") as a, loop_device(mounted / "b") as b:
            run("mkfs.btrfs", "-q", "-d", "raid1", "-m", "raid1", a, b)
            run("btrfs", "device", "scan", a, b)
            with file_system(a, point) as top:
                yield top, a, b
            run("btrfs", "check", a)
    finally:
        run("btrfs", "device", "scan", "--forget")


def _extents(path: Path, device: str, mirror: str) -> list[dict[str, int]]:
    """Where the content of *path* is on *mirror*, one of the devices of the file system on *device*."""
    listing = run("filefrag", "-v", f"-b{BLOCK}", path)
    rows = re.findall(r"^ +\d+: +\d+\.\. +\d+: +(\d+)\.\. +\d+: +(\d+):", listing, re.MULTILINE)
    ranges = []
    for start, count in rows:
        said = run("btrfs-map-logical", "-l", str(int(start) * BLOCK), device)
        place = re.search(rf"physical (\d+) device {mirror}$", said, re.MULTILINE)
        assert place is not None, said
        ranges.append({"start": int(place[1]), "length": int(count) * BLOCK})
    assert sum(extent["length"] for extent in ranges) == len(CONTENT)
    return ranges


def _write_in_pieces(top: Path) -> Path:
    """A file whose content is in many places."""
    with open(top / "file", "wb") as file, open(top / "other", "wb") as other:
        for offset in range(0, len(CONTENT), 1 << 20):
            for written, content in ((file, CONTENT[offset : offset + (1 << 20)]), (other, bytes(BLOCK))):
                written.write(content)
                written.flush()
                run("sync", "-f", top)
    return top / "file"


def _scrub(top: Path) -> dict[str, int]:
    """What scrub has counted."""
    said = run("btrfs", "scrub", "start", "-B", "-R", top)
    return {name: int(count) for name, count in re.findall(r"(\w+): (\d+)$", said, re.MULTILINE)}


def test_scrub_heals_as_many_blocks_as_the_ledger_has_bits_flipped_in(
    mount: Callable[..., Mount], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(LENGTH)
    mounted = mount(raw("a", tmp_path / "a"), raw("b", tmp_path / "b"))
    with _mirror(mounted, tmp_path / "fs") as (top, device, mirror):
        path = _write_in_pieces(top)
        ranges = _extents(path, device, mirror)
        assert len(ranges) > 2
        words = ["action=bit-flip", "at-rest=on", "count=500", f"ranges:={json.dumps(ranges)}"]
        fusebd("fault", "add", mounted.point, "b", *words)
        (entry,) = mounted.qmp("query-ledger")
        blocks = {byte // BLOCK for byte, _ in entry["bits"]}
        assert (len(entry["bits"]), entry["node-name"]) == (500, "b")
        assert _flipped(mounted) == [{"offset": byte, "bit": bit, "rule": entry["rule"]} for byte, bit in entry["bits"]]

        # A block of 4 KiB has a checksum: that is what scrub counts, however many of its bits are wrong.
        counts = _scrub(top)
        assert (counts["csum_errors"], counts["corrected_errors"]) == (len(blocks), len(blocks))
        assert counts["uncorrectable_errors"] == 0
        words = run("btrfs", "device", "stats", top).split()
        stats = dict(zip(words[::2], words[1::2], strict=True))
        assert stats[f"[{mirror}].corruption_errs"] == str(len(blocks))
        assert stats[f"[{device}].corruption_errs"] == "0"

        assert _flipped(mounted) == []
        assert _scrub(top)["csum_errors"] == 0
        run("sync", "-f", top)
        Path("/proc/sys/vm/drop_caches").write_text("1")
        assert path.read_bytes() == CONTENT
    mounted.umount()


def _flipped(mounted: Mount) -> Any:
    return mounted.qmp("query-fault-rules", {"node-name": "b"})["flipped-bits"]
