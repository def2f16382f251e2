"""The FUSE protocol as bytes: what the kernel asks and what it is answered.  No I/O here.

Each structure is declared once, as a Layout, which reads it and writes it.  Whatever a request says of its own length
is checked against what arrived; what does not fit is a MalformedRequest.  Numbers are in the byte order of the host.

Specification: include/uapi/linux/fuse.h, protocol 7.23 (Linux 3.15) to 7.45 (Linux 6.18); structures and requests
have the names they have there.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable
from struct import Struct
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from fusebd.errors import FuseProtocolError

if TYPE_CHECKING:
    from fusebd.fuse.transport import Attr, DirEntry, Statfs

T = TypeVar("T")

MAJOR = 7
#: the newest protocol that is spoken, and the oldest: the first in which the answer to INIT has its present size
MINOR, OLDEST_MINOR = 45, 23

#: file offsets are signed in the kernel
MAX_OFFSET = (1 << 63) - 1
#: longest name that is taken; the kernel's own limit is PATH_MAX
MAX_NAME = 4095
#: most bytes in one write request if the kernel cannot be told another number (FUSE_DEFAULT_MAX_PAGES_PER_REQ)
_OLD_MAX_WRITE = 32 * 4096
_PAGE = 4096


class Opcode(enum.IntEnum):
    """enum fuse_opcode: those that are told apart."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


class Notify(enum.IntEnum):
    """enum fuse_notify_code: messages that nobody asked for."""

    INVAL_INODE = 2
    INVAL_ENTRY = 3
    DELETE = 6


class Init(enum.IntFlag):
    """What INIT offers and asks for; from bit 32 on in ``flags2``."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    PARALLEL_DIROPS = 1 << 18
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    EXPLICIT_INVAL_DATA = 1 << 25
    HANDLE_KILLPRIV_V2 = 1 << 28
    INIT_EXT = 1 << 30
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37


class Fopen(enum.IntFlag):
    """How the kernel uses an open file."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NOFLUSH = 1 << 5
    PARALLEL_DIRECT_WRITES = 1 << 6
    PASSTHROUGH = 1 << 7


