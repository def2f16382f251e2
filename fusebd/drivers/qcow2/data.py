"""Where guest data lies: in the image file itself, or in an external data file.

In a data file, each cluster has the offset that it has for the guest.  Entries of L2 tables say so, and offset 0 is
one like any other there, which is told from "nothing" by the COPIED flag.  In memory these entries have offsets that
are larger by ``SHIFT`` clusters, so that 0 means nothing for everybody; here that is undone.

Specification: QEMU docs/interop/qcow2.txt, "External data file".
"""

from __future__ import annotations

from array import array
from collections.abc import Awaitable

from fusebd.block.child import Buffers, Child
from fusebd.block.node import Node
from fusebd.block.queueing import Batch, Done
from fusebd.ondisk import qcow2 as ondisk

#: clusters
SHIFT = 1


class DataFile:
    """The external data file behind *child*, addressed as entries in memory have it; *shift* is in bytes."""

    __slots__ = ("child", "shift")

    def __init__(self, child: Child, shift: int) -> None:
        self.child, self.shift = child, shift

    @property
    def events(self) -> frozenset[str]:
        return self.child.events

    def announce(self, event: str) -> Awaitable[None]:
        return self.child.announce(event)

    def announced(self, event: str) -> Awaitable[None] | None:
        return self.child.announced(event)

    @property
    def node(self) -> Node:
        return self.child.node

    def preadv(self, offset: int, bufs: Buffers) -> Awaitable[None]:
        return self.child.preadv(offset - self.shift, bufs)

    @property
    def queues_reads(self) -> bool:
        return self.child.queues_reads

    def queue_read(self, offset: int, buf: memoryview, done: Done) -> Batch | None:
        return self.child.queue_read(offset - self.shift, buf, done)

    def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> Awaitable[None]:
        return self.child.pwritev(offset - self.shift, bufs, flags)

    def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> Awaitable[None]:
        return self.child.pwrite_zeroes(offset - self.shift, length, flags)


class MisplacedCluster(ValueError):
    """An entry of an image with an external data file that cannot be: *index* in its slice, *text*."""

    def __init__(self, index: int, text: str) -> None:
        super().__init__(text)
        self.index, self.text = index, text


def shift_in(entries: array[int], guest_offset: int, cluster_bits: int) -> None:
    """Make *entries* as they are on disk, the first one for *guest_offset*, those that are kept in memory.

    Raises MisplacedCluster.
    """
    shift = SHIFT << cluster_bits
    for index, entry in enumerate(entries):
        if not entry:
            continue
        if entry & ondisk.COMPRESSED:
            raise MisplacedCluster(index, "Compressed cluster entry found in image with external data file")
        place = entry & ondisk.OFFSET_MASK
        if not place and (entry & ondisk.ZERO or not entry & ondisk.COPIED):
            continue
        wanted = guest_offset + (index << cluster_bits)
        if place != wanted:
            raise MisplacedCluster(
                index,
                f"External data file host cluster offset {place:#x} does not match guest cluster offset: {wanted:#x}",
            )
        entries[index] = entry + shift


def shift_out(entries: array[int], cluster_bits: int) -> None:
    """The inverse of ``shift_in``."""
    shift = SHIFT << cluster_bits
    for index, entry in enumerate(entries):
        if entry & ondisk.OFFSET_MASK:
            entries[index] = entry - shift
