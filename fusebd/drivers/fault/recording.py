"""A run of the fault filter in a file: what it began with, what was changed while it ran, and what was decided.

JSON lines.  The first one, the header, has the format and its version, seed and state, the rules with all that they
were declared with and how far they had come (``progress``, if the recording began later than the filter), and the
damage that there was.  Each of the others has a ``kind``:

``add``, ``remove``, ``release``, ``heal``
    what a command has changed;
``clock``
    the time at which a rule's ``after`` or ``until`` had passed: it stands still in between;
``decision``
    what a rule that was hit has done to a request, or to the medium at rest (operation ``none``).

Changes have their position ``at``: how many requests of each kind, and events, the filter had seen by then.  A decision
has the number of its request among those of its kind, so that it says the same if reads and writes, which different
tasks make, come in another order among each other.

What follows from the changes and from the damage is not here: a filter that begins alike and gets the same requests
does the same.  Each line is handed to the host before anything else happens, and is there if the daemon is killed.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType, field

from fusebd.block.options import Int, Json, OptionStruct, Size
from fusebd.drivers.fault.damage import Damage
from fusebd.drivers.fault.options import OPERATIONS, ActionName, FaultRule, Operation, rule_members
from fusebd.drivers.fault.rules import Hit, Rule, RuleProgress, RuleSet
from fusebd.errors import OpenError

log = logging.getLogger(__name__)

FORMAT = "fusebd fault recording"
VERSION = 1

#: kinds of requests, ``event`` for blkdebug events -> how many there have been
Position = dict[str, Size]
COUNTED = frozenset[str]({*OPERATIONS, "event"})


class FlippedBit(OptionStruct, frozen=True, kw_only=True):
    offset: Annotated[int, Meta(ge=0, lt=2**60)]
    bit: Annotated[int, Meta(ge=0, le=7)]
    rule: str


class BadSectors(OptionStruct, frozen=True, kw_only=True):
    offset: Size
    length: Size
    rule: str
    errno: Annotated[int, Meta(ge=1, le=511)]


class Header(OptionStruct, frozen=True, kw_only=True):
    format: str
    version: int
    seed: Int
    state: Int
    clock: float
    rules: list[FaultRule]
    progress: dict[str, RuleProgress] = field(default_factory=dict)
    flipped_bits: list[FlippedBit] = field(default_factory=list)
    bad_sectors: list[BadSectors] = field(default_factory=list)


class Add(OptionStruct, frozen=True, kw_only=True, omit_defaults=True):
    at: Position
    clock: float
    rule: FaultRule


class Remove(OptionStruct, frozen=True, kw_only=True, omit_defaults=True):
    at: Position
    id: str


class Release(OptionStruct, frozen=True, kw_only=True, omit_defaults=True):
    at: Position
    id: str | UnsetType = UNSET
    request: Size | UnsetType = UNSET


class Heal(OptionStruct, frozen=True, kw_only=True, omit_defaults=True):
    at: Position
    id: str | UnsetType = UNSET
    offset: Size = 0
    length: Size | UnsetType = UNSET


class Clock(OptionStruct, frozen=True, kw_only=True, omit_defaults=True):
    at: Position
    clock: float


class Decision(OptionStruct, frozen=True, kw_only=True, omit_defaults=True):
    """*number* counts the requests of the kind *operation*, from 1 on; *details* are those of the ledger's entry."""

    number: Size
    rule: str
    action: ActionName
    operation: Literal[Operation, "none"]
    offset: Size
    length: Size
    errno: Size = 0
    details: dict[str, Json] = field(default_factory=dict)


Change = Add | Remove | Release | Heal | Clock
KINDS: dict[str, type[Change | Decision]] = {
    "add": Add,
    "remove": Remove,
    "release": Release,
    "heal": Heal,
    "clock": Clock,
    "decision": Decision,
}
_NAMES = {kind: name for name, kind in KINDS.items()}


def as_json(line: Change | Decision) -> dict[str, Json]:
    """*line* as it is in the file."""
    return {"kind": _NAMES[type(line)], **msgspec.to_builtins(line)}


