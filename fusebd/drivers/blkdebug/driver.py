"""blkdebug: fail chosen requests at chosen moments, stop them, and tell the layers above about limits.

Parents announce what they are about to do on their child's ``debug_event``; rules (``rules.py``) turn such
events into errors for the requests that follow.  The limits are kept by the edge above.

Options: QAPI BlockdevOptionsBlkdebug.  Behaviour: QEMU block/blkdebug.c, docs/devel/testing/blkdebug.rst.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import Annotated, ClassVar, Literal

import trio
from msgspec import UNSET, Meta, UnsetType, field

from fusebd.block.driver import BlockStatus, Buffers, Child, FilterDriver, Limits, Node, nbytes, register
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef, Int, Json
from fusebd.block.perms import Perm, Role, default_perms
from fusebd.drivers.blkdebug.config import read_config
from fusebd.drivers.blkdebug.rules import EVENTS, InjectErrorOptions, Rule, RuleSet, SetStateOptions
from fusebd.errors import BlockIOError, CommandError, NotSupported, OptionError

log = logging.getLogger(__name__)

_PREFIX = "blkdebug:"
_INT_MAX = 2**31 - 1
#: a longer name is not reported (QEMU: sizeof(BlockDriverState.exact_filename))
_FILENAME_LENGTH = 4096

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
    align: Annotated[Int, Meta(description="required alignment in bytes, 0 for none")] = 0
    max_transfer: Annotated[Int, Meta(description="longest request in bytes, 0 for the image's")] = 0
    opt_write_zero: Annotated[Int, Meta(description="preferred alignment of zero writes in bytes, 0 for none")] = 0
    max_write_zero: Annotated[Int, Meta(description="longest zero write in bytes, 0 for any")] = 0
    opt_discard: Annotated[Int, Meta(description="preferred alignment of discards in bytes, 0 for none")] = 0
    max_discard: Annotated[Int, Meta(description="longest discard in bytes, 0 for any")] = 0
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


def _limits(options: BlkdebugOptions, below: Limits) -> Limits:
    """The limits that *options* ask for; raises OptionError where they contradict each other or those of the image."""
    align = options.align
    unit = max(_checked("align", align, 1), below.request_alignment)
    if align & (align - 1):
        raise _unmet("align", align)
    zero_unit = _checked("opt-write-zero", options.opt_write_zero, unit)
    discard_unit = _checked("opt-discard", options.opt_discard, unit)
    return Limits(
        request_alignment=align or 1,
        max_transfer=_checked("max-transfer", options.max_transfer, unit) or below.max_transfer,
        pwrite_zeroes_alignment=zero_unit,
        max_pwrite_zeroes=_checked("max-write-zero", options.max_write_zero, max(zero_unit, unit)),
        pdiscard_alignment=discard_unit,
        max_pdiscard=_checked("max-discard", options.max_discard, max(discard_unit, unit)),
    )


def _checked(name: str, value: int, unit: int) -> int:
    """*value*, a positive multiple of *unit* that fits a request, or 0."""
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
    fails them, and as long as a breakpoint holds them.
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
        self.debug_event = self._debug_event
        self._suspended: list[tuple[str, trio.Event]] = []
        self._arrival = trio.Event()
        self._config = "" if options.config is UNSET else str(options.config)
        told = (name.replace("-", "_") for name in self.strong_options - {"config"})
        self._has_short_name = not any(getattr(options, name) for name in told)

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
        if not rule.immediately:
            await trio.lowlevel.checkpoint()
        if rule.errno == errno.ENOTSUP:
            raise NotSupported(node_name=self.node.name, operation=io_type)
        raise BlockIOError(rule.errno, node_name=self.node.name, operation=io_type, offset=offset)

    # -- events and breakpoints -----------------------------------------------------------------

    async def _debug_event(self, event: str) -> None:
        tags = self.rules.announce(event)
        if tags:
            await self._stop(tags)

    async def _stop(self, tags: list[str]) -> None:
        """Suspend until each of *tags* has been resumed."""
        held = [(tag, trio.Event()) for tag in tags]
        self._suspended += held
        arrival, self._arrival = self._arrival, trio.Event()
        arrival.set()
        for tag, _ in held:
            log.info("blkdebug: Suspended request '%s'", tag)
        try:
            for _, resumed in held:
                await resumed.wait()
        finally:
            self._suspended = [entry for entry in self._suspended if entry not in held]

    def set_break(self, event: str, tag: str) -> None:
        """Suspend, once, the next request that announces *event*, under the name *tag*.  Raises CommandError."""
        if event not in EVENTS:
            raise CommandError("Could not set a breakpoint: No such file or directory", errno=errno.ENOENT)
        self.rules.add_breakpoint(event, tag)

    def resume(self, tag: str) -> None:
        """Let one request go that is suspended as *tag*, the latest.  Raises CommandError if there is none."""
        if not self._resume(tag):
            raise CommandError("Could not resume request: No such file or directory", errno=errno.ENOENT)

    def remove_break(self, tag: str) -> None:
        """Drop the breakpoints *tag* and let all requests go that are suspended there.  Raises CommandError."""
        found = self.rules.remove_breakpoints(tag)
        while self._resume(tag):
            found += 1
        if not found:
            raise CommandError("Could not remove a breakpoint: No such file or directory", errno=errno.ENOENT)

    def is_suspended(self, tag: str) -> bool:
        """Whether a request is suspended as *tag*."""
        return any(held == tag for held, _ in self._suspended)

    async def wait_break(self, tag: str) -> None:
        """Suspend until a request is suspended as *tag*."""
        while not self.is_suspended(tag):
            await self._arrival.wait()

    def _resume(self, tag: str) -> bool:
        for index in reversed(range(len(self._suspended))):
            held, resumed = self._suspended[index]
            if held == tag:
                log.info("blkdebug: Resuming request '%s'", tag)
                del self._suspended[index]
                resumed.set()
                return True
        return False

    # -- rules, while open ----------------------------------------------------------------------

    def add_rule(self, options: InjectErrorOptions | SetStateOptions, ident: str | None = None) -> Rule:
        """Add a rule after those there are; one on the event ``none`` is active at once, beside those that are.

        Raises OptionError if *ident* is taken or a value is out of range.
        """
        rule = self.rules.add(options, ident)
        if rule.event == "none":
            self.rules.start(rule)
        return rule

    def remove_rule(self, ident: str) -> None:
        """Take the rule *ident* away.  Raises CommandError if there is none."""
        self.rules.remove(ident)

    def list_rules(self) -> list[Rule]:
        """The rules, breakpoints among them."""
        return list(self.rules)
