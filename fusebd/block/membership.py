"""Children that are added to a node, and taken away from it, while it is in use.

Only some drivers take part (``Driver.changes_children``).  The change is made while no request is under way.

Behaviour and texts: QEMU qmp_x_blockdev_change (blockdev.c), bdrv_add_child, bdrv_del_child (block.c).
"""

from __future__ import annotations

import errno

from fusebd.block.graph import Graph
from fusebd.block.node import Node
from fusebd.block.root import Root
from fusebd.errors import GraphError


async def change_children(
    graph: Graph, parent_name: str, *, child_name: str | None = None, node_name: str | None = None
) -> None:
    """Take away the child *child_name* of the node *parent_name*, or add the node *node_name* to its children.

    Suspends until requests under way have ended, and while a child that nothing else uses is closed.  Raises
    GraphError (with EBUSY where an open file is in the way), PermissionConflict, ReadOnlyError; nothing has changed
    then.
    """
    async with graph.lock:
        parent = graph.find_for_reference(parent_name)
        if child_name is None and node_name is None:
            raise GraphError("Either child or node must be specified")
        if child_name is not None and node_name is not None:
            raise GraphError("The parameters child and node are in conflict")
        if child_name is not None:
            await _remove(graph, parent, child_name)
        elif node_name is not None:
            await _add(graph, parent, node_name)
    graph.nodes_changed()


async def _add(graph: Graph, parent: Node, name: str) -> None:
    below = graph.nodes.get(name)
    if below is None:
        raise GraphError(f"Node '{name}' not found")
    driver = parent.driver
    if not driver.changes_children:
        raise GraphError(f"The node {parent.name} does not support adding a child")
    if below.parents:
        busy = all(isinstance(edge, Root) for edge in below.parents)
        raise GraphError(f"The node {name} already has a parent", errno=errno.EBUSY if busy else None)
    async with graph.drained(parent):
        child, role = driver.new_child(below)
        driver.child_added(graph.attach(parent, child, role, below))
        parent.refresh_edges()


async def _remove(graph: Graph, parent: Node, name: str) -> None:
    edge = parent.children.get(name)
    if edge is None:
        raise GraphError(f"Node '{parent.name}' does not have child '{name}'")
    driver = parent.driver
    if not driver.changes_children:
        raise GraphError(f"The node {parent.name} does not support removing a child")
    driver.check_removal(edge)
    async with graph.drained(parent):
        del parent.children[name]
        edge.node.parents.remove(edge)
        driver.child_removed(edge)
        parent.refresh_edges()
        graph.loosen_perms(edge.node)
        await graph.release(edge.node)
