"""What becomes of a request that a rule has chosen, as a plan: nothing is done here, and nothing waited for.

A plan says which parts of the request reach the medium, and where; ``fusebd.drivers.fault.driver`` carries it out.  The
real things that are imitated are in the documentation of each action.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from errno import EIO, ENOSPC
from itertools import accumulate, pairwise
from typing import ClassVar

from msgspec import UNSET, UnsetType

from fusebd.block.child import FUA
from fusebd.block.options import Json
from fusebd.drivers.fault.chance import Dice, distribution
from fusebd.drivers.fault.damage import Damage
from fusebd.drivers.fault.options import SECTOR_SIZE, FaultRule, errno_number
from fusebd.drivers.fault.ranges import Ranges
from fusebd.errors import OptionError


@dataclass(slots=True)
class Medium:
    """What is below: *length* bytes, and what is wrong with them."""

    length: int
    damage: Damage = field(default_factory=Damage)


@dataclass(slots=True)
class Request:
    """One request on the filter.  Offset, length and end are in bytes, 0 for a flush."""

    operation: str
    offset: int
    length: int
    flags: int = 0
    end: int = field(init=False)

    def __post_init__(self) -> None:
        self.end = self.offset + self.length


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes *start* to *end* of a request, at byte *offset* of the medium.

    With *data* they are these instead: in the buffer of a read, which leaves the medium alone, or on the medium.
    """

    start: int
    end: int
    offset: int
    data: bytes | None = None


@dataclass(slots=True)
class Plan:
    """What is done for a request in place of the request: *parts*, in order; then it ends with *errno*, 0 for success.

    *flips* (bits) and *spoiled* (sectors) are what *rule* does to the medium: before a read, after a write.  *inverted*
    bits are wrong in the buffer of this read alone.  Without *durable*, a write is no FUA any more.
    """

    parts: list[Part] = field(default_factory=list)
    errno: int = 0
    flips: list[int] = field(default_factory=list)
    inverted: list[int] = field(default_factory=list)
    spoiled: list[int] = field(default_factory=list)
    spoiled_errno: int = EIO
    durable: bool = True
    rule: str = ""


@dataclass(slots=True)
class Outcome:
    """What an action does: to wait for *seconds* (None: until it is released), *plan*, or both.

    *details* are what the ledger says beside request and rule.
    """

    waits: bool = False
    seconds: float | None = None
    plan: Plan | None = None
    details: dict[str, Json] = field(default_factory=dict)


class Action:
    """Base of all.  A *terminal* action decides the request: no later rule gets to see it."""

    terminal: bool = True
    #: whether the ledger hears of it
    is_fault: ClassVar[bool] = True
    #: how many bytes it still lets through, if it counts them
    left: int | None = None

    def __init__(self, rule: FaultRule, ranges: Ranges, dice: Dice) -> None:
        self.rule, self.ranges, self.dice = rule, ranges, dice

    def check(self, medium: Medium) -> None:
        """Raises OptionError if the rule cannot be on *medium*."""

    def concerns(self, request: Request, medium: Medium) -> bool:
        """Whether there is something to do to *request*, which the rule is for in all other respects."""
        return True

    def act(self, request: Request, medium: Medium) -> Outcome:
        """What becomes of *request*."""
        raise NotImplementedError

    def act_at_rest(self, medium: Medium) -> Outcome:
        """What happens to *medium* at once."""
        raise NotImplementedError


def _given(value: int | UnsetType, otherwise: int) -> int:
    return otherwise if value is UNSET else int(value)


def _code(rule: FaultRule, otherwise: int) -> int:
    return otherwise if rule.errno is UNSET else errno_number(rule.errno)


def _whole(request: Request, offset: int | None = None) -> Part:
    return Part(0, request.length, request.offset if offset is None else offset)


def _places(parts: Iterable[Part]) -> list[list[int]]:
    """Where *parts* are on the medium, as the ledger says it: [offset, length]."""
    return [[part.offset, part.end - part.start] for part in parts if part.data is None]


class Error(Action):
    def act(self, request: Request, medium: Medium) -> Outcome:
        return Outcome(plan=Plan(errno=_code(self.rule, EIO)))


