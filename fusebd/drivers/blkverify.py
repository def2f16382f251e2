"""blkverify: send every request to the image under test and to a raw twin, and compare what comes back.

A read whose bytes differ, and any request that ends differently on the two, is a mismatch: it is logged in QEMU's
words with a dump of the difference, announced as BLKVERIFY_MISMATCH, and the request fails with EIO.  With
``on-mismatch=report`` it ends as ``test`` answered it instead, with ``on-mismatch=stop`` the program ends, as QEMU's
do.  Flushes go to ``test`` alone; zero writes and discards are not passed on, so that they reach both sides as writes,
or not at all.

Options: QAPI BlockdevOptionsBlkverify.  Behaviour: QEMU block/blkverify.c.
"""

from __future__ import annotations

import os
from typing import Annotated, ClassVar

from msgspec import Meta

from fusebd.block.driver import Buffers, Child, FilterDriver, Node, Preallocation, nbytes, register
from fusebd.block.mismatch import Mismatches, OnMismatch
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef, Json
from fusebd.block.perms import Role
from fusebd.block.sidebyside import Request, SideBySide
from fusebd.errors import BlockIOError, NotSupported, OptionError

_PREFIX = "blkverify:"
#: a longer name is not reported (QEMU: sizeof(BlockDriverState.exact_filename))
_FILENAME_LENGTH = 4096


class BlkverifyOptions(BlockdevOptions, frozen=True, kw_only=True):
    test: Annotated[BlockdevRef, Meta(description="node under test")]
    raw: Annotated[BlockdevRef, Meta(description="node that has the right content")]
    on_mismatch: Annotated[
        OnMismatch, Meta(description="what a difference does: fail the request, only report it, or end the daemon")
    ] = "error"


@register("blkverify", BlkverifyOptions)
class Blkverify(FilterDriver):
    """The length is that of ``test``.  Requests suspend where either child does."""

    protocol_prefix: ClassVar[str | None] = "blkverify"
    probed_children: ClassVar[frozenset[str]] = frozenset({"test"})
    supports_fua = False
    changeable: ClassVar[frozenset[str] | None] = None

    def __init__(self, node: Node, raw: Child, test: Child, on_mismatch: OnMismatch) -> None:
        super().__init__(node, raw)
        self.raw, self.test = raw, test
        self.length = test.node.driver.length
        self._mismatches = Mismatches(node, on_mismatch, ("test", "raw"))
        self._side_by_side = SideBySide()

    @classmethod
    async def open(cls, opening: Opening, options: BlkverifyOptions) -> Blkverify:
        raw = await opening.child("raw", options.raw, Role.FILTERED | Role.PRIMARY)
        test = await opening.child("test", options.test, Role.DATA)
        return cls(opening.node, raw, test, options.on_mismatch)

    @classmethod
    def parse_filename(cls, name: str) -> dict[str, Json]:
        """``blkverify:RAW:TEST``; the first colon ends RAW."""
        raw, colon, test = name.removeprefix(_PREFIX).partition(":")
        if not colon:
            raise OptionError("blkverify requires raw copy and original image path")
        return {"raw": {"filename": raw}, "test": {"filename": test}}

    @property
    def filename(self) -> str:
        raw, test = self.raw.node.driver.filename, self.test.node.driver.filename
        name = f"{_PREFIX}{raw}:{test}"
        return name if raw and test and len(os.fsencode(name)) < _FILENAME_LENGTH else ""

    def child_resized(self, child: Child) -> None:
        if child is self.test:
            self.node.set_length(child.node.driver.length)

    # -- requests -------------------------------------------------------------------------------

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        size = nbytes(bufs)
        expected = bytearray(size)
        whole = memoryview(expected)
        test, raw = self.test.preadv(offset, bufs), self.raw.preadv(offset, (whole,))
        if not await self._both("read", offset, size, test, raw):
            return
        at = 0
        for buf in bufs:
            # a bytearray is compared by memcmp, two memoryviews item by item
            if not expected.startswith(buf, at):
                self._mismatches.contents("blkverify: read", offset, size, at, buf, whole[at : at + len(buf)])
                return
            at += len(buf)

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        test, raw = self.test.pwritev(offset, bufs, flags), self.raw.pwritev(offset, bufs, flags)
        await self._both("write", offset, nbytes(bufs), test, raw)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        raise NotSupported(node_name=self.node.name, operation="write zeroes")

    async def pdiscard(self, offset: int, length: int) -> None:
        raise NotSupported(node_name=self.node.name, operation="discard")

    async def flush(self) -> None:
        """Flush ``test``: the raw twin is not what matters."""
        await self.test.flush()

    async def truncate(
        self, length: int, *, exact: bool = False, prealloc: Preallocation = "off", zero: bool = False
    ) -> None:
        """Resize both.  If ``raw`` refuses, ``test`` has its new length already."""
        await self.test.truncate(length, exact=exact, prealloc=prealloc, zero=zero)
        await self.raw.truncate(length, exact=exact, zero=zero)

    async def _both(self, operation: str, offset: int, size: int, test: Request, raw: Request) -> bool:
        """Carry out both; whether they ended alike.  Raises what ``test`` failed with, or EIO for a mismatch."""
        test_errno, raw_errno = await self._side_by_side.outcomes((test, raw))
        if test_errno != raw_errno:
            self._mismatches.outcomes(f"blkverify: {operation}", operation, offset, size, test_errno, raw_errno)
        if test_errno:
            raise BlockIOError(test_errno, node_name=self.node.name, operation=operation, offset=offset)
        return not raw_errno
