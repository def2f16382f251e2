"""Arithmetic on refcount blocks: arrays of big-endian numbers of 1 to 64 bits.

Widths below a byte fill each byte from its least significant bit on.
Specification: QEMU docs/interop/qcow2.txt, "Refcount block entry".
"""

from __future__ import annotations

import re


class RefcountWidth:
    """Access to the entries of refcount blocks of order *order*: 2**order bits each."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.bits = 1 << order
        self.maximum = (1 << self.bits) - 1
        self._bytes = self.bits // 8
        self._zero = bytes(self._bytes)
        self._one = (1).to_bytes(self._bytes, "big") if self._bytes else b""
        if not self._bytes:
            # Which bytes have an entry of zero.
            holes = bytes(b for b in range(256) if any(not b >> s & self.maximum for s in range(0, 8, self.bits)))
            self._hole = re.compile(b"[" + re.escape(holes) + b"]", re.DOTALL)

    def get(self, data: bytearray, index: int) -> int:
        """Entry *index*."""
        if self._bytes:
            at = index * self._bytes
            return int.from_bytes(data[at : at + self._bytes], "big")
        bit = index << self.order
        return data[bit >> 3] >> (bit & 7) & self.maximum

    def set(self, data: bytearray, index: int, value: int) -> None:
        """Make entry *index* *value*, which is at most ``maximum``."""
        if self._bytes:
            at = index * self._bytes
            data[at : at + self._bytes] = value.to_bytes(self._bytes, "big")
        else:
            bit = index << self.order
            shift = bit & 7
            data[bit >> 3] = data[bit >> 3] & ~(self.maximum << shift) | value << shift

    def set_ones(self, data: bytearray, start: int, end: int) -> None:
        """Make the entries from *start* up to *end* one."""
        if self._bytes:
            data[start * self._bytes : end * self._bytes] = self._one * (end - start)
        else:
            for index in range(start, end):
                self.set(data, index, 1)

    def are_ones(self, data: bytearray, start: int, end: int) -> bool:
        """Whether all entries from *start* up to *end* are one."""
        if self._bytes:
            return data[start * self._bytes : end * self._bytes] == self._one * (end - start)
        return all(self.get(data, index) == 1 for index in range(start, end))

    def last(self, data: bytearray) -> int:
        """The last entry that is not zero; -1 if there is none."""
        entry = (len(data.rstrip(b"\0")) * 8 - 1) >> self.order
        while entry >= 0 and not self.get(data, entry):
            entry -= 1
        return entry

    def find_zero(self, data: bytearray, start: int) -> int:
        """The first entry from *start* on that is zero; -1 if there is none."""
        width = self._bytes
        if width:
            at = start * width
            while (at := data.find(self._zero, at)) >= 0 and at % width:
                at += 1
            return at // width if at >= 0 else -1
        per_byte = 8 >> self.order
        total = len(data) * per_byte
        while start < total and start % per_byte:
            if not self.get(data, start):
                return start
            start += 1
        found = self._hole.search(data, start // per_byte)
        if found is None:
            return -1
        first = found.start() * per_byte
        return next(index for index in range(first, first + per_byte) if not self.get(data, index))

    def count_zeroes(self, data: bytearray, start: int, end: int) -> int:
        """How many entries in a row are zero from *start* on, not looking at *end* and beyond."""
        width = self._bytes
        if width:
            rest = data[start * width : end * width]
            return (len(rest) - len(rest.lstrip(b"\0"))) // width
        count = 0
        while start + count < end and not self.get(data, start + count):
            count += 1
        return count
