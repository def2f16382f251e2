"""quorum: keep the same content in several nodes, and believe what enough of them agree on.

A read asks all children and compares what they say.  If they do not agree, the content that most of them have wins:
those with another one are reported (QUORUM_REPORT_BAD), and rewritten if that is wanted (``rewrite-corrupted``).  A
write goes to all children.  Any request fails if fewer than ``vote-threshold`` children carry it out, with the errno
that most of the others had, and a read does, too, if no content has as many votes (QUORUM_FAILURE).  With
``read-pattern=fifo`` a read asks one child after the other until one answers.  With ``blkverify`` two children are
compared as blkverify does, the first being the side under test, and ``on-mismatch`` says what a difference does.

While a write is under way its range differs from child to child, and nothing is wrong with that.  So a read that
finds a difference waits for such writes and asks again before there is a vote.  Writes to the same bytes go in turn, so
that all children end with the same of them.  (QEMU does neither: it reports, or corrects, what is no corruption.)

Options: QAPI BlockdevOptionsQuorum.  Behaviour and texts: QEMU block/quorum.c.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Generic, Literal, TypeVar

from msgspec import UNSET, Meta, UnsetType

from fusebd.block.blockstatus import block_status_above
from fusebd.block.child import copy_into
from fusebd.block.driver import (
    NO_FALLBACK,
    BlockStatus,
    Buffers,
    Child,
    Driver,
    Node,
    Status,
    nbytes,
    register,
)
from fusebd.block.mismatch import Mismatches, OnMismatch
from fusebd.block.node import RangeLock
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef, Int
from fusebd.block.perms import Perm, Role
from fusebd.block.sidebyside import Request, SideBySide
from fusebd.errors import BlockIOError, GraphError, NotSupported, OpenError, OptionError

#: events count in sectors of so many bytes
_SECTOR = 512

V = TypeVar("V")
Operation = Literal["read", "write", "flush"]


class QuorumOptions(BlockdevOptions, frozen=True, kw_only=True):
    blkverify: Annotated[
        bool | UnsetType, Meta(description="compare two children, and do at a difference what on-mismatch says")
    ] = UNSET
    children: Annotated[list[BlockdevRef], Meta(description="nodes with the same content")]
    vote_threshold: Annotated[Int, Meta(description="how many children must carry out a request, and agree on a read")]
    rewrite_corrupted: Annotated[
        bool | UnsetType, Meta(description="write what was agreed on to children that have something else")
    ] = UNSET
    read_pattern: Annotated[
        Literal["quorum", "fifo"] | UnsetType,
        Meta(description="read from all children, or from the first that does not fail (default: quorum)"),
    ] = UNSET
    on_mismatch: Annotated[
        OnMismatch | UnsetType,
        Meta(description="with blkverify: fail the read, only report it, or end the daemon (default: error)"),
    ] = UNSET

    @property
    def first_come(self) -> bool:
        """Whether reads are answered by the first child that can.  Much else means nothing then."""
        return self.read_pattern == "fifo"

    @property
    def verifies(self) -> bool:
        return self.blkverify is True and not self.first_come

    @property
    def rewrites(self) -> bool:
        return self.rewrite_corrupted is True and not self.first_come

    def check(self) -> None:
        """Raises OptionError, in QEMU's words and order."""
        if not self.children:
            raise OptionError("Number of provided children must be 1 or more")
        if self.vote_threshold < 1:
            raise OptionError("Parameter 'vote-threshold' expects a value >= 1")
        if self.vote_threshold > len(self.children):
            raise OptionError("threshold may not exceed children count")
        if self.verifies and (len(self.children) != 2 or self.vote_threshold != 2):
            raise OptionError("blkverify=on can only be set if there are exactly two files and vote-threshold is 2")
        if self.verifies and self.rewrites:
            raise OptionError("rewrite-corrupted=on cannot be used with blkverify=on")
        if self.on_mismatch is not UNSET and self.blkverify is not True:
            raise OptionError("on-mismatch can only be set with blkverify=on")


