"""null-co, null-aio: a device of any length that takes every write and keeps nothing.

The two differ as they do in QEMU: null-co answers at once, null-aio only after a trip through the scheduler.
Reads give zeroes, whatever ``read-zeroes`` says: a buffer that is left as it is would show whoever reads what was
in it before.  The option decides what block status promises.

Options: QAPI BlockdevOptionsNull.  Behaviour: QEMU block/null.c.
"""

from __future__ import annotations

import errno
from typing import Annotated, ClassVar, TypeVar

import trio
from msgspec import UNSET, Meta, UnsetType

from fusebd.block.child import MAX_LENGTH, fill_zeroes
from fusebd.block.driver import BlockStatus, Buffers, ProtocolDriver, Status, register
from fusebd.block.naming import has_strong_options
from fusebd.block.node import Node
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, Int, Json
from fusebd.errors import OpenError, OptionError

N = TypeVar("N", bound="_Null")

_DEFAULT_SIZE = 1 << 30


class NullOptions(BlockdevOptions, frozen=True, kw_only=True):
    size: Annotated[Int | UnsetType, Meta(description="length of the node in bytes, 1 GiB if absent")] = UNSET
    latency_ns: Annotated[Int, Meta(description="nanoseconds that a request takes")] = 0
    read_zeroes: Annotated[
        bool | UnsetType, Meta(description="whether block status says that the node reads as zeroes")
    ] = UNSET


def _size(options: NullOptions) -> int:
    return _DEFAULT_SIZE if options.size is UNSET else int(options.size)


class _Null(ProtocolDriver):
    """Reads, writes and flushes suspend for ``latency-ns``."""

    supports_fua = True
    strong_options: ClassVar[frozenset[str]] = frozenset({"size", "read-zeroes"})
    changeable: ClassVar[frozenset[str] | None] = frozenset()

    def __init__(self, node: Node, options: NullOptions) -> None:
        super().__init__(node)
        self.length = _size(options)
        self._latency = options.latency_ns / 1e9
        self._status = Status.OFFSET_VALID | Status.ALLOCATED
        if options.read_zeroes is True:
            self._status |= Status.ZERO

    @classmethod
    async def open(cls: type[N], opening: Opening, options: NullOptions) -> N:
        """Never suspends.  Raises OptionError, OpenError for a length or a latency that cannot be."""
        size = _size(options)
        if size < 0:
            raise OptionError(f"Value '{size}' is out of range for parameter 'size'")
        if size > MAX_LENGTH:
            raise OpenError.from_os("Could not refresh total sector count", OSError(errno.EFBIG, ""))
        if options.latency_ns < 0:
            raise OptionError("latency-ns is invalid")
        return cls(opening.node, options)

    @classmethod
    def parse_filename(cls, name: str) -> dict[str, Json]:
        only = f"{cls.protocol_prefix}://"
        if name != only:
            raise OptionError(f"The only allowed filename for this driver is '{only}'")
        return {}

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        fill_zeroes(bufs)
        await self._take_time()

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        await self._take_time()

    async def flush_to_disk(self) -> None:
        await self._take_time()

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        return BlockStatus(self._status, length, offset, self.node)

    async def _take_time(self) -> None:
        if self._latency:
            await trio.sleep(self._latency)

    @property
    def filename(self) -> str:
        return "" if has_strong_options(self.node) else f"{self.protocol_prefix}://"

    def allocated_bytes(self) -> int:
        return 0


@register("null-co", NullOptions)
class NullCo(_Null):
    protocol_prefix: ClassVar[str | None] = "null-co"


@register("null-aio", NullOptions)
class NullAio(_Null):
    """Every read, write and flush suspends: its completion comes from the scheduler."""

    protocol_prefix: ClassVar[str | None] = "null-aio"

    async def _take_time(self) -> None:
        await trio.sleep(self._latency)
