"""Commands as they are declared: a name, a struct of arguments, and what carries them out.

A module that adds commands makes a CommandTable of its own and has it merged into the server's::

    table = CommandTable()

    @table.command("block-export-add", ExportOptions)
    async def block_export_add(context: Context, arguments: ExportOptions) -> None:
        await context.service(Exports).add(arguments)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from fusebd.block.options import Json, OptionStruct, convert

if TYPE_CHECKING:
    from fusebd.block.graph import Graph
    from fusebd.qmp.monitor import Monitor

T = TypeVar("T")


class NoArguments(OptionStruct, frozen=True, kw_only=True):
    """The arguments of a command that takes none."""


@dataclass(slots=True)
class Context:
    """What a command can reach.

    *services* has what modules beside the graph need, by type; *quit* ends the daemon, once the answer is sent.
    """

    graph: Graph
    table: CommandTable
    monitor: Monitor
    quit: Callable[[], None]
    services: Mapping[type, Any] = field(default_factory=dict)

    def service(self, kind: type[T]) -> T:
        """The one object of the type *kind* that the server was given."""
        found: T = self.services[kind]
        return found


Handler = Callable[[Context, Any], Awaitable[Json]]


@dataclass(frozen=True, slots=True)
class Command:
    """One command.  *arguments* None: the handler takes the JSON object as it is and validates it itself."""

    name: str
    arguments: type[OptionStruct] | None
    handler: Handler
    allow_oob: bool = False

    async def run(self, context: Context, arguments: dict[str, Json]) -> Json:
        """Carry it out and give what it returns, an empty object if nothing.  Raises FusebdError."""
        given = arguments if self.arguments is None else convert(arguments, self.arguments)
        value = await self.handler(context, given)
        return {} if value is None else value


class CommandTable:
    """Commands by name, in the order in which they were declared.

    *more* makes a table of others, when one is asked for that is not among *tables*, or all of them are.
    """

    def __init__(self, *tables: CommandTable, more: Callable[[], CommandTable] | None = None) -> None:
        self._commands: dict[str, Command] = {}
        self._more = more
        for table in tables:
            self._commands.update(table._commands)
            self._more = self._more or table._more

    def __iter__(self) -> Iterator[Command]:
        self._load_more()
        return iter(self._commands.values())

    def get(self, name: str) -> Command | None:
        if name not in self._commands:
            self._load_more()
        return self._commands.get(name)

    def _load_more(self) -> None:
        more, self._more = self._more, None
        if more is not None:
            self._commands.update(more()._commands)

    def add(self, command: Command) -> None:
        """Add *command*."""
        self._commands[command.name] = command

    def command(
        self, name: str, arguments: type[OptionStruct] | None = NoArguments, *, allow_oob: bool = False
    ) -> Callable[[Handler], Handler]:
        """Decorator: the function carries out *name*.  *allow_oob*: also out of band, so it must never wait."""

        def enter(handler: Handler) -> Handler:
            self.add(Command(name, arguments, handler, allow_oob))
            return handler

        return enter
