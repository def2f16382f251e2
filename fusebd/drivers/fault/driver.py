"""fault: whatever real storage does to requests and to data, by rules that come and go while the node is in use.

``options.py`` declares the rules, ``rules.py`` decides which request gets which fault, ``actions.py`` plans what that
means for it, ``damage.py`` keeps what is wrong with the medium; here all that is carried out.  Everything that is done
to a request is in the ledger.  The same seed and the same requests give the same faults.

Options: fusebd's own; QEMU has no such driver.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import trio
from msgspec import UNSET, Meta, UnsetType

from fusebd.block.caller import current_request
from fusebd.block.child import FUA, copy_into, slice_buffers
from fusebd.block.debugevents import EDGE_EVENTS
from fusebd.block.driver import (
    BlockStatus,
    Buffers,
    Child,
    FilterDriver,
    Node,
    Status,
    driver_command,
    nbytes,
    register,
)
from fusebd.block.opening import Opening
from fusebd.block.options import Json, OptionStruct, Size
from fusebd.block.perms import Role
from fusebd.drivers.fault.actions import Medium, Plan, Request
from fusebd.drivers.fault.options import SECTOR_SIZE, FaultOptions, FaultRule
from fusebd.drivers.fault.rules import Hit, RuleSet, Verdict
from fusebd.errors import BlockIOError, CommandError, NotSupported, OptionError


class FaultRuleAdd(OptionStruct, frozen=True, kw_only=True):
    rule: Annotated[FaultRule, Meta(description="the rule to add behind those there are")]


class FaultRuleRemove(OptionStruct, frozen=True, kw_only=True):
    id: Annotated[str, Meta(description="the rule to take away; requests that it holds go on")]


class QueryFaultRules(OptionStruct, frozen=True, kw_only=True):
    """Nothing but the node."""


class FaultRelease(OptionStruct, frozen=True, kw_only=True):
    id: Annotated[str | UnsetType, Meta(description="the rule whose requests go on; all that are held if absent")] = (
        UNSET
    )
    request: Annotated[Size | UnsetType, Meta(description="this one alone, by its number")] = UNSET


class FaultHeal(OptionStruct, frozen=True, kw_only=True):
    id: Annotated[str | UnsetType, Meta(description="what this rule has done; all damage if absent")] = UNSET
    offset: Annotated[Size, Meta(description="from this byte on")] = 0
    length: Annotated[Size | UnsetType, Meta(description="in so many bytes; up to the end if absent")] = UNSET


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that a rule keeps waiting: for *seconds*, or until it is released (None)."""

    number: int
    rule: str
    seconds: float | None
    request: Request
    since: float
    caller: int
    released: trio.Event = field(default_factory=trio.Event)


def _is_thread_of(process: int, thread: int) -> bool:
    """FUSE tells which thread makes a request."""
    return process == thread or os.path.exists(f"/proc/{process}/task/{thread}")


