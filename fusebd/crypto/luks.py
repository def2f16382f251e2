"""LUKS headers: checked, and unlocked with a password.

Nothing that a header says is used before it was checked.  Specification: LUKS1 On-Disk Format Specification 1.2.3.
Limits, order of checks and messages: QEMU crypto/block-luks.c.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import trio

from fusebd.block.child import Child
from fusebd.block.options import Json
from fusebd.crypto import antiforensic
from fusebd.crypto.ciphers import SectorCipher, cipher_mode, hash_algorithm
from fusebd.errors import BlockIOError, ImageError
from fusebd.ondisk import luks as ondisk

#: the most iterations that are made for a password: an hour's work, a thousand times what cryptsetup has them be
_MAX_ITERATIONS = 1 << 31
HEADER_SECTORS = ondisk.KEY_MATERIAL_OFFSET // ondisk.SECTOR


class HeaderFile:
    """Where a header is: in *child* from byte *offset* on, and nowhere else if it is *length* bytes long.

    All methods suspend where *child* does, and raise BlockIOError.
    """

    def __init__(self, child: Child, offset: int = 0, length: int | None = None) -> None:
        self._child, self._offset, self._length = child, offset, length

    async def read(self, offset: int, length: int) -> bytes:
        """*length* bytes from byte *offset* of the header on.  Raises ImageError, too."""
        self._check(offset + length)
        data = bytearray(length)
        try:
            await self._child.preadv(self._offset + offset, (memoryview(data),))
        except BlockIOError as error:
            raise error.prefixed("Could not read encryption header") from None
        return bytes(data)

    async def write(self, offset: int, data: bytes) -> None:
        """Write *data* at byte *offset* of the header, durably.  Raises ImageError, too."""
        self._check(offset + len(data))
        try:
            await self._child.pwritev(self._offset + offset, (memoryview(data),))
            await self._child.flush()
        except BlockIOError as error:
            raise error.prefixed("Could not write encryption header") from None

    def _check(self, end: int) -> None:
        if self._length is not None and end > self._length:
            raise ImageError("Request for data outside of extension header")


class LuksHeader:
    """A header that was checked; its key slots may change.  *detached*: the payload is elsewhere."""

    def __init__(self, fields: Any, *, detached: bool = False) -> None:
        """*fields* are those of ``ondisk.HEADER``.  Raises ImageError."""
        _check(fields, detached=detached)
        self.fields = fields
        self.spec = _spec(fields)
        self.detached = detached

    @classmethod
    async def load(cls, file: HeaderFile, *, detached: bool = False) -> LuksHeader:
        """The header in *file*.  Suspends where that does.  Raises ImageError, BlockIOError."""
        return cls(ondisk.HEADER.parse(await file.read(0, ondisk.HEADER_LENGTH)), detached=detached)

    @property
    def payload_offset(self) -> int:
        """In bytes from the header's beginning."""
        return int(self.fields.payload_offset) * ondisk.SECTOR

    @property
    def active_slots(self) -> list[int]:
        """The numbers of the key slots that are in use."""
        return [number for number, slot in enumerate(self.fields.key_slots) if slot.active == ondisk.SLOT_ENABLED]

    def material_place(self, number: int) -> tuple[int, int]:
        """Where the key material of slot *number* is: byte offset and length."""
        slot = self.fields.key_slots[number]
        return slot.key_material_offset * ondisk.SECTOR, self.fields.key_bytes * slot.stripes

    async def key_in_slot(self, file: HeaderFile, number: int, password: bytes) -> bytes | None:
        """The master key, if slot *number* is in use and *password* opens it.

        Suspends while it reads, and while a worker thread tries the password.  Raises BlockIOError.
        """
        if number not in self.active_slots:
            return None
        material = await file.read(*self.material_place(number))
        return await trio.to_thread.run_sync(_opened, self.fields, self.spec, number, material, password)

    async def master_key(self, file: HeaderFile, password: bytes) -> bytes:
        """The master key, by the first slot that *password* opens.

        Suspends likewise.  Raises ImageError, BlockIOError.
        """
        for number in self.active_slots:
            if (key := await self.key_in_slot(file, number, password)) is not None:
                return key
        raise ImageError("Invalid password, cannot unlock any keyslot")

    def info(self) -> dict[str, Json]:
        """QAPI QCryptoBlockInfoLUKS."""
        fields, spec = self.fields, self.spec
        bits = fields.key_bytes * 8 // (2 if spec.mode == "xts" else 1)
        slots: list[dict[str, Json]] = []
        for number, slot in enumerate(fields.key_slots):
            found: dict[str, Json] = {"active": slot.active == ondisk.SLOT_ENABLED}
            if found["active"]:
                found |= {"iters": slot.iterations, "stripes": slot.stripes}
            slots.append({**found, "key-offset": self.material_place(number)[0]})
        info: dict[str, Json] = {
            "cipher-alg": f"aes-{bits}",
            "cipher-mode": spec.mode,
            "ivgen-alg": spec.ivgen,
            "hash-alg": spec.hash,
            "detached-header": self.detached,
            "payload-offset": self.payload_offset,
            "master-key-iters": fields.mk_digest_iterations,
            "uuid": _text(fields.uuid, "uuid"),
            "slots": slots,
        }
        if spec.ivgen == "essiv":
            info["ivgen-hash-alg"] = spec.ivgen_hash
        return info


@dataclass(frozen=True, slots=True)
class LuksVolume:
    """An unlocked volume, with its header and where that is."""

    file: HeaderFile
    header: LuksHeader
    cipher: SectorCipher


