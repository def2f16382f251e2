"""The power fails while qcow2 images are written at random: they have no errors, and all that was flushed."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from images import after_power_cut, check_image, content, create, io, is_dirty
from mounting import run
from support import READ_WRITE, recorder_of, root_of, write

from fusebd.block.child import MAY_UNMAP
from fusebd.block.graph import Graph
from fusebd.block.root import Root

SECTOR = 512
CUTS = 8
IMAGES: dict[str, dict[str, Any]] = {
    "small": {"cluster_size": 512},
    "small-v2": {"cluster_size": 512, "compat": "0.10"},
    "wide-refcounts": {"cluster_size": 512, "refcount_bits": 64},
    "lazy": {"cluster_size": 512, "lazy_refcounts": "on"},
    "lazy-snapshot": {"cluster_size": 2048, "lazy_refcounts": "on", "snapshot": True},
    "snapshot": {"cluster_size": 1024, "snapshot": True},
    "backed": {"cluster_size": 4096, "backed": True},
    "compressed": {"cluster_size": 4096, "compressed": True},
    "subclusters": {"cluster_size": "16k", "extended_l2": "on"},
    "subclusters-backed": {"cluster_size": "16k", "extended_l2": "on", "backed": True},
    "default": {},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The image of a name in IMAGES, used already, and what is in it."""
    directory = tmp_path_factory.mktemp("images")

    @cache
    def image(name: str) -> tuple[Path, bytes]:
        options = dict(IMAGES[name])
        snapshot, backed, compressed = (options.pop(word, False) for word in ("snapshot", "backed", "compressed"))
        path, backing = directory / name, directory / "backing"
        backing.write_bytes(random.Random(0).randbytes(100 << 10))
        create(path, "160k", backing=backing if backed else None, backing_format="raw", **options)
        if compressed:
            io(path, *(f"write -c -P {number + 1} {number * 8}k 4k" for number in range(8)))
        io(path, "write -P 200 3k 20k", "write -P 201 90k 30k")
        if snapshot:
            run("qemu-img", "snapshot", "-c", "one", path)
        return path, content(path)

    return image


@dataclass
class Disk:
    """What is on the disk, and what may be: since the last flush a sector has had several contents."""

    model: bytearray
    flushed: bytes = b""
    since: dict[int, list[bytes]] = field(default_factory=dict)
    #: (length of the journal when it began, ``flushed``, a copy of ``since``) for each request
    history: list[tuple[int, bytes, dict[int, list[bytes]]]] = field(default_factory=list)

    def change(self, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data
        for at in range(offset, offset + len(data), SECTOR):
            self.since.setdefault(at, []).append(bytes(self.model[at : at + SECTOR]))

    def note(self, journal_length: int) -> None:
        self.history.append((journal_length, self.flushed, {at: list(found) for at, found in self.since.items()}))

    def flush(self) -> None:
        self.flushed = bytes(self.model)
        self.since = {}

    def judge(self, moment: int, found: bytes) -> None:
        """AssertionError if *found* cannot be what is left when the journal had the length *moment*."""
        _, flushed, since = next(entry for entry in reversed(self.history) if entry[0] <= moment)
        assert len(found) == len(flushed)
        for at in range(0, len(found), SECTOR):
            sector = found[at : at + SECTOR]
            assert sector == flushed[at : at + SECTOR] or sector in since.get(at, []), f"sector at {at}"


async def work(root: Root, disk: Disk, journal: list[Any], rng: random.Random, cluster: int) -> None:
    """Some requests, of whole sectors; *disk* keeps account."""
    for _ in range(rng.randrange(10, 30)):
        offset = rng.randrange(len(disk.model) // SECTOR) * SECTOR
        if rng.random() < 0.5:
            offset = offset // cluster * cluster
        length = min(rng.choice([SECTOR, 2 * SECTOR, cluster, 3 * cluster]), len(disk.model) - offset)
        began, kind = len(journal), rng.choice(["write", "write", "write", "zero", "unmap", "discard", "flush"])
        if kind == "flush":
            disk.note(began)
            await root.flush()
            disk.flush()
        elif kind == "write":
            data = rng.randbytes(length)
            disk.change(offset, data)
            disk.note(began)
            await write(root, offset, data)
        elif kind == "discard" and root.node.backing is None:
            start, end = -(-offset // cluster) * cluster, (offset + length) // cluster * cluster
            disk.change(start, bytes(max(0, end - start)))
            disk.note(began)
            await root.pdiscard(start, max(0, end - start))
        else:
            disk.change(offset, bytes(length))
            disk.note(began)
            await root.pwrite_zeroes(offset, length, MAY_UNMAP if kind == "unmap" else 0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", IMAGES)
async def test_what_was_flushed_is_there_and_the_image_is_sound(
    images: Any, tmp_path: Path, name: str, seed: int
) -> None:
    source, data = images(name)
    path = Path(shutil.copy(source, tmp_path / "image"))
    before = source.read_bytes()
    rng = random.Random(seed)
    graph = Graph()
    file = {"driver": "file", "filename": str(path), "cache": {"no-flush": True}}
    await graph.blockdev_add({"driver": "test-recorder", "node-name": "recorder", "file": file})
    journal = recorder_of(graph, "recorder").journal
    caches = rng.choice([{}, {"cache-size": 0}])
    node = await graph.blockdev_add(
        {"driver": "qcow2", "node-name": "disk", "file": "recorder", "discard": "unmap", **caches}
    )
    cluster = node.driver.limits.pdiscard_alignment
    disk = Disk(bytearray(data), bytes(data))
    disk.note(0)
    await work(root_of(graph, "disk", READ_WRITE), disk, journal, rng, cluster)
    disk.note(len(journal))
    await graph.close()
    for moment in rng.sample(range(len(journal) + 1), min(CUTS, len(journal) + 1)):
        path.write_bytes(after_power_cut(before, journal[:moment], rng))
        if is_dirty(path):  # as it is with lazy refcounts, and whoever opens it repairs it
            run("qemu-io", "-c", "read 0 512", path)
        check_image(path, leaks=True)
        disk.judge(moment, content(path))
