"""Block status of a whole chain: what a range of a node reads as, and which layer decides it.

A driver's ``block_status`` knows its own layer.  Here its answer is completed: drivers that only pass on are looked
through, ranges that no layer has are traced down the backing chain, zeroes are found where the file below has a hole
or a backing file is too short.

Behaviour: QEMU bdrv_co_do_block_status and bdrv_co_common_block_status_above (block/io.c).
"""

from __future__ import annotations

from fusebd.block.node import Node
from fusebd.block.status import BlockStatus, Status
from fusebd.errors import BlockIOError

_KNOWN = Status.DATA | Status.ZERO


def below(node: Node) -> Node | None:
    """The node whose content shows through where *node* itself has none: what it filters, or its backing node."""
    edge = node.primary_child if node.driver.is_filter else node.backing
    return edge.node if edge is not None else None


async def block_status(node: Node, offset: int, length: int) -> BlockStatus:
    """What the *length* bytes from *offset* on are in the layer of *node*.

    The answer is for a prefix of the range that is all of one kind.  It has EOF if that reaches the end of the node;
    from the end on, it has EOF alone and no length.  Without ALLOCATED, a layer below decides.  Suspends where the
    drivers do.  Raises BlockIOError.
    """
    driver = node.driver
    total = driver.length
    if offset >= total:
        return BlockStatus(Status.EOF, 0)
    length = min(length, total - offset)
    if length <= 0:
        return BlockStatus(Status.NONE, 0)
    mask = driver.limits.request_alignment - 1
    start = offset & ~mask
    answer = await driver.block_status(start, ((offset + length + mask) & ~mask) - start)
    skipped = offset - start
    length = min(answer.length - skipped, length)
    if length <= 0:
        raise BlockIOError(node_name=node.name, operation="block status", offset=offset, reason="no progress")
    flags, file = answer.flags, answer.file
    host_offset = answer.host_offset + skipped if flags & Status.OFFSET_VALID else 0
    if flags & Status.RAW and file is not None:
        answer = await block_status(file, host_offset, length)
        if not answer.length:  # what this node has beyond the end of the file reads as zeroes
            answer = BlockStatus(Status.ZERO | Status.ALLOCATED, length)
        flags, length, host_offset, file = answer.flags & ~Status.EOF, answer.length, answer.host_offset, answer.file
    elif flags & _KNOWN:
        flags |= Status.ALLOCATED
        flags, length = await _look_below(node, flags, length, host_offset, file)
    elif not flags & Status.ALLOCATED:
        backing = node.backing
        if backing is None or offset >= backing.node.driver.length:
            flags |= Status.ZERO
    if offset + length == total:
        flags |= Status.EOF
    return BlockStatus(flags, length, host_offset, file)


async def _look_below(
    node: Node, flags: Status, length: int, host_offset: int, file: Node | None
) -> tuple[Status, int]:
    """Data of *node* may be in a hole of *file*, if the driver says that this can be (RECURSE)."""
    recurse = flags & Status.RECURSE and flags & Status.OFFSET_VALID and not flags & Status.ZERO
    flags &= ~Status.RECURSE
    if not recurse or file is None or file is node:
        return flags, length
    try:
        answer = await block_status(file, host_offset, length)
    except BlockIOError:
        return flags, length  # that these are zeroes would have been good to know, no more
    if answer.flags & Status.EOF and (not answer.length or answer.flags & Status.ZERO):
        return flags | Status.ZERO, length
    return flags | answer.flags & Status.ZERO, answer.length


async def block_status_above(
    node: Node, offset: int, length: int, *, base: Node | None = None, include_base: bool = False
) -> BlockStatus:
    """What the *length* bytes from *offset* on read as, with all layers from *node* down to before *base*.

    *base* None means the whole chain; with *include_base* its layer counts too.  The answer is for a prefix of the
    range, never an empty one before the end of *node*; EOF as in ``block_status``.  Suspends where the drivers do.
    Raises BlockIOError.
    """
    if node is base and not include_base:
        return BlockStatus(Status.NONE, length)
    top = answer = await block_status(node, offset, length)
    layer = node
    while answer.length and not answer.flags & Status.ALLOCATED and layer is not base:
        lower = below(layer)
        if lower is None or (lower is base and not include_base):
            break
        length, layer = answer.length, lower
        answer = await block_status(lower, offset, length)
        if not answer.length:
            # A layer that ends here reads as zeroes, as if they were allocated in it.
            answer = BlockStatus(Status.ZERO | Status.ALLOCATED, length, 0, lower)
    if answer is top:
        return answer
    flags = answer.flags & ~Status.EOF
    if top.flags & Status.EOF and answer.length == top.length:
        flags |= Status.EOF
    return BlockStatus(flags, answer.length, answer.host_offset, answer.file)
