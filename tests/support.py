"""What tests need and fusebd does not: drivers over memory, and short ways to say common things."""

from __future__ import annotations

import random
from dataclasses import astuple
from typing import Annotated, Any, ClassVar

import trio
from msgspec import Meta

from fusebd.block.child import Child, fill_zeroes
from fusebd.block.debugevents import EVENTS
from fusebd.block.driver import Buffers, FilterDriver, Node, Preallocation, ProtocolDriver, nbytes, register
from fusebd.block.graph import Graph
from fusebd.block.opening import Opening
from fusebd.block.options import BlockdevOptions, BlockdevRef, Size
from fusebd.block.perms import Perm, Role
from fusebd.block.root import Root
from fusebd.drivers.file import File
from fusebd.errors import BlockIOError, NotSupported

READ_WRITE = Perm.CONSISTENT_READ | Perm.WRITE


class MemoryOptions(BlockdevOptions, frozen=True, kw_only=True):
    size: Annotated[Size, Meta(description="length in bytes")] = 1 << 20
    align: Size = 1
    max_transfer: Size = 0
    zero_align: Size = 0
    discard_align: Size = 0


@register("test-memory", MemoryOptions)
class Memory(ProtocolDriver):
    """A bytearray.  ``log`` has every request that arrived: (operation, offset, length)."""

    changeable: ClassVar[frozenset[str] | None] = frozenset()

    def __init__(self, node: Node, options: MemoryOptions) -> None:
        super().__init__(node)
        self.data = bytearray(options.size)
        self.length = options.size
        self.limits.request_alignment = options.align
        self.limits.max_transfer = options.max_transfer
        self.limits.pwrite_zeroes_alignment = options.zero_align
        self.limits.pdiscard_alignment = options.discard_align
        self.zeroes_supported = True
        self.log: list[tuple[str, int, int]] = []

    @classmethod
    async def open(cls, opening: Opening, options: MemoryOptions) -> Memory:
        return cls(opening.node, options)

    def _check(self, operation: str, offset: int, length: int) -> None:
        self.log.append((operation, offset, length))
        assert not (offset | length) % self.limits.request_alignment
        assert not self.limits.max_transfer or length <= self.limits.max_transfer

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        self._check("read", offset, nbytes(bufs))
        for buf in bufs:
            found = self.data[offset : offset + len(buf)]
            fill_zeroes((buf,))
            buf[: len(found)] = found
            offset += len(buf)

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        self._check("write", offset, nbytes(bufs))
        for buf in bufs:
            if len(self.data) < offset + len(buf):
                self.data.extend(bytes(offset + len(buf) - len(self.data)))
            self.data[offset : offset + len(buf)] = buf
            offset += len(buf)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        if not self.zeroes_supported or (offset | length) % (self.limits.pwrite_zeroes_alignment or 1):
            raise NotSupported(node_name=self.node.name, operation="write zeroes")
        self.log.append(("zero", offset, length))
        self.data[offset : offset + length] = bytes(length)

    async def pdiscard(self, offset: int, length: int) -> None:
        self.log.append(("discard", offset, length))
        self.data[offset : offset + length] = bytes(length)

    async def flush_to_disk(self) -> None:
        self.log.append(("flush", 0, 0))

    async def truncate(
        self, length: int, *, exact: bool = False, prealloc: Preallocation = "off", zero: bool = False
    ) -> None:
        del self.data[length:]
        self.data.extend(bytes(length - len(self.data)))
        self.node.set_length(length)


async def read(root: Root, offset: int, length: int) -> bytes:
    """*length* bytes of what *root* leads to."""
    data = bytearray(length)
    await root.preadv(offset, (memoryview(data),))
    return bytes(data)


async def write(root: Root, offset: int, data: bytes) -> None:
    """Write *data* to what *root* leads to."""
    await root.pwritev(offset, (memoryview(data),))


def root_of(graph: Graph, name: str, perm: Perm = READ_WRITE) -> Root:
    """A way in to the node *name*."""
    return graph.attach_root(graph.find(name), "a test", perm)


def memory_of(graph: Graph, name: str) -> Memory:
    """The driver of the test-memory node *name*."""
    driver = graph.find(name).driver
    assert isinstance(driver, Memory)
    return driver


def snapshot(graph: Graph) -> dict[str, Any]:
    """All there is about nodes and edges, the drivers' own state included: equal to another one if nothing changed."""
    found: dict[str, Any] = {name: _state(node) for name, node in graph.nodes.items()}
    found["roots"] = {root: root._gate for root in graph.roots}
    found["drains"] = list(graph._drains)
    found["unready"] = set(graph.unready)
    return found


