"""A recorded run of the fault filter, read back and repeated.

The file may come from anywhere: all of it is read and checked before anything is done.  Changes are made at the
positions that they were recorded at: before the first request that came after them, and, unless what they do to the
medium has to wait for requests under way, as soon as all requests have been seen that came before them.  If there are
more requests than there were, as a cache may make them, only those kinds count that the changed rule is for.

Decisions are not taken from the file.  They are made anew, and compared.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import zip_longest

import msgspec
from msgspec import UNSET

from fusebd.block.options import Json, convert
from fusebd.drivers.fault.damage import Damage
from fusebd.drivers.fault.options import SECTOR_SIZE, FaultRule, check_rule
from fusebd.drivers.fault.ranges import ranges_of
from fusebd.drivers.fault.recording import (
    COUNTED,
    FORMAT,
    KINDS,
    VERSION,
    Add,
    Change,
    Clock,
    Decision,
    Header,
    Heal,
    Release,
    Remove,
    as_json,
)
from fusebd.drivers.fault.rules import RuleSet, operations_of
from fusebd.errors import FusebdError, OpenError, OptionError

#: bytes of a line: a rule may have a million ranges
_LONGEST = 1 << 27
#: sectors that are bad in the beginning
_MAX_SECTORS = 1 << 22


@dataclass(frozen=True, slots=True)
class Step:
    """A change at its position.  *concerns* are the kinds of requests to which it makes a difference.

    A *late* one is not made as long as the request before it may be under way.
    """

    change: Change
    concerns: frozenset[str]
    late: bool


@dataclass(slots=True)
class Run:
    """What a file has: *steps* in order, *decisions* by the kind of request."""

    path: str
    header: Header
    steps: deque[Step] = field(default_factory=deque)
    decisions: dict[str, deque[Decision]] = field(default_factory=dict)
    total: int = 0


# --- reading ---------------------------------------------------------------------------------------


def load(path: str) -> Run:
    """The run in the file *path*.  Raises OpenError; OptionError, which names the line, if it is not right."""
    try:
        # whatever it is, opening it waits for nobody
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise OpenError.from_os(f"Could not open '{path}'", error) from None
    except ValueError:
        raise OpenError(f"Could not open '{path}': a file name cannot have that") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OptionError(f"'{path}' is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        reader = _Reader(path)
        try:
            while line := file.readline(_LONGEST):
                reader.take(line)
        except FusebdError as error:
            raise OptionError(f"'{path}', line {reader.lines}: {error}") from None
        except OSError as error:
            raise OpenError.from_os(f"Could not read '{path}'", error) from None
    if reader.run is None:
        raise OptionError(f"'{path}', line 1: the file is empty")
    return reader.run


def _object(line: bytes) -> dict[str, Json]:
    if not line.endswith(b"\n"):
        raise OptionError("the line is too long" if len(line) == _LONGEST else "the line is cut off")
    try:
        value = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OptionError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise OptionError("not a JSON object")
    return value


class _Reader:
    """Takes line by line, and knows which rules there are by then."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.run: Run | None = None
        self.lines = 0
        self._concerns: dict[str, frozenset[str]] = {}
        #: rules that make up a length, to which a request under way may belong
        self._advertising: set[str] = set()
        self._counts: dict[str, int] = {}
        self._clock = 0.0

    def take(self, line: bytes) -> None:
        """Raises OptionError."""
        self.lines += 1
        value = _object(line)
        if self.run is None:
            self.run = Run(self._path, self._header(value))
            return
        name = value.pop("kind", None)
        kind = KINDS.get(name) if isinstance(name, str) else None
        if kind is None:
            raise OptionError("Parameter 'kind' is none that there is")
        entry = convert(value, kind)
        if isinstance(entry, Decision):
            self._decision(self.run, entry)
        else:
            self._change(self.run, entry)

    def _header(self, value: dict[str, Json]) -> Header:
        if value.get("format") != FORMAT:
            raise OptionError("not a recording of the fault driver")
        if value.get("version") != VERSION:
            raise OptionError(f"not version {VERSION} of the format")
        header = convert(value, Header)
        self._clock = header.clock
        for rule in header.rules:
            self._rule(rule)
        for name in header.progress:
            self._known(name)
        return header

    def _rule(self, rule: FaultRule) -> frozenset[str]:
        """*rule* is added; the kinds of requests to which it makes a difference."""
        check_rule(rule)
        if rule.id is UNSET:
            raise OptionError("Parameter 'rule.id' is missing")
        if rule.id in self._concerns:
            raise OptionError(f"Duplicate ID '{rule.id}' for fault rule")
        if rule.advertised is not UNSET:
            self._advertising.add(rule.id)
        of_all = rule.event not in (UNSET, "none") or rule.advertised is not UNSET or rule.at_rest is True
        self._concerns[rule.id] = COUNTED if of_all else operations_of(rule, ranges_of(rule))
        return self._concerns[rule.id]

    def _known(self, ident: str) -> frozenset[str]:
        if ident not in self._concerns:
            raise OptionError(f"No fault rule with id '{ident}'")
        return self._concerns[ident]

    def _decision(self, run: Run, decision: Decision) -> None:
        queue = run.decisions.setdefault(decision.operation, deque())
        if (decision.number == 0) is not (decision.operation == "none"):
            raise OptionError("Parameter 'number' is not one of a request")
        if queue and decision.number < queue[-1].number:
            raise OptionError("Parameter 'number' is smaller than before")
        queue.append(decision)
        run.total += 1

    def _change(self, run: Run, change: Change) -> None:
        counts = change.at
        if unknown := counts.keys() - COUNTED:
            raise OptionError(f"Parameter 'at' does not accept value '{min(unknown)}'")
        if any(counts.get(name, 0) < count for name, count in self._counts.items()):
            raise OptionError("Parameter 'at' is before that of an earlier line")
        self._counts = counts
        if isinstance(change, (Add, Clock)):
            if change.clock < self._clock:
                raise OptionError("Parameter 'clock' is before that of an earlier line")
            self._clock = change.clock
        concerns, late = COUNTED, False
        if isinstance(change, Add):
            concerns, late = self._rule(change.rule), change.rule.at_rest is True
        elif isinstance(change, Remove):
            concerns, late = self._known(change.id), change.id in self._advertising
            del self._concerns[change.id]
            self._advertising.discard(change.id)
        elif isinstance(change, (Release, Heal)):
            late = True
        run.steps.append(Step(change, concerns, late))


