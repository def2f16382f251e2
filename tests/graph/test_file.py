"""The file and host_device drivers against real files, a loop device, and a real qemu for the image locks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from support import READ_WRITE, read, root_of, write

from fusebd.block.child import FUA, MAY_UNMAP
from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.block.status import Status
from fusebd.errors import BlockIOError, FusebdError, PermissionConflict

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A MiB of bytes that differ from place to place."""
    path = tmp_path / "image"
    path.write_bytes(bytes(i // 512 % 255 + 1 for i in range(MIB)))
    return path


def file(path: Path | str, **more: Any) -> dict[str, Any]:
    return {"driver": "file", "node-name": "f", "filename": str(path), **more}


@pytest.mark.parametrize(
    "options", [{}, {"cache": {"direct": True}}, {"cache": {"direct": True}, "aio": "threads"}], ids=str
)
async def test_what_is_written_is_in_the_file(graph: Graph, image: Path, options: dict[str, Any]) -> None:
    await graph.blockdev_add(file(image, **options))
    root = root_of(graph, "f")
    model = bytearray(image.read_bytes())
    for offset, length in ((0, 512), (100, 9000), (MIB - 700, 700), (4096, 300000)):
        data = os.urandom(length)
        await write(root, offset, data)
        model[offset : offset + length] = data
        assert await read(root, offset, length) == data
    assert image.read_bytes() == model


async def test_the_length_is_exact_and_the_rest_of_the_last_block_reads_zero(graph: Graph, image: Path) -> None:
    os.truncate(image, 1000)
    await graph.blockdev_add(file(image, cache={"direct": True}))
    root = root_of(graph, "f", READ_WRITE | Perm.RESIZE)
    assert root.length == 1000
    assert await read(root, 0, 1000) == image.read_bytes()


async def test_a_file_cut_by_somebody_else_reads_zeroes_there(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(file(image))
    os.truncate(image, 5000)
    assert await read(root_of(graph, "f"), 4096, 4096) == bytes([9]) * 512 + bytes([10]) * 392 + bytes(3192)


async def test_many_requests_in_threads_at_once(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(file(image, cache={"direct": True}))
    root = root_of(graph, "f")
    async with trio.open_nursery() as nursery:
        for at in range(0, MIB, 8192):
            nursery.start_soon(write, root, at, at.to_bytes(8, "little") * 1024)
    data = image.read_bytes()
    assert all(data[at : at + 8192] == at.to_bytes(8, "little") * 1024 for at in range(0, MIB, 8192))


@pytest.mark.parametrize("aio", ["threads", "native"])
async def test_direct_io_takes_memory_of_any_alignment_and_in_any_pieces(graph: Graph, image: Path, aio: str) -> None:
    await graph.blockdev_add(file(image, cache={"direct": True}, aio=aio))
    root = root_of(graph, "f")
    before = image.read_bytes()
    for shift in (0, 1, 511):
        memory = memoryview(bytearray(16384 + shift))[shift:]
        await root.preadv(8192, (memory[:512], memory[512:5000], memory[5000:]))
        assert memory == before[8192 : 8192 + 16384]
        await root.pwritev(65536, (memory[:4096], memory[4096:]))
        assert image.read_bytes()[65536 : 65536 + 16384] == memory


async def test_more_direct_requests_than_the_kernel_takes_at_once(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(file(image, cache={"direct": True}))
    root = root_of(graph, "f")
    found: dict[int, bytes] = {}

    async def read_into(at: int) -> None:
        found[at] = await read(root, at, 512)

    async with trio.open_nursery() as nursery:
        for at in range(0, MIB, 512):
            nursery.start_soon(read_into, at)
    assert b"".join(found[at] for at in range(0, MIB, 512)) == image.read_bytes()


async def test_a_file_that_is_opened_for_direct_io_may_be_closed_at_once(graph: Graph, image: Path) -> None:
    for _ in range(3):
        await graph.blockdev_add(file(image, cache={"direct": True}))
        await graph.blockdev_del("f")
    await graph.blockdev_add(file(image, cache={"direct": True}))
    assert await read(root_of(graph, "f"), 0, 512) == bytes([1]) * 512


async def test_zeroes_and_discards_make_holes(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(file(image, discard="unmap"))
    root = root_of(graph, "f")
    os.sync()
    before = image.stat().st_blocks
    await root.pwrite_zeroes(0, MIB // 4, MAY_UNMAP)
    await root.pdiscard(MIB // 2, MIB // 4)
    assert image.stat().st_blocks <= before - MIB // 2 // 512
    data = image.read_bytes()
    assert data[: MIB // 4] == bytes(MIB // 4)
    assert data[MIB // 2 : MIB * 3 // 4] == bytes(MIB // 4)
    assert len(data) == MIB


async def test_zeroes_past_the_end_make_the_file_longer(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(file(image, discard="unmap"))
    root = root_of(graph, "f", READ_WRITE | Perm.RESIZE)
    await root.pwrite_zeroes(MIB - 100, 200, MAY_UNMAP)
    await root.pwrite_zeroes(MIB + 1000, 24)
    assert root.length == image.stat().st_size == MIB + 1024
    assert image.read_bytes()[-1124:] == bytes(1124)


async def test_block_status_tells_data_from_holes(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as sparse:
        sparse.truncate(3 * MIB)
        sparse.seek(MIB)
        sparse.write(b"x" * MIB)
    await graph.blockdev_add(file(path))
    driver = graph.find("f").driver
    found = [await driver.block_status(at, 3 * MIB - at) for at in (0, MIB, 2 * MIB)]
    assert [(bool(s.flags & Status.ZERO), s.length) for s in found] == [(True, MIB), (False, MIB), (True, MIB)]


@pytest.mark.parametrize(("prealloc", "blocks"), [("off", 0), ("falloc", MIB // 512), ("full", MIB // 512)])
async def test_growing_takes_space_as_asked(graph: Graph, tmp_path: Path, prealloc: Any, blocks: int) -> None:
    path = tmp_path / "empty"
    path.touch()
    await graph.blockdev_add(file(path))
    root = root_of(graph, "f", Perm.WRITE | Perm.RESIZE)
    await root.truncate(MIB, prealloc=prealloc)
    assert (path.stat().st_size, path.stat().st_blocks >= blocks) == (MIB, True)
    assert bool(path.stat().st_blocks) == bool(blocks)


async def test_fua_and_flush_succeed(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(file(image))
    root = root_of(graph, "f")
    await root.pwritev(0, (memoryview(b"durable"),), FUA)
    await root.flush()
    assert image.read_bytes()[:7] == b"durable"
    assert graph.find("f").counted().flush_operations == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filename": "/nosuch/x"}, "Could not open '/nosuch/x': No such file or directory"),
        ({"filename": "/tmp"}, "Could not open '/tmp': Is a directory"),
        ({"filename": "/tmp", "read-only": True}, "'file' driver requires '/tmp' to be a regular file"),
        ({"filename": "/dev/null"}, "'file' driver requires '/dev/null' to be a regular file"),
        ({"filename": ""}, "The 'file' block driver requires a file name"),
        (
            {"aio": "native"},
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ),
        ({"filename": "a\0b"}, "Could not open 'a\0b': Invalid argument"),
        (
            {"driver": "host_device", "filename": "/etc/passwd"},
            "'host_device' driver requires '/etc/passwd' to be either a character or block device",
        ),
    ],
)
async def test_what_cannot_be_opened_is_refused(graph: Graph, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FusebdError) as refused:
        await graph.blockdev_add({**file("x"), **options})
    assert str(refused.value) == message


async def test_a_fifo_does_not_hold_up_the_daemon(graph: Graph, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FusebdError, match="to be a regular file"):
        await graph.blockdev_add(file(tmp_path / "fifo"))


# --- image locks ---------------------------------------------------------------------------------


def qemu_io(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["qemu-io", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def qemu_holds(image: Path) -> Iterator[None]:
    """A qemu-io that has the image open for writing."""
    process = subprocess.Popen(["qemu-io", "-f", "raw", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"length\n")
    process.stdin.flush()
    while b"MiB" not in process.stdout.readline():
        pass
    yield
    process.stdin.close()
    process.stdout.close()
    process.wait()


@pytest.mark.usefixtures("qemu_holds")
async def test_an_image_that_qemu_writes_is_refused(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(file(image))
    with pytest.raises(PermissionConflict) as refused:
        graph.attach_root(graph.find("f"), "a test", READ_WRITE, Perm.CONSISTENT_READ)
    assert str(refused.value) == 'Failed to get shared "write" lock'
    assert refused.value.hint == f"Is another process using the image [{image}]?"


@pytest.mark.usefixtures("qemu_holds")
async def test_locking_off_and_force_share_get_past_the_locks(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(file(image, locking="off"))
    assert await read(root_of(graph, "f"), 0, 1) == b"\1"
    shared = {"driver": "file", "filename": str(image)}
    await graph.blockdev_add(
        {"driver": "raw", "node-name": "r", "read-only": True, "force-share": True, "file": shared}
    )
    assert await read(root_of(graph, "r", Perm.CONSISTENT_READ), 0, 1) == b"\1"


async def test_an_image_that_we_write_is_refused_to_qemu_until_we_let_go(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(file(image))
    root = graph.attach_root(graph.find("f"), "a test", READ_WRITE, Perm.CONSISTENT_READ)
    assert 'Failed to get "write" lock' in qemu_io("-f", "raw", "-c", "write 0 512", str(image)).stderr
    assert qemu_io("-f", "raw", "-r", "-U", "-c", "read 0 512", str(image)).returncode == 0
    await graph.detach_root(root)
    assert qemu_io("-f", "raw", "-c", "write 0 512", str(image)).returncode == 0


# --- host_device ---------------------------------------------------------------------------------


@pytest.fixture
def loop_device(image: Path) -> Iterator[str]:
    if os.geteuid():
        pytest.skip("loop devices need root")
    device = subprocess.run(
        ["losetup", "--find", "--show", image], capture_output=True, text=True, check=True
    ).stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize("direct", [False, True])
async def test_a_block_device_is_read_written_zeroed_and_flushed(
    graph: Graph, image: Path, loop_device: str, direct: bool
) -> None:
    device = {"driver": "host_device", "node-name": "d", "filename": loop_device, "cache": {"direct": direct}}
    await graph.blockdev_add({**device, "discard": "unmap"})
    root = root_of(graph, "d")
    assert root.length == MIB
    model = bytearray(image.read_bytes())
    for offset, length in ((0, 4096), (513, 7000), (MIB - 10, 10)):
        data = os.urandom(length)
        await write(root, offset, data)
        model[offset : offset + length] = data
    await root.pwrite_zeroes(65536, 70000, MAY_UNMAP)
    model[65536 : 65536 + 70000] = bytes(70000)
    assert await read(root, 0, MIB) == model
    await root.flush()
    assert image.read_bytes() == model
    await root.pdiscard(MIB // 2, 65536)
    assert len(await read(root, MIB // 2, 65536)) == 65536


async def test_a_block_device_keeps_its_length(graph: Graph, loop_device: str) -> None:
    await graph.blockdev_add({"driver": "host_device", "node-name": "d", "filename": loop_device})
    with pytest.raises(BlockIOError, match="Cannot grow device files"):
        await graph.block_resize("d", 2 * MIB)
    assert graph.find("d").driver.length == MIB
