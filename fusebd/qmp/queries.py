"""What the query commands answer: nodes, their images, their statistics and the graph they make up.

Payloads: QEMU's qapi/block-core.json, filled in as block/qapi.c and bdrv_get_xdbg_block_graph (block.c) do.  Where
qemu-storage-daemon lists only what hangs on a named BlockBackend, which no node here does, there is one entry for
each node that blockdev-add made.
"""

from __future__ import annotations

import contextlib

from fusebd.block.child import Child
from fusebd.block.filename import resolve_relative
from fusebd.block.graph import Graph
from fusebd.block.naming import node_filename
from fusebd.block.node import Node
from fusebd.block.options import Json
from fusebd.block.perms import Perm, Role
from fusebd.errors import OpenError

#: QEMU's nodes have whole sectors of this many bytes; the last one of a file may be past its end
_SECTOR = 512
_NO_LIMITS = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
# Members of BlockDeviceStats that a node never counts: requests are not merged, refused unseen or appended to zones.
_NEVER_COUNTED = {
    **dict.fromkeys(
        (
            "rd_merged",
            "wr_merged",
            "unmap_merged",
            "zone_append_merged",
            "zone_append_bytes",
            "zone_append_operations",
            "zone_append_total_time_ns",
            "failed_zone_append_operations",
            "invalid_rd_operations",
            "invalid_wr_operations",
            "invalid_flush_operations",
            "invalid_unmap_operations",
            "invalid_zone_append_operations",
        ),
        0,
    ),
    "account_invalid": False,
    "account_failed": False,
    "timed_stats": [],
}
_PERMISSIONS = (
    (Perm.RESIZE, "resize"),
    (Perm.WRITE_UNCHANGED, "write-unchanged"),
    (Perm.WRITE, "write"),
    (Perm.CONSISTENT_READ, "consistent-read"),
)


def _open_nodes(graph: Graph) -> list[Node]:
    """All nodes in the order in which they were named, which is QEMU's."""
    return sorted((node for node in graph.nodes.values() if node.is_open), key=lambda node: node.name_number or 0)


def _devices(graph: Graph) -> list[Node]:
    return [node for node in _open_nodes(graph) if node.monitor_owned]


# --- nodes and their images ----------------------------------------------------------------------


def named_block_nodes(graph: Graph, *, flat: bool) -> Json:
    """QAPI query-named-block-nodes: every node, the latest first; *flat* leaves the backing chain out."""
    return [block_device_info(node, flat=flat) for node in reversed(_open_nodes(graph))]


def block(graph: Graph) -> Json:
    """QAPI query-block: a BlockInfo for each node that blockdev-add made."""
    return [
        {
            "device": "",
            "type": "unknown",
            "removable": False,
            "locked": False,
            "inserted": block_device_info(node, flat=False),
        }
        for node in _devices(graph)
    ]


def block_device_info(node: Node, *, flat: bool) -> dict[str, Json]:
    """QAPI BlockDeviceInfo."""
    image = image_info(node, flat=flat)
    info: dict[str, Json] = {
        "file": image["filename"],
        "node-name": node.name,
        "ro": node.read_only,
        "drv": node.driver_name,
        "active": True,
        "encrypted": image.get("encrypted", False),
        "detect_zeroes": node.detect_zeroes,
        **_NO_LIMITS,
        "write_threshold": 0,
        "cache": {"writeback": True, "direct": node.cache_direct, "no-flush": node.no_flush},
        "image": image,
        "backing_file_depth": _depth(image),
    }
    if node.backing is not None:
        info["backing_file"] = node_filename(node.backing.node)
    if node.dirty_bitmaps:
        info["dirty-bitmaps"] = [bitmap.info() for bitmap in node.dirty_bitmaps]
    return info


def _depth(image: dict[str, Json]) -> int:
    depth = 0
    while "backing-image" in image:
        image, depth = image["backing-image"], depth + 1
    return depth


