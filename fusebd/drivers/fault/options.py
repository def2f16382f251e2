"""The options of the fault filter: its rules, and which of their members go with which action.

A rule says which requests it is for - everything that it says must hold - and what becomes of them.  The declaration is
the same for rules that a node is made with and for those of ``fault-rule-add``.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import UNSET, Meta, UnsetType, field

from fusebd.block.debugevents import BlkdebugEvent
from fusebd.block.options import BlockdevOptions, BlockdevRef, Int, OptionStruct, Size
from fusebd.errors import OptionError

Operation = Literal["read", "write", "write-zeroes", "discard", "flush", "block-status"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)

ActionName = Literal[
    "error",
    "delay",
    "hang",
    "set-state",
    "short-read",
    "torn-write",
    "lost-write",
    "lying-flush",
    "misdirect",
    "duplicate",
    "bit-flip",
    "latent",
    "disk-full",
    "wrap",
]

SECTOR_SIZE = 512
#: the initial state, as blkdebug has it
FIRST_STATE = 1
#: the kernel takes no larger errno in the answer to a FUSE request
_MAX_ERRNO = 511
#: of the ranges of a rule: more than any layout has
_MAX_RANGES = 1 << 20
#: what one request may do to the medium, so that its entry in the ledger stays readable
_MAX_COUNT = 1 << 16
_MAX_SECONDS = 10**9


class ByteRange(OptionStruct, frozen=True, kw_only=True):
    """A part of the node, as ``fusebd targets --json`` prints it."""

    start: Annotated[Size, Meta(description="its first byte")]
    length: Annotated[Size, Meta(description="how many bytes it has")]


class Percentile(OptionStruct, frozen=True, kw_only=True):
    """A point of a distribution: *percentile* of a hundred draws are not above *seconds*."""

    percentile: Annotated[float, Meta(description="of a hundred draws")]
    seconds: Annotated[float, Meta(description="the longest delay of these")]


class FaultRule(OptionStruct, frozen=True, kw_only=True):
    """A rule of the fault filter."""

    action: Annotated[ActionName, Meta(description="what becomes of the requests")]
    id: Annotated[str | UnsetType, Meta(description="what the rule is called; a number if absent")] = UNSET

    # which requests
    operations: Annotated[
        list[Operation] | UnsetType, Meta(description="kinds of requests; those that the action is for if absent")
    ] = UNSET
    offset: Annotated[Size | UnsetType, Meta(description="first byte of the range that requests must touch")] = UNSET
    length: Annotated[Size | UnsetType, Meta(description="bytes of that range; up to the end if absent")] = UNSET
    sector: Annotated[Size | UnsetType, Meta(description="the same in sectors of 512 bytes: the first one")] = UNSET
    sectors: Annotated[Size | UnsetType, Meta(description="how many sectors; one if absent")] = UNSET
    ranges: Annotated[list[ByteRange] | UnsetType, Meta(description="several ranges; requests must touch one")] = UNSET
    min_size: Annotated[Size | UnsetType, Meta(description="the smallest requests, in bytes")] = UNSET
    max_size: Annotated[Size | UnsetType, Meta(description="the largest requests, in bytes")] = UNSET
    state: Annotated[Int | UnsetType, Meta(description="the state of the filter; any if 0 or absent")] = UNSET
    event: Annotated[
        BlkdebugEvent | UnsetType, Meta(description="blkdebug event that arms the rule; armed from the start if absent")
    ] = UNSET
    pid: Annotated[Size | UnsetType, Meta(description="the process that makes the request")] = UNSET
    uid: Annotated[Size | UnsetType, Meta(description="the user of that process")] = UNSET
    after: Annotated[float | UnsetType, Meta(description="seconds since the rule was added: from then on")] = UNSET
    until: Annotated[float | UnsetType, Meta(description="seconds since the rule was added: up to then")] = UNSET
    nth: Annotated[Size | UnsetType, Meta(description="of those requests the nth alone; with every, the first one")] = (
        UNSET
    )
    every: Annotated[Size | UnsetType, Meta(description="of those requests every so manieth")] = UNSET
    probability: Annotated[float | UnsetType, Meta(description="of each one that is left")] = UNSET
    times: Annotated[Size | UnsetType, Meta(description="how often at most")] = UNSET

    # and what becomes of them
    set_state: Annotated[Int | UnsetType, Meta(description="the state of the filter from then on")] = UNSET
    errno: Annotated[
        str | int | UnsetType, Meta(description="error that the request ends with, a name or a number")
    ] = UNSET
    distribution: Annotated[
        Literal["fixed", "uniform", "normal", "lognormal", "percentiles"] | UnsetType,
        Meta(description="delay: how it is drawn; fixed if absent"),
    ] = UNSET
    seconds: Annotated[
        float | UnsetType, Meta(description="delay: how long; the mean of normal, the median of lognormal")
    ] = UNSET
    deviation: Annotated[float | UnsetType, Meta(description="delay: standard deviation of normal")] = UNSET
    sigma: Annotated[float | UnsetType, Meta(description="delay: that of the logarithm, of lognormal")] = UNSET
    minimum: Annotated[float | UnsetType, Meta(description="delay: none is shorter")] = UNSET
    maximum: Annotated[float | UnsetType, Meta(description="delay: none is longer")] = UNSET
    percentiles: Annotated[list[Percentile] | UnsetType, Meta(description="delay: points of the distribution")] = UNSET
    bytes: Annotated[
        Size | UnsetType, Meta(description="short-read, torn-write: how many bytes get through; drawn if absent")
    ] = UNSET
    pattern: Annotated[
        Literal["prefix", "suffix", "interleaved", "random"] | UnsetType,
        Meta(description="torn-write: which part of the data gets through; prefix if absent"),
    ] = UNSET
    unit: Annotated[
        Size | UnsetType, Meta(description="bytes that are not torn, or that drawn places are a multiple of; 512")
    ] = UNSET
    fill: Annotated[
        Literal["old", "zeroes", "random"] | UnsetType,
        Meta(description="short-read (zeroes if absent), torn-write (old if absent): what is in the other part"),
    ] = UNSET
    delta: Annotated[
        Int | UnsetType, Meta(description="misdirect, duplicate: how far off in bytes; drawn if absent")
    ] = UNSET
    target_offset: Annotated[
        Size | UnsetType, Meta(description="misdirect, duplicate: where a drawn place is at the earliest")
    ] = UNSET
    target_length: Annotated[
        Size | UnsetType, Meta(description="misdirect, duplicate: bytes from there, up to the end if absent")
    ] = UNSET
    count: Annotated[
        Size | UnsetType, Meta(description="bit-flip, latent: how many bits or sectors at a time; one if absent")
    ] = UNSET
    bit: Annotated[int | UnsetType, Meta(description="bit-flip: which one of its byte; drawn if absent")] = UNSET
    transient: Annotated[bool | UnsetType, Meta(description="bit-flip: in this one read alone")] = UNSET
    at_rest: Annotated[
        bool | UnsetType, Meta(description="bit-flip, latent: at once when the rule is added, not with a request")
    ] = UNSET
    at_offset: Annotated[Size | UnsetType, Meta(description="disk-full: the first byte that has no room")] = UNSET
    after_bytes: Annotated[
        Size | UnsetType, Meta(description="disk-full: how many bytes can be written altogether")
    ] = UNSET
    capacity: Annotated[
        Size | UnsetType, Meta(description="wrap: bytes that there really are; all of the node below if absent")
    ] = UNSET
    advertised: Annotated[Size | UnsetType, Meta(description="wrap: bytes that there seem to be")] = UNSET


class FaultOptions(BlockdevOptions, frozen=True, kw_only=True):
    file: Annotated[BlockdevRef, Meta(description="the node that requests go to")]
    seed: Annotated[Int, Meta(description="what everything that is drawn follows from")] = 0
    state: Annotated[Int, Meta(description="the state in the beginning")] = FIRST_STATE
    rules: Annotated[list[FaultRule], Meta(description="rules, in the order in which they are asked")] = field(
        default_factory=list
    )
    record: Annotated[
        str | UnsetType, Meta(description="file that rules, changes and decisions are recorded in; it is overwritten")
    ] = UNSET
    replay: Annotated[str | UnsetType, Meta(description="recording to repeat, in place of seed, state and rules")] = (
        UNSET
    )


# --- what goes together --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """*members* of a rule belong to the action; *usual* are its operations if none are said, of all *possible*."""

    possible: tuple[Operation, ...]
    usual: tuple[Operation, ...]
    members: frozenset[str] = frozenset()
    required: tuple[str, ...] = ()


_ANY: tuple[Operation, ...] = OPERATIONS
_MOST: tuple[Operation, ...] = tuple(operation for operation in OPERATIONS if operation != "block-status")
_WRITES: tuple[Operation, ...] = ("write", "write-zeroes")
_PLACES: tuple[Operation, ...] = ("read", "write", "write-zeroes")
_TARGET = frozenset({"delta", "target-offset", "target-length", "unit"})

KINDS: dict[str, Kind] = {
    "error": Kind(_ANY, _MOST, frozenset({"errno"})),
    "delay": Kind(
        _ANY,
        _MOST,
        frozenset({"distribution", "seconds", "deviation", "sigma", "minimum", "maximum", "percentiles"}),
    ),
    "hang": Kind(_ANY, _MOST, frozenset({"errno"})),
    "set-state": Kind(_ANY, _MOST, required=("set-state",)),
    "short-read": Kind(("read",), ("read",), frozenset({"bytes", "unit", "fill", "errno"})),
    "torn-write": Kind(_WRITES, _WRITES, frozenset({"bytes", "unit", "pattern", "fill", "errno"})),
    "lost-write": Kind((*_WRITES, "discard"), _WRITES),
    "lying-flush": Kind(("flush", *_WRITES), ("flush", *_WRITES)),
    "misdirect": Kind(_PLACES, ("read", "write"), _TARGET),
    "duplicate": Kind(_WRITES, ("write",), _TARGET),
    "bit-flip": Kind(_PLACES, ("read",), frozenset({"count", "bit", "transient", "at-rest"})),
    "latent": Kind(_PLACES, ("read",), frozenset({"count", "unit", "errno", "at-rest"})),
    "disk-full": Kind(_WRITES, _WRITES, frozenset({"at-offset", "after-bytes"})),
    "wrap": Kind(
        (*_PLACES, "discard", "block-status"),
        (*_PLACES, "discard", "block-status"),
        frozenset({"capacity", "advertised"}),
    ),
}
_OF_ACTIONS = frozenset[str]().union(*(kind.members for kind in KINDS.values()))
#: what is said about requests, apart from ranges
_OF_REQUESTS = (
    *("operations", "min-size", "max-size", "state", "event", "pid", "uid"),
    *("after", "until", "nth", "every", "probability", "times"),
)
#: the largest values of numbers; none is negative
_LIMITS = {
    **dict.fromkeys(("after", "until", "seconds", "deviation", "minimum", "maximum"), _MAX_SECONDS),
    "probability": 1,
    "sigma": 10,
    "bit": 7,
}
_OF_DISTRIBUTIONS = {
    "fixed": (("seconds",), ()),
    "uniform": (("minimum", "maximum"), ()),
    "normal": (("seconds", "deviation"), ("minimum", "maximum")),
    "lognormal": (("seconds", "sigma"), ("minimum", "maximum")),
    "percentiles": (("percentiles",), ()),
}


def given_names(rule: FaultRule) -> Iterator[str]:
    """The names of the members that *rule* has."""
    for attribute, name in zip(rule.__struct_fields__, rule.__struct_encode_fields__, strict=True):
        if getattr(rule, attribute) is not UNSET:
            yield name


def check_rule(rule: FaultRule) -> None:
    """Raises OptionError if members of *rule* do not go together, or have values that cannot be."""
    kind, given = KINDS[rule.action], set(given_names(rule))
    for name in sorted(given & _OF_ACTIONS - kind.members):
        raise OptionError(f"Parameter '{name}' is not for action '{rule.action}'")
    for name in kind.required:
        _require(rule, given, name)
    if rule.operations is not UNSET:
        if not rule.operations:
            raise OptionError("Parameter 'operations' is empty")
        for operation in rule.operations:
            if operation not in kind.possible:
                raise OptionError(f"Action '{rule.action}' is not for '{operation}'")
    if rule.id is not UNSET and not (rule.id and rule.id.isprintable() and len(rule.id) < 128):
        raise OptionError("Parameter 'id' expects an identifier")
    _check_ranges(rule, given)
    for name in ("nth", "every", "times", "unit", "count", "capacity", "length", "sectors"):
        if getattr(rule, name) == 0:
            raise OptionError(f"Parameter '{name}' expects a positive number")
    for name, most in _LIMITS.items():
        _check_number(name, getattr(rule, name), most)
    if rule.errno is not UNSET:
        errno_number(rule.errno)
    if rule.action in _CHECKS:
        _CHECKS[rule.action](rule, given)
    if rule.at_rest is True and (both := [name for name in _OF_REQUESTS if name in given]):
        raise OptionError(f"Parameter '{both[0]}' is not for what is at rest")


def _check_number(name: str, value: float | UnsetType, most: float) -> None:
    if value is not UNSET and not 0 <= value <= most:  # not a number is neither
        raise OptionError(f"Parameter '{name}' expects a number from 0 to {most}")


def _require(rule: FaultRule, given: set[str], name: str) -> None:
    if name not in given:
        raise OptionError(f"Parameter '{name}' is missing for action '{rule.action}'")


def _check_ranges(rule: FaultRule, given: set[str]) -> None:
    ways = [name for name, names in _RANGES.items() if given & names]
    if len(ways) > 1:
        raise OptionError(f"Parameters '{ways[0]}' and '{ways[1]}' exclude each other")
    if "sectors" in given and "sector" not in given:
        raise OptionError("Parameter 'sector' is missing")
    if rule.ranges is not UNSET and not 0 < len(rule.ranges) <= _MAX_RANGES:
        raise OptionError("Parameter 'ranges' is empty" if not rule.ranges else "Parameter 'ranges' is too long")


_RANGES = {"offset": {"offset", "length"}, "sector": {"sector", "sectors"}, "ranges": {"ranges"}}


def _check_delay(rule: FaultRule, given: set[str]) -> None:
    distribution = "fixed" if rule.distribution is UNSET else rule.distribution
    needed, allowed = _OF_DISTRIBUTIONS[distribution]
    for name in needed:
        _require(rule, given, name)
    for name in sorted(given & KINDS["delay"].members - {"distribution", *needed, *allowed}):
        raise OptionError(f"Parameter '{name}' is not for distribution '{distribution}'")
    if rule.minimum is not UNSET and rule.maximum is not UNSET and rule.minimum > rule.maximum:
        raise OptionError("Parameter 'minimum' is larger than 'maximum'")
    if rule.percentiles is not UNSET:
        points = [(point.percentile, point.seconds) for point in rule.percentiles]
        for percentile, seconds in points:
            _check_number("percentile", percentile, 100)
            _check_number("seconds", seconds, _MAX_SECONDS)
        rising = all(a < b and x <= y for (a, x), (b, y) in pairwise(points))
        if not points or not rising:
            raise OptionError("Parameter 'percentiles' expects points in ascending order")


def _check_torn(rule: FaultRule, given: set[str]) -> None:
    if rule.pattern in ("interleaved", "random") and "bytes" in given:
        raise OptionError(f"Parameter 'bytes' is not for pattern '{rule.pattern}'")
    if rule.pattern in ("interleaved", "random") and rule.unit is not UNSET and rule.unit < SECTOR_SIZE:
        raise OptionError(f"Parameter 'unit' expects {SECTOR_SIZE} or more for pattern '{rule.pattern}'")


def _check_short(rule: FaultRule, given: set[str]) -> None:
    if rule.fill == "old":
        raise OptionError("Action 'short-read' has nothing old to fill with")


def _check_target(rule: FaultRule, given: set[str]) -> None:
    if "delta" in given and (drawn := given & (_TARGET - {"delta"})):
        raise OptionError(f"Parameters 'delta' and '{min(drawn)}' exclude each other")
    if rule.delta == 0:
        raise OptionError("Parameter 'delta' expects a number other than 0")


def _check_bits(rule: FaultRule, given: set[str]) -> None:
    if rule.count is not UNSET and rule.count > _MAX_COUNT:
        raise OptionError(f"Parameter 'count' expects {_MAX_COUNT} at most")
    if rule.transient is True:
        if rule.at_rest is True:
            raise OptionError("Parameters 'transient' and 'at-rest' exclude each other")
        if rule.operations is not UNSET and rule.operations != ["read"]:
            raise OptionError("Only reads can have transient flips")
    if rule.unit is not UNSET and rule.unit % SECTOR_SIZE:
        raise OptionError(f"Parameter 'unit' expects a multiple of {SECTOR_SIZE}")


def _check_full(rule: FaultRule, given: set[str]) -> None:
    if len(given & {"at-offset", "after-bytes"}) != 1:
        raise OptionError("Action 'disk-full' needs one of 'at-offset' and 'after-bytes'")


def _check_state(rule: FaultRule, given: set[str]) -> None:
    if "event" in given and (about := given & _OF_ITS_OWN):
        raise OptionError(f"Parameter '{min(about)}' is not for a state that an event sets")


#: what only a request has, and the announcement of an event has not
_OF_ITS_OWN = {"operations", "min-size", "max-size", "pid", "uid", *frozenset[str]().union(*_RANGES.values())}

_CHECKS: dict[str, Callable[[FaultRule, set[str]], None]] = {
    "delay": _check_delay,
    "torn-write": _check_torn,
    "short-read": _check_short,
    "misdirect": _check_target,
    "duplicate": _check_target,
    "bit-flip": _check_bits,
    "latent": _check_bits,
    "disk-full": _check_full,
    "set-state": _check_state,
}


def errno_number(value: int | str) -> int:
    """The errno that *value*, a name (``ENOSPC``) or a number, means.  Raises OptionError."""
    text = str(value)
    number = getattr(errno, text, None) if text.isidentifier() else None
    if number is None and text.isdecimal():
        number = int(text)
    if not isinstance(number, int) or not 0 < number <= _MAX_ERRNO:
        raise OptionError(f"Parameter 'errno' does not accept value '{text}'")
    return number


def rule_members(rule: FaultRule) -> dict[str, object]:
    """What was said when *rule* was added, as a JSON object."""
    members = msgspec.to_builtins(rule)
    assert isinstance(members, dict)
    return members
