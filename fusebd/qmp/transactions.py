"""Several actions that take effect together, or not at all, while no request is under way on any of their nodes.

Arguments and messages: QEMU's qapi/transaction.json, qmp_transaction (blockdev.c).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import trio
from msgspec import UNSET, Meta, UnsetType

from fusebd.block.graph import Graph
from fusebd.block.options import Json, OptionStruct, convert
from fusebd.errors import CommandError, FusebdError, OptionError
from fusebd.qmp.table import Command, CommandTable, Context

log = logging.getLogger(__name__)

COMMANDS = CommandTable()
command = COMMANDS.command

A = TypeVar("A", bound=OptionStruct)
C = TypeVar("C", bound="type[Action[Any]]")


class Action(Generic[A]):
    """One action.  Its methods are called with the graph's lock held, and its nodes drained."""

    arguments_class: ClassVar[type[OptionStruct]]

    def __init__(self, arguments: A) -> None:
        self.arguments = arguments

    def nodes(self, graph: Graph) -> list[str]:
        """The names of the nodes that are to be at rest."""
        return []

    async def prepare(self, graph: Graph) -> None:
        """Do it, or so much that only ``commit``, which cannot fail, is left to do.  Raises FusebdError."""

    def commit(self, graph: Graph) -> None:
        """All actions were prepared."""

    async def abort(self, graph: Graph) -> None:
        """Undo ``prepare``, which may have failed: the action, or a later one, cannot be done."""


_ACTIONS: dict[str, type[Action[Any]]] = {}


def action(name: str, arguments: type[OptionStruct], *, alone: bool = True) -> Callable[[C], C]:
    """Class decorator: *name* is the action's ``type``, *arguments* declares its ``data``.

    Unless *alone* is false, it is a command of that name, too.
    """

    def enter(kind: C) -> C:
        async def run(context: Context, given: OptionStruct) -> None:
            await run_all(context.graph, [kind(given)])

        kind.arguments_class = arguments
        _ACTIONS[name] = kind
        if alone:
            COMMANDS.add(Command(name, arguments, run))
        return kind

    return enter


class NoData(OptionStruct, frozen=True, kw_only=True):
    pass


@action("abort", NoData, alone=False)
class AbortAction(Action[NoData]):
    """Fails."""

    async def prepare(self, graph: Graph) -> None:
        raise CommandError("Transaction aborted using Abort action")


async def run_all(graph: Graph, actions: Sequence[Action[Any]]) -> None:
    """Carry out *actions* in their order.  Raises FusebdError; none has been done then."""
    async with graph.lock:
        names = dict.fromkeys(name for one in actions for name in one.nodes(graph))
        nodes = [graph.nodes[name] for name in names if name in graph.nodes and graph.nodes[name].is_open]
        async with graph.drained(*nodes):
            begun: list[Action[Any]] = []
            try:
                for one in actions:
                    begun.append(one)
                    await one.prepare(graph)
            except BaseException:
                with trio.CancelScope(shield=True):
                    for one in reversed(begun):
                        await _abort(graph, one)
                raise
            for one in actions:
                one.commit(graph)


async def _abort(graph: Graph, one: Action[Any]) -> None:
    try:
        await one.abort(graph)
    except FusebdError as error:
        log.error("a part of a transaction cannot be undone: %s", error)


class Properties(OptionStruct, frozen=True, kw_only=True):
    completion_mode: Literal["individual", "grouped"] = "individual"


class Transaction(OptionStruct, frozen=True, kw_only=True):
    actions: Annotated[list[Json], Meta(description="objects with a type and its data")]
    properties: Properties | UnsetType = UNSET


@command("transaction", Transaction)
async def transaction(context: Context, arguments: Transaction) -> None:
    actions = [_parse(value, f"actions[{number}]") for number, value in enumerate(arguments.actions)]
    if arguments.properties is not UNSET and actions:
        mode = arguments.properties.completion_mode
        if mode != "individual":
            name = arguments.actions[0]["type"]
            raise CommandError(f"Action '{name}' does not support transaction property completion-mode = {mode}")
    await run_all(context.graph, actions)


def _parse(value: Json, place: str) -> Action[Any]:
    if not isinstance(value, dict):
        raise OptionError(f"Invalid parameter type for '{place}', expected: object")
    kind = value.get("type")
    if kind is None:
        raise OptionError(f"Parameter '{place}.type' is missing")
    if not isinstance(kind, str):
        raise OptionError(f"Invalid parameter type for '{place}.type', expected: string")
    if kind not in _ACTIONS:
        raise OptionError(f"Parameter 'type' does not accept value '{kind}'")
    if "data" not in value:
        raise OptionError(f"Parameter '{place}.data' is missing")
    if not isinstance(value["data"], dict):
        raise OptionError(f"Invalid parameter type for '{place}.data', expected: object")
    found = _ACTIONS[kind]
    data = convert(value["data"], found.arguments_class, f"{place}.data.")
    if unknown := set(value) - {"type", "data"}:
        raise OptionError(f"Parameter '{place}.{min(unknown)}' is unexpected")
    return found(data)
