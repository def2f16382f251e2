"""Requests without a task: one call queues a request, another one is called when it is done.

A request that suspends takes a task of its own and a pass of the event loop to wake it, which costs more than a read
past the page cache takes the processor otherwise.  Where the way to a driver is straight (``fusebd.block.straight``)
and the driver can hand the kernel a request as it is, whoever serves requests queues it instead, goes on to the next,
and submits what has come together.

It is the plain case only that is served like this.  A request that turns out to be any other - a short read, an error,
a file that makes the kernel wait - is made anew as ever, by ``preadv``, which knows what is to be done then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

#: called once, from the event loop, with the bytes done or a negative errno
Done = Callable[[int], None]


class Batch(Protocol):
    """Where a request was queued."""

    def submit(self) -> None:
        """Hand the kernel everything that is queued.  Never suspends."""

    def fileno(self) -> int:
        """What can be read from while there are requests that are done, and perhaps for a while after that."""

    def clear(self) -> None:
        """Let ``fileno`` tell only of what comes next; ``reap`` may find something all the same."""

    def reap(self, most: int) -> int:
        """Say of up to *most* requests that they are done, for whoever need not wait for that; how many were."""


#: Queues a read of a whole buffer at a byte offset.  The buffer stays as it is until *done* is called, which is never
#: before ``submit``.  None: such a read cannot be queued at the moment, and *done* is not called.
QueueRead = Callable[[int, memoryview, Done], Batch | None]
