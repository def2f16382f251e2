"""Nodes whose images are left as they are: what is written goes to a temporary overlay that ends with the daemon.

An overlay is a qcow2 image without a name in the host's filesystem.  It takes the place, and the node-name, of the node
that it is over.  Filters stay above it, so that what they do to writes is done.

Behaviour: QEMU bdrv_append_temp_snapshot (block.c), its option ``-snapshot``.
"""

from __future__ import annotations

import os
import tempfile

from fusebd.block.creation import opened, parse_creation
from fusebd.block.driver import driver_class, parse_blockdev
from fusebd.block.graph import Graph
from fusebd.block.node import Node
from fusebd.block.options import Json, references
from fusebd.block.perms import Perm
from fusebd.errors import OpenError

#: options that say what becomes of requests: the overlay's, which has the requests
_OF_REQUESTS = ("node-name", "discard", "detect-zeroes")
_SECTOR = 512


async def add_throwaway(graph: Graph, value: Json) -> Node:
    """``Graph.blockdev_add``, with an overlay over each node in *value* that could be written.

    Nodes that *value* only names are left to whoever adds them.  Temporary files are made in $TMPDIR, or /var/tmp.
    Suspends and raises as ``blockdev_add`` does; raises OpenError.
    """
    files: list[str] = []
    try:
        return await graph.blockdev_add(await _overlaid(graph, value, files))
    finally:
        for path in files:
            os.unlink(path)


async def _overlaid(graph: Graph, value: Json, files: list[str]) -> Json:
    """*value* with overlays, whose *files* exist until they have been opened."""
    options = parse_blockdev(value)
    if options.read_only is True:
        return value
    if driver_class(options.driver).is_filter:
        inline = [(name, ref.raw) for name, ref in references(options) if ref.raw is not None]
        return {**value, **{name: await _overlaid(graph, raw, files) for name, raw in inline}}
    image = {**value, "read-only": True}
    image.pop("node-name", None)
    async with opened(graph, image, Perm.CONSISTENT_READ) as root:
        length = root.length
    overlay = {name: value[name] for name in _OF_REQUESTS if name in value}
    file = {"driver": "file", "filename": _temporary_file(files)}
    await parse_creation(graph, {"driver": "qcow2", "file": file, "size": length + -length % _SECTOR})()
    return {"discard": "unmap", **overlay, "driver": "qcow2", "file": file, "backing": image}


def _temporary_file(files: list[str]) -> str:
    directory = os.environ.get("TMPDIR") or "/var/tmp"
    try:
        descriptor, path = tempfile.mkstemp(prefix="fusebd-", dir=directory)
    except OSError as error:
        raise OpenError.from_os(f"Could not create a temporary file in '{directory}'", error) from None
    os.close(descriptor)
    files.append(path)
    return path
