"""throttle: hold requests back so that a throttle group stays inside its limits.

Reads count as reads; writes, zero writes and discards as writes; flushes and everything else is free.

Options: QAPI BlockdevOptionsThrottle.  Behaviour: QEMU block/throttle.c, docs/throttle.txt.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from fusebd.block.driver import Buffers, Bypass, Child, FilterDriver, Node, nbytes, register
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef
from fusebd.block.perms import Role
from fusebd.block.reopening import Reopening
from fusebd.block.throttlegroup import READ, WRITE, Member


class ThrottleOptions(BlockdevOptions, frozen=True, kw_only=True):
    throttle_group: Annotated[str, Meta(description="the group whose limits hold; it must exist")]
    file: Annotated[BlockdevRef, Meta(description="the node that requests go to")]


class ThrottleReopening(Reopening):
    """Another group: the node has a place in both until it is left in one of them."""

    driver: Throttle
    _before: Member | None = None
    _after: Member | None = None

    def prepare(self) -> None:
        if self.changed:
            self._after = self.node.graph.objects.throttle_group(self.options.throttle_group).join()

    def take_over(self) -> None:
        if self._after is not None:
            self._before = self.driver.change_member(self._after)

    def commit(self) -> None:
        if self._before is not None:
            self._before.leave()

    def undo(self) -> None:
        if self._before is not None:
            self.driver.change_member(self._before)
        if self._after is not None:
            self._after.leave()


@register("throttle", ThrottleOptions)
class Throttle(FilterDriver):
    """Requests suspend while the group is over its limits, or where ``file`` does."""

    strong_options = frozenset({"throttle-group"})
    changeable: ClassVar[frozenset[str] | None] = frozenset({"throttle-group"})
    reopening = ThrottleReopening
    can_compress = True

    def __init__(self, node: Node, file: Child, member: Member) -> None:
        super().__init__(node, file)
        self._member = member
        self._drains = 0

    @classmethod
    async def open(cls, opening: Opening, options: ThrottleOptions) -> Throttle:
        file = await opening.child("file", options.file, Role.FILTERED | Role.PRIMARY)
        group = opening.graph.objects.throttle_group(options.throttle_group)
        return cls(opening.node, file, group.join())

    async def close(self) -> None:
        self._member.leave()

    def change_member(self, member: Member) -> Member:
        """Ask *member* from now on, while no request is under way; who was asked before."""
        before, self._member = self._member, member
        for _ in range(self._drains):
            member.suspend_limits()
            before.resume_limits()
        return before

    def drain_begin(self) -> None:
        self._drains += 1
        self._member.suspend_limits()

    def drain_end(self) -> None:
        self._drains -= 1
        self._member.resume_limits()

    async def flush(self) -> None:
        # without the events that a flush announces elsewhere, as in QEMU
        await self.file.flush()

    def read_bypass(self) -> Bypass | None:
        return Bypass(self.file, self._concerns_read)

    def write_bypass(self) -> Bypass | None:
        return Bypass(self.file, self._concerns_write)

    def _concerns_read(self, offset: int, length: int) -> bool:
        return self._member.group.state.is_limited(READ)

    def _concerns_write(self, offset: int, length: int) -> bool:
        return self._member.group.state.is_limited(WRITE)

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        await self._member.admit(READ, nbytes(bufs))
        await self.file.preadv(offset, bufs)

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        await self._member.admit(WRITE, nbytes(bufs))
        await self.file.pwritev(offset, bufs, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self._member.admit(WRITE, length)
        await self.file.pwrite_zeroes(offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        await self._member.admit(WRITE, length)
        await self.file.pdiscard(offset, length)
