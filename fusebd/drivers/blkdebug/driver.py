"""blkdebug: fail chosen requests at chosen moments, stop them, and tell the layers above about limits.

Parents announce what they are about to do to their child; rules (``rules.py``) turn such
events into errors for the requests that follow; breakpoints (``stops.py``) hold whoever announces them.  Rules and
breakpoints come and go by commands, and each injected error is in the ledger.  The limits are kept by the edge above.

Options: QAPI BlockdevOptionsBlkdebug.  Behaviour: QEMU block/blkdebug.c, docs/devel/testing/blkdebug.rst.
"""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Awaitable
from typing import Annotated, ClassVar, Literal

import trio
from msgspec import UNSET, Meta, UnsetType, field

from fusebd.block.debugevents import EVENTS, BlkdebugEvent
from fusebd.block.driver import (
    BlockStatus,
    Buffers,
    Bypass,
    Child,
    FilterDriver,
    Limits,
    Node,
    driver_command,
    nbytes,
    register,
)
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef, Int, Int32, Json, OptionStruct, Size
from fusebd.block.perms import Perm, Role, default_perms
from fusebd.block.straight import Concerns
from fusebd.drivers.blkdebug.config import read_config
from fusebd.drivers.blkdebug.rules import BlkdebugRule, InjectErrorOptions, Rule, RuleSet, SetStateOptions
from fusebd.drivers.blkdebug.stops import Stop, Stops
from fusebd.errors import BlockIOError, CommandError, NotSupported, OptionError

log = logging.getLogger(__name__)

_PREFIX = "blkdebug:"
_INT_MAX = 2**31 - 1
#: a longer name is not reported (QEMU: sizeof(BlockDriverState.exact_filename))
_FILENAME_LENGTH = 4096
_MAX_SECONDS = 10**9

BlockPermission = Literal["consistent-read", "resize", "write", "write-unchanged"]
_PERMS = {
    "consistent-read": Perm.CONSISTENT_READ,
    "resize": Perm.RESIZE,
    "write": Perm.WRITE,
    "write-unchanged": Perm.WRITE_UNCHANGED,
}


class BlkdebugOptions(BlockdevOptions, frozen=True, kw_only=True):
    image: Annotated[BlockdevRef, Meta(description="node that requests go to")]
    config: Annotated[str | UnsetType, Meta(description="file with rules")] = UNSET
    align: Annotated[Int | UnsetType, Meta(description="required alignment in bytes, 0 for none")] = UNSET
    max_transfer: Annotated[Int32 | UnsetType, Meta(description="longest request in bytes, 0 for the image's")] = UNSET
    opt_write_zero: Annotated[
        Int32 | UnsetType, Meta(description="preferred alignment of zero writes in bytes, 0 for none")
    ] = UNSET
    max_write_zero: Annotated[Int32 | UnsetType, Meta(description="longest zero write in bytes, 0 for any")] = UNSET
    opt_discard: Annotated[
        Int32 | UnsetType, Meta(description="preferred alignment of discards in bytes, 0 for none")
    ] = UNSET
    max_discard: Annotated[Int32 | UnsetType, Meta(description="longest discard in bytes, 0 for any")] = UNSET
    inject_error: Annotated[list[InjectErrorOptions], Meta(description="rules that make requests fail")] = field(
        default_factory=list
    )
    set_state: Annotated[list[SetStateOptions], Meta(description="rules that change the state")] = field(
        default_factory=list
    )
    take_child_perms: Annotated[list[BlockPermission], Meta(description="permissions to take on the image")] = field(
        default_factory=list
    )
    unshare_child_perms: Annotated[list[BlockPermission], Meta(description="permissions not to share")] = field(
        default_factory=list
    )


class BlkdebugRuleAdd(OptionStruct, frozen=True, kw_only=True):
    rule: Annotated[BlkdebugRule, Meta(description="the rule to add behind those there are")]


class BlkdebugRuleRemove(OptionStruct, frozen=True, kw_only=True):
    id: Annotated[str, Meta(description="the rule to take away")]


class BlkdebugSetState(OptionStruct, frozen=True, kw_only=True):
    state: Annotated[Int, Meta(description="the state from now on")]


class BlkdebugBreak(OptionStruct, frozen=True, kw_only=True):
    event: Annotated[BlkdebugEvent, Meta(description="the next request that announces it is stopped")]
    tag: Annotated[str, Meta(description="what it is resumed by")]


class BlkdebugTag(OptionStruct, frozen=True, kw_only=True):
    tag: Annotated[str, Meta(description="that of the breakpoint")]


