"""volatile-cache: what is written stays in memory until it is flushed, and is lost when the power is cut.

So behaves a disk with its write cache enabled.  A write is acknowledged at once; a flush, or a write with FUA, brings
it to ``file``, which stands for the medium.  ``power_cut`` drops a part of what is in the cache, drawn by the seed:
whole requests, and if asked for single sectors of them.  Then every request fails until ``power_on``.  What was flushed
is there; of the rest nobody knows before.  The decisions are in the ledger and in ``report``.

The same seed, requests and cut give the same content of ``file``, on any machine.
"""

from __future__ import annotations

import errno
import logging
import random
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from fusebd.block.child import copy_into
from fusebd.block.driver import (
    FUA,
    BlockStatus,
    Buffers,
    Child,
    FilterDriver,
    Node,
    Preallocation,
    Status,
    driver_command,
    nbytes,
    register,
)
from fusebd.block.mutex import Mutex
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef, Json, OptionStruct, Size
from fusebd.block.perms import Role
from fusebd.drivers.volatilecache.pending import DISCARD, WRITE, ZERO, Decision, Pending, WriteLog, decide
from fusebd.errors import BlockIOError, CommandError, OptionError

log = logging.getLogger(__name__)

#: decisions of the last power cut that ``report`` shows
_MOST_DECISIONS = 4096


class PowerCutOptions(OptionStruct, frozen=True, kw_only=True):
    """How the power is cut."""

    keep: Annotated[float, Meta(description="probability that a request in the cache survives", ge=0, le=1)] = 0.5
    torn: Annotated[float, Meta(description="probability that a write that survives is torn", ge=0, le=1)] = 0.0
    operation: Annotated[
        Literal["read", "write", "flush", "any"], Meta(description="requests that nth and every count")
    ] = "any"
    nth: Annotated[Size, Meta(description="cut when so many of them have come; 0: at once")] = 0


class NoOptions(OptionStruct, frozen=True, kw_only=True):
    """A command that takes nothing but the node."""


class VolatileCacheOptions(BlockdevOptions, frozen=True, kw_only=True):
    file: Annotated[BlockdevRef, Meta(description="the medium")]
    size: Annotated[Size, Meta(description="bytes of data in the cache before the oldest is written out")] = 64 << 20
    sector_size: Annotated[Size, Meta(description="bytes that are never torn")] = 512
    seed: Annotated[Size, Meta(description="what a power cut draws from")] = 0
    power_cut: Annotated[PowerCutOptions | UnsetType, Meta(description="cut the power by itself")] = UNSET


