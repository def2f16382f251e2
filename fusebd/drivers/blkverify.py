"""blkverify: send every request to the image under test and to a raw twin, and compare what comes back.

A read whose bytes differ, and any request that ends differently on the two, is a mismatch: it is logged in QEMU's
words, announced as BLKVERIFY_MISMATCH, and the request fails with EIO.  (QEMU exits instead.)  Flushes go to ``test``
alone; zero writes and discards are not passed on, so that they reach both sides as writes, or not at all.

Both sides should be at work at the same time, but a nursery costs some ten microseconds, several times a request that
is served from memory.  So the first request runs ``test`` and then ``raw`` in the task it came in.  If ``test`` had to
wait there, later ones run the two side by side, until one comes during which it did not.

Options: QAPI BlockdevOptionsBlkverify.  Behaviour: QEMU block/blkverify.c.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Coroutine, Generator
from types import coroutine
from typing import Annotated, Any, ClassVar

import trio
from msgspec import Meta

from fusebd.block.driver import Buffers, Child, FilterDriver, Node, Preallocation, nbytes, register
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef, Json
from fusebd.block.perms import Role
from fusebd.errors import BlockIOError, NotSupported, OptionError

log = logging.getLogger(__name__)

_PREFIX = "blkverify:"
#: a longer name is not reported (QEMU: sizeof(BlockDriverState.exact_filename))
_FILENAME_LENGTH = 4096
#: how many bytes of either side an event shows, from the first that differs on
_SHOWN = 16

Request = Coroutine[Any, Any, None]


class BlkverifyOptions(BlockdevOptions, frozen=True, kw_only=True):
    test: Annotated[BlockdevRef, Meta(description="node under test")]
    raw: Annotated[BlockdevRef, Meta(description="node that has the right content")]


@register("blkverify", BlkverifyOptions)
class Blkverify(FilterDriver):
    """The length is that of ``test``.  Requests suspend where either child does."""

    protocol_prefix: ClassVar[str | None] = "blkverify"
    probed_children: ClassVar[frozenset[str]] = frozenset({"test"})

    def __init__(self, node: Node, raw: Child, test: Child) -> None:
        super().__init__(node, raw)
        self.raw, self.test = raw, test
        self.length = test.node.driver.length
        self._side_by_side = False

    @classmethod
    async def open(cls, opening: Opening, options: BlkverifyOptions) -> Blkverify:
        raw = await opening.child("raw", options.raw, Role.FILTERED | Role.PRIMARY)
        test = await opening.child("test", options.test, Role.DATA)
        return cls(opening.node, raw, test)

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
        await self._both(
            "read", offset, size, self.test.preadv(offset, bufs), self.raw.preadv(offset, (memoryview(expected),))
        )
        at = 0
        for buf in bufs:
            # a bytearray is compared by memcmp, two memoryviews item by item
            if not expected.startswith(buf, at):
                self._differs("read", offset, size, at, memoryview(expected)[at:], buf)
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

    async def _both(self, operation: str, offset: int, size: int, test: Request, raw: Request) -> None:
        """Carry out both; raise what they both failed with, or EIO if they did not end alike."""
        if self._side_by_side:
            raw_result = [0]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_keep_outcome, raw, raw_result)
                test_errno, self._side_by_side = await _watched(_outcome(test))
            raw_errno = raw_result[0]
        else:
            try:
                test_errno, self._side_by_side = await _watched(_outcome(test))
            except BaseException:
                raw.close()
                raise
            raw_errno = await _outcome(raw)
        if test_errno != raw_errno:
            reason = f"return value mismatch {-test_errno} != {-raw_errno}"
            self._mismatch(operation, offset, size, reason, {"test-errno": test_errno, "raw-errno": raw_errno})
        if test_errno:
            raise BlockIOError(test_errno, node_name=self.node.name, operation=operation, offset=offset)

    def _differs(
        self, operation: str, offset: int, size: int, at: int, expected: memoryview, found: memoryview
    ) -> None:
        """*found*, *at* bytes into the request, is not how *expected* begins: say where first."""
        first = _first_difference(bytes(expected[: len(found)]), bytes(found))
        where = offset + at + first
        details = {
            "mismatch-offset": where,
            "test-data": found[first : first + _SHOWN].hex(),
            "raw-data": expected[first : min(first + _SHOWN, len(found))].hex(),
        }
        self._mismatch(operation, offset, size, f"contents mismatch at offset {where}", details)

    def _mismatch(self, operation: str, offset: int, size: int, reason: str, details: dict[str, Any]) -> None:
        log.error("blkverify: %s offset=%d bytes=%d %s", operation, offset, size, reason)
        data = {"node-name": self.node.name, "operation": operation, "offset": offset, "length": size}
        self.node.emit("BLKVERIFY_MISMATCH", {**data, "reason": reason, **details})
        raise BlockIOError(errno.EIO, node_name=self.node.name, operation=operation, offset=offset, reason=reason)


async def _outcome(request: Request) -> int:
    """The errno that *request* fails with, 0 if it does not."""
    try:
        await request
    except BlockIOError as error:
        return error.errno
    return 0


async def _keep_outcome(request: Request, result: list[int]) -> None:
    result[0] = await _outcome(request)


@coroutine
def _watched(work: Coroutine[Any, Any, int]) -> Generator[Any, Any, tuple[int, bool]]:
    """Carry out *work*: its result, and whether it suspended."""
    try:
        trap = work.send(None)
    except StopIteration as done:
        return done.value, False
    while True:
        thrown: BaseException | None = None
        try:
            answer = yield trap
        except BaseException as error:
            thrown = error
        try:
            trap = work.send(answer) if thrown is None else work.throw(thrown)
        except StopIteration as done:
            return done.value, True


def _first_difference(a: bytes, b: bytes) -> int:
    """The index of the first byte in which *a* and *b*, of one length and not equal, differ."""
    low, high = 0, len(a)
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
