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
def storage_daemon(*words: str) -> Iterator[Qmp]:
    """The monitor of a qemu-storage-daemon with *words* on its command line, which ends with the context."""
    # Not on a listening socket: the one of 7.2 can turn deaf when a client comes while it is starting.
    ours, theirs = socket.socketpair()
    with theirs:
        daemon = subprocess.Popen(
            ["qemu-storage-daemon", *words, "--chardev", "stdio,id=monitor", "--monitor", "monitor"],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
        )
    try:
        monitor = Qmp(ours)
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
