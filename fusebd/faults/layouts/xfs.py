"""xfs: where xfs_db says that structures are.

It shows what is on the disk: what a mounted file system has not written yet is not there.  It is run read-only.

Sources: xfs_db(8); "XFS Algorithms & Data Structures", chapters "Superblocks", "AG Free Space Management", "AG Inode
Management".
"""

from __future__ import annotations

import re
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fusebd.errors import FusebdError, ImageError, OptionError
from fusebd.faults.layout import Area, Layout, Range, Target, absolute, number
from fusebd.faults.tools import Output

MAGIC = b"XFSB"
INODE_MAGIC = 0x494E
MIN_AG_BLOCKS = 64
INODES_PER_CHUNK = 64
#: bits of holemask, each for INODES_PER_CHUNK / 16 inodes that a sparse chunk has not
HOLEMASK_BITS = 16
#: allocation groups that one run of xfs_db is asked about; its command line has to stay inside the kernel's limit
AGS_PER_RUN = 1000

#: the sectors with which an allocation group begins
AG_SECTORS = {"superblock": 0, "agf": 1, "agi": 2, "agfl": 3}
_KINDS = {"file": stat.S_IFREG, "directory": stat.S_IFDIR}
_KIND_NAMES = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


@dataclass(frozen=True)
class Geometry:
    """Fields of the superblock, by its names."""

    blocksize: int
    sectsize: int
    inodesize: int
    inopblog: int
    agblocks: int
    agblklog: int
    agcount: int
    dblocks: int
    logstart: int
    logblocks: int
    rootino: int

    def check(self, length: int) -> None:
        """Raise ImageError unless a file system like that can be in *length* bytes."""
        if not (
            512 <= self.sectsize <= self.blocksize <= 1 << 16
            and 0 < self.inodesize <= self.blocksize
            and 0 <= self.inopblog <= 8
            and 0 < self.agblklog < 32
            and MIN_AG_BLOCKS <= self.agblocks <= 1 << self.agblklog
            and (self.agcount - 1) * self.agblocks < self.dblocks <= self.agcount * self.agblocks
        ):
            raise ImageError("the superblock contradicts itself")
        if self.dblocks * self.blocksize > length:
            raise ImageError(f"the file system has {self.dblocks * self.blocksize} bytes, and there are only {length}")

    def ag_start(self, ag: int) -> int:
        """The byte with which the allocation group *ag* begins."""
        return ag * self.agblocks * self.blocksize

    def block(self, fsblock: int) -> int:
        """The byte with which the block *fsblock* begins."""
        ag, agblock = fsblock >> self.agblklog, fsblock & ((1 << self.agblklog) - 1)
        return self.ag_start(ag) + agblock * self.blocksize

    def inode(self, inode: int) -> int:
        """The byte with which the inode *inode* begins."""
        return self.block(inode >> self.inopblog) + (inode & ((1 << self.inopblog) - 1)) * self.inodesize

    def ag_inode(self, ag: int, aginode: int) -> int:
        """The byte with which the inode begins that has the number *aginode* in the allocation group *ag*."""
        return self.inode(ag << (self.agblklog + self.inopblog) | aginode)


class Chunk(NamedTuple):
    """A record of an inode B+tree: 64 inodes, without those of the bits in *holemask*."""

    ag: int
    start: int
    holemask: int


def parse_fields(text: str) -> dict[str, int]:
    """``print``: the fields that are numbers, in whatever base."""
    return {
        name: int(value, 0) if value.startswith("0x") else int(value, 8 if name == "core.mode" else 10)
        for name, value in re.findall(r"^([\w.]+) = (0x[0-9a-f]+|\d+)\b", text, re.MULTILINE)
    }


def parse_bmap(text: str) -> list[tuple[int, int]]:
    """``bmap``: the first block and the number of blocks of each extent."""
    return [(int(first), int(count)) for first, count in re.findall(r"startblock (\d+) \(.*?\) count (\d+)", text)]


def parse_chunks(text: str) -> list[Chunk]:
    """``print seqno`` of the agi and ``btdump`` of its inode B+tree, for several allocation groups."""
    chunks = []
    ag = 0
    for line in text.splitlines():
        if found := re.fullmatch(r"seqno = (\d+)", line):
            ag = int(found[1])
        # startino, and where there can be sparse chunks holemask and count; freecount, free
        elif found := re.fullmatch(r"\d+:\[(\d+)(?:,(\w+),\d+)?,\d+,\w+\] *", line):
            chunks.append(Chunk(ag, int(found[1]), int(found[2] or "0", 0)))
    return chunks


def parse_ls(listing: bytes) -> Iterator[tuple[bytes, int]]:
    """``ls``: name and inode number of each entry.  Names are raw, and may have line ends in them."""
    entry = re.compile(rb"^\d+ +(\d+) +\w+ +0x[0-9a-f]+ +(\d+) ", re.MULTILINE)
    position = 0
    while found := entry.search(listing, position):
        position = found.end() + int(found[2])
        yield listing[found.end() : position], int(found[1])


