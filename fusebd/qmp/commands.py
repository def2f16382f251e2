"""The commands of every fusebd: the protocol's own, and those that change or show the graph of block nodes.

Arguments and results: QEMU's qapi/block-core.json, qapi/control.json, qapi/misc.json; texts: blockdev.c.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Literal

import trio
from msgspec import UNSET, UnsetType

from fusebd.block.graph import Graph
from fusebd.block.membership import change_children
from fusebd.block.options import Int, Json, OptionStruct
from fusebd.block.reopen import reopen
from fusebd.errors import BlockIOError, CommandError, GraphError
from fusebd.qmp import bitmaps, exports, filecaches, filters, images, jobs, objects, queries, snapshots, transactions
from fusebd.qmp.drivercommands import driver_commands
from fusebd.qmp.monitor import version_info
from fusebd.qmp.table import CommandTable, Context, NoArguments

_OWN = CommandTable()
command = _OWN.command


class Capabilities(OptionStruct, frozen=True, kw_only=True):
    enable: tuple[Literal["oob"], ...] = ()


@command("qmp_capabilities", Capabilities)
async def qmp_capabilities(context: Context, arguments: Capabilities) -> None:
    context.monitor.negotiate(list(arguments.enable))


@command("query-version")
async def query_version(context: Context, arguments: NoArguments) -> Json:
    return version_info()


@command("query-commands")
async def query_commands(context: Context, arguments: NoArguments) -> Json:
    return [{"name": found.name} for found in context.table]


@command("quit")
async def quit_daemon(context: Context, arguments: NoArguments) -> None:
    context.quit()


#: for how long a node may still be in use by a file that was closed, in seconds
_CLOSING = 0.1


async def _retried(graph: Graph, attempt: Callable[[], Awaitable[object]]) -> None:
    """Carry out *attempt*, and again if it finds a node in use that is not so a moment later.

    The kernel says that a file was closed only after close() has returned, when its user may have come here already.
    """
    deadline = trio.current_time() + _CLOSING
    while True:
        users = set(graph.roots)
        try:
            await attempt()
            return
        except GraphError as error:
            if error.errno != errno.EBUSY:
                raise
            while users <= graph.roots:
                if not users or trio.current_time() >= deadline:
                    raise
                await trio.sleep(_CLOSING / 100)


@command("blockdev-add", None)
async def blockdev_add(context: Context, arguments: dict[str, Json]) -> None:
    await _retried(context.graph, partial(context.graph.blockdev_add, arguments))


class NodeName(OptionStruct, frozen=True, kw_only=True):
    node_name: str


@command("blockdev-del", NodeName)
async def blockdev_del(context: Context, arguments: NodeName) -> None:
    await _retried(context.graph, partial(context.graph.blockdev_del, arguments.node_name))


class BlockdevReopen(OptionStruct, frozen=True, kw_only=True):
    options: list[Json]


@command("blockdev-reopen", BlockdevReopen)
async def blockdev_reopen(context: Context, arguments: BlockdevReopen) -> None:
    await _retried(context.graph, partial(reopen, context.graph, arguments.options))


class BlockResize(OptionStruct, frozen=True, kw_only=True):
    device: str | UnsetType = UNSET
    node_name: str | UnsetType = UNSET
    size: Int


@command("block_resize", BlockResize)
async def block_resize(context: Context, arguments: BlockResize) -> None:
    device = "" if arguments.device is UNSET else arguments.device
    name = "" if arguments.node_name is UNSET else arguments.node_name
    # No node is a device here, so a device name alone finds nothing.
    node = context.graph.nodes.get(name)
    if node is None or not node.is_open:
        raise GraphError(f"Cannot find device='{device}' nor node-name='{name}'")
    try:
        await context.graph.block_resize(name, arguments.size)
    except BlockIOError as error:
        raise CommandError(error.reason) from error


class XBlockdevChange(OptionStruct, frozen=True, kw_only=True):
    parent: str
    child: str | UnsetType = UNSET
    node: str | UnsetType = UNSET


@command("x-blockdev-change", XBlockdevChange)
async def x_blockdev_change(context: Context, arguments: XBlockdevChange) -> None:
    child = None if arguments.child is UNSET else str(arguments.child)
    node = None if arguments.node is UNSET else str(arguments.node)
    change = partial(change_children, context.graph, arguments.parent, child_name=child, node_name=node)
    await _retried(context.graph, change)


class QueryNamedBlockNodes(OptionStruct, frozen=True, kw_only=True):
    flat: bool = False


@command("query-named-block-nodes", QueryNamedBlockNodes)
async def query_named_block_nodes(context: Context, arguments: QueryNamedBlockNodes) -> Json:
    return queries.named_block_nodes(context.graph, flat=arguments.flat)


@command("query-block")
async def query_block(context: Context, arguments: NoArguments) -> Json:
    return queries.block(context.graph)


class QueryBlockstats(OptionStruct, frozen=True, kw_only=True):
    query_nodes: bool = False


@command("query-blockstats", QueryBlockstats)
async def query_blockstats(context: Context, arguments: QueryBlockstats) -> Json:
    return queries.blockstats(context.graph, query_nodes=arguments.query_nodes)


@command("x-debug-query-block-graph")
async def x_debug_query_block_graph(context: Context, arguments: NoArguments) -> Json:
    return queries.block_graph(context.graph)


COMMANDS = CommandTable(
    _OWN,
    exports.COMMANDS,
    objects.COMMANDS,
    filters.COMMANDS,
    filecaches.COMMANDS,
    transactions.COMMANDS,
    snapshots.COMMANDS,
    bitmaps.COMMANDS,
    images.COMMANDS,
    jobs.COMMANDS,
    more=driver_commands,
)
