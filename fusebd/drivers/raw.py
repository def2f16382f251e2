"""raw: a window of its child, or all of it, without any structure.

Options: QAPI BlockdevOptionsRaw.  Behaviour: QEMU block/raw-format.c.
"""

from __future__ import annotations

import errno
from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from fusebd.block.driver import (
    BlockStatus,
    Buffers,
    Child,
    FormatDriver,
    Node,
    Preallocation,
    Status,
    nbytes,
    register,
)
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef, Int
from fusebd.block.perms import Perm, Role, default_perms
from fusebd.errors import BlockIOError, FusebdError, OptionError

_SECTOR = 512


class RawOptions(BlockdevOptions, frozen=True, kw_only=True):
    file: Annotated[BlockdevRef, Meta(description="the node whose bytes are shown")]
    offset: Annotated[Int, Meta(description="first byte of the window")] = 0
    size: Annotated[Int | UnsetType, Meta(description="length of the window in bytes, a multiple of 512")] = UNSET


def _window(options: RawOptions) -> bool:
    return options.offset != 0 or options.size is not UNSET


@register("raw", RawOptions)
class Raw(FormatDriver):
    """Every request goes to ``file``, moved by the offset.  Announces read_aio and write_aio to it."""

    supports_fua = True
    strong_options = frozenset({"offset", "size"})

    def __init__(self, node: Node, file: Child, options: RawOptions) -> None:
        super().__init__(node)
        self.file = file
        self._offset = options.offset
        self._size = None if options.size is UNSET else int(options.size)
        self.length = self._length_over(file)

    @classmethod
    async def open(cls, opening: Opening, options: RawOptions) -> Raw:
        size = None if options.size is UNSET else int(options.size)
        for name, value in (("offset", options.offset), ("size", size or 0)):
            if value < 0:
                raise OptionError(f"Value '{value}' is out of range for parameter '{name}'")
        role = Role.DATA | Role.PRIMARY if _window(options) else Role.FILTERED | Role.PRIMARY
        file = await opening.child("file", options.file, role)
        length = file.node.driver.length
        if options.offset > length:
            raise OptionError(
                f"Offset ({options.offset}) cannot be greater than size of the containing file ({length})"
            )
        if size is not None and length - options.offset < size:
            raise OptionError(
                f"The sum of offset ({options.offset}) and size ({size}) has to be smaller or equal to the "
                f" actual size of the containing file ({length})"
            )
        if size is not None and size % _SECTOR:
            raise OptionError(f"Specified size is not multiple of {_SECTOR}")
        return cls(opening.node, file, options)

    @classmethod
    def probe(cls, data: bytes, name: str) -> int:
        return 1

    @classmethod
    def child_perm(cls, node: Node, child: str, role: Role, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        taken, given = default_perms(role, perm, shared, writable=not node.read_only)
        # There is no metadata that would have to be written or to grow when the parents do not ask for it.
        changes = Perm.WRITE | Perm.RESIZE
        return taken & ~changes | perm & changes, given

    def _length_over(self, file: Child) -> int:
        length = max(file.node.driver.length - self._offset, 0)
        return length if self._size is None else min(length, self._size)

    def child_resized(self, child: Child) -> None:
        self.node.set_length(self._length_over(child))

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        file = self.file
        if file.debug_event is not None:
            await file.debug_event("read_aio")
        await file.preadv(offset + self._offset, bufs)

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        file = self.file
        if self._size is not None and offset + nbytes(bufs) > self._size:
            raise self._failed("write", errno.ENOSPC)
        if file.debug_event is not None:
            await file.debug_event("write_aio")
        await file.pwritev(offset + self._offset, bufs, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self.file.pwrite_zeroes(offset + self._offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        await self.file.pdiscard(offset + self._offset, length)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        return BlockStatus(Status.RAW | Status.OFFSET_VALID, length, offset + self._offset, self.file.node)

    async def truncate(
        self, length: int, *, exact: bool = False, prealloc: Preallocation = "off", zero: bool = False
    ) -> None:
        if self._size is not None:
            raise self._failed("resize", errno.ENOTSUP, "Cannot resize fixed-size raw disks")
        await self.file.truncate(length + self._offset, exact=exact, prealloc=prealloc, zero=zero)

    def _failed(self, operation: str, code: int, reason: str = "") -> FusebdError:
        return BlockIOError(code, node_name=self.node.name, operation=operation, reason=reason)
