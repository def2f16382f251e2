"""Read write logs, of blklogwrites or of the kernel's dm-log-writes, and replay them onto a copy of the disk.

The copy is to be as the disk was when the log began.  What is replayed up to an entry is then what the disk was when
that entry was logged.  Nothing in a log is trusted: what does not fit in the log, or on any disk, is an ImageError.

Options and output: xfstests' src/log-writes/replay-log; the layout is ``fusebd.ondisk.logwrites``.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

from fusebd.errors import FusebdError, ImageError, OpenError
from fusebd.ondisk import logwrites as ondisk
from fusebd.ondisk.logwrites import DISCARD, FLAG_NAMES, MARK

#: data is copied in pieces of so many bytes
_PIECE = 1 << 20
_ZEROES = bytes(_PIECE)
_MAX_OFFSET = 2**63 - 1

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@dataclass(frozen=True, slots=True)
class LogEntry:
    """Entry *number* of a log, counted from 0 on: *length* bytes at byte *offset* of the disk, and *flags*.

    ``position`` is the byte of the log at which the entry begins, ``data`` the one at which its data does, ``end`` the
    one behind it.  ``mark`` is the text of a mark.
    """

    number: int
    offset: int
    length: int
    flags: int
    mark: str
    position: int
    data: int
    end: int

    @property
    def kind(self) -> str:
        """The flags by name, ``write`` if none says what it is, joined by ``|``: ``write|fua``, ``discard``."""
        names = [name for flag, name in FLAG_NAMES.items() if self.flags & flag]
        if self.length and not self.flags & DISCARD:
            names.insert(0, "write")
        return "|".join(names)


class WriteLog:
    """The log in the file or block device *path*, which is open until ``close``.  A context manager.

    Raises OpenError, and ImageError in QEMU's words if there is no log in it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise OpenError.from_os(f"Could not open '{path}'", error) from None
        try:
            self._length = os.lseek(self._fd, 0, os.SEEK_END)
            superblock = ondisk.parse_superblock(self._read(0, ondisk.SUPERBLOCK_LENGTH))
        except OSError as error:
            self.close()
            raise OpenError.from_os(f"Could not read '{path}'", error) from None
        except FusebdError as error:
            self.close()
            raise error.prefixed(f"'{path}'") from None
        self.nr_entries, self.sector_size = superblock.nr_entries, superblock.sector_size

    def __enter__(self) -> WriteLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._fd)

    def _read(self, position: int, length: int) -> bytes:
        """*length* bytes, at most some megabytes, from byte *position* of the log on.  Raises ImageError, OSError."""
        data = os.pread(self._fd, length, position) if position < self._length else b""
        while data and len(data) < length and (more := os.pread(self._fd, length - len(data), position + len(data))):
            data += more
        if len(data) < length:
            raise ImageError("The log ends too early")
        return data

    def entries(self) -> Iterator[LogEntry]:
        """The entries in their order.

        Raises ImageError when it comes to one that is malformed, OpenError if the host cannot read.
        """
        position = self.sector_size
        for number in range(self.nr_entries):
            try:
                entry = self._entry(number, position)
            except FusebdError as error:
                raise error.prefixed(f"'{self.path}'") from None
            except OSError as error:
                raise OpenError.from_os(f"Could not read '{self.path}'", error) from None
            yield entry
            position = entry.end

    def _entry(self, number: int, position: int) -> LogEntry:
        size = self.sector_size
        if position + size > self._length:
            raise ImageError(f"Log entry {number} is past the end of the log")
        # One byte more than the header: that what is behind it is zero shows that the sector is an entry at all.
        head = self._read(position, min(ondisk.ENTRY_LENGTH + 1, size))
        entry = ondisk.parse_entry(head[: ondisk.ENTRY_LENGTH], number)
        if (not entry.flags and not entry.nr_sectors) or (not entry.flags & MARK and any(head[ondisk.ENTRY_LENGTH :])):
            raise ImageError(f"Malformed log entry {number}")
        data = position + size
        end = data + entry.data_sectors * size
        if end > self._length:
            raise ImageError(f"The data of log entry {number} is past the end of the log")
        offset, length = entry.sector * size, entry.nr_sectors * size
        if offset + length > _MAX_OFFSET:
            raise ImageError(f"Log entry {number} is about sector {entry.sector}, which no disk has")
        mark = ""
        if entry.flags & MARK:
            if entry.data_len > ondisk.max_mark_length(size):
                raise ImageError(f"The mark of log entry {number} is longer than its sector")
            text = self._read(position + ondisk.ENTRY_LENGTH, entry.data_len) if entry.data_len else b""
            mark = os.fsdecode(text.partition(b"\0")[0])
        return LogEntry(number, offset, length, entry.flags, mark, position, data, end)

    def read_data(self, entry: LogEntry) -> Iterator[tuple[int, bytes]]:
        """What *entry* wrote, in pieces: the byte of the disk, and the bytes.  Raises OpenError."""
        if entry.flags & DISCARD:
            return
        for at in range(0, entry.length, _PIECE):
            try:
                yield entry.offset + at, self._read(entry.data + at, min(_PIECE, entry.length - at))
            except FusebdError as error:
                raise error.prefixed(f"'{self.path}'") from None
            except OSError as error:
                raise OpenError.from_os(f"Could not read '{self.path}'", error) from None


