"""A file with the process id in it: locked as long as the process lives, and removed at its end.

Behaviour and messages: QEMU qemu_write_pidfile (util/oslib-posix.c).
"""

from __future__ import annotations

import contextlib
import fcntl
import os

from fusebd.errors import OpenError

_FAILURE = "cannot create PID file"


class PidFile:
    """The file *path*, which is there and locked when this returns.  Raises OpenError."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._descriptor = _locked(path)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, b"%d\n" % os.getpid(), 0)

    def remove(self) -> None:
        """Remove the file, and give up the lock."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        os.close(self._descriptor)


def _locked(path: str) -> int:
    """A descriptor of the file that *path* names, with the lock."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise OpenError.from_os(f"{_FAILURE}: Could not create '{path}'", error) from None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
            os.close(descriptor)  # whoever had it removed it between the two calls
        except FileNotFoundError:
            os.close(descriptor)
        except OSError as error:
            os.close(descriptor)
            raise OpenError.from_os(f"{_FAILURE}: Cannot lock pid file", error) from None
