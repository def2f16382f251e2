"""blockdev-reopen of images: windows, backing chains, metadata; files and images under load."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from images import check_image, content, create, info, io, patch, u64
from reopens import descriptors, file, image_node, locks_of, node, put, read_all, refusal
from support import READ_WRITE, read, root_of, snapshot, write

from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.block.reopen import reopen
from fusebd.errors import BlockIOError, FusebdError, ReadOnlyError

Json = Any
MIB = 1 << 20
READ = Perm.CONSISTENT_READ


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain"
    path.write_bytes(random.Random(1).randbytes(MIB))
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = create(tmp_path / "image", MIB)
    io(path, "write -q -P 7 0 64k")
    return path


# --- raw and backing chains ----------------------------------------------------------------------


async def test_the_window_moves(graph: Graph, plain: Path) -> None:
    data = plain.read_bytes()
    options = node("raw", "r", file=file("f", str(plain)))
    await graph.blockdev_add(options)
    root = root_of(graph, "r")
    await reopen(graph, [{**options, "offset": MIB // 2, "size": 4096}])
    assert await read(root, 0, root.length) == data[MIB // 2 : MIB // 2 + 4096]
    await write(root, 4090, b"last 6")
    with pytest.raises(BlockIOError):
        await write(root, 4096, b"beyond")
    await reopen(graph, [options])
    assert await read(root, MIB // 2 + 4090, 8) == b"last 6" + data[MIB // 2 + 4096 : MIB // 2 + 4098]
    assert root.length == MIB
    await graph.detach_root(root)


async def test_reads_go_through_the_backing_chain_that_there_is(graph: Graph, tmp_path: Path) -> None:
    options = []
    for number in range(3):
        path = create(tmp_path / f"hd{number}", "3M")
        io(path, f"write -q -P {number + 1} {number}M 1M")
        options.append(image_node(f"hd{number}", path))
        await graph.blockdev_add(options[-1])

    async def shown(name: str) -> list[int]:
        data = await read_all(graph, name)
        assert all(data[at : at + MIB] == data[at : at + 1] * MIB for at in range(0, 3 * MIB, MIB))
        return [data[at] for at in range(0, 3 * MIB, MIB)]

    async def back(number: int, backing: int | None) -> None:
        await reopen(graph, [{**options[number], "backing": None if backing is None else f"hd{backing}"}])

    assert await shown("hd0") == [1, 0, 0]
    await back(0, 1)
    assert await shown("hd0") == [1, 2, 0]
    await back(2, 1)
    assert await shown("hd2") == [0, 2, 3]
    await back(0, 2)
    assert await shown("hd0") == [1, 2, 3]
    await back(2, None)
    assert await shown("hd0") == [1, 0, 3]
    await back(1, 2)
    await back(0, 1)
    assert await shown("hd0") == [1, 2, 3]
    # all at once, the chain is turned round
    await reopen(
        graph,
        [
            {**options[0], "backing": None},
            {**options[1], "backing": "hd0"},
            {**options[2], "backing": "hd1"},
        ],
    )
    assert [await shown(f"hd{number}") for number in range(3)] == [[1, 0, 0], [1, 2, 0], [1, 2, 3]]


async def test_a_backing_file_that_the_image_names_goes_by_its_name(graph: Graph, tmp_path: Path) -> None:
    create(tmp_path / "base", MIB)
    overlay = create(tmp_path / "overlay", MIB, backing="base")
    await graph.blockdev_add(image_node("q", overlay))
    plain_name = graph.find("q").driver.filename
    backing = graph.find("q").children["backing"].node.name
    await reopen(graph, [image_node("q", overlay, backing=backing)])
    assert graph.find("q").driver.filename == plain_name == str(overlay)
    await reopen(graph, [image_node("q", overlay, backing=None)])
    assert graph.find("q").driver.filename == ""


# --- qcow2 ---------------------------------------------------------------------------------------


async def test_an_image_is_whole_once_it_is_read_only(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(image_node("q", image))
    await put(graph, "q", 200_000, b"allocated")
    root = root_of(graph, "q")
    await root.pdiscard(0, 65536)
    await graph.detach_root(root)
    await reopen(graph, [image_node("q", image, read_only=True, discard="unmap")])
    await trio.to_thread.run_sync(check_image, image)
    expected = bytearray(await read_all(graph, "q"))
    assert expected[200_000:200_009] == b"allocated"
    assert await trio.to_thread.run_sync(content, image) == expected
    before = image.read_bytes()
    await graph.blockdev_del("q")
    assert image.read_bytes() == before


async def test_an_image_is_prepared_when_it_becomes_writable(graph: Graph, image: Path) -> None:
    # the dirty bit, and an autoclear bit that nobody knows
    patch(image, (72, u64(1)), (88, u64(1 << 40)))
    await graph.blockdev_add(image_node("q", image, read_only=True))
    assert info(image)["dirty-flag"]
    await reopen(graph, [image_node("q", image)])
    assert image.read_bytes()[72:80] == u64(0)
    assert image.read_bytes()[88:96] == u64(0)
    await put(graph, "q", 500_000, b"new")
    await graph.blockdev_del("q")
    check_image(image)
    assert content(image)[500_000:500_003] == b"new"


async def test_an_image_that_cannot_be_written_stays_read_only(graph: Graph, image: Path) -> None:
    patch(image, (72, u64(2)))
    await graph.blockdev_add(image_node("q", image, read_only=True))
    held, opened = locks_of(image), descriptors()
    assert await refusal(graph, image_node("q", image)) == "qcow2: Image is corrupt; cannot be opened read/write"
    assert (locks_of(image), descriptors()) == (held, opened)
    assert (await read_all(graph, "q"))[:16] == b"\7" * 16


async def test_a_failure_of_one_image_takes_back_what_was_done_for_another(
    graph: Graph, image: Path, tmp_path: Path
) -> None:
    corrupt = patch(create(tmp_path / "corrupt", MIB), (72, u64(2)))
    for name, path in (("good", image), ("bad", corrupt)):
        await graph.blockdev_add(image_node(name, path, read_only=True))
    held = locks_of(image)
    for order in (("good", "bad"), ("bad", "good")):
        both = [image_node(name, {"good": image, "bad": corrupt}[name]) for name in order]
        assert "Image is corrupt" in await refusal(graph, *both)
        assert locks_of(image) == held
    await reopen(graph, [image_node("good", image)])


async def test_nobody_writes_to_an_image_that_is_not_prepared_yet(graph: Graph, image: Path) -> None:
    below = node("test-suspends", "slow", file=file("f", str(image)))
    await graph.blockdev_add(node("qcow2", "q", file=below, read_only=True))
    before = snapshot(graph)
    seen = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reopen, graph, [node("qcow2", "q", file=below)])
        while snapshot(graph)["unready"] == before["unready"]:
            await trio.lowlevel.checkpoint()
        with pytest.raises(ReadOnlyError, match=r"^Block node is read-only$"):
            root_of(graph, "q")
        reader = root_of(graph, "q", READ)
        seen.append(await read(reader, 0, 4))
    assert seen == [b"\7" * 4]
    await graph.detach_root(reader)
    await put(graph, "q", 0, b"now")


async def test_it_can_be_cancelled_at_any_moment(graph: Graph, image: Path) -> None:
    """Nothing has changed then, except at the very end, when it is done."""
    patch(image, (72, u64(1)))  # dirty
    below = node("test-suspends", "slow", file=file("f", str(image)), most=4)
    await graph.blockdev_add(node("qcow2", "q", file=below, read_only=True))
    before, opened = snapshot(graph), descriptors()
    for moment in range(1000):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reopen, graph, [node("qcow2", "q", file=below, detect_zeroes="on")])
                for _ in range(moment):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        if not graph.find("q").read_only:
            break
        assert (snapshot(graph), descriptors()) == (before, opened)
    assert moment > 20
    await put(graph, "q", 0, b"writable")
    await graph.blockdev_del("q")
    check_image(image)


@pytest.mark.parametrize(
    "change",
    [
        {"l2_cache_size": 4096, "l2_cache_entry_size": 512, "refcount_cache_size": 65536},
        {"overlap_check": "all"},
        {"overlap_check": "none", "discard": "unmap"},
        {"discard_no_unref": True, "pass_discard_request": True},
        {"lazy_refcounts": True},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_what_was_written_is_there_after_a_change_of_options(graph: Graph, tmp_path: Path, change: Json) -> None:
    path = create(tmp_path / "image", "8M", cluster_size=4096)
    rng = random.Random(2)
    expected = bytearray(8 * MIB)
    await graph.blockdev_add(image_node("q", path))
    root = root_of(graph, "q")
    for round_ in range(6):
        for _ in range(40):
            offset = rng.randrange(8 * MIB - 10_000)
            data = rng.randbytes(rng.randrange(1, 10_000))
            await write(root, offset, data)
            expected[offset : offset + len(data)] = data
        await root.pdiscard(round_ * MIB, 65536)
        if graph.find("q").unmap:
            expected[round_ * MIB : round_ * MIB + 65536] = bytes(65536)
        await reopen(graph, [image_node("q", path, **(change if round_ % 2 == 0 else {}))])
        assert await read(root, 0, 8 * MIB) == expected
    await graph.detach_root(root)
    await graph.blockdev_del("q")
    check_image(path)
    assert content(path) == expected


async def test_discards_are_passed_on_as_the_options_say(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(image_node("q", image))
    before = image.stat().st_blocks
    await reopen(graph, [image_node("q", image, discard="unmap")])
    root = root_of(graph, "q")
    await root.pdiscard(0, 65536)
    await root.flush()
    await graph.detach_root(root)
    assert image.stat().st_blocks <= before - 65536 // 512


async def test_images_exchange_their_files(graph: Graph, tmp_path: Path) -> None:
    paths = [create(tmp_path / "one", MIB), create(tmp_path / "other", "2M", cluster_size=4096)]
    for number, (name, path) in enumerate(zip(("one", "other"), paths, strict=True)):
        io(path, f"write -q -P {number + 1} 100k 300k")
        await graph.blockdev_add(image_node(name, path))
    lengths: list[int] = []
    root = root_of(graph, "one")
    root.on_resize = lambda: lengths.append(root.length)
    await reopen(
        graph, [image_node("one", paths[0], file="other-file"), image_node("other", paths[1], file="one-file")]
    )
    assert await read(root, 200_000, 4) == b"\2" * 4
    await write(root, 200_000, b"to the other")
    await reopen(
        graph, [image_node("one", paths[0], file="one-file"), image_node("other", paths[1], file="other-file")]
    )
    assert await read(root, 200_000, 4) == b"\1" * 4
    assert lengths == [2 * MIB, MIB]
    await graph.detach_root(root)
    for name in ("one", "other"):
        await graph.blockdev_del(name)
    for path in paths:
        check_image(path)
    assert content(paths[1])[200_000:200_012] == b"to the other"


async def test_a_file_that_is_no_image_is_refused(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(node("null-co", "n", size=MIB))
    await graph.blockdev_add(image_node("q", image))
    root = root_of(graph, "q")
    assert await refusal(graph, image_node("q", image, file="n")) == "Image is not in qcow2 format"
    await write(root, 0, b"still")
    await graph.detach_root(root)


async def test_a_filter_below_an_image_may_fail_everything(graph: Graph, image: Path) -> None:
    """What is known of the image stays known, so that nothing is read when the filter comes."""
    failing = node("blkdebug", "bd", image="q-file", inject_error=[{"event": "none"}])
    await graph.blockdev_add(image_node("q", image))
    await graph.blockdev_add(failing)
    root = root_of(graph, "q")
    await reopen(graph, [image_node("q", image, file="bd")])
    with pytest.raises(BlockIOError):
        await read(root, 0, 512)
    await reopen(graph, [image_node("q", image, file="q-file")])
    assert await read(root, 0, 4) == b"\7" * 4
    await write(root, 0, b"works")
    await graph.detach_root(root)
    await graph.blockdev_del("bd")
    await graph.blockdev_del("q")
    check_image(image)


async def test_an_image_that_broke_can_be_read_again(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(image_node("q", image))
    await put(graph, "q", 0, b"x")
    table = int.from_bytes(image.read_bytes()[40:48], "big")
    l2_offset = int.from_bytes(image.read_bytes()[table : table + 8], "big") & (1 << 56) - 1
    await reopen(graph, [image_node("q", image, cache_size=MIB)])
    patch(image, (l2_offset + 8, u64(1 << 63 | 0x50200)))
    with pytest.raises(BlockIOError):
        await read_all(graph, "q")
    with pytest.raises(BlockIOError) as gone:
        await read_all(graph, "q")
    assert gone.value.errno == errno.ENOMEDIUM
    assert "Image is corrupt" in await refusal(graph, image_node("q", image))
    await reopen(graph, [image_node("q", image, read_only=True)])
    root = root_of(graph, "q", READ)
    assert await read(root, 0, 1) == b"x"
    await graph.detach_root(root)


# --- under load ----------------------------------------------------------------------------------


async def load(graph: Graph, name: str, number: int, done: trio.Event) -> int:
    """Write to the piece *number* of the node and compare what is read back, until *done*; how often."""
    rng = random.Random(number)
    root = graph.attach_root(graph.find(name), "a test", READ_WRITE)
    start, size = number * 65536, 65536
    expected = bytearray(await read(root, start, size))
    count = 0
    while not done.is_set():
        offset, length = rng.randrange(size - 5000), rng.randrange(1, 5000)
        data = rng.randbytes(length)
        await write(root, start + offset, data)
        expected[offset : offset + length] = data
        assert await read(root, start, size) == expected
        if rng.random() < 0.05:
            await root.flush()
        count += 1
        await trio.lowlevel.checkpoint()
    await graph.detach_root(root)
    return count


@pytest.mark.parametrize("over", ["raw", "qcow2"])
async def test_filters_come_and_go_under_load(graph: Graph, tmp_path: Path, over: str) -> None:
    path = create(tmp_path / "image", MIB) if over == "qcow2" else tmp_path / "image"
    if over == "raw":
        path.write_bytes(bytes(MIB))
    await graph.blockdev_add(file("f", str(path)))
    await graph.blockdev_add(node("test-suspends", "slow", file="f", most=3, seed=1))
    await graph.blockdev_add(node("blkdebug", "bd", image="f", align=512))
    await graph.blockdev_add(node(over, "top", file="f"))
    done = trio.Event()
    counts: list[int] = []

    async def worker(number: int) -> None:
        counts.append(await load(graph, "top", number, done))

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(worker, number)
        rng = random.Random(3)
        for _ in range(150):
            options: Json = {"detect_zeroes": rng.choice(["on", "off"])}
            if over == "qcow2" and rng.random() < 0.3:
                options |= {"cache_size": rng.choice([MIB, 2 * MIB])}
            await reopen(graph, [node(over, "top", file=rng.choice(["f", "slow", "bd"]), **options)])
            with pytest.raises(FusebdError):
                await reopen(graph, [node(over, "top", file="slow", read_only=True)])
            for _ in range(rng.randrange(30)):
                await trio.lowlevel.checkpoint()
        done.set()
    assert len(counts) == 8
    assert min(counts) > 10
    if over == "qcow2":
        for name in ("top", "bd", "slow", "f"):
            await graph.blockdev_del(name)
        check_image(path)


async def test_a_file_is_reopened_under_load(graph: Graph, plain: Path) -> None:
    options = node("raw", "top", file=file("f", str(plain)))
    await graph.blockdev_add(options)
    done = trio.Event()

    async def worker(number: int) -> None:
        await load(graph, "top", number, done)

    before = descriptors()
    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(worker, number)
        for round_ in range(60):
            await reopen(graph, [{**options, "cache": {"direct": round_ % 2 == 0}}])
            for _ in range(round_ % 20):
                await trio.lowlevel.checkpoint()
        done.set()
    await graph.blockdev_del("top")
    assert descriptors() < before
