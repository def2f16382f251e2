"""Dirty bitmaps: what of a node has been written since some moment.

They belong to a node and hear of writes as those do who watch its content (``fusebd.block.contentwatch``): edges lead
writes another way while a bitmap records, and pay nothing otherwise.  Like there, a write that failed counts.

Meaning and messages: QEMU block/dirty-bitmap.c, util/hbitmap.c.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fusebd.block.bitarray import BitArray
from fusebd.block.options import Json
from fusebd.errors import CommandError

if TYPE_CHECKING:
    from fusebd.block.child import Child
    from fusebd.block.node import Node

_SECTOR = 512
#: the longest name, in bytes
_NAME_LENGTH = 1023


class DirtyBitmap:
    """One bit for each *granularity* bytes of *length*.

    ``enabled``: it records writes.  ``persistent``: the image keeps it.  ``read_only``: the image cannot be written, so
    that it stays as it is.  ``inconsistent``: what was in the image is of no use.  ``busy``: being removed.
    """

    def __init__(self, name: str, granularity: int, length: int) -> None:
        self.name = name
        self.granularity = granularity
        self.length = length
        self.bits = BitArray(-(-length // granularity))
        self._shift = granularity.bit_length() - 1
        self.enabled = True
        self.persistent = self.read_only = self.inconsistent = self.busy = False

    def mark(self, offset: int, length: int) -> None:
        """*length* bytes from byte *offset* on are dirty."""
        self.bits.set(offset >> self._shift, ((offset + length - 1) >> self._shift) + 1)

    def resize(self, length: int) -> None:
        """The node has *length* bytes now."""
        self.length = length
        self.bits.resize(-(-length // self.granularity))

    def merge(self, other: DirtyBitmap) -> None:
        """What is dirty in *other* is dirty here, too.  They are of nodes of one length."""
        if other.granularity == self.granularity:
            self.bits.merge(other.bits)
            return
        for first, end in other.bits.runs():
            self.mark(first * other.granularity, min(end * other.granularity, self.length) - first * other.granularity)

    def check(self, *, allow_read_only: bool = False, allow_inconsistent: bool = False) -> None:
        """Raise CommandError unless the bitmap can be used."""
        if self.busy:
            raise CommandError(f"Bitmap '{self.name}' is currently in use by another operation and cannot be used")
        if self.read_only and not allow_read_only:
            raise CommandError(f"Bitmap '{self.name}' is readonly and cannot be modified")
        if self.inconsistent and not allow_inconsistent:
            raise CommandError(f"Bitmap '{self.name}' is inconsistent and cannot be used")

    def info(self) -> dict[str, Json]:
        """QAPI BlockDirtyInfo."""
        info: dict[str, Json] = {
            "name": self.name,
            "recording": self.enabled,
            "persistent": self.persistent,
            "busy": self.busy,
            "granularity": self.granularity,
            "count": self.bits.count() * self.granularity,
        }
        if self.inconsistent:
            info["inconsistent"] = True
        return info


class DirtyBitmaps:
    """Those of *node*, the latest first.  No write is under way when they change, nor when one begins to record."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._bitmaps: list[DirtyBitmap] = []
        self._recording: list[DirtyBitmap] = []

    def __iter__(self) -> Iterator[DirtyBitmap]:
        return iter(self._bitmaps)

    def __len__(self) -> int:
        return len(self._bitmaps)

    def find(self, name: str) -> DirtyBitmap | None:
        """The bitmap *name*."""
        return next((bitmap for bitmap in self._bitmaps if bitmap.name == name), None)

    def check_name(self, name: str) -> None:
        """Raise CommandError if a new bitmap cannot be called *name*."""
        if self.find(name) is not None:
            raise CommandError(f"Bitmap already exists: {name}")
        if len(name.encode("utf-8", "surrogateescape")) > _NAME_LENGTH:
            raise CommandError(f"Bitmap name too long: {name}")

    def new(self, name: str, granularity: int) -> DirtyBitmap:
        """A new bitmap, not added yet."""
        return DirtyBitmap(name, granularity, self._length)

    def add(self, bitmap: DirtyBitmap) -> None:
        """Add *bitmap*."""
        self._bitmaps.insert(0, bitmap)
        self.refresh()

    def remove(self, bitmap: DirtyBitmap) -> None:
        """Remove *bitmap*."""
        self._bitmaps.remove(bitmap)
        self.refresh()

    @property
    def _length(self) -> int:
        return -(-self._node.driver.length // _SECTOR) * _SECTOR

    def refresh(self) -> None:
        """Which bitmaps there are, or are enabled, has changed: hear of writes, or do not."""
        was_recording = bool(self._recording)
        self._recording = [bitmap for bitmap in self._bitmaps if bitmap.enabled and not bitmap.inconsistent]
        if bool(self._recording) != was_recording:
            if was_recording:
                self._node.watches.remove(self)
            else:
                self._node.watches.append(self)
            self._node.refresh_edges()

    def concerns(self, edge: Child) -> bool:
        """Whether to hear of what comes by *edge*."""
        return True

    def changed(self, node: Node, offset: int, length: int) -> None:
        """*length* bytes at byte *offset* have changed; length 0: any."""
        for bitmap in self._recording:
            bitmap.mark(offset, length or bitmap.length)

    def resize(self) -> None:
        """The node has another length."""
        for bitmap in self._bitmaps:
            if not bitmap.inconsistent:
                bitmap.resize(self._length)


class BitmapStore(ABC):
    """Where an image keeps its node's persistent bitmaps while nobody uses it."""

    @abstractmethod
    def check_new(self, name: str, granularity: int) -> None:
        """Raise CommandError if a new bitmap *name* could not be kept."""

    @abstractmethod
    async def remove(self, name: str) -> None:
        """Do not keep the bitmap *name* any more, if it is kept.  Raises FusebdError; it may be kept still then."""
