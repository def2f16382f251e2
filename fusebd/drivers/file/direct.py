"""Direct I/O: requests past the host's page cache, as cache.direct=on asks.

The memory, the offset and the length of each call have to be aligned.  The edge above sees to the latter two; memory
that is not aligned is copied through a buffer that is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from ctypes import addressof, c_char
from functools import partial

from fusebd.block.buffers import BufferPool
from fusebd.block.child import Buffers, copy_into, fill_zeroes, nbytes
from fusebd.block.queueing import Done, QueueRead
from fusebd.drivers.file.aio import PREAD, PWRITE, LinuxAio, address_of

#: runs a blocking call with a byte offset, for messages, in a worker thread
InThread = Callable[[str, int, Callable[[], int]], Awaitable[int]]


class DirectIO:
    """Reads and writes of one descriptor opened with O_DIRECT; *alignment* is in bytes.

    Native asynchronous I/O where *native* is set and the kernel has it, else worker threads through *in_thread*.
    """

    def __init__(self, fd: int, alignment: int, in_thread: InThread, *, native: bool) -> None:
        self._fd = fd
        self.alignment = alignment
        self._mask = alignment - 1
        self._in_thread = in_thread
        self._pool = BufferPool()
        self._aio: LinuxAio | None = None
        # a request that the kernel could not start without waiting comes back, to be given to a thread
        self._nowait = os.RWF_NOWAIT
        if native:
            try:
                self._aio = LinuxAio(fd)
            except OSError:
                self._aio = None

    def close(self) -> None:
        """Let go of the asynchronous context; no request is under way."""
        if self._aio is not None:
            self._aio.close()

    async def read(self, offset: int, bufs: Buffers) -> None:
        """Fill *bufs*; zeroes past the end of the file.  Suspends until the host has read.  Raises OSError."""
        if len(bufs) == 1 and (address := address_of(bufs[0])) is not None and not address & self._mask:
            await self._read_into(offset, bufs[0], address)
            return
        size = nbytes(bufs)
        bounce = self._pool.take(size)
        try:
            part = bounce[:size]
            await self._read_into(offset, part, address_of(part) or 0)
            copy_into(bufs, part)
        finally:
            self._pool.give_back(bounce)

    @property
    def read_queue(self) -> QueueRead | None:
        """What takes reads without a task."""
        return None if self._aio is None else self._queue_read

    def _queue_read(self, offset: int, buf: memoryview, done: Done) -> LinuxAio | None:
        aio = self._aio
        if aio is None or buf.readonly or not aio.has_room:
            return None
        address = addressof(c_char.from_buffer(buf))
        if address & self._mask:
            return None
        aio.queue(PREAD, address, len(buf), offset, self._nowait, done)
        return aio

    async def _read_into(self, offset: int, buf: memoryview, address: int) -> None:
        done = await self._native(PREAD, address, len(buf), offset, 0)
        while done < len(buf):
            if done & self._mask:
                break  # a read that ends in the middle of a block ended at the end of the file
            got = await self._in_thread("read", offset, partial(os.preadv, self._fd, [buf[done:]], offset + done))
            if not got:
                break
            done += got
        if done < len(buf):
            fill_zeroes((buf[done:],))

    async def write(self, offset: int, bufs: Buffers, flags: int) -> None:
        """Write *bufs* with the RWF_* *flags*.  Suspends until the host has written.  Raises OSError."""
        if len(bufs) == 1 and (address := address_of(bufs[0])) is not None and not address & self._mask:
            await self._write_from(offset, bufs[0], address, flags)
            return
        size = nbytes(bufs)
        bounce = self._pool.take(size)
        try:
            part = bounce[:size]
            at = 0
            for buf in bufs:
                part[at : at + len(buf)] = buf
                at += len(buf)
            await self._write_from(offset, part, address_of(part) or 0, flags)
        finally:
            self._pool.give_back(bounce)

    async def _write_from(self, offset: int, buf: memoryview, address: int, flags: int) -> None:
        done = await self._native(PWRITE, address, len(buf), offset, flags)
        while done < len(buf):
            write = partial(os.pwritev, self._fd, [buf[done:]], offset + done, flags)
            done += await self._in_thread("write", offset, write)

    async def _native(self, opcode: int, address: int, length: int, offset: int, flags: int) -> int:
        """Bytes done asynchronously: 0 if a thread has to do it."""
        if self._aio is None or not self._aio.has_room:
            return 0
        result = await self._aio.request(opcode, address, length, offset, flags | self._nowait)
        if result >= 0:
            return result
        if result in (-errno.EOPNOTSUPP, -errno.EINVAL) and self._nowait:
            self._nowait = 0
            return 0
        if result in (-errno.EAGAIN, -errno.EINTR):
            return 0
        raise OSError(-result, os.strerror(-result))
