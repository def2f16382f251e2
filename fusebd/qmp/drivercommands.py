"""The commands that drivers declare: each takes ``node-name`` and what the driver says, and goes to that driver."""

from __future__ import annotations

import msgspec
import trio

from fusebd.block.driver import Driver, DriverCommand, driver_class, driver_names
from fusebd.block.graph import Graph
from fusebd.block.insertion import find_driver, find_inserted, insert_filter, remove_filter
from fusebd.block.options import Json, OptionStruct
from fusebd.qmp.table import Command, CommandTable, Context


def driver_commands() -> CommandTable:
    """The commands of all drivers; makes sure that all of them are imported."""
    table = CommandTable()
    for name in driver_names():
        driver = driver_class(name)
        for command in driver.commands.values():
            table.add(_command(driver, command))
    return table


def _command(driver: type[Driver], command: DriverCommand) -> Command:
    arguments = msgspec.defstruct(
        command.arguments.__name__,
        [("node_name", str)],
        bases=(command.arguments,),
        frozen=True,
        kw_only=True,
    )
    assert issubclass(arguments, OptionStruct)

    async def carry_out(context: Context, given: msgspec.Struct) -> Json:
        name: str = given.node_name  # type: ignore[attr-defined]
        if command.inserts and find_inserted(context.graph, name, driver) is None:
            return await _inserted(context.graph, name, driver, command, given)
        return await command.method(find_driver(context.graph, name, driver), given)

    return Command(command.name, arguments, carry_out, command.allow_oob)


async def _inserted(
    graph: Graph, name: str, driver: type[Driver], command: DriverCommand, given: msgspec.Struct
) -> Json:
    """Insert *driver* above the node *name* and have it carry out *command*; if that fails, it was not inserted."""
    node = await insert_filter(graph, {"driver": driver.name}, name)
    try:
        return await command.method(node.driver, given)
    except BaseException:
        with trio.CancelScope(shield=True):
            await remove_filter(graph, node.name)
        raise
