"""The LUKS volume in an image: made, and its key slots changed.

Behaviour and messages: QEMU qcow2_set_up_encryption, qcow2_co_amend (block/qcow2.c).
"""

from __future__ import annotations

from fusebd.block.objects import Objects
from fusebd.crypto.options import AesChange, LuksChange, LuksEncryption
from fusebd.drivers.qcow2.amending import write_first_cluster
from fusebd.drivers.qcow2.encryption import Encryption, required_secret
from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.refcounts import Refcounts
from fusebd.errors import BlockIOError, CommandError
from fusebd.ondisk import qcow2 as ondisk


async def make_luks_volume(image: Image, refcounts: Refcounts, parameters: LuksEncryption, objects: Objects) -> None:
    """Give the image, which is not encrypted and has no data, a LUKS volume.  It has to be opened anew then.

    Suspends while a worker thread calculates, and while the file is written.  Raises FusebdError.
    """
    from fusebd.crypto.keyslots import fill_slot, header_length, new_volume
    from fusebd.crypto.luks import HeaderFile

    password = objects.password(required_secret(parameters))
    volume, key = await new_volume(parameters, detached=False)
    length = header_length(volume)
    clusters = -(-length // image.cluster_size)
    async with image.lock:
        try:
            offset = await refcounts.allocate(clusters)
        except BlockIOError as error:
            raise error.prefixed(f"Cannot allocate cluster for LUKS header size {length}") from None
        try:
            await image.file.pwrite_zeroes(offset, clusters * image.cluster_size)
        except BlockIOError as error:
            raise error.prefixed("Could not zero fill encryption header") from None
        await fill_slot(HeaderFile(image.file, offset, length), volume, 0, password, key, parameters.iter_time)
        await refcounts.write_back()
        place = ondisk.CRYPTO_HEADER.build({"offset": offset, "length": length})
        header = image.header
        await write_first_cluster(
            image,
            {"crypt_method": ondisk.CRYPT_LUKS},
            header.backing_file,
            header.backing_format,
            [(ondisk.EXT_CRYPTO_HEADER, place)],
        )


async def amend_volume(
    encryption: Encryption | None, change: LuksChange | AesChange, objects: Objects, *, force: bool
) -> None:
    """Fill or erase key slots of the LUKS volume in an image.

    Suspends while a worker thread calculates, and while the header is written.  Raises FusebdError.
    """
    if encryption is None:
        raise CommandError("image is not encrypted, can't amend")
    if isinstance(change, AesChange):
        raise CommandError("Amend can't be used to change the qcow2 encryption format")
    if encryption.volume is None:
        raise CommandError("Only LUKS encryption options can be amended for qcow2 with blockdev-amend")
    from fusebd.crypto.keyslots import change_slots

    await change_slots(encryption.volume, change, objects, encryption.secret, force=force)
