"""LUKS headers: checked, and unlocked with a password.

Nothing that a header says is used before it was checked.  Specification: LUKS1 On-Disk Format Specification 1.2.3.
Limits, order of checks and messages: QEMU crypto/block-luks.c.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from fusebd.block.options import Json
from fusebd.crypto.ciphers import SectorCipher, cipher_mode, hash_algorithm
from fusebd.errors import ImageError
from fusebd.ondisk import luks as ondisk

#: reads so many bytes from a byte of the header on
Read = Callable[[int, int], Awaitable[bytes]]

#: the most iterations that are made for a password: an hour's work, a thousand times what cryptsetup has them be
_MAX_ITERATIONS = 1 << 31
_HEADER_SECTORS = ondisk.KEY_MATERIAL_OFFSET // ondisk.SECTOR


@dataclass(frozen=True, slots=True)
class LuksVolume:
    """An unlocked volume.  *payload_offset* is in bytes from the header's beginning; *info* is for people."""

    cipher: SectorCipher
    payload_offset: int
    info: dict[str, Json]


async def unlock(read: Read, password: bytes, *, detached: bool = False) -> LuksVolume:
    """The volume whose header *read* gives; *detached*: the payload is elsewhere.

    Suspends while it reads, and while a worker thread tries the key slots.  Raises ImageError, BlockIOError.
    """
    header: Any = ondisk.HEADER.parse(await read(0, ondisk.HEADER_LENGTH))
    _check(header, detached=detached)
    spec = _spec(header)
    materials = []
    for slot in header.key_slots:
        length = header.key_bytes * slot.stripes
        active = slot.active == ondisk.SLOT_ENABLED
        materials.append(await read(slot.key_material_offset * ondisk.SECTOR, length) if active else b"")
    key = await trio.to_thread.run_sync(_find_key, header, spec, materials, password)
    offset = header.payload_offset * ondisk.SECTOR
    return LuksVolume(spec.cipher(key), offset, _info(header, spec, detached=detached))


@dataclass(frozen=True, slots=True)
class _Spec:
    """How a header says that the volume is encrypted."""

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
    if not detached and header.payload_offset < _HEADER_SECTORS:
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
        end = start + _split_sectors(header.key_bytes)
        if start < _HEADER_SECTORS:
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


def _split_sectors(key_bytes: int) -> int:
    """The sectors of a slot's key material, rounded up as where it begins is."""
    sectors = -(-key_bytes * ondisk.STRIPES // ondisk.SECTOR)
    return -(-sectors // _HEADER_SECTORS) * _HEADER_SECTORS


def _spec(header: Any) -> _Spec:
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
    spec = _Spec(mode, ivgen, ivgen_hash, hash_algorithm(_text(header.hash_spec, "hash spec")))
    spec.cipher(bytes(header.key_bytes))
    return spec


def _find_key(header: Any, spec: _Spec, materials: list[bytes], password: bytes) -> bytes:
    """The master key, from the first slot that *password* opens.  *materials*: empty where a slot is not in use."""
    for slot, material in zip(header.key_slots, materials, strict=True):
        if not material:
            continue
        opening = hashlib.pbkdf2_hmac(spec.hash, password, slot.salt, slot.iterations, header.key_bytes)
        padded = material.ljust(-(-len(material) // ondisk.SECTOR) * ondisk.SECTOR, b"\0")
        key = _merge(spec.cipher(opening).decrypt(0, padded)[: len(material)], header.key_bytes, spec.hash)
        digest = hashlib.pbkdf2_hmac(
            spec.hash, key, header.mk_digest_salt, header.mk_digest_iterations, ondisk.DIGEST_LENGTH
        )
        if digest == header.mk_digest:
            return key
    raise ImageError("Invalid password, cannot unlock any keyslot")


def _merge(material: bytes, key_bytes: int, hash_name: str) -> bytes:
    """The key that was split into *material*, the anti-forensic way."""
    key = bytes(key_bytes)
    last = len(material) - key_bytes
    for at in range(0, last, key_bytes):
        key = _diffused(_xor(key, material[at : at + key_bytes]), hash_name)
    return _xor(key, material[last:])


def _xor(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).to_bytes(len(a), "big")


def _diffused(block: bytes, hash_name: str) -> bytes:
    size = hashlib.new(hash_name).digest_size
    parts = []
    for number, at in enumerate(range(0, len(block), size)):
        part = block[at : at + size]
        parts.append(hashlib.new(hash_name, struct.pack(">I", number) + part).digest()[: len(part)])
    return b"".join(parts)


def _info(header: Any, spec: _Spec, *, detached: bool) -> dict[str, Json]:
    """QAPI QCryptoBlockInfoLUKS."""
    bits = header.key_bytes * 8 // (2 if spec.mode == "xts" else 1)
    slots: list[dict[str, Json]] = []
    for slot in header.key_slots:
        found: dict[str, Json] = {"active": slot.active == ondisk.SLOT_ENABLED}
        if found["active"]:
            found |= {"iters": slot.iterations, "stripes": slot.stripes}
        slots.append({**found, "key-offset": slot.key_material_offset * ondisk.SECTOR})
    info: dict[str, Json] = {
        "cipher-alg": f"aes-{bits}",
        "cipher-mode": spec.mode,
        "ivgen-alg": spec.ivgen,
        "hash-alg": spec.hash,
        "detached-header": detached,
        "payload-offset": header.payload_offset * ondisk.SECTOR,
        "master-key-iters": header.mk_digest_iterations,
        "uuid": _text(header.uuid, "uuid"),
        "slots": slots,
    }
    if spec.ivgen == "essiv":
        info["ivgen-hash-alg"] = spec.ivgen_hash
    return info
