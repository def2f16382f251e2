"""Options of nodes as one flat object: what a node was given, and what it has taken over from its parent.

A key is a dotted name (``cache.direct``, ``inject-error.0.event``).  Children are no part of it.

Meaning: QEMU qdict_flatten (qobject/block-qdict.c), bdrv_inherited_options (block.c), bds_tree_init (blockdev.c).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import msgspec

from fusebd.block.options import BlockdevOptions, Json, declared_options
from fusebd.block.perms import Role

Flat = dict[str, Json]

#: what the topmost node has where nothing is given, and those below it take over
_DEFAULTS: Mapping[str, Json] = {"cache.direct": False, "cache.no-flush": False, "read-only": False}
_INHERITED = ("cache.direct", "cache.no-flush", "force-share")
#: inherited as well, but not by a backing node
_INHERITED_BY_DATA = ("read-only", "auto-read-only")


def flatten(value: Mapping[str, Json]) -> Flat:
    """*value*, a JSON object, with the members of objects and arrays in it as its own.  Empty ones vanish."""
    flat: Flat = {}

    def enter(name: str, item: Json) -> None:
        if isinstance(item, dict):
            for key, inner in item.items():
                enter(f"{name}.{key}", inner)
        elif isinstance(item, list):
            for index, inner in enumerate(item):
                enter(f"{name}.{index}", inner)
        else:
            flat[name] = item

    for key, item in value.items():
        enter(key, item)
    return flat


@functools.cache
def child_options(declaration: type[msgspec.Struct]) -> frozenset[str]:
    """The options of *declaration* that take one device."""
    return frozenset(
        option.name for option in declared_options(declaration) if option.type_name.startswith("BlockdevRef")
    )


def own_options(options: BlockdevOptions) -> Flat:
    """What was given for the node itself in *options*."""
    children = child_options(type(options))
    return {name: value for name, value in flatten(options.given).items() if name.partition(".")[0] not in children}


def inherit(options: Flat, parent: Mapping[str, Json] | None, role: Role) -> None:
    """Add to *options* what a child in *role* takes over from *parent*, if it says nothing itself.

    Without a *parent*, it is a node that was added by itself.
    """
    if parent is None:
        for name, value in _DEFAULTS.items():
            options.setdefault(name, value)
        return
    names = _INHERITED if role & Role.COW else _INHERITED + _INHERITED_BY_DATA
    for name in names:
        if name in parent:
            options.setdefault(name, parent[name])
    if role & Role.COW:
        # a backing file is opened read-only unless it says otherwise itself
        options.setdefault("read-only", True)
        options.setdefault("auto-read-only", False)
    # what is discarded above is discarded below
    options.setdefault("discard", "unmap")
