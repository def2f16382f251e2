"""The blkdebug driver: limits, permissions, its configuration file, breakpoints.  Its rules: test_blkdebug_rules.py."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import UNSET
from support import READ_WRITE, Memory, memory_of, read, root_of, write

from fusebd.block.filename import options_for
from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.drivers.blkdebug import Blkdebug, BlkdebugOptions, InjectErrorOptions, SetStateOptions
from fusebd.drivers.blkdebug.config import parse_config
from fusebd.drivers.raw import RawOptions
from fusebd.errors import BlockIOError, CommandError, FusebdError, OptionError, PermissionConflict, ReadOnlyError

KIB = 1024
NULL = {"driver": "null-co"}


async def add_over_memory(graph: Graph, *, size: int = 256 * KIB, memory: Any = None, **options: Any) -> Memory:
    """A node ``debug`` over a test-memory node ``m``, with *options* (``_`` for ``-``)."""
    given = {name.replace("_", "-"): value for name, value in options.items()}
    below = {"driver": "test-memory", "node-name": "m", "size": size, **(memory or {})}
    await graph.blockdev_add({"driver": "blkdebug", "node-name": "debug", "discard": "unmap", "image": below, **given})
    return memory_of(graph, "m")


def debug_of(graph: Graph) -> Blkdebug:
    driver = graph.find("debug").driver
    assert isinstance(driver, Blkdebug)
    return driver


async def refusal(graph: Graph, options: dict[str, Any]) -> str:
    with pytest.raises(FusebdError) as refused:
        await graph.blockdev_add(options)
    assert not graph.nodes
    return str(refused.value)


# --- limits --------------------------------------------------------------------------------------


# The messages are those of qemu-storage-daemon 10.0.2.
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"align": 3}, "Cannot meet constraints with align 3"),
        ({"align": 2**31 - 1}, "Cannot meet constraints with align 2147483647"),
        ({"align": 2**31}, "Cannot meet constraints with align 2147483648"),
        ({"align": -1}, "Value '-1' is out of range for parameter 'align'"),
        ({"align": 4096, "max-transfer": 512}, "Cannot meet constraints with max-transfer 512"),
        ({"max-transfer": 2**31 - 1}, "Cannot meet constraints with max-transfer 2147483647"),
        ({"max-transfer": -512}, "Value '-512' is out of range for parameter 'max-transfer'"),
        ({"max-transfer": 2**31}, "Parameter 'max-transfer' expects int32_t"),
        ({"align": 512, "opt-write-zero": 100}, "Cannot meet constraints with opt-write-zero 100"),
        ({"opt-write-zero": 1024, "max-write-zero": 512}, "Cannot meet constraints with max-write-zero 512"),
        ({"align": 1024, "max-write-zero": 512}, "Cannot meet constraints with max-write-zero 512"),
        ({"align": 2, "opt-discard": 3}, "Cannot meet constraints with opt-discard 3"),
        ({"opt-discard": 1024, "max-discard": 1536}, "Cannot meet constraints with max-discard 1536"),
        ({"max-discard": -(2**31) - 1}, "Parameter 'max-discard' expects int32_t"),
        ({"align": 512, "max-transfer": 100, "opt-write-zero": 100}, "Cannot meet constraints with max-transfer 100"),
    ],
    ids=str,
)
async def test_limits_that_cannot_be_met_are_refused(graph: Graph, limits: dict[str, int], message: str) -> None:
    assert await refusal(graph, {"driver": "blkdebug", "node-name": "b", "image": NULL, **limits}) == message


@pytest.mark.parametrize(
    "limits",
    [
        {"align": 0, "max-transfer": 0, "opt-write-zero": 0, "max-write-zero": 0, "opt-discard": 0, "max-discard": 0},
        {"align": 2**30, "max-transfer": 2**30},
        {"opt-write-zero": 3, "max-write-zero": 9, "opt-discard": 5, "max-discard": 10},
        {"align": 512, "max-write-zero": 1536, "max-discard": 2560},
    ],
    ids=str,
)
async def test_limits_that_can_be_met_are_taken(graph: Graph, limits: dict[str, int]) -> None:
    await graph.blockdev_add({"driver": "blkdebug", "node-name": "b", "image": NULL, **limits})


async def test_limits_have_to_suit_the_alignment_of_the_image(graph: Graph) -> None:
    image = {"driver": "test-memory", "align": 4096}
    wrong = {"driver": "blkdebug", "node-name": "b", "image": image, "max-transfer": 6144}
    assert await refusal(graph, wrong) == "Cannot meet constraints with max-transfer 6144"
    await graph.blockdev_add({**wrong, "max-transfer": 8192})


async def test_requests_are_split_at_max_transfer(graph: Graph) -> None:
    memory = await add_over_memory(graph, max_transfer=4096)
    root = root_of(graph, "debug")
    await write(root, 0, b"x" * 10000)
    assert await read(root, 1000, 9000) == b"x" * 9000
    assert memory.log == [
        ("write", 0, 4096),
        ("write", 4096, 4096),
        ("write", 8192, 1808),
        ("read", 1000, 4096),
        ("read", 5096, 4096),
        ("read", 9192, 808),
    ]


async def test_without_a_limit_of_its_own_that_of_the_image_holds(graph: Graph) -> None:
    memory = await add_over_memory(graph, memory={"max-transfer": 8192})
    await write(root_of(graph, "debug"), 0, b"x" * 10000)
    assert memory.log == [("write", 0, 8192), ("write", 8192, 1808)]


async def test_unaligned_writes_read_what_is_around_them(graph: Graph) -> None:
    memory = await add_over_memory(graph, align=4096)
    root = root_of(graph, "debug")
    await write(root, 5000, b"x" * 5000)
    assert memory.data[4999:10001] == b"\0" + b"x" * 5000 + b"\0"
    await write(root, 5000, b"x" * 9000)
    assert memory.log == [
        ("read", 4096, 8192),
        ("write", 4096, 8192),
        ("read", 4096, 4096),
        ("read", 12288, 4096),
        ("write", 4096, 12288),
    ]


async def test_unaligned_reads_are_of_whole_units(graph: Graph) -> None:
    memory = await add_over_memory(graph, align=4096)
    await read(root_of(graph, "debug"), 5000, 10)
    assert memory.log == [("read", 4096, 4096)]


async def test_zero_writes_are_cut_at_their_alignment_and_length(graph: Graph) -> None:
    memory = await add_over_memory(graph, align=512, opt_write_zero=4096, max_write_zero=8192)
    await root_of(graph, "debug").pwrite_zeroes(1024, 24 * KIB)
    # the head and the tail are shorter than opt-write-zero, so that blkdebug has them written
    assert memory.log == [
        ("write", 1024, 3072),
        ("zero", 4096, 8192),
        ("zero", 12288, 8192),
        ("zero", 20480, 4096),
        ("write", 24576, 1024),
    ]


async def test_a_zero_write_shorter_than_the_alignment_becomes_a_write(graph: Graph) -> None:
    memory = await add_over_memory(graph, align=512)
    memory.data[:] = b"x" * len(memory.data)
    await root_of(graph, "debug").pwrite_zeroes(100, 200)
    assert memory.log == [("read", 0, 512), ("write", 0, 512)]
    assert memory.data[:512] == b"x" * 100 + bytes(200) + b"x" * 212


async def test_discards_are_cut_at_their_alignment_and_length(graph: Graph) -> None:
    memory = await add_over_memory(graph, align=512, opt_discard=4096, max_discard=8192)
    await root_of(graph, "debug").pdiscard(1000, 24 * KIB)
    # what is no whole unit of ``align`` is left alone
    assert memory.log == [
        ("discard", 4096, 8192),
        ("discard", 12288, 8192),
        ("discard", 20480, 4096),
    ]


async def test_discards_of_whole_units_at_both_ends_are_passed_on(graph: Graph) -> None:
    memory = await add_over_memory(graph, align=512, opt_discard=4096)
    await root_of(graph, "debug").pdiscard(1024, 8192)
    assert memory.log == [("discard", 1024, 3072), ("discard", 4096, 4096), ("discard", 8192, 1024)]


@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_limits_give_the_right_bytes(data: st.DataObject) -> None:
    """Against a bytearray; test-memory checks that what arrives is as it was asked for."""
    align = data.draw(st.sampled_from([0, 1, 16, 512, 4096]), "align")
    unit = align or 1
    multiples = st.integers(0, 5).map(lambda n: n * unit)
    zero, discard = data.draw(multiples, "opt-write-zero"), data.draw(multiples, "opt-discard")
    limits = {
        "align": align,
        "max-transfer": data.draw(multiples, "max-transfer"),
        "opt-write-zero": zero,
        "max-write-zero": data.draw(st.integers(0, 3), "max-write-zero") * max(zero, unit),
        "opt-discard": discard,
        "max-discard": data.draw(st.integers(0, 3), "max-discard") * max(discard, unit),
    }
    ranges = st.tuples(st.integers(0, 65535), st.integers(1, 30000)).map(lambda r: (r[0], min(r[1], 65536 - r[0])))
    requests = data.draw(st.lists(st.tuples(st.sampled_from("rwzd"), ranges), max_size=12), "requests")

    async def check() -> None:
        graph = Graph()
        given = {name.replace("-", "_"): value for name, value in limits.items()}
        memory = await add_over_memory(graph, size=65536, **given)
        root = root_of(graph, "debug")
        model = bytearray(65536)
        for number, (kind, (offset, length)) in enumerate(requests):
            end = offset + length
            if kind == "r":
                assert await read(root, offset, length) == model[offset:end]
            elif kind == "w":
                model[offset:end] = bytes([number + 1]) * length
                await write(root, offset, bytes(model[offset:end]))
            elif kind == "z":
                model[offset:end] = bytes(length)
                await root.pwrite_zeroes(offset, length)
            else:
                before = bytes(memory.data)
                await root.pdiscard(offset, length)
                assert all(a in (b, 0) for a, b in zip(memory.data, before, strict=True))
                assert memory.data[:offset] + memory.data[end:] == before[:offset] + before[end:]
                model[:] = memory.data
        assert memory.data == model
        await graph.close()

    trio.run(check)


# --- permissions ---------------------------------------------------------------------------------


async def test_permissions_of_the_parents_are_passed_on(graph: Graph) -> None:
    await add_over_memory(graph)
    edge = graph.find("debug").children["image"]
    assert (edge.perm, edge.shared) == (Perm.NONE, Perm.ALL)
    root_of(graph, "debug", READ_WRITE)
    assert (edge.perm, edge.shared) == (READ_WRITE, Perm.ALL)


async def test_permissions_are_taken_and_not_shared_as_asked(graph: Graph) -> None:
    await add_over_memory(
        graph, take_child_perms=["write", "resize"], unshare_child_perms=["consistent-read", "write-unchanged"]
    )
    edge = graph.find("debug").children["image"]
    assert edge.perm == Perm.WRITE | Perm.RESIZE
    assert edge.shared == Perm.WRITE | Perm.RESIZE


# The messages are those of qemu-storage-daemon 10.0.2.
@pytest.mark.parametrize(
    ("first", "second", "names", "taker", "owner"),
    [
        ({"unshare-child-perms": ["write"]}, {"take-child-perms": ["write"]}, "write", "two", "one"),
        ({"take-child-perms": ["write"]}, {"unshare-child-perms": ["write"]}, "write", "one", "two"),
        (
            {"unshare-child-perms": ["write", "resize", "write-unchanged", "consistent-read"]},
            {"take-child-perms": ["resize", "write", "consistent-read", "write-unchanged"]},
            "consistent read, write, write unchanged, resize",
            "two",
            "one",
        ),
        (
            {"take-child-perms": ["write"], "unshare-child-perms": ["write"]},
            {"take-child-perms": ["write"], "unshare-child-perms": ["write"]},
            "write",
            "one",
            "two",
        ),
    ],
)
async def test_permissions_that_exclude_each_other_conflict(
    graph: Graph, first: dict[str, Any], second: dict[str, Any], names: str, taker: str, owner: str
) -> None:
    await graph.blockdev_add({"driver": "test-memory", "node-name": "m"})
    await graph.blockdev_add({"driver": "blkdebug", "node-name": "one", "image": "m", **first})
    with pytest.raises(PermissionConflict) as refused:
        await graph.blockdev_add({"driver": "blkdebug", "node-name": "two", "image": "m", **second})
    assert str(refused.value) == (
        f"Permission conflict on node 'm': permissions '{names}' are both required by node '{taker}' "
        f"(uses node 'm' as 'image' child) and unshared by node '{owner}' (uses node 'm' as 'image' child)."
    )
    assert list(graph.nodes) == ["m", "one"]


async def test_an_inline_image_that_conflicts_is_closed_again(graph: Graph) -> None:
    await graph.blockdev_add({"driver": "test-memory", "node-name": "m"})
    await graph.blockdev_add({"driver": "blkdebug", "node-name": "one", "image": "m", "unshare-child-perms": ["write"]})
    between = {"driver": "raw", "node-name": "between", "file": "m"}
    with pytest.raises(PermissionConflict):
        await graph.blockdev_add(
            {"driver": "blkdebug", "node-name": "two", "image": between, "take-child-perms": ["write"]}
        )
    assert list(graph.nodes) == ["m", "one"]


async def test_writing_cannot_be_taken_on_a_read_only_image(graph: Graph) -> None:
    await graph.blockdev_add({"driver": "test-memory", "node-name": "m", "read-only": True})
    with pytest.raises(ReadOnlyError, match=r"^Block node is read-only$"):
        await graph.blockdev_add({"driver": "blkdebug", "node-name": "b", "image": "m", "take-child-perms": ["write"]})


async def test_a_user_of_the_image_is_kept_away(graph: Graph) -> None:
    await add_over_memory(graph, unshare_child_perms=["write"])
    with pytest.raises(PermissionConflict, match=r"unshared by node 'debug' \(uses node 'm' as 'image' child\)"):
        root_of(graph, "m", READ_WRITE)
    root_of(graph, "m", Perm.CONSISTENT_READ)


# --- the configuration file ----------------------------------------------------------------------

GOOD = """\
# errors
[inject-error "first"]
event = "read_aio"
errno = "28"
once = "on"

