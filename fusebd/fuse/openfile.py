"""One node as a regular file: its attributes, and what an open file can do beyond reading and writing.

Behaviour: QEMU block/export/fuse.c, open(2), fallocate(2), lseek(2).  Errors are those of the block layer, or
FuseError where the request itself cannot be.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from fusebd.block.blockstatus import block_status_above
from fusebd.block.cachemode import CacheMode
from fusebd.block.child import FUA, MAY_UNMAP, NO_FALLBACK
from fusebd.block.contentwatch import ContentWatch
from fusebd.block.mutex import Mutex
from fusebd.block.node import Node
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.block.status import Status
from fusebd.errors import FuseError
from fusebd.fuse.caching import Access
from fusebd.fuse.entry import Entry, Needs
from fusebd.fuse.transport import Attr

#: fallocate(2) modes (include/uapi/linux/falloc.h)
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10

#: smallest st_blksize: programs size their buffers by it, and every buffer is a request that reaches the chain
_BLKSIZE = 4096
_MAX_OFFSET = (1 << 63) - 1
_WRITE_BITS = 0o222
_OTHERS = 0o077
#: how many block status queries are made before others get their turn
_STATUS_TURN = 64


class NodeFile:
    """The file of *node*, with permission bits *mode*.

    What ``chmod``, ``chown`` and ``touch`` set is kept as long as the node is there.  A *growable* file becomes longer
    by writes past its end; with *writethrough*, every write to it is durable when it returns.

    ``cache`` is the mode that is asked for; ``told_length`` the length of which the kernel knows, where it goes by its
    own knowledge.  ``overran``: the kernel has taken writes past the end, and has a wrong idea of it.  ``open_files``
    share ``entry``; ``resizing`` counts those of their requests that change the length.  ``taken_back`` says why it is
    not passed through though it should be.
    """

    __slots__ = (
        "_allow_other",
        "_mode",
        "_read_only",
        "atime_ns",
        "cache",
        "ctime_ns",
        "entry",
        "gid",
        "growable",
        "growing",
        "ino",
        "mtime_ns",
        "node",
        "open_files",
        "overran",
        "resizing",
        "taken_back",
        "told_length",
        "uid",
        "watch",
        "writethrough",
    )

    entry: Entry  #: given to it by those who keep the files

    def __init__(
        self,
        node: Node,
        ino: int,
        mode: int,
        *,
        cache: CacheMode,
        read_only: bool,
        allow_other: bool,
        growable: bool = False,
        writethrough: bool = False,
    ) -> None:
        self.node = node
        self.ino = ino
        self.cache = cache
        self.open_files: list[OpenFile] = []
        self.watch: ContentWatch | None = None
        self.told_length = node.entrance.driver.length
        self.overran = False
        self.resizing = 0
        self.taken_back = ""
        self.uid, self.gid = os.geteuid(), os.getegid()
        self.growable = growable
        self.growing = Mutex()
        self.writethrough = writethrough
        self._read_only = read_only
        self._allow_other = allow_other
        self._mode = mode
        self.atime_ns = self.mtime_ns = self.ctime_ns = time.time_ns()

    @property
    def read_only(self) -> bool:
        """Whether the file cannot be written, whatever its mode."""
        return self._read_only or self.node.read_only

    @property
    def is_passed(self) -> bool:
        """Whether the kernel reads and writes the host's file by itself just now."""
        return self.cache == "passthrough" and any(handle.access.passed for handle in self.open_files)

    @property
    def in_cache(self) -> bool:
        """Whether it is open through the page cache."""
        return any(handle.access.cached for handle in self.open_files)

    def catch_up(self) -> None:
        """Take over the length and the time of what the kernel has written into the host's file by itself."""
        if self.cache != "passthrough" or not any(
            handle.access.passed and handle.writable for handle in self.open_files
        ):
            return
        bottom = self._bottom()
        bottom.driver.refresh_length()
        self.mtime_ns = max(self.mtime_ns, os.fstat(bottom.backing_descriptor()).st_mtime_ns)

    def changed_aside(self) -> None:
        """Who closes or flushes the file may have written into the host's file."""
        self.catch_up()
        self._bottom().changed_aside()

    def _bottom(self) -> Node:
        node = self.node
        while (child := node.primary_child) is not None:
            node = child.node
        return node

    def attr(self) -> Attr:
        """What ``stat`` shows."""
        self.catch_up()
        driver = self.node.entrance.driver
        length = driver.length
        allocated = driver.allocated_bytes()
        return Attr(
            ino=self.ino,
            mode=stat.S_IFREG | (self._mode & ~_WRITE_BITS if self.read_only else self._mode),
            size=length,
            blocks=-(-(length if allocated is None else allocated) // 512),
            blksize=max(_BLKSIZE, driver.limits.request_alignment),
            uid=self.uid,
            gid=self.gid,
            atime_ns=self.atime_ns,
            mtime_ns=self.mtime_ns,
            ctime_ns=self.ctime_ns,
        )

    def check_mode(self, mode: int) -> None:
        """Refuse permission bits that would promise an access there cannot be."""
        if mode & _OTHERS and not self._allow_other:
            raise FuseError(errno.EPERM)
        if mode & _WRITE_BITS and self.read_only:
            raise FuseError(errno.EROFS)

    def check_owner(self) -> None:
        """Refuse another owner where only the daemon's user gets at the mount."""
        if not self._allow_other:
            raise FuseError(errno.EPERM)

    def set_mode(self, mode: int) -> None:
        self._mode = mode & 0o7777

    def touch(self) -> None:
        """The content has changed just now."""
        self.mtime_ns = self.ctime_ns = time.time_ns()


class OpenFile:
    """One open(2) of a node's file, which enters the graph by *root*, and is used as *access* says."""

    __slots__ = ("access", "file", "root", "writable", "write_flags")

    def __init__(self, file: NodeFile, root: Root, flags: int, access: Access) -> None:
        self.file = file
        self.root = root
        self.access = access
        self.writable = access.writable
        self.write_flags = FUA if flags & os.O_DSYNC or file.writethrough else 0

    @property
    def length(self) -> int:
        return self.root.driver.length

    async def flush(self) -> None:
        """Make what was written durable; a file that cannot be written has nothing to flush."""
        if self.writable:
            if self.access.passed:
                self.file.changed_aside()
            await self.root.flush()

    @asynccontextmanager
    async def _may_resize(self) -> AsyncIterator[None]:
        """Resizing is taken only while it happens, so that it keeps nobody else away from the node."""
        file, needs = self.file, Needs(Perm.RESIZE)
        file.entry.take(needs)
        try:
            with self._resizing():
                yield
        finally:
            file.entry.loosen(needs)

    @contextmanager
    def _resizing(self) -> Iterator[None]:
        """The length changes because the kernel asks for it, which needs no notice then, unless it fails."""
        file = self.file
        file.resizing += 1
        try:
            yield
        except BaseException:
            file.told_length = -1  # where it was a part that failed
            raise
        finally:
            file.resizing -= 1

    async def truncate(self, length: int) -> None:
        """Give the node *length* bytes.  EACCES through a file that is not open for writing."""
        if not self.writable:
            raise FuseError(errno.EACCES)
        async with self._may_resize():
            await self.root.truncate(length, exact=True)
        self.file.touch()

    async def grow(self, length: int) -> None:
        """Make the node at least *length* bytes long, for a write that ends there.

        One at a time: of two writes past the end, the shorter one must not cut off the longer one.
        """
        async with self.file.growing:
            if length > self.length:
                with self._resizing():
                    await self.root.truncate(length, exact=True)

    # -- fallocate ------------------------------------------------------------------------------

    async def fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2).  Inside the file nothing can be allocated as such; a hole is punched only if that is fast."""
        if not self.writable:
            raise FuseError(errno.EACCES)
        if offset < 0 or length <= 0:
            raise FuseError(errno.EINVAL)
        if offset + length > _MAX_OFFSET:
            raise FuseError(errno.EFBIG)
        keep_size, what = mode & KEEP_SIZE, mode & ~KEEP_SIZE
        if keep_size:
            length = min(length, self.length - offset)
        if not mode:
            await self._preallocate(offset, length)
        elif what == PUNCH_HOLE:
            if not keep_size:
                raise FuseError(errno.EINVAL)
            if length > 0:
                await self.root.pwrite_zeroes(offset, length, MAY_UNMAP | NO_FALLBACK)
        elif what == ZERO_RANGE:
            if not keep_size and offset + length > self.length:
                await self.truncate(offset + length)
            if length > 0:
                await self.root.pwrite_zeroes(offset, length)
        else:
            raise FuseError(errno.EOPNOTSUPP)

    async def _preallocate(self, offset: int, length: int) -> None:
        if offset < self.length:
            raise FuseError(errno.EOPNOTSUPP)
        async with self._may_resize():
            if offset > self.length:
                await self.root.truncate(offset, exact=True)
            await self.root.truncate(offset + length, exact=True, prealloc="falloc")

    # -- holes ----------------------------------------------------------------------------------

    async def seek(self, offset: int, whence: int) -> int:
        """lseek(2) for SEEK_DATA and SEEK_HOLE: where *offset* or the next data or hole is; the end is a hole."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise FuseError(errno.EINVAL)
        if offset < 0 or offset >= self.length:
            raise FuseError(errno.ENXIO)
        queries = 0
        async with self.root.entered():
            while offset < self.length:
                status = await block_status_above(self.root.node, offset, self.length - offset)
                # Zeroes that are stored as data (DATA and ZERO) are none of a hole's.
                is_data = bool(status.flags & Status.DATA)
                if is_data == (whence == os.SEEK_DATA):
                    return offset
                offset += status.length
                queries += 1
                if queries % _STATUS_TURN == 0:
                    await trio.lowlevel.checkpoint()
        if whence == os.SEEK_DATA:
            raise FuseError(errno.ENXIO)
        return self.length

    async def zero_prefix(self, offset: int, length: int) -> int:
        """How many of the *length* bytes from *offset* on are known to be zeroes without reading them."""
        async with self.root.entered():
            status = await block_status_above(self.root.node, offset, length)
        return status.length if status.flags & Status.ZERO else 0
