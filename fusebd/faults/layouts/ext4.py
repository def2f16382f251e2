"""ext4, and ext2 and ext3: where dumpe2fs and debugfs say that structures are.

They show what is on the disk: what a mounted file system has not written yet is not there.  debugfs runs in its
catastrophic mode, which reads no bitmaps and cannot write.

Sources: dumpe2fs(8), debugfs(8); Linux Documentation/filesystems/ext4/.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from fusebd.errors import FusebdError, ImageError, OptionError
from fusebd.faults.layout import Area, Layout, Range, Target, absolute, number
from fusebd.faults.tools import Output

SUPERBLOCK_OFFSET, SUPERBLOCK_LENGTH = 1024, 1024
MAGIC_OFFSET, MAGIC = 1024 + 56, b"\x53\xef"
#: the byte with the feature that says that it is but the journal of another file system
INCOMPAT_OFFSET, INCOMPAT_JOURNAL_DEV = 1024 + 96, 0x08

#: target -> what debugfs calls the type of an inode
_KINDS = {"file": "regular file", "directory": "directory"}


@dataclass(frozen=True)
class Group:
    """A block group, in block numbers.  There is not in every group a superblock, nor are there group descriptors."""

    number: int
    superblock: int | None
    #: first and last
    descriptors: tuple[int, int] | None
    block_bitmap: int
    inode_bitmap: int
    inode_table: int


@dataclass(frozen=True)
class Stat:
    """An inode, as debugfs shows it.  Blocks as first and last: those of its content, and those that map them."""

    kind: str
    blocks: list[tuple[int, int]]
    mapping: list[tuple[int, int]]


def parse_header(text: str) -> dict[str, str]:
    """``dumpe2fs -h``: what is before the colon of each line -> what is behind it."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, colon, value in pairs if colon}


def parse_groups(text: str) -> list[Group]:
    """``dumpe2fs -g``."""
    groups = []
    for line in text.splitlines():
        if not re.fullmatch(r"\d+:\d+(:-?\d+(-\d+)?){5}", line):
            continue
        number_, _, superblock, descriptors, block_bitmap, inode_bitmap, inode_table = line.split(":")
        first, _, last = descriptors.partition("-") if descriptors != "-1" else ("", "", "")
        groups.append(
            Group(
                int(number_),
                int(superblock) if superblock != "-1" else None,
                (int(first), int(last or first)) if first else None,
                int(block_bitmap),
                int(inode_bitmap),
                int(inode_table.partition("-")[0]),
            )
        )
    return groups


def parse_stat(text: str) -> Stat | None:
    """debugfs's ``stat``; None if it shows no inode."""
    found = re.search(r"^Inode: \d+ +Type: (.*?) +Mode:", text, re.MULTILINE)
    if found is None:
        return None
    # An attribute's value may have a line like that, but before.
    _, *listings = re.split(r"^(?:EXTENTS|BLOCKS):\n", text, flags=re.MULTILINE)
    blocks: list[tuple[int, int]] = []
    mapping: list[tuple[int, int]] = []
    # "(0-11):100-111, (IND):112, (ETB0):34", and "(0-7[u]):50-57" for what was preallocated
    for logical, first, last in re.findall(r"\(([^()]+)\):(\d+)(?:-(\d+))?", listings[-1] if listings else ""):
        (blocks if logical[0].isdigit() else mapping).append((int(first), int(last or first)))
    kind = "regular file" if found[1] == "regular" else found[1]
    return Stat(kind, blocks, mapping)


def parse_imap(text: str) -> tuple[int, int] | None:
    """debugfs's ``imap``: the block that an inode is in, and the byte in there; None if it shows none."""
    found = re.search(r"located at block (\d+), offset 0x([0-9a-f]+)", text)
    return (int(found[1]), int(found[2], 16)) if found else None


def quoted(path: str) -> str:
    """*path* as a word of a debugfs request."""
    return '"' + path.replace('"', '""') + '"'


