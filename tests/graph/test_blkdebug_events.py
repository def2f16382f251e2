"""Which of blkdebug's events happen during what: fusebd's qcow2, raw and edges beside qemu-io's.

Whether an event has happened shows in a read at the end: a set-state rule for the event makes it fail.
fusebd takes the refcounts of freed clusters down after the flush that makes it safe, and QEMU before: so after a
second flush there is no difference.
"""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support import READ_WRITE, root_of
from test_blkdebug_rules import carry_out

from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.drivers.blkdebug import EVENTS

LENGTH = 512 << 10
#: a cluster of each image that has data; the last request reads there
PROBE = LENGTH - 65536

#: what there is to happen in SEQUENCES, and what is easily mistaken for it
QCOW2_EVENTS = (
    "l1_update", "l1_grow_alloc_table", "l1_grow_write_table", "l1_grow_activate_table", "l2_load", "l2_update",
    "l2_alloc_cow_read", "l2_alloc_write", "read_backing_aio", "read_compressed", "write_aio", "write_compressed",
    "cow_read", "cow_write", "reftable_load", "reftable_grow", "reftable_update", "refblock_load",
    "refblock_update_part", "refblock_alloc", "refblock_alloc_hookup", "refblock_alloc_write",
    "refblock_alloc_write_blocks", "refblock_alloc_write_table", "refblock_alloc_switch_table", "cluster_alloc",
    "cluster_alloc_bytes", "cluster_alloc_space", "cluster_free", "l1_shrink_write_table", "l1_shrink_free_l2_clusters",
    "flush_to_os", "flush_to_disk", "pwritev", "pwritev_zero",
)  # fmt: skip
RAW_EVENTS = ("write_aio", "flush_to_os", "flush_to_disk", "pwritev", "pwritev_zero", "pwritev_done", "l2_load")
RMW_EVENTS = tuple(event for event in EVENTS if "_rmw_" in event)

SEQUENCES = {
    "allocate a cluster": ("empty", ["write 0 65536"]),
    "allocate for a part and flush": ("empty", ["write 512 512", "flush"]),
    "overwrite and flush": ("full", ["write 0 65536", "flush"]),
    "flush after nothing": ("full", ["flush"]),
    "read": ("full", ["read 65536 512"]),
    "read from below": ("overlay", ["read 65536 512"]),
    "copy on write": ("overlay", ["write 512 512"]),
    "read a compressed cluster": ("compressed", ["read 0 512"]),
    "zero a cluster": ("full", ["write -z 0 65536"]),
    "zero a part": ("full", ["write -z 0 512"]),
    "run out of refcounts": ("small", ["write 0 300000"]),
    "grow the L1 table": ("small", ["truncate 4194304"]),
    "discard a cluster": ("full", ["discard 0 65536", "flush", "flush"]),
    "discard what is not allocated": ("empty", ["discard 0 65536", "flush"]),
    "discard a compressed cluster": ("compressed", ["discard 0 65536", "flush", "flush"]),
    "discard a snapshot's cluster": ("shared", ["discard 0 65536", "flush", "flush"]),
    "zero a cluster and unmap it": ("full", ["write -z -u 0 65536", "flush", "flush"]),
    "zero a compressed cluster": ("compressed", ["write -z 0 65536", "flush", "flush"]),
    "write over a compressed cluster": ("compressed", ["write 512 512", "flush", "flush"]),
    "write over a snapshot's cluster": ("shared", ["write 512 512", "flush", "flush"]),
}
#: images with an L2 table for each 32 KiB, all there; the last request is to the part that is left
SHRINKING = {
    "shrink by L2 tables": ["truncate 65536", "flush", "flush", "read 0 512"],
    "shrink by a part of an L2 table": [f"truncate {LENGTH - 1024}", "flush", "flush", "read 0 512"],
    "shrink by nothing": [f"truncate {LENGTH}", "read 0 512"],
}


