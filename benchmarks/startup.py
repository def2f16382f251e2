"""How long it takes from the command line to a served first read."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.load import Plan
from benchmarks.processes import BenchmarkError, end_pid, is_mounted, output_of, pinned, unmount
from benchmarks.servers import FUSEBD
from benchmarks.stacks import Options

_NODES = (2, 3)


@dataclass(frozen=True)
class Start:
    """One start: *seconds* until the first 4 KiB were read."""

    program: str
    nodes: int
    round: int
    seconds: float


def _blockdevs(directory: str, nodes: int) -> list[Options]:
    """A chain of named nodes: file, qcow2, and as the third a filter."""
    chain: list[Options] = [
        {"driver": "file", "node-name": "file", "filename": os.path.join(directory, "disk.qcow2")},
        {"driver": "qcow2", "node-name": "format", "file": "file"},
        {"driver": "blkdebug", "node-name": "filter", "image": "format"},
    ]
    return chain[:nodes]


def _blockdev_arguments(blockdevs: list[Options]) -> list[str]:
    return [word for options in blockdevs for word in ("--blockdev", json.dumps(options))]


def _mount(transport: str) -> Callable[[Plan, str, int], float]:
    def measure(plan: Plan, directory: str, nodes: int) -> float:
        mountpoint = os.path.join(directory, "mnt")
        os.makedirs(mountpoint, exist_ok=True)
        blockdevs = _blockdevs(directory, nodes)
        command = [*FUSEBD, "mount", "--transport", transport, *_blockdev_arguments(blockdevs), mountpoint]
        try:
            begin = time.perf_counter()
            _start(plan, command)
            _read(os.path.join(mountpoint, blockdevs[-1]["node-name"]))
            seconds = time.perf_counter() - begin
            output_of(*FUSEBD, "umount", mountpoint)
        finally:
            if is_mounted(mountpoint):
                output_of(*FUSEBD, "umount", "--force", mountpoint)
        return seconds

    return measure


def _storage_daemon(*program: str) -> Callable[[Plan, str, int], float]:
    def measure(plan: Plan, directory: str, nodes: int) -> float:
        path, pidfile = os.path.join(directory, "export"), os.path.join(directory, "pid")
        with open(path, "wb"):
            pass
        blockdevs = _blockdevs(directory, nodes)
        export = {"type": "fuse", "id": "export", "node-name": blockdevs[-1]["node-name"], "mountpoint": path}
        command = [*(program or (plan.setting.qsd,)), "--daemonize", "--pidfile", pidfile]
        command += [*_blockdev_arguments(blockdevs), "--export", json.dumps(export)]
        try:
            begin = time.perf_counter()
            _start(plan, command)
            _read(path)
            return time.perf_counter() - begin
        finally:
            with contextlib.suppress(FileNotFoundError), open(pidfile) as file:
                end_pid(int(file.read()))
            if is_mounted(path):
                unmount(path)

    return measure


def _start(plan: Plan, command: list[str]) -> None:
    # No pipe: a daemon that kept one open would be waited for until its end.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(
            pinned(command, plan.setting.cores), stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
        )
        if done.returncode != 0:
            output.seek(0)
            raise BenchmarkError(output.read().decode(errors="replace").strip())


def _read(path: str) -> None:
    with open(path, "rb", buffering=0) as file:
        if len(file.read(4096)) != 4096:
            raise BenchmarkError(f"{path}: short read")


PROGRAMS: dict[str, Callable[[Plan, str, int], float]] = {
    "fusebd mount (devfuse)": _mount("devfuse"),
    "fusebd mount (pyfuse3)": _mount("pyfuse3"),
    "fusebd storage-daemon": _storage_daemon(*FUSEBD, "storage-daemon"),
    "qemu-storage-daemon": _storage_daemon(),
}


def measure_starts(plan: Plan) -> Iterator[Start]:
    """Start everything in turn; who cannot be started is left out, with the reason in ``plan.failures``."""
    with tempfile.TemporaryDirectory(prefix="fusebd-bench.", dir=plan.directory) as directory:
        output_of("qemu-img", "create", "-q", "-f", "qcow2", os.path.join(directory, "disk.qcow2"), str(64 << 20))
        # The first round warms the page cache up and is not counted.
        for number in range(-1, plan.rounds):
            for nodes in _NODES:
                for program, measure in PROGRAMS.items():
                    if program in plan.failures:
                        continue
                    plan.progress(f"startup {program} {nodes} nodes {number + 1}/{plan.rounds}")
                    try:
                        seconds = measure(plan, directory, nodes)
                    except BenchmarkError as error:
                        plan.failures[program] = str(error)
                    else:
                        if number >= 0:
                            yield Start(program, nodes, number, seconds)
