"""Those who show nodes as files: what the block layer tells them, and what QMP asks of them.

The kernel may keep what it has read of a file, or read and write the host's file by itself.  So whoever shows a node as
a file has a say before what is below the node changes, and is waited for after a change of which the kernel is to hear.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import trio

from fusebd.block.cachemode import CacheMode
from fusebd.block.options import Json
from fusebd.errors import GraphError

if TYPE_CHECKING:
    from fusebd.block.node import Node

#: How long a change waits for the kernel to hear of it, in seconds.  The kernel in turn waits for requests under way on
#: what it is to forget; one of those may be held by a rule of blkdebug, or be the one that waits here.
_PATIENCE = 0.2


class FileView(ABC):
    """One mount.  ``mountpoint`` says where, as far as messages are concerned."""

    mountpoint: str = ""

    @abstractmethod
    def cached_files(self) -> list[dict[str, Json]]:
        """What query-fuse-files says about each file."""

    @abstractmethod
    def shows(self, node_name: str) -> bool:
        """Whether the node *node_name* has a file here."""

    @abstractmethod
    async def set_cache(self, node_name: str, mode: CacheMode) -> None:
        """How the file of the node *node_name* is cached from its next opening on.  Raises GraphError, EBUSY."""

    @abstractmethod
    def chain_changing(self, node: Node) -> None:
        """What those who use *node* go through is about to change.  Raises GraphError to prevent it."""

    @abstractmethod
    async def settle(self) -> None:
        """Wait until the kernel has forgotten what it was told to so far."""


class FileViews:
    """All mounts of a daemon.

    ``changes`` counts changes of which a kernel has to hear; ``unsettled`` has the mounts where it may not have yet.
    """

    def __init__(self) -> None:
        self.all: list[FileView] = []
        self.changes = 0
        self.unsettled: set[FileView] = set()

    def chain_changing(self, node: Node) -> None:
        """What those who use *node* go through is about to change.  Raises GraphError if a file does not allow it."""
        for view in self.all:
            view.chain_changing(node)

    async def settle(self) -> None:
        """Wait until the kernel has heard of the changes up to now, but not long.  Suspends only if it has not."""
        if not self.unsettled:
            return
        with trio.move_on_after(_PATIENCE):
            for view in list(self.unsettled):
                await view.settle()

    def find(self, node_name: str, mountpoint: str | None) -> FileView:
        """The mount that shows the node *node_name*; with *mountpoint*, the one there.  Raises GraphError."""
        found = [
            view for view in self.all if view.shows(node_name) and (mountpoint is None or view.mountpoint == mountpoint)
        ]
        if not found:
            where = "" if mountpoint is None else f" in '{mountpoint}'"
            raise GraphError(f"Node '{node_name}' is not shown as a file{where}")
        if len(found) > 1:
            raise GraphError(f"Node '{node_name}' is shown as a file more than once: 'mountpoint' must say which")
        return found[0]
