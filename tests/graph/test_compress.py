"""The filter ``compress``, and compressed writes to qcow2 images, with qemu-img and qemu-io as the judges."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import trio
from images import after_power_cut, check_image, content, create, io
from mounting import run
from support import READ_WRITE, read, recorder_of, root_of, write

from fusebd.block.child import COMPRESSED, MAY_UNMAP
from fusebd.block.graph import Graph
from fusebd.block.root import Root
from fusebd.errors import BlockIOError, FusebdError
from fusebd.ondisk import qcow2 as ondisk

K = 1024
IMAGES: dict[str, dict[str, Any]] = {
    "zlib": {"cluster_size": "64k"},
    "zstd": {"cluster_size": "64k", "compression_type": "zstd"},
    "small": {"cluster_size": 4096},
    "smallest": {"cluster_size": 512, "refcount_bits": 64},
    "narrow-refcounts": {"cluster_size": 4096, "refcount_bits": 2},
    "version-2": {"cluster_size": 8192, "compat": "0.10"},
    "subclusters": {"cluster_size": "16k", "extended_l2": "on"},
    "large": {"cluster_size": "2M"},
}


def cluster_of(name: str) -> int:
    """The cluster size of an image, bytes."""
    size = str(IMAGES[name]["cluster_size"])
    return int(size.rstrip("kM")) * (K if size.endswith("k") else K * K if size.endswith("M") else 1)


def text(rng: random.Random, length: int) -> bytes:
    """Data that are stored in a part of their *length*, of some size or other."""
    words = [rng.randbytes(rng.randrange(1, 9)) for _ in range(20)]
    data = b"".join(rng.choices(words, k=min(length, 256 * K) // 3 + 9))
    return (data * (length // len(data) + 1))[:length]


async def opened(graph: Graph, path: Path, *, above: str = "compress", **options: Any) -> Root:
    """The root of node ``disk``, the filter *above* over the image, which is node ``image``."""
    file = {"driver": "file", "filename": str(path)}
    image = {"driver": "qcow2", "node-name": "image", "discard": "unmap", "file": file, **options}
    if above != "compress":
        image = {"driver": above, "file": image}
    await graph.blockdev_add({"driver": "compress", "node-name": "disk", "discard": "unmap", "file": image})
    return root_of(graph, "disk", READ_WRITE)


async def closed(graph: Graph, root: Root) -> None:
    await graph.detach_root(root)
    await graph.blockdev_del("disk")


def compressed(path: Path) -> int:
    """How many clusters of the image are compressed."""
    said = run("qemu-img", "check", "-f", "qcow2", path, expect=(0, 3))
    found = [line for line in said.splitlines() if "compressed" in line]
    share = found[0].split("fragmented, ")[1].split("%")[0]
    clusters = int(found[0].split("/")[0])
    return round(float(share) * clusters / 100)


@pytest.mark.parametrize("name", IMAGES)
async def test_what_is_written_is_stored_compressed_and_read_by_qemu(graph: Graph, tmp_path: Path, name: str) -> None:
    cluster = cluster_of(name)
    size = 24 * cluster
    path = create(tmp_path / "image", size, **IMAGES[name])
    rng = random.Random(name)
    model = bytearray(size)
    root = await opened(graph, path)
    numbers = rng.sample(range(24), 18)
    for number in numbers:
        data = rng.randbytes(cluster) if number % 5 == 0 else text(rng, cluster)
        await write(root, number * cluster, data)
        model[number * cluster : (number + 1) * cluster] = data
    assert await read(root, 0, size) == model
    await closed(graph, root)
    check_image(path)
    assert content(path) == model
    assert compressed(path) == sum(number % 5 != 0 for number in numbers)
    # and the other way round
    io(path, *(f"write -c -P {number + 1} {number * cluster} {cluster}" for number in range(24)), expect=(0, 1))
    expected = content(path)
    await graph.blockdev_add(
        {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": str(path)}}
    )
    root = root_of(graph, "disk", READ_WRITE)
    assert await read(root, 0, size) == expected
    await write(root, cluster // 2, b"over" * (cluster // 4))
    await root.pdiscard(4 * cluster, 2 * cluster)
    await closed(graph, root)
    check_image(path)
    assert content(path)[cluster // 2 : cluster // 2 + cluster] == b"over" * (cluster // 4)


async def test_several_clusters_share_one_of_the_file(graph: Graph, tmp_path: Path) -> None:
    path = create(tmp_path / "image", "4M")
    root = await opened(graph, path)
    before = path.stat().st_size
    await write(root, 0, b"a" * (4 << 20))
    await closed(graph, root)
    check_image(path)
    assert compressed(path) == 64
    assert path.stat().st_size - before <= 3 * 64 * K  # of the L1 table, an L2 table, all data
    assert content(path) == b"a" * (4 << 20)


async def test_a_shorter_write_is_made_a_whole_cluster_and_an_overwritten_one_is_refused(
    graph: Graph, tmp_path: Path
) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(b"b" * (256 * K))
    path = create(tmp_path / "image", "256k", backing=backing, backing_format="raw")
    root = await opened(graph, path)
    assert root.driver.limits.request_alignment == 64 * K
    await write(root, 64 * K + 1000, b"x" * 1000)
    assert await read(root, 64 * K, 64 * K) == b"b" * 1000 + b"x" * 1000 + b"b" * (64 * K - 2000)
    with pytest.raises(BlockIOError, match="Input/output error"):
        await write(root, 64 * K, b"y" * 64 * K)
    assert await read(root, 64 * K, 1000) == b"b" * 1000
    await root.pwrite_zeroes(64 * K, 64 * K, MAY_UNMAP)
    await write(root, 64 * K, b"y" * 64 * K)
    await closed(graph, root)
    check_image(path)
    assert compressed(path) == 1
    assert content(path) == b"b" * 64 * K + b"y" * 64 * K + b"b" * 128 * K


async def test_requests_that_a_format_cannot_store_compressed_are_refused(graph: Graph, tmp_path: Path) -> None:
    path = create(tmp_path / "image", "256k", data_file=tmp_path / "data")
    root = await opened(graph, path)
    with pytest.raises(BlockIOError, match="Operation not supported"):
        await write(root, 0, b"x" * 64 * K)
    await closed(graph, root)
    path = create(tmp_path / "other", "300k")
    await graph.blockdev_add({"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": str(path)}})
    root = root_of(graph, "q", READ_WRITE)
    for offset, length in ((512, 64 * K), (0, 512), (256 * K, 4096)):
        with pytest.raises(BlockIOError, match="Invalid argument"):
            await root.pwritev(offset, (memoryview(bytes(length)),), COMPRESSED)
    await root.pwritev(256 * K, (memoryview(b"e" * 44 * K),), COMPRESSED)
    await graph.detach_root(root)
    await graph.blockdev_del("q")
    assert content(path) == bytes(256 * K) + b"e" * 44 * K
    await graph.blockdev_add({"driver": "null-co", "node-name": "n", "size": 65536})
    root = root_of(graph, "n", READ_WRITE)
    with pytest.raises(BlockIOError, match="Operation not supported"):
        await root.pwritev(0, (memoryview(bytes(512)),), COMPRESSED)


async def test_the_filter_is_refused_over_what_does_not_compress(graph: Graph, tmp_path: Path) -> None:
    for driver, options in (("raw", {"file": {"driver": "null-co", "size": 65536}}), ("null-co", {"size": 65536})):
        with pytest.raises(FusebdError, match=f"^Compression is not supported for underlying format: {driver}$"):
            await graph.blockdev_add({"driver": "compress", "node-name": "c", "file": {"driver": driver, **options}})
    path = create(tmp_path / "image", "300k")
    file = {"driver": "file", "filename": str(path)}
    await graph.blockdev_add({"driver": "compress", "node-name": "c", "file": {"driver": "qcow2", "file": file}})
    with pytest.raises(FusebdError, match=r"Image size is not a multiple of request alignment$"):
        root_of(graph, "c", READ_WRITE)


async def test_a_place_that_gets_other_data_is_read_anew(graph: Graph, tmp_path: Path) -> None:
    """The cluster that was decompressed last is kept, by its L2 entry, which another one may come to have."""
    path = create(tmp_path / "image", "1M", cluster_size=4096)
    root = await opened(graph, path)
    for round_ in range(20):
        data = bytes([round_ + 1]) * 4096
        await write(root, 0, data)
        assert await read(root, 0, 4096) == data
        await root.pdiscard(0, 4096)
        await root.flush()
    await closed(graph, root)
    check_image(path)


@pytest.mark.parametrize("name", ["small", "smallest", "narrow-refcounts", "zstd"])
async def test_writes_at_once_and_discards_leave_a_sound_image(graph: Graph, tmp_path: Path, name: str) -> None:
    cluster = cluster_of(name)
    size = 40 * cluster
    path = create(tmp_path / "image", size, **IMAGES[name])
    model = bytearray(size)
    root = await opened(graph, path)

    async def work(mine: range, rng: random.Random) -> None:
        for _ in range(30):
            number = rng.choice(mine)
            at = number * cluster
            kind = rng.randrange(4)
            if kind < 2:
                data = text(rng, cluster) if rng.random() < 0.8 else rng.randbytes(cluster)
                try:
                    await write(root, at, data)
                except BlockIOError:
                    assert any(model[at : at + cluster])  # it has data
                    continue
                model[at : at + cluster] = data
            elif kind == 2 and IMAGES[name].get("compat") != "0.10":
                await root.pwrite_zeroes(at, cluster, MAY_UNMAP)
                model[at : at + cluster] = bytes(cluster)
            else:
                await root.flush()
            assert await read(root, at, cluster) == model[at : at + cluster]

    async with trio.open_nursery() as nursery:
        for worker in range(4):
            nursery.start_soon(work, range(worker * 10, worker * 10 + 10), random.Random(worker))
    assert await read(root, 0, size) == model
    await closed(graph, root)
    check_image(path)
    assert content(path) == model


@pytest.mark.parametrize("seed", range(6))
async def test_a_power_cut_leaves_what_was_flushed(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = create(tmp_path / "image", 40 * 4096, cluster_size=4096)
    graph = Graph()
    await graph.blockdev_add(
        {"driver": "test-recorder", "node-name": "recorder", "file": {"driver": "file", "filename": str(path)}}
    )
    recorder = recorder_of(graph, "recorder")
    image = {"driver": "qcow2", "discard": "unmap", "file": "recorder"}
    await graph.blockdev_add({"driver": "compress", "node-name": "disk", "discard": "unmap", "file": image})
    before = path.read_bytes()
    root = root_of(graph, "disk", READ_WRITE)
    model, flushed = bytearray(40 * 4096), {0: bytes(40 * 4096)}
    touched: dict[int, set[int]] = {}
    for _ in range(40):
        number = rng.randrange(40)
        at = number * 4096
        if rng.random() < 0.2:
            await root.flush()
            flushed[len(recorder.journal)] = bytes(model)
            continue
        touched.setdefault(number, set()).add(len(recorder.journal))
        if any(model[at : at + 4096]):
            await root.pdiscard(at, 4096)
            model[at : at + 4096] = bytes(4096)
        else:
            data = text(rng, 4096)
            await write(root, at, data)
            model[at : at + 4096] = data
    journal = list(recorder.journal)
    await graph.detach_root(root)
    await graph.close()
    for moment in rng.sample(range(len(journal)), min(8, len(journal))):
        cut = tmp_path / "cut"
        cut.write_bytes(after_power_cut(before, journal[:moment], rng))
        check_image(cut, leaks=True)
        kept = flushed[max(length for length in flushed if length <= moment)]
        since = max(length for length in flushed if length <= moment)
        found = content(cut)
        for number in range(40):
            if not any(since <= when <= moment for when in touched.get(number, ())):
                assert found[number * 4096 : (number + 1) * 4096] == kept[number * 4096 : (number + 1) * 4096]


async def test_a_write_that_fails_anywhere_leaves_the_image_as_it_was(tmp_path: Path) -> None:
    source = create(tmp_path / "source", 40 * 4096, cluster_size=4096)
    events: list[str] = []
    fail_at = 0
    while fail_at <= len(events):
        path = Path(shutil.copy(source, tmp_path / "image"))
        graph = Graph()
        file = {"driver": "file", "filename": str(path)}
        await graph.blockdev_add({"driver": "test-recorder", "node-name": "recorder", "file": file})
        recorder = recorder_of(graph, "recorder")
        image = {"driver": "qcow2", "discard": "unmap", "file": "recorder"}
        await graph.blockdev_add({"driver": "compress", "node-name": "disk", "file": image})
        root = root_of(graph, "disk", READ_WRITE)
        recorder.events.clear()
        recorder.fail_at = fail_at
        failed = False
        try:
            await write(root, 0, b"a" * 4096)
        except BlockIOError:
            failed = True
        events = max(events, recorder.events, key=len)
        recorder.fail_at, recorder.failing = -1, False
        assert await read(root, 0, 4096) == (bytes(4096) if failed else b"a" * 4096)
        if failed:
            await write(root, 0, b"b" * 4096)
        await graph.detach_root(root)
        await graph.close()
        check_image(path)
        assert content(path)[:4096] == (b"b" if failed else b"a") * 4096
        fail_at += 1
    assert {"cluster_alloc_bytes", "write_compressed", "l2_update_compressed"} <= set(events)


@pytest.mark.parametrize("bits", [9, 12, 16, 21])
def test_the_fields_of_an_entry_are_as_wide_as_the_cluster_size_says(bits: int) -> None:
    offset = (1 << ondisk.compressed_offset_bits(bits)) - 700
    entry = ondisk.build_compressed(offset, 300, bits)
    assert ondisk.parse_compressed(entry, bits)[0] == offset
    assert entry >> 62 == 1
