"""Image formats that are read and never written: what is common to their drivers.

A driver says what a range of the disk is made of (``Extent``); how that is read, and what block status says about it,
is the same for all.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from enum import Enum, auto

import construct as cs

from fusebd.block.child import Buffers, Child, copy_into, fill_zeroes, nbytes, slice_buffers
from fusebd.block.driver import BlockStatus, FormatDriver, Status
from fusebd.block.opening import Opening
from fusebd.errors import ImageError, OpenError


class Kind(Enum):
    """Bytes of a file; zeroes; nothing in this image; bytes that have to be decompressed."""

    DATA = auto()
    ZERO = auto()
    UNALLOCATED = auto()
    COMPRESSED = auto()


@dataclass(frozen=True, slots=True)
class Extent:
    """What *length* bytes of a disk are: *file* and *offset* say where DATA is.

    COMPRESSED begins at byte *start* of a cluster, whose data are at *offset*.  With *recurse*, *file* may know better
    whether DATA are zeroes.
    """

    kind: Kind
    length: int
    file: Child | None = None
    offset: int = 0
    start: int = 0
    recurse: bool = False


def refuse_writing(opening: Opening) -> None:
    """Nothing can be written: the node is read-only, or becomes so if auto-read-only allows it.  Raises OpenError."""
    name = opening.node.driver_name
    opening.fall_back_to_read_only(
        OpenError(f"Images of the format '{name}' cannot be written: read-only=on, or auto-read-only=on, is needed")
    )


async def read_bytes(file: Child, offset: int, length: int) -> bytearray:
    """*length* bytes of *file*; zeroes past its end.  Suspends where it does.  Raises BlockIOError."""
    data = bytearray(length)
    await file.preadv(offset, (memoryview(data),))
    return data


async def read_struct(file: Child, offset: int, struct: cs.Construct, length: int) -> cs.Container:
    """The *struct* of *length* bytes at byte *offset* of *file*.  Raises ImageError if it cannot be parsed."""
    try:
        return struct.parse(await read_bytes(file, offset, length))
    except cs.ConstructError as error:
        raise ImageError(f"Malformed structure at offset {offset}: {str(error).splitlines()[-1]}") from None


class ForeignFormat(FormatDriver):
    """Reads by what ``extent`` says; suspends where the children do."""

    backing: Child | None = None
    backing_name = ""

    @abstractmethod
    async def extent(self, offset: int, length: int) -> Extent:
        """What the disk is made of from byte *offset* on: *length* bytes, or as many of them as are alike."""

    async def decompressed(self, extent: Extent) -> memoryview:
        """The bytes of the COMPRESSED *extent*'s cluster."""
        raise NotImplementedError

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        size, done = nbytes(bufs), 0
        while done < size:
            extent = await self.extent(offset + done, size - done)
            part = slice_buffers(bufs, done, done + extent.length)
            if extent.kind is Kind.DATA:
                assert extent.file is not None
                if "read_aio" in extent.file.events:
                    await extent.file.announce("read_aio")
                await extent.file.preadv(extent.offset, part)
            elif extent.kind is Kind.COMPRESSED:
                copy_into(part, (await self.decompressed(extent))[extent.start : extent.start + extent.length])
            elif extent.kind is Kind.UNALLOCATED and self.backing is not None:
                await self.backing.preadv(offset + done, part)
            else:
                fill_zeroes(part)
            done += extent.length

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        extent = await self.extent(offset, length)
        if extent.kind is Kind.DATA:
            assert extent.file is not None
            flags = Status.DATA | Status.OFFSET_VALID | (Status.RECURSE if extent.recurse else Status.NONE)
            return BlockStatus(flags, extent.length, extent.offset, extent.file.node)
        flags = {
            Kind.ZERO: Status.ZERO,
            Kind.UNALLOCATED: Status.NONE,
            Kind.COMPRESSED: Status.DATA | Status.COMPRESSED,
        }[extent.kind]
        return BlockStatus(flags, extent.length)
