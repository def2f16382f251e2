"""Every exception that fusebd raises on purpose.

The tree says whose fault an error is: the caller's words (OptionError, GraphError, CommandError),
the image's content (ImageError), or a request that could not be carried out (BlockIOError).
Anything else that is raised is a bug of fusebd's own.  Two doors translate these for the outside:
``fusebd.fuse.tree`` into an errno, ``fusebd.qmp.monitor`` into a QMP error class and description.
"""

from __future__ import annotations

import contextlib
import errno as _errno
import os
from collections.abc import Iterator


class FusebdError(Exception):
    """Base of all; ``str()`` is one line that can be shown to the user as it is.

    *errno* is what a file operation that fails for this reason answers; *hint*, if any, is a second line for
    people, which QMP does not carry.
    """

    errno: int = _errno.EINVAL

    def __init__(self, message: str, *, errno: int | None = None, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        if errno is not None:
            self.errno = errno

    def prefixed(self, context: str) -> FusebdError:
        """The same error with *context* before its text: ``Could not open backing file: ...``."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.args = (f"{context}: {self}",)
        return other

    def with_hint_in_line(self) -> str:
        """Text and hint in one line, as the command line shows them."""
        return f"{self} ({self.hint})" if self.hint else str(self)


class OptionError(FusebdError):
    """An option is missing, unknown, or has a value that its declaration does not allow."""


class GraphError(FusebdError):
    """The graph as it stands does not allow what was asked: names, ownership, cycles, use."""


class PermissionConflict(GraphError):
    """Two users of a node exclude each other, here or in another process (image locking)."""

    errno = _errno.EBUSY


class ReadOnlyError(GraphError):
    """Something would have to be written to a node that is read-only."""

    errno = _errno.EROFS


class OpenError(FusebdError):
    """The host refused to open or create a file; *errno* is the host's."""

    @classmethod
    def from_os(cls, what: str, error: OSError) -> OpenError:
        """*what* failed with the host error *error*; QEMU's form ``what: strerror``."""
        code = error.errno or _errno.EIO
        return cls(f"{what}: {os.strerror(code)}", errno=code)


class ImageError(FusebdError):
    """The content of an image is malformed, unsupported or corrupt; the image is at fault."""


class CommandError(FusebdError):
    """A QMP client asked for something that cannot be done; *qmp_class* is QMP's error class."""

    qmp_class = "GenericError"


class CommandNotFound(CommandError):
    qmp_class = "CommandNotFound"


class DeviceNotFound(CommandError):
    qmp_class = "DeviceNotFound"


class UsageError(FusebdError):
    """The command line or the configuration file is wrong."""


class BlockIOError(FusebdError):
    """A request on a node failed with *errno*; nothing is wrong with the request itself.

    *node_name* and *operation* say where it came up first, *offset* is in bytes there; *reason* is the text without
    all that.
    """

    errno = _errno.EIO

    def __init__(
        self,
        errno: int = _errno.EIO,
        *,
        node_name: str = "",
        operation: str = "",
        offset: int = -1,
        reason: str = "",
    ) -> None:
        where = f"{node_name or 'node'}: {operation or 'request'}"
        if offset >= 0:
            where += f" at offset {offset}"
        super().__init__(f"{where}: {reason or os.strerror(errno)}", errno=errno)
        self.node_name, self.operation, self.offset = node_name, operation, offset
        self.reason = reason or os.strerror(errno)

    def prefixed(self, context: str) -> FusebdError:
        """The same error with *context* in place of where it came up."""
        other = super().prefixed(context)
        other.args = (f"{context}: {self.reason}",)
        return other


class NotSupported(BlockIOError):
    """The driver has no way to do this operation; the caller may fall back to another."""

    def __init__(self, *, node_name: str = "", operation: str = "", reason: str = "") -> None:
        super().__init__(_errno.ENOTSUP, node_name=node_name, operation=operation, reason=reason)


class FuseError(FusebdError):
    """The answer to a FUSE request that fails: *errno*, for the kernel."""

    def __init__(self, errno: int) -> None:
        super().__init__(os.strerror(errno), errno=errno)


class FuseProtocolError(FusebdError):
    """What arrived through /dev/fuse is no request of the FUSE protocol that is spoken; the kernel is at fault."""


@contextlib.contextmanager
def single_error() -> Iterator[None]:
    """Raise what a nursery packed into a group of one as itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None
