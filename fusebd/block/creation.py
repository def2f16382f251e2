"""Making image files: what blockdev-create has drivers do.

A driver that can make images has a Creator: the declaration of its options, and the function that makes one.

Behaviour: QEMU block/create.c, bdrv_co_open_blockdev_ref (block.c).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from fusebd.block.driver import driver_class, parse_blockdev
from fusebd.block.graph import Graph
from fusebd.block.options import BlockdevRef, Json, OptionStruct, convert, references
from fusebd.block.perms import Perm
from fusebd.block.root import UNNAMED, Root
from fusebd.errors import CommandError, OptionError


@dataclass(frozen=True, slots=True)
class Creator:
    """*create*, called with an instance of *options*, makes an image.  It suspends; raises FusebdError.

    *options* is a part of QAPI's BlockdevCreateOptions, with the member ``driver``.
    """

    options: type[OptionStruct]
    create: Callable[[Graph, Any], Awaitable[None]]


def parse_creation(graph: Graph, value: dict[str, Json], prefix: str = "") -> Callable[[], Awaitable[None]]:
    """What makes the image that *value*, a BlockdevCreateOptions, describes.

    *prefix* is its place in the whole (``options.``), for messages.  Raises OptionError, CommandError.
    """
    if "driver" not in value:
        raise OptionError(f"Parameter '{prefix}driver' is missing")
    if not isinstance(value["driver"], str):
        raise OptionError(f"Invalid parameter type for '{prefix}driver', expected: string")
    creator = driver_class(value["driver"]).creator()
    if creator is None:
        raise CommandError("Driver does not support blockdev-create")
    options = convert(value, creator.options, prefix)
    for name, ref in references(options):
        if ref.raw is not None:
            ref.options = parse_blockdev(ref.raw, f"{prefix}{name}.")

    async def create() -> None:
        await creator.create(graph, options)

    return create


@asynccontextmanager
async def held(graph: Graph, ref: BlockdevRef, perm: Perm = Perm.NONE) -> AsyncIterator[Root]:
    """A way with *perm* to the node that *ref* names or describes, for as long as the context lasts."""
    async with graph.lock:
        if ref.reference is not None:
            node = graph.find_for_reference(ref.reference)
        else:
            assert ref.options is not None
            node = await graph.open_node(ref.options)
        root = graph.attach_root(node, UNNAMED, Perm.NONE, report_errors=False)
    try:
        if perm:
            async with graph.lock:
                graph.set_root_perms(root, perm, Perm.ALL)
        yield root
    finally:
        with trio.CancelScope(shield=True):
            await graph.detach_root(root)


@asynccontextmanager
async def opened(graph: Graph, options: dict[str, Json], perm: Perm) -> AsyncIterator[Root]:
    """A way with *perm* to a node of its own that *options* describe, for as long as the context lasts."""
    async with held(graph, _described(options), perm) as root:
        yield root


def _described(options: dict[str, Json]) -> BlockdevRef:
    ref = BlockdevRef(options)
    ref.options = parse_blockdev(options)
    return ref