class Delay(Action):
    terminal = False

    def __init__(self, rule: FaultRule, ranges: Ranges, dice: Dice) -> None:
        super().__init__(rule, ranges, dice)
        self._draw = distribution(rule)

    def act(self, request: Request, medium: Medium) -> Outcome:
        seconds = self._draw(self.dice)
        return Outcome(waits=True, seconds=seconds, details={"seconds": seconds})


class Hang(Action):
    """Without an errno the request goes on when it is released."""

    def __init__(self, rule: FaultRule, ranges: Ranges, dice: Dice) -> None:
        super().__init__(rule, ranges, dice)
        self.terminal = rule.errno is not UNSET

    def act(self, request: Request, medium: Medium) -> Outcome:
        plan = Plan(errno=_code(self.rule, 0)) if self.terminal else None
        return Outcome(waits=True, plan=plan)


class SetState(Action):
    terminal = False
    is_fault = False

    def act(self, request: Request, medium: Medium) -> Outcome:
        return Outcome()


class ShortRead(Action):
    def concerns(self, request: Request, medium: Medium) -> bool:
        return _can_be_cut(self.rule, request)

    def act(self, request: Request, medium: Medium) -> Outcome:
        unit = _given(self.rule.unit, SECTOR_SIZE)
        got = self.rule.bytes if self.rule.bytes is not UNSET else _drawn_cut(self.dice, request, unit)
        rest = request.length - got
        data = self.dice.bytes(rest) if self.rule.fill == "random" else bytes(rest)
        parts = [Part(0, got, request.offset)] if got else []
        parts.append(Part(got, request.length, request.offset + got, data))
        return Outcome(plan=Plan(parts, _code(self.rule, 0)), details={"bytes": got})


def _can_be_cut(rule: FaultRule, request: Request) -> bool:
    """Whether a part of *request* can get through, and another not: one unit is never torn."""
    if rule.bytes is not UNSET:
        return request.length > rule.bytes
    unit = _given(rule.unit, SECTOR_SIZE)
    return request.length > 0 and request.offset // unit < (request.end - 1) // unit


