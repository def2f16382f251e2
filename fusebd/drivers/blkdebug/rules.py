"""blkdebug's rules: which event arms which error, and which request gets it.  No I/O, no waiting.

A rule belongs to one event.  When the event is announced, the event's rules whose state is 0 (any) or the state at
that moment are taken in the order in which they were added:

- inject rules, if there are any, become the *active* rules in place of those that were; if there are none, the
  active rules stay, and go on failing requests, whatever events follow;
- the first set-state rule decides the state that holds after the event;
- every breakpoint is used up, and stops whoever announced the event.

A request is decided by the first active rule that covers its kind and its range: the rule's errno is injected, or,
if that is 0, nothing is, and later rules do not get to see the request.  A rule marked ``once`` is gone after that.

Semantics: QEMU block/blkdebug.c, docs/devel/testing/blkdebug.rst.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import UNSET, Meta, UnsetType

from fusebd.block.debugevents import BlkdebugEvent
from fusebd.block.options import Int, Json, OptionStruct
from fusebd.errors import CommandError, OptionError

IoType = Literal["read", "write", "write-zeroes", "discard", "flush", "block-status"]
IO_TYPES: tuple[str, ...] = get_args(IoType)
_DEFAULT_IO_TYPES = frozenset(IO_TYPES) - {"block-status"}

SECTOR_SIZE = 512
#: the initial state
FIRST_STATE = 1
#: the kernel takes no larger errno in the answer to a FUSE request
_MAX_ERRNO = 511
#: what a rule can be called
IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")


class InjectErrorOptions(OptionStruct, frozen=True, kw_only=True):
    """A rule that makes requests fail (QAPI BlkdebugInjectErrorOptions)."""

    event: Annotated[BlkdebugEvent, Meta(description="event that arms the rule")]
    state: Annotated[Int | UnsetType, Meta(description="state in which the event counts; any if 0 or absent")] = UNSET
    iotype: Annotated[IoType | UnsetType, Meta(description="requests that fail; all but block-status if absent")] = (
        UNSET
    )
    errno: Annotated[
        Int | UnsetType, Meta(description="error to inject, 0 to let the request through; EIO if absent")
    ] = UNSET
    sector: Annotated[
        Int | UnsetType, Meta(description="512-byte sector that the request has to touch; any if -1 or absent")
    ] = UNSET
    once: Annotated[bool | UnsetType, Meta(description="remove the rule when it has failed a request")] = UNSET
    immediately: Annotated[bool | UnsetType, Meta(description="fail without a trip through the scheduler")] = UNSET


class SetStateOptions(OptionStruct, frozen=True, kw_only=True):
    """A rule that changes the state (QAPI BlkdebugSetStateOptions)."""

    event: Annotated[BlkdebugEvent, Meta(description="event that changes the state")]
    state: Annotated[Int | UnsetType, Meta(description="state in which the event counts; any if 0 or absent")] = UNSET
    new_state: Annotated[Int, Meta(description="state after the event")] = msgspec.field(name="new_state")


class BlkdebugRule(OptionStruct, frozen=True, kw_only=True):
    """A rule as ``blkdebug-rule-add`` takes it: one of the two, as in the lists of blockdev-add."""

    id: Annotated[str | UnsetType, Meta(description="what the rule is called; a number if absent")] = UNSET
    inject_error: Annotated[InjectErrorOptions | UnsetType, Meta(description="make requests fail")] = UNSET
    set_state: Annotated[SetStateOptions | UnsetType, Meta(description="change the state")] = UNSET

    def options(self) -> InjectErrorOptions | SetStateOptions:
        """The one of the two that was given.  Raises OptionError, also for an id that is no identifier."""
        if self.id is not UNSET and not IDENTIFIER.match(self.id):
            raise OptionError("Parameter 'id' expects an identifier")
        given = [options for options in (self.inject_error, self.set_state) if options is not UNSET]
        if len(given) != 1:
            raise OptionError("Parameter 'rule' expects one of 'inject-error' and 'set-state'")
        return given[0]


def _given(value: int | UnsetType, default: int) -> int:
    # Which options were given shows in the name that the node is reported under, so they have no defaults.
    return default if value is UNSET else int(value)


@dataclass(slots=True, eq=False)
class Rule:
    """*id* is unique among the rules of a node, "" if it has none; *hits* counts how often it decided something."""

    id: str
    event: str
    state: int
    hits: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class InjectRule(Rule):
    """Fails requests of the kinds in *io_types* that touch byte *offset* (None: any request)."""

    options: InjectErrorOptions
    io_types: frozenset[str] = _DEFAULT_IO_TYPES
    errno: int = errno.EIO
    offset: int | None = None
    once: bool = False
    immediately: bool = False

    def covers(self, io_type: str, offset: int, length: int) -> bool:
        """Whether the rule decides a request of *io_type* on *length* bytes from *offset* on."""
        if io_type not in self.io_types:
            return False
        return self.offset is None or offset <= self.offset < offset + length


@dataclass(slots=True, eq=False, kw_only=True)
class SetStateRule(Rule):
    options: SetStateOptions
    new_state: int


@dataclass(slots=True, eq=False, kw_only=True)
class Breakpoint(Rule):
    """Stops, once, whoever announces the event; *tag* is what the request is resumed by."""

    tag: str


class RuleSet:
    """The rules of one node, its state, and the rules that are active now."""

    def __init__(self) -> None:
        self.state = FIRST_STATE
        self.active: list[InjectRule] = []
        self._rules: list[Rule] = []
        self._by_event: dict[str, list[Rule]] = {}
        #: for events that do nothing but inject, whatever the state: the list that becomes active
        self.always: dict[str, list[InjectRule]] = {}
        self._numbered = 0

    def __iter__(self) -> Iterator[Rule]:
        """The rules and breakpoints, in the order in which they were added."""
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def __contains__(self, ident: str) -> bool:
        return any(rule.id == ident for rule in self)

    def add(self, options: InjectErrorOptions | SetStateOptions, ident: str | None = None) -> Rule:
        """Add the rule that *options* describe, called *ident* or by a number of its own, and return it.

        Raises OptionError if *ident* is taken or the errno is none that a request can fail with.
        """
        if ident is not None and ident in self:
            raise OptionError(f"Duplicate ID '{ident}' for blkdebug rule")
        state = _given(options.state, 0)
        if isinstance(options, SetStateOptions):
            ident = ident or self._number()
            return self._enter(SetStateRule(ident, options.event, state, options=options, new_state=options.new_state))
        code, sector = _given(options.errno, errno.EIO), _given(options.sector, -1)
        if not 0 <= code <= _MAX_ERRNO:
            raise OptionError(f"Value '{code}' is out of range for parameter 'errno'")
        return self._enter(
            InjectRule(
                ident or self._number(),
                options.event,
                state,
                options=options,
                io_types=_DEFAULT_IO_TYPES if options.iotype is UNSET else frozenset((str(options.iotype),)),
                errno=code,
                offset=None if sector == -1 else sector * SECTOR_SIZE,
                once=options.once is True,
                immediately=options.immediately is True,
            )
        )

    def add_breakpoint(self, event: str, tag: str) -> Breakpoint:
        """Stop the next request that announces *event*; *event* is one of EVENTS."""
        rule = Breakpoint("", event, 0, tag=tag)
        self._enter(rule)
        return rule

    def _number(self) -> str:
        # A user's own id begins with a letter, so these never collide with it.
        self._numbered += 1
        return str(self._numbered)

    def _enter(self, rule: Rule) -> Rule:
        self._rules.append(rule)
        self._by_event.setdefault(rule.event, []).append(rule)
        self._sort_out(rule.event)
        return rule

    def _sort_out(self, event: str) -> None:
        """The rules of *event* are others: whether its announcement always does the same."""
        rules = self._by_event.get(event, [])
        injecting = [rule for rule in rules if isinstance(rule, InjectRule) and not rule.state]
        if injecting and len(injecting) == len(rules):
            self.always[event] = injecting
        else:
            self.always.pop(event, None)

    def remove(self, ident: str) -> None:
        """Take the rule *ident* away, active or not.  Raises CommandError if there is none."""
        rule = next((rule for rule in self if rule.id == ident), None)
        if rule is None or not ident:
            raise CommandError(f"No blkdebug rule with id '{ident}'")
        self._drop(rule)

    @property
    def events(self) -> frozenset[str]:
        """Those that do something when they are announced."""
        return frozenset(self._by_event)

    @property
    def breakpoints(self) -> list[Breakpoint]:
        """Those that have not been reached yet."""
        return [rule for rule in self if isinstance(rule, Breakpoint)]

    def remove_breakpoints(self, tag: str) -> int:
        """Take away the breakpoints that have not been reached yet; how many there were."""
        found = [rule for rule in self.breakpoints if rule.tag == tag]
        for rule in found:
            self._drop(rule)
        return len(found)

    def _drop(self, rule: Rule) -> None:
        self._rules.remove(rule)
        rules = self._by_event[rule.event]
        rules.remove(rule)
        if not rules:
            del self._by_event[rule.event]
        self._sort_out(rule.event)
        if isinstance(rule, InjectRule):
            self.active = [other for other in self.active if other is not rule]

    def announce(self, event: str, *, stops: bool = True) -> list[str]:
        """*event* happens.  The tags of the breakpoints that were reached, in the order in which they were set.

        Without *stops* they stay as they are.
        """
        rules = self._by_event.get(event)
        if rules is None:
            return []
        matching = [rule for rule in rules if rule.state in (0, self.state)]
        injecting = [rule for rule in matching if isinstance(rule, InjectRule)]
        if injecting:
            self.active = injecting
        for rule in matching:
            if isinstance(rule, SetStateRule):
                rule.hits += 1
                self.state = rule.new_state
                break
        reached = [rule for rule in matching if isinstance(rule, Breakpoint)] if stops else []
        for breakpoint_ in reached:
            self._drop(breakpoint_)
        return [breakpoint_.tag for breakpoint_ in reached]

    def start(self, rule: Rule) -> None:
        """Have *rule* take effect now if it holds in the present state; the active rules stay active."""
        if rule.state not in (0, self.state):
            return
        if isinstance(rule, InjectRule):
            self.active = [*self.active, rule]
        elif isinstance(rule, SetStateRule):
            rule.hits += 1
            self.state = rule.new_state

    def covering(self, io_type: str) -> Callable[[int, int], bool]:
        """What says whether an active rule decides a request of *io_type*, by its byte offset and length."""

        def covered(offset: int, length: int) -> bool:
            for rule in self.active:
                place = rule.offset
                if (place is None or offset <= place < offset + length) and io_type in rule.io_types:
                    return True
            return False

        return covered

    def announcing(self, event: str, io_type: str) -> Callable[[int, int], bool]:
        """The same together with the announcement of *event*; it is always true where that may do more than inject."""

        def covered(offset: int, length: int) -> bool:
            rules = self.always.get(event)
            if rules is None:
                return True
            self.active = rules
            for rule in rules:
                place = rule.offset
                if (place is None or offset <= place < offset + length) and io_type in rule.io_types:
                    return True
            return False

        return covered

    def fire(self, io_type: str, offset: int, length: int) -> InjectRule | None:
        """The rule whose error the request gets, None if it goes through; counts it, and drops it if ``once``."""
        rule = next((rule for rule in self.active if rule.covers(io_type, offset, length)), None)
        if rule is None:
            return None
        rule.hits += 1
        if not rule.errno:
            return None
        if rule.once:
            self._drop(rule)
        return rule

    # -- what is shown --------------------------------------------------------------------------

    def describe(self) -> list[dict[str, Json]]:
        """The rules, as the user has given them, and what they have done so far; breakpoints are not among them."""
        shown: list[dict[str, Json]] = []
        for rule in self:
            if isinstance(rule, InjectRule):
                counted = {"id": rule.id, "hits": rule.hits, "active": rule in self.active}
                shown.append({**counted, "inject-error": msgspec.to_builtins(rule.options)})
            elif isinstance(rule, SetStateRule):
                shown.append({"id": rule.id, "hits": rule.hits, "set-state": msgspec.to_builtins(rule.options)})
        return shown
