"""Keys spread over so many bytes that one cannot be had again when any of them is lost, and put together again.

Specification: LUKS1 On-Disk Format Specification 1.2.3, "anti-forensic splitter".
"""

from __future__ import annotations

import hashlib
import secrets
import struct


def split(key: bytes, stripes: int, hash_name: str) -> bytes:
    """*key* spread over *stripes* times its length."""
    noise = secrets.token_bytes(len(key) * (stripes - 1))
    return noise + _xor(_folded(noise, len(key), hash_name), key)


def merge(material: bytes, key_bytes: int, hash_name: str) -> bytes:
    """The key of so many bytes that was split into *material*."""
    last = len(material) - key_bytes
    return _xor(_folded(material[:last], key_bytes, hash_name), material[last:])


def _folded(stripes: bytes, key_bytes: int, hash_name: str) -> bytes:
    key = bytes(key_bytes)
    for at in range(0, len(stripes), key_bytes):
        key = _diffused(_xor(key, stripes[at : at + key_bytes]), hash_name)
    return key


def _xor(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).to_bytes(len(a), "big")


def _diffused(block: bytes, hash_name: str) -> bytes:
    size = hashlib.new(hash_name).digest_size
    parts = []
    for number, at in enumerate(range(0, len(block), size)):
        part = block[at : at + size]
        parts.append(hashlib.new(hash_name, struct.pack(">I", number) + part).digest()[: len(part)])
    return b"".join(parts)
