"""What is told of an image: the qcow2 part of QAPI ImageInfo.

What there is, and when: QEMU qcow2_get_specific_info (block/qcow2.c).
"""

from __future__ import annotations

from collections.abc import Sequence

from fusebd.block.options import Json
from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.snapshots import Snapshot
from fusebd.ondisk import qcow2 as ondisk


def image_info(
    image: Image, snapshots: Sequence[Snapshot], bitmaps: list[dict[str, Json]], backing_name: str
) -> dict[str, Json]:
    """The members that *image* has, with what is told of its *bitmaps*; *backing_name* is its backing file, if any."""
    header = image.header
    data: dict[str, Json] = {
        "compat": "0.10",
        "compression-type": ondisk.COMPRESSION_NAMES[header.compression_type],
        "refcount-bits": 1 << header.refcount_order,
    }
    if header.version >= 3:
        data |= {
            "compat": "1.1",
            "lazy-refcounts": bool(header.compatible_features & ondisk.COMPAT_LAZY_REFCOUNTS),
            "corrupt": bool(header.incompatible_features & ondisk.INCOMPAT_CORRUPT),
            "extended-l2": header.extended_l2,
        }
    if header.data_file:
        data["data-file"] = header.data_file
    if header.has_data_file:
        data["data-file-raw"] = image.has_raw_flag
    if image.encryption is not None:
        data["encrypt"] = image.encryption.info
    info: dict[str, Json] = {
        "cluster-size": header.cluster_size,
        "dirty-flag": bool(header.incompatible_features & ondisk.INCOMPAT_DIRTY),
        "format-specific": {"type": "qcow2", "data": data},
    }
    if image.encryption is not None:
        info["encrypted"] = True
    if snapshots:
        info["snapshots"] = [snapshot.info() for snapshot in snapshots]
    if bitmaps:
        data["bitmaps"] = bitmaps
    if backing_name:
        info["backing-filename"] = backing_name
        if header.backing_format:
            info["backing-filename-format"] = header.backing_format
    return info
