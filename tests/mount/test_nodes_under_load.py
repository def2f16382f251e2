"""Nodes come and go, or are slow, while others are busy."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from mounting import Mount, check_image, qcow2, raw, run

LENGTH = 32 << 20
NODES = 100


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def _resident(pid: int) -> int:
    """Bytes of memory in use."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS:"))


@contextmanager
def _fio_until_left(path: Path) -> Iterator[None]:
    """fio with verification on *path* meanwhile; AssertionError if it had an error."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(_fio, path, stop)
        try:
            yield
        finally:
            stop.set()
        assert done.result() > 0


def _fio(path: Path, stop: threading.Event) -> int:
    """Runs until *stop*, at least once; how many runs there were."""
    runs = 0
    while not runs or not stop.is_set():
        run(
            "fio", "--name=load", f"--filename={path}", f"--size={LENGTH}", "--io_size=8m", "--rw=randwrite",
            "--bssplit=4k/70:16k/20:64k/10", "--ioengine=libaio", "--direct=1", "--iodepth=16", "--verify=crc32c",
            "--verify_fatal=1", "--allow_file_create=0", f"--randseed={runs}",
            cwd=path.parent.parent,
        )  # fmt: skip
        runs += 1
    return runs


def _add_and_remove(mounted: Mount, directory: Path) -> None:
    """A hundred nodes of several kinds, all there at once, used, and removed."""
    for number in range(NODES):
        image = directory / f"{number % 4}.qcow2"
        options = qcow2(f"node{number}", image, **{"read-only": True, "force-share": True})
        if number % 3 == 1:
            options["file"] = {"driver": "blkdebug", "image": options["file"]}
        mounted.qmp("blockdev-add", options)
        assert (mounted / f"node{number}").stat().st_size == 4 << 20
    assert {f"node{number}" for number in range(NODES)} < set(os.listdir(mounted.point))
    for number in range(0, NODES, 7):
        with open(mounted / f"node{number}", "rb") as file:
            assert file.read(65536) == bytes([number % 4]) * 65536
    for number in range(NODES):
        mounted.qmp("blockdev-del", {"node-name": f"node{number}"})
    assert os.listdir(mounted.point) == ["disk"]


def test_nodes_come_and_go_during_load_and_leave_nothing_behind(mount: Callable[..., Mount], tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", disk, str(LENGTH))
    for number in range(4):
        image = tmp_path / f"{number}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", image, "4M")
        run("qemu-io", "-f", "qcow2", "-c", f"write -q -P {number} 0 4M", image)
    mounted = mount(qcow2("disk", disk))
    with _fio_until_left(mounted / "disk"):
        for _ in range(3):  # until the allocator has all the memory that a hundred nodes at once need
            _add_and_remove(mounted, tmp_path)
    before = _descriptors(mounted.pid), _threads(mounted.pid)
    resident = _resident(mounted.pid)
    with _fio_until_left(mounted / "disk"):
        for _ in range(3):
            _add_and_remove(mounted, tmp_path)
    assert _descriptors(mounted.pid) <= before[0]
    # Idle worker threads end by themselves after a while; they are bounded whatever happens.
    assert _threads(mounted.pid) <= before[1] + 8
    # 300 nodes that kept something would be tens of megabytes: a qcow2 node has caches of its own.
    assert _resident(mounted.pid) - resident < 8 << 20
    mounted.umount()
    check_image(disk)


def test_a_slow_node_delays_no_other(mount: Callable[..., Mount], tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"fast" * 1024)
    slow = {"driver": "null-co", "node-name": "slow", "latency-ns": 1_000_000_000, "read-zeroes": True}
    mounted = mount(slow, raw("disk", tmp_path / "disk.raw"))
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(_read, mounted / "slow") for _ in range(4)]
        rounds = 0
        descriptor = os.open(mounted / "disk", os.O_RDONLY)
        while not any(one.done() for one in waiting):
            assert os.pread(descriptor, 4, 0) == b"fast"
            rounds += 1
        os.close(descriptor)
        assert [one.result() for one in waiting] == [bytes(4096)] * 4
    # A read that waited for the slow node would take a second each.
    assert rounds > 100
    mounted.umount()


def _read(path: Path) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read(4096)


def test_a_slow_node_serves_many_requests_at_the_same_time(mount: Callable[..., Mount], tmp_path: Path) -> None:
    slow = {"driver": "null-co", "node-name": "slow", "latency-ns": 1_000_000_000, "size": 64 << 20}
    mounted = mount(slow)
    begin = time.monotonic()
    run(
        "fio", "--name=many", f"--filename={mounted / 'slow'}", "--size=64m", "--rw=randread", "--bs=4k",
        "--ioengine=libaio", "--direct=1", "--iodepth=100", "--number_ios=100", "--allow_file_create=0", cwd=tmp_path,
    )  # fmt: skip
    # One after the other they would take 100 seconds.
    assert time.monotonic() - begin < 50
    mounted.umount()


def test_a_reader_that_is_killed_leaves_nothing_behind(mount: Callable[..., Mount]) -> None:
    mounted = mount({"driver": "null-co", "node-name": "slow", "latency-ns": 1_000_000_000})
    readers = [subprocess.Popen(["dd", f"if={mounted / 'slow'}", "of=/dev/null", "bs=4k"]) for _ in range(8)]
    time.sleep(0.3)
    for reader in readers:
        reader.kill()
    for reader in readers:
        assert reader.wait() != 0
    mounted.qmp("blockdev-del", {"node-name": "slow"})
    assert os.listdir(mounted.point) == []
    mounted.umount()
