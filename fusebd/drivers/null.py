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
from msgspec import Meta

from fusebd.block.child import fill_zeroes
from fusebd.block.driver import BlockStatus, Buffers, ProtocolDriver, Status, register
from fusebd.block.naming import has_strong_options
from fusebd.block.node import Node
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, Int, Json, Size
from fusebd.errors import OpenError, OptionError

N = TypeVar("N", bound="_Null")

_DEFAULT_SIZE = 1 << 30
#: the longest node that QEMU has (BDRV_MAX_LENGTH)
_MAX_SIZE = 2**63 - 2**30


class NullOptions(BlockdevOptions, frozen=True, kw_only=True):
    size: Annotated[Int, Meta(description="length of the node in bytes")] = _DEFAULT_SIZE
    latency_ns: Annotated[Size, Meta(description="nanoseconds that a request takes")] = 0
    read_zeroes: Annotated[bool, Meta(description="whether block status says that the node reads as zeroes")] = False


class _Null(ProtocolDriver):
    """Reads, writes and flushes suspend for ``latency-ns``."""

    supports_fua: ClassVar[bool] = True
    strong_options: ClassVar[frozenset[str]] = frozenset({"size", "read-zeroes"})

    def __init__(self, node: Node, options: NullOptions) -> None:
        super().__init__(node)
        self.length = options.size
        self._latency = options.latency_ns / 1e9
        self._status = Status.OFFSET_VALID | Status.ALLOCATED
        if options.read_zeroes:
            self._status |= Status.ZERO

    @classmethod
    async def open(cls: type[N], opening: Opening, options: NullOptions) -> N:
        """Never suspends.  Raises OptionError, OpenError for a length or a latency that cannot be."""
        if options.size < 0:
            raise OptionError(f"Value '{options.size}' is out of range for parameter 'size'")
        if options.size > _MAX_SIZE:
            raise OpenError.from_os("Could not refresh total sector count", OSError(errno.EFBIG, ""))
        if options.latency_ns >= 2**63:
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
