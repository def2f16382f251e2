"""System calls on a descriptor that Python's os module does not have.

fallocate(2), fcntl(2) with open file description locks, and the ioctls of linux/fs.h for block devices and new files.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16

_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F
_BLKROGET = 0x125E
_BLKSSZGET = 0x1268
_BLKGETSIZE64 = 0x80081272
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x0080_0000
_FS_IOC_FSGETXATTR = 0x801C581F
_FS_IOC_FSSETXATTR = 0x401C5820
_FS_XFLAG_EXTSIZE = 0x0800
#: struct fsxattr: flags, extent size hint, number of extents, project, hint for copy on write, padding
_FSXATTR = "IIIII8x"

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

# struct flock with 64-bit offsets: l_type, l_whence, l_start, l_len, l_pid (0 for description locks)
_FLOCK = "hhqqi4x"


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); raises OSError.  Interrupted calls are made again."""
    while _fallocate(fd, mode, offset, length):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def share_lock(fd: int, byte: int) -> None:
    """Take a shared lock of the open file description on one byte; raises OSError (EAGAIN: taken exclusively)."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))


def unlock(fd: int, byte: int) -> None:
    """Give up the lock on one byte."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))


def is_locked_elsewhere(fd: int, byte: int) -> bool:
    """Whether another open file description holds any lock on the byte."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    kind: int = struct.unpack(_FLOCK, answer)[0]
    return kind != fcntl.F_UNLCK


def device_length(fd: int) -> int:
    """The length of a block device in bytes."""
    length: int = struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
    return length


def device_sector_size(fd: int) -> int:
    """The logical sector size of a block device in bytes: the alignment of direct I/O."""
    size: int = struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0]
    return size


def device_is_read_only(fd: int) -> bool:
    """Whether a block device cannot be written, though it may have been opened for writing."""
    read_only: int = struct.unpack("i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))[0]
    return bool(read_only)


def device_discard(fd: int, offset: int, length: int) -> None:
    """BLKDISCARD: let the device forget the range."""
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("QQ", offset, length))


def device_write_zeroes(fd: int, offset: int, length: int) -> None:
    """BLKZEROOUT: have the device zero the range."""
    fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("QQ", offset, length))


def set_nocow(fd: int) -> None:
    """Have the filesystem write an empty file's data in place; raises OSError where it knows no other way."""
    flags: int = struct.unpack("i", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(4)))[0]
    fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("i", flags | _FS_NOCOW_FL))


def set_extent_size_hint(fd: int, size: int) -> None:
    """Have the filesystem allocate an empty file in pieces of *size* bytes; raises OSError where it cannot."""
    flags, _, *rest = struct.unpack(_FSXATTR, fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(struct.calcsize(_FSXATTR))))
    fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, struct.pack(_FSXATTR, flags | _FS_XFLAG_EXTSIZE, size, *rest))
