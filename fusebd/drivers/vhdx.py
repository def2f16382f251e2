"""vhdx: disk images of Hyper-V, dynamic and fixed, to be read.

An image whose log has changes that were not carried out is refused: reading it as it is would show what never was.

Options: QAPI BlockdevOptionsGenericFormat.  Layout: ``fusebd.ondisk.vhdx``.  Behaviour and messages: QEMU block/vhdx.c.
"""

from __future__ import annotations

import errno
from typing import Annotated

import construct as cs
import trio
from msgspec import Meta

from fusebd.block.driver import Child, Node, register
from fusebd.block.foreignformat import Extent, ForeignFormat, Kind, read_bytes, refuse_writing
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef, Json
from fusebd.block.pagedtable import PagedTable
from fusebd.block.perms import Role
from fusebd.errors import BlockIOError, ImageError, OpenError
from fusebd.ondisk import vhdx as ondisk

#: more of a log is not looked at
_MAX_LOG = 64 << 20


class VhdxOptions(BlockdevOptions, frozen=True, kw_only=True):
    file: Annotated[BlockdevRef, Meta(description="node with the image")]


@register("vhdx", VhdxOptions)
class Vhdx(ForeignFormat):
    """One open image."""

    def __init__(self, node: Node, file: Child, table: PagedTable, length: int, block_size: int) -> None:
        super().__init__(node)
        self._file, self._table, self._block_size = file, table, block_size
        #: blocks after which the table has an entry for a bitmap of sectors
        self._chunk = ondisk.MAX_SECTORS_PER_BLOCK * ondisk.SECTOR_SIZE // block_size
        self.length = length

    @classmethod
    def probe(cls, data: bytes, name: str) -> int:
        return 100 if data[:8] == ondisk.SIGNATURE else 0

    @classmethod
    async def open(cls, opening: Opening, options: VhdxOptions) -> Vhdx:
        refuse_writing(opening)
        file = await opening.child("file", options.file, Role.IMAGE)
        if await read_bytes(file, 0, 8) != ondisk.SIGNATURE:
            raise ImageError("Image not in VHDX format")
        header = await _read_header(file)
        if await _has_log(file, header):
            name = file.node.driver.filename
            raise OpenError(
                f"VHDX image file '{name}' opened read-only, but contains a log that needs to be replayed",
                errno=errno.EPERM,
                hint=f"To replay the log, run: qemu-img check -r all '{name}'",
            )
        regions = await _read_regions(file)
        bat, metadata = regions[ondisk.BAT], regions[ondisk.METADATA]
        length, block_size = await _read_metadata(file, metadata.file_offset)
        driver = cls(opening.node, file, _table(file, bat, length, block_size), length, block_size)
        await driver._check_places()
        return driver

    async def _check_places(self) -> None:
        """Raise ImageError if a block is not in the file."""
        end = self._file.node.driver.length
        index = -1
        for number in self._table.pages:
            await trio.lowlevel.checkpoint()
            for entry in await self._table.page(number):
                index += 1
                bitmaps, place = divmod(index, self._chunk + 1)
                if entry & ondisk.BAT_STATE_MASK != ondisk.FULLY_PRESENT or place == self._chunk:
                    continue
                offset = entry & ondisk.BAT_OFFSET_MASK
                # the last one may be there in part only
                needed = min(self._block_size, self.length - (index - bitmaps) * self._block_size)
                if offset + needed > end:
                    where = f"start offset {offset}" if offset >= end else f"end offset {offset + needed - 1}"
                    raise ImageError(
                        f"VHDX BAT entry {index} {where} points after end of file ({end})."
                        " Image has probably been truncated."
                    )

    async def extent(self, offset: int, length: int) -> Extent:
        block, start = divmod(offset, self._block_size)
        length = min(length, self._block_size - start)
        entry = await self._table.get(block + block // self._chunk)
        state = entry & ondisk.BAT_STATE_MASK
        if state in ondisk.EMPTY_STATES:
            return Extent(Kind.ZERO, length)
        if state != ondisk.FULLY_PRESENT:
            reason = f"block {block} is in state {state}"
            raise BlockIOError(errno.EIO, node_name=self.node.name, operation="read", offset=offset, reason=reason)
        return Extent(Kind.DATA, length, self._file, (entry & ondisk.BAT_OFFSET_MASK) + start)

    def format_info(self) -> dict[str, Json]:
        return {"cluster-size": self._block_size, "dirty-flag": False}


async def _read_header(file: Child) -> cs.Container:
    """The header that holds.  Raises ImageError if none does."""
    found = []
    for offset in ondisk.HEADER_OFFSETS:
        data = bytes(await read_bytes(file, offset, ondisk.HEADER_CHECKED))
        header = ondisk.HEADER.parse(data)
        right = header.signature == ondisk.HEADER_SIGNATURE and header.version == 1
        if right and ondisk.checksum(data) == header.checksum:
            found.append(header)
    if not found or (len(found) == 2 and found[0].sequence_number == found[1].sequence_number and found[0] != found[1]):
        raise ImageError("No valid VHDX header found")
    return max(found, key=lambda header: header.sequence_number)


async def _has_log(file: Child, header: cs.Container) -> bool:
    """Whether the log has an entry that may have to be carried out."""
    if not any(header.log_guid):
        return False
    if header.log_version != 0:
        raise ImageError(f"unsupported VHDX image (log version {header.log_version})")
    if not header.log_length or header.log_length % (1 << 20) or header.log_length > _MAX_LOG:
        raise ImageError(f"invalid VHDX image (log of {header.log_length} bytes)")
    log = memoryview(await read_bytes(file, header.log_offset, header.log_length))
    for at in range(0, len(log), ondisk.LOG_SECTOR):
        await trio.lowlevel.checkpoint()
        entry = ondisk.LOG_HEADER.parse(log[at : at + ondisk.LOG_HEADER_LENGTH])
        if entry.signature != ondisk.LOG_SIGNATURE or entry.log_guid != header.log_guid or not entry.sequence_number:
            continue
        length = entry.entry_length
        if not length or length % ondisk.LOG_SECTOR or length > len(log):
            continue
        whole = bytes(log[at : at + length]) + bytes(log[: max(at + length - len(log), 0)])
        if await trio.to_thread.run_sync(ondisk.checksum, whole) == entry.checksum:
            return True
    return False


async def _read_regions(file: Child) -> dict[bytes, cs.Container]:
    data = bytes(await read_bytes(file, ondisk.REGION_TABLE_OFFSET, ondisk.REGION_TABLE_LENGTH))
    header = ondisk.REGION_HEADER.parse(data)
    if header.signature != ondisk.REGION_SIGNATURE or header.entry_count > ondisk.MAX_REGIONS:
        raise ImageError("invalid VHDX image (no region table)")
    if ondisk.checksum(data) != header.checksum:
        raise ImageError("invalid VHDX image (wrong checksum of the region table)")
    regions: dict[bytes, cs.Container] = {}
    taken: list[tuple[int, int]] = []
    for number in range(header.entry_count):
        entry = ondisk.REGION_ENTRY.parse(data[ondisk.REGION_HEADER_LENGTH + number * ondisk.REGION_ENTRY_LENGTH :])
        start, end = entry.file_offset, entry.file_offset + entry.length
        if entry.guid in regions or any(start < other[1] and other[0] < end for other in taken):
            raise ImageError("invalid VHDX image (regions overlap)")
        if entry.guid not in (ondisk.BAT, ondisk.METADATA) and entry.data_bits & ondisk.REGION_ENTRY_REQUIRED:
            raise ImageError("unsupported VHDX image (unknown region)", errno=errno.ENOTSUP)
        regions[entry.guid] = entry
        taken.append((start, end))
    if not {ondisk.BAT, ondisk.METADATA} <= regions.keys():
        raise ImageError("invalid VHDX image (a region is missing)")
    return regions


async def _read_metadata(file: Child, offset: int) -> tuple[int, int]:
    """The length of the disk and that of a block, in bytes, by the metadata at byte *offset*."""
    data = bytes(await read_bytes(file, offset, ondisk.METADATA_TABLE_LENGTH))
    header = ondisk.METADATA_HEADER.parse(data)
    if header.signature != ondisk.METADATA_SIGNATURE or header.entry_count > ondisk.MAX_METADATA:
        raise ImageError("invalid VHDX image (no metadata)")
    items: dict[bytes, int] = {}
    for index in range(header.entry_count):
        at = ondisk.METADATA_HEADER_LENGTH + index * ondisk.METADATA_ENTRY_LENGTH
        entry = ondisk.METADATA_ENTRY.parse(data[at:])
        known = entry.item_id in ondisk.ITEMS or entry.item_id == ondisk.PARENT_LOCATOR
        if known and entry.item_id in items:
            raise ImageError("invalid VHDX image (a metadata item is there twice)")
        if not known and entry.data_bits & ondisk.METADATA_REQUIRED:
            raise ImageError("unsupported VHDX image (unknown metadata item)", errno=errno.ENOTSUP)
        items[entry.item_id] = offset + entry.offset
    if not items.keys() >= ondisk.ITEMS:
        raise ImageError("unsupported VHDX image (a metadata item is missing)", errno=errno.ENOTSUP)

    async def number(item: bytes, start: int, length: int) -> int:
        return int.from_bytes(await read_bytes(file, items[item] + start, length), "little")

    block_size, flags = await number(ondisk.FILE_PARAMETERS, 0, 4), await number(ondisk.FILE_PARAMETERS, 4, 4)
    length, sector = await number(ondisk.DISK_SIZE, 0, 8), await number(ondisk.LOGICAL_SECTOR, 0, 4)
    if flags & ondisk.HAS_PARENT:
        raise ImageError("unsupported VHDX image (it has a parent)", errno=errno.ENOTSUP)
    if not ondisk.MIN_BLOCK_SIZE <= block_size <= ondisk.MAX_BLOCK_SIZE or block_size & (block_size - 1):
        raise ImageError(f"invalid VHDX image (block size {block_size})")
    if sector != ondisk.SECTOR_SIZE:
        raise ImageError(f"unsupported VHDX image (sector size {sector})", errno=errno.ENOTSUP)
    if length > ondisk.MAX_DISK_SIZE:
        raise ImageError(f"invalid VHDX image (disk size {length})")
    return length // sector * sector, block_size


def _table(file: Child, region: cs.Container, length: int, block_size: int) -> PagedTable:
    """The block allocation table, which is in *region*."""
    chunk = ondisk.MAX_SECTORS_PER_BLOCK * ondisk.SECTOR_SIZE // block_size
    blocks = -(-length // block_size)
    count = blocks + max(blocks - 1, 0) // chunk
    if count > region.length // 8:
        raise ImageError("invalid VHDX image (the block allocation table is too short)")
    return PagedTable(file, region.file_offset, count, width=8, order="little")
