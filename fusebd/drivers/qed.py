"""qed: QEMU enhanced disks, to be read.

Options: QAPI BlockdevOptionsGenericCOWFormat.  Layout: ``fusebd.ondisk.qed``.  Behaviour and messages:
QEMU block/qed.c.
"""

from __future__ import annotations

import errno
import os
from typing import Annotated

import construct as cs
from msgspec import UNSET, Meta, UnsetType

from fusebd.block.driver import Child, Node, register
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
from fusebd.errors import BlockIOError, ImageError
from fusebd.ondisk import qed as ondisk

#: L2 tables whose pages are kept
_MAX_TABLES = 16


class QedOptions(BlockdevOptions, frozen=True, kw_only=True):
    file: Annotated[BlockdevRef, Meta(description="node with the image")]
    backing: Annotated[
        BlockdevRef | UnsetType | None, Meta(description="the backing node; null or empty: none; default: the image's")
    ] = UNSET


@register("qed", QedOptions)
class Qed(ForeignFormat):
    """One open image.  One that was not closed cleanly is read as it is."""

    def __init__(self, node: Node, file: Child, header: cs.Container) -> None:
        super().__init__(node)
        self._file, self._header = file, header
        self._entries = header.cluster_size * header.table_size // 8
        self._l1 = PagedTable(file, header.l1_table_offset, self._entries, width=8, order="little")
        self._tables: dict[int, PagedTable] = {}
        self.length = header.image_size

    @classmethod
    def probe(cls, data: bytes, name: str) -> int:
        return 100 if data[:4] == ondisk.MAGIC and len(data) >= ondisk.HEADER_LENGTH else 0

    @classmethod
    async def open(cls, opening: Opening, options: QedOptions) -> Qed:
        refuse_writing(opening)
        file = await opening.child("file", options.file, Role.IMAGE)
        header = await read_struct(file, 0, ondisk.HEADER, ondisk.HEADER_LENGTH)
        _check(header, file.node.driver.length)
        driver = cls(opening.node, file, header)
        if header.features & ondisk.BACKING_FILE:
            driver.backing_name = await _backing_name(file, header)
        raw = header.features & ondisk.BACKING_FORMAT_NO_PROBE
        driver.backing = await opening.backing(options.backing, driver.backing_name, "raw" if raw else None, file.node)
        return driver

    async def extent(self, offset: int, length: int) -> Extent:
        size = self._header.cluster_size
        cluster, start = divmod(offset, size)
        index, at = divmod(cluster, self._entries)
        table_offset = await self._l1.get(index)
        if not table_offset:
            return Extent(Kind.UNALLOCATED, min(length, (self._entries - at) * size - start))
        length = min(length, size - start)
        place = await self._table(table_offset).get(at)
        if not place:
            return Extent(Kind.UNALLOCATED, length)
        if place == ondisk.ZERO_CLUSTER:
            return Extent(Kind.ZERO, length)
        if place % size or place >= self._file.node.driver.length:
            raise self._broken(offset, f"cluster offset {place:#x} is invalid")
        return Extent(Kind.DATA, length, self._file, place + start)

    def _table(self, offset: int) -> PagedTable:
        """The L2 table at byte *offset* of the file."""
        table = self._tables.pop(offset, None)
        if table is None:
            if offset % self._header.cluster_size or offset >= self._file.node.driver.length:
                raise self._broken(0, f"table offset {offset:#x} is invalid")
            table = PagedTable(self._file, offset, self._entries, width=8, order="little")
            while len(self._tables) >= _MAX_TABLES:
                del self._tables[next(iter(self._tables))]
        self._tables[offset] = table
        return table

    def _broken(self, offset: int, reason: str) -> BlockIOError:
        return BlockIOError(errno.EIO, node_name=self.node.name, operation="read", offset=offset, reason=reason)

    def format_info(self) -> dict[str, Json]:
        header = self._header
        info: dict[str, Json] = {
            "cluster-size": header.cluster_size,
            "dirty-flag": bool(header.features & ondisk.NEED_CHECK),
        }
        if self.backing_name:
            info["backing-filename"] = self.backing_name
            if header.features & ondisk.BACKING_FORMAT_NO_PROBE:
                info["backing-filename-format"] = "raw"
        return info


def _check(header: cs.Container, file_length: int) -> None:
    if header.magic != ondisk.MAGIC:
        raise ImageError("Image not in QED format")
    if unknown := header.features & ~ondisk.FEATURES_KNOWN:
        raise ImageError(f"Unsupported QED features: {unknown:x}", errno=errno.ENOTSUP)
    size, table_size = header.cluster_size, header.table_size
    if not ondisk.MIN_CLUSTER_SIZE <= size <= ondisk.MAX_CLUSTER_SIZE or size & (size - 1):
        raise ImageError("QED cluster size is invalid")
    if not ondisk.MIN_TABLE_SIZE <= table_size <= ondisk.MAX_TABLE_SIZE or table_size & (table_size - 1):
        raise ImageError("QED table size is invalid")
    entries = size * table_size // 8
    if header.image_size % ondisk.SECTOR_SIZE or header.image_size > entries * entries * size:
        raise ImageError("QED image size is invalid")
    if header.image_size > 1 << 62:
        raise ImageError("QED image size is invalid")
    first, last = header.l1_table_offset, header.l1_table_offset + (table_size - 1) * size
    if first % size or not header.header_size * size <= first or last >= file_length // size * size:
        raise ImageError("QED table offset is invalid")
    if header.header_size > 0xFFFFFFFF // size:
        raise ImageError("QED header size is too large")


async def _backing_name(file: Child, header: cs.Container) -> str:
    offset, length = header.backing_filename_offset, header.backing_filename_size
    if offset + length > header.cluster_size * header.header_size:
        raise ImageError("QED backing filename offset is invalid")
    if length > ondisk.MAX_BACKING_NAME:
        raise ImageError("Failed to read backing filename")
    return os.fsdecode(bytes(await read_bytes(file, offset, length)).partition(b"\0")[0])
