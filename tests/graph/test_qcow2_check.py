"""blockdev-check: what is wrong in an image is what qemu-img check finds wrong, and is mended likewise."""

from __future__ import annotations

import errno
import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from images import check_image, content, create, io, patch, u64
from mounting import run
from qmptalk import monitor
from support import READ_WRITE, read, root_of, write

from fusebd.block.graph import Graph
from fusebd.errors import BlockIOError, ImageError
from fusebd.ondisk import qcow2 as ondisk

K = 1024
Json = Any
COUNTED = (
    "corruptions", "leaks", "total-clusters", "allocated-clusters", "fragmented-clusters", "compressed-clusters",
    "image-end-offset",
)  # fmt: skip
IMAGES: dict[str, dict[str, Any]] = {
    "small": {"cluster_size": 512},
    "default": {},
    "version-2": {"compat": "0.10", "cluster_size": 4096},
    "narrow": {"cluster_size": 4096, "refcount_bits": 1},
    "wide": {"cluster_size": 4096, "refcount_bits": 64},
    "subclusters": {"cluster_size": "16k", "extended_l2": "on"},
    "snapshot": {"cluster_size": 4096, "snapshot": True},
    "compressed": {"cluster_size": 4096, "compressed": True, "snapshot": True},
}


def image(directory: Path, name: str) -> Path:
    options = dict(IMAGES[name])
    snapshot, compressed = (options.pop(word, False) for word in ("snapshot", "compressed"))
    path = create(directory / "image", "600k", **options)
    if compressed:
        io(path, *(f"write -c -P {number + 1} {number * 8}k 4k" for number in range(8)))
    io(path, "write -P 20 100k 64k", "write -P 21 300k 3k", "write -P 22 200k 30k", "write -z 256k 64k")
    if snapshot:
        run("qemu-img", "snapshot", "-c", "one", path)
        io(path, "write -P 30 110k 9k")
    return path


def by_qemu(path: Path, *options: str) -> Json:
    """What qemu-img check tells of the image: those of COUNTED that are not 0."""
    said = run("qemu-img", "check", "-f", "qcow2", "--output=json", *options, path, expect=(0, 2, 3))
    found = json.loads(said[said.index("{\n") :])
    return {name: found[name] for name in COUNTED if found.get(name)}


async def check(path: Path, fix: str = "") -> Json:
    """The same by fusebd."""
    options = {"fix": fix} if fix else {}
    async with monitor(path, **{"overlap-check": "none"}) as (_, talk):
        found = await talk.execute("blockdev-check", node_name="disk", **options)
    assert (found["filename"], found["format"], found["check-errors"]) == (str(path), "qcow2", 0)
    return found


def counted(found: Json) -> Json:
    return {name: found[name] for name in COUNTED if name in found}


def tables(path: Path) -> tuple[int, int]:
    """Where the refcount block and the first L2 table are."""
    data = path.read_bytes()
    header = ondisk.parse_header(data[: ondisk.HEADER_FULL_LENGTH])
    (block,) = struct.unpack_from(">Q", data, header["refcount_table_offset"])
    l1 = struct.unpack_from(f">{header['l1_size']}Q", data, header["l1_table_offset"])
    l2 = next(entry for entry in l1 if entry)
    return block, l2 & ondisk.OFFSET_MASK


@pytest.mark.parametrize("name", IMAGES)
async def test_a_sound_image_is_found_sound(tmp_path: Path, name: str) -> None:
    path = image(tmp_path, name)
    found = await check(path)
    assert counted(found) == by_qemu(path)
    assert "corruptions" not in found
    assert "leaks" not in found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", IMAGES)
