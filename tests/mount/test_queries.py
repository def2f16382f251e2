"""What a mount's monitor answers to queries and to mistakes, beside qemu-storage-daemon with the same nodes.

The answers are those of 10.0.2; where the program that is installed is older and says less or something else, what
10.0.2 says stands here as data.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, Qmp, run, sweep
from qemuprograms import storage_daemon

Json = Any
MIB = 1 << 20


class Both:
    """The monitors of a qemu-storage-daemon and of a mount, and the directory of the images for both."""

    def __init__(self, qemu: Qmp, mount: Mount, images: Path) -> None:
        self.qemu, self.mount, self.images = qemu, mount, images
        version = qemu("query-version")["qemu"]
        self.is_old = version["major"] < 10

    def place(self, value: Json) -> Json:
        """*value* with the directory of the images in place of ``DIR``."""
        return json.loads(json.dumps(value).replace("DIR", str(self.images)))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs root and /dev/fuse")
    images = tmp_path_factory.mktemp("images")
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    for name in ("a.raw", "b.raw"):
        (images / name).write_bytes(b"data" * (MIB // 8) + bytes(MIB // 2))
    (images / "odd.raw").write_bytes(bytes(1000))
    run(*create, images / "a.qcow2", "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write 0 300k", images / "a.qcow2")
    (images / "b.qcow2").write_bytes((images / "a.qcow2").read_bytes())
    run(*create, "-o", "compat=0.10,cluster_size=4k", images / "old.qcow2", "1M")
    run(*create, "-o", "lazy_refcounts=on,refcount_bits=64", images / "lazy.qcow2", "1M")
    run(*create, "-o", "compression_type=zstd", images / "zstd.qcow2", "1M")
    run(*create, "-b", "a.qcow2", "-F", "qcow2", images / "overlay.qcow2")
    run(*create, "-b", images / "overlay.qcow2", images / "top.qcow2", "-F", "qcow2")
    (images / "rules").write_text('[inject-error]\nevent = "l1_update"\n')
    (images / "no-rules").touch()
    with pytest.MonkeyPatch.context() as patch, storage_daemon() as qemu:
        directory = tmp_path_factory.mktemp("mount")
        patch.setenv("FUSEBD_RUNTIME_DIR", str(directory / "run"))
        mount = Mount(directory / "mnt", "devfuse", [])
        try:
            yield Both(qemu, mount, images)
            mount.umount()
        finally:
            sweep(directory)


def file(name: str, **more: Json) -> Json:
    return {"driver": "file", "filename": f"DIR/{name}", **more}


def qcow2(name: str, **more: Json) -> Json:
    return {"driver": "qcow2", "file": file(name), **more}


def raw(below: Json, **more: Json) -> Json:
    return {"driver": "raw", "file": below, **more}


def blkdebug(image: Json, **more: Json) -> Json:
    return {"driver": "blkdebug", "image": image, **more}


def blkverify(raw: Json, test: Json) -> Json:
    return {"driver": "blkverify", "raw": raw, "test": test}


NULL = {"driver": "null-co"}
RULE = {"inject-error": [{"event": "l1_update"}]}
ALL_RULES = {
    "inject-error": [
        {
            "event": "l1_update",
            "errno": 5,
            "sector": 3,
            "once": True,
            "immediately": False,
            "state": 2,
            "iotype": "read",
        },
        {"event": "cluster_alloc"},
    ],
    "set-state": [{"event": "l2_load", "new_state": 3}, {"event": "cow_read", "new_state": 3, "state": 1}],
}
LIMITS = {
    "align": 512,
    "max-transfer": 4096,
    "opt-write-zero": 512,
    "max-write-zero": 1024,
    "opt-discard": 512,
    "max-discard": 512,
}

#: nodes that are added one after the other; names are given to those that have none: n0, n1 ...
STACKS: dict[str, list[Json]] = {
    "null": [NULL, {"driver": "null-aio", "size": MIB, "read-zeroes": True}],
    "null with defaults spelt out": [{"driver": "null-co", "size": 1 << 30, "read-zeroes": False, "latency-ns": 0}],
    "file": [file("a.raw")],
    "file of odd length": [file("odd.raw")],
    "file with options": [
        file(
            "a.raw",
            **{
                "read-only": True,
                "cache": {"direct": True, "no-flush": True},
                "discard": "unmap",
                "detect-zeroes": "unmap",
                "locking": "on",
                "aio": "threads",
            },
        )
    ],
    "raw": [raw(file("a.raw"))],
    "raw without locks": [raw(file("a.raw"), **{"read-only": True, "force-share": True})],
    "window": [raw(file("a.raw"), offset=512, size=1024), raw({"driver": "null-co", "size": 4096}, offset=0)],
    "raw over raw": [raw(raw(file("a.raw")))],
    "raw over qcow2": [raw(qcow2("a.qcow2"))],
    "references": [
        file("a.raw", **{"node-name": "base"}),
        raw("base", **{"node-name": "middle"}),
        blkdebug("middle", **{"node-name": "debug"}),
        blkverify(file("b.raw"), "debug"),
    ],
    "inline names": [raw({**NULL, "node-name": "inner"}), raw("inner")],
    "qcow2": [qcow2("a.qcow2")],
    "qcow2 version 2": [qcow2("old.qcow2")],
    "qcow2 with features": [qcow2("lazy.qcow2")],
    "qcow2 compressed with zstd": [qcow2("zstd.qcow2")],
    "overlay": [qcow2("overlay.qcow2")],
    "two overlays": [qcow2("top.qcow2")],
    "overlay without its backing file": [qcow2("overlay.qcow2", backing=None)],
    "overlay with its backing file spelt out": [qcow2("overlay.qcow2", backing=qcow2("a.qcow2"))],
    "overlay with another backing file": [qcow2("overlay.qcow2", backing=raw(file("a.raw")))],
    "overlay with a backing node": [
        qcow2("a.qcow2", **{"node-name": "base", "read-only": True}),
        qcow2("overlay.qcow2", backing="base"),
    ],
    "blkdebug": [blkdebug(file("a.raw"))],
    "blkdebug with a file of no rules": [blkdebug(file("a.raw"), config="DIR/no-rules")],
    "blkdebug with a file of rules": [qcow2("a.qcow2", file=blkdebug(file("a.qcow2"), config="DIR/rules"))],
    "blkdebug with a rule": [blkdebug(file("a.raw"), **RULE)],
    "blkdebug with rules": [blkdebug(file("a.raw"), **ALL_RULES)],
    "blkdebug with limits": [blkdebug(file("a.raw"), **LIMITS)],
    "blkdebug with a limit that is none": [blkdebug(file("a.raw"), align=0)],
    "blkdebug with permissions": [
        blkdebug(file("a.raw"), **{"take-child-perms": ["write"], "unshare-child-perms": ["resize"]})
    ],
    "blkdebug over raw": [blkdebug(raw(file("a.raw"), size=512)), blkdebug(raw(file("b.raw")))],
    "blkdebug over qcow2": [blkdebug(qcow2("a.qcow2"))],
    "raw over blkdebug": [raw(blkdebug(file("a.raw"), **ALL_RULES))],
    "qcow2 over blkdebug": [qcow2("a.qcow2", file=blkdebug(file("a.qcow2")))],
    "qcow2 over blkdebug with rules": [qcow2("a.qcow2", file=blkdebug(file("a.qcow2"), **ALL_RULES))],
    "overlay over blkdebug": [qcow2("", file=blkdebug(file("overlay.qcow2"), **RULE))],
    "blkverify": [blkverify(file("a.raw"), file("b.raw"))],
    "blkverify of qcow2": [blkverify(file("a.raw"), qcow2("a.qcow2"))],
    "blkverify of qcow2 over blkdebug": [blkverify(file("a.raw"), qcow2("", file=blkdebug(file("a.qcow2"))))],
    "blkverify over rules": [blkverify(file("a.raw"), qcow2("", file=blkdebug(file("a.qcow2"), **RULE)))],
    "raw over blkverify": [raw(blkverify(file("a.raw"), file("b.raw")))],
    "qcow2 over blkverify": [qcow2("", file=blkverify(file("a.qcow2"), file("b.qcow2")))],
}


def without_numbers(answer: Json) -> Json:
    """*answer* with the numbers of anonymous nodes replaced in the order in which they appear."""
    seen: dict[str, str] = {}
    text = json.dumps(answer, sort_keys=True)
    return json.loads(re.sub(r"#block\d+", lambda found: seen.setdefault(found[0], f"#anonymous{len(seen)}"), text))


def as_old(answer: Json) -> Json:
    """*answer* without what QEMU 7.2 does not say: ``active``, and a file's ``format-specific``."""
    if isinstance(answer, list):
        return [as_old(item) for item in answer]
    if not isinstance(answer, dict):
        return answer
    kept = {key: as_old(value) for key, value in answer.items() if key != "active"}
    if kept.get("format-specific", {}).get("type") == "file":
        del kept["format-specific"]
    return kept


