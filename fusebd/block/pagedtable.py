"""A table of numbers in an image file, of which only a few pages are kept in memory."""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from typing import Literal

from fusebd.block.child import Child

#: bytes that are read at once, and how many such pages are kept
PAGE_BYTES = 1 << 16
MAX_PAGES = 64


class PagedTable:
    """*count* unsigned numbers of *width* bytes (4 or 8), at byte *offset* of *file*.

    What is past the end of the file is 0.
    """

    def __init__(
        self, file: Child, offset: int, count: int, *, width: Literal[4, 8], order: Literal["little", "big"]
    ) -> None:
        self._file, self._offset, self.count, self._width = file, offset, count, width
        self._swap = order != sys.byteorder
        self._per_page = PAGE_BYTES // width
        self._pages: OrderedDict[int, array[int]] = OrderedDict()

    async def get(self, index: int) -> int:
        """Number *index*, which is below ``count``.  Suspends where *file* does.  Raises BlockIOError."""
        number, at = divmod(index, self._per_page)
        return (await self.page(number))[at]

    @property
    def pages(self) -> range:
        """The numbers of all pages."""
        return range(-(-self.count // self._per_page))

    async def page(self, number: int) -> array[int]:
        """Page *number* of the table."""
        found = self._pages.get(number)
        if found is None:
            first = number * self._per_page
            data = bytearray(min(self._per_page, self.count - first) * self._width)
            await self._file.preadv(self._offset + first * self._width, (memoryview(data),))
            found = array("Q" if self._width == 8 else "I", bytes(data))
            if self._swap:
                found.byteswap()
            self._pages[number] = found
            if len(self._pages) > MAX_PAGES:
                self._pages.popitem(last=False)
        else:
            self._pages.move_to_end(number)
        return found
