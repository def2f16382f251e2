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
from fusebd.drivers.qcow2.data import DataFile
from fusebd.drivers.qcow2.header import Header, read_bytes
from fusebd.drivers.qcow2.options import Encryption as EncryptionOptions
from fusebd.errors import ImageError, OptionError
from fusebd.ondisk import qcow2 as ondisk

if TYPE_CHECKING:
    from fusebd.crypto.ciphers import SectorCipher

_FORMATS = {ondisk.CRYPT_AES: "aes", ondisk.CRYPT_LUKS: "luks"}
_AES_KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class Encryption:
    """How the guest data of one image is encrypted; *by_host_offset* says which place a sector's number is of."""

    cipher: SectorCipher
    by_host_offset: bool
    info: dict[str, Json]

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
        return (host_offset if self.by_host_offset else guest_offset) // SECTOR


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
    if isinstance(options, UnsetType) or options.key_secret is UNSET:
        raise OptionError("Parameter 'encrypt.key-secret' is required for cipher")
    # with OpenSSL they take some megabytes, which other images need not pay for
    from fusebd.crypto.ciphers import SectorCipher
    from fusebd.crypto.luks import unlock

    password = objects.password(str(options.key_secret))
    if header.crypt_method == ondisk.CRYPT_AES:
        key = password[:_AES_KEY_BYTES].ljust(_AES_KEY_BYTES, b"\0")
        return Encryption(SectorCipher(key, "cbc", "plain64"), False, {"format": "aes"})

    async def read(offset: int, length: int) -> bytes:
        if offset + length > header.crypto_header_length:
            raise ImageError("Request for data outside of extension header")
        return await read_bytes(file, header.crypto_header_offset + offset, length, "Could not read encryption header")

    volume = await unlock(read, password)
    return Encryption(volume.cipher, True, {"format": "luks", **volume.info})
