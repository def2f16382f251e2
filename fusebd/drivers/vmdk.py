"""vmdk: disk images of VMware, to be read: sparse, compressed and flat ones, in one file or in several.

The files that a descriptor names are children called ``extents.0`` and so on.

Options: QAPI BlockdevOptionsGenericCOWFormat.  Layout: ``fusebd.ondisk.vmdk``.  Behaviour and messages: QEMU
block/vmdk.c.
"""

from __future__ import annotations

import errno
import os
import stat
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from typing import Annotated, Literal

import construct as cs
from msgspec import UNSET, Meta, UnsetType

from fusebd.block.driver import Child, Node, parse_blockdev, register
from fusebd.block.foreignformat import (
    Extent,
    ForeignFormat,
    Kind,
    read_bytes,
    read_struct,
    refuse_writing,
)
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef, Json
from fusebd.block.pagedtable import PagedTable
from fusebd.block.perms import Role
from fusebd.errors import BlockIOError, ImageError, OpenError
from fusebd.ondisk import vmdk as ondisk

_SECTOR = ondisk.SECTOR_SIZE
#: grain tables whose pages are kept, of each extent
_MAX_TABLES = 16
#: where the descriptor of an image that has all in one file is, and how much of it is looked at
_EMBEDDED_AT, _EMBEDDED_LENGTH = _SECTOR, 20 * _SECTOR
_MAX_NAME = 1023
#: more of a disk than that is not to be had
_MAX_SECTORS = (2**63 - 1) // _SECTOR


class VmdkOptions(BlockdevOptions, frozen=True, kw_only=True):
    file: Annotated[BlockdevRef, Meta(description="node with the image or its descriptor")]
    backing: Annotated[
        BlockdevRef | UnsetType | None, Meta(description="the backing node; null or empty: none; default: the image's")
    ] = UNSET


@dataclass(slots=True)
class _Flat:
    """*sectors* of the disk, as they are in *file* from byte *offset* on."""

    file: Child
    sectors: int
    offset: int


@dataclass(slots=True)
class _Sparse:
    """*sectors* of the disk in grains of *grain* bytes; *directory* has where the tables of *entries* grains are."""

    file: Child
    sectors: int
    grain: int
    entries: int
    directory: PagedTable
    compressed: bool = False
    markers: bool = False
    zeroed: bool = False
    #: of seSparse: the first sector of the grain tables, and that of the grains
    bases: tuple[int, int] | None = None


