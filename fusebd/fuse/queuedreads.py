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


class _Place:
    """A batch with reads of ours in it, *count* of them; *submitted*, once any of them is."""

    __slots__ = ("batch", "count", "submitted")

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.count = 0
        self.submitted = False


class QueuedRead:
    """A read of *size* bytes under way, and the memory that it is read to."""

    __slots__ = ("_reads", "place", "room", "size", "unique")

    place: _Place

    def __init__(self, reads: QueuedReads, room: Room, unique: int, size: int) -> None:
        self._reads = reads
        self.room = room
        self.unique = unique
        self.size = size

    def done(self, result: int) -> None:
        """It has ended with so many bytes, or a negative errno."""
        reads, place = self._reads, self.place
        reads.under_way -= 1
        place.count -= 1
        if not place.count:
            reads.leave(place)
        if result == self.size:
            reads.answer(self)
        else:
            reads.make_again(self)
        if reads.all_ended is not None and not reads.under_way:
            reads.all_ended.set()


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
        #: set when none is under way, if somebody waits for that
        self.all_ended: trio.Event | None = None
        #: reads that are not submitted yet, and where they are queued
        self.waiting = 0
        self._to_submit: set[_Place] = set()
        self._places: dict[Batch, _Place] = {}
        #: where some are submitted, by the descriptors that tell of their ends
        self._submitted: dict[int, _Place] = {}
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def queue(self, queue: QueueRead, room: Room, unique: int, offset: int, size: int) -> bool:
        """Have *queue* take the read *unique* to *room*; False if it does not."""
        read = QueuedRead(self, room, unique, size)
        batch = queue(offset, room[1][:size], read.done)
        if batch is None:
            return False
        place = self._places.get(batch)
        if place is None:
            place = self._places[batch] = _Place(batch)
        read.place = place
        place.count += 1
        self.under_way += 1
        self.waiting += 1
        self._to_submit.add(place)
        if self.waiting >= _BATCH:
            self.submit()
        return True

    def submit(self) -> None:
        """Submit everything that is queued."""
        self.waiting = 0
        while self._to_submit:
            place = self._to_submit.pop()
            place.batch.submit()
            if not place.submitted:
                place.submitted = True
                descriptor = place.batch.fileno()
                self._submitted[descriptor] = place
                self._poll.register(descriptor, select.POLLIN)

    def leave(self, place: _Place) -> None:
        """No read is left there, and whoever owns the batch may close it."""
        del self._places[place.batch]
        if place.submitted:
            descriptor = place.batch.fileno()
            self._poll.unregister(descriptor)
            del self._submitted[descriptor]

    def reap(self) -> bool:
        """See to a few reads that have ended; whether there were any."""
        return sum([place.batch.reap(_BATCH) for place in list(self._submitted.values())]) > 0

    def wait(self) -> bool:
        """After ``reap`` has found nothing: wait shortly for a request or the end of a read; whether there is one."""
        ready = self._poll.poll(_WAIT)
        for descriptor, _ in ready:
            place = self._submitted.get(descriptor)
            if place is not None:
                place.batch.clear()
                place.batch.reap(_BATCH)
        return bool(ready)

    async def wait_ended(self) -> None:
        """Wait until no read is under way, come what may: their memory is the kernel's until then."""
        if self.under_way:
            self.all_ended = trio.Event()
            with trio.CancelScope(shield=True):
                await self.all_ended.wait()
