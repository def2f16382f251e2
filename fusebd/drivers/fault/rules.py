"""The rules of a fault filter: which request gets which fault.  No I/O, no waiting.

A request is put to the rules in their order.  A rule *matches* if everything holds that it says about operation, range,
size, state, event, caller and time; matching requests are counted, and ``nth``, ``every`` and ``probability`` choose
among them.  A rule that has chosen is *hit*; after ``times`` hits, or after ``until``, it is spent.  The first hit rule
whose action is terminal decides what becomes of the request; delays, hangs and changes of state before it come on top.

All is decided when the request arrives, before anything waits, so that it depends on nothing but the order of arrival
and the seed; each rule draws from a sequence of its own.

A rule with an event is armed by it as blkdebug's are: when an event is announced that has rules whose state holds,
these are armed, and those that another event had armed are not any more.  A rule that sets the state on an event does
so when that is announced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from fusebd.block.caller import current_request
from fusebd.block.options import Json, OptionStruct, Size
from fusebd.drivers.fault.actions import ACTIONS, Action, Medium, Outcome, Plan, Request
from fusebd.drivers.fault.chance import Dice
from fusebd.drivers.fault.options import KINDS, OPERATIONS, FaultRule, check_rule, rule_members
from fusebd.drivers.fault.ranges import Ranges, ranges_of
from fusebd.errors import CommandError, OptionError


def _same(pid: int, thread: int) -> bool:
    return pid == thread


class RuleProgress(OptionStruct, frozen=True, kw_only=True, omit_defaults=True):
    """How far a rule has come.  *added* is a time in seconds; *left* the bytes that disk-full lets through."""

    matches: Size = 0
    hits: Size = 0
    spent: bool = False
    armed: bool | UnsetType = UNSET
    added: float | UnsetType = UNSET
    left: Size | UnsetType = UNSET
    dice: str | UnsetType = UNSET


def operations_of(options: FaultRule, ranges: Ranges) -> frozenset[str]:
    """The kinds of requests that a rule with *options* has to be asked about; none if it acts on events alone."""
    if options.action == "set-state" and options.event not in (UNSET, "none"):
        return frozenset()
    kind = KINDS[options.action]
    operations = kind.usual if options.operations is UNSET else options.operations
    if options.transient is True:
        operations = ["read"]
    if not ranges.everything:  # a flush has no place
        operations = [operation for operation in operations if operation != "flush"]
    return frozenset(operations)


class Rule:
    """One rule.  *id* is unique among those of a filter; *added* is the time, in seconds."""

    def __init__(
        self, ident: str, options: FaultRule, action: Action, ranges: Ranges, dice: Dice, added: float
    ) -> None:
        self.id, self.options, self.action = ident, options, action
        self.ranges, self.dice = ranges, dice
        # what touches no byte of these, touches none of the ranges
        self.start, self.end = ranges.hull
        self.matches = self.hits = 0
        #: the event that arms it, None if it needs none
        self.event = None if options.event in (UNSET, "none") else str(options.event)
        self.armed = self.event is None
        self.spent = self.removed = False
        #: set the state when the event is announced, whatever the requests
        self.on_event = options.action == "set-state" and self.event is not None
        self.armed |= self.on_event
        self.operations = operations_of(options, ranges)
        # of a rule with an event, the state counts when that is announced
        self._state = 0 if options.state is UNSET or self.event is not None else int(options.state)
        self._least = 0 if options.min_size is UNSET else int(options.min_size)
        self._most = 1 << 64 if options.max_size is UNSET else int(options.max_size)
        self._begin(added)
        self._timed = options.after is not UNSET or options.until is not UNSET
        self._by_caller = options.pid is not UNSET or options.uid is not UNSET
        first = 1 if options.nth is UNSET else options.nth
        self._every = options.every if options.every is not UNSET else None
        if options.nth is UNSET and self._every is not None:
            first = self._every
        self._first = first
        self._counts = options.nth is not UNSET or options.every is not UNSET

    def _begin(self, added: float) -> None:
        self._added = added
        self._from = added + (0.0 if self.options.after is UNSET else self.options.after)
        self._until = None if self.options.until is UNSET else added + self.options.until

    def holds(
        self, request: Request, medium: Medium, state: int, clock: Callable[[], float], same: Callable[[int, int], bool]
    ) -> bool:
        """Whether the rule matches *request*.  It may turn out to be spent."""
        if not self.armed or not (self.ranges.everything or self.ranges.touches(request.offset, request.end)):
            return False
        if not self._least <= request.length <= self._most or (self._state and self._state != state):
            return False
        if self._timed and not self._in_time(clock()):
            return False
        if self._by_caller and not self._called(same):
            return False
        return self.action.concerns(request, medium)

    def _in_time(self, now: float) -> bool:
        if self._until is not None and now >= self._until:
            self.spent = True
            return False
        return now >= self._from

    def _called(self, same: Callable[[int, int], bool]) -> bool:
        caller = current_request.get()
        if caller is None:
            return False
        if self.options.uid is not UNSET and caller.uid != self.options.uid:
            return False
        return self.options.pid is UNSET or (caller.pid > 0 and same(self.options.pid, caller.pid))

    def state_holds(self, state: int) -> bool:
        """Whether *state* is the one in which the rule's event counts."""
        return self.options.state in (UNSET, 0, state)

    def ready(self, clock: Callable[[], float]) -> bool:
        """Whether it is the time for it."""
        return not self._timed or self._in_time(clock())

    def chosen(self) -> bool:
        """One more matches: whether it is a hit."""
        self.matches += 1
        if self._counts:
            past = self.matches - self._first
            if past < 0 or (past % self._every if self._every is not None else past):
                return False
        if self.options.probability is not UNSET and self.dice.share() >= self.options.probability:
            return False
        self.hits += 1
        once = self._counts and self._every is None
        if once or (self.options.times is not UNSET and self.hits >= self.options.times):
            self.spent = True
        return True

    def next_boundary(self, after: float) -> float:
        """The next time, in seconds, at which the rule begins or ceases to hold; infinity if there is none."""
        if not self._timed or self.spent:
            return math.inf
        ends = (self._from, math.inf if self._until is None else self._until)
        return min((end for end in ends if end > after), default=math.inf)

    def progress(self, now: float) -> RuleProgress | None:
        """How far it has come; None if it is as one that is added at the time *now*."""
        initially_armed = self.event is None or self.on_event
        left = self.action.left
        made = RuleProgress(
            matches=self.matches,
            hits=self.hits,
            spent=self.spent,
            armed=UNSET if self.armed is initially_armed else self.armed,
            added=self._added if self._timed and self._added != now else UNSET,
            left=UNSET if left is None or left == self.options.after_bytes else left,
            dice=UNSET if self.dice.is_fresh else self.dice.state,
        )
        return None if made == RuleProgress() else made

    def restore(self, progress: RuleProgress) -> None:
        """Be as far as *progress* says.  Raises OptionError."""
        self.matches, self.hits, self.spent = progress.matches, progress.hits, progress.spent
        if progress.armed is not UNSET:
            self.armed = progress.armed
        if progress.added is not UNSET:
            self._begin(progress.added)
        if progress.left is not UNSET:
            if self.action.left is None:
                raise OptionError(f"Parameter 'left' is not for rule '{self.id}'")
            self.action.left = progress.left
        if progress.dice is not UNSET:
            self.dice.restore(progress.dice)

    def describe(self) -> dict[str, Json]:
        """What it is, and what it has done so far."""
        counted = {"matches": self.matches, "hits": self.hits, "active": self.armed and not self.spent}
        return {"id": self.id, **counted, **{k: v for k, v in rule_members(self.options).items() if k != "id"}}


