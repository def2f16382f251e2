"""One node as a regular file: its attributes, and what an open file can do beyond reading and writing.

Behaviour: QEMU block/export/fuse.c, open(2), fallocate(2), lseek(2).  Errors are those of the block layer, or
FuseError where the request itself cannot be.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from fusebd.block.blockstatus import block_status_above
from fusebd.block.child import FUA, MAY_UNMAP, NO_FALLBACK
from fusebd.block.graph import Graph
from fusebd.block.node import Node
from fusebd.block.perms import Perm
from fusebd.block.status import Status
from fusebd.errors import FuseError
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
    """The file of *node*.  What ``chmod``, ``chown`` and ``touch`` set is kept as long as the node is there."""

    __slots__ = ("_allow_other", "_mode", "_read_only", "atime_ns", "ctime_ns", "gid", "ino", "mtime_ns", "node", "uid")

    def __init__(self, node: Node, ino: int, *, read_only: bool, allow_other: bool) -> None:
        self.node = node
        self.ino = ino
        self.uid, self.gid = os.geteuid(), os.getegid()
        self._read_only = read_only
        self._allow_other = allow_other
        # With allow_other, everybody may read, as with files that are made under the usual umask.
        self._mode = 0o644 if allow_other else 0o600
        self.atime_ns = self.mtime_ns = self.ctime_ns = time.time_ns()

    @property
    def read_only(self) -> bool:
        """Whether the file cannot be written, whatever its mode."""
        return self._read_only or self.node.read_only

    def attr(self) -> Attr:
        """What ``stat`` shows."""
        driver = self.node.driver
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


class OpenFile:
    """One open(2) of a node's file: an edge into the graph."""

    __slots__ = ("_growing", "file", "graph", "root", "writable", "write_flags")

    def __init__(self, graph: Graph, file: NodeFile, flags: int) -> None:
        self.graph = graph
        self.file = file
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        self.write_flags = FUA if flags & os.O_DSYNC else 0
        self._growing = 0
        perm = Perm.CONSISTENT_READ
        if self.writable:
            if file.read_only:
                raise FuseError(errno.EROFS)
            perm |= Perm.WRITE
            driver = file.node.driver
            if driver.length % driver.limits.request_alignment:
                perm |= Perm.RESIZE  # what is written to the last block may reach past the end
        self.root = graph.attach_root(file.node, "an open file", perm)

    async def close(self) -> None:
        """Wait for what is under way, and let go of the node."""
        await self.graph.detach_root(self.root)

    @property
    def length(self) -> int:
        return self.root.driver.length

    async def flush(self) -> None:
        """Make what was written durable; a file that cannot be written has nothing to flush."""
        if self.writable:
            await self.root.flush()

    @asynccontextmanager
    async def _may_resize(self) -> AsyncIterator[None]:
        """Resizing is shared only while it happens, so that it keeps nobody else away from the node."""
        root = self.root
        if root.perm & Perm.RESIZE and not self._growing:
            yield
            return
        if not self._growing:
            self.graph.set_root_perms(root, root.perm | Perm.RESIZE, root.shared)
        self._growing += 1
        try:
            yield
        finally:
            self._growing -= 1
            if not self._growing:
                self.graph.set_root_perms(root, root.perm & ~Perm.RESIZE, root.shared)

    async def truncate(self, length: int) -> None:
        """Give the node *length* bytes.  EACCES through a file that is not open for writing."""
        if not self.writable:
            raise FuseError(errno.EACCES)
        async with self._may_resize():
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
