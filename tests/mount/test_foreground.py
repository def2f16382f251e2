"""``fusebd mount --foreground``: QMP on standard input and output, the log, signals, and the exit status."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from mounting import FUSEBD, failing, fusebd, left_behind, refusal

NULL = {"driver": "null-co", "node-name": "null", "size": 65536}
on_devfuse = pytest.mark.parametrize("transport", ["devfuse"])


def blockdev(value: Any) -> list[str]:
    return ["--blockdev", json.dumps(value)]


class Foreground:
    """``fusebd mount --foreground`` as a child process, with QMP on its standard input and output."""

    def __init__(self, point: Path, transport: str, *words: str) -> None:
        self.point = point
        point.mkdir()
        command = [*FUSEBD, "mount", "--foreground", "--transport", transport, *words, str(point)]
        self.errors = point.with_suffix(".stderr")
        with self.errors.open("wb") as errors:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def read(self) -> Any:
        return json.loads(self.stdout.readline())

    def ask(self, command: str) -> Any:
        """The answer to *command*; events before it are lost."""
        self.stdin.write(json.dumps({"execute": command}).encode() + b"\n")
        self.stdin.flush()
        while "event" in (answer := self.read()):
            pass
        return answer

    def wait_serving(self, log: Path | None = None) -> None:
        """Wait until it says in its log that the directory is mounted."""
        log = log or self.errors
        while not (log.exists() and f"INFO {self.point}: mounted" in log.read_text()):
            assert self.process.poll() is None, self.errors.read_text()
            time.sleep(0.01)

    def end(self) -> tuple[int, bytes, str]:
        """Its exit status, what is left of its standard output, and its standard error, when it has ended."""
        with self.process:
            output = self.stdout.read()
        return self.process.returncode, output, self.errors.read_text()


def test_in_the_foreground_qmp_is_on_standard_input_and_output(scratch: Path, transport: str) -> None:
    process = Foreground(scratch / "mnt", transport, "--qmp", "stdio", *blockdev(NULL))
    assert "QMP" in process.read()
    assert process.ask("qmp_capabilities") == {"return": {}}
    process.wait_serving()
    assert (scratch / "mnt" / "null").read_bytes() == bytes(65536)
    assert process.ask("quit") == {"return": {}}
    status, _, log = process.end()
    assert status == 0
    assert f" INFO {scratch}/mnt: mounted\n" in log
    assert left_behind(scratch) == []


@on_devfuse
def test_the_end_of_standard_input_leaves_the_mount(scratch: Path, transport: str) -> None:
    process = Foreground(scratch / "mnt", transport, "--qmp", "stdio", *blockdev(NULL))
    process.stdin.close()
    process.wait_serving()
    assert process.stdout.readline().startswith(b'{"QMP": ')
    assert (scratch / "mnt" / "null").read_bytes() == bytes(65536)
    fusebd("umount", scratch / "mnt")
    assert process.end()[0] == 0
    assert left_behind(scratch) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_foreground_well(scratch: Path, transport: str, number: int) -> None:
    process = Foreground(scratch / "mnt", transport, *blockdev(NULL))
    process.wait_serving()
    process.process.send_signal(number)
    status, _, log = process.end()
    assert status == 0
    assert log.endswith(f" INFO {scratch}/mnt: unmounted\n")
    assert left_behind(scratch) == []


@on_devfuse
def test_in_the_foreground_nothing_but_qmp_is_on_standard_output(scratch: Path, transport: str) -> None:
    process = Foreground(scratch / "mnt", transport, *blockdev(NULL))
    process.wait_serving()
    process.process.terminate()
    assert process.end()[1] == b""


@on_devfuse
def test_the_foreground_logs_to_a_file_if_told_to(scratch: Path, transport: str) -> None:
    process = Foreground(scratch / "mnt", transport, "--log-file", str(scratch / "log"))
    process.wait_serving(scratch / "log")
    process.process.terminate()
    assert process.end() == (0, b"", "")


def test_the_foreground_that_cannot_start_says_so_in_one_line(scratch: Path) -> None:
    (scratch / "mnt").mkdir()
    node = "file,node-name=x,filename=none"
    message = refusal("mount", "--foreground", "--blockdev", node, scratch / "mnt")
    assert message == f"--blockdev {node}: Could not open 'none': No such file or directory"
    assert left_behind(scratch) == []


@on_devfuse
def test_the_foreground_that_ends_badly_says_so(scratch: Path, transport: str) -> None:
    process = Foreground(scratch / "mnt", transport, *blockdev(failing("disk", event="flush_to_disk")))
    process.wait_serving()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (scratch / "mnt" / "disk").write_bytes(b"x")
    process.process.terminate()
    status, _, log = process.end()
    assert status == 1
    assert log.splitlines()[-1].startswith(f"fusebd: {scratch}/mnt: disk: #block")


def test_a_signal_during_the_start_ends_it(scratch: Path, transport: str) -> None:
    for delay in range(0, 50, 4):  # milliseconds from when its state file is there: mounting takes about thirty
        process = Foreground(scratch / f"mnt{delay}", transport, *blockdev(NULL))
        while not any(name.endswith(".json") for name in left_behind(scratch)):
            time.sleep(0.001)
        time.sleep(delay / 1000)
        process.process.send_signal(signal.SIGINT)
        status, _, log = process.end()
        assert status in (0, 1, 130), log
        assert left_behind(scratch) == [], log
