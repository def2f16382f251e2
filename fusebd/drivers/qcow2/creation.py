"""Making an image: blockdev-create of the driver ``qcow2``.

What is written first is an image of length 0: header, refcount table and one refcount block in three clusters.  It is
opened then, and made as long as it is to be.

Options: QAPI BlockdevCreateOptionsQcow2.  Behaviour and messages: QEMU qcow2_co_create (block/qcow2.c).
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType

from fusebd.block.creation import Creator, held, opened
from fusebd.block.driver import Preallocation
from fusebd.block.graph import Graph
from fusebd.block.naming import node_filename
from fusebd.block.options import BlockdevRef, Int, Json, OptionStruct, Uint64
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.crypto.options import AesEncryption, LuksEncryption
from fusebd.drivers.qcow2.driver import Qcow2
from fusebd.drivers.qcow2.encryption import required_secret
from fusebd.drivers.qcow2.firstcluster import build_first_cluster
from fusebd.drivers.qcow2.refblock import RefcountWidth
from fusebd.errors import BlockIOError, CommandError, ImageError
from fusebd.ondisk import qcow2 as ondisk

_SECTOR = 512
_WRITING = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE
#: the image formats that a backing file can be said to have: those of QAPI's BlockdevDriver
BackingFormat = Literal[
    "blkdebug", "blklogwrites", "blkreplay", "blkverify", "bochs", "cloop", "compress", "copy-before-write",
    "copy-on-read", "dmg", "file", "snapshot-access", "ftp", "ftps", "gluster", "host_cdrom", "host_device", "http",
    "https", "io_uring", "iscsi", "luks", "nbd", "nfs", "null-aio", "null-co", "nvme", "nvme-io_uring", "parallels",
    "preallocate", "qcow", "qcow2", "qed", "quorum", "raw", "rbd", "replication", "ssh", "throttle", "vdi", "vhdx",
    "virtio-blk-vfio-pci", "virtio-blk-vhost-user", "virtio-blk-vhost-vdpa", "vmdk", "vpc", "vvfat",
]  # fmt: skip


class Qcow2CreateOptions(OptionStruct, frozen=True, kw_only=True):
    driver: str
    file: Annotated[BlockdevRef, Meta(description="the node that is to hold the image")]
    data_file: Annotated[BlockdevRef | UnsetType, Meta(description="the node that is to hold the guest data")] = UNSET
    data_file_raw: Annotated[bool, Meta(description="the data file reads as the disk does by itself")] = False
    extended_l2: Annotated[bool, Meta(description="clusters have subclusters")] = False
    size: Annotated[Uint64, Meta(description="length of the disk, bytes")]
    version: Annotated[Literal["v2", "v3"], Meta(description="v2 for QEMU 0.10 and later, v3 for 1.1")] = "v3"
    backing_file: Annotated[str | UnsetType, Meta(description="name of the backing file")] = UNSET
    backing_fmt: Annotated[BackingFormat | UnsetType, Meta(description="format of the backing file")] = UNSET
    cluster_size: Annotated[Uint64, Meta(description="512 to 2097152, bytes")] = 65536
    preallocation: Annotated[Preallocation, Meta(description="what has its place in the file from the start")] = "off"
    lazy_refcounts: Annotated[bool, Meta(description="let refcount updates be postponed")] = False
    refcount_bits: Annotated[Int, Meta(description="1 to 64")] = 16
    compression_type: Annotated[Literal["zlib", "zstd"], Meta(description="for compressed clusters")] = "zlib"
    encrypt: Annotated[
        LuksEncryption | AesEncryption | UnsetType, Meta(description="how the guest data are encrypted")
    ] = UNSET

    @property
    def header_version(self) -> int:
        """The header's field ``version``."""
        return int(self.version[1:])


def _needs_v3(what: str, alternative: str = "and") -> CommandError:
    return CommandError(f"{what} compatibility level 1.1 {alternative} above (use version=v3 or greater)")


def _check(options: Qcow2CreateOptions) -> None:
    """Raise CommandError for what cannot be made, in QEMU's order and words."""
    v2 = options.version == "v2"
    if options.size % _SECTOR:
        raise CommandError(f"Image size must be a multiple of {_SECTOR} bytes")
    if options.extended_l2 and v2:
        raise _needs_v3("Extended L2 entries are only supported with")
    _check_cluster_size(options.cluster_size, extended_l2=options.extended_l2)
    backed = options.backing_file is not UNSET
    if backed and options.preallocation != "off" and not options.extended_l2:
        raise CommandError("Backing file and preallocation can only be used at the same time if extended_l2 is on")
    if options.backing_fmt is not UNSET and not backed:
        raise CommandError("Backing format cannot be used without backing file")
    if options.lazy_refcounts and v2:
        raise _needs_v3("Lazy refcounts only supported with")
    if options.refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
        raise CommandError("Refcount width must be a power of two and may not exceed 64 bits")
    if options.refcount_bits != 16 and v2:
        raise _needs_v3("Different refcount widths than 16 bits require", "or")
    if options.data_file_raw and options.data_file is UNSET:
        raise CommandError("data-file-raw requires data-file")
    if options.data_file_raw and backed:
        raise CommandError("Backing file and data-file-raw cannot be used at the same time")
    if options.data_file is not UNSET and v2:
        raise _needs_v3("External data files are only supported with")