def shape(answer: Json) -> Json:
    """The members of query-blockstats *answer*, with those that are counted by their names alone."""
    if isinstance(answer, list):
        return [shape(item) for item in answer]
    if not isinstance(answer, dict):
        return answer
    new = {name for name in answer.get("stats", {}) if "zone_append" in name}
    return {k: sorted(set(v) - new) if k == "stats" else shape(v) for k, v in answer.items()}


def graph_of(answer: Json) -> Json:
    """x-debug-query-block-graph without the numbers: nodes and edges by name."""
    names = {node["id"]: f"{node['type']} {node['name']}" for node in answer["nodes"]}
    edges = [
        [names[edge["parent"]], edge["name"], names[edge["child"]], sorted(edge["perm"]), sorted(edge["shared-perm"])]
        for edge in answer["edges"]
    ]
    return {"nodes": sorted(names.values()), "edges": sorted(edges)}


def answers(monitor: Qmp, nodes: list[Json]) -> dict[str, Json]:
    """What *monitor* says while it has *nodes*, which are gone again afterwards."""
    for node in nodes:
        monitor("blockdev-add", node)
    found = {
        "full": without_numbers(monitor("query-named-block-nodes")),
        "flat": without_numbers(monitor("query-named-block-nodes", {"flat": True})),
        "graph": graph_of(without_numbers(monitor("x-debug-query-block-graph"))),
        "stats": shape(without_numbers(monitor("query-blockstats", {"query-nodes": True}))),
    }
    for node in reversed(nodes):
        monitor("blockdev-del", {"node-name": node["node-name"]})
    assert monitor("query-named-block-nodes") == []
    return found


