"""Reading and checking what lies in the first cluster of a qcow2 image: header, extensions, backing file name.

Nothing that the image says is used before it was checked.  Limits, order of checks and messages: QEMU
qcow2_do_open and qcow2_read_extensions (block/qcow2.c).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fusebd.block.child import Child
from fusebd.errors import BlockIOError, ImageError
from fusebd.ondisk import qcow2 as ondisk

log = logging.getLogger(__name__)


@dataclass
class Header:
    """A checked header.  Fields are named as in the specification; sizes of tables are inside QEMU's limits."""

    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible_features: int
    compatible_features: int
    autoclear_features: int
    refcount_order: int
    header_length: int
    compression_type: int
    backing_file: str = ""
    backing_format: str = ""
    data_file: str = ""
    crypto_header_offset: int = 0
    crypto_header_length: int = 0
    snapshots_length: int = 0  #: bytes of the snapshot table, once that was read
    nb_bitmaps: int = 0  #: that can be relied on, as the autoclear bit says
    bitmap_directory_size: int = 0
    bitmap_directory_offset: int = 0
    extensions: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def cluster_size(self) -> int:
        """In bytes."""
        return 1 << self.cluster_bits

    @property
    def has_data_file(self) -> bool:
        """Whether guest data is in an external data file."""
        return bool(self.incompatible_features & ondisk.INCOMPAT_DATA_FILE)

    @property
    def extended_l2(self) -> bool:
        """Whether clusters have subclusters."""
        return bool(self.incompatible_features & ondisk.INCOMPAT_EXTENDED_L2)

    @property
    def l2_entry_bytes(self) -> int:
        """Of one entry of an L2 table."""
        return 16 if self.extended_l2 else 8


def check_table(offset: int, entries: int, entry_bytes: int, max_bytes: int, cluster_size: int, name: str) -> None:
    """Raise ImageError unless a table called *name* of so many entries at *offset* can be."""
    if entries > max_bytes // entry_bytes:
        raise ImageError(f"{name} too large")
    if 2**63 - 1 - entries * entry_bytes < offset or offset % cluster_size:
        raise ImageError(f"{name} offset invalid")


async def read_bytes(file: Child, offset: int, length: int, failure: str) -> bytes:
    """*length* bytes of *file* from byte *offset* on, zeroes past its end; *failure* begins the error message."""
    data = bytearray(length)
    try:
        await file.preadv(offset, (memoryview(data),))
    except BlockIOError as error:
        raise error.prefixed(failure) from None
    return bytes(data)


async def read_header(file: Child, *, read_only: bool) -> Header:
    """The header of the image in *file*, checked, with its extensions and the backing file's name.

    Suspends while *file* is read.  Raises ImageError in QEMU's words, BlockIOError.
    """
    data = await read_bytes(file, 0, ondisk.HEADER_FULL_LENGTH, "Could not read qcow2 header")
    fields = ondisk.parse_header(data)
    if fields.pop("magic") != ondisk.MAGIC:
        raise ImageError("Image is not in qcow2 format")
    header = Header(**fields)
    _check_first(header)
    end = header.backing_file_offset or header.cluster_size
    if header.crypt_method > ondisk.CRYPT_LUKS:
        raise ImageError(f"Unsupported encryption method {header.crypt_method}")
    _check_compression(header)
    if unknown := header.incompatible_features & ~ondisk.INCOMPAT_KNOWN:
        table = _feature_table(await _read_extensions(file, header.header_length, end))
        raise ImageError(f"Unsupported qcow2 feature(s): {_feature_names(table, unknown)}")
    if header.incompatible_features & ondisk.INCOMPAT_CORRUPT and not read_only:
        raise ImageError("qcow2: Image is corrupt; cannot be opened read/write", errno=errno.EACCES)
    _check_tables(header)
    header.extensions = list(_extensions(await _read_extensions(file, header.header_length, end)))
    _take_extensions(header, read_only=read_only)
    if header.autoclear_features & ondisk.AUTOCLEAR_DATA_FILE_RAW and not header.has_data_file:
        raise ImageError("data-file-raw requires a data file")
    if header.crypt_method == ondisk.CRYPT_LUKS and not header.crypto_header_length:
        raise ImageError(f"Missing CRYPTO header for crypt method {header.crypt_method}")
    if header.backing_file_offset:
        length = header.backing_file_size
        if length > min(ondisk.MAX_BACKING_NAME, header.cluster_size - header.backing_file_offset):
            raise ImageError("Backing file name too long")
        name = await read_bytes(file, header.backing_file_offset, length, "Could not read backing file name")
        header.backing_file = _text(name)
    return header