async def test_wrong_refcounts_and_flags_are_counted_and_mended(tmp_path: Path, name: str, seed: int) -> None:
    path = image(tmp_path, name)
    text = content(path)
    rng = random.Random(seed)
    block, l2 = tables(path)
    used = path.stat().st_size // {"subclusters": 16 * K, "default": 64 * K, "small": 512}.get(name, 4 * K)
    bits = int(IMAGES[name].get("refcount_bits", 16))
    # not those of the metadata at the beginning: without them QEMU makes all refcounts anew
    for _ in range(rng.randrange(1, 4)):
        at = block + rng.randrange(6 * bits // 8 + 1, max(used * bits // 8, 6 * bits // 8 + 2))
        if bits >= 8:
            at = at // (bits // 8) * (bits // 8) + bits // 8 - 1
        old = path.read_bytes()[at]
        if old:
            patch(path, (at, bytes([old ^ (1 if bits == 1 else rng.choice([1, 3, 2]))])))
    for _ in range(rng.randrange(3)):
        at = l2 + 8 * rng.randrange(0, 64, 2 if name == "subclusters" else 1)
        (entry,) = struct.unpack_from(">Q", path.read_bytes(), at)
        if entry & ondisk.OFFSET_MASK and not entry & ondisk.COMPRESSED:
            patch(path, (at, u64(entry ^ ondisk.COPIED)))
    before = Path(shutil.copy(path, tmp_path / "before"))
    expected = by_qemu(before)
    found = await check(path)
    assert counted(found) == expected
    assert path.read_bytes() == before.read_bytes()
    leaks, corruptions = found.get("leaks", 0), found.get("corruptions", 0)
    found = await check(path, "leaks")
    assert found.get("leaks-fixed", 0) == leaks
    left = found.get("corruptions", 0)
    assert left <= corruptions
    found = await check(path, "all")
    assert "corruptions" not in found
    assert (found.get("corruptions-fixed", 0) > 0) == (left > 0)
    check_image(path)
    assert content(path) == text


@pytest.mark.parametrize(
    ("index", "entry"),
    [
        (0, ondisk.COPIED | 3 * 4096 + 512),
        (1, ondisk.COPIED | 1 << 40),
        (2, ondisk.COMPRESSED | ondisk.COPIED | 1 << 30),
    ],
    ids=["unaligned", "past the end", "compressed and copied"],
)
async def test_references_that_cannot_be_are_corruptions_that_stay(tmp_path: Path, index: int, entry: int) -> None:
    path = create(tmp_path / "image", "600k", cluster_size=4096)
    io(path, "write 0 64k")
    _, l2 = tables(path)
    patch(path, (l2 + 8 * index, u64(entry)))
    theirs, ours = by_qemu(path), await check(path)
    assert ours["corruptions"] == theirs["corruptions"]
    assert ours["leaks"] == theirs["leaks"] == 1
    found = await check(path, "all")
    assert 1 <= found["corruptions"] <= ours["corruptions"]
    assert found["leaks-fixed"] == 1


async def test_a_missing_refcount_block_is_made(tmp_path: Path) -> None:
    path = create(tmp_path / "image", "600k", cluster_size=512, refcount_bits=64)
    io(path, "write -P 9 0 600k")
    header = ondisk.parse_header(path.read_bytes()[: ondisk.HEADER_FULL_LENGTH])
    text = content(path)
    patch(path, (header["refcount_table_offset"] + 8 * 5, u64(0)))
    found = await check(path)
    assert found["corruptions"] >= 64
    found = await check(path, "all")
    assert "corruptions" not in found
    check_image(path, leaks=True)
    assert content(path) == text


async def test_a_disk_in_use_is_checked_between_requests(tmp_path: Path) -> None:
    path = create(tmp_path / "image", "4M", cluster_size=4096)
    async with monitor(path) as (graph, talk):
        root = root_of(graph, "disk", READ_WRITE)
        await write(root, 4096, b"x" * 100_000)
        found = await talk.execute("blockdev-check", node_name="disk", fix="all")
        assert found["allocated-clusters"] == 25
        assert {"leaks", "corruptions", "leaks-fixed"}.isdisjoint(found)
        await write(root, 1 << 20, b"y" * 100_000)
        await graph.detach_root(root)
    check_image(path)
    assert content(path)[4096:104_096] == b"x" * 100_000


async def test_what_cannot_be_mended_is_refused(tmp_path: Path) -> None:
    path = create(tmp_path / "image", "1M")
    async with monitor(path, **{"read-only": True}) as (_, talk):
        assert await talk.fail("blockdev-check", node_name="disk", fix="all") == "Image is read-only"
        assert (await talk.execute("blockdev-check", node_name="disk"))["total-clusters"] == 16
        assert await talk.fail("blockdev-check", node_name="disk", fix="some") == (
            "Parameter 'fix' does not accept value 'some'"
        )


def marked_corrupt(path: Path, name: str) -> Path:
    """The image with two clusters of the disk in the same place, of which QEMU has become aware."""
    _, l2 = tables(path)
    data = path.read_bytes()
    bits = data[23]
    words = 16 if IMAGES[name].get("extended_l2") else 8
    one, other = (l2 + words * ((100 * K >> bits) + number) for number in (0, 1))
    patch(path, (other, data[one : one + words]))
    return patch(path, (72, u64(int.from_bytes(data[72:80], "big") | ondisk.INCOMPAT_CORRUPT)))


@pytest.mark.parametrize("name", ["default", "wide", "subclusters", "snapshot"])
async def test_an_image_that_is_marked_as_corrupt_is_mended(tmp_path: Path, name: str) -> None:
    path = marked_corrupt(image(tmp_path, name), name)
    theirs = Path(shutil.copy(path, tmp_path / "theirs"))
    run("qemu-img", "check", "-r", "all", "-f", "qcow2", theirs, expect=(0, 2, 3))
    message = "qcow2: Image is corrupt; cannot be opened read/write"
    node = {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": str(path)}}
    graph = Graph()
    with pytest.raises(ImageError) as refused:
        await graph.blockdev_add(node)
    assert str(refused.value) == message
    await graph.close()
    async with monitor(path, **{"x-check": True}) as (graph, talk):
        root = root_of(graph, "disk", READ_WRITE)
        for request in (read(root, 0, 512), write(root, 0, b"x" * 512)):
            with pytest.raises(BlockIOError) as unusable:
                await request
            assert unusable.value.errno == errno.ENOMEDIUM
        for fix in ({}, {"fix": "leaks"}):
            assert (await talk.fail("blockdev-check", node_name="disk", **fix)).endswith("No medium found")
        found = await talk.execute("blockdev-check", node_name="disk", fix="all")
        assert found["corruptions-fixed"] > 0
        assert "corruptions" not in found
        await write(root, 0, b"x" * 512)
        assert await read(root, 0, 512) == b"x" * 512
        await graph.detach_root(root)
    io(theirs, "write -P 0x78 0 512")
    for file in (path, theirs):
        assert not file.read_bytes()[79] & (ondisk.INCOMPAT_CORRUPT | ondisk.INCOMPAT_DIRTY)
        check_image(file)
    assert content(path) == content(theirs)


async def test_an_image_found_corrupt_in_use_is_mended_in_use(tmp_path: Path) -> None:
    path = image(tmp_path, "default")
    expected = content(path)
    _, l2 = tables(path)
    entry = path.read_bytes()[l2 + 8 : l2 + 16]
    async with monitor(path) as (graph, talk):
        root = root_of(graph, "disk", READ_WRITE)
        patch(path, (l2 + 8, u64(ondisk.COPIED | 512)))  # not the beginning of a cluster
        with pytest.raises(BlockIOError):
            await read(root, 64 * K, 512)
        with pytest.raises(BlockIOError):
            await read(root, 0, 512)
        patch(path, (l2 + 8, entry))
        assert "corruptions" not in await talk.execute("blockdev-check", node_name="disk", fix="all")
        assert await read(root, 0, len(expected)) == expected
        await graph.detach_root(root)
    check_image(path)


async def test_what_cannot_be_mended_stays_corrupt(tmp_path: Path) -> None:
    path = image(tmp_path, "default")
    _, l2 = tables(path)
    patch(path, (l2 + 8, u64(ondisk.COPIED | 512)), (72, u64(ondisk.INCOMPAT_CORRUPT)))
    async with monitor(path, **{"x-check": True}) as (graph, talk):
        found = await talk.execute("blockdev-check", node_name="disk", fix="all")
        assert found["corruptions"] > 0
        root = root_of(graph, "disk", READ_WRITE)
        with pytest.raises(BlockIOError):
            await read(root, 0, 512)
        await graph.detach_root(root)
    assert path.read_bytes()[79] & ondisk.INCOMPAT_CORRUPT
