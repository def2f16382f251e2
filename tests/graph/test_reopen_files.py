"""blockdev-reopen of files: their descriptors, and the image locks that these hold."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from images import create, io
from mounting import loop_device, run
from qemuprograms import held_by_qemu_io
from reopens import descriptors, file, image_node, locks_of, node, put, read_all, refusal
from support import root_of

from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.block.reopen import reopen
from fusebd.drivers.file import File
from fusebd.errors import ReadOnlyError

Json = Any
MIB = 1 << 20
READ = Perm.CONSISTENT_READ


def driver_of(graph: Graph, name: str) -> File:
    driver = graph.find(name).driver
    assert isinstance(driver, File)
    return driver


def flags_of(graph: Graph, name: str) -> int:
    """The flags with which the file of the node *name* is open."""
    return fcntl.fcntl(driver_of(graph, name).handle.fd, fcntl.F_GETFL)


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


# --- the descriptor of a file --------------------------------------------------------------------


async def test_a_file_is_opened_as_it_is_used(graph: Graph, plain: Path) -> None:
    await graph.blockdev_add(file("f", str(plain)))
    before = descriptors()
    modes = []
    for options in (
        {},
        {"read_only": True},
        {"read_only": True, "cache": {"direct": True}},
        {"cache": {"direct": True}},
    ):
        await reopen(graph, [file("f", str(plain), **options)])
        assert await read_all(graph, "f") == plain.read_bytes()
        modes.append((flags_of(graph, "f") & os.O_ACCMODE, bool(flags_of(graph, "f") & os.O_DIRECT)))
    assert modes == [(os.O_RDWR, False), (os.O_RDONLY, False), (os.O_RDONLY, True), (os.O_RDWR, True)]
    await put(graph, "f", 5, b"written")
    await reopen(graph, [file("f", str(plain))])
    assert descriptors() == before
    assert plain.read_bytes()[5:12] == b"written"


async def test_without_a_need_the_descriptor_stays(graph: Graph, plain: Path) -> None:
    await graph.blockdev_add(file("f", str(plain)))
    before = driver_of(graph, "f").handle.fd
    await reopen(graph, [file("f", str(plain), detect_zeroes="on", cache={"no-flush": True})])
    assert driver_of(graph, "f").handle.fd == before


async def test_it_is_the_same_file_whatever_has_become_of_its_name(graph: Graph, plain: Path) -> None:
    await graph.blockdev_add(file("f", str(plain)))
    expected = plain.read_bytes()
    plain.rename(plain.with_name("moved"))
    plain.write_bytes(b"another file")
    await reopen(graph, [file("f", str(plain), read_only=True)])
    plain.with_name("moved").unlink()
    await reopen(graph, [file("f", str(plain), cache={"direct": True})])
    assert await read_all(graph, "f") == expected
    await put(graph, "f", 0, b"unseen")
    assert plain.read_bytes() == b"another file"


async def test_the_length_is_what_the_file_has_by_then(graph: Graph, plain: Path) -> None:
    await graph.blockdev_add(node("raw", "r", file=file("f", str(plain))))
    os.truncate(plain, 2 * MIB)
    await reopen(graph, [node("raw", "r", file="f", read_only=True)])
    assert graph.find("r").driver.length == 2 * MIB


@contextmanager
def running(program: Path) -> Iterator[None]:
    """*program* runs: nobody can open it for writing meanwhile."""
    process = subprocess.Popen([program, "600"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def test_a_file_that_cannot_be_written_stays_read_only(graph: Graph, tmp_path: Path) -> None:
    program = tmp_path / "program"
    shutil.copy("/bin/sleep", program)
    with running(program):
        await graph.blockdev_add(file("f", str(program), read_only=True))
        before = descriptors()
        assert await refusal(graph, file("f", str(program))) == f"Could not open '{program}': Text file busy"
        await reopen(graph, [file("f", str(program), auto_read_only=True)])
        assert graph.find("f").read_only
        with pytest.raises(ReadOnlyError):
            root_of(graph, "f")
        assert descriptors() == before
    await reopen(graph, [file("f", str(program), auto_read_only=True)])
    assert not graph.find("f").read_only


async def test_one_file_that_cannot_be_opened_leaves_all_as_they_were(
    graph: Graph, plain: Path, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    shutil.copy("/bin/sleep", program)
    with running(program):
        await graph.blockdev_add(file("f", str(plain)))
        await graph.blockdev_add(file("g", str(program), read_only=True))
        before = descriptors()
        wanted = file("f", str(plain), read_only=True, cache={"direct": True})
        assert "Text file busy" in await refusal(graph, wanted, file("g", str(program)))
        assert descriptors() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root")
async def test_a_device_is_reopened_like_a_file(graph: Graph, plain: Path) -> None:
    with loop_device(plain) as device:
        options = node("host_device", "d", filename=device)
        await graph.blockdev_add(options)
        await reopen(graph, [{**options, "read-only": True, "cache": {"direct": True}}])
        assert await read_all(graph, "d") == plain.read_bytes()
        with pytest.raises(ReadOnlyError):
            root_of(graph, "d")
        run("blockdev", "--setro", device)
        refused = await refusal(graph, options)
        assert refused == "The device is not writable: Permission denied"
        run("blockdev", "--setrw", device)
        await reopen(graph, [options])
        await put(graph, "d", 0, b"device")
        await graph.blockdev_del("d")
    assert plain.read_bytes()[:6] == b"device"


# --- image locks ---------------------------------------------------------------------------------


async def test_image_locks_are_those_of_the_permissions_taken(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(image_node("q", image))
    writable = locks_of(image)
    await reopen(graph, [image_node("q", image, read_only=True)])
    read_only = locks_of(image)
    await graph.blockdev_del("q")
    assert locks_of(image) == set()
    await graph.blockdev_add(image_node("q", image, read_only=True))
    assert locks_of(image) == read_only
    await reopen(graph, [image_node("q", image)])
    assert locks_of(image) == writable > read_only


async def test_qemu_reads_beside_a_node_that_was_made_read_only(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(image_node("q", image))
    words = ("-r", "-f", "qcow2", "-c", "read -P 7 0 64k", image)
    assert 'Failed to get shared "write" lock' in await run_in_thread("qemu-io", *words, expect=(1,))
    await reopen(graph, [image_node("q", image, read_only=True)])
    assert "read 65536/65536" in await run_in_thread("qemu-io", *words)
    for name in ("write -P 8 0 64k", "quit"):
        said = await run_in_thread("qemu-io", "-f", "qcow2", "-c", name, image, expect=(1,))
        assert 'Failed to get "write" lock' in said
    await reopen(graph, [image_node("q", image)])
    assert 'Failed to get shared "write" lock' in await run_in_thread("qemu-io", *words, expect=(1,))


async def test_a_node_stays_read_only_while_qemu_reads_the_image(graph: Graph, image: Path) -> None:
    await graph.blockdev_add(image_node("q", image, read_only=True))
    before = descriptors()
    with held_by_qemu_io("-r", "-f", "qcow2", image):
        held = descriptors()
        assert await refusal(graph, image_node("q", image)) == 'Failed to get "write" lock'
        assert descriptors() == held
        # read-only or direct, it may be reopened as often as it likes
        await reopen(graph, [image_node("q", image, read_only=True, cache={"direct": True})])
        assert (await read_all(graph, "q"))[:4096] == b"\7" * 4096
        await reopen(graph, [image_node("q", image, read_only=True)])
    await reopen(graph, [image_node("q", image)])
    await put(graph, "q", 0, b"written")
    assert descriptors() == before


#: takes the file as its argument, says so when it looks, and at the end of its input how often the lock was missing
_WATCHER = """
import fcntl, os, select, struct, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
missing = looks = 0
while not select.select([0], [], [], 0)[0]:
    answer = fcntl.fcntl(descriptor, 36, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 201, 1, 0))
    missing += struct.unpack("hhqqi4x", answer)[0] == fcntl.F_UNLCK
    looks += 1
    if looks == 1:
        os.write(1, b"looking")
os.write(1, b" %d %d" % (missing, looks))
"""


async def test_the_image_is_never_without_locks(graph: Graph, image: Path) -> None:
    """Another process asks for the lock that keeps writers out, over and over."""
    await graph.blockdev_add(image_node("q", image))
    command = [sys.executable, "-c", _WATCHER, str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as watcher:
        assert watcher.stdout is not None
        assert os.read(watcher.stdout.fileno(), 7) == b"looking"
        for round_ in range(50):
            # whether it is read-only or not, it keeps others from writing
            await reopen(graph, [image_node("q", image, cache={"direct": round_ % 2 == 0})])
            await reopen(graph, [image_node("q", image, cache={"direct": round_ % 3 == 0}, read_only=True)])
        said, _ = watcher.communicate()
    missing, looks = said.split()
    assert missing == b"0"
    assert int(looks) > 100


async def run_in_thread(*words: str | Path, expect: tuple[int, ...] = (0,)) -> str:
    return await trio.to_thread.run_sync(lambda: run(*words, expect=expect))
