"""The commands for user-creatable objects: making and deleting them, and QOM, the tree in which they hang.

The tree has one container, ``/objects``; QEMU's others hold what does not exist here.  A path that does not begin with
a slash stands for every path that ends in it; it has to be only one.

Arguments and results: QEMU's qapi/qom.json; texts: qom/qom-qmp-cmds.c, qom/object.c.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import UNSET, UnsetType

from fusebd.block.objects import OBJECT_TYPES, Objects
from fusebd.block.options import Json, OptionStruct
from fusebd.block.userobject import UserObject, property_list
from fusebd.errors import CommandError, DeviceNotFound
from fusebd.qmp.table import CommandTable, Context

COMMANDS = CommandTable()
command = COMMANDS.command

_TYPE_PROPERTY = {"name": "type", "type": "string"}
#: types of which there are no objects, or none that can be made: name -> (parent, whether its kinds can be made)
_OTHER_TYPES = {
    "object": ("", False),
    "container": ("object", False),
    "event-loop-base": ("object", True),
    "secret_common": ("object", True),
    "user-creatable": ("interface", True),
}
_ABSTRACT = frozenset(_OTHER_TYPES) - {"container"}


# --- object-add, object-del ----------------------------------------------------------------------


@command("object-add", None)
async def object_add(context: Context, arguments: dict[str, Json]) -> None:
    await context.graph.objects.add(arguments)


class ObjectId(OptionStruct, frozen=True, kw_only=True):
    id: str


@command("object-del", ObjectId)
async def object_del(context: Context, arguments: ObjectId) -> None:
    context.graph.objects.remove(arguments.id)


# --- the tree ------------------------------------------------------------------------------------


class _Container:
    """An object that does nothing but hold others."""

    def __init__(self, path: str, children: dict[str, _Thing]) -> None:
        self.path, self.children = path, children

    def list(self) -> list[Json]:
        def kind(thing: _Thing) -> str:
            return "container" if isinstance(thing, _Container) else thing.qom_type

        children = [{"name": name, "type": f"child<{kind(thing)}>"} for name, thing in self.children.items()]
        return [_TYPE_PROPERTY, *children]

    def get(self, name: str) -> Json:
        if name == "type":
            return "container"
        self._check_exists(name)
        return f"{self.path}/{name}"

    def set(self, name: str, value: Json) -> None:
        if name != "type":
            self._check_exists(name)
        raise CommandError(f"Property 'container.{name}' is not writable")

    def _check_exists(self, name: str) -> None:
        if name not in self.children:
            raise CommandError(f"Property 'container.{name}' not found")


_Thing = _Container | UserObject


def _tree(objects: Objects) -> _Container:
    return _Container("", {"objects": _Container("/objects", {each.id: each for each in objects if each.completed})})


def _below(thing: _Thing) -> Iterator[_Thing]:
    """*thing* and everything in it."""
    yield thing
    if isinstance(thing, _Container):
        for child in thing.children.values():
            yield from _below(child)


def _resolve(objects: Objects, path: str) -> _Thing:
    """What is at *path*.  Raises DeviceNotFound, and CommandError if that could be several things."""
    parts = [part for part in path.split("/") if part]
    root = _tree(objects)
    starts = [root] if path.startswith("/") else list(_below(root))
    found = [end for start in starts if (end := _walk(start, parts)) is not None]
    if not found:
        raise DeviceNotFound(f"Device '{path}' not found")
    if len(found) > 1:
        raise CommandError(f"Path '{path}' is ambiguous")
    return found[0]


def _walk(thing: _Thing, parts: list[str]) -> _Thing | None:
    for part in parts:
        if not isinstance(thing, _Container) or part not in thing.children:
            return None
        thing = thing.children[part]
    return thing


class QomList(OptionStruct, frozen=True, kw_only=True):
    path: str


@command("qom-list", QomList)
async def qom_list(context: Context, arguments: QomList) -> Json:
    found = _resolve(context.graph.objects, arguments.path)
    return found.list() if isinstance(found, _Container) else property_list(type(found))


class QomGet(OptionStruct, frozen=True, kw_only=True):
    path: str
    property: str


@command("qom-get", QomGet)
async def qom_get(context: Context, arguments: QomGet) -> Json:
    return _only(context.graph.objects, arguments.path).get(arguments.property)


class QomSet(OptionStruct, frozen=True, kw_only=True):
    path: str
    property: str
    value: Json


@command("qom-set", QomSet)
async def qom_set(context: Context, arguments: QomSet) -> None:
    _only(context.graph.objects, arguments.path).set(arguments.property, arguments.value)


def _only(objects: Objects, path: str) -> _Thing:
    """What is at *path*; an ambiguous one leads nowhere."""
    try:
        return _resolve(objects, path)
    except CommandError:
        raise DeviceNotFound(f"Device '{path}' not found") from None


# --- types ---------------------------------------------------------------------------------------


class QomListTypes(OptionStruct, frozen=True, kw_only=True):
    implements: str | UnsetType = UNSET
    abstract: bool = False


@command("qom-list-types", QomListTypes)
async def qom_list_types(context: Context, arguments: QomListTypes) -> Json:
    wanted = "object" if arguments.implements is UNSET else arguments.implements
    found = []
    for name in (*_OTHER_TYPES, *OBJECT_TYPES):
        if wanted not in _ancestry(name) or (name in _ABSTRACT and not arguments.abstract):
            continue
        entry: dict[str, Json] = {"name": name}
        if name in _ABSTRACT:
            entry["abstract"] = True
        if parent := _parent(name):
            entry["parent"] = parent
        found.append(entry)
    return found


def _parent(name: str) -> str:
    kind = OBJECT_TYPES.get(name)
    return kind.qom_parent if kind is not None else _OTHER_TYPES[name][0]


def _ancestry(name: str) -> set[str]:
    """The types that *name* is a kind of, itself included."""
    creatable = name in OBJECT_TYPES or _OTHER_TYPES[name][1]
    found = {"user-creatable"} if creatable else set()
    while name in OBJECT_TYPES or name in _OTHER_TYPES:
        found.add(name)
        name = _parent(name)
    return found


class QomListProperties(OptionStruct, frozen=True, kw_only=True):
    typename: str


@command("qom-list-properties", QomListProperties)
async def qom_list_properties(context: Context, arguments: QomListProperties) -> Json:
    name = arguments.typename
    if name in OBJECT_TYPES:
        return property_list(OBJECT_TYPES[name])
    if name not in _OTHER_TYPES:
        raise DeviceNotFound(f"Class '{name}' not found")
    return [_TYPE_PROPERTY]