def _text(data: bytes) -> str:
    """A name as C reads it: up to the first zero byte; bytes that are not UTF-8 survive as file names do."""
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _check_first(header: Header) -> None:
    if header.version not in (2, 3):
        raise ImageError(f"Unsupported qcow2 version {header.version}")
    if not ondisk.MIN_CLUSTER_BITS <= header.cluster_bits <= ondisk.MAX_CLUSTER_BITS:
        raise ImageError(f"Unsupported cluster size: 2^{header.cluster_bits}")
    if header.version == 3 and header.header_length < ondisk.HEADER_V3_LENGTH:
        raise ImageError("qcow2 header too short")
    if header.header_length > header.cluster_size:
        raise ImageError("qcow2 header exceeds cluster size")
    if header.backing_file_offset > header.cluster_size:
        raise ImageError("Invalid backing file offset")


def _check_compression(header: Header) -> None:
    flagged = bool(header.incompatible_features & ondisk.INCOMPAT_COMPRESSION)
    if header.compression_type == ondisk.COMPRESSION_ZLIB:
        if flagged:
            raise ImageError("qcow2: Compression type incompatible feature bit must not be set")
    elif header.compression_type != ondisk.COMPRESSION_ZSTD:
        raise ImageError(f"qcow2: unknown compression type: {header.compression_type}")
    elif not flagged:
        raise ImageError("qcow2: Compression type incompatible feature bit must be set")


def _check_tables(header: Header) -> None:
    cluster = header.cluster_size
    if header.extended_l2 and cluster // ondisk.SUBCLUSTERS < 1 << ondisk.MIN_CLUSTER_BITS:
        raise ImageError(f"Unsupported subcluster size: {cluster // ondisk.SUBCLUSTERS}")
    if header.refcount_order > ondisk.MAX_REFCOUNT_ORDER:
        raise ImageError("Reference count entry width too large; may not exceed 64 bits")
    if header.refcount_table_clusters == 0:
        raise ImageError("Image does not contain a reference count table")
    check_table(
        header.refcount_table_offset,
        header.refcount_table_clusters,
        cluster,
        ondisk.MAX_REFCOUNT_TABLE_BYTES,
        cluster,
        "Reference count table",
    )
    check_table(
        header.snapshots_offset,
        header.nb_snapshots,
        ondisk.SNAPSHOT_LENGTH,
        ondisk.SNAPSHOT_LENGTH * ondisk.MAX_SNAPSHOTS,
        cluster,
        "Snapshot table",
    )
    check_table(header.l1_table_offset, header.l1_size, 8, ondisk.MAX_L1_BYTES, cluster, "Active L1 table")
    needed = l1_entries_for(header, header.size)
    if needed > 2**31 - 1:
        raise ImageError("Image is too big", errno=errno.EFBIG)
    if header.l1_size < needed:
        raise ImageError("L1 table is too small")
    header.size -= header.size % 512  # disks have whole sectors


def l1_entries_for(header: Header, size: int) -> int:
    """How many L1 entries a disk of *size* bytes needs."""
    shift = 2 * header.cluster_bits - (4 if header.extended_l2 else 3)
    return (size + (1 << shift) - 1) >> shift


async def _read_extensions(file: Child, start: int, end: int) -> bytes:
    """The header extensions as they are between the bytes *start* and *end*, which are in the first cluster."""
    return await read_bytes(file, start, max(end - start, 0), "qcow2_read_extension: ERROR: pread fail")