@pytest.mark.parametrize("name", STACKS)
def test_nodes_are_described_as_by_qemu(both: Both, name: str) -> None:
    nodes = both.place([{"node-name": f"n{number}", **node} for number, node in enumerate(STACKS[name])])
    expected, found = answers(both.qemu, nodes), answers(both.mount.qmp, nodes)
    if both.is_old:
        found = {key: as_old(value) for key, value in found.items()}
    for key, value in expected.items():
        assert found[key] == value, key


# --- what differs on purpose, or only in an older QEMU ---------------------------------------------


def test_what_is_newer_than_7_2_is_said(both: Both) -> None:
    # as 10.0.2 does
    node = both.place({"node-name": "n", **file("a.raw")})
    both.mount.qmp("blockdev-add", node)
    (found,) = both.mount.qmp("query-named-block-nodes")
    both.mount.qmp("blockdev-del", {"node-name": "n"})
    assert found["active"] is True
    assert found["image"]["format-specific"] == {"type": "file", "data": {}}


def test_query_block_lists_the_nodes_of_blockdev_add(both: Both) -> None:
    # qemu-storage-daemon has no devices, and answers with nothing
    monitor = both.mount.qmp
    monitor("blockdev-add", {"node-name": "n", **raw({**NULL, "node-name": "inner"})})
    (found,) = monitor("query-block")
    nodes = {node["node-name"]: node for node in monitor("query-named-block-nodes")}
    monitor("blockdev-del", {"node-name": "n"})
    assert found == {"device": "", "type": "unknown", "removable": False, "locked": False, "inserted": nodes["n"]}
    assert both.qemu("query-block") == []


