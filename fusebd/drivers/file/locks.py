"""Image locks: permissions on a host file, agreed between processes by locks on single bytes of it.

A process that takes a permission holds a shared lock on byte 100 + its number; one that does not share it, on byte
200 + its number.  A conflict is a lock of somebody else on the opposite byte.  The same bytes as QEMU's
(docs/system/images.rst, block/file-posix.c), so that both respect each other.
"""

from __future__ import annotations

import os

from fusebd.block.perms import Perm, perm_names
from fusebd.drivers.file import syscalls
from fusebd.errors import OpenError, PermissionConflict

_TAKEN_BASE = 100
_UNSHARED_BASE = 200
_ALL = tuple(perm for perm in Perm if perm)


class ImageLocks:
    """The locks that one open file description holds."""

    def __init__(self, fd: int, filename: str) -> None:
        self._fd = fd
        self._filename = filename
        self._held: set[int] = set()

    def hold(self, perm: Perm, shared: Perm) -> None:
        """Hold exactly the locks for taking *perm* and sharing *shared*.

        Raises PermissionConflict if another process is in the way; the locks held before are held still.
        """
        wanted = {_TAKEN_BASE + n for n, p in enumerate(_ALL) if perm & p}
        wanted |= {_UNSHARED_BASE + n for n, p in enumerate(_ALL) if not shared & p}
        added = wanted - self._held
        try:
            for byte in sorted(added):
                syscalls.share_lock(self._fd, byte)
            self._check(perm, shared)
        except OSError as error:
            self._drop(added)
            raise OpenError(f"Failed to lock byte: {os.strerror(error.errno or 0)}", errno=error.errno) from None
        except PermissionConflict:
            self._drop(added)
            raise
        self._drop(self._held - wanted)
        self._held = wanted

    def copy(self, other: ImageLocks) -> None:
        """Hold what *other* holds, which is a description of the same file.  Nobody is asked: *other* has done so.

        Raises OpenError.
        """
        try:
            for byte in sorted(other._held):
                syscalls.share_lock(self._fd, byte)
        except OSError as error:
            raise OpenError(f"Failed to lock byte: {os.strerror(error.errno or 0)}", errno=error.errno) from None
        self._held = set(other._held)

    def _check(self, perm: Perm, shared: Perm) -> None:
        for number, bit in enumerate(_ALL):
            if perm & bit and syscalls.is_locked_elsewhere(self._fd, _UNSHARED_BASE + number):
                raise self._conflict(f'Failed to get "{perm_names(bit)}" lock')
        for number, bit in enumerate(_ALL):
            if not shared & bit and syscalls.is_locked_elsewhere(self._fd, _TAKEN_BASE + number):
                raise self._conflict(f'Failed to get shared "{perm_names(bit)}" lock')

    def _conflict(self, message: str) -> PermissionConflict:
        return PermissionConflict(message, hint=f"Is another process using the image [{self._filename}]?")

    def _drop(self, locks: set[int]) -> None:
        for byte in locks:
            syscalls.unlock(self._fd, byte)
