"""Real daemons and mounts for tests, driven as a user does it: by the command line, by QMP, by signals."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusebd.runtime import Place

FUSEBD = [sys.executable, "-m", "fusebd"]
Json = Any


def run(*command: str | Path, expect: Sequence[int] = (0,), **options: Any) -> str:
    """What *command* prints, both outputs together; AssertionError if its exit status is not one of *expect*."""
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        **options,
    )
    assert done.returncode in expect, f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}"
    output: str = done.stdout
    return output


def fusebd(*words: str | Path, expect: Sequence[int] = (0,)) -> str:
    """Run ``fusebd``; what it prints."""
    return run(*FUSEBD, *words, expect=expect)


def refusal(*words: str | Path, **options: Any) -> str:
    """The one line on standard error with which ``fusebd`` refuses *words*, without its name in front."""
    command = [*FUSEBD, *map(str, words)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False, **options
    )
    assert (done.returncode, done.stdout) == (1, ""), done
    line, newline, rest = done.stderr.partition("\n")
    assert (newline, rest) == ("\n", ""), done.stderr
    assert line.startswith("fusebd: "), line
    message: str = line.removeprefix("fusebd: ")
    return message


def mounts_below(directory: Path) -> list[str]:
    """Where something is mounted in *directory*, the latest first."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    points = [line.split(b" ")[4].decode("unicode-escape").encode("latin-1") for line in lines]
    return [os.fsdecode(point) for point in reversed(points) if point.startswith(os.fsencode(directory) + b"/")]


def daemons_of(directory: Path) -> list[int]:
    """The processes of fusebd that run in *directory*, or have been told something about it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
            if b"\0fusebd\0" not in words:
                continue
            here = os.readlink(process / "cwd")
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
        if here == str(directory) or os.fsencode(directory) + b"/" in words:
            found.append(int(process.name))
    return found


def left_behind(directory: Path) -> list[str]:
    """What there still is of mounts in *directory*: mounts, processes, and files in its runtime directory ``run``."""
    run_directory = directory / "run"
    files = os.listdir(run_directory) if run_directory.exists() else []
    return [*mounts_below(directory), *map(str, daemons_of(directory)), *files]


def sweep(directory: Path) -> None:
    """Kill and unmount what a test has left in *directory*."""
    for pid in daemons_of(directory):
        os.kill(pid, signal.SIGKILL)
    for point in mounts_below(directory):
        run("umount", "-l", point)


class Qmp:
    """A QMP connection.  Events that arrive while an answer is awaited are kept in ``events``."""

    def __init__(self, server: str | socket.socket) -> None:
        """With *server*: the path of its socket, or a socket that is connected to it, which is closed in the end."""
        self._socket = socket.socket(socket.AF_UNIX) if isinstance(server, str) else server
        self._socket.settimeout(60)
        self._file = self._socket.makefile("rb")
        self.events: list[Json] = []
        try:
            if isinstance(server, str):
                self._socket.connect(server)
            assert "QMP" in self._read()
            self("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def _read(self) -> Json:
        return json.loads(self._file.readline())

    def ask(self, request: Json) -> Json:
        """The whole answer to *request*."""
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while "return" not in (answer := self._read()) and "error" not in answer:
            self.events.append(answer)
        return answer

    def __call__(self, command: str, arguments: Json = None) -> Json:
        """What *command* returns; an error is an AssertionError with its description."""
        answer = self.ask({"execute": command, "arguments": arguments or {}})
        assert "return" in answer, answer
        return answer["return"]

    def wait_end(self) -> None:
        """Wait until the other side hangs up, and keep the events until then."""
        for line in self._file:
            self.events.append(json.loads(line))

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Mount:
    """A directory of nodes that a daemon serves.  ``mount / "disk"`` is the path of a node."""

    def __init__(self, point: Path, transport: str, blockdevs: Sequence[Json], options: Sequence[str] = ()) -> None:
        self.point, self.transport = point, transport
        self.log = point.with_name(point.name + ".log")
        self._qmp: Qmp | None = None
        self._place = Place(str(point))
        point.mkdir(exist_ok=True)
        words = [word for blockdev in blockdevs for word in ("--blockdev", json.dumps(blockdev))]
        fusebd("mount", "--transport", transport, "--log-file", self.log, *options, *words, point)
        file = self._place.find()
        assert file is not None
        state = file.read()
        file.close()
        assert state is not None
        self.pid = state.pid

    def __truediv__(self, name: str) -> Path:
        return self.point / name

    @property
    def qmp(self) -> Qmp:
        if self._qmp is None:
            self._qmp = Qmp(self._place.socket)
        return self._qmp

    def hang_up(self) -> None:
        """Close the QMP connection."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None

    def umount(self) -> None:
        """Unmount; AssertionError if the daemon did not end well, or logged an error."""
        self.hang_up()
        fusebd("umount", self.point)
        log = self.log.read_text()
        assert " ERROR " not in log, log
        assert "Traceback" not in log, log

    def wait_end(self) -> None:
        """Wait until the daemon has ended, by itself or because it was told to."""
        self.hang_up()
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        assert select.select([descriptor], [], [], 60)[0], "the daemon does not end"
        os.close(descriptor)

    def kill(self) -> None:
        """SIGKILL, and wait until it has no descriptor any more."""
        self.hang_up()
        os.kill(self.pid, signal.SIGKILL)
        file = self._place.find()
        assert file is not None
        file.wait_lock()
        file.close()

    def sweep(self) -> None:
        """Leave nothing behind, whatever a test has left."""
        self.hang_up()
        file = self._place.find()
        if file is not None:
            try:
                if not file.try_lock():
                    os.kill(self.pid, signal.SIGKILL)
                    file.wait_lock()
            finally:
                file.close()
            self._place.clear()
        while str(self.point) in mounts_below(self.point.parent):
            run("umount", "-l", self.point)


