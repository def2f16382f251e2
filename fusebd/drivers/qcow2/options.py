"""The options of a qcow2 node: QAPI BlockdevOptionsQcow2, and what they mean for one image.

Defaults, limits and messages: QEMU block/qcow2.c (read_cache_sizes, qcow2_update_options_prepare).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from fusebd.block.options import BlockdevOptions, BlockdevRef, Int, OptionStruct
from fusebd.drivers.qcow2.header import Header
from fusebd.errors import OptionError
from fusebd.ondisk import qcow2 as ondisk

#: metadata areas that a write may be checked against, as bits, with their option and the name that messages use
OVERLAP_NAMES = (
    ("main-header", "qcow2_header"),
    ("active-l1", "active L1 table"),
    ("active-l2", "active L2 table"),
    ("refcount-table", "refcount table"),
    ("refcount-block", "refcount block"),
    ("snapshot-table", "snapshot table"),
    ("inactive-l1", "inactive L1 table"),
    ("inactive-l2", "inactive L2 table"),
    ("bitmap-directory", "bitmap directory"),
)
(
    OL_MAIN_HEADER,
    OL_ACTIVE_L1,
    OL_ACTIVE_L2,
    OL_REFCOUNT_TABLE,
    OL_REFCOUNT_BLOCK,
    OL_SNAPSHOT_TABLE,
    OL_INACTIVE_L1,
    OL_INACTIVE_L2,
    OL_BITMAP_DIRECTORY,
) = (1 << bit for bit in range(len(OVERLAP_NAMES)))
_ALL = (1 << len(OVERLAP_NAMES)) - 1
_TEMPLATES = {
    "none": 0,
    "constant": OL_MAIN_HEADER | OL_REFCOUNT_TABLE | OL_SNAPSHOT_TABLE | OL_BITMAP_DIRECTORY,
    "cached": _ALL & ~OL_INACTIVE_L2,
    "all": _ALL,
}
_MIN_L2_SLICES = 2
_MIN_REFCOUNT_BLOCKS = 4
_DEFAULT_L2_CACHE = 32 << 20
_SLICE_WHEN_SHORT = 4096
#: bytes of memory that go with the entries of a cached slice: its objects, and its place in the table of them
_SLICE_OVERHEAD = 600

OverlapTemplate = Literal["none", "constant", "cached", "all"]


class OverlapFlags(OptionStruct, frozen=True, kw_only=True):
    """QAPI Qcow2OverlapCheckFlags: a template, and flags that differ from it."""

    template: OverlapTemplate = "cached"
    main_header: bool | UnsetType = UNSET
    active_l1: bool | UnsetType = UNSET
    active_l2: bool | UnsetType = UNSET
    refcount_table: bool | UnsetType = UNSET
    refcount_block: bool | UnsetType = UNSET
    snapshot_table: bool | UnsetType = UNSET
    inactive_l1: bool | UnsetType = UNSET
    inactive_l2: bool | UnsetType = UNSET
    bitmap_directory: bool | UnsetType = UNSET


class Encryption(OptionStruct, frozen=True, kw_only=True):
    """QAPI BlockdevQcow2Encryption."""

    format: Annotated[Literal["aes", "luks"], Meta(description="that of the image")]
    key_secret: Annotated[str | UnsetType, Meta(description="secret with the password")] = UNSET


class Qcow2Options(BlockdevOptions, frozen=True, kw_only=True):
    """QAPI BlockdevOptionsQcow2."""

    file: Annotated[BlockdevRef, Meta(description="the node that holds the image")]
    backing: Annotated[
        BlockdevRef | UnsetType | None, Meta(description="the backing node; null or empty: none; default: the image's")
    ] = UNSET
    lazy_refcounts: Annotated[bool | UnsetType, Meta(description="postpone refcount updates")] = UNSET
    pass_discard_request: Annotated[
        bool | UnsetType, Meta(description="pass guest discards on to the file (default: as discard says)")
    ] = UNSET
    pass_discard_snapshot: Annotated[bool, Meta(description="pass discards caused by snapshots on to the file")] = True
    pass_discard_other: Annotated[bool, Meta(description="pass other discards on to the file")] = False
    discard_no_unref: Annotated[bool, Meta(description="keep discarded clusters reserved in the image")] = False
    overlap_check: Annotated[
        OverlapTemplate | OverlapFlags, Meta(description="which metadata writes are checked against")
    ] = "cached"
    cache_size: Annotated[Int | UnsetType, Meta(description="most memory for all metadata caches, bytes")] = UNSET
    l2_cache_size: Annotated[Int | UnsetType, Meta(description="most memory for L2 tables, bytes")] = UNSET
    l2_cache_entry_size: Annotated[Int | UnsetType, Meta(description="size of an L2 cache entry, bytes")] = UNSET
    refcount_cache_size: Annotated[Int | UnsetType, Meta(description="most memory for refcount blocks, bytes")] = UNSET
    cache_clean_interval: Annotated[Int, Meta(description="drop unused cache entries after so many seconds")] = 600
    encrypt: Annotated[Encryption | UnsetType, Meta(description="how the image is encrypted")] = UNSET
    x_check: Annotated[
        bool,
        Meta(description="open an image that is marked as corrupt, to be mended by blockdev-check first"),
    ] = False
    data_file: Annotated[
        BlockdevRef | UnsetType,
        Meta(description="node with the guest data; default: the image's"),
    ] = UNSET


def check_options(options: Qcow2Options, *, version: int) -> None:
    """Raises OptionError, in QEMU's words, for what images of *version* do not have."""
    if version < 3 and options.lazy_refcounts is True:
        raise OptionError("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level")
    if version < 3 and options.discard_no_unref:
        raise OptionError("discard-no-unref is only supported since qcow2 version 3")


