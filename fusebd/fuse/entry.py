"""The way in to a node that all who have its file open share.

So they do not exclude each other where one of them keeps others out: who keeps written data for a while must know
that nobody else changes the node, and means everybody but the kernel that keeps it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from fusebd.block.node import Node
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.errors import FusebdError

log = logging.getLogger(__name__)


class Needs(NamedTuple):
    """What somebody takes of the node, and what others may take meanwhile."""

    perm: Perm
    shared: Perm = Perm.ALL


class Entry:
    """The way in to *node*, there as long as somebody needs it; *on_resize* is called when the length has changed.

    With *root*, that is the way in, and stays as it is whatever is needed.
    """

    def __init__(self, node: Node, on_resize: Callable[[], None], root: Root | None = None) -> None:
        self._node = node
        self._on_resize = on_resize
        self._fixed = root is not None
        self._needs: Counter[Needs] = Counter()
        self.root = root
        if root is not None:
            root.on_resize = on_resize

    def take(self, needs: Needs) -> Root:
        """The way in, with *needs* too.  Raises PermissionConflict, ReadOnlyError; nothing is changed then."""
        self._needs[needs] += 1
        try:
            return self._adapted()
        except BaseException:
            self._forget(needs)
            raise

    def _forget(self, needs: Needs) -> None:
        self._needs[needs] -= 1
        if not self._needs[needs]:
            del self._needs[needs]

    def _adapted(self) -> Root:
        perm, shared = Perm.NONE, Perm.ALL
        for needs in self._needs:
            perm |= needs.perm
            shared &= needs.shared
        graph, root = self._node.graph, self.root
        if root is None:
            root = self.root = graph.attach_root(self._node.entrance, "an open file", perm, shared)
            root.on_resize = self._on_resize
        elif not self._fixed and (perm, shared) != (root.perm, root.shared):
            graph.set_root_perms(root, perm, shared)
        return root

    def loosen(self, needs: Needs) -> None:
        """*needs* are none any more, but others are."""
        self._forget(needs)
        with self._logged():
            self._adapted()

    @contextmanager
    def _logged(self) -> Iterator[None]:
        try:
            yield
        except FusebdError as error:
            log.warning("%s: permissions could not be loosened: %s", self._node.name, error)

    async def give_back(self, needs: Needs) -> None:
        """*needs* are none any more.  The last one waits for requests under way."""
        if self._fixed or self._needs.total() > 1:
            self.loosen(needs)
            return
        self._forget(needs)
        root, self.root = self.root, None
        assert root is not None
        # Whoever opens the file while this waits has a way in of his own, which must not be in conflict with this one.
        with self._logged():
            self._node.graph.set_root_perms(root, Perm.NONE, Perm.ALL)
        await self._node.graph.detach_root(root)