def qcow2(name: str, path: Path, **options: Json) -> Json:
    """The options of a qcow2 node over the file *path*."""
    return {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": str(path)}, **options}


def raw(name: str, path: Path, **options: Json) -> Json:
    """The options of a raw node over the file *path*."""
    return {"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": str(path)}, **options}


def failing(name: str, image: Json = None, **rule: Json) -> Json:
    """The options of a raw node that fails by *rule* (of blkdebug's inject-error), over *image* or else null-co."""
    below = {
        "driver": "blkdebug",
        "image": image or {"driver": "null-co", "size": 65536},
        "inject-error": [rule],
    }
    return {"driver": "raw", "node-name": name, "file": below}


def check_image(path: Path, *, leaks: bool = False) -> None:
    """AssertionError if qemu-img check finds an error in the qcow2 image *path*, or (unless *leaks*) a leak."""
    run("qemu-img", "check", "-f", "qcow2", path, expect=(0, 3) if leaks else (0,))


@contextmanager
def loop_device(path: Path, *, direct: bool = True) -> Iterator[str]:
    """A loop device over *path*."""
    device = run("losetup", "--find", "--show", f"--direct-io={'on' if direct else 'off'}", path).strip()
    try:
        yield device
    finally:
        run("losetup", "-d", device)


@contextmanager
def file_system(device: str, point: Path, *options: str) -> Iterator[Path]:
    """The file system on *device*, mounted at *point*."""
    point.mkdir(exist_ok=True)
    run("mount", *options, device, point)
    try:
        yield point
    finally:
        run("umount", point)


class KernelLog:
    """What the kernel says from now on."""

    def __init__(self) -> None:
        self._descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._descriptor, 0, os.SEEK_END)
        self._text = ""

    def wait_for(self, text: str) -> bool:
        """Whether *text* is in it, after some seconds at most."""
        for _ in range(100):
            if self.has(text):
                return True
            time.sleep(0.05)
        return False

    def has(self, text: str) -> bool:
        """Whether *text* is in it by now."""
        return text in self.text()

    def text(self) -> str:
        """All of it by now."""
        try:
            while True:
                self._text += os.read(self._descriptor, 8192).decode(errors="replace")
        except BlockingIOError:
            return self._text

    def close(self) -> None:
        os.close(self._descriptor)
