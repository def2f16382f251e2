"""Exports: nodes that are offered to the outside one by one, each in the way of its type.

A type is a class registered under its QAPI name together with the declaration of its options.  An export holds its
node by an edge of its own as long as it lives; its end, whatever the cause, is announced as BLOCK_EXPORT_DELETED.

Options: QAPI BlockExportOptions.  Rules and messages: QEMU block/export/export.c.
"""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, ClassVar, TypeVar

import trio
from msgspec import UNSET, Meta, UnsetType

from fusebd.block.eventloop import IoThread
from fusebd.block.graph import Graph
from fusebd.block.identifiers import is_well_formed
from fusebd.block.options import Json, OptionStruct, convert, declared_options, parse_keyval, type_keyval
from fusebd.block.perms import Perm
from fusebd.block.qjson import loads
from fusebd.block.root import UNNAMED, Root
from fusebd.errors import FusebdError, GraphError, OptionError

log = logging.getLogger(__name__)


class ExportOptions(OptionStruct, frozen=True, kw_only=True):
    """Options that every export takes."""

    type: Annotated[str, Meta(description="type of the export")]
    id: Annotated[str, Meta(description="name of the export")]
    node_name: Annotated[str, Meta(description="node to export")]
    writable: Annotated[bool, Meta(description="clients may write")] = False
    writethrough: Annotated[bool, Meta(description="every write is durable when it returns")] = False
    iothread: Annotated[str | UnsetType, Meta(description="an iothread object, accepted and not used")] = UNSET
    fixed_iothread: Annotated[bool, Meta(description="accepted and not used")] = False
    allow_inactive: Annotated[bool, Meta(description="accepted and not used")] = False


class Export(ABC):
    """One export.  *root* is its way in to the node."""

    type_name: ClassVar[str]
    options_class: ClassVar[type[ExportOptions]]

    def __init__(self, root: Root, options: ExportOptions, others: list[Export]) -> None:
        self.root = root
        self.options = options
        self.shutting_down = False
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

    @classmethod
    def perm(cls, options: ExportOptions) -> Perm:
        """What an export with *options* takes of its node."""
        return Perm.CONSISTENT_READ | (Perm.WRITE if options.writable else Perm.NONE)

    @classmethod
    def shared(cls, options: ExportOptions) -> Perm:
        """What others may take of the node of an export with *options*."""
        return Perm.ALL

    @abstractmethod
    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Serve clients until cancelled, or until there is nothing more to serve; ``started`` once it does.

        Raises FusebdError before that if it cannot.
        """

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """``serve`` until ``stop``."""
        try:
            with self._scope:
                await self.serve(task_status=task_status)
        finally:
            self.shutting_down = True

    def stop(self) -> None:
        """End the export; ``Exports`` says when it has ended."""
        self.shutting_down = True
        self._scope.cancel()

    def ended(self) -> None:
        self._ended.set()

    async def wait_ended(self) -> None:
        """Wait until the node is let go."""
        await self._ended.wait()


E = TypeVar("E", bound=Export)

_REGISTRY: dict[str, type[Export]] = {}
#: type -> the module that registers it, imported when the type is first asked for
_MODULES = {"fuse": "fusebd.fuse.export"}


def register(name: str, options: type[ExportOptions]) -> Callable[[type[E]], type[E]]:
    """Class decorator: *name* is the type's name in QAPI, *options* the declaration of its options."""

    def enter(export: type[E]) -> type[E]:
        export.type_name, export.options_class = name, options
        _REGISTRY[name] = export
        return export

    return enter


def export_class(name: str) -> type[Export]:
    """The export type called *name*.  Raises OptionError."""
    if name not in _MODULES:
        raise OptionError(f"Parameter 'type' does not accept value '{name}'")
    importlib.import_module(_MODULES[name])
    return _REGISTRY[name]


def parse_export(value: dict[str, Json]) -> ExportOptions:
    """*value*, the JSON object of a block-export-add, validated.  Raises OptionError."""
    if "type" not in value:
        raise OptionError("Parameter 'type' is missing")
    if not isinstance(value["type"], str):
        raise OptionError("Invalid parameter type for 'type', expected: string")
    return convert(value, export_class(value["type"]).options_class)


def parse_export_text(text: str) -> dict[str, Json]:
    """The JSON object for block-export-add that *text* spells, as ``--export`` takes it: JSON, or key=value.

    The strings of key=value have the types that the export's type declares; otherwise nothing is validated.
    Raises OptionError.
    """
    if text.startswith("{"):
        value = loads(text)
        assert isinstance(value, dict)
        return value
    tree = parse_keyval(text, implied_key="type")
    if not isinstance(tree.get("type"), str):
        return tree
    return type_keyval(tree, declared_options(export_class(tree["type"]).options_class))


class Exports:
    """All exports of one daemon; they are served in *nursery*, and end with it."""

    def __init__(self, graph: Graph, nursery: trio.Nursery) -> None:
        self._graph = graph
        self._nursery = nursery
        self._exports: dict[str, Export] = {}

    async def add(self, options: ExportOptions) -> None:
        """Export a node; returns when clients are served.  Raises FusebdError, with nothing changed then."""
        if not is_well_formed(options.id):
            raise GraphError("Invalid block export id")
        if options.id in self._exports:
            raise GraphError(f"Block export id '{options.id}' is already in use")
        node = self._graph.find(options.node_name)
        if options.writable and node.read_only:
            raise GraphError("Cannot export read-only node as writable")
        if options.iothread is not UNSET and not isinstance(self._graph.objects.get(str(options.iothread)), IoThread):
            raise GraphError(f'iothread "{options.iothread}" not found')
        cls = export_class(options.type)
        root = self._graph.attach_root(node, UNNAMED, cls.perm(options), cls.shared(options))
        try:
            export = cls(root, options, list(self._exports.values()))
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._graph.detach_root(root)
            raise
        self._exports[options.id] = export
        await self._nursery.start(self._run, export)

    async def _run(self, export: Export, *, task_status: trio.TaskStatus[None]) -> None:
        name = export.options.id
        started = _Started(task_status)
        try:
            await export.run(task_status=started)
        except FusebdError as error:
            if not started.done:
                raise
            log.error("export %s: %s", name, error)
        finally:
            with trio.CancelScope(shield=True):
                await self._graph.detach_root(export.root)
            del self._exports[name]
            export.ended()
            if started.done:
                self._graph.emit("BLOCK_EXPORT_DELETED", {"id": name})

    async def delete(self, name: str, *, hard: bool = False) -> None:
        """End the export *name* and wait until it has ended.  Unless *hard*, it must not be in use.

        Raises GraphError in QEMU's words.
        """
        export = self._exports.get(name)
        if export is None:
            raise GraphError(f"Export '{name}' is not found")
        if export.root.in_flight and not hard:
            raise GraphError(f"export '{name}' still in use")
        export.stop()
        await export.wait_ended()

    def query(self) -> list[dict[str, Json]]:
        """QAPI BlockExportInfo of each, the latest first."""
        return [
            {
                "id": name,
                "type": export.type_name,
                "node-name": export.options.node_name,
                "shutting-down": export.shutting_down,
            }
            for name, export in reversed(self._exports.items())
        ]


class _Started(trio.TaskStatus[None]):
    """Passes "started" on, and remembers it."""

    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._task_status = task_status
        self.done = False

    def started(self, value: None = None) -> None:
        self.done = True
        self._task_status.started(value)
