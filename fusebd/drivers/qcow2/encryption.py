"""Encrypted images: with a LUKS header inside, or in the old way, AES with the password as the key.

Guest data is encrypted sector by sector; the number of a sector is that of its place in the file with LUKS, and that
of its place on the disk with AES.  Metadata and compressed clusters are not encrypted.

Behaviour and messages: QEMU block/qcow2.c, crypto/block-qcow.c.  Specification: docs/interop/qcow2.txt, "crypt_method".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec import UNSET, UnsetType

from fusebd.block.child import Buffers, Child, copy_into, nbytes
from fusebd.block.objects import Objects
from fusebd.block.options import Json
from fusebd.crypto import SECTOR
from fusebd.crypto.options import AesEncryption, LuksEncryption
from fusebd.drivers.qcow2.data import DataFile
from fusebd.drivers.qcow2.header import Header
from fusebd.drivers.qcow2.options import Encryption as EncryptionOptions
from fusebd.errors import OptionError
from fusebd.ondisk import qcow2 as ondisk

if TYPE_CHECKING:
    from fusebd.crypto.ciphers import SectorCipher
    from fusebd.crypto.luks import LuksVolume

_FORMATS = {ondisk.CRYPT_AES: "aes", ondisk.CRYPT_LUKS: "luks"}
_AES_KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class Encryption:
    """How the guest data of one image is encrypted: as the LUKS *volume* says, or else with its password as the key.

    *secret* names the object that has the password.
    """

    cipher: SectorCipher
    volume: LuksVolume | None
    secret: str

    @property
    def info(self) -> dict[str, Json]:
        """QAPI ImageInfoSpecificQCow2Encryption."""
        return {"format": "aes"} if self.volume is None else {"format": "luks", **self.volume.header.info()}

    async def read(
        self, data: Child | DataFile, host_offset: int, guest_offset: int, shift: int, bufs: Buffers
    ) -> None:
        """Fill *bufs* with whole sectors from byte *host_offset* of *data* on, which is larger by *shift* than in the
        file, and is shown at *guest_offset*.
        """
        secret = bytearray(nbytes(bufs))
        await data.preadv(host_offset, (memoryview(secret),))
        number = self._number(host_offset - shift, guest_offset)
        copy_into(bufs, memoryview(await self.cipher.decrypted(number, secret)))

    async def encrypted(self, host_offset: int, guest_offset: int, bufs: Buffers) -> Buffers:
        """What is to be written at *host_offset* of the file for *bufs*, whole sectors at *guest_offset*."""
        secret = await self.cipher.encrypted(self._number(host_offset, guest_offset), b"".join(bufs))
        return (memoryview(secret),)

    def _number(self, host_offset: int, guest_offset: int) -> int:
        return (guest_offset if self.volume is None else host_offset) // SECTOR


def required_secret(options: EncryptionOptions | LuksEncryption | AesEncryption | UnsetType) -> str:
    """The name of the secret in *options*.  Raises OptionError."""
    if isinstance(options, UnsetType) or options.key_secret is UNSET:
        raise OptionError("Parameter 'encrypt.key-secret' is required for cipher")
    return str(options.key_secret)


async def unlock_image(
    file: Child, header: Header, options: EncryptionOptions | UnsetType, objects: Objects
) -> Encryption | None:
    """What opens the image in *file*; None if it is not encrypted.

    Suspends while the LUKS header is read and a key looked for.  Raises OptionError, ImageError, BlockIOError.
    """
    given = None if isinstance(options, UnsetType) else options.format
    if not header.crypt_method:
        if given is not None:
            raise OptionError(f"No encryption in image header, but options specified format '{given}'")
        return None
    kind = _FORMATS[header.crypt_method]
    if given not in (None, kind):
        raise OptionError(f"Header reported '{kind}' encryption format but options specify '{given}'")
    secret = required_secret(options)
    # with OpenSSL they take some megabytes, which other images need not pay for
    from fusebd.crypto.ciphers import SectorCipher
    from fusebd.crypto.luks import HeaderFile, unlock

    password = objects.password(secret)
    if header.crypt_method == ondisk.CRYPT_AES:
        key = password[:_AES_KEY_BYTES].ljust(_AES_KEY_BYTES, b"\0")
        return Encryption(SectorCipher(key, "cbc", "plain64"), None, secret)
    place = HeaderFile(file, header.crypto_header_offset, header.crypto_header_length)
    volume = await unlock(place, password)
    return Encryption(volume.cipher, volume, secret)
