"""The ways into the graph from outside: open files, exports, the monitor.

A Root is an edge that also holds requests back while its node is drained, and reports failures as BLOCK_IO_ERROR.

Behaviour: QEMU block/block-backend.c.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import trio

from fusebd.block.child import Buffers, Child, nbytes
from fusebd.block.perms import Role
from fusebd.errors import BlockIOError, NotSupported

if TYPE_CHECKING:
    from fusebd.block.driver import Preallocation
    from fusebd.block.node import Node
    from fusebd.block.queueing import Batch, Done

#: the description of a user of whom nothing more is known (QEMU: a BlockBackend without a name)
UNNAMED = "an unnamed block device"


class Root(Child):
    """An edge from outside the graph: a file that is open, an export, the monitor.

    *description* names the user in messages (``block device 'x'``, ``an unnamed block device``).  Requests outside of
    the node fail with EIO, as they do on a real device.  While the node is drained, requests wait.
    ``on_resize`` is called when the length has changed.
    """

    __slots__ = ("_description", "_gate", "_idle", "in_flight", "on_resize", "report_errors")

    def __init__(self, node: Node, description: str, *, report_errors: bool = True) -> None:
        super().__init__(None, "root", Role.DATA | Role.PRIMARY, node)
        self._description = description
        self._gate: trio.Event | None = None
        self._idle: trio.Event | None = None
        self.in_flight = 0
        self.report_errors = report_errors
        self.on_resize: Callable[[], None] | None = None

    @property
    def parent_description(self) -> str:
        return self._description

    @property
    def length(self) -> int:
        """The node's length in bytes."""
        return self.driver.length

    def child_resized(self) -> None:
        if self.on_resize is not None:
            self.on_resize()

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        """Fill *bufs* from byte *offset* on; EIO if any of it is past the end."""
        if self._gate is not None:
            await self.wait_undrained()
        self.in_flight += 1
        try:
            if offset < 0 or offset + nbytes(bufs) > self.driver.length:
                raise self._outside("read", offset)
            await Child.preadv(self, offset, bufs)
        except BlockIOError as error:
            self._report("read", error, offset, nbytes(bufs))
            raise
        finally:
            self.in_flight -= 1
            if self._idle is not None:
                self._check_idle()

    def queue_read(self, offset: int, buf: memoryview, done: Done) -> Batch | None:
        # What Child's does and some more, in one call of another instead of two.
        size, queue = len(buf), self._queue_read
        if queue is None or self._gate is not None or not self._may_queue(offset, size):
            return None
        counters, began = self._read_counters, perf_counter_ns()

        def finished(result: int) -> None:
            if result == size:
                counters.rd_operations += 1
                counters.rd_bytes += size
                counters.rd_total_time_ns += perf_counter_ns() - began
            self.in_flight -= 1
            if self._idle is not None:
                self._check_idle()
            done(result)

        batch = queue(offset, buf, finished)
        if batch is not None:
            self.in_flight += 1
        return batch

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        """Write *bufs* from byte *offset* on; EIO if any of it is past the end and the edge may not resize."""
        if self._gate is not None:
            await self.wait_undrained()
        self.in_flight += 1
        try:
            if offset < 0:
                raise self._outside("write", offset)
            await Child.pwritev(self, offset, bufs, flags)
        except BlockIOError as error:
            self._report("write", error, offset, nbytes(bufs))
            raise
        finally:
            self.in_flight -= 1
            if self._idle is not None:
                self._check_idle()

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        async with self._request("write", offset, length):
            await super().pwrite_zeroes(offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        async with self._request("unmap", offset, length):
            await super().pdiscard(offset, length)

    async def flush(self) -> None:
        async with self._request("flush", 0, 0):
            await super().flush()

    async def truncate(
        self, length: int, *, exact: bool = False, prealloc: Preallocation = "off", zero: bool = False
    ) -> None:
        async with self._request("resize", length, 0):
            await super().truncate(length, exact=exact, prealloc=prealloc, zero=zero)

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[None]:
        """Keeps the node from being drained while in this context: for what is no request by itself (block status)."""
        if self._gate is not None:
            await self.wait_undrained()
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            if self._idle is not None:
                self._check_idle()

    @asynccontextmanager
    async def _request(self, operation: str, offset: int, length: int) -> AsyncIterator[None]:
        if self._gate is not None:
            await self.wait_undrained()
        self.in_flight += 1
        try:
            yield
        except BlockIOError as error:
            if not isinstance(error, NotSupported):
                self._report(operation, error, offset, length)
            raise
        finally:
            self.in_flight -= 1
            if self._idle is not None:
                self._check_idle()

    def _outside(self, operation: str, offset: int) -> BlockIOError:
        return BlockIOError(
            errno.EIO, node_name=self.node.name, operation=operation, offset=offset, reason="outside of the node"
        )

    def _report(self, operation: str, error: BlockIOError, offset: int, length: int) -> None:
        if not self.report_errors:
            return
        self.node.graph.ledger.record_error(
            self.node, operation=operation, offset=offset, length=length, errno=error.errno
        )
        data: dict[str, Any] = {
            "device": "",
            "node-name": self.node.public_name,
            "operation": "write" if operation == "unmap" else operation,
            "action": "report",
            "nospace": error.errno == errno.ENOSPC,
            "reason": os.strerror(error.errno),
        }
        self.node.emit("BLOCK_IO_ERROR", data)

    # -- drain ----------------------------------------------------------------------------------

    async def wait_undrained(self) -> None:
        """Wait until requests may start."""
        while self._gate is not None:
            await self._gate.wait()

    def begin_drain(self) -> None:
        """From now on, requests that arrive wait."""
        if self._gate is None:
            self._gate = trio.Event()

    def end_drain(self) -> None:
        """Let the waiting requests go."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.set()

    async def wait_idle(self) -> None:
        """Wait until no request is under way."""
        while self.in_flight:
            self._idle = trio.Event()
            await self._idle.wait()

    def _check_idle(self) -> None:
        if not self.in_flight and self._idle is not None:
            idle, self._idle = self._idle, None
            idle.set()
