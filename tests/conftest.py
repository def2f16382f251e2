"""Fixtures that several kinds of tests share."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mounting import Mount, sweep

from fusebd.block.graph import Graph


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    """An empty graph; whatever is in it at the end is closed."""
    graph = Graph()
    yield graph
    await graph.close()
    assert not graph.nodes


@pytest.fixture(params=["devfuse", "pyfuse3"])
def transport(request: pytest.FixtureRequest) -> str:
    """Each transport in turn."""
    name: str = request.param
    return name


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for mounts, whose runtime directory is ``run`` in it.  What is left at the end is taken away."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs root and /dev/fuse")
    monkeypatch.setenv("FUSEBD_RUNTIME_DIR", str(tmp_path / "run"))
    yield tmp_path
    sweep(tmp_path)


@pytest.fixture
def mount(scratch: Path, transport: str) -> Iterator[Callable[..., Mount]]:
    """Mounts nodes: ``mount(blockdev, ..., name="mnt", options=[...])``.  What is left at the end is taken away."""
    mounts: list[Mount] = []

    def mount_nodes(*blockdevs: Any, name: str = "mnt", options: Sequence[str] = ()) -> Mount:
        mounts.append(Mount(scratch / name, transport, blockdevs, options))
        return mounts[-1]

    yield mount_nodes
    for mounted in mounts:
        mounted.sweep()


@pytest.fixture
def limited_memory() -> Iterator[None]:
    """A process that may grow by 512 MiB: whatever takes more fails with MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + (512 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
