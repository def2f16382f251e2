"""Arrays of bits that may be very long: what is all zeroes or all ones takes next to no memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

#: bytes of bits that are kept together
CHUNK = 4096
_CHUNK_BITS = CHUNK * 8
_ZEROES = bytes(CHUNK)
_ONES = b"\xff" * CHUNK
#: QEMU hashes and stores whole words of this many bits
_WORD = 64


class BitArray:
    """*size* bits, zero at first; bit n is bit n % 8 of byte n // 8."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._chunks: dict[int, bytearray | bytes] = {}  # those that are not all zeroes; bytes: all ones, shared

    @property
    def nb_bytes(self) -> int:
        """How many bytes the bits take where they are stored: whole words of 64 bits."""
        return -(-self.size // _WORD) * 8

    def copy(self) -> BitArray:
        other = BitArray(self.size)
        other.take(self)
        return other

    def take(self, other: BitArray) -> None:
        """Have the bits of *other*, which is as long."""
        self._chunks = {
            index: chunk if isinstance(chunk, bytes) else bytearray(chunk) for index, chunk in other._chunks.items()
        }

    def clear(self) -> None:
        """Make all bits zero."""
        self._chunks.clear()

    def count(self) -> int:
        """How many bits are one."""
        return (
            sum(
                _CHUNK_BITS if isinstance(chunk, bytes) else int.from_bytes(chunk, "little").bit_count()
                for chunk in self._chunks.values()
            )
            - self._ones_past_end()
        )

    def _ones_past_end(self) -> int:
        """Only a shared chunk can have ones past the end."""
        index, rest = divmod(self.size, _CHUNK_BITS)
        return _CHUNK_BITS - rest if rest and isinstance(self._chunks.get(index), bytes) else 0

    def set(self, first: int, end: int) -> None:
        """Make the bits from *first* up to *end* one."""
        end = min(end, self.size)
        while first < end:
            index, at = divmod(first, _CHUNK_BITS)
            stop = min(_CHUNK_BITS, at + end - first)
            first += stop - at
            if stop - at == _CHUNK_BITS:
                self._chunks[index] = _ONES
                continue
            chunk = self._chunks.get(index)
            if chunk is None:
                chunk = self._chunks[index] = bytearray(CHUNK)
            elif isinstance(chunk, bytes):
                continue
            if stop - at == 1:
                chunk[at >> 3] |= 1 << (at & 7)
                continue
            byte, last = at >> 3, (stop - 1) >> 3
            head, tail = 0xFF << (at & 7) & 0xFF, 0xFF >> (7 - ((stop - 1) & 7))
            if byte == last:
                chunk[byte] |= head & tail
            else:
                chunk[byte] |= head
                chunk[last] |= tail
                chunk[byte + 1 : last] = _ONES[: last - byte - 1]

    def resize(self, size: int) -> None:
        """Have *size* bits from now on; new ones are zero."""
        for index in [index for index in self._chunks if index * _CHUNK_BITS >= min(size, self.size)]:
            del self._chunks[index]
        edge = min(size, self.size)
        index, rest = divmod(edge, _CHUNK_BITS)
        chunk = self._chunks.get(index)
        if chunk is not None and rest:
            kept = bytearray(chunk)
            byte, bit = rest >> 3, rest & 7
            kept[byte] &= (1 << bit) - 1
            kept[byte + 1 :] = bytes(CHUNK - byte - 1)
            self._chunks[index] = kept
        self.size = size

    def merge(self, other: BitArray) -> None:
        """Make those bits one that are so in *other*, which is as long."""
        for index, chunk in other._chunks.items():
            mine = self._chunks.get(index)
            if mine is None or isinstance(chunk, bytes):
                self._chunks[index] = chunk if isinstance(chunk, bytes) else bytearray(chunk)
            elif not isinstance(mine, bytes):
                joined = int.from_bytes(mine, "little") | int.from_bytes(chunk, "little")
                self._chunks[index] = bytearray(joined.to_bytes(CHUNK, "little"))

    def runs(self) -> Iterator[tuple[int, int]]:
        """The ones: (first, end) of each run; runs end where chunks do."""
        for index in sorted(self._chunks):
            chunk, base = self._chunks[index], index * _CHUNK_BITS
            if isinstance(chunk, bytes):
                yield base, min(base + _CHUNK_BITS, self.size)
                continue
            value, at = int.from_bytes(chunk, "little"), 0
            while value:
                skip = (value & -value).bit_length() - 1
                value >>= skip
                ones = (~value & (value + 1)).bit_length() - 1
                yield base + at + skip, base + at + skip + ones
                value >>= ones
                at += skip + ones

    # -- as bytes -------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """*length* bytes from byte *offset* on; zeroes past the end.  They lie in one chunk, or are whole chunks."""
        found = [
            self._chunks.get(index, _ZEROES) for index in range(offset // CHUNK, (offset + length + CHUNK - 1) // CHUNK)
        ]
        data = b"".join(found)[offset % CHUNK : offset % CHUNK + length]
        past = offset * 8 + length * 8 - self.size
        if past > 0:
            bits = max(length * 8 - past, 0)
            keep = data[: bits // 8]
            if bits % 8:
                keep += bytes((data[bits // 8] & (1 << bits % 8) - 1,))
            data = keep.ljust(length, b"\0")
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Take over *data* from byte *offset* on, where all was zero; what is past the end is ignored."""
        data = data[: max((self.size + 7) // 8 - offset, 0)]
        done = 0
        while done < len(data):
            index, at = divmod(offset + done, CHUNK)
            part = data[done : done + CHUNK - at]
            done += len(part)
            if part.count(0) == len(part):
                continue
            chunk = self._chunks.get(index)
            if part == _ONES:
                self._chunks[index] = _ONES
                continue
            if chunk is None or isinstance(chunk, bytes):
                chunk = self._chunks[index] = bytearray(CHUNK)
            chunk[at : at + len(part)] = part
        rest = self.size % 8
        index, at = divmod(self.size // 8, CHUNK)
        last = self._chunks.get(index)
        if rest and isinstance(last, bytearray):
            last[at] &= (1 << rest) - 1

    @property
    def memory(self) -> int:
        """About how many bytes of memory the bits take."""
        return sum(64 if isinstance(chunk, bytes) else CHUNK for chunk in self._chunks.values())

    def sha256(self) -> str:
        """The hash of all bits, in hexadecimal; of a word at least."""
        found = hashlib.sha256()
        total = max(self.nb_bytes, 8)
        for offset in range(0, total, CHUNK):
            found.update(self.read(offset, min(CHUNK, total - offset)))
        return found.hexdigest()
