"""qcow2: images with allocation on demand, backing files, compressed clusters and internal snapshots.

Options: QAPI BlockdevOptionsQcow2.  Layout: QEMU docs/interop/qcow2.txt.  Behaviour: QEMU block/qcow2.c.

A request within one cluster that has data of its own, in an L2 slice that is cached, goes to the file at once.  All
others are cut into extents of one kind (``mapping``); what changes the mapping goes through ``allocation``,
``zeroing`` or ``resize``, under ``Image.lock``.
"""

from __future__ import annotations

import errno
from typing import Annotated, ClassVar, Literal
from weakref import WeakSet

from msgspec import UNSET, Meta, UnsetType

from fusebd.block.blockstatus import block_status_above
from fusebd.block.child import MAY_UNMAP, copy_into, fill_zeroes, slice_buffers
from fusebd.block.dirtybitmaps import BitmapStore
from fusebd.block.driver import (
    BlockStatus,
    Buffers,
    Child,
    FormatDriver,
    Node,
    Preallocation,
    Status,
    driver_command,
    nbytes,
    register,
)
from fusebd.block.mutex import Mutex
from fusebd.block.naming import node_filename
from fusebd.block.opening import Opening
from fusebd.block.options import Json, OptionStruct
from fusebd.block.perms import Role
from fusebd.block.queueing import Batch, Done, QueueRead
from fusebd.block.snapshots import SnapshotStore
from fusebd.crypto import SECTOR
from fusebd.crypto.options import LuksEncryption
from fusebd.drivers.qcow2 import mapping, subclusters
from fusebd.drivers.qcow2.allocation import Allocator
from fusebd.drivers.qcow2.amending import Amender, AmendOptions
from fusebd.drivers.qcow2.appending import Appender
from fusebd.drivers.qcow2.bitmaps import Qcow2Bitmaps
from fusebd.drivers.qcow2.cleaning import Cleaner
from fusebd.drivers.qcow2.compressedwrites import CompressedWriter
from fusebd.drivers.qcow2.compression import decompress_in_thread
from fusebd.drivers.qcow2.encryption import Encryption, unlock_image
from fusebd.drivers.qcow2.header import Header, read_header
from fusebd.drivers.qcow2.image import Image, hexadecimal
from fusebd.drivers.qcow2.imageinfo import image_info
from fusebd.drivers.qcow2.luksvolume import amend_volume, make_luks_volume
from fusebd.drivers.qcow2.opening import open_data_file, prepare_for_writing
from fusebd.drivers.qcow2.options import (
    OL_BITMAP_DIRECTORY,
    OL_MAIN_HEADER,
    OL_SNAPSHOT_TABLE,
    Qcow2Options,
    cache_sizes,
    check_options,
    is_lazy,
    overlap_mask,
)
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.drivers.qcow2.reopening import CHANGEABLE, Qcow2Reopening
from fusebd.drivers.qcow2.repair import Checker, CheckResult
from fusebd.drivers.qcow2.resize import Resizer
from fusebd.drivers.qcow2.snapshots import Snapshot, protect_snapshots, read_snapshots
from fusebd.drivers.qcow2.snapshotting import Qcow2Snapshots
from fusebd.drivers.qcow2.tables import Slice, Tables
from fusebd.drivers.qcow2.zeroing import Zeroer
from fusebd.errors import CommandError, ImageError, ReadOnlyError
from fusebd.ondisk import qcow2 as ondisk

_NOT_DATA = ondisk.COMPRESSED | ondisk.ZERO | mapping.MIXED


class Check(OptionStruct, frozen=True, kw_only=True):
    """The arguments of ``blockdev-check`` beside the node."""

    fix: Annotated[Literal["leaks", "all"] | UnsetType, Meta(description="what is mended, as by qemu-img check -r")] = (
        UNSET
    )


