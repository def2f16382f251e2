"""compress: every write that comes this way is stored compressed by the format below.

Requests are made whole clusters by the edge above: what is around a shorter write is read, and written with it.  As
in QEMU, what has been written before cannot be again, but in whole clusters that were discarded or zeroed.

Options: QAPI BlockdevOptionsGenericFormat.  Behaviour: QEMU block/filter-compress.c.
"""

from __future__ import annotations

import errno
from typing import Annotated

from msgspec import Meta

from fusebd.block.driver import COMPRESSED, Buffers, Child, FilterDriver, Node, register
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef
from fusebd.block.perms import Role
from fusebd.errors import GraphError


class CompressOptions(BlockdevOptions, frozen=True, kw_only=True):
    file: Annotated[BlockdevRef, Meta(description="the node whose format compresses")]


@register("compress", CompressOptions)
class Compress(FilterDriver):
    """Reads, zero writes and discards pass as they are."""

    def __init__(self, node: Node, file: Child) -> None:
        super().__init__(node, file)
        self.limits.request_alignment = _cluster_size(file.node) or 1

    @classmethod
    async def open(cls, opening: Opening, options: CompressOptions) -> Compress:
        file = await opening.child("file", options.file, Role.FILTERED | Role.PRIMARY)
        if not file.driver.can_compress:
            raise GraphError(
                f"Compression is not supported for underlying format: {file.node.driver_name}", errno=errno.ENOTSUP
            )
        return cls(opening.node, file)

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        await self.file.pwritev(offset, bufs, flags | COMPRESSED)


def _cluster_size(node: Node) -> int:
    """The cluster size of *node*, or of the first node below filters that has one, in bytes; 0 if none has."""
    while node.driver.is_filter and node.primary_child is not None:
        node = node.primary_child.node
    size: int = node.driver.format_info().get("cluster-size", 0)
    return size
