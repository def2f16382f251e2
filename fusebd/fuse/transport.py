"""The narrow interface between a FUSE transport and what it serves.

A transport speaks with the kernel (``libfuse.py`` through pyfuse3, ``devfuse.py`` by itself) and knows nothing of
nodes; a FileSystem (``tree.py``) knows nothing of the protocol.  Requests cross as plain integers and buffers:
each method of FileSystem is one FUSE request, and either returns its answer or raises FuseError.

What an answer means to the kernel: include/uapi/linux/fuse.h.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import trio

from fusebd.block.buffers import BufferPool
from fusebd.block.caller import current_request
from fusebd.block.queueing import QueueRead
from fusebd.errors import FuseError

__all__ = [
    "MAX_REQUEST",
    "ROOT_INODE",
    "Attr",
    "BufferPool",
    "Changes",
    "DirEntry",
    "FileSystem",
    "FuseError",
    "Opened",
    "Statfs",
    "Transport",
    "current_request",
]

#: inode number of the root (FUSE_ROOT_ID)
ROOT_INODE = 1
#: the longest read or write that is asked of the kernel, in bytes
MAX_REQUEST = 1 << 20


@dataclass(slots=True)
class Attr:
    """What ``stat`` shows.  Sizes in bytes, ``blocks`` in units of 512 bytes, times in nanoseconds."""

    ino: int
    mode: int  #: with the file type
    size: int
    blocks: int
    blksize: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    nlink: int = 1


@dataclass(slots=True, kw_only=True)
class Changes:
    """What a setattr request changes; None stays as it is.  The transport resolves "now" into a time."""

    size: int | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class Opened(NamedTuple):
    """The answer to open.  A transport ignores what it cannot express to the kernel."""

    fh: int
    direct_io: bool = True  #: reads and writes bypass the page cache
    keep_cache: bool = False  #: what the page cache holds of the file is still good
    parallel_direct_writes: bool = True  #: the kernel need not serialise direct writes to the file
    no_flush: bool = False  #: close needs no flush request
    #: an open file that the kernel is to read, write and map by itself ("passthrough"); open until ``release``
    backing_fd: int | None = None


class DirEntry(NamedTuple):
    """One name in a directory; *next_offset* is where a listing goes on after it."""

    name: bytes
    attr: Attr
    next_offset: int


class Statfs(NamedTuple):
    """The answer to statfs: *blocks*, *bfree*, *bavail* in units of *bsize* bytes."""

    bsize: int
    blocks: int
    bfree: int
    bavail: int
    files: int
    namelen: int


class FileSystem(ABC):
    """What a transport serves.

    Every method raises FuseError and nothing else (``trio.Cancelled`` aside).  Calls overlap as the
    kernel's requests do.  ``read`` and ``write`` suspend only where the block layer does; so does whatever else does
    not say otherwise.  Names are bytes.  An inode number is not used again once its file is gone, and
    nothing is kept for a looked-up name, so that FORGET requests end in the transport.

    Requests that would make, remove or rename files (create, mknod, mkdir, symlink, link, unlink, rmdir, rename) end
    in the transport too, with EPERM, and so do setxattr and removexattr, with ENOSYS, after which the kernel
    answers EOPNOTSUPP by itself.
    """

    #: what takes reads without a task (``fusebd.block.queueing``), by the open files that may have some
    queued_reads: dict[int, QueueRead]

    #: how long the kernel may go on using a name, and attributes, without asking, in seconds
    entry_timeout: float = 0.0
    attr_timeout: float = 0.0

    @abstractmethod
    async def lookup(self, parent: int, name: bytes) -> Attr:
        """The file *name* in the directory *parent*."""

    @abstractmethod
    async def getattr(self, ino: int) -> Attr:
        """The attributes of *ino*."""

    @abstractmethod
    async def setattr(self, ino: int, changes: Changes, fh: int | None = None) -> Attr:
        """Carry out *changes* and return the attributes after them.  *fh* is given if it came through an open file."""

    @abstractmethod
    async def open(self, ino: int, flags: int) -> Opened:
        """Open *ino* with the O_* *flags* of open(2).  Each success is followed by one ``release``."""

    @abstractmethod
    async def release(self, fh: int) -> None:
        """The last user of *fh* is gone.  Waits for requests under way on it."""

    @abstractmethod
    async def read(self, fh: int, offset: int, buf: memoryview) -> int:
        """Fill *buf* from byte *offset* on; return how many bytes that were: fewer only at the end of the file.

        The transport brings the memory, so that it can be aligned, and used again for the next request.
        """

    @abstractmethod
    async def write(self, fh: int, offset: int, buf: memoryview, held_back: int = 0) -> int:
        """Write *buf* at byte *offset*; return how many bytes were: fewer only at the end of the file.

        *buf* must stay as it is until this returns.  *held_back*, if that is known: it comes from the page cache some
        time after somebody wrote it, nobody cares for how much was written, and *fh* is any that can write.
        """

    @abstractmethod
    async def flush(self, fh: int) -> None:
        """A descriptor of *fh* is being closed; an error is the result of close(2)."""

    @abstractmethod
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Make what was written through *fh* durable."""

    @abstractmethod
    async def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2) with its FALLOC_FL_* *mode*."""

    @abstractmethod
    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        """lseek(2) for SEEK_DATA and SEEK_HOLE: the offset found."""

    @abstractmethod
    async def copy_file_range(self, fh_in: int, offset_in: int, fh_out: int, offset_out: int, length: int) -> int:
        """Copy up to *length* bytes between two open files; return how many were."""

    @abstractmethod
    async def opendir(self, ino: int) -> None:
        """The directory *ino* is going to be listed: ENOTDIR if it is none.  There is no handle, nothing to release."""

    @abstractmethod
    async def readdir(self, ino: int, offset: int) -> Iterable[DirEntry]:
        """The entries of the directory *ino* from *offset* on (0, or a ``next_offset``), ``.`` and ``..`` first.

        The transport takes as many as fit.  Never suspends.
        """

    @abstractmethod
    async def statfs(self) -> Statfs:
        """What ``df`` shows."""

    @abstractmethod
    async def getxattr(self, ino: int, name: bytes) -> bytes:
        """The value of the extended attribute *name*; ENODATA if there is none."""

    @abstractmethod
    async def listxattr(self, ino: int) -> list[bytes]:
        """The names of the extended attributes."""


class Transport(Protocol):
    """Serves one FileSystem on one mounted /dev/fuse descriptor.

    ``mount.py`` mounts and unmounts; the transport is made with the descriptor that came of it, and owns
    it from then on.
    """

    #: what callers can do through this transport, beyond reading and writing: "fallocate", "lseek",
    #: "copy_file_range", "shared-mmap", "parallel-writes", "notify", "passthrough", "writeback"; complete once
    #: ``serve`` has started
    capabilities: frozenset[str]

    def why_not(self, capability: str) -> str:
        """Why *capability* is not among them."""

    def try_backing(self, descriptor: int) -> None:
        """Raise NotSupported, with the reason, if files cannot be passed through to *descriptor*."""

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer requests until the mount is gone; ``started`` once they are taken.

        When cancelled it stops taking requests; those under way are cancelled.
        """

    def close(self) -> None:
        """Close the descriptor, after ``serve``; the kernel fails what it still has to ask with ENOTCONN."""

    # The kernel may need an answer from us before it finishes one of these: they only ask for it and return at once.
    # What the kernel has not cached, or answers with an error, is ignored.

    def notify_inval_inode(self, ino: int, offset: int = 0, length: int = 0) -> None:
        """Have the kernel forget what it caches of *ino*: attributes, and pages with any of *length* bytes at *offset*.

        A length of 0 goes to the end; with a negative offset, the pages stay.
        """

    async def wait_notified(self) -> bool:
        """Wait until the kernel has done what it was told to up to now; whether nothing else was told meanwhile."""

    def notify_inval_entry(self, parent: int, name: bytes) -> None:
        """Have the kernel look up *name* again."""

    def notify_delete(self, parent: int, ino: int, name: bytes) -> None:
        """Tell the kernel, and through it inotify watchers, that *name* is gone."""
