"""What all parts of the qcow2 driver share: geometry, the lock on metadata, the metadata map, corruption.

Metadata is changed only by the holder of ``Image.lock``.  A request on clusters that are allocated already takes no
lock; it counts itself in the current ``Epoch`` instead, so that a cluster that it may still be using is not given
to somebody else (``fusebd.drivers.qcow2.refcounts``).

Overlap checks and corruption: QEMU qcow2_pre_write_overlap_check, qcow2_signal_corruption.
"""

from __future__ import annotations

import errno
import logging
from bisect import bisect_right
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import trio

from fusebd.block.child import Child
from fusebd.block.mutex import Mutex
from fusebd.block.node import Node
from fusebd.drivers.qcow2.data import SHIFT, DataFile
from fusebd.drivers.qcow2.encryption import Encryption
from fusebd.drivers.qcow2.header import Header
from fusebd.drivers.qcow2.options import OVERLAP_NAMES
from fusebd.errors import BlockIOError
from fusebd.ondisk import qcow2 as ondisk

log = logging.getLogger(__name__)


def hexadecimal(number: int) -> str:
    """*number* as messages show it: 0 has no prefix."""
    return f"{number:#x}" if number else "0"


class Epoch:
    """A span of time; ``count`` requests that began in it are still using host clusters."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class MetadataMap:
    """Which host clusters hold metadata that a write is checked against; kinds are ``OL_`` bits."""

    def __init__(self, enabled: int, cluster_bits: int) -> None:
        self.enabled = enabled
        self._cluster_bits = cluster_bits
        self.clusters: dict[int, int] = {}
        self._starts: list[int] = []  # of areas in the order of their offsets, not overlapping
        self._ends: list[int] = []
        self._area_kind = 0

    def add(self, kind: int, offset: int, length: int) -> None:
        """The bytes from *offset* on are metadata of *kind*."""
        if kind & self.enabled and length:
            bits = self._cluster_bits
            for cluster in range(offset >> bits, ((offset + length - 1) >> bits) + 1):
                self.clusters[cluster] = self.clusters.get(cluster, 0) | kind

    def remove(self, kind: int, offset: int, length: int) -> None:
        """The bytes from *offset* on are no longer metadata of *kind*."""
        if kind & self.enabled and length:
            bits = self._cluster_bits
            for cluster in range(offset >> bits, ((offset + length - 1) >> bits) + 1):
                left = self.clusters.pop(cluster, 0) & ~kind
                if left:
                    self.clusters[cluster] = left

    def forget(self, kinds: int) -> None:
        """Nothing is metadata of any of *kinds*."""
        if kinds & self._area_kind:
            self._starts, self._ends = [], []
        for cluster in [cluster for cluster, kind in self.clusters.items() if kind & kinds]:
            self.remove(kinds & self.enabled, cluster << self._cluster_bits, 1)

    def set_areas(self, kind: int, areas: list[tuple[int, int]]) -> None:
        """Keep (offset, length) *areas* of *kind*, which may be many and large, until it is forgotten."""
        if not kind & self.enabled:
            return
        self._area_kind = kind
        for offset, length in sorted(areas):
            if self._ends and offset <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], offset + length)
            else:
                self._starts.append(offset)
                self._ends.append(offset + length)

    @property
    def simple(self) -> bool:
        """Whether looking into ``clusters`` is all that a check takes."""
        return not self._starts

    def overlap(self, offset: int, length: int, ignore: int = 0) -> int:
        """The lowest bit of the kinds of metadata that the bytes from *offset* on overlap; 0 if there is none."""
        bits = self._cluster_bits
        first, last = offset >> bits, (offset + length - 1) >> bits
        found = 0
        for cluster in range(first, last + 1):
            found |= self.clusters.get(cluster, 0)
        if self._starts:
            at = bisect_right(self._starts, ((last + 1) << bits) - 1) - 1
            if at >= 0 and self._ends[at] > first << bits:
                found |= self._area_kind
        found &= ~ignore
        return found & -found


class Image:
    """One open image: its header, what is below it, and the state of its health."""

    def __init__(
        self,
        node: Node,
        file: Child,
        header: Header,
        overlap_mask: int,
        data_file: Child | None,
        encryption: Encryption | None,
    ) -> None:
        self.node = node
        self.file = file
        self.header = header
        #: where guest data is read and written, by the offsets that L2 entries have in memory
        self.data: Child | DataFile = file
        #: by how much these are larger than those in the file that has the data
        self.data_shift = 0
        if data_file is not None:
            self.data_shift = SHIFT << header.cluster_bits
            self.data = DataFile(data_file, self.data_shift)
        self.data_file = data_file
        self.encryption = encryption
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.cluster_mask = header.cluster_size - 1
        #: what is mapped by itself: a subcluster, or else a cluster
        self.granule_size = header.cluster_size // (ondisk.SUBCLUSTERS if header.extended_l2 else 1)
        self.granule_bits = self.granule_size.bit_length() - 1
        self.granule_mask = self.granule_size - 1
        self.lock = Mutex()
        self.epoch = Epoch()
        self.metadata = MetadataMap(overlap_mask, header.cluster_bits)
        self.usable = True
        self._signaled = False
        #: called when the image becomes unusable
        self.on_unusable: list[Any] = []

    # -- errors ---------------------------------------------------------------------------------

    def error(self, operation: str, *, code: int = errno.EIO, offset: int = -1, reason: str = "") -> BlockIOError:
        """An error of this node, to be raised."""
        return BlockIOError(code, node_name=self.node.name, operation=operation, offset=offset, reason=reason)

    def check_usable(self) -> None:
        """Raise ENOMEDIUM if a fatal corruption was found."""
        if not self.usable:
            raise self.error("request", code=errno.ENOMEDIUM)

    async def corrupt(self, message: str, offset: int = -1, size: int = -1, *, fatal: bool = True) -> BlockIOError:
        """Report the corruption *message*; if it is *fatal* and the image writable, nobody may use it any more.

        *offset* and *size* (bytes of the file) are part of the event unless they are negative.
        Returns the error to raise.  Suspends while the image is marked.
        """
        fatal = fatal and not self.node.read_only
        header = self.header
        error = self.error("request", reason=message)
        if not self._signal(message, offset, size, fatal=fatal):
            return error
        if fatal:
            self.give_up()
            try:
                await self.set_incompatible(header.incompatible_features | ondisk.INCOMPAT_CORRUPT)
            except BlockIOError as failure:
                log.error("%s: could not mark the image as corrupt: %s", self.node.name, failure)
        return error

    def give_up(self) -> None:
        """Nobody may use the image any more: what is known of it may not be so."""
        self.usable = False
        for callback in self.on_unusable:
            callback()

    def note_corruption(self, message: str) -> None:
        """Report the corruption *message*, which hurts nobody further."""
        self._signal(message, -1, -1, fatal=False)

    def _signal(self, message: str, offset: int, size: int, *, fatal: bool) -> bool:
        """Log and emit it, unless that was done before; whether it was now."""
        if self._signaled and (not fatal or self.header.incompatible_features & ondisk.INCOMPAT_CORRUPT):
            return False
        self._signaled = True
        if fatal:
            log.error("qcow2: Marking image as corrupt: %s; further corruption events will be suppressed", message)
        else:
            log.error("qcow2: Image is corrupt: %s; further non-fatal corruption events will be suppressed", message)
        data: dict[str, Any] = {"device": "", "node-name": self.node.name, "msg": message, "fatal": fatal}
        if offset >= 0:
            data["offset"] = offset
        if size >= 0:
            data["size"] = size
        self.node.emit("BLOCK_IMAGE_CORRUPTED", data)
        return True

    # -- writing metadata -----------------------------------------------------------------------

    async def announce(self, event: str) -> None:
        """Tell blkdebug, if it is below, that *event* is about to happen; raises what it injects."""
        if event in self.file.events:
            await self.file.announce(event)

    async def check_overlap(self, offset: int, length: int, ignore: int = 0) -> None:
        """Raise if a write of *length* bytes at the host *offset* would hit metadata other than of kind *ignore*."""
        kind = self.metadata.overlap(offset, length, ignore)
        if kind:
            name = OVERLAP_NAMES[kind.bit_length() - 1][1]
            raise await self.corrupt(f"Preventing invalid write on metadata (overlaps with {name})", offset, length)

    async def check_data_overlap(self, offset: int, length: int) -> None:
        """The same for guest data, which has no metadata beside it in a data file."""
        if self.data_file is None:
            await self.check_overlap(offset, length)

    @property
    def data_end(self) -> int:
        """The end of what is written of guest data, as an offset of L2 entries."""
        return self.data.node.driver.length + self.data_shift

    @property
    def is_raw(self) -> bool:
        """Whether the data file has to read as the disk does by itself; an encrypted one cannot."""
        return self.has_raw_flag and self.encryption is None

    @property
    def has_raw_flag(self) -> bool:
        """Whether the header says that it has to."""
        return self.data_file is not None and bool(self.header.autoclear_features & ondisk.AUTOCLEAR_DATA_FILE_RAW)

    async def write(self, offset: int, data: bytes | bytearray) -> None:
        """Write *data* to the file at byte *offset*."""
        await self.file.pwritev(offset, (memoryview(data),))

    async def switch(
        self, offset: int, new: bytes, old: bytes, undo: Callable[[], Awaitable[None]], *, durable: bool = True
    ) -> None:
        """Write *new* over *old* at byte *offset* of the file: a reference to what was allocated for it.

        After a failure *new* may be there or not.  Only if *old* could be put back, durably, *undo* is called, which
        gives up what *new* refers to.  *durable*: flush the file also if all goes well.
        """
        try:
            await self.write(offset, new)
            if durable:
                await self.file.flush()
        except BaseException:
            with trio.CancelScope(shield=True), suppress(BlockIOError):
                await self.write(offset, old)
                await self.file.flush()
                await undo()
            raise

    async def read(self, offset: int, length: int) -> bytearray:
        """*length* bytes of the file from byte *offset* on; zeroes past its end."""
        data = bytearray(length)
        await self.file.preadv(offset, (memoryview(data),))
        return data

    async def set_incompatible(self, features: int) -> None:
        """Store the incompatible feature bits *features* in the header, durably; version 2 has none to store."""
        if self.header.version >= 3:
            await self.write(ondisk.INCOMPATIBLE_OFFSET, features.to_bytes(8, "big"))
            await self.file.flush()
        self.header.incompatible_features = features
