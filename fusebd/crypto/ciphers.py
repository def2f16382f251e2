"""Ciphers of disks: each sector of 512 bytes is encrypted by itself, with a vector that follows from its number.

Names and vectors: dm-crypt (Linux Documentation/admin-guide/device-mapper/dm-crypt.rst), QEMU crypto/ivgen-*.c.  The
work is done by OpenSSL, through the package cryptography.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import trio
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fusebd.crypto import SECTOR
from fusebd.errors import ImageError

#: so many bytes are encrypted in a tenth of a millisecond; what is longer goes to a worker thread
_LONG = 8 << 10

Vector = Callable[[int], bytes]

_MODES: dict[str, Callable[[bytes], Any]] = {
    "cbc": modes.CBC,
    "ctr": modes.CTR,
    "xts": modes.XTS,
    "ecb": lambda vector: modes.ECB(),
}
#: hash algorithms, by the names that LUKS headers have for them
HASHES = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "sm3")


def hash_algorithm(name: str) -> str:
    """*name*, if that is an algorithm that hashlib has.  Raises ImageError."""
    if name not in HASHES or name not in hashlib.algorithms_available:
        raise ImageError(f"Hash algorithm '{name}' not supported")
    return name


def cipher_mode(name: str) -> str:
    """*name*, if there is such a mode.  Raises ImageError."""
    if name not in _MODES:
        raise ImageError(f"Cipher mode '{name}' not supported")
    return name


def _plain(sector: int) -> bytes:
    return (sector & 0xFFFF_FFFF).to_bytes(16, "little")


def _plain64(sector: int) -> bytes:
    return sector.to_bytes(16, "little")


def _essiv(key: bytes, hash_name: str) -> Vector:
    """The sector's number, encrypted by a hash of the key."""
    salt = hashlib.new(hash_algorithm(hash_name), key).digest()
    if len(salt) not in (16, 24, 32):
        raise ImageError(f"No AES cipher with key size {len(salt)} available")
    cipher = Cipher(algorithms.AES(salt), modes.ECB())
    return lambda sector: cipher.encryptor().update(_plain64(sector))


class SectorCipher:
    """AES with *key* in the mode *mode* (``cbc``, ``xts``, ...); vectors by *ivgen* (``plain64``, ``essiv``, ...).

    Raises ImageError for what there is not.
    """

    def __init__(self, key: bytes, mode: str, ivgen: str, ivgen_hash: str = "") -> None:
        cipher_mode(mode)
        if len(key) not in ((32, 64) if mode == "xts" else (16, 24, 32)):
            raise ImageError(f"Algorithm 'aes' with key size {len(key)} bytes not supported")
        self._algorithm = algorithms.AES(key)
        self._mode = _MODES[mode]
        if ivgen == "essiv":
            if not ivgen_hash:
                raise ImageError("Missing IV generator hash specification")
            self._vector = _essiv(key, ivgen_hash)
        elif ivgen in ("plain", "plain64"):
            self._vector = _plain if ivgen == "plain" else _plain64
        else:
            raise ImageError(f"IV generator '{ivgen}' not supported")

    def encrypt(self, sector: int, data: bytes | bytearray | memoryview) -> bytes:
        """*data*, whole sectors of which the first is number *sector*, encrypted."""
        return b"".join(
            self._context(sector + at // SECTOR).encryptor().update(data[at : at + SECTOR])
            for at in range(0, len(data), SECTOR)
        )

    def decrypt(self, sector: int, data: bytes | bytearray | memoryview) -> bytes:
        """The inverse of ``encrypt``."""
        return b"".join(
            self._context(sector + at // SECTOR).decryptor().update(data[at : at + SECTOR])
            for at in range(0, len(data), SECTOR)
        )

    def _context(self, sector: int) -> Any:
        return Cipher(self._algorithm, self._mode(self._vector(sector)))

    async def encrypted(self, sector: int, data: bytes | bytearray) -> bytes:
        """``encrypt``, in a worker thread where it takes long."""
        if len(data) <= _LONG:
            return self.encrypt(sector, data)
        return await trio.to_thread.run_sync(self.encrypt, sector, data)

    async def decrypted(self, sector: int, data: bytes | bytearray) -> bytes:
        """``decrypt`` likewise."""
        if len(data) <= _LONG:
            return self.decrypt(sector, data)
        return await trio.to_thread.run_sync(self.decrypt, sector, data)
