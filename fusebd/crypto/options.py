"""What encrypted volumes are made with, and what can be changed about them later.

Options: QAPI QCryptoBlockCreateOptions and QCryptoBlockAmendOptions (qapi/crypto.json).
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from fusebd.block.options import Int, OptionStruct

CipherAlgorithm = Literal[
    "aes-128", "aes-192", "aes-256", "des", "3des", "cast5-128", "serpent-128", "serpent-192", "serpent-256",
    "twofish-128", "twofish-192", "twofish-256", "sm4",
]  # fmt: skip
CipherMode = Literal["ecb", "cbc", "xts", "ctr"]
IvGenerator = Literal["plain", "plain64", "essiv"]
Hash = Literal["md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "sm3"]
#: milliseconds that a guess at a password takes
DEFAULT_ITER_TIME = 2000


class LuksParameters(OptionStruct, frozen=True, kw_only=True):
    """What a LUKS volume is made with."""

    key_secret: Annotated[str | UnsetType, Meta(description="secret with the password")] = UNSET
    cipher_alg: Annotated[CipherAlgorithm, Meta(description="cipher of the data; only AES is there")] = "aes-256"
    cipher_mode: Annotated[CipherMode, Meta(description="its mode")] = "xts"
    ivgen_alg: Annotated[IvGenerator, Meta(description="what the vectors of sectors are made by")] = "plain64"
    ivgen_hash_alg: Annotated[Hash | UnsetType, Meta(description="hash of essiv; default: sha256")] = UNSET
    hash_alg: Annotated[Hash, Meta(description="hash of passwords and of the master key")] = "sha256"
    iter_time: Annotated[Int, Meta(description="how long a guess at the password takes, milliseconds")] = (
        DEFAULT_ITER_TIME
    )


class LuksEncryption(LuksParameters, frozen=True, kw_only=True, tag="luks", tag_field="format"):
    """The same for the LUKS volume in an image."""


class AesEncryption(OptionStruct, frozen=True, kw_only=True, tag="qcow", tag_field="format"):
    """What an image is made with whose key is the password itself."""

    key_secret: Annotated[str | UnsetType, Meta(description="secret with the password")] = UNSET


class KeySlotChange(OptionStruct, frozen=True, kw_only=True):
    """Which key slots of a LUKS volume are to be filled or erased."""

    state: Annotated[Literal["active", "inactive"], Meta(description="whether to fill a key slot or to erase some")]
    new_secret: Annotated[str | UnsetType, Meta(description="secret with the password to be added")] = UNSET
    old_secret: Annotated[str | UnsetType, Meta(description="secret with the password to be taken away")] = UNSET
    keyslot: Annotated[Int | UnsetType, Meta(description="number of the slot; default: the first free one")] = UNSET
    iter_time: Annotated[Int | UnsetType, Meta(description="as when a volume is made")] = UNSET
    secret: Annotated[
        str | UnsetType, Meta(description="secret that opens the volume; default: that it was opened with")
    ] = UNSET


class LuksChange(KeySlotChange, frozen=True, kw_only=True, tag="luks", tag_field="format"):
    """The same for the LUKS volume in an image."""


class AesChange(OptionStruct, frozen=True, kw_only=True, tag="qcow", tag_field="format"):
    """Nothing can be changed about the encryption of an image whose key is the password itself."""