def _check_cluster_size(size: int, *, extended_l2: bool) -> None:
    smallest, largest = 1 << ondisk.MIN_CLUSTER_BITS, 1 << ondisk.MAX_CLUSTER_BITS
    if not smallest <= size <= largest or size & (size - 1):
        raise CommandError(f"Cluster size must be a power of two between {smallest} and {largest >> 10}k")
    smallest *= ondisk.SUBCLUSTERS
    if extended_l2 and size < smallest:
        raise CommandError(f"Extended L2 entries are only supported with cluster sizes of at least {smallest} bytes")


def _header(options: Qcow2CreateOptions) -> dict[str, Any]:
    """The header's fields for an image of length 0."""
    incompatible = ondisk.INCOMPAT_DATA_FILE if options.data_file is not UNSET else 0
    incompatible |= ondisk.INCOMPAT_COMPRESSION if options.compression_type != "zlib" else 0
    incompatible |= ondisk.INCOMPAT_EXTENDED_L2 if options.extended_l2 else 0
    types = {name: number for number, name in ondisk.COMPRESSION_NAMES.items()}
    return {
        "magic": ondisk.MAGIC,
        "version": options.header_version,
        "cluster_bits": options.cluster_size.bit_length() - 1,
        "size": 0,
        "crypt_method": ondisk.CRYPT_AES if isinstance(options.encrypt, AesEncryption) else 0,
        "l1_size": 0,
        "l1_table_offset": 0,
        "refcount_table_offset": options.cluster_size,
        "refcount_table_clusters": 1,
        "nb_snapshots": 0,
        "snapshots_offset": 0,
        "incompatible_features": incompatible,
        "compatible_features": ondisk.COMPAT_LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        "autoclear_features": ondisk.AUTOCLEAR_DATA_FILE_RAW if options.data_file_raw else 0,
        "refcount_order": options.refcount_bits.bit_length() - 1,
        "header_length": ondisk.HEADER_FULL_LENGTH if options.version == "v3" else ondisk.HEADER_V2_LENGTH,
        "compression_type": types[options.compression_type],
    }


def _first_clusters(options: Qcow2CreateOptions, data_file: str) -> bytes:
    """Header, refcount table and refcount block.  Raises CommandError if the names in the header are too long."""
    extensions: list[tuple[int, bytes]] = []
    backing_file = "" if options.backing_file is UNSET else str(options.backing_file)
    if options.backing_fmt is not UNSET:
        extensions.append((ondisk.EXT_BACKING_FORMAT, str(options.backing_fmt).encode()))
    if data_file:
        extensions.append((ondisk.EXT_DATA_FILE, data_file.encode("utf-8", "surrogateescape")))
    fields = _header(options)
    try:
        if len(os.fsencode(backing_file)) > ondisk.MAX_BACKING_NAME:
            raise ImageError("Invalid argument")
        first = build_first_cluster(fields, extensions, backing_file)
    except ImageError as error:
        named = "(null)" if options.backing_fmt is UNSET else options.backing_fmt
        raise CommandError(f"Could not assign backing file '{backing_file}' with format '{named}': {error}") from None
    size = options.cluster_size
    block = bytearray(size)
    RefcountWidth(fields["refcount_order"]).set_ones(block, 0, 3)
    return first + (2 * size).to_bytes(8, "big").ljust(size, b"\0") + bytes(block)


async def _create(graph: Graph, options: Qcow2CreateOptions) -> None:
    """Make the image.  Suspends while it is written.

    Raises FusebdError; what was in the file may be gone then.
    """
    async with AsyncExitStack() as stack:
        file = await stack.enter_async_context(held(graph, options.file))
        _check(options)
        image: dict[str, Json] = {"driver": "qcow2", "file": file.node.name, "read-only": False, "backing": None}
        data_name = ""
        if options.data_file is not UNSET:
            data_file = await stack.enter_async_context(held(graph, options.data_file))
            image["data-file"] = data_file.node.name
            data_name = node_filename(data_file.node)
        if options.compression_type != "zlib" and options.version == "v2":
            raise _needs_v3("Non-zlib compression type is only supported with")
        encrypt, key = options.encrypt, {}
        if not isinstance(encrypt, UnsetType):
            kind = "luks" if isinstance(encrypt, LuksEncryption) else "aes"
            key = {"encrypt": {"format": kind, "key-secret": required_secret(encrypt)}}
        await _write(graph, file, _first_clusters(options, data_name))
        if isinstance(encrypt, LuksEncryption):
            async with opened(graph, image, _WRITING) as disk:
                driver = disk.node.driver
                assert isinstance(driver, Qcow2)
                await driver.encrypt(encrypt)
        async with opened(graph, image | key, _WRITING) as disk:
            await _resize(disk, options)


async def _write(graph: Graph, file: Root, data: bytes) -> None:
    """Write *data* to *file*, where nobody else writes meanwhile who would not know."""
    async with graph.lock:
        graph.set_root_perms(file, Perm.WRITE | Perm.RESIZE, Perm.ALL)
    try:
        await file.pwritev(0, (memoryview(data),))
    except BlockIOError as error:
        raise CommandError(f"Could not write qcow2 header: {error.reason}") from None
    async with graph.lock:
        graph.set_root_perms(file, Perm.NONE, Perm.ALL)


async def _resize(disk: Root, options: Qcow2CreateOptions) -> None:
    preallocation = options.preallocation
    if options.data_file_raw and preallocation == "off":
        preallocation = "metadata"  # disk and data file have to read the same
    size = options.size % 2**64
    if size >= 2**63:
        raise CommandError("Could not resize image: Image size cannot be negative")
    try:
        await disk.truncate(size, prealloc=preallocation)
    except BlockIOError as error:
        raise CommandError(f"Could not resize image: {error.reason}") from None


CREATOR = Creator(Qcow2CreateOptions, _create)
