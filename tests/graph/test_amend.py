"""x-blockdev-amend and change-backing-file: what qcow2 images are, changed while they are in use."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import trio
from images import check_image, content, create, info, io
from mounting import run
from qmptalk import Talk, disk, monitor, talking
from support import READ_WRITE, read, root_of, write

from fusebd.block.graph import Graph
from fusebd.block.jobs import Jobs
from fusebd.qmp.server import QmpServer

Json = Any
K = 1024


async def amend(path: Path, **options: Json) -> str | None:
    """The job's error; the image is written to before and after."""
    graph = Graph()
    try:
        await graph.blockdev_add(disk(path, discard="unmap"))
        async with trio.open_nursery() as nursery:
            server = QmpServer(graph, lambda: None, services={Jobs: Jobs(nursery, graph.emit)})
            async with talking(server) as talk:
                root = root_of(graph, "disk", READ_WRITE)
                await write(root, 100 * K, b"before" * 1000)
                error = await amended(talk, **options)
                assert await read(root, 100 * K, 6000) == b"before" * 1000
                await write(root, 200 * K, b"behind" * 1000)
                await graph.detach_root(root)
            nursery.cancel_scope.cancel()
    finally:
        await graph.close()
    check_image(path)
    assert content(path)[200 * K : 200 * K + 6000] == b"behind" * 1000
    return error


async def amended(talk: Talk, **options: Json) -> str | None:
    given = {name.replace("_", "-"): value for name, value in options.items()}
    await talk.execute("x-blockdev-amend", job_id="job", node_name="disk", options={"driver": "qcow2", **given})
    while (job := (await talk.execute("query-jobs"))[0])["status"] != "concluded":
        await trio.sleep(0.01)
    assert job["type"] == "amend"
    await talk.execute("job-dismiss", id="job")
    error: str | None = job.get("error")
    return error


@pytest.mark.parametrize("cluster_size", [512, 65536])
async def test_an_old_image_becomes_a_new_one(tmp_path: Path, cluster_size: int) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(random.Random(0).randbytes(300 * K))
    path = create(
        tmp_path / "image", "300k", backing=backing, backing_format="raw", compat="0.10", cluster_size=cluster_size
    )
    theirs = create(
        tmp_path / "theirs", "300k", backing=backing, backing_format="raw", compat="0.10", cluster_size=cluster_size
    )
    assert await amend(path, version="v3", lazy_refcounts=True) is None
    found = info(path)
    assert found["format-specific"]["data"]["compat"] == "1.1"
    assert found["format-specific"]["data"]["lazy-refcounts"] is True
    assert (found["backing-filename"], found["backing-filename-format"]) == (str(backing), "raw")
    assert content(path)[: 100 * K] == backing.read_bytes()[: 100 * K]
    run("qemu-img", "amend", "-f", "qcow2", "-o", "compat=1.1,lazy_refcounts=on", theirs)
    ours, expected = path.read_bytes()[:cluster_size], theirs.read_bytes()[:cluster_size]
    assert ours[:48] + ours[60:] == expected[:48] + expected[60:]  # but for where the refcount table is
    io(path, "write -P 3 0 64k", "write -z 64k 64k")
    check_image(path)


async def test_an_image_names_another_backing_file(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1" * 300 * K)
    other.write_bytes(b"2" * 300 * K)
    path = create(tmp_path / "image", "300k", backing=one, backing_format="raw")
    assert await amend(path, backing_file=str(other), backing_fmt="raw") is None
    assert (info(path)["backing-filename"], info(path)["backing-filename-format"]) == (str(other), "raw")
    assert content(path)[: 64 * K] == b"2" * 64 * K
    assert await amend(path, backing_file="") is None
    assert "backing-filename" not in info(path)
    assert content(path)[: 64 * K] == bytes(64 * K)


async def test_what_cannot_be_amended_is_refused(tmp_path: Path) -> None:
    path = create(tmp_path / "old", "300k", compat="0.10")
    before = path.read_bytes()[:65536]
    assert await amend(path, lazy_refcounts=True) == (
        "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)"
    )
    assert await amend(path, backing_fmt="raw") == "Backing format cannot be used without backing file"
    name = "n" * 1024
    assert await amend(path, backing_file=name) == f"Could not change backing file to '{name}': Invalid argument"
    assert path.read_bytes()[:40] == before[:40]
    path = create(tmp_path / "small", "300k", cluster_size=512)
    assert await amend(path, backing_file="n" * 500) == "No space left on device"
    assert await amend(path) is None
    async with monitor(path) as (_, talk):
        for options, message in (
            ({"driver": "raw"}, "x-blockdev-amend doesn't support changing the block driver"),
            ({}, "Parameter 'options.driver' is missing"),
            ({"driver": "qcow2", "size": 5}, "Parameter 'options.size' is unexpected"),
        ):
            assert await talk.fail("x-blockdev-amend", job_id="j", node_name="disk", options=options) == message
        assert await talk.fail("x-blockdev-amend", job_id="j", node_name="x", options={"driver": "qcow2"}) == (
            "Cannot find device='x' nor node-name='x'"
        )


async def test_change_backing_file(tmp_path: Path) -> None:
    base = create(tmp_path / "base", "300k")
    io(base, "write -P 5 0 300k")
    path = create(tmp_path / "image", "300k", backing=base)
    alone = create(tmp_path / "alone", "300k")
    async with monitor(path) as (graph, talk):
        name = graph.nodes["disk"].children["backing"].node.name
        arguments = {"device": "disk", "image-node-name": "disk", "backing-file": "elsewhere"}
        await talk.execute("change-backing-file", **arguments)
        assert info(path)["backing-filename"] == "elsewhere"
        await talk.execute("change-backing-file", **{**arguments, "backing-file": str(base)})
        assert await talk.fail("change-backing-file", **{**arguments, "image-node-name": name}) == (
            "not allowing backing file change on an image without a backing file"
        )
        await graph.blockdev_add({**disk(alone), "node-name": "alone"})
        assert await talk.fail("change-backing-file", **{**arguments, "device": "alone"}) == (
            "'alone' and image file are not in the same chain"
        )
        long = "n" * 2000
        assert await talk.fail("change-backing-file", **{**arguments, "backing-file": long}) == (
            f"Could not change backing file to '{long}': Invalid argument"
        )
    assert content(path) == b"\5" * 300 * K
