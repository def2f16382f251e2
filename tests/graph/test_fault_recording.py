"""Runs of the fault filter that are recorded, and replayed: the same content, the same decisions, or it is told."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from qmptalk import talking
from support import memory_of, read, root_of, write

from fusebd.block.graph import Graph
from fusebd.block.naming import node_filename
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.drivers.fault import Fault, FaultRule
from fusebd.drivers.fault.commands import (
    FaultHeal,
    FaultRecord,
    FaultRecordEnd,
    FaultRelease,
    FaultRuleAdd,
    FaultRuleRemove,
    QueryFaultRules,
)
from fusebd.errors import BlockIOError, CommandError, OpenError, OptionError
from fusebd.qmp.server import QmpServer

LENGTH = 1 << 16
OLD = bytes(range(256)) * (LENGTH // 256)
ERROR = {"action": "error", "operations": ["read"]}

Json = dict[str, Any]


async def opened(graph: Graph, **options: Any) -> Root:
    """A way in to the fault node ``disk`` over the memory node ``medium``, which has OLD."""
    memory = {"driver": "test-memory", "node-name": "medium", "size": LENGTH, "discard": "unmap"}
    named = {"driver": "fault", "node-name": "disk", "discard": "unmap"}
    await graph.blockdev_add({**named, "file": memory, **options})
    memory_of(graph, "medium").data[:] = OLD
    return root_of(graph, "disk", Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE)


def fault(graph: Graph) -> Fault:
    driver = graph.find("disk").entrance.driver
    assert isinstance(driver, Fault)
    return driver


async def add(graph: Graph, **members: Any) -> str:
    return str((await fault(graph).add_rule(FaultRuleAdd(rule=FaultRule(**members))))["id"])


async def shown(graph: Graph) -> Json:
    found = await fault(graph).list_rules(QueryFaultRules())
    assert isinstance(found, dict)
    return found


def ledger(graph: Graph) -> list[Json]:
    return [{name: value for name, value in entry.items() if name != "time"} for entry in graph.ledger]


def lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def tried(root: Root, operation: str, offset: int, data: int | bytes) -> None:
    """One request, which may fail."""
    try:
        if isinstance(data, bytes):
            await write(root, offset, data)
        elif operation == "read":
            await read(root, offset, data)
        elif operation == "write-zeroes":
            await root.pwrite_zeroes(offset, data)
        elif operation == "discard":
            await root.pdiscard(offset, data)
        else:
            await root.flush()
    except BlockIOError:
        return


class Differences:
    """What is announced of replays that differ."""

    def __init__(self, graph: Graph) -> None:
        self.told: list[Json] = []
        graph.event_listeners.append(self._event)

    def _event(self, event: str, data: Json) -> None:
        if event == "FAULT_REPLAY_DIVERGED":
            self.told.append(data)


# --- the same again ------------------------------------------------------------------------------

MIXED = [
    {"action": "torn-write", "probability": 0.2, "pattern": "random", "fill": "random"},
    {"action": "misdirect", "probability": 0.1, "operations": ["write"]},
    {"action": "bit-flip", "probability": 0.1, "operations": ["write"]},
    {"action": "lost-write", "probability": 0.1},
    {"action": "latent", "probability": 0.05},
    {"action": "disk-full", "after-bytes": 1 << 18},
    {"action": "set-state", "nth": 40, "set-state": 2},
    {"action": "error", "probability": 0.3, "state": 2},
    {"action": "delay", "distribution": "lognormal", "seconds": 0.01, "sigma": 1},
]


async def mixed_requests(graph: Graph, root: Root, number: int, *, changes: bool) -> None:
    """*number* requests, always the same; with *changes*, rules come and go in between."""
    rng = random.Random(1)
    for index in range(number):
        if changes and index == 0:
            await add(graph, action="bit-flip", at_rest=True, count=9, id="rotten")
        if changes and index == 30:
            await add(graph, action="duplicate", id="twice", every=3)
            await add(graph, action="latent", at_rest=True, sector=5, sectors=20, count=7)
        if changes and index == 60:
            await fault(graph).heal(FaultHeal(offset=1024, length=8192))
            await fault(graph).remove_rule(FaultRuleRemove(id="3"))
        if changes and index == 90:
            await fault(graph).remove_rule(FaultRuleRemove(id="twice"))
        offset, length = rng.randrange(LENGTH // 512 - 16) * 512, rng.randrange(1, 17) * 512
        operation = rng.choice(["read", "write", "write", "write-zeroes", "discard", "flush"])
        data = rng.randbytes(length) if operation == "write" else length
        await tried(root, operation, offset, data)


async def test_a_replay_gives_the_same_content_ledger_and_recording(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    seen = []
    again = tmp_path / "again"
    run: Json = {"seed": 7, "rules": MIXED, "record": str(tmp_path / "run")}
    for options in (run, {"replay": str(tmp_path / "run"), "record": str(again)}):
        graph = Graph()
        differences = Differences(graph)
        root = await opened(graph, **options)
        await mixed_requests(graph, root, 200, changes=options is run)
        disk, data = fault(graph), memory_of(graph, "medium").data
        await graph.close()  # with a flush, about which something is decided, too
        assert differences.told == []
        found: Any = await disk.list_rules(QueryFaultRules())
        replay = found.get("replay")
        seen.append((bytes(data), ledger(graph), found["rules"]))
    assert seen[0] == seen[1]
    assert seen[0][0] != OLD
    assert again.read_bytes() == (tmp_path / "run").read_bytes()
    recorded = lines(again)
    assert {line.get("kind") for line in recorded} == {None, "add", "remove", "heal", "decision"}
    made = sum(line.get("kind") == "decision" for line in recorded)
    assert replay == {"filename": str(tmp_path / "run"), "decisions": made, "recorded": made}
    assert made > 200


async def test_a_recording_that_began_later_goes_on_from_there(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "run"
    graph = Graph()
    root = await opened(graph, seed=3, rules=MIXED)
    await mixed_requests(graph, root, 70, changes=True)
    begin = bytes(memory_of(graph, "medium").data)
    already = len(ledger(graph))
    await fault(graph).record(FaultRecord(filename=str(path)))
    await mixed_requests(graph, root, 100, changes=False)
    await fault(graph).end_record(FaultRecordEnd())
    expected, entries = await shown(graph), ledger(graph)[already:]
    left = bytes(memory_of(graph, "medium").data)
    await tried(root, "read", 0, 512)  # not in the file any more
    await graph.close()

    graph = Graph()
    root = await opened(graph, replay=str(path))
    memory_of(graph, "medium").data[:] = begin
    await mixed_requests(graph, root, 100, changes=False)
    found = await shown(graph)
    assert "diverged" not in found.pop("replay")
    assert found == expected
    assert bytes(memory_of(graph, "medium").data) == left
    assert [{**entry, "id": 0} for entry in ledger(graph)] == [{**entry, "id": 0} for entry in entries]
    await graph.close()


async def test_the_time_is_that_of_the_recording(
    graph: Graph, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "run"
    rules = [{"action": "error", "after": 10, "until": 20, "operations": ["read"]}]
    first = Graph()
    root = await opened(first, rules=rules, record=str(path))
    for seconds in (9, 0.5, 0.5, 5, 5, 5):
        await trio.sleep(seconds)
        await tried(root, "read", 0, 512)
    expected = ledger(first)
    await first.close()
    assert len(expected) == 4  # two faults, two errors
    assert [line["at"] for line in lines(path) if line.get("kind") == "clock"] == [{"read": 2}, {"read": 4}]
    root = await opened(graph, replay=str(path))
    for _ in range(6):
        await tried(root, "read", 0, 512)
    assert ledger(graph) == expected
    assert "diverged" not in (await shown(graph))["replay"]


async def test_events_are_counted_like_requests(tmp_path: Path) -> None:
    path, seen = tmp_path / "run", []
    for options in ({"record": str(path)}, {"replay": str(path)}):
        graph = Graph()
        await opened(graph, **options)
        await graph.blockdev_add({"driver": "raw", "node-name": "top", "file": "disk"})
        root = root_of(graph, "top", Perm.CONSISTENT_READ | Perm.WRITE)
        await tried(root, "read", 0, 512)
        if "record" in options:
            await add(graph, action="error", event="write_aio", operations=["read"], times=2)
        for operation, data in (("read", 512), ("write", b"x"), ("read", 512), ("read", 512), ("read", 512)):
            await tried(root, operation, 0, data)
        seen.append(ledger(graph))
        assert "diverged" not in (await shown(graph)).get("replay", {})
        await graph.detach_root(root)
        await graph.close()
    assert seen[0] == seen[1]
    assert len(seen[0]) == 4


async def test_what_was_released_is_released_again(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = Graph()
    root = await opened(first, rules=[{"action": "hang", "operations": ["write"], "id": "stuck"}], record=str(path))
    for number in range(3):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, root, 0, b"N" * 512)
            if number == 1:
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(write, root, 512, b"N" * 512)
            await trio.testing.wait_all_tasks_blocked()
            if number < 2:
                await fault(first).release(FaultRelease())
            else:
                await fault(first).remove_rule(FaultRuleRemove(id="stuck"))
    await write(root, 0, b"M" * 512)
    await first.close()
    root = await opened(graph, replay=str(path))
    for number in range(3):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, root, 0, b"N" * 512)
            if number == 1:
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(write, root, 512, b"N" * 512)
    await write(root, 0, b"M" * 512)
    found = await shown(graph)
    assert found["rules"] == []
    assert found["replay"] == {"filename": str(path), "decisions": 4, "recorded": 4}


async def test_reads_in_between_do_not_move_rules_for_writes(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = Graph()
    root = await opened(first, record=str(path))
    for number in range(4):
        await tried(root, "write", 0, b"x")
        await tried(root, "read", 0, 512)
        if number == 1:
            await add(first, action="lost-write")
    await first.close()
    root = await opened(graph, replay=str(path))
    for number in range(4):
        for _ in range(3 - number):  # more of them, and then fewer
            await tried(root, "read", 0, 512)
        await tried(root, "write", 0, b"x")
    found = (await shown(graph))["replay"]
    assert found == {"filename": str(path), "decisions": 2, "recorded": 2}


async def test_a_length_that_a_change_made_up_is_there_in_time(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = Graph()
    root = await opened(first, record=str(path))
    await add(first, action="wrap", advertised=4 * LENGTH, id="fake")
    await tried(root, "write", 3 * LENGTH, b"x")
    await fault(first).remove_rule(FaultRuleRemove(id="fake"))
    await first.close()
    root = await opened(graph, replay=str(path))
    assert root.length == 4 * LENGTH
    await write(root, 3 * LENGTH, b"x")
    await read(root, 0, 512)
    assert root.length == LENGTH
    assert "diverged" not in (await shown(graph))["replay"]


def rules_of_any_kind() -> st.SearchStrategy[Json]:
    def of(action: str, **members: st.SearchStrategy[Any]) -> st.SearchStrategy[Json]:
        chosen = {
            "probability": st.sampled_from([0.1, 0.5, 0.9]),
            "every": st.integers(1, 4),
            "nth": st.integers(1, 9),
            "times": st.integers(1, 4),
            "state": st.integers(1, 2),
            "offset": st.integers(0, LENGTH),
        }
        return st.fixed_dictionaries({"action": st.just(action), **members}, optional=chosen)

    return st.one_of(
        of("error"),
        of("set-state", **{"set-state": st.integers(1, 2)}),
        of("short-read", fill=st.sampled_from(["zeroes", "random"])),
        of("torn-write", pattern=st.sampled_from(["prefix", "suffix", "interleaved", "random"])),
        of("lost-write"),
        of("lying-flush"),
        of("misdirect"),
        of("duplicate", delta=st.sampled_from([-512, 4096])),
        of("bit-flip", operations=st.sampled_from([["read"], ["write"], ["write-zeroes"]])),
        of("latent", operations=st.sampled_from([["read"], ["write"]])),
        of("disk-full", **{"after-bytes": st.integers(0, LENGTH)}),
        st.just({"action": "bit-flip", "at-rest": True, "count": 5}),
    )


requests = st.tuples(
    st.sampled_from(["read", "write", "write-zeroes", "discard", "flush"]),
    st.integers(0, LENGTH - 4096),
    st.integers(1, 4096),
)
changes = st.one_of(
    st.tuples(st.just("add"), rules_of_any_kind()),
    st.tuples(st.just("remove"), st.integers(0, 5)),
    st.tuples(st.just("heal"), st.integers(0, LENGTH)),
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(rules_of_any_kind(), max_size=4),
    st.lists(st.one_of(requests, requests, requests, changes), max_size=40),
    st.integers(0, 40),
    st.integers(-5, 5),
)
def test_whatever_was_recorded_is_repeated(rules: list[Json], steps: list[Any], late: int, seed: int) -> None:
    """*late*: after how many steps the recording begins."""

    async def make(graph: Graph, root: Root, steps: list[Any], *, changes: bool) -> None:
        for step in steps:
            if len(step) == 3:
                operation, offset, length = step
                data = bytes([length % 251]) * length if operation == "write" else length
                await tried(root, operation, offset, data)
            elif changes:
                what, value = step
                if what == "add":
                    members = {name.replace("-", "_"): member for name, member in value.items()}
                    await add(graph, **members)
                elif what == "heal":
                    await fault(graph).heal(FaultHeal(offset=value))
                elif rules := [rule["id"] for rule in (await shown(graph))["rules"]]:
                    await fault(graph).remove_rule(FaultRuleRemove(id=rules[value % len(rules)]))

    async def run(path: str) -> None:
        graph = Graph()
        begins = late < len(steps)
        root = await opened(graph, seed=seed, rules=rules, **({} if begins else {"record": path}))
        begin, already = OLD, 0
        if begins:
            await make(graph, root, steps[:late], changes=True)
            begin, already = bytes(memory_of(graph, "medium").data), len(ledger(graph))
            await fault(graph).record(FaultRecord(filename=path))
        await make(graph, root, steps[late if begins else 0 :], changes=True)
        expected = bytes(memory_of(graph, "medium").data)
        entries = [{**entry, "id": 0} for entry in ledger(graph)[already:]]
        await graph.close()

        graph = Graph()
        root = await opened(graph, replay=path)
        memory_of(graph, "medium").data[:] = begin
        await make(graph, root, steps[late if begins else 0 :], changes=False)
        replay = (await shown(graph))["replay"]
        assert "diverged" not in replay
        assert bytes(memory_of(graph, "medium").data) == expected
        # changes after the last request are not made: what they did at once is missing
        found = [{**entry, "id": 0} for entry in ledger(graph)]
        assert found == entries[: len(found)]
        assert {entry["operation"] for entry in entries[len(found) :]} <= {"none"}
        await graph.close()

    with tempfile.TemporaryDirectory() as directory:
        trio.run(run, f"{directory}/run")


# --- what is not the same --------------------------------------------------------------------------


async def recorded_run(path: Path, **options: Any) -> None:
    """Record six writes, every second of which is lost, but the last."""
    graph = Graph()
    root = await opened(graph, rules=[{"action": "lost-write", "every": 2}], record=str(path), **options)
    for offset in range(0, 6 * 512, 512):
        await tried(root, "write", offset, b"x" * 512)
    await graph.close()


def lost(number: int, offset: int) -> Json:
    what = {"kind": "decision", "rule": "1", "action": "lost-write", "operation": "write"}
    return {**what, "number": number, "offset": offset, "length": 512}


async def test_a_request_that_is_another_one_is_told_once(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "run"
    await recorded_run(path)
    differences = Differences(graph)
    root = await opened(graph, replay=str(path))
    for offset in (0, 512, 1024, 8192, 9216, 10240):
        await tried(root, "write", offset, b"x" * 512)
    (told,) = differences.told
    position = {"operation": "write", "number": 4}
    difference = {"position": position, "expected": lost(4, 1536), "found": lost(4, 8192)}
    assert told == {"node-name": "disk", **difference}
    replay = {"filename": str(path), "decisions": 1, "recorded": 3, "diverged": difference}
    assert (await shown(graph))["replay"] == replay


async def test_a_decision_that_is_missing_or_new_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run"
    await recorded_run(path)
    text = path.read_text().splitlines(keepends=True)
    kept = [line for line in text if '"number":4' not in line]
    path.write_text("".join(kept))
    for edited, told in ((kept, (None, lost(4, 1536))), ([*text[:-1], lost(5, 2048)], (lost(5, 2048), None))):
        path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in edited))
        graph = Graph()
        differences = Differences(graph)
        root = await opened(graph, replay=str(path))
        for offset in range(0, 6 * 512, 512):
            await tried(root, "write", offset, b"x" * 512)
        assert [(one["expected"], one["found"]) for one in differences.told] == [told]
        await graph.close()


async def test_a_change_that_cannot_be_made_is_told(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = Graph()
    root = await opened(first, record=str(path))
    await tried(root, "read", 0, 512)
    await add(first, action="error", id="one")
    await first.close()
    differences = Differences(graph)
    root = await opened(graph, replay=str(path))
    await add(graph, action="lost-write", id="one")
    await tried(root, "read", 0, 512)
    (told,) = differences.told
    assert told["expected"]["kind"] == "add"
    assert told["found"] == {"error": "Duplicate ID 'one' for fault rule"}


# --- files that are not right ----------------------------------------------------------------------

HEADER: Json = {
    "format": "fusebd fault recording",
    "version": 1,
    "seed": 0,
    "state": 1,
    "clock": 1.5,
    "rules": [{"action": "error", "id": "1"}],
}
DECISION = {
    "kind": "decision",
    "number": 1,
    "rule": "1",
    "action": "error",
    "operation": "read",
    "offset": 0,
    "length": 1,
}
ADD = {"kind": "add", "at": {"read": 3}, "clock": 2, "rule": {"action": "error", "id": "2"}}
DICE = "AAAA"


def text(*entries: Any) -> bytes:
    return b"".join(entry if isinstance(entry, bytes) else json.dumps(entry).encode() + b"\n" for entry in entries)


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"", 1, "the file is empty"),
        (b"\x7fELF\n", 1, "not JSON"),
        (b"\xff\xfe\n", 1, "not JSON"),
        (b"[" * 100000 + b"\n", 1, "not JSON"),
        (b"[]\n", 1, "not a JSON object"),
        (text({"id": 1, "kind": "fault", "node-name": "disk"}), 1, "not a recording of the fault driver"),
        (text({**HEADER, "version": 2}), 1, "not version 1 of the format"),
        (text(HEADER)[:-1], 1, "the line is cut off"),
        (text({**HEADER, "seed": "x"}), 1, "Invalid parameter type for 'seed', expected: integer"),
        (text({**HEADER, "more": 1}), 1, "Parameter 'more' is unexpected"),
        (text({**HEADER, "rules": [{"action": "error"}]}), 1, "Parameter 'rule.id' is missing"),
        (text({**HEADER, "rules": HEADER["rules"] * 2}), 1, "Duplicate ID '1' for fault rule"),
        (text({**HEADER, "rules": [{"action": "wrap", "id": "1", "capacity": LENGTH + 1}]}), 1, "The capacity"),
        (text({**HEADER, "progress": {"2": {}}}), 1, "No fault rule with id '2'"),
        (text({**HEADER, "progress": {"1": {"dice": DICE}}}), 1, "Parameter 'dice' expects"),
        (text({**HEADER, "progress": {"1": {"left": 5}}}), 1, "Parameter 'left' is not for rule '1'"),
        (text({**HEADER, "flipped-bits": [{"offset": LENGTH, "bit": 0, "rule": "1"}]}), 1, "flipped-bits"),
        (
            text({**HEADER, "bad-sectors": [{"offset": 0, "length": 2**62, "rule": "1", "errno": 5}]}),
            1,
            "bad-sectors",
        ),
        (text(HEADER, {}), 2, "Parameter 'kind' is none that there is"),
        (text(HEADER, {"kind": ["add"]}), 2, "Parameter 'kind' is none that there is"),
        (text(HEADER, DECISION, b"\n"), 3, "not JSON"),
        (text(HEADER, DECISION, text(DECISION)[:30]), 3, "the line is cut off"),
        (text(HEADER, {**DECISION, "number": 2}, DECISION), 3, "Parameter 'number' is smaller than before"),
        (text(HEADER, {**DECISION, "number": 0}), 2, "Parameter 'number' is not one of a request"),
        (text(HEADER, {**DECISION, "operation": "eat"}), 2, "Parameter 'operation' does not accept value 'eat'"),
        (text(HEADER, {**ADD, "at": {"eat": 1}}), 2, "Parameter 'at' does not accept value 'eat'"),
        (text(HEADER, {**ADD, "at": {"read": -1}}), 2, "Invalid parameter type"),
        (text(HEADER, {**ADD, "clock": 1}), 2, "Parameter 'clock' is before"),
        (text(HEADER, {**ADD, "rule": {"action": "error", "id": "1"}}), 2, "Duplicate ID '1'"),
        (text(HEADER, {**ADD, "rule": {"action": "error", "id": "2", "nth": 0}}), 2, "Parameter 'nth' expects"),
        (text(HEADER, ADD, {"kind": "remove", "at": {"read": 2}, "id": "1"}), 3, "Parameter 'at' is before"),
        (text(HEADER, {"kind": "remove", "at": {}, "id": "2"}), 2, "No fault rule with id '2'"),
        (text(HEADER, {"kind": "clock", "at": {}, "clock": 1e400}), 2, "not JSON"),
    ],
)
async def test_a_file_that_is_not_right_is_refused(
    graph: Graph, tmp_path: Path, content: bytes, line: int, message: str
) -> None:
    path = tmp_path / "run"
    path.write_bytes(content.replace(b"Infinity", b"1e400"))
    with pytest.raises(OptionError) as refused:
        await opened(graph, replay=str(path))
    assert str(refused.value).startswith(f"'{path}', line {line}: {message}")
    assert "\n" not in str(refused.value)
    assert graph.nodes == {}


async def test_a_recording_cut_or_changed_anywhere_is_taken_or_refused(tmp_path: Path) -> None:
    """Nothing else happens: no other error, no other node."""
    path = tmp_path / "run"
    await recorded_run(path)
    whole = path.read_bytes()
    rng = random.Random(5)
    for number in range(400):
        changed = bytearray(whole)
        if number < 60:
            del changed[rng.randrange(len(whole)) :]
        else:
            for _ in range(rng.randrange(1, 4)):
                changed[rng.randrange(len(whole))] = rng.choice(b'0123456789{}[]",:-eabz\n\0\xff')
        path.write_bytes(changed)
        graph = Graph()
        message = ""
        try:
            root = await opened(graph, replay=str(path))
            await tried(root, "write", 0, b"x" * 512)
        except OptionError as error:
            message = str(error)
        assert message.startswith(f"'{path}', line ") or graph.nodes.keys() == {"medium", "disk"}
        assert not message or graph.nodes == {}
        await graph.close()


@pytest.mark.parametrize("name", ["seed", "state", "rules"])
async def test_a_replay_has_no_options_of_a_run(graph: Graph, tmp_path: Path, name: str) -> None:
    await recorded_run(tmp_path / "run")
    given = {"seed": 0, "state": 1, "rules": []}[name]
    with pytest.raises(OptionError, match=f"^Parameters 'replay' and '{name}' exclude each other$"):
        await opened(graph, replay=str(tmp_path / "run"), **{name: given})


async def test_files_that_cannot_be_opened_are_said_to_be_so(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(OpenError, match=r"^Could not open '.*none': No such file or directory$"):
        await opened(graph, replay=str(tmp_path / "none"))
    with pytest.raises(OptionError, match=r"is not a regular file$"):
        await opened(graph, replay=str(tmp_path))
    with pytest.raises(OpenError, match=r"^Could not open '.*': Is a directory$"):
        await opened(graph, record=str(tmp_path))
    for name in ("record", "replay"):
        with pytest.raises(OpenError):
            await opened(graph, **{name: "a\0b"})
    assert graph.nodes == {}


async def test_a_replay_is_not_overwritten_by_its_own_recording(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "run"
    await recorded_run(path)
    before = path.read_bytes()
    with pytest.raises(OptionError, match=r"is what is replayed$"):
        await opened(graph, replay=str(path), record=str(path))
    assert path.read_bytes() == before


async def test_a_full_disk_ends_the_recording_and_nothing_else(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(OpenError, match=r"^Could not write '/dev/full': No space left on device$"):
        await opened(graph, record="/dev/full")
    root = await opened(graph, rules=[{"action": "lost-write"}], record=str(tmp_path / "run"))
    recorder = fault(graph)._recorder
    assert recorder is not None
    recorder._file.close()
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(recorder, "_file", full)
        await write(root, 0, b"x")
        assert (await shown(graph))["recording"]["error"] == "No space left on device"
        await write(root, 0, b"x")
        with pytest.raises(CommandError, match=r"No space left on device"):
            await fault(graph).end_record(FaultRecordEnd())
    assert len(ledger(graph)) == 2
    assert [record.levelname for record in caplog.records if "recording has ended" in record.message] == ["ERROR"]


# --- by QMP ----------------------------------------------------------------------------------------


async def test_a_node_is_recorded_from_a_command_on_until_another(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "run"
    await graph.blockdev_add({"driver": "test-memory", "node-name": "disk", "size": LENGTH})
    root = root_of(graph, "disk")
    async with talking(QmpServer(graph, lambda: None)) as talk:
        assert await talk.fail("fault-record-end", node_name="disk") == "Node 'disk' has no fault driver"
        message = await talk.fail("fault-record", node_name="disk", filename=str(tmp_path))
        assert message == f"Could not open '{tmp_path}': Is a directory"
        assert root.node.name == "disk"
        assert await talk.execute("fault-record", node_name="disk", filename=str(path)) == {"node-name": root.node.name}
        message = await talk.fail("fault-record", node_name="disk", filename=str(path))
        assert message == f"Node '{root.node.name}' is recorded to '{path}' already"
        await talk.execute("fault-rule-add", node_name="disk", rule={**ERROR, "times": 1})
        await tried(root, "read", 0, 512)
        found = await talk.execute("query-fault-rules", node_name="disk")
        assert found["recording"] == {"filename": str(path), "decisions": 1}
        await talk.execute("fault-record-end", node_name="disk")
        message = await talk.fail("fault-record-end", node_name="disk")
        assert message == f"Node '{root.node.name}' is not recorded"
        assert "recording" not in await talk.execute("query-fault-rules", node_name="disk")
    assert [line.get("kind") for line in lines(path)] == [None, "add", "decision"]
    await graph.detach_root(root)


async def test_requests_are_counted_only_for_recording_and_replay(graph: Graph, tmp_path: Path) -> None:
    await opened(graph)
    disk = fault(graph)
    flags = ("_reads", "_writes", "_zeroes", "_discards", "_flushes", "_statuses")

    def looked_at() -> list[bool]:
        listens = bool(disk.listens)
        return [*(getattr(disk, name) for name in flags), listens, disk._decide != disk.rules.decide]

    assert looked_at() == [False] * 8
    await disk.record(FaultRecord(filename=str(tmp_path / "run")))
    assert looked_at() == [True] * 8
    await disk.end_record(FaultRecordEnd())
    assert looked_at() == [False] * 8


async def test_a_replay_is_part_of_the_name_of_the_node(graph: Graph, tmp_path: Path) -> None:
    await recorded_run(tmp_path / "run")
    await opened(graph, replay=str(tmp_path / "run"))
    assert f'"replay": "{tmp_path}/run"' in node_filename(graph.find("disk"))
