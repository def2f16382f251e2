"""The transport that speaks the kernel's FUSE protocol itself, from /dev/fuse.

Scheduling.  One reader task at a time has the turn: it reads a request and serves it there and then.  Most requests
end without suspending, so that nothing else happens between readv(2) and writev(2).  A reader's coroutine is run
through ``_watched``, which sees each trap that it yields to trio: the first one of a request is the moment to pass the
turn on to another reader task (one that idles, or a new one).  So a slow request holds up no other, and each request
under way has a task and a buffer of its own.  A reader that has served a request that suspended takes what else there
is to read; when there is nothing, it idles as one of a few, or ends: waiting is for the one that has the turn.

The device is read until it has nothing more; only then it is waited for.  Other tasks get their turn by time.

Memory.  The data of a write is read to page-aligned memory; that same memory is what a read request is answered from.
A reader owns its memory as long as it lives.

Interrupts are declined: a disk does not stop in the middle, and a program that gets a signal would not
expect EINTR of a file.

Specification: include/uapi/linux/fuse.h and, for what the kernel does, fs/fuse/ of Linux 6.18.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import sys
import types
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from functools import partial
from struct import Struct
from time import monotonic, time_ns
from typing import Any, TypeVar, cast

import trio

from fusebd.block.caller import Asked
from fusebd.errors import FuseError, FuseProtocolError, NotSupported
from fusebd.fuse import wire
from fusebd.fuse.arena import Arena
from fusebd.fuse.asked import ENOUGH, asked
from fusebd.fuse.notices import Notices
from fusebd.fuse.passthrough import Backings
from fusebd.fuse.queuedreads import QueuedRead, QueuedReads, Room
from fusebd.fuse.transport import MAX_REQUEST, Changes, FileSystem, Opened, current_request
from fusebd.fuse.wire import Fattr, Fopen, InHeader, Init, Opcode

log = logging.getLogger(__name__)

T = TypeVar("T")

#: What is asked of the kernel, as far as it has it.  HANDLE_KILLPRIV_V2 saves it to ask for file capabilities before
#: each write; the mount is nosuid, so that there is no privilege to take away.
_WANTED = (
    Init.ASYNC_READ
    | Init.ATOMIC_O_TRUNC
    | Init.BIG_WRITES
    | Init.DO_READDIRPLUS
    | Init.READDIRPLUS_AUTO
    | Init.ASYNC_DIO
    | Init.PARALLEL_DIROPS
    | Init.ABORT_ERROR
    | Init.MAX_PAGES
    | Init.EXPLICIT_INVAL_DATA
    | Init.HANDLE_KILLPRIV_V2
    | Init.DIRECT_IO_ALLOW_MMAP
    | Init.PASSTHROUGH
)
#: asynchronous requests that the kernel sends before it waits for answers
_MAX_BACKGROUND = 1024

#: how long a reader serves requests before other tasks get their turn, in seconds: a checkpoint costs as much as two
#: requests.  With requests suspended, somebody waits for what a checkpoint would see.
_TURN, _SHORT_TURN = 0.002, 0.0003
#: A client that waits for each answer sends its next request a few microseconds after it, but to be woken for it takes
#: 20 and more (4 KiB reads at depth 1: 19,000/s waiting, 34,000/s polling).  So where requests come in quick
#: succession, the device is polled for a while, in seconds, before it is waited for.
_POLL_TIME, _SHORT_WAIT = 50e-6, 100e-6
#: readers that are kept for the next request that suspends, and memory for the next reader
_MAX_IDLE = 32

_HEAD = wire.IO_REQUEST.size
_OUT = wire.OUT_HEADER.size
_pack_head = wire.OUT_HEADER.struct.pack
_WRITE_REPLY = Struct("=IiQI4x")
#: the connection has ended: unmounted, or aborted
_GONE = (errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN, errno.EPIPE)

Handler = Callable[["DevfuseTransport", InHeader, memoryview], Coroutine[Any, Any, bytes]]


@types.coroutine
def _watched(coro: Coroutine[Any, Any, T], suspending: Callable[[], None]) -> Generator[Any, Any, T]:
    """*coro*, with *suspending* called each time before it suspends."""
    resume = partial(coro.send, None)
    while True:
        try:
            trap = resume()
        except StopIteration as stop:
            return cast(T, stop.value)
        suspending()
        try:
            resume = partial(coro.send, (yield trap))
        except BaseException as error:
            resume = partial(coro.throw, error)


def _poll(poll: Callable[[int], Sequence[object]]) -> bool:
    """Whether *poll* finds something in a short time.  The client may need this very processor: it goes first."""
    ends = monotonic() + _POLL_TIME
    while not poll(0):
        if monotonic() > ends:
            return False
        os.sched_yield()
    return True


class _Reader:
    """What belongs to one reader task: the memory for its request."""

    __slots__ = ("data", "has_turn", "head", "poll", "room", "serving", "transport")

    def __init__(self, transport: DevfuseTransport, room: Room, descriptor: int) -> None:
        self.transport = transport
        self.use(room)
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        self.poll = poller.poll
        #: a request is being served, and has not suspended yet
        self.serving = False
        #: it is this one that waits when there is nothing to read
        self.has_turn = True

    def use(self, room: Room) -> None:
        """Read to *room* from now on."""
        self.room = room
        self.head, self.data = room

    # who asked (fusebd.block.caller): read from the header only where somebody wants to know

    @property
    def pid(self) -> int:
        return int.from_bytes(self.head[32:36], sys.byteorder)

    @property
    def uid(self) -> int:
        return int.from_bytes(self.head[24:28], sys.byteorder)

    def identity(self) -> dict[str, Any]:
        return {"request": int.from_bytes(self.head[8:16], sys.byteorder), "pid": self.pid}

    def asked(self) -> Asked:
        return asked(memoryview(bytes(self.head) + bytes(self.data[:ENOUGH])))

    def message(self, length: int) -> memoryview:
        """A request of *length* bytes that is neither a read nor a write, in one piece."""
        if length <= _HEAD:
            return self.head[:length]
        return memoryview(bytes(self.head) + bytes(self.data[: length - _HEAD]))

    def suspending(self) -> None:
        """The reader's task is about to suspend: if that is because of its request, the turn goes on."""
        if self.serving:
            self.serving = False
            self.transport._suspended += 1
            self.transport._reads.submit()
            if self.has_turn:
                self.has_turn = False
                self.transport._pass_turn()


