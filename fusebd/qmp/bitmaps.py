"""The commands on dirty bitmaps, each of which is an action of transactions, too.

Arguments and results: QEMU's qapi/block-core.json; texts: block/monitor/bitmap-qmp-cmds.c.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from fusebd.block.bitarray import BitArray
from fusebd.block.dirtybitmaps import DirtyBitmap
from fusebd.block.graph import Graph
from fusebd.block.node import Node
from fusebd.block.options import Json, OptionStruct, Uint32, convert
from fusebd.errors import CommandError, OptionError
from fusebd.qmp.queries import image_info
from fusebd.qmp.table import CommandTable, Context
from fusebd.qmp.transactions import Action, action

COMMANDS = CommandTable()
command = COMMANDS.command

_SMALLEST_GRANULARITY = 512
#: what the default granularity is between, and is where there are no clusters
_LEAST_DEFAULT, _MOST_DEFAULT = 4096, 65536


class BitmapName(OptionStruct, frozen=True, kw_only=True):
    node: Annotated[str, Meta(description="node that has the bitmap")]
    name: Annotated[str, Meta(description="the bitmap's name")]


def _find(graph: Graph, node_name: str, name: str) -> tuple[Node, DirtyBitmap]:
    node = graph.nodes.get(node_name)
    if node is None or not node.is_open:
        raise CommandError(f"Node '{node_name}' not found")
    bitmap = node.dirty_bitmaps.find(name)
    if bitmap is None:
        raise CommandError(f"Dirty bitmap '{name}' not found")
    return node, bitmap


class BitmapAdd(OptionStruct, frozen=True, kw_only=True):
    node: Annotated[str, Meta(description="node whose writes are to be recorded")]
    name: Annotated[str, Meta(description="name of the bitmap")]
    granularity: Annotated[Uint32 | UnsetType, Meta(description="bytes for each bit, a power of two")] = UNSET
    persistent: Annotated[bool, Meta(description="have the image keep it")] = False
    disabled: Annotated[bool, Meta(description="do not record yet")] = False


def _default_granularity(node: Node) -> int:
    cluster_size: int = image_info(node, flat=True).get("cluster-size", 0)
    return min(max(cluster_size, _LEAST_DEFAULT), _MOST_DEFAULT) if cluster_size else _MOST_DEFAULT


@action("block-dirty-bitmap-add", BitmapAdd)
class AddAction(Action[BitmapAdd]):
    added: tuple[Node, DirtyBitmap] | None = None

    def nodes(self, graph: Graph) -> list[str]:
        return [self.arguments.node]

    async def prepare(self, graph: Graph) -> None:
        arguments = self.arguments
        name, granularity = arguments.name, arguments.granularity
        if not name:
            raise CommandError("Bitmap name cannot be empty")
        node = graph.nodes.get(arguments.node)
        if node is None or not node.is_open:
            raise CommandError(f"Cannot find device='{arguments.node}' nor node-name='{arguments.node}'")
        if granularity is UNSET:
            granularity = _default_granularity(node)
        assert isinstance(granularity, int)
        if granularity < _SMALLEST_GRANULARITY or granularity & (granularity - 1):
            raise CommandError("Granularity must be power of 2 and at least 512")
        if arguments.persistent:
            store = node.driver.bitmap_store
            if store is None:
                raise CommandError(
                    f"Can't store persistent bitmaps to {node.name}: {os.strerror(errno.ENOTSUP)}", errno=errno.ENOTSUP
                )
            node.dirty_bitmaps.check_name(name)
            store.check_new(name, granularity)
        node.dirty_bitmaps.check_name(name)
        graph.views.chain_changing(node)
        bitmap = node.dirty_bitmaps.new(name, granularity)
        bitmap.enabled, bitmap.persistent = not arguments.disabled, arguments.persistent
        node.dirty_bitmaps.add(bitmap)
        self.added = node, bitmap

    async def abort(self, graph: Graph) -> None:
        if self.added is not None:
            node, bitmap = self.added
            node.dirty_bitmaps.remove(bitmap)


@action("block-dirty-bitmap-remove", BitmapName)
class RemoveAction(Action[BitmapName]):
    """The image forgets the bitmap at once; after a failure it is kept again when it is stored the next time."""

    removed: tuple[Node, DirtyBitmap] | None = None

    def nodes(self, graph: Graph) -> list[str]:
        return [self.arguments.node]

    async def prepare(self, graph: Graph) -> None:
        node, bitmap = _find(graph, self.arguments.node, self.arguments.name)
        bitmap.check(allow_inconsistent=True)
        store = node.driver.bitmap_store
        if bitmap.persistent and store is not None:
            await store.remove(bitmap.name)
        bitmap.busy = True
        self.removed = node, bitmap

    def commit(self, graph: Graph) -> None:
        if self.removed is not None:
            node, bitmap = self.removed
            node.dirty_bitmaps.remove(bitmap)

    async def abort(self, graph: Graph) -> None:
        if self.removed is not None:
            self.removed[1].busy = False


class _Restoring:
    """A bitmap whose bits can be put back."""

    _changed: tuple[DirtyBitmap, BitArray] | None = None

    def _keep(self, bitmap: DirtyBitmap) -> None:
        self._changed = bitmap, bitmap.bits.copy()

    async def abort(self, graph: Graph) -> None:
        if self._changed is not None:
            bitmap, bits = self._changed
            bitmap.bits.take(bits)


@action("block-dirty-bitmap-clear", BitmapName)
class ClearAction(_Restoring, Action[BitmapName]):
    def nodes(self, graph: Graph) -> list[str]:
        return [self.arguments.node]

    async def prepare(self, graph: Graph) -> None:
        _, bitmap = _find(graph, self.arguments.node, self.arguments.name)
        bitmap.check()
        self._keep(bitmap)
        bitmap.bits.clear()


class _SwitchAction(Action[BitmapName]):
    """Enables or disables a bitmap."""

    enable: bool
    switched: tuple[Node, DirtyBitmap, bool] | None = None

    def nodes(self, graph: Graph) -> list[str]:
        return [self.arguments.node]

    async def prepare(self, graph: Graph) -> None:
        node, bitmap = _find(graph, self.arguments.node, self.arguments.name)
        bitmap.check(allow_read_only=True)
        self.switched = node, bitmap, bitmap.enabled
        bitmap.enabled = self.enable
        node.dirty_bitmaps.refresh()

    async def abort(self, graph: Graph) -> None:
        if self.switched is not None:
            node, bitmap, was_enabled = self.switched
            bitmap.enabled = was_enabled
            node.dirty_bitmaps.refresh()


@action("block-dirty-bitmap-enable", BitmapName)
class EnableAction(_SwitchAction):
    enable = True


@action("block-dirty-bitmap-disable", BitmapName)
class DisableAction(_SwitchAction):
    enable = False


class BitmapMerge(OptionStruct, frozen=True, kw_only=True):
    node: Annotated[str, Meta(description="node that has the target")]
    target: Annotated[str, Meta(description="bitmap to merge into")]
    bitmaps: Annotated[list[Json], Meta(description="names, or objects with a node and a name")]


@action("block-dirty-bitmap-merge", BitmapMerge)
class MergeAction(_Restoring, Action[BitmapMerge]):
    def __init__(self, arguments: BitmapMerge) -> None:
        super().__init__(arguments)
        self._sources = list(self._named())

    def _named(self) -> Iterator[tuple[str, str]]:
        for number, value in enumerate(self.arguments.bitmaps):
            if isinstance(value, str):
                yield self.arguments.node, value
            elif isinstance(value, dict):
                named = convert(value, BitmapName, f"bitmaps[{number}].")
                yield named.node, named.name
            else:
                raise OptionError("Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr")

    def nodes(self, graph: Graph) -> list[str]:
        return [self.arguments.node, *(node for node, _ in self._sources)]

    async def prepare(self, graph: Graph) -> None:
        _, target = _find(graph, self.arguments.node, self.arguments.target)
        for node_name, name in self._sources:
            _, source = _find(graph, node_name, name)
            target.check()
            source.check(allow_read_only=True)
            if source.length != target.length:
                raise CommandError(
                    f"Bitmaps are of different sizes (destination size is {target.length}, source size is "
                    f"{source.length}) and can't be merged"
                )
            if self._changed is None:
                self._keep(target)
            target.merge(source)


@command("x-debug-block-dirty-bitmap-sha256", BitmapName)
async def x_debug_block_dirty_bitmap_sha256(context: Context, arguments: BitmapName) -> Json:
    _, bitmap = _find(context.graph, arguments.node, arguments.name)
    return {"sha256": bitmap.bits.sha256()}
