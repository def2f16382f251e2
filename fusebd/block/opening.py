"""One node being opened: what a driver's ``open`` may ask of the graph.

Inheritance of options from parent to inline child: QEMU bdrv_inherited_options (block.c).
"""

from __future__ import annotations

import os
from contextvars import ContextVar
from typing import TYPE_CHECKING

from msgspec import UNSET, UnsetType

from fusebd.block import filename
from fusebd.block.flatoptions import Flat, inherit, own_options
from fusebd.block.naming import node_filename
from fusebd.block.node import Inherited, Node
from fusebd.block.options import BlockdevOptions, BlockdevRef
from fusebd.block.perms import Role
from fusebd.errors import FusebdError, GraphError, OpenError

if TYPE_CHECKING:
    from fusebd.block.child import Child
    from fusebd.block.graph import Graph


#: images in a backing chain that is opened by the names in them; a longer one would exhaust Python's stack
MAX_CHAIN = 200
#: the names by which images above the one that this task is opening were opened
_names: ContextVar[tuple[str, ...]] = ContextVar("names", default=())


def resolve_options(options: BlockdevOptions, parent: Inherited | None, role: Role) -> tuple[Flat, Flat]:
    """What a node was given in *options*, and that together with what it inherits from its parent.

    Raises GraphError where options that every node takes contradict each other.
    """
    own = own_options(options)
    effective = dict(own)
    inherit(effective, None if parent is None else parent.as_options(), role)
    check_detect_zeroes(effective)
    check_force_share(effective)
    return own, effective


def check_detect_zeroes(options: Flat) -> None:
    """Raises GraphError where detect-zeroes asks for discards that are not carried out."""
    if options.get("detect-zeroes") == "unmap" and options.get("discard") != "unmap":
        raise GraphError("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")


def check_force_share(options: Flat) -> None:
    """Raises GraphError where image locks would be ignored by one who writes."""
    if options.get("force-share") and not options.get("read-only"):
        raise GraphError("force-share=on can only be used with read-only images")


class _ChainTooLong(OpenError):
    """Its text stays as it is on the way up, where every image of the chain would add to it."""

    def prefixed(self, context: str) -> FusebdError:
        return self


class Opening:
    """Handed to ``Driver.open``: opens children and settles whether the node can be written."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph = graph
        self.node = node

    @property
    def read_only(self) -> bool:
        """Whether the node will not be written."""
        return self.node.read_only

    def fall_back_to_read_only(self, error: FusebdError) -> None:
        """Make the node read-only if auto-read-only allows it; else raise *error*.  Nothing if it is already."""
        if self.node.read_only:
            return
        if not self.node.inherited.auto_read_only:
            raise error
        self.node.read_only = True

    async def child(self, name: str, ref: BlockdevRef, role: Role, *, failure: str = "") -> Child:
        """Open the child *name* that *ref* names or describes, and attach it.

        Suspends while the child opens.  Raises GraphError (no such node, cycle), PermissionConflict,
        and what the child's driver raises; *failure* is put before what went wrong while it was looked for or opened.
        """
        if name != "file":
            self.node.take_name()
        try:
            if ref.reference is not None:
                below = self.graph.find_for_reference(ref.reference)
            else:
                assert ref.options is not None
                below = await self.graph.open_node(
                    ref.options,
                    inherit=self.node.inherited,
                    role=role,
                    described_as=(*self.node.described_as, name),
                )
        except FusebdError as error:
            raise (error.prefixed(failure) if failure else error) from None
        self.node.take_name()
        if ref.reference is not None:
            return self.graph.attach(self.node, name, role, below)
        below.inherits_from = self.node
        return await self.graph.attach_opened(self.node, name, role, below)

    async def child_by_filename(
        self,
        name: str,
        file: str,
        role: Role,
        *,
        driver: str | None = None,
        base: Node | None = None,
        protocol: bool = False,
        failure: str = "",
    ) -> Child:
        """Open the child *name* from the file name *file* as images and command lines spell it.

        *driver* is the image format to take it as; None has it probed, unless *protocol* says that it is none.
        A relative name is taken from the directory of *base*.  Understands ``json:``, ``blkdebug:`` and the other
        legacy names.  Suspends and raises as ``child`` does.
        """
        whole = filename.resolve_relative(file, base)
        above = _names.get()
        token = _names.set((*above, whole))
        try:
            if whole in above or self._is_file_above(whole):
                raise OpenError(f"Backing file '{whole}' creates an infinite loop.")
            if len(above) >= MAX_CHAIN:
                raise _ChainTooLong(f"Backing file chain has more than {MAX_CHAIN} images")
            options = await filename.options_for(whole, driver, self.graph.probe, protocol=protocol)
            below = await self.graph.open_node(options, inherit=self.node.inherited, role=role)
            if driver is None and not protocol and not filename.names_driver(whole):
                below.driver.was_probed()
        except FusebdError as error:
            raise (error.prefixed(failure) if failure else error) from None
        finally:
            _names.reset(token)
        below.inherits_from = self.node
        if name == "backing":
            self.node.opened_backing = node_filename(below)
        return await self.graph.attach_opened(self.node, name, role, below)

    async def backing(
        self, given: BlockdevRef | UnsetType | None, named: str, driver: str | None, base: Node
    ) -> Child | None:
        """Open the backing child: what the option *given* says, else the file that the image calls *named*.

        *given* None (``null``), or an empty reference, means none.  *driver*, *base* and the rest as in
        ``child_by_filename``.
        """
        failure = "Could not open backing file"
        if isinstance(given, BlockdevRef) and given.reference != "":
            return await self.child("backing", given, Role.COW, failure=failure)
        if given is not UNSET or not named:
            return None
        return await self.child_by_filename("backing", named, Role.COW, driver=driver, base=base, failure=failure)

    def _is_file_above(self, name: str) -> bool:
        """Whether *name* is the file of an image that is opening, that is of this one or one above it."""
        for node in self.graph.nodes.values():
            file = node.children.get("file")
            if not node.is_open and file is not None and file.node.is_open:
                try:
                    if os.path.samefile(file.node.driver.filename, name.removeprefix("file:")):
                        return True
                except (OSError, ValueError):  # one of them is no path, or nothing is there
                    continue
        return False
