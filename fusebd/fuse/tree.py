"""The mounted directory: every named node of the graph is a file in it.

Files come and go with their nodes; an open file holds its node in the graph.

Behaviour: QEMU block/export/fuse.c, for a directory of exports.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping

from fusebd.block.cachemode import CacheMode
from fusebd.block.graph import NODE_NAME_LENGTH, Graph
from fusebd.block.node import Node
from fusebd.errors import FuseError
from fusebd.fuse.files import XATTR_PREFIX, Files, answered
from fusebd.fuse.openfile import NodeFile
from fusebd.fuse.transport import ROOT_INODE, Attr, Changes, DirEntry, Statfs

_STATFS_BSIZE = 4096
#: listing offsets 1 and 2 are those after "." and ".."; a file's is its inode number and this
_FIRST_FILE = 1


class Tree(Files):
    """The files of *graph*'s named nodes in one directory.

    *read_only* refuses to open for writing; *allow_other* says that users other than the daemon's get at the mount;
    *info* are extended attributes of the directory (``user.fusebd.<key>``).  *caches* has cache modes by node-name, of
    nodes that may come later too; the others' is direct.  ``transport`` is told of files that vanish, too.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        read_only: bool = False,
        allow_other: bool = False,
        info: Mapping[str, str] | None = None,
        caches: Mapping[str, CacheMode] | None = None,
    ) -> None:
        super().__init__(graph)
        self._caches = dict(caches or {})
        self._read_only = read_only
        self._allow_other = allow_other
        self._info = {XATTR_PREFIX + key: value for key, value in (info or {}).items()}
        self._files: dict[int, NodeFile] = {}
        self._inodes: dict[Node, int] = {}
        self._next_inode = ROOT_INODE + 1
        self._changed_ns = time.time_ns()
        self._sync()
        graph.node_listeners.append(self._sync)

    async def aclose(self) -> None:
        self._graph.node_listeners.remove(self._sync)
        await super().aclose()

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
                self._files[ino] = self._new_file(node, ino)
                self._changed_ns = time.time_ns()

    def _new_file(self, node: Node, ino: int) -> NodeFile:
        # With allow_other, everybody may read, as with files that are made under the usual umask.
        mode = 0o644 if self._allow_other else 0o600
        cache = self._caches.get(node.name, "direct")
        file = NodeFile(node, ino, mode, cache=cache, read_only=self._read_only, allow_other=self._allow_other)
        return self._with_entry(file)

    def _forget(self, node: Node) -> None:
        ino = self._inodes.pop(node)
        del self._files[ino]
        self._changed_ns = time.time_ns()
        if self.transport is not None:
            self.transport.notify_delete(ROOT_INODE, ino, node.name.encode())

    def _all_files(self) -> Iterable[NodeFile]:
        return list(self._files.values())

    def wanted_caches(self) -> Mapping[str, CacheMode]:
        return self._caches

    async def set_cache(self, node_name: str, mode: CacheMode) -> None:
        await super().set_cache(node_name, mode)
        self._caches[node_name] = mode

    def _current(self, file: NodeFile) -> NodeFile:
        """*file* as the kernel may know it: with another inode number where it has a wrong length for this one."""
        length = file.node.entrance.driver.length
        if self.kernel_lengths and not file.open_files and (file.told_length != length or file.overran):
            del self._files[file.ino]
            file.ino, self._next_inode = self._next_inode, self._next_inode + 1
            file.told_length, file.overran = length, False
            self._inodes[file.node] = file.ino
            self._files[file.ino] = file
        return file

    def _file(self, ino: int) -> NodeFile:
        if ino == ROOT_INODE:
            raise FuseError(errno.EISDIR)
        file = self._files.get(ino)
        if file is None:
            raise FuseError(errno.ESTALE)
        return file

    # -- names and attributes -------------------------------------------------------------------

    @answered
    async def lookup(self, parent: int, name: bytes) -> Attr:
        if parent != ROOT_INODE:
            raise FuseError(errno.ENOTDIR)
        if name in (b".", b".."):
            return self._directory()
        node = self._graph.nodes.get(os.fsdecode(name))
        ino = self._inodes.get(node) if node is not None else None
        if ino is None:
            raise FuseError(errno.ENOENT)
        return self._current(self._files[ino]).attr()

    @answered
    async def getattr(self, ino: int) -> Attr:
        return self._directory() if ino == ROOT_INODE else await super().getattr(ino)

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

    @answered
    async def setattr(self, ino: int, changes: Changes, fh: int | None = None) -> Attr:
        if ino == ROOT_INODE:
            raise FuseError(errno.EPERM)
        return await super().setattr(ino, changes, fh)

    @answered
    async def statfs(self) -> Statfs:
        """The sizes of all nodes together; nothing is free, because nothing can be made here."""
        blocks = sum(-(-file.node.entrance.driver.length // _STATFS_BSIZE) for file in self._files.values())
        return Statfs(_STATFS_BSIZE, blocks, 0, 0, len(self._files), NODE_NAME_LENGTH)

    # -- the directory --------------------------------------------------------------------------

    @answered
    async def opendir(self, ino: int) -> None:
        if ino != ROOT_INODE:
            raise FuseError(errno.ENOTDIR)

    @answered
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
        for file in self._all_files():
            self._current(file)
        for file in self._all_files():
            if file.ino + _FIRST_FILE > offset:
                yield DirEntry(file.node.name.encode(), file.attr(), file.ino + _FIRST_FILE)

    # -- extended attributes --------------------------------------------------------------------

    def _xattrs(self, ino: int) -> Mapping[str, str]:
        return self._info if ino == ROOT_INODE else super()._xattrs(ino)