@dataclass(frozen=True, slots=True)
class Hit:
    """What *rule* has decided about a request."""

    rule: Rule
    outcome: Outcome


@dataclass(slots=True)
class Verdict:
    """What becomes of *request*: what all the rules say that were hit, and the plan in place of it, if any."""

    request: Request
    hits: list[Hit] = field(default_factory=list)
    plan: Plan | None = None


class RuleSet:
    """The rules of one filter over *medium*, and its *state*.

    *clock* gives seconds; *same* says whether a process has a thread; *changed* is called when there are other rules
    for some operation than before.
    """

    def __init__(
        self,
        seed: int,
        state: int,
        medium: Medium,
        *,
        clock: Callable[[], float],
        same: Callable[[int, int], bool] = _same,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.seed, self.state, self.medium = seed, state, medium
        self._clock, self._same, self._changed = clock, same, changed
        self._rules: dict[str, Rule] = {}
        self._numbered = 0
        #: the rules to ask, by operation
        self.by_operation: dict[str, tuple[Rule, ...]] = dict.fromkeys(OPERATIONS, ())

    def __iter__(self) -> Iterator[Rule]:
        return iter(self._rules.values())

    def __len__(self) -> int:
        return len(self._rules)

    @property
    def events(self) -> frozenset[str]:
        """Those that some rule has to hear of."""
        return frozenset(rule.event for rule in self if rule.event is not None and not rule.spent)

    @property
    def advertised(self) -> int | None:
        """The length that the rules make up, in bytes; None if they do not."""
        return next((int(rule.options.advertised) for rule in self if rule.options.advertised is not UNSET), None)

    def next_boundary(self, after: float) -> float:
        """The next time, in seconds, at which a rule begins or ceases to hold; infinity if there is none."""
        return min((rule.next_boundary(after) for rule in self), default=math.inf)

    # -- coming and going -----------------------------------------------------------------------

    def add(self, options: FaultRule) -> Rule:
        """Add the rule that *options* describe behind those there are, and return it.  Raises OptionError.

        One that is at rest has not acted yet: see ``act_at_rest``.
        """
        check_rule(options)
        if options.id is not UNSET and options.id in self._rules:
            raise OptionError(f"Duplicate ID '{options.id}' for fault rule")
        ident = self._next_number() if options.id is UNSET else options.id
        ranges, dice = ranges_of(options), Dice(self.seed, ident)
        action = ACTIONS[options.action](options, ranges, dice)
        action.check(self.medium)
        rule = Rule(ident, options, action, ranges, dice, self._clock())
        self._rules[ident] = rule
        if options.at_rest is not True:
            self._index()
        return rule

    def restore(self, options: FaultRule, progress: RuleProgress) -> None:
        """Add the rule that *options* describe, and that has come as far as *progress* says.  Raises OptionError."""
        self.add(options).restore(progress)
        self._index()

    def _next_number(self) -> str:
        self._numbered += 1
        while str(self._numbered) in self._rules:
            self._numbered += 1
        return str(self._numbered)

    def act_at_rest(self, rule: Rule) -> Outcome:
        """What *rule*, which is at rest, does to the medium."""
        rule.hits, rule.spent = 1, True
        outcome = rule.action.act_at_rest(self.medium)
        self._owned(rule, outcome)
        return outcome

    @staticmethod
    def _owned(rule: Rule, outcome: Outcome) -> Plan | None:
        if outcome.plan is not None:
            outcome.plan.rule = rule.id
        return outcome.plan

    def find(self, ident: str) -> Rule:
        """The rule *ident*.  Raises CommandError if there is none."""
        rule = self._rules.get(ident)
        if rule is None:
            raise CommandError(f"No fault rule with id '{ident}'")
        return rule

    def remove(self, ident: str) -> None:
        """Take the rule *ident* away.  Raises CommandError if there is none."""
        self.find(ident).removed = True
        del self._rules[ident]
        self._index()

    def _index(self) -> None:
        asked = [rule for rule in self if not rule.spent and rule.options.at_rest is not True]
        for operation in OPERATIONS:
            self.by_operation[operation] = tuple(rule for rule in asked if operation in rule.operations)
        self._changed()

    # -- deciding -------------------------------------------------------------------------------

    def decide(self, operation: str, offset: int, length: int, flags: int = 0) -> Verdict | None:
        """What becomes of a request of *length* bytes at byte *offset*; None if no rule is hit."""
        if self.touch(operation, offset, length):
            return self._decide(Request(operation, offset, length, flags))
        return None

    def touch(self, operation: str, offset: int, length: int) -> bool:
        """Whether any rule may have to do with an *operation* on *length* bytes from *offset* on."""
        end = offset + length
        for rule in self.by_operation[operation]:  # noqa: SIM110 - a generator costs as much as all the rest
            if offset < rule.end and end > rule.start:
                return True
        return False

    def _decide(self, request: Request) -> Verdict | None:
        verdict: Verdict | None = None
        state: int | None = None
        spent = False
        for rule in self.by_operation[request.operation]:
            if not rule.holds(request, self.medium, self.state, self._clock, self._same) or not rule.chosen():
                spent |= rule.spent
                continue
            spent |= rule.spent
            outcome = rule.action.act(request, self.medium)
            if rule.options.set_state is not UNSET:
                outcome.details["state"] = rule.options.set_state
                state = rule.options.set_state if state is None else state
            verdict = verdict or Verdict(request)
            verdict.hits.append(Hit(rule, outcome))
            if rule.action.terminal:
                verdict.plan = self._owned(rule, outcome)
                break
        if state is not None:
            self.state = state
        if spent:
            self._index()
        return verdict

    def announce(self, event: str) -> None:
        """*event* happens."""
        concerned = [rule for rule in self if rule.event == event and not rule.spent and rule.state_holds(self.state)]
        arming = [rule for rule in concerned if not rule.on_event]
        if arming:
            for rule in self:
                rule.armed = rule.event is None or rule.on_event or rule in arming
        for rule in concerned:
            if rule.on_event and rule.ready(self._clock) and rule.chosen():
                assert rule.options.set_state is not UNSET
                self.state = rule.options.set_state
                break
        if any(rule.spent for rule in concerned):
            self._index()
