"""Changing what an image is, while it is in use: its version, its backing file's name.

The first cluster is written as a whole, in one request.

Options: QAPI BlockdevAmendOptionsQcow2, and those of ``qemu-img amend`` for which QEMU's QMP has no words.  Behaviour
and messages: QEMU qcow2_amend_options, qcow2_co_change_backing_file (block/qcow2.c).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from fusebd.block.options import OptionStruct
from fusebd.crypto.options import AesChange, LuksChange
from fusebd.drivers.qcow2.firstcluster import build_first_cluster
from fusebd.drivers.qcow2.header import Header
from fusebd.drivers.qcow2.image import Image
from fusebd.errors import CommandError
from fusebd.ondisk import qcow2 as ondisk


class AmendOptions(OptionStruct, frozen=True, kw_only=True):
    driver: Literal["qcow2"]
    version: Annotated[Literal["v2", "v3"] | UnsetType, Meta(description="v3 makes a v2 image one of QEMU 1.1")] = UNSET
    lazy_refcounts: Annotated[bool | UnsetType, Meta(description="let refcount updates be postponed")] = UNSET
    backing_file: Annotated[str | UnsetType, Meta(description="name of the backing file; empty: none")] = UNSET
    backing_fmt: Annotated[str | UnsetType, Meta(description="format of the backing file")] = UNSET
    encrypt: Annotated[LuksChange | AesChange | UnsetType, Meta(description="key slots to be filled or erased")] = UNSET


async def amend_header(image: Image, options: AmendOptions) -> None:
    """Do what *options* say of the header, all or nothing, durably.  The caller holds ``Image.lock``.

    Raises CommandError, ImageError (ENOSPC), BlockIOError.
    """
    header = image.header
    changes: dict[str, int] = {}
    version = header.version if options.version is UNSET else int(options.version[1:])
    if version < header.version:
        raise CommandError("Downgrading an image to version 2 is not supported", errno=errno.ENOTSUP)
    if version > header.version:
        changes |= {"version": version, "header_length": ondisk.HEADER_FULL_LENGTH}
    if options.lazy_refcounts is not UNSET:
        if options.lazy_refcounts and version < 3:
            raise CommandError(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)"
            )
        others = header.compatible_features & ~ondisk.COMPAT_LAZY_REFCOUNTS
        changes["compatible_features"] = others | (ondisk.COMPAT_LAZY_REFCOUNTS if options.lazy_refcounts else 0)
    name, backing_format = header.backing_file, header.backing_format
    if options.backing_file is not UNSET:
        name, backing_format = options.backing_file, ""
    if options.backing_fmt is not UNSET:
        backing_format = options.backing_fmt
    _check_backing(header, name, backing_format)
    await write_first_cluster(image, changes, name, backing_format)


def _check_backing(header: Header, name: str, backing_format: str) -> None:
    """Raise CommandError unless *header* can name the backing file *name*, of *backing_format*; "" is none."""
    if backing_format and not name:
        raise CommandError("Backing format cannot be used without backing file")
    if name and header.autoclear_features & ondisk.AUTOCLEAR_DATA_FILE_RAW:
        raise CommandError("Backing file and data-file-raw cannot be used at the same time")
    if len(name.encode("utf-8", "surrogateescape")) > ondisk.MAX_BACKING_NAME:
        raise CommandError(f"Could not change backing file to '{name}': Invalid argument")
    if len(backing_format) > ondisk.MAX_BACKING_FORMAT:
        raise CommandError(f"Backing format '{backing_format}' is too long")


async def write_first_cluster(
    image: Image,
    changes: dict[str, int],
    name: str,
    backing_format: str,
    added: Sequence[tuple[int, bytes]] = (),
) -> None:
    """Write the header with *changes* of its fields, another backing file, and *added* extensions, durably.

    Raises ImageError (ENOSPC), BlockIOError.
    """
    header = image.header
    before = bytes(await image.read(0, image.cluster_size))
    fields = ondisk.parse_header(before[: ondisk.HEADER_FULL_LENGTH])
    unknown = before[ondisk.HEADER_FULL_LENGTH : fields["header_length"]]
    extensions = [(kind, body) for kind, body in header.extensions if kind != ondisk.EXT_BACKING_FORMAT]
    extensions += added
    if backing_format:
        extensions.insert(0, (ondisk.EXT_BACKING_FORMAT, backing_format.encode()))
    data = build_first_cluster({**fields, **changes}, extensions, name, unknown)
    if data == before:
        return

    async def undo() -> None:
        """Nothing was allocated."""

    await image.switch(0, data, before, undo)
    written = ondisk.parse_header(data[: ondisk.HEADER_FULL_LENGTH])
    for field in (*changes, "backing_file_offset", "backing_file_size"):
        setattr(header, field, written[field])
    header.extensions = extensions
    header.backing_file, header.backing_format = name, backing_format