class DevfuseTransport:
    """Serves *fs* on *descriptor*, a mounted /dev/fuse.  See ``fusebd.fuse.transport.Transport``.

    *writeback*: writes to files that are not opened for direct I/O may stay in the page cache for a while; the size of
    such a file is the kernel's to say from then on.
    """

    def __init__(self, fs: FileSystem, descriptor: int, *, writeback: bool = False) -> None:
        os.set_blocking(descriptor, False)
        self.capabilities = frozenset({"fallocate", "lseek", "copy_file_range", "parallel-writes", "notify"})
        self._fs = fs
        self._fd = descriptor
        # Without ATOMIC_O_TRUNC, the length after an opening with O_TRUNC is what a SETATTR is answered: with
        # WRITEBACK_CACHE the kernel would go by its own idea of it, which is 0.
        self._wanted = (_WANTED | Init.WRITEBACK_CACHE) & ~Init.ATOMIC_O_TRUNC if writeback else _WANTED
        self._session: wire.Session | None = None
        self._nursery: trio.Nursery | None = None
        self._ended = trio.Event()
        self._idle: list[tuple[_Reader, trio.lowlevel.Task]] = []
        self._suspended = 0
        self._reads = QueuedReads(descriptor, self._answer_read, self._make_again)
        self._rooms: list[Room] = []
        self._notices: Notices[bytes] = Notices(self._to_write)
        self._backings = Backings(descriptor)
        self._arena = Arena()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer requests until the mount is gone.  Raises FuseProtocolError if the kernel's protocol is too old."""
        await self._negotiate()
        task_status.started()
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._read_requests)
            notifier = trio.CancelScope()
            self._nursery.start_soon(self._notices.send, notifier)
            try:
                await self._ended.wait()
            finally:
                await self._reads.wait_ended()
            notifier.cancel()
            self._notices.end()

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)

    # -- INIT -----------------------------------------------------------------------------------

    async def _negotiate(self) -> None:
        reader = self._new_reader()
        while self._session is None:
            try:
                length = os.readv(self._fd, reader.room)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._fd)
                continue
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                length = 0
            if not length:
                self._end()
                return
            unique = wire.IO_REQUEST.unpack_from(reader.head)[2]
            self._write(self._answer_init(unique, reader.message(length)))
        self._leave_room(reader.room)

    def _answer_init(self, unique: int, message: memoryview) -> bytes:
        """The answer to the first request, which may be nothing else than INIT."""
        try:
            header, body = wire.decode_header(message)
            if header.opcode != Opcode.INIT:
                return wire.encode_error(unique, errno.EIO)
            init = wire.decode_init(body)
        except FuseProtocolError as error:
            log.error("malformed INIT: %s", error)
            return wire.encode_error(unique, errno.EIO)
        try:
            self._session, answer = wire.negotiate(init, self._wanted, MAX_REQUEST, _MAX_BACKGROUND)
        except FuseProtocolError:
            self._write(wire.encode_error(unique, errno.EPROTO))
            raise
        if self._session is not None:
            self._take_capabilities(self._session)
        return wire.encode_reply(unique, answer)

    def _take_capabilities(self, session: wire.Session) -> None:
        log.debug("FUSE protocol 7.%d, %r, max_write %d", session.minor, session.flags, session.max_write)
        if session.flags & Init.DIRECT_IO_ALLOW_MMAP:
            self.capabilities |= {"shared-mmap"}
        if session.flags & Init.PASSTHROUGH:
            self.capabilities |= {"passthrough"}
        if session.flags & Init.WRITEBACK_CACHE:
            self.capabilities |= {"writeback"}

    def why_not(self, capability: str) -> str:
        if capability == "writeback" and not self._wanted & Init.WRITEBACK_CACHE:
            return "the mount was made without it"
        if capability == "passthrough" and "writeback" in self.capabilities:
            return "in one mount, the kernel has this or 'writeback'"
        return "the kernel cannot do it"

    def try_backing(self, descriptor: int) -> None:
        if "passthrough" not in self.capabilities:
            raise NotSupported(operation="passthrough", reason=self.why_not("passthrough"))
        try:
            self._backings.try_one(descriptor)
        except OSError as error:
            reason = f"the kernel refuses it: {os.strerror(error.errno or errno.EIO)}"
            if error.errno == errno.EPERM:
                reason += " (it takes root)"
            raise NotSupported(operation="passthrough", reason=reason) from None

    # -- readers --------------------------------------------------------------------------------

    def _new_reader(self) -> _Reader:
        return _Reader(self, self._take_room(), self._fd)

    def _take_room(self) -> Room:
        return self._rooms.pop() if self._rooms else (memoryview(bytearray(_HEAD)), self._arena.take())

    def _leave_room(self, room: Room) -> None:
        if len(self._rooms) < _MAX_IDLE:
            self._rooms.append(room)
        else:
            self._arena.give_back(room[1])

    async def _read_requests(self) -> None:
        """A reader task; it has the turn when it starts."""
        reader = self._new_reader()
        current_request.set(reader)
        await _watched(self._read_by_turns(reader), reader.suspending)
        self._leave_room(reader.room)

    async def _read_by_turns(self, reader: _Reader) -> None:
        while await self._take_turn(reader):
            if self._ended.is_set() or len(self._idle) >= _MAX_IDLE:
                return
            idle = reader, trio.lowlevel.current_task()
            self._idle.append(idle)

            def abort(_: object, idle: tuple[_Reader, trio.lowlevel.Task] = idle) -> trio.lowlevel.Abort:
                self._idle.remove(idle)
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
            if self._ended.is_set():
                return

    def _pass_turn(self) -> None:
        if self._idle:
            reader, task = self._idle.pop()
            reader.has_turn = True
            trio.lowlevel.reschedule(task)
        else:
            assert self._nursery is not None
            self._nursery.start_soon(self._read_requests)

    def _end(self) -> None:
        self._ended.set()
        while self._idle:
            trio.lowlevel.reschedule(self._idle.pop()[1])

    async def _take_turn(self, reader: _Reader) -> bool:
        """Serve requests until there are none and another reader waits for them (True), or the connection ends."""
        # Everything that is used for each request is a local name.
        fd, readv, writev, write = self._fd, os.readv, os.writev, os.write
        fs_read, fs_write, other = self._fs.read, self._fs.write, self._serve_other
        unpack = wire.IO_REQUEST.unpack_from
        pack_head, pack_written = _pack_head, _WRITE_REPLY.pack
        head_size, out_size, max_size, max_offset = _HEAD, _OUT, MAX_REQUEST, wire.MAX_OFFSET
        read_op, write_op, held_back = int(Opcode.READ), int(Opcode.WRITE), wire.WRITE_CACHE
        room, head, data = reader.room, reader.head, reader.data
        reads, queued_reads = self._reads, self._fs.queued_reads
        polls = False
        turn_ends = monotonic() + (_SHORT_TURN if self._suspended else _TURN)
        while True:
            try:
                length = readv(fd, room)
            except BlockingIOError:
                if reads.waiting:
                    reads.submit()
                if reads.under_way and reads.reap():
                    continue
                if not reader.has_turn:
                    return True
                if not self._suspended:
                    if reads.under_way:
                        if monotonic() < turn_ends and reads.wait():
                            continue
                    elif polls and _poll(reader.poll):
                        continue
                polls = await self._wait_readable() and not polls
                turn_ends = monotonic() + (_SHORT_TURN if self._suspended else _TURN)
                continue
            except OSError as error:
                if error.errno == errno.ENOENT:  # the request was taken back meanwhile
                    continue
                if error.errno not in _GONE:
                    raise
                length = 0
            if not length:
                self._end()
                return False
            total, opcode, unique, _, fh, offset, size, flags = unpack(head)
            reply: bytes | tuple[bytes, memoryview]
            reader.serving = True
            try:
                if (
                    opcode == read_op
                    and total == length == head_size
                    and size <= max_size
                    and offset <= max_offset - size
                ):
                    buf = data[:size]
                    if (
                        queued_reads
                        and (queue := queued_reads.get(fh)) is not None
                        and reads.queue(queue, room, unique, offset, size)
                    ):
                        reader.use(self._rooms.pop() if self._rooms else self._take_room())
                        room, head, data = reader.room, reader.head, reader.data
                        reply = b""
                    else:
                        done = await fs_read(fh, offset, buf)
                        reply = (pack_head(out_size + done, 0, unique), buf if done == size else buf[:done])
                elif (
                    opcode == write_op
                    and total == length
                    and size == length - head_size
                    and offset <= max_offset - size
                ):
                    done = await fs_write(fh, offset, data[:size], flags & held_back)
                    reply = pack_written(24, 0, unique, done)
                else:
                    reply = await other(unique, reader.message(length))
            except FuseError as error:
                reply = wire.encode_error(unique, error.errno)
            except Exception:
                log.exception("internal error in a FUSE request")
                reply = wire.encode_error(unique, errno.EIO)
            try:
                if isinstance(reply, tuple):
                    writev(fd, reply)
                elif reply:
                    write(fd, reply)
            except OSError as error:
                self._not_taken(unique, error)
            if not reader.serving:  # it has suspended
                self._suspended -= 1
                turn_ends = monotonic() + _SHORT_TURN
                continue
            reader.serving = False
            if monotonic() > turn_ends:
                if reads.waiting:
                    reads.submit()
                await trio.lowlevel.checkpoint()
                turn_ends = monotonic() + (_SHORT_TURN if self._suspended else _TURN)

    async def _wait_readable(self) -> bool:
        """Wait for a request; whether that was so short that polling would have been better."""
        began = monotonic()
        await trio.lowlevel.wait_readable(self._fd)
        return monotonic() - began < _SHORT_WAIT

    def _write(self, reply: bytes) -> None:
        try:
            os.write(self._fd, reply)
        except OSError as error:
            self._not_taken(wire.OUT_HEADER.struct.unpack_from(reply)[2], error)

    def _not_taken(self, unique: int, error: OSError) -> None:
        """The kernel did not take an answer: nobody waits for it any more, or it is wrong, which is a bug."""
        if error.errno == errno.ENOENT or error.errno in _GONE:
            return
        log.error("the kernel refused the answer to request %d: %s", unique, error)
        with contextlib.suppress(OSError):
            os.write(self._fd, wire.encode_error(unique, errno.EIO))

    # -- queued reads ---------------------------------------------------------------------------

    def _answer_read(self, read: QueuedRead) -> None:
        try:
            os.writev(self._fd, (_pack_head(_OUT + read.size, 0, read.unique), read.room[1][: read.size]))
        except OSError as error:
            self._not_taken(read.unique, error)
        self._leave_room(read.room)

    def _make_again(self, read: QueuedRead) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._read_by_task, read)

    async def _read_by_task(self, read: QueuedRead) -> None:
        """Make a read once more that could not be done without a task."""
        reader = _Reader(self, read.room, self._fd)
        current_request.set(reader)
        try:
            reply = await self._serve_other(read.unique, reader.message(_HEAD))
        except FuseError as error:
            reply = wire.encode_error(read.unique, error.errno)
        except Exception:
            log.exception("internal error in a FUSE request")
            reply = wire.encode_error(read.unique, errno.EIO)
        self._write(reply)
        self._leave_room(read.room)

    # -- all other requests ---------------------------------------------------------------------

    async def _serve_other(self, unique: int, message: memoryview) -> bytes:
        """The whole answer to *message*; empty if none is due."""
        try:
            header, body = wire.decode_header(message)
            if header.opcode in _NO_ANSWER:
                return b""
            handler = _HANDLERS.get(header.opcode)
            if handler is None:
                return wire.encode_error(unique, _REFUSED.get(header.opcode, errno.ENOSYS))
            return wire.encode_reply(unique, await handler(self, header, body))
        except FuseProtocolError as error:
            log.error("malformed FUSE request: %s", error)
            return wire.encode_error(unique, errno.EINVAL)

    async def _lookup(self, header: InHeader, body: memoryview) -> bytes:
        attr = await self._fs.lookup(header.nodeid, wire.decode_name(body))
        return wire.encode_entry_out(attr, self._fs.entry_timeout, self._fs.attr_timeout)

    async def _getattr(self, header: InHeader, body: memoryview) -> bytes:
        wire.GETATTR_IN.decode(body)
        return wire.encode_attr_out(await self._fs.getattr(header.nodeid), self._fs.attr_timeout)

    async def _statx(self, header: InHeader, body: memoryview) -> bytes:
        wire.STATX_IN.decode(body)
        return wire.encode_statx_out(await self._fs.getattr(header.nodeid), self._fs.attr_timeout)

    async def _setattr(self, header: InHeader, body: memoryview) -> bytes:
        asked = wire.decode_setattr(body)
        valid = asked.valid
        changes = Changes(
            size=asked.size if valid & Fattr.SIZE else None,
            mode=asked.mode & 0o7777 if valid & Fattr.MODE else None,
            uid=asked.uid if valid & Fattr.UID else None,
            gid=asked.gid if valid & Fattr.GID else None,
        )
        if valid & Fattr.ATIME:
            changes.atime_ns = time_ns() if valid & Fattr.ATIME_NOW else asked.atime * 10**9 + asked.atimensec
        if valid & Fattr.MTIME:
            changes.mtime_ns = time_ns() if valid & Fattr.MTIME_NOW else asked.mtime * 10**9 + asked.mtimensec
        attr = await self._fs.setattr(header.nodeid, changes, asked.fh if valid & Fattr.FH else None)
        return wire.encode_attr_out(attr, self._fs.attr_timeout)

    async def _open(self, header: InHeader, body: memoryview) -> bytes:
        opened = await self._fs.open(header.nodeid, wire.OPEN_IN.decode(body).flags)
        flags = Fopen.NOFLUSH if opened.no_flush else Fopen(0)
        backing_id = self._back(header.nodeid, opened)
        if backing_id:
            flags |= Fopen.PASSTHROUGH
        else:
            if opened.direct_io:
                flags |= Fopen.DIRECT_IO
            if opened.keep_cache:
                flags |= Fopen.KEEP_CACHE
            if opened.parallel_direct_writes:
                flags |= Fopen.PARALLEL_DIRECT_WRITES
        return wire.encode_open_out(opened.fh, flags, backing_id)

    def _back(self, ino: int, opened: Opened) -> int:
        """The id of the file that the kernel is to use for *opened*, 0 for none."""
        if opened.backing_fd is None or "passthrough" not in self.capabilities:
            return 0
        try:
            return self._backings.take(ino, opened.fh, opened.backing_fd)
        except OSError as error:
            log.warning("the kernel does not pass through to the backing file: %s", error)
            return 0

    async def _release(self, header: InHeader, body: memoryview) -> bytes:
        fh = wire.RELEASE_IN.decode(body).fh
        self._backings.give_back(fh)
        await self._fs.release(fh)
        return b""

    async def _slow_write(self, header: InHeader, body: memoryview) -> bytes:
        """A write that has something unusual about it; most likely it is refused here."""
        request, data = wire.decode_write(body)
        held_back = request.rw_flags & wire.WRITE_CACHE
        return wire.encode_write_out(await self._fs.write(request.fh, request.offset, data, held_back))

    async def _slow_read(self, header: InHeader, body: memoryview) -> bytes:
        request = wire.READ_IN.decode(body)
        if request.size > MAX_REQUEST or request.offset + request.size > wire.MAX_OFFSET:
            raise FuseProtocolError(f"a read of {request.size} bytes at {request.offset}")
        data = bytearray(request.size)
        return bytes(data[: await self._fs.read(request.fh, request.offset, memoryview(data))])

    async def _flush(self, header: InHeader, body: memoryview) -> bytes:
        await self._fs.flush(wire.FLUSH_IN.decode(body).fh)
        return b""

    async def _fsync(self, header: InHeader, body: memoryview) -> bytes:
        request = wire.FSYNC_IN.decode(body)
        await self._fs.fsync(request.fh, bool(request.flags & wire.FSYNC_FDATASYNC))
        return b""

    async def _fallocate(self, header: InHeader, body: memoryview) -> bytes:
        request = wire.FALLOCATE_IN.decode(body)
        await self._fs.fallocate(request.fh, request.mode, request.offset, request.length)
        return b""

    async def _lseek(self, header: InHeader, body: memoryview) -> bytes:
        return wire.encode_u64(await self._fs.lseek(*wire.LSEEK_IN.decode(body)))

    async def _copy(self, body: memoryview, most: int) -> int:
        request = wire.COPY_FILE_RANGE_IN.decode(body)
        if request.flags:
            raise FuseError(errno.EINVAL)
        length = min(request.length, most)
        return await self._fs.copy_file_range(
            request.fh_in, request.offset_in, request.fh_out, request.offset_out, length
        )

    async def _copy_file_range(self, header: InHeader, body: memoryview) -> bytes:
        return wire.encode_write_out(await self._copy(body, 0xFFFFF000))

    async def _copy_file_range_64(self, header: InHeader, body: memoryview) -> bytes:
        return wire.encode_u64(await self._copy(body, wire.MAX_OFFSET))

    async def _opendir(self, header: InHeader, body: memoryview) -> bytes:
        wire.OPEN_IN.decode(body)
        await self._fs.opendir(header.nodeid)
        return wire.encode_open_out(0, 0)

    async def _readdir(self, header: InHeader, body: memoryview) -> bytes:
        request = wire.READ_IN.decode(body)
        entries = await self._fs.readdir(header.nodeid, request.offset)
        return wire.encode_dirents(entries, min(request.size, MAX_REQUEST))

    async def _readdirplus(self, header: InHeader, body: memoryview) -> bytes:
        request = wire.READ_IN.decode(body)
        entries = await self._fs.readdir(header.nodeid, request.offset)
        room = min(request.size, MAX_REQUEST)
        return wire.encode_direntplus(entries, room, self._fs.entry_timeout, self._fs.attr_timeout)

    async def _nothing(self, header: InHeader, body: memoryview) -> bytes:
        """For requests that need an answer, and nothing done."""
        return b""

    async def _statfs(self, header: InHeader, body: memoryview) -> bytes:
        return wire.encode_statfs_out(await self._fs.statfs())

    async def _getxattr(self, header: InHeader, body: memoryview) -> bytes:
        room, name = wire.decode_getxattr(body)
        return _xattr_reply(await self._fs.getxattr(header.nodeid, name), room)

    async def _listxattr(self, header: InHeader, body: memoryview) -> bytes:
        room = wire.XATTR_IN.decode(body).size
        names = await self._fs.listxattr(header.nodeid)
        return _xattr_reply(b"".join(name + b"\0" for name in names), room)

    # -- notifications --------------------------------------------------------------------------

    def _notify(self, notice: bytes) -> None:
        if not self._ended.is_set():
            self._notices.give(notice)

    def notify_inval_inode(self, ino: int, offset: int = 0, length: int = 0) -> None:
        self._notify(wire.encode_inval_inode(ino, offset, length))

    async def wait_notified(self) -> bool:
        return await self._notices.wait_taken()

    def notify_inval_entry(self, parent: int, name: bytes) -> None:
        self._notify(wire.encode_inval_entry(parent, name))

    def notify_delete(self, parent: int, ino: int, name: bytes) -> None:
        self._notify(wire.encode_delete(parent, ino, name))

    def _to_write(self, notices: Iterable[bytes]) -> Callable[[], None]:
        # A thread that is left behind must not write to whatever has the number of our descriptor then.
        return partial(_write_notices, os.dup(self._fd), notices)


