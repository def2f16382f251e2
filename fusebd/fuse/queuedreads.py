"""Reads that are under way without a task (``fusebd.block.queueing``), on behalf of a transport.

A reader leaves its memory to such a read, takes other memory, and goes on reading.  What has come together is submitted
when there is nothing more to read, or enough of it; the answer is written from the call that says that it is done.

While such reads are under way, the reader itself waits for what comes next: a request, or the end of a read.  It is a
millisecond at most in which nobody else gets a turn, and a pass of the event loop less for every few requests.
"""

from __future__ import annotations

import select
from collections.abc import Callable

import trio

from fusebd.block.queueing import Batch, QueueRead

#: Reads that are submitted at once, and that are answered before new requests are looked at.  Together they cost the
#: kernel less, but the disk waits meanwhile.
_BATCH = 8
#: the longest wait, in milliseconds
_WAIT = 1

#: memory for one request: the header apart from the data
Room = tuple[memoryview, memoryview]


class QueuedRead:
    """A read of *size* bytes under way, and the memory that it is read to."""

    __slots__ = ("_reads", "batch", "room", "size", "unique")

    batch: Batch  #: where it is queued

    def __init__(self, reads: QueuedReads, room: Room, unique: int, size: int) -> None:
        self._reads = reads
        self.room = room
        self.unique = unique
        self.size = size

    def done(self, result: int) -> None:
        """It has ended with so many bytes, or a negative errno."""
        reads = self._reads
        reads.ended(self.batch)
        if result == self.size:
            reads.answer(self)
        else:
            reads.make_again(self)
        reads.settle()


class QueuedReads:
    """The reads of one transport, which has requests to read at *descriptor*.

    *answer* is called with each that has been done, *make_again* with each that takes a task after all.
    """

    def __init__(
        self, descriptor: int, answer: Callable[[QueuedRead], None], make_again: Callable[[QueuedRead], None]
    ) -> None:
        self.answer = answer
        self.make_again = make_again
        self.under_way = 0
        #: reads that are not submitted yet, and where they are queued
        self.waiting = 0
        self._queued_at: set[Batch] = set()
        #: how many there are in each batch, and the batches by the descriptors that tell of the ends of reads
        self._counts: dict[Batch, int] = {}
        self._batches: dict[int, Batch] = {}
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._ended: trio.Event | None = None

    def queue(self, queue: QueueRead, room: Room, unique: int, offset: int, size: int) -> bool:
        """Have *queue* take the read *unique* to *room*; False if it does not."""
        read = QueuedRead(self, room, unique, size)
        batch = queue(offset, room[1][:size], read.done)
        if batch is None:
            return False
        read.batch = batch
        self._counts[batch] = self._counts.get(batch, 0) + 1
        self.under_way += 1
        self.waiting += 1
        self._queued_at.add(batch)
        if self.waiting >= _BATCH:
            self.submit()
        return True

    def submit(self) -> None:
        """Submit everything that is queued."""
        self.waiting = 0
        while self._queued_at:
            batch = self._queued_at.pop()
            batch.submit()
            descriptor = batch.fileno()
            if descriptor not in self._batches:
                self._batches[descriptor] = batch
                self._poll.register(descriptor, select.POLLIN)

    def reap(self) -> bool:
        """See to a few reads that have ended; whether there were any."""
        return sum(batch.reap(_BATCH) for batch in list(self._batches.values())) > 0

    def wait(self) -> bool:
        """After ``reap`` has found nothing: wait shortly for a request or the end of a read; whether there is one."""
        ready = self._poll.poll(_WAIT)
        for descriptor, _ in ready:
            batch = self._batches.get(descriptor)
            if batch is not None:
                batch.clear()
                batch.reap(_BATCH)
        return bool(ready)

    def ended(self, batch: Batch) -> None:
        """A read in *batch* has ended; with the last one, whoever owns *batch* may close it."""
        self.under_way -= 1
        left = self._counts[batch] = self._counts[batch] - 1
        if not left:
            del self._counts[batch]
            descriptor = batch.fileno()
            if self._batches.pop(descriptor, None) is not None:
                self._poll.unregister(descriptor)

    def settle(self) -> None:
        """What waits for the end of all reads goes on if that is now."""
        if self._ended is not None and not self.under_way:
            self._ended.set()

    async def wait_ended(self) -> None:
        """Wait until no read is under way, come what may: their memory is the kernel's until then."""
        if self.under_way:
            self._ended = trio.Event()
            with trio.CancelScope(shield=True):
                await self._ended.wait()
