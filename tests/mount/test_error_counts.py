"""Errors are counted by everybody they pass: by dd under strace, by the kernel, by the ledger, and all agree."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from blockerrors import block_errors
from mounting import KernelLog, Mount, fusebd, loop_device, raw, run

LENGTH = 8 << 20
BLOCK = 4096
#: the kernel says no more than ten times in five seconds that a request has failed, whatever device it was for
MOST_MESSAGES = 10
QUIET = 5.5


@pytest.fixture
def mounted(mount: Callable[..., Mount], tmp_path: Path) -> Mount:
    with open(tmp_path / "disk.raw", "wb") as file:
        file.truncate(LENGTH)
    return mount(raw("disk", tmp_path / "disk.raw"))


def _spoil(mounted: Mount, sectors: int) -> list[int]:
    """Make *sectors* of them bad; the offsets of the blocks that they are in."""
    fusebd("fault", "add", mounted.point, "disk", "id=bad", "action=latent", "at-rest=on", f"count={sectors}")
    found = json.loads(fusebd("fault", "list", "--json", mounted.point, "disk"))["bad-sectors"]
    assert sum(run_of["length"] for run_of in found) == sectors * 512
    places = [place for bad in found for place in range(bad["offset"], bad["offset"] + bad["length"], 512)]
    return sorted({place // BLOCK * BLOCK for place in places})


def _read_all(path: str, directory: Path) -> list[int]:
    """Read *path* block by block with dd; the offsets at which strace sees it fail."""
    trace = directory / "strace"
    dd = ["dd", f"if={path}", "of=/dev/null", f"bs={BLOCK}", "iflag=direct", "conv=noerror"]
    said = run("strace", "-e", "trace=read", "-P", path, "-o", trace, *dd)
    results = re.findall(r"^read\(0, .*\) += (-1 EIO|\d+)", trace.read_text(), re.MULTILINE)
    failed = [number for number, result in enumerate(results) if result == "-1 EIO"]
    assert len(results) == LENGTH // BLOCK + 1  # and the end
    assert set(results) == {str(BLOCK), "-1 EIO", "0"}
    assert len(re.findall(r"^dd: error reading .*: Input/output error$", said, re.MULTILINE)) == len(failed)
    assert f"{LENGTH // BLOCK - len(failed)}+0 records in" in said
    return [number * BLOCK for number in failed]


@contextmanager
def _ledger(mounted: Mount) -> Iterator[dict[str, list[int]]]:
    """The offsets of what comes into the ledger meanwhile, of ``fault`` and ``error``; each must be of a block."""
    entries = mounted.qmp("query-ledger")
    kinds: dict[str, list[int]] = {"fault": [], "error": []}
    yield kinds
    for entry in mounted.qmp("query-ledger", {"since": entries[-1]["id"]}):
        assert (entry["operation"], entry["length"]) == ("read", BLOCK)
        kinds[entry["kind"]].append(entry["offset"])


def test_dd_and_the_kernel_and_the_ledger_count_the_same_errors(mounted: Mount, tmp_path: Path) -> None:
    expected = _spoil(mounted, 60)
    with loop_device(mounted / "disk") as device, block_errors(device, tmp_path) as errors, _ledger(mounted) as ledger:
        assert _read_all(device, tmp_path) == expected
        assert [(error.offset, error.length, error.errno) for error in errors()] == [
            (offset, BLOCK, 5) for offset in expected
        ]
    assert ledger == {"fault": expected, "error": expected}
    mounted.umount()


def test_dd_and_the_kernels_log_and_the_ledger_count_the_same_errors(mounted: Mount, tmp_path: Path) -> None:
    expected = _spoil(mounted, MOST_MESSAGES - 2)
    with loop_device(mounted / "disk") as device:
        lines: list[int] = []
        for _ in range(5):  # others may have made it say something already
            kernel_log = KernelLog()
            with _ledger(mounted) as ledger:
                assert _read_all(device, tmp_path) == expected
            assert ledger == {"fault": expected, "error": expected}
            pattern = rf"I/O error, dev {os.path.basename(device)}, sector (\d+) op 0x0:\(READ\)"
            lines = [int(sector) * 512 for sector in re.findall(pattern, kernel_log.text())]
            kernel_log.close()
            if lines == expected:
                break
            time.sleep(QUIET)
        assert lines == expected
    mounted.umount()