def _state(node: Node) -> dict[str, Any]:
    edges = [(edge, edge.role, edge.perm, edge.shared, edge.driver, edge._mask) for edge in node.parents]
    # what has been written and flushed on the way does not count
    passing = ("parents", "children", "counters", "tallies", "flushed_generation")
    kept = {name: value for name, value in vars(node).items() if name not in passing}
    driver = {name: value for name, value in vars(node.driver).items() if name != "limits"}
    if isinstance(node.driver, File):  # nor does what it has learnt about the host
        driver = {"handle": node.driver.handle, "options": node.driver.options, "length": node.driver.length}
    return {
        **kept,
        "own_options": list(node.own_options.items()),
        "effective_options": dict(node.effective_options),
        "driver": (node.driver, driver, astuple(node.driver.limits)),
        "parents": edges,
        "children": [(name, edge, edge.node) for name, edge in node.children.items()],
    }


class SuspendsOptions(BlockdevOptions, frozen=True, kw_only=True):
    file: BlockdevRef
    most: Size = 1
    seed: Size = 0


@register("test-suspends", SuspendsOptions)
class Suspends(FilterDriver):
    """Every request makes a trip through the scheduler before it goes on to ``file``.

    With *most* above one, it makes up to so many, before and after; how many follows from *seed*.
    """

    most = 1
    rng: random.Random

    @classmethod
    async def open(cls, opening: Opening, options: SuspendsOptions) -> Suspends:
        driver = cls(opening.node, await opening.child("file", options.file, Role.FILTERED | Role.PRIMARY))
        driver.most, driver.rng = options.most, random.Random(options.seed)
        return driver

    async def _suspend(self) -> None:
        for _ in range(self.rng.randint(0, self.most) if self.most > 1 else 1):
            await trio.lowlevel.checkpoint()

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        await self._suspend()
        await self.file.preadv(offset, bufs)
        if self.most > 1:
            await self._suspend()

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        await self._suspend()
        await self.file.pwritev(offset, bufs, flags)
        if self.most > 1:
            await self._suspend()

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self._suspend()
        await self.file.pwrite_zeroes(offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        await self._suspend()
        await self.file.pdiscard(offset, length)

    async def flush_to_disk(self) -> None:
        await self._suspend()


class RecorderOptions(BlockdevOptions, frozen=True, kw_only=True):
    file: BlockdevRef


@register("test-recorder", RecorderOptions)
class Recorder(FilterDriver):
    """Stands where blkdebug would: ``events`` has what the node above announced.

    The first request after event number *fail_at*, counting from 0, fails with EIO; ``failing``: the next one does.
    ``journal`` has what was written: (offset, bytes), and None for a flush.
    """

    def __init__(self, node: Node, file: Child) -> None:
        super().__init__(node, file)
        self.events: list[str] = []
        self.fail_at = -1
        self.journal: list[tuple[int, bytes] | None] = []
        self.failing = False
        self.listens = frozenset(EVENTS)

    @classmethod
    async def open(cls, opening: Opening, options: RecorderOptions) -> Recorder:
        return cls(opening.node, await opening.child("file", options.file, Role.FILTERED | Role.PRIMARY))

    def announced(self, event: str) -> None:
        if len(self.events) == self.fail_at:
            self.failing = True
        self.events.append(event)

    def _check(self, operation: str) -> None:
        if self.failing:
            self.failing = False
            raise BlockIOError(node_name=self.node.name, operation=operation)

    async def preadv(self, offset: int, bufs: Buffers) -> None:
        self._check("read")
        await self.file.preadv(offset, bufs)

    async def pwritev(self, offset: int, bufs: Buffers, flags: int = 0) -> None:
        self._check("write")
        self.journal.append((offset, b"".join(bufs)))
        await self.file.pwritev(offset, bufs, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self._check("write zeroes")
        self.journal.append((offset, bytes(length)))
        await self.file.pwrite_zeroes(offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        self._check("discard")
        self.journal.append((offset, bytes(length)))
        await self.file.pdiscard(offset, length)

    async def flush_to_disk(self) -> None:
        self._check("flush")
        self.journal.append(None)


def recorder_of(graph: Graph, name: str) -> Recorder:
    """The driver of the test-recorder node *name*."""
    driver = graph.find(name).driver
    assert isinstance(driver, Recorder)
    return driver
