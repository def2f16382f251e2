"""luks: a disk that is encrypted as a whole, behind a LUKS header (version 1) or with the header in another node.

Options: QAPI BlockdevOptionsLUKS.  Behaviour: QEMU block/crypto.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, cast

from msgspec import UNSET, Meta, UnsetType

from fusebd.block.child import copy_into
from fusebd.block.driver import (
    Buffers,
    Child,
    FormatDriver,
    Node,
    Preallocation,
    nbytes,
    register,
)
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef, Json
from fusebd.block.perms import Perm, Role, default_perms
from fusebd.crypto import SECTOR
from fusebd.crypto.options import KeySlotChange
from fusebd.errors import ImageError, OptionError
from fusebd.ondisk import luks as ondisk

if TYPE_CHECKING:
    from fusebd.crypto.luks import LuksVolume

#: the most that is encrypted at once, in bytes
_MAX_TRANSFER = 1 << 20


class LuksOptions(BlockdevOptions, frozen=True, kw_only=True):
    file: Annotated[BlockdevRef, Meta(description="the node that holds the encrypted disk")]
    key_secret: Annotated[str | UnsetType, Meta(description="secret that opens a key slot")] = UNSET
    header: Annotated[BlockdevRef | UnsetType, Meta(description="node with the header, if file does not have it")] = (
        UNSET
    )


class LuksAmendOptions(KeySlotChange, frozen=True, kw_only=True):
    driver: Literal["luks"]


@register("luks", LuksOptions)
class Luks(FormatDriver):
    """Requests are whole sectors.  They suspend where ``file`` does, and while worker threads encrypt."""

    strong_options = frozenset({"key-secret"})
    amend_options = LuksAmendOptions
    creation_module = "fusebd.drivers.luks.creation"

    def __init__(self, node: Node, file: Child, volume: LuksVolume) -> None:
        super().__init__(node)
        self._file, self._volume, self._cipher = file, volume, volume.cipher
        self._offset = volume.header.payload_offset
        self._changing_keys = False
        self.length = file.node.driver.length - self._offset
        self.limits.request_alignment = SECTOR
        self.limits.max_transfer = _MAX_TRANSFER

    @classmethod
    def probe(cls, data: bytes, name: str) -> int:
        return 100 if data[:6] == ondisk.MAGIC and data[6:8] == b"\0\1" else 0

    @classmethod
    async def open(cls, opening: Opening, options: LuksOptions) -> Luks:
        file = await opening.child("file", options.file, Role.IMAGE)
        header = file
        if options.header is not UNSET:
            header = await opening.child("header", options.header, Role.METADATA)
        if options.key_secret is UNSET:
            raise OptionError("Parameter 'key-secret' is required for cipher")
        from fusebd.crypto.luks import HeaderFile, unlock  # OpenSSL takes some megabytes

        password = opening.graph.objects.password(str(options.key_secret))
        volume = await unlock(HeaderFile(header), password, detached=header is not file)
        if volume.header.payload_offset > file.node.driver.length:
            raise ImageError("LUKS payload is past the end of the file")
        return cls(opening.node, file, volume)

    async def amend(self, options: LuksAmendOptions, *, force: bool = False) -> None:
        from fusebd.crypto.keyslots import change_slots

        given, graph = self.node.options, self.node.graph
        assert isinstance(given, LuksOptions)
        self._changing_keys = True
        try:
            graph.refresh_perms([self.node])
            await change_slots(self._volume, options, graph.objects, str(given.key_secret), force=force)
        finally:
            self._changing_keys = False
            graph.refresh_perms([self.node])

    @classmethod
    def child_perm(cls, node: Node, child: str, role: Role, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Others may change the file, too: only what writes the header has it for itself."""
        taken, given = default_perms(role, perm, shared, writable=not node.read_only)
        changes = Perm.WRITE | Perm.RESIZE
        taken, given = taken & ~changes | perm & changes, given | shared & changes
        if node.is_open and cast("Luks", node.driver)._changing_keys:
            taken, given = taken | Perm.WRITE, given & ~(Perm.CONSISTENT_READ | Perm.WRITE)
        return taken, given

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        data = bytearray(nbytes(bufs))
        await self._file.preadv(self._offset + offset, (memoryview(data),))
        copy_into(bufs, memoryview(await self._cipher.decrypted(offset // SECTOR, data)))

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        data = await self._cipher.encrypted(offset // SECTOR, b"".join(bufs))
        await self._file.pwritev(self._offset + offset, (memoryview(data),), flags)

    @property
    def supports_fua(self) -> bool:
        return self._file.driver.supports_fua

    async def truncate(
        self, length: int, *, exact: bool = False, prealloc: Preallocation = "off", zero: bool = False
    ) -> None:
        """What is new is written: unlike in QEMU, it has to read as zeroes."""
        before = self.length
        await self._file.truncate(self._offset + length, exact=exact, prealloc=prealloc)
        for at in range(before, length, _MAX_TRANSFER):
            await self.pwritev(at, (memoryview(bytes(min(_MAX_TRANSFER, length - at))),))
        self.node.set_length(length)

    def child_resized(self, child: Child) -> None:
        if child is self._file:
            self.node.set_length(child.node.driver.length - self._offset)

    def format_info(self) -> dict[str, Json]:
        return {"encrypted": True, "format-specific": {"type": "luks", "data": self._volume.header.info()}}