# --- repeating -------------------------------------------------------------------------------------


class Replay:
    """Repeats *run*: *make* makes a change (FusebdError: it cannot), *tell* is told of the first difference.

    ``clock`` is the time, in seconds, that rules see: it stands still until the next change that has one.
    """

    def __init__(self, run: Run, make: Callable[[Change], None], tell: Callable[[dict[str, Json]], None]) -> None:
        self.path, self.clock, self._total = run.path, run.header.clock, run.total
        self._steps, self._decisions = run.steps, run.decisions
        self._make, self._tell = make, tell
        self._counts: dict[str, int] = {}
        self._latest: tuple[str, int] = ("none", 0)
        self.compared = 0
        self.diverged: dict[str, Json] | None = None

    def begin(self, header: Header, rules: RuleSet, damage: Damage, length: int) -> None:
        """Have *rules* and *damage* of a medium of *length* bytes be what they were.  Raises OptionError."""
        where = f"'{self.path}', line 1"
        try:
            for rule in header.rules:
                progress = header.progress.get(str(rule.id))
                if progress is None:
                    rules.add(rule)
                else:
                    rules.restore(rule, progress)
            _restore(header, damage, length)
        except OptionError as error:
            raise error.prefixed(where) from None

    def arrive(self, kind: str) -> None:
        """A request arrives, or an event, that has not been decided about: make the changes that came before it."""
        self.catch_up(late=True)
        number = self._counts.get(kind, 0) + 1
        due = 0
        for index, step in enumerate(self._steps, 1):
            if step.change.at.get(kind, 0) >= number:
                break
            if kind in step.concerns:
                due = index
        for _ in range(due):
            self._next()
        self._counts[kind] = number
        self._latest = kind, number

    def catch_up(self, *, late: bool) -> None:
        """Make the changes whose position has been reached; with *late* those, too, that come late."""
        while self._steps and (late or not self._steps[0].late) and self._reached(self._steps[0]):
            self._next()

    def _reached(self, step: Step) -> bool:
        return all(self._counts.get(kind, 0) >= count for kind, count in step.change.at.items())

    def _next(self) -> None:
        change = self._steps.popleft().change
        if isinstance(change, (Add, Clock)):
            self.clock = change.clock
        try:
            self._make(change)
        except FusebdError as error:
            self._differs(as_json(change), {"error": str(error)})

    def number(self, operation: str) -> int:
        """The number of the latest request of the kind *operation*; 0 for what is at rest."""
        return self._counts.get(operation, 0)

    def decide(self, operation: str, found: Collection[Decision]) -> None:
        """*found* has been decided about the latest request of the kind *operation*."""
        queue = self._decisions.get(operation)
        number = self.number(operation)
        expected: list[Decision] = []
        while queue and queue[0].number <= number and (operation != "none" or len(expected) < len(found)):
            expected.append(queue.popleft())
        for one, other in zip_longest(expected, found):
            if one != other:
                self._differs(None if one is None else as_json(one), None if other is None else as_json(other))
                return
            self.compared += self.diverged is None

    def _differs(self, expected: Json, found: Json) -> None:
        if self.diverged is None:
            kind, number = self._latest
            position = {"operation": kind, "number": number}
            self.diverged = {"position": position, "expected": expected, "found": found}
            self._tell(self.diverged)

    def describe(self) -> dict[str, Json]:
        """How far it has come: how many decisions were as they had been, of how many."""
        shown: dict[str, Json] = {"filename": self.path, "decisions": self.compared, "recorded": self._total}
        if self.diverged is not None:
            shown["diverged"] = self.diverged
        return shown


def _restore(header: Header, damage: Damage, length: int) -> None:
    """Do the *damage* that *header* has.  Raises OptionError."""
    bits: dict[str, list[int]] = {}
    for flipped in header.flipped_bits:
        if flipped.offset >= length:
            raise OptionError(f"flipped-bits: {flipped.offset} is behind the end of the node")
        bits.setdefault(flipped.rule, []).append(flipped.offset * 8 + flipped.bit)
    for rule, numbers in bits.items():
        damage.flip(numbers, rule)
    sectors: dict[tuple[str, int], list[int]] = {}
    left = _MAX_SECTORS
    for bad in header.bad_sectors:
        first, count = bad.offset // SECTOR_SIZE, -(-bad.length // SECTOR_SIZE)
        left -= count
        if bad.offset + bad.length > -(-length // SECTOR_SIZE) * SECTOR_SIZE or left < 0:
            raise OptionError(f"bad-sectors: {bad.length} at {bad.offset} are more than there can be")
        sectors.setdefault((bad.rule, bad.errno), []).extend(range(first, first + count))
    for (rule, errno), spoiled in sectors.items():
        damage.spoil(spoiled, rule, errno)
