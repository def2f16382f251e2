"""fault: whatever real storage does to requests and to data, by rules that come and go while the node is in use.

``options.py`` declares the rules, ``rules.py`` decides which request gets which fault, ``actions.py`` plans what that
means for it, ``damage.py`` keeps what is wrong with the medium; here all that is carried out.  Everything that is done
to a request is in the ledger.  The same seed and the same requests give the same faults; ``recording.py`` writes down
what a run consists of, ``replay.py`` repeats it.

Options: fusebd's own; QEMU has no such driver.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import trio
from msgspec import UNSET, UnsetType

from fusebd.block.caller import current_request
from fusebd.block.child import FUA, copy_into, slice_buffers
from fusebd.block.debugevents import EDGE_EVENTS, EVENTS
from fusebd.block.driver import (
    BlockStatus,
    Buffers,
    Bypass,
    Child,
    FilterDriver,
    Node,
    Status,
    driver_command,
    nbytes,
    register,
)
from fusebd.block.opening import Opening
from fusebd.block.options import Json
from fusebd.block.perms import Role
from fusebd.drivers.fault.actions import Medium, Plan, Request
from fusebd.drivers.fault.commands import (
    FaultHeal,
    FaultRecord,
    FaultRecordEnd,
    FaultRelease,
    FaultRuleAdd,
    FaultRuleRemove,
    QueryFaultRules,
)
from fusebd.drivers.fault.options import SECTOR_SIZE, FaultOptions, FaultRule
from fusebd.drivers.fault.recording import Add, Change, Heal, Recorder, Release, Remove, decisions, declared
from fusebd.drivers.fault.replay import Replay, Run, load
from fusebd.drivers.fault.rules import Hit, Rule, RuleSet, Verdict
from fusebd.errors import BlockIOError, CommandError, NotSupported, OptionError


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

    strong_options: ClassVar[frozenset[str]] = frozenset({"seed", "state", "rules", "replay"})

    def __init__(self, node: Node, file: Child, options: FaultOptions, run: Run | None = None) -> None:
        super().__init__(node, file)
        self.medium = Medium(file.node.driver.length)
        self._recorder: Recorder | None = None
        self._replay = None if run is None else Replay(run, self._repeat, self._diverged)
        start = options if run is None else run.header
        self.rules = RuleSet(
            start.seed,
            start.state,
            self.medium,
            clock=self._now,
            same=_is_thread_of,
            changed=self._rules_changed,
        )
        self._waiting: list[_Waiting] = []
        self._numbered = 0
        self._drains = 0
        # whether requests of a kind have to be looked at
        self._reads = self._writes = self._zeroes = self._discards = self._flushes = self._statuses = False
        self._decide = self.rules.decide
        self._bypass: tuple[Bypass | None, Bypass | None] = None, None
        self._concerns_read, self._concerns_write = (partial(self.rules.touch, kind) for kind in ("read", "write"))
        if run is not None and self._replay is not None:
            self._replay.begin(run.header, self.rules, self.medium.damage, self.medium.length)
        for index, rule in enumerate(options.rules):
            try:
                self.rules.add(rule)
            except OptionError as error:
                raise error.prefixed(f"rules.{index}") from None

    @classmethod
    async def open(cls, opening: Opening, options: FaultOptions) -> Fault:
        run = None
        if options.replay is not UNSET:
            for name in ("seed", "state", "rules"):
                if name in options.given:
                    raise OptionError(f"Parameters 'replay' and '{name}' exclude each other")
            run = await trio.to_thread.run_sync(load, options.replay)
        file = await opening.child("file", options.file, Role.FILTERED | Role.PRIMARY)
        driver = cls(opening.node, file, options, run)
        if options.record is not UNSET:
            driver._record_to(options.record)
        driver._begin()
        return driver

    def _begin(self) -> None:
        """Everything is there: what is at rest happens, and what a recording had before the first request."""
        for rule in list(self.rules):
            if not rule.hits:
                self._act_at_rest(rule)
        self._taping_changed()
        if self._replay is not None:
            self._replay.catch_up(late=True)

    async def close(self) -> None:
        self._end_recording()

    # -- requests -------------------------------------------------------------------------------

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        if self._reads:
            verdict = self._decide("read", offset, nbytes(bufs), 0)
            if verdict is not None or self.medium.damage:
                await self._read(verdict, offset, bufs)
                return
        await self.file.preadv(offset, bufs)

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        if self._writes:
            verdict = self._decide("write", offset, nbytes(bufs), flags)
            if verdict is not None or self.medium.damage:
                await self._write(verdict, offset, bufs, flags)
                return
        await self.file.pwritev(offset, bufs, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        if self._zeroes:
            verdict = self._decide("write-zeroes", offset, length, flags)
            if verdict is not None or self.medium.damage:
                await self._zero(verdict, offset, length, flags)
                return
        await self.file.pwrite_zeroes(offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        if self._discards:
            verdict = self._decide("discard", offset, length, 0)
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
            verdict = self._decide("flush", 0, 0, 0)
            plan = None if verdict is None else await self._plan(verdict)
            if plan is not None:
                self._end(plan, "flush", 0)
                return
        await self.file.flush()

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """Where bits are flipped there is data, whatever is below."""
        place = offset
        if self._statuses:
            verdict = self._decide("block-status", offset, length, 0)
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
        if seconds is None and self._replay is not None:
            self._replay.catch_up(late=True)  # that it is released may be next
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
        if self._recorder is not None:
            self._recorder.tick()
        rule = self.rules.add(options)
        if self._recorder is not None:
            self._recorder.change(Add, clock=self._recorder.now, rule=declared(rule))
        self._act_at_rest(rule)
        return rule.id

    def _act_at_rest(self, rule: Rule) -> None:
        """What *rule* does at once, if it is at rest."""
        if rule.options.at_rest is True:
            outcome = self.rules.act_at_rest(rule)
            assert outcome.plan is not None
            self._damage(outcome.plan)
            request = Request("none", 0, self.medium.length)
            self._record(rule.id, rule.options.action, request, 0, outcome.details)
            self._decided(request.operation, 0, request.length, [Hit(rule, outcome)])

    def _rules_changed(self) -> None:
        self._refresh()
        self._refresh_events()
        self._refresh_length()
        if self._recorder is not None:
            self._recorder.rules_changed()

    def _refresh(self) -> None:
        """Take over which requests have to be looked at."""
        rules, damage = self.rules.by_operation, self.medium.damage
        taped = self._is_taped
        damaged = taped or bool(damage)
        self._reads = damaged or bool(rules["read"])
        self._writes = damaged or bool(rules["write"])
        self._zeroes = damaged or bool(rules["write-zeroes"])
        self._discards = taped or bool(rules["discard"])
        self._flushes = taped or bool(rules["flush"])
        self._statuses = taped or damage.has_flips or bool(rules["block-status"])
        self._refresh_bypass()

    def _refresh_bypass(self) -> None:
        """Have requests go past that nothing can happen to."""
        read = write = None
        if not self._is_taped and not self.medium.damage and self.length == self.medium.length:
            rules = self.rules.by_operation
            read = Bypass(self.file, self._concerns_read if rules["read"] else None)
            write = Bypass(self.file, self._concerns_write if rules["write"] else None)
        if (read, write) != self._bypass:
            self._bypass = read, write
            self.node.refresh_edges()

    def read_bypass(self) -> Bypass | None:
        return self._bypass[0]

    def write_bypass(self) -> Bypass | None:
        return self._bypass[1]

    # -- recording and replay -------------------------------------------------------------------

    @property
    def _is_taped(self) -> bool:
        """Whether requests and events are counted, because they are recorded or replayed."""
        return self._recorder is not None or self._replay is not None

    def _taping_changed(self) -> None:
        self._decide = self._decide_taped if self._is_taped else self.rules.decide
        self._refresh()
        self._refresh_events()

    def _now(self) -> float:
        """The time in seconds, as rules see it: in a replay that of the recording."""
        if self._recorder is not None:
            return self._recorder.now
        return self._base_time()

    def _base_time(self) -> float:
        return trio.current_time() if self._replay is None else self._replay.clock

    def _arrive(self, kind: str) -> None:
        if self._replay is not None:
            self._replay.arrive(kind)
        if self._recorder is not None:
            self._recorder.arrive(kind)

    def _decide_taped(self, operation: str, offset: int, length: int, flags: int = 0) -> Verdict | None:
        self._arrive(operation)
        verdict = self.rules.decide(operation, offset, length, flags)
        hits = [] if verdict is None else verdict.hits
        self._decided(operation, offset, length, hits)
        # a request that is going to hang has not been there yet when those were released that did
        if self._replay is not None and not any(hit.outcome.waits and hit.outcome.seconds is None for hit in hits):
            self._catch_up()
        return verdict

    def _decided(self, operation: str, offset: int, length: int, hits: list[Hit]) -> None:
        if self._recorder is not None:
            self._recorder.decide(operation, offset, length, hits)
        if self._replay is not None:
            number = self._replay.number(operation)
            self._replay.decide(operation, decisions(operation, number, offset, length, hits))

    def _catch_up(self) -> None:
        if self._replay is not None:
            self._replay.catch_up(late=any(waiting.seconds is None for waiting in self._waiting))

    def _repeat(self, change: Change) -> None:
        """Make *change* of a recording.  Raises FusebdError if that cannot be."""
        if isinstance(change, Add):
            self._add(change.rule)
            if change.rule.at_rest is True:
                self.node.changed_aside()
        elif isinstance(change, Remove):
            self._remove(change.id)
        elif isinstance(change, Release):
            self._let_go(change.id, change.request)
        elif isinstance(change, Heal):
            self._heal(change.id, change.offset, change.length)

    def _diverged(self, difference: dict[str, Json]) -> None:
        self.node.emit("FAULT_REPLAY_DIVERGED", {"node-name": self.node.public_name, **difference})

    def _record_to(self, filename: str) -> None:
        replay = self._replay
        if replay is not None and os.path.exists(filename) and os.path.samefile(filename, replay.path):
            raise OptionError(f"'{filename}' is what is replayed")
        self._recorder = Recorder(filename, self.rules, self.medium.damage, self._base_time)

    def _end_recording(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
            self._taping_changed()

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
        self._refresh_bypass()

    def child_refreshed(self, child: Child) -> None:
        if child is self.file:
            self._refresh_events()

    def _refresh_events(self) -> None:
        """Hear of events only if someone here or below makes use of them: announcing costs every request above.

        A recording counts all, and so does its replay.
        """
        # what an edge announces of its own requests, the one to the node below announces, too
        below = self.file.events - EDGE_EVENTS
        events = frozenset(EVENTS) if self._is_taped else self.rules.events | below
        if events != self.listens:
            self.listens = events
            self.node.refresh_edges()

    def announced(self, event: str) -> Awaitable[None] | None:
        if self._is_taped:
            self._arrive("event")
        self.rules.announce(event)
        self._catch_up()
        if event not in EDGE_EVENTS and event in self.file.events:
            return self.file.announce(event)
        return None

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
        self._remove(arguments.id)

    def _remove(self, ident: str) -> None:
        self.rules.remove(ident)
        if self._recorder is not None:
            self._recorder.change(Remove, id=ident)
        self._release(lambda waiting: waiting.rule == ident)

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
        shown: dict[str, Json] = {
            "node-name": self.node.name,
            "seed": self.rules.seed,
            "state": self.rules.state,
            "rules": [rule.describe() for rule in self.rules],
            "flipped-bits": self.medium.damage.flipped_bits(),
            "bad-sectors": self.medium.damage.bad_sectors(),
            "held": held,
        }
        if self._recorder is not None:
            shown["recording"] = self._recorder.describe()
        if self._replay is not None:
            shown["replay"] = self._replay.describe()
        return shown

    @driver_command("fault-release", FaultRelease)
    async def release(self, arguments: FaultRelease) -> Json:
        """Let requests go on that hang.  Raises CommandError if a rule or request is named that there is not."""
        if arguments.id is not UNSET:
            self.rules.find(arguments.id)
        released = self._let_go(arguments.id, arguments.request)
        if arguments.request is not UNSET and not released:
            raise CommandError(f"No request {arguments.request} is held")
        return {"released": released}

    def _let_go(self, ident: str | UnsetType, request: int | UnsetType) -> int:
        released = self._release(
            lambda waiting: (
                waiting.seconds is None and ident in (UNSET, waiting.rule) and request in (UNSET, waiting.number)
            )
        )
        if released and self._recorder is not None:
            self._recorder.change(Release, id=ident, request=request)
        return released

    def _release(self, concerned: Callable[[_Waiting], bool]) -> int:
        found = [waiting for waiting in self._waiting if concerned(waiting)]
        for waiting in found:
            waiting.released.set()
        return len(found)

    @driver_command("fault-heal", FaultHeal)
    async def heal(self, arguments: FaultHeal) -> Json:
        """Undo damage; the rules stay."""
        bits, sectors = self._heal(arguments.id, arguments.offset, arguments.length)
        return {"bits": bits, "sectors": sectors}

    def _heal(self, ident: str | UnsetType, offset: int, length: int | UnsetType) -> tuple[int, int]:
        end = 1 << 63 if length is UNSET else offset + length
        bits, sectors = self.medium.damage.heal(offset, end, None if ident is UNSET else ident)
        if bits or sectors:
            if self._recorder is not None:
                self._recorder.change(Heal, id=ident, offset=offset, length=length)
            self._refresh()
            self.node.changed_aside()
        return bits, sectors

    @driver_command("fault-record", FaultRecord, inserts=True)
    async def record(self, arguments: FaultRecord) -> Json:
        """Record what happens from now on.  Raises CommandError if that is done already, OpenError."""
        if self._recorder is not None:
            raise CommandError(f"Node '{self.node.name}' is recorded to '{self._recorder.path}' already")
        self._record_to(arguments.filename)
        self._taping_changed()
        return {"node-name": self.node.name}

    @driver_command("fault-record-end", FaultRecordEnd)
    async def end_record(self, arguments: FaultRecordEnd) -> None:
        """End the recording.  Raises CommandError if there is none, or not all of it."""
        recorder = self._recorder
        if recorder is None:
            raise CommandError(f"Node '{self.node.name}' is not recorded")
        self._end_recording()
        if recorder.error is not None:
            raise CommandError(f"Could not write '{recorder.path}': {recorder.error}")