def is_lazy(options: Qcow2Options, header: Header) -> bool:
    """Whether refcount updates may be postponed: as the options say, or else the image."""
    lazy = options.lazy_refcounts
    return header.version >= 3 and bool(
        header.compatible_features & ondisk.COMPAT_LAZY_REFCOUNTS if lazy is UNSET else lazy
    )


def overlap_mask(value: OverlapTemplate | OverlapFlags) -> int:
    """The ``OL_`` bits that the option overlap-check turns on."""
    if isinstance(value, str):
        return _TEMPLATES[value]
    mask = _TEMPLATES[value.template]
    for bit, (name, _) in enumerate(OVERLAP_NAMES):
        flag = getattr(value, name.replace("-", "_"))
        if flag is not UNSET:
            mask = mask | 1 << bit if flag else mask & ~(1 << bit)
    return mask


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """How much metadata is kept in memory."""

    slice_bytes: int  #: of one L2 slice, the unit in which L2 tables are cached
    slices: int
    refcount_blocks: int


def cache_sizes(options: Qcow2Options, *, size: int, cluster_bits: int, l2_entry_bytes: int) -> CacheSizes:
    """The cache sizes that *options* mean for an image of *size* bytes.  Raises OptionError in QEMU's words."""
    cluster = 1 << cluster_bits
    min_refcount = _MIN_REFCOUNT_BLOCKS * cluster
    whole_l2 = -(-(-(-size // cluster) * l2_entry_bytes) // cluster) * cluster
    l2_max = _size(options.l2_cache_size, "l2-cache-size", _DEFAULT_L2_CACHE)
    refcount = _size(options.refcount_cache_size, "refcount-cache-size", 0)
    slice_bytes = _size(options.l2_cache_entry_size, "l2-cache-entry-size", cluster)
    l2 = min(whole_l2, l2_max)
    if options.cache_size is not UNSET:
        combined = _size(options.cache_size, "cache-size", 0)
        l2_given, refcount_given = options.l2_cache_size is not UNSET, options.refcount_cache_size is not UNSET
        if l2_given and refcount_given:
            raise OptionError("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time")
        if l2_given and l2_max > combined:
            raise OptionError("l2-cache-size may not exceed cache-size")
        if refcount > combined:
            raise OptionError("refcount-cache-size may not exceed cache-size")
        if l2_given:
            refcount = combined - l2
        elif refcount_given:
            l2 = combined - refcount
        elif combined >= whole_l2 + min_refcount:
            l2, refcount = whole_l2, combined - whole_l2
        else:
            refcount = min(combined, min_refcount)
            l2 = combined - refcount
    if l2 < whole_l2 and options.l2_cache_entry_size is UNSET:
        slice_bytes = min(cluster, _SLICE_WHEN_SHORT)
    smallest = 1 << ondisk.MIN_CLUSTER_BITS
    if not smallest <= slice_bytes <= cluster or slice_bytes & (slice_bytes - 1):
        raise OptionError(
            f"L2 cache entry size must be a power of two between {smallest} and the cluster size ({cluster})"
        )
    slices = l2 // slice_bytes if l2 >= whole_l2 else l2 // (slice_bytes + _SLICE_OVERHEAD)
    slices = max(slices, _MIN_L2_SLICES)
    blocks = max(refcount // cluster, _MIN_REFCOUNT_BLOCKS)
    if slices > 2**31 - 1:
        raise OptionError("L2 cache size too big")
    if blocks > 2**31 - 1:
        raise OptionError("Refcount cache size too big")
    if not 0 <= options.cache_clean_interval <= 2**32 - 1:
        raise OptionError("Cache clean interval too big")
    return CacheSizes(slice_bytes, slices, blocks)


def _size(value: int | UnsetType, name: str, default: int) -> int:
    if value is UNSET:
        return default
    assert isinstance(value, int)
    if value < 0:
        raise OptionError(f"Value '{value}' is out of range for parameter '{name}'")
    return value
