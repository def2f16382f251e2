"""Write logs in tests: blklogwrites nodes over memory, and logs read as their description says, by nothing of ours."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from support import READ_WRITE, memory_of, root_of

from fusebd.block.graph import Graph
from fusebd.block.root import Root
from fusebd.drivers.blklogwrites import Blklogwrites, MarkOptions

LENGTH = 1 << 20
MEM = {"driver": "test-memory", "discard": "unmap"}
MAGIC = 0x6A736677736872
FLUSH, FUA_FLAG, DISCARD, MARK = 1, 2, 4, 8


@dataclass(frozen=True)
class Found:
    """What a log has, read as its description says: the superblock's count, and entries with their data or text."""

    count: int
    sector_size: int
    entries: list[tuple[int, int, int, bytes]]


def parse(data: bytes) -> Found:
    """The log in *data*; all that is there, whether the superblock counts it or not."""
    magic, version, count, size = struct.unpack("<QQQI", data[:28])
    assert (magic, version) == (MAGIC, 1)
    assert not any(data[28:size])
    entries, at = [], size
    while at < len(data):
        sector, nr_sectors, flags, data_len = struct.unpack("<QQQQ", data[at : at + 32])
        text = data[at + 32 : at + 32 + data_len]
        assert not any(data[at + 32 + data_len : at + size])
        assert not data_len or flags == MARK
        at += size
        length = 0 if flags & DISCARD else nr_sectors * size
        assert at + length <= len(data)
        entries.append((sector, nr_sectors, flags, data[at : at + length] or text))
        at += length
    return Found(count, size, entries)


async def logged(graph: Graph, *, file: Any = None, log: Any = None, **options: Any) -> Root:
    """A way in to a new blklogwrites node ``top``, over the memory nodes ``file-memory`` and ``log-memory``."""
    for name, size in (("file-memory", LENGTH), ("log-memory", 0)):
        if name not in graph.nodes:
            await graph.blockdev_add({**MEM, "node-name": name, "size": size})
    given = {"file": file or "file-memory", "log": log or "log-memory", "discard": "unmap"}
    named = {name.replace("_", "-"): value for name, value in options.items()}
    await graph.blockdev_add({"driver": "blklogwrites", "node-name": "top", **given, **named})
    return root_of(graph, "top", READ_WRITE)


def log_of(graph: Graph) -> Found:
    return parse(bytes(memory_of(graph, "log-memory").data))


def driver_of(graph: Graph) -> Blklogwrites:
    driver = graph.find("top").driver
    assert isinstance(driver, Blklogwrites)
    return driver


async def set_mark(graph: Graph, text: str) -> None:
    await driver_of(graph).mark(MarkOptions(mark=text))


def failing(node: str, event: str, **rule: Any) -> dict[str, Any]:
    """A blkdebug node over *node*, in which one request fails."""
    return {
        "driver": "blkdebug",
        "image": node,
        "discard": "unmap",
        "inject-error": [{"event": event, "once": True, **rule}],
    }


def whole_log(graph: Graph, count: int = 0) -> bytes:
    """The log, with a superblock in front of it that may not have been written yet."""
    data = bytes(memory_of(graph, "log-memory").data)
    return struct.pack("<QQQI", MAGIC, 1, count, 512).ljust(512, b"\0") + data[512:]


async def appended(graph: Graph, content: bytes, **options: Any) -> Root:
    """A way in to a node that appends to the log *content*."""
    await graph.blockdev_add({**MEM, "node-name": "log-memory", "size": 0})
    memory_of(graph, "log-memory").data[:] = content
    graph.find("log-memory").set_length(len(content))
    return await logged(graph, log_append=True, **options)


def sectors(*headers: tuple[int, int, int], count: int | None = None, size: int = 512) -> bytes:
    """A log of entries with data of zeroes."""
    parts = [struct.pack("<QQQI", MAGIC, 1, len(headers) if count is None else count, size).ljust(size, b"\0")]
    for sector, nr_sectors, flags in headers:
        parts.append(struct.pack("<QQQQ", sector, nr_sectors, flags, 0).ljust(size, b"\0"))
        parts.append(b"" if flags & DISCARD else bytes(nr_sectors * size))
    return b"".join(parts)
