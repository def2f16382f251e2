"""What the layouts share: the bytes that they are found in, and how they say which structures there are.

Everything here blocks; nothing of it belongs into a daemon's event loop.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from fusebd.errors import FusebdError, ImageError, OpenError, OptionError
from fusebd.faults.tools import Output, fd_path, run_tool, window

#: start and length in bytes
Range = tuple[int, int]


@dataclass(frozen=True)
class Source:
    """A file or block device of *size* bytes, opened as *descriptor*; *windows* has what was mounted to look at it."""

    path: str
    descriptor: int
    size: int
    windows: contextlib.ExitStack


@dataclass
class Area:
    """*length* bytes of *source* from byte *offset* on.

    Offsets in its methods, and in what layouts find, count from the area's own start.
    """

    source: Source
    offset: int
    length: int
    _file: str = ""

    def read(self, offset: int, length: int) -> bytes:
        """*length* bytes from byte *offset* on, fewer at the end.  Raises OpenError with the host's errno."""
        end = min(offset + length, self.length)
        parts = []
        while offset < end:
            try:
                part = os.pread(self.source.descriptor, end - offset, self.offset + offset)
            except OSError as error:
                raise OpenError.from_os(f"reading at byte {self.offset + offset}", error) from None
            if not part:
                break
            parts.append(part)
            offset += len(part)
        return b"".join(parts)

    def part(self, start: int, length: int) -> Area:
        """The area of *length* bytes that begins at byte *start* of this one, and is inside of it."""
        return Area(self.source, self.offset + start, length)

    @property
    def is_device(self) -> bool:
        """Whether it is a whole block device."""
        return self._is_whole and stat.S_ISBLK(os.fstat(self.source.descriptor).st_mode)

    @property
    def _is_whole(self) -> bool:
        return (self.offset, self.length) == (0, self.source.size)

    @property
    def whole_file(self) -> str:
        """The name of the file that it lies in, for a program that ``run`` runs."""
        return fd_path(self.source.descriptor)

    @property
    def file(self) -> str:
        """The name of a file that is this area and nothing else, for a program that ``run`` runs.

        Blocks while one is mounted, which is unmounted with the source's end.  Raises FusebdError.
        """
        if not self._file:
            self._file = self.whole_file
            if not self._is_whole:
                mounted = window(self.source.path, self.offset, self.length)
                self._file = self.source.windows.enter_context(mounted)
        return self._file

    def run(self, tool: str, *arguments: str) -> Output:
        """Run a program on it: ``run_tool``."""
        return run_tool(tool, *arguments, descriptor=self.source.descriptor)


@contextlib.contextmanager
def opened(path: str, offset: int, length: int | None) -> Iterator[Area]:
    """The area of *length* bytes (None: up to the end) from byte *offset* on of the file or block device *path*.

    Raises OpenError; OptionError if it is not inside.
    """
    what = f"Could not open '{path}'"
    try:
        # A FIFO without a writer would block.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise OpenError.from_os(what, error) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise OpenError(f"{what}: neither a regular file nor a block device")
        size = os.lseek(descriptor, 0, os.SEEK_END)
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise OptionError(f"{path}: there are no {length} bytes from byte {offset} on, its size is {size}")
        with contextlib.ExitStack() as windows:
            yield Area(Source(path, descriptor, size, windows), offset, length)
    finally:
        os.close(descriptor)


#: more are refused, whatever an image says: they would take hundreds of megabytes
MAX_RANGES = 1 << 20


def merged(ranges: Iterable[Range], length: int) -> list[Range]:
    """*ranges* sorted, and those that touch or overlap made one.

    Raises ImageError if one of them is not inside of *length* bytes; FusebdError if there are none, or too many.
    """
    found: list[Range] = []
    for start, extent in ranges:
        if start < 0 or extent <= 0 or start + extent > length:
            raise ImageError(f"bytes {start} to {start + extent} are not inside of it, it has {length}")
        _append(found, start, extent)
        if len(found) > MAX_RANGES:
            raise FusebdError(f"it is in more than {MAX_RANGES} places")
    if not found:
        raise FusebdError("it takes no bytes")
    result: list[Range] = []
    for start, extent in sorted(found):
        _append(result, start, extent)
    return result


def _append(ranges: list[Range], start: int, length: int) -> None:
    """Add a range to the end, or to the last one if that reaches its start."""
    if ranges:
        first, extent = ranges[-1]
        if first <= start <= first + extent:
            ranges[-1] = first, max(extent, start + length - first)
            return
    ranges.append((start, length))


@dataclass(frozen=True)
class Target:
    """A name for structures of a layout.

    *parameter* is what stands behind ``=``, in capitals for a listing; *optional* if that can be left out.
    A *container* holds another layout, which ``/`` introduces.
    """

    name: str
    summary: str
    parameter: str = ""
    optional: bool = False
    container: bool = False


class Layout(ABC):
    """One way to lay out structures, found in an area."""

    name: ClassVar[str]
    #: for a message: "no NOUN is in it"
    noun: ClassVar[str]
    targets: ClassVar[tuple[Target, ...]]

    def __init__(self, area: Area) -> None:
        self.area = area

    @classmethod
    @abstractmethod
    def matches(cls, area: Area) -> bool:
        """Whether *area* looks as if it had this layout: by signature, no more."""

    @abstractmethod
    def find(self, target: str, value: str) -> Iterable[Range]:
        """The ranges of *target*, one of ``targets``, with the parameter *value* (empty: none).

        They need not be sorted nor inside of the area.  Raises FusebdError: ImageError for what is malformed,
        OptionError for the parameter.
        """

    def absent(self) -> Collection[str]:
        """The targets that this area has not."""
        return ()

    def containers(self) -> list[tuple[str, Range]]:
        """The parameters of the container, and where they are."""
        return []


_SUFFIXES = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def number(text: str, what: str) -> int:
    """The number *text*, decimal or hexadecimal with 0x; OptionError says that it should be *what*."""
    if not re.fullmatch(r"[0-9]{1,20}|0[xX][0-9a-fA-F]{1,16}", text):
        raise OptionError(f"'{text}' is not {what}")
    return int(text, 16) if text[:2] in ("0x", "0X") else int(text)


def size(text: str, what: str) -> int:
    """A number of bytes, with a suffix k, M, G or T (powers of 1024) if wanted."""
    suffix = text[-1:].lower() if text[:2] not in ("0x", "0X") and text[-1:].isalpha() else ""
    if suffix not in _SUFFIXES:
        raise OptionError(f"'{text}' is not {what}")
    return number(text[: len(text) - len(suffix)], what) << _SUFFIXES[suffix]


def absolute(path: str) -> str:
    """*path*, which has to begin at the root of the file system that it is in."""
    if not path.startswith("/") or "\0" in path:
        raise OptionError(f"'{path}' is not an absolute path in the file system")
    return path
