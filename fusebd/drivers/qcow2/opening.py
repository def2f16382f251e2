"""What is done for an image when it is opened, beside reading its metadata.

Behaviour and messages: QEMU qcow2_do_open (block/qcow2.c).
"""

from __future__ import annotations

from msgspec import UNSET

from fusebd.block.child import Child
from fusebd.block.opening import Opening
from fusebd.block.perms import Role
from fusebd.drivers.qcow2.extensions import drop_extension, set_autoclear
from fusebd.drivers.qcow2.header import Header
from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.options import Qcow2Options
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.drivers.qcow2.repair import rebuild_refcounts
from fusebd.drivers.qcow2.snapshots import Snapshot
from fusebd.drivers.qcow2.tables import Tables
from fusebd.errors import FusebdError, OptionError
from fusebd.ondisk import qcow2 as ondisk


async def prepare_for_writing(image: Image, tables: Tables, refcounts: Refcounts, snapshots: list[Snapshot]) -> None:
    """Make right what has to be before anything is changed in the image.  Suspends; raises FusebdError."""
    header = image.header
    await set_autoclear(image, header.autoclear_features & ondisk.AUTOCLEAR_KNOWN)
    if not header.nb_bitmaps and any(kind == ondisk.EXT_BITMAPS for kind, _ in header.extensions):
        await drop_extension(image, ondisk.EXT_BITMAPS)  # they are not what they were
    if header.incompatible_features & ondisk.INCOMPAT_DIRTY:
        try:
            await rebuild_refcounts(image, tables, refcounts, snapshots)
        except FusebdError as error:
            raise error.prefixed("Could not repair dirty image") from None
        await image.set_incompatible(header.incompatible_features & ~ondisk.INCOMPAT_DIRTY)


async def open_data_file(opening: Opening, options: Qcow2Options, header: Header, file: Child) -> Child | None:
    """The child with the guest data, if that is not in *file*: the option's, else the one that the image names.

    Suspends while it is opened.  Raises OptionError, FusebdError.
    """
    if not header.has_data_file:
        if options.data_file is not UNSET:
            await opening.child("data-file", options.data_file, Role.DATA)
            raise OptionError("'data-file' can only be set for images with an external data file")
        return None
    if options.data_file is not UNSET:
        data_file = await opening.child("data-file", options.data_file, Role.DATA)
    elif header.data_file:
        data_file = await opening.child_by_filename("data-file", header.data_file, Role.DATA, protocol=True)
    else:
        raise OptionError("'data-file' is required for this image")
    file.role &= ~Role.DATA
    opening.graph.refresh_perms([opening.node])
    return data_file
