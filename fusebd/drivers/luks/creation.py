"""Making an encrypted disk: blockdev-create of the driver ``luks``.

Options: QAPI BlockdevCreateOptionsLUKS.  Behaviour and messages: QEMU block_crypto_co_create_luks (block/crypto.c).
"""

from __future__ import annotations

import errno
from contextlib import AsyncExitStack
from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from fusebd.block.creation import Creator, held
from fusebd.block.driver import Preallocation
from fusebd.block.graph import Graph
from fusebd.block.options import BlockdevRef, Uint64
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.crypto.keyslots import fill_slot, header_length, new_volume
from fusebd.crypto.luks import HeaderFile
from fusebd.crypto.options import LuksParameters
from fusebd.errors import BlockIOError, CommandError, OptionError


class LuksCreateOptions(LuksParameters, frozen=True, kw_only=True):
    driver: str
    file: Annotated[BlockdevRef | UnsetType, Meta(description="the node that is to hold the disk")] = UNSET
    header: Annotated[BlockdevRef | UnsetType, Meta(description="the node that is to hold the header")] = UNSET
    size: Annotated[Uint64, Meta(description="length of the disk, bytes")]
    preallocation: Annotated[Preallocation, Meta(description="what has its place in the file from the start")] = "off"


async def _create(graph: Graph, options: LuksCreateOptions) -> None:
    """Make the disk.  Suspends while it is written.

    Raises FusebdError; what was in the file may be gone then.
    """
    file_ref, header_ref = options.file, options.header
    if file_ref is UNSET and header_ref is UNSET:
        raise CommandError("Either the parameter 'header' or 'file' must be specified")
    if options.preallocation != "off" and file_ref is UNSET:
        raise CommandError("Parameter 'preallocation' requires 'file' to be specified for formatting LUKS disk")
    size = options.size % 2**64
    writing = Perm.WRITE | Perm.RESIZE
    async with AsyncExitStack() as stack:
        if isinstance(header_ref, UnsetType):
            assert isinstance(file_ref, BlockdevRef)
            file = await stack.enter_async_context(held(graph, file_ref, writing))
            preallocation = "off" if options.preallocation == "metadata" else options.preallocation
            await _format(graph, file, options, size, preallocation, detached=False)
            return
        header = await stack.enter_async_context(held(graph, header_ref, writing))
        await _format(graph, header, options, 0, "off", detached=True)
        if isinstance(file_ref, BlockdevRef):
            file = await stack.enter_async_context(held(graph, file_ref, writing))
            await _resize(file, size, options.preallocation, exact=True)


async def _format(
    graph: Graph, file: Root, options: LuksCreateOptions, size: int, preallocation: Preallocation, *, detached: bool
) -> None:
    """Make *file* a LUKS volume for *size* bytes."""
    if options.key_secret is UNSET:
        raise OptionError("Parameter 'key-secret' is required for cipher")
    password = graph.objects.password(str(options.key_secret))
    header, key = await new_volume(options, detached=detached)
    await _resize(file, size + header_length(header), preallocation, exact=False)
    await fill_slot(HeaderFile(file), header, 0, password, key, options.iter_time)


async def _resize(file: Root, length: int, preallocation: Preallocation, *, exact: bool) -> None:
    try:
        if length >= 2**63:
            raise BlockIOError(errno.EFBIG)
        await file.truncate(length, exact=exact, prealloc=preallocation)
    except BlockIOError as error:
        reason = "The requested file size is too large" if error.errno == errno.EFBIG else error.reason
        raise CommandError(reason) from None


CREATOR = Creator(LuksCreateOptions, _create)
