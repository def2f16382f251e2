"""fuse: one node as one file, mounted over a regular file that exists.

Options: QAPI BlockExportOptionsFuse.  Behaviour and messages: QEMU block/export/fuse.c.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import trio
from msgspec import Meta

from fusebd.block.cachemode import CacheMode
from fusebd.block.export import Export, ExportOptions, register
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.errors import FuseError, GraphError, OpenError, UsageError
from fusebd.fuse.files import Files
from fusebd.fuse.mount import serve_mounted
from fusebd.fuse.openfile import NodeFile
from fusebd.fuse.transport import ROOT_INODE, Attr, DirEntry, Statfs

log = logging.getLogger(__name__)

_STATFS_BSIZE = 4096
_NAME_MAX = 255


class FuseExportOptions(ExportOptions, frozen=True, kw_only=True):
    mountpoint: Annotated[str, Meta(description="regular file to mount over")]
    growable: Annotated[bool, Meta(description="writes past the end make the node longer")] = False
    allow_other: Annotated[
        Literal["off", "on", "auto"], Meta(description="let other users in, too; auto: if that is allowed")
    ] = "auto"
    cache: Annotated[CacheMode, Meta(description="what the kernel may keep (QEMU: always direct)")] = "direct"


class ExportedFile(Files):
    """A file system whose root is the file of one node.  Open files share the export's way in, *root*."""

    refused_write = errno.EACCES

    def __init__(self, root: Root, options: FuseExportOptions, *, allow_other: bool) -> None:
        super().__init__(root.node.graph)
        self._root = root
        self._exported = NodeFile(
            root.node.graph.find(options.node_name),
            ROOT_INODE,
            0o600 if options.writable else 0o400,
            cache=options.cache,
            read_only=not options.writable,
            allow_other=allow_other,
            growable=options.growable,
            writethrough=options.writethrough,
        )
        self._with_entry(self._exported, root)

    def _file(self, ino: int) -> NodeFile:
        if ino != ROOT_INODE:
            raise FuseError(errno.ESTALE)
        return self._exported

    def _all_files(self) -> Iterable[NodeFile]:
        return (self._exported,)

    def wanted_caches(self) -> Mapping[str, CacheMode]:
        return {self._exported.node.name: self._exported.cache}

    async def lookup(self, parent: int, name: bytes) -> Attr:
        raise FuseError(errno.ENOENT)

    async def opendir(self, ino: int) -> None:
        raise FuseError(errno.ENOTDIR)

    async def readdir(self, ino: int, offset: int) -> Iterable[DirEntry]:
        raise FuseError(errno.ENOTDIR)

    async def statfs(self) -> Statfs:
        """The size of the node; nothing is free."""
        return Statfs(_STATFS_BSIZE, -(-self._root.length // _STATFS_BSIZE), 0, 0, 1, _NAME_MAX)


@register("fuse", FuseExportOptions)
class FuseExport(Export):
    """Ends when its file is unmounted from outside, too."""

    options: FuseExportOptions

    def __init__(self, root: Root, options: FuseExportOptions, others: list[Export]) -> None:
        super().__init__(root, options, others)
        if any(isinstance(other, FuseExport) and other.options.mountpoint == options.mountpoint for other in others):
            raise GraphError(f"There already is a FUSE export on '{options.mountpoint}'")
        if options.cache == "writeback" and options.writable and not options.growable:
            raise GraphError("cache=writeback takes growable=on: the kernel lets writes past the end")

    @classmethod
    def perm(cls, options: ExportOptions) -> Perm:
        assert isinstance(options, FuseExportOptions)
        resize = Perm.RESIZE if options.writable or options.growable else Perm.NONE
        return super().perm(options) | resize

    @classmethod
    def shared(cls, options: ExportOptions) -> Perm:
        assert isinstance(options, FuseExportOptions)
        if options.cache != "writeback":
            return super().shared(options)
        return Perm.ALL & ~(Perm.RESIZE | Perm.WRITE if options.writable else Perm.RESIZE)

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        await trio.to_thread.run_sync(_check, self.options.mountpoint)
        choices = {"off": [False], "on": [True], "auto": [True, False]}[self.options.allow_other]
        for allow_other in choices:
            try:
                await self._serve(allow_other, task_status)
            except UsageError as error:
                if allow_other and len(choices) > 1:
                    log.debug("%s: mounted without allow_other: %s", self.options.mountpoint, error)
                    continue
                raise
            return

    async def _serve(self, allow_other: bool, task_status: trio.TaskStatus[None]) -> None:
        file = ExportedFile(self.root, self.options, allow_other=allow_other)
        await serve_mounted(file, self.options.mountpoint, allow_other=allow_other, task_status=task_status)


def _check(mountpoint: str) -> None:
    """Raise unless *mountpoint* is a regular file.  May wait for the file system that it is in."""
    try:
        mode = os.stat(mountpoint).st_mode
    except (OSError, ValueError) as error:
        code = error.errno if isinstance(error, OSError) and error.errno else errno.EINVAL
        raise OpenError(f"Failed to stat '{mountpoint}': {os.strerror(code)}", errno=code) from None
    if not stat.S_ISREG(mode):
        raise UsageError(f"'{mountpoint}' is not a regular file")
