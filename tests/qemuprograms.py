"""QEMU's own programs at work while a test runs: a storage daemon, an image that qemu-io holds open."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mounting import Qmp


@contextmanager
def storage_daemon(directory: Path, *options: str) -> Iterator[Qmp]:
    """The monitor of a qemu-storage-daemon, whose socket is in *directory*; it ends with the context."""
    path = str(directory / "qsd.sock")
    # It is given the socket that listens already, so that there is nothing to wait for.
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        chardev = f"socket,id=monitor,server=on,wait=off,fd={listening.fileno()}"
        daemon = subprocess.Popen(
            ["qemu-storage-daemon", "--chardev", chardev, "--monitor", "monitor", *options],
            pass_fds=[listening.fileno()],
        )
    try:
        monitor = Qmp(path)
        try:
            yield monitor
        finally:
            # not by a signal: one that comes just when the client hangs up can be lost on it
            monitor("quit")
            monitor.close()
    except BaseException:
        daemon.kill()
        raise
    finally:
        daemon.wait()
        Path(path).unlink(missing_ok=True)


@contextmanager
def held_by_qemu_io(*words: str | Path) -> Iterator[None]:
    """A qemu-io that has opened what *words* say, and keeps it open."""
    holder = subprocess.Popen(
        ["qemu-io", *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.write(b"length\n")
    holder.stdin.flush()
    said = b""
    while b"iB\n" not in said:  # a length has been answered
        more = os.read(holder.stdout.fileno(), 4096)
        assert more, said
        said += more
    try:
        yield
    finally:
        holder.communicate(b"quit\n")
