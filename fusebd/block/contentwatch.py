"""Hearing of changes of a node's content that are made on other ways than one's own.

A way in (Root) that has a cache above it has to know what others change: through the same node, or through one below
it.  An edge on which such a change can come tells the watches after each write; the edges on the way of
those who watch do not, so that nobody who writes alone pays for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusebd.block.child import Child
    from fusebd.block.node import Node
    from fusebd.block.root import Root

#: called with the byte offset and the length of what has changed; length 0: all of it
Changed = Callable[[int, int], None]


class ContentWatch:
    """Calls *changed* whenever the content of *root*'s node has changed otherwise than by *root*, until ``close``."""

    def __init__(self, root: Root, changed: Changed) -> None:
        self._root = root
        self._changed = changed
        self._nodes: set[Node] = set()
        self.renew()

    def renew(self) -> None:
        """Take over what is below the root now.  What is seen there may be different: that is a change, too."""
        nodes = self._root.node.graph.subtree(self._root.node)
        before = self._nodes
        if nodes == before:
            return
        self.close()
        self._nodes = nodes
        for node in nodes:
            node.watches.append(self)
            node.refresh_edges()
        if before:
            self._changed(0, 0)

    def close(self) -> None:
        """Watch no more."""
        nodes, self._nodes = self._nodes, set()
        for node in nodes:
            node.watches.remove(self)
            node.refresh_edges()

    def concerns(self, edge: Child) -> bool:
        """Whether what comes by *edge* is not of the root's own doing."""
        return edge is not self._root and edge.parent not in self._nodes

    def changed(self, node: Node, offset: int, length: int) -> None:
        """*length* bytes of *node* at byte *offset* have changed; length 0: any."""
        if node is self._root.node:
            self._changed(offset, length)
        else:
            self._changed(0, 0)
