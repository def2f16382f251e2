"""Straight paths: reads and writes past drivers that would only hand them on.

A driver that has nothing to do for the moment - a filter without rules, a raw that shows all of its file - says so by
its bypass.  An edge leads to the first driver that does something, and counts a request with all the nodes on the way
at once.  What a node has to be asked about (``Bypass.concerns``), or is not plain in any other way, goes from node to
node as ever.

Whoever changes what is decided here has the edges refreshed (``Node.refresh_edges``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from fusebd.block.node import Counters, Tally
from fusebd.block.queueing import QueueRead

if TYPE_CHECKING:
    from fusebd.block.child import Buffers, Child
    from fusebd.block.node import Node

#: whether the driver wants to see a request, by its byte offset and length; asking changes nothing
Concerns = Callable[[int, int], bool]
Read = Callable[[int, "Buffers"], Awaitable[None]]
Write = Callable[[int, "Buffers"], Awaitable[None]]
R = TypeVar("R")

_NO_LIMIT = 1 << 62
#: what an edge announces of a write
_WRITE_EVENTS = frozenset({"pwritev", "pwritev_done"})


class Bypass(NamedTuple):
    """*child* is where requests go, at the same offset, but for those that *concerns* is true of (None: all).

    *asks_below*: *concerns* is ``Driver.announcing`` of the driver below, which need not be asked by itself then.
    """

    child: Child
    concerns: Concerns | None = None
    asks_below: bool = False


class Straight(NamedTuple, Generic[R]):
    """*request* goes to the driver at the end of the path.

    It takes offsets and lengths that *mask* has no bit of, and at most *most* bytes.  *counters* are for all nodes on
    the way.  *queue* is what the driver has for reads without a task.
    """

    request: R
    mask: int
    most: int
    concerns: Concerns | None
    counters: Counters
    queue: QueueRead | None = None


def straight_read(edge: Child) -> Straight[Read]:
    """The way of reads by *edge*."""
    driver = edge.node.driver
    path = [edge.node]
    mask, most = driver.limits.request_alignment - 1, driver.limits.max_transfer or _NO_LIMIT
    concerns: Concerns | None = None
    asked = False
    while (bypass := driver.read_bypass()) is not None and (concerns is None or bypass.concerns is None or asked):
        concerns, asked = concerns or bypass.concerns, bypass.asks_below
        path.append(bypass.child.node)
        driver = bypass.child.node.driver
        mask |= driver.limits.request_alignment - 1
        most = min(most, driver.limits.max_transfer or _NO_LIMIT)
    return Straight(driver.preadv, mask, most, concerns, _counters(path), driver.read_queue())


def straight_write(edge: Child) -> Straight[Write]:
    """The way of writes by *edge*; *most* is -1 if there is none."""
    driver = edge.node.driver
    if not is_plain(edge):
        return Straight(driver.pwritev, 0, -1, None, edge.node.counters)
    path = [edge.node]
    most = driver.limits.max_transfer or _NO_LIMIT
    concerns: Concerns | None = None
    asked = False
    while (
        (bypass := driver.write_bypass()) is not None
        and (concerns is None or bypass.concerns is None or asked)
        and is_plain(bypass.child)
    ):
        concerns, asked = concerns or bypass.concerns, bypass.asks_below
        path.append(bypass.child.node)
        driver = bypass.child.node.driver
        most = min(most, driver.limits.max_transfer or _NO_LIMIT)
    return Straight(driver.pwritev, 0, most, concerns, _counters(path))


def is_plain(edge: Child) -> bool:
    """Whether *edge* has nothing to do for a write but to hand it on."""
    node = edge.node
    return (
        node.driver.limits.request_alignment == 1
        and node.detect_zeroes == "off"
        and edge.events.isdisjoint(_WRITE_EVENTS)
        and not edge.watches
    )


def _counters(path: list[Node]) -> Counters:
    """Those that count for all of *path* at once."""
    if len(path) == 1:
        return path[0].counters
    nodes = tuple(path)
    found = next((tally for tally in path[0].tallies if tally.nodes == nodes), None)
    return found or Tally(nodes)