class Fattr(enum.IntFlag):
    """Which fields of a setattr request count."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8


FSYNC_FDATASYNC = 1
#: a write of what the page cache has held back, through any file that is open for writing (FUSE_WRITE_CACHE)
WRITE_CACHE = 1
#: STATX_BASIC_STATS
STATX_BASIC = 0x7FF


class Layout(Generic[T]):
    """One structure: its fields in struct's letters, and the named tuple that they make.

    *offsets* are the indices of fields that count bytes of a file.
    """

    def __init__(self, fields: str, make: Callable[..., T], offsets: tuple[int, ...] = ()) -> None:
        self.struct = Struct("=" + fields)
        self.size = self.struct.size
        self._make = make
        self._offsets = offsets

    def decode(self, body: memoryview) -> T:
        """What *body* starts with.  Newer kernels may have more to say: what follows is ignored."""
        if len(body) < self.size:
            raise FuseProtocolError(f"{len(body)} bytes where {self._make.__name__} has {self.size}")
        fields = self.struct.unpack_from(body)
        for index in self._offsets:
            if fields[index] > MAX_OFFSET:
                raise FuseProtocolError(f"offset or length {fields[index]} is out of range")
        return self._make(*fields)

    def encode(self, *fields: int) -> bytes:
        """The structure with these *fields*."""
        return self.struct.pack(*fields)


# -- headers ------------------------------------------------------------------------------------


class InHeader(NamedTuple):
    """Before every request.  ``total_extlen`` is in units of 8 bytes, at the end of the request."""

    len: int
    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    total_extlen: int


class OutHeader(NamedTuple):
    """Before every answer: ``error`` is a negative errno or 0.  In a notification: its code, and no ``unique``."""

    len: int
    error: int
    unique: int


IN_HEADER = Layout("IIQQIIIH2x", InHeader)
OUT_HEADER = Layout("IiQ", OutHeader)

#: A read or write request in one piece: len, opcode, unique, nodeid, fh, offset, size, flags.  The two have the same
#: layout and are what the fast path is for.  Before other requests are looked at, only the first four count.
IO_REQUEST = Struct("=IIQQ16xQQII16x")


def decode_header(message: memoryview) -> tuple[InHeader, memoryview]:
    """The header of one request, and its body without extensions."""
    header = IN_HEADER.decode(message)
    if header.len != len(message):
        raise FuseProtocolError(f"a request of {header.len} bytes arrived with {len(message)}")
    end = header.len - 8 * header.total_extlen
    if end < IN_HEADER.size:
        raise FuseProtocolError("the extensions of a request are longer than the request")
    return header, message[IN_HEADER.size : end]


def encode_reply(unique: int, payload: bytes = b"") -> bytes:
    """A whole answer."""
    return OUT_HEADER.encode(OUT_HEADER.size + len(payload), 0, unique) + payload


def encode_error(unique: int, code: int) -> bytes:
    """The answer to a request that failed with the errno *code*."""
    return OUT_HEADER.encode(OUT_HEADER.size, -code, unique)


# -- requests -----------------------------------------------------------------------------------


class InitIn(NamedTuple):
    major: int
    minor: int
    max_readahead: int
    flags: int  #: an Init, with what was in ``flags2``


class GetattrIn(NamedTuple):
    flags: int
    fh: int


class SetattrIn(NamedTuple):
    valid: int
    fh: int
    size: int
    atime: int
    mtime: int
    atimensec: int
    mtimensec: int
    mode: int
    uid: int
    gid: int


class OpenIn(NamedTuple):
    flags: int
    open_flags: int


class ReadIn(NamedTuple):
    """Also WRITE, with as many bytes of data after it, READDIR and READDIRPLUS."""

    fh: int
    offset: int
    size: int
    rw_flags: int
    lock_owner: int
    flags: int


class ReleaseIn(NamedTuple):
    fh: int
    flags: int
    release_flags: int
    lock_owner: int


class FlushIn(NamedTuple):
    fh: int
    lock_owner: int


class FsyncIn(NamedTuple):
    fh: int
    flags: int


class XattrIn(NamedTuple):
    size: int


class FallocateIn(NamedTuple):
    fh: int
    offset: int
    length: int
    mode: int


class LseekIn(NamedTuple):
    fh: int
    offset: int
    whence: int


class CopyFileRangeIn(NamedTuple):
    fh_in: int
    offset_in: int
    nodeid_out: int
    fh_out: int
    offset_out: int
    length: int
    flags: int


class StatxIn(NamedTuple):
    getattr_flags: int
    fh: int
    sx_flags: int
    sx_mask: int


_INIT_IN = Layout("IIII", InitIn)
_INIT_EXT = Struct("=I44x")
GETATTR_IN = Layout("I4xQ", GetattrIn)
_SETATTR_IN = Layout("I4xQQ8xqq8xII4xI4xII4x", SetattrIn)
OPEN_IN = Layout("II", OpenIn)
READ_IN = Layout("QQIIQI4x", ReadIn, offsets=(1,))
RELEASE_IN = Layout("QIIQ", ReleaseIn)
FLUSH_IN = Layout("Q8xQ", FlushIn)
FSYNC_IN = Layout("QI4x", FsyncIn)
XATTR_IN = Layout("I4x", XattrIn)
FALLOCATE_IN = Layout("QQQI4x", FallocateIn, offsets=(1, 2))
LSEEK_IN = Layout("QQI4x", LseekIn, offsets=(1,))
COPY_FILE_RANGE_IN = Layout("QQQQQQQ", CopyFileRangeIn, offsets=(1, 4, 5))
STATX_IN = Layout("I4xQII", StatxIn)


def decode_init(body: memoryview) -> InitIn:
    """INIT; the second word of flags is there if the first says so."""
    init = _INIT_IN.decode(body)
    if init.flags & Init.INIT_EXT:
        rest = body[_INIT_IN.size :]
        if len(rest) < _INIT_EXT.size:
            raise FuseProtocolError(f"INIT has {len(body)} bytes and says that it is extended")
        init = init._replace(flags=init.flags | _INIT_EXT.unpack_from(rest)[0] << 32)
    return init


def decode_setattr(body: memoryview) -> SetattrIn:
    """SETATTR; fields that do not count may have any value."""
    request = _SETATTR_IN.decode(body)
    if request.valid & Fattr.SIZE and request.size > MAX_OFFSET:
        raise FuseProtocolError(f"size {request.size} is out of range")
    if max(request.atimensec, request.mtimensec) >= 10**9:
        raise FuseProtocolError("a second has 10^9 nanoseconds")
    return request


def decode_write(body: memoryview) -> tuple[ReadIn, memoryview]:
    """WRITE and its data."""
    request = READ_IN.decode(body)
    data = body[READ_IN.size :]
    if request.size != len(data):
        raise FuseProtocolError(f"a write of {request.size} bytes arrived with {len(data)}")
    if request.offset + request.size > MAX_OFFSET:
        raise FuseProtocolError("a write ends beyond the greatest offset")
    return request, data


def decode_name(body: memoryview) -> bytes:
    """A name, NUL at its end, and nothing behind."""
    if not 1 < len(body) <= MAX_NAME + 1:
        raise FuseProtocolError(f"a name of {len(body) - 1} bytes")
    name = bytes(body)
    if name.find(0) != len(name) - 1:
        raise FuseProtocolError("a name does not end where it should")
    return name[:-1]


def decode_getxattr(body: memoryview) -> tuple[int, bytes]:
    """GETXATTR: room for the value (0: only its length is asked for), and the name."""
    return XATTR_IN.decode(body).size, decode_name(body[XATTR_IN.size :])


# -- INIT ---------------------------------------------------------------------------------------


class InitOut(NamedTuple):
    major: int
    minor: int
    max_readahead: int
    flags: int
    max_background: int
    congestion_threshold: int
    max_write: int
    time_gran: int
    max_pages: int
    map_alignment: int
    flags2: int
    max_stack_depth: int


INIT_OUT = Layout("IIIIHHIIHHII24x", InitOut)


class Session(NamedTuple):
    """What both sides agreed on."""

    minor: int
    flags: Init
    max_write: int


def negotiate(init: InitIn, wanted: Init, max_write: int, max_background: int) -> tuple[Session | None, bytes]:
    """What comes of *init*, and the answer to it.

    *max_write* is in bytes, of *wanted* the kernel gets what it offered.  No session comes of a kernel with a later
    major version: it will send another INIT.  FuseProtocolError if the kernel is too old.
    """
    if init.major > MAJOR:
        return None, INIT_OUT.encode(MAJOR, MINOR, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    if (init.major, init.minor) < (MAJOR, OLDEST_MINOR):
        raise FuseProtocolError(
            f"the kernel speaks FUSE protocol {init.major}.{init.minor}, at least {MAJOR}.{OLDEST_MINOR} is needed"
        )
    flags = Init(init.flags & wanted)
    if Init.WRITEBACK_CACHE in flags:
        flags &= ~Init.PASSTHROUGH  # the kernel refuses the two together
    if not flags & Init.MAX_PAGES:
        max_write = min(max_write, _OLD_MAX_WRITE)
    if flags >> 32:
        flags |= Init.INIT_EXT
    answer = INIT_OUT.encode(
        MAJOR,
        min(init.minor, MINOR),
        init.max_readahead,
        flags & 0xFFFFFFFF,
        max_background,
        max_background * 3 // 4,
        max_write,
        1,
        max_write // _PAGE if flags & Init.MAX_PAGES else 0,
        0,
        flags >> 32,
        1 if flags & Init.PASSTHROUGH else 0,
    )
    return Session(min(init.minor, MINOR), flags, max_write), answer


# -- answers ------------------------------------------------------------------------------------

_ATTR = Struct("=QQQqqqIIIIIIIIII")
_ATTR_OUT = Struct("=QI4x")
_ENTRY_OUT = Struct("=QQQQII")
_STATX_OUT = Struct("=QI4x16x IIQIIIH2xQQQQ qI4x qI4x qI4x qI4x IIII112x".replace(" ", ""))
_DIRENT = Struct("=QQII")
_STATFS_OUT = Struct("=QQQQQIII4x24x")
_OPEN_OUT = Struct("=QIi")
_WRITE_OUT = Struct("=I4x")
_U64 = Struct("=Q")

_NO_ENTRY = bytes(_ENTRY_OUT.size + _ATTR.size)
_GIGA = 10**9
_U32 = 0xFFFFFFFF


def _split(seconds: float) -> tuple[int, int]:
    """A timeout as seconds and nanoseconds."""
    fraction, whole = math.modf(seconds)
    return int(whole), int(fraction * _GIGA)


def encode_attr(attr: Attr) -> bytes:
    """struct fuse_attr."""
    atime, atimensec = divmod(attr.atime_ns, _GIGA)
    mtime, mtimensec = divmod(attr.mtime_ns, _GIGA)
    ctime, ctimensec = divmod(attr.ctime_ns, _GIGA)
    return _ATTR.pack(
        attr.ino,
        attr.size,
        attr.blocks,
        atime,
        mtime,
        ctime,
        atimensec,
        mtimensec,
        ctimensec,
        attr.mode,
        attr.nlink,
        attr.uid & _U32,
        attr.gid & _U32,
        0,
        attr.blksize,
        0,
    )


def encode_attr_out(attr: Attr, timeout: float) -> bytes:
    """The answer to GETATTR and SETATTR: the kernel may use *attr* for *timeout* seconds."""
    return _ATTR_OUT.pack(*_split(timeout)) + encode_attr(attr)


def encode_entry_out(attr: Attr, entry_timeout: float, attr_timeout: float) -> bytes:
    """The answer to LOOKUP.  The inode number is the node id, and never used again: so one generation will do."""
    entry_sec, entry_nsec = _split(entry_timeout)
    attr_sec, attr_nsec = _split(attr_timeout)
    return _ENTRY_OUT.pack(attr.ino, 0, entry_sec, attr_sec, entry_nsec, attr_nsec) + encode_attr(attr)


def encode_statx_out(attr: Attr, timeout: float) -> bytes:
    """The answer to STATX: what stat has, and nothing more."""
    atime, atimensec = divmod(attr.atime_ns, _GIGA)
    mtime, mtimensec = divmod(attr.mtime_ns, _GIGA)
    ctime, ctimensec = divmod(attr.ctime_ns, _GIGA)
    return _STATX_OUT.pack(
        *_split(timeout),
        STATX_BASIC,
        attr.blksize,
        0,
        attr.nlink,
        attr.uid & _U32,
        attr.gid & _U32,
        attr.mode,
        attr.ino,
        attr.size,
        attr.blocks,
        0,
        atime,
        atimensec,
        0,
        0,
        ctime,
        ctimensec,
        mtime,
        mtimensec,
        0,
        0,
        0,
        0,
    )


def encode_open_out(fh: int, flags: int, backing_id: int = 0) -> bytes:
    """The answer to OPEN and OPENDIR."""
    return _OPEN_OUT.pack(fh, flags, backing_id)


def encode_write_out(size: int) -> bytes:
    """The answer to WRITE and COPY_FILE_RANGE; also, how long a GETXATTR or LISTXATTR would be."""
    return _WRITE_OUT.pack(size)


def encode_u64(value: int) -> bytes:
    """The answer to LSEEK (an offset) and COPY_FILE_RANGE_64 (a length)."""
    return _U64.pack(value)


def encode_statfs_out(statfs: Statfs) -> bytes:
    """The answer to STATFS."""
    return _STATFS_OUT.pack(
        statfs.blocks,
        statfs.bfree,
        statfs.bavail,
        statfs.files,
        0,
        statfs.bsize,
        statfs.namelen,
        statfs.bsize,
    )


def encode_dirents(entries: Iterable[DirEntry], room: int) -> bytes:
    """The answer to READDIR: of *entries* as many as fit in *room* bytes."""
    return _pack_entries(entries, room, lambda entry: b"")


def encode_direntplus(entries: Iterable[DirEntry], room: int, entry_timeout: float, attr_timeout: float) -> bytes:
    """The answer to READDIRPLUS.  The kernel looks ``.`` and ``..`` up by itself."""

    def lead(entry: DirEntry) -> bytes:
        if entry.name in (b".", b".."):
            return _NO_ENTRY
        return encode_entry_out(entry.attr, entry_timeout, attr_timeout)

    return _pack_entries(entries, room, lead)


def _pack_entries(entries: Iterable[DirEntry], room: int, lead: Callable[[DirEntry], bytes]) -> bytes:
    packed = bytearray()
    for entry in entries:
        name, attr, next_offset = entry
        record = lead(entry) + _DIRENT.pack(attr.ino, next_offset, len(name), attr.mode >> 12) + name
        record += bytes(-len(record) % 8)
        if len(packed) + len(record) > room:
            break
        packed += record
    return bytes(packed)


# -- notifications ------------------------------------------------------------------------------

_INVAL_INODE_OUT = Struct("=Qqq")
_INVAL_ENTRY_OUT = Struct("=QII")
_DELETE_OUT = Struct("=QQI4x")


def encode_notify(code: Notify, payload: bytes) -> bytes:
    """A whole notification."""
    return OUT_HEADER.encode(OUT_HEADER.size + len(payload), code, 0) + payload


def encode_inval_inode(ino: int, offset: int = 0, length: int = 0) -> bytes:
    """Forget attributes, and the pages in a range (length 0: to the end; a negative offset: none)."""
    return encode_notify(Notify.INVAL_INODE, _INVAL_INODE_OUT.pack(ino, offset, length))


def encode_inval_entry(parent: int, name: bytes) -> bytes:
    """Forget what *name* leads to."""
    return encode_notify(Notify.INVAL_ENTRY, _INVAL_ENTRY_OUT.pack(parent, len(name), 0) + name + b"\0")


def encode_delete(parent: int, child: int, name: bytes) -> bytes:
    """*name* is gone."""
    return encode_notify(Notify.DELETE, _DELETE_OUT.pack(parent, child, len(name)) + name + b"\0")


# -- passthrough --------------------------------------------------------------------------------

_BACKING_MAP = Struct("=iI8x")
#: ioctl(2) numbers on /dev/fuse: _IOW(229, 1, struct fuse_backing_map) and _IOW(229, 2, uint32_t)
DEV_IOC_BACKING_OPEN = 1 << 30 | _BACKING_MAP.size << 16 | 229 << 8 | 1
DEV_IOC_BACKING_CLOSE = 1 << 30 | 4 << 16 | 229 << 8 | 2


def encode_backing_map(descriptor: int) -> bytes:
    """The argument of FUSE_DEV_IOC_BACKING_OPEN."""
    return _BACKING_MAP.pack(descriptor, 0)
