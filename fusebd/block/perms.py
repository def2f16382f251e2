"""Permissions and roles of the edges of the graph.

What the four permissions and the five roles mean, and which permissions an edge of a role takes
and shares by default, is QEMU's: include/block/block-common.h and the bdrv_default_perms family
in block.c.
"""

from __future__ import annotations

from enum import IntFlag


class Perm(IntFlag):
    """What the user of a node needs (taken) or lets others do (shared).

    The values are also the byte offsets' indices of the image locks that QEMU takes on a host file.
    """

    NONE = 0
    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8
    ALL = 15


class Role(IntFlag):
    """What a child is for its parent; several can hold at once."""

    DATA = 1
    METADATA = 2
    FILTERED = 4
    COW = 8
    PRIMARY = 16
    #: what a format's ``file`` child is when it has no external data file
    IMAGE = DATA | METADATA | PRIMARY


_NAMES = (
    (Perm.CONSISTENT_READ, "consistent read"),
    (Perm.WRITE, "write"),
    (Perm.WRITE_UNCHANGED, "write unchanged"),
    (Perm.RESIZE, "resize"),
)


def perm_names(perm: Perm) -> str:
    """The permissions in *perm* as QEMU's messages list them."""
    return ", ".join(name for bit, name in _NAMES if perm & bit)


def default_perms(role: Role, perm: Perm, shared: Perm, *, writable: bool) -> tuple[Perm, Perm]:
    """Permissions (taken, shared) on a child in *role*.

    *perm* and *shared* are what the parents of the node take and share, all together; *writable*
    says whether the node itself is.
    """
    if role & Role.FILTERED:
        return perm, shared
    if role & Role.COW:
        cow_shared = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        if shared & Perm.WRITE:
            cow_shared |= Perm.WRITE | Perm.RESIZE
        return perm & Perm.CONSISTENT_READ, cow_shared
    if role & Role.METADATA:
        if writable:
            perm |= Perm.WRITE | Perm.RESIZE
        perm |= Perm.CONSISTENT_READ
        shared &= ~(Perm.WRITE | Perm.RESIZE)
    if role & Role.DATA:
        shared &= ~Perm.RESIZE
        if perm & Perm.WRITE_UNCHANGED:
            perm |= Perm.WRITE
        if perm & Perm.WRITE:
            perm |= Perm.RESIZE
    return perm, shared
