"""The commands on exports.  Arguments and results: QEMU's qapi/block-export.json."""

from __future__ import annotations

from typing import Literal

from fusebd.block.export import Exports, parse_export
from fusebd.block.options import Json, OptionStruct
from fusebd.qmp.table import CommandTable, Context, NoArguments

COMMANDS = CommandTable()
command = COMMANDS.command


@command("block-export-add", None)
async def block_export_add(context: Context, arguments: dict[str, Json]) -> None:
    await context.service(Exports).add(parse_export(arguments))


class BlockExportDel(OptionStruct, frozen=True, kw_only=True):
    id: str
    mode: Literal["safe", "hard"] = "safe"


@command("block-export-del", BlockExportDel)
async def block_export_del(context: Context, arguments: BlockExportDel) -> None:
    await context.service(Exports).delete(arguments.id, hard=arguments.mode == "hard")


@command("query-block-exports")
async def query_block_exports(context: Context, arguments: NoArguments) -> Json:
    return context.service(Exports).query()