@register("fault", FaultOptions)
class Fault(FilterDriver):
    """Requests suspend where ``file`` does, and as long as a delay or a hang keeps them waiting.

    A request that no rule has to be asked about costs one look at an attribute.
    """

    strong_options: ClassVar[frozenset[str]] = frozenset({"seed", "state", "rules"})

    def __init__(self, node: Node, file: Child, options: FaultOptions) -> None:
        super().__init__(node, file)
        self.medium = Medium(file.node.driver.length)
        self.rules = RuleSet(
            options.seed,
            options.state,
            self.medium,
            clock=trio.current_time,
            same=_is_thread_of,
            changed=self._rules_changed,
        )
        self._waiting: list[_Waiting] = []
        self._numbered = 0
        self._drains = 0
        # whether requests of a kind have to be looked at
        self._reads = self._writes = self._zeroes = self._discards = self._flushes = self._statuses = False
        for index, rule in enumerate(options.rules):
            try:
                self._add(rule)
            except OptionError as error:
                raise error.prefixed(f"rules.{index}") from None
        self._refresh_events()

    @classmethod
    async def open(cls, opening: Opening, options: FaultOptions) -> Fault:
        return cls(opening.node, await opening.child("file", options.file, Role.FILTERED | Role.PRIMARY), options)

    # -- requests -------------------------------------------------------------------------------

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        if self._reads:
            verdict = self.rules.decide("read", offset, nbytes(bufs))
            if verdict is not None or self.medium.damage:
                await self._read(verdict, offset, bufs)
                return
        await self.file.preadv(offset, bufs)

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        if self._writes:
            verdict = self.rules.decide("write", offset, nbytes(bufs), flags)
            if verdict is not None or self.medium.damage:
                await self._write(verdict, offset, bufs, flags)
                return
        await self.file.pwritev(offset, bufs, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        if self._zeroes:
            verdict = self.rules.decide("write-zeroes", offset, length, flags)
            if verdict is not None or self.medium.damage:
                await self._zero(verdict, offset, length, flags)
                return
        await self.file.pwrite_zeroes(offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        if self._discards:
            verdict = self.rules.decide("discard", offset, length)
            plan = None if verdict is None else await self._plan(verdict)
            if plan is not None:
                for part in plan.parts:
                    await self.file.pdiscard(part.offset, part.end - part.start)
                self._end(plan, "discard", offset)
                return
        await self.file.pdiscard(offset, length)

    async def flush(self) -> None:
        # without the events that a flush announces elsewhere: those of the node above are passed on
        if self._flushes:
            verdict = self.rules.decide("flush", 0, 0)
            plan = None if verdict is None else await self._plan(verdict)
            if plan is not None:
                self._end(plan, "flush", 0)
                return
        await self.file.flush()

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """Where bits are flipped there is data, whatever is below."""
        place = offset
        if self._statuses:
            verdict = self.rules.decide("block-status", offset, length)
            plan = None if verdict is None else await self._plan(verdict)
            if plan is not None:
                self._end(plan, "block-status", offset)
                place, length = plan.parts[0].offset, plan.parts[0].end
            length, flipped = self.medium.damage.uniform_prefix(place, length)
            if flipped:
                return BlockStatus(Status.DATA | Status.ALLOCATED, length)
        return BlockStatus(Status.RAW | Status.OFFSET_VALID, length, place, self.file.node)

    async def _read(self, verdict: Verdict | None, offset: int, bufs: Buffers) -> None:
        plan = None if verdict is None else await self._plan(verdict)
        if plan is None:
            await self._read_medium(offset, bufs)
            return
        self._damage(plan)
        for part in plan.parts:
            into = slice_buffers(bufs, part.start, part.end)
            if part.data is None:
                await self._read_medium(part.offset, into)
            else:
                copy_into(into, memoryview(part.data))
        for bit in plan.inverted:
            at = (bit >> 3) - offset
            (byte,) = slice_buffers(bufs, at, at + 1)
            byte[0] ^= 1 << (bit & 7)
        self._end(plan, "read", offset)

    async def _write(self, verdict: Verdict | None, offset: int, bufs: Buffers, flags: int) -> None:
        plan = None if verdict is None else await self._plan(verdict)
        if plan is None:
            await self._write_medium(offset, bufs, flags)
            return
        if not plan.durable:
            flags &= ~FUA
        for part in plan.parts:
            data = slice_buffers(bufs, part.start, part.end) if part.data is None else (memoryview(part.data),)
            await self._write_medium(part.offset, data, flags)
        self._damage(plan)
        self._end(plan, "write", offset)

    async def _zero(self, verdict: Verdict | None, offset: int, length: int, flags: int) -> None:
        plan = None if verdict is None else await self._plan(verdict)
        if plan is None:
            await self._zero_medium(offset, length, flags)
            return
        if not plan.durable:
            flags &= ~FUA
        for part in plan.parts:
            if part.data is None:
                await self._zero_medium(part.offset, part.end - part.start, flags)
            else:
                await self._write_medium(part.offset, (memoryview(part.data),), flags & FUA)
        self._damage(plan)
        self._end(plan, "write-zeroes", offset)

    def _end(self, plan: Plan, operation: str, offset: int) -> None:
        """Raise what *plan* has the request end with, if it is an error."""
        if plan.errno == errno.ENOTSUP:
            raise NotSupported(node_name=self.node.name, operation=operation)
        if plan.errno:
            raise BlockIOError(plan.errno, node_name=self.node.name, operation=operation, offset=offset)

    # -- the medium -----------------------------------------------------------------------------

    async def _read_medium(self, offset: int, bufs: Buffers) -> None:
        """Read as a medium with that damage does."""
        damage = self.medium.damage
        if not damage:
            await self.file.preadv(offset, bufs)
            return
        length = nbytes(bufs)
        found = damage.first_bad(offset, offset + length)
        if found is not None:
            sector, bad = found
            self._record(bad.rule, "latent", Request("read", offset, length), bad.errno, {"sector": sector})
            at = max(sector * SECTOR_SIZE, offset)
            raise BlockIOError(bad.errno, node_name=self.node.name, operation="read", offset=at)
        await self.file.preadv(offset, bufs)
        damage.invert(offset, bufs)

    async def _write_medium(self, offset: int, bufs: Buffers, flags: int) -> None:
        await self.file.pwritev(offset, bufs, flags)
        self._overwritten(offset, nbytes(bufs))

    async def _zero_medium(self, offset: int, length: int, flags: int) -> None:
        await self.file.pwrite_zeroes(offset, length, flags)
        self._overwritten(offset, length)

    def _overwritten(self, offset: int, length: int) -> None:
        if self.medium.damage and self.medium.damage.overwritten(offset, offset + length):
            self._refresh()

    def _damage(self, plan: Plan) -> None:
        """What *plan* does to the medium."""
        if plan.flips:
            self.medium.damage.flip(plan.flips, plan.rule)
        if plan.spoiled:
            self.medium.damage.spoil(plan.spoiled, plan.rule, plan.spoiled_errno)
        if plan.flips or plan.spoiled:
            self._refresh()

    # -- rules ----------------------------------------------------------------------------------

    async def _plan(self, verdict: Verdict) -> Plan | None:
        """What is done in place of the request, None if nothing else.  Suspends as long as rules keep it waiting."""
        for hit in verdict.hits:
            if hit.rule.action.is_fault:
                code = 0 if hit.outcome.plan is None else hit.outcome.plan.errno
                self._record(hit.rule.id, hit.rule.options.action, verdict.request, code, hit.outcome.details)
        for hit in verdict.hits:
            if hit.outcome.waits:
                await self._wait(hit, verdict.request)
        return verdict.plan

    def _record(self, rule: str, action: str, request: Request, code: int, details: dict[str, Json]) -> None:
        self.node.graph.ledger.record_fault(
            self.node,
            rule=rule,
            action=action,
            operation=request.operation,
            offset=request.offset,
            length=request.length,
            errno=code,
            **details,
        )

    async def _wait(self, hit: Hit, request: Request) -> None:
        """Suspend as long as *hit* wants it, unless the node is drained, its rule removed, or the request released."""
        seconds = hit.outcome.seconds
        if self._drains or hit.rule.removed or seconds == 0:
            return
        self._numbered += 1
        caller = current_request.get()
        pid = 0 if caller is None else caller.pid
        waiting = _Waiting(self._numbered, hit.rule.id, seconds, request, trio.current_time(), pid)
        self._waiting.append(waiting)
        try:
            with trio.move_on_after(math.inf if seconds is None else seconds):
                await waiting.released.wait()
        finally:
            self._waiting.remove(waiting)

    def drain_begin(self) -> None:
        self._drains += 1
        for waiting in self._waiting:
            waiting.released.set()

    def drain_end(self) -> None:
        self._drains -= 1

    def _add(self, options: FaultRule) -> str:
        """Add the rule that *options* describe; its id.  Raises OptionError."""
        rule = self.rules.add(options)
        if options.at_rest is True:
            outcome = self.rules.act_at_rest(rule)
            assert outcome.plan is not None
            self._damage(outcome.plan)
            self._record(rule.id, options.action, Request("none", 0, self.medium.length), 0, outcome.details)
        return rule.id

    def _rules_changed(self) -> None:
        self._refresh()
        self._refresh_events()
        self._refresh_length()

    def _refresh(self) -> None:
        """Take over which requests have to be looked at."""
        rules, damage = self.rules.by_operation, self.medium.damage
        damaged = bool(damage)
        self._reads = damaged or bool(rules["read"])
        self._writes = damaged or bool(rules["write"])
        self._zeroes = damaged or bool(rules["write-zeroes"])
        self._discards = bool(rules["discard"])
        self._flushes = bool(rules["flush"])
        self._statuses = damage.has_flips or bool(rules["block-status"])

    # -- the graph ------------------------------------------------------------------------------

    def child_resized(self, child: Child) -> None:
        if child is not self.file:
            return
        self.medium.length = child.node.driver.length
        if self.medium.damage.cut(self.medium.length):
            self._refresh()
        self._refresh_length()

    def _refresh_length(self) -> None:
        advertised = self.rules.advertised
        length = self.medium.length if advertised is None else advertised
        if self.node.is_open:
            self.node.set_length(length)
        else:
            self.length = length

    def child_refreshed(self, child: Child) -> None:
        if child is self.file:
            self._refresh_events()

    def _refresh_events(self) -> None:
        """Hear of events only if someone here or below makes use of them: announcing costs every request above."""
        wanted = self.rules.uses_events or self.file.debug_event is not None
        if wanted is not (self.debug_event is not None):
            self.debug_event = self._announced if wanted else None
            self.node.refresh_edges()

    async def _announced(self, event: str) -> None:
        self.rules.announce(event)
        below = self.file.debug_event
        # what an edge announces of its own requests, the one to the node below announces, too
        if below is not None and event not in EDGE_EVENTS:
            await below(event)

    # -- commands -------------------------------------------------------------------------------

    @driver_command("fault-rule-add", FaultRuleAdd, inserts=True)
    async def add_rule(self, arguments: FaultRuleAdd) -> Json:
        """Add a rule; what it is called."""
        ident = self._add(arguments.rule)
        if arguments.rule.at_rest is True:
            self.node.changed_aside()
        return {"node-name": self.node.name, "id": ident}

    @driver_command("fault-rule-remove", FaultRuleRemove)
    async def remove_rule(self, arguments: FaultRuleRemove) -> None:
        """Take a rule away; the damage that it has done stays."""
        self.rules.remove(arguments.id)
        self._release(lambda waiting: waiting.rule == arguments.id)

    @driver_command("query-fault-rules", QueryFaultRules)
    async def list_rules(self, arguments: QueryFaultRules) -> Json:
        now = trio.current_time()
        held = [
            {
                "request": waiting.number,
                "rule": waiting.rule,
                "operation": waiting.request.operation,
                "offset": waiting.request.offset,
                "length": waiting.request.length,
                "pid": waiting.caller,
                "seconds": round(now - waiting.since, 3),
            }
            for waiting in self._waiting
            if waiting.seconds is None
        ]
        return {
            "node-name": self.node.name,
            "seed": self.rules.seed,
            "state": self.rules.state,
            "rules": [rule.describe() for rule in self.rules],
            "flipped-bits": self.medium.damage.flipped_bits(),
            "bad-sectors": self.medium.damage.bad_sectors(),
            "held": held,
        }

    @driver_command("fault-release", FaultRelease)
    async def release(self, arguments: FaultRelease) -> Json:
        """Let requests go on that hang.  Raises CommandError if a rule or request is named that there is not."""
        if arguments.id is not UNSET:
            self.rules.find(arguments.id)
        released = self._release(
            lambda waiting: (
                waiting.seconds is None
                and arguments.id in (UNSET, waiting.rule)
                and arguments.request in (UNSET, waiting.number)
            )
        )
        if arguments.request is not UNSET and not released:
            raise CommandError(f"No request {arguments.request} is held")
        return {"released": released}

    def _release(self, concerned: Callable[[_Waiting], bool]) -> int:
        found = [waiting for waiting in self._waiting if concerned(waiting)]
        for waiting in found:
            waiting.released.set()
        return len(found)

    @driver_command("fault-heal", FaultHeal)
    async def heal(self, arguments: FaultHeal) -> Json:
        """Undo damage; the rules stay."""
        end = 1 << 63 if arguments.length is UNSET else arguments.offset + arguments.length
        rule = None if arguments.id is UNSET else arguments.id
        bits, sectors = self.medium.damage.heal(arguments.offset, end, rule)
        if bits or sectors:
            self._refresh()
            self.node.changed_aside()
        return {"bits": bits, "sectors": sectors}
