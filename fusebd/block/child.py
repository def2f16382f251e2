"""The edges of the graph: the one place where requests are checked before a driver sees them.

``Child`` leads from a node to one below it; ``fusebd.block.root`` has those that lead to a node from outside.  An edge
cuts or zero-fills at the end of the node, splits what is longer than the driver takes, pads what is not aligned
(reads) and reads, modifies and writes back (writes), carries out discard, detect-zeroes and zero-write fallback,
counts, and announces blkdebug's request events.  Drivers that have nothing to do are passed by
(``fusebd.block.straight``).

Behaviour: QEMU block/io.c.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING

from fusebd.block.perms import Perm, Role
from fusebd.block.queueing import Batch, Done
from fusebd.block.straight import straight_read, straight_write
from fusebd.errors import BlockIOError, NotSupported, ReadOnlyError

if TYPE_CHECKING:
    from fusebd.block.driver import Preallocation
    from fusebd.block.node import Node

Buffers = Sequence[memoryview]

#: flags of writes; plain integers, because IntFlag arithmetic costs a microsecond a request
FUA = 1  #: durable when the call returns
MAY_UNMAP = 2  #: a zero write may deallocate
NO_FALLBACK = 4  #: a zero write fails with NotSupported rather than write buffers of zeroes
COMPRESSED = 8  #: store compressed, if the format can

#: the longest node that there can be, in bytes (QEMU: BDRV_MAX_LENGTH)
MAX_LENGTH = 2**63 - 2**30
_NO_LIMIT = 1 << 62
#: zeroes for what is past the end, for fallbacks and for comparing
_ZERO_BYTES = bytes(1 << 20)
_ZEROES = memoryview(_ZERO_BYTES)
#: the longest piece in which a zero write falls back to buffers
_FALLBACK_PIECE = len(_ZEROES)


def nbytes(bufs: Buffers) -> int:
    """The length of *bufs* together, in bytes."""
    return len(bufs[0]) if len(bufs) == 1 else sum(map(len, bufs))


def slice_buffers(bufs: Buffers, start: int, end: int) -> Buffers:
    """Bytes *start* to *end* of *bufs*, without copying."""
    if len(bufs) == 1:
        return (bufs[0][start:end],)
    parts = []
    for buf in bufs:
        if end <= 0:
            break
        if start < len(buf):
            parts.append(buf[max(start, 0) : end])
        start -= len(buf)
        end -= len(buf)
    return parts


def fill_zeroes(bufs: Buffers) -> None:
    """Set every byte of *bufs* to zero."""
    for buf in bufs:
        for at in range(0, len(buf), len(_ZEROES)):
            part = buf[at : at + len(_ZEROES)]
            part[:] = _ZEROES[: len(part)]


def copy_into(bufs: Buffers, data: memoryview) -> None:
    """Copy *data*, which is as long as *bufs*, into them."""
    at = 0
    for buf in bufs:
        buf[:] = data[at : at + len(buf)]
        at += len(buf)


def is_zero(bufs: Buffers) -> bool:
    """Whether every byte of *bufs* is zero."""
    for buf in bufs:
        for at in range(0, len(buf), len(_ZEROES)):
            part = buf[at : at + len(_ZEROES)]
            # memcmp; two memoryviews would be compared item by item, seventy times slower
            if not _ZERO_BYTES.startswith(part):
                return False
    return True


class Child:
    """An edge to *node*, called *name* by its parent.

    All requests are in bytes of the node below.  Reading past its end gives zeroes; writing past its end makes it
    longer if the edge may resize.  Requests suspend where the driver does, and while an overlapping
    read-modify-write is under way.  They raise BlockIOError.
    """

    __slots__ = (
        "_mask",
        "_max_transfer",
        "_may_grow",
        "_perm",
        "_queue_read",
        "_read",
        "_read_concerns",
        "_read_counters",
        "_read_mask",
        "_read_most",
        "_write",
        "_write_concerns",
        "_write_counters",
        "_write_most",
        "driver",
        "events",
        "name",
        "node",
        "parent",
        "role",
        "shared",
        "watches",
    )

    def __init__(self, parent: Node | None, name: str, role: Role, node: Node) -> None:
        self.parent = parent
        self.name = name
        self.role = role
        self.perm, self.shared = Perm.NONE, Perm.ALL
        self.point_at(node)

    def __repr__(self) -> str:
        return f"<{self.name} of {self.parent_description}: {self.node.name}>"

    @property
    def parent_description(self) -> str:
        """The parent, as QEMU's messages call it."""
        assert self.parent is not None
        return f"node '{self.parent.name}'"

    @property
    def perm(self) -> Perm:
        """What is taken of the node by this edge."""
        return self._perm

    @perm.setter
    def perm(self, perm: Perm) -> None:
        self._perm = perm
        self._may_grow = bool(perm & Perm.RESIZE)

    def point_at(self, node: Node) -> None:
        """Lead to *node* from now on.  The caller keeps the parents' list and the permissions right."""
        self.node = node
        self.refresh()

    def refresh(self) -> None:
        """Take over what the request path needs from the node, and those below it that are passed by."""
        driver = self.driver = self.node.driver
        self.events = driver.listens
        self._mask = driver.limits.request_alignment - 1
        self._max_transfer = driver.limits.max_transfer or _NO_LIMIT
        self.watches = [watch for watch in self.node.watches if watch.concerns(self)]
        read, write = straight_read(self), straight_write(self)
        self._read, self._read_mask, self._read_most, self._read_concerns, self._read_counters, self._queue_read = read
        self._write, _, self._write_most, self._write_concerns, self._write_counters, _ = write
        if self.parent is not None and self.parent.is_open:
            self.parent.driver.child_refreshed(self)
            self.parent.refresh_edges()

    def child_resized(self) -> None:
        """The node has a new length."""
        if self.parent is not None and self.parent.is_open:
            self.parent.driver.child_resized(self)

    def announced(self, event: str) -> Awaitable[None] | None:
        """*event*, one of ``events``, happens: what to wait for.  ``announce`` for where each tenth of a us counts."""
        return self.driver.announced(event)

    async def announce(self, event: str) -> None:
        """*event*, one of ``fusebd.block.debugevents``, happens.  Suspends if it is held up below."""
        if event in self.events:
            held = self.driver.announced(event)
            if held is not None:
                await held

    # -- reading --------------------------------------------------------------------------------

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        """Fill *bufs* from byte *offset* on; what is past the end of the node reads as zeroes."""
        size = len(bufs[0]) if len(bufs) == 1 else nbytes(bufs)
        if (
            offset + size > self.driver.length
            or size > self._read_most
            or (offset | size) & self._read_mask
            or (self._read_concerns is not None and self._read_concerns(offset, size))
        ):
            await self._preadv_pieces(offset, bufs, size)
            return
        counters = self._read_counters
        began = perf_counter_ns()
        try:
            await self._read(offset, bufs)
        except BaseException:
            counters.failed_rd_operations += 1
            raise
        counters.rd_operations += 1
        counters.rd_bytes += size
        counters.rd_total_time_ns += perf_counter_ns() - began

    @property
    def queues_reads(self) -> bool:
        """Whether ``queue_read`` may take any."""
        return self._queue_read is not None

    def queue_read(self, offset: int, buf: memoryview, done: Done) -> Batch | None:
        """A ``QueueRead`` (``fusebd.block.queueing``): what does not end with all of *buf* read is counted nowhere."""
        size, queue = len(buf), self._queue_read
        if queue is None or not self._may_queue(offset, size):
            return None
        counters, began = self._read_counters, perf_counter_ns()

        def finished(result: int) -> None:
            if result == size:
                counters.rd_operations += 1
                counters.rd_bytes += size
                counters.rd_total_time_ns += perf_counter_ns() - began
            done(result)

        return queue(offset, buf, finished)

    def _may_queue(self, offset: int, size: int) -> bool:
        """Whether a read of *size* bytes is as plain as the queue of the driver below needs it."""
        return (
            0 < size <= self._read_most
            and offset + size <= self.driver.length
            and not (offset | size) & self._read_mask
            and (self._read_concerns is None or not self._read_concerns(offset, size))
        )

    async def _preadv_pieces(self, offset: int, bufs: Buffers, size: int) -> None:
        length, mask = self.driver.length, self._mask
        if offset + size > length:
            inside = max(length - offset, 0)
            fill_zeroes(slice_buffers(bufs, inside, size))
            if not inside:
                return
            bufs, size = slice_buffers(bufs, 0, inside), inside
        start, end = offset & ~mask, (offset + size + mask) & ~mask
        if (start, end) != (offset, offset + size):
            # An unaligned end of the node is inside the driver's last aligned unit: it reads zeroes there.
            whole = memoryview(bytearray(end - start))
            await self._read_split(start, (whole,), end - start)
            copy_into(bufs, whole[offset - start : offset - start + size])
        else:
            await self._read_split(offset, bufs, size)

    async def _read_split(self, offset: int, bufs: Buffers, size: int) -> None:
        """Read an aligned range in pieces that the driver takes."""
        counters = self.node.counters
        piece = self._max_transfer & ~self._mask
        began = perf_counter_ns()
        try:
            for at in range(0, size or 1, piece):
                part = bufs if size <= piece else slice_buffers(bufs, at, min(at + piece, size))
                await self.driver.preadv(offset + at, part)
        except BaseException:
            counters.failed_rd_operations += 1
            raise
        counters.rd_operations += 1
        counters.rd_bytes += size
        counters.rd_total_time_ns += perf_counter_ns() - began

    # -- writing --------------------------------------------------------------------------------

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        """Write all of *bufs* from byte *offset* on.  *flags*: FUA, COMPRESSED, and MAY_UNMAP for detected zeroes."""
        size = len(bufs[0]) if len(bufs) == 1 else nbytes(bufs)
        end = offset + size
        grows = end > self.driver.length
        if (
            (grows and not (self._may_grow and self._write_counters is self.node.counters))
            or size > self._write_most
            or flags
            or (self._write_concerns is not None and self._write_concerns(offset, size))
        ):
            await self._pwritev_general(offset, bufs, size, flags)
            return
        counters = self._write_counters
        began = perf_counter_ns()
        try:
            await self._write(offset, bufs)
        except BaseException:
            counters.failed_wr_operations += 1
            counters.changes += 1  # a part of it may be written, so that the next flush matters
            raise
        counters.changes += 1
        counters.wr_operations += 1
        counters.wr_bytes += size
        counters.wr_total_time_ns += perf_counter_ns() - began
        if end > counters.wr_highest_offset:
            counters.wr_highest_offset = end
        if grows and end > self.driver.length:
            self.node.set_length(end)

    async def _pwritev_general(self, offset: int, bufs: Buffers, size: int, flags: int) -> None:
        if offset + size > self.driver.length and not self._may_grow:
            raise self._past_end("write", offset)
        node, mask = self.node, self._mask
        if not size and offset & mask:
            return
        counters = node.counters
        start, end = offset & ~mask, (offset + size + mask) & ~mask
        unaligned = (start, end) != (offset, offset + size)
        began = perf_counter_ns()
        lock = await node.ranges.acquire(start, end, exclusive=unaligned) if mask else None
        try:
            if unaligned:
                bufs = await self._with_surroundings(offset, bufs, size, start, end)
            await self._write_aligned(start, bufs, end - start, flags)
        except BaseException:
            counters.failed_wr_operations += 1
            node.counters.changes += 1  # a part of it may be written, so that the next flush matters
            raise
        finally:
            if lock is not None:
                node.ranges.release(lock)
            if self.watches:
                self._tell(offset, size)
        counters.wr_operations += 1
        counters.wr_bytes += size
        counters.wr_total_time_ns += perf_counter_ns() - began
        self._wrote(offset + size)

    async def _with_surroundings(self, offset: int, bufs: Buffers, size: int, start: int, end: int) -> Buffers:
        """*bufs* with the bytes around them that fill up the aligned range *start* to *end*."""
        unit = self._mask + 1
        whole = memoryview(bytearray(end - start))
        head, tail = offset != start, offset + size != end
        # What is around is read at once where nothing lies between that is overwritten as a whole.
        merged = end - start == (2 * unit if head and tail and end - start > unit else unit)
        if head or merged:
            if head:
                await self.announce("pwritev_rmw_head")
            if merged and tail:
                await self.announce("pwritev_rmw_tail")
            await self._read_for_merge(start, whole if merged else whole[:unit])
            if head:
                await self.announce("pwritev_rmw_after_head")
            if merged and tail:
                await self.announce("pwritev_rmw_after_tail")
        if tail and not merged:
            await self.announce("pwritev_rmw_tail")
            await self._read_for_merge(end - unit, whole[-unit:])
            await self.announce("pwritev_rmw_after_tail")
        at = offset - start
        for buf in bufs:
            whole[at : at + len(buf)] = buf
            at += len(buf)
        return (whole,)

    async def _read_for_merge(self, offset: int, buf: memoryview) -> None:
        """Read whole units, as far as the node has them."""
        mask = self._mask
        buf = buf[: max(((self.driver.length + mask) & ~mask) - offset, 0)]
        piece = self._max_transfer & ~mask
        for at in range(0, len(buf), piece):
            await self.driver.preadv(offset + at, (buf[at : at + piece],))

    async def _write_aligned(self, offset: int, bufs: Buffers, size: int, flags: int) -> None:
        node, driver = self.node, self.driver
        if node.detect_zeroes != "off" and not flags & COMPRESSED and is_zero(bufs):
            if node.detect_zeroes == "unmap":
                flags |= MAY_UNMAP
            await self._zero_aligned(offset, size, flags)
            return
        if not flags & COMPRESSED:
            await self.announce("pwritev")
        elif not driver.can_compress:
            raise NotSupported(node_name=node.name, operation="write")
        piece = self._max_transfer & ~self._mask
        passed = flags & ~MAY_UNMAP if driver.supports_fua else flags & COMPRESSED
        try:
            for at in range(0, size or 1, piece):
                part = bufs if size <= piece else slice_buffers(bufs, at, min(at + piece, size))
                await driver.pwritev(offset + at, part, passed)
        finally:
            await self.announce("pwritev_done")
        if flags & FUA and not driver.supports_fua:
            node.counters.changes += 1
            await self.flush()

    def _tell(self, offset: int, length: int) -> None:
        """What may have changed, to those who have to know what others change."""
        for watch in self.watches:
            watch.changed(self.node, offset, length)

    def _past_end(self, operation: str, offset: int) -> BlockIOError:
        reason = "past the end of the node"
        return BlockIOError(errno.EIO, node_name=self.node.name, operation=operation, offset=offset, reason=reason)

    def _wrote(self, end: int) -> None:
        """A change that reached up to byte *end* is in."""
        node = self.node
        node.counters.changes += 1
        if end > node.counters.wr_highest_offset:
            node.counters.wr_highest_offset = end
        if end > self.driver.length:
            node.set_length(end)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """Make *length* bytes read as zeroes.  *flags*: MAY_UNMAP, NO_FALLBACK, FUA.

        With NO_FALLBACK it raises NotSupported before anything has changed if the driver cannot do it.
        """
        if not length:
            return
        node, mask, end = self.node, self._mask, offset + length
        if end > self.driver.length and not self._may_grow:
            raise self._past_end("write zeroes", offset)
        counters = node.counters
        first, last = (offset + mask) & ~mask, end & ~mask
        if mask and (first, last) != (offset, end):
            if flags & NO_FALLBACK:
                raise NotSupported(node_name=node.name, operation="write zeroes")
            # Only whole units can be zeroed as such; the bytes before and after are written.
            if first >= last:
                await self.pwritev(offset, _zero_buffers(length), flags & FUA)
                return
            if first > offset:
                await self.pwritev(offset, _zero_buffers(first - offset), flags & FUA)
            if end > last:
                await self.pwritev(last, _zero_buffers(end - last), flags & FUA)
            offset, end = first, last
        lock = await node.ranges.acquire(offset, end, exclusive=False) if mask else None
        began = perf_counter_ns()
        try:
            await self._zero_aligned(offset, end - offset, flags)
        except BaseException:
            counters.failed_wr_operations += 1
            node.counters.changes += 1  # a part of it may be written, so that the next flush matters
            raise
        finally:
            if lock is not None:
                node.ranges.release(lock)
            if self.watches:
                self._tell(offset, end - offset)
        counters.wr_operations += 1
        counters.wr_bytes += length
        counters.wr_total_time_ns += perf_counter_ns() - began
        self._wrote(end)

    async def _zero_aligned(self, offset: int, length: int, flags: int) -> None:
        node, driver = self.node, self.driver
        limits = driver.limits
        if not node.unmap:
            flags &= ~MAY_UNMAP
        await self.announce("pwritev_zero")
        passed = flags if driver.supports_fua else flags & ~FUA
        try:
            for start, size in _pieces(offset, length, limits.pwrite_zeroes_alignment, limits.max_pwrite_zeroes):
                try:
                    await driver.pwrite_zeroes(start, size, passed)
                except NotSupported:
                    if flags & NO_FALLBACK:
                        raise
                    piece = min(_FALLBACK_PIECE, self._max_transfer) & ~self._mask
                    for at in range(0, size, piece):
                        await driver.pwritev(start + at, (_ZEROES[: min(piece, size - at)],), passed & FUA)
        finally:
            await self.announce("pwritev_done")
        if flags & FUA and not driver.supports_fua:
            node.counters.changes += 1
            await self.flush()

    async def pdiscard(self, offset: int, length: int) -> None:
        """The content of *length* bytes is not needed any more; what is past the end is cut off.

        Does nothing on a node without discard=unmap, and where the driver cannot.
        """
        node = self.node
        length = min(length, self.driver.length - offset)
        if not node.unmap or length <= 0:
            return
        limits, counters = self.driver.limits, node.counters
        began = perf_counter_ns()
        try:
            for start, size in _pieces(
                offset, length, limits.pdiscard_alignment or limits.request_alignment, limits.max_pdiscard
            ):
                if (start | size) & self._mask:
                    continue
                try:
                    await self.driver.pdiscard(start, size)
                except NotSupported:
                    continue
        except BaseException:
            counters.failed_unmap_operations += 1
            node.counters.changes += 1
            raise
        finally:
            if self.watches:
                self._tell(offset, length)
        counters.unmap_operations += 1
        counters.unmap_bytes += length
        counters.unmap_total_time_ns += perf_counter_ns() - began
        node.counters.changes += 1

    async def flush(self) -> None:
        """Make every write that has returned durable."""
        counters = self.node.counters
        began = perf_counter_ns()
        try:
            await self.driver.flush()
        except BaseException:
            counters.failed_flush_operations += 1
            raise
        counters.flush_operations += 1
        counters.flush_total_time_ns += perf_counter_ns() - began

    async def truncate(
        self, length: int, *, exact: bool = False, prealloc: Preallocation = "off", zero: bool = False
    ) -> None:
        """Give the node *length* bytes; new ones read as zeroes.  Raises BlockIOError, ReadOnlyError.

        Where a longer backing node would show in new bytes of an overlay, they are zeroed.
        """
        node = self.node
        if length > MAX_LENGTH:
            reason = f"offset({length}) exceeds maximum({MAX_LENGTH})"
            raise BlockIOError(errno.EFBIG, node_name=node.name, operation="resize", reason=reason)
        if node.read_only:
            raise ReadOnlyError("Image is read-only")
        backing = node.backing
        if backing is not None and backing.driver.length > self.driver.length:
            zero = True
        await self.driver.truncate(length, exact=exact, prealloc=prealloc, zero=zero)
        node.counters.changes += 1


def _zero_buffers(length: int) -> Buffers:
    """Read-only buffers of zeroes, *length* bytes together."""
    whole, rest = divmod(length, len(_ZEROES))
    return [_ZEROES] * whole + ([_ZEROES[:rest]] if rest else [])


def _pieces(offset: int, length: int, alignment: int, maximum: int) -> list[tuple[int, int]]:
    """The range as an unaligned head, aligned pieces of at most *maximum*, and an unaligned tail (offset, length)."""
    alignment = alignment or 1
    maximum = (maximum or _NO_LIMIT) // alignment * alignment or alignment
    pieces = []
    end = offset + length
    while offset < end:
        if offset % alignment:
            stop = min(end, offset - offset % alignment + alignment)
        else:
            stop = min(end - end % alignment, offset + maximum) if end - offset >= alignment else end
        pieces.append((offset, stop - offset))
        offset = stop
    return pieces