def _write_notices(descriptor: int, notices: Iterable[bytes]) -> None:
    try:
        for notice in notices:
            with contextlib.suppress(OSError):  # ENOENT: nothing of it was cached
                os.write(descriptor, notice)
    finally:
        os.close(descriptor)


def _xattr_reply(value: bytes, room: int) -> bytes:
    if not room:
        return wire.encode_write_out(len(value))
    if len(value) > room:
        raise FuseError(errno.ERANGE)
    return value


#: requests that are not answered.  Nothing is kept for a looked-up name, so there is nothing to forget.
_NO_ANSWER = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.NOTIFY_REPLY})

#: What is refused always, and how.  ENOSYS, for all others, makes the kernel stop asking: ACCESS (the mount has
#: default_permissions), FSYNCDIR and POLL it then does by itself, INTERRUPT it keeps to itself.
_REFUSED: dict[int, int] = {
    **dict.fromkeys(
        (
            Opcode.CREATE,
            Opcode.MKNOD,
            Opcode.MKDIR,
            Opcode.SYMLINK,
            Opcode.LINK,
            Opcode.UNLINK,
            Opcode.RMDIR,
            Opcode.RENAME,
            Opcode.RENAME2,
            Opcode.TMPFILE,
        ),
        errno.EPERM,
    ),
    Opcode.READLINK: errno.EINVAL,
    Opcode.IOCTL: errno.ENOTTY,
}

