"""One node being reopened: the driver's part in it.

``blockdev-reopen`` (``fusebd.block.reopen``) takes all nodes concerned through the same stages, one after the other,
while no request is under way on them:

``write_out`` (of the driver)
    nothing that was written, or belongs to it, is in memory alone; may suspend.
``prepare``
    whatever can fail is tried, and nothing changes yet.
``apply``
    edges and options are the new ones; here the driver takes over what permissions depend on.
``take_over``
    the permissions hold; the driver works with what it has prepared.
``settle``
    what has to be read and written before others may; may suspend.
``commit`` or ``undo``
    the end.  ``undo`` also follows on a failure in any of the stages from ``prepare`` on, of any of the nodes, and
    finds edges and options as they were before.

A driver that can be reopened says so by ``Driver.changeable``; where its part is more than to agree, it has a subclass
as ``Driver.reopening``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusebd.block.driver import Driver
    from fusebd.block.node import Inherited, Node


class Reopening:
    """What *node* is to become: *options* and *inherited* are the new ones, *unmap* says whether it discards.

    *options* is an instance of the driver's ``options_class``.

    *changed* has the names of the driver's own options that have another value than before; *children* the nodes that
    children called so lead to afterwards, as far as they are to change (None: nowhere).
    """

    #: the driver of *node* before; subclasses say which it is
    driver: Driver
    #: the node will be read-only; a driver that falls back to that sets it in ``prepare``
    read_only: bool
    #: the content of the node may be different afterwards
    changes_content = False
    #: what ``Driver.backing_descriptor`` gives may be different afterwards
    changes_descriptor = False

    def __init__(
        self,
        node: Node,
        options: Any,
        inherited: Inherited,
        *,
        changed: frozenset[str],
        unmap: bool,
        children: Mapping[str, Node | None],
    ) -> None:
        self.node = node
        self.driver = node.driver
        self.options = options
        self.inherited = inherited
        self.changed = changed
        self.unmap = unmap
        self.children = children
        self.read_only = inherited.read_only

    def prepare(self) -> None:
        """Raise FusebdError if it cannot be done."""

    def apply(self) -> None:
        """Take over limits, and anything else that others look at."""

    def take_over(self) -> None:
        """Raises FusebdError."""

    @property
    def has_to_settle(self) -> bool:
        """Whether ``settle`` has something to do."""
        return False

    async def settle(self) -> None:
        """Raises FusebdError."""

    def commit(self) -> None:
        """Let go of what is not needed any more.  Nothing can fail here."""

    def undo(self) -> None:
        """Be as before ``prepare``, how far it ever got.  Raises FusebdError where that cannot be."""
