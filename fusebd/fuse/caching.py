"""How the kernel uses a file that is opened, for each cache mode.

The kernel's rules (fs/fuse/iomode.c, file.c, inode.c of Linux 6.18): the open files of an inode may bypass the page
cache or use it, side by side; those that bypass it write back and drop the pages that they touch.  But all of
them are passed through, or none is.  FUSE_WRITEBACK_CACHE is a property of the mount: whatever is written through the
page cache is written back later then, and the lengths of regular files are the kernel's own, which no answer of the
server changes but that to a SETATTR of the length.  A mount has it or passes files through, not both.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from fusebd.block.cachemode import CacheMode
from fusebd.block.perms import Perm
from fusebd.fuse.entry import Needs


class Access(NamedTuple):
    """How one open file is used.  *cached*: reads, and in mode writeback writes, need not reach the node."""

    mode: CacheMode
    writable: bool
    cached: bool
    keep_cache: bool
    needs: Needs

    @property
    def passed(self) -> bool:
        return self.mode == "passthrough"


def access(
    mode: CacheMode,
    flags: int,
    *,
    kernel_lengths: bool = False,
    cache_in_use: bool = False,
    unaligned_end: bool = False,
) -> Access:
    """What an open(2) with *flags* comes to for a file in *mode*.

    *kernel_lengths*: the mount has FUSE_WRITEBACK_CACHE.  *cache_in_use*: the file is open through the page cache
    already, so that what is in there is watched over; otherwise nothing says that it is still right.
    *unaligned_end*: what is written to the last block may reach past the end.
    """
    writable = flags & os.O_ACCMODE != os.O_RDONLY
    cached = mode in ("page", "writeback") and not flags & os.O_DIRECT
    if mode == "page" and writable and kernel_lengths:
        cached = False  # the page cache of this mount would keep what is written
    perm, shared = Perm.CONSISTENT_READ, Perm.ALL
    if writable:
        perm |= Perm.WRITE
        # Past the end, the kernel writes into the host's file without asking.
        if unaligned_end or mode == "passthrough":
            perm |= Perm.RESIZE
    if kernel_lengths:
        shared &= ~Perm.RESIZE
    if cached and writable and mode == "writeback":
        shared &= ~Perm.WRITE
    return Access(mode, writable, cached, cached and cache_in_use, Needs(perm, shared))
