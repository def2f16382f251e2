"""The commands on internal snapshots.

Arguments and results: QEMU's qapi/block-core.json.  blockdev-snapshot-apply-internal-sync is fusebd's own: QEMU
applies a snapshot only to an image that nobody uses (``qemu-img snapshot -a``).
"""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from fusebd.block import snapshots
from fusebd.block.graph import Graph
from fusebd.block.options import Json, OptionStruct
from fusebd.block.snapshots import SnapshotInfo
from fusebd.qmp.table import CommandTable, Context
from fusebd.qmp.transactions import Action, action

COMMANDS = CommandTable()
command = COMMANDS.command


class SnapshotInternalSync(OptionStruct, frozen=True, kw_only=True):
    device: Annotated[str, Meta(description="node whose state is to be kept")]
    name: Annotated[str, Meta(description="name of the snapshot")]


@action("blockdev-snapshot-internal-sync", SnapshotInternalSync)
class SnapshotAction(Action[SnapshotInternalSync]):
    """Makes a snapshot, and deletes it again."""

    made: SnapshotInfo | None = None

    def nodes(self, graph: Graph) -> list[str]:
        return [self.arguments.device]

    async def prepare(self, graph: Graph) -> None:
        self.made = await snapshots.create(graph, self.arguments.device, self.arguments.name)

    async def abort(self, graph: Graph) -> None:
        if self.made is not None:
            await snapshots.remove_again(graph, self.arguments.device, self.made)


class SnapshotNamed(OptionStruct, frozen=True, kw_only=True):
    device: Annotated[str, Meta(description="node that has the snapshot")]
    id: Annotated[str | UnsetType, Meta(description="the snapshot's ID")] = UNSET
    name: Annotated[str | UnsetType, Meta(description="the snapshot's name")] = UNSET


def _words(arguments: SnapshotNamed) -> tuple[str, str | None, str | None]:
    by_id = None if arguments.id is UNSET else str(arguments.id)
    return arguments.device, by_id, None if arguments.name is UNSET else str(arguments.name)


@command("blockdev-snapshot-delete-internal-sync", SnapshotNamed)
async def blockdev_snapshot_delete_internal_sync(context: Context, arguments: SnapshotNamed) -> Json:
    return (await snapshots.delete(context.graph, *_words(arguments))).info()


@command("blockdev-snapshot-apply-internal-sync", SnapshotNamed)
async def blockdev_snapshot_apply_internal_sync(context: Context, arguments: SnapshotNamed) -> Json:
    return (await snapshots.apply(context.graph, *_words(arguments))).info()
