"""Images of other programs, as qemu-img makes them: vdi, vpc, vhdx, qed, vmdk."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
from pathlib import Path
from typing import Any

import pytest
from images import patch
from mounting import run
from powercuts import LONG
from support import read, root_of, write

from fusebd.block.blockstatus import block_status_above
from fusebd.block.driver import driver_class
from fusebd.block.graph import Graph
from fusebd.block.node import Node
from fusebd.block.perms import Perm
from fusebd.block.status import Status
from fusebd.errors import BlockIOError, FusebdError
from fusebd.ondisk import vhdx

SIZE = (9 << 20) + 512 * 3
#: (format, options of qemu-img)
KINDS = [
    ("vdi", ""),
    ("vdi", "static=on"),
    ("vpc", ""),
    ("vpc", "subformat=fixed"),
    ("vpc", "force_size=on"),
    ("vhdx", ""),
    ("vhdx", "subformat=fixed"),
    ("vhdx", "block_size=1M,block_state_zero=off"),
    ("qed", ""),
    ("qed", "cluster_size=32k,table_size=2"),
    ("vmdk", ""),
    ("vmdk", "zeroed_grain=on"),
    ("vmdk", "compat6=on"),
    ("vmdk", "subformat=monolithicFlat"),
    ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vmdk", "subformat=twoGbMaxExtentFlat"),
    ("vmdk", "subformat=streamOptimized"),
]
ONE_OF_EACH = [("vdi", ""), ("vpc", ""), ("vhdx", ""), ("qed", ""), ("vmdk", ""), ("vmdk", "subformat=streamOptimized")]


def name_of(kind: tuple[str, str]) -> str:
    return "-".join(filter(None, kind))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with data, some of them hard to compress, in many places."""
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("foreign") / "disk.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for at, length in ((0, 70000), (1 << 20, 300_000), ((5 << 20) + 4096, 5000), (SIZE - 512, 512)):
            file.seek(at)
            file.write(rng.randbytes(length) if at else b"text " * (length // 5))
    return path


def convert(raw: Path, directory: Path, kind: tuple[str, str]) -> Path:
    image_format, options = kind
    path = directory / f"disk.{image_format}"
    words = ["-o", options] if options else []
    run("qemu-img", "convert", "-f", "raw", "-O", image_format, *words, raw, path)
    return path


def file_of(path: Path) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path)}


async def opened(graph: Graph, image_format: str, path: Path, **options: Any) -> Node:
    return await graph.blockdev_add(
        {"driver": image_format, "node-name": "disk", "read-only": True, "file": file_of(path), **options}
    )


async def content(graph: Graph, length: int) -> bytes:
    root = root_of(graph, "disk", Perm.CONSISTENT_READ)
    found = await read(root, 0, length)
    await graph.detach_root(root)
    return found


async def map_of(node: Node) -> list[tuple[int, int, bool, bool, int | None]]:
    """As qemu-img map shows it: start, length, zero, data, offset."""
    found: list[tuple[int, int, bool, bool, int | None]] = []
    at, length = 0, node.driver.length
    while at < length:
        status = await block_status_above(node, at, length - at)
        flags = status.flags
        place = status.host_offset if flags & Status.OFFSET_VALID else None
        entry = at, status.length, bool(flags & Status.ZERO), bool(flags & Status.DATA), place
        if found:
            start, before, *alike, offset = found[-1]
            follows = offset is None if place is None else offset is not None and place == offset + before
            if alike == [*entry[2:4]] and follows:
                entry = start, before + status.length, entry[2], entry[3], offset
                found.pop()
        found.append(entry)
        at += status.length
    return found


def qemu_map(image_format: str, path: Path) -> list[tuple[int, int, bool, bool, int | None]]:
    said = json.loads(run("qemu-img", "map", "--output=json", "-f", image_format, path))
    return [
        (entry["start"], entry["length"], entry["zero"], entry["data"], entry.get("offset"))
        for entry in said
    ]  # fmt: skip


