"""raw: a window of its child, or all of it, without any structure.

Options: QAPI BlockdevOptionsRaw.  Behaviour: QEMU block/raw-format.c.
"""

from __future__ import annotations

import errno
from typing import Annotated, ClassVar

from msgspec import UNSET, Meta, UnsetType

from fusebd.block.driver import (
    BlockStatus,
    Buffers,
    Bypass,
    Child,
    FormatDriver,
    Node,
    Preallocation,
    Status,
    best_format,
    nbytes,
    register,
)
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef, Int
from fusebd.block.perms import Perm, Role, default_perms
from fusebd.block.reopening import Reopening
from fusebd.errors import BlockIOError, FusebdError, NotSupported, OptionError

_SECTOR = 512


class RawOptions(BlockdevOptions, frozen=True, kw_only=True):
    file: Annotated[BlockdevRef, Meta(description="the node whose bytes are shown")]
    offset: Annotated[Int | UnsetType, Meta(description="first byte of the window, 0 if absent")] = UNSET
    size: Annotated[Int | UnsetType, Meta(description="length of the window in bytes, a multiple of 512")] = UNSET


def _window(options: RawOptions) -> tuple[int, int | None]:
    """The first byte that is shown, and how many are: None for all that follow."""
    offset = 0 if options.offset is UNSET else int(options.offset)
    return offset, None if options.size is UNSET else int(options.size)


def _check_window(options: RawOptions) -> None:
    """Raises OptionError where no file has such a window."""
    for name, value in zip(("offset", "size"), _window(options), strict=True):
        if value is not None and value < 0:
            raise OptionError(f"Value '{value}' is out of range for parameter '{name}'")


def _check_fits(options: RawOptions, length: int) -> None:
    """Raises OptionError where a file of *length* bytes has no such window."""
    offset, size = _window(options)
    if offset > length:
        raise OptionError(f"Offset ({offset}) cannot be greater than size of the containing file ({length})")
    if size is not None and length - offset < size:
        raise OptionError(
            f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the "
            f" actual size of the containing file ({length})"
        )
    if size is not None and size % _SECTOR:
        raise OptionError(f"Specified size is not multiple of {_SECTOR}")


class RawReopening(Reopening):
    """Another window, which must be one of the file that there is then."""

    driver: Raw

    def prepare(self) -> None:
        _check_window(self.options)
        if self.changed:
            file = self.children.get("file") or self.driver.file.node
            _check_fits(self.options, file.driver.length)
            self.changes_content = self.changes_descriptor = True

    def apply(self) -> None:
        self.driver.set_window(self.options)
        self.node.refresh_edges()

    def undo(self) -> None:
        assert isinstance(self.node.options, RawOptions)
        self.driver.set_window(self.node.options)
        self.node.refresh_edges()


@register("raw", RawOptions)
class Raw(FormatDriver):
    """Every request goes to ``file``, moved by the offset.  Announces read_aio and write_aio to it."""

    strong_options = frozenset({"offset", "size"})
    changeable: ClassVar[frozenset[str] | None] = frozenset({"offset", "size"})
    resettable = frozenset({"offset", "size"})
    reopening = RawReopening

    def __init__(self, node: Node, file: Child, options: RawOptions) -> None:
        super().__init__(node)
        self.file = file
        self._probed = False
        self.set_window(options)
        self.length = self._length_over(file)

    @classmethod
    async def open(cls, opening: Opening, options: RawOptions) -> Raw:
        offset, size = _window(options)
        _check_window(options)
        role = Role.PRIMARY | (Role.DATA if offset or size is not None else Role.FILTERED)
        file = await opening.child("file", options.file, role)
        _check_fits(options, file.node.driver.length)
        return cls(opening.node, file, options)

    @classmethod
    def probe(cls, data: bytes, name: str) -> int:
        return 1

    @classmethod
    def child_perm(cls, node: Node, child: str, role: Role, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        taken, given = default_perms(role, perm, shared, writable=not node.read_only)
        # There is no metadata that would have to be written or to grow when the parents do not ask for it.
        changes = Perm.WRITE | Perm.RESIZE
        return taken & ~changes | perm & changes, given

    @property
    def supports_fua(self) -> bool:
        return self.file.driver.supports_fua

    def set_window(self, options: RawOptions) -> None:
        """Show what *options* say.  The length stays as it is until ``child_resized``."""
        self._offset, self._size = _window(options)

    def _length_over(self, file: Child) -> int:
        length = max(file.node.driver.length - self._offset, 0)
        return length if self._size is None else min(length, self._size)

    def child_resized(self, child: Child) -> None:
        self.node.set_length(self._length_over(child))

    def read_bypass(self) -> Bypass | None:
        return self._bypass("read_aio", "read") if self.shows_child else None

    def was_probed(self) -> None:
        self._probed = True
        self.limits.request_alignment = _SECTOR
        self.node.refresh_edges()

    def write_bypass(self) -> Bypass | None:
        return self._bypass("write_aio", "write") if self.shows_child and not self._probed else None

    def _bypass(self, event: str, operation: str) -> Bypass | None:
        """Past here, if *event* need not be announced, or the child can do without hearing of it from here."""
        if event not in self.file.events:
            return Bypass(self.file)
        concerns = self.file.driver.announcing(event, operation)
        return None if concerns is None else Bypass(self.file, concerns, asks_below=True)

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        file = self.file
        if "read_aio" in file.events:
            await file.announce("read_aio")
        await file.preadv(offset + self._offset, bufs)

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        file = self.file
        self._check_inside(offset, nbytes(bufs))
        if self._probed and offset < _SECTOR:
            self._check_stays_raw(bufs)
        if "write_aio" in file.events:
            await file.announce("write_aio")
        await file.pwritev(offset + self._offset, bufs, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self._check_inside(offset, length)
        await self.file.pwrite_zeroes(offset + self._offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        await self.file.pdiscard(offset + self._offset, length)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        return BlockStatus(Status.RAW | Status.OFFSET_VALID, length, offset + self._offset, self.file.node)

    async def truncate(
        self, length: int, *, exact: bool = False, prealloc: Preallocation = "off", zero: bool = False
    ) -> None:
        if self._size is not None:
            raise self._failed("resize", errno.ENOTSUP, "Cannot resize fixed-size raw disks")
        if length > 2**63 - 1 - self._offset:
            raise self._failed("resize", errno.EINVAL, "Disk size too large for the chosen offset")
        await self.file.truncate(length + self._offset, exact=exact, prealloc=prealloc, zero=zero)

    @property
    def shows_child(self) -> bool:
        return not self._offset and self._size is None

    def backing_descriptor(self) -> int:
        if self._offset or self._size is not None:
            reason = "raw has an offset or a size"
            raise NotSupported(node_name=self.node.name, operation="passthrough", reason=reason)
        return self.file.node.backing_descriptor()

    def _check_inside(self, offset: int, length: int) -> None:
        """What is behind a window of fixed size is not this node's, even if the edge may resize."""
        if self._size is not None and offset + length > self._size:
            raise self._failed("write", errno.ENOSPC)

    def _check_stays_raw(self, bufs: Buffers) -> None:
        """EPERM for a first sector by which the image would be taken for another format when it is probed next."""
        first = b"".join(bytes(buf[:_SECTOR]) for buf in bufs)[:_SECTOR]
        if best_format(first, "") != "raw":
            raise self._failed("write", errno.EPERM)

    def _failed(self, operation: str, code: int, reason: str = "") -> FusebdError:
        return BlockIOError(code, node_name=self.node.name, operation=operation, reason=reason)
