"""blockdev-reopen: give nodes other options, and other children, while they are in use.

All options of a node are given anew: what is left out has its default afterwards, unless that cannot be.  An inline
child is reopened with its parent.  Where its options are given, these are all that it has; where only its name is, it
keeps what it was given and takes over from its parent what it would have inherited.  All changes of all nodes are
made together, while no request is under way, or none is.

A filter that was inserted (``fusebd.block.insertion``) is not seen: what is below it counts as the child.

Behaviour and texts: QEMU qmp_blockdev_reopen (blockdev.c), bdrv_reopen_multiple (block.c).  Differences: ``discard``
goes back to its default like any other option; ``force-share`` may be given again as it was; what depends on the length
of a child goes by the new child.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import trio

from fusebd.block.child import Child
from fusebd.block.driver import parse_blockdev
from fusebd.block.flatoptions import Flat, child_options, flatten, inherit
from fusebd.block.graph import Graph
from fusebd.block.node import Inherited, Node
from fusebd.block.opening import check_detect_zeroes, check_force_share
from fusebd.block.options import BlockdevOptions, Json, convert, tree_from_dotted
from fusebd.block.perms import Role
from fusebd.block.qjson import bucket
from fusebd.block.reopening import Reopening
from fusebd.errors import BlockIOError, FusebdError, GraphError, OptionError

log = logging.getLogger(__name__)

#: options of every node that can be changed
_CHANGEABLE = frozenset({"cache.direct", "cache.no-flush", "read-only", "auto-read-only", "discard", "detect-zeroes"})
#: options of every node that may be left out though they were given before
_RESETTABLE = _CHANGEABLE | {"node-name"}
#: options of every node
_COMMON = frozenset(BlockdevOptions.__struct_encode_fields__)
#: children that can be exchanged, in the order in which that is done
_EXCHANGEABLE = ("backing", "file")


async def reopen(graph: Graph, values: Sequence[Json]) -> None:
    """Reopen the nodes that the JSON objects *values*, each as for blockdev-add, name and describe.

    Suspends until requests under way have ended and everything is flushed, and while images are read anew.
    Raises FusebdError; the graph is then as it was.
    """
    given = [parse_blockdev(value, f"options[{index}].") for index, value in enumerate(values)]
    async with graph.lock:
        queue = _Queue()
        for options in given:
            if not isinstance(options.node_name, str):
                raise OptionError("node-name not specified")
            node = graph.nodes.get(options.node_name)
            if node is None or not node.is_open:
                raise GraphError(f"Failed to find node with node-name='{options.node_name}'")
            queue.add(node, flatten(options.given))
        async with graph.drained(*queue.entries):
            await _Change(graph, list(queue.entries.values())).carry_out()
    graph.nodes_changed()
    await graph.views.settle()


def _below(edge: Child) -> Node:
    """The child that *edge* stands for: what is below filters that were inserted there."""
    node = edge.node
    while node.inserted_over is not None:
        node = node.children[node.inserted_over[1]].node
    return node


# --- what is asked for ---------------------------------------------------------------------------


@dataclass(slots=True)
class _Entry:
    """One node, with the options that it is to have: *own* as given, *effective* with what it inherits or keeps."""

    node: Node
    own: Flat
    effective: Flat
    lacks_backing: bool = False


class _Queue:
    """The nodes to reopen, each before its children."""

    def __init__(self) -> None:
        self.entries: dict[Node, _Entry] = {}

    def add(
        self,
        node: Node,
        options: Flat,
        *,
        parent: Mapping[str, Json] | None = None,
        role: Role = Role.DATA,
        keep: bool = False,
    ) -> None:
        """*node* is to have *options*; as a child in *role* of a node with the options *parent*, if that is given.

        *keep*: what it has stays, where neither *options* nor its parent say otherwise.  Options that the queue has for
        it already stay likewise.
        """
        entry = self.entries.get(node)
        if entry is not None or keep:
            options = {**(node.own_options if entry is None else entry.own), **options}
        own = dict(options)
        if parent is not None:
            inherit(options, parent, role)
        if keep:
            options = {**node.effective_options, **options}
        if entry is None:
            entry = self.entries[node] = _Entry(node, own, options)
        entry.own, entry.effective = own, options
        if not keep:
            entry.lacks_backing = "backing" not in options and "backing.driver" not in options
        # the latest child first, as QEMU has them
        for name, edge in reversed(node.children.items()):
            below = _below(edge)
            # what is no inline child can only be exchanged
            if below.inherits_from is not node:
                continue
            if name not in options:
                told = _take(own, name)
                _take(options, name)
                self.add(below, told, parent=options, role=edge.role, keep=keep)
            elif options[name] in (below.name, edge.node.name):
                self.add(below, {}, parent=options, role=edge.role, keep=True)


def _take(options: Flat, child: str) -> Flat:
    """The options of *child* among *options*, which lose them."""
    prefix = f"{child}."
    taken = {name.removeprefix(prefix): value for name, value in options.items() if name.startswith(prefix)}
    for name in taken:
        del options[prefix + name]
    return taken


# --- making it so --------------------------------------------------------------------------------


class _Change:
    """The change of all nodes in *entries*, all of it or nothing.  Requests are held back meanwhile."""

    def __init__(self, graph: Graph, entries: Sequence[_Entry]) -> None:
        self._graph = graph
        self._entries = entries
        self._reopenings: list[Reopening] = []
        self._moves: list[tuple[Node, str, Node | None]] = []
        self._left: dict[Node, None] = {}  #: nodes that edges led to before
        self._gained: set[Node] = set()  #: nodes that become writable
        self._lost: set[Node] = set()  #: nodes that become read-only
        self._tops: list[Node] = []  #: nodes below which permissions may have changed
        self._steps_back: list[Callable[[], None]] = []
        self._given_up: list[Node] = []  #: nodes that were writable, and put away what they keep as long as they are

    async def carry_out(self) -> None:
        """Raises FusebdError; nothing has changed then."""
        for entry in self._entries:
            await _write_out(entry.node)
        try:
            await self._give_up_write()
            for entry in self._entries:
                self._prepare(entry)
            self._apply()
            await self._settle()
        except BaseException:
            self._undo()
            with trio.CancelScope(shield=True):
                await self._take_back_write()
            raise
        finally:
            self._graph.unready.clear()
            for node in self._lost:
                node.losing_write = None
        self._commit()
        with trio.CancelScope(shield=True):
            for node in self._left:
                await self._graph.release(node)

    async def _give_up_write(self) -> None:
        for entry in self._entries:
            if entry.effective.get("read-only") and not entry.node.read_only:
                self._given_up.append(entry.node)
                await entry.node.driver.give_up_write()

    async def _take_back_write(self) -> None:
        for node in self._given_up:
            try:
                await node.driver.take_back_write()
            except FusebdError as error:
                log.error("%s: could not be made writable again: %s", node.name, error)

    # -- checking -------------------------------------------------------------------------------

    def _prepare(self, entry: _Entry) -> None:
        """Check what *entry* asks for, and have the driver do so."""
        node, effective = entry.node, entry.effective
        driver = node.driver
        check_detect_zeroes(effective)
        if driver.changeable is None:
            raise GraphError(
                f"Block format '{node.driver_name}' used by node '{node.name}' does not support reopening files"
            )
        for name in _in_order(node.effective_options):
            if name not in effective and not _is_among(name, _RESETTABLE | driver.resettable):
                raise OptionError(f"Option '{name}' cannot be reset to its default value")
        changed = _differing(node.effective_options, effective)
        children = self._wanted_children(entry)
        reopening = driver.reopening(
            node,
            _typed_options(entry, children),
            Inherited.of(effective),
            changed=frozenset(name for name in changed if _is_among(name, driver.changeable)),
            unmap=effective.get("discard") == "unmap",
            children=children,
        )
        self._reopenings.append(reopening)
        reopening.prepare()
        if entry.lacks_backing and (node.backing is not None or driver.format_info().get("backing-filename")):
            raise GraphError(f"backing is missing for '{node.name}'")
        for name in _EXCHANGEABLE:
            if name in effective:
                self._plan_child(node, name, effective[name])
        for name in _in_order(changed & effective.keys()):
            if name in _EXCHANGEABLE or _is_among(name, _CHANGEABLE | driver.changeable):
                continue
            edge = node.children.get(name)
            if edge is None or effective[name] not in (edge.node.name, _below(edge).name):
                raise OptionError(f"Cannot change the option '{name}'")
        check_force_share(effective)

    def _wanted_children(self, entry: _Entry) -> dict[str, Node | None]:
        """The children that are to be exchanged; None where there is to be none, or there is no such node."""
        wanted: dict[str, Node | None] = {}
        for name in _EXCHANGEABLE:
            if name in entry.effective:
                reference = entry.effective[name]
                target = None if reference is None else self._graph.nodes.get(reference)
                if not _leads_to(entry.node.children.get(name), target):
                    wanted[name] = target
        return wanted

    def _plan_child(self, node: Node, name: str, reference: str | None) -> None:
        """Make *reference*, None for nothing, the child *name* of *node*, once all is prepared."""
        target = None if reference is None else self._graph.find(reference)
        if target is not None and node in self._planned_subtree(target):
            raise GraphError(f"Making '{reference}' a {name} child of '{node.name}' would create a cycle")
        edge = node.children.get(name)
        if _leads_to(edge, target):
            return
        if edge is not None and edge.node.inserted_over is not None:
            raise GraphError(f"Cannot replace implicit {name} child of {node.name}")
        if edge is None and node.driver.is_filter:
            raise GraphError(f"'{node.name}' is a {node.driver_name} filter node that does not support a {name} child")
        if name == "backing" and name not in child_options(node.driver.options_class):
            raise GraphError(f"Driver '{node.driver_name}' of node '{node.name}' does not support backing files")
        if edge is None and name != "backing":
            raise GraphError(f"Cannot set {name} child to format node without {name} child")
        self._moves.append((node, name, target))

    def _planned_subtree(self, top: Node) -> set[Node]:
        """*top* and what is below it after the moves that are planned so far."""
        found = {top}
        todo = [top]
        while todo:
            node = todo.pop()
            below: dict[str, Node | None] = {name: edge.node for name, edge in node.children.items()}
            below |= {name: target for moved, name, target in self._moves if moved is node}
            new = {child for child in below.values() if child is not None} - found
            found |= new
            todo += new
        return found

    # -- changing -------------------------------------------------------------------------------

    def _apply(self) -> None:
        """Make the new state hold for everybody; permissions are what can still be in the way."""
        for entry, reopening in zip(self._entries, self._reopenings, strict=True):
            detects = entry.effective.get("detect-zeroes", "off") != entry.node.detect_zeroes
            if detects or reopening.changes_descriptor or self._changes_content(reopening):
                self._graph.views.chain_changing(entry.node)
        for entry, reopening in zip(self._entries, self._reopenings, strict=True):
            self._configure(entry, reopening)
        for node, name, target in self._moves:
            self._move(node, name, target)
        for reopening in self._reopenings:
            reopening.apply()
            reopening.node.refresh_edges()
        tops = [*self._left, *(reopening.node for reopening in self._reopenings)]
        tops += [target for _, _, target in self._moves if target is not None]
        for reopening in self._reopenings:
            tops += _inserted_over(reopening.node)
        self._graph.refresh_perms(tops)
        self._tops = tops
        for reopening in reversed(self._reopenings):
            reopening.take_over()
        self._refresh_lengths()

    def _changes_content(self, reopening: Reopening) -> bool:
        return reopening.changes_content or any(node is reopening.node for node, _, _ in self._moves)

    def _configure(self, entry: _Entry, reopening: Reopening) -> None:
        """Have the node be as *entry* says, and writable or not as *reopening* has found."""
        node = entry.node
        was_read_only = node.read_only
        names = child_options(node.driver.options_class)
        self._set_options(
            node,
            reopening.options,
            {name: value for name, value in entry.own.items() if name not in names},
            {name: value for name, value in entry.effective.items() if name not in names},
        )
        node.read_only = reopening.read_only
        if was_read_only is node.read_only:
            return
        filters = [above for above in _inserted_over(node) if "read-only" not in above.own_options]
        for above in filters:
            effective = {**above.effective_options, "read-only": node.read_only}
            self._set_options(above, above.options, above.own_options, effective)
        if was_read_only:
            self._gained.update((node, *filters))
            return
        self._lost.update((node, *filters))
        for lost in (node, *filters):
            lost.losing_write = node

    def _set_options(self, node: Node, options: BlockdevOptions, own: Flat, effective: Flat) -> None:
        before, read_only = (node.options, node.own_options, node.effective_options), node.read_only

        def step_back() -> None:
            node.configure(*before)
            node.read_only = read_only

        self._steps_back.append(step_back)
        node.configure(options, own, effective)

    def _move(self, node: Node, name: str, target: Node | None) -> None:
        """Have the child *name* of *node* lead to *target*, or be none."""
        children = dict(node.children)
        edge = children.get(name)
        before = None if edge is None else edge.node
        place = 0 if edge is None or before is None else before.parents.index(edge)
        made = Child(node, name, Role.COW, target) if edge is None and target is not None else edge
        assert made is not None

        def step_back() -> None:
            if target is not None:
                target.parents.remove(made)
            if before is not None:
                before.parents.insert(place, made)
                made.point_at(before)
            node.children.clear()
            node.children.update(children)

        self._steps_back.append(step_back)
        if before is not None:
            before.parents.remove(made)
            self._left[before] = None
            del node.children[name]
        if target is None:
            return
        target.parents.append(made)
        node.children[name] = made
        made.point_at(target)

    def _refresh_lengths(self) -> None:
        for reopening in reversed(self._reopenings):
            for edge in reopening.node.children.values():
                edge.child_resized()

    async def _settle(self) -> None:
        settling = [reopening for reopening in reversed(self._reopenings) if reopening.has_to_settle]
        if settling:
            self._graph.unready |= self._gained
        for reopening in settling:
            await reopening.settle()

    # -- the end --------------------------------------------------------------------------------

    def _commit(self) -> None:
        for reopening in reversed(self._reopenings):
            reopening.commit()
        for reopening in reversed(self._reopenings):
            if self._changes_content(reopening):
                reopening.node.changed_aside()
        for node, _, target in self._moves:
            if target is not None and _inherits(target, node):
                target.inherits_from = node
        for left in self._left:
            for below in self._graph.subtree(left):
                above = below.inherits_from
                if above is not None and all(
                    below not in (edge.node, _below(edge)) for edge in above.children.values()
                ):
                    below.inherits_from = None

    def _undo(self) -> None:
        while self._steps_back:
            self._steps_back.pop()()
        for reopening in reversed(self._reopenings):
            _logged(reopening.node, reopening.undo)
            reopening.node.refresh_edges()
        if self._tops:
            _logged(self._tops[0], lambda: self._graph.refresh_perms(self._tops))
        self._refresh_lengths()


async def _write_out(node: Node) -> None:
    if node.read_only:
        return
    try:
        await node.driver.write_out()
    except BlockIOError as error:
        raise GraphError(f"Error flushing drive: {os.strerror(error.errno)}", errno=error.errno) from error


def _typed_options(entry: _Entry, children: Mapping[str, Node | None]) -> BlockdevOptions:
    """The options that *entry* gives for its node, with its children by name; *children* are those to be exchanged."""
    node = entry.node
    if entry.own["driver"] != node.driver_name:
        return node.options  # which is refused, once what is common to all drivers has been looked at
    declaration = node.driver.options_class
    names = child_options(declaration)
    # what the driver does not know is complained about later
    known = frozenset(declaration.__struct_encode_fields__) - names
    given = {
        name: value for name, value in entry.effective.items() if name in entry.own or not _is_among(name, _COMMON)
    }
    tree = tree_from_dotted({name: value for name, value in given.items() if _is_among(name, known)})
    for name in names:
        edge = node.children.get(name)
        target = children.get(name) or (None if edge is None else _below(edge))
        if entry.effective.get(name, ...) is None:
            tree[name] = None
        elif target is not None:
            tree[name] = target.name
    options = convert(tree, declaration)
    options.keep_given(tree)
    return options


def _leads_to(edge: Child | None, target: Node | None) -> bool:
    """Whether *edge* need not be changed to lead to *target*; None is no edge, and nowhere."""
    return target is None if edge is None else target in (edge.node, _below(edge))


def _inserted_over(node: Node) -> list[Node]:
    """The filters that were inserted over *node*, in no order."""
    found: list[Node] = []
    for edge in node.parents:
        above = edge.parent
        if above is not None and above.inserted_over is not None and above.inserted_over[1] == edge.name:
            found += [above, *_inserted_over(above)]
    return found


def _inherits(node: Node, above: Node) -> bool:
    """Whether *node* was described in the options of *above*, or in those of a node that was, and so on."""
    parent = node.inherits_from
    return parent is not None and (parent is above or _inherits(parent, above))


def _is_among(name: str, options: frozenset[str]) -> bool:
    """Whether the option *name*, or the object or array that it is in, is one of *options*."""
    return name in options or name.partition(".")[0] in options


def _differing(old: Flat, new: Flat) -> set[str]:
    """The options that one of the two has and the other has not, or not with this value."""
    return {name for name in old.keys() | new.keys() if old.get(name, ...) != new.get(name, ...)}


def _in_order(names: Iterable[str]) -> list[str]:
    """*names* in the order in which QEMU's hash table has them: which one is complained about first."""
    return sorted(names, key=bucket)


def _logged(node: Node, step: Callable[[], None]) -> None:
    """Carry out *step* of going back, which others who came meanwhile may prevent."""
    try:
        step()
    except FusebdError as error:
        log.error("%s: could not be set back after a failed reopening: %s", node.name, error)
