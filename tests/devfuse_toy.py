"""A small file system in memory, mounted through devfuse by a process of its own: ``devfuse_toy.py MOUNTPOINT``.

The client of a FUSE file system must not be in the process that serves it.  Lines on stdin are calls of methods of
Control, as JSON; each is answered by a line on stdout.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import pwd
import stat
import sys
import time
from collections import Counter

import trio

from fusebd.errors import FuseError
from fusebd.fuse.devfuse import DevfuseTransport
from fusebd.fuse.mountpoint import mount
from fusebd.fuse.transport import (
    MAX_REQUEST,
    ROOT_INODE,
    Attr,
    Changes,
    DirEntry,
    FileSystem,
    Opened,
    Statfs,
)

SIZE = 4 << 20
#: ``data`` bypasses the page cache and ``cached`` does not; reads of ``held`` wait until they are let go; ``broken``
#: has a bug; ``passed`` is read by the kernel from the backing file; ``away`` always suspends
NAMES = (b"data", b"cached", b"held", b"broken", b"passed", b"away")


class Toy(FileSystem):
    """Files with the inode numbers 2 and following; a handle is an inode number and 1000 times a counter."""

    def __init__(self, backing: str | None) -> None:
        self.files = {2 + index: bytearray(SIZE) for index in range(len(NAMES))}
        self.names = dict(zip(NAMES, self.files, strict=True))
        now = time.time_ns()
        self.attrs = {
            ino: Attr(ino, stat.S_IFREG | 0o644, SIZE, SIZE // 512, 4096, os.getuid(), os.getgid(), now, now, now)
            for ino in self.files
        }
        self.opened = 0
        self.flags: list[int] = []
        self.calls: Counter[str] = Counter()
        self.last: dict[str, list[int]] = {}
        self.held = 0
        self.held_back = 0
        self.gate = trio.Event()
        self.queued_reads = {}
        self.backing = os.open(backing, os.O_RDWR) if backing else None

    def _note(self, method: str, *arguments: int) -> None:
        self.calls[method] += 1
        self.last[method] = list(arguments)

    async def lookup(self, parent: int, name: bytes) -> Attr:
        self._note("lookup", parent)
        if name not in self.names:
            raise FuseError(errno.ENOENT)
        return self.attrs[self.names[name]]

    async def getattr(self, ino: int) -> Attr:
        self._note("getattr", ino)
        if ino == ROOT_INODE:
            return Attr(ino, stat.S_IFDIR | 0o755, 0, 0, 4096, os.getuid(), os.getgid(), 0, 0, 0, 2)
        if ino not in self.attrs:
            raise FuseError(errno.ESTALE)
        return self.attrs[ino]

    async def setattr(self, ino: int, changes: Changes, fh: int | None = None) -> Attr:
        self._note("setattr", ino, -1 if fh is None else fh)
        attr = self.attrs[ino]
        if changes.size is not None:
            attr.size = changes.size
            file = self.files[ino]
            del file[changes.size :]
            file.extend(bytes(changes.size - len(file)))
        if changes.mode is not None:
            attr.mode = stat.S_IFREG | changes.mode
        for name in ("uid", "gid", "atime_ns", "mtime_ns"):
            if getattr(changes, name) is not None:
                setattr(attr, name, getattr(changes, name))
        return attr

    async def open(self, ino: int, flags: int) -> Opened:
        self._note("open", ino, flags)
        self.opened += 1
        fh = ino + 1000 * self.opened
        name = NAMES[ino - 2]
        if name == b"cached":
            return Opened(fh, direct_io=False, keep_cache=True)
        return Opened(fh, backing_fd=self.backing if name == b"passed" else None)

    async def release(self, fh: int) -> None:
        self._note("release", fh)

    async def read(self, fh: int, offset: int, buf: memoryview) -> int:
        self._note("read", fh, offset, len(buf))
        ino = fh % 1000
        name = NAMES[ino - 2]
        if name == b"broken":
            raise ValueError("a bug")
        if name == b"held":
            self.held += 1
            await self.gate.wait()
            self.held -= 1
        if name == b"away":
            await trio.lowlevel.checkpoint()
        part = self.files[ino][offset : offset + len(buf)]
        buf[: len(part)] = part
        return len(part)

    async def write(self, fh: int, offset: int, buf: memoryview, held_back: int = 0) -> int:
        self._note("write", fh, offset, len(buf))
        self.held_back = held_back
        ino = fh % 1000
        if NAMES[ino - 2] == b"broken":
            raise FuseError(errno.ENOSPC)
        if NAMES[ino - 2] == b"away":
            await trio.lowlevel.checkpoint()
        length = min(len(buf), len(self.files[ino]) - offset)
        self.files[ino][offset : offset + length] = buf[:length]
        return length

    async def flush(self, fh: int) -> None:
        self._note("flush", fh)

    async def fsync(self, fh: int, datasync: bool) -> None:
        self._note("fsync", fh, datasync)

    async def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        self._note("fallocate", mode, offset, length)

    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        self._note("lseek", offset, whence)
        return offset + 4096

    async def copy_file_range(self, fh_in: int, offset_in: int, fh_out: int, offset_out: int, length: int) -> int:
        self._note("copy_file_range", offset_in, offset_out, length)
        part = self.files[fh_in % 1000][offset_in : offset_in + length]
        self.files[fh_out % 1000][offset_out : offset_out + len(part)] = part
        return len(part)

    async def opendir(self, ino: int) -> None:
        self._note("opendir", ino)

    async def readdir(self, ino: int, offset: int) -> list[DirEntry]:
        self._note("readdir", ino, offset)
        here = await self.getattr(ROOT_INODE)
        entries = [(b".", here), (b"..", here), *((name, self.attrs[ino]) for name, ino in self.names.items())]
        return [DirEntry(name, attr, at) for at, (name, attr) in enumerate(entries, 1) if at > offset]

    async def statfs(self) -> Statfs:
        return Statfs(4096, 123, 45, 44, 6, 31)

    async def getxattr(self, ino: int, name: bytes) -> bytes:
        self._note("getxattr", ino)
        if name != b"user.toy":
            raise FuseError(errno.ENODATA)
        return b"a value"

    async def listxattr(self, ino: int) -> list[bytes]:
        return [b"user.toy", b"user.other"]


class Control:
    """What tests can do to the file system from its inside."""

    def __init__(self, toy: Toy, transport: DevfuseTransport) -> None:
        self.toy, self.transport = toy, transport

    def capabilities(self) -> list[str]:
        return sorted(self.transport.capabilities)

    def calls(self) -> dict[str, int]:
        return dict(self.toy.calls)

    def last(self, method: str) -> list[int]:
        return self.toy.last[method]

    def held(self) -> int:
        return self.toy.held

    def let_go(self) -> None:
        self.toy.gate.set()

    def hold(self) -> None:
        self.toy.gate = trio.Event()

    def timeouts(self, seconds: float) -> None:
        self.toy.entry_timeout = self.toy.attr_timeout = seconds

    def resize(self, name: str, size: int) -> None:
        """As if from behind the kernel's back."""
        ino = self.toy.names[name.encode()]
        self.toy.attrs[ino].size = size

    def fill(self, name: str, byte: int) -> None:
        data = self.toy.files[self.toy.names[name.encode()]]
        data[:] = bytes((byte,)) * len(data)

    def invalidate(self, name: str) -> None:
        self.transport.notify_inval_inode(self.toy.names[name.encode()])

    def rename(self, name: str, new: str) -> None:
        self.toy.names[new.encode()] = self.toy.names.pop(name.encode())
        self.transport.notify_inval_entry(ROOT_INODE, name.encode())

    def remove(self, name: str) -> None:
        ino = self.toy.names.pop(name.encode())
        self.transport.notify_delete(ROOT_INODE, ino, name.encode())


async def _obey(control: Control) -> None:
    lines = trio.lowlevel.FdStream(os.dup(sys.stdin.fileno()))
    rest = b""
    async for part in lines:
        rest += part
        while b"\n" in rest:
            line, rest = rest.split(b"\n", 1)
            method, *arguments = json.loads(line)
            print(json.dumps(getattr(control, method)(*arguments)), flush=True)  # noqa: T201


async def _main(mountpoint: str, backing: str | None, writeback: bool) -> None:
    toy = Toy(backing)
    transport = DevfuseTransport(
        toy, mount(mountpoint, read_only=False, allow_other=False, max_read=MAX_REQUEST), writeback=writeback
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(_serve, transport, nursery.cancel_scope)
        print("null", flush=True)  # noqa: T201
        await _obey(Control(toy, transport))
    transport.close()


async def _serve(transport: DevfuseTransport, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
    await transport.serve(task_status=task_status)
    scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("mountpoint")
    parser.add_argument("--user")
    parser.add_argument("--backing")
    parser.add_argument("--writeback", action="store_true")
    options = parser.parse_args()
    if options.user:
        entry = pwd.getpwnam(options.user)
        os.setgroups([])
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    trio.run(_main, options.mountpoint, options.backing, options.writeback)