async def unlock(file: HeaderFile, password: bytes, *, detached: bool = False) -> LuksVolume:
    """The volume whose header is in *file*; *detached*: the payload is elsewhere.

    Suspends while it reads, and while a worker thread tries the key slots.  Raises ImageError, BlockIOError.
    """
    header = await LuksHeader.load(file, detached=detached)
    return LuksVolume(file, header, header.spec.cipher(await header.master_key(file, password)))


@dataclass(frozen=True, slots=True)
class LuksSpec:
    """How a volume is encrypted, as its header says."""

    mode: str
    ivgen: str
    ivgen_hash: str
    hash: str

    def cipher(self, key: bytes) -> SectorCipher:
        return SectorCipher(key, self.mode, self.ivgen, self.ivgen_hash)


def _text(data: bytes, name: str) -> str:
    if b"\0" not in data:
        raise ImageError(f"LUKS header {name} is not NUL terminated")
    return data.partition(b"\0")[0].decode("utf-8", "replace")


def _check(header: Any, *, detached: bool) -> None:
    if header.magic != ondisk.MAGIC:
        raise ImageError("Volume is not in LUKS format")
    if header.version != 1:
        raise ImageError(f"LUKS version {header.version} is not supported")
    for field, name in (("cipher_name", "cipher name"), ("cipher_mode", "cipher mode"), ("hash_spec", "hash spec")):
        _text(header[field], name)
    if not detached and header.payload_offset < HEADER_SECTORS:
        raise ImageError("LUKS payload is overlapping with the header")
    if header.mk_digest_iterations == 0:
        raise ImageError("LUKS key iteration count is zero")
    areas = []
    for number, slot in enumerate(header.key_slots):
        if slot.stripes != ondisk.STRIPES:
            raise ImageError(f"Keyslot {number} is corrupted (stripes {slot.stripes} != {ondisk.STRIPES})")
        if slot.active not in (ondisk.SLOT_ENABLED, ondisk.SLOT_DISABLED):
            raise ImageError(f"Keyslot {number} state (active/disable) is corrupted")
        if slot.active == ondisk.SLOT_ENABLED and slot.iterations == 0:
            raise ImageError(f"Keyslot {number} iteration count is zero")
        start = slot.key_material_offset
        end = start + split_sectors(header.key_bytes)
        if start < HEADER_SECTORS:
            raise ImageError(f"Keyslot {number} is overlapping with the LUKS header")
        if not detached and end > header.payload_offset:
            raise ImageError(f"Keyslot {number} is overlapping with the encrypted payload")
        areas.append((start, end))
    for number, (start, end) in enumerate(areas):
        for other in range(number + 1, len(areas)):
            if start < areas[other][1] and areas[other][0] < end:
                raise ImageError(f"Keyslots {number} and {other} are overlapping in the header")
    counts = [slot.iterations for slot in header.key_slots if slot.active == ondisk.SLOT_ENABLED]
    if max([header.mk_digest_iterations, *counts]) >= _MAX_ITERATIONS:
        raise ImageError("LUKS key iteration count is too large")


def split_sectors(key_bytes: int) -> int:
    """The sectors of a slot's key material, rounded up as where it begins is."""
    sectors = -(-key_bytes * ondisk.STRIPES // ondisk.SECTOR)
    return -(-sectors // HEADER_SECTORS) * HEADER_SECTORS


def _spec(header: Any) -> LuksSpec:
    whole = _text(header.cipher_mode, "cipher mode")
    mode, dash, rest = whole.partition("-")
    if not dash:
        raise ImageError(f"Unexpected cipher mode string format '{whole}'")
    ivgen, _, ivgen_hash = rest.partition(":")
    if ivgen_hash:
        hash_algorithm(ivgen_hash)
    cipher_mode(mode)
    name = _text(header.cipher_name, "cipher name")
    size = header.key_bytes // (2 if mode == "xts" else 1)
    if name != "aes" or size not in (16, 24, 32):
        raise ImageError(f"Algorithm '{name}' with key size {size} bytes not supported")
    spec = LuksSpec(mode, ivgen, ivgen_hash, hash_algorithm(_text(header.hash_spec, "hash spec")))
    spec.cipher(bytes(header.key_bytes))
    return spec


def _opened(fields: Any, spec: LuksSpec, number: int, material: bytes, password: bytes) -> bytes | None:
    """The master key that is split and encrypted in *material*, slot *number*'s, if *password* opens it."""
    slot = fields.key_slots[number]
    opening = hashlib.pbkdf2_hmac(spec.hash, password, slot.salt, slot.iterations, fields.key_bytes)
    split = spec.cipher(opening).decrypt(0, whole_sectors(material))[: len(material)]
    key = antiforensic.merge(split, fields.key_bytes, spec.hash)
    return (
        key if key_digest(spec, key, fields.mk_digest_salt, fields.mk_digest_iterations) == fields.mk_digest else None
    )


def key_digest(spec: LuksSpec, key: bytes, salt: bytes, iterations: int) -> bytes:
    """What a header has of its master key, to know it again by."""
    return hashlib.pbkdf2_hmac(spec.hash, key, salt, iterations, ondisk.DIGEST_LENGTH)


def whole_sectors(data: bytes) -> bytes:
    """*data*, made as long as whole sectors by zeroes: key material of some ciphers ends in the midst of one."""
    return data.ljust(-(-len(data) // ondisk.SECTOR) * ondisk.SECTOR, b"\0")