@register("volatile-cache", VolatileCacheOptions)
class VolatileCache(FilterDriver):
    """Reads suspend where ``file`` does, writes only where the cache is full, flushes while it is written out."""

    def __init__(self, node: Node, file: Child, options: VolatileCacheOptions) -> None:
        super().__init__(node, file)
        sector = options.sector_size
        if sector < 1 or sector & (sector - 1) or sector > 1 << 20:
            raise OptionError(f"sector-size must be a power of two of at most 1 MiB, not {sector}")
        self.limits.request_alignment = max(sector, file.node.driver.limits.request_alignment)
        self._cache = WriteLog(sector)
        self._most = options.size
        self._seed = options.seed
        self._writing_out = Mutex()
        self._powered = True
        self._cuts = 0
        self._decisions: list[dict[str, Json]] = []
        self._scheduled: PowerCutOptions | None = None
        self._countdown = 0
        if options.power_cut is not UNSET:
            self._schedule(options.power_cut)

    @classmethod
    async def open(cls, opening: Opening, options: VolatileCacheOptions) -> VolatileCache:
        return cls(opening.node, await opening.child("file", options.file, Role.FILTERED | Role.PRIMARY), options)

    @property
    def supports_fua(self) -> bool:
        return True

    # -- requests -------------------------------------------------------------------------------

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        """Fill *bufs*: what is in the cache when the request comes, over what is on the medium."""
        await self._arrival("read")
        size = nbytes(bufs)
        overlay = self._cache.overlay(offset, size)
        if not overlay:
            await self.file.preadv(offset, bufs)
            return
        whole = memoryview(bytearray(size))
        if sum(length for _, length, _ in overlay) < size:
            await self.file.preadv(offset, (whole,))
        for at, length, entry in overlay:
            part = whole[at - offset : at - offset + length]
            part[:] = entry.part(at, length) if entry.kind == WRITE else bytes(length)
        copy_into(bufs, whole)

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        await self._arrival("write")
        if flags & FUA:
            async with self._writing_out:
                self._check_power("write", offset)
                self._cache.overtaken(offset, nbytes(bufs))
                await self.file.pwritev(offset, bufs, flags)
            return
        data = bytes(bufs[0]) if len(bufs) == 1 else b"".join(bufs)
        self._cache.add(WRITE, offset, len(data), data)
        self._grow(offset + len(data))
        if self._cache.size > self._most:
            await self._write_out(self._most)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self._arrival("write")
        self._cache.add(ZERO, offset, length, flags=flags & ~FUA)
        self._grow(offset + length)
        if flags & FUA:
            await self.flush()

    async def pdiscard(self, offset: int, length: int) -> None:
        await self._arrival("write")
        self._cache.add(DISCARD, offset, length)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        if self._cache.overlay(offset, length):
            return BlockStatus(Status.DATA | Status.ALLOCATED, length)
        return await super().block_status(offset, length)

    async def truncate(
        self, length: int, *, exact: bool = False, prealloc: Preallocation = "off", zero: bool = False
    ) -> None:
        """Write everything out, and resize ``file``."""
        self._check_power("resize", length)
        await self._write_out()
        await super().truncate(length, exact=exact, prealloc=prealloc, zero=zero)

    async def flush(self) -> None:
        """Bring all that is in the cache to the medium, and flush that."""
        await self._arrival("flush")
        await self._write_out()
        await self.file.flush()

    def _grow(self, end: int) -> None:
        if end > self.length:
            self.node.set_length(end)

    # -- the cache ------------------------------------------------------------------------------

    async def _write_out(self, left: int = -1) -> None:
        """Bring requests to the medium, the oldest first, until no more than *left* bytes of data stay (-1: none)."""
        async with self._writing_out:
            last = self._cache.last_sequence
            while (entry := self._cache.oldest()) is not None and entry.sequence <= last and self._cache.size > left:
                self._check_power("flush", entry.offset)
                await self._put(entry, self._cache.runs(entry))
                self._cache.done(entry)

    async def _put(self, entry: Pending, runs: list[tuple[int, int]]) -> None:
        """Bring the *runs* of *entry* to the medium."""
        for offset, length in runs:
            if entry.kind == WRITE:
                await self.file.pwritev(offset, (entry.part(offset, length),))
            elif entry.kind == ZERO:
                await self.file.pwrite_zeroes(offset, length, entry.flags)
            else:
                await self.file.pdiscard(offset, length)

    # -- power ----------------------------------------------------------------------------------

    def _check_power(self, operation: str, offset: int) -> None:
        if not self._powered:
            raise BlockIOError(
                errno.EIO, node_name=self.node.name, operation=operation, offset=offset, reason="power is off"
            )

    async def _arrival(self, operation: str) -> None:
        """A request has come: the one that a power cut waits for finds the power off."""
        self._check_power(operation, -1)
        scheduled = self._scheduled
        if scheduled is not None and scheduled.operation in ("any", operation):
            self._countdown -= 1
            if not self._countdown:
                await self._cut(scheduled)
                self._check_power(operation, -1)

    def _schedule(self, options: PowerCutOptions) -> None:
        self._scheduled, self._countdown = options, options.nth

    @driver_command("power-cut", PowerCutOptions)
    async def power_cut(self, options: PowerCutOptions) -> dict[str, Json]:
        """Cut the power, now or when the requests that *options* wait for have come.  Raises CommandError if it is off.

        Suspends, if now, until what survives is on the medium.  The result is the state then.
        """
        if not self._powered:
            raise CommandError("The power is off already")
        if options.nth:
            self._schedule(options)
        else:
            await self._cut(options)
        return self.report()

    async def _cut(self, options: PowerCutOptions) -> None:
        self._powered = False
        self._scheduled = None
        self._cuts += 1
        rng = random.Random(f"{self._seed}/{self._cuts}")
        decisions: list[Decision] = []
        async with self._writing_out:
            for decision in decide(self._cache, rng, keep=options.keep, torn=options.torn):
                decisions.append(decision)
                await self._put(decision.entry, self._cache.runs(decision.entry, decision.kept))
                self._cache.done(decision.entry)
            await self.file.flush()
        self._record(decisions)

    def _record(self, decisions: list[Decision]) -> None:
        sector = self._cache.sector
        self._decisions = []
        for decision in decisions:
            entry = decision.entry
            shown: dict[str, Json] = {"sequence": entry.sequence, "outcome": decision.outcome}
            if decision.outcome == "torn":
                shown["kept-sectors"] = sorted(number - entry.offset // sector for number in decision.kept)
            if decision.outcome != "kept":
                self.node.graph.ledger.record_fault(
                    self.node,
                    rule=f"power-cut-{self._cuts}",
                    action=decision.outcome,
                    operation=entry.kind,
                    offset=entry.offset,
                    length=entry.length,
                    sequence=entry.sequence,
                    **{name: value for name, value in shown.items() if name == "kept-sectors"},
                )
            self._decisions.append({**shown, "operation": entry.kind, "offset": entry.offset, "length": entry.length})
        counts = {name: sum(d.outcome == name for d in decisions) for name in ("kept", "dropped", "torn")}
        log.warning("%s: power cut %d: %s", self.node.public_name, self._cuts, counts)
        self.node.emit("POWER_CUT", {"node-name": self.node.public_name, "number": self._cuts, **counts})

    @driver_command("power-on", NoOptions)
    async def power_on(self, options: NoOptions) -> None:
        """Serve requests again, from what is on the medium.  Never suspends.  Raises CommandError if it is on."""
        if self._powered:
            raise CommandError("The power is on already")
        self._powered = True

    @driver_command("query-volatile-cache", NoOptions)
    async def query(self, options: NoOptions) -> dict[str, Json]:
        """``report``.  Never suspends."""
        return self.report()

    def report(self) -> dict[str, Json]:
        """The state: whether it is on, what is pending, and what the last power cut did."""
        pending = [entry.sequence for entry in self._cache.pending.values()]
        found: dict[str, Json] = {
            "power": self._powered,
            "cuts": self._cuts,
            "acknowledged": self._cache.last_sequence,
            "pending": len(pending),
            "pending-bytes": self._cache.size,
            #: every request up to this one is on the medium, or was lost by a power cut
            "settled": pending[0] - 1 if pending else self._cache.last_sequence,
            "last-cut": self._decisions[-_MOST_DECISIONS:],
        }
        if self._scheduled is not None:
            found["scheduled"] = {**msgspec.to_builtins(self._scheduled), "left": self._countdown}
        return found

    def specific_stats(self) -> dict[str, Any]:
        return {"pending": len(self._cache), "pending-bytes": self._cache.size, "power-cuts": self._cuts}