class Ballot(Generic[V]):
    """Votes of children, by their numbers, for one of several versions of something."""

    def __init__(self, votes: Iterable[tuple[int, V]]) -> None:
        self._versions: dict[V, list[int]] = {}
        for child, version in votes:
            self._versions.setdefault(version, []).append(child)

    @property
    def winner(self) -> tuple[V, list[int]]:
        """The version that most voted for, and who did.  Of several such, it is the one that came up last."""
        return max(reversed(self._versions.items()), key=lambda version: len(version[1]))

    @property
    def losers(self) -> list[int]:
        """Who did not vote for the winner, the latest first."""
        winner, _ = self.winner
        return [
            child
            for version, voters in reversed(self._versions.items())
            if version != winner
            for child in reversed(voters)
        ]


@register("quorum", QuorumOptions)
class Quorum(Driver):
    """The length is that of the children, which is the same to the byte (in QEMU, to the sector).

    Requests suspend where children do, and while a write to the same bytes is under way.
    """

    probed_children = frozenset({"children"})
    strong_options = frozenset({"vote-threshold", "blkverify", "rewrite-corrupted", "read-pattern"})
    changes_children = True

    def __init__(self, node: Node, children: list[Child], options: QuorumOptions) -> None:
        super().__init__(node)
        self._members = children
        self._threshold = options.vote_threshold
        self._first_come = options.first_come
        self._rewrites = options.rewrites
        self._mismatches: Mismatches | None = None
        if options.verifies:
            action: OnMismatch = "error" if options.on_mismatch is UNSET else options.on_mismatch
            self._mismatches = Mismatches(node, action, (children[0].name, children[1].name))
        self._next_index = len(children)
        self._reads, self._writes, self._flushes = SideBySide(), SideBySide(), SideBySide()
        self._writing = RangeLock()
        self._writes_begun = self._writes_ended = 0
        self._take_limits()

    @classmethod
    async def open(cls, opening: Opening, options: QuorumOptions) -> Quorum:
        options.check()
        children = [
            await opening.child(f"children.{index}", ref, Role.DATA) for index, ref in enumerate(options.children)
        ]
        lengths = [child.node.driver.length for child in children]
        if len(set(lengths)) > 1:
            raise OpenError(
                f"Could not refresh total sector count: {os.strerror(errno.EIO)}",
                errno=errno.EIO,
                hint=f"the children have different lengths: {', '.join(map(str, lengths))} bytes",
            )
        driver = cls(opening.node, children, options)
        driver.length = lengths[0]
        return driver

    @classmethod
    def child_perm(cls, node: Node, child: str, role: Role, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        options = node.options
        assert isinstance(options, QuorumOptions)
        if options.rewrites:
            perm |= Perm.WRITE
        # who else writes or resizes one of the children makes it different from the others
        return perm, shared & (Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED)

    def _take_limits(self) -> None:
        """A request that a child takes only in pieces is voted on piece by piece."""
        self.limits.max_transfer = min(
            filter(None, (child.node.driver.limits.max_transfer for child in self._members)), default=0
        )

    def child_resized(self, child: Child) -> None:
        lengths = {member.node.driver.length for member in self._members}
        if len(lengths) == 1:
            self.node.set_length(lengths.pop())

    def allocated_bytes(self) -> int | None:
        """What all children take together."""
        sizes = [child.node.driver.allocated_bytes() for child in self._members]
        return None if None in sizes else sum(filter(None, sizes))

    # -- reading --------------------------------------------------------------------------------

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        size = nbytes(bufs)
        if self._first_come:
            await self._read_first(offset, bufs, size)
            return
        begun, under_way = self._writes_begun, self._writes_begun != self._writes_ended
        answers = await self._read_all(offset, bufs, size)
        if answers.differ:
            lock = await self._writing.acquire(offset, offset + size, exclusive=True)
            try:
                if under_way or self._writes_begun != begun:
                    answers = await self._read_all(offset, bufs, size)
                if answers.differ:
                    await self._decide(offset, size, answers)
                    return
            finally:
                self._writing.release(lock)
        self._settle("read", offset, size, answers.errnos)

    async def _read_first(self, offset: int, bufs: Buffers, size: int) -> None:
        code = 0
        for child in self._members:
            try:
                await child.preadv(offset, bufs)
            except BlockIOError as error:
                code = error.errno
                self._report_bad("read", child, offset, size, code)
            else:
                return
        raise self._failed("read", offset, code)

    async def _read_all(self, offset: int, bufs: Buffers, size: int) -> _Answers:
        copies = [bytearray(size) for _ in self._members[1:]]
        targets = [bufs, *((memoryview(copy),) for copy in copies)]
        requests = [child.preadv(offset, target) for child, target in zip(self._members, targets, strict=True)]
        return _Answers(bufs, copies, await self._reads.outcomes(requests))

    async def _decide(self, offset: int, size: int, answers: _Answers) -> None:
        """Children differ: have the right content in the reader's buffers, and in the children if that is wanted."""
        self._settle("read", offset, size, answers.errnos)
        if self._mismatches is not None:
            at, test, raw = answers.first_difference()
            self._mismatches.contents("quorum:", offset, size, at, test, raw)
            return
        ballot = Ballot((child, answers.digest(child)) for child in answers.good)
        _, winners = ballot.winner
        if len(winners) < self._threshold:
            self._report_failure(offset, size)
            raise self._failed("read", offset, errno.EIO)
        answers.take(winners[0])
        for index in ballot.losers:
            self._report_bad("read", self._members[index], offset, size)
        if self._rewrites:
            # whether that works shows at the next read
            await self._writes.outcomes([self._members[index].pwritev(offset, answers.bufs) for index in ballot.losers])

    # -- writing --------------------------------------------------------------------------------

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        size = nbytes(bufs)
        errnos = await self._write(offset, size, lambda child: child.pwritev(offset, bufs, flags))
        self._settle("write", offset, size, errnos)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """As in the base class.  Under NO_FALLBACK, NotSupported is what all children answer: where it is but some,
        these write zeroes all the same, because the others have."""
        slowly = flags & ~NO_FALLBACK
        errnos = await self._write(
            offset,
            length,
            lambda child: child.pwrite_zeroes(offset, length, flags),
            lambda child: child.pwrite_zeroes(offset, length, slowly),
        )
        if flags & NO_FALLBACK and all(code == errno.ENOTSUP for code in errnos):
            raise NotSupported(node_name=self.node.name, operation="write zeroes")
        self._settle("write", offset, length, errnos)

    async def _write(
        self,
        offset: int,
        size: int,
        request: Callable[[Child], Request],
        otherwise: Callable[[Child], Request] | None = None,
    ) -> list[int]:
        """Have all children carry out *request*: the errno of each, 0 for success.

        If some, and not all, do not support it, these carry out *otherwise*.
        """
        lock = await self._writing.acquire(offset, offset + size, exclusive=True)
        self._writes_begun += 1
        try:
            errnos = await self._writes.outcomes([request(child) for child in self._members])
            unable = [index for index, code in enumerate(errnos) if code == errno.ENOTSUP]
            if otherwise is not None and 0 < len(unable) < len(errnos):
                for index, code in zip(
                    unable,
                    await self._writes.outcomes([otherwise(self._members[index]) for index in unable]),
                    strict=True,
                ):
                    errnos[index] = code
            return errnos
        finally:
            self._writes_ended += 1
            self._writing.release(lock)

    async def flush(self) -> None:
        """Flush all children.  It fails if fewer than the threshold can."""
        self._settle("flush", 0, 0, await self._flushes.outcomes([child.flush() for child in self._members]))

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """Zeroes where all children have them, as far as all do; else data, as far as any child has some."""
        zeroes, data = length, 0
        for child in self._members:
            try:
                status = await block_status_above(child.node, offset, length)
            except BlockIOError as error:
                self._report_bad("read", child, offset, length, error.errno)
                data = length
                break
            if status.flags & Status.ZERO:
                zeroes = min(zeroes, status.length)
            else:
                data = max(data, status.length)
        return BlockStatus(Status.DATA, data) if data else BlockStatus(Status.ZERO, zeroes)

    # -- verdicts -------------------------------------------------------------------------------

    def _settle(self, operation: Operation, offset: int, size: int, errnos: Sequence[int]) -> None:
        """Report the children that failed, and raise what most of them failed with if too few did not."""
        if not any(errnos):
            return
        failed = [(index, code) for index, code in enumerate(errnos) if code]
        for index, code in failed:
            self._report_bad(operation, self._members[index], offset, size, code)
        if len(errnos) - len(failed) < self._threshold:
            if operation != "flush":
                self._report_failure(offset, size)
            code, _ = Ballot(failed).winner
            raise self._failed(operation, offset, code)

    def _failed(self, operation: Operation, offset: int, code: int) -> BlockIOError:
        return BlockIOError(code, node_name=self.node.name, operation=operation, offset=offset)

    def _report_bad(self, operation: Operation, child: Child, offset: int, size: int, code: int = 0) -> None:
        """Announce that *child* failed with *code*, or has other content than the rest if that is 0."""
        data: dict[str, str | int] = {"type": operation}
        if code:
            data["error"] = os.strerror(code)
        data["node-name"] = child.node.public_name
        self.node.emit("QUORUM_REPORT_BAD", data | _sectors(offset, size))

    def _report_failure(self, offset: int, size: int) -> None:
        self.node.emit("QUORUM_FAILURE", {"reference": self.node.name} | _sectors(offset, size))

    # -- children that come and go --------------------------------------------------------------

    def new_child(self, below: Node) -> tuple[str, Role]:
        if self._mismatches is not None:
            raise GraphError("Cannot add a child to a quorum in blkverify mode")
        if below.driver.length != self.length:
            # QEMU takes it, and aborts when a write goes past the end of a shorter one
            raise GraphError(
                f"The node {below.name} has {below.driver.length} bytes, "
                f"and the children of the node {self.node.name} have {self.length}"
            )
        return f"children.{self._next_index}", Role.DATA

    def check_removal(self, child: Child) -> None:
        if len(self._members) <= self._threshold:
            raise GraphError(f"The number of children cannot be lower than the vote threshold {self._threshold}")

    def child_added(self, child: Child) -> None:
        self._members.append(child)
        self._next_index += 1
        self._take_limits()

    def child_removed(self, child: Child) -> None:
        self._members.remove(child)
        if child.name == f"children.{self._next_index - 1}":
            self._next_index -= 1
        self._take_limits()


def _sectors(offset: int, size: int) -> dict[str, str | int]:
    first = offset // _SECTOR
    return {"sector-num": first, "sectors-count": -(-(offset + size) // _SECTOR) - first}


class _Answers:
    """What children answered to a read: the first in *bufs*, which are the reader's, the others in *copies*.

    If the first failed, *bufs* get what the next one that did not has said.
    """

    __slots__ = ("_copies", "_in_bufs", "bufs", "differ", "errnos", "good")

    def __init__(self, bufs: Buffers, copies: Sequence[bytearray], errnos: Sequence[int]) -> None:
        self.bufs, self._copies, self.errnos = bufs, copies, errnos
        self.good = [index for index, code in enumerate(errnos) if not code]
        self._in_bufs = 0
        if self.good and self.good[0]:
            self.take(self.good[0])
        #: whether those that answered do not all have the same content
        self.differ = any(self._differs(index) is not None for index in self.good[1:])

    def take(self, child: int) -> None:
        """Have *bufs* contain what *child* answered."""
        if child != self._in_bufs:
            copy_into(self.bufs, memoryview(self._copies[child - 1]))
            self._in_bufs = child

    def digest(self, child: int) -> bytes:
        """What identifies the content of *child*."""
        digest = hashlib.sha256()
        for buf in self.bufs if child == self._in_bufs else (self._copies[child - 1],):
            digest.update(buf)
        return digest.digest()

    def _differs(self, child: int) -> tuple[int, memoryview] | None:
        """The first of *bufs* that *child* has otherwise, and where it begins; None if there is none."""
        copy, at = self._copies[child - 1], 0
        for buf in self.bufs:
            # a bytearray is compared by memcmp, two memoryviews item by item
            if not copy.startswith(buf, at):
                return at, buf
            at += len(buf)
        return None

    def first_difference(self) -> tuple[int, memoryview, memoryview]:
        """Of the first two children, which differ: parts of the same place, one of which differs, and where that is."""
        found = self._differs(1)
        assert found is not None
        at, buf = found
        return at, buf, memoryview(self._copies[0])[at : at + len(buf)]
