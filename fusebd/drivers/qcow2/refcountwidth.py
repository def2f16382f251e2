"""Refcounts of another width: the whole structure made anew, and the header then changed in one write.

The new table and blocks lie behind everything that is counted, where the old structure has free clusters and the new
one knows about itself alone.  So a crash at any moment leaves one of the two, each of which is right.

Limits and messages: QEMU qcow2_change_refcount_order (block/qcow2-refcount.c).
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Awaitable, Callable

import trio

from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.refblock import RefcountWidth
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.drivers.qcow2.references import to_big_endian
from fusebd.errors import BlockIOError, CommandError
from fusebd.ondisk import qcow2 as ondisk


async def change_width(
    image: Image, refcounts: Refcounts, order: int, write_header: Callable[[dict[str, int]], Awaitable[None]]
) -> None:
    """Have refcounts of 2**\\ *order* bits; *write_header* writes the header with changes of its fields, durably.

    The caller holds ``Image.lock``, no request is under way, and nothing is cached that was not written.  Suspends
    while blocks are read and written.  Raises CommandError, BlockIOError; nothing has changed then.
    """
    width = RefcountWidth(order)
    per_block = image.cluster_size * 8 >> order
    old = _own_clusters(image, refcounts)
    needed, end = await _needed_blocks(image, refcounts, width, without=old)
    table_clusters, indices = _layout(image, needed, end, per_block)
    table = array("Q", bytes(table_clusters * image.cluster_size))
    used = range(end, end + table_clusters + len(indices))
    for number, index in enumerate(indices):
        place = end + table_clusters + number
        await _write_block(image, refcounts, width, index, place, used=used, without=old)
        table[index] = place << image.cluster_bits
    offset = end << image.cluster_bits
    await image.write(offset, to_big_endian(table))
    await image.file.flush()
    try:
        await write_header(
            {"refcount_table_offset": offset, "refcount_table_clusters": table_clusters, "refcount_order": order}
        )
    except BaseException:
        with trio.CancelScope(shield=True):
            if await _named_table(image) != refcounts.table_offset:
                image.give_up()
        raise
    refcounts.adopt(order, table)


async def _named_table(image: Image) -> int:
    """Where the file's header says that the refcount table is; -1 if it cannot be read."""
    try:
        data = await image.read(0, ondisk.HEADER_FULL_LENGTH)
    except BlockIOError:
        return -1
    return int(ondisk.parse_header(bytes(data))["refcount_table_offset"])


def _own_clusters(image: Image, refcounts: Refcounts) -> set[int]:
    """The clusters of the refcount table and its blocks."""
    bits = image.cluster_bits
    first = refcounts.table_offset >> bits
    table = range(first, first + (len(refcounts.table) * 8 >> bits))
    blocks = (refcounts.block_offset(index) >> bits for index in range(len(refcounts.table)))
    return {*table, *blocks} - {0}


async def _needed_blocks(
    image: Image, refcounts: Refcounts, width: RefcountWidth, *, without: set[int]
) -> tuple[set[int], int]:
    """Which blocks of *width* there have to be for what is counted, and the first cluster behind all of that.

    The clusters *without* will not be counted any more.  Raises CommandError where *width* is too small.
    """
    per_block = image.cluster_size * 8 >> width.order
    needed: set[int] = set()
    end = -(-image.file.node.driver.length >> image.cluster_bits)
    for index in range(len(refcounts.table)):
        if not refcounts.block_offset(index):
            continue
        data = (await refcounts.block(index)).data
        for cluster in range(index * refcounts.per_block, (index + 1) * refcounts.per_block):
            value = refcounts.width.get(data, cluster % refcounts.per_block)
            if not value:
                continue
            end = max(end, cluster + 1)
            if value > width.maximum and cluster not in without:
                raise CommandError(
                    f"Cannot decrease refcount entry width to {width.bits} bits: Cluster at offset "
                    f"{cluster << image.cluster_bits:#x} has a refcount of {value}",
                    errno=errno.EINVAL,
                )
            if cluster not in without:
                needed.add(cluster // per_block)
        await trio.lowlevel.checkpoint()
    return needed, end


def _layout(image: Image, needed: set[int], first: int, per_block: int) -> tuple[int, list[int]]:
    """The clusters of the table, and which blocks there have to be: those *needed*, and those that count the new ones.

    *first* is the first of the new clusters.  Raises CommandError.
    """
    table_clusters = 1
    indices: list[int] = []
    while True:
        end = first + table_clusters + len(indices)
        found = sorted(needed | set(range(first // per_block, (end - 1) // per_block + 1)))
        clusters = -(-(found[-1] + 1) * 8 // image.cluster_size)
        if (clusters, len(found)) == (table_clusters, len(indices)):
            break
        table_clusters, indices = clusters, found
    if table_clusters * image.cluster_size > ondisk.MAX_REFCOUNT_TABLE_BYTES:
        raise CommandError("The refcount table would be too large", errno=errno.EFBIG)
    return table_clusters, indices


async def _write_block(
    image: Image, refcounts: Refcounts, width: RefcountWidth, index: int, place: int, *, used: range, without: set[int]
) -> None:
    """Write the new block *index* to cluster *place*: counts as before, one for those *used*, none for *without*."""
    per_block = image.cluster_size * 8 >> width.order
    first, end = index * per_block, (index + 1) * per_block
    data = bytearray(image.cluster_size)
    cluster = first
    while cluster < end:
        old_index, at = divmod(cluster, refcounts.per_block)
        stop = min(end, (old_index + 1) * refcounts.per_block)
        if refcounts.block_offset(old_index):
            block = await refcounts.block(old_index)
            for number in range(cluster, stop):
                value = refcounts.width.get(block.data, at + number - cluster)
                if value and number not in without:
                    width.set(data, number - first, value)
        cluster = stop
    for number in range(max(first, used.start), min(end, used.stop)):
        width.set(data, number - first, 1)
    await image.check_overlap(place << image.cluster_bits, image.cluster_size)
    await image.write(place << image.cluster_bits, data)
    await trio.lowlevel.checkpoint()
