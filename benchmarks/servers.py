"""Those who serve a stack as a file: fusebd, qemu-storage-daemon in two ways, and nobody (the bare file)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.processes import BenchmarkError, is_mounted, output_of, running, unmount, wait_for
from benchmarks.stacks import EMPTY_LENGTH, NODE, Options, Stack

FUSEBD = [sys.executable, "-m", "fusebd"]


@dataclass(frozen=True)
class Served:
    """A stack that is served: the directory of its images, the file to read and write, and the processes behind it."""

    directory: str
    path: str
    pids: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """What all servers of a run have in common: the qemu-storage-daemon to use, and the cores they run on."""

    qsd: str
    cores: str | None


@dataclass(frozen=True)
class Server:
    """``serve`` starts it over the images in a directory; ``note`` goes beside its figures."""

    name: str
    serve: Callable[[Setting, Stack, str, int], contextlib.AbstractContextManager[Served]]
    note: str = ""


def find_qsd(named: str | None) -> str:
    """The qemu-storage-daemon to measure: *named*, else $QSD, else the newest on the PATH.  Raises BenchmarkError."""
    named = named or os.environ.get("QSD")
    if named is not None:
        if (found := shutil.which(named)) is None:
            raise BenchmarkError(f"{named}: no such program")
        return found
    found_in = (
        shutil.which("qemu-storage-daemon", path=path) for path in os.environ.get("PATH", os.defpath).split(os.pathsep)
    )
    programs = [program for program in found_in if program]
    if not programs:
        raise BenchmarkError("qemu-storage-daemon: not found (Debian's package qemu-system-common has it)")
    return max(programs, key=_version)


def _version(program: str) -> tuple[int, ...]:
    found = re.search(r"version (\d+)\.(\d+)\.(\d+)", output_of(program, "--version"))
    return tuple(map(int, found.groups())) if found else ()


def _options(stack: Stack, directory: str, length: int) -> Options:
    return {"node-name": NODE, **stack.blockdev(directory, length)}


@contextlib.contextmanager
def _mounted(path: str) -> Iterator[None]:
    try:
        yield
    finally:
        if is_mounted(path):
            unmount(path)


def _fusebd(transport: str) -> Server:
    @contextlib.contextmanager
    def serve(setting: Setting, stack: Stack, directory: str, length: int) -> Iterator[Served]:
        mountpoint, log = os.path.join(directory, "mnt"), os.path.join(directory, "fusebd.log")
        os.makedirs(mountpoint, exist_ok=True)
        command = [*FUSEBD, "mount", "--foreground", "--transport", transport, "--log-level", "warning"]
        command += [*stack.fusebd, "--blockdev", json.dumps(_options(stack, directory, length)), mountpoint]
        with _mounted(mountpoint), running(command, log, setting.cores) as process:
            path = os.path.join(mountpoint, NODE)
            wait_for(lambda: is_mounted(mountpoint) and os.path.exists(path), process, log, "fusebd")
            yield Served(directory, path, (process.pid,))

    return Server(f"fusebd-{transport}", serve)


@contextlib.contextmanager
def _serve_qsd(setting: Setting, stack: Stack, directory: str, length: int) -> Iterator[Served]:
    path, log = os.path.join(directory, "export"), os.path.join(directory, "qsd.log")
    with open(path, "wb"):
        pass
    export = {"type": "fuse", "id": "export", "node-name": NODE, "mountpoint": path, "writable": True}
    command = [setting.qsd, "--blockdev", json.dumps(_options(stack, directory, length))]
    command += ["--export", json.dumps(export)]
    with _mounted(path), running(command, log, setting.cores) as process:
        wait_for(lambda: is_mounted(path), process, log, setting.qsd)
        yield Served(directory, path, (process.pid,))


@contextlib.contextmanager
def _serve_nbdfuse(setting: Setting, stack: Stack, directory: str, length: int) -> Iterator[Served]:
    mountpoint, socket = os.path.join(directory, "nbdfuse"), os.path.join(directory, "nbd")
    qsd_log, nbdfuse_log = os.path.join(directory, "qsd.log"), os.path.join(directory, "nbdfuse.log")
    os.makedirs(mountpoint, exist_ok=True)
    server = {"addr": {"type": "unix", "path": socket}}
    export = {"type": "nbd", "id": "export", "node-name": NODE, "name": NODE, "writable": True}
    qsd = [setting.qsd, "--blockdev", json.dumps(_options(stack, directory, length))]
    qsd += ["--nbd-server", json.dumps(server), "--export", json.dumps(export)]
    path = os.path.join(mountpoint, NODE)
    nbdfuse = ["nbdfuse", path, f"nbd+unix:///{NODE}?socket={socket}"]
    with running(qsd, qsd_log, setting.cores) as served_by:
        wait_for(lambda: os.path.exists(socket), served_by, qsd_log, setting.qsd)
        with running(nbdfuse, nbdfuse_log, setting.cores) as shown_by, _mounted(mountpoint):
            wait_for(lambda: is_mounted(mountpoint) and os.path.exists(path), shown_by, nbdfuse_log, "nbdfuse")
            yield Served(directory, path, (served_by.pid, shown_by.pid))


@contextlib.contextmanager
def _serve_bare(setting: Setting, stack: Stack, directory: str, length: int) -> Iterator[Served]:
    yield Served(directory, os.path.join(directory, "disk.raw"), ())


QSD = "qsd-fuse"
BARE = "bare"
SERVERS = {
    server.name: server
    for server in (
        _fusebd("devfuse"),
        _fusebd("pyfuse3"),
        Server(
            QSD, _serve_qsd, "its FUSE export mixes up the data of concurrent writes: at depth 16 it is fast and wrong"
        ),
        Server(
            "qsd-nbdfuse", _serve_nbdfuse, "qemu-storage-daemon's NBD export, shown as a file by nbdfuse; both counted"
        ),
        Server(BARE, _serve_bare, "the image itself: O_DIRECT only where the stack says so"),
    )
}


def span(stack: Stack, length: int) -> int:
    """How much of the served file the load may use, in bytes."""
    return EMPTY_LENGTH if stack.fresh else length
