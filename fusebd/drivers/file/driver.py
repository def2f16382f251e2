"""file, host_device: a regular file or a block device of the host.

Options: QAPI BlockdevOptionsFile.  Behaviour: QEMU block/file-posix.c.

The event loop is not kept waiting for a disk.  A read of what the host has cached is done on the spot, by preadv2
with RWF_NOWAIT; where the host says that it would have to wait, a worker thread does it.  ext4 (6.18) and tmpfs refuse
RWF_NOWAIT for buffered writes, tmpfs for reads as well; such a call is a memory copy of a few microseconds as long as
the host keeps up with writing back, so it is made on the spot until two take longer than ``SLOW``, and by worker
threads for a while after that.  A thread costs about 60 us a request, a cached 4 KiB read 1.3 us.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import trio
from msgspec import UNSET, Meta, UnsetType

from fusebd.block.child import fill_zeroes, slice_buffers
from fusebd.block.driver import (
    FUA,
    MAY_UNMAP,
    BlockStatus,
    Buffers,
    Node,
    Preallocation,
    ProtocolDriver,
    Status,
    nbytes,
    register,
)
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, Int, Json
from fusebd.block.perms import Perm
from fusebd.block.queueing import QueueRead
from fusebd.drivers.file import syscalls
from fusebd.drivers.file.direct import DirectIO
from fusebd.drivers.file.locks import ImageLocks
from fusebd.drivers.file.reopening import NOT_WRITABLE, FileReopening, Handle
from fusebd.drivers.file.resizing import resize_file
from fusebd.errors import BlockIOError, FusebdError, NotSupported, OpenError

T = TypeVar("T")

#: a call on the spot that takes longer than this, in seconds, is slow
SLOW = 0.002
#: A second slow one within so many calls sends the following ones to threads: a single one may just mean that another
#: process had the processor meanwhile.
CLOSE = 16
#: for so many times as long as it took
CAUTION = 5
#: most requests of one file in worker threads at a time
WORKERS = 32
#: the alignment that direct I/O of regular files is tried with, in bytes, until one works
_DIRECT_ALIGNMENTS = (512, 1024, 2048, 4096)
#: longest read or write that the kernel carries out at once (MAX_RW_COUNT), rounded down
_MAX_TRANSFER = 0x7FFF_0000


class FileOptions(BlockdevOptions, frozen=True, kw_only=True):
    filename: Annotated[str, Meta(description="path of the file")]
    locking: Annotated[Literal["auto", "on", "off"], Meta(description="agree with other processes by image locks")] = (
        "auto"
    )
    aio: Annotated[
        Literal["threads", "native", "io_uring"] | UnsetType,
        Meta(description="with cache.direct=on: worker threads, or else native asynchronous I/O"),
    ] = UNSET
    aio_max_batch: Annotated[Int | UnsetType, Meta(description="accepted, not used")] = UNSET
    drop_cache: Annotated[bool, Meta(description="accepted, not used")] = True
    pr_manager: Annotated[str | UnsetType, Meta(description="accepted, not used")] = UNSET


@register("file", FileOptions)
class File(ProtocolDriver):
    """A regular file.  Reads past its end give zeroes, writes past its end make it longer."""

    supports_fua = True
    protocol_prefix = "file"
    creation_module = "fusebd.drivers.file.creation"
    strong_options = frozenset({"filename"})
    changeable: ClassVar[frozenset[str] | None] = frozenset({"drop-cache"})
    reopening = FileReopening

    def __init__(self, node: Node, fd: int, options: FileOptions) -> None:
        super().__init__(node)
        self.options = options
        self._fd = fd
        self._direct: DirectIO | None = None
        self._locks = ImageLocks(fd, options.filename) if options.locking != "off" else None
        self._limiter = trio.CapacityLimiter(WORKERS)
        self._nowait_read = self._nowait_write = True
        self._cautious_until = 0.0
        self._since_slow = CLOSE  #: calls on the spot since the last slow one
        self.limits.max_transfer = _MAX_TRANSFER

    @classmethod
    async def open(cls, opening: Opening, options: FileOptions) -> File:
        if not options.filename:
            raise OpenError(f"The '{cls.name}' block driver requires a file name")
        if options.aio == "native" and not opening.node.cache_direct:
            raise OpenError("aio=native was specified, but it requires cache.direct=on, which was not specified.")
        fd = _open(opening, options.filename)
        try:
            cls._check_kind(fd, options.filename)
            if not opening.read_only:
                try:
                    cls._check_writable(fd)
                except OpenError as error:
                    opening.fall_back_to_read_only(error)
            driver = cls(opening.node, fd, options)
            driver.length = driver._read_length()
            if opening.node.cache_direct:
                driver._direct = driver._make_direct(fd)
                driver.limits.request_alignment = driver._direct.alignment
        except BaseException:
            os.close(fd)
            raise
        return driver

    @classmethod
    def parse_filename(cls, name: str) -> dict[str, Json]:
        return {"filename": name.removeprefix("file:")}

    @classmethod
    def _check_kind(cls, fd: int, filename: str) -> None:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OpenError(f"'{cls.name}' driver requires '{filename}' to be a regular file")

    @classmethod
    def _check_writable(cls, fd: int) -> None:
        """Raise OpenError if what was opened for writing cannot be written all the same."""

    def _read_length(self) -> int:
        return os.fstat(self._fd).st_size

    def _make_direct(self, fd: int) -> DirectIO:
        native = self.options.aio != "threads"
        return DirectIO(fd, self._direct_alignment(fd), self._in_thread, native=native)

    def _direct_alignment(self, fd: int) -> int:
        buffer = mmap.mmap(-1, _DIRECT_ALIGNMENTS[-1])
        for alignment in _DIRECT_ALIGNMENTS:
            try:
                os.preadv(fd, [memoryview(buffer)[:alignment]], 0)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise OpenError.from_os("Could not read image", error) from None
            else:
                return alignment
        raise OpenError("Could not find working O_DIRECT alignment")

    def backing_descriptor(self) -> int:
        if self._direct is not None:
            raise NotSupported(node_name=self.node.name, operation="passthrough", reason="cache.direct is on")
        return self._fd

    def refresh_length(self) -> None:
        self.node.set_length(self._read_length())

    async def close(self) -> None:
        self.handle.close()

    # -- being reopened -------------------------------------------------------------------------

    @property
    def handle(self) -> Handle:
        """What the file is used by."""
        return Handle(self._fd, self._locks, self._direct)

    def open_again(self, *, writable: bool, direct: bool) -> Handle:
        """Open the same file once more, whatever has become of its name; no image locks are held yet.

        Raises OpenError.
        """
        filename = self.options.filename
        fd = open_file(f"/proc/self/fd/{self._fd}", filename, writable=writable, direct=direct)
        try:
            if writable:
                self._check_writable(fd)
            locks = None if self._locks is None else ImageLocks(fd, filename)
            return Handle(fd, locks, self._make_direct(fd) if direct else None)
        except BaseException:
            os.close(fd)
            raise

    def use(self, handle: Handle) -> None:
        """Use the file by *handle* from now on.  No request is under way."""
        self._fd, self._locks, self._direct = handle
        self.node.refresh_edges()

    def set_perm(self, perm: Perm, shared: Perm) -> None:
        if self._locks is not None:
            self._locks.hold(perm, shared)

    # -- data -----------------------------------------------------------------------------------

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        """Fill *bufs*; zeroes past the end of the file.  Suspends if the host has to read."""
        if self._direct is not None:
            await self._directly("read", offset, self._direct.read(offset, bufs))
            return
        done = 0
        if self._nowait_read:
            try:
                done = os.preadv(self._fd, bufs, offset, os.RWF_NOWAIT)
            except BlockingIOError:
                done = 0
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise self._failed("read", offset, error) from None
                self._nowait_read = False
            else:
                if done == (len(bufs[0]) if len(bufs) == 1 else nbytes(bufs)):
                    return
            if self._nowait_read:
                await self._in_thread("read", offset, self._read_all, offset, bufs, done)
                return
        await self._promptly("read", offset, self._read_all, offset, bufs, done)

    def read_queue(self) -> QueueRead | None:
        return None if self._direct is None else self._direct.read_queue

    def _read_all(self, offset: int, bufs: Buffers, done: int) -> None:
        size = nbytes(bufs)
        while done < size:
            got = os.preadv(self._fd, slice_buffers(bufs, done, size) if done else bufs, offset + done)
            if not got:
                fill_zeroes(slice_buffers(bufs, done, size))
                return
            done += got

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        """Write *bufs*; with FUA they are on the disk when this returns.  Suspends if the host has to wait."""
        if self._direct is not None:
            await self._directly("write", offset, self._direct.write(offset, bufs, os.RWF_DSYNC if flags & FUA else 0))
            return
        if flags & FUA:
            await self._in_thread("write", offset, self._write_all, offset, bufs, 0, os.RWF_DSYNC)
            return
        done = 0
        if self._nowait_write:
            try:
                done = os.pwritev(self._fd, bufs, offset, os.RWF_NOWAIT)
            except BlockingIOError:
                done = 0
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise self._failed("write", offset, error) from None
                self._nowait_write = False
            else:
                if done == nbytes(bufs):
                    return
            if self._nowait_write:
                await self._in_thread("write", offset, self._write_all, offset, bufs, done)
                return
        # ``_promptly``, without the calls: this is where most writes go through
        began = perf_counter()
        if done or began < self._cautious_until:
            await self._promptly("write", offset, self._write_all, offset, bufs, done)
            return
        try:
            done = os.pwritev(self._fd, bufs, offset)
        except OSError as error:
            raise self._failed("write", offset, error) from None
        self._judge(perf_counter() - began)
        size = len(bufs[0]) if len(bufs) == 1 else nbytes(bufs)
        if done < size:
            await self._promptly("write", offset, self._write_all, offset, bufs, done)

    def _write_all(self, offset: int, bufs: Buffers, done: int, flags: int = 0) -> None:
        size = nbytes(bufs)
        while done < size:
            done += os.pwritev(self._fd, slice_buffers(bufs, done, size) if done else bufs, offset + done, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """Zero by fallocate: a hole with MAY_UNMAP, allocated zeroes otherwise.  Grows the file if it has to."""
        await self._promptly("write zeroes", offset, self._zero, offset, length, bool(flags & MAY_UNMAP))
        if flags & FUA:
            await self.flush_to_disk()

    def _zero(self, offset: int, length: int, unmap: bool) -> None:
        punch = syscalls.FALLOC_FL_PUNCH_HOLE | syscalls.FALLOC_FL_KEEP_SIZE
        try:
            if not unmap:
                try:
                    syscalls.fallocate(self._fd, syscalls.FALLOC_FL_ZERO_RANGE, offset, length)
                    return
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
            syscalls.fallocate(self._fd, punch, offset, length)
            if not unmap:
                syscalls.fallocate(self._fd, 0, offset, length)
            elif offset + length > os.fstat(self._fd).st_size:
                # not by ftruncate, which would cut off what another request has written behind it meanwhile
                syscalls.fallocate(self._fd, 0, offset + length - 1, 1)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
                raise NotSupported(node_name=self.node.name, operation="write zeroes") from None
            raise

    async def pdiscard(self, offset: int, length: int) -> None:
        await self._promptly("discard", offset, self._discard, offset, length)

    def _discard(self, offset: int, length: int) -> None:
        try:
            syscalls.fallocate(self._fd, syscalls.FALLOC_FL_PUNCH_HOLE | syscalls.FALLOC_FL_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
                raise NotSupported(node_name=self.node.name, operation="discard") from None
            raise

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """Data or hole, as lseek says; data where the filesystem cannot tell."""
        here = Status.OFFSET_VALID
        try:
            data = os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                return BlockStatus(Status.DATA | here, length, offset, self.node)
            return BlockStatus(Status.ZERO | here, length, offset, self.node)
        if data > offset:
            return BlockStatus(Status.ZERO | here, min(length, data - offset), offset, self.node)
        hole = os.lseek(self._fd, offset, os.SEEK_HOLE)
        return BlockStatus(Status.DATA | here, min(length, hole - offset), offset, self.node)

    async def truncate(
        self, length: int, *, exact: bool = False, prealloc: Preallocation = "off", zero: bool = False
    ) -> None:
        """Change the file's length; *prealloc* falloc or full takes disk space for what is new at once."""
        await self._in_thread("resize", length, resize_file, self._fd, length, prealloc, self.node.name)
        self.node.set_length(length)

    async def flush_to_disk(self) -> None:
        """fdatasync(2), in a worker thread."""
        await self._in_thread("flush", -1, os.fdatasync, self._fd)

    # -- running host calls ---------------------------------------------------------------------

    async def _promptly(self, operation: str, offset: int, call: Callable[..., T], *args: Any) -> T:
        """Make a host call on the spot while such calls are quick, otherwise in a thread."""
        if perf_counter() < self._cautious_until:
            return await self._in_thread(operation, offset, call, *args)
        began = perf_counter()
        try:
            return call(*args)
        except OSError as error:
            raise self._failed(operation, offset, error) from None
        finally:
            self._judge(perf_counter() - began)

    def _judge(self, took: float) -> None:
        """A call on the spot has taken so many seconds: whether the next ones are better made in threads."""
        self._since_slow += 1
        if took > SLOW:
            if self._since_slow <= CLOSE:
                self._cautious_until = perf_counter() + CAUTION * took
            self._since_slow = 0

    async def _directly(self, operation: str, offset: int, request: Awaitable[None]) -> None:
        try:
            await request
        except OSError as error:
            raise self._failed(operation, offset, error) from None

    async def _in_thread(self, operation: str, offset: int, call: Callable[..., T], *args: Any) -> T:
        try:
            return await trio.to_thread.run_sync(call, *args, limiter=self._limiter)
        except OSError as error:
            raise self._failed(operation, offset, error) from None

    def _failed(self, operation: str, offset: int, error: OSError) -> BlockIOError:
        return BlockIOError(error.errno or errno.EIO, node_name=self.node.name, operation=operation, offset=offset)

    def _refused(self, reason: str, code: int) -> FusebdError:
        return BlockIOError(code, node_name=self.node.name, operation="resize", reason=reason)

    # -- what is shown --------------------------------------------------------------------------

    @property
    def filename(self) -> str:
        return self.options.filename

    def allocated_bytes(self) -> int | None:
        return os.fstat(self._fd).st_blocks * 512

    def format_info(self) -> dict[str, Json]:
        return {"dirty-flag": False, "format-specific": {"type": "file", "data": {}}}

    def specific_stats(self) -> dict[str, Json]:
        counters = self.node.counted()
        return {
            "discard-nb-ok": counters.unmap_operations,
            "discard-nb-failed": counters.failed_unmap_operations,
            "discard-bytes-ok": counters.unmap_bytes,
        }


