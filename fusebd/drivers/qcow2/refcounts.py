"""Refcounts of host clusters: the cache of refcount blocks, allocation, and freeing.

The order of writes rests on two rules.

- A refcount that goes up is in a cached block at once, and all dirty blocks are written before an L2 slice is
  (``fusebd.drivers.qcow2.tables``).  A block may therefore be written at any time: what is in it too early is a leak.
  With lazy refcounts the image is marked as dirty instead, so that the blocks need be written only when it is closed.
- A refcount goes down only when the reference is durably gone.  A cluster that loses a reference is put on a list;
  ``seal`` closes the list when the tables have been written, and ``release`` takes the counts down after the flush
  that follows - and not before all requests have ended that began while the cluster was still referenced, since
  they may be reading or writing it.  Until then nobody can allocate it.

Growing of tables and messages: QEMU block/qcow2-refcount.c.
"""

from __future__ import annotations

import errno
import logging
from array import array
from collections import deque
from dataclasses import dataclass

import trio

from fusebd.drivers.qcow2.image import Epoch, Image, hexadecimal
from fusebd.drivers.qcow2.options import OL_REFCOUNT_BLOCK, OL_REFCOUNT_TABLE
from fusebd.drivers.qcow2.refblock import RefcountWidth
from fusebd.errors import BlockIOError
from fusebd.ondisk import qcow2 as ondisk

log = logging.getLogger(__name__)

#: runs of freed clusters that may wait for a flush
_MOST_WAITING = 4096


class Block:
    """A cached refcount block, entry *index* of the refcount table."""

    __slots__ = ("data", "dirty", "host_offset", "index", "used")

    def __init__(self, index: int, host_offset: int, data: bytearray) -> None:
        self.index, self.host_offset, self.data = index, host_offset, data
        self.dirty = False
        self.used = True


@dataclass(slots=True)
class Freed:
    """Host clusters that have lost one reference each, *discard* saying whether the file is told."""

    first: int
    count: int
    discard: bool


