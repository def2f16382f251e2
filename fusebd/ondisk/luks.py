"""The header of a LUKS volume, version 1.

Specification: LUKS1 On-Disk Format Specification 1.2.3.  All numbers are big-endian; a sector is 512 bytes.
"""

from __future__ import annotations

import construct as cs

MAGIC = b"LUKS\xba\xbe"
SECTOR = 512
SLOTS = 8
STRIPES = 4000
SLOT_ENABLED, SLOT_DISABLED = 0x00AC71F3, 0x0000DEAD
DIGEST_LENGTH = 20
#: where the first key slot's material may be, in bytes
KEY_MATERIAL_OFFSET = 4096

KEY_SLOT = cs.Struct(
    "active" / cs.Int32ub,
    "iterations" / cs.Int32ub,
    "salt" / cs.Bytes(32),
    "key_material_offset" / cs.Int32ub,  # sectors
    "stripes" / cs.Int32ub,
)
HEADER = cs.Struct(
    "magic" / cs.Bytes(6),
    "version" / cs.Int16ub,
    "cipher_name" / cs.Bytes(32),
    "cipher_mode" / cs.Bytes(32),
    "hash_spec" / cs.Bytes(32),
    "payload_offset" / cs.Int32ub,  # sectors
    "key_bytes" / cs.Int32ub,
    "mk_digest" / cs.Bytes(DIGEST_LENGTH),
    "mk_digest_salt" / cs.Bytes(32),
    "mk_digest_iterations" / cs.Int32ub,
    "uuid" / cs.Bytes(40),
    "key_slots" / KEY_SLOT[SLOTS],
)
HEADER_LENGTH = 592