# --- parts of logs -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which entries of a log: from ``start_entry``, or behind the mark ``start_mark``, on.

    The last is the first one of these: the ``limit``-th, the mark ``end_mark``, one with a flag of ``stop_flags``.
    """

    start_entry: int = 0
    start_mark: str | None = None
    limit: int = 0
    end_mark: str | None = None
    stop_flags: int = 0

    @property
    def ends(self) -> bool:
        """Whether it says what the last entry is."""
        return bool(self.limit or self.end_mark is not None or self.stop_flags)

    def entries(self, log: WriteLog) -> Iterator[tuple[LogEntry, bool]]:
        """The entries that are meant, and of each whether it is the last that was asked for.

        Raises ImageError; and FusebdError if the first one, or the mark that ends them, is not there, but that only
        when everything before it has been given.
        """
        count, started = 0, self.start_mark is None
        for entry in log.entries():
            if not started:
                started = bool(entry.flags & MARK) and entry.mark == self.start_mark
                continue
            if entry.number < self.start_entry:
                continue
            count += 1
            last = (
                count == self.limit
                or bool(entry.flags & self.stop_flags)
                or (self.end_mark is not None and bool(entry.flags & MARK) and entry.mark == self.end_mark)
            )
            yield entry, last
            if last:
                return
        if not started:
            raise FusebdError(f"'{log.path}' has no mark '{self.start_mark}'")
        if self.start_entry and self.start_entry >= log.nr_entries:
            raise FusebdError(f"'{log.path}' has no entry {self.start_entry}, only {log.nr_entries} entries")
        if self.end_mark is not None:
            raise FusebdError(f"'{log.path}' has no mark '{self.end_mark}' behind where it is to start")


def find(log: WriteLog, selection: Selection) -> LogEntry:
    """The last entry of *selection*.  Raises FusebdError if there is none that it means."""
    for entry, last in selection.entries(log):
        if last:
            return entry
    raise FusebdError(f"'{log.path}' has no such entry")


def listing(log: WriteLog, selection: Selection) -> Iterator[str]:
    """A line for each entry: number, kind, offset and length in bytes, or a mark's text."""
    for entry, _ in selection.entries(log):
        if entry.flags & MARK:
            mark = "".join(character if character.isprintable() else repr(character)[1:-1] for character in entry.mark)
            yield f"{entry.number:>8} {entry.kind:<12} {mark}"
        elif entry.length:
            yield f"{entry.number:>8} {entry.kind:<12} offset {entry.offset} length {entry.length}"
        else:
            yield f"{entry.number:>8} {entry.kind}"


# --- replaying -----------------------------------------------------------------------------------


class Target:
    """The file or block device *path*, which must exist, to be replayed onto.  A context manager; raises OpenError."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise OpenError.from_os(f"Could not open '{path}'", error) from None

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def apply(self, log: WriteLog, entry: LogEntry, *, discard: bool = True) -> None:
        """Do once more what *entry* did; a discarded range reads as zeroes, unless *discard* is off.

        A regular file grows where it is written past its end.  Raises OpenError, ImageError.
        """
        try:
            if not entry.flags & DISCARD:
                for offset, data in log.read_data(entry):
                    self._write(offset, data)
            elif discard:
                self._zero(entry.offset, entry.length)
        except OSError as error:
            raise OpenError.from_os(f"Could not write '{self.path}'", error) from None

    def sync(self) -> None:
        """Have what was applied on the disk.  Raises OpenError."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise OpenError.from_os(f"Could not write '{self.path}'", error) from None

    def _write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written

    def _zero(self, offset: int, length: int) -> None:
        end = min(offset + length, os.lseek(self._fd, 0, os.SEEK_END))
        if end <= offset:
            return
        while _fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, end - offset):
            code = ctypes.get_errno()
            if code == errno.EOPNOTSUPP:
                break
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        else:
            return
        for at in range(offset, end, _PIECE):
            self._write(at, _ZEROES[: min(_PIECE, end - at)])


def replay(log: WriteLog, path: str, selection: Selection, *, discard: bool = True) -> int:
    """Replay *selection* onto the file or block device *path*; how many entries that were.

    It is known before anything is written that the log has what *selection* names, and that its entries are right.
    """
    for _ in selection.entries(log):
        pass
    count = 0
    if os.path.exists(path) and os.path.samefile(log.path, path):
        raise FusebdError(f"'{path}' is the log itself")
    with Target(path) as target:
        for entry, _ in selection.entries(log):
            target.apply(log, entry, discard=discard)
            count += 1
        target.sync()
    return count
