"""Nodes as files: what can be done with an open one, whatever directory or mount point it was found in.

The one place where an exception of the block layer becomes an errno.  Reads and writes are cut at the end of the node,
as on a block device, unless the file is growable.  Opening with O_TRUNC changes nothing, as on a block device: a node
is a disk, and ``dd of=disk0`` means to write to it.

Behaviour: QEMU block/export/fuse.c.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec

from fusebd.block.cachemode import CacheMode
from fusebd.block.contentwatch import ContentWatch
from fusebd.block.fileviews import FileView
from fusebd.block.graph import Graph
from fusebd.block.node import Node
from fusebd.block.options import BlockdevRef, Json
from fusebd.block.perms import Perm
from fusebd.block.queueing import QueueRead
from fusebd.block.root import Root
from fusebd.errors import BlockIOError, FusebdError, FuseError, GraphError, NotSupported, UsageError
from fusebd.fuse.caching import Access, access
from fusebd.fuse.entry import Entry, Needs
from fusebd.fuse.openfile import NodeFile, OpenFile
from fusebd.fuse.transport import MAX_REQUEST, Attr, BufferPool, Changes, FileSystem, Opened, Transport

log = logging.getLogger(__name__)

F = TypeVar("F", bound="Files")
P = ParamSpec("P")
T = TypeVar("T")

XATTR_PREFIX = "user.fusebd."
#: most that one copy_file_range request copies, in bytes, so that it can be interrupted
_MAX_COPY = 16 * MAX_REQUEST


def errno_of(error: Exception) -> int:
    """What a request that failed with *error* answers.  What is not one of fusebd's own errors is a bug: EIO."""
    if isinstance(error, FusebdError):
        return error.errno if error.errno > 0 else errno.EIO
    log.error("internal error in a FUSE request", exc_info=error)
    return errno.EIO