def qemu_io(*words: str | Path) -> str:
    return subprocess.run(["qemu-io", *map(str, words)], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the images that SEQUENCES name."""
    path = tmp_path_factory.mktemp("images")

    def create(name: str, *options: str) -> None:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, name, str(LENGTH)], check=True, cwd=path)

    create("empty")
    create("small", "-o", "cluster_size=512")
    create("full")
    qemu_io("-f", "qcow2", "-c", f"write -P 1 0 {LENGTH}", path / "full")
    create("tables", "-o", "cluster_size=512")
    create("shared")
    for name in ("tables", "shared"):
        qemu_io("-f", "qcow2", "-c", f"write -P 1 0 {LENGTH}", path / name)
    subprocess.run(["qemu-img", "snapshot", "-c", "one", "shared"], check=True, cwd=path)
    create("overlay", "-b", str(path / "full"), "-F", "qcow2")
    (path / "text").write_bytes((b"text" * 3000).ljust(LENGTH, b"\0"))
    subprocess.run(
        ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "text", "compressed"], check=True, cwd=path
    )
    for name in ("empty", "small", "overlay", "compressed"):
        qemu_io("-f", "qcow2", "-c", f"write -P 2 {PROBE} 65536", path / name)
    return path


def stack(driver: str, image: Path, event: str) -> dict[str, Any]:
    rules = {
        "set-state": [{"event": event, "state": 1, "new_state": 2}],
        "inject-error": [{"event": "read_aio", "state": 2, "iotype": "read", "errno": errno.EPERM}],
    }
    return {
        "driver": driver,
        "discard": "unmap",
        "file": {"driver": "blkdebug", "image": {"driver": "file", "filename": str(image)}, **rules},
    }


#: what qemu-io says to a command of this kind, here in order to tell the stacks apart
SEPARATOR, SEPARATES = "resume nothing", "Could not resume request"


def happen_in_qemu_io(stacks: list[dict[str, Any]], commands: list[str]) -> list[bool]:
    """Whether a request fails, for each of *stacks*: one process opens them one after the other."""
    words = []
    for options in stacks:
        name = "json:" + json.dumps(options, separators=(",", ":"))
        words += [f"open -t writeback {name}", *commands, SEPARATOR, "close"]
    said = subprocess.run(
        ["qemu-io", *(word for command in words for word in ("-c", command))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not said.stderr, said.stderr
    parts = said.stdout.split(SEPARATES)
    assert len(parts) == len(stacks) + 1
    return ["Operation not permitted" in part for part in parts[:-1]]


async def happens_in_fusebd(options: dict[str, Any], commands: list[str]) -> bool:
    graph = Graph()
    try:
        await graph.blockdev_add({**options, "node-name": "top"})
        root = root_of(graph, "top", READ_WRITE | Perm.RESIZE)
        outcomes = {await carry_out(root, command) for command in commands}
        assert outcomes <= {"ok", "EPERM"}
        return "EPERM" in outcomes
    finally:
        await graph.close()


async def happening(
    driver: str, image: Path, events: Sequence[str], commands: list[str], **blkdebug: int
) -> tuple[list[str], list[str]]:
    """Which of *events* happen during *commands* here and in qemu-io; *blkdebug* are options of that node."""
    content, here, stacks = image.read_bytes(), [], []
    for event in events:
        work = image.with_name(f"{image.name}-{event}")
        options = stack(driver, work, event)
        options["file"] |= blkdebug
        stacks.append(options)
        work.write_bytes(content)
        if await happens_in_fusebd(options, commands):
            here.append(event)
        work.write_bytes(content)
    there = happen_in_qemu_io(stacks, commands)
    return here, [event for event, happens in zip(events, there, strict=True) if happens]


@pytest.mark.parametrize("name", SEQUENCES)
async def test_qcow2_announces_what_qemu_announces(images: Path, name: str) -> None:
    image, commands = SEQUENCES[name]
    here, there = await happening("qcow2", images / image, QCOW2_EVENTS, [*commands, f"read {PROBE} 512"])
    assert here == there


@pytest.mark.parametrize("name", SHRINKING)
async def test_qcow2_announces_how_it_shrinks(images: Path, name: str) -> None:
    # QEMU writes the L2 tables once more that it drops, and empties the L1 table by a zero write
    events = [event for event in QCOW2_EVENTS if event not in ("l2_update", "pwritev", "pwritev_zero")]
    here, there = await happening("qcow2", images / "tables", events, SHRINKING[name])
    assert here == there
    assert ("l1_shrink_write_table" in here) == (name == "shrink by L2 tables")


WRITE = ["write_aio", "pwritev", "pwritev_done"]


@pytest.mark.parametrize(
    ("commands", "events"),
    [
        (["write 0 4096"], WRITE),
        (["write 100 5"], WRITE),
        (["write -z 0 4096"], ["pwritev_zero", "pwritev_done"]),
        (["read 0 4096"], []),
        (["write 0 512", "flush"], [*WRITE, "flush_to_os", "flush_to_disk"]),
        (["flush"], ["flush_to_os"]),
    ],
    ids=str,
)
async def test_raw_announces_what_qemu_announces(images: Path, commands: list[str], events: list[str]) -> None:
    here, there = await happening("raw", images / "text", RAW_EVENTS, [*commands, "read 0 512"])
    assert here == there
    assert set(here) == set(events)


HEAD, TAIL = ["pwritev_rmw_head", "pwritev_rmw_after_head"], ["pwritev_rmw_tail", "pwritev_rmw_after_tail"]


@pytest.mark.parametrize(
    ("command", "events"),
    [
        ("write 0 4096", []),
        ("write 100 5", [*HEAD, *TAIL]),
        ("write 0 100", TAIL),
        ("write 100 412", HEAD),
        ("write 100 500", [*HEAD, *TAIL]),
        ("write 100 5000", [*HEAD, *TAIL]),
        ("write -z 100 5000", [*HEAD, *TAIL]),
        ("write -z 100 5", [*HEAD, *TAIL]),
    ],
    ids=str,
)
async def test_writes_that_are_not_aligned_announce_what_they_read(
    images: Path, command: str, events: list[str]
) -> None:
    here, there = await happening("raw", images / "text", RMW_EVENTS, [command, "read 0 512"], align=512)
    assert here == there == events