@register("qcow2", Qcow2Options)
class Qcow2(FormatDriver):
    """One open image."""

    strong_options = frozenset({"encrypt"})
    changeable: ClassVar[frozenset[str] | None] = CHANGEABLE
    resettable = CHANGEABLE
    reopening = Qcow2Reopening
    amend_options = AmendOptions
    creation_module = "fusebd.drivers.qcow2.creation"
    can_compress = True

    def __init__(
        self,
        node: Node,
        image: Image,
        tables: Tables,
        refcounts: Refcounts,
        snapshots: list[Snapshot],
    ) -> None:
        super().__init__(node)
        self._image, self._tables, self._refcounts = image, tables, refcounts
        self._file, self._data = image.file, image.data
        self._backing: Child | None = None
        self._snapshots = snapshots
        self._backing_name = image.header.backing_file
        options = node.options
        assert isinstance(options, Qcow2Options)
        self._allocator = Allocator(image, tables, refcounts, self._read_extents, self._reads_zero_below)
        self._appender = Appender(image, tables, refcounts, self._allocator)
        self._compressed_writer = CompressedWriter(image, tables, refcounts, self._allocator, self._forget_decompressed)
        self._zeroer = Zeroer(image, tables, refcounts, self._allocator, options)
        self._resizer = Resizer(image, tables, refcounts, self._allocator, self._zeroer, self.pwritev)
        self._flushing = Mutex()
        self._cleaner = Cleaner(image, options.cache_clean_interval, tables, refcounts)
        self._sealed = 0  #: lists of freed clusters that the flush under way makes releasable
        self._decompressed: tuple[int, bytes] = (-1, b"")  #: the compressed cluster that was read last, by its L2 entry
        self._snapshot_store = Qcow2Snapshots(
            self, image, tables, refcounts, snapshots, discard=options.pass_discard_snapshot
        )
        self._bitmaps = Qcow2Bitmaps(image, refcounts)
        self._views: WeakSet[Qcow2] = WeakSet()  #: of snapshots, that ``showing`` has made
        self.length = image.header.size
        #: entries with one of these bits go by what they mean in detail
        self._special = _NOT_DATA if image.encryption is None else ondisk.OFFSET_MASK
        if image.encryption is not None:
            self.limits.request_alignment = SECTOR
        self.limits.pwrite_zeroes_alignment = image.granule_size
        self.limits.pdiscard_alignment = image.cluster_size

    # -- opening --------------------------------------------------------------------------------

    @classmethod
    def probe(cls, data: bytes, name: str) -> int:
        return 100 if data[:4] == ondisk.MAGIC and len(data) >= 8 and int.from_bytes(data[4:8], "big") >= 2 else 0

    @classmethod
    async def open(cls, opening: Opening, options: Qcow2Options) -> Qcow2:
        file = await opening.child("file", options.file, Role.IMAGE)
        header = await read_header(file, read_only=opening.node.read_only or options.x_check)
        data_file = await open_data_file(opening, options, header, file)
        encryption = await unlock_image(file, header, options.encrypt, opening.graph.objects)
        driver = await cls.load(opening.node, file, data_file, options, encryption, mending=options.x_check)
        if header.incompatible_features & ondisk.INCOMPAT_CORRUPT and not opening.node.read_only:
            driver._image.give_up()
        named, image_format = driver.header.backing_file, driver.header.backing_format
        driver.back_by(await opening.backing(options.backing, named, image_format or None, file.node))
        return driver

    @classmethod
    async def load(
        cls,
        node: Node,
        file: Child,
        data_file: Child | None,
        options: Qcow2Options,
        encryption: Encryption | None,
        *,
        mending: bool = False,
    ) -> Qcow2:
        """The image that is in *file*, ready to be written if *node* is not read-only; backed by nothing.

        *data_file* has the guest data, if *file* does not; *encryption* is how they are encrypted, if they are.
        *mending*: an image that is marked as corrupt is not refused, and is not ready for anything but being checked.

        Suspends where *file* does.  Raises OptionError, ImageError, BlockIOError.
        """
        header = await read_header(file, read_only=node.read_only or mending)
        corrupt = bool(header.incompatible_features & ondisk.INCOMPAT_CORRUPT)
        check_options(options, version=header.version)
        sizes = cache_sizes(
            options, size=header.size, cluster_bits=header.cluster_bits, l2_entry_bytes=header.l2_entry_bytes
        )
        if bool(header.crypt_method) != (encryption is not None):
            raise ImageError("The image has come to be encrypted, or not to be")
        if header.has_data_file != (data_file is not None):
            raise ImageError("The image has come to have an external data file, or to have none")
        image = Image(node, file, header, overlap_mask(options.overlap_check), data_file, encryption)
        image.metadata.add(OL_MAIN_HEADER, 0, image.cluster_size)
        refcounts = Refcounts(image, sizes.refcount_blocks)
        refcounts.lazy = is_lazy(options, header)
        tables = Tables(image, refcounts, slice_bytes=sizes.slice_bytes, max_slices=sizes.slices)
        await refcounts.load()
        await tables.load()
        snapshots, header.snapshots_length = await read_snapshots(file, header)
        image.metadata.add(OL_SNAPSHOT_TABLE, header.snapshots_offset, header.snapshots_length)
        await protect_snapshots(image, snapshots)
        image.metadata.add(OL_BITMAP_DIRECTORY, header.bitmap_directory_offset, header.bitmap_directory_size)
        if not node.read_only and not corrupt:
            await prepare_for_writing(image, tables, refcounts, snapshots)
        driver = cls(node, image, tables, refcounts, snapshots)
        await driver._bitmaps.load()
        driver._cleaner.start()
        return driver

    async def close(self) -> None:
        """Store the bitmaps, write back all metadata and give back what was freed."""
        try:
            if self._image.usable:
                await self._bitmaps.store_at_end()
            if self.node.read_only or not self._image.usable:
                return
            if self._refcounts.waiting:
                await self.flush()
            async with self._image.lock:
                await self._tables.write_back()
                await self._snapshot_store.clean()
        finally:
            self.drop()

    # -- being reopened -------------------------------------------------------------------------

    @property
    def header(self) -> Header:
        return self._image.header

    @property
    def encryption(self) -> Encryption | None:
        return self._image.encryption

    @property
    def is_usable(self) -> bool:
        """Whether no fatal corruption was found."""
        return self._image.usable

    async def write_out(self) -> None:
        await self.flush()
        if self._image.usable:
            async with self._image.lock:
                await self._tables.write_back()  # refcounts of what that flush has freed
                await self._snapshot_store.clean()

    def back_by(self, backing: Child | None) -> None:
        """Show *backing* where nothing is allocated."""
        self._backing = backing
        for view in self._views:
            view._backing = backing

    def drop(self) -> None:
        """Let go of what is cached."""
        self._cleaner.stop()
        # The parts of a driver refer to each other, so that the collector finds them late: not with their tables.
        self._tables.drop()
        self._refcounts.drop()

    async def give_up_write(self) -> None:
        await self._bitmaps.give_up_write()

    async def take_back_write(self) -> None:
        await self._bitmaps.take_back_write()

    # -- snapshots and bitmaps ------------------------------------------------------------------

    @property
    def bitmap_store(self) -> BitmapStore:
        return self._bitmaps

    @property
    def snapshot_store(self) -> SnapshotStore:
        return self._snapshot_store

    def showing(self, tables: Tables, length: int) -> Qcow2:
        """A driver that reads what *tables*, which nobody changes, map in *length* bytes; to be let go, not closed."""
        view = type(self)(self.node, self._image, tables, self._refcounts, [])
        view.length = length
        view._backing = self._backing
        self._views.add(view)
        return view

    def content_replaced(self, length: int) -> None:
        """The tables map another disk, of *length* bytes."""
        self._forget_decompressed()
        self.node.set_length(length)

    # -- being amended --------------------------------------------------------------------------

    async def amend(self, options: AmendOptions, *, force: bool = False) -> None:
        """Change what the image is, as *options* say.  No request is under way.  Raises FusebdError."""
        image = self._image
        image.check_usable()
        await self.write_out()
        async with image.lock:
            self._tables.slices.clear()
            amender = Amender(
                image,
                self._tables,
                self._refcounts,
                self._snapshots,
                options,
                self._snapshot_store.rewrite,
                backed=self._backing is not None or bool(self.header.backing_file),
            )
            amender.check()
            if not isinstance(options.encrypt, UnsetType):
                await amend_volume(image.encryption, options.encrypt, self.node.graph.objects, force=force)
            await amender.amend()
        given = self.node.options
        assert isinstance(given, Qcow2Options)
        self._refcounts.lazy = is_lazy(given, self.header)
        if options.backing_file is not UNSET:
            self._backing_name = self.header.backing_file

    async def encrypt(self, parameters: LuksEncryption) -> None:
        """Make the image, which is not encrypted and has no data, one of those that are, when it is opened next.

        Raises FusebdError.
        """
        await make_luks_volume(self._image, self._refcounts, parameters, self.node.graph.objects)

    # -- being checked --------------------------------------------------------------------------

    @driver_command("blockdev-check", Check)
    async def _command_check(self, arguments: Check) -> Json:
        """QAPI ImageCheck.  No request is under way meanwhile.  Raises FusebdError."""
        image, graph = self._image, self.node.graph
        fix = "" if arguments.fix is UNSET else arguments.fix
        if fix and self.node.read_only:
            raise ReadOnlyError("Image is read-only")
        async with graph.lock, graph.drained(self.node):
            if image.usable:
                result = await self._checked(fix)
            elif fix == "all":
                result = await self._mended()
            else:
                raise image.error("check", code=errno.ENOMEDIUM)
        return {"filename": node_filename(self.node), "format": self.name, **result.info()}

    async def _checked(self, fix: str) -> CheckResult:
        """What is wrong in the image, which is usable, and mended as *fix* says."""
        image = self._image
        if not self.node.read_only:
            await self.write_out()
        async with image.lock:
            self._tables.slices.clear()
            self._forget_decompressed()
            checker = Checker(image, self._tables, self._refcounts, self._snapshots)
            return await checker.check(fix_leaks=bool(fix), fix_errors=fix == "all")

    async def _mended(self) -> CheckResult:
        """Mend an image that is marked as corrupt, as it is in the file, and use it again if that was enough."""
        options, image = self.node.options, self._image
        assert isinstance(options, Qcow2Options)
        anew = await type(self).load(self.node, image.file, image.data_file, options, image.encryption, mending=True)
        try:
            result = await anew._checked("all")
            if result.corruptions:
                anew.drop()
                return result
            marks = ondisk.INCOMPAT_CORRUPT | ondisk.INCOMPAT_DIRTY
            await anew._image.set_incompatible(anew.header.incompatible_features & ~marks)
            await prepare_for_writing(anew._image, anew._tables, anew._refcounts, anew._snapshots)
        except BaseException:
            anew.drop()
            raise
        anew.back_by(self._backing)
        self.node.replace_driver(anew)
        self.drop()
        return result

    # -- reading --------------------------------------------------------------------------------

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        """Fill *bufs*.  Suspends where the children do, and for the lock while an L2 slice is read."""
        image, tables = self._image, self._tables
        size = len(bufs[0]) if len(bufs) == 1 else nbytes(bufs)
        item = tables.slices.get(offset >> tables.slice_shift)
        if item is not None:
            in_cluster = offset & image.cluster_mask
            if in_cluster + size <= image.cluster_size:
                entry = item.entries[offset >> image.cluster_bits & tables.entry_mask]
                host_offset = entry & ondisk.OFFSET_MASK
                if host_offset and not entry & self._special and not host_offset & image.cluster_mask:
                    item.used = True
                    await self._read_data(host_offset + in_cluster, bufs, offset)
                    return
        await self._read_extents(offset, bufs)

    def read_queue(self) -> QueueRead | None:
        return self._queue_read if self._data.queues_reads and self._image.encryption is None else None

    def _queue_read(self, offset: int, buf: memoryview, done: Done) -> Batch | None:
        """Queue what is data in one cluster, whose mapping is in the cache, and nobody wants to hear of."""
        image, tables, data = self._image, self._tables, self._data
        item = tables.slices.get(offset >> tables.slice_shift)
        in_cluster = offset & image.cluster_mask
        if item is None or in_cluster + len(buf) > image.cluster_size or "read_aio" in data.events:
            return None
        entry = item.entries[offset >> image.cluster_bits & tables.entry_mask]
        host_offset = entry & ondisk.OFFSET_MASK
        if not host_offset or entry & self._special or host_offset & image.cluster_mask:
            return None
        item.used = True
        epoch = image.epoch

        def finished(result: int) -> None:
            epoch.count -= 1
            done(result)

        batch = data.queue_read(host_offset + in_cluster, buf, finished)
        if batch is not None:
            epoch.count += 1
        return batch

    async def _read_data(self, host_offset: int, bufs: Buffers, guest_offset: int) -> None:
        data, encryption = self._data, self._image.encryption
        epoch = self._image.epoch
        epoch.count += 1
        try:
            if "read_aio" in data.events and (held := data.announced("read_aio")) is not None:
                await held
            if encryption is None:
                await data.preadv(host_offset, bufs)
            else:
                await encryption.read(data, host_offset, guest_offset, self._image.data_shift, bufs)
        finally:
            epoch.count -= 1

    async def _slice(self, offset: int) -> Slice | None:
        """The slice that maps *offset*, from the cache or from the file."""
        item = self._tables.slices.get(offset >> self._tables.slice_shift)
        if item is not None:
            item.used = True
            return item
        async with self._image.lock:
            return await self._tables.find(offset)

    async def _read_extents(self, offset: int, bufs: Buffers) -> None:
        """Fill *bufs*, whatever they cross."""
        image = self._image
        size = nbytes(bufs)
        done = 0
        while done < size:
            at = offset + done
            kind, host_offset, length = await self._extent(at, size - done)
            part = slice_buffers(bufs, done, done + length)
            done += length
            if kind == mapping.DATA:
                await self._read_data(host_offset + (at & image.cluster_mask), part, at)
            elif kind == mapping.COMPRESSED:
                await self._read_compressed(host_offset, at & image.cluster_mask, part)
            elif kind == mapping.UNALLOCATED and self._backing is not None:
                if "read_backing_aio" in self._file.events:
                    await self._file.announce("read_backing_aio")
                await self._backing.preadv(at, part)
            else:
                fill_zeroes(part)

    async def _extent(self, offset: int, size: int) -> tuple[int, int, int]:
        """What *offset* is mapped to: (kind, the cluster's host offset or compressed entry, bytes, up to *size*)."""
        image, tables = self._image, self._tables
        item = await self._slice(offset)
        bits = image.cluster_bits
        in_cluster = offset & image.cluster_mask
        at = offset >> bits & tables.entry_mask
        limit = min(tables.slice_entries, at + ((in_cluster + size - 1) >> bits) + 1)
        if item is None:
            return mapping.UNALLOCATED, 0, min(size, ((tables.slice_entries - at) << bits) - in_cluster)
        kind, host_offset, number = mapping.extent(item.entries, at, limit, image.cluster_size)
        if kind in (mapping.ZERO_PLAIN, mapping.ZERO_ALLOCATED) and image.header.version < 3:
            raise await image.corrupt(
                f"Zero cluster entry found in pre-v3 image (L2 offset: {item.host_offset:#x},"
                f" L2 index: {hexadecimal(at)})"
            )
        if kind in (mapping.DATA, mapping.ZERO_ALLOCATED) and host_offset & image.cluster_mask:
            raise await image.corrupt(
                f"Cluster allocation offset {host_offset:#x} unaligned (L2 offset: {item.host_offset:#x},"
                f" L2 index: {hexadecimal(at)})"
            )
        if kind == mapping.SEVERAL:
            return await self._extent_in_cluster(item, at, in_cluster, size)
        return kind, host_offset, min(size, (number << bits) - in_cluster)

    async def _extent_in_cluster(self, item: Slice, index: int, in_cluster: int, size: int) -> tuple[int, int, int]:
        """``_extent`` in the mixed cluster that entry *index* of the slice maps, from byte *in_cluster* of it on."""
        image = self._image
        entry, bitmap = item.entries[index], item.bitmap(index)
        host_offset = entry & ondisk.OFFSET_MASK
        if not subclusters.is_valid(entry, bitmap):
            raise await image.corrupt(item.invalid_entry(index))
        if host_offset & image.cluster_mask:
            raise await image.corrupt(
                f"Cluster allocation offset {host_offset:#x} unaligned (L2 offset: {item.host_offset:#x},"
                f" L2 index: {hexadecimal(index)})"
            )
        bits = image.granule_bits
        first = in_cluster >> bits
        end = min(((in_cluster + size - 1) >> bits) + 1, subclusters.NUMBER)
        number = subclusters.run(entry, bitmap, first, end)
        kind = subclusters.kind_at(entry, bitmap, first)
        return kind, host_offset, min(size, (first + number << bits) - in_cluster)

    async def _read_compressed(self, entry: int, in_cluster: int, bufs: Buffers) -> None:
        """Fill *bufs* from byte *in_cluster* on of the cluster that the L2 *entry* describes."""
        image = self._image
        if self._decompressed[0] != entry:
            host_offset, length = ondisk.parse_compressed(entry, image.cluster_bits)
            epoch = image.epoch
            epoch.count += 1
            try:
                await image.announce("read_compressed")
                data = await image.read(host_offset, length)
                cluster = await decompress_in_thread(image.header.compression_type, data, image.cluster_size)
                self._decompressed = entry, cluster
            except ValueError:
                raise image.error("read", reason="compressed cluster cannot be decompressed") from None
            finally:
                epoch.count -= 1
        else:
            cluster = self._decompressed[1]
        copy_into(bufs, memoryview(cluster)[in_cluster:])

    def _forget_decompressed(self) -> None:
        """Where the cluster was that was read last there may be others soon."""
        self._decompressed = -1, b""

    # -- writing --------------------------------------------------------------------------------

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        """Write *bufs*.  Suspends where the children do, and for the lock when the mapping has to change."""
        image, tables = self._image, self._tables
        size = len(bufs[0]) if len(bufs) == 1 else nbytes(bufs)
        if not image.usable:
            image.check_usable()
        if flags:
            await self._compressed_writer.pwritev(offset, bufs, self.length)
            return
        item = tables.slices.get(offset >> tables.slice_shift)
        if item is not None and image.metadata.simple:
            in_cluster = offset & image.cluster_mask
            if in_cluster + size <= image.cluster_size:
                entry = item.entries[offset >> image.cluster_bits & tables.entry_mask]
                host_offset = entry & ondisk.OFFSET_MASK
                if (
                    host_offset
                    and entry & ondisk.COPIED
                    and not entry & self._special
                    and not host_offset & image.cluster_mask
                    and host_offset >> image.cluster_bits not in image.metadata.clusters
                ):
                    item.used = True
                    data = self._data
                    epoch = image.epoch
                    epoch.count += 1
                    try:
                        if "write_aio" in data.events and (held := data.announced("write_aio")) is not None:
                            await held
                        await data.pwritev(host_offset + in_cluster, bufs)
                    finally:
                        epoch.count -= 1
                    return
                if not entry and self._backing is None and (cluster := self._appender.take(offset)):
                    await self._appender.write(item, offset, cluster, bufs, size)
                    return
        await self._allocator.pwritev(offset, bufs, size)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """Zero whole clusters by their L2 entries; NotSupported for parts of one that is not zero anyway."""
        image = self._image
        image.check_usable()
        if image.is_raw:
            assert image.data_file is not None
            await image.data_file.pwrite_zeroes(offset, length, flags)
        head = offset & image.granule_mask
        tail = -(offset + length) & image.granule_mask
        if head or tail:
            end = min(offset + length + tail, self.length)
            if not await self._reads_zero(offset - head, head) or not await self._reads_zero(
                offset + length, end - offset - length
            ):
                raise self._zeroer.refuse("write zeroes")
            offset, length = offset - head, head + length + tail
        await self._zeroer.zeroize(offset, length, flags, without_data=bool(head or tail))
        await self._limit_waiting()

    async def pdiscard(self, offset: int, length: int) -> None:
        """Give up whole clusters; NotSupported for parts of one, but for the last one if the image ends in it."""
        image = self._image
        image.check_usable()
        if offset + length == self.length:
            length = (length + image.cluster_mask) & ~image.cluster_mask
        if (offset | length) & image.cluster_mask:
            raise self._zeroer.refuse("discard")
        if image.data_file is not None:
            await self._discard_data(offset, length)
            if image.is_raw:
                return
        await self._zeroer.discard(offset, length, has_backing=self._backing is not None)
        await self._limit_waiting()

    async def _discard_data(self, offset: int, length: int) -> None:
        """Have the external data file forget the clusters; a raw one must read as zeroes there."""
        data_file = self._image.data_file
        assert data_file is not None
        length = min(length, data_file.node.driver.length - offset)
        if length <= 0:
            return
        if self._image.is_raw:
            await data_file.pwrite_zeroes(offset, length, MAY_UNMAP)
        elif self._zeroer.passes_on:
            await data_file.pdiscard(offset, length)

    async def _limit_waiting(self) -> None:
        """Freed clusters come back with the next flush; where none comes, make one."""
        if self._refcounts.crowded:
            await self.flush()

    def _reads_zero_below(self, offset: int, length: int) -> bool:
        """Whether unallocated bytes from *offset* on are known to be zeroes."""
        return self._backing is None or offset >= self._backing.node.driver.length

    async def _reads_zero(self, offset: int, length: int) -> bool:
        """Whether all the bytes are known to read as zeroes."""
        while length > 0:
            status = await block_status_above(self.node, offset, length)
            if status.length and not status.flags & Status.ZERO:
                return False
            if not status.length:
                return True
            offset, length = offset + status.length, length - status.length
        return True

    # -- the rest -------------------------------------------------------------------------------

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        kind, host_offset, length = await self._extent(offset, length)
        if self._image.encryption is not None and kind in (mapping.DATA, mapping.ZERO_ALLOCATED):
            return BlockStatus(Status.DATA if kind == mapping.DATA else Status.ZERO, length)
        place = host_offset + (offset & self._image.cluster_mask) - self._image.data_shift
        if kind == mapping.DATA:
            # A hole of the file may be in it, so that preallocated clusters are known to be zeroes.
            flags = Status.DATA | Status.OFFSET_VALID | Status.RECURSE
            return BlockStatus(flags, length, place, self._data.node)
        if kind == mapping.ZERO_ALLOCATED:
            flags = Status.ZERO | Status.OFFSET_VALID
            return BlockStatus(flags, length, place, self._data.node)
        if kind == mapping.ZERO_PLAIN:
            return BlockStatus(Status.ZERO, length)
        if kind == mapping.COMPRESSED:
            return BlockStatus(Status.DATA | Status.COMPRESSED, length)
        return BlockStatus(Status.NONE, length)

    async def truncate(
        self, length: int, *, exact: bool = False, prealloc: Preallocation = "off", zero: bool = False
    ) -> None:
        self._image.check_usable()
        try:
            self._bitmaps.check_resize()
        except CommandError as error:
            raise self._image.error("resize", code=errno.ENOTSUP, reason=str(error)) from None
        await self._resizer.truncate(
            self.length,
            length,
            prealloc,
            exact=exact,
            zero=zero,
            nb_snapshots=len(self._snapshots),
        )

    async def flush_to_os(self) -> None:
        """Write the cached metadata to the file, in the order that a crash asks for."""
        if self.node.read_only or not self._image.usable:
            return
        async with self._image.lock:
            await self._tables.write_back()
            self._sealed = self._refcounts.sealed()

    async def flush(self) -> None:
        """Make everything durable, and only then take down the refcounts of what was freed before."""
        async with self._flushing:
            self._sealed = 0
            await super().flush()
            if self._sealed and self._image.usable:
                async with self._image.lock:
                    await self._refcounts.release(self._sealed)

    # -- what is shown --------------------------------------------------------------------------

    def format_info(self) -> dict[str, Json]:
        return image_info(self._image, self._snapshots, self._bitmaps.info(), self._backing_name)