def answered(
    method: Callable[Concatenate[F, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[F, P], Coroutine[Any, Any, T]]:
    """Makes whatever *method* raises a FuseError.  read and write do it themselves, to save the call."""

    @functools.wraps(method)
    async def answer(self: F, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(self, *args, **kwargs)
        except Exception as error:
            raise FuseError(errno_of(error)) from error

    return answer


class Files(FileSystem, FileView):
    """Open files of nodes of *graph*.  A subclass says which files there are.

    ``transport`` is told of files that change.  ``aclose`` ends it.
    """

    transport: Transport | None = None
    #: how opening for writing what cannot be written is refused
    refused_write = errno.EROFS
    #: the kernel goes by its own knowledge of lengths, see ``fusebd.fuse.caching``
    kernel_lengths = False

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._handles: dict[int, OpenFile] = {}
        self.queued_reads: dict[int, QueueRead] = {}
        self._next_handle = 1
        self._pool = BufferPool(MAX_REQUEST)
        self._views = graph.views
        self._views.all.append(self)
        graph.node_listeners.append(self._chains_changed)

    async def aclose(self) -> None:
        """Flush and close what is still open.  Failures are logged."""
        while self._handles:
            _, handle = self._handles.popitem()
            try:
                await handle.flush()
            except BlockIOError as error:
                log.error("flush at unmount failed: %s", error)
            await self._leave(handle)
        self._views.all.remove(self)
        self._views.unsettled.discard(self)
        self._graph.node_listeners.remove(self._chains_changed)

    @abstractmethod
    def _file(self, ino: int) -> NodeFile:
        """The file with the inode number *ino*.  ESTALE if it is gone, EISDIR if it is a directory."""

    @abstractmethod
    def _all_files(self) -> Iterable[NodeFile]:
        """All files there are."""

    def _with_entry(self, file: NodeFile, root: Root | None = None) -> NodeFile:
        """*file*, with its way in; *root*, if there is one for good."""
        file.entry = Entry(file.node, functools.partial(self._resized, file), root)
        return file

    def _access(self, file: NodeFile, mode: CacheMode, flags: int) -> Access:
        driver = file.node.entrance.driver
        return access(
            mode,
            flags,
            kernel_lengths=self.kernel_lengths,
            cache_in_use=file.watch is not None,
            unaligned_end=bool(driver.length % driver.limits.request_alignment),
        )

    def _enter(self, file: NodeFile, flags: int, mode: CacheMode) -> OpenFile:
        """*file* opened in *mode*.  EROFS or EACCES, EBUSY."""
        found = self._access(file, mode, flags)
        if found.writable and file.read_only:
            raise FuseError(self.refused_write)
        handle = OpenFile(file, file.entry.take(found.needs), flags, found)
        file.open_files.append(handle)
        if found.cached and file.watch is None:
            file.watch = ContentWatch(handle.root, functools.partial(self._content_changed, file))
        return handle

    async def _leave(self, handle: OpenFile) -> None:
        file = handle.file
        if handle.access.passed and handle.writable:
            file.changed_aside()
        file.open_files.remove(handle)
        if file.watch is not None and not file.in_cache:
            file.watch.close()
            file.watch = None
        await file.entry.give_back(handle.access.needs)

    def _handle(self, fh: int) -> OpenFile:
        handle = self._handles.get(fh)
        if handle is None:
            raise FuseError(errno.EBADF)
        handle.file.catch_up()
        return handle

    def _resized(self, file: NodeFile) -> None:
        """The node of *file* has another length."""
        file.touch()
        if file.resizing:
            file.told_length = file.node.entrance.driver.length
        elif self.transport is not None:
            self.transport.notify_inval_inode(file.ino)

    # -- what the kernel keeps ------------------------------------------------------------------

    def _content_changed(self, file: NodeFile, offset: int, length: int) -> None:
        """What the kernel may keep of *file* was changed on another way; *length* 0: any of it."""
        if self.transport is not None:
            self.transport.notify_inval_inode(file.ino, offset, length)
            self._views.changes += 1
            self._views.unsettled.add(self)

    async def settle(self) -> None:
        if self.transport is None or await self.transport.wait_notified():
            self._views.unsettled.discard(self)

    def _chains_changed(self) -> None:
        for file in self._all_files():
            if file.watch is not None:
                file.watch.renew()
            if self.attr_timeout and self.transport is not None:
                self.transport.notify_inval_inode(file.ino, -1)  # its mode may be another one

    def chain_changing(self, node: Node) -> None:
        for file in self._all_files():
            if file.is_passed and node in self._graph.subtree(file.node.entrance):
                reason = "the kernel passes it through to a file below, and does not let go of that before it is closed"
                raise GraphError(f"Node '{file.node.name}' is open, and {reason}", errno=errno.EBUSY)

    def _mode(self, file: NodeFile) -> CacheMode:
        """The mode in which *file* is opened now: the one that is asked for, unless that is impossible."""
        if file.cache == "passthrough" and not file.is_passed:
            if file.open_files:  # all of them or none
                return "direct"
            try:
                file.node.entrance.backing_descriptor()
            except NotSupported as error:
                if file.taken_back != error.reason:
                    log.warning("%s is not passed through: %s", file.node.name, error.reason)
                file.taken_back = error.reason
                return "direct"
            file.taken_back = ""
        return file.cache

    async def check_caches(self) -> None:
        """Once requests are served: raise UsageError if files cannot be cached as it is asked for."""
        assert self.transport is not None
        self.kernel_lengths = "writeback" in self.transport.capabilities
        if self.kernel_lengths:
            # With each write the kernel asks for the attributes if they are out of date.
            self.attr_timeout = 1.0
        for name, mode in self.wanted_caches().items():
            if mode in ("writeback", "passthrough") and mode not in self.transport.capabilities:
                raise UsageError(f"{self.mountpoint}: {_cannot_have(name, mode, self.transport.why_not(mode))}")
        for file in self._all_files():
            if reason := await self._refusal(file, file.cache):
                raise UsageError(f"{self.mountpoint}: {_cannot_have(file.node.name, file.cache, reason)}")

    @abstractmethod
    def wanted_caches(self) -> Mapping[str, CacheMode]:
        """The modes that are asked for, by node-name; the nodes need not be there yet."""

    async def _refusal(self, file: NodeFile, mode: CacheMode) -> str:
        """Why *file* cannot be cached in *mode*, which the mount can do; "" if it can."""
        if mode == "passthrough":
            assert self.transport is not None
            try:
                self.transport.try_backing(file.node.entrance.backing_descriptor())
            except NotSupported as error:
                return error.reason
        if mode == "writeback" and not file.read_only:
            needs = Needs(Perm.CONSISTENT_READ, Perm.ALL & ~(Perm.WRITE | Perm.RESIZE))
            try:
                file.entry.take(needs)
            except GraphError as error:
                return str(error)
            await file.entry.give_back(needs)
        return ""

    async def set_cache(self, node_name: str, mode: CacheMode) -> None:
        file = next(file for file in self._all_files() if file.node.name == node_name)
        if mode == file.cache:
            return
        assert self.transport is not None
        if file.open_files and file.is_passed != (mode == "passthrough"):
            reason = "it is open, and the kernel passes through all of its open files or none"
            raise GraphError(_cannot_have(node_name, mode, reason), errno=errno.EBUSY)
        if mode in ("writeback", "passthrough") and mode not in self.transport.capabilities:
            raise GraphError(_cannot_have(node_name, mode, self.transport.why_not(mode)))
        if reason := await self._refusal(file, mode):
            raise GraphError(_cannot_have(node_name, mode, reason))
        file.cache = mode

    def shows(self, node_name: str) -> bool:
        return any(file.node.name == node_name for file in self._all_files())

    def cached_files(self) -> list[dict[str, Json]]:
        return [
            {
                "node-name": file.node.name,
                "mountpoint": self.mountpoint,
                "cache": self._mode(file),
                "wanted-cache": file.cache,
                "open-files": len(file.open_files),
            }
            for file in self._all_files()
        ]

    # -- attributes -----------------------------------------------------------------------------

    @answered
    async def getattr(self, ino: int) -> Attr:
        file = self._file(ino)
        if file.overran:  # this is what the kernel asks before it takes more
            raise FuseError(errno.ENOSPC)
        return file.attr()

    @answered
    async def setattr(self, ino: int, changes: Changes, fh: int | None = None) -> Attr:
        """Everything is checked before anything is changed; the size comes first, because it alone can still fail."""
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
        # Where the kernel is left to truncate at an opening with O_TRUNC, it does so in this way.
        if fh is not None:
            await self._handle(fh).truncate(size)
        elif size or not self.kernel_lengths:
            handle = self._enter(file, os.O_RDWR, "direct")
            try:
                await handle.truncate(size)
            finally:
                await self._leave(handle)
        # The answer has the length, and that is what the kernel goes by.
        file.told_length, file.overran = file.node.entrance.driver.length, False

    # -- open files -----------------------------------------------------------------------------

    @answered
    async def open(self, ino: int, flags: int) -> Opened:
        """Never suspends.  EROFS, and EBUSY where another user of the node does not share what *flags* need."""
        file = self._file(ino)
        handle = self._enter(file, flags, self._mode(file))
        fh, self._next_handle = self._next_handle, self._next_handle + 1
        self._handles[fh] = handle
        if handle.root.queues_reads:
            self.queued_reads[fh] = handle.root.queue_read
        found = handle.access
        return Opened(
            fh,
            direct_io=not found.cached,
            keep_cache=found.keep_cache,
            no_flush=not found.writable,
            backing_fd=file.node.entrance.backing_descriptor() if found.passed else None,
        )

    @answered
    async def release(self, fh: int) -> None:
        handle = self._handle(fh)
        del self._handles[fh]
        self.queued_reads.pop(fh, None)
        await self._leave(handle)

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

    async def write(self, fh: int, offset: int, buf: memoryview, held_back: int = 0) -> int:
        """A file that is not growable: cut at the end of the node; ENOSPC from there on."""
        try:
            handle = self._handles.get(fh)
            if handle is None or not handle.writable:
                raise FuseError(errno.EBADF)
            root = handle.root
            changes = self._views.changes
            size = len(buf)
            left = root.driver.length - offset
            if size > left:
                if handle.file.growable:
                    await handle.grow(offset + size)
                elif left <= 0:
                    raise self._past_end(handle.file, held_back)
                else:
                    buf, size = buf[:left], left
                    if held_back:
                        await root.pwritev(offset, (buf,), handle.write_flags)
                        raise self._past_end(handle.file, held_back)
            await root.pwritev(offset, (buf,), handle.write_flags)
            file = handle.file
            file.mtime_ns = file.ctime_ns = time.time_ns()
            if not held_back:
                # Past the page cache; what somebody has read meanwhile is in there, and not all kernels drop that.
                if file.watch is not None and not handle.access.cached:
                    self._content_changed(file, offset, size)
                if self._views.changes != changes:
                    await self._views.settle()
        except Exception as error:
            raise FuseError(errno_of(error)) from error
        return size

    def _past_end(self, file: NodeFile, held_back: int) -> FuseError:
        """A write goes past the end.  Where the kernel goes by its own knowledge, it has taken the file to be longer.

        It goes on taking writes then, unless it is told otherwise before each.
        """
        if held_back and self.kernel_lengths:
            file.overran = True
            if self.transport is not None:
                self.transport.notify_inval_inode(file.ino, -1)
        return FuseError(errno.ENOSPC)

    @answered
    async def flush(self, fh: int) -> None:
        handle = self._handle(fh)
        await handle.flush()
        # What the kernel has written on its own account, nobody has waited for yet.
        if self.kernel_lengths or handle.access.passed:
            await self._views.settle()

    @answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self.flush(fh)

    @answered
    async def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        handle = self._handle(fh)
        changes = self._views.changes
        await handle.fallocate(mode, offset, length)
        handle.file.touch()
        if self._views.changes != changes:
            await self._views.settle()

    @answered
    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        return await self._handle(fh).seek(offset, whence)

    @answered
    async def copy_file_range(self, fh_in: int, offset_in: int, fh_out: int, offset_out: int, length: int) -> int:
        """What is known to be zeroes is not read, but zeroed.  An error counts only if nothing was copied before."""
        source, target = self._handle(fh_in), self._handle(fh_out)
        if not target.writable:
            raise FuseError(errno.EBADF)
        if min(offset_in, offset_out, length) < 0:
            raise FuseError(errno.EINVAL)
        length = min(length, source.length - offset_in, _MAX_COPY)
        if length > 0 and target.file.growable:
            await target.grow(offset_out + length)
        if length > 0 and offset_out >= target.length:
            raise FuseError(errno.ENOSPC)
        length = min(length, target.length - offset_out)
        done, changes = 0, self._views.changes
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
        target.file.touch()
        if self._views.changes != changes:
            await self._views.settle()
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
        node = self._file(ino).node
        return {
            f"{XATTR_PREFIX}cache": self._mode(self._file(ino)),
            f"{XATTR_PREFIX}driver": node.driver_name,
            f"{XATTR_PREFIX}node-name": node.name,
            f"{XATTR_PREFIX}details": msgspec.json.encode(_details(node)).decode(),
        }

    @answered
    async def getxattr(self, ino: int, name: bytes) -> bytes:
        value = self._xattrs(ino).get(os.fsdecode(name))
        if value is None:
            raise FuseError(errno.ENODATA)
        return value.encode(errors="surrogateescape")

    @answered
    async def listxattr(self, ino: int) -> list[bytes]:
        return [name.encode() for name in self._xattrs(ino)]


def _cannot_have(node_name: str, mode: CacheMode, reason: str) -> str:
    return f"Node '{node_name}' cannot have cache mode '{mode}': {reason}"


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
