"""Header extensions changed while an image is open, so that it can be opened at any moment.

An extension is added where the end marker is: first what comes behind, then, within one sector, its head over the
marker.  Where the backing file's name is in the way, a copy is made behind it and the header turned to that.

Layout: QEMU docs/interop/qcow2.txt, "Header extensions".
"""

from __future__ import annotations

import errno

from fusebd.drivers.qcow2.image import Image
from fusebd.errors import BlockIOError
from fusebd.ondisk import qcow2 as ondisk

_HEAD = ondisk.EXTENSION_HEADER_LENGTH


class _Area:
    """The extensions as they are in the file: (type, where, length of the body), and where the end marker is."""

    def __init__(self, start: int, data: bytearray) -> None:
        self.found: list[tuple[int, int, int]] = []
        at = 0
        while at + _HEAD <= len(data):
            head = ondisk.EXTENSION_HEADER.parse(bytes(data[at : at + _HEAD]))
            if head.type == ondisk.EXT_END:
                break
            self.found.append((head.type, start + at, head.length))
            at += _HEAD + ((head.length + 7) & ~7)
        self.end = start + at

    def find(self, kind: int) -> tuple[int, int] | None:
        """Where the extension of *kind* is, and the length of its body."""
        return next(((at, length) for found, at, length in self.found if found == kind), None)


async def _read(image: Image) -> tuple[_Area, int]:
    """The extensions, and where the room for them ends."""
    header = image.header
    limit = header.backing_file_offset or header.cluster_size
    data = await image.read(header.header_length, limit - header.header_length)
    return _Area(header.header_length, data), limit


def _remember(image: Image, kind: int, body: bytes | None) -> None:
    kept = [(known, content) for known, content in image.header.extensions if known != kind]
    image.header.extensions = kept if body is None else [*kept, (kind, body)]


async def put_extension(image: Image, kind: int, body: bytes) -> None:
    """Have the extension of *kind*, whose length is always the same, say *body*, durably.

    One that is there is overwritten, which a power cut may interrupt: the caller sees to it that nobody believes it
    then.  Raises ENOSPC where the first cluster has no room for it, BlockIOError.
    """
    area, limit = await _read(image)
    place = area.find(kind)
    if place is not None and place[1] == len(body):
        await image.write(place[0] + _HEAD, body)
    else:
        tail = body.ljust((len(body) + 7) & ~7, b"\0")
        needed = area.end + _HEAD + len(tail) + _HEAD
        if needed > limit:
            await _move_backing_name(image, needed)
        await image.write(area.end + _HEAD, tail + bytes(_HEAD))
        await image.file.flush()
        head: bytes = ondisk.EXTENSION_HEADER.build({"type": kind, "length": len(body)})
        await image.write(area.end, head)
    await image.file.flush()
    _remember(image, kind, body)


async def drop_extension(image: Image, kind: int) -> None:
    """Remove the extension of *kind*, durably, if there is one; those behind it close up."""
    area, _ = await _read(image)
    place = area.find(kind)
    if place is not None:
        at, length = place
        size = _HEAD + ((length + 7) & ~7)
        behind = await image.read(at + size, area.end - at - size)
        await image.write(at, bytes(behind) + bytes(size))
        await image.file.flush()
    _remember(image, kind, None)


async def _move_backing_name(image: Image, least: int) -> None:
    """Put the backing file's name at byte *least* of the image or behind, where it is not now."""
    header = image.header
    offset, size = header.backing_file_offset, header.backing_file_size
    target = max(least, offset + size)
    if not offset or target + size > header.cluster_size:
        raise BlockIOError(errno.ENOSPC, node_name=image.node.name, operation="update header")
    name = await image.read(offset, size)
    await image.write(target, name)
    await image.file.flush()
    await image.write(ondisk.BACKING_FILE_OFFSET, target.to_bytes(8, "big"))
    await image.file.flush()
    header.backing_file_offset = target


async def set_autoclear(image: Image, features: int) -> None:
    """Store the autoclear feature bits *features* in the header, durably."""
    if features != image.header.autoclear_features:
        await image.write(ondisk.AUTOCLEAR_OFFSET, features.to_bytes(8, "big"))
        await image.file.flush()
        image.header.autoclear_features = features