def _drawn_cut(dice: Dice, request: Request, unit: int) -> int:
    """After how many bytes *request*, which can be cut, is cut in two: where a *unit* of the medium ends."""
    first = (request.offset // unit + 1) * unit - request.offset
    return first + dice.below(-(-(request.length - first) // unit)) * unit


class TornWrite(Action):
    def concerns(self, request: Request, medium: Medium) -> bool:
        return _can_be_cut(self.rule, request)

    def act(self, request: Request, medium: Medium) -> Outcome:
        parts: list[Part] = []
        at = 0
        for start, end in [*self._kept(request), (request.length, request.length)]:
            if at < start:
                parts += self._other(request, at, start)
            if start < end:
                parts.append(Part(start, end, request.offset + start))
            at = end
        return Outcome(plan=Plan(parts, _code(self.rule, 0)), details={"written": _places(parts)})

    def _kept(self, request: Request) -> list[tuple[int, int]]:
        """Which bytes of the request get through, in order."""
        rule, length, unit = self.rule, request.length, _given(self.rule.unit, SECTOR_SIZE)
        if rule.pattern in ("interleaved", "random"):
            edges = [0, *range((request.offset // unit + 1) * unit - request.offset, length, unit), length]
            units = list(pairwise(edges))
            if rule.pattern == "interleaved":
                kept = units[::2]
            else:
                kept = [each for each in units if self.dice.share() < 0.5]
            if len(kept) == len(units):  # then it would not be torn
                del kept[self.dice.below(len(units))]
            return Ranges(kept).all()
        if rule.bytes is not UNSET:
            return [(length - rule.bytes, length)] if rule.pattern == "suffix" else [(0, rule.bytes)]
        cut = _drawn_cut(self.dice, request, unit)
        return [(cut, length)] if rule.pattern == "suffix" else [(0, cut)]

    def _other(self, request: Request, start: int, end: int) -> list[Part]:
        if self.rule.fill is UNSET or self.rule.fill == "old":
            return []
        length = end - start
        data = self.dice.bytes(length) if self.rule.fill == "random" else bytes(length)
        return [Part(start, end, request.offset + start, data)]


class LostWrite(Action):
    def act(self, request: Request, medium: Medium) -> Outcome:
        return Outcome(plan=Plan())


class LyingFlush(Action):
    """Writes are concerned by the flush that is in them, FUA."""

    def concerns(self, request: Request, medium: Medium) -> bool:
        return request.operation == "flush" or bool(request.flags & FUA)

    def act(self, request: Request, medium: Medium) -> Outcome:
        parts = [_whole(request)] if request.operation != "flush" else []
        return Outcome(plan=Plan(parts, durable=False))


class _Elsewhere(Action):
    """*delta* bytes further, or at a place that is drawn."""

    def concerns(self, request: Request, medium: Medium) -> bool:
        if not request.length:
            return False
        if self.rule.delta is not UNSET:
            return 0 <= request.offset + self.rule.delta <= medium.length - request.length
        first, count = self._choice(request, medium)
        return count > 1 or (count == 1 and first != request.offset)

    def _choice(self, request: Request, medium: Medium) -> tuple[int, int]:
        """The first place there is to choose, and how many."""
        unit = _given(self.rule.unit, SECTOR_SIZE)
        start = _given(self.rule.target_offset, 0)
        end = min(start + _given(self.rule.target_length, medium.length), medium.length)
        first = -(-start // unit) * unit
        return first, max((end - request.length - first) // unit + 1, 0)

    def _target(self, request: Request, medium: Medium) -> int:
        if self.rule.delta is not UNSET:
            return request.offset + self.rule.delta
        first, count = self._choice(request, medium)
        unit = _given(self.rule.unit, SECTOR_SIZE)
        number = self.dice.below(count)
        if first + number * unit == request.offset:  # there it would be right
            number = (number + 1) % count
        return first + number * unit


class Misdirect(_Elsewhere):
    def act(self, request: Request, medium: Medium) -> Outcome:
        target = self._target(request, medium)
        return Outcome(plan=Plan([_whole(request, target)]), details={"to": target})


class Duplicate(_Elsewhere):
    def act(self, request: Request, medium: Medium) -> Outcome:
        target = self._target(request, medium)
        return Outcome(plan=Plan([_whole(request), _whole(request, target)]), details={"to": target})


class BitFlip(Action):
    def concerns(self, request: Request, medium: Medium) -> bool:
        return bool(self.ranges.clip(request.offset, min(request.end, medium.length)))

    def act(self, request: Request, medium: Medium) -> Outcome:
        bits = self._draw(self.ranges.clip(request.offset, min(request.end, medium.length)), medium)
        plan = Plan([_whole(request)])
        if self.rule.transient is True:
            plan.inverted = bits
        else:
            plan.flips = bits
        return Outcome(plan=plan, details=self._details(bits))

    def act_at_rest(self, medium: Medium) -> Outcome:
        bits = self._draw(self.ranges.clip(0, medium.length), medium)
        return Outcome(plan=Plan(flips=bits), details=self._details(bits))

    def _draw(self, places: list[tuple[int, int]], medium: Medium) -> list[int]:
        """Bits somewhere in *places*; those that are flipped already are left out."""
        numbered = _Numbered(places)
        count = _given(self.rule.count, 1)
        if self.rule.bit is not UNSET:
            bits = [numbered[n] * 8 + self.rule.bit for n in self.dice.distinct(count, len(numbered))]
        else:
            bits = [numbered[n >> 3] * 8 + (n & 7) for n in self.dice.distinct(count, len(numbered) * 8)]
        return [bit for bit in bits if not medium.damage.is_flipped(bit)]

    @staticmethod
    def _details(bits: list[int]) -> dict[str, Json]:
        return {"bits": [[bit >> 3, bit & 7] for bit in bits]}


class _Numbered:
    """The numbers in *ranges* (start, end), which are in order, put one behind the other."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        self._starts = [start for start, _ in ranges]
        self._before = [0, *accumulate(end - start for start, end in ranges)]

    def __len__(self) -> int:
        return self._before[-1]

    def __getitem__(self, number: int) -> int:
        index = bisect_right(self._before, number) - 1
        return self._starts[index] + number - self._before[index]


class Latent(Action):
    def concerns(self, request: Request, medium: Medium) -> bool:
        return bool(self.ranges.clip(request.offset, min(request.end, medium.length)))

    def act(self, request: Request, medium: Medium) -> Outcome:
        sectors = self._draw(self.ranges.clip(request.offset, min(request.end, medium.length)))
        code = _code(self.rule, EIO)
        plan = Plan(spoiled=sectors, spoiled_errno=code)
        if request.operation == "read":
            plan.errno = code
        else:
            plan.parts.append(_whole(request))
        return Outcome(plan=plan, details=self._details(sectors))

    def act_at_rest(self, medium: Medium) -> Outcome:
        sectors = self._draw(self.ranges.clip(0, medium.length))
        plan = Plan(spoiled=sectors, spoiled_errno=_code(self.rule, EIO))
        return Outcome(plan=plan, details=self._details(sectors))

    def _draw(self, places: list[tuple[int, int]]) -> list[int]:
        """Sectors that touch *places*, a whole unit at a time."""
        unit = _given(self.rule.unit, SECTOR_SIZE)
        units = _Numbered(Ranges((start // unit, -(-end // unit)) for start, end in places).all())
        each = unit // SECTOR_SIZE
        drawn = (units[n] * each for n in self.dice.distinct(_given(self.rule.count, 1), len(units)))
        return [first + within for first in drawn for within in range(each)]

    @staticmethod
    def _details(sectors: list[int]) -> dict[str, Json]:
        ranges = Ranges((sector, sector + 1) for sector in sectors).all()
        return {"bad": [[start * SECTOR_SIZE, (end - start) * SECTOR_SIZE] for start, end in ranges]}


class DiskFull(Action):
    """With *after_bytes* it counts what it lets through."""

    def __init__(self, rule: FaultRule, ranges: Ranges, dice: Dice) -> None:
        super().__init__(rule, ranges, dice)
        self.left = None if rule.after_bytes is UNSET else rule.after_bytes

    def _room(self, request: Request) -> int:
        """How many bytes of *request* there is room for."""
        if self.rule.at_offset is not UNSET:
            return min(max(self.rule.at_offset - request.offset, 0), request.length)
        assert self.left is not None
        return min(self.left, request.length)

    def concerns(self, request: Request, medium: Medium) -> bool:
        if self._room(request) < request.length:
            return True
        if self.left is not None:
            self.left -= request.length
        return False

    def act(self, request: Request, medium: Medium) -> Outcome:
        room = self._room(request)
        if self.left is not None:
            self.left -= room
        parts = [Part(0, room, request.offset)] if room else []
        return Outcome(plan=Plan(parts, ENOSPC), details={"bytes": room})


class Wrap(Action):
    def check(self, medium: Medium) -> None:
        if self.rule.capacity is not UNSET and self.rule.capacity > medium.length:
            raise OptionError(f"The capacity {self.rule.capacity} is more than the node has, {medium.length}")

    def _capacity(self, medium: Medium) -> int:
        return min(_given(self.rule.capacity, medium.length), medium.length)

    def concerns(self, request: Request, medium: Medium) -> bool:
        return 0 < self._capacity(medium) < request.end

    def act(self, request: Request, medium: Medium) -> Outcome:
        capacity, parts, at = self._capacity(medium), [], 0
        while at < request.length:
            offset = (request.offset + at) % capacity
            length = min(capacity - offset, request.length - at)
            parts.append(Part(at, at + length, offset))
            at += length
        return Outcome(plan=Plan(parts), details={"to": _places(parts)})


ACTIONS: dict[str, type[Action]] = {
    "error": Error,
    "delay": Delay,
    "hang": Hang,
    "set-state": SetState,
    "short-read": ShortRead,
    "torn-write": TornWrite,
    "lost-write": LostWrite,
    "lying-flush": LyingFlush,
    "misdirect": Misdirect,
    "duplicate": Duplicate,
    "bit-flip": BitFlip,
    "latent": Latent,
    "disk-full": DiskFull,
    "wrap": Wrap,
}
