"""blklogwrites: its options and their errors, appending to a log that is there, and its place in the graph."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import trio
from support import READ_WRITE, memory_of, root_of, write
from writelogs import (
    DISCARD,
    FLUSH,
    FUA_FLAG,
    LENGTH,
    MAGIC,
    MARK,
    MEM,
    Found,
    appended,
    failing,
    log_of,
    logged,
    parse,
    sectors,
)

from fusebd.block.driver import parse_blockdev_text
from fusebd.block.graph import Graph
from fusebd.block.perms import Perm, Role
from fusebd.errors import FusebdError, OptionError, PermissionConflict
from fusebd.qmp.queries import block_graph, named_block_nodes

# --- appending -----------------------------------------------------------------------------------


async def test_an_empty_log_can_be_appended_to(graph: Graph) -> None:
    root = await appended(graph, b"")
    await write(root, 512, b"x" * 512)
    await root.flush()
    assert log_of(graph) == Found(2, 512, [(1, 1, 0, b"x" * 512), (0, 0, FLUSH, b"")])


async def test_entries_are_added_behind_those_that_are_counted(graph: Graph) -> None:
    before = sectors((0, 3, 0), (0, 0, FLUSH), (5, 100, DISCARD), (0, 0, MARK), (2, 1, FUA_FLAG | FLUSH))
    root = await appended(graph, before + sectors((0, 7, 0))[512:])
    await write(root, 0, b"x" * 512)
    await root.flush()
    found = log_of(graph)
    assert found.count == 7
    assert found.entries[:7] == [*parse(before).entries, (0, 1, 0, b"x" * 512), (0, 0, FLUSH, b"")]


async def test_an_appended_log_keeps_its_sector_size(graph: Graph) -> None:
    root = await appended(graph, sectors((0, 1, 0), size=4096))
    assert root.driver.limits.request_alignment == 4096
    await write(root, 0, b"x" * 4096)
    await root.flush()
    assert (log_of(graph).count, log_of(graph).sector_size) == (3, 4096)


async def test_the_interval_counts_entries_that_were_there(graph: Graph) -> None:
    root = await appended(graph, sectors(*[(0, 0, FLUSH)] * 3), log_super_update_interval=4)
    await write(root, 0, bytes(512))
    assert log_of(graph).count == 4


async def test_reading_a_long_log_lets_others_have_their_turn(graph: Graph) -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await appended(graph, sectors(*[(0, 0, FLUSH)] * 6000))
        nursery.cancel_scope.cancel()
    assert turns > 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * 600, "Invalid log superblock magic"),
        (b"x" * 6, "Invalid log superblock magic"),
        (sectors()[:20], "Invalid log sector size 0"),
        (sectors()[:8] + b"\2" + sectors()[9:], "Unsupported log version 2"),
        (struct.pack("<QQQI", MAGIC, 1, 0, 100), "Invalid log sector size 100"),
        (struct.pack("<QQQI", MAGIC, 1, 0, 2**31), "Invalid log sector size 2147483648"),
        (sectors((0, 1, 0), (0, 0, 0x30)), "Invalid flags 0x30 in log entry 1"),
        (sectors(count=3), "Log entry 0 is past the end of the log"),
        (sectors(count=2**64 - 1), "Log entry 0 is past the end of the log"),
        (sectors((0, 0, FLUSH), count=2), "Log entry 1 is past the end of the log"),
        (sectors((0, 3, 0))[:-1], "Log entry 0 is past the end of the log"),
        (
            sectors() + struct.pack("<QQQQ", 0, 2**64 - 1, 0, 0) + bytes(480) + sectors((0, 1, 0))[512:],
            None,
        ),
    ],
)
async def test_a_log_that_is_malformed_is_not_appended_to(graph: Graph, content: bytes, message: str | None) -> None:
    if message is None:  # nothing is counted
        await appended(graph, content)
        return
    with pytest.raises(FusebdError) as caught:
        await appended(graph, content)
    assert str(caught.value) == message
    assert "top" not in graph.nodes
    assert memory_of(graph, "log-memory").data == content


async def test_an_entry_that_claims_more_than_there_is_is_refused(graph: Graph) -> None:
    content = sectors(count=1) + struct.pack("<QQQQ", 0, 2**64 - 1, 0, 0).ljust(4096, b"\0")
    with pytest.raises(FusebdError, match="Log entry 0 is past the end of the log"):
        await appended(graph, content)


@pytest.mark.parametrize(
    ("sector", "message"),
    [
        (0, "Could not read log superblock: Input/output error"),
        (1, "Failed to read log entry 0: Input/output error"),
        (3, "Failed to read log entry 1: Input/output error"),
    ],
)
async def test_a_log_that_cannot_be_read_is_not_appended_to(graph: Graph, sector: int, message: str) -> None:
    await graph.blockdev_add({**MEM, "node-name": "log-memory", "size": 0})
    content = sectors((0, 1, 0), (0, 0, FLUSH))
    memory_of(graph, "log-memory").data[:] = content
    graph.find("log-memory").set_length(len(content))
    broken = failing("log-memory", "none", sector=sector, once=False)
    with pytest.raises(FusebdError) as caught:
        await logged(graph, log=broken, log_append=True)
    assert str(caught.value) == message


# --- options -------------------------------------------------------------------------------------

INLINE = {
    "driver": "blklogwrites",
    "node-name": "top",
    "file": {"driver": "null-co", "size": LENGTH},
    "log": {"driver": "test-memory", "size": 0},
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"log-sector-size": size}, f"Invalid log sector size {size}")
            for size in (0, 1, 16, 31, 33, 48, 1000, 1 << 24, 1 << 31)
        ),
        *(
            ({"log-sector-size": size}, "Parameter 'log-sector-size' expects uint32_t")
            for size in (-1, 1 << 32, (1 << 64) - 1)
        ),
        *(
            ({"log-sector-size": size}, "Parameter 'log-sector-size' expects uint64")
            for size in (1 << 64, "512", True, None, 1.5)
        ),
        ({"log-super-update-interval": 0}, "Invalid log superblock update interval 0"),
        *(
            ({"log-super-update-interval": size}, "Parameter 'log-super-update-interval' expects uint64")
            for size in (1 << 64, "5", True)
        ),
        *(
            ({"log-append": value}, "Invalid parameter type for 'log-append', expected: boolean")
            for value in ("on", 1, None)
        ),
        ({"log-append": True, "log-sector-size": 512}, "log-append and log-sector-size are mutually exclusive"),
        ({"log-append": True, "log-super-update-interval": 0}, "Invalid log superblock update interval 0"),
        ({"log-sector-size": 3, "log-super-update-interval": 0}, "Invalid log sector size 3"),
        ({"log": None}, "Invalid parameter type for 'log', expected: BlockdevRef"),
        ({"file": "none"}, "Cannot find device='none' nor node-name='none'"),
        ({"log": "none"}, "Cannot find device='none' nor node-name='none'"),
        ({"file": "top"}, "Cannot find device='top' nor node-name='top'"),
        ({"log": "top"}, "Making 'top' a log child of 'top' would create a cycle"),
        ({"nonsense": 1}, "Parameter 'nonsense' is unexpected"),
    ],
)
async def test_a_wrong_option_is_refused_in_the_words_of_qemu(
    graph: Graph, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(FusebdError) as caught:
        await graph.blockdev_add({**INLINE, **options})
    assert str(caught.value) == message
    assert not graph.nodes


@pytest.mark.parametrize("child", ["file", "log"])
async def test_both_children_are_required(graph: Graph, child: str) -> None:
    with pytest.raises(OptionError, match=f"Parameter '{child}' is missing"):
        await graph.blockdev_add({name: value for name, value in INLINE.items() if name != child})


@pytest.mark.parametrize(
    "options",
    [
        {"log-sector-size": 32},
        {"log-sector-size": 1 << 23},
        {"log-append": False, "log-sector-size": 1024},
        {"log-super-update-interval": -1},
        {"log-super-update-interval": (1 << 64) - 1},
    ],
)
async def test_an_option_at_its_limit_is_taken(graph: Graph, options: dict[str, Any]) -> None:
    await graph.blockdev_add({**INLINE, **options})
    assert graph.find("top").is_open


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("log-sector-size=4k", "Parameter 'log-sector-size' expects integer"),
        ("log-sector-size=", "Parameter 'log-sector-size' expects integer"),
        ("log-sector-size=99999999999", "Parameter 'log-sector-size' expects uint32_t"),
        ("log-sector-size=010", "Invalid log sector size 8"),
        ("log-super-update-interval=99999999999999999999", "Parameter 'log-super-update-interval' expects integer"),
        ("log-append=yes", "Parameter 'log-append' expects 'on' or 'off'"),
    ],
)
async def test_a_wrong_option_on_the_command_line_is_refused_in_the_words_of_qemu(
    graph: Graph, text: str, message: str
) -> None:
    whole = f"blklogwrites,node-name=top,file.driver=null-co,log.driver=null-co,log.size=0,{text}"
    with pytest.raises(FusebdError) as caught:
        await graph.blockdev_add(parse_blockdev_text(whole))
    assert str(caught.value) == message


async def test_the_file_must_be_as_long_as_some_log_sectors(graph: Graph) -> None:
    await graph.blockdev_add({**MEM, "node-name": "file-memory", "size": 1536})
    with pytest.raises(FusebdError) as caught:
        await logged(graph, log_sector_size=1024)
    assert str(caught.value) == (
        "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment"
    )


# --- the graph -----------------------------------------------------------------------------------


async def test_permissions_are_those_of_qemu(graph: Graph) -> None:
    await graph.detach_root(await logged(graph))
    # what qemu-storage-daemon 10.0.2 answers
    shared = ["resize", "write-unchanged", "write", "consistent-read"]
    assert [
        {key: edge[key] for key in ("name", "perm", "shared-perm")}
        for edge in block_graph(graph)["edges"]
    ] == [
        {"name": "file", "perm": [], "shared-perm": shared},
        {
            "name": "log",
            "perm": ["resize", "write", "consistent-read"],
            "shared-perm": ["write-unchanged", "consistent-read"],
        },
    ]  # fmt: skip
    assert graph.find("top").children["log"].role == Role.METADATA


async def test_a_log_has_one_writer(graph: Graph) -> None:
    await logged(graph)
    with pytest.raises(PermissionConflict):
        root_of(graph, "log-memory", READ_WRITE)


async def test_a_read_only_node_only_reads_its_log(graph: Graph) -> None:
    memories = {"file": {**MEM, "size": LENGTH}, "log": {**MEM, "size": 0}}
    await graph.blockdev_add({"driver": "blklogwrites", "node-name": "top", "read-only": True, **memories})
    assert graph.find("top").children["log"].perm == Perm.CONSISTENT_READ


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, '"driver": "blklogwrites"'),
        (
            {"log-sector-size": 4096, "log-super-update-interval": 5},
            '"log-sector-size": 4096, "driver": "blklogwrites"',
        ),
        (
            {"log-append": False, "log-sector-size": 1024},
            '"log-sector-size": 1024, "driver": "blklogwrites", "log-append": false',
        ),
    ],
)
async def test_the_file_name_is_as_qemu_shows_it(
    graph: Graph, tmp_path: Path, options: dict[str, Any], shown: str
) -> None:
    (tmp_path / "disk").write_bytes(bytes(8192))
    (tmp_path / "log").write_bytes(b"")
    file, log = ({"driver": "file", "filename": f"{tmp_path}/{name}"} for name in ("disk", "log"))
    await graph.blockdev_add({"driver": "blklogwrites", "node-name": "top", "file": file, "log": log, **options})
    found = next(node for node in named_block_nodes(graph, flat=True) if node["node-name"] == "top")
    disk_text, log_text = (f'{{"driver": "file", "filename": "{tmp_path}/{name}"}}' for name in ("disk", "log"))
    assert found["file"] == f'json:{{"log": {log_text}, {shown}, "file": {disk_text}}}'
