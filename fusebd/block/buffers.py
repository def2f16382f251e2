"""Memory for requests: page-aligned, and used again."""

from __future__ import annotations

import mmap


class BufferPool:
    """Page-aligned buffers for the data of requests, used again and again.

    A fresh megabyte costs more in page faults than the read that fills it, and a file opened with O_DIRECT
    wants aligned memory.  Not more than *keep* bytes stay allocated while unused.
    """

    def __init__(self, keep: int = 16 << 20) -> None:
        self._free: dict[int, list[memoryview]] = {}
        self._left = keep

    def take(self, size: int) -> memoryview:
        """A buffer of at least *size* bytes, with whatever is in it; hand it to ``give_back`` whole."""
        bits = (max(size, mmap.PAGESIZE) - 1).bit_length()
        free = self._free.get(bits)
        if free:
            self._left += 1 << bits
            return free.pop()
        return memoryview(mmap.mmap(-1, 1 << bits))

    def give_back(self, buf: memoryview) -> None:
        """*buf*, from ``take``, is not in use any more."""
        size = len(buf)
        if size <= self._left:
            self._left -= size
            self._free.setdefault((size - 1).bit_length(), []).append(buf)
