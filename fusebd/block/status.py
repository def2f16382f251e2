"""What a range of a node consists of: the answer of block status queries.

The flags and their meaning are QEMU's (include/block/block-common.h, BDRV_BLOCK_*).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusebd.block.node import Node


class Status(IntFlag):
    NONE = 0
    DATA = 1  #: the range may hold data that is not zero
    ZERO = 2  #: the range reads as zeroes
    OFFSET_VALID = 4  #: ``host_offset`` says where in ``file`` the bytes are, as they are
    RAW = 8  #: ask the node in ``file`` again: the driver itself knows nothing
    ALLOCATED = 16  #: this layer, not one below, decides the content
    EOF = 32  #: the range ends at the end of the node
    RECURSE = 64  #: ``file`` may know better whether DATA is zeroes (metadata preallocation)
    COMPRESSED = 128  #: stored compressed


@dataclass(frozen=True, slots=True)
class BlockStatus:
    """*flags* hold for *length* bytes (more than 0, except past the end of the node)."""

    flags: Status
    length: int
    host_offset: int = 0
    file: Node | None = None
