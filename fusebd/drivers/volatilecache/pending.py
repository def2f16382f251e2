"""Writes that have been acknowledged and are not on the medium yet: in their order, and by sector for who reads.

No I/O here.  Offsets and lengths are bytes, whole sectors always.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

WRITE, ZERO, DISCARD = "write", "write-zeroes", "discard"

#: runs of sectors: (offset, length)
Runs = list[tuple[int, int]]


@dataclass(slots=True)
class Pending:
    """One request in the cache.  ``lost`` are sectors that something newer has put on the medium already."""

    sequence: int
    kind: str
    offset: int
    length: int
    data: bytes = b""
    flags: int = 0
    lost: set[int] = field(default_factory=set)

    def part(self, offset: int, length: int) -> memoryview:
        """The data of *length* bytes at byte *offset* of the node."""
        return memoryview(self.data)[offset - self.offset : offset - self.offset + length]


class WriteLog:
    """The pending requests of one node; *sector* is the unit in which they can be torn, in bytes."""

    def __init__(self, sector: int) -> None:
        self.sector = sector
        self.pending: dict[int, Pending] = {}
        self.size = 0  #: bytes of data in memory
        self.last_sequence = 0
        self._newest: dict[int, Pending] = {}

    def __len__(self) -> int:
        return len(self.pending)

    def add(self, kind: str, offset: int, length: int, data: bytes = b"", flags: int = 0) -> Pending:
        """A request is acknowledged."""
        self.last_sequence += 1
        entry = Pending(self.last_sequence, kind, offset, length, data, flags)
        self.pending[entry.sequence] = entry
        self.size += len(data)
        # what a discard leaves is read from where it was: nobody may rely on it
        if kind != DISCARD:
            for number in self.sectors(offset, length):
                self._newest[number] = entry
        return entry

    def sectors(self, offset: int, length: int) -> range:
        """The numbers of the sectors in the range."""
        return range(offset // self.sector, (offset + length) // self.sector)

    def overlay(self, offset: int, length: int) -> list[tuple[int, int, Pending]]:
        """What of the range is in the cache: (offset, length, request) pieces, in the order of their offsets."""
        newest = self._newest
        if not newest:
            return []
        pieces: list[tuple[int, int, Pending]] = []
        for number in self.sectors(offset, length):
            entry = newest.get(number)
            if entry is None:
                continue
            at = number * self.sector
            if pieces and pieces[-1][2] is entry and pieces[-1][0] + pieces[-1][1] == at:
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + self.sector, entry)
            else:
                pieces.append((at, self.sector, entry))
        return pieces

    def oldest(self) -> Pending | None:
        """The request that comes next to the medium."""
        return next(iter(self.pending.values()), None)

    def done(self, entry: Pending) -> None:
        """*entry* is on the medium, or has been dropped."""
        del self.pending[entry.sequence]
        self.size -= len(entry.data)
        for number in self.sectors(entry.offset, entry.length):
            if self._newest.get(number) is entry:
                del self._newest[number]

    def overtaken(self, offset: int, length: int) -> None:
        """Something newer than all that is pending goes to the medium there at once."""
        for entry in self.pending.values():
            start, end = max(entry.offset, offset), min(entry.offset + entry.length, offset + length)
            if start < end:
                entry.lost.update(self.sectors(start, end - start))
        for number in self.sectors(offset, length):
            self._newest.pop(number, None)

    def runs(self, entry: Pending, kept: frozenset[int] | None = None) -> Runs:
        """What of *entry* is still to go to the medium; with *kept*, only those sectors of it."""
        found: Runs = []
        for number in self.sectors(entry.offset, entry.length):
            if number in entry.lost or (kept is not None and number not in kept):
                continue
            at = number * self.sector
            if found and found[-1][0] + found[-1][1] == at:
                found[-1] = (found[-1][0], found[-1][1] + self.sector)
            else:
                found.append((at, self.sector))
        return found


@dataclass(frozen=True, slots=True)
class Decision:
    """What a power cut does with one pending request: ``kept`` sectors reach the medium."""

    entry: Pending
    outcome: str  #: kept, dropped, torn
    kept: frozenset[int]


def decide(log: WriteLog, rng: random.Random, *, keep: float, torn: float) -> Iterator[Decision]:
    """For each pending request, in its order, whether it survives.

    That is so with the probability *keep*; a write that does is torn with the probability *torn*: each of its sectors
    reaches the medium or not.
    """
    for entry in list(log.pending.values()):
        sectors = [number for number in log.sectors(entry.offset, entry.length) if number not in entry.lost]
        if rng.random() >= keep:
            yield Decision(entry, "dropped", frozenset())
        elif entry.kind == WRITE and len(sectors) > 1 and rng.random() < torn:
            kept = frozenset(number for number in sectors if rng.random() < 0.5)
            outcome = "kept" if len(kept) == len(sectors) else "torn" if kept else "dropped"
            yield Decision(entry, outcome, kept)
        else:
            yield Decision(entry, "kept", frozenset(sectors))
