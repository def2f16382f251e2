"""devfuse from the kernel's side of the descriptor: a socket that keeps messages apart stands in for /dev/fuse."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable

import pytest
import trio
import trio.testing
from devfuse_toy import SIZE, Toy

from fusebd.errors import FuseProtocolError
from fusebd.fuse import wire
from fusebd.fuse.devfuse import DevfuseTransport
from fusebd.fuse.wire import Opcode

DATA, HELD, BROKEN, AWAY = 1002, 1004, 1005, 1007


class Kernel:
    """Sends requests and takes answers: ``await kernel(opcode, body)`` is (errno, payload)."""

    def __init__(self) -> None:
        self.socket, self._theirs = (
            trio.socket.from_stdlib_socket(half) for half in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        )
        self.toy = Toy(None)
        self.transport = DevfuseTransport(self.toy, os.dup(self._theirs.fileno()))
        self._theirs.close()
        self._unique = 0

    def ask(self, opcode: int, body: bytes = b"", nodeid: int = 2) -> int:
        """Send a request; its number."""
        self._unique += 2
        self.send(wire.IN_HEADER.encode(40 + len(body), opcode, self._unique, nodeid, 0, 0, 1, 0) + body)
        return self._unique

    def send(self, message: bytes) -> None:
        os.write(self.socket.fileno(), message)

    async def answer(self) -> tuple[int, int, bytes]:
        """The next answer: number, errno, payload."""
        message = await self.socket.recv(2 << 20)
        header = wire.OUT_HEADER.decode(memoryview(message))
        assert header.len == len(message)
        return header.unique, -header.error, message[16:]

    async def __call__(self, opcode: int, body: bytes = b"", nodeid: int = 2) -> tuple[int, bytes]:
        asked = self.ask(opcode, body, nodeid)
        unique, code, payload = await self.answer()
        assert unique == asked
        return code, payload

    async def start(self, nursery: trio.Nursery, minor: int = 45) -> None:
        self.ask(Opcode.INIT, struct.pack("=IIIII44x", 7, minor, 131072, 0x7FFFFFFF, 0xFF))
        await nursery.start(self.transport.serve)
        _, code, payload = await self.answer()
        assert code == 0
        assert len(payload) == 64

    def end(self) -> None:
        """The connection ends."""
        self.socket.close()

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self.transport.close()


def rw(fh: int, offset: int, size: int) -> bytes:
    return wire.READ_IN.encode(fh, offset, size, 0, 0, 0)


@pytest.fixture
async def kernel() -> AsyncIterator[Kernel]:
    with Kernel() as kernel:
        async with trio.open_nursery() as nursery:
            await kernel.start(nursery)
            yield kernel
            nursery.cancel_scope.cancel()


@pytest.fixture
async def unserved() -> AsyncIterator[Kernel]:
    """One that nobody serves yet."""
    with Kernel() as kernel:
        yield kernel


async def test_read_and_write(kernel: Kernel) -> None:
    assert await kernel(Opcode.WRITE, rw(DATA, 10, 3) + b"abc") == (0, struct.pack("=I4x", 3))
    assert await kernel(Opcode.READ, rw(DATA, 9, 5)) == (0, b"\0abc\0")


async def test_what_the_page_cache_held_back_is_told_apart(kernel: Kernel) -> None:
    for flags, held_back in ((0, 0), (wire.WRITE_CACHE, 1), (4, 0)):
        request = wire.READ_IN.encode(DATA, 10, 3, flags, 0, 0)
        assert await kernel(Opcode.WRITE, request + b"abc") == (0, struct.pack("=I4x", 3))
        assert kernel.toy.held_back == held_back


async def test_read_past_the_end_is_short(kernel: Kernel) -> None:
    code, payload = await kernel(Opcode.READ, rw(DATA, SIZE - 2, 100))
    assert (code, len(payload)) == (0, 2)


async def test_requests_that_do_not_suspend_reach_no_scheduler(kernel: Kernel) -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    for _ in range(100):
        kernel.ask(Opcode.READ, rw(DATA, 0, 512))
    answers = [await kernel.answer() for _ in range(100)]
    assert [unique for unique, _, _ in answers] == sorted(unique for unique, _, _ in answers)
    assert trio.lowlevel.current_statistics().tasks_living == before


async def test_request_that_suspends_is_overtaken(kernel: Kernel) -> None:
    held = kernel.ask(Opcode.READ, rw(HELD, 0, 512))
    assert await kernel(Opcode.READ, rw(DATA, 0, 512)) == (0, bytes(512))
    kernel.toy.gate.set()
    assert await kernel.answer() == (held, 0, bytes(512))


async def test_each_request_under_way_has_its_answer(kernel: Kernel) -> None:
    asked = []
    for index in range(200):
        asked.append(kernel.ask(Opcode.READ, rw(HELD, index, 16)))
        await trio.testing.wait_all_tasks_blocked()
    assert kernel.toy.held == 200
    kernel.toy.gate.set()
    answers = [await kernel.answer() for _ in asked]
    assert sorted(unique for unique, _, _ in answers) == asked
    assert all(payload == bytes(16) for _, _, payload in answers)


async def test_readers_that_nobody_needs_end(kernel: Kernel) -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    for _ in range(200):
        kernel.ask(Opcode.READ, rw(HELD, 0, 16))
        await trio.testing.wait_all_tasks_blocked()
    kernel.toy.gate.set()
    for _ in range(200):
        await kernel.answer()
    await trio.testing.wait_all_tasks_blocked()
    assert trio.lowlevel.current_statistics().tasks_living < before + 50


async def test_data_of_requests_under_way_is_not_mixed_up(kernel: Kernel) -> None:
    for index in range(64):
        kernel.ask(Opcode.WRITE, rw(AWAY, 512 * index, 512) + bytes([index]) * 512)
    for _ in range(64):
        await kernel.answer()
    numbers = {kernel.ask(Opcode.READ, rw(AWAY, 512 * index, 512)): index for index in range(64)}
    for _ in range(64):
        unique, code, payload = await kernel.answer()
        assert (code, payload) == (0, bytes([numbers[unique]]) * 512)


async def test_other_tasks_get_their_turn_under_full_load(unserved: Kernel) -> None:
    """Each request asks for the next one: the reader never has to wait."""

    async def endless(fh: int, offset: int, buf: memoryview) -> int:
        unserved.ask(Opcode.READ, rw(DATA, 0, 16))
        with contextlib.suppress(BlockingIOError):
            os.read(unserved.socket.fileno(), 1000)
        requests.append(fh)
        return 16

    requests: list[int] = []
    unserved.toy.read = endless  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        await unserved.start(nursery)
        unserved.ask(Opcode.READ, rw(DATA, 0, 16))
        for _ in range(20):
            await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert len(requests) > 20


# -- what needs no answer, or a refusal ---------------------------------------------------------


@pytest.mark.parametrize(
    ("opcode", "body"),
    [
        (Opcode.FORGET, struct.pack("=Q", 1)),
        (Opcode.BATCH_FORGET, struct.pack("=IIQQ", 1, 0, 2, 1)),
        (Opcode.BATCH_FORGET, struct.pack("=II", 0xFFFFFFFF, 0)),
    ],
)
async def test_forget_has_no_answer(kernel: Kernel, opcode: Opcode, body: bytes) -> None:
    kernel.ask(opcode, body)
    assert await kernel(Opcode.READ, rw(DATA, 0, 3)) == (0, bytes(3))


@pytest.mark.parametrize(
    ("opcode", "code"),
    [
        (Opcode.INTERRUPT, errno.ENOSYS),
        (Opcode.ACCESS, errno.ENOSYS),
        (Opcode.POLL, errno.ENOSYS),
        (Opcode.SETXATTR, errno.ENOSYS),
        (Opcode.FSYNCDIR, errno.ENOSYS),
        (Opcode.IOCTL, errno.ENOTTY),
        (Opcode.READLINK, errno.EINVAL),
        (Opcode.CREATE, errno.EPERM),
        (Opcode.RENAME2, errno.EPERM),
        (Opcode.INIT, errno.ENOSYS),
        (4096, errno.ENOSYS),
        (0, errno.ENOSYS),
        (0xFFFFFFFF, errno.ENOSYS),
    ],
)
async def test_refused_requests(kernel: Kernel, opcode: int, code: int) -> None:
    assert await kernel(opcode, bytes(64)) == (code, b"")


@pytest.mark.parametrize("opcode", [Opcode.DESTROY, Opcode.RELEASEDIR])
async def test_requests_with_nothing_to_do(kernel: Kernel, opcode: Opcode) -> None:
    assert await kernel(opcode, bytes(24)) == (0, b"")


# -- malformed requests -------------------------------------------------------------------------

BODIES = {
    Opcode.LOOKUP: b"data\0",
    Opcode.GETATTR: bytes(16),
    Opcode.SETATTR: bytes(88),
    Opcode.OPEN: bytes(8),
    Opcode.READ: rw(DATA, 0, 512),
    Opcode.WRITE: rw(DATA, 0, 10) + bytes(10),
    Opcode.RELEASE: bytes(24),
    Opcode.FSYNC: bytes(16),
    Opcode.GETXATTR: bytes(8) + b"user.toy\0",
    Opcode.LISTXATTR: bytes(8),
    Opcode.FLUSH: bytes(24),
    Opcode.OPENDIR: bytes(8),
    Opcode.READDIR: rw(0, 0, 4096),
    Opcode.READDIRPLUS: rw(0, 0, 4096),
    Opcode.FALLOCATE: bytes(32),
    Opcode.LSEEK: bytes(24),
    Opcode.COPY_FILE_RANGE: struct.pack("=QQQQQQQ", DATA, 0, 2, DATA, 0, 10, 0),
    Opcode.COPY_FILE_RANGE_64: struct.pack("=QQQQQQQ", DATA, 0, 2, DATA, 0, 10, 0),
    Opcode.STATX: bytes(24),
}


@pytest.mark.parametrize("opcode", BODIES)
async def test_whole_request_is_served_and_a_truncated_one_refused(kernel: Kernel, opcode: Opcode) -> None:
    body = BODIES[opcode]
    code, _ = await kernel(opcode, body)
    assert code == 0
    for length in range(len(body)):
        assert await kernel(opcode, body[:length]) == (errno.EINVAL, b"")
    assert await kernel(Opcode.READ, rw(DATA, 0, 3)) == (0, bytes(3))


@pytest.mark.parametrize("length", [0, 8, 24, 39])
async def test_less_than_a_header_is_refused(kernel: Kernel, length: int) -> None:
    message = wire.IN_HEADER.encode(40, Opcode.STATFS, 98, 1, 0, 0, 1, 0)
    kernel.send(message[: max(length, 1)])
    _, code, payload = await kernel.answer()
    assert (code, payload) == (errno.EINVAL, b"")
    assert (await kernel(Opcode.STATFS))[0] == 0


@pytest.mark.parametrize("opcode", [Opcode.READ, Opcode.WRITE, Opcode.STATFS])
@pytest.mark.parametrize("said", [0, 39, 79, 81, 0xFFFFFFFF])
async def test_another_length_than_it_says_is_refused(kernel: Kernel, opcode: Opcode, said: int) -> None:
    kernel.send(wire.IN_HEADER.encode(said, opcode, 98, 1, 0, 0, 1, 0) + rw(DATA, 0, 0))
    assert await kernel.answer() == (98, errno.EINVAL, b"")


@pytest.mark.parametrize(
    ("offset", "size"), [(0, (1 << 20) + 1), (0, 0xFFFFFFFF), (1 << 63, 1), ((1 << 63) - 1, 1), ((1 << 64) - 1, 512)]
)
@pytest.mark.parametrize("opcode", [Opcode.READ, Opcode.WRITE])
async def test_hostile_offset_or_size_is_refused(kernel: Kernel, opcode: Opcode, offset: int, size: int) -> None:
    assert await kernel(opcode, rw(DATA, offset, size)) == (errno.EINVAL, b"")
    assert not kernel.toy.calls


async def test_read_with_more_than_a_request_has_is_served(kernel: Kernel) -> None:
    assert await kernel(Opcode.READ, rw(DATA, 0, 5) + b"and more") == (0, bytes(5))


async def test_listing_with_hostile_size_has_what_there_is(kernel: Kernel) -> None:
    code, payload = await kernel(Opcode.READDIR, rw(0, 0, 0xFFFFFFFF), nodeid=1)
    assert code == 0
    assert b"broken" in payload


async def test_bug_is_answered_with_eio(kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    assert await kernel(Opcode.READ, rw(BROKEN, 0, 5)) == (errno.EIO, b"")
    assert "a bug" in caplog.text
    assert await kernel(Opcode.WRITE, rw(BROKEN, 0, 1) + b"x") == (errno.ENOSPC, b"")


# -- beginning and end ----------------------------------------------------------------------------


async def test_too_old_protocol_is_refused(unserved: Kernel) -> None:
    unserved.ask(Opcode.INIT, struct.pack("=IIII", 7, 12, 131072, 0))
    with pytest.raises(FuseProtocolError, match=r"7\.12, at least 7\.23"):
        await unserved.transport.serve()
    assert (await unserved.answer())[1] == errno.EPROTO


async def test_later_major_version_gets_a_second_chance(unserved: Kernel, nursery: trio.Nursery) -> None:
    unserved.ask(Opcode.INIT, struct.pack("=IIII48x", 8, 0, 131072, 0))
    unserved.ask(Opcode.INIT, struct.pack("=IIII48x", 7, 45, 131072, 0))
    await nursery.start(unserved.transport.serve)
    versions = [struct.unpack_from("=II", (await unserved.answer())[2]) for _ in range(2)]
    assert versions == [(7, 45), (7, 45)]
    assert (await unserved(Opcode.STATFS))[0] == 0


@pytest.mark.parametrize("first", [Opcode.STATFS, Opcode.READ])
async def test_nothing_is_served_before_init(unserved: Kernel, nursery: trio.Nursery, first: Opcode) -> None:
    asked = unserved.ask(first, rw(DATA, 0, 1))
    nursery.start_soon(unserved.transport.serve)
    assert await unserved.answer() == (asked, errno.EIO, b"")


async def test_malformed_init_is_refused_and_another_one_taken(unserved: Kernel, nursery: trio.Nursery) -> None:
    asked = unserved.ask(Opcode.INIT, struct.pack("=III", 7, 45, 131072))
    nursery.start_soon(unserved.transport.serve)
    assert await unserved.answer() == (asked, errno.EIO, b"")
    assert (await unserved(Opcode.INIT, struct.pack("=IIII", 7, 45, 131072, 0)))[0] == 0
    assert (await unserved(Opcode.STATFS))[0] == 0


async def test_end_of_the_connection_before_init_ends_the_server(unserved: Kernel) -> None:
    unserved.end()
    async with trio.open_nursery() as nursery:
        await nursery.start(unserved.transport.serve)
    assert not unserved.toy.calls


async def test_end_of_the_connection_lets_requests_under_way_finish(unserved: Kernel) -> None:
    async with trio.open_nursery() as nursery:
        await unserved.start(nursery)
        unserved.ask(Opcode.READ, rw(HELD, 0, 512))
        unserved.ask(Opcode.READ, rw(AWAY, 0, 512))
        await unserved.answer()
        unserved.end()
        await trio.testing.wait_all_tasks_blocked()
        assert unserved.toy.held == 1
        unserved.toy.gate.set()
    assert unserved.toy.held == 0


async def test_cancelled_server_cancels_requests_under_way(unserved: Kernel) -> None:
    async with trio.open_nursery() as nursery:
        await unserved.start(nursery)
        unserved.ask(Opcode.READ, rw(AWAY, 0, 512))
        unserved.ask(Opcode.READ, rw(HELD, 0, 512))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert unserved.toy.calls["read"] == 2


# -- reads without a task -----------------------------------------------------------------------


class Queue:
    """Takes *taken* reads of the handle *fh*, one byte value each; ``end`` ends what was submitted."""

    def __init__(self, toy: Toy, taken: int = 1000, fh: int = DATA) -> None:
        self.taken = taken
        self.reads: list[tuple[int, memoryview, Callable[[int], None]]] = []
        self.submissions: list[int] = []
        self.signal = os.eventfd(0)
        self.cleared = 0
        toy.queued_reads[fh] = self._queue

    def _queue(self, offset: int, buf: memoryview, done: Callable[[int], None]) -> Queue | None:
        if not self.taken:
            return None
        self.taken -= 1
        self.reads.append((offset, buf, done))
        return self

    def submit(self) -> None:
        self.submissions.append(len(self.reads) - sum(self.submissions))

    def fileno(self) -> int:
        return self.signal

    def clear(self) -> None:
        self.cleared += 1

    def reap(self, most: int) -> int:
        return 0

    def end(self, number: int, *, is_read: bool = True) -> None:
        offset, buf, done = self.reads[number]
        assert number < sum(self.submissions)
        if is_read:
            buf[:] = bytes([offset // 512]) * len(buf)
        done(len(buf) if is_read else -errno.EIO)


async def test_a_queued_read_is_answered_when_it_is_done(kernel: Kernel) -> None:
    queue = Queue(kernel.toy)
    before = trio.lowlevel.current_statistics().tasks_living
    asked = [kernel.ask(Opcode.READ, rw(DATA, 512 * number, 512)) for number in range(40)]
    await trio.testing.wait_all_tasks_blocked()
    assert sum(queue.submissions) == 40
    assert len(queue.submissions) < 20
    assert trio.lowlevel.current_statistics().tasks_living == before
    assert await kernel(Opcode.WRITE, rw(DATA, 0, 3) + b"abc") == (0, struct.pack("=I4x", 3))
    for number in reversed(range(40)):
        queue.end(number)
        assert await kernel.answer() == (asked[number], 0, bytes([number]) * 512)
    assert not kernel.toy.calls["read"]


async def test_a_read_that_is_not_queued_or_comes_back_is_made_by_a_task(kernel: Kernel) -> None:
    kernel.toy.files[2][:1024] = b"x" * 1024
    queue = Queue(kernel.toy, taken=1)
    back = kernel.ask(Opcode.READ, rw(DATA, 0, 512))
    assert await kernel(Opcode.READ, rw(DATA, 512, 100)) == (0, b"x" * 100)
    queue.end(0, is_read=False)
    assert await kernel.answer() == (back, 0, b"x" * 512)
    assert kernel.toy.calls["read"] == 2


async def test_a_queued_read_is_submitted_when_another_request_suspends(kernel: Kernel) -> None:
    queue = Queue(kernel.toy)
    queued = kernel.ask(Opcode.READ, rw(DATA, 512, 512))
    held = kernel.ask(Opcode.READ, rw(HELD, 0, 512))
    await trio.testing.wait_all_tasks_blocked()
    queue.end(0)
    assert await kernel.answer() == (queued, 0, b"\1" * 512)
    kernel.toy.gate.set()
    assert await kernel.answer() == (held, 0, bytes(512))


async def test_an_error_of_a_read_that_comes_back_is_answered(kernel: Kernel) -> None:
    queue = Queue(kernel.toy)
    kernel.toy.queued_reads[BROKEN] = kernel.toy.queued_reads[DATA]
    back = kernel.ask(Opcode.READ, rw(BROKEN, 0, 512))
    await trio.testing.wait_all_tasks_blocked()
    queue.end(0, is_read=False)
    assert await kernel.answer() == (back, errno.EIO, b"")


async def test_a_batch_without_reads_may_be_closed_while_others_have_some(kernel: Kernel) -> None:
    one, other = Queue(kernel.toy), Queue(kernel.toy, fh=AWAY)
    first = kernel.ask(Opcode.READ, rw(DATA, 512, 512))
    second = kernel.ask(Opcode.READ, rw(AWAY, 1024, 512))
    await trio.testing.wait_all_tasks_blocked()
    one.end(0)
    assert await kernel.answer() == (first, 0, b"\1" * 512)
    os.close(one.signal)
    ready = os.open("/dev/zero", os.O_RDONLY)  # readable at once, and most likely of the same number
    third = kernel.ask(Opcode.READ, rw(AWAY, 1536, 512))
    await trio.testing.wait_all_tasks_blocked()
    os.close(ready)
    for number, (unique, byte) in enumerate(((second, b"\2"), (third, b"\3"))):
        other.end(number)
        assert await kernel.answer() == (unique, 0, byte * 512)
    assert one.cleared == 0


@pytest.mark.parametrize("is_read", [True, False])
async def test_cancelled_server_waits_for_queued_reads(unserved: Kernel, is_read: bool) -> None:
    queue = Queue(unserved.toy)
    ended = trio.Event()

    async def serve_and_tell(*, task_status: trio.TaskStatus[None]) -> None:
        try:
            await unserved.transport.serve(task_status=task_status)
        finally:
            ended.set()

    async with trio.open_nursery() as nursery:
        unserved.ask(Opcode.INIT, struct.pack("=IIIII44x", 7, 45, 131072, 0x7FFFFFFF, 0xFF))
        await nursery.start(serve_and_tell)
        await unserved.answer()
        unserved.ask(Opcode.READ, rw(DATA, 0, 512))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()
            assert not ended.is_set()
            queue.end(0, is_read=is_read)
            await ended.wait()


# -- notifications ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("notify", "message"),
    [
        (lambda transport: transport.notify_inval_inode(2), wire.encode_inval_inode(2)),
        (lambda transport: transport.notify_inval_inode(2, 512, 7), wire.encode_inval_inode(2, 512, 7)),
        (lambda transport: transport.notify_inval_entry(1, b"x"), wire.encode_inval_entry(1, b"x")),
        (lambda transport: transport.notify_delete(1, 2, b"x"), wire.encode_delete(1, 2, b"x")),
    ],
    ids=["inval_inode", "inval_range", "inval_entry", "delete"],
)
async def test_notification_is_sent_once(
    kernel: Kernel, notify: Callable[[DevfuseTransport], None], message: bytes
) -> None:
    notify(kernel.transport)
    notify(kernel.transport)
    assert await kernel.socket.recv(1000) == message
    kernel.ask(Opcode.STATFS)
    assert (await kernel.answer())[1] == 0


async def test_notification_after_the_end_is_ignored(kernel: Kernel) -> None:
    kernel.end()
    await trio.testing.wait_all_tasks_blocked()
    kernel.transport.notify_inval_inode(2)
    assert await kernel.transport.wait_notified()
