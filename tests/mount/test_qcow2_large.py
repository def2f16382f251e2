"""A qcow2 image of 16 TiB, of which 1 TiB has clusters: the memory to open it, and to read all over it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from images import create
from mounting import Mount, qcow2, run
from powercuts import tell

TiB = 1 << 40
MiB = 1 << 20
#: L2 tables are cached in parts of 4 KiB, each for 32 MiB of the disk: more parts than fit into any of the caches
READS = 12_000


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = create(tmp_path_factory.mktemp("large") / "disk.qcow2", TiB, preallocation="metadata")
    run("qemu-img", "resize", "-q", "-f", "qcow2", path, str(16 * TiB))
    return path


@pytest.mark.parametrize("transport", ["devfuse"])
@pytest.mark.parametrize("cache", [0, 4 * MiB, 32 * MiB])
def test_memory_is_that_of_the_cache(mount: Callable[..., Mount], image: Path, cache: int) -> None:
    mounted = mount()
    before = _resident(mounted.pid)
    mounted.qmp("blockdev-add", qcow2("disk", image, **{"l2-cache-size": cache, "l2-cache-entry-size": 4096}))
    opened = _resident(mounted.pid) - before
    rng = random.Random(1)
    descriptor = os.open(mounted / "disk", os.O_RDONLY)
    for _ in range(READS):
        assert os.pread(descriptor, 512, rng.randrange(TiB) // 512 * 512) == bytes(512)
    os.close(descriptor)
    used = _resident(mounted.pid) - before
    tell(f"{opened / MiB:.1f} MiB when it is open, {used / MiB:.1f} MiB when it has been read")
    # the L1 table, where the L2 tables and refcount blocks are, four refcount blocks, and code that was not needed yet
    assert opened < 8 * MiB
    # with the objects of Python's that each cached part is; and code that was not needed before
    assert used < opened + cache + 2 * MiB
    mounted.umount()


def _resident(pid: int) -> int:
    """Bytes of memory in use."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS:"))
