"""Persistent dirty bitmaps of qcow2 images, kept in turns with QEMU's programs, which judge them."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from images import after_power_cut, check_image, content, create, info, io, patch, u16, u32, u64
from mounting import run
from qemuprograms import storage_daemon
from qmptalk import disk, monitor, talking
from support import READ_WRITE, recorder_of, root_of, write

from fusebd.block.graph import Graph
from fusebd.errors import BlockIOError, FusebdError
from fusebd.qmp.server import QmpServer

K, M = 1024, 1 << 20
Json = Any
LONG = bool(os.environ.get("FUSEBD_LONG"))
ADD, REMOVE, CLEAR, DISABLE = (f"block-dirty-bitmap-{verb}" for verb in ("add", "remove", "clear", "disable"))
SHA256 = "x-debug-block-dirty-bitmap-sha256"
CLUSTER_SIZES = [512, 4096, 65536, 2 * M]


async def write_to(graph: Graph, *ranges: tuple[int, int]) -> None:
    """Write to (offset, length) each."""
    root = root_of(graph, "disk", READ_WRITE)
    for offset, length in ranges:
        await write(root, offset, b"w" * length)
    await graph.detach_root(root)


def of_node(nodes: Json) -> Json:
    return next(node for node in nodes if node["node-name"] == "disk")


def seen(path: Path, *, read_only: bool = True) -> dict[str, Json]:
    """What qemu-storage-daemon says of each bitmap in the image: its members, and the hash of its bits."""
    with storage_daemon() as qemu:
        qemu("blockdev-add", disk(path, **{"read-only": read_only}))
        found = of_node(qemu("query-named-block-nodes", {"flat": True})).get("dirty-bitmaps", [])
        return {
            bitmap["name"]: {**bitmap, "sha256": qemu(SHA256, {"node": "disk", "name": bitmap["name"]})["sha256"]}
            for bitmap in found
        }


def listed(path: Path) -> list[Json]:
    found: list[Json] = info(path)["format-specific"]["data"].get("bitmaps", [])
    return found


def bitmap(path: Path, *words: str) -> None:
    run("qemu-img", "bitmap", *words[:-1], path, words[-1])


def with_bitmaps(path: Path, size: str = "4M", **options: Any) -> Path:
    """An image that has the bitmaps ``fine``, ``coarse``, and ``off``, which does not record."""
    create(path, size, **options)
    bitmap(path, "--add", "-g", "512", "fine")
    bitmap(path, "--add", "coarse")
    io(path, "write 100k 70k")
    bitmap(path, "--add", "--disable", "-g", "4k", "off")
    return path


RANGES = ((0, 512), (M - 100, 200), (3 * M, 70 * K))
COMMANDS = ("write 0 512", f"write {M - 100} 200", "write 3M 70k")


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
async def test_bitmaps_are_loaded_kept_and_stored_as_qemu_does(tmp_path: Path, cluster_size: int) -> None:
    ours = with_bitmaps(tmp_path / "ours", cluster_size=cluster_size)
    theirs = Path(shutil.copy(ours, tmp_path / "theirs"))
    before = seen(ours)
    async with monitor(ours) as (graph, talk):
        shown = of_node(await talk.execute("query-named-block-nodes"))
        assert shown["dirty-bitmaps"] == [
            {name: value for name, value in entry.items() if name != "sha256"} for entry in before.values()
        ]
        for name, entry in before.items():
            assert await talk.execute(SHA256, node="disk", name=name) == {"sha256": entry["sha256"]}
        assert [entry["flags"] for entry in listed(ours)] == [["in-use", "auto"], ["in-use", "auto"], ["in-use"]]
        assert shown["image"]["format-specific"] == info(ours)["format-specific"]
        await write_to(graph, *RANGES)
    io(theirs, *COMMANDS)
    for path in (ours, theirs):
        check_image(path)
    assert seen(ours) == seen(theirs)
    assert seen(ours) != before
    assert listed(ours) == listed(theirs)
    # and the other way round
    io(ours, "write 2M 300k")
    io(theirs, "write 2M 300k")
    async with monitor(ours) as (_, talk):
        for name, entry in seen(theirs).items():
            assert await talk.execute(SHA256, node="disk", name=name) == {"sha256": entry["sha256"]}
    assert seen(ours) == seen(theirs)
    check_image(ours)


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
async def test_new_bitmaps_are_stored_and_removed_ones_are_gone(tmp_path: Path, cluster_size: int) -> None:
    path = create(tmp_path / "disk", "4M", cluster_size=cluster_size)
    theirs = Path(shutil.copy(path, tmp_path / "theirs"))
    for name, granularity in (("b", 512), ("a", 65536)):
        bitmap(theirs, "--add", "-g", str(granularity), name)
    async with monitor(path) as (graph, talk):
        await talk.execute(ADD, node="disk", name="a", persistent=True, granularity=65536)
        await talk.execute(ADD, node="disk", name="b", persistent=True, granularity=512)
        await talk.execute(ADD, node="disk", name="passing")
        await write_to(graph, *RANGES)
    io(theirs, *COMMANDS)
    check_image(path)
    assert seen(path) == dict(reversed(seen(theirs).items()))
    assert listed(path) == listed(theirs)
    async with monitor(path) as (_, talk):
        await talk.execute(REMOVE, node="disk", name="a")
        assert [entry["name"] for entry in listed(path)] == ["b"]
        await talk.execute(DISABLE, node="disk", name="b")
    assert listed(path) == [{"name": "b", "granularity": 512, "flags": []}]
    check_image(path)
    async with monitor(path) as (_, talk):
        await talk.execute(REMOVE, node="disk", name="b")
    assert listed(path) == []
    check_image(path)


async def test_an_image_that_is_only_read_stays_as_it_is(tmp_path: Path) -> None:
    path = with_bitmaps(tmp_path / "disk")
    before = path.read_bytes()
    async with monitor(path, **{"read-only": True}) as (_, talk):
        for command in (CLEAR, REMOVE):
            said = await talk.fail(command, node="disk", name="fine")
            assert said == "Bitmap 'fine' is readonly and cannot be modified"
        assert await talk.fail(ADD, node="disk", name="fine") == "Bitmap already exists: fine"
        await talk.execute(ADD, node="disk", name="new")
    assert path.read_bytes() == before


async def test_bitmaps_that_were_in_use_are_inconsistent(tmp_path: Path) -> None:
    path = with_bitmaps(tmp_path / "disk")
    async with monitor(path) as (graph, _):
        await write_to(graph, *RANGES)
        copy = Path(shutil.copy(path, tmp_path / "copy"))
    theirs = seen(copy, read_only=False)
    async with monitor(copy) as (_, talk):
        shown = of_node(await talk.execute("query-named-block-nodes"))["dirty-bitmaps"]
        assert [dict(entry, sha256=theirs[entry["name"]]["sha256"]) for entry in shown] == list(theirs.values())
        assert all(entry["inconsistent"] for entry in shown)
        said = await talk.fail(CLEAR, node="disk", name="fine")
        assert said == "Bitmap 'fine' is inconsistent and cannot be used"
        said = await talk.fail("block_resize", node_name="disk", size=8 * M)
        assert said == "Bitmap 'fine' is inconsistent and cannot be used"
        await talk.execute(REMOVE, node="disk", name="fine")
    assert [entry["name"] for entry in listed(copy)] == ["coarse", "off"]
    check_image(copy)


async def test_bitmaps_are_forgotten_if_a_program_without_them_has_written(tmp_path: Path) -> None:
    path = with_bitmaps(tmp_path / "disk")
    patch(path, (88, u64(0)))
    before = path.read_bytes()
    async with monitor(path, **{"read-only": True}) as (_, talk):
        assert "dirty-bitmaps" not in of_node(await talk.execute("query-named-block-nodes"))
    assert path.read_bytes() == before
    async with monitor(path) as (_, talk):
        assert "dirty-bitmaps" not in of_node(await talk.execute("query-named-block-nodes"))
        await talk.execute(ADD, node="disk", name="fine", persistent=True)
    assert [entry["name"] for entry in listed(path)] == ["fine"]
    run("qemu-img", "check", "-q", "-r", "leaks", path)
    check_image(path)
    assert set(seen(path)) == {"fine"}


async def test_bitmaps_change_their_length_with_the_disk(tmp_path: Path) -> None:
    path = with_bitmaps(tmp_path / "disk")
    theirs = Path(shutil.copy(path, tmp_path / "theirs"))
    async with monitor(path) as (graph, talk):
        await talk.execute("block_resize", node_name="disk", size=40 * M)
        await write_to(graph, (39 * M, K))
        await talk.execute("block_resize", node_name="disk", size=120 * K)
    io(theirs, "truncate 40M", "write 39M 1k", "truncate 120k")
    check_image(path)
    assert seen(path) == seen(theirs)


async def test_bitmaps_and_snapshots_get_on(tmp_path: Path) -> None:
    path = with_bitmaps(tmp_path / "disk")
    async with monitor(path) as (graph, talk):
        await talk.execute("blockdev-snapshot-internal-sync", device="disk", name="one")
        await write_to(graph, *RANGES)
        said = await talk.fail("blockdev-snapshot-apply-internal-sync", device="disk", name="one")
        assert said == "Device has active dirty bitmaps"
        await talk.execute("blockdev-snapshot-delete-internal-sync", device="disk", name="one")
    check_image(path)


async def test_a_node_that_is_reopened_keeps_its_bitmaps(tmp_path: Path) -> None:
    path = with_bitmaps(tmp_path / "disk")
    theirs = Path(shutil.copy(path, tmp_path / "theirs"))
    async with monitor(path) as (graph, talk):
        await write_to(graph, RANGES[0])
        await talk.execute("blockdev-reopen", options=[disk(path, **{"cache-size": 0})])
        await write_to(graph, RANGES[1])
        await talk.execute("blockdev-reopen", options=[disk(path, **{"read-only": True})])
        assert all("in-use" not in entry["flags"] for entry in listed(path))
        said = await talk.fail(CLEAR, node="disk", name="fine")
        assert said == "Bitmap 'fine' is readonly and cannot be modified"
        await talk.execute("blockdev-reopen", options=[disk(path, **{"read-only": False})])
        assert all("in-use" in entry["flags"] for entry in listed(path))
        await write_to(graph, RANGES[2])
        await talk.fail("blockdev-reopen", options=[disk(path, **{"read-only": True, "detect-zeroes": "unmap"})])
        await talk.execute("blockdev-reopen", options=[disk(path)])
    io(theirs, *COMMANDS)
    check_image(path)
    assert seen(path) == seen(theirs)


async def test_an_image_with_bitmaps_is_not_exchanged_for_another(tmp_path: Path) -> None:
    path = with_bitmaps(tmp_path / "disk")
    other = create(tmp_path / "other", "4M")
    async with monitor(path) as (graph, talk):
        await graph.blockdev_add({"driver": "file", "node-name": "other", "filename": str(other)})
        said = await talk.fail("blockdev-reopen", options=[disk(path, file="other")])
        assert said == "The file of node 'disk' cannot be exchanged: it has persistent dirty bitmaps"
    assert len(listed(path)) == 3
    assert not listed(other)


@pytest.mark.parametrize("cluster_size", [512, 65536])
async def test_the_header_keeps_what_else_is_in_it(tmp_path: Path, cluster_size: int) -> None:
    backing = create(tmp_path / "backing", "4M")
    io(backing, "write -P 7 0 1M")
    path = create(tmp_path / "disk", "4M", backing=backing, cluster_size=cluster_size)
    before, data = info(path), content(path)
    async with monitor(path) as (_, talk):
        await talk.execute(ADD, node="disk", name="map", persistent=True)
    assert [entry["name"] for entry in listed(path)] == ["map"]
    assert info(path)["full-backing-filename"] == before["full-backing-filename"]
    assert content(path) == data
    check_image(path)
    io(path, "write 0 1k")
    async with monitor(path) as (_, talk):
        await talk.execute(REMOVE, node="disk", name="map")
    after = info(path)
    assert after["format-specific"] == before["format-specific"]
    assert after["backing-filename"] == before["backing-filename"]
    check_image(path)


async def test_a_dirty_image_is_repaired_with_its_bitmaps(tmp_path: Path) -> None:
    path = with_bitmaps(tmp_path / "disk", cluster_size=512)
    before = seen(path)
    patch(path, (72, u64(1)))
    async with monitor(path):
        pass
    check_image(path)
    assert seen(path) == before


def damages(path: Path) -> dict[str, tuple[tuple[int, bytes], str]]:
    """Edits of the image *path*, and what an opening of it says then."""
    data = path.read_bytes()
    at = data.index(u32(0x23852875) + u32(24)) + 8
    directory = int.from_bytes(data[at + 16 : at + 24], "big")
    table = int.from_bytes(data[directory : directory + 8], "big")
    unsound = "Bitmap 'fine' doesn't satisfy the constraints"
    read = "Could not read bitmap_table table from image for bitmap 'fine': Invalid argument"
    return {
        "more": ((at, u32(1)), "More bitmaps found than specified in header extension"),
        "less": ((at, u32(9)), "Less bitmaps found than specified in header extension"),
        "short": ((at + 8, u64(10)), "Broken bitmap directory"),
        "empty": ((at + 8, u64(0)), "Requested bitmap directory size is zero"),
        "name": ((directory + 18, u16(60000)), "Broken bitmap directory"),
        "extra": ((directory + 20, u32(8)), "Bitmap extra data is not supported"),
        "type": ((directory + 16, b"\2"), unsound),
        "granularity": ((directory + 17, b"\40"), unsound),
        "flags": ((directory + 12, u32(6)), unsound),
        "no table": ((directory, u64(0)), unsound),
        "unaligned": ((directory, u64(0x10001)), unsound),
        "small": ((directory + 8, u32(0)), unsound),
        "large": ((directory + 8, u32(1 << 27)), unsound),
        "long": ((directory + 8, u32(2)), "Could not read bitmap 'fine' from image: Invalid argument"),
        "entry": ((table, u64(1 << 60)), read),
        "offset": ((table, u64(0x200)), read),
        "both": ((table, u64(0x10001)), read),
    }


DAMAGES = ["more", "less", "short", "empty", "name", "extra", "type", "granularity", "flags", "no table", "unaligned"]
DAMAGES += ["small", "large", "long", "entry", "offset", "both"]


@pytest.mark.parametrize("damage", DAMAGES)
async def test_malformed_bitmaps_are_refused_as_qemu_does(tmp_path: Path, damage: str) -> None:
    path = with_bitmaps(tmp_path / "disk")
    edit, message = damages(path)[damage]
    patch(path, edit)
    graph = Graph()
    with pytest.raises(FusebdError) as caught:
        await graph.blockdev_add(disk(path))
    await graph.close()
    assert str(caught.value) == message
    said = run("qemu-io", "-f", "qcow2", "-c", "quit", path, expect=(1,))
    assert message in said


# The messages are those of qemu-storage-daemon 10.0.2.
async def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", 1 << 45)
    old = create(tmp_path / "old", "1M", compat="0.10")
    async with monitor(path) as (graph, talk):
        await graph.blockdev_add(disk(old, **{"node-name": "old"}))
        said = await talk.fail(ADD, node="disk", name="x", persistent=True, granularity=512)
        assert said == (
            "Can't make bitmap 'x' persistent in 'disk': Too much space will be occupied by the bitmap. "
            "Use larger granularity"
        )
        said = await talk.fail(ADD, node="old", name="x", persistent=True)
        assert said == "Can't make bitmap 'x' persistent in 'old': Cannot store dirty bitmaps in qcow2 v2 files"
        await talk.execute(ADD, node="old", name="x")


async def attempt(path: Path, request: str, number: int) -> tuple[bool, bool]:
    """Open, change and close the image, while *request* number *number* of the file fails.

    Whether it came to that, and whether the image was opened.
    """
    graph = Graph()
    below = {"driver": "file", "filename": str(path), "cache": {"no-flush": True}}
    node = await graph.blockdev_add({"driver": "test-recorder", "node-name": "recorder", "file": below})
    carry_out, left, opened = getattr(node.driver, request), number, False

    async def failing(*arguments: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise BlockIOError(28, node_name="recorder", operation=request)
        await carry_out(*arguments)

    setattr(node.driver, request, failing)
    try:
        await graph.blockdev_add({"driver": "qcow2", "node-name": "disk", "file": "recorder"})
        opened = True
        async with talking(QmpServer(graph, lambda: None)) as talk:
            await talk.execute(ADD, node="disk", name="new", persistent=True, granularity=4096)
            with contextlib.suppress(BlockIOError):
                await write_to(graph, RANGES[0])
            await talk.ask({"execute": REMOVE, "arguments": {"node": "disk", "name": "off"}})
    except FusebdError:
        pass  # it could not be opened
    await graph.close()
    return left <= 0, opened


@pytest.mark.parametrize("request_name", ["preadv", "pwritev", "flush_to_disk"])
async def test_after_a_failure_no_bitmap_is_wrong(tmp_path: Path, request_name: str) -> None:
    source = with_bitmaps(tmp_path / "source", cluster_size=512)
    before = seen(source)
    path = Path(shutil.copy(source, tmp_path / "disk"))
    await attempt(path, request_name, 10**6)
    right = seen(path)
    number = 1
    while True:
        shutil.copy(source, path)
        failed, opened = await attempt(path, request_name, number)
        if not failed:
            break
        check_image(path, leaks=True)
        for name, entry in seen(path).items():
            if not entry.get("inconsistent"):
                # ``off`` may not have been removed
                assert entry == (right if opened and name != "off" else before).get(name), (number, name)
        number += 1 if LONG else 1 + number // 6
    assert number > 4


@pytest.mark.parametrize("seed", range(60 if LONG else 3))
async def test_after_a_power_cut_no_bitmap_is_wrong(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = with_bitmaps(tmp_path / "disk", cluster_size=rng.choice([512, 4096]))
    if rng.random() < 0.3:
        bitmap(path, "--add", "in-the-way")
    before = path.read_bytes()
    graph = Graph()
    file = {"driver": "file", "filename": str(path), "cache": {"no-flush": True}}
    await graph.blockdev_add({"driver": "test-recorder", "node-name": "recorder", "file": file})
    journal = recorder_of(graph, "recorder").journal
    right = [seen(path)]
    await graph.blockdev_add({"driver": "qcow2", "node-name": "disk", "file": "recorder"})
    opened = len(journal)
    async with talking(QmpServer(graph, lambda: None)) as talk:
        await write_to(graph, *((rng.randrange(4 * M - 9 * K), 9 * K) for _ in range(3)))
        await talk.execute(ADD, node="disk", name="new", persistent=True, granularity=4096)
        await talk.execute(REMOVE, node="disk", name="off")
        await write_to(graph, *((rng.randrange(4 * M - 9 * K), 9 * K) for _ in range(3)))
    closing = len(journal)
    await graph.close()
    right.append(seen(path))
    check_image(path)
    for moment in (
        *rng.sample(range(len(journal) + 1), 4),
        rng.randrange(opened + 1),
        rng.randrange(closing, len(journal)),
    ):
        path.write_bytes(after_power_cut(before, journal[:moment], rng))
        check_image(path, leaks=True)
        for name, entry in seen(path).items():
            if not entry.get("inconsistent"):
                allowed = right[:1] if moment <= opened else right[1:]
                assert entry in [known.get(name) for known in allowed], (moment, opened, closing, len(journal))
        io(path, "read 0 4M")
        check_image(path, leaks=True)
