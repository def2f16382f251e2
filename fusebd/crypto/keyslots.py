"""LUKS volumes made, and passwords added to them and taken away.

A slot that is being filled has its key material durably in place before the header says so, and the header no longer
says so, durably, before the material of a slot is destroyed: at each moment the header is true.

Specification: LUKS1 On-Disk Format Specification 1.2.3.  Behaviour and messages: QEMU crypto/block-luks.c.
"""

from __future__ import annotations

import copy
import hashlib
import secrets
import time
import uuid
from typing import Any

import trio
from msgspec import UNSET, UnsetType

from fusebd.block.objects import Objects
from fusebd.crypto import antiforensic
from fusebd.crypto.luks import (
    HEADER_SECTORS,
    HeaderFile,
    LuksHeader,
    LuksSpec,
    LuksVolume,
    key_digest,
    split_sectors,
    whole_sectors,
)
from fusebd.crypto.options import DEFAULT_ITER_TIME, KeySlotChange, LuksParameters
from fusebd.errors import CommandError, ImageError
from fusebd.ondisk import luks as ondisk

_SALT_BYTES = 32
_LEAST_ITERATIONS = 1000
#: seconds of work by which is measured how much of it a second has room for
_MEASURED = 0.05


async def new_volume(parameters: LuksParameters, *, detached: bool) -> tuple[LuksHeader, bytes]:
    """A header without passwords, and the master key that ``fill_slot`` is to put into it.

    Suspends while a worker thread calculates.  Raises CommandError, ImageError.
    """
    if parameters.iter_time <= 0:
        raise CommandError("iter-time must be greater than 0")
    return await trio.to_thread.run_sync(_new_volume, parameters, detached)


def header_length(header: LuksHeader) -> int:
    """The bytes up to the end of the last key slot's material."""
    return (HEADER_SECTORS + ondisk.SLOTS * split_sectors(header.fields.key_bytes)) * ondisk.SECTOR


async def fill_slot(
    file: HeaderFile, header: LuksHeader, number: int, password: bytes, key: bytes, iter_time: int
) -> None:
    """Have *password* open slot *number*, so that a guess takes *iter_time* milliseconds; *key* is the master key.

    Suspends while a worker thread calculates and the header is written.  Raises CommandError, BlockIOError.
    """
    salt = secrets.token_bytes(_SALT_BYTES)
    iterations, material = await trio.to_thread.run_sync(_locked, header, number, password, salt, key, iter_time)
    await file.write(header.material_place(number)[0], material)
    await _store(file, header, number, active=ondisk.SLOT_ENABLED, iterations=iterations, salt=salt)


async def erase_slot(file: HeaderFile, header: LuksHeader, number: int) -> None:
    """Have no password open slot *number* any more.  Suspends while the header is written.  Raises BlockIOError."""
    await _store(file, header, number, active=ondisk.SLOT_DISABLED, iterations=0, salt=bytes(_SALT_BYTES))
    offset, length = header.material_place(number)
    await file.write(offset, secrets.token_bytes(length))


async def change_slots(
    volume: LuksVolume, change: KeySlotChange, objects: Objects, opened_by: str, *, force: bool
) -> None:
    """Fill the slot, or erase those, that *change* says; *opened_by* is the secret that opened the volume.

    *force*: also where a password would be overwritten, or none be left.  Suspends as those do.  Raises FusebdError.
    """
    if change.state == "active":
        await _add(volume.file, volume.header, change, objects, opened_by, force=force)
    else:
        await _remove(volume.file, volume.header, change, objects, force=force)


async def _add(
    file: HeaderFile, header: LuksHeader, change: KeySlotChange, objects: Objects, opened_by: str, *, force: bool
) -> None:
    if isinstance(change.new_secret, UnsetType):
        raise CommandError("'new-secret' is required to activate a keyslot")
    if change.old_secret is not UNSET:
        raise CommandError("'old-secret' must not be given when activating keyslots")
    iter_time = DEFAULT_ITER_TIME if isinstance(change.iter_time, UnsetType) else change.iter_time
    if iter_time <= 0:
        raise CommandError("iter-time must be greater than 0")
    if isinstance(change.keyslot, UnsetType):
        free = sorted(set(range(ondisk.SLOTS)) - set(header.active_slots))
        if not free:
            raise CommandError("Can't add a keyslot - all keyslots are in use")
        number = free[0]
    else:
        number = _checked(change.keyslot % 2**32)
    if number in header.active_slots and not force:
        raise CommandError(f"Refusing to overwrite active keyslot {number} - please erase it first")
    old = objects.password(opened_by if isinstance(change.secret, UnsetType) else change.secret)
    key = await header.master_key(file, old)
    await fill_slot(file, header, number, objects.password(change.new_secret), key, iter_time)


