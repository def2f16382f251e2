"""Filters that are put into a graph, and taken out of it, while it is in use.

The edges of those who use a node are turned to the filter, or back, while no request is under way on them; open files
and exports keep working, and do not notice.  QEMU inserts filters of its own in this way (bdrv_append in block.c), but
has no command for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import trio

from fusebd.block.child import Child
from fusebd.block.driver import Driver, driver_class, parse_blockdev
from fusebd.block.graph import Graph
from fusebd.block.node import Inherited, Node
from fusebd.block.options import Json, declared_options
from fusebd.errors import GraphError, OptionError

D = TypeVar("D", bound=Driver)


async def insert_filter(graph: Graph, value: Json, node_name: str, child: str | None = None) -> Node:
    """Insert the filter that *value*, a JSON object as for blockdev-add, describes above the node *node_name*.

    With *child* it goes between that node and its child of that name.  The one required child that *value* leaves out
    is what the filter is put over.  Suspends while the filter opens, and until requests under way have ended.
    Raises FusebdError; the graph is then as it was.
    """
    async with graph.lock:
        node = graph.find(node_name)
        base = node.entrance if child is None else _child(node, child).node
        role = _open_child(value)
        options = parse_blockdev({**value, role: base.name})
        if not driver_class(options.driver).is_filter:
            raise GraphError(f"Driver '{options.driver}' is not a filter")
        inserted = await graph.open_node(options, inherit=Inherited(read_only=base.read_only))
        try:
            async with graph.drained(base):
                graph.views.chain_changing(base if child is None else node)
                edges = [edge for edge in base.parents if edge.parent is not inserted]
                _turn(graph, edges if child is None else [_child(node, child)], inserted)
        except BaseException:
            with trio.CancelScope(shield=True):
                await graph.release(inserted)
            raise
        inserted.monitor_owned = True
        inserted.inserted_over = base, role
        if child is None:
            base.inserted_above = inserted
    graph.nodes_changed()
    return inserted


async def remove_filter(graph: Graph, node_name: str) -> None:
    """Take the filter *node_name* out: those who use it use what is below it from now on.

    It need not have been inserted.  Suspends until requests under way have ended and it has been flushed.
    Raises FusebdError; it is still there then.
    """
    async with graph.lock:
        node = graph.find(node_name)
        below = _filtered(node)
        async with graph.drained(node):
            await node.driver.flush()
            graph.views.chain_changing(node)
            _turn(graph, list(node.parents), below)
            node.monitor_owned = False
            if below.inherits_from is node:
                below.inherits_from = node.inherits_from
            if below.inserted_above is node:
                below.inserted_above = node.inserted_above
            for edge in below.parents:
                above = edge.parent
                if above is not None and above.inserted_over is not None and above.inserted_over[0] is node:
                    above.inserted_over = below, above.inserted_over[1]
            await graph.release(node)
    graph.nodes_changed()


def find_driver(graph: Graph, node_name: str, kind: type[D]) -> D:
    """The driver of the class *kind* that requests to the node *node_name* come through first.

    Filters inserted above the node count as parts of it.  Raises GraphError if there is none.
    """
    node: Node | None = graph.find(node_name).entrance
    while node is not None:
        if isinstance(node.driver, kind):
            return node.driver
        node = node.primary_child.node if node.primary_child is not None else None
    raise GraphError(f"Node '{node_name}' has no {kind.name} driver")


def find_inserted(graph: Graph, node_name: str, kind: type[D]) -> D | None:
    """The driver of the class *kind* of the node *node_name* itself, or of a filter inserted above it: the topmost."""
    last = graph.find(node_name)
    node = last.entrance
    while not isinstance(node.driver, kind):
        if node is last:
            return None
        assert node.inserted_over is not None
        node = node.inserted_over[0]
    return node.driver


def _child(node: Node, name: str) -> Child:
    child = node.children.get(name)
    if child is None:
        raise GraphError(f"Node '{node.name}' has no child '{name}'")
    return child


def _open_child(value: Json) -> str:
    """The one child that the options *value* of a filter require and do not give."""
    if not isinstance(value, dict):
        raise OptionError("Invalid parameter type for 'filter', expected: object")
    if not isinstance(value.get("driver"), str):
        raise OptionError("Parameter 'filter.driver' is missing")
    options = declared_options(driver_class(value["driver"]).options_class)
    left_out = [
        option.name
        for option in options
        if option.type_name == "BlockdevRef" and option.required and option.name not in value
    ]
    if len(left_out) != 1:
        raise OptionError(f"Just one child of the filter must be left out, not {len(left_out)}: it is what is there")
    return left_out[0]


def _filtered(node: Node) -> Node:
    """What is below the filter *node*."""
    if node.inserted_over is not None:
        return node.children[node.inserted_over[1]].node
    primary = node.primary_child
    if not node.driver.is_filter or primary is None:
        raise GraphError(f"Node '{node.name}' is not a filter")
    return primary.node


def _turn(graph: Graph, edges: Iterable[Child], target: Node) -> None:
    """Make *edges* lead to *target*.  The permissions follow, or nothing has changed."""
    turned = [(edge, edge.node) for edge in edges]
    for edge, _ in turned:
        _lead(edge, target)
    tops = [target, *(before for _, before in turned), *(edge.parent for edge, _ in turned if edge.parent is not None)]
    try:
        graph.refresh_perms(dict.fromkeys(tops))
    except BaseException:
        for edge, before in turned:
            _lead(edge, before)
        raise
    for edge, before in turned:
        if target.driver.length != before.driver.length:
            edge.child_resized()


def _lead(edge: Child, target: Node) -> None:
    edge.node.parents.remove(edge)
    target.parents.append(edge)
    edge.point_at(target)
