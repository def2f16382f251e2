"""The host_device driver on a loop device: data, zeroes, discard, length, devices that cannot be written."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from support import READ_WRITE, read, root_of, write

from fusebd.block.child import FUA, MAY_UNMAP, NO_FALLBACK
from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.block.status import Status
from fusebd.errors import BlockIOError, FusebdError, ReadOnlyError

MIB = 1 << 20
direct_or_not = pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(MIB))
    return path


@pytest.fixture
def attach() -> Iterator[Callable[..., str]]:
    """``attach(path, option, ...)`` makes a loop device; all are detached at the end."""
    if os.geteuid():
        pytest.skip("loop devices need root")
    devices: list[str] = []

    def losetup(path: Path, *options: str) -> str:
        done = subprocess.run(
            ["losetup", "--find", "--show", *options, str(path)], capture_output=True, text=True, check=True
        )
        devices.append(done.stdout.strip())
        return devices[-1]

    yield losetup
    for device in devices:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.fixture
def device(attach: Callable[..., str], image: Path) -> str:
    return attach(image)


async def add(graph: Graph, device: str, *, direct: bool = False, **options: Any) -> None:
    given = {name.replace("_", "-"): value for name, value in options.items()}
    await graph.blockdev_add(
        {
            "driver": "host_device",
            "node-name": "d",
            "filename": device,
            "cache": {"direct": direct},
            "discard": "unmap",
            **given,
        }
    )


async def check(root: Root, model: bytes | bytearray) -> None:
    """What *root* reads is *model*, and so is what the host reads of the device's file once it is flushed."""
    assert await read(root, 0, len(model)) == model
    await root.flush()


@direct_or_not
async def test_the_length_is_that_of_the_device(graph: Graph, device: str, direct: bool) -> None:
    await add(graph, device, direct=direct)
    assert root_of(graph, "d").length == MIB


@direct_or_not
async def test_what_is_written_is_read_and_in_the_image(graph: Graph, device: str, image: Path, direct: bool) -> None:
    await add(graph, device, direct=direct)
    root = root_of(graph, "d")
    model, rng = bytearray(image.read_bytes()), random.Random(2)
    for _ in range(60):
        offset = rng.randrange(MIB)
        data = rng.randbytes(min(rng.choice([1, 511, 512, 4096, 70000]), MIB - offset))
        model[offset : offset + len(data)] = data
        await root.pwritev(offset, (memoryview(data)[:1], memoryview(data)[1:]), FUA if rng.random() < 0.1 else 0)
    await check(root, model)
    assert image.read_bytes() == model


async def test_direct_requests_are_aligned_to_sectors(graph: Graph, attach: Callable[..., str], image: Path) -> None:
    await add(graph, attach(image, "--sector-size=4096"), direct=True)
    assert graph.find("d").driver.limits.request_alignment == 4096
    root = root_of(graph, "d")
    model = bytearray(image.read_bytes())
    model[1000:1005] = b"small"
    await write(root, 1000, b"small")
    await check(root, model)


@direct_or_not
@pytest.mark.parametrize("flags", [0, MAY_UNMAP], ids=["zero", "unmap"])
async def test_zero_writes_zero_their_range_and_no_more(
    graph: Graph, device: str, image: Path, direct: bool, flags: int
) -> None:
    await add(graph, device, direct=direct)
    root = root_of(graph, "d")
    model = bytearray(image.read_bytes())
    for offset, length in ((0, 4096), (65536, 131072), (300001, 5000), (MIB - 700, 700), (200000, 1)):
        model[offset : offset + length] = bytes(length)
        await root.pwrite_zeroes(offset, length, flags)
    await check(root, model)
    assert image.read_bytes() == model


