"""File names that stand for whole block stacks: ``json:{...}``, ``blkdebug:config:image``, plain paths.

They are understood where a file name is - in the backing file field of an image, on a command line - and never
in the options of blockdev-add.  What they leave out (a driver, mostly) is filled in as QEMU does: from the name's
protocol prefix, or by looking at the first bytes of the file.

Meaning: QEMU bdrv_fill_options and bdrv_open_inherit (block.c).
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

from fusebd.block.driver import driver_class, parse_blockdev, prefix_driver
from fusebd.block.naming import base_directory
from fusebd.block.node import Node
from fusebd.block.options import BlockdevOptions, Json, declared_options, tree_from_dotted, type_keyval
from fusebd.block.qjson import loads
from fusebd.errors import OpenError, OptionError

#: finds the format of the node that the options describe; suspends while it reads
Prober = Callable[[BlockdevOptions], Awaitable[str]]


def has_prefix(name: str) -> bool:
    """Whether *name* begins with a protocol (``nbd:``), rather than being a path."""
    colon, slash = name.find(":"), name.find("/")
    return colon >= 0 and not 0 <= slash < colon


def resolve_relative(name: str, base: Node | None) -> str:
    """*name*, found in the image that is in *base*, as a name that holds from here; absolute and prefixed names stay.

    Raises OpenError if *base* has no directory.
    """
    if base is None or has_prefix(name) or os.path.isabs(name):
        return name
    return base_directory(base) + name


def protocol_options(name: str) -> dict[str, Json]:
    """The options of the protocol node or filter that *name* means; inside them, drivers may be missing."""
    if name.startswith("json:"):
        return _json_options(name)
    if not has_prefix(name):
        return {"driver": "file", "filename": name}
    prefix = name.partition(":")[0]
    driver = prefix_driver(prefix)
    if driver is None:
        raise OpenError(f"Unknown protocol '{prefix}'")
    return {"driver": driver.name, **driver.parse_filename(name)}


def _json_options(name: str) -> dict[str, Json]:
    try:
        value = loads(name.removeprefix("json:"))
    except OptionError as error:
        raise error.prefixed("Could not parse the JSON options") from None
    if not isinstance(value, dict):
        raise OptionError("Invalid JSON object given")
    return tree_from_dotted(value)


async def options_for(name: str, driver: str | None, probe: Prober, *, protocol: bool = False) -> BlockdevOptions:
    """The validated options of the stack that *name* means, as an image of the format *driver* (None: probe).

    *protocol*: it is no image, but a file or the like.
    """
    tree: dict[str, Json] = _json_options(name) if name.startswith("json:") else {"filename": name}
    if driver is not None:
        tree["driver"] = driver
    return parse_blockdev(await fill(tree, probe, protocol=protocol))


def names_driver(name: str) -> bool:
    """Whether the file name *name* says of which driver the image is."""
    return name.startswith("json:") and "driver" in _json_options(name)


async def fill(tree: dict[str, Json], probe: Prober, *, protocol: bool) -> dict[str, Json]:
    """*tree* with what it leaves out filled in, in it and in its children.

    *protocol*: it stands where a protocol is expected, so a missing driver comes from the file name's prefix;
    elsewhere it is the format that *probe* finds.
    """
    tree = dict(tree)
    if "driver" not in tree:
        if protocol:
            tree = {**protocol_options(_take_filename(tree)), **tree}
        else:
            file = tree.get("file") or {"filename": _take_filename(tree)}
            tree["file"] = await _filled_child(file, probe, protocol=True)
            tree["driver"] = await _probe_child(tree["file"], probe)
    try:
        driver = driver_class(str(tree["driver"]))
    except OptionError:
        raise OptionError(f"Unknown driver '{tree['driver']}'") from None
    options = declared_options(driver.options_class)
    if driver.is_format and "filename" in tree:
        tree["file"] = {"filename": tree.pop("filename"), **(tree.get("file") or {})}
    elif driver.protocol_prefix and has_prefix(str(tree.get("filename", ""))):
        tree = {**driver.parse_filename(tree.pop("filename")), **tree}
    tree = type_keyval(tree, options)
    for option in options:
        if not (option.type_name.startswith("BlockdevRef") or option.name in driver.probed_children):
            continue
        child_protocol = option.name not in driver.probed_children and (driver.is_format or protocol)
        value = tree.get(option.name)
        if isinstance(value, list):
            tree[option.name] = [await _filled_child(item, probe, protocol=child_protocol) for item in value]
        elif value is not None:
            tree[option.name] = await _filled_child(value, probe, protocol=child_protocol)
    return tree


async def _filled_child(value: Json, probe: Prober, *, protocol: bool) -> Json:
    return await fill(value, probe, protocol=protocol) if isinstance(value, dict) else value


async def _probe_child(value: Json, probe: Prober) -> str:
    if not isinstance(value, dict):
        raise OptionError("Must specify either driver or file")
    return await probe(parse_blockdev(value))


def _take_filename(tree: dict[str, Json]) -> str:
    name = tree.pop("filename", None)
    if not isinstance(name, str):
        raise OptionError("Must specify either driver or file")
    return name
