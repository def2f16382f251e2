"""A qcow2 image as node ``disk``: opened, changed at random beside a model, closed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from support import READ_WRITE, read, root_of, write

from fusebd.block.child import MAY_UNMAP
from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.block.root import Root


def file(path: Path) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path)}


async def opened(graph: Graph, path: Path, **options: Any) -> Root:
    """A way to the image, a qcow2 one unless *options* say otherwise, which may be written and resized."""
    node = {"driver": "qcow2", "node-name": "disk", "discard": "unmap", "file": file(path), **options}
    await graph.blockdev_add(node)
    return root_of(graph, "disk", READ_WRITE | Perm.RESIZE)


async def closed(graph: Graph, root: Root) -> None:
    await graph.detach_root(root)
    await graph.blockdev_del("disk")


async def change(root: Root, model: bytearray, rng: random.Random, count: int, unit: int) -> None:
    """*count* random writes, zero writes, discards of *unit* bytes, and reads that have to find what *model* has."""
    for _ in range(count):
        start = rng.randrange(len(model))
        length = min(rng.choice([1, 512, 4096, unit, 3 * unit, 100_000]), len(model) - start)
        kind = rng.randrange(6)
        if kind < 3:
            data = rng.randbytes(length)
            await write(root, start, data)
            model[start : start + length] = data
        elif kind == 3:
            await root.pwrite_zeroes(start, length, rng.choice([0, MAY_UNMAP]))
            model[start : start + length] = bytes(length)
        elif kind == 4:
            start = start // unit * unit
            length = min(unit, len(model) - start)
            await root.pdiscard(start, length)
            model[start : start + length] = await read(root, start, length)
        else:
            assert await read(root, start, length) == model[start : start + length]
