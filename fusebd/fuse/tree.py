"""The mounted directory: every named node of the graph is a file in it.

The one place where an exception of the block layer becomes an errno.  Files come and go with their nodes; an open
file holds its node in the graph.  Reads and writes are cut at the end of the node, as on a block device.
Opening with O_TRUNC changes nothing, as on a block device: a node is a disk, and ``dd of=disk0`` means to write to it.

Behaviour: QEMU block/export/fuse.c, for a directory of exports.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec

from fusebd.block.graph import NODE_NAME_LENGTH, Graph
from fusebd.block.node import Node
from fusebd.block.options import BlockdevRef, Json
from fusebd.errors import BlockIOError, FusebdError, FuseError
from fusebd.fuse.openfile import NodeFile, OpenFile
from fusebd.fuse.transport import (
    MAX_REQUEST,
    ROOT_INODE,
    Attr,
    BufferPool,
    Changes,
    DirEntry,
    FileSystem,
    Opened,
    Statfs,
    Transport,
)

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_XATTR_PREFIX = "user.fusebd."
_STATFS_BSIZE = 4096
#: most that one copy_file_range request copies, in bytes, so that it can be interrupted
_MAX_COPY = 16 * MAX_REQUEST
#: listing offsets 1 and 2 are those after "." and ".."; a file's is its inode number and this
_FIRST_FILE = 1


def errno_of(error: Exception) -> int:
    """What a request that failed with *error* answers.  What is not one of fusebd's own errors is a bug: EIO."""
    if isinstance(error, FusebdError):
        return error.errno if error.errno > 0 else errno.EIO
    log.error("internal error in a FUSE request", exc_info=error)
    return errno.EIO