class BlkdebugResume(BlkdebugTag, frozen=True, kw_only=True):
    request: Annotated[Size | UnsetType, Meta(description="this one, by its number; the latest if absent")] = UNSET


class BlkdebugWaitBreak(BlkdebugTag, frozen=True, kw_only=True):
    timeout: Annotated[float | UnsetType, Meta(description="seconds to wait at most; no limit if absent")] = UNSET


class QueryBlkdebug(OptionStruct, frozen=True, kw_only=True):
    """Nothing but the node."""


def _limits(options: BlkdebugOptions, below: Limits) -> Limits:
    """The limits that *options* ask for; raises OptionError where they contradict each other or those of the image."""
    align = _checked("align", options.align, 1)
    unit = max(align, below.request_alignment)
    if align & (align - 1):
        raise _unmet("align", align)
    max_transfer = _checked("max-transfer", options.max_transfer, unit)
    zero_unit = _checked("opt-write-zero", options.opt_write_zero, unit)
    max_zero = _checked("max-write-zero", options.max_write_zero, max(zero_unit, unit))
    discard_unit = _checked("opt-discard", options.opt_discard, unit)
    return Limits(
        request_alignment=align or 1,
        max_transfer=max_transfer or below.max_transfer,
        pwrite_zeroes_alignment=zero_unit,
        max_pwrite_zeroes=max_zero,
        pdiscard_alignment=discard_unit,
        max_pdiscard=_checked("max-discard", options.max_discard, max(discard_unit, unit)),
    )


def _checked(name: str, given: int | UnsetType, unit: int) -> int:
    """*given*, a positive multiple of *unit* that fits a request, or 0."""
    value = 0 if given is UNSET else int(given)
    if value < 0:
        raise OptionError(f"Value '{value}' is out of range for parameter '{name}'")
    if value >= _INT_MAX or value % unit:
        raise _unmet(name, value)
    return value


def _unmet(name: str, value: int) -> OptionError:
    return OptionError(f"Cannot meet constraints with {name} {value}")


