"""vdi: disk images of VirtualBox, dynamic and fixed, to be read.

Options: QAPI BlockdevOptionsGenericFormat.  Layout: ``fusebd.ondisk.vdi``.  Behaviour and messages: QEMU block/vdi.c.
"""

from __future__ import annotations

import errno
from typing import Annotated

import construct as cs
from msgspec import Meta

from fusebd.block.driver import Child, Node, register
from fusebd.block.foreignformat import Extent, ForeignFormat, Kind, read_struct, refuse_writing
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef, Json
from fusebd.block.pagedtable import PagedTable
from fusebd.block.perms import Role
from fusebd.errors import ImageError
from fusebd.ondisk import vdi as ondisk


class VdiOptions(BlockdevOptions, frozen=True, kw_only=True):
    file: Annotated[BlockdevRef, Meta(description="node with the image")]


@register("vdi", VdiOptions)
class Vdi(ForeignFormat):
    """One open image."""

    def __init__(self, node: Node, file: Child, table: PagedTable, header: cs.Container, length: int) -> None:
        super().__init__(node)
        self._file, self._table, self._data_offset = file, table, header.offset_data
        self._is_static = header.image_type == ondisk.TYPE_STATIC
        self.length = length

    @classmethod
    def probe(cls, data: bytes, name: str) -> int:
        at = ondisk.SIGNATURE_OFFSET
        return 100 if int.from_bytes(data[at : at + 4], "little") == ondisk.SIGNATURE else 0

    @classmethod
    async def open(cls, opening: Opening, options: VdiOptions) -> Vdi:
        refuse_writing(opening)
        file = await opening.child("file", options.file, Role.IMAGE)
        header = await read_struct(file, 0, ondisk.HEADER, ondisk.HEADER_LENGTH)
        if header.disk_size > ondisk.MAX_DISK_SIZE:
            limit = ondisk.MAX_DISK_SIZE
            raise _unsupported(
                f"Unsupported VDI image size (size is {header.disk_size:#x}, max supported is {limit:#x})"
            )
        if header.signature != ondisk.SIGNATURE:
            raise ImageError(f"Image not in VDI format (bad signature {header.signature:08x})")
        size = -(-header.disk_size // ondisk.SECTOR_SIZE) * ondisk.SECTOR_SIZE
        room = header.blocks_in_image * header.block_size
        for wrong, what in (
            (header.version != ondisk.VERSION_1_1, f"version {header.version >> 16}.{header.version & 0xFFFF}"),
            (header.offset_bmap % ondisk.SECTOR_SIZE, f"unaligned block map offset {header.offset_bmap:#x}"),
            (header.offset_data % ondisk.SECTOR_SIZE, f"unaligned data offset {header.offset_data:#x}"),
            (header.sector_size != ondisk.SECTOR_SIZE, f"sector size {header.sector_size} is not {ondisk.SECTOR_SIZE}"),
            (header.block_size != ondisk.BLOCK_SIZE, f"block size {header.block_size} is not {ondisk.BLOCK_SIZE}"),
            (size > room, f"disk size {size}, image bitmap has room for {room}"),
            (any(header.uuid_link), "non-NULL link UUID"),
            (any(header.uuid_parent), "non-NULL parent UUID"),
            (
                header.blocks_in_image > ondisk.MAX_BLOCKS,
                f"too many blocks {header.blocks_in_image}, max is {ondisk.MAX_BLOCKS}",
            ),
        ):
            if wrong:
                raise _unsupported(f"unsupported VDI image ({what})")
        table = PagedTable(file, header.offset_bmap, header.blocks_in_image, width=4, order="little")
        return cls(opening.node, file, table, header, size)

    async def extent(self, offset: int, length: int) -> Extent:
        block, start = divmod(offset, ondisk.BLOCK_SIZE)
        length = min(length, ondisk.BLOCK_SIZE - start)
        place = await self._table.get(block)
        if place >= ondisk.DISCARDED:
            return Extent(Kind.UNALLOCATED, length)
        at = self._data_offset + place * ondisk.BLOCK_SIZE + start
        return Extent(Kind.DATA, length, self._file, at, recurse=self._is_static)

    def format_info(self) -> dict[str, Json]:
        return {"cluster-size": ondisk.BLOCK_SIZE, "dirty-flag": False}


def _unsupported(message: str) -> ImageError:
    return ImageError(message, errno=errno.ENOTSUP)