def without_places(
    found: list[tuple[int, int, bool, bool, int | None]],
) -> list[tuple[int, int, bool, bool]]:
    """Neighbours made one that differ in nothing but where they are."""
    merged: list[tuple[int, int, bool, bool]] = []
    for start, length, zero, data, _ in found:
        if merged and merged[-1][2:] == (zero, data):
            start, length = merged[-1][0], merged.pop()[1] + length
        merged.append((start, length, zero, data))
    return merged


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
async def test_what_qemu_img_writes_is_read(graph: Graph, raw: Path, tmp_path: Path, kind: tuple[str, str]) -> None:
    path = convert(raw, tmp_path, kind)
    node = await opened(graph, kind[0], path)
    said = json.loads(run("qemu-img", "info", "--output=json", "-f", kind[0], path))
    assert node.driver.length == said["virtual-size"] >= SIZE
    data = await content(graph, node.driver.length)
    assert data[:SIZE] == raw.read_bytes()
    assert not any(data[SIZE:])
    rng = random.Random(2)
    root = root_of(graph, "disk", Perm.CONSISTENT_READ)
    for _ in range(200):
        start = rng.randrange(len(data))
        length = rng.randrange(1, min(len(data) - start, 200_000) + 1)
        assert await read(root, start, length) == data[start : start + length]
    await graph.detach_root(root)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
async def test_the_holes_are_where_qemu_img_map_sees_them(
    graph: Graph, raw: Path, tmp_path: Path, kind: tuple[str, str]
) -> None:
    path = convert(raw, tmp_path, kind)
    node = await opened(graph, kind[0], path)
    found, wanted = await map_of(node), qemu_map(kind[0], path)
    if kind[0] == "vhdx":  # QEMU does not know: there is data everywhere
        assert [(0, node.driver.length, False, True, None)] == wanted
        if "block_size=1M" in kind[1]:
            assert sum(length for _, length, zero, *_ in found if zero) >= 4 << 20
        return
    assert without_places(found) == without_places(wanted)
    if "static" not in kind[1]:
        assert [entry for entry in found if entry[4] is not None] == [entry for entry in wanted if entry[4] is not None]


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
async def test_formats_are_told_by_their_beginning(
    graph: Graph, raw: Path, tmp_path: Path, kind: tuple[str, str]
) -> None:
    path = convert(raw, tmp_path, kind)
    head = path.read_bytes()[:512]
    names = ("vdi", "vpc", "vhdx", "qed", "vmdk", "qcow2")
    found = [name for name in names if driver_class(name).probe(head, str(path))]
    assert found == ([] if kind == ("vpc", "subformat=fixed") else [kind[0]])
    overlay = tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", path, "-F", kind[0], overlay)
    await graph.blockdev_add(
        {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": str(overlay)}}
    )
    assert (await content(graph, SIZE)) == raw.read_bytes()


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=name_of)
async def test_nothing_is_written(graph: Graph, raw: Path, tmp_path: Path, kind: tuple[str, str]) -> None:
    path = convert(raw, tmp_path, kind)
    with pytest.raises(FusebdError, match=f"^Images of the format '{kind[0]}' cannot be written: read-only=on"):
        await opened(graph, kind[0], path, **{"read-only": False})
    assert list(graph.nodes) == []
    node = await opened(graph, kind[0], path, **{"read-only": False, "auto-read-only": True})
    assert node.read_only


