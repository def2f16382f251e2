"""Requests to blockdev-reopen, and what QEMU 10.0.2 answers to them; what tests of it need.

Files are relative to the current directory: ``a.raw`` and ``b.raw`` of 1 MiB and 2 MiB, and the qcow2 images
``p.qcow2``, ``o.qcow2`` (backed by ``p.qcow2``) and ``v2.qcow2`` (version 2), all of 1 MiB.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from images import create
from support import read, root_of, snapshot, write

from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.block.reopen import reopen
from fusebd.errors import FusebdError

Json = Any
MIB = 1 << 20


async def refusal(graph: Graph, *options: Json) -> str:
    """How reopening *options* fails; AssertionError if anything has changed then, or it does not."""
    before = snapshot(graph)
    with pytest.raises(FusebdError) as refused:
        await reopen(graph, options)
    assert snapshot(graph) == before
    return str(refused.value)


async def read_all(graph: Graph, name: str) -> bytes:
    """The content of the node *name*."""
    root = root_of(graph, name, Perm.CONSISTENT_READ)
    data = await read(root, 0, root.length)
    await graph.detach_root(root)
    return data


async def put(graph: Graph, name: str, offset: int, data: bytes) -> None:
    """Write *data* to the node *name*."""
    root = root_of(graph, name)
    await write(root, offset, data)
    await graph.detach_root(root)


def descriptors() -> int:
    """How many descriptors there are."""
    return len(os.listdir("/proc/self/fd"))


def locks_of(path: Path) -> set[int]:
    """The bytes of *path* on which anybody holds an open file description lock."""
    inode = path.stat().st_ino
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    held = [words for words in lines if words[1] == "OFDLCK" and words[5].rpartition(":")[2] == str(inode)]
    return {byte for words in held for byte in range(int(words[6]), int(words[7]) + 1)}


class Step(NamedTuple):
    """One blockdev-reopen of the nodes *options*, and the error it ends with; None: it succeeds."""

    options: list[Json]
    error: str | None = None


class Scenario(NamedTuple):
    """What is there first (nodes to add), and what is tried then, in this order."""

    name: str
    nodes: list[Json]
    steps: list[Step]


def make_images(directory: Path) -> None:
    (directory / "a.raw").write_bytes(bytes(MIB))
    (directory / "b.raw").write_bytes(bytes(2 * MIB))
    create(directory / "p.qcow2", MIB)
    create(directory / "o.qcow2", MIB, backing="p.qcow2")
    create(directory / "v2.qcow2", MIB, compat="0.10")


def node(driver: str, name: str | None = None, **options: Json) -> Json:
    """Options of a node; ``_`` in their names stands for ``-``."""
    named = {} if name is None else {"node-name": name}
    return {"driver": driver, **named, **{key.replace("_", "-"): value for key, value in options.items()}}


def file(name: str | None, filename: str, **options: Json) -> Json:
    return node("file", name, filename=filename, **options)


def null(name: str | None, size: int = 4096, **options: Json) -> Json:
    return node("null-co", name, size=size, **options)


def image_node(name: str, path: Path, **options: Json) -> Json:
    """The qcow2 node *name* over *path*, a file whose node is called after it."""
    return node("qcow2", name, **{"file": file(f"{name}-file", str(path)), **options})


def raw(below: Json = None, **options: Json) -> Json:
    """The raw node ``r`` over the file ``rf``, or over *below*."""
    return node("raw", "r", file=file("rf", "a.raw") if below is None else below, **options)


def qcow2(below: Json = None, **options: Json) -> Json:
    """The qcow2 node ``q`` over the file ``qf``, or over *below*."""
    return node("qcow2", "q", file=file("qf", "p.qcow2") if below is None else below, **options)


def overlay(**options: Json) -> Json:
    return node("qcow2", "o", file=file("of", "o.qcow2"), **options)


def throttle(group: str, below: str, **options: Json) -> Json:
    return node("throttle", "th", throttle_group=group, file=below, **options)


def blkdebug(**options: Json) -> Json:
    return node("blkdebug", "bd", image="n", **options)


def cycle(child: str, name: str, parent: str) -> str:
    return f"Making '{child}' a {name} child of '{parent}' would create a cycle"


def unchangeable(option: str) -> str:
    return f"Cannot change the option '{option}'"


def not_reset(option: str) -> str:
    return f"Option '{option}' cannot be reset to its default value"


def cannot_find(name: str) -> str:
    return f"Cannot find device='' nor node-name='{name}'"


def not_reopened(driver: str, name: str) -> str:
    return f"Block format '{driver}' used by node '{name}' does not support reopening files"


def conflict(name: str, user: str, other: str) -> str:
    return (
        f"Permission conflict on node '{name}': permissions 'write, resize' are both required by node '{user}' (uses "
        f"node '{name}' as 'file' child) and unshared by node '{other}' (uses node '{name}' as 'file' child)."
    )


READ_ONLY = "Block node is read-only"
UNMAP = "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
WRITE_ERROR = {"event": "none", "iotype": "write", "errno": 5}

SCENARIOS = [
    Scenario(
        "what a request needs",
        [file("f", "a.raw")],
        [
            Step([5], "Invalid parameter type for 'options[0]', expected: object"),
            Step([None], "Invalid parameter type for 'options[0]', expected: object"),
            Step([{}], "Parameter 'options[0].driver' is missing"),
            Step([{"node-name": "f"}], "Parameter 'options[0].driver' is missing"),
            Step([node("file", "f")], "Parameter 'options[0].filename' is missing"),
            Step([file("f", "a.raw"), 5], "Invalid parameter type for 'options[1]', expected: object"),
            Step([node("zork", "f")], "Parameter 'driver' does not accept value 'zork'"),
            Step(
                [{"driver": None, "node-name": "f"}], "Invalid parameter type for 'options[0].driver', expected: string"
            ),
            Step([file("f", "a.raw", bogus=1)], "Parameter 'options[0].bogus' is unexpected"),
            Step([file("f", "a.raw", detect_zeroes="bad")], "Parameter 'detect-zeroes' does not accept value 'bad'"),
            Step(
                [file("f", "a.raw", read_only="x")],
                "Invalid parameter type for 'options[0].read-only', expected: boolean",
            ),
            Step([file("f", "a.raw", cache={"x": 1})], "Parameter 'options[0].cache.x' is unexpected"),
            Step([node("raw", "f", file=None)], "Invalid parameter type for 'file', expected: BlockdevRef"),
            Step([node("raw", "f", file={})], "Parameter 'options[0].file.driver' is missing"),
            Step([node("raw", "f", file={"driver": "file"})], "Parameter 'options[0].file.filename' is missing"),
            Step([file(None, "a.raw")], "node-name not specified"),
            Step([file("", "a.raw")], "Failed to find node with node-name=''"),
            Step([file("nope", "a.raw")], "Failed to find node with node-name='nope'"),
            Step([file("f", "a.raw"), file("nope", "a.raw")], "Failed to find node with node-name='nope'"),
            Step([file("f", "a.raw")]),
            Step([file("f", "a.raw"), file("f", "a.raw")]),
        ],
    ),
    Scenario(
        "options of file",
        [file("f", "a.raw"), file("g", "b.raw", locking="on", aio="threads")],
        [
            Step([file("f", "b.raw")], unchangeable("filename")),
            Step([file("f", "./a.raw")], unchangeable("filename")),
            Step([file("f", "a.raw", locking="off")], unchangeable("locking")),
            Step([file("f", "a.raw", locking="auto")], unchangeable("locking")),
            Step([file("f", "a.raw", aio="threads")], unchangeable("aio")),
            Step([file("f", "a.raw", aio_max_batch=0)], unchangeable("aio-max-batch")),
            Step([node("host_device", "f", filename="a.raw")], unchangeable("driver")),
            Step([null("f")], not_reset("filename")),
            Step([file("f", "a.raw", drop_cache=False)]),
            Step([file("f", "a.raw")], not_reset("drop-cache")),
            Step([file("f", "a.raw", drop_cache=True)]),
            Step([file("g", "b.raw", locking="on")], not_reset("aio")),
            Step([file("g", "b.raw", aio="threads")], not_reset("locking")),
            Step([file("g", "b.raw")], not_reset("locking")),
            Step([file("g", "b.raw", locking="off", aio="threads")], unchangeable("locking")),
            Step([file("g", "b.raw", locking="on", aio="threads", read_only=True)]),
        ],
    ),
    Scenario(
        "options of every node",
        [raw()],
        [
            Step([raw(detect_zeroes="on")]),
            Step([raw(detect_zeroes="unmap")], UNMAP),
            Step([raw(detect_zeroes="unmap", discard="unmap")]),
            Step([raw(discard="ignore", detect_zeroes="unmap")], UNMAP),
            Step([raw(cache={"direct": True, "no-flush": True})]),
            Step([raw(auto_read_only=True)]),
            Step([raw(force_share=True)], unchangeable("force-share")),
            Step([raw(force_share=True, read_only=True)], unchangeable("force-share")),
            Step([raw(file("rf", "a.raw", detect_zeroes="unmap"))]),
            Step([raw(file("rf", "a.raw", detect_zeroes="unmap", discard="ignore"))], UNMAP),
            Step([raw("rf")]),
            Step([raw()]),
        ],
    ),
    Scenario(
        "names of inline children",
        [raw(file(None, "a.raw"))],
        [
            Step([raw(file("new", "a.raw"))], unchangeable("node-name")),
            Step([raw(file("#block123", "a.raw"))], unchangeable("node-name")),
            Step([raw(file(None, "b.raw"))], unchangeable("filename")),
            Step([raw(null(None))], not_reset("filename")),
            Step([raw(node("host_device", filename="a.raw"))], unchangeable("driver")),
            Step([raw("")], cannot_find("")),
            Step([raw(file(None, "a.raw"))]),
        ],
    ),
    Scenario(
        "read-only and inline children",
        [qcow2()],
        [
            Step([file("qf", "p.qcow2", read_only=True)], "Read-only block node 'qf' cannot support read-write users"),
            Step([qcow2(read_only=True)]),
            # by its name alone the child stays as it is, and says nothing about being read-only
            Step([qcow2("qf")], READ_ONLY),
            Step([qcow2("qf", read_only=False)]),
            Step([qcow2(read_only=True)]),
            Step([qcow2()]),
            Step(
                [qcow2(file("qf", "p.qcow2", read_only=True))],
                "Read-only block node 'qf' cannot support read-write users",
            ),
            Step([file("qf", "p.qcow2", read_only=True), qcow2(read_only=True)]),
            Step([file("qf", "p.qcow2")]),
            Step([qcow2("qf", read_only=True)]),
            Step([qcow2("qf")], READ_ONLY),
            Step([qcow2("qf"), file("qf", "p.qcow2")]),
        ],
    ),
    Scenario(
        "read-only and children by name",
        [file("f", "p.qcow2", read_only=True), node("qcow2", "q", file="f", read_only=True), raw("q")],
        [
            Step([node("qcow2", "q", file="f")], READ_ONLY),
            Step([file("f", "p.qcow2"), node("qcow2", "q", file="f")]),
            Step([file("f", "p.qcow2", read_only=True)], "Read-only block node 'f' cannot support read-write users"),
            Step([node("qcow2", "q", file="f", read_only=True), file("f", "p.qcow2", read_only=True)]),
            Step([node("qcow2", "q", file="f"), file("f", "p.qcow2")]),
            Step([raw("q", read_only=True)]),
            Step([raw("q")]),
        ],
    ),
    Scenario(
        "the window of raw",
        [raw()],
        [
            Step([raw(offset=512, size=1024)]),
            Step([raw(offset=-1)], "Value '-1' is out of range for parameter 'offset'"),
            Step([raw(size=-1)], "Value '-1' is out of range for parameter 'size'"),
            Step([raw(size=513)], "Specified size is not multiple of 512"),
            Step(
                [raw(offset=2 * MIB)],
                f"Offset ({2 * MIB}) cannot be greater than size of the containing file ({MIB})",
            ),
            Step(
                [raw(offset=512, size=MIB)],
                f"The sum of offset (512) and size ({MIB}) has to be smaller or equal to the "
                f" actual size of the containing file ({MIB})",
            ),
            Step([raw(size=0)]),
            Step([raw(offset=0)]),
            Step([raw()]),
        ],
    ),
    Scenario(
        "options of qcow2",
        [qcow2(), node("qcow2", "v", file=file("vf", "v2.qcow2"))],
        [
            Step([qcow2(lazy_refcounts=True)]),
            Step([qcow2(lazy_refcounts=False)]),
            Step([qcow2(pass_discard_request=True, pass_discard_snapshot=False, pass_discard_other=True)]),
            Step([qcow2(discard_no_unref=True)]),
            Step([qcow2(overlap_check="all")]),
            Step([qcow2(overlap_check={"template": "none", "main-header": True})]),
            Step([qcow2(overlap_check={"template": "x"})], "Parameter 'template' does not accept value 'x'"),
            Step([qcow2(cache_size=MIB)]),
            Step([qcow2(l2_cache_size=MIB, cache_size=MIB // 2)], "l2-cache-size may not exceed cache-size"),
            Step(
                [qcow2(l2_cache_entry_size=MIB // 8)],
                "L2 cache entry size must be a power of two between 512 and the cluster size (65536)",
            ),
            Step([qcow2(cache_clean_interval=5)]),
            Step([qcow2(cache_clean_interval=-5)], "Cache clean interval too big"),
            Step([qcow2(cache_size=-1)], "Value '-1' is out of range for parameter 'cache-size'"),
            Step([qcow2(refcount_cache_size=1 << 60)], "Refcount cache size too big"),
            Step([qcow2(data_file="qf")], unchangeable("data-file")),
            Step([qcow2(data_file=null(None))], unchangeable("data-file.driver")),
            Step([qcow2(l2_cache_entry_size=1024, l2_cache_size=4096, refcount_cache_size=MIB)]),
            Step([qcow2()]),
            Step(
                [node("qcow2", "v", file="vf", lazy_refcounts=True)],
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
            ),
            Step(
                [node("qcow2", "v", file="vf", discard_no_unref=True)],
                "discard-no-unref is only supported since qcow2 version 3",
            ),
            Step([node("qcow2", "v", file="vf", lazy_refcounts=False)]),
        ],
    ),
    Scenario(
        "a backing file must be repeated",
        [overlay()],
        [
            Step([overlay()], "backing is missing for 'o'"),
            # that comes before the driver
            Step([node("raw", "o", file="of")], "backing is missing for 'o'"),
            Step([overlay(backing="")], cannot_find("")),
            Step([overlay(backing="nope")], cannot_find("nope")),
            Step([overlay(backing="o")], cycle("o", "backing", "o")),
            Step([overlay(backing=node("qcow2", "new", file=file(None, "p.qcow2")))], unchangeable("node-name")),
            Step([overlay(backing=node("raw", file=file(None, "p.qcow2")))], unchangeable("driver")),
            Step([overlay(backing=node("qcow2", file=file("new", "p.qcow2")))], unchangeable("node-name")),
            Step([overlay(backing=node("qcow2", file=file(None, "p.qcow2")))]),
            Step([overlay(backing=None)]),
            Step([overlay()], "backing is missing for 'o'"),
            Step([overlay(backing=node("qcow2", file=file(None, "p.qcow2")))], unchangeable("backing.driver")),
            Step([overlay(backing=None)]),
        ],
    ),
    Scenario(
        "an inline backing file",
        [overlay(backing=node("qcow2", "b", file=file("bf", "p.qcow2")))],
        [
            Step([overlay(backing="b")]),
            Step([overlay(backing=node("qcow2", file=file("bf", "p.qcow2")))]),
            Step([overlay(backing=node("qcow2", file="bf"))]),
            Step([overlay(backing=node("qcow2", file="bf", read_only=False))]),
            Step([overlay(backing=node("qcow2", file=file("bf", "p.qcow2"), read_only=False))]),
            Step([overlay(backing=node("qcow2", file="bf"))]),
            Step([overlay(backing=node("raw", file="bf"))], unchangeable("driver")),
            # its file goes with it
            Step([overlay(backing="of")]),
            Step([overlay(backing="bf")], cannot_find("bf")),
            Step([overlay(backing="b")], cannot_find("b")),
            Step([overlay(backing=None)]),
        ],
    ),
    Scenario(
        "a backing node by name",
        [null("n", MIB), qcow2(backing="n")],
        [
            Step([qcow2()], "backing is missing for 'q'"),
            Step([qcow2(backing=null(None))], unchangeable("backing.driver")),
            Step([qcow2(backing=null("n", MIB))], unchangeable("backing.driver")),
            Step([qcow2(backing="n")]),
            Step([qcow2(backing=None)]),
            Step([qcow2()]),
            Step([qcow2(backing="n")]),
        ],
    ),
    Scenario(
        "drivers without a backing child",
        [null("n"), null("m"), raw("n")],
        [
            Step([raw("n", backing="n")], "Parameter 'options[0].backing' is unexpected"),
            Step(
                [node("qcow2", "r", file="n", backing="n")], "Driver 'raw' of node 'r' does not support backing files"
            ),
            Step([node("qcow2", "r", file="n", backing=None)], unchangeable("driver")),
            Step([node("raw", "n", file="m", size=4096)], "Cannot set file child to format node without file child"),
        ],
    ),
    Scenario(
        "another file",
        [null("n"), null("m", 8192), null("o", 1024), raw("n"), node("raw", "rr", file="r")],
        [
            Step([raw("m")]),
            Step([raw("m", offset=6144)]),
            Step([raw("o", offset=6144)]),
            Step([raw("o")]),
            Step([raw("nope")], cannot_find("nope")),
            Step([raw("r")], cycle("r", "file", "r")),
            Step([raw("rr")], cycle("rr", "file", "r")),
            Step([raw(null(None))], unchangeable("file.driver")),
            Step([raw(null("o", 1024))], unchangeable("file.driver")),
            Step([raw("n")]),
        ],
    ),
    Scenario(
        "an inline file that is left",
        [raw(null("in")), null("n")],
        [
            Step([raw("n")]),
            Step([raw("in")], cannot_find("in")),
            Step([raw(null("in"))], unchangeable("file.driver")),
        ],
    ),
    Scenario(
        "several nodes, one after the other",
        [null("n"), null("m", 8192), raw("n"), node("raw", "s", file="m")],
        [
            Step([raw("m"), node("raw", "s", file="n")]),
            Step([raw("s"), node("raw", "s", file="r")], cycle("r", "file", "s")),
            Step([raw("s"), node("raw", "s", file="n")]),
            Step([node("raw", "s", file="r"), raw("n")], cycle("r", "file", "s")),
            Step([raw("n"), node("raw", "s", file="r")]),
            Step([raw("m"), node("raw", "s", file="nope")], cannot_find("nope")),
            Step([raw("nope"), node("raw", "s", file="n", size=77)], cannot_find("nope")),
            Step([raw("n", size=77), node("raw", "s", file="nope")], "Specified size is not multiple of 512"),
            Step([raw("m"), null("n", 512)], unchangeable("size")),
        ],
    ),
    Scenario(
        "two images exchange their files",
        [qcow2(), node("qcow2", "s", file=file("sf", "v2.qcow2"))],
        [
            Step([qcow2("sf")], conflict("sf", "s", "q")),
            Step([node("qcow2", "s", file="qf")], conflict("qf", "q", "s")),
            Step([qcow2("sf"), node("qcow2", "s", file="qf")]),
            Step([qcow2("qf"), node("qcow2", "s", file="sf")]),
        ],
    ),
    Scenario(
        "a filter that comes and goes",
        [qcow2(), node("blkdebug", "bd", image="qf")],
        [
            Step([qcow2("bd")]),
            Step([qcow2()], unchangeable("file.driver")),
            Step([qcow2("qf")]),
            # it was inline once, but not any more
            Step([qcow2()], unchangeable("file.driver")),
            Step([qcow2("bd", read_only=True)]),
        ],
    ),
    Scenario(
        "throttle",
        [null("n"), null("m", 8192), throttle("g1", "n")],
        [
            Step([throttle("g2", "m")]),
            Step([throttle("g3", "nope")], "Throttle group 'g3' does not exist"),
            Step([throttle("g2", "nope")], cannot_find("nope")),
            Step([throttle("g2", "th")], cycle("th", "file", "th")),
            Step([throttle("g1", null(None))], unchangeable("file.driver")),
            Step([node("raw", "th", file="n")], not_reset("throttle-group")),
            Step([throttle("g1", "n", read_only=True, detect_zeroes="on")]),
        ],
    ),
    Scenario(
        "blkdebug",
        [null("n"), null("m"), blkdebug(inject_error=[WRITE_ERROR], take_child_perms=["write"])],
        [
            Step([blkdebug()], not_reset("take-child-perms.0")),
            Step([blkdebug(inject_error=[WRITE_ERROR], take_child_perms=["write"])]),
            Step(
                [blkdebug(inject_error=[WRITE_ERROR], take_child_perms=["resize"])], unchangeable("take-child-perms.0")
            ),
            Step(
                [blkdebug(inject_error=[{"event": "none"}], take_child_perms=["write"])],
                not_reset("inject-error.0.iotype"),
            ),
            Step(
                [blkdebug(inject_error=[{**WRITE_ERROR, "once": True, "state": 3}], take_child_perms=["write"])],
                unchangeable("inject-error.0.state"),
            ),
            Step(
                [node("blkdebug", "bd", image="m", inject_error=[WRITE_ERROR], take_child_perms=["write"])],
                unchangeable("image"),
            ),
            Step([blkdebug(inject_error=[WRITE_ERROR], take_child_perms=["write"], align=512)], unchangeable("align")),
            Step([blkdebug(inject_error=[WRITE_ERROR], take_child_perms=["write"], detect_zeroes="on")]),
        ],
    ),
    Scenario(
        "null",
        [null("n"), node("null-aio", "a")],
        [
            Step([null("n", 8192)], unchangeable("size")),
            Step([node("null-co", "n")], not_reset("size")),
            Step([null("n", latency_ns=0)], unchangeable("latency-ns")),
            Step([null("n", read_zeroes=False)], unchangeable("read-zeroes")),
            Step([node("null-aio", "n", size=4096)], unchangeable("driver")),
            Step([node("null-aio", "a", size=1 << 30)], unchangeable("size")),
            Step([node("null-aio", "a", detect_zeroes="on", discard="unmap", read_only=True)]),
        ],
    ),
    Scenario(
        "drivers that are not reopened",
        [
            null("n"),
            null("m"),
            null("l"),
            node("blkverify", "bv", test="n", raw="m"),
            node("quorum", "qu", children=["n", "m"], vote_threshold=1),
            node("blklogwrites", "lw", file="l", log=null(None)),
            raw(node("blkverify", "in", test=null(None), raw=null(None))),
        ],
        [
            Step([node("blkverify", "bv", test="n", raw="m")], not_reopened("blkverify", "bv")),
            Step([node("quorum", "qu", children=["n", "m"], vote_threshold=1)], not_reopened("quorum", "qu")),
            Step([node("blklogwrites", "lw", file="l", log=null(None))], not_reopened("blklogwrites", "lw")),
            Step([raw("in")], not_reopened("blkverify", "in")),
            Step([raw("n")]),
            Step([node("raw", "n", size=4096, file="bv")], cycle("bv", "file", "n")),
        ],
    ),
]
