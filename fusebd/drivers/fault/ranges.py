"""Which bytes a rule is about."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

from msgspec import UNSET

from fusebd.drivers.fault.options import SECTOR_SIZE, FaultRule

_END = 1 << 63


class Ranges:
    """A set of bytes, given by (start, end) ranges that may overlap and be in any order."""

    __slots__ = ("_ends", "_starts", "everything", "hull")

    def __init__(self, ranges: Iterable[tuple[int, int]], *, everything: bool = False) -> None:
        self.everything = everything
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted(ranges):
            if start >= end:
                continue
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(start)
                self._ends.append(end)
        #: (start, end) of all of it; a request without bytes is inside of everything
        self.hull = (-1, _END) if everything else (self._starts[0], self._ends[-1]) if self._ends else (0, 0)

    def touches(self, start: int, end: int) -> bool:
        """Whether any byte from *start* up to *end* is in it."""
        index = bisect_right(self._ends, start)
        return index < len(self._starts) and self._starts[index] < end

    def all(self) -> list[tuple[int, int]]:
        """All of it, as ranges that do not touch each other, in order."""
        return list(zip(self._starts, self._ends, strict=True))

    def clip(self, start: int, end: int) -> list[tuple[int, int]]:
        """What of it there is from byte *start* up to *end*, as ranges in order."""
        first, last = bisect_right(self._ends, start), bisect_left(self._starts, end)
        return [(max(self._starts[n], start), min(self._ends[n], end)) for n in range(first, last)]


def ranges_of(rule: FaultRule) -> Ranges:
    """The bytes that requests must touch for *rule*, which is valid; all of them if it does not say."""
    if rule.ranges is not UNSET:
        return Ranges((each.start, each.start + each.length) for each in rule.ranges)
    if rule.sector is not UNSET:
        count = 1 if rule.sectors is UNSET else rule.sectors
        return Ranges([(rule.sector * SECTOR_SIZE, (rule.sector + count) * SECTOR_SIZE)])
    if rule.offset is UNSET and rule.length is UNSET:
        return Ranges([(0, _END)], everything=True)
    start = 0 if rule.offset is UNSET else rule.offset
    return Ranges([(start, _END if rule.length is UNSET else start + rule.length)])
