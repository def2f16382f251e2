"""A file being reopened: read-only or not, directly or through the page cache, take a new descriptor.

The image locks must not be let go of meanwhile.  They belong to the open file description, so that those of the old
one are in the way of no others, but count as somebody else's for the new one.  So it is the old one that asks for what
locks are needed then; the new one takes the same, which conflict with nothing, before the old one is closed.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from fusebd.block.reopening import Reopening
from fusebd.drivers.file.direct import DirectIO
from fusebd.drivers.file.locks import ImageLocks
from fusebd.errors import OpenError

if TYPE_CHECKING:
    from fusebd.drivers.file.driver import File

#: errors of opening for writing that opening for reading need not have
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY)


class Handle(NamedTuple):
    """What a file is used by: a descriptor, the image locks that this holds, and direct I/O if it has to be direct."""

    fd: int
    locks: ImageLocks | None
    direct: DirectIO | None

    @property
    def alignment(self) -> int:
        """What requests have to be aligned to, in bytes."""
        return 1 if self.direct is None else self.direct.alignment

    def close(self) -> None:
        if self.direct is not None:
            self.direct.close()
        os.close(self.fd)


class FileReopening(Reopening):
    """Has a new descriptor where the old one will not do."""

    driver: File
    _after: Handle | None = None
    _before: Handle | None = None

    def prepare(self) -> None:
        if self._differs and not self.read_only:
            try:
                self._after = self.driver.open_again(writable=True, direct=self.inherited.cache_direct)
            except OpenError as error:
                if error.errno not in NOT_WRITABLE or not self.inherited.auto_read_only:
                    raise
                self.read_only = True
        if self._differs and self.read_only:
            self._after = self.driver.open_again(writable=False, direct=self.inherited.cache_direct)
        self.changes_descriptor = self._after is not None

    @property
    def _differs(self) -> bool:
        node = self.node
        return (self.read_only, self.inherited.cache_direct) != (node.read_only, node.cache_direct)

    def apply(self) -> None:
        if self._after is not None:
            self.driver.limits.request_alignment = self._after.alignment

    def take_over(self) -> None:
        if self._after is not None:
            before = self.driver.handle
            if self._after.locks is not None and before.locks is not None:
                self._after.locks.copy(before.locks)
            self.driver.use(self._after)
            self._before = before
        self.driver.refresh_length()

    def commit(self) -> None:
        if self._before is not None:
            self._before.close()

    def undo(self) -> None:
        if self._after is None:
            return
        taken_over = self._before is not None
        if self._before is not None:
            self.driver.use(self._before)
        self.driver.limits.request_alignment = self.driver.handle.alignment
        self._after.close()
        if taken_over:
            # somebody may have come meanwhile, and the new description alone heard of it
            self.driver.set_perm(self.node.perm, self.node.shared)