@register("host_device", FileOptions)
class HostDevice(File):
    """A block device (or a character device that can be read at offsets); its length is fixed."""

    protocol_prefix = "host_device"
    creation_module = ""

    @classmethod
    def parse_filename(cls, name: str) -> dict[str, Json]:
        return {"filename": name.removeprefix("host_device:")}

    @classmethod
    def _check_kind(cls, fd: int, filename: str) -> None:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
            raise OpenError(f"'{cls.name}' driver requires '{filename}' to be either a character or block device")

    @classmethod
    def _check_writable(cls, fd: int) -> None:
        if stat.S_ISBLK(os.fstat(fd).st_mode) and syscalls.device_is_read_only(fd):
            raise OpenError.from_os("The device is not writable", OSError(errno.EACCES, ""))

    def _read_length(self) -> int:
        try:
            if stat.S_ISBLK(os.fstat(self._fd).st_mode):
                return syscalls.device_length(self._fd)
            return os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            raise OpenError.from_os("Could not refresh total sector count", error) from None

    def backing_descriptor(self) -> int:
        reason = "the kernel passes through to regular files only"
        raise NotSupported(node_name=self.node.name, operation="passthrough", reason=reason)

    def _direct_alignment(self, fd: int) -> int:
        return syscalls.device_sector_size(fd)

    def _zero(self, offset: int, length: int, unmap: bool) -> None:
        if unmap:
            try:
                syscalls.fallocate(
                    self._fd, syscalls.FALLOC_FL_PUNCH_HOLE | syscalls.FALLOC_FL_KEEP_SIZE, offset, length
                )
                return
            except OSError as error:
                # EINVAL: the range is not one of whole sectors; EBUSY: the page cache could not be emptied there
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.EBUSY, errno.ENODEV):
                    raise
        # Buffered, the page cache would keep showing what was there before (see QEMU file-posix.c).
        if self._direct is None:
            raise NotSupported(node_name=self.node.name, operation="write zeroes")
        syscalls.device_write_zeroes(self._fd, offset, length)

    def _discard(self, offset: int, length: int) -> None:
        try:
            syscalls.device_discard(self._fd, offset, length)
        except OSError as error:
            # EINVAL: the range is not one of whole sectors
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                raise NotSupported(node_name=self.node.name, operation="discard") from None
            raise

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        return BlockStatus(Status.DATA | Status.OFFSET_VALID, length, offset, self.node)

    async def truncate(
        self, length: int, *, exact: bool = False, prealloc: Preallocation = "off", zero: bool = False
    ) -> None:
        """Only what changes nothing: a device's length is its own."""
        if prealloc != "off":
            raise self._refused(f"Preallocation mode '{prealloc}' unsupported for this device", errno.ENOTSUP)
        if exact and length != self.length:
            raise self._refused("Cannot resize device files", errno.ENOTSUP)
        if length > self.length:
            raise self._refused("Cannot grow device files", errno.EINVAL)

    def allocated_bytes(self) -> int | None:
        return None


def _open(opening: Opening, filename: str) -> int:
    """A descriptor of *filename*, for writing too unless the node is read-only or has to become so."""
    direct = opening.node.cache_direct
    if not opening.read_only:
        try:
            return open_file(filename, filename, writable=True, direct=direct)
        except OpenError as error:
            if error.errno not in NOT_WRITABLE:
                raise
            opening.fall_back_to_read_only(error)
    return open_file(filename, filename, writable=False, direct=direct)


def open_file(path: str, filename: str, *, writable: bool, direct: bool) -> int:
    """A descriptor of *path*.  Raises OpenError, which calls it *filename*."""
    # O_NONBLOCK keeps a FIFO or a tape from holding up the daemon; it means nothing for files and disks
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_DIRECT if direct else 0) | (os.O_RDWR if writable else os.O_RDONLY)
    try:
        return os.open(path, flags)
    except ValueError:  # a NUL byte in the name
        raise OpenError(f"Could not open '{filename}': {os.strerror(errno.EINVAL)}") from None
    except OSError as error:
        raise OpenError.from_os(f"Could not open '{filename}'", error) from None