@register("blkdebug", BlkdebugOptions)
class Blkdebug(FilterDriver):
    """Requests suspend where ``image`` does, one trip through the scheduler where a rule without ``immediately``
    fails them, and as long as a breakpoint holds them.  While the node is drained, none does.
    """

    protocol_prefix: ClassVar[str | None] = "blkdebug"
    strong_options: ClassVar[frozenset[str]] = frozenset(
        {
            "config",
            "inject-error",
            "set-state",
            "align",
            "max-transfer",
            "opt-write-zero",
            "max-write-zero",
            "opt-discard",
            "max-discard",
        }
    )

    def __init__(self, node: Node, file: Child, options: BlkdebugOptions) -> None:
        super().__init__(node, file)
        self.limits = _limits(options, file.node.driver.limits)
        self.rules = RuleSet()
        self._stops = Stops(self._stopped)
        self._drains = 0
        self._passes = True  #: there are no rules
        self._config = "" if options.config is UNSET else str(options.config)
        told = (getattr(options, name.replace("-", "_")) for name in self.strong_options - {"config"})
        self._has_short_name = all(value is UNSET or value == [] for value in told)

    @classmethod
    async def open(cls, opening: Opening, options: BlkdebugOptions) -> Blkdebug:
        """Read the rules, then open the image.  Rules of the file come before those in the options.

        Suspends while the file is read.
        """
        configured = [] if options.config is UNSET else await read_config(str(options.config))
        child = await opening.child("image", options.image, Role.FILTERED | Role.PRIMARY)
        driver = cls(opening.node, child, options)
        rules = driver.rules
        for rule in configured:
            # sections of different kinds may have the same id in QEMU; the second then goes by a number
            rules.add(rule.options, rule.id if rule.id is not None and rule.id not in rules else None)
        for injected in options.inject_error:
            rules.add(injected)
        for setting in options.set_state:
            rules.add(setting)
        rules.announce("none")
        driver._refresh_events()
        return driver

    @classmethod
    def parse_filename(cls, name: str) -> dict[str, Json]:
        """``blkdebug:CONFIG:IMAGE``; CONFIG may be empty."""
        config, colon, image = name.removeprefix(_PREFIX).partition(":")
        if not colon:
            raise OptionError("blkdebug requires both config file and image path")
        tree: dict[str, Json] = {"image": {"filename": image}}
        if config:
            tree["config"] = config
        return tree

    @classmethod
    def child_perm(cls, node: Node, child: str, role: Role, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        options = node.options
        assert isinstance(options, BlkdebugOptions)
        taken, given = default_perms(role, perm, shared, writable=not node.read_only)
        for name in options.take_child_perms:
            taken |= _PERMS[name]
        for name in options.unshare_child_perms:
            given &= ~_PERMS[name]
        return taken, given

    @property
    def filename(self) -> str:
        below = self.file.node.driver.filename
        name = f"{_PREFIX}{self._config}:{below}"
        return name if below and self._has_short_name and len(os.fsencode(name)) < _FILENAME_LENGTH else ""

    # -- requests -------------------------------------------------------------------------------

    def read_bypass(self) -> Bypass | None:
        return Bypass(self.file, None if self._passes else self.rules.covering("read"))

    def write_bypass(self) -> Bypass | None:
        return Bypass(self.file, None if self._passes else self.rules.covering("write"))

    def announcing(self, event: str, operation: str) -> Concerns | None:
        return self.rules.announcing(event, operation)

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        if self.rules.active:
            await self._check("read", offset, nbytes(bufs))
        await self.file.preadv(offset, bufs)

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        if self.rules.active:
            await self._check("write", offset, nbytes(bufs))
        await self.file.pwritev(offset, bufs, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        # Shorter ones are refused, so that the caller's way of writing heads and tails gets its test.
        if length < max(self.limits.request_alignment, self.limits.pwrite_zeroes_alignment):
            raise NotSupported(node_name=self.node.name, operation="write-zeroes")
        if self.rules.active:
            await self._check("write-zeroes", offset, length)
        await self.file.pwrite_zeroes(offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        if length < self.limits.request_alignment:
            raise NotSupported(node_name=self.node.name, operation="discard")
        if self.rules.active:
            await self._check("discard", offset, length)
        await self.file.pdiscard(offset, length)

    async def flush_to_disk(self) -> None:
        # the image itself is flushed by ``flush``, after this
        if self.rules.active:
            await self._check("flush", 0, 0)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        if self.rules.active:
            await self._check("block-status", offset, length)
        return await super().block_status(offset, length)

    async def _check(self, io_type: str, offset: int, length: int) -> None:
        """Raise the error that a rule has for the request, if one has."""
        rule = self.rules.fire(io_type, offset, length)
        if rule is None:
            return
        self._refresh_events()  # it may have been the last one
        self.node.graph.ledger.record_fault(
            self.node,
            rule=rule.id,
            action="error",
            operation=io_type,
            offset=offset,
            length=length,
            errno=rule.errno,
        )
        if not rule.immediately:
            await trio.lowlevel.checkpoint()
        if rule.errno == errno.ENOTSUP:
            raise NotSupported(node_name=self.node.name, operation=io_type)
        raise BlockIOError(rule.errno, node_name=self.node.name, operation=io_type, offset=offset)

    # -- events and breakpoints -----------------------------------------------------------------

    def announced(self, event: str) -> Awaitable[None] | None:
        """While the node is drained, breakpoints stay as they are: nothing may be held then."""
        rules = self.rules
        always = rules.always.get(event)
        if always is not None:
            rules.active = always
            return None
        tags = rules.announce(event, stops=not self._drains)
        if not tags:
            return None
        self._refresh_events()
        return self._stops.hold(event, tags)

    def _refresh_events(self) -> None:
        """Hear only of events that rules wait for, and of requests only if there are rules."""
        events = self.rules.events
        if events != self.listens or self._passes != (not self.rules):
            self.listens, self._passes = events, not self.rules
            self.node.refresh_edges()

    def _stopped(self, stop: Stop) -> None:
        self.node.emit("BLKDEBUG_BREAK", {"node-name": self.node.public_name, **stop.describe()})

    def drain_begin(self) -> None:
        self._drains += 1
        self._stops.resume_all()

    def drain_end(self) -> None:
        self._drains -= 1

    async def close(self) -> None:
        self._stops.give_up(f"Node '{self.node.name}' was removed")

    def set_break(self, event: str, tag: str) -> None:
        """Suspend, once, the next request that announces *event*, under the name *tag*.  Raises CommandError."""
        if event not in EVENTS:
            raise CommandError("Could not set breakpoint: No such file or directory", errno=errno.ENOENT)
        self.rules.add_breakpoint(event, tag)
        self._refresh_events()

    def resume(self, tag: str, number: int | None = None) -> None:
        """Let one request go that is suspended as *tag*: the latest, or the one of the stop *number*.

        Raises CommandError if there is none.
        """
        stop = self._stops.find(tag, number)
        if stop is None:
            raise CommandError("Could not resume request: No such file or directory", errno=errno.ENOENT)
        self._resume(stop)

    def remove_break(self, tag: str) -> None:
        """Drop the breakpoints *tag* and let all requests go that are suspended there.  Raises CommandError."""
        found = self.rules.remove_breakpoints(tag)
        while (stop := self._stops.find(tag)) is not None:
            self._resume(stop)
            found += 1
        if not found:
            raise CommandError(f"Could not remove breakpoint {tag}: No such file or directory", errno=errno.ENOENT)
        self._stops.give_up(f"Breakpoint '{tag}' was removed", tag)
        self._refresh_events()

    def is_suspended(self, tag: str) -> bool:
        """Whether a request is suspended as *tag*."""
        return self._stops.find(tag) is not None

    async def wait_break(self, tag: str) -> Stop:
        """Suspend until a request is suspended as *tag*.

        Raises CommandError if the breakpoint or the node is removed meanwhile.
        """
        return await self._stops.wait(tag)

    def _resume(self, stop: Stop) -> None:
        log.info("blkdebug: Resuming request '%s'", stop.tag)
        self._stops.resume(stop)

    # -- rules, while open ----------------------------------------------------------------------

    def add_rule(self, options: InjectErrorOptions | SetStateOptions, ident: str | None = None) -> Rule:
        """Add a rule after those there are; one on the event ``none`` is active at once, beside those that are.

        Raises OptionError if *ident* is taken or a value is out of range.
        """
        rule = self.rules.add(options, ident)
        if rule.event == "none":
            self.rules.start(rule)
        self._refresh_events()
        return rule

    def remove_rule(self, ident: str) -> None:
        """Take the rule *ident* away.  Raises CommandError if there is none."""
        self.rules.remove(ident)
        self._refresh_events()

    def list_rules(self) -> list[Rule]:
        """The rules, breakpoints among them."""
        return list(self.rules)

    # -- commands -------------------------------------------------------------------------------
    # Only the one that waits suspends: the others can be given out of band by a client that waits.

    @driver_command("blkdebug-rule-add", BlkdebugRuleAdd, allow_oob=True)
    async def _command_rule_add(self, arguments: BlkdebugRuleAdd) -> Json:
        """Add a rule; what it is called."""
        given = arguments.rule
        rule = self.add_rule(given.options(), None if given.id is UNSET else given.id)
        return {"node-name": self.node.name, "id": rule.id}

    @driver_command("blkdebug-rule-remove", BlkdebugRuleRemove, allow_oob=True)
    async def _command_rule_remove(self, arguments: BlkdebugRuleRemove) -> None:
        self.remove_rule(arguments.id)

    @driver_command("blkdebug-set-state", BlkdebugSetState, allow_oob=True)
    async def _command_set_state(self, arguments: BlkdebugSetState) -> None:
        self.rules.state = arguments.state

    @driver_command("blkdebug-break", BlkdebugBreak, allow_oob=True)
    async def _command_break(self, arguments: BlkdebugBreak) -> None:
        self.set_break(arguments.event, arguments.tag)

    @driver_command("blkdebug-resume", BlkdebugResume, allow_oob=True)
    async def _command_resume(self, arguments: BlkdebugResume) -> None:
        self.resume(arguments.tag, None if arguments.request is UNSET else arguments.request)

    @driver_command("blkdebug-remove-break", BlkdebugTag, allow_oob=True)
    async def _command_remove_break(self, arguments: BlkdebugTag) -> None:
        self.remove_break(arguments.tag)

    @driver_command("blkdebug-wait-break", BlkdebugWaitBreak)
    async def _command_wait_break(self, arguments: BlkdebugWaitBreak) -> Json:
        """Suspend until a request is held as the tag; what is held.

        Raises CommandError if there is no such breakpoint, or it goes away, or nothing has reached it in time.
        """
        tag, timeout = arguments.tag, arguments.timeout
        if timeout is not UNSET and not 0 <= timeout <= _MAX_SECONDS:
            raise OptionError(f"Parameter 'timeout' expects a number from 0 to {_MAX_SECONDS}")
        if not self.is_suspended(tag) and all(point.tag != tag for point in self.rules.breakpoints):
            raise CommandError(f"No breakpoint '{tag}'")
        with trio.move_on_after(math.inf if timeout is UNSET else timeout):
            return (await self.wait_break(tag)).describe()
        raise CommandError(f"No request has reached breakpoint '{tag}' in {timeout:g} seconds")

    @driver_command("query-blkdebug", QueryBlkdebug, allow_oob=True)
    async def _command_query(self, arguments: QueryBlkdebug) -> Json:
        now = trio.current_time()
        return {
            "node-name": self.node.name,
            "state": self.rules.state,
            "rules": self.rules.describe(),
            "breakpoints": [{"tag": point.tag, "event": point.event} for point in self.rules.breakpoints],
            "held": [{**stop.describe(), "seconds": round(now - stop.since, 3)} for stop in self._stops.held],
        }
