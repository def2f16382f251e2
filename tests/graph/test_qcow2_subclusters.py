"""qcow2 images with extended L2 entries: the same requests leave the same subclusters as in QEMU's hands."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from disks import closed, opened
from images import check_image, content, create, info, io, patch, u64
from mounting import run
from support import read, write

from fusebd.block.blockstatus import block_status_above
from fusebd.block.child import MAY_UNMAP
from fusebd.block.graph import Graph
from fusebd.block.root import Root
from fusebd.block.status import Status
from fusebd.errors import BlockIOError
from fusebd.ondisk import qcow2 as ondisk

K = 1024
CLUSTER, SIZE = 64 * K, 12 * 64 * K
IMAGES: dict[str, dict[str, Any]] = {
    "alone": {},
    "backed": {"backed": True},
    "backed-shorter": {"backed": True, "backing_size": SIZE // 2 + 512},
    "snapshot": {"backed": True, "snapshot": True},
    "compressed": {"compressed": True},
    "compressed-snapshot": {"compressed": True, "backed": True, "snapshot": True},
    "metadata": {"preallocation": "metadata"},
    "data-file": {"data_file": "data"},
    "data-file-raw": {"data_file": "data", "data_file_raw": "on"},
}


def image(directory: Path, name: str) -> Path:
    """The image of a name in IMAGES, with something in it."""
    options = dict(IMAGES[name])
    backed, snapshot, compressed = (options.pop(word, False) for word in ("backed", "snapshot", "compressed"))
    backing = directory / "backing"
    backing.write_bytes(random.Random(0).randbytes(options.pop("backing_size", SIZE)))
    if "data_file" in options:
        options["data_file"] = directory / options["data_file"]
    path = directory / "image"
    create(path, SIZE, backing=backing if backed else None, backing_format="raw", extended_l2="on", **options)
    if compressed:
        io(path, *(f"write -c -P {number + 1} {number * 3 * 64}k 64k" for number in range(4)))
    io(path, "write -P 200 70k 9k", "write -P 201 300k 170k", "write -z 500k 20k")
    if snapshot:
        run("qemu-img", "snapshot", "-c", "one", path)
    return path


@dataclass(frozen=True)
class Change:
    """A write of bytes *value*, or a zero write, an unmapping one, or a discard."""

    kind: str
    offset: int
    length: int
    value: int = 0

    @property
    def command(self) -> str:
        """For qemu-io."""
        place = f"{self.offset} {self.length}"
        words = {"write": f"write -P {self.value}", "zero": "write -z", "unmap": "write -z -u", "discard": "discard"}
        return f"{words[self.kind]} {place}"

    async def carry_out(self, root: Root) -> None:
        if self.kind == "write":
            await write(root, self.offset, bytes([self.value]) * self.length)
        elif self.kind == "discard":
            await root.pdiscard(self.offset, self.length)
        else:
            await root.pwrite_zeroes(self.offset, self.length, MAY_UNMAP if self.kind == "unmap" else 0)


def changes(rng: random.Random, count: int) -> list[Change]:
    made = []
    for _ in range(count):
        offset = rng.choice(
            [rng.randrange(SIZE // 512) * 512, rng.randrange(SIZE // 2048) * 2048, rng.randrange(12) * CLUSTER]
        )
        length = rng.choice([512, 2048, 3 * 2048, 7000 // 512 * 512, CLUSTER, 2 * CLUSTER, 2 * CLUSTER + 4096])
        kind = rng.choice(["write", "write", "write", "zero", "unmap", "discard"])
        made.append(Change(kind, offset, min(length, SIZE - offset), rng.randrange(1, 200)))
    return made


def entries(path: Path) -> list[tuple[str, int]]:
    """Of each cluster: whether it has a host cluster, or is compressed, and its bitmap."""
    data = path.read_bytes()
    header = ondisk.parse_header(data[: ondisk.HEADER_FULL_LENGTH])
    (l1,) = struct.unpack_from(">Q", data, header["l1_table_offset"])
    table = l1 & ondisk.OFFSET_MASK
    found = []
    for number in range(SIZE // CLUSTER):
        entry, bitmap = struct.unpack_from(">QQ", data, table + 16 * number) if table else (0, 0)
        allocated = entry & (ondisk.OFFSET_MASK | (ondisk.COPIED if header["incompatible_features"] & 4 else 0))
        kind = "compressed" if entry & ondisk.COMPRESSED else "allocated" if allocated else ""
        found.append((kind, bitmap))
    return found


# In a raw data file a discard leaves clusters where they are here, so that both read the same whoever looks.
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", [name for name in IMAGES if name != "data-file-raw"])
async def test_subclusters_become_what_they_become_in_qemu(graph: Graph, tmp_path: Path, name: str, seed: int) -> None:
    path = image(tmp_path, name)
    data, copies = path.with_name("data"), [path.with_name("image.before"), path.with_name("data.before")]
    kept = [shutil.copy(source, copy) for source, copy in zip([path, data], copies, strict=True) if source.exists()]
    requests = changes(random.Random(seed), 12)
    # QEMU's own unaligned zero writes may fall back to data where the rest of a subcluster is not known to be zero
    io(path, *(request.command for request in requests))
    expected, text = entries(path), content(path)
    for copy in kept:
        shutil.copy(copy, str(copy).removesuffix(".before"))
    root = await opened(graph, path)
    for request in requests:
        await request.carry_out(root)
    found = await read(root, 0, SIZE)
    await closed(graph, root)
    assert found == text
    assert entries(path) == expected
    assert content(path) == text
    check_image(path)


@pytest.mark.parametrize("name", IMAGES)
async def test_ten_rounds_in_turn_with_qemu(graph: Graph, tmp_path: Path, name: str) -> None:
    path = image(tmp_path, name)
    rng = random.Random(name)
    for _ in range(10):
        root = await opened(graph, path)
        for request in changes(rng, 5):
            await request.carry_out(root)
        found = await read(root, 0, SIZE)
        if name != "data-file-raw":
            assert await extents(root) == mapped(path)
        await closed(graph, root)
        assert content(path) == found
        io(path, *(request.command for request in changes(rng, 5)))
    check_image(path)
    assert info(path)["format-specific"]["data"]["extended-l2"] is True


async def extents(root: Root) -> list[tuple[int, int, bool]]:
    """(offset, length, whether it is known to be zero) of what is there."""
    await root.flush()
    found: list[tuple[int, int, bool]] = []
    at = 0
    while at < SIZE:
        status = await block_status_above(root.node, at, SIZE - at)
        zero = bool(status.flags & Status.ZERO)
        if found and found[-1][2] == zero:
            found[-1] = found[-1][0], found[-1][1] + status.length, zero
        else:
            found.append((at, status.length, zero))
        at += status.length
    return found


def mapped(path: Path) -> list[tuple[int, int, bool]]:
    """The same by qemu-img map."""
    found: list[tuple[int, int, bool]] = []
    for extent in json.loads(run("qemu-img", "map", "-U", "-f", "qcow2", "--output=json", path)):
        start, length, zero = extent["start"], extent["length"], extent["zero"]
        if found and found[-1][2] == zero:
            found[-1] = found[-1][0], found[-1][1] + length, zero
        else:
            found.append((start, length, zero))
    return found


@pytest.mark.parametrize(
    ("edit", "offset"),
    [((8, u64(0xFFFF_FFFF | 1 << 40)), 8 * 2048), ((0, u64(0) + u64(1)), 0)],
    ids=["zero-and-allocated", "allocated-nowhere"],
)
async def test_bitmaps_that_cannot_be_are_corruption(
    graph: Graph, tmp_path: Path, edit: tuple[int, bytes], offset: int
) -> None:
    path = create(tmp_path / "image", SIZE, extended_l2="on")
    io(path, "write 0 64k")
    header = ondisk.parse_header(path.read_bytes()[:112])
    l1 = int.from_bytes(path.read_bytes()[header["l1_table_offset"] :][:8], "big") & ondisk.OFFSET_MASK
    patch(path, (l1 + edit[0], edit[1]))
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    said = run("qemu-io", "-f", "qcow2", "-c", f"read {offset} 512", copy, expect=(1,))
    root = await opened(graph, path)
    with pytest.raises(BlockIOError, match="Invalid cluster entry found ") as caught:
        await read(root, offset, 512)
    assert caught.value.reason.replace("  ", " ") in said.replace("  ", " ")
    with pytest.raises(BlockIOError):
        await write(root, offset, b"x" * 512)
    await closed(graph, root)


async def test_only_subclusters_that_are_touched_are_copied(graph: Graph, tmp_path: Path) -> None:
    """Bytes that go to the file for 512 of a guest's: those of one subcluster."""
    backing = tmp_path / "backing"
    backing.write_bytes(b"b" * SIZE)
    path = create(tmp_path / "image", SIZE, backing=backing, backing_format="raw", extended_l2="on")
    root = await opened(graph, path)
    await write(root, 0, b"x" * 512)
    before = root.node.children["file"].node.counted().wr_bytes
    await write(root, 3 * CLUSTER + 4096 + 512, b"x" * 512)
    assert root.node.children["file"].node.counted().wr_bytes - before == 2048
    assert await read(root, 3 * CLUSTER, CLUSTER) == b"b" * 4608 + b"x" * 512 + b"b" * (CLUSTER - 5120)
    await closed(graph, root)
    check_image(path)


def test_no_request_has_been_left_out() -> None:
    kinds: Sequence[str] = [change.kind for seed in range(6) for change in changes(random.Random(seed), 12)]
    assert set(kinds) == {"write", "zero", "unmap", "discard"}
