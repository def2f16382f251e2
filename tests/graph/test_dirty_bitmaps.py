"""Dirty bitmaps record just what is written, and answer as qemu-storage-daemon's do."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from images import create
from qemuprograms import storage_daemon
from qmptalk import talking
from support import READ_WRITE, root_of, write

from fusebd.block.graph import Graph
from fusebd.errors import BlockIOError, NotSupported
from fusebd.qmp.server import QmpServer

K = 1024
Json = Any
ADD, REMOVE, CLEAR, ENABLE, DISABLE, MERGE = (
    f"block-dirty-bitmap-{verb}" for verb in ("add", "remove", "clear", "enable", "disable", "merge")
)
SHA256 = "x-debug-block-dirty-bitmap-sha256"
LONG_NAME = "x" * 1024


def nodes(directory: Path) -> list[Json]:
    def file(name: str) -> Json:
        return {"driver": "file", "filename": str(directory / name)}

    return [
        {"driver": "qcow2", "node-name": "disk", "file": file("disk")},
        {"driver": "qcow2", "node-name": "small", "file": file("small")},
        {"driver": "qcow2", "node-name": "large", "file": file("large")},
        {"driver": "raw", "node-name": "plain", "file": file("plain")},
    ]


def files(directory: Path) -> None:
    directory.mkdir()
    create(directory / "disk", "1M")
    create(directory / "small", "2M", cluster_size=512)
    create(directory / "large", "1M", cluster_size="2M")
    (directory / "plain").write_bytes(bytes(1 << 20))


def on(node: str, name: str, **more: Json) -> Json:
    return {"node": node, "name": name, **more}


SCRIPT: list[tuple[str, Json]] = [
    (ADD, on("disk", "one")),
    (ADD, on("disk", "one")),
    (ADD, on("disk", "")),
    (ADD, on("disk", LONG_NAME)),
    (ADD, on("none", "one")),
    (ADD, on("disk", "two", granularity=100)),
    (ADD, on("disk", "two", granularity=256)),
    (ADD, on("disk", "two", granularity=0)),
    (ADD, on("disk", "two", granularity=1 << 32)),
    (ADD, on("disk", "two", granularity="x")),
    (ADD, on("disk", "two", granularity=512, disabled=True)),
    (ADD, on("disk", "three", granularity=1 << 31)),
    (ADD, on("small", "one")),
    (ADD, on("large", "one")),
    (ADD, on("plain", "one")),
    (ADD, on("plain", "two", persistent=True)),
    ("query", {}),
    *((verb, on("none", "one")) for verb in (REMOVE, CLEAR, ENABLE, DISABLE, SHA256)),
    *((verb, on("disk", "none")) for verb in (REMOVE, CLEAR, ENABLE, DISABLE, SHA256)),
    *((SHA256, on("disk", name)) for name in ("one", "two", "three")),
    (SHA256, on("small", "one")),
    (ENABLE, on("disk", "two")),
    (DISABLE, on("disk", "one")),
    (DISABLE, on("disk", "one")),
    (MERGE, {"node": "disk", "target": "none", "bitmaps": ["one"]}),
    (MERGE, {"node": "disk", "target": "one", "bitmaps": ["none"]}),
    (MERGE, {"node": "disk", "target": "one", "bitmaps": ["two", "three"]}),
    (MERGE, {"node": "disk", "target": "one", "bitmaps": [{"node": "plain", "name": "one"}]}),
    (MERGE, {"node": "disk", "target": "one", "bitmaps": [{"node": "small", "name": "one"}]}),
    (MERGE, {"node": "disk", "target": "one", "bitmaps": [{"node": "none", "name": "one"}]}),
    (MERGE, {"node": "disk", "target": "one", "bitmaps": [{"node": "small"}]}),
    (MERGE, {"node": "disk", "target": "one", "bitmaps": [5]}),
    ("query", {}),
    ("block_resize", {"node-name": "disk", "size": 3 << 20}),
    (SHA256, on("disk", "two")),
    (REMOVE, on("disk", "three")),
    (
        "transaction",
        {
            "actions": [
                {"type": ADD, "data": on("disk", "four")},
                {"type": CLEAR, "data": on("disk", "one")},
                {"type": REMOVE, "data": on("disk", "two")},
                {"type": ENABLE, "data": on("disk", "one")},
                {"type": "abort", "data": {}},
            ]
        },
    ),
    ("query", {}),
    (
        "transaction",
        {
            "actions": [
                {"type": ADD, "data": on("disk", "four")},
                {"type": MERGE, "data": {"node": "disk", "target": "four", "bitmaps": ["one"]}},
                {"type": REMOVE, "data": on("disk", "two")},
                {"type": ENABLE, "data": on("disk", "one")},
            ]
        },
    ),
    ("query", {}),
]


def bitmaps_of(found: Json) -> Json:
    """The bitmaps of each node that has a name."""
    return {
        node["node-name"]: node.get("dirty-bitmaps") for node in found if not node["node-name"].startswith("#block")
    }


async def test_the_answers_are_those_of_qemu_storage_daemon(tmp_path: Path) -> None:
    expected, found = [], []
    files(tmp_path / "theirs")
    with storage_daemon() as monitor:
        for options in nodes(tmp_path / "theirs"):
            monitor("blockdev-add", options)
        for command, arguments in SCRIPT:
            if command == "query":
                expected.append(bitmaps_of(monitor("query-named-block-nodes", {"flat": True})))
            else:
                expected.append(monitor.ask({"execute": command, "arguments": arguments}))
    files(tmp_path / "ours")
    graph = Graph()
    async with talking(QmpServer(graph, lambda: None)) as talk:
        for options in nodes(tmp_path / "ours"):
            await talk.ask({"execute": "blockdev-add", "arguments": options})
        for command, arguments in SCRIPT:
            if command == "query":
                found.append(bitmaps_of(await talk.execute("query-named-block-nodes", flat=True)))
            else:
                found.append(await talk.ask({"execute": command, "arguments": arguments}))
    await graph.close()
    assert len(found) == len(SCRIPT)
    for (command, arguments), ours, theirs in zip(SCRIPT, found, expected, strict=True):
        assert ours == theirs, (command, arguments)


@pytest.mark.parametrize("granularity", [512, 4096, 65536])
async def test_a_bitmap_has_just_what_is_written(granularity: int) -> None:
    graph = Graph()
    await graph.blockdev_add({"driver": "test-memory", "node-name": "memory", "discard": "unmap"})
    await graph.blockdev_add({"driver": "raw", "node-name": "disk", "file": "memory", "discard": "unmap"})
    root = root_of(graph, "disk", READ_WRITE)
    rng = random.Random(granularity)
    length = 1 << 20
    async with talking(QmpServer(graph, lambda: None)) as talk:
        await write(root, 0, b"before")
        await talk.execute(ADD, node="disk", name="map", granularity=granularity)
        await talk.execute(ADD, node="memory", name="below", granularity=512)
        await talk.execute(ADD, node="disk", name="off", disabled=True)
        model = bytearray(length)
        for _ in range(30):
            offset = rng.randrange(length)
            size = min(rng.choice([1, 512, 5000, 70000]), length - offset)
            kind = rng.choice(["write", "zero", "discard"])
            if kind == "write":
                await write(root, offset, bytes(size))
            elif kind == "zero":
                await root.pwrite_zeroes(offset, size)
            else:
                await root.pdiscard(offset, size)
            first, end = offset // granularity * granularity, -(-(offset + size) // granularity) * granularity
            model[first:end] = b"x" * (end - first)
        dirty = sum(bool(model[at]) for at in range(0, length, granularity)) * granularity
        nodes_now = bitmaps_of(await talk.execute("query-named-block-nodes"))
        assert nodes_now["disk"][1]["count"] == dirty
        assert nodes_now["disk"][0]["count"] == 0
        bitmap = graph.find("disk").dirty_bitmaps.find("map")
        assert bitmap is not None
        marked = bytearray(length)
        for first, end in bitmap.bits.runs():
            marked[first * granularity : end * granularity] = b"x" * (end - first) * granularity
        assert marked == model
        await talk.execute(CLEAR, node="disk", name="map")
        await write(root, 3 * granularity, b"x")
        await talk.execute(DISABLE, node="disk", name="map")
        await write(root, 0, b"x" * length)
        assert list(bitmap.bits.runs()) == [(3, 4)]
        await talk.execute(MERGE, node="disk", target="off", bitmaps=["map"])
        await talk.execute(REMOVE, node="disk", name="map")
        off = graph.find("disk").dirty_bitmaps.find("off")
        assert off is not None
        assert off.bits.count() == 1
    await graph.detach_root(root)
    await graph.close()


async def test_writes_pay_nothing_where_no_bitmap_records() -> None:
    graph = Graph()
    await graph.blockdev_add({"driver": "test-memory", "node-name": "memory"})
    root = root_of(graph, "memory", READ_WRITE)
    async with talking(QmpServer(graph, lambda: None)) as talk:
        straight = root._write_most
        assert straight > 0
        await talk.execute(ADD, node="memory", name="off", disabled=True)
        assert root._write_most == straight
        await talk.execute(ENABLE, node="memory", name="off")
        assert root.watches
        assert root._write_most == -1
        await talk.execute(REMOVE, node="memory", name="off")
        assert not root.watches
        assert root._write_most == straight
    await graph.detach_root(root)
    await graph.close()


async def test_a_write_that_fails_is_dirty() -> None:
    graph = Graph()
    rules = [{"event": "pwritev", "errno": 5}]
    below = {"driver": "test-memory"}
    await graph.blockdev_add({"driver": "blkdebug", "node-name": "disk", "image": below, "inject-error": rules})
    root = root_of(graph, "disk", READ_WRITE)
    async with talking(QmpServer(graph, lambda: None)) as talk:
        await talk.execute(ADD, node="disk", name="map")
        with pytest.raises(BlockIOError):
            await write(root, 0, b"x")
        assert bitmaps_of(await talk.execute("query-named-block-nodes"))["disk"][0]["count"] == 65536
    await graph.detach_root(root)
    await graph.close()


async def test_a_node_with_a_bitmap_is_not_passed_through(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(bytes(K))
    graph = Graph()
    await graph.blockdev_add({"driver": "file", "node-name": "file", "filename": str(tmp_path / "plain")})
    node = graph.find("file")
    assert node.backing_descriptor() >= 0
    async with talking(QmpServer(graph, lambda: None)) as talk:
        await talk.execute(ADD, node="file", name="map")
    with pytest.raises(NotSupported, match="dirty bitmaps"):
        node.backing_descriptor()
    await graph.close()