class Refcounts:
    """All methods that suspend need ``Image.lock`` to be held by the caller."""

    def __init__(self, image: Image, max_blocks: int) -> None:
        self.image = image
        self.width = RefcountWidth(image.header.refcount_order)
        self.max_blocks = max_blocks
        self.per_block = image.cluster_size * 8 >> image.header.refcount_order
        self.table: array[int] = array("Q")
        self.table_offset = image.header.refcount_table_offset
        self.blocks: dict[int, Block] = {}
        self.lazy = False  #: the image may be marked as dirty, instead of writing refcounts before the tables
        self.free_hint = 0  #: no cluster below this index is free
        self._free_byte = 0  #: from here to the end of its cluster are bytes for compressed data; 0: there is no such
        #: set when refcounts went up that tables about to be written rely on, until the file was flushed
        self.needs_flush = False
        self._freed: list[Freed] = []
        self._sealed: deque[tuple[Epoch, list[Freed]]] = deque()
        self._epochs: deque[Epoch] = deque()

    async def load(self) -> None:
        """Read the refcount table."""
        image = self.image
        length = image.header.refcount_table_clusters * image.cluster_size
        image.metadata.add(OL_REFCOUNT_TABLE, self.table_offset, length)
        await image.announce("reftable_load")
        try:
            table = array("Q", bytes(await image.read(self.table_offset, length)))
        except BlockIOError as error:
            raise error.prefixed("Could not initialize refcount handling") from None
        table.byteswap()
        self._take(table)

    def adopt(self, order: int, table: array[int]) -> None:
        r"""Go by *table*, which is where the header says now, and by 2**\ *order* bits; all blocks are written."""
        image = self.image
        image.metadata.forget(OL_REFCOUNT_TABLE | OL_REFCOUNT_BLOCK)
        self.blocks.clear()
        self.width = RefcountWidth(order)
        self.per_block = image.cluster_size * 8 >> order
        self.table_offset = image.header.refcount_table_offset
        self.free_hint = self._free_byte = 0
        image.metadata.add(OL_REFCOUNT_TABLE, self.table_offset, len(table) * 8)
        self._take(table)

    def _take(self, table: array[int]) -> None:
        self.table = table
        for entry in filter(None, table):
            if offset := entry & ondisk.REFCOUNT_TABLE_OFFSET_MASK:
                self.image.metadata.add(OL_REFCOUNT_BLOCK, offset, self.image.cluster_size)

    def drop(self) -> None:
        """Let go of all that is cached: the image is closed."""
        self.blocks.clear()
        self.table = array("Q")

    # -- blocks ---------------------------------------------------------------------------------

    def block_offset(self, index: int) -> int:
        """Where refcount block *index* is in the file; 0 if it does not exist."""
        return self.table[index] & ondisk.REFCOUNT_TABLE_OFFSET_MASK if index < len(self.table) else 0

    async def block(self, index: int) -> Block:
        """Refcount block *index*, which exists."""
        block = self.blocks.get(index)
        if block is not None:
            block.used = True
            return block
        image = self.image
        offset = self.block_offset(index)
        if offset & image.cluster_mask:
            raise await image.corrupt(f"Refblock offset {offset:#x} unaligned (reftable index: {hexadecimal(index)})")
        if offset > ondisk.MAX_FILE_OFFSET:
            raise image.error("read refcount block", offset=offset)
        await self._make_room()
        block = Block(index, offset, await image.read(offset, image.cluster_size))
        self.blocks[index] = block
        return block

    async def _make_room(self) -> None:
        """Drop blocks that were not used lately until one more fits."""
        while len(self.blocks) >= self.max_blocks:
            block = next(iter(self.blocks.values()))
            if block.used:
                block.used = False
                self.blocks[block.index] = self.blocks.pop(block.index)
                continue
            if block.dirty:
                await self._write_block(block)
            self.blocks.pop(block.index, None)

    def drop_unused(self) -> None:
        """Drop the blocks that are not dirty and were not used since the last call."""
        for index, block in list(self.blocks.items()):
            if not block.used and not block.dirty:
                del self.blocks[index]
            block.used = False

    async def _write_block(self, block: Block) -> None:
        image = self.image
        await image.check_overlap(block.host_offset, image.cluster_size, OL_REFCOUNT_BLOCK)
        await image.announce("refblock_update_part")
        await image.write(block.host_offset, block.data)
        block.dirty = False
        self.needs_flush = True

    async def write_back(self) -> None:
        """Write all blocks that have changed; they are not durable before the file is flushed."""
        first_error: BlockIOError | None = None
        for block in [block for block in self.blocks.values() if block.dirty]:
            try:
                await self._write_block(block)
            except BlockIOError as error:
                first_error = first_error or error
        if first_error is not None:
            raise first_error

    @property
    def postponed(self) -> bool:
        """Whether refcounts need not be written now: the image says of itself that they are to be made anew."""
        return self.lazy and bool(self.image.header.incompatible_features & ondisk.INCOMPAT_DIRTY)

    async def secure(self) -> None:
        """Make durable what tables that come next rely on: refcounts, or that they are to be made anew."""
        if not self.lazy:
            await self.write_back()
        elif not self.postponed:
            await self.image.set_incompatible(self.image.header.incompatible_features | ondisk.INCOMPAT_DIRTY)
        await self.flush_file()

    async def flush_file(self) -> None:
        """Make everything that was written to the file durable, if tables that come next rely on it."""
        if self.needs_flush:
            self.needs_flush = False
            try:
                await self.image.file.flush()
            except BaseException:
                self.needs_flush = True
                raise

    async def get(self, cluster: int) -> int:
        """The refcount of the host *cluster*."""
        index, at = divmod(cluster, self.per_block)
        if not self.block_offset(index):
            return 0
        return self.width.get((await self.block(index)).data, at)

    async def are_ones(self, first: int, count: int) -> bool:
        """Whether *count* clusters from *first* on have a refcount of one, and that in one block."""
        index, at = divmod(first, self.per_block)
        if at + count > self.per_block or not self.block_offset(index):
            return False
        return self.width.are_ones((await self.block(index)).data, at, at + count)

    # -- allocation -----------------------------------------------------------------------------

    async def allocate(self, count: int, purpose: str = "data cluster") -> int:
        """Take *count* free clusters in a row, refcount 1 each; the host offset of the first.  EFBIG, ENOSPC, EIO.

        *purpose* is for the message if the image is so corrupt that its header seems to be free.
        """
        image = self.image
        await image.announce("cluster_alloc")
        while True:
            first = await self._find_free(count)
            if first == 0:
                if purpose == "data cluster":
                    await image.check_overlap(0, count << image.cluster_bits)
                raise await image.corrupt(f"Preventing invalid allocation of {purpose} at offset 0")
            if await self.cover(first, count):
                break
        try:
            await self._set_ones(first, count)
        except BaseException:
            self.free_hint = min(self.free_hint, first)
            raise
        self.free_hint = first + count
        return first << image.cluster_bits

    def take_from(self, end: int) -> int:
        """One cluster as ``allocate`` gives it, if that is not before byte *end* and takes no I/O; else 0."""
        cluster, image = self.free_hint, self.image
        host_offset = cluster << image.cluster_bits
        index = cluster // self.per_block
        block = self.blocks.get(index)
        at = cluster - index * self.per_block
        if (
            host_offset < end
            or block is None
            or host_offset > ondisk.MAX_CLUSTER_OFFSET
            or cluster in image.metadata.clusters
            or self.width.get(block.data, at)
        ):
            return 0
        self.width.set_ones(block.data, at, at + 1)
        block.dirty = block.used = True
        self.free_hint = cluster + 1
        return host_offset

    async def allocate_bytes(self, size: int) -> int:
        """*size* bytes, at most a cluster, that the clusters have a reference for; their host offset.

        They are next to what was allocated so before, if that leaves room.  Raises as ``allocate`` does.
        """
        image = self.image
        await image.announce("cluster_alloc_bytes")
        offset, bits = self._free_byte, image.cluster_bits
        if offset and await self.get(offset >> bits) == self.width.maximum:
            offset = 0
        left = -offset & image.cluster_mask
        if not offset or left < size:
            new = await self.allocate(1)
            if not offset or offset + left != new:
                offset, left = new, 0
            if offset >= 1 << ondisk.compressed_offset_bits(bits):
                await self.abandon(new, 1)
                raise image.error("allocate", code=errno.EFBIG)
            if left:
                try:
                    await self.update(offset >> bits, 1, 1)
                except BaseException:
                    await self.abandon(new, 1)
                    raise
        else:
            await self.update(offset >> bits, 1, 1)
        end = offset + size
        self._free_byte = end if end & image.cluster_mask else 0
        return offset

    async def abandon_bytes(self, host_offset: int, size: int) -> None:
        """Give back what ``allocate_bytes`` gave, and no table refers to."""
        bits = self.image.cluster_bits
        await self.abandon(host_offset, ((host_offset + size - 1) >> bits) + 1 - (host_offset >> bits))

    async def _find_free(self, count: int) -> int:
        """The first of *count* free clusters in a row, the lowest there are above the hint."""
        per_block, width = self.per_block, self.width
        limit = ondisk.MAX_CLUSTER_OFFSET >> self.image.cluster_bits
        start = position = self.free_hint
        while position - start < count:
            index, at = divmod(position, per_block)
            wanted = min(per_block - at, count - (position - start))
            if self.block_offset(index):
                data = (await self.block(index)).data
                if position == start:
                    at = width.find_zero(data, at)
                    if at < 0:
                        start = position = (index + 1) * per_block
                        continue
                    start = position = index * per_block + at
                    wanted = min(per_block - at, count)
                got = width.count_zeroes(data, at, at + wanted)
                position += got
                if got < wanted:
                    start = position
            else:
                position += wanted
            if position > limit:
                raise self.image.error("allocate", code=errno.EFBIG)
        return start

    async def cover(self, first: int, count: int) -> bool:
        """Whether the clusters have refcount blocks; if not, one block was made, and clusters were used for it."""
        for index in range(first // self.per_block, (first + count - 1) // self.per_block + 1):
            await self.image.announce("refblock_alloc")
            if not self.block_offset(index):
                if index >= len(self.table):
                    await self._grow_table(index)
                else:
                    await self._add_block(index)
                return False
            await self.image.announce("refblock_load")
        return True

    async def _set_ones(self, first: int, count: int) -> None:
        done, end = first, first + count
        try:
            while done < end:
                index, at = divmod(done, self.per_block)
                stop = min(self.per_block, at + end - done)
                block = await self.block(index)
                self.width.set_ones(block.data, at, stop)
                block.dirty = True
                done += stop - at
        except BaseException:
            if done > first:
                with trio.CancelScope(shield=True):
                    await self.update(first, done - first, -1)
            raise

    async def update(self, first: int, count: int, delta: int) -> None:
        """Add *delta* to the refcounts of clusters; all have refcount blocks.

        Raises EINVAL, with nothing changed from the offending cluster on, where a count would leave its range.
        """
        done, end = first, first + count
        while done < end:
            index, at = divmod(done, self.per_block)
            stop = min(self.per_block, at + end - done)
            if not self.block_offset(index):
                raise self.image.error("update refcount", code=errno.EINVAL, offset=done << self.image.cluster_bits)
            block = await self.block(index)
            for position in range(at, stop):
                value = self.width.get(block.data, position) + delta
                if not 0 <= value <= self.width.maximum:
                    raise self.image.error("update refcount", code=errno.EINVAL, offset=done << self.image.cluster_bits)
                self.width.set(block.data, position, value)
                block.dirty = True
                if not value and index * self.per_block + position == self._free_byte >> self.image.cluster_bits:
                    self._free_byte = 0  # others may get that cluster now
                if not value and done < self.free_hint:
                    self.free_hint = done
                done += 1

    # -- refcount blocks and table that grow ----------------------------------------------------

    async def _add_block(self, index: int) -> None:
        """Make refcount block *index*, for which the table has room."""
        image = self.image
        cluster = await self._find_free(1)
        host_offset = cluster << image.cluster_bits
        if host_offset == 0:
            raise await image.corrupt("Preventing invalid allocation of refcount block at offset 0")
        own_index, at = divmod(cluster, self.per_block)
        block = Block(index, host_offset, bytearray(image.cluster_size))
        if own_index == index:
            self.width.set(block.data, at, 1)
        elif await self.cover(cluster, 1):
            await self._set_ones(cluster, 1)
        else:
            return

        async def undo() -> None:
            if own_index != index:
                await self.abandon(host_offset, 1)

        try:
            await self.write_back()
            await image.check_overlap(host_offset, image.cluster_size)
            await image.announce("refblock_alloc_write")
            await image.announce("refblock_update_part")
            await image.write(host_offset, block.data)
            await image.file.flush()
            await image.announce("refblock_alloc_hookup")
        except BaseException:
            await undo()
            raise
        await image.switch(self.table_offset + 8 * index, host_offset.to_bytes(8, "big"), bytes(8), undo, durable=False)
        await self._enter([block])

    async def _enter(self, blocks: list[Block]) -> None:
        """The refcount table refers to new *blocks*; they are written already."""
        for block in blocks:
            self.table[block.index] = block.host_offset
            self.image.metadata.add(OL_REFCOUNT_BLOCK, block.host_offset, self.image.cluster_size)
        self.needs_flush = True
        for block in blocks:
            await self._make_room()
            self.blocks[block.index] = block

    async def _grow_table(self, index: int) -> None:
        """Give the table an entry *index*: no refcount block exists from there on, so all of that space is free.

        A new table, half as long again as is needed, and the blocks that cover it and themselves are put there.
        """
        image = self.image
        await image.announce("refblock_alloc_write")
        await image.announce("reftable_grow")
        first = index * self.per_block
        nb_blocks = 1
        while True:
            entries = index + nb_blocks + (index + nb_blocks + 1) // 2
            table_clusters = -(-entries * 8 // image.cluster_size)
            needed = -(-(nb_blocks + table_clusters) // self.per_block)
            if needed <= nb_blocks:
                break
            nb_blocks = needed
        if table_clusters * image.cluster_size > ondisk.MAX_REFCOUNT_TABLE_BYTES:
            raise image.error("allocate", code=errno.EFBIG)
        host_offset = first << image.cluster_bits
        table_offset = host_offset + (nb_blocks << image.cluster_bits)
        used = nb_blocks + table_clusters
        table = array("Q", bytes(table_clusters * image.cluster_size))
        table[: len(self.table)] = self.table
        blocks = []
        for number in range(nb_blocks):
            data = bytearray(image.cluster_size)
            self.width.set_ones(data, 0, max(0, min(self.per_block, used - number * self.per_block)))
            blocks.append(Block(index + number, host_offset + (number << image.cluster_bits), data))
            table[index + number] = blocks[-1].host_offset
        await image.check_overlap(host_offset, used << image.cluster_bits)
        await image.announce("refblock_alloc_write_blocks")
        for block in blocks:
            await image.announce("refblock_update_part")
            await image.write(block.host_offset, block.data)
        swapped = array("Q", table)
        swapped.byteswap()
        await image.announce("refblock_alloc_write_table")
        await image.write(table_offset, swapped.tobytes())
        await image.file.flush()
        await image.announce("refblock_alloc_switch_table")
        old_offset, old_length = self.table_offset, len(self.table) * 8
        new_fields, old_fields = (
            ondisk.REFCOUNT_TABLE_FIELDS.build({"refcount_table_offset": offset, "refcount_table_clusters": clusters})
            for offset, clusters in ((table_offset, table_clusters), (old_offset, old_length >> image.cluster_bits))
        )

        async def undo() -> None:
            """Nothing counts the new clusters but what is in them."""

        await image.switch(ondisk.REFCOUNT_TABLE_FIELDS_OFFSET, new_fields, old_fields, undo, durable=False)
        self.table, self.table_offset = table, table_offset
        image.header.refcount_table_offset, image.header.refcount_table_clusters = table_offset, table_clusters
        image.metadata.remove(OL_REFCOUNT_TABLE, old_offset, old_length)
        image.metadata.add(OL_REFCOUNT_TABLE, table_offset, table_clusters * image.cluster_size)
        self.free(old_offset, old_length)
        await self._enter(blocks)
        await image.announce("cluster_free")

    # -- freeing --------------------------------------------------------------------------------

    def free(self, host_offset: int, length: int, *, discard: bool = False) -> None:
        """One reference to each cluster that the bytes from *host_offset* on touch is gone from the cached tables.

        *discard*: tell the file about those that nobody references then.
        """
        bits = self.image.cluster_bits
        first = host_offset >> bits
        count = ((host_offset + length - 1) >> bits) + 1 - first
        if self._freed:
            last = self._freed[-1]
            if last.first + last.count == first and last.discard == discard:
                last.count += count
                return
        self._freed.append(Freed(first, count, discard))

    @property
    def crowded(self) -> bool:
        """Whether so much waits to be released that somebody should flush."""
        return len(self._freed) + sum(len(freed) for _, freed in self._sealed) > _MOST_WAITING

    @property
    def waiting(self) -> bool:
        """Whether freed clusters wait for ``seal`` or ``release``."""
        return bool(self._freed or self._sealed)

    def seal(self) -> None:
        """All tables have been written: what was freed so far may be released after the next flush of the file."""
        if self._freed:
            freed, self._freed = self._freed, []
            epoch, self.image.epoch = self.image.epoch, Epoch()
            self._epochs.append(epoch)
            self._sealed.append((epoch, freed))

    def sealed(self) -> int:
        """How many lists are sealed now; what ``release`` wants, if the file is flushed after this call."""
        return len(self._sealed)

    async def release(self, lists: int) -> None:
        """Take down the refcounts of the first *lists* sealed lists, except where requests are still under way.

        An error leaks clusters; it is logged.
        """
        while lists and self._sealed:
            while self._epochs and not self._epochs[0].count:
                self._epochs.popleft()
            epoch, freed = self._sealed[0]
            if epoch in self._epochs:
                return
            while freed:
                try:
                    await self._release(freed[0])
                except BlockIOError as error:
                    log.error("%s: qcow2_free_clusters failed: %s", self.image.node.name, error)
                freed.pop(0)
            self._sealed.popleft()
            lists -= 1

    async def lower(self, first: int, count: int, *, discard: bool) -> None:
        """Take down the refcounts of clusters at once: that nobody refers to them any more is durable already."""
        await self._release(Freed(first, count, discard))

    async def _release(self, item: Freed) -> None:
        """Take down the refcounts of *item*; what of it is done is taken out of it, in case this is cancelled."""
        while item.count:
            # the clusters of one block: ``update`` then suspends only before it changes anything
            first, count = item.first, min(item.count, self.per_block - item.first % self.per_block)
            await self.image.announce("refblock_alloc")
            await self.image.announce("refblock_load")
            await self.update(first, count, -1)
            item.first += count
            item.count -= count
            if item.discard:
                await self._discard(first, count)

    async def _discard(self, first: int, count: int) -> None:
        """Tell the file about those of the clusters that nobody references any more."""
        bits = self.image.cluster_bits
        start = end = first
        for cluster in range(first, first + count + 1):
            if cluster < first + count and not await self.get(cluster):
                end = cluster + 1
                continue
            if start < end:
                try:
                    await self.image.file.pdiscard(start << bits, (end - start) << bits)
                except BlockIOError as error:
                    log.debug("%s: discard of freed clusters: %s", self.image.node.name, error)
            start = end = cluster + 1

    async def abandon(self, host_offset: int, count: int) -> None:
        """Give back *count* clusters that were allocated but never referenced from any table."""
        try:
            with trio.CancelScope(shield=True):
                await self.image.announce("cluster_free")
                await self.update(host_offset >> self.image.cluster_bits, count, -1)
        except BlockIOError as error:
            log.error("%s: qcow2_free_clusters failed: %s", self.image.node.name, error)
