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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import UNSET, Meta, UnsetType

from fusebd.block.options import Int, OptionStruct
from fusebd.errors import CommandError, OptionError

BlkdebugEvent = Literal[
    "l1_update",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l2_load",
    "l2_update",
    "l2_update_compressed",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_aio",
    "read_backing_aio",
    "read_compressed",
    "write_aio",
    "write_compressed",
    "vmstate_load",
    "vmstate_save",
    "cow_read",
    "cow_write",
    "reftable_load",
    "reftable_grow",
    "reftable_update",
    "refblock_load",
    "refblock_update",
    "refblock_update_part",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_free",
    "flush_to_os",
    "flush_to_disk",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "pwritev",
    "pwritev_zero",
    "pwritev_done",
    "empty_image_prepare",
    "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters",
    "cor_write",
    "cluster_alloc_space",
    "none",
]
EVENTS: tuple[str, ...] = get_args(BlkdebugEvent)

IoType = Literal["read", "write", "write-zeroes", "discard", "flush", "block-status"]
IO_TYPES: tuple[str, ...] = get_args(IoType)
_DEFAULT_IO_TYPES = frozenset(IO_TYPES) - {"block-status"}

SECTOR_SIZE = 512
#: the initial state
FIRST_STATE = 1
#: the kernel takes no larger errno in the answer to a FUSE request
_MAX_ERRNO = 511


class InjectErrorOptions(OptionStruct, frozen=True, kw_only=True):
    """A rule that makes requests fail (QAPI BlkdebugInjectErrorOptions)."""

    event: Annotated[BlkdebugEvent, Meta(description="event that arms the rule")]
    state: Annotated[Int, Meta(description="state in which the event counts, 0 for any")] = 0
    iotype: Annotated[IoType | UnsetType, Meta(description="requests that fail; all but block-status if absent")] = (
        UNSET
    )
    errno: Annotated[Int, Meta(description="error to inject, 0 to let the request through")] = errno.EIO
    sector: Annotated[Int, Meta(description="512-byte sector that the request has to touch, -1 for any")] = -1
    once: Annotated[bool, Meta(description="remove the rule when it has failed a request")] = False
    immediately: Annotated[bool, Meta(description="fail without a trip through the scheduler")] = False


class SetStateOptions(OptionStruct, frozen=True, kw_only=True):
    """A rule that changes the state (QAPI BlkdebugSetStateOptions)."""

    event: Annotated[BlkdebugEvent, Meta(description="event that changes the state")]
    state: Annotated[Int, Meta(description="state in which the event counts, 0 for any")] = 0
    new_state: Annotated[Int, Meta(description="state after the event")] = msgspec.field(name="new_state")


@dataclass(slots=True, eq=False)
class Rule:
    """*id* is unique among the rules of a node; *hits* counts how often the rule decided something."""

    id: str
    event: str
    state: int
    hits: int = 0


@dataclass(slots=True, eq=False)
class InjectRule(Rule):
    """Fails requests of the kinds in *io_types* that touch byte *offset* (None: any request)."""

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


@dataclass(slots=True, eq=False)
class SetStateRule(Rule):
    new_state: int = 0


@dataclass(slots=True, eq=False)
class Breakpoint(Rule):
    """Stops, once, whoever announces the event; *tag* is what the request is resumed by."""

    tag: str = ""


class RuleSet:
    """The rules of one node, its state, and the rules that are active now."""

    def __init__(self) -> None:
        self.state = FIRST_STATE
        self.active: list[InjectRule] = []
        self._by_event: dict[str, list[Rule]] = {}
        self._numbered = 0

    def __iter__(self) -> Iterator[Rule]:
        for rules in self._by_event.values():
            yield from rules

    def __contains__(self, ident: str) -> bool:
        return any(rule.id == ident for rule in self)

    def add(self, options: InjectErrorOptions | SetStateOptions, ident: str | None = None) -> Rule:
        """Add the rule that *options* describe, called *ident* or by a number of its own, and return it.

        Raises OptionError if *ident* is taken or the errno is none that a request can fail with.
        """
        if ident is not None and ident in self:
            raise OptionError(f"Duplicate ID '{ident}' for blkdebug rule")
        rule: Rule
        if isinstance(options, SetStateOptions):
            rule = SetStateRule(ident or self._number(), options.event, options.state, new_state=options.new_state)
        else:
            if not 0 <= options.errno <= _MAX_ERRNO:
                raise OptionError(f"Value '{options.errno}' is out of range for parameter 'errno'")
            rule = InjectRule(
                ident or self._number(),
                options.event,
                options.state,
                io_types=_DEFAULT_IO_TYPES if options.iotype is UNSET else frozenset((str(options.iotype),)),
                errno=options.errno,
                offset=None if options.sector == -1 else options.sector * SECTOR_SIZE,
                once=options.once,
                immediately=options.immediately,
            )
        return self._enter(rule)

    def add_breakpoint(self, event: str, tag: str) -> Breakpoint:
        """Stop the next request that announces *event*; *event* is one of EVENTS."""
        rule = Breakpoint(self._number(), event, 0, tag=tag)
        self._enter(rule)
        return rule

    def _number(self) -> str:
        # A user's own id begins with a letter, so these never collide with it.
        self._numbered += 1
        return str(self._numbered)

    def _enter(self, rule: Rule) -> Rule:
        self._by_event.setdefault(rule.event, []).append(rule)
        return rule

    def remove(self, ident: str) -> None:
        """Take the rule *ident* away, active or not.  Raises CommandError if there is none."""
        rule = next((rule for rule in self if rule.id == ident), None)
        if rule is None:
            raise CommandError(f"No blkdebug rule with id '{ident}'")
        self._drop(rule)

    def remove_breakpoints(self, tag: str) -> int:
        """Take away the breakpoints that have not been reached yet; how many there were."""
        found = [rule for rule in self if isinstance(rule, Breakpoint) and rule.tag == tag]
        for rule in found:
            self._drop(rule)
        return len(found)

    def _drop(self, rule: Rule) -> None:
        rules = self._by_event[rule.event]
        rules.remove(rule)
        if not rules:
            del self._by_event[rule.event]
        if isinstance(rule, InjectRule) and rule in self.active:
            self.active.remove(rule)

    def announce(self, event: str) -> list[str]:
        """*event* happens.  The tags of the breakpoints that were reached, in the order in which they were set."""
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
        reached = [rule for rule in matching if isinstance(rule, Breakpoint)]
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
