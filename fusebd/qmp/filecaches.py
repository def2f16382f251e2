"""The commands on what the kernel may keep of files that show nodes.  fusebd's own: QEMU has none of them."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from fusebd.block.cachemode import CacheMode
from fusebd.block.options import Json, OptionStruct
from fusebd.qmp.table import CommandTable, Context, NoArguments

COMMANDS = CommandTable()
command = COMMANDS.command


class FuseSetCache(OptionStruct, frozen=True, kw_only=True):
    node_name: Annotated[str, Meta(description="node whose file is meant")]
    cache: Annotated[CacheMode, Meta(description="what the kernel may keep of what is opened from now on")]
    mountpoint: Annotated[str | UnsetType, Meta(description="where, if the node is shown more than once")] = UNSET


@command("fuse-set-cache", FuseSetCache)
async def fuse_set_cache(context: Context, arguments: FuseSetCache) -> None:
    mountpoint = None if arguments.mountpoint is UNSET else str(arguments.mountpoint)
    view = context.graph.views.find(arguments.node_name, mountpoint)
    await view.set_cache(arguments.node_name, arguments.cache)


@command("query-fuse-files")
async def query_fuse_files(context: Context, arguments: NoArguments) -> Json:
    return [entry for view in context.graph.views.all for entry in view.cached_files()]
