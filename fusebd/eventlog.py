"""What happens in a graph, as lines in the log: nodes that come and go, requests that fail, data that differs."""

from __future__ import annotations

import logging
from typing import Any

from fusebd.block.graph import Graph
from fusebd.block.quiet import Quiet

log = logging.getLogger(__name__)

#: events that can come with every request -> the members of their data that tell apart what they are about
_FREQUENT = {
    "BLKVERIFY_MISMATCH": ("node-name",),
    "QUORUM_FAILURE": ("reference",),
    "QUORUM_REPORT_BAD": ("node-name", "type", "error"),
}
#: events that tell of no trouble
_UNEVENTFUL = frozenset({"BLKDEBUG_BREAK", "BLOCK_EXPORT_DELETED", "FAULT_INJECTED"})


class EventLog:
    """Listens to *graph* and writes the log."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._names: set[str] = set()
        self._quiet = Quiet()
        graph.node_listeners.append(self._nodes_changed)
        graph.event_listeners.append(self._event)

    def _nodes_changed(self) -> None:
        nodes = self._graph.named_nodes()
        for name in sorted(self._names - nodes.keys()):
            log.info("%s: removed", name)
        for name, node in nodes.items():
            if name not in self._names:
                mode = "read-only" if node.read_only else "read-write"
                log.info("%s: added (%s, %d bytes, %s)", name, node.driver_name, node.driver.length, mode)
        self._names = set(nodes)

    def _event(self, event: str, data: dict[str, Any]) -> None:
        if event == "BLOCK_IO_ERROR":
            self._io_error(data)
            return
        more: str | None = ""
        if event in _FREQUENT:
            more = self._quiet.admit(event, *(str(data.get(member)) for member in _FREQUENT[event]))
        if more is not None:
            details = " ".join(f"{name}={value}" for name, value in data.items())
            log.log(logging.INFO if event in _UNEVENTFUL else logging.WARNING, "%s: %s%s", event, details, more)

    def _io_error(self, data: dict[str, Any]) -> None:
        """One line for a failure, but few for each kind: a failing disk is asked again and again."""
        kind = data["node-name"], data["operation"], data["reason"]
        more = self._quiet.admit(*kind)
        if more is not None:
            log.warning("%s: %s failed: %s%s", *kind, more)