@pytest.mark.parametrize("image_format", ["qed", "vmdk"])
@pytest.mark.parametrize("backing_format", ["raw", "own"])
async def test_what_is_not_there_is_in_the_backing_file(
    graph: Graph, raw: Path, tmp_path: Path, image_format: str, backing_format: str
) -> None:
    if image_format == "vmdk" and backing_format == "raw":
        backing_format = "own"  # it can have no other one
    base = raw if backing_format == "raw" else convert(raw, tmp_path, (image_format, ""))
    name = "raw" if backing_format == "raw" else image_format
    path = tmp_path / "overlay"
    run("qemu-img", "create", "-q", "-f", image_format, "-b", base, "-F", name, path)
    for command in ("write -P 7 1000000 200000", "write -P 8 4096 512"):
        run("qemu-io", "-f", image_format, "-c", command, path)
    node = await opened(graph, image_format, path)
    expected = bytearray(raw.read_bytes())
    expected[1000000:1200000] = b"\7" * 200000
    expected[4096:4608] = b"\x08" * 512
    assert await content(graph, SIZE) == expected
    assert without_places(await map_of(node)) == without_places(qemu_map(image_format, path))
    assert node.backing is not None
    info = node.driver.format_info()
    assert os.path.samefile(str(info["backing-filename"]), base)


async def test_a_descriptor_names_files_beside_it(graph: Graph, raw: Path, tmp_path: Path) -> None:
    path = convert(raw, tmp_path, ("vmdk", "subformat=monolithicFlat"))
    node = await opened(graph, "vmdk", path)
    assert list(node.children) == ["file", "extents.0"]
    assert node.children["extents.0"].node.driver.filename == str(tmp_path / "disk-flat.vmdk")
    assert await content(graph, SIZE) == raw.read_bytes()


async def test_an_extent_that_is_missing_is_said(graph: Graph, raw: Path, tmp_path: Path) -> None:
    path = convert(raw, tmp_path, ("vmdk", "subformat=monolithicFlat"))
    (tmp_path / "disk-flat.vmdk").unlink()
    with pytest.raises(FusebdError, match=r"^Could not open '.*disk-flat\.vmdk': No such file or directory$"):
        await opened(graph, "vmdk", path)
    assert list(graph.nodes) == []


def le(value: int, width: int = 4) -> bytes:
    return value.to_bytes(width, "little")


#: (format, offset, bytes, what is said: as QEMU does)
WRONG = [
    ("vdi", 0x40, bytes(4), r"Image not in VDI format \(bad signature 00000000\)"),
    ("vdi", 0x44, le(0x20003), r"unsupported VDI image \(version 2.3\)"),
    ("vdi", 0x154, le(513), r"unsupported VDI image \(unaligned block map offset 0x201\)"),
    ("vdi", 0x158, le(513), r"unsupported VDI image \(unaligned data offset 0x201\)"),
    ("vdi", 0x168, le(4096), r"unsupported VDI image \(sector size 4096 is not 512\)"),
    ("vdi", 0x178, le(4096), r"unsupported VDI image \(block size 4096 is not 1048576\)"),
    ("vdi", 0x180, le(3), r"unsupported VDI image \(disk size 9438720, image bitmap has room for 3145728\)"),
    ("vdi", 0x1A8, b"link", r"unsupported VDI image \(non-NULL link UUID\)"),
    ("vdi", 0x1B8, b"parent", r"unsupported VDI image \(non-NULL parent UUID\)"),
    ("vpc", 0, bytes(8), "Incorrect header checksum|invalid VPC image"),
    ("vpc", 70, b"x", "Incorrect header checksum"),
    ("vpc", 512, b"X", "Invalid header magic"),
    ("vpc", 512 + 32, bytes((0, 0, 0, 3)), "Invalid block size 3"),
    ("vpc", 512 + 28, bytes((0, 0, 0, 1)), "Page table too small"),
    ("vpc", 1536, bytes((0x7F, 0, 0, 0)), "block-vpc: free_data_block_offset points after the end of file"),
    ("vhdx", 0, b"VHDX", "Image not in VHDX format"),
    ("vhdx", 3 << 16, b"none", r"invalid VHDX image \(no region table\)"),
    ("vhdx", (3 << 16) + 100, b"x", r"invalid VHDX image \(wrong checksum of the region table\)"),
    ("qed", 0, b"QEX", "Image not in QED format"),
    ("qed", 4, le(5000), "QED cluster size is invalid"),
    ("qed", 8, le(3), "QED table size is invalid"),
    ("qed", 16, le(64, 8), "Unsupported QED features: 40"),
    ("qed", 40, le(1 << 40, 8), "QED table offset is invalid"),
    ("qed", 48, le(511, 8), "QED image size is invalid"),
    ("vmdk", 4, le(4), "Unsupported VMDK version 4"),
    ("vmdk", 20, le(1 << 30, 8), "Invalid granularity, image may be corrupt|L1 entry size is invalid"),
    ("vmdk", 44, le(513), "L2 table size too big"),
    ("vmdk", 44, le(0), "L1 entry size is invalid"),
    ("vmdk", 64, le(1 << 32, 8), "File truncated, expecting at least 2199023255552 bytes"),
]