def test_query_block_has_qemus_members(both: Both) -> None:
    # qemu-system lists devices; the members that it gives one are all here
    requests = "\n".join(json.dumps({"execute": name}) for name in ("qmp_capabilities", "query-block", "quit"))
    program = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"]
    done = subprocess.run(
        [*program, "-drive", "if=none,id=d,driver=null-co"], input=requests, capture_output=True, text=True, check=True
    )
    (theirs,) = json.loads(done.stdout.splitlines()[2])["return"]
    both.mount.qmp("blockdev-add", {"node-name": "n", **NULL})
    (ours,) = both.mount.qmp("query-block")
    both.mount.qmp("blockdev-del", {"node-name": "n"})
    assert set(theirs) - set(ours) <= {"io-status", "qdev", "tray_open"}
    assert set(theirs["inserted"]) - set(ours["inserted"]) == set()


def test_query_blockstats_counts_requests_of_nodes(both: Both, tmp_path: Path) -> None:
    # qemu-storage-daemon counts nothing, and without query-nodes lists nothing
    monitor = both.mount.qmp
    monitor("blockdev-add", {"node-name": "n", **raw({**NULL, "node-name": "inner", "read-zeroes": True})})
    path = both.mount / "n"
    run("dd", f"of={path}", "if=/dev/zero", "bs=4k", "count=3", "conv=notrunc,fsync")
    run("dd", f"if={path}", "of=/dev/null", "bs=8k", "count=2")
    (found,) = monitor("query-blockstats")
    by_name = {node["node-name"]: node["stats"] for node in monitor("query-blockstats", {"query-nodes": True})}
    monitor("blockdev-del", {"node-name": "n"})
    assert (found["device"], found["node-name"], found["parent"]["node-name"]) == ("", "n", "inner")
    for stats in (found["stats"], found["parent"]["stats"], by_name["n"], by_name["inner"]):
        assert (stats["rd_operations"], stats["rd_bytes"]) == (2, 16384)
        assert (stats["wr_operations"], stats["wr_bytes"], stats["wr_highest_offset"]) == (3, 12288, 12288)
        assert stats["rd_total_time_ns"] > 0
        assert stats["flush_operations"] >= 1
    assert both.qemu("query-blockstats") == []


def test_the_graph_shows_who_uses_a_node(both: Both) -> None:
    monitor = both.mount.qmp
    monitor("blockdev-add", {"node-name": "n", **NULL})
    with open(both.mount / "n", "rb"):
        used = graph_of(monitor("x-debug-query-block-graph"))
    monitor("blockdev-del", {"node-name": "n"})
    assert used == {
        "nodes": ["block-backend an open file", "block-driver n"],
        "edges": [
            [
                "block-backend an open file",
                "root",
                "block-driver n",
                ["consistent-read"],
                ["consistent-read", "resize", "write", "write-unchanged"],
            ]
        ],
    }


# --- mistakes ------------------------------------------------------------------------------------

#: what there is while the mistakes are made
STANDING: list[Json] = [
    {"node-name": "null", "driver": "null-co", "size": MIB},
    {"node-name": "upper", **raw({"driver": "null-co", "node-name": "inner", "size": MIB})},
    {"node-name": "user", **raw("null")},
    {"node-name": "protected", "driver": "null-co", "read-only": True},
    # both programs have it open at the same time
    {"node-name": "image", **file("a.qcow2", locking="off")},
    {"node-name": "format", "driver": "qcow2", "file": "image"},
    {"node-name": "odd", **file("odd.raw", locking="off")},
    {"node-name": "selfish", **blkdebug("upper", **{"unshare-child-perms": ["write", "resize"]})},
]


def add(**arguments: Json) -> tuple[str, Json]:
    return "blockdev-add", {name.replace("_", "-"): value for name, value in arguments.items()}


def delete(**arguments: Json) -> tuple[str, Json]:
    return "blockdev-del", {name.replace("_", "-"): value for name, value in arguments.items()}