def _answered(
    method: Callable[Concatenate[Tree, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Tree, P], Coroutine[Any, Any, T]]:
    """Makes whatever *method* raises a FuseError.  read and write do it themselves, to save the call."""

    @functools.wraps(method)
    async def answer(self: Tree, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(self, *args, **kwargs)
        except Exception as error:
            raise FuseError(errno_of(error)) from error

    return answer


class Tree(FileSystem):
    """The files of *graph*'s named nodes in one directory.

    *read_only* refuses to open for writing; *allow_other* says that users other than the daemon's get at the mount;
    *info* are extended attributes of the directory (``user.fusebd.<key>``).  ``transport`` is told of
    files that vanish or change their size.  ``aclose`` ends it.
    """

    transport: Transport | None = None

    def __init__(
        self,
        graph: Graph,
        *,
        read_only: bool = False,
        allow_other: bool = False,
        info: Mapping[str, str] | None = None,
    ) -> None:
        self._graph = graph
        self._read_only = read_only
        self._allow_other = allow_other
        self._info = {_XATTR_PREFIX + key: value for key, value in (info or {}).items()}
        self._files: dict[int, NodeFile] = {}
        self._inodes: dict[Node, int] = {}
        self._next_inode = ROOT_INODE + 1
        self._handles: dict[int, OpenFile] = {}
        self._next_handle = 1
        self._pool = BufferPool(MAX_REQUEST)
        self._changed_ns = time.time_ns()
        self._sync()
        graph.node_listeners.append(self._sync)

    async def aclose(self) -> None:
        """Flush and close what is still open.  Failures are logged."""
        self._graph.node_listeners.remove(self._sync)
        while self._handles:
            _, handle = self._handles.popitem()
            try:
                await handle.flush()
            except BlockIOError as error:
                log.error("flush at unmount failed: %s", error)
            await handle.close()

    # -- the nodes ------------------------------------------------------------------------------

    def _sync(self) -> None:
        """Take over which nodes there are."""
        nodes = set(self._graph.named_nodes().values())
        for node in [node for node in self._inodes if node not in nodes]:
            self._forget(node)
        for node in self._graph.named_nodes().values():
            if node not in self._inodes:
                ino, self._next_inode = self._next_inode, self._next_inode + 1
                self._inodes[node] = ino
                self._files[ino] = NodeFile(node, ino, read_only=self._read_only, allow_other=self._allow_other)
                self._changed_ns = time.time_ns()

    def _forget(self, node: Node) -> None:
        ino = self._inodes.pop(node)
        del self._files[ino]
        self._changed_ns = time.time_ns()
        if self.transport is not None:
            self.transport.notify_delete(ROOT_INODE, ino, node.name.encode())

    def _file(self, ino: int) -> NodeFile:
        file = self._files.get(ino)
        if file is None:
            raise FuseError(errno.ESTALE)
        return file

    def _handle(self, fh: int) -> OpenFile:
        handle = self._handles.get(fh)
        if handle is None:
            raise FuseError(errno.EBADF)
        return handle

    def _resized(self, file: NodeFile) -> None:
        file.mtime_ns = file.ctime_ns = time.time_ns()
        if self.transport is not None:
            self.transport.notify_inval_inode(file.ino)

    # -- names and attributes -------------------------------------------------------------------

    @_answered
    async def lookup(self, parent: int, name: bytes) -> Attr:
        if parent != ROOT_INODE:
            raise FuseError(errno.ENOTDIR)
        if name in (b".", b".."):
            return self._directory()
        node = self._graph.nodes.get(os.fsdecode(name))
        ino = self._inodes.get(node) if node is not None else None
        if ino is None:
            raise FuseError(errno.ENOENT)
        return self._files[ino].attr()

    @_answered
    async def getattr(self, ino: int) -> Attr:
        return self._directory() if ino == ROOT_INODE else self._file(ino).attr()

    def _directory(self) -> Attr:
        mode = 0o755 if self._allow_other else 0o700
        return Attr(
            ino=ROOT_INODE,
            mode=stat.S_IFDIR | (mode & ~0o222 if self._read_only else mode),
            size=0,
            blocks=0,
            blksize=_STATFS_BSIZE,
            uid=os.geteuid(),
            gid=os.getegid(),
            atime_ns=self._changed_ns,
            mtime_ns=self._changed_ns,
            ctime_ns=self._changed_ns,
            nlink=2,
        )

    @_answered
    async def setattr(self, ino: int, changes: Changes, fh: int | None = None) -> Attr:
        """Everything is checked before anything is changed; the size comes first, because it alone can still fail."""
        if ino == ROOT_INODE:
            raise FuseError(errno.EPERM)
        file = self._file(ino)
        if changes.mode is not None:
            file.check_mode(changes.mode)
        if changes.uid is not None or changes.gid is not None:
            file.check_owner()
        if changes.size is not None:
            await self._truncate(file, changes.size, fh)
        if changes.mode is not None:
            file.set_mode(changes.mode)
        if changes.uid is not None:
            file.uid = changes.uid
        if changes.gid is not None:
            file.gid = changes.gid
        if changes.atime_ns is not None:
            file.atime_ns = changes.atime_ns
        if changes.mtime_ns is not None:
            file.mtime_ns = changes.mtime_ns
        file.ctime_ns = time.time_ns()
        return file.attr()

    async def _truncate(self, file: NodeFile, size: int, fh: int | None) -> None:
        if size < 0 or size >= 1 << 63:
            raise FuseError(errno.EFBIG)
        if fh is not None:
            await self._handle(fh).truncate(size)
            return
        handle = OpenFile(self._graph, file, os.O_RDWR)
        try:
            await handle.truncate(size)
        finally:
            await handle.close()
        file.mtime_ns = time.time_ns()

    @_answered
    async def statfs(self) -> Statfs:
        """The sizes of all nodes together; nothing is free, because nothing can be made here."""
        blocks = sum(-(-file.node.driver.length // _STATFS_BSIZE) for file in self._files.values())
        return Statfs(_STATFS_BSIZE, blocks, 0, 0, len(self._files), NODE_NAME_LENGTH)

    # -- the directory --------------------------------------------------------------------------

    @_answered
    async def opendir(self, ino: int) -> None:
        if ino != ROOT_INODE:
            raise FuseError(errno.ENOTDIR)

    @_answered
    async def readdir(self, ino: int, offset: int) -> Iterator[DirEntry]:
        if ino != ROOT_INODE:
            raise FuseError(errno.ENOTDIR)
        return self._entries(offset)

    def _entries(self, offset: int) -> Iterator[DirEntry]:
        """In the order of inode numbers, which is that in which the nodes came."""
        if offset < 1:
            yield DirEntry(b".", self._directory(), 1)
        if offset < 2:
            yield DirEntry(b"..", self._directory(), 2)
        for ino, file in self._files.items():
            if ino + _FIRST_FILE > offset:
                yield DirEntry(file.node.name.encode(), file.attr(), ino + _FIRST_FILE)

    # -- open files -----------------------------------------------------------------------------

    @_answered
    async def open(self, ino: int, flags: int) -> Opened:
        """Never suspends.  EROFS, and EBUSY where another user of the node does not share what *flags* need."""
        if ino == ROOT_INODE:
            raise FuseError(errno.EISDIR)
        file = self._file(ino)
        handle = OpenFile(self._graph, file, flags)
        handle.root.on_resize = functools.partial(self._resized, file)
        fh, self._next_handle = self._next_handle, self._next_handle + 1
        self._handles[fh] = handle
        return Opened(fh, no_flush=not handle.writable)

    @_answered
    async def release(self, fh: int) -> None:
        handle = self._handle(fh)
        del self._handles[fh]
        await handle.close()

    async def read(self, fh: int, offset: int, buf: memoryview) -> int:
        try:
            handle = self._handles.get(fh)
            if handle is None:
                raise FuseError(errno.EBADF)
            root = handle.root
            size = len(buf)
            left = root.driver.length - offset
            if size > left:
                if left <= 0:
                    return 0
                buf, size = buf[:left], left
            await root.preadv(offset, (buf,))
        except Exception as error:
            raise FuseError(errno_of(error)) from error
        return size

    async def write(self, fh: int, offset: int, buf: memoryview) -> int:
        """Cut at the end of the node; ENOSPC from there on."""
        try:
            handle = self._handles.get(fh)
            if handle is None or not handle.writable:
                raise FuseError(errno.EBADF)
            root = handle.root
            size = len(buf)
            left = root.driver.length - offset
            if size > left:
                if left <= 0:
                    raise FuseError(errno.ENOSPC)
                buf, size = buf[:left], left
            await root.pwritev(offset, (buf,), handle.write_flags)
            file = handle.file
            file.mtime_ns = file.ctime_ns = time.time_ns()
        except Exception as error:
            raise FuseError(errno_of(error)) from error
        return size

    @_answered
    async def flush(self, fh: int) -> None:
        await self._handle(fh).flush()

    @_answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._handle(fh).flush()

    @_answered
    async def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        handle = self._handle(fh)
        await handle.fallocate(mode, offset, length)
        handle.file.mtime_ns = handle.file.ctime_ns = time.time_ns()

    @_answered
    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        return await self._handle(fh).seek(offset, whence)

    @_answered
    async def copy_file_range(self, fh_in: int, offset_in: int, fh_out: int, offset_out: int, length: int) -> int:
        """What is known to be zeroes is not read, but zeroed.  An error counts only if nothing was copied before."""
        source, target = self._handle(fh_in), self._handle(fh_out)
        if not target.writable:
            raise FuseError(errno.EBADF)
        if min(offset_in, offset_out, length) < 0:
            raise FuseError(errno.EINVAL)
        length = min(length, source.length - offset_in, _MAX_COPY)
        if length > 0 and offset_out >= target.length:
            raise FuseError(errno.ENOSPC)
        length = min(length, target.length - offset_out)
        done = 0
        buf = self._pool.take(MAX_REQUEST)
        try:
            while done < length:
                done += await self._copy_piece(
                    source, offset_in + done, target, offset_out + done, buf[: length - done], length - done
                )
        except FusebdError:
            if not done:
                raise
        finally:
            self._pool.give_back(buf)
        target.file.mtime_ns = target.file.ctime_ns = time.time_ns()
        return max(done, 0)

    @staticmethod
    async def _copy_piece(
        source: OpenFile, offset_in: int, target: OpenFile, offset_out: int, buf: memoryview, length: int
    ) -> int:
        zeroes = await source.zero_prefix(offset_in, length)
        if zeroes:
            await target.root.pwrite_zeroes(offset_out, zeroes)
            return zeroes
        await source.root.preadv(offset_in, (buf,))
        await target.root.pwritev(offset_out, (buf,), target.write_flags)
        return len(buf)

    # -- extended attributes --------------------------------------------------------------------

    def _xattrs(self, ino: int) -> Mapping[str, str]:
        if ino == ROOT_INODE:
            return self._info
        node = self._file(ino).node
        return {
            f"{_XATTR_PREFIX}driver": node.driver_name,
            f"{_XATTR_PREFIX}node-name": node.name,
            f"{_XATTR_PREFIX}details": msgspec.json.encode(_details(node)).decode(),
        }

    @_answered
    async def getxattr(self, ino: int, name: bytes) -> bytes:
        value = self._xattrs(ino).get(os.fsdecode(name))
        if value is None:
            raise FuseError(errno.ENODATA)
        return value.encode(errors="surrogateescape")

    @_answered
    async def listxattr(self, ino: int) -> list[bytes]:
        return [name.encode() for name in self._xattrs(ino)]


def _details(node: Node) -> dict[str, Json]:
    """What a node is, for people and scripts that have only its file."""
    return {
        "driver": node.driver_name,
        "node-name": node.name,
        "length": node.driver.length,
        "read-only": node.read_only,
        "filename": node.driver.filename,
        "options": msgspec.to_builtins(node.options, enc_hook=_encode_reference),
        "children": {name: edge.node.name for name, edge in node.children.items()},
    }


def _encode_reference(value: object) -> Json:
    assert isinstance(value, BlockdevRef)
    return value.reference if value.raw is None else value.raw
