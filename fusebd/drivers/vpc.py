"""vpc: disk images of Virtual PC and Hyper-V (VHD), dynamic and fixed, to be read.

Options: QAPI BlockdevOptionsGenericFormat.  Layout: ``fusebd.ondisk.vpc``.  Behaviour and messages: QEMU block/vpc.c.
"""

from __future__ import annotations

import errno
from typing import Annotated

import construct as cs
import trio
from msgspec import Meta

from fusebd.block.driver import Child, Node, register
from fusebd.block.foreignformat import Extent, ForeignFormat, Kind, read_bytes, read_struct, refuse_writing
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef, Json
from fusebd.block.pagedtable import PagedTable
from fusebd.block.perms import Role
from fusebd.errors import ImageError
from fusebd.ondisk import vpc as ondisk

_INT_MAX = 2**31 - 1


class VpcOptions(BlockdevOptions, frozen=True, kw_only=True):
    file: Annotated[BlockdevRef, Meta(description="node with the image")]


@register("vpc", VpcOptions)
class Vpc(ForeignFormat):
    """One open image; *table* None means that all of the disk is in the file, from its first byte on."""

    def __init__(self, node: Node, file: Child, length: int, table: PagedTable | None, block_size: int) -> None:
        super().__init__(node)
        self._file, self._table, self._block_size = file, table, block_size
        self._bitmap_size = -(-(block_size // (8 * ondisk.SECTOR_SIZE)) // 512) * 512
        self.length = length

    @classmethod
    def probe(cls, data: bytes, name: str) -> int:
        return 100 if data[:8] == ondisk.COOKIE else 0

    @classmethod
    async def open(cls, opening: Opening, options: VpcOptions) -> Vpc:
        refuse_writing(opening)
        file = await opening.child("file", options.file, Role.IMAGE)
        footer, dynamic = await _read_footer(file)
        sectors = footer.cylinders * footer.heads * footer.sectors_per_cylinder
        if footer.creator_app not in ondisk.GEOMETRY_APPS or sectors == ondisk.MAX_GEOMETRY:
            sectors = footer.current_size // ondisk.SECTOR_SIZE
        if sectors > ondisk.MAX_SECTORS:
            raise ImageError("Could not open image: File too large", errno=errno.EFBIG)
        length = sectors * ondisk.SECTOR_SIZE
        if not dynamic:
            return cls(opening.node, file, length, None, ondisk.SECTOR_SIZE)
        header = await read_struct(file, footer.data_offset, ondisk.DYNAMIC_HEADER, ondisk.DYNAMIC_HEADER_LENGTH)
        if header.magic != ondisk.DYNAMIC_COOKIE:
            raise ImageError("Invalid header magic")
        size, entries = header.block_size, header.max_table_entries
        if size & (size - 1) or size < ondisk.SECTOR_SIZE:
            raise ImageError(f"Invalid block size {size}")
        if entries * size < length:
            raise ImageError("Page table too small")
        if entries > _INT_MAX // 4:
            raise ImageError(f"Max Table Entries too large ({entries})")
        table = PagedTable(file, header.table_offset, entries, width=4, order="big")
        driver = cls(opening.node, file, length, table, size)
        await driver._check_places()
        return driver

    async def _check_places(self) -> None:
        """Raise ImageError if a block that the disk needs is not in the file."""
        assert self._table is not None
        limit = self._file.node.driver.length - self._bitmap_size - self._block_size
        left = -(-self.length // self._block_size)
        for number in self._table.pages:
            await trio.lowlevel.checkpoint()
            page = (await self._table.page(number))[:left]
            left -= len(page)
            if any(place * ondisk.SECTOR_SIZE > limit and place != ondisk.UNALLOCATED for place in page):
                raise ImageError(
                    "block-vpc: free_data_block_offset points after the end of file. The image has been truncated."
                )
            if not left:
                return

    async def extent(self, offset: int, length: int) -> Extent:
        if self._table is None:
            return Extent(Kind.DATA, length, self._file, offset, recurse=True)
        block, start = divmod(offset, self._block_size)
        length = min(length, self._block_size - start)
        place = await self._table.get(block)
        if place == ondisk.UNALLOCATED:
            return Extent(Kind.UNALLOCATED, length)
        return Extent(Kind.DATA, length, self._file, place * ondisk.SECTOR_SIZE + self._bitmap_size + start)

    def format_info(self) -> dict[str, Json]:
        info: dict[str, Json] = {"dirty-flag": False}
        if self._table is not None:
            info["cluster-size"] = self._block_size
        return info


async def _read_footer(file: Child) -> tuple[cs.Container, bool]:
    """The footer, and whether the image is a dynamic one: these have a copy of it where the file begins."""
    data = await read_bytes(file, 0, ondisk.FOOTER_LENGTH)
    dynamic = data[:8] == ondisk.COOKIE
    if not dynamic:
        end = file.node.driver.length
        if end < ondisk.FOOTER_LENGTH:
            raise ImageError("File too small for a VHD header")
        data = await read_bytes(file, end - ondisk.FOOTER_LENGTH, ondisk.FOOTER_LENGTH)
    footer = ondisk.FOOTER.parse(data)
    if not dynamic and (footer.creator != ondisk.COOKIE or footer.type != ondisk.TYPE_FIXED):
        raise ImageError("invalid VPC image")
    if ondisk.checksum(data) != footer.checksum:
        raise ImageError("Incorrect header checksum")
    return footer, dynamic
