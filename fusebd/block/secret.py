"""secret: a password or key that other options name by its id, so that it need not stand among them.

Options: QAPI SecretProperties.  Behaviour and texts: QEMU crypto/secret.c, crypto/secret_common.c, util/base64.c.
"""

from __future__ import annotations

import binascii
import os
import re
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import trio
from msgspec import UNSET, Meta, UnsetType

from fusebd.block.options import Json
from fusebd.block.userobject import ObjectOptions, UserObject
from fusebd.errors import OpenError, OptionError

if TYPE_CHECKING:
    from fusebd.block.objects import Objects

#: the longest file that is taken for a secret, in bytes
_MAX_SIZE = 1 << 20
#: of AES-256, in bytes
_KEY_LENGTH, _BLOCK = 32, 16


class SecretOptions(ObjectOptions, frozen=True, kw_only=True):
    format: Annotated[Literal["raw", "base64"] | UnsetType, Meta(description="how the secret is written")] = UNSET
    keyid: Annotated[str | UnsetType, Meta(description="secret that it is encrypted with, AES-256-CBC")] = UNSET
    iv: Annotated[str | UnsetType, Meta(description="initialisation vector of the encryption, base64")] = UNSET
    data: Annotated[str | UnsetType, Meta(description="the secret itself")] = UNSET
    file: Annotated[str | UnsetType, Meta(description="file that has the secret")] = UNSET


class Secret(UserObject):
    """``value`` is what was given when it was made; properties that change later do not change it, as in QEMU."""

    qom_type = "secret"
    qom_parent = "secret_common"
    options_class = SecretOptions
    defaults: ClassVar[dict[str, Json]] = {"format": "raw", "keyid": "", "iv": "", "data": "", "file": ""}
    property_types: ClassVar[dict[str, str]] = {"format": "QCryptoSecretFormat"}

    value: bytes

    def __init__(self, options: SecretOptions) -> None:
        super().__init__(options)
        self._given = {name for name in ("data", "file", "keyid", "iv") if getattr(options, name) is not UNSET}

    async def complete(self, objects: Objects) -> None:
        """Suspends while the file is read.  Raises OptionError, OpenError."""
        if {"data", "file"} <= self._given:
            raise OptionError("'file' and 'data' are mutually exclusive")
        if not {"data", "file"} & self._given:
            raise OptionError("Either 'file' or 'data' must be provided")
        if "file" in self._given:
            value = await trio.to_thread.run_sync(_read_file, self.values["file"])
        else:
            value = self.values["data"].encode(errors="surrogateescape")
        if "keyid" in self._given:
            key = objects.secret(self.values["keyid"]).value
            if len(key) != _KEY_LENGTH:
                raise OptionError(f"Key should be {_KEY_LENGTH} bytes in length")
            if "iv" not in self._given:
                raise OptionError("IV is required to decrypt secret")
            vector = _from_base64(self.values["iv"].encode(errors="surrogateescape"))
            if len(vector) != _BLOCK:
                raise OptionError(f"IV should be {_BLOCK} bytes in length not {len(vector)}")
        if self.values["format"] == "base64":
            value = _from_base64(value)
        self.value = _decrypted(value, key, vector) if "keyid" in self._given else value


def _read_file(path: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise OpenError.from_os(f"Unable to read {path}: Failed to open file \u201c{path}\u201d", error) from None
    value = b""
    try:
        while len(value) <= _MAX_SIZE and (piece := os.read(descriptor, _MAX_SIZE)):
            value += piece
    except OSError as error:
        raise OpenError.from_os(f"Unable to read {path}: Error reading file \u201c{path}\u201d", error) from None
    finally:
        os.close(descriptor)
    if len(value) > _MAX_SIZE:
        raise OpenError(f"Unable to read {path}: it has more than {_MAX_SIZE} bytes")
    return value


def _from_base64(text: bytes) -> bytes:
    if b"\0" in text:
        raise OptionError("Base64 data contains embedded NUL characters")
    if not re.fullmatch(rb"[A-Za-z0-9+/=\n]*", text):
        raise OptionError("Base64 data contains invalid characters")
    text = text.replace(b"\n", b"")
    try:
        # GLib, which does it for QEMU, leaves out what is no whole group of four
        return binascii.a2b_base64(text[: len(text) // 4 * 4])
    except binascii.Error:
        raise OptionError("Base64 data is malformed") from None


def _decrypted(value: bytes, key: bytes, vector: bytes) -> bytes:
    """*value* decrypted, without the bytes that fill up its last block."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes  # few secrets are secret themselves

    if not value or len(value) % _BLOCK:
        raise OptionError(f"Length {len(value)} must be a multiple of block size {_BLOCK}")
    text = Cipher(algorithms.AES(key), modes.CBC(vector)).decryptor().update(value)
    if text[-1] > _BLOCK:
        raise OptionError(f"Incorrect number of padding bytes ({text[-1]}) found on decrypted data")
    return text[: len(text) - text[-1]]
