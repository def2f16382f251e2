"""Changing what an image is, while it is in use: its version, the width of its refcounts, its backing file's name.

The first cluster is written as a whole, in one request.

Options: QAPI BlockdevAmendOptionsQcow2, and those of ``qemu-img amend`` for which QEMU's QMP has no words.  Behaviour
and messages: QEMU qcow2_amend_options, qcow2_co_change_backing_file (block/qcow2.c).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from fusebd.block.options import Int, OptionStruct
from fusebd.crypto.options import AesChange, LuksChange
from fusebd.drivers.qcow2.downgrading import Downgrader, check_downgrade
from fusebd.drivers.qcow2.firstcluster import build_first_cluster
from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.drivers.qcow2.refcountwidth import change_width
from fusebd.drivers.qcow2.snapshots import Snapshot
from fusebd.drivers.qcow2.tables import Tables
from fusebd.errors import CommandError
from fusebd.ondisk import qcow2 as ondisk


class AmendOptions(OptionStruct, frozen=True, kw_only=True):
    driver: Literal["qcow2"]
    version: Annotated[Literal["v2", "v3"] | UnsetType, Meta(description="v2 for QEMU 0.10 and later, v3 for 1.1")] = (
        UNSET
    )
    refcount_bits: Annotated[Int | UnsetType, Meta(description="width of refcounts, 1 to 64")] = UNSET
    lazy_refcounts: Annotated[bool | UnsetType, Meta(description="let refcount updates be postponed")] = UNSET
    backing_file: Annotated[str | UnsetType, Meta(description="name of the backing file; empty: none")] = UNSET
    backing_fmt: Annotated[str | UnsetType, Meta(description="format of the backing file")] = UNSET
    data_file: Annotated[str | UnsetType, Meta(description="name of the data file")] = UNSET
    data_file_raw: Annotated[bool | UnsetType, Meta(description="false: the data file need not read as the disk")] = (
        UNSET
    )
    encrypt: Annotated[LuksChange | AesChange | UnsetType, Meta(description="key slots to be filled or erased")] = UNSET


class Amender:
    """Changes one image as *options* say, step by step.

    The caller holds ``Image.lock``; no request is under way, nothing is cached that was not written.
    """

    def __init__(
        self,
        image: Image,
        tables: Tables,
        refcounts: Refcounts,
        snapshots: Sequence[Snapshot],
        options: AmendOptions,
        rewrite_snapshots: Callable[[], Awaitable[None]],
        *,
        backed: bool,
    ) -> None:
        """*rewrite_snapshots* writes their table anew; *backed*: the disk shows another node where it has nothing."""
        self._image, self._tables, self._refcounts, self._snapshots = image, tables, refcounts, snapshots
        self._options = options
        self._rewrite_snapshots = rewrite_snapshots
        self._backed = backed
        header = image.header
        self._version = header.version if options.version is UNSET else int(options.version[1:])
        before = 1 << header.refcount_order
        self._bits = before if isinstance(options.refcount_bits, UnsetType) else options.refcount_bits

    def check(self) -> None:
        """Raise CommandError for what cannot be, as far as the header tells."""
        options, header = self._options, self._image.header
        if self._bits not in (1, 2, 4, 8, 16, 32, 64):
            raise CommandError("Refcount width must be a power of two and may not exceed 64 bits")
        if options.data_file is not UNSET and not header.has_data_file:
            raise CommandError("data-file can only be set for images that use an external data file")
        if options.data_file_raw is True and not self._image.has_raw_flag:
            raise CommandError("data-file-raw cannot be set on existing images")
        if self._bits != 16 and self._version < 3 and header.version < 3:
            raise CommandError(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or "
                "greater)"
            )
        if options.lazy_refcounts is True and self._version < 3:
            raise CommandError(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)"
            )
        name, backing_format = self._backing()
        raw = header.autoclear_features & ondisk.AUTOCLEAR_DATA_FILE_RAW and options.data_file_raw is not False
        _check_backing(name, backing_format, raw=bool(raw))
        if self._version < header.version:
            check_downgrade(self._image, self._snapshots, header.incompatible_features, self._bits.bit_length() - 1)

    def _backing(self) -> tuple[str, str]:
        """The name and format of the backing file that there is to be."""
        options, header = self._options, self._image.header
        name, backing_format = header.backing_file, header.backing_format
        if not isinstance(options.backing_file, UnsetType):
            name, backing_format = options.backing_file, ""
        if not isinstance(options.backing_fmt, UnsetType):
            backing_format = options.backing_fmt
        return name, backing_format

    async def amend(self) -> None:
        """Do it, durably.  An error leaves what was done of the steps: version, refcounts, all else, downgrade.

        Raises CommandError, ImageError (ENOSPC), BlockIOError.
        """
        image, options, header = self._image, self._options, self._image.header
        downgrader = Downgrader(image, self._tables, self._refcounts, self._snapshots, backed=self._backed)
        if self._version < header.version:
            await downgrader.check_compression()
        if self._version > header.version:
            if self._snapshots:
                await self._rewrite_snapshots()  # version 2 lets them leave out what version 3 wants
            await self._write({"version": self._version, "header_length": ondisk.HEADER_FULL_LENGTH})
        if self._bits != 1 << header.refcount_order:
            await change_width(image, self._refcounts, self._bits.bit_length() - 1, self._write)
        changes: dict[str, int] = {}
        if options.lazy_refcounts is not UNSET:
            others = header.compatible_features & ~ondisk.COMPAT_LAZY_REFCOUNTS
            changes["compatible_features"] = others | (ondisk.COMPAT_LAZY_REFCOUNTS if options.lazy_refcounts else 0)
        if options.data_file_raw is False:
            changes["autoclear_features"] = header.autoclear_features & ~ondisk.AUTOCLEAR_DATA_FILE_RAW
        replaced: list[tuple[int, bytes]] = []
        if not isinstance(options.data_file, UnsetType):
            replaced.append((ondisk.EXT_DATA_FILE, options.data_file.encode("utf-8", "surrogateescape")))
            header.data_file = options.data_file
        await write_first_cluster(image, changes, *self._backing(), replaced)
        if self._version < header.version:
            await downgrader.expand_zeroes()
            compression = {"compression_type": ondisk.COMPRESSION_ZLIB}
            await self._write({"version": self._version, **ondisk.V3_DEFAULTS, **compression})

    async def _write(self, changes: dict[str, int]) -> None:
        header = self._image.header
        await write_first_cluster(self._image, changes, header.backing_file, header.backing_format)


def _check_backing(name: str, backing_format: str, *, raw: bool) -> None:
    """Raise CommandError unless an image can name the backing file *name*, of *backing_format*; "" is none.

    *raw*: its data file has to read as the disk does.
    """
    if backing_format and not name:
        raise CommandError("Backing format cannot be used without backing file")
    if name and raw:
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
    replaced: Sequence[tuple[int, bytes]] = (),
) -> None:
    """Write the header with *changes* of its fields, another backing file, and other extensions, durably.

    *replaced* are those that are new or have another content; without content they are taken away.

    Raises ImageError (ENOSPC), BlockIOError.
    """
    header = image.header
    before = bytes(await image.read(0, image.cluster_size))
    fields = ondisk.parse_header(before[: ondisk.HEADER_FULL_LENGTH])
    unknown = before[ondisk.HEADER_FULL_LENGTH : fields["header_length"]]
    fields |= changes
    others = {ondisk.EXT_BACKING_FORMAT, *(kind for kind, _ in replaced)}
    if fields["version"] < 3:
        others.add(ondisk.EXT_FEATURE_TABLE)
        unknown = b""
    extensions = [(kind, body) for kind, body in header.extensions if kind not in others]
    extensions += [(kind, body) for kind, body in replaced if body]
    if backing_format:
        extensions.insert(0, (ondisk.EXT_BACKING_FORMAT, backing_format.encode()))
    data = build_first_cluster(fields, extensions, name, unknown)
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
