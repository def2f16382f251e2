"""Making a regular file: blockdev-create of the driver ``file``.

Options: QAPI BlockdevCreateOptionsFile.  Behaviour: QEMU raw_co_create (block/file-posix.c).
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import Annotated

import trio
from msgspec import UNSET, Meta, UnsetType

from fusebd.block.creation import Creator
from fusebd.block.driver import Preallocation
from fusebd.block.graph import Graph
from fusebd.block.options import OptionStruct, Uint64
from fusebd.block.perms import Perm
from fusebd.drivers.file import syscalls
from fusebd.drivers.file.locks import ImageLocks
from fusebd.drivers.file.resizing import resize_file
from fusebd.errors import CommandError, OpenError

log = logging.getLogger(__name__)

_DEFAULT_EXTENT_SIZE = 1 << 20


class FileCreateOptions(OptionStruct, frozen=True, kw_only=True):
    driver: str
    filename: Annotated[str, Meta(description="path of the file")]
    size: Annotated[Uint64, Meta(description="its length, bytes")]
    preallocation: Annotated[Preallocation, Meta(description="off, falloc or full")] = "off"
    nocow: Annotated[bool, Meta(description="turn off copy on write where the filesystem has it")] = False
    extent_size_hint: Annotated[
        Uint64 | UnsetType, Meta(description="have the filesystem allocate so many bytes at once (default: 1 MiB)")
    ] = UNSET


async def _create(graph: Graph, options: FileCreateOptions) -> None:
    """Make the file, or empty one that nobody else uses.  Suspends while a worker thread does.

    Raises OpenError, PermissionConflict, BlockIOError.
    """
    if options.extent_size_hint is not UNSET and not 0 <= options.extent_size_hint < 2**32:
        raise CommandError("Extent size hint is too large")
    await trio.to_thread.run_sync(_make, options)


def _make(options: FileCreateOptions) -> None:
    try:
        fd = os.open(options.filename, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except ValueError:  # a NUL byte in the name
        raise OpenError(f"Could not create '{options.filename}': Invalid argument") from None
    except OSError as error:
        raise OpenError.from_os(f"Could not create '{options.filename}'", error) from None
    try:
        # That it has the right length at the end can be promised only if nobody else changes it meanwhile.
        ImageLocks(fd, options.filename).hold(Perm.WRITE | Perm.RESIZE, Perm.ALL & ~Perm.RESIZE)
        resize_file(fd, 0, "off")
        if options.nocow:
            with suppress(OSError):  # a help for filesystems that have copy on write
                syscalls.set_nocow(fd)
        hint = options.extent_size_hint
        try:
            syscalls.set_extent_size_hint(fd, _DEFAULT_EXTENT_SIZE if isinstance(hint, UnsetType) else hint)
        except OSError as error:
            if hint:
                log.warning("Failed to set extent size hint: %s", os.strerror(error.errno or 0))
        resize_file(fd, options.size % 2**64, options.preallocation)
    finally:
        os.close(fd)


CREATOR = Creator(FileCreateOptions, _create)
