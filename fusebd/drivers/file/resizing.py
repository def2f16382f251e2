"""Changing the length of a regular file, with or without disk space for what is new.

Behaviour and messages: QEMU raw_regular_truncate, handle_aiocb_truncate (block/file-posix.c).
"""

from __future__ import annotations

import errno
import logging
import os

from fusebd.block.driver import Preallocation
from fusebd.errors import BlockIOError

log = logging.getLogger(__name__)

_ZEROES = bytes(1 << 20)


def resize_file(fd: int, length: int, prealloc: Preallocation, node_name: str = "") -> None:
    """Give the file *fd* *length* bytes; with *prealloc* falloc or full, new ones have their place on the disk.

    Raises BlockIOError; the length is then the old one.  Takes as long as the host does.
    """
    before = os.fstat(fd).st_size
    if prealloc != "off" and length < before:
        raise _refused(node_name, "Cannot use preallocation for shrinking files", errno.ENOTSUP)
    if prealloc == "metadata":
        raise _refused(node_name, "Unsupported preallocation mode: metadata", errno.ENOTSUP)
    doing = "resize file"
    try:
        if prealloc == "falloc":
            doing = "preallocate new data"
            if length > before:
                os.posix_fallocate(fd, before, length - before)
        else:
            os.ftruncate(fd, length)
        if prealloc == "full":
            doing = "write zeros for preallocation"
            for at in range(before, length, len(_ZEROES)):
                _write_zeroes(fd, at, min(len(_ZEROES), length - at))
            doing = "flush file to disk"
            os.fsync(fd)
    except (OSError, OverflowError) as error:
        code = (error.errno or errno.EIO) if isinstance(error, OSError) else errno.EINVAL
        if prealloc != "off":
            _restore(fd, before)
        raise _refused(node_name, f"Could not {doing}: {os.strerror(code)}", code) from None


def _write_zeroes(fd: int, offset: int, length: int) -> None:
    done = 0
    while done < length:
        done += os.pwrite(fd, memoryview(_ZEROES)[done:length], offset + done)


def _restore(fd: int, length: int) -> None:
    try:
        os.ftruncate(fd, length)
    except OSError as error:
        log.error("Failed to restore old file length: %s", os.strerror(error.errno or errno.EIO))


def _refused(node_name: str, reason: str, code: int) -> BlockIOError:
    return BlockIOError(code, node_name=node_name, operation="resize", reason=reason)
