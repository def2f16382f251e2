"""Logs of QEMU's blklogwrites and of ours: the same requests give the same bytes, and each appends to the other's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mounting import run
from support import READ_WRITE, root_of, write

from fusebd.block.graph import Graph
from fusebd.faults.writelog import Selection, WriteLog, replay

LENGTH = 4 << 20
#: (operation, offset, length, the byte that is written)
Request = tuple[str, int, int, int]


def requests(seed: int, count: int = 60, *, unit: int = 512) -> list[Request]:
    """Requests that all reach a log node whose sectors have *unit* bytes."""
    rng = random.Random(seed)
    made: list[Request] = []
    for _ in range(count):
        kind = rng.choice(["write", "write", "write", "zero", "discard", "flush"])
        length = rng.randrange(1, 65536 // unit) * unit
        offset = rng.randrange((LENGTH - length) // unit) * unit
        if kind == "write" and rng.random() < 0.3:
            offset, length = offset + rng.randrange(unit), rng.randrange(1, 3 * unit)
            length = min(length, LENGTH - offset)
        made.append((kind, offset, length, rng.randrange(1, 256)))
    return made


def qemu_options(path: Path, **options: Any) -> str:
    extra = "".join(f",{name.replace('_', '-')}={value}" for name, value in options.items())
    return (
        f"driver=blklogwrites,file.driver=file,file.filename={path}/disk,log.driver=file,log.filename={path}/log{extra}"
    )


def qemu_io(path: Path, todo: Sequence[Request], **options: Any) -> None:
    """Have qemu-io carry *todo* out on ``path/disk``, with its log in ``path/log``."""
    words = {
        "write": "write -q -P {byte} {offset} {length}",
        "zero": "write -q -z {offset} {length}",
        "discard": "discard -q {offset} {length}",
        "flush": "flush",
    }
    commands = [words[kind].format(byte=byte, offset=offset, length=length) for kind, offset, length, byte in todo]
    given = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-d", "unmap", "-t", "writeback", "--image-opts", qemu_options(path, **options), *given)


async def ours(graph: Graph, path: Path, todo: Sequence[Request], **options: Any) -> None:
    """Carry *todo* out on ``path/disk``, with the log in ``path/log``."""
    files = {name: {"driver": "file", "filename": str(path / name)} for name in ("disk", "log")}
    named = {name.replace("_", "-"): value for name, value in options.items()}
    node = {"driver": "blklogwrites", "node-name": "top", "discard": "unmap", **named}
    await graph.blockdev_add({**node, "file": files["disk"], "log": files["log"]})
    root = root_of(graph, "top", READ_WRITE)
    for kind, offset, length, byte in todo:
        if kind == "write":
            await write(root, offset, bytes([byte]) * length)
        elif kind == "zero":
            await root.pwrite_zeroes(offset, length)
        elif kind == "discard":
            await root.pdiscard(offset, length)
        else:
            await root.flush()
    await graph.detach_root(root)
    await graph.blockdev_del("top")


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """Two directories, each with a ``disk`` of the same content and an empty ``log``: QEMU's and ours."""
    made = tmp_path / "qemu", tmp_path / "ours"
    for path in made:
        path.mkdir()
        (path / "disk").write_bytes(random.Random(0).randbytes(LENGTH))
        (path / "log").write_bytes(b"")
    return made


@pytest.mark.parametrize("unit", [512, 4096])
@pytest.mark.parametrize("seed", range(3))
async def test_the_same_requests_give_the_same_log(
    graph: Graph, places: tuple[Path, Path], seed: int, unit: int
) -> None:
    todo = requests(seed, unit=unit)
    qemu_io(places[0], todo, log_sector_size=unit)
    await ours(graph, places[1], todo, log_sector_size=unit)
    assert (places[1] / "log").read_bytes() == (places[0] / "log").read_bytes()
    assert (places[1] / "disk").read_bytes() == (places[0] / "disk").read_bytes()


async def test_the_superblock_is_rewritten_at_the_same_times(graph: Graph, places: tuple[Path, Path]) -> None:
    # without flushes the superblock counts no more than the interval lets it
    todo = [request for request in requests(7, 40) if request[0] != "flush"]
    options = {"log_super_update_interval": 7}
    qemu_io(places[0], todo, **options, **{"cache.no_flush": "on"})
    await ours(graph, places[1], todo, **options, cache={"no-flush": True})
    assert (places[1] / "log").read_bytes() == (places[0] / "log").read_bytes()


async def test_each_appends_to_the_log_of_the_other(graph: Graph, places: tuple[Path, Path]) -> None:
    first, second, third = requests(1, 20), requests(2, 20), requests(3, 20)
    qemu_io(places[0], first)
    await ours(graph, places[1], first)
    await ours(graph, places[0], second, log_append=True)
    qemu_io(places[1], second, log_append="on")
    qemu_io(places[0], third, log_append="on")
    await ours(graph, places[1], third, log_append=True)
    assert (places[1] / "log").read_bytes() == (places[0] / "log").read_bytes()
    assert (places[1] / "disk").read_bytes() == (places[0] / "disk").read_bytes()


def test_a_log_of_qemu_replays_to_the_disk_that_it_wrote(places: tuple[Path, Path]) -> None:
    todo = requests(5)
    qemu_io(places[0], todo)
    with WriteLog(str(places[0] / "log")) as log:
        replay(log, str(places[1] / "disk"), Selection())
    assert (places[1] / "disk").read_bytes() == (places[0] / "disk").read_bytes()
