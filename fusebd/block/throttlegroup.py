"""throttle-group: I/O limits that the nodes in the group share, and the waiting that keeps them.

Requests that have to wait stand in queues, one for each member of the group and each direction.  In a direction, one
of them is at the head: the first of the member that has been served longest ago.  It alone sleeps until the limits
let it go, so no task is needed beside the requests' own; the others wait until they are at the head.  Reads and writes
fill the same buckets where a total is limited, so of the two heads the older goes first where both could.

A request is charged at the moment it goes, by itself and without a suspension between looking and charging.  One that
is cancelled while it waits has therefore charged nothing, and leaves its place to the next.

Options: QAPI ThrottleGroupProperties.  Behaviour and texts: QEMU block/throttle-groups.c, docs/throttle.txt.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import count
from typing import TYPE_CHECKING, Annotated, ClassVar, cast

import msgspec
import trio
from msgspec import UNSET, Meta, UnsetType

from fusebd.block.options import Int, Json
from fusebd.block.throttling import (
    MAX_BURST_LENGTH,
    NO_LIMITS,
    READ,
    WRITE,
    ThrottleLimits,
    ThrottleState,
    changed_limits,
    check_limits,
    is_length,
)
from fusebd.block.userobject import ObjectOptions, UserObject
from fusebd.errors import CommandError, OptionError

if TYPE_CHECKING:
    from fusebd.block.objects import Objects

__all__ = ["READ", "WRITE", "Member", "ThrottleGroup", "ThrottleGroupOptions"]

#: before the names of limits that are properties of their own
_X = "x-"

_Limits = Annotated[ThrottleLimits | UnsetType, Meta(description="the limits")]

#: ``limits``, and for the command line of old each of them once more by itself
ThrottleGroupOptions = cast(
    type[ObjectOptions],
    msgspec.defstruct(
        "ThrottleGroupOptions",
        [
            ("limits", _Limits, UNSET),
            *(
                (
                    f"x_{name}",
                    Annotated[Int | UnsetType, Meta(description="the same, only when the group is made")],
                    UNSET,
                )
                for name in ThrottleLimits.__struct_fields__
            ),
        ],
        bases=(ObjectOptions,),
        module=__name__,
        frozen=True,
        kw_only=True,
        rename="kebab",
        forbid_unknown_fields=True,
    ),
)


class _Waiter:
    """One request that waits.  ``since`` is its place in the order in which requests came to the head."""

    __slots__ = ("event", "since")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.since = 0

    async def sleep(self, seconds: float) -> None:
        """Until it is woken, *seconds* at most."""
        self.event = trio.Event()
        with trio.move_on_after(seconds):
            await self.event.wait()


class Member:
    """The place of one node in a group, until ``leave``."""

    __slots__ = ("_unlimited", "group", "queues")

    def __init__(self, group: ThrottleGroup) -> None:
        self.group = group
        self.queues: tuple[deque[_Waiter], ...] = (deque(), deque())
        self._unlimited = 0

    @property
    def unlimited(self) -> bool:
        """Whether its requests do not wait at present."""
        return self._unlimited > 0

    async def admit(self, direction: int, size: int) -> None:
        """Return when a request of *size* bytes in *direction* (READ, WRITE) may go, with the limits charged for it.

        Suspends only if it may not go at once.  Cancelled while it waits, it has charged nothing.
        """
        group = self.group
        state = group.state
        if not state.is_limited(direction):
            return
        now = trio.current_time()
        if self._unlimited or group.may_go(direction, now):
            state.charge(direction, size, now)
        else:
            await group.wait_turn(self, direction, size)

    def suspend_limits(self) -> None:
        """Let all requests go that wait or come, still charged for, until ``resume_limits``.  Nests."""
        self._unlimited += 1
        for queue in self.queues:
            for waiter in queue:
                waiter.event.set()

    def resume_limits(self) -> None:
        """The limits hold again as soon as this was called as often as ``suspend_limits``."""
        self._unlimited -= 1

    def leave(self) -> None:
        """Out of the group.  No request waits any more."""
        self.group.remove(self)


class ThrottleGroup(UserObject):
    """Limits, and the nodes that share them.  ``state`` is replaced when the limits change."""

    qom_type = "throttle-group"
    options_class = ThrottleGroupOptions
    property_types: ClassVar[dict[str, str]] = {"limits": "ThrottleLimits"}

    def __init__(self, options: ObjectOptions) -> None:
        self.limits = dict(NO_LIMITS)
        self.state = ThrottleState(self.limits)
        # members in the order in which it is their turn, for reads and for writes
        self._turns: tuple[list[Member], ...] = ([], [])
        self._heads: list[_Waiter | None] = [None, None]
        self._numbers = count()
        super().__init__(options)

    async def complete(self, objects: Objects) -> None:
        check_limits(self.limits)
        self._start_anew()

    # -- properties -----------------------------------------------------------------------------

    def get(self, name: str) -> Json:
        if name == "limits":
            return dict(self.limits)
        limit = name.removeprefix(_X)
        return self.limits[limit] if name != limit and limit in self.limits else super().get(name)

    def set(self, name: str, value: Json) -> None:
        if name.removeprefix(_X) != name and name.removeprefix(_X) in self.limits:
            raise CommandError("Property cannot be set after initialization")
        super().set(name, value)

    def put(self, name: str, value: Json) -> None:
        if name == "limits":
            self.limits = changed_limits(self.limits, value)
        else:
            self.limits[name.removeprefix(_X)] = _checked(name, value)
        if self.completed:
            self._start_anew()

    def _start_anew(self) -> None:
        """New limits hold from now on, with nothing charged; requests that wait look again whether they have to."""
        self.state = ThrottleState(self.limits)
        self._wake_heads()

    # -- members --------------------------------------------------------------------------------

    def join(self) -> Member:
        """A new member."""
        member = Member(self)
        for turns in self._turns:
            turns.append(member)
        return member

    def remove(self, member: Member) -> None:
        for turns in self._turns:
            turns.remove(member)

    @property
    def in_use(self) -> bool:
        return bool(self._turns[READ])

    # -- waiting --------------------------------------------------------------------------------

    def may_go(self, direction: int, now: float) -> bool:
        """Whether a request in *direction* that arrives may go at once: neither a limit nor another one is ahead."""
        if self._heads[direction] is not None or self.state.wait(direction, now):
            return False
        other = 1 - direction
        return self._heads[other] is None or self.state.wait(other, now) > 0

    async def wait_turn(self, member: Member, direction: int, size: int) -> None:
        """Wait until a request of *member* may go, and charge for it."""
        waiter = _Waiter()
        member.queues[direction].append(waiter)
        self._fill_head(direction)
        try:
            while not member.unlimited and (delay := self._delay(waiter, direction)):
                await waiter.sleep(delay)
            self.state.charge(direction, size, trio.current_time())
            turns = self._turns[direction]
            turns.remove(member)
            turns.append(member)
        finally:
            member.queues[direction].remove(waiter)
            if self._heads[direction] is waiter:
                self._heads[direction] = None
                self._fill_head(direction)
            self._wake_heads()

    def _delay(self, waiter: _Waiter, direction: int) -> float:
        """How many seconds *waiter* has to sleep; infinity if it is to be woken."""
        if self._heads[direction] is not waiter:
            return math.inf
        now = trio.current_time()
        other = self._heads[1 - direction]
        if other is not None and other.since < waiter.since and not self.state.wait(1 - direction, now):
            other.event.set()  # it goes first, and wakes this one then
            return math.inf
        return self.state.wait(direction, now)

    def _fill_head(self, direction: int) -> None:
        """If no request is at the head, let the next one there."""
        if self._heads[direction] is not None:
            return
        for member in self._turns[direction]:
            if member.queues[direction]:
                waiter = member.queues[direction][0]
                waiter.since = next(self._numbers)
                self._heads[direction] = waiter
                return

    def _wake_heads(self) -> None:
        for head in self._heads:
            if head is not None:
                head.event.set()


def _checked(name: str, value: int) -> int:
    if value < 0:
        raise OptionError("Property values cannot be negative")
    if is_length(name) and value > MAX_BURST_LENGTH:
        # QEMU's text is spelt like this
        raise OptionError(f"{name} value must be in therange [0, {MAX_BURST_LENGTH}]")
    return value