def resize(**arguments: Json) -> tuple[str, Json]:
    return "block_resize", {name.replace("_", "-"): value for name, value in arguments.items()}


def conflict(node: str, perms: str, takes: str, edge: str, keeps: str, other: str) -> str:
    return (
        f"Permission conflict on node '{node}': permissions '{perms}' are both required by {takes} (uses node '{node}' "
        f"as '{edge}' child) and unshared by {keeps} (uses node '{node}' as '{other}' child)."
    )


def debug(**more: Json) -> tuple[str, Json]:
    return add(node_name="x", **blkdebug(NULL, **{name.replace("_", "-"): value for name, value in more.items()}))


#: 10.0.2 says this where 7.2 says something else
NEW = {
    "Value '-1' is out of range for parameter 'offset'",
    "Value '-1' is out of range for parameter 'align'",
    "Parameter 'device' is missing",
}

MISTAKES: list[tuple[tuple[str, Json], str]] = [
    # options that every node takes
    (add(), "Parameter 'driver' is missing"),
    (add(driver="nope", node_name="x"), "Parameter 'driver' does not accept value 'nope'"),
    (add(driver=5, node_name="x"), "Invalid parameter type for 'driver', expected: string"),
    (add(**NULL), "'node-name' must be specified for the root node"),
    (add(**NULL, node_name="1x"), "Invalid node-name: '1x'"),
    (add(**NULL, node_name="#block1"), "Invalid node-name: '#block1'"),
    (add(**NULL, node_name=""), "Invalid node-name: ''"),
    (add(**NULL, node_name="x" * 32), "Node name too long"),
    (add(**NULL, node_name="null"), "Duplicate nodes with node-name='null'"),
    (add(**NULL, node_name="inner"), "Duplicate nodes with node-name='inner'"),
    (add(**NULL, node_name=5), "Invalid parameter type for 'node-name', expected: string"),
    (add(**NULL, node_name="x", bogus=1), "Parameter 'bogus' is unexpected"),
    (add(driver="raw", node_name="x", bogus=1), "Parameter 'file' is missing"),
    (add(**NULL, node_name="x", read_only="yes"), "Invalid parameter type for 'read-only', expected: boolean"),
    (add(**NULL, node_name="x", discard="yes"), "Parameter 'discard' does not accept value 'yes'"),
    (add(**NULL, node_name="x", cache=1), "Invalid parameter type for 'cache', expected: object"),
    (add(**NULL, node_name="x", cache={"direct": 1}), "Invalid parameter type for 'cache.direct', expected: boolean"),
    (add(**NULL, node_name="x", cache={"writeback": True}), "Parameter 'cache.writeback' is unexpected"),
    (add(**NULL, node_name="x", force_share=True), "force-share=on can only be used with read-only images"),
    (
        add(**NULL, node_name="x", detect_zeroes="unmap"),
        "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
    ),
    # children
    (add(node_name="x", **raw(None)), "Invalid parameter type for 'file', expected: BlockdevRef"),
    (add(node_name="x", **raw("nope")), "Cannot find device='nope' nor node-name='nope'"),
    (add(node_name="x", **raw("x")), "Cannot find device='x' nor node-name='x'"),
    (add(node_name="x", **raw({})), "Parameter 'file.driver' is missing"),
    (add(node_name="x", **raw({"driver": "file"})), "Parameter 'file.filename' is missing"),
    (add(node_name="x", **raw({**NULL, "bogus": 1})), "Parameter 'file.bogus' is unexpected"),
    (add(node_name="x", **raw({**NULL, "node-name": "null"})), "Duplicate nodes with node-name='null'"),
    (add(node_name="x", **blkdebug("x")), "Making 'x' a image child of 'x' would create a cycle"),
    (add(node_name="x", **blkverify("null", "x")), "Making 'x' a test child of 'x' would create a cycle"),
    (
        add(node_name="x", **qcow2("overlay.qcow2", backing=3)),
        "Invalid parameter type for 'backing', expected: BlockdevRefOrNull",
    ),
    (
        add(node_name="x", **qcow2("overlay.qcow2", backing="nope")),
        "Could not open backing file: Cannot find device='nope' nor node-name='nope'",
    ),
    (
        add(node_name="x", **qcow2("overlay.qcow2", backing="x")),
        "Making 'x' a backing child of 'x' would create a cycle",
    ),
    # drivers
    (add(node_name="x", **file("nosuch")), "Could not open 'DIR/nosuch': No such file or directory"),
    (add(node_name="x", driver="file", filename="DIR"), "Could not open 'DIR': Is a directory"),
    (add(node_name="x", **file("a.raw", locking="maybe")), "Parameter 'locking' does not accept value 'maybe'"),
    (
        add(node_name="x", **file("a.raw", aio="native")),
        "aio=native was specified, but it requires cache.direct=on, which was not specified.",
    ),
    (
        add(node_name="x", driver="host_device", filename="DIR/a.raw"),
        "'host_device' driver requires 'DIR/a.raw' to be either a character or block device",
    ),
    (add(node_name="x", **raw(NULL, offset=-1)), "Value '-1' is out of range for parameter 'offset'"),
    (add(node_name="x", **raw(NULL, size=1000)), "Specified size is not multiple of 512"),
    (
        add(node_name="x", **raw("null", offset=2 * MIB)),
        "Offset (2097152) cannot be greater than size of the containing file (1048576)",
    ),
    (add(node_name="x", driver="null-co", latency_ns=-1), "latency-ns is invalid"),
    (
        add(node_name="x", driver="null-co", size=2**63 - 1),
        "Could not refresh total sector count: File too large",
    ),
    (add(node_name="x", **qcow2("a.raw")), "Image is not in qcow2 format"),
    (
        add(node_name="x", driver="qcow2", file=blkdebug(file("b.qcow2"), **{"inject-error": [{"event": "none"}]})),
        "Could not read qcow2 header: Input/output error",
    ),
    (debug(align=3), "Cannot meet constraints with align 3"),
    (debug(align=-1), "Value '-1' is out of range for parameter 'align'"),
    (debug(max_discard=2**31), "Parameter 'max-discard' expects int32_t"),
    (debug(config="DIR/nosuch"), "Could not read blkdebug config file: No such file or directory"),
    (debug(config="DIR"), "Cannot read config file: Is a directory"),
    (debug(inject_error={}), "Invalid parameter type for 'inject-error', expected: array"),
    (debug(inject_error=[{}]), "Parameter 'inject-error[0].event' is missing"),
    (debug(inject_error=[{"event": "nope"}]), "Parameter 'event' does not accept value 'nope'"),
    (
        debug(inject_error=[{"event": "none", "errno": "EIO"}]),
        "Invalid parameter type for 'inject-error[0].errno', expected: integer",
    ),
    (debug(set_state=[{"event": "none"}]), "Parameter 'set-state[0].new_state' is missing"),
    (debug(take_child_perms=["wrte"]), "Parameter 'null' does not accept value 'wrte'"),
    (debug(file=NULL), "Parameter 'file' is unexpected"),
    # permissions
    (add(node_name="x", driver="qcow2", file="protected"), "Block node is read-only"),
    (
        add(node_name="x", driver="qcow2", file="image"),
        conflict("image", "write, resize", "node 'format'", "file", "node 'x'", "file"),
    ),
    (
        add(node_name="x", **raw("image", size=512)),
        conflict("image", "resize", "node 'format'", "file", "node 'x'", "file"),
    ),
    (
        add(node_name="x", **blkdebug("image", **{"take-child-perms": ["write", "consistent-read"]})),
        conflict("image", "write", "node 'x'", "image", "node 'format'", "file"),
    ),
    (
        add(node_name="x", **blkdebug("image", **{"unshare-child-perms": ["consistent-read", "resize"]})),
        conflict("image", "consistent read, resize", "node 'format'", "file", "node 'x'", "image"),
    ),
    (
        add(node_name="x", **blkdebug("upper", **{"take-child-perms": ["resize"]})),
        conflict("upper", "resize", "node 'x'", "image", "node 'selfish'", "image"),
    ),
    (
        add(node_name="x", **blkdebug("protected", **{"take-child-perms": ["write-unchanged"]})),
        "Block node is read-only",
    ),
    # blockdev-del
    (delete(), "Parameter 'node-name' is missing"),
    (delete(node_name=5), "Invalid parameter type for 'node-name', expected: string"),
    (delete(node_name="null", force=True), "Parameter 'force' is unexpected"),
    (delete(node_name="nope"), "Failed to find node with node-name='nope'"),
    (delete(node_name=""), "Failed to find node with node-name=''"),
    (delete(node_name="inner"), "Node inner is not owned by the monitor"),
    (delete(node_name="null"), "Block device null is in use"),
    (delete(node_name="image"), "Block device image is in use"),
    # block_resize
    (resize(), "Parameter 'size' is missing"),
    (resize(size=512), "Cannot find device='' nor node-name=''"),
    (resize(node_name="nope", size=512), "Cannot find device='' nor node-name='nope'"),
    (resize(device="null", size=512), "Cannot find device='null' nor node-name=''"),
    (resize(node_name="null", size=-1), "Parameter 'size' expects a >0 size"),
    (resize(node_name="null", size="512"), "Invalid parameter type for 'size', expected: integer"),
    (resize(node_name="null", size=1.5), "Invalid parameter type for 'size', expected: integer"),
    (resize(node_name="null", size=2**63), "Invalid parameter type for 'size', expected: integer"),
    (resize(node_name="null", size=512), "Image format driver does not support resize"),
    (resize(node_name="user", size=512), "Image format driver does not support resize"),
    (resize(node_name="protected", size=512), "Image is read-only"),
    (resize(node_name="format", size=1000), "The new size must be a multiple of 512"),
    (
        resize(node_name="odd", size=2**63 - 1),
        "offset(9223372036854775807) exceeds maximum(9223372035781033984)",
    ),
    (resize(node_name="odd", size=2**62), "Could not resize file: File too large"),
    (
        resize(node_name="image", size=MIB),
        conflict("image", "resize", "an unnamed block device", "root", "node 'format'", "file"),
    ),
    (
        resize(node_name="upper", size=MIB),
        conflict("upper", "resize", "an unnamed block device", "root", "node 'selfish'", "image"),
    ),
    # the rest
    (("query-named-block-nodes", {"flat": 1}), "Invalid parameter type for 'flat', expected: boolean"),
    (("query-blockstats", {"query-nodes": 1}), "Invalid parameter type for 'query-nodes', expected: boolean"),
    (("query-block", {"device": "x"}), "Parameter 'device' is unexpected"),
    (("nosuch", {}), "The command nosuch has not been found"),
    (("qmp_capabilities", {}), "Capabilities negotiation is already complete, command ignored"),
]


@pytest.fixture(scope="module")
def standing(both: Both) -> Iterator[Both]:
    """Both programs with the nodes of STANDING."""
    monitors = both.qemu, both.mount.qmp
    for monitor in monitors:
        for node in both.place(STANDING):
            monitor("blockdev-add", node)
    yield both
    for monitor in monitors:
        for node in reversed(STANDING):
            monitor("blockdev-del", {"node-name": node["node-name"]})


def error(monitor: Qmp, request: tuple[str, Json]) -> Json:
    command, arguments = request
    before = monitor("query-named-block-nodes")
    answer = monitor.ask({"execute": command, "arguments": arguments})
    assert monitor("query-named-block-nodes") == before
    return answer


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=lambda number: f"{MISTAKES[number][1][:60]}-{number}")
def test_a_mistake_is_answered_in_qemus_words(standing: Both, number: int) -> None:
    request, message = standing.place(MISTAKES[number])
    unknown = request[0] in ("nosuch", "qmp_capabilities")
    expected = {"error": {"class": "CommandNotFound" if unknown else "GenericError", "desc": message}}
    assert error(standing.mount.qmp, request) == expected
    if not (standing.is_old and message in NEW):
        assert error(standing.qemu, request) == expected