class Ext4(Layout):
    name = "ext4"
    noun = "ext2, ext3 or ext4 file system"
    targets = (
        Target("superblock", "the primary superblock"),
        Target("backup-superblocks", "the superblock's copies"),
        Target("group-descriptors", "the primary group descriptors"),
        Target("backup-group-descriptors", "the group descriptors' copies"),
        Target("block-bitmaps", "the block bitmaps, or that of one group", "GROUP", optional=True),
        Target("inode-bitmaps", "the inode bitmaps, or that of one group", "GROUP", optional=True),
        Target("inode-tables", "the inode tables, or that of one group", "GROUP", optional=True),
        Target("journal", "the journal"),
        Target("inode", "the inode table's entry for a file or inode number", "PATH|NUMBER"),
        Target("file", "the blocks of a file's content", "PATH"),
        Target("directory", "the blocks of a directory's entries", "PATH"),
        Target("mapping", "the extent tree or indirect blocks of a file or directory", "PATH"),
    )

    @classmethod
    def matches(cls, area: Area) -> bool:
        if area.read(MAGIC_OFFSET, len(MAGIC)) != MAGIC:
            return False
        return not any(byte & INCOMPAT_JOURNAL_DEV for byte in area.read(INCOMPAT_OFFSET, 1))

    def find(self, target: str, value: str) -> Iterable[Range]:
        match target:
            case "superblock":
                return [(SUPERBLOCK_OFFSET, SUPERBLOCK_LENGTH)]
            case "backup-superblocks":
                return self._backup_superblocks()
            case "group-descriptors" | "backup-group-descriptors":
                return self._group_descriptors(backup=target.startswith("backup"))
            case "block-bitmaps":
                return [self._blocks(group.block_bitmap) for group in self._chosen(value)]
            case "inode-bitmaps":
                return [self._blocks(group.inode_bitmap) for group in self._chosen(value)]
            case "inode-tables":
                length = self._field("Inode blocks per group")
                return [
                    self._blocks(group.inode_table, group.inode_table + length - 1) for group in self._chosen(value)
                ]
            case "journal":
                return self._journal()
            case "inode":
                return [self._inode(value)]
            case "mapping":
                return self._mapping(value)
            case _:
                return self._content(value, _KINDS[target])

    def absent(self) -> Collection[str]:
        absent = set()
        if "Journal inode" not in self._header:
            absent.add("journal")
        if all(group.superblock in (None, self._groups[0].superblock) for group in self._groups):
            absent.add("backup-superblocks")
        if not any(self._group_descriptors(backup=True)):
            absent.add("backup-group-descriptors")
        return absent

    # --- what the tools say ---

    @cached_property
    def _header(self) -> dict[str, str]:
        output = self.area.run("dumpe2fs", "-h", self._path)
        # It complains about a damaged journal, too, which is no reason not to look for the rest.
        if "Block size:" not in output.text:
            raise ImageError(f"dumpe2fs: {output.complaint}")
        return parse_header(output.text)

    @cached_property
    def _groups(self) -> list[Group]:
        output = self.area.run("dumpe2fs", "-g", self._path)
        groups = parse_groups(output.text)
        if not groups:
            raise ImageError(f"dumpe2fs: {output.complaint}")
        return groups

    def _field(self, key: str, default: int | None = None) -> int:
        text = self._header.get(key, "" if default is None else str(default))
        if not re.fullmatch(r"[0-9]{1,20}", text):
            raise ImageError(f"dumpe2fs prints no number for '{key}'")
        return int(text)

    @property
    def _path(self) -> str:
        # libext2fs knows where in a file the file system begins
        offset = self.area.offset
        return self.area.whole_file + (f"?offset={offset}" if offset else "")

    def _debugfs(self, request: str) -> Output:
        return self.area.run("debugfs", "-c", "-R", request, self._path)

    def _stat(self, word: str, name: str) -> Stat:
        output = self._debugfs(f"stat {word}")
        found = parse_stat(output.text)
        if found is None:
            raise self._failure(output, name)
        return found

    @staticmethod
    def _failure(output: Output, name: str) -> FusebdError:
        if "File not found" in output.stderr:
            return FusebdError(f"the file system has no '{name}'")
        return ImageError(f"debugfs: {output.complaint}")

    # --- ranges ---

    def _blocks(self, first: int, last: int | None = None) -> Range:
        block_size = self._field("Block size")
        return first * block_size, ((first if last is None else last) - first + 1) * block_size

    def _chosen(self, value: str) -> list[Group]:
        """The groups that a parameter *value* means: all, or one."""
        if not value:
            return self._groups
        wanted = number(value, "the number of a block group")
        groups = [group for group in self._groups if group.number == wanted]
        if not groups:
            raise OptionError(f"there is no block group {wanted}, there are {len(self._groups)}")
        return groups

    def _backup_superblocks(self) -> list[Range]:
        return [
            (self._blocks(group.superblock)[0], SUPERBLOCK_LENGTH)
            for group in self._groups[1:]
            if group.superblock is not None
        ]

    def _group_descriptors(self, *, backup: bool) -> Iterator[Range]:
        per_block, first_meta = 0, 0
        if "meta_bg" in self._header.get("Filesystem features", "").split():
            # One block describes a meta group; its copies are in the second and the last group of that.
            per_block = self._field("Block size") // max(self._field("Group descriptor size", 32), 32)
            first_meta = self._field("First meta block group", 0) * per_block
        for group in self._groups:
            if group.descriptors is None:
                continue
            in_meta_group = per_block and group.number >= first_meta
            primary = group.number % per_block == 0 if in_meta_group else group.number == 0
            if primary != backup:
                yield self._blocks(*group.descriptors)

    def _journal(self) -> list[Range]:
        if "Journal inode" not in self._header:
            if "has_journal" in self._header.get("Filesystem features", "").split():
                raise FusebdError("the journal is on another device")
            raise FusebdError("the file system has no journal")
        blocks = self._stat(f"<{self._field('Journal inode')}>", "journal inode").blocks
        return [self._blocks(*extent) for extent in blocks]

    def _inode(self, value: str) -> Range:
        if value.startswith("/"):
            output = self._debugfs(f"imap {quoted(absolute(value))}")
        else:
            inode = number(value, "an inode's number or an absolute path")
            if not 0 < inode <= self._field("Inode count"):
                raise OptionError(f"there is no inode {inode}, there are {self._field('Inode count')}")
            output = self._debugfs(f"imap <{inode}>")
        found = parse_imap(output.text)
        if found is None:
            raise self._failure(output, value)
        block, offset = found
        return self._blocks(block)[0] + offset, self._field("Inode size")

    def _mapping(self, path: str) -> list[Range]:
        found = self._stat(quoted(absolute(path)), path)
        if not found.mapping:
            raise FusebdError(f"'{path}' needs no blocks to map its own: its inode has the whole map")
        return [self._blocks(*extent) for extent in found.mapping]

    def _content(self, path: str, kind: str) -> list[Range]:
        found = self._stat(quoted(absolute(path)), path)
        if found.kind != kind:
            raise FusebdError(f"'{path}' is no {kind} (it is of type {found.kind})")
        if not found.blocks:
            raise FusebdError(f"'{path}' has no blocks: it is empty, a hole, or inside of its inode")
        return [self._blocks(*extent) for extent in found.blocks]