def image_info(node: Node, *, flat: bool) -> dict[str, Json]:
    """QAPI ImageInfo, with the images below it unless *flat*."""
    driver = node.driver
    info: dict[str, Json] = {
        "filename": node_filename(node),
        "format": node.driver_name,
        "virtual-size": -(-driver.length // _SECTOR) * _SECTOR,
        **_inherited_info(node),
        **driver.format_info(),
    }
    if _has_actual_size(node):
        info["actual-size"] = driver.allocated_bytes() or 0  # of a device, stat knows of no blocks
    backing_name = info.get("backing-filename")
    if backing_name and "full-backing-filename" not in info:
        with contextlib.suppress(OpenError):  # left out where the image has no directory
            info["full-backing-filename"] = resolve_relative(backing_name, node)
    below = _filtered_or_backing(node)
    if below is not None and not flat:
        info["backing-image"] = image_info(below.node, flat=False)
    return info


def _has_actual_size(node: Node) -> bool:
    """Whether QEMU would tell how much the node takes on the host: it never does for a filter with a prefix."""
    below = [child.node for child in node.children.values() if child is not node.backing]
    return not (below and node.driver.protocol_prefix) and all(map(_has_actual_size, below))


def _inherited_info(node: Node) -> dict[str, Json]:
    """What a node that only passes requests on reports of the node below it."""
    child = node.primary_child
    if child is None or not (node.driver.is_filter or node.driver_name == "raw"):
        return {}
    known = {**_inherited_info(child.node), **child.node.driver.format_info()}
    return {name: known[name] for name in ("cluster-size", "dirty-flag") if name in known}


def _filtered_or_backing(node: Node) -> Child | None:
    if node.backing is not None:
        return node.backing
    return node.primary_child if node.driver.is_filter else None


# --- statistics ----------------------------------------------------------------------------------


def blockstats(graph: Graph, *, query_nodes: bool) -> Json:
    """QAPI query-blockstats: of every node, or of those that blockdev-add made with what is below them."""
    if query_nodes:
        return [node_stats(node, backing=False) for node in _open_nodes(graph)]
    return [{"device": "", **node_stats(node, backing=True)} for node in _devices(graph)]


def node_stats(node: Node, *, backing: bool) -> dict[str, Json]:
    """QAPI BlockStats.  *backing*: with those of the backing (or filtered) node."""
    found: dict[str, Json] = {
        "node-name": node.name,
        "stats": {**node.counted().as_dict(), **_NEVER_COUNTED},
    }
    specific = node.driver.specific_stats()
    if specific:
        found["driver-specific"] = {"driver": node.driver_name, **specific}
    storage = _storage_child(node)
    if storage is not None:
        found["parent"] = node_stats(storage.node, backing=backing)
    below = _filtered_or_backing(node)
    if below is not None and backing:
        found["backing"] = node_stats(below.node, backing=True)
    return found


def _storage_child(node: Node) -> Child | None:
    """The child that stores the data, if there is one that does alone."""
    primary = node.primary_child
    if primary is not None and primary.role & (Role.DATA | Role.FILTERED):
        return primary
    storing = [child for child in node.children.values() if child.role & Role.DATA]
    return storing[0] if len(storing) == 1 else None


# --- the graph -----------------------------------------------------------------------------------


def block_graph(graph: Graph) -> Json:
    """QAPI XDbgBlockGraph: the nodes, the users outside the graph, and the edges with their permissions."""
    ids: dict[object, int] = {}
    nodes: list[Json] = []
    edges: list[Json] = []

    def number(thing: object) -> int:
        return ids.setdefault(thing, len(ids) + 1)

    def add_node(thing: object, kind: str, name: str) -> None:
        nodes.append({"id": number(thing), "type": kind, "name": name})

    def add_edge(parent: object, child: Child) -> None:
        edges.append(
            {
                "parent": number(parent),
                "child": number(child.node),
                "name": child.name,
                "perm": [name for bit, name in _PERMISSIONS if child.perm & bit],
                "shared-perm": [name for bit, name in _PERMISSIONS if child.shared & bit],
            }
        )

    for root in sorted(graph.roots, key=lambda root: (root.parent_description, root.node.name)):
        add_node(root, "block-backend", root.parent_description)
        add_edge(root, root)
    for node in _open_nodes(graph):
        add_node(node, "block-driver", node.name)
        for child in reversed(node.children.values()):
            add_edge(node, child)
    return {"nodes": nodes[::-1], "edges": edges[::-1]}