@pytest.mark.parametrize(("image_format", "offset", "data", "message"), WRONG, ids=lambda value: None)
async def test_what_is_wrong_is_said_in_qemu_s_words(
    graph: Graph, raw: Path, tmp_path: Path, image_format: str, offset: int, data: bytes, message: str
) -> None:
    path = convert(raw, tmp_path, (image_format, ""))
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    with pytest.raises(FusebdError, match=f"^(?:{message})"):
        await opened(graph, image_format, path)
    assert list(graph.nodes) == []
    # in the first of these words or in others, QEMU refuses it as well
    run("qemu-img", "map", "-f", image_format, path, expect=(1,))


async def test_a_vhdx_without_a_header_that_holds_is_refused(graph: Graph, raw: Path, tmp_path: Path) -> None:
    path = convert(raw, tmp_path, ("vhdx", ""))
    for at in vhdx.HEADER_OFFSETS:
        patch(path, (at + 8, b"changed"))
    with pytest.raises(FusebdError, match=r"^No valid VHDX header found$"):
        await opened(graph, "vhdx", path)


async def test_a_vhdx_with_a_log_that_was_not_carried_out_is_refused(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    run("qemu-img", "create", "-q", "-f", "vhdx", path, "16M")
    # killed after the change was made: the log is still there, and is put in force again
    run("qemu-io", "-f", "vhdx", "-c", "write 0 64k", "-c", "sigraise 9", path, expect=(-9,))
    await graph.blockdev_add({"driver": "vhdx", "read-only": True, "node-name": "n", "file": file_of(path)})
    await graph.blockdev_del("n")
    image = path.read_bytes()
    at = max(vhdx.HEADER_OFFSETS, key=lambda at: vhdx.HEADER.parse(image[at:]).sequence_number)
    log = vhdx.HEADER.parse(image[at:]).log_offset
    entry = vhdx.LOG_HEADER.parse(image[log:])
    assert entry.signature == vhdx.LOG_SIGNATURE
    header = bytearray(image[at : at + vhdx.HEADER_CHECKED])
    header[48:64] = entry.log_guid
    header[4:8] = le(vhdx.checksum(bytes(header)))
    patch(path, (at, bytes(header)))
    with pytest.raises(FusebdError) as caught:
        await opened(graph, "vhdx", path)
    words = f"VHDX image file '{path}' opened read-only, but contains a log that needs to be replayed"
    assert str(caught.value) == words
    assert words in run("qemu-io", "-r", "-f", "vhdx", "-c", "read 0 512", path, expect=(1,))


@pytest.mark.parametrize("lines", ["RW 5 FLAT \"x\"", "RW 5 SPARSE \"x\" 0", "RW 5 FLAT \"x\" -1"])  # fmt: skip
async def test_a_malformed_extent_line_is_shown(graph: Graph, tmp_path: Path, lines: str) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_text(f'# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\n{lines}\n')
    with pytest.raises(FusebdError, match=f"^Invalid extent line: {lines}$"):
        await opened(graph, "vmdk", path)


# --- any bytes ---------------------------------------------------------------------------------------

NASTY = [0, 1, 2, 0x1FF, 0x200, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 512, 2**63, 2**64 - 1]


def mutated(data: bytes, rng: random.Random, reach: int) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(rng.choice([128, 600, reach]))
        width = rng.choice([1, 2, 4, 8])
        at = min(at // width * width, len(changed) - width)
        value = rng.choice(NASTY) if rng.random() < 0.6 else rng.getrandbits(64)
        changed[at : at + width] = (value % 256**width).to_bytes(width, rng.choice(["little", "big"]))
    if rng.random() < 0.1:
        del changed[rng.randrange(len(changed)) :]
    return bytes(changed)


async def exercise(image_format: str, path: Path) -> bool:
    graph = Graph()
    try:
        try:
            node = await opened(
                graph, image_format, path, **{"backing": None} if image_format in ("qed", "vmdk") else {}
            )
        except FusebdError:
            return False
        root = root_of(graph, "disk", Perm.CONSISTENT_READ)
        length = root.length
        for at in (0, length // 2, max(length - 70000, 0)):
            with contextlib.suppress(FusebdError):
                await read(root, at, min(70000, length - at))
        with contextlib.suppress(FusebdError):
            await block_status_above(node, 0, length)
        return True
    finally:
        await graph.close()


@pytest.mark.parametrize("kind", [*ONE_OF_EACH, ("vmdk", "subformat=monolithicFlat")], ids=name_of)
async def test_a_mutated_image_opens_or_is_refused(
    raw: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    kind: tuple[str, str],
) -> None:
    caplog.set_level(logging.CRITICAL)
    small = tmp_path / "small.raw"
    small.write_bytes(raw.read_bytes()[: (1 << 20) + 4096])
    data = convert(small, tmp_path, kind).read_bytes()
    request.getfixturevalue("limited_memory")
    reach = min(len(data), 4 << 20 if kind[0] == "vhdx" else 300 << 10)
    path, opened_count, rounds = tmp_path / "image", 0, 3000 if LONG else 60
    for seed in range(rounds):
        path.write_bytes(mutated(data, random.Random(seed), reach))
        try:
            opened_count += await exercise(kind[0], path)
        except Exception as error:
            pytest.fail(f"seed {seed}: {error!r}")
    assert 0 < opened_count < rounds


# --- what was taken for raw --------------------------------------------------------------------------


async def test_what_was_taken_for_raw_does_not_become_another(graph: Graph) -> None:
    await graph.blockdev_add({"driver": "test-memory", "node-name": "memory", "size": 1 << 20})
    node = await graph.blockdev_add({"driver": "raw", "node-name": "disk", "file": "memory"})
    root = root_of(graph, "disk")
    dangerous = b"QFI\xfb\0\0\0\3" + bytes(600)
    await write(root, 0, dangerous)  # by a user who has said that it is raw
    await write(root, 0, bytes(600))
    node.driver.was_probed()
    await write(root, 512, dangerous)
    await write(root, 4, b"anything else")
    for data in (dangerous, b"QFI\xfb", b"KDMV"):
        with pytest.raises(BlockIOError) as caught:
            await write(root, 0, data)
        assert caught.value.errno == errno.EPERM
    assert await read(root, 0, 17) == bytes(4) + b"anything else"
    await graph.detach_root(root)


@pytest.mark.parametrize("known", [False, True])
async def test_a_format_that_the_image_does_not_tell_is_probed(graph: Graph, tmp_path: Path, known: bool) -> None:
    overlay, base = tmp_path / "overlay.qcow2", tmp_path / "base"
    base.write_bytes(bytes(1 << 20))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay)
    if not known:  # an extension of another kind in place of the one with the format
        header = overlay.read_bytes()
        at = header.index(bytes.fromhex("E2792ACA"))
        overlay.write_bytes(header[:at] + b"none" + header[at + 4 :])
    file = {"driver": "file", "filename": str(overlay)}
    node = await graph.blockdev_add({"driver": "qcow2", "node-name": "disk", "file": file})
    assert node.backing is not None
    below = node.backing.node.driver
    assert (below.name, below.limits.request_alignment) == ("raw", 1 if known else 512)
