"""The transport through pyfuse3, and with it libfuse's own request loop.

pyfuse3 keeps its session in module globals, so that a process can serve one mount this way.  It registers no
fallocate, lseek, copy_file_range and ioctl handlers, cannot ask for parallel direct writes, and cannot have shared
mmap of files that bypass the page cache: all this is ``devfuse.py``'s.  The mount is made by ``mountpoint.py``; libfuse
is given the descriptor (``/dev/fd/N``).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable
from functools import partial
from typing import Any, NoReturn

import pyfuse3
import trio

from fusebd.block.caller import Asked
from fusebd.errors import FuseError, NotSupported, UsageError
from fusebd.fuse.notices import Notices
from fusebd.fuse.transport import Attr, BufferPool, Changes, FileSystem, current_request

#: tasks that read requests; each serves the one that it read.  Idle ones above the minimum end.
_MIN_TASKS, _MAX_TASKS = 8, 128


class LibfuseTransport:
    """Serves *fs* on *descriptor*, a mounted /dev/fuse.  See ``fusebd.fuse.transport.Transport``."""

    capabilities = frozenset({"notify"})
    _in_use = False

    def __init__(self, fs: FileSystem, descriptor: int) -> None:
        if LibfuseTransport._in_use:
            raise UsageError("the pyfuse3 transport can serve only one mount in a process")
        try:
            pyfuse3.init(_Operations(fs), f"/dev/fd/{descriptor}", set())
        except RuntimeError as error:
            raise UsageError(f"pyfuse3: {error}", errno=errno.EIO) from None
        LibfuseTransport._in_use = True
        self._serving = False
        self._stale: Notices[int] = Notices(lambda inos: partial(_invalidate, inos))

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            notifier = trio.CancelScope()
            nursery.start_soon(self._stale.send, notifier)
            self._serving = True
            task_status.started()
            try:
                await pyfuse3.main(_MIN_TASKS, _MAX_TASKS)
            finally:
                self._serving = False
                notifier.cancel()
                self._stale.end()

    def close(self) -> None:
        """A notification that the kernel has not finished keeps the session open: libfuse would free it under it."""
        if not self._stale.under_way:
            pyfuse3.close(unmount=False)
            LibfuseTransport._in_use = False

    def why_not(self, capability: str) -> str:
        return "it takes the devfuse transport"

    def try_backing(self, descriptor: int) -> None:
        raise NotSupported(operation="passthrough", reason=self.why_not("passthrough"))

    async def wait_notified(self) -> bool:
        return await self._stale.wait_taken()

    def notify_inval_inode(self, ino: int, offset: int = 0, length: int = 0) -> None:
        """All pages, whatever the range: pyfuse3 knows no other way."""
        if self._serving:
            self._stale.give(ino)

    def notify_inval_entry(self, parent: int, name: bytes) -> None:
        pyfuse3.invalidate_entry_async(pyfuse3.InodeT(parent), pyfuse3.FileNameT(name), ignore_enoent=True)

    def notify_delete(self, parent: int, ino: int, name: bytes) -> None:
        pyfuse3.invalidate_entry_async(
            pyfuse3.InodeT(parent), pyfuse3.FileNameT(name), pyfuse3.InodeT(ino), ignore_enoent=True
        )


def _invalidate(inos: Iterable[int]) -> None:
    for ino in inos:
        with contextlib.suppress(OSError):  # the kernel does not know the inode: then there is nothing to forget
            pyfuse3.invalidate_inode(pyfuse3.InodeT(ino))


def _refuse(error: FuseError) -> NoReturn:
    raise pyfuse3.FUSEError(error.errno) from None


class _Request:
    """The request that a task serves.  pyfuse3 does not tell whose reads, writes and flushes it is asked for."""

    pid, uid = 0, -1

    def __init__(self, *asked: Any) -> None:
        self._asked = Asked(*asked)

    def identity(self) -> dict[str, Any]:
        return {}

    def asked(self) -> Asked:
        return self._asked


class _Operations(pyfuse3.Operations):
    """pyfuse3's calls, as calls of a FileSystem."""

    def __init__(self, fs: FileSystem) -> None:
        super().__init__()
        self._fs = fs
        self._pool = BufferPool()

    def _entry(self, attr: Attr) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(attr.ino)
        entry.st_mode = pyfuse3.ModeT(attr.mode)
        entry.st_size = attr.size
        entry.st_blocks = attr.blocks
        entry.st_blksize = attr.blksize
        entry.st_uid = attr.uid
        entry.st_gid = attr.gid
        entry.st_nlink = attr.nlink
        entry.st_atime_ns = attr.atime_ns
        entry.st_mtime_ns = attr.mtime_ns
        entry.st_ctime_ns = attr.ctime_ns
        entry.entry_timeout = self._fs.entry_timeout
        entry.attr_timeout = self._fs.attr_timeout
        return entry

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        try:
            return self._entry(await self._fs.lookup(parent_inode, name))
        except FuseError as error:
            _refuse(error)

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        try:
            return self._entry(await self._fs.getattr(inode))
        except FuseError as error:
            _refuse(error)

    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        changes = Changes(
            size=attr.st_size if fields.update_size else None,
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        current_request.set(_Request("resize", attr.st_size))
        try:
            return self._entry(await self._fs.setattr(inode, changes, fh))
        except FuseError as error:
            _refuse(error)

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        try:
            opened = await self._fs.open(inode, flags)
        except FuseError as error:
            _refuse(error)
        fh = pyfuse3.FileHandleT(opened.fh)
        return pyfuse3.FileInfo(fh=fh, direct_io=opened.direct_io, keep_cache=opened.keep_cache)

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        current_request.set(_Request("close"))
        try:
            await self._fs.release(fh)
        except FuseError as error:
            _refuse(error)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        current_request.set(_Request("read", off, size))
        buf = self._pool.take(size)
        try:
            done = await self._fs.read(fh, off, buf[:size])
        except FuseError as error:
            _refuse(error)
        finally:
            self._pool.give_back(buf)
        # pyfuse3 takes any buffer, and copies it to the kernel before another task can take it from the pool.
        return buf[:done]  # type: ignore[return-value]

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        current_request.set(_Request("write", off, len(buf)))
        try:
            return await self._fs.write(fh, off, memoryview(buf))
        except FuseError as error:
            _refuse(error)

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        current_request.set(_Request("flush"))
        try:
            await self._fs.flush(fh)
        except FuseError as error:
            _refuse(error)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        current_request.set(_Request("flush"))
        try:
            await self._fs.fsync(fh, datasync)
        except FuseError as error:
            _refuse(error)

    # -- the directory: its handle is its inode number ------------------------------------------

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        try:
            await self._fs.opendir(inode)
        except FuseError as error:
            _refuse(error)
        return pyfuse3.FileHandleT(inode)

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        try:
            entries = await self._fs.readdir(fh, start_id)
        except FuseError as error:
            _refuse(error)
        for name, attr, next_offset in entries:
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), self._entry(attr), next_offset):
                break

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """Nothing was opened for it."""

    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """Nothing of it is on a disk."""

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        try:
            found = await self._fs.statfs()
        except FuseError as error:
            _refuse(error)
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = found.bsize
        data.f_blocks, data.f_bfree, data.f_bavail = found.blocks, found.bfree, found.bavail
        data.f_files, data.f_namemax = found.files, found.namelen
        return data

    # -- extended attributes; pyfuse3's own setxattr and removexattr answer ENOSYS --------------

    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        try:
            return await self._fs.getxattr(inode, name)
        except FuseError as error:
            _refuse(error)

    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> list[pyfuse3.XAttrNameT]:
        try:
            return [pyfuse3.XAttrNameT(name) for name in await self._fs.listxattr(inode)]
        except FuseError as error:
            _refuse(error)

    # -- files are made and removed by blockdev-add and blockdev-del alone ----------------------

    async def create(self, *args: Any, **kwargs: Any) -> Any:
        raise pyfuse3.FUSEError(errno.EPERM)

    mknod = mkdir = symlink = link = unlink = rmdir = rename = create
