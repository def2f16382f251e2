"""qcow2 images whose guest data is in an external data file, with qemu-img and qemu-io as the judges."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from disks import change, closed, file, opened
from images import check_image, content, create, info, io, patch, u64
from mounting import run
from support import read, write

from fusebd.block.blockstatus import block_status_above
from fusebd.block.graph import Graph
from fusebd.block.status import Status
from fusebd.errors import BlockIOError, FusebdError
from fusebd.ondisk import qcow2 as ondisk

SIZE = (3 << 20) + 512
CLUSTER = 16 << 10


def image(directory: Path, *, raw: bool = False, **options: Any) -> Path:
    options = {"cluster_size": CLUSTER, "data_file": directory / "data", **options}
    return create(directory / "image", SIZE, data_file_raw="on" if raw else "off", **options)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc"])
async def test_random_changes_are_those_that_qemu_reads(
    graph: Graph, tmp_path: Path, raw: bool, preallocation: str
) -> None:
    path = image(tmp_path, raw=raw, preallocation=preallocation)
    model, rng = bytearray(SIZE), random.Random(f"{raw}{preallocation}")
    for _ in range(3):
        root = await opened(graph, path)
        await change(root, model, rng, 60, CLUSTER)
        assert await read(root, 0, SIZE) == model
        await closed(graph, root)
        assert content(path) == model
        check_image(path)
        if raw:
            assert (tmp_path / "data").read_bytes()[:SIZE] == model
        # QEMU goes on with it
        start = rng.randrange(SIZE // 512 - 100) * 512
        io(path, f"write -P 77 {start} 51200", f"write -z 0 {CLUSTER}")
        model[start : start + 51200] = b"\x4d" * 51200
        model[:CLUSTER] = bytes(CLUSTER)


async def test_the_first_cluster_is_one_like_any_other(graph: Graph, tmp_path: Path) -> None:
    path = image(tmp_path)
    root = await opened(graph, path)
    await write(root, 100, b"first")
    status = await block_status_above(root.node, 0, CLUSTER)
    assert (status.flags & Status.DATA, status.host_offset) == (Status.DATA, 0)
    assert status.file is graph.find("disk").children["data-file"].node
    await closed(graph, root)
    root = await opened(graph, path)
    assert await read(root, 0, 200) == bytes(100) + b"first" + bytes(95)
    await root.pwrite_zeroes(0, CLUSTER)
    assert await read(root, 0, 200) == bytes(200)
    await write(root, 4, b"again")
    await closed(graph, root)
    assert content(path)[:200] == bytes(4) + b"again" + bytes(191)
    check_image(path)


async def test_a_new_cluster_has_nothing_of_what_was_in_the_data_file(graph: Graph, tmp_path: Path) -> None:
    path = image(tmp_path)
    (tmp_path / "data").write_bytes(b"old" * (SIZE // 3))
    root = await opened(graph, path)
    assert await read(root, 0, SIZE) == bytes(SIZE)
    await write(root, CLUSTER + 5, b"new")
    assert await read(root, CLUSTER, CLUSTER) == (bytes(5) + b"new").ljust(CLUSTER, b"\0")
    await closed(graph, root)
    check_image(path)


@pytest.mark.parametrize("raw", [False, True])
async def test_the_data_file_becomes_as_long_as_the_disk(graph: Graph, tmp_path: Path, raw: bool) -> None:
    path = image(tmp_path, raw=raw)
    root = await opened(graph, path)
    await write(root, SIZE - 3, b"end")
    await root.truncate(SIZE + (1 << 20), exact=True)
    assert (tmp_path / "data").stat().st_size == SIZE + (1 << 20)
    assert await read(root, SIZE - 3, 1000) == b"end" + bytes(997)
    await root.truncate(1 << 20, exact=True)
    assert (tmp_path / "data").stat().st_size == 1 << 20
    await root.truncate(2 << 20, exact=True, prealloc="falloc")
    assert await read(root, 0, 2 << 20) == bytes(2 << 20)
    await closed(graph, root)
    assert info(path)["virtual-size"] == 2 << 20
    check_image(path)


async def test_discarded_clusters_take_no_space(graph: Graph, tmp_path: Path) -> None:
    path = image(tmp_path)
    root = await opened(graph, path)
    await write(root, 0, b"x" * (1 << 20))
    await root.flush()
    before = (tmp_path / "data").stat().st_blocks
    await root.pdiscard(0, 1 << 20)
    assert (tmp_path / "data").stat().st_blocks < before
    assert await read(root, 0, 1 << 20) == bytes(1 << 20)
    await closed(graph, root)
    check_image(path)


async def test_a_backing_file_shows_where_nothing_was_written(graph: Graph, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"base" * (SIZE // 4))
    path = create(
        tmp_path / "image",
        SIZE,
        backing=base,
        backing_format="raw",
        cluster_size=CLUSTER,
        data_file=tmp_path / "data",
    )
    model = bytearray(base.read_bytes())
    root = await opened(graph, path)
    await change(root, model, random.Random(4), 80, CLUSTER)
    assert await read(root, 0, SIZE) == model
    await closed(graph, root)
    assert content(path) == model
    check_image(path)


async def test_the_data_file_can_be_given(graph: Graph, tmp_path: Path) -> None:
    path = image(tmp_path)
    io(path, "write -P 3 0 64k")
    other = (tmp_path / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(FusebdError, match=r"Could not open '.*/data': No such file or directory$"):
        await opened(graph, path)
    assert list(graph.nodes) == []
    root = await opened(graph, path, **{"data-file": {**file(other), "node-name": "data"}})
    assert await read(root, 0, 3) == b"\3\3\3"
    node = graph.find("disk")
    assert {name: edge.node.driver_name for name, edge in node.children.items()} == {
        "file": "file",
        "data-file": "file",
    }
    told = node.driver.format_info()["format-specific"]["data"]
    assert (told["data-file"], told["data-file-raw"]) == (str(tmp_path / "data"), False)
    await closed(graph, root)


async def test_what_does_not_fit_together_is_refused(graph: Graph, tmp_path: Path) -> None:
    plain = create(tmp_path / "plain", SIZE)
    (tmp_path / "spare").write_bytes(b"")
    with pytest.raises(FusebdError, match=r"^'data-file' can only be set for images with an external data file$"):
        await opened(graph, plain, **{"data-file": file(tmp_path / "spare")})
    path = image(tmp_path)
    header = path.read_bytes()
    at = header.index(ondisk.EXT_DATA_FILE.to_bytes(4, "big"))
    patch(path, (at, b"none"))
    with pytest.raises(FusebdError, match=r"^'data-file' is required for this image$"):
        await opened(graph, path)
    assert list(graph.nodes) == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            ondisk.COPIED | 5 * CLUSTER,
            "External data file host cluster offset 0x14000 does not match guest cluster offset: 0x4000",
        ),
        (ondisk.COMPRESSED | 5 * CLUSTER, "Compressed cluster entry found in image with external data file"),
    ],
    ids=["misplaced", "compressed"],
)
async def test_entries_that_cannot_be_are_corruption(graph: Graph, tmp_path: Path, entry: int, message: str) -> None:
    path = image(tmp_path)
    io(path, "write 0 64k")
    header = ondisk.parse_header(path.read_bytes()[:112])
    l1 = int.from_bytes(path.read_bytes()[header["l1_table_offset"] :][:8], "big") & ondisk.OFFSET_MASK
    patch(path, (l1 + 8, u64(entry)))
    root = await opened(graph, path, **{"read-only": False})
    with pytest.raises(BlockIOError) as caught:
        await read(root, CLUSTER, 512)
    assert message in str(caught.value)
    await closed(graph, root)
    run("qemu-io", "-r", "-f", "qcow2", "-c", f"read {CLUSTER} 512", path, expect=(1,))