async def _remove(
    file: HeaderFile, header: LuksHeader, change: KeySlotChange, objects: Objects, *, force: bool
) -> None:
    for name in ("new_secret", "iter_time", "secret"):
        if getattr(change, name) is not UNSET:
            raise CommandError(f"'{name.replace('_', '-')}' must not be given when erasing keyslots")
    old = None if isinstance(change.old_secret, UnsetType) else objects.password(change.old_secret)
    if not isinstance(change.keyslot, UnsetType):
        number = _checked(change.keyslot)
        if old is not None and await header.key_in_slot(file, number, old) is None:
            raise CommandError(f"Given keyslot {number} doesn't contain the given old password for erase operation")
        if number not in header.active_slots and not force:
            raise CommandError(f"Given keyslot {number} is already erased (inactive) ")
        if len(header.active_slots) == 1 and not force:
            raise CommandError(
                f"Attempt to erase the only active keyslot {number} which will erase all the data in the image "
                "irreversibly - refusing operation"
            )
        numbers = [number]
    elif old is not None:
        numbers = [n for n in header.active_slots if await header.key_in_slot(file, n, old) is not None]
        if not numbers:
            raise CommandError("No keyslots match given (old) password for erase operation")
        if numbers == header.active_slots and not force:
            raise CommandError(
                "All the active keyslots match the (old) password that was given and erasing them will erase all the "
                "data in the image irreversibly - refusing operation"
            )
    else:
        raise CommandError(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be "
            "given"
        )
    for number in numbers:
        await erase_slot(file, header, number)


def _checked(number: int) -> int:
    if not 0 <= number < ondisk.SLOTS:
        raise CommandError(f"Invalid keyslot {number} specified, must be between 0 and {ondisk.SLOTS - 1}")
    return number


async def _store(file: HeaderFile, header: LuksHeader, number: int, **changes: Any) -> None:
    """Write the header with *changes* of slot *number*, durably."""
    fields = copy.deepcopy(header.fields)
    fields.key_slots[number].update(changes)
    await file.write(0, ondisk.HEADER.build(fields))
    header.fields = fields


def _new_volume(parameters: LuksParameters, detached: bool) -> tuple[LuksHeader, bytes]:
    """What ``new_volume`` says."""
    cipher, _, bits = parameters.cipher_alg.rpartition("-")
    xts = parameters.cipher_mode == "xts"
    if cipher != "aes" or (xts and bits == "192"):
        raise ImageError(f"Unsupported cipher algorithm {parameters.cipher_alg} with {parameters.cipher_mode} mode")
    key = secrets.token_bytes(int(bits) // 8 * (2 if xts else 1))
    vectors: str = parameters.ivgen_alg
    if parameters.ivgen_hash_alg is not UNSET or vectors == "essiv":
        vectors += ":" + ("sha256" if parameters.ivgen_hash_alg is UNSET else str(parameters.ivgen_hash_alg))
    material = split_sectors(len(key))
    slot = {"active": ondisk.SLOT_DISABLED, "iterations": 0, "salt": bytes(_SALT_BYTES), "stripes": ondisk.STRIPES}
    places = [HEADER_SECTORS + number * material for number in range(ondisk.SLOTS + 1)]
    salt = secrets.token_bytes(_SALT_BYTES)
    fields = {
        "magic": ondisk.MAGIC,
        "version": 1,
        "cipher_name": cipher.encode().ljust(32, b"\0"),
        "cipher_mode": f"{parameters.cipher_mode}-{vectors}".encode().ljust(32, b"\0"),
        "hash_spec": parameters.hash_alg.encode().ljust(32, b"\0"),
        "payload_offset": 0 if detached else places[-1],
        "key_bytes": len(key),
        "mk_digest": bytes(ondisk.DIGEST_LENGTH),
        "mk_digest_salt": salt,
        "mk_digest_iterations": _LEAST_ITERATIONS,
        "uuid": str(uuid.uuid4()).encode().ljust(40, b"\0"),
        "key_slots": [{**slot, "key_material_offset": place} for place in places[:-1]],
    }
    header = LuksHeader(ondisk.HEADER.parse(ondisk.HEADER.build(fields)), detached=detached)
    header.spec.cipher(key)
    # the master key is random: an eighth of the time is enough to check it, as with cryptsetup
    work = _iterations(header.spec, key, salt, ondisk.DIGEST_LENGTH, parameters.iter_time) // 8
    header.fields.mk_digest_iterations = max(work, _LEAST_ITERATIONS)
    header.fields.mk_digest = key_digest(header.spec, key, salt, header.fields.mk_digest_iterations)
    return header, key


def _locked(
    header: LuksHeader, number: int, password: bytes, salt: bytes, key: bytes, iter_time: int
) -> tuple[int, bytes]:
    """The iterations that *password* gets, and the master key *key* split and encrypted for slot *number*."""
    spec = header.spec
    iterations = max(_iterations(spec, password, salt, len(key), iter_time), _LEAST_ITERATIONS)
    closing = hashlib.pbkdf2_hmac(spec.hash, password, salt, iterations, len(key))
    split = antiforensic.split(key, header.fields.key_slots[number].stripes, spec.hash)
    return iterations, spec.cipher(closing).encrypt(0, whole_sectors(split))[: len(split)]


def _iterations(spec: LuksSpec, secret: bytes, salt: bytes, length: int, iter_time: int) -> int:
    """How many iterations to *length* bytes take *iter_time* milliseconds of this processor."""
    count, spent = _LEAST_ITERATIONS // 2, 0.0
    while spent < _MEASURED:
        count *= 2
        started = time.thread_time()
        hashlib.pbkdf2_hmac(spec.hash, secret, salt, count, length)
        spent = time.thread_time() - started
    iterations = int(count / spent * iter_time / 1000)
    if iterations >= 1 << 31:
        raise CommandError(f"PBKDF iterations {iterations} larger than {(1 << 31) - 1}")
    return iterations
