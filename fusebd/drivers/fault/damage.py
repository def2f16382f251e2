"""What is wrong with the medium: bits that read inverted, sectors that cannot be read.

An overlay: the data below is intact, and shows again when the damage is healed.  Places are those of the node below.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fusebd.block.child import Buffers
from fusebd.block.options import Json
from fusebd.drivers.fault.options import SECTOR_SIZE


@dataclass(frozen=True, slots=True)
class BadSector:
    """Which rule made it so, and what reading it fails with."""

    rule: str
    errno: int


class Damage:
    """Bits are numbered from the first byte's lowest one on; sectors have 512 bytes.  False if there is none."""

    def __init__(self) -> None:
        self._flips: dict[int, str] = {}  # bit -> rule
        self._bits: list[int] = []  # the same bits in order
        self._bad: dict[int, BadSector] = {}
        self._sectors: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._bits or self._sectors)

    # -- doing it -------------------------------------------------------------------------------

    def flip(self, bits: Iterable[int], rule: str) -> None:
        """*bits* read inverted from now on; those that do already go on to."""
        new = {bit: rule for bit in bits if bit not in self._flips}
        self._flips |= new
        self._bits += new
        self._bits.sort()  # quick: most of them are in order

    def is_flipped(self, bit: int) -> bool:
        return bit in self._flips

    def spoil(self, sectors: Iterable[int], rule: str, errno: int) -> None:
        """Reading *sectors* fails with *errno* from now on; those that are bad already stay as they are."""
        new = {sector: BadSector(rule, errno) for sector in sectors if sector not in self._bad}
        self._bad |= new
        self._sectors += new
        self._sectors.sort()

    # -- feeling it -----------------------------------------------------------------------------

    @property
    def has_flips(self) -> bool:
        return bool(self._bits)

    def first_bad(self, start: int, end: int) -> tuple[int, BadSector] | None:
        """The number of the first bad sector among the bytes from *start* up to *end*, and what is known of it."""
        index = bisect_left(self._sectors, start // SECTOR_SIZE)
        if index == len(self._sectors) or self._sectors[index] * SECTOR_SIZE >= end:
            return None
        return self._sectors[index], self._bad[self._sectors[index]]

    def invert(self, offset: int, bufs: Buffers) -> None:
        """Invert in *bufs*, which were read from byte *offset* on, the bits that are flipped there."""
        for buf in bufs:
            end = offset + len(buf)
            for bit in self._among(self._bits, offset * 8, end * 8):
                buf[(bit >> 3) - offset] ^= 1 << (bit & 7)
            offset = end

    def uniform_prefix(self, offset: int, length: int) -> tuple[int, bool]:
        """How many of *length* bytes from *offset* on are in sectors that are alike, and whether these have flips."""
        start, end = offset // SECTOR_SIZE, -(-(offset + length) // SECTOR_SIZE)
        flipped = sorted({bit // 8 // SECTOR_SIZE for bit in self._among(self._bits, start << 12, end << 12)})
        if not flipped:
            return length, False
        if flipped[0] > start:
            return flipped[0] * SECTOR_SIZE - offset, False
        run = next((n for n, sector in enumerate(flipped) if sector != start + n), len(flipped))
        return min((start + run) * SECTOR_SIZE - offset, length), True

    @staticmethod
    def _among(ordered: list[int], start: int, end: int) -> list[int]:
        return ordered[bisect_left(ordered, start) : bisect_left(ordered, end)]

    # -- undoing it -----------------------------------------------------------------------------

    def overwritten(self, start: int, end: int) -> bool:
        """The bytes from *start* up to *end* were written: their bits are right, and sectors that are among them good.

        True if that has changed anything.
        """
        bits = self._among(self._bits, start * 8, end * 8)
        sectors = self._among(self._sectors, -(-start // SECTOR_SIZE), end // SECTOR_SIZE)
        return self._forget(bits, sectors)

    def heal(self, start: int, end: int, rule: str | None) -> tuple[int, int]:
        """As if nothing had been done to the bytes from *start* up to *end*, or not by *rule*.

        How many bits and sectors that were; a sector counts if any of it is among those bytes.
        """
        if start >= end:
            return 0, 0
        bits = self._among(self._bits, start * 8, end * 8)
        sectors = self._among(self._sectors, start // SECTOR_SIZE, -(-end // SECTOR_SIZE))
        if rule is not None:
            bits = [bit for bit in bits if self._flips[bit] == rule]
            sectors = [sector for sector in sectors if self._bad[sector].rule == rule]
        self._forget(bits, sectors)
        return len(bits), len(sectors)

    def cut(self, length: int) -> bool:
        """There are *length* bytes from now on.  True if that has changed anything."""
        bits = self._bits[bisect_left(self._bits, length * 8) :]
        return self._forget(bits, self._sectors[bisect_left(self._sectors, -(-length // SECTOR_SIZE)) :])

    def _forget(self, bits: list[int], sectors: list[int]) -> bool:
        if bits:
            for bit in bits:
                del self._flips[bit]
            self._bits = [bit for bit in self._bits if bit in self._flips]
        if sectors:
            for sector in sectors:
                del self._bad[sector]
            self._sectors = [sector for sector in self._sectors if sector in self._bad]
        return bool(bits or sectors)

    # -- showing it -----------------------------------------------------------------------------

    def flipped_bits(self) -> list[dict[str, Json]]:
        """Each one: the byte it is in, which of its bits (0 is the lowest), the rule."""
        return [{"offset": bit >> 3, "bit": bit & 7, "rule": self._flips[bit]} for bit in self._bits]

    def bad_sectors(self) -> list[dict[str, Json]]:
        """Runs of bad sectors that have one rule, as ranges of bytes."""
        return [
            {"offset": first * SECTOR_SIZE, "length": count * SECTOR_SIZE, "rule": rule, "errno": errno}
            for first, count, rule, errno in self._runs()
        ]

    def _runs(self) -> Iterator[tuple[int, int, str, int]]:
        first, count = 0, 0
        known: BadSector | None = None
        for sector in self._sectors:
            if known is not None and sector == first + count and self._bad[sector] == known:
                count += 1
                continue
            if known is not None:
                yield first, count, known.rule, known.errno
            first, count, known = sector, 1, self._bad[sector]
        if known is not None:
            yield first, count, known.rule, known.errno