@register("vmdk", VmdkOptions)
class Vmdk(ForeignFormat):
    """One open image."""

    def __init__(self, node: Node, file: Child) -> None:
        super().__init__(node)
        self._file = file
        self._parts: list[_Flat | _Sparse] = []
        self._ends: list[int] = []  #: where the parts end, in bytes
        self._tables: dict[tuple[int, int], PagedTable] = {}
        self._decompressed: tuple[Child | None, int, memoryview] = None, 0, memoryview(b"")
        self.create_type = ""

    @classmethod
    def probe(cls, data: bytes, name: str) -> int:
        if data[:4] in (ondisk.SPARSE_MAGIC, ondisk.COWD_MAGIC):
            return 100
        for line in data.split(b"\n"):
            if line.startswith(b"#") or (line.startswith(b" ") and not line.strip(b" \r")):
                continue
            return 100 if line.rstrip(b"\r") in (b"version=1", b"version=2", b"version=3") else 0
        return 0

    @classmethod
    async def open(cls, opening: Opening, options: VmdkOptions) -> Vmdk:
        refuse_writing(opening)
        file = await opening.child("file", options.file, Role.IMAGE)
        driver = cls(opening.node, file)
        magic = await _magic(file)
        if magic in (ondisk.SPARSE_MAGIC, ondisk.COWD_MAGIC):
            await driver._open_sparse(opening, file, magic)
            head = bytes(await read_bytes(file, _EMBEDDED_AT, _EMBEDDED_LENGTH))
        else:
            head = await _descriptor(file, 0)
            await driver._open_described(opening, head)
        driver.length = driver._ends[-1] if driver._ends else 0
        driver.backing_name = _parent(head[:_EMBEDDED_LENGTH])
        driver.backing = await opening.backing(options.backing, driver.backing_name, "vmdk", file.node)
        return driver

    # -- opening --------------------------------------------------------------------------------

    def _add(self, part: _Flat | _Sparse) -> None:
        begin = self._ends[-1] if self._ends else 0
        if part.sectors > _MAX_SECTORS - begin // _SECTOR:
            raise ImageError("Could not open image: File too large", errno=errno.EFBIG)
        self._parts.append(part)
        self._ends.append(begin + part.sectors * _SECTOR)

    def _add_sparse(
        self,
        file: Child,
        sectors: int,
        *,
        grain_sectors: int,
        entries: int,
        directory: tuple[int, int],
        width: Literal[4, 8] = 4,
    ) -> _Sparse:
        """A sparse part, whose *directory* is (byte offset, entries)."""
        if grain_sectors > ondisk.MAX_GRAIN_SECTORS or not grain_sectors or not entries:
            raise ImageError("Invalid granularity, image may be corrupt", errno=errno.EFBIG)
        if directory[1] > ondisk.MAX_DIRECTORY_ENTRIES:
            raise ImageError("L1 size too big", errno=errno.EFBIG)
        table = PagedTable(file, *directory, width=width, order="little")
        part = _Sparse(file, sectors, grain_sectors * _SECTOR, entries, table)
        self._add(part)
        return part

    async def _open_sparse(self, opening: Opening, file: Child, magic: bytes) -> None:
        if magic == ondisk.COWD_MAGIC:
            header = await read_struct(file, 0, ondisk.COWD_HEADER, ondisk.COWD_HEADER_LENGTH)
            self._add_sparse(
                file,
                header.disk_sectors,
                grain_sectors=header.granularity,
                entries=ondisk.COWD_TABLE_ENTRIES,
                directory=(header.directory_offset * _SECTOR, header.directory_size),
            )
        elif magic == ondisk.SPARSE_MAGIC:
            await self._open_hosted(opening, file)
        else:
            raise ImageError("Image not in VMDK format")

    async def _open_hosted(self, opening: Opening, file: Child) -> None:
        header = await read_struct(file, 0, ondisk.SPARSE_HEADER, ondisk.SPARSE_HEADER_LENGTH)
        if not header.capacity and header.descriptor_offset:
            if file is not self._file:
                raise ImageError("invalid VMDK image descriptor")
            await self._open_described(opening, await _descriptor(file, header.descriptor_offset * _SECTOR))
            return
        self.create_type = self.create_type or "monolithicSparse"
        if header.directory_offset == ondisk.DIRECTORY_AT_END:
            header = await _footer(file)
        compressed = header.compression == ondisk.COMPRESSION_DEFLATE
        if header.version > ondisk.MAX_VERSION:
            raise ImageError(f"Unsupported VMDK version {header.version}", errno=errno.ENOTSUP)
        if header.entries_per_table > ondisk.MAX_TABLE_ENTRIES:
            raise ImageError("L2 table size too big")
        sectors_per_entry = header.entries_per_table * header.granularity & 0xFFFFFFFF
        if not sectors_per_entry:
            raise ImageError("L1 entry size is invalid")
        if file.node.driver.length < header.grain_offset * _SECTOR:
            raise ImageError(f"File truncated, expecting at least {header.grain_offset * _SECTOR} bytes")
        part = self._add_sparse(
            file,
            header.capacity,
            grain_sectors=header.granularity,
            entries=header.entries_per_table,
            directory=(header.directory_offset * _SECTOR, -(-header.capacity // sectors_per_entry)),
        )
        part.compressed = compressed
        part.markers = bool(header.flags & ondisk.FLAG_MARKERS)
        part.zeroed = bool(header.flags & ondisk.FLAG_ZERO_GRAIN)
        if compressed:
            self.create_type = "streamOptimized"

    async def _open_sesparse(self, file: Child) -> None:
        header = await read_struct(file, 0, ondisk.SESPARSE_HEADER, ondisk.SESPARSE_HEADER_LENGTH)
        if header.magic != ondisk.SESPARSE_MAGIC:
            raise ImageError(f"Bad const header magic: {header.magic:#018x}")
        for wrong, what in (
            (header.version != ondisk.SESPARSE_VERSION, f"version: {header.version:#018x}"),
            (header.grain_size != ondisk.SESPARSE_GRAIN_SECTORS, f"grain size: {header.grain_size}"),
            (header.grain_table_size != ondisk.SESPARSE_TABLE_SECTORS, f"grain table size: {header.grain_table_size}"),
            (header.flags, f"flags: {header.flags:#018x}"),
            (any(header.reserved), "reserved bits: " + " ".join(f"{bits:#018x}" for bits in header.reserved)),
            (any(header.padding), "non-zero const header padding"),
        ):
            if wrong:
                raise ImageError(f"Unsupported {what}", errno=errno.ENOTSUP)
        at = header.volatile_header_offset * _SECTOR
        volatile = await read_struct(file, at, ondisk.SESPARSE_VOLATILE_HEADER, ondisk.SESPARSE_HEADER_LENGTH)
        if volatile.magic != ondisk.SESPARSE_VOLATILE_MAGIC:
            raise ImageError(f"Bad volatile header magic: {volatile.magic:#018x}")
        if volatile.replay_journal:
            raise ImageError("Image is dirty, Replaying journal not supported", errno=errno.ENOTSUP)
        if any(volatile.padding):
            raise ImageError("Unsupported non-zero volatile header padding", errno=errno.ENOTSUP)
        part = self._add_sparse(
            file,
            header.capacity,
            grain_sectors=header.grain_size,
            entries=header.grain_table_size * _SECTOR // 8,
            directory=(header.directory_offset * _SECTOR, header.directory_size * _SECTOR // 8),
            width=8,
        )
        part.bases = header.tables_offset, header.grains_offset

    async def _open_described(self, opening: Opening, descriptor: bytes) -> None:
        """Open the files that *descriptor* names."""
        kind = ondisk.described(descriptor, "createType")
        if kind is None or len(kind) > 127:
            raise ImageError("invalid VMDK image descriptor")
        name = kind.decode(errors="replace")
        if name not in ondisk.CREATE_TYPES:
            raise ImageError(f"Unsupported image type '{name}'", errno=errno.ENOTSUP)
        self.create_type = name
        try:
            lines = ondisk.extent_lines(descriptor)
        except ValueError as error:
            raise ImageError(f"Invalid extent line: {error}") from None
        for number, line in enumerate(lines):
            role = Role.DATA if line.type in ondisk.FLAT_TYPES else Role.IMAGE & ~Role.PRIMARY
            file = await self._open_extent(opening, f"extents.{number}", os.fsdecode(line.name), role)
            if line.type in ondisk.FLAT_TYPES:
                self._add(_Flat(file, line.sectors, line.start * _SECTOR))
            elif line.type == "SESPARSE":
                await self._open_sesparse(file)
            else:
                await self._open_sparse(opening, file, await _magic(file))

    async def _open_extent(self, opening: Opening, name: str, filename: str, role: Role) -> Child:
        if not os.path.isabs(filename):
            base = self._file.node.driver.filename
            if not base or base.startswith("json:"):
                raise OpenError(f"Cannot use relative paths with VMDK descriptor file '{base}'")
            filename = os.path.join(os.path.dirname(base), filename)
        driver = "host_device" if _is_device(filename) else "file"
        ref = BlockdevRef({"driver": driver, "filename": filename})
        ref.options = parse_blockdev(ref.raw)
        return await opening.child(name, ref, role)

    # -- reading --------------------------------------------------------------------------------

    async def extent(self, offset: int, length: int) -> Extent:
        number = bisect_right(self._ends, offset)
        part = self._parts[number]
        begin = self._ends[number] - part.sectors * _SECTOR
        length = min(length, self._ends[number] - offset)
        if isinstance(part, _Flat):
            return Extent(Kind.DATA, length, part.file, part.offset + offset - begin, recurse=True)
        grain, start = divmod(offset - begin, part.grain)
        index, at = divmod(grain, part.entries)
        if index >= part.directory.count:
            raise self._broken(offset, "the grain directory ends before the disk")
        table = await self._table(number, part, index, offset)
        if table is None:
            return Extent(Kind.UNALLOCATED, min(length, (part.entries - at) * part.grain - start))
        length = min(length, part.grain - start)
        entry = await table.get(at)
        sector = entry if part.bases is None else self._sesparse_sector(part, entry, offset)
        if not sector:
            return Extent(Kind.UNALLOCATED, length)
        if sector < 0 or (part.zeroed and sector == ondisk.ZEROED_GRAIN):
            return Extent(Kind.ZERO, length)
        if part.compressed:
            return Extent(Kind.COMPRESSED, length, part.file, sector * _SECTOR, start)
        return Extent(Kind.DATA, length, part.file, sector * _SECTOR + start)

    async def _table(self, number: int, part: _Sparse, index: int, offset: int) -> PagedTable | None:
        """Grain table *index* of *part*, which is the one with that *number*; None if there is none."""
        key = number, index
        table = self._tables.pop(key, None)
        if table is None:
            sector = await part.directory.get(index)
            if not sector:
                return None
            if part.bases is not None:
                if sector >> 32 != 0x10000000:
                    raise self._broken(offset, f"grain directory entry {sector:#x} is invalid")
                sector = part.bases[0] + (sector & 0xFFFFFFFF) * part.entries * 8 // _SECTOR
            width: Literal[4, 8] = 4 if part.bases is None else 8
            table = PagedTable(part.file, sector * _SECTOR, part.entries, width=width, order="little")
            while len(self._tables) >= _MAX_TABLES:
                del self._tables[next(iter(self._tables))]
        self._tables[key] = table
        return table

    def _sesparse_sector(self, part: _Sparse, entry: int, offset: int) -> int:
        """Where the grain of the seSparse *entry* is; 0 if nowhere, -1 if it reads as zeroes."""
        assert part.bases is not None
        kind = entry >> 60
        if not entry:
            return 0
        if kind in (1, 2):
            return -1
        if kind != 3:
            raise self._broken(offset, f"grain table entry {entry:#x} is invalid")
        grain = (entry & 0x0FFF000000000000) >> 48 | (entry & 0x0000FFFFFFFFFFFF) << 12
        return part.bases[1] + grain * part.grain // _SECTOR

    async def decompressed(self, extent: Extent) -> memoryview:
        file, offset, data = self._decompressed
        if file is extent.file and offset == extent.offset:
            return data
        assert extent.file is not None
        part = next(part for part in self._parts if isinstance(part, _Sparse) and part.file is extent.file)
        await extent.file.announce("read_compressed")
        # two grains, because data that do not compress are longer than they were
        raw = memoryview(await read_bytes(extent.file, extent.offset, 2 * part.grain))
        size = part.grain
        if part.markers:
            size = ondisk.GRAIN_MARKER.parse(raw[: ondisk.GRAIN_MARKER_LENGTH]).size
            raw = raw[ondisk.GRAIN_MARKER_LENGTH :]
        if not size or size > 2 * part.grain:
            raise self._broken(extent.offset, "the length of a compressed grain is invalid")
        stream = zlib.decompressobj()
        try:
            data = memoryview(stream.decompress(raw[:size], part.grain))
        except zlib.error as error:
            raise self._broken(extent.offset, f"a compressed grain is damaged: {error}") from None
        if len(data) < extent.start + extent.length:
            raise self._broken(extent.offset, "a compressed grain is too short")
        self._decompressed = extent.file, extent.offset, data
        return data

    def _broken(self, offset: int, reason: str) -> BlockIOError:
        return BlockIOError(errno.EIO, node_name=self.node.name, operation="read", offset=offset, reason=reason)

    # -- what is shown --------------------------------------------------------------------------

    def format_info(self) -> dict[str, Json]:
        info: dict[str, Json] = {"dirty-flag": False}
        sparse = [part for part in self._parts if isinstance(part, _Sparse)]
        if sparse:
            info["cluster-size"] = sparse[0].grain
        if self.backing_name:
            info["backing-filename"] = self.backing_name
            info["backing-filename-format"] = "vmdk"
        return info


def _is_device(filename: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(filename).st_mode)
    except (OSError, ValueError):  # opening it will say what is wrong
        return False


async def _magic(file: Child) -> bytes:
    if file.node.driver.length < 4:
        raise ImageError("File is too small, not a valid image")
    return bytes(await read_bytes(file, 0, 4))


async def _descriptor(file: Child, offset: int) -> bytes:
    """The descriptor that is, or begins, at byte *offset* of *file*."""
    length = min(max(file.node.driver.length - offset, 0), ondisk.MAX_DESCRIPTOR)
    return bytes(await read_bytes(file, offset, length)).partition(b"\0")[0]


async def _footer(file: Child) -> cs.Container:
    """The header in the last sector but one, which is framed by markers."""
    data = bytes(
        await read_bytes(file, max(file.node.driver.length // _SECTOR * _SECTOR - 3 * _SECTOR, 0), 3 * _SECTOR)
    )
    header = ondisk.SPARSE_HEADER.parse(data[_SECTOR : 2 * _SECTOR])
    before = ondisk.MARKER.parse(data[: ondisk.MARKER_LENGTH])
    after = ondisk.MARKER.parse(data[2 * _SECTOR : 2 * _SECTOR + ondisk.MARKER_LENGTH])
    if (
        header.magic != ondisk.SPARSE_MAGIC
        or (before.size, before.type) != (0, ondisk.MARKER_FOOTER)
        or (after.value, after.size, after.type) != (0, 0, ondisk.MARKER_END_OF_STREAM)
    ):
        raise ImageError("Invalid footer")
    return header


def _parent(descriptor: bytes) -> str:
    """The backing file that *descriptor* names, "" if it names none."""
    if b"parentFileNameHint" not in descriptor:
        return ""
    name = ondisk.described(descriptor, "parentFileNameHint")
    if name is None or len(name) > _MAX_NAME:
        raise ImageError("Could not open image: Invalid argument")
    return os.fsdecode(name)
