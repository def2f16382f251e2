"""The first cluster of an image as a whole: header, extensions, backing file name.

Order and content as in QEMU qcow2_update_header (block/qcow2.c), so that the same image has the same bytes.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

from fusebd.errors import ImageError
from fusebd.ondisk import qcow2 as ondisk

#: clusters up to this size have no feature table: it would leave no room for a backing file name
_NO_FEATURE_TABLE = 4096
_ORDER = (
    ondisk.EXT_BACKING_FORMAT,
    ondisk.EXT_DATA_FILE,
    ondisk.EXT_CRYPTO_HEADER,
    ondisk.EXT_FEATURE_TABLE,
    ondisk.EXT_BITMAPS,
)


def build_first_cluster(
    fields: dict[str, Any], extensions: Sequence[tuple[int, bytes]], backing_file: str, unknown: bytes = b""
) -> bytes:
    """The cluster for the header *fields* (but for where the backing file's name is), *extensions* and that name.

    *unknown* is what the header has behind its known fields.  A feature table is added where images have one.  Raises
    ImageError (ENOSPC) if there is no room for it all.
    """
    cluster = 1 << fields["cluster_bits"]
    known = dict(extensions)
    if fields["version"] >= 3 and cluster > _NO_FEATURE_TABLE:
        known[ondisk.EXT_FEATURE_TABLE] = ondisk.build_feature_table()
    body = b"".join(_extension(kind, known.pop(kind)) for kind in _ORDER if kind in known)
    body += b"".join(_extension(kind, content) for kind, content in known.items())
    body += _extension(ondisk.EXT_END, b"")
    name = backing_file.encode("utf-8", "surrogateescape")
    place = fields["header_length"] + len(body)
    if place + len(name) > cluster:
        raise ImageError("No space left on device", errno=errno.ENOSPC)
    backing = {"backing_file_offset": place if name else 0, "backing_file_size": len(name)}
    return (ondisk.build_header({**fields, **backing}) + unknown + body + name).ljust(cluster, b"\0")


def _extension(kind: int, content: bytes) -> bytes:
    head: bytes = ondisk.EXTENSION_HEADER.build({"type": kind, "length": len(content)})
    return head + content.ljust((len(content) + 7) & ~7, b"\0")
