"""blklogwrites: log every write, zero write, discard and flush, with its data, in the order in which they ended.

The log is a dm-log-writes log (``fusebd.ondisk.logwrites``): what it has can be replayed up to any entry onto a copy of
the image as it was before.  The data goes to ``file`` first, and is logged when that has returned, also if it failed:
nobody knows then what has been written.  Entries are written one at a time, so that all that the superblock counts are
whole.  If an entry cannot be written the request fails, and the next entry takes its place.

The superblock is rewritten, and the log flushed, after flushes, marks and writes with FUA, and after every
``log-super-update-interval``-th entry.  Later entries are lost if the daemon is killed.

Options: QAPI BlockdevOptionsBlklogwrites.  Behaviour: QEMU block/blklogwrites.c, which writes neither marks nor FUA.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, ClassVar

import trio
from msgspec import UNSET, Meta, UnsetType

from fusebd.block.driver import FUA, Buffers, Child, FilterDriver, Node, driver_command, nbytes, register
from fusebd.block.mutex import Mutex
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef, OptionStruct, Uint32, Uint64
from fusebd.block.perms import Perm, Role
from fusebd.block.root import UNNAMED
from fusebd.errors import BlockIOError, ImageError, NotSupported, OptionError, ReadOnlyError
from fusebd.ondisk import logwrites as ondisk

#: an existing log's entries are read in turns of so many, in between of which others have theirs
_ENTRIES_PER_TURN = 256


class BlklogwritesOptions(BlockdevOptions, frozen=True, kw_only=True):
    file: Annotated[BlockdevRef, Meta(description="the node that requests go to")]
    log: Annotated[BlockdevRef, Meta(description="the node that the log is written to")]
    log_sector_size: Annotated[
        Uint32 | UnsetType, Meta(description="unit of the log and of requests in bytes, a power of two; 512 if absent")
    ] = UNSET
    log_append: Annotated[bool | UnsetType, Meta(description="add to the log that is there; off if absent")] = UNSET
    log_super_update_interval: Annotated[
        Uint64, Meta(description="after how many entries the superblock is rewritten at the latest")
    ] = 4096


class MarkOptions(OptionStruct, frozen=True, kw_only=True):
    """A mark to set in the log."""

    mark: Annotated[str, Meta(description="text to find it by")]


@register("blklogwrites", BlklogwritesOptions)
class Blklogwrites(FilterDriver):
    """Requests suspend where either child does, and where an entry has to wait for another to be written."""

    strong_options = frozenset({"log-append", "log-sector-size"})
    changeable: ClassVar[frozenset[str] | None] = None
    #: the entry shows it; if ``file`` does not know it, the edge to it flushes
    supports_fua: ClassVar[bool] = True

    def __init__(self, node: Node, file: Child, log: Child, superblock: ondisk.Superblock, end: int) -> None:
        super().__init__(node, file)
        self.log = log
        self.limits.request_alignment = self._sector_size = superblock.sector_size
        self._sector_bits = superblock.sector_size.bit_length() - 1
        assert isinstance(node.options, BlklogwritesOptions)
        self._interval = node.options.log_super_update_interval % 2**64
        # What the log has: entries, bytes, and how many of the entries the superblock counts.
        self._nr_entries = self._nr_counted = superblock.nr_entries
        self._end = end
        self._appending, self._updating = Mutex(), Mutex()
        # The sector of the entry that is being written; what is behind its header is zero but for a mark's text.
        self._entry = memoryview(bytearray(superblock.sector_size))

    @classmethod
    async def open(cls, opening: Opening, options: BlklogwritesOptions) -> Blklogwrites:
        file = await opening.child("file", options.file, Role.FILTERED | Role.PRIMARY)
        log = await opening.child("log", options.log, Role.METADATA)
        sector_size = ondisk.DEFAULT_SECTOR_SIZE if options.log_sector_size is UNSET else int(options.log_sector_size)
        superblock, end = ondisk.Superblock(0, sector_size), sector_size
        if options.log_append is True:
            if options.log_sector_size is not UNSET:
                raise OptionError("log-append and log-sector-size are mutually exclusive")
            if log.node.driver.length:
                superblock, end = await _read_log(log)
        if not ondisk.is_sector_size(sector_size):
            raise OptionError(f"Invalid log sector size {sector_size}")
        if not options.log_super_update_interval:
            raise OptionError("Invalid log superblock update interval 0")
        return cls(opening.node, file, log, superblock, end)

    # -- requests -------------------------------------------------------------------------------

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        entry_flags = ondisk.FUA if flags & FUA else 0
        await self._logged(self.file.pwritev(offset, bufs, flags), offset, nbytes(bufs), entry_flags, bufs)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """Zero the range of ``file`` in what way *flags* allow; what is logged is a write of zeroes."""
        entry_flags = ondisk.FUA if flags & FUA else 0
        await self._logged(self.file.pwrite_zeroes(offset, length, flags), offset, length, entry_flags, zeroes=length)

    async def pdiscard(self, offset: int, length: int) -> None:
        await self._logged(self.file.pdiscard(offset, length), offset, length, ondisk.DISCARD)

    async def flush_to_disk(self) -> None:
        await self._logged(self.file.flush(), 0, 0, ondisk.FLUSH)

    @driver_command("blklogwrites-mark", MarkOptions)
    async def mark(self, options: MarkOptions) -> None:
        """Log a mark, which ``replay-log`` and ``fusebd log`` find again by its text.

        Everything is before it that had returned when this was called.  Raises OptionError about the text,
        ReadOnlyError, BlockIOError.
        """
        most = ondisk.max_mark_length(self._sector_size)
        data = options.mark.encode()
        if most < 1:
            raise OptionError(f"There is no room for marks in log sectors of {self._sector_size} bytes")
        if not 0 < len(data) <= most or b"\0" in data:
            raise OptionError(f"Parameter 'mark' expects a text of 1 to {most} bytes without NUL")
        if self.node.read_only:
            raise ReadOnlyError("Block node is read-only")
        # It comes from the monitor and through no edge, so that nothing else would keep the node.
        graph = self.node.graph
        root = graph.attach_root(self.node, UNNAMED, Perm.NONE, report_errors=False)
        try:
            async with root.entered():
                await self._append(0, 0, ondisk.MARK, text=data)
        finally:
            with trio.CancelScope(shield=True):
                await graph.detach_root(root)

    # -- the log --------------------------------------------------------------------------------

    async def _logged(
        self, request: Awaitable[None], offset: int, length: int, flags: int, bufs: Buffers = (), zeroes: int = 0
    ) -> None:
        """Carry out *request* on ``file`` and log it; its own failure is raised, else that of logging."""
        failure = None
        try:
            await request
        except NotSupported:
            raise  # nothing has been done
        except BlockIOError as error:
            failure = error
        bits = self._sector_bits
        try:
            await self._append(offset >> bits, length >> bits, flags, bufs, zeroes)
        except BlockIOError:
            if failure is None:
                raise
        if failure is not None:
            raise failure

    async def _append(
        self, sector: int, nr_sectors: int, flags: int, bufs: Buffers = (), zeroes: int = 0, text: bytes = b""
    ) -> None:
        """Write an entry, and the superblock if that is due."""
        async with self._appending:
            header, end = self._entry, self._end
            ondisk.PACKED_ENTRY.pack_into(header, 0, sector, nr_sectors, flags, len(text))
            text_end = ondisk.ENTRY_LENGTH + len(text)
            header[ondisk.ENTRY_LENGTH : text_end] = text
            try:
                await self.log.pwritev(end, (header, *bufs))
                end += self._sector_size + nbytes(bufs)
                if zeroes:
                    await self.log.pwrite_zeroes(end, zeroes)
            finally:
                header[ondisk.ENTRY_LENGTH : text_end] = bytes(len(text))
            self._end = end + zeroes
            self._nr_entries = number = self._nr_entries + 1
        if flags & (ondisk.FLUSH | ondisk.FUA | ondisk.MARK) or not number % self._interval:
            await self._update_superblock(number)

    async def _update_superblock(self, number: int) -> None:
        """Make *number* entries durable, and that the superblock counts at least them."""
        async with self._updating:
            if self._nr_counted >= number:
                return  # one who was before in turn has done it
            superblock = ondisk.Superblock(self._nr_entries, self._sector_size)
            sector = bytearray(self._sector_size)
            sector[: ondisk.SUPERBLOCK_LENGTH] = superblock.pack()
            await self.log.pwritev(0, (memoryview(sector),))
            await self.log.flush()
            self._nr_counted = superblock.nr_entries


async def _read_log(log: Child) -> tuple[ondisk.Superblock, int]:
    """The superblock of the log in *log*, and where its last entry ends, in bytes.

    Suspends where *log* does, and now and then to give other tasks their turn.
    """
    data = bytearray(ondisk.SUPERBLOCK_LENGTH)
    try:
        await log.preadv(0, (memoryview(data),))
    except BlockIOError as error:
        raise error.prefixed("Could not read log superblock") from None
    superblock = ondisk.parse_superblock(bytes(data))
    size, length = superblock.sector_size, log.node.driver.length
    end = size
    data = bytearray(ondisk.ENTRY_LENGTH)
    for number in range(superblock.nr_entries):
        try:
            await log.preadv(end, (memoryview(data),))
        except BlockIOError as error:
            raise error.prefixed(f"Failed to read log entry {number}") from None
        entry = ondisk.parse_entry(bytes(data), number)
        end += (1 + entry.data_sectors) * size
        if end > length:
            # QEMU reads zeroes there, for as long as the superblock says; but what was counted had been written.
            raise ImageError(f"Log entry {number} is past the end of the log")
        if not (number + 1) % _ENTRIES_PER_TURN:
            await trio.lowlevel.checkpoint()
    return superblock, end
