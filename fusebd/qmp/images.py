"""The commands that make images, and change what they are.

Arguments and results: QEMU's qapi/block-core.json; texts: block/create.c, block/amend.c, qmp_change_backing_file
(blockdev.c).
"""

from __future__ import annotations

import os
from typing import Annotated

from msgspec import Meta

from fusebd.block.creation import parse_creation
from fusebd.block.driver import driver_class
from fusebd.block.jobs import Jobs
from fusebd.block.node import Node
from fusebd.block.options import Json, OptionStruct, convert
from fusebd.block.snapshots import root_node
from fusebd.errors import BlockIOError, CommandError, GraphError, ImageError, OptionError, ReadOnlyError
from fusebd.qmp.table import CommandTable, Context

COMMANDS = CommandTable()
command = COMMANDS.command


class BlockdevCreate(OptionStruct, frozen=True, kw_only=True):
    job_id: Annotated[str, Meta(description="name of the job")]
    options: Annotated[dict[str, Json], Meta(description="the driver, and what it takes to make an image")]


@command("blockdev-create", BlockdevCreate)
async def blockdev_create(context: Context, arguments: BlockdevCreate) -> None:
    create = parse_creation(context.graph, arguments.options, "options.")
    context.service(Jobs).start(arguments.job_id, "create", create)


class XBlockdevAmend(OptionStruct, frozen=True, kw_only=True):
    job_id: Annotated[str, Meta(description="name of the job")]
    node_name: Annotated[str, Meta(description="node of the image that is to be changed")]
    options: Annotated[dict[str, Json], Meta(description="the driver, and what is to be changed")]
    force: Annotated[bool, Meta(description="even if the content becomes unreadable")] = False


@command("x-blockdev-amend", XBlockdevAmend)
async def x_blockdev_amend(context: Context, arguments: XBlockdevAmend) -> None:
    graph = context.graph
    node = graph.find_for_reference(arguments.node_name)
    given = arguments.options.get("driver")
    if given is None:
        raise OptionError("Parameter 'options.driver' is missing")
    if not isinstance(given, str):
        raise OptionError("Invalid parameter type for 'options.driver', expected: string")
    if driver_class(given).name != node.driver_name:
        raise CommandError("x-blockdev-amend doesn't support changing the block driver")
    kind = node.driver.amend_options
    if kind is None:
        raise CommandError("Driver does not support x-blockdev-amend")
    options = convert(arguments.options, kind, "options.")

    async def amend() -> None:
        async with graph.lock:
            if graph.find_for_reference(node.name) is not node:
                raise CommandError(f"Node '{node.name}' is gone")
            if node.read_only:
                raise ReadOnlyError("Image is read-only")
            async with graph.drained(node):
                await node.driver.amend(options, force=arguments.force)

    context.service(Jobs).start(arguments.job_id, "amend", amend)


class ChangeBackingFile(OptionStruct, frozen=True, kw_only=True):
    device: Annotated[str, Meta(description="node at the top of the chain")]
    image_node_name: Annotated[str, Meta(description="node of the image that is to name another backing file")]
    backing_file: Annotated[str, Meta(description="that file's name")]


@command("change-backing-file", ChangeBackingFile)
async def change_backing_file(context: Context, arguments: ChangeBackingFile) -> None:
    graph = context.graph
    async with graph.lock:
        top = root_node(graph, arguments.device)
        image = graph.nodes.get(arguments.image_node_name)
        if image is None or not image.is_open:
            name = arguments.image_node_name
            raise GraphError(f"Cannot find device='' nor node-name='{name}'")
        if image.backing is None:
            raise CommandError("not allowing backing file change on an image without a backing file")
        if image not in _chain(top):
            raise CommandError(f"'{arguments.device}' and image file are not in the same chain")
        failure = f"Could not change backing file to '{arguments.backing_file}'"
        if image.driver.amend_options is None:
            raise CommandError(f"{failure}: Operation not supported")
        if image.read_only:
            raise ReadOnlyError(f"{failure}: Image is read-only")
        # the format is the image's own, which is what QEMU has it be
        given = {"driver": image.driver_name, "backing-file": arguments.backing_file, "backing-fmt": image.driver_name}
        async with graph.drained(image):
            try:
                await image.driver.amend(convert(given, image.driver.amend_options))
            except (BlockIOError, ImageError) as error:
                raise CommandError(f"{failure}: {os.strerror(error.errno)}") from None


def _chain(node: Node) -> list[Node]:
    """*node*, and the images that it is over: its backing file, theirs and so on, and what is below filters."""
    chain = [node]
    while (edge := node.backing or (node.primary_child if node.driver.is_filter else None)) is not None:
        node = edge.node
        chain.append(node)
    return chain