def declared(rule: Rule) -> FaultRule:
    """What *rule* was declared with, and its id, which may have been left out."""
    return msgspec.structs.replace(rule.options, id=rule.id)


def decisions(operation: str, number: int, offset: int, length: int, hits: list[Hit]) -> list[Decision]:
    """What *hits* on the request with that *number* decide."""
    return [
        Decision(
            number=number,
            rule=hit.rule.id,
            action=hit.rule.options.action,
            operation=operation,  # type: ignore[arg-type]
            offset=offset,
            length=length,
            errno=0 if hit.outcome.plan is None else hit.outcome.plan.errno,
            details=hit.outcome.details,
        )
        for hit in hits
    ]


class Recorder:
    """Writes down what happens to *rules* and to the medium with that *damage*, from now on, in the file *path*.

    *clock* gives seconds.  The time that rules see must be ``now`` while this is at work.  A file that cannot be
    written any more ends the recording, and nothing else: ``error`` says why.  Raises OpenError.
    """

    def __init__(self, path: str, rules: RuleSet, damage: Damage, clock: Callable[[], float]) -> None:
        self.path, self._rules, self._clock = path, rules, clock
        self.now = clock()
        self.error: str | None = None
        self.recorded = 0
        self._counts: dict[str, int] = {}
        self._boundary = math.inf
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise OpenError.from_os(f"Could not open '{path}'", error) from None
        except ValueError:
            raise OpenError(f"Could not open '{path}': a file name cannot have that") from None
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        try:
            self._put(self._header(damage))
        except OSError as error:
            self._file.close()
            raise OpenError.from_os(f"Could not write '{path}'", error) from None
        self.rules_changed()

    def _header(self, damage: Damage) -> dict[str, Json]:
        header: dict[str, Json] = {
            "format": FORMAT,
            "version": VERSION,
            "seed": self._rules.seed,
            "state": self._rules.state,
            "clock": self.now,
            "rules": [rule_members(declared(rule)) for rule in self._rules],
        }
        progress = {rule.id: rule.progress(self.now) for rule in self._rules}
        if come_far := {ident: msgspec.to_builtins(each) for ident, each in progress.items() if each is not None}:
            header["progress"] = come_far
        if damage:
            header["flipped-bits"], header["bad-sectors"] = damage.flipped_bits(), damage.bad_sectors()
        return header

    def rules_changed(self) -> None:
        """There are other rules than before."""
        self._boundary = self._rules.next_boundary(self.now)

    def tick(self) -> None:
        """Something happens that depends on the time."""
        self.now = self._clock()

    def arrive(self, kind: str) -> None:
        """A request arrives, or an event, that has not been decided about."""
        if self._boundary < math.inf and (now := self._clock()) >= self._boundary:
            self.now = now
            self.change(Clock, clock=now)
            self.rules_changed()
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def decide(self, operation: str, offset: int, length: int, hits: list[Hit]) -> None:
        """*hits* decide about the request that has arrived last, or about what is at rest."""
        number = self._counts.get(operation, 0)
        for decision in decisions(operation, number, offset, length, hits):
            self.recorded += 1
            self._write(as_json(decision))

    def change(self, kind: type[Change], **members: Any) -> None:
        """What *kind* stands for has been done."""
        self._write(as_json(kind(at=dict(self._counts), **members)))

    def _write(self, line: Json) -> None:
        if self.error is not None:
            return
        try:
            self._put(line)
        except OSError as error:
            self.error = os.strerror(error.errno or 0)
            log.error("%s: the recording has ended: %s", self.path, self.error)

    def _put(self, line: Json) -> None:
        data = memoryview(msgspec.json.encode(line) + b"\n")
        while data:
            data = data[self._file.write(data) :]

    def describe(self) -> dict[str, Json]:
        """How far it has come."""
        shown: dict[str, Json] = {"filename": self.path, "decisions": self.recorded}
        if self.error is not None:
            shown["error"] = self.error
        return shown

    def close(self) -> None:
        """The end of the recording."""
        self._file.close()
