"""Files that the kernel reads, writes and maps by itself, instead of asking the server (FUSE passthrough).

Specification: include/uapi/linux/fuse.h (FUSE_DEV_IOC_BACKING_OPEN),
Documentation/filesystems/fuse/fuse-passthrough.rst.
"""

from __future__ import annotations

import contextlib
import fcntl
import sys

from fusebd.fuse import wire


class Backings:
    """The files that the kernel was given to read and write instead of asking us.

    All who have an inode open at the same time must share one (the kernel answers EBUSY otherwise).
    """

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor
        self._ids: dict[int, int] = {}
        self._inodes: dict[int, int] = {}

    def try_one(self, backing_fd: int) -> None:
        """Raise OSError if the kernel does not take *backing_fd*."""
        self._close(self._open(backing_fd))

    def _open(self, backing_fd: int) -> int:
        asked = bytearray(wire.encode_backing_map(backing_fd))  # only for what it can change ioctl() returns a number
        backing_id: int = fcntl.ioctl(self._fd, wire.DEV_IOC_BACKING_OPEN, asked)
        return backing_id

    def _close(self, backing_id: int) -> None:
        fcntl.ioctl(self._fd, wire.DEV_IOC_BACKING_CLOSE, backing_id.to_bytes(4, sys.byteorder))

    def take(self, ino: int, fh: int, backing_fd: int) -> int:
        """The id for *fh*, an open of *ino*; *backing_fd* becomes it if there is none yet.  Raises OSError."""
        if ino not in self._ids:
            self._ids[ino] = self._open(backing_fd)
        self._inodes[fh] = ino
        return self._ids[ino]

    def give_back(self, fh: int) -> None:
        """*fh* is closed; with the last one of an inode the kernel lets go of the file."""
        ino = self._inodes.pop(fh, None)
        if ino is not None and ino not in self._inodes.values():
            with contextlib.suppress(OSError):  # the connection is gone, and with it the file
                self._close(self._ids.pop(ino))
