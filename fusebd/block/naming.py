"""The file name that a node is reported under: one that would open the same thing again.

It is a plain name (a path, ``blkdebug:config:image``) if there is one that says it all, else ``json:{...}`` made
of the options that decide what the node contains.

Rules: QEMU bdrv_refresh_filename, append_strong_runtime_options, bdrv_backing_overridden, bdrv_dirname (block.c).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET

from fusebd.block.qjson import bucket, dumps
from fusebd.errors import OpenError

if TYPE_CHECKING:
    from fusebd.block.node import Node

Json = Any


def node_filename(node: Node) -> str:
    """The name of *node* for people and for images: plain, or ``json:{...}``."""
    return node.driver.filename or "json:" + dumps(open_options(node))


def open_options(node: Node) -> dict[str, Json]:
    """Options that would make *node* again: those that decide its content, and its children's likewise."""
    options: dict[str, Json] = {"driver": node.driver_name, **_given_options(node)}
    overridden = backing_overridden(node)
    lists: dict[str, list[Json]] = {}
    for name, child in node.children.items():
        if child is node.backing and not overridden:
            continue
        array, dot, index = name.partition(".")
        if dot and index.isdecimal():
            lists.setdefault(array, []).append(open_options(child.node))
        else:
            options[name] = open_options(child.node)
    options.update(lists)
    if overridden and node.backing is None:
        options["backing"] = None
    return options


def has_strong_options(node: Node) -> bool:
    """Whether *node* was given options, other than its children and a file name, that decide its content."""
    return any(name != "filename" for name in _given_options(node))


def _given_options(node: Node) -> dict[str, Json]:
    """The strong options of *node* by their dotted names, as far as they were given, to be shown in reverse.

    QEMU copies them from one hash table into the next, and a member follows the others of its bucket in the order in
    which they are found in the table before: as the JSON object is flattened, what is not nested at the top first;
    then in the options of each node that this one is described in, outermost first, where the names are longer.
    At last it takes what is nested before what is not.
    """
    path = node.described_as
    members = [member for member in _members(node.options) if member[0] in node.driver.strong_options]
    members.sort(key=lambda member: bucket(member[0]) if path or isinstance(member[1], (list, msgspec.Struct)) else -1)
    given: dict[str, Json] = {}
    for name, value in members:
        _flatten(name, value, given)
    names = list(given)
    for depth in range(len(path)):
        names.sort(key=lambda name: bucket(".".join((*path[depth:], name))))
    names.reverse()
    names.sort(key=lambda name: "." not in name)
    return {name: given[name] for name in names}


def _members(options: msgspec.Struct) -> Iterator[tuple[str, Json]]:
    for field in msgspec.structs.fields(options):
        value = getattr(options, field.name)
        if value is not UNSET and value != field.default:
            yield field.encode_name, value


def _flatten(name: str, value: Json, into: dict[str, Json]) -> None:
    if isinstance(value, msgspec.Struct):
        for key, item in sorted(_members(value), key=lambda member: bucket(member[0])):
            _flatten(f"{name}.{key}", item, into)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _flatten(f"{name}.{index}", item, into)
    else:
        into[name] = value


def backing_overridden(node: Node) -> bool:
    """Whether *node* has another backing node than the one that its image names."""
    named = node.opened_backing or node.driver.format_info().get("backing-filename", "")
    if node.backing is None:
        return bool(named)
    if getattr(node.options, "backing", UNSET) is UNSET:
        return False
    return bool(named != node_filename(node.backing.node))


def base_directory(node: Node) -> str:
    """What relative names in the image that is in *node* begin with: a path that ends in a slash, or nothing.

    Raises OpenError if there is none: where two images with directories of their own are below, or no file.
    """
    child = node.primary_child
    if child is not None and not (node.driver.is_filter and len(node.children) > 1):
        return base_directory(child.node)
    name = "" if child is not None else node.driver.filename
    if not name:
        raise OpenError(f"Cannot generate a base directory for {node.driver_name} nodes")
    return name[: name.rfind("/") + 1]


def format_filename(node: Node) -> str:
    """The plain name of a format node: its file's, if opening that as this format gives just this node; else ""."""
    child = node.primary_child
    if (
        child is None
        or child.node.driver.protocol_prefix is None
        or has_strong_options(node)
        or backing_overridden(node)
    ):
        return ""
    return child.node.driver.filename