[inject-error]
\tevent   =   "write_aio"
state = "2"
iotype = "write"
sector = "0x10"
immediately = "yes"
[set-state "first"]
event = "write_aio"
new_state = "2"
"""


async def test_rules_come_from_the_file_and_then_from_the_options(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "rules").write_text(GOOD)
    await add_over_memory(graph, config=str(tmp_path / "rules"), inject_error=[{"event": "none", "errno": 1}])
    shown = [(rule.id, rule.event, rule.state) for rule in debug_of(graph).list_rules()]
    assert shown == [("first", "read_aio", 0), ("1", "write_aio", 2), ("2", "write_aio", 0), ("3", "none", 0)]
    with pytest.raises(BlockIOError) as failed:
        await read(root_of(graph, "debug"), 0, 512)
    assert failed.value.errno == 1


def test_what_the_file_says_is_what_the_rules_are() -> None:
    first, second, third = (rule.options for rule in parse_config(GOOD, "rules"))
    assert [getattr(first, name) for name in ("event", "errno", "once")] == ["read_aio", 28, True]
    assert [getattr(second, name) for name in ("event", "state", "iotype", "sector", "immediately")] == [
        "write_aio",
        2,
        "write",
        16,
        True,
    ]
    assert [getattr(third, name) for name in ("event", "new_state")] == ["write_aio", 2]


#: content of the file -> the line that is named and QEMU's message (10.0.2), None where it is taken
FILES = {
    "": None,
    "# nothing\n\n#\n": None,
    '[inject-error]\nevent = "read_aio"': None,
    '[inject-error]\r\nevent = "read_aio"\r\n': None,
    '[inject-error]\nevent = "read_aio" # why\n': None,
    '[inject-error] why\nevent = "read_aio"\n': None,
    '[inject-error]\nevent = "read_aio"\nevent = "write_aio"\n': None,
    '[inject-error]\nevent = "read_aio"\nerrno = "034"\n': None,
    '[inject-error]\nevent = "read_aio"\nerrno = " 5"\n': None,
    '[inject-error]\nevent = "read_aio"\nsector = "-1"\n': None,
    '[inject-error]\nevent = "read_aio"\nonce = "y"\n': None,
    '[inject-error]\nevent = "read_aio"\nonce = "false"\n': None,
    '[set-state]\nevent = "read_aio"\n': None,
    '[inject-error "a"]\nevent = "read_aio"\n[set-state "a"]\nevent = "read_aio"\n': None,
    '[inject-error]\nevent = "read_aio"\n#' + "x" * 1022 + "\n": None,
    '[nope]\nevent = "read_aio"\n': (1, "There is no option group 'nope'"),
    'event = "read_aio"\n': (1, "no group defined"),
    ' [inject-error]\nevent = "read_aio"\n': (1, "no group defined"),
    '[inject-error]\nerrno = "5"\n': (1, "Missing event name for rule"),
    '\n[set-state]\nnew_state = "5"\n': (2, "Missing event name for rule"),
    "[inject-error]\n": (1, "Missing event name for rule"),
    '[inject-error]\nevent = "nope"\n': (2, "invalid parameter value: nope"),
    '[inject-error]\nevent = ""\n': (2, "invalid parameter value: "),
    '[inject-error]\nevent = "read_aio"\niotype = "nope"\n': (3, "invalid parameter value: nope"),
    '[inject-error]\nevent = "read_aio"\nbogus = "1"\n': (3, "Invalid parameter 'bogus'"),
    '[inject-error]\nevent = "read_aio"\nnew_state = "1"\n': (3, "Invalid parameter 'new_state'"),
    '[inject-error]\nevent = "read_aio"\nerrno = "EIO"\n': (3, "Parameter 'errno' expects a number"),
    '[inject-error]\nevent = "read_aio"\nerrno = ""\n': (3, "Parameter 'errno' expects a number"),
    '[inject-error]\nevent = "read_aio"\nerrno = "09"\n': (3, "Parameter 'errno' expects a number"),
    '[inject-error]\nevent = "read_aio"\nerrno = "5x"\n': (3, "Parameter 'errno' expects a number"),
    '[inject-error]\nevent = "read_aio"\nstate = "one"\n': (3, "Parameter 'state' expects a number"),
    '[inject-error]\nevent = "read_aio"\nsector = "99999999999999999999"\n': (
        3,
        "Value '99999999999999999999' is too large for parameter 'sector'",
    ),
    '[inject-error]\nevent = "read_aio"\nonce = "1"\n': (3, "Parameter 'once' expects 'on' or 'off'"),
    '[inject-error "a"]\nevent = "read_aio"\n[inject-error "a"]\nevent = "read_aio"\n': (
        3,
        "Duplicate ID 'a' for inject-error",
    ),
    '[inject-error "1a"]\nevent = "read_aio"\n': (1, "Parameter 'id' expects an identifier"),
    '[inject-error "a b"]\nevent = "read_aio"\n': (1, "Parameter 'id' expects an identifier"),
    '[inject-error]\nevent = "read_aio"\n   \n': (3, "parse error"),
    '[inject-error]\nevent = "read_aio"\n\0\n': (3, "parse error"),
}
#: what QEMU takes for something else and then complains about is called a parse error here
UNREADABLE = {
    "[inject-error]\nevent = read_aio\n": 2,
    '[inject-error]\nevent = "read_aio\n': 2,
    '[inject-error]\nevent "read_aio"\n': 2,
    "[inject-error]\nhello\n": 2,
    '[inject-error]\nevent = "read_aio"\n  # indented\n': 3,
    '[inject-error\nevent = "read_aio"\n': 1,
    '[inject-error "a\nevent = "read_aio"\n': 1,
    '[]\nevent = "read_aio"\n': 1,
}


@pytest.mark.parametrize("content", FILES, ids=repr)
def test_a_file_is_taken_or_refused_as_by_qemu(content: str) -> None:
    expected = FILES[content]
    if expected is None:
        parse_config(content, "rules")
        return
    with pytest.raises(OptionError) as refused:
        parse_config(content, "rules")
    assert str(refused.value) == f"rules:{expected[0]}: {expected[1]}"


@pytest.mark.parametrize("content", UNREADABLE, ids=repr)
def test_a_line_that_cannot_be_read_is_named(content: str) -> None:
    with pytest.raises(OptionError) as refused:
        parse_config(content, "rules")
    assert str(refused.value) == f"rules:{UNREADABLE[content]}: parse error"


def test_a_line_that_is_too_long_is_refused() -> None:
    with pytest.raises(OptionError, match=r"^rules:2: line is longer than 1023 characters$"):
        parse_config("\n#" + "x" * 1023 + "\n", "rules")


@pytest.mark.parametrize("content", [*FILES, *UNREADABLE], ids=repr)
def test_qemu_io_takes_and_refuses_the_same_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rules"
    path.write_bytes(content.encode())
    options = {"driver": "blkdebug", "image": NULL, "config": str(path)}
    said = subprocess.run(
        ["qemu-io", "-c", "length", "json:" + json.dumps(options)], capture_output=True, text=True, check=False
    ).stderr
    expected = FILES.get(content, (0, ""))
    if expected is None:
        assert said == ""
    else:
        assert expected[1] in said
        assert said != ""


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nosuch/rules", "Could not read blkdebug config file: No such file or directory"),
        ("/", "Cannot read config file: Is a directory"),
    ],
)
async def test_a_file_that_cannot_be_read_is_refused(graph: Graph, path: str, message: str) -> None:
    assert await refusal(graph, {"driver": "blkdebug", "node-name": "b", "image": NULL, "config": path}) == message


async def test_a_file_of_endless_length_is_refused(graph: Graph) -> None:
    options = {"driver": "blkdebug", "node-name": "b", "image": NULL, "config": "/dev/zero"}
    assert await refusal(graph, options) == "/dev/zero: configuration file is too long"


# --- waiting -------------------------------------------------------------------------------------


async def test_nothing_suspends_without_rules(graph: Graph) -> None:
    await add_over_memory(graph)
    root = root_of(graph, "debug")
    with trio.testing.assert_no_checkpoints():
        await use(root)


async def test_nothing_suspends_with_rules_that_do_not_fire(graph: Graph) -> None:
    rules = [{"event": "none", "sector": 10**9}, {"event": "pwritev", "state": 9}]
    await add_over_memory(graph, inject_error=rules, set_state=[{"event": "pwritev_done", "new_state": 1}])
    root = root_of(graph, "debug")
    with trio.testing.assert_no_checkpoints():
        await use(root)


async def use(root: Root) -> None:
    await write(root, 100, b"data")
    assert await read(root, 100, 4) == b"data"
    await root.pwrite_zeroes(0, 4096)
    await root.pdiscard(0, 4096)
    await root.flush()


@pytest.mark.parametrize("immediately", [False, True])
async def test_an_error_takes_a_trip_through_the_scheduler_unless_immediate(graph: Graph, immediately: bool) -> None:
    await add_over_memory(graph, inject_error=[{"event": "none", "immediately": immediately}])
    root = root_of(graph, "debug")
    expectation: Callable[[], Any] = (
        trio.testing.assert_no_checkpoints if immediately else trio.testing.assert_checkpoints
    )
    with expectation(), pytest.raises(BlockIOError):
        await read(root, 0, 512)


# --- breakpoints ---------------------------------------------------------------------------------


class Held:
    """A write of 512 bytes at *offset* that goes on in the background."""

    def __init__(self, nursery: trio.Nursery, root: Root, offset: int = 0) -> None:
        self.done = False
        nursery.start_soon(self._write, root, offset)

    async def _write(self, root: Root, offset: int) -> None:
        await write(root, offset, b"x" * 512)
        self.done = True


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def test_a_breakpoint_stops_one_request_until_it_is_resumed(graph: Graph) -> None:
    memory = await add_over_memory(graph)
    debug, root = debug_of(graph), root_of(graph, "debug")
    debug.set_break("pwritev", "A")
    async with trio.open_nursery() as nursery:
        held = Held(nursery, root)
        await debug.wait_break("A")
        assert debug.is_suspended("A")
        assert not debug.is_suspended("B")
        await write(root, 4096, b"others pass")
        assert memory.log == [("write", 4096, 11)]
        debug.resume("A")
        await settle()
        assert held.done
    assert memory.log[1:] == [("write", 0, 512)]
    assert not debug.is_suspended("A")


async def test_a_request_is_stopped_before_or_after_it_is_done(graph: Graph) -> None:
    memory = await add_over_memory(graph)
    debug, root = debug_of(graph), root_of(graph, "debug")
    debug.set_break("pwritev_done", "A")
    async with trio.open_nursery() as nursery:
        held = Held(nursery, root)
        await debug.wait_break("A")
        assert memory.log == [("write", 0, 512)]
        assert not held.done
        debug.resume("A")


async def test_resume_lets_the_latest_go(graph: Graph) -> None:
    await add_over_memory(graph)
    debug, root = debug_of(graph), root_of(graph, "debug")
    async with trio.open_nursery() as nursery:
        held = []
        for offset in (0, 512):
            debug.set_break("pwritev", "A")
            held.append(Held(nursery, root, offset))
            await settle()
        debug.resume("A")
        await settle()
        assert [one.done for one in held] == [False, True]
        debug.resume("A")


async def test_a_request_that_two_breakpoints_hold_needs_both_resumed(graph: Graph) -> None:
    await add_over_memory(graph)
    debug, root = debug_of(graph), root_of(graph, "debug")
    debug.set_break("pwritev", "A")
    debug.set_break("pwritev", "B")
    async with trio.open_nursery() as nursery:
        held = Held(nursery, root)
        await settle()
        debug.resume("B")
        await settle()
        assert (held.done, debug.is_suspended("A")) == (False, True)
        debug.resume("A")


async def test_remove_break_wakes_all_and_drops_those_not_reached(graph: Graph) -> None:
    await add_over_memory(graph)
    debug, root = debug_of(graph), root_of(graph, "debug")
    async with trio.open_nursery() as nursery:
        held = []
        for offset in (0, 512):
            debug.set_break("pwritev", "A")
            held.append(Held(nursery, root, offset))
            await settle()
        debug.set_break("pwritev", "A")
        debug.remove_break("A")
        await settle()
        assert [one.done for one in held] == [True, True]
        await write(root, 0, b"passes")


async def test_removing_a_breakpoint_that_nothing_has_reached_succeeds(graph: Graph) -> None:
    # QEMU removes it, and then says that there was none
    await add_over_memory(graph)
    debug_of(graph).set_break("pwritev", "A")
    debug_of(graph).remove_break("A")
    assert debug_of(graph).list_rules() == []


async def test_what_is_not_there_is_refused_in_qemus_words(graph: Graph) -> None:
    await add_over_memory(graph)
    debug = debug_of(graph)
    attempts: list[tuple[Callable[[], None], str]] = [
        (lambda: debug.set_break("nope", "A"), "Could not set breakpoint: No such file or directory"),
        (lambda: debug.resume("A"), "Could not resume request: No such file or directory"),
        (lambda: debug.remove_break("A"), "Could not remove breakpoint A: No such file or directory"),
    ]
    for attempt, message in attempts:
        with pytest.raises(CommandError) as refused:
            attempt()
        assert str(refused.value) == message


async def test_the_state_changes_when_a_request_is_stopped_not_when_it_goes_on(graph: Graph) -> None:
    # seen in qemu-io 10.0.2: write stopped by a breakpoint, read meanwhile fails
    await add_over_memory(
        graph,
        set_state=[{"event": "pwritev", "new_state": 2}],
        inject_error=[{"event": "pwritev", "state": 1, "iotype": "read"}],
    )
    debug, root = debug_of(graph), root_of(graph, "debug")
    debug.set_break("pwritev", "A")
    async with trio.open_nursery() as nursery:
        Held(nursery, root)
        await settle()
        assert debug.rules.state == 2
        with pytest.raises(BlockIOError):
            await read(root, 0, 512)
        debug.resume("A")


async def test_a_cancelled_request_leaves_its_breakpoint(graph: Graph) -> None:
    memory = await add_over_memory(graph)
    debug, root = debug_of(graph), root_of(graph, "debug")
    debug.set_break("pwritev", "A")
    debug.set_break("pwritev", "B")
    async with trio.open_nursery() as nursery:
        Held(nursery, root)
        await settle()
        debug.resume("A")
        nursery.cancel_scope.cancel()
    assert not debug.is_suspended("B")
    with pytest.raises(CommandError):
        debug.resume("B")
    assert (memory.log, root.in_flight) == ([], 0)
    await write(root, 0, b"goes on")


async def test_one_of_several_suspended_requests_can_be_cancelled(graph: Graph) -> None:
    await add_over_memory(graph)
    debug, root = debug_of(graph), root_of(graph, "debug")
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def cancelled() -> None:
            with scope:
                await write(root, 0, b"never")

        debug.set_break("pwritev", "A")
        held = Held(nursery, root, 512)
        await settle()
        debug.set_break("pwritev", "A")
        nursery.start_soon(cancelled)
        await settle()
        scope.cancel()
        await settle()
        assert debug.is_suspended("A")
        debug.resume("A")
        await settle()
        assert held.done
    assert not debug.is_suspended("A")


async def test_wait_break_waits_for_its_tag_only(graph: Graph) -> None:
    await add_over_memory(graph)
    debug, root = debug_of(graph), root_of(graph, "debug")
    reached: list[str] = []

    async def wait_for(tag: str) -> None:
        await debug.wait_break(tag)
        reached.append(tag)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for, "A")
        nursery.start_soon(wait_for, "B")
        await settle()
        debug.set_break("pwritev", "B")
        Held(nursery, root)
        await settle()
        assert reached == ["B"]
        debug.set_break("pwritev", "A")
        Held(nursery, root, 512)
        await settle()
        assert reached == ["B", "A"]
        debug.remove_break("A")
        debug.remove_break("B")


# --- rules while the node is open ----------------------------------------------------------------


async def test_rules_can_be_added_and_removed_while_the_node_is_used(graph: Graph) -> None:
    await add_over_memory(graph)
    debug, root = debug_of(graph), root_of(graph, "debug")
    await read(root, 0, 512)
    rule = debug.add_rule(InjectErrorOptions(event="none", sector=1), "mine")
    await read(root, 0, 512)
    with pytest.raises(BlockIOError):
        await read(root, 512, 512)
    assert (debug.list_rules(), rule.hits) == ([rule], 1)
    debug.remove_rule("mine")
    await read(root, 512, 512)
    assert debug.list_rules() == []


async def test_a_rule_that_is_added_leaves_the_active_ones(graph: Graph) -> None:
    await add_over_memory(graph, inject_error=[{"event": "none", "iotype": "write"}])
    debug, root = debug_of(graph), root_of(graph, "debug")
    debug.add_rule(InjectErrorOptions(event="none", iotype="read"))
    debug.add_rule(SetStateOptions(event="none", new_state=7))
    for request in (read(root, 0, 1), write(root, 0, b"x")):
        with pytest.raises(BlockIOError):
            await request
    assert debug.rules.state == 7


# --- legacy names --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "image"),
    [
        ("blkdebug::/disk", None, "/disk"),
        ("blkdebug:rules:/disk", "rules", "/disk"),
        ("blkdebug:rules:/a:b", "rules", "/a:b"),
        ("blkdebug:/etc/rules:file:/disk", "/etc/rules", "/disk"),
    ],
)
async def test_the_legacy_name_means_a_file_of_rules_and_an_image(
    graph: Graph, name: str, config: str | None, image: str
) -> None:
    options = await options_for(name, "raw", graph.probe)
    assert isinstance(options, RawOptions)
    debug = options.file.options
    assert isinstance(debug, BlkdebugOptions)
    assert debug.image.raw == {"driver": "file", "filename": image}
    assert debug.config == (UNSET if config is None else config)


async def test_legacy_names_can_be_put_into_each_other(graph: Graph) -> None:
    options = await options_for("blkdebug::blkdebug:rules:/disk", "raw", graph.probe)
    assert isinstance(options, RawOptions)
    assert options.file.raw == {
        "driver": "blkdebug",
        "image": {"driver": "blkdebug", "config": "rules", "image": {"driver": "file", "filename": "/disk"}},
    }


async def test_a_legacy_name_without_an_image_is_refused(graph: Graph) -> None:
    with pytest.raises(OptionError, match=r"^blkdebug requires both config file and image path$"):
        await options_for("blkdebug:/disk", "raw", graph.probe)