class Xfs(Layout):
    name = "xfs"
    noun = "xfs file system"
    targets = (
        Target("superblock", "the primary superblock"),
        Target("backup-superblocks", "the superblock's copies"),
        Target("ag-headers", "the headers of all allocation groups, or of one", "AG", optional=True),
        Target("agf", "the free space headers", "AG", optional=True),
        Target("agi", "the inode headers", "AG", optional=True),
        Target("agfl", "the free lists", "AG", optional=True),
        Target("inodes", "the inode chunks", "AG", optional=True),
        Target("log", "the log"),
        Target("inode", "the inode of a file or of that number", "PATH|NUMBER"),
        Target("file", "the blocks of a file's content", "PATH"),
        Target("directory", "the blocks of a directory's entries", "PATH"),
    )

    @classmethod
    def matches(cls, area: Area) -> bool:
        return area.read(0, len(MAGIC)) == MAGIC

    def find(self, target: str, value: str) -> Iterable[Range]:
        match target:
            case "superblock":
                return [self._ag_sector(0, "superblock")]
            case "backup-superblocks":
                return [self._ag_sector(ag, "superblock") for ag in range(1, self._geometry.agcount)]
            case "ag-headers":
                return [self._ag_sector(ag, sector) for ag in self._chosen(value) for sector in AG_SECTORS]
            case "agf" | "agi" | "agfl":
                return [self._ag_sector(ag, target) for ag in self._chosen(value)]
            case "inodes":
                return self._inode_chunks(self._chosen(value))
            case "log":
                return [self._log()]
            case "inode":
                return [self._inode(value)]
            case _:
                return self._content(value, _KINDS[target])

    def absent(self) -> Collection[str]:
        absent = set()
        if not self._geometry.logstart:
            absent.add("log")
        if self._geometry.agcount == 1:
            absent.add("backup-superblocks")
        return absent

    # --- what xfs_db says ---

    def _run(self, *commands: str) -> Output:
        words = [word for command in commands for word in ("-c", command)]
        if not self.area.is_device:
            words.insert(0, "-f")
        return self.area.run("xfs_db", "-r", *words, self.area.file)

    @cached_property
    def _geometry(self) -> Geometry:
        output = self._run("sb 0", "print")
        fields = parse_fields(output.text)
        try:
            geometry = Geometry(**{name: fields[name] for name in Geometry.__dataclass_fields__})
        except KeyError:
            raise ImageError(f"xfs_db: {output.complaint}") from None
        geometry.check(self.area.length)
        return geometry

    def _lookup(self, path: str) -> int:
        """The number of the inode at *path*; symbolic links are not followed."""
        inode = self._geometry.rootino
        walked = ""
        for name in absolute(path).split("/"):
            if not name:
                continue
            output = self._run(f"inode {inode}", "ls")
            entries = dict(parse_ls(output.stdout))
            if not entries:
                raise ImageError(f"'{walked or '/'}' cannot be listed: xfs_db: {output.complaint}")
            walked += f"/{name}"
            try:
                inode = entries[name.encode("utf-8", "surrogateescape")]
            except KeyError:
                raise FusebdError(f"the file system has no '{walked}'") from None
        return inode

    # --- ranges ---

    def _chosen(self, value: str) -> range:
        """The allocation groups that a parameter *value* means: all, or one."""
        count = self._geometry.agcount
        if not value:
            return range(count)
        ag = number(value, "the number of an allocation group")
        if ag >= count:
            raise OptionError(f"there is no allocation group {ag}, there are {count}")
        return range(ag, ag + 1)

    def _ag_sector(self, ag: int, name: str) -> Range:
        geometry = self._geometry
        return geometry.ag_start(ag) + AG_SECTORS[name] * geometry.sectsize, geometry.sectsize

    def _log(self) -> Range:
        geometry = self._geometry
        if not geometry.logstart:
            raise FusebdError("the log is on another device")
        return geometry.block(geometry.logstart), geometry.logblocks * geometry.blocksize

    def _inode_chunks(self, ags: range) -> Iterator[Range]:
        inodes_per_bit = INODES_PER_CHUNK // HOLEMASK_BITS
        length = inodes_per_bit * self._geometry.inodesize
        for first in range(ags.start, ags.stop, AGS_PER_RUN):
            commands = [
                command
                for ag in range(first, min(first + AGS_PER_RUN, ags.stop))
                for command in (f"agi {ag}", "print seqno", "addr root", "btdump")
            ]
            for chunk in parse_chunks(self._run(*commands).text):
                for bit in range(HOLEMASK_BITS):
                    if not chunk.holemask >> bit & 1:
                        yield self._geometry.ag_inode(chunk.ag, chunk.start + bit * inodes_per_bit), length

    def _inode(self, value: str) -> Range:
        if value.startswith("/"):
            inode = self._lookup(value)
        else:
            inode = number(value, "an inode's number or an absolute path")
        core, _ = self._inode_core(inode)
        if core.get("core.magic") != INODE_MAGIC:
            raise FusebdError(f"there is no inode {inode}")
        return self._geometry.inode(inode), self._geometry.inodesize

    def _inode_core(self, inode: int) -> tuple[dict[str, int], Output]:
        """Fields of an inode, with the output that has the extents, too."""
        output = self._run(f"inode {inode}", "print core.magic core.mode core.realtime", "bmap -d")
        return parse_fields(output.text), output

    def _content(self, path: str, kind: int) -> list[Range]:
        inode = self._lookup(path)
        core, output = self._inode_core(inode)
        if core.get("core.magic") != INODE_MAGIC:
            raise ImageError(f"'{path}' is inode {inode}, which is none: xfs_db: {output.complaint}")
        found = stat.S_IFMT(core.get("core.mode", 0))
        if found != kind:
            name = _KIND_NAMES.get(found, "unknown")
            raise FusebdError(f"'{path}' is no {_KIND_NAMES[kind]} (it is of type {name})")
        if core.get("core.realtime"):
            raise FusebdError(f"the blocks of '{path}' are on the realtime device")
        extents = parse_bmap(output.text)
        if not extents:
            raise FusebdError(f"'{path}' has no blocks: it is empty, a hole, or inside of its inode")
        geometry = self._geometry
        return [(geometry.block(first), count * geometry.blocksize) for first, count in extents]