_HANDLERS: dict[int, Handler] = {
    Opcode.LOOKUP: DevfuseTransport._lookup,
    Opcode.GETATTR: DevfuseTransport._getattr,
    Opcode.SETATTR: DevfuseTransport._setattr,
    Opcode.OPEN: DevfuseTransport._open,
    Opcode.READ: DevfuseTransport._slow_read,
    Opcode.WRITE: DevfuseTransport._slow_write,
    Opcode.STATFS: DevfuseTransport._statfs,
    Opcode.RELEASE: DevfuseTransport._release,
    Opcode.FSYNC: DevfuseTransport._fsync,
    Opcode.GETXATTR: DevfuseTransport._getxattr,
    Opcode.LISTXATTR: DevfuseTransport._listxattr,
    Opcode.FLUSH: DevfuseTransport._flush,
    Opcode.OPENDIR: DevfuseTransport._opendir,
    Opcode.READDIR: DevfuseTransport._readdir,
    Opcode.RELEASEDIR: DevfuseTransport._nothing,
    Opcode.DESTROY: DevfuseTransport._nothing,
    Opcode.FALLOCATE: DevfuseTransport._fallocate,
    Opcode.READDIRPLUS: DevfuseTransport._readdirplus,
    Opcode.LSEEK: DevfuseTransport._lseek,
    Opcode.COPY_FILE_RANGE: DevfuseTransport._copy_file_range,
    Opcode.COPY_FILE_RANGE_64: DevfuseTransport._copy_file_range_64,
    Opcode.STATX: DevfuseTransport._statx,
}
