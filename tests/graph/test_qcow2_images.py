"""qcow2 images of all kinds that QEMU's programs make: chains, names, compressed, preallocated, dirty, resized."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from images import check_image, content, create, info, io, patch, u32, u64
from mounting import run
from support import READ_WRITE, memory_of, read, root_of, write

from fusebd.block.blockstatus import block_status
from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.block.reopen import reopen
from fusebd.block.status import Status
from fusebd.errors import BlockIOError, FusebdError, OptionError
from fusebd.ondisk import qcow2 as ondisk
from fusebd.qmp import queries

K, M = 1024, 1 << 20
CLUSTER_SIZES = [1 << bits for bits in range(9, 22)]
Json = Any


def disk(path: Path, **options: Json) -> Json:
    file = {"driver": "file", "filename": str(path)}
    return {"driver": "qcow2", "node-name": "disk", "file": file, **options}


async def add(graph: Graph, path: Path, **options: Json) -> None:
    """Open the image as node ``disk``."""
    await graph.blockdev_add(disk(path, **options))


async def whole(graph: Graph) -> bytes:
    """What the node ``disk`` contains."""
    root = root_of(graph, "disk", Perm.CONSISTENT_READ)
    data = await read(root, 0, root.length)
    await graph.detach_root(root)
    return data


async def opened(path: Path, **options: Json) -> bytes:
    """What the image contains, opened with *options*."""
    graph = Graph()
    try:
        await add(graph, path, **options)
        return await whole(graph)
    finally:
        await graph.close()


async def read_only(path: Path, **options: Json) -> bytes:
    return await opened(path, **{"read-only": True, **options})


def raw(path: Path, seed: int, length: int) -> Path:
    """A raw image of random bytes."""
    path.write_bytes(random.Random(seed).randbytes(length))
    return path


def without_format(path: Path) -> Path:
    """The image with its backing format forgotten, so that it is probed."""
    at = path.read_bytes().index(u32(ondisk.EXT_BACKING_FORMAT))
    return patch(path, (at, u32(0x12345)))


# --- backing chains ------------------------------------------------------------------------------


def chain(directory: Path, cluster_sizes: Sequence[int]) -> Path:
    """Images above each other, each shorter or longer than the one below, with writes of their own; the top."""
    below = raw(directory / "base.raw", 1, M + 1536)
    backing_format = "raw"
    for number, cluster_size in enumerate(cluster_sizes):
        size = M + (512 * K if number % 2 else -256 * K)
        path = create(
            directory / f"{number}.qcow2",
            size,
            backing=below,
            backing_format=backing_format,
            cluster_size=cluster_size,
            compat="0.10" if number % 3 == 2 else "1.1",
        )
        offset = 100 * K * (number + 1)
        io(path, f"write -P {number + 1} {offset} 70k", f"write -P {number + 101} {size - 3 * K} 1k")
        if number % 3 != 2:
            io(path, f"write -z {offset + 20 * K} 30k")
        below, backing_format = path, "qcow2"
    return below


@pytest.mark.parametrize("sizes", [(65536,) * 3, (512, 65536, 4096, 2 * M, 1024)], ids=["three", "five"])
async def test_a_chain_reads_as_qemu_img_reads_it(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    top = chain(tmp_path, sizes)
    assert await read_only(top) == content(top)


@pytest.mark.parametrize("sizes", [(65536,) * 3, (512, 65536, 4096, 2 * M, 1024)], ids=["three", "five"])
async def test_only_the_top_of_a_chain_is_written(graph: Graph, tmp_path: Path, sizes: tuple[int, ...]) -> None:
    top = chain(tmp_path, sizes)
    model = bytearray(content(top))
    others = {path: path.read_bytes() for path in tmp_path.iterdir() if path != top}
    await add(graph, top)
    root = root_of(graph, "disk")
    rng = random.Random(2)
    for _ in range(40):
        length = rng.choice([1, 512, 5000, 70000])
        offset = rng.randrange(len(model) - length)
        data = rng.randbytes(length)
        model[offset : offset + length] = data
        await write(root, offset, data)
    assert await read(root, 0, len(model)) == model
    await graph.close()
    check_image(top)
    assert content(top) == model
    assert others == {path: path.read_bytes() for path in others}


async def test_what_is_behind_the_end_of_a_backing_file_reads_as_zeroes(tmp_path: Path) -> None:
    base = raw(tmp_path / "base", 3, 100 * K + 512)
    path = create(tmp_path / "image", 300 * K, backing=base, backing_format="raw")
    assert await read_only(path) == base.read_bytes().ljust(300 * K, b"\0")


async def test_what_a_longer_backing_file_has_beyond_the_end_does_not_show(graph: Graph, tmp_path: Path) -> None:
    base = raw(tmp_path / "base", 4, M)
    path = create(tmp_path / "image", 300 * K, backing=base, backing_format="raw")
    await add(graph, path)
    assert await whole(graph) == base.read_bytes()[: 300 * K]
    await graph.block_resize("disk", 500 * K)
    await graph.block_resize("disk", 2 * M)
    assert await whole(graph) == base.read_bytes()[: 300 * K].ljust(2 * M, b"\0")


# --- names of backing files ----------------------------------------------------------------------


def renamed(path: Path, name: str) -> Path:
    """The image with another backing file name and no backing format."""
    data = path.read_bytes()
    offset = ondisk.parse_header(data[:112])["backing_file_offset"]
    return patch(without_format(path), (offset, name.encode()), (16, u32(len(name))))


def overlay(path: Path, name: str, size: int = M) -> Path:
    """An empty image whose backing file is called *name*; its format is probed."""
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "x", "-F", "raw", path, str(size))
    return renamed(path, name)


@pytest.fixture
def bases(tmp_path: Path) -> Path:
    """A directory with images to stand on: ``base.raw``, ``base.qcow2`` with the same content, rules for blkdebug."""
    raw(tmp_path / "base.raw", 5, M)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "base.raw", tmp_path / "base.qcow2")
    (tmp_path / "rules").write_text('[set-state]\nevent = "read_aio"\nstate = "1"\nnew_state = "2"\n')
    (tmp_path / "other").mkdir()
    return tmp_path


NAMES = {
    "relative": "base.raw",
    "relative through a directory": "other/../base.qcow2",
    "absolute": "{dir}/base.raw",
    "file": "file:{dir}/base.qcow2",
    "json raw": 'json:{{"driver":"raw","file":{{"driver":"file","filename":"{dir}/base.raw"}}}}',
    "json probed": 'json:{{"file":{{"driver":"file","filename":"{dir}/base.qcow2"}}}}',
    "json dotted": 'json:{{"driver":"qcow2","file.driver":"file","file.filename":"{dir}/base.qcow2"}}',
    "json filename": 'json:{{"driver":"qcow2","file.filename":"{dir}/base.qcow2"}}',
    "json of a filter": (
        'json:{{"driver":"qcow2","file":{{"driver":"blkdebug","image":'
        '{{"driver":"file","filename":"{dir}/base.qcow2"}}}}}}'
    ),
    "json with options": (
        'json:{{"driver":"raw","offset":0,"size":1048576,"file":{{"driver":"file","filename":"{dir}/base.raw"}}}}'
    ),
    "blkdebug": "blkdebug::{dir}/base.qcow2",
    "blkdebug with rules": "blkdebug:{dir}/rules:{dir}/base.raw",
    "blkverify": "blkverify:{dir}/base.raw:{dir}/base.qcow2",
    "blkdebug of blkverify": "blkdebug::blkverify:{dir}/base.raw:{dir}/base.raw",
}


@pytest.mark.parametrize("name", NAMES)
async def test_a_backing_file_is_found_by_its_name(bases: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bases / "other")
    path = overlay(bases / "image", NAMES[name].format(dir=bases))
    assert await read_only(path) == (bases / "base.raw").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_qemu_img_finds_the_backing_file_by_the_same_name(
    bases: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bases / "other")
    path = overlay(bases / "image", NAMES[name].format(dir=bases))
    assert content(path) == (bases / "base.raw").read_bytes()


async def test_relative_names_of_a_chain_hold_where_each_image_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    base = raw(tmp_path / "b" / "base.raw", 6, M)
    create(tmp_path / "b" / "middle", M, backing="base.raw", backing_format="raw")
    create(tmp_path / "a" / "top", M, backing="../b/middle")
    monkeypatch.chdir(tmp_path)
    assert await read_only(Path("a/top")) == base.read_bytes()


# Left the name in the image, right what QEMU 10.0.2 says.
NOT_FOUND = {
    "missing": ("missing", "Could not open '{dir}/missing': No such file or directory"),
    "directory": ("other", "'file' driver requires '{dir}/other' to be a regular file"),
    "unknown protocol": ("nosuch:x", "Unknown protocol 'nosuch'"),
    "no protocol": (":x", "Unknown protocol ''"),
    "json of an unknown driver": ('json:{"driver":"nosuch"}', "Unknown driver 'nosuch'"),
    "json of nothing": ("json:", "Could not parse the JSON options: Expecting a JSON value"),
    "json without a file": ("json:{}", "Must specify either driver or file"),
    "json of a missing node": (
        'json:{"driver":"raw","file":"node"}',
        "Cannot find device='node' nor node-name='node'",
    ),
    "no file name": ("file:", "The 'file' block driver requires a file name"),
    "json nonsense": ("json:{", "Could not parse the JSON options: JSON parse error, premature EOI"),
    "json list": ("json:[]", "Invalid JSON object given"),
    "blkdebug without a colon": ("blkdebug:x", "blkdebug requires both config file and image path"),
}


@pytest.mark.parametrize("name", NOT_FOUND)
async def test_a_backing_file_that_cannot_be_opened_is_named(graph: Graph, bases: Path, name: str) -> None:
    stored, message = NOT_FOUND[name]
    path = overlay(bases / "image", stored)
    with pytest.raises(FusebdError) as caught:
        await add(graph, path)
    assert str(caught.value) == "Could not open backing file: " + message.replace("{dir}", str(bases))
    assert graph.nodes == {}
    assert len(await opened(path, backing=None)) == M


async def test_an_unknown_backing_format_is_named(graph: Graph, bases: Path) -> None:
    path = create(bases / "image", M, backing=bases / "base.raw", backing_format="raw")
    at = path.read_bytes().index(u32(ondisk.EXT_BACKING_FORMAT))
    patch(path, (at + 8, b"row"))
    with pytest.raises(FusebdError, match="Could not open backing file: Unknown driver 'row'"):
        await add(graph, path)


async def test_a_backing_file_is_taken_for_what_the_image_says(bases: Path) -> None:
    """A guest that writes a qcow2 header into its raw disk gains nothing by it."""
    path = create(bases / "image", (bases / "base.qcow2").stat().st_size, backing="base.qcow2", backing_format="raw")
    assert await read_only(path) == (bases / "base.qcow2").read_bytes()


# --- the option backing --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, ""], ids=["null", "empty"])
async def test_no_backing_file_is_opened_if_that_is_asked_for(bases: Path, value: str | None) -> None:
    path = create(bases / "image", M, backing=bases / "base.raw", backing_format="raw")
    io(path, "write -P 9 64k 64k")
    (bases / "base.raw").unlink()
    assert await opened(path, backing=value) == bytes(64 * K) + b"\x09" * (64 * K) + bytes(M - 128 * K)


async def test_a_backing_node_may_be_one_that_exists(graph: Graph, bases: Path) -> None:
    path = create(bases / "image", M)
    await graph.blockdev_add({"driver": "test-memory", "node-name": "base", "size": M // 2})
    memory_of(graph, "base").data[:] = b"m" * (M // 2)
    await add(graph, path, backing="base")
    assert await whole(graph) == b"m" * (M // 2) + bytes(M // 2)
    root = root_of(graph, "disk")
    await write(root, 1000, b"mine")
    assert await read(root, 998, 8) == b"mmminemm"[:2] + b"mine" + b"mm"
    assert memory_of(graph, "base").data == b"m" * (M // 2)


async def test_a_backing_node_in_the_options_goes_before_the_one_in_the_image(bases: Path) -> None:
    path = create(bases / "image", M, backing=bases / "base.raw", backing_format="raw")
    (bases / "base.raw").unlink()
    other = raw(bases / "other.raw", 7, M)
    backing = {"driver": "raw", "file": {"driver": "file", "filename": str(other)}}
    assert await opened(path, backing=backing) == other.read_bytes()


async def test_a_backing_node_that_does_not_exist_is_named(graph: Graph, bases: Path) -> None:
    with pytest.raises(FusebdError) as caught:
        await add(graph, create(bases / "image", M), backing="nosuch")
    assert str(caught.value) == "Could not open backing file: Cannot find device='nosuch' nor node-name='nosuch'"


async def test_a_backing_file_is_open_for_reading_only(graph: Graph, bases: Path) -> None:
    (bases / "base.raw").chmod(0o444)
    await add(graph, create(bases / "image", M, backing=bases / "base.raw", backing_format="raw"))
    backing = graph.find("disk").backing
    assert backing is not None
    assert backing.node.read_only
    assert backing.name == "backing"


# --- compressed clusters -------------------------------------------------------------------------


def compressible(length: int) -> bytes:
    rng = random.Random(8)
    return b"".join(bytes([rng.randrange(256)]) * rng.randrange(1, 9000) for _ in range(length // 4000))[:length]


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
async def test_compressed_images_of_every_cluster_size_are_read_and_written(
    graph: Graph, tmp_path: Path, cluster_size: int, compression: str
) -> None:
    source, path = tmp_path / "source", tmp_path / "image"
    source.write_bytes(compressible(M).ljust(M, b"e"))
    options = f"cluster_size={cluster_size},compression_type={compression}"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, source, path)
    model = bytearray(source.read_bytes())
    await add(graph, path, discard="unmap")
    assert await whole(graph) == model
    root = root_of(graph, "disk")
    rng = random.Random(cluster_size)
    for _ in range(30):
        length = rng.choice([1, 700, 5000, 70000])
        offset = rng.randrange(M - length)
        data = rng.randbytes(length)
        model[offset : offset + length] = data
        await write(root, offset, data)
    first = -(-300000 // cluster_size) * cluster_size
    await root.pdiscard(first, cluster_size)
    model[first : first + cluster_size] = bytes(len(model[first : first + cluster_size]))
    assert await read(root, 0, M) == model
    await graph.close()
    check_image(path)
    assert content(path) == model


async def test_compressed_clusters_that_qemu_io_wrote_are_read(graph: Graph, tmp_path: Path) -> None:
    path = create(tmp_path / "image", M)
    io(path, *(f"write -c -P {number + 1} {number * 64}k 64k" for number in range(0, 16, 2)))
    expected = content(path)
    await add(graph, path)
    assert await whole(graph) == expected
    status = await block_status(graph.find("disk"), 0, M)
    assert status.flags == Status.DATA | Status.ALLOCATED | Status.COMPRESSED
    assert status.length == 65536


# --- zero clusters, preallocation ----------------------------------------------------------------


async def test_zero_clusters_hide_the_backing_file(graph: Graph, bases: Path) -> None:
    path = create(bases / "image", M, backing=bases / "base.raw", backing_format="raw")
    io(path, "write -P 1 0 256k", "write -z 64k 64k", "write -z -u 128k 64k", "write -z 512k 64k", "discard 192k 64k")
    expected = content(path)
    await add(graph, path)
    assert await whole(graph) == expected
    node = graph.find("disk")
    assert (await block_status(node, 64 * K, 64 * K)).flags & Status.ZERO
    assert (await block_status(node, 512 * K, 64 * K)).flags & Status.ZERO


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
async def test_preallocated_images_are_zeroes_and_can_be_written(
    graph: Graph, tmp_path: Path, compat: str, mode: str
) -> None:
    path = create(tmp_path / "image", M, compat=compat, preallocation=mode)
    model = bytearray(content(path))
    await add(graph, path)
    assert await whole(graph) == model
    root = root_of(graph, "disk")
    for offset, length in ((0, 65536), (70000, 100), (200000, 130000), (M - 1, 1)):
        model[offset : offset + length] = b"w" * length
        await write(root, offset, b"w" * length)
    assert await read(root, 0, M) == model
    await graph.close()
    check_image(path)
    assert content(path) == model


async def test_a_preallocated_cluster_is_known_to_be_zero_where_the_file_has_a_hole(
    graph: Graph, tmp_path: Path
) -> None:
    await add(graph, create(tmp_path / "image", M, preallocation="metadata"))
    status = await block_status(graph.find("disk"), 0, M)
    assert status.flags & Status.ZERO


# --- images that qemu-io wrote -------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
async def test_images_that_qemu_io_wrote_are_read_and_worked_on(
    graph: Graph, tmp_path: Path, compat: str, cluster_size: int
) -> None:
    size = 3 * M + 1536
    path = create(tmp_path / "image", size, compat=compat, cluster_size=cluster_size)
    rng = random.Random(cluster_size)
    commands = []
    for _ in range(12):
        offset, length = rng.randrange(size // 512) * 512, rng.randrange(1, 600) * 512
        kind = rng.choice(["write -P 1", "write -P 99", "write -z", "write -z -u", "discard"])
        commands.append(f"{kind} {offset} {min(length, size - offset)}")
    io(path, *commands)
    model = bytearray(content(path))
    await add(graph, path)
    assert await whole(graph) == model
    root = root_of(graph, "disk")
    for _ in range(12):
        offset, length = rng.randrange(size), rng.randrange(1, 300000)
        data = rng.randbytes(min(length, size - offset))
        model[offset : offset + len(data)] = data
        await write(root, offset, data)
    await graph.close()
    check_image(path)
    assert content(path) == model


# --- snapshots -----------------------------------------------------------------------------------


def with_snapshots(path: Path, **options: Json) -> Path:
    create(path, M, **options)
    for number, name in enumerate(["one", "two", "drei \N{LATIN SMALL LETTER U WITH DIAERESIS}"]):
        io(path, f"write -P {number + 1} {number * 32}k 64k")
        run("qemu-img", "snapshot", "-c", name, path)
    return path


def shown(graph: Graph) -> Json:
    """What query-named-block-nodes says of the image in the node ``disk``."""
    return next(node for node in queries.named_block_nodes(graph, flat=True) if node["node-name"] == "disk")["image"]


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
async def test_snapshots_are_listed_as_qemu_img_lists_them(graph: Graph, tmp_path: Path, compat: str) -> None:
    path = with_snapshots(tmp_path / "image", compat=compat)
    await add(graph, path)
    expected = info(path)["snapshots"]
    assert [snapshot["name"] for snapshot in expected] == ["one", "two", "drei ü"]
    # QEMU 7.2 leaves out what 10 says: the instruction count, which these have not
    assert shown(graph)["snapshots"] == expected


async def test_writes_leave_snapshots_as_they_are(graph: Graph, tmp_path: Path) -> None:
    path = with_snapshots(tmp_path / "image", cluster_size=4096)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", "two", path, tmp_path / "before")
    await add(graph, path, discard="unmap")
    root = root_of(graph, "disk")
    await write(root, 1000, b"w" * 200000)
    await root.pdiscard(0, 8192)
    await root.pwrite_zeroes(16384, 8192)
    await graph.block_resize("disk", 2 * M)
    await graph.close()
    check_image(path)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", "two", path, tmp_path / "after")
    # qemu-img shows a snapshot with the length that the disk has now
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes() + bytes(M)


OVERLAPS = {
    "inactive-l1": "inactive L1 table", "inactive-l2": "inactive L2 table", "snapshot-table": "snapshot table",
}  # fmt: skip


@pytest.mark.parametrize("check", ["none", "constant", "cached", "all"])
@pytest.mark.parametrize("name", OVERLAPS)
async def test_tables_of_snapshots_are_protected_as_asked(graph: Graph, tmp_path: Path, name: str, check: str) -> None:
    path = with_snapshots(tmp_path / "image")
    data = path.read_bytes()
    header = ondisk.parse_header(data[:112])
    snapshot_l1 = ondisk.SNAPSHOT.parse(data[header["snapshots_offset"] :]).l1_table_offset
    snapshot_l2 = int.from_bytes(data[snapshot_l1 : snapshot_l1 + 8], "big") & ondisk.OFFSET_MASK
    active_l2 = int.from_bytes(data[header["l1_table_offset"] :][:8], "big") & ondisk.OFFSET_MASK
    target = {
        "inactive-l1": snapshot_l1, "inactive-l2": snapshot_l2, "snapshot-table": header["snapshots_offset"],
    }[name]  # fmt: skip
    # The last cluster of the disk is said to be where the table is.
    patch(path, (header["l1_table_offset"], u64(active_l2 | ondisk.COPIED)))
    patch(path, (active_l2 + 8 * 15, u64(target | ondisk.COPIED)))
    protected = {"none": [], "constant": ["snapshot-table"], "cached": ["snapshot-table", "inactive-l1"]}
    await add(graph, path, **{"overlap-check": check})
    root = root_of(graph, "disk")
    if name in protected.get(check, OVERLAPS):
        with pytest.raises(BlockIOError, match=f"overlaps with {OVERLAPS[name]}"):
            await write(root, M - 512, b"x" * 512)
    else:
        await write(root, M - 512, b"x" * 512)


# --- dirty images, lazy refcounts, autoclear bits ------------------------------------------------


def killed(path: Path, *commands: str) -> Path:
    """The image after qemu-io has carried out *commands* and died."""
    output = io(path, *commands, "flush", "abort", options=["-t", "writeback"], expect=(-signal.SIGABRT,))
    assert "failed" not in output
    assert info(path)["dirty-flag"]
    return path


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
async def test_an_image_that_was_not_closed_is_repaired(
    graph: Graph, tmp_path: Path, refcount_bits: int, cluster_size: int
) -> None:
    path = create(tmp_path / "image", M, lazy_refcounts="on", refcount_bits=refcount_bits, cluster_size=cluster_size)
    killed(path, "write -P 1 0 300k", "write -P 2 700k 100k", "write -z 10k 40k", "discard 100k 64k")
    before = content(path)
    await add(graph, path)
    assert not shown(graph)["dirty-flag"]
    root = root_of(graph, "disk")
    await write(root, 600 * K, b"more" * 5000)
    assert await read(root, 0, 600 * K) == before[: 600 * K]
    await graph.close()
    assert not info(path)["dirty-flag"]
    check_image(path)
    assert content(path) == before[: 600 * K] + (b"more" * 5000) + before[600 * K + 20000 :]


async def test_a_dirty_image_with_snapshots_and_compressed_clusters_is_repaired(graph: Graph, tmp_path: Path) -> None:
    path = create(tmp_path / "image", M, lazy_refcounts="on", cluster_size=4096)
    io(path, "write -P 1 0 200k", "write -c -P 2 200k 4k", "write -c -P 3 204k 4k", "write -c -P 4 208k 4k")
    run("qemu-img", "snapshot", "-c", "one", path)
    killed(path, "write -P 5 100k 150k", "write -P 6 900k 10k")
    before = content(path)
    await add(graph, path)
    assert await whole(graph) == before
    await graph.close()
    check_image(path)
    run("qemu-img", "snapshot", "-a", "one", path)
    assert content(path)[: 212 * K] == b"\1" * (200 * K) + b"".join(bytes([n]) * 4096 for n in (2, 3, 4))


async def test_a_dirty_image_is_read_without_being_repaired(graph: Graph, tmp_path: Path) -> None:
    path = killed(create(tmp_path / "image", M, lazy_refcounts="on"), "write -P 1 0 300k")
    before = path.read_bytes()
    await add(graph, path, **{"read-only": True})
    assert (await whole(graph))[: 300 * K] == b"\1" * (300 * K)
    assert shown(graph)["dirty-flag"]
    await graph.close()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("image", "option", "dirty"),
    [("on", {}, True), ("off", {"lazy-refcounts": True}, True), ("on", {"lazy-refcounts": False}, False)],
)
async def test_lazy_refcounts_are_written_when_the_image_is_closed(
    graph: Graph, tmp_path: Path, image: str, option: dict[str, bool], dirty: bool
) -> None:
    path, killed_copy = create(tmp_path / "image", M, lazy_refcounts=image), tmp_path / "copy"
    await add(graph, path, **option)
    assert not info(path)["dirty-flag"]
    root = root_of(graph, "disk")
    await write(root, 1000, b"data")
    await root.flush()
    assert info(path)["dirty-flag"] is dirty
    blocks = path.read_bytes()[2 * 65536 : 3 * 65536]
    await write(root, 300 * K, b"more")
    await root.flush()
    assert (path.read_bytes()[2 * 65536 : 3 * 65536] == blocks) is dirty
    shutil.copy(path, killed_copy)
    await graph.close()
    for file in (path, killed_copy):
        io(file, "read -P 0 0 1000", "write -P 1 600k 100k")  # who opens it repairs it
        assert not info(file)["dirty-flag"]
        check_image(file)
        assert content(file)[1000:1004] == b"data"
        assert content(file)[300 * K : 300 * K + 4] == b"more"


async def test_an_image_that_becomes_read_only_is_clean(graph: Graph, tmp_path: Path) -> None:
    path = create(tmp_path / "image", M, lazy_refcounts="on")
    await add(graph, path)
    root = root_of(graph, "disk")
    await write(root, 1000, b"data")
    await root.flush()
    await graph.detach_root(root)
    assert info(path)["dirty-flag"]
    await reopen(graph, [disk(path, **{"read-only": True})])
    assert not info(path)["dirty-flag"]
    run("qemu-img", "check", "-U", path)
    await graph.close()
    check_image(path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("lazy-refcounts", "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"),
        ("discard-no-unref", "discard-no-unref is only supported since qcow2 version 3"),
    ],
)
async def test_version_2_refuses_what_it_has_not(graph: Graph, tmp_path: Path, option: str, message: str) -> None:
    path = create(tmp_path / "image", M, compat="0.10")
    with pytest.raises(OptionError) as caught:
        await add(graph, path, **{option: True})
    assert str(caught.value) == message
    await add(graph, path, **{option: False})


def autoclear(path: Path) -> int:
    value: int = ondisk.parse_header(path.read_bytes()[:112])["autoclear_features"]
    return value


async def test_autoclear_bits_are_cleared_before_an_image_is_written(graph: Graph, tmp_path: Path) -> None:
    path = patch(create(tmp_path / "image", M), (ondisk.AUTOCLEAR_OFFSET, u64(0xFF00)))
    await add(graph, path, **{"read-only": True})
    await graph.blockdev_del("disk")
    assert autoclear(path) == 0xFF00
    await add(graph, path)
    assert autoclear(path) == 0


# --- what is shown -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"compat": "0.10"}, {"refcount_bits": 1}, {"lazy_refcounts": "on"}, {"cluster_size": 512}],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()) or "default",
)
async def test_an_image_is_described_as_qemu_img_describes_it(
    graph: Graph, bases: Path, options: dict[str, object]
) -> None:
    path = create(bases / "image", M, backing="base.raw", backing_format="raw", **options)
    await add(graph, path)
    expected = info(path)
    described = shown(graph)
    for changing in ("actual-size", "children"):  # the latter only in newer versions
        expected.pop(changing, None)
        described.pop(changing, None)
    assert described == expected


# --- resizing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * M])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
async def test_a_resized_image_keeps_what_stays_and_has_zeroes_behind_it(
    graph: Graph, tmp_path: Path, compat: str, cluster_size: int
) -> None:
    path = create(tmp_path / "image", M, compat=compat, cluster_size=cluster_size)
    model = bytearray(random.Random(9).randbytes(M))
    await add(graph, path)
    root = root_of(graph, "disk")
    await write(root, 0, bytes(model))
    for size in (300 * K + 512, M, 3 * M, 512, 2 * M, 0, M + 512):
        await graph.block_resize("disk", size)
        del model[size:]
        model.extend(bytes(size - len(model)))
        assert root.length == size
        assert await read(root, 0, size) == model
        if size > 1000:
            await write(root, size - 700, b"e" * 700)
            model[size - 700 :] = b"e" * 700
    await graph.close()
    check_image(path)
    assert content(path) == model
    assert info(path)["virtual-size"] == M + 512


# Right what QEMU 10.0.2 answers to block_resize.
@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({}, 1000, "The new size must be a multiple of 512"),
        ({}, 1 << 62, "Failed to grow the L1 table: File too large"),
        ({"compat": "0.10", "snapshot": True}, 2 * M, "Can't resize a v2 image which has snapshots"),
        ({"compat": "0.10", "snapshot": True}, M, "Can't resize a v2 image which has snapshots"),
        ({"compat": "0.10", "backed": True}, 1 << 40, "Failed to zero out new clusters: Operation not supported"),
    ],
)
async def test_a_size_that_cannot_be_is_refused(
    graph: Graph, bases: Path, options: dict[str, Json], size: int, message: str
) -> None:
    options = dict(options)
    backing = bases / "base.raw" if options.pop("backed", False) else None
    snapshot = options.pop("snapshot", False)
    path = create(bases / "image", 512 * K, backing=backing, backing_format="raw", **options)
    if snapshot:
        run("qemu-img", "snapshot", "-c", "one", path)
    before = content(path)
    await add(graph, path)
    with pytest.raises(BlockIOError) as caught:
        await graph.block_resize("disk", size)
    assert caught.value.reason == message
    assert await whole(graph) == before
    await graph.close()
    check_image(path)


async def test_an_image_that_became_longer_is_zero_where_a_crash_left_clusters(graph: Graph, tmp_path: Path) -> None:
    path = create(tmp_path / "image", M)
    io(path, "write -P 1 0 1M")
    patch(path, (ondisk.SIZE_OFFSET, u64(256 * K)))
    await add(graph, path)
    await graph.block_resize("disk", M)
    assert await whole(graph) == b"\1" * (256 * K) + bytes(768 * K)
    await graph.close()
    check_image(path)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
async def test_what_is_new_can_be_preallocated(graph: Graph, tmp_path: Path, mode: Any) -> None:
    path = create(tmp_path / "image", 300 * K)
    io(path, "write -P 1 0 300k")
    await add(graph, path)
    root = root_of(graph, "disk", READ_WRITE | Perm.RESIZE)
    await root.truncate(M, prealloc=mode)
    assert await read(root, 0, M) == b"\1" * (300 * K) + bytes(724 * K)
    status = await block_status(root.node, 512 * K, 512 * K)
    assert status.flags & Status.OFFSET_VALID
    # behind a hole is the block that gives the file its length
    assert status.length == 512 * K or (mode == "metadata" and status.length >= 448 * K)
    await graph.close()
    check_image(path)
    assert (path.stat().st_blocks * 512 >= M) == (mode != "metadata")