@direct_or_not
async def test_zeroes_that_may_unmap_make_a_hole(graph: Graph, device: str, image: Path, direct: bool) -> None:
    await add(graph, device, direct=direct)
    root = root_of(graph, "d")
    os.sync()
    before = image.stat().st_blocks
    await root.pwrite_zeroes(0, MIB // 2, MAY_UNMAP | NO_FALLBACK)
    assert image.stat().st_blocks <= before - MIB // 2 // 512
    assert await read(root, 0, MIB // 2) == bytes(MIB // 2)


@direct_or_not
async def test_zeroes_are_seen_by_a_reader_through_the_page_cache(graph: Graph, device: str, direct: bool) -> None:
    await add(graph, device, direct=direct)
    root = root_of(graph, "d")
    with open(device, "rb", buffering=0) as reader:
        assert reader.read(4096) != bytes(4096)
        await root.pwrite_zeroes(0, 4096, MAY_UNMAP)
        await root.flush()
        reader.seek(0)
        assert reader.read(4096) == bytes(4096)


@direct_or_not
async def test_a_discard_frees_what_is_below(graph: Graph, device: str, image: Path, direct: bool) -> None:
    await add(graph, device, direct=direct)
    root = root_of(graph, "d")
    os.sync()
    content, before = image.read_bytes(), image.stat().st_blocks
    await root.pdiscard(MIB // 4, MIB // 2)
    assert image.stat().st_blocks <= before - MIB // 2 // 512
    found = await read(root, 0, MIB)
    assert found[: MIB // 4] == content[: MIB // 4]
    assert found[MIB * 3 // 4 :] == content[MIB * 3 // 4 :]


async def test_a_discard_of_parts_of_sectors_is_left_out(graph: Graph, device: str, image: Path) -> None:
    await add(graph, device)
    await root_of(graph, "d").pdiscard(100, 300)
    assert await read(root_of(graph, "d"), 0, 512) == image.read_bytes()[:512]


async def test_a_discard_is_ignored_unless_asked_for(graph: Graph, device: str, image: Path) -> None:
    await add(graph, device, discard="ignore")
    await root_of(graph, "d").pdiscard(0, MIB)
    assert await read(root_of(graph, "d"), 0, MIB) == image.read_bytes()


@direct_or_not
async def test_many_requests_at_once_do_not_mix(graph: Graph, device: str, image: Path, direct: bool) -> None:
    await add(graph, device, direct=direct)
    root = root_of(graph, "d")
    async with trio.open_nursery() as nursery:
        for at in range(0, MIB, 4096):
            nursery.start_soon(write, root, at, at.to_bytes(4, "little") * 1024)
    await check(root, b"".join(at.to_bytes(4, "little") * 1024 for at in range(0, MIB, 4096)))


async def test_block_status_is_data(graph: Graph, device: str) -> None:
    await add(graph, device)
    status = await graph.find("d").driver.block_status(4096, 8192)
    assert (status.flags & Status.DATA, status.length, status.host_offset) == (Status.DATA, 8192, 4096)


# --- what cannot be ------------------------------------------------------------------------------


# What block_resize says, and that a shorter length changes nothing, is as in qemu-storage-daemon 10.0.2.
async def test_a_longer_length_is_refused_and_a_shorter_one_changes_nothing(graph: Graph, device: str) -> None:
    await add(graph, device)
    with pytest.raises(BlockIOError, match="Cannot grow device files"):
        await graph.block_resize("d", 2 * MIB)
    await graph.block_resize("d", 4096)
    await graph.block_resize("d", MIB)
    assert graph.find("d").driver.length == MIB


async def test_exactly_another_length_is_refused(graph: Graph, device: str) -> None:
    await add(graph, device)
    root = root_of(graph, "d", Perm.WRITE | Perm.RESIZE)
    with pytest.raises(BlockIOError, match="Cannot resize device files"):
        await root.truncate(4096, exact=True)
    with pytest.raises(BlockIOError, match="Preallocation mode 'full' unsupported for this device"):
        await root.truncate(MIB, prealloc="full")


async def test_writes_past_the_end_fail(graph: Graph, device: str) -> None:
    await add(graph, device)
    with pytest.raises(BlockIOError):
        await write(root_of(graph, "d"), MIB, b"x")


async def test_a_read_only_device_is_refused(graph: Graph, attach: Callable[..., str], image: Path) -> None:
    device = attach(image, "--read-only")
    with pytest.raises(FusebdError) as refused:
        await add(graph, device)
    # QEMU's words
    assert str(refused.value) == "The device is not writable: Permission denied"
    assert refused.value.errno == errno.EACCES
    assert not graph.nodes


@pytest.mark.parametrize("option", ["read_only", "auto_read_only"])
async def test_a_read_only_device_can_be_read(
    graph: Graph, attach: Callable[..., str], image: Path, option: str
) -> None:
    await add(graph, attach(image, "--read-only"), **{option: True})
    assert graph.find("d").read_only
    assert await read(root_of(graph, "d", Perm.CONSISTENT_READ), 0, MIB) == image.read_bytes()
    with pytest.raises(ReadOnlyError):
        root_of(graph, "d", READ_WRITE)


@pytest.mark.parametrize(
    ("filename", "message"),
    [
        ("/etc/passwd", "'host_device' driver requires '/etc/passwd' to be either a character or block device"),
        ("/dev/nosuch", "Could not open '/dev/nosuch': No such file or directory"),
        ("", "The 'host_device' block driver requires a file name"),
    ],
)
async def test_what_is_no_device_is_refused(graph: Graph, filename: str, message: str) -> None:
    with pytest.raises(FusebdError) as refused:
        await add(graph, filename)
    assert str(refused.value) == message


async def test_the_file_driver_refuses_a_device(graph: Graph, device: str) -> None:
    with pytest.raises(FusebdError) as refused:
        await graph.blockdev_add({"driver": "file", "node-name": "f", "filename": device})
    assert str(refused.value) == f"'file' driver requires '{device}' to be a regular file"


async def test_an_unknown_character_device_has_no_length(graph: Graph) -> None:
    await add(graph, "/dev/null")
    assert graph.find("d").driver.length == 0


async def test_closing_lets_go_of_the_device(graph: Graph, device: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    await add(graph, device, direct=True)
    await graph.blockdev_del("d")
    assert len(os.listdir("/proc/self/fd")) == before