def _extensions(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The header extensions in *data*: (type, content).  Raises ImageError when it comes to one that is malformed."""
    at = 0
    while at < len(data):
        head = data[at : at + ondisk.EXTENSION_HEADER_LENGTH]
        if len(head) < ondisk.EXTENSION_HEADER_LENGTH:
            raise ImageError("Header extension too large")
        kind = int.from_bytes(head[:4], "big")
        length = int.from_bytes(head[4:], "big")
        at += ondisk.EXTENSION_HEADER_LENGTH
        if length > len(data) - at:
            raise ImageError("Header extension too large")
        if kind == ondisk.EXT_END:
            return
        yield kind, data[at : at + length]
        at += (length + 7) & ~7


def _feature_table(data: bytes) -> bytes:
    """The feature name table among the extensions in *data*; what is malformed there does not matter now."""
    table = b""
    with suppress(ImageError):
        for kind, body in _extensions(data):
            if kind == ondisk.EXT_FEATURE_TABLE:
                table = body
    return table


def _feature_names(table: bytes, mask: int) -> str:
    """The incompatible features in *mask*, by the names that the image's feature table gives them."""
    names = []
    for at in range(0, len(table) - ondisk.FEATURE_NAME_LENGTH + 1, ondisk.FEATURE_NAME_LENGTH):
        entry = ondisk.FEATURE_NAME.parse(table[at : at + ondisk.FEATURE_NAME_LENGTH])
        name = entry.name.partition(b"\0")[0].decode("utf-8", "replace")
        if not name:
            break
        if entry.type == ondisk.FEATURE_INCOMPATIBLE and entry.bit < 64 and mask & 1 << entry.bit:
            names.append(name)
            mask &= ~(1 << entry.bit)
    if mask:
        names.append(f"Unknown incompatible feature: {mask:x}")
    return ", ".join(names)


def _take_extensions(header: Header, *, read_only: bool) -> None:
    """Understand the extensions that mean something here; the others only have to be kept."""
    for kind, body in header.extensions:
        if kind == ondisk.EXT_BACKING_FORMAT:
            if len(body) > ondisk.MAX_BACKING_FORMAT:
                raise ImageError(
                    f"ERROR: ext_backing_format: len={len(body)} too large (>={ondisk.MAX_BACKING_FORMAT + 1})"
                )
            header.backing_format = _text(body)
        elif kind == ondisk.EXT_DATA_FILE:
            header.data_file = _text(body)
        elif kind == ondisk.EXT_CRYPTO_HEADER:
            _take_crypto_header(header, body)
        elif kind == ondisk.EXT_BITMAPS:
            _take_bitmaps(header, body, read_only=read_only)


def _take_crypto_header(header: Header, body: bytes) -> None:
    if header.crypt_method != ondisk.CRYPT_LUKS:
        raise ImageError("CRYPTO header extension only expected with LUKS encryption method")
    if len(body) != ondisk.CRYPTO_HEADER_LENGTH:
        raise ImageError(f"CRYPTO header extension size {len(body)}, but expected size {ondisk.CRYPTO_HEADER_LENGTH}")
    place: Any = ondisk.CRYPTO_HEADER.parse(body)
    if place.offset % header.cluster_size:
        raise ImageError(
            f"Encryption header offset '{place.offset}' is not a multiple of cluster size '{header.cluster_size}'"
        )
    header.crypto_header_offset, header.crypto_header_length = place.offset, place.length


def _take_bitmaps(header: Header, body: bytes, *, read_only: bool) -> None:
    if len(body) != ondisk.BITMAPS_LENGTH:
        raise ImageError("bitmaps_ext: Invalid extension length")
    if not header.autoclear_features & ondisk.AUTOCLEAR_BITMAPS:
        if header.version < 3:
            log.warning(
                "This qcow2 v2 image contains bitmaps, but they may have been modified by software without persistent "
                "bitmap support; so now these bitmaps should all be considered inconsistent"
            )
        elif not read_only:
            log.warning(
                "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent"
            )
        return
    bitmaps: Any = ondisk.BITMAPS.parse(body)
    if bitmaps.reserved:
        raise ImageError("bitmaps_ext: Reserved field is not zero")
    if bitmaps.nb_bitmaps > ondisk.MAX_BITMAPS:
        raise ImageError(
            f"bitmaps_ext: Image has {bitmaps.nb_bitmaps} bitmaps, exceeding the QEMU supported maximum of "
            f"{ondisk.MAX_BITMAPS}"
        )
    if bitmaps.nb_bitmaps == 0:
        raise ImageError("found bitmaps extension with zero bitmaps")
    if bitmaps.bitmap_directory_offset % header.cluster_size:
        raise ImageError("bitmaps_ext: invalid bitmap directory offset")
    if bitmaps.bitmap_directory_size > ondisk.MAX_BITMAP_DIRECTORY_BYTES:
        raise ImageError(
            f"bitmaps_ext: bitmap directory size ({bitmaps.bitmap_directory_size}) exceeds the maximum supported "
            f"size ({ondisk.MAX_BITMAP_DIRECTORY_BYTES})"
        )
    header.nb_bitmaps = bitmaps.nb_bitmaps
    header.bitmap_directory_size = bitmaps.bitmap_directory_size
    header.bitmap_directory_offset = bitmaps.bitmap_directory_offset
