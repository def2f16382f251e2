"""What happens in a graph, as lines in the log: nodes that come and go, requests that fail, data that differs."""

from __future__ import annotations

import logging
import time
from typing import Any

from fusebd.block.graph import Graph

log = logging.getLogger(__name__)

#: seconds for which failures of the same kind on the same node are counted instead of logged one by one
QUIET_PERIOD = 1.0


class EventLog:
    """Listens to *graph* and writes the log."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._names: set[str] = set()
        self._failures: dict[tuple[str, ...], tuple[float, int]] = {}
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
        else:
            log.warning("%s %s", event, data)

    def _io_error(self, data: dict[str, Any]) -> None:
        """One line for a failure, but at most one a period for each kind: a failing disk is asked again and again."""
        kind = data["node-name"], data["operation"], data["reason"]
        now = time.monotonic()
        since, left_out = self._failures.get(kind, (-QUIET_PERIOD, 0))
        if now - since < QUIET_PERIOD:
            self._failures[kind] = since, left_out + 1
            return
        self._failures[kind] = now, 0
        more = f" ({left_out} more since the last line)" if left_out else ""
        log.warning("%s: %s failed: %s%s", *kind, more)
