"""An image being reopened: its tables are read anew where they may be others, or are to be kept otherwise.

So they are if the options change, if the image becomes writable (and is prepared for that, as when it is opened), and
if ``file`` leads to another content than before, which QEMU does not look at.  What ``lazy-refcounts`` allows is never
made use of, so that it changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import UNSET

from fusebd.block.reopening import Reopening
from fusebd.drivers.qcow2.options import cache_sizes, check_options
from fusebd.errors import GraphError

if TYPE_CHECKING:
    from fusebd.drivers.qcow2.driver import Qcow2

#: the options that can be changed
CHANGEABLE = frozenset(
    {
        "lazy-refcounts",
        "pass-discard-request",
        "pass-discard-snapshot",
        "pass-discard-other",
        "discard-no-unref",
        "overlap-check",
        "cache-size",
        "l2-cache-size",
        "l2-cache-entry-size",
        "refcount-cache-size",
        "cache-clean-interval",
    }
)


class Qcow2Reopening(Reopening):
    """Makes another driver of the same children."""

    driver: Qcow2
    _anew = False
    _after: Qcow2 | None = None

    def prepare(self) -> None:
        header = self.driver.header
        check_options(self.options, version=header.version)
        cache_sizes(
            self.options, size=header.size, cluster_bits=header.cluster_bits, l2_entry_bytes=header.l2_entry_bytes
        )
        node = self.node
        file = self.children.get("file")
        changes_file = file is not None and file.content_node is not node.children["file"].node.content_node
        if changes_file and any(bitmap.persistent for bitmap in node.dirty_bitmaps):
            raise GraphError(f"The file of node '{node.name}' cannot be exchanged: it has persistent dirty bitmaps")
        self._anew = (
            bool(self.changed)
            or not self.driver.is_usable
            or (node.read_only and not self.read_only)
            or (self.options.pass_discard_request is UNSET and self.unmap != node.unmap)
            or changes_file
        )

    def apply(self) -> None:
        self.driver.back_by(self.node.backing)

    @property
    def has_to_settle(self) -> bool:
        return self._anew

    async def settle(self) -> None:
        children = self.node.children
        self._after = await type(self.driver).load(
            self.node, children["file"], children.get("data-file"), self.options, self.driver.encryption
        )
        self._after.back_by(self.node.backing)

    def commit(self) -> None:
        if self._after is not None:
            if self._after.header.backing_file != self.driver.header.backing_file:
                self.node.opened_backing = ""  # that was what the other image named
            self.node.replace_driver(self._after)
            self.driver.drop()

    def undo(self) -> None:
        if self._after is not None:
            self._after.drop()
        self.driver.back_by(self.node.backing)
