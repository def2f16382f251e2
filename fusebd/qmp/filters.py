"""The commands that change a stack while it is in use, and show what failed.  fusebd's own: QEMU has none of them."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from fusebd.block.insertion import insert_filter, remove_filter
from fusebd.block.options import Int, Json, OptionStruct
from fusebd.qmp.table import CommandTable, Context

COMMANDS = CommandTable()
command = COMMANDS.command


class BlockFilterInsert(OptionStruct, frozen=True, kw_only=True):
    node_name: Annotated[str, Meta(description="node to insert the filter above")]
    child: Annotated[str | UnsetType, Meta(description="between the node and this child instead")] = UNSET
    filter: Annotated[dict[str, Json], Meta(description="options of the filter, without the child it is put over")]


@command("block-filter-insert", BlockFilterInsert)
async def block_filter_insert(context: Context, arguments: BlockFilterInsert) -> Json:
    child = None if arguments.child is UNSET else str(arguments.child)
    inserted = await insert_filter(context.graph, arguments.filter, arguments.node_name, child)
    return {"node-name": inserted.name}


class BlockFilterRemove(OptionStruct, frozen=True, kw_only=True):
    node_name: str


@command("block-filter-remove", BlockFilterRemove)
async def block_filter_remove(context: Context, arguments: BlockFilterRemove) -> None:
    await remove_filter(context.graph, arguments.node_name)


class QueryLedger(OptionStruct, frozen=True, kw_only=True):
    since: Annotated[Int, Meta(description="entries with a larger id only")] = 0
    node_name: Annotated[str | UnsetType, Meta(description="entries of this node only")] = UNSET


@command("query-ledger", QueryLedger)
async def query_ledger(context: Context, arguments: QueryLedger) -> Json:
    return [
        entry
        for entry in context.graph.ledger
        if entry["id"] > arguments.since and arguments.node_name in (UNSET, entry["node-name"])
    ]


class LedgerOpen(OptionStruct, frozen=True, kw_only=True):
    filename: Annotated[str, Meta(description="file to append entries to, one JSON object a line")]
    time: Annotated[bool, Meta(description="with the time of each entry, and who asked")] = True


@command("ledger-open", LedgerOpen)
async def ledger_open(context: Context, arguments: LedgerOpen) -> None:
    context.graph.ledger.open_file(arguments.filename, with_time=arguments.time)
