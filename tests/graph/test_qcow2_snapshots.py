"""Internal snapshots of qcow2 images made, deleted, applied and read, with QEMU's programs as the judges."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from images import after_power_cut, check_image, content, create, info, io, patch, u16, u32, u64
from mounting import run
from qmptalk import disk, monitor, talking
from support import READ_WRITE, read, recorder_of, root_of, write

from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.errors import BlockIOError
from fusebd.qmp.server import QmpServer

CREATE, DELETE, APPLY = (f"blockdev-snapshot-{verb}internal-sync" for verb in ("", "delete-", "apply-"))
K = 1024
Json = Any
LONG = bool(os.environ.get("FUSEBD_LONG"))

IMAGES: dict[str, dict[str, Any]] = {
    "small": {"cluster_size": 512},
    "version-2": {"cluster_size": 1024, "compat": "0.10"},
    "wide-refcounts": {"cluster_size": 512, "refcount_bits": 64},
    "narrow-refcounts": {"cluster_size": 4096, "refcount_bits": 4},
    "backed": {"cluster_size": 4096, "backed": True},
    "compressed": {"cluster_size": 4096, "compressed": True},
    "subclusters": {"cluster_size": "16k", "extended_l2": "on", "backed": True},
    "default": {},
}


def image(directory: Path, name: str, size: str = "160k") -> Path:
    """The image of a name in IMAGES, with data in it."""
    options = dict(IMAGES[name])
    backed, compressed = (options.pop(word, False) for word in ("backed", "compressed"))
    path, backing = directory / f"{name}.qcow2", directory / "backing"
    backing.write_bytes(random.Random(0).randbytes(100 * K))
    create(path, size, backing=backing if backed else None, backing_format="raw", **options)
    if compressed:
        io(path, *(f"write -c -P {number + 1} {number * 8}k 4k" for number in range(8)))
    io(path, "write -P 200 3k 20k", "write -P 201 90k 30k")
    return path


def of_snapshot(path: Path, name: str) -> bytes:
    """What the snapshot *name* contains, by qemu-img."""
    copy = path.with_name("of-snapshot")
    run("qemu-img", "convert", "-l", f"snapshot.name={name}", "-O", "raw", path, copy)
    return copy.read_bytes()


async def whole(graph: Graph, name: str = "disk") -> bytes:
    root = root_of(graph, name, Perm.CONSISTENT_READ)
    try:
        return await read(root, 0, root.length)
    finally:
        await graph.detach_root(root)


@pytest.mark.parametrize("name", IMAGES)
async def test_snapshots_are_made_changed_below_read_applied_and_deleted(tmp_path: Path, name: str) -> None:
    path = image(tmp_path, name)
    rng = random.Random(name)
    states: dict[str, bytes] = {}
    async with monitor(path, discard="unmap") as (graph, talk):
        for number in range(3):
            await talk.execute(CREATE, device="disk", name=f"state{number}")
            states[f"state{number}"] = await whole(graph)
            root = root_of(graph, "disk", READ_WRITE)
            for _ in range(12):
                offset = rng.randrange(160 * K // 512) * 512
                await write(root, offset, rng.randbytes(min(rng.choice([512, 5 * K]), 160 * K - offset)))
            await root.pdiscard(64 * K, 16 * K)
            await graph.detach_root(root)
        last = await whole(graph)
        shown = {}
        for number, state in enumerate(states):
            await talk.execute(
                "blockdev-add",
                **{
                    "driver": "internal-snapshot",
                    "node-name": f"s{number}",
                    "image": "disk",
                    "snapshot-name": state,
                    "read-only": True,
                },
            )
            shown[state] = await whole(graph, f"s{number}")
            await talk.execute("blockdev-del", node_name=f"s{number}")
        assert shown == states
        await talk.execute(DELETE, device="disk", name="state1")
        assert await whole(graph) == last
    check_image(path)
    assert content(path) == last
    assert [entry["name"] for entry in info(path)["snapshots"]] == ["state0", "state2"]
    for kept in ("state0", "state2"):
        assert of_snapshot(path, kept) == states[kept]
    async with monitor(path) as (graph, talk):
        await talk.execute(APPLY, device="disk", name="state0")
        assert await whole(graph) == states["state0"]
        root = root_of(graph, "disk", READ_WRITE)
        await write(root, 0, b"x" * 160 * K)
        await graph.detach_root(root)
        await talk.execute(DELETE, device="disk", id="3")
    check_image(path)
    assert content(path) == b"x" * 160 * K
    assert of_snapshot(path, "state0") == states["state0"]
    run("qemu-img", "snapshot", "-a", "state0", path)
    async with monitor(path) as (graph, talk):
        assert await whole(graph) == states["state0"]
        await talk.execute(DELETE, device="disk", name="state0")
    check_image(path)
    assert content(path) == states["state0"]
    assert "snapshots" not in info(path)


async def test_after_a_snapshot_is_deleted_clusters_are_written_in_place_again(tmp_path: Path) -> None:
    path = image(tmp_path, "default")
    async with monitor(path) as (graph, talk):
        await talk.execute(CREATE, device="disk", name="one")
        await talk.execute(DELETE, device="disk", name="one")
        root = root_of(graph, "disk", READ_WRITE)
        before = io(path, "map", options=("-r", "-U"))
        await write(root, 4 * K, b"x" * K)
        await root.flush()
        await graph.detach_root(root)
        assert io(path, "map", options=("-r", "-U")) == before
    check_image(path)


async def test_snapshots_of_qemu_img_and_ours_take_turns(tmp_path: Path) -> None:
    path = image(tmp_path, "small")
    for number in range(4):
        state = content(path)
        if number % 2:
            run("qemu-img", "snapshot", "-c", f"n{number}", path)
        else:
            async with monitor(path) as (_, talk):
                await talk.execute(CREATE, device="disk", name=f"n{number}")
        assert of_snapshot(path, f"n{number}") == state
        io(path, f"write -P {number + 1} {number * 7}k 11k")
        check_image(path)
    async with monitor(path) as (_, talk):
        await talk.execute(DELETE, device="disk", name="n1")
    run("qemu-img", "snapshot", "-d", "n0", path)
    check_image(path)
    assert [entry["id"] for entry in info(path)["snapshots"]] == ["3", "4"]


async def test_a_snapshot_of_another_length_is_applied_with_it(tmp_path: Path) -> None:
    path = image(tmp_path, "default")
    async with monitor(path) as (graph, talk):
        await talk.execute(CREATE, device="disk", name="short")
        short = await whole(graph)
        await talk.execute("block_resize", node_name="disk", size=4 << 30)
        root = root_of(graph, "disk", READ_WRITE)
        await write(root, 3 << 30, b"x" * K)
        await graph.detach_root(root)
        await talk.execute(CREATE, device="disk", name="long")
        await talk.execute(APPLY, device="disk", name="short")
        assert await whole(graph) == short
        await talk.execute(APPLY, device="disk", name="long")
        assert graph.find("disk").driver.length == 4 << 30
        root = root_of(graph, "disk", READ_WRITE)
        assert await read(root, 3 << 30, K) == b"x" * K
        await graph.detach_root(root)
    check_image(path)
    assert info(path)["virtual-size"] == 4 << 30
    run("qemu-img", "snapshot", "-a", "short", path)
    assert content(path) == short
    check_image(path)


async def test_what_others_keep_in_the_table_stays_byte_for_byte(tmp_path: Path) -> None:
    path = image(tmp_path, "default")
    run("qemu-img", "snapshot", "-c", "one", path)
    table = int.from_bytes(path.read_bytes()[64:72], "big")
    entry = bytearray(path.read_bytes()[table : table + 4096])
    size = int.from_bytes(entry[36:40], "big")
    name = b"n\xff\xfe"
    made = (
        entry[:14] + u16(len(name)) + entry[16:36] + u32(size + 8) + entry[40 : 40 + size] + b"unknown!" + b"1" + name
    )
    patch(path, (table, bytes(made)))
    async with monitor(path) as (_, talk):
        await talk.execute(CREATE, device="disk", name="two")
    check_image(path)
    table = int.from_bytes(path.read_bytes()[64:72], "big")
    assert path.read_bytes()[table : table + len(made)] == made


async def test_snapshots_are_reported(tmp_path: Path) -> None:
    path = image(tmp_path, "default")
    async with monitor(path) as (_, talk):
        await talk.execute(CREATE, device="disk", name="one")
        nodes = await talk.execute("query-named-block-nodes", flat=True)
        listed = next(node for node in nodes if node["node-name"] == "disk")["image"]["snapshots"]
        assert listed == info(path)["snapshots"]
        made = listed[0]
        assert (made["id"], made["name"], made["vm-state-size"]) == ("1", "one", 0)
        assert (made["date-sec"], made["date-nsec"]) == (made["vm-clock-sec"], made["vm-clock-nsec"])
        assert await talk.execute(APPLY, device="disk", id="1") == made
        assert await talk.execute(DELETE, device="disk", id="1", name="one") == made


# The messages are those of qemu-storage-daemon 10.0.2, but for the ones on apply and on use.
REFUSED: list[tuple[str, dict[str, Json], str]] = [
    (CREATE, {"device": "disk", "name": "one"}, "Snapshot with name 'one' already exists on device 'disk'"),
    (CREATE, {"device": "disk", "name": ""}, "Name is empty"),
    (CREATE, {"device": "none", "name": "x"}, "Cannot find device='none' nor node-name='none'"),
    (
        CREATE,
        {"device": "plain", "name": "x"},
        "Block format 'raw' used by device 'plain' does not support internal snapshots",
    ),
    (CREATE, {"device": "below", "name": "x"}, "Need a root block node"),
    (CREATE, {"device": "read-only", "name": "x"}, "Device 'read-only' is read only"),
    (CREATE, {"device": "disk"}, "Parameter 'name' is missing"),
    (
        CREATE,
        {"device": "narrow", "name": "x"},
        "Failed to create snapshot 'x' on device 'narrow': Invalid argument",
    ),
    (DELETE, {"device": "disk"}, "Name or id must be provided"),
    (DELETE, {"device": "disk", "id": ""}, "Snapshot with id '' and name 'null' does not exist on device 'disk'"),
    (
        DELETE,
        {"device": "disk", "id": "1", "name": "x"},
        "Snapshot with id '1' and name 'x' does not exist on device 'disk'",
    ),
    (DELETE, {"device": "plain", "id": "1"}, "Failed to get a snapshot list: Operation not supported"),
    (DELETE, {"device": "disk", "name": "used"}, "Snapshot with id '2' and name 'used' is in use"),
    (APPLY, {"device": "disk"}, "Name or id must be provided"),
    (APPLY, {"device": "disk", "name": "x"}, "Snapshot with id 'null' and name 'x' does not exist on device 'disk'"),
    (
        "blockdev-add",
        {"driver": "internal-snapshot", "node-name": "x", "image": "disk", "snapshot-name": "x", "read-only": True},
        "Can't find snapshot",
    ),
    (
        "blockdev-add",
        {"driver": "internal-snapshot", "node-name": "x", "image": "plain", "snapshot-name": "x", "read-only": True},
        "Block format 'raw' does not support internal snapshots",
    ),
    (
        "blockdev-add",
        {"driver": "internal-snapshot", "node-name": "x", "image": "disk", "read-only": True},
        "Name or id must be provided",
    ),
    (
        "blockdev-add",
        {"driver": "internal-snapshot", "node-name": "x", "image": "disk", "snapshot-id": "1", "read-only": False},
        "Internal snapshots are read-only",
    ),
]


async def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    path = image(tmp_path, "default")
    other = create(tmp_path / "other", "1M")
    narrow = create(tmp_path / "narrow", "1M", refcount_bits=1)
    io(narrow, "write 0 640k")
    (tmp_path / "plain").write_bytes(bytes(K))
    async with monitor(path) as (graph, talk):
        plain = {"driver": "file", "filename": str(tmp_path / "plain")}
        await graph.blockdev_add({"driver": "raw", "node-name": "plain", "file": plain})
        await graph.blockdev_add({"driver": "file", "node-name": "below", "filename": str(other)})
        await graph.blockdev_add({"driver": "qcow2", "node-name": "read-only", "file": "below", "read-only": True})
        await graph.blockdev_add(disk(narrow, **{"node-name": "narrow"}))
        await talk.execute(CREATE, device="disk", name="one")
        await talk.execute(CREATE, device="disk", name="used")
        await graph.blockdev_add(
            {
                "driver": "internal-snapshot",
                "node-name": "reader",
                "image": "disk",
                "snapshot-name": "used",
                "read-only": True,
            }
        )
        answers = [
            await talk.fail(command, **{name.replace("-", "_"): value for name, value in arguments.items()})
            for command, arguments, _ in REFUSED
        ]
        assert answers == [message for _, _, message in REFUSED]
    for left in (path, narrow):
        check_image(left)


async def test_a_snapshot_is_not_applied_under_who_does_not_share_writing(tmp_path: Path) -> None:
    path = image(tmp_path, "default")
    async with monitor(path) as (graph, talk):
        await talk.execute(CREATE, device="disk", name="one")
        root = graph.attach_root(graph.find("disk"), "somebody", Perm.CONSISTENT_READ, Perm.CONSISTENT_READ)
        said = await talk.fail(APPLY, device="disk", name="one")
        assert said.startswith("Permission conflict on node 'disk': permissions 'write, resize' are both required by")
        await graph.detach_root(root)


def make(device: str, name: str) -> Json:
    return {"type": CREATE, "data": {"device": device, "name": name}}


async def test_transactions_are_done_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = image(tmp_path, "default")
    other = create(tmp_path / "other", "1M")
    async with monitor(path) as (graph, talk):
        await graph.blockdev_add(disk(other, **{"node-name": "other"}))
        await talk.execute("transaction", actions=[make("disk", "a"), make("other", "a"), make("disk", "b")])
        abort = {"type": "abort", "data": {}}
        said = await talk.fail("transaction", actions=[make("disk", "c"), make("other", "c"), abort])
        assert said == "Transaction aborted using Abort action"
        said = await talk.fail("transaction", actions=[make("disk", "c"), make("other", "a")])
        assert said == "Snapshot with name 'a' already exists on device 'other'"
        await talk.execute("transaction", actions=[])
        assert [s.name for s in graph.find("disk").driver.snapshot_store.entries] == ["a", "b"]  # type: ignore[union-attr]
    for left, names in ((path, ["a", "b"]), (other, ["a"])):
        check_image(left)
        assert [entry["name"] for entry in info(left)["snapshots"]] == names


# The messages are those of qemu-storage-daemon 10.0.2.
MALFORMED: list[tuple[Json, str]] = [
    ([5], "Invalid parameter type for 'actions[0]', expected: object"),
    ([{}], "Parameter 'actions[0].type' is missing"),
    ([{"type": 5}], "Invalid parameter type for 'actions[0].type', expected: string"),
    ([{"type": "x", "data": {}}], "Parameter 'type' does not accept value 'x'"),
    ([{"type": "abort"}], "Parameter 'actions[0].data' is missing"),
    ([{"type": "abort", "data": 5}], "Invalid parameter type for 'actions[0].data', expected: object"),
    ([{"type": CREATE, "data": {"device": "d"}}], "Parameter 'actions[0].data.name' is missing"),
    ([{"type": "abort", "data": {}, "x": 1}], "Parameter 'actions[0].x' is unexpected"),
    ([{"type": "abort", "data": {"y": 1}}], "Parameter 'actions[0].data.y' is unexpected"),
]


async def test_malformed_transactions_are_refused() -> None:
    async with talking(QmpServer(Graph(), lambda: None)) as talk:
        for actions, message in MALFORMED:
            assert await talk.fail("transaction", actions=actions) == message
        said = await talk.fail(
            "transaction", actions=[{"type": "abort", "data": {}}], properties={"completion-mode": "grouped"}
        )
        assert said == "Action 'abort' does not support transaction property completion-mode = grouped"


async def test_a_snapshot_is_read_while_the_disk_is_written_reopened_and_turned_back(tmp_path: Path) -> None:
    path = image(tmp_path, "small")
    async with monitor(path) as (graph, talk):
        await talk.execute(CREATE, device="disk", name="one")
        state = await whole(graph)
        await graph.blockdev_add(
            {"driver": "internal-snapshot", "node-name": "one", "image": "disk", "snapshot-id": "1", "read-only": True}
        )
        root, reader = root_of(graph, "disk", READ_WRITE), root_of(graph, "one", Perm.CONSISTENT_READ)
        for at in range(0, 160 * K, 20 * K):
            await write(root, at, b"y" * 20 * K)
            assert await read(reader, 0, 160 * K) == state
        await talk.execute(CREATE, device="disk", name="two")
        await talk.execute("blockdev-reopen", options=[disk(path, **{"cache-size": 0})])
        assert await read(reader, 0, 160 * K) == state
        assert "in use" in await talk.fail(DELETE, device="disk", name="one")
        await write(root, 0, b"z" * K)
        await talk.execute(APPLY, device="disk", name="two")
        assert await read(root, 0, 160 * K) == b"y" * 160 * K
        assert await read(reader, 0, 160 * K) == state
        await graph.detach_root(reader)
        await talk.execute("blockdev-del", node_name="one")
        await graph.detach_root(root)
        await talk.execute(DELETE, device="disk", name="one")
    check_image(path)


@pytest.mark.parametrize("table", ["unaligned", "too large", "past the end"])
async def test_malformed_l1_tables_of_snapshots_are_refused(tmp_path: Path, table: str) -> None:
    path = image(tmp_path, "default")
    run("qemu-img", "snapshot", "-c", "one", path)
    at = int.from_bytes(path.read_bytes()[64:72], "big")
    edit, message = {
        "unaligned": ((at, u64(0x10001)), "Snapshot L1 table offset invalid"),
        "too large": ((at + 8, u32(1 << 24)), "Snapshot L1 table too large"),
        "past the end": ((at, u64(1 << 40)), ""),
    }[table]
    patch(path, edit)
    async with monitor(path) as (graph, talk):
        state = await whole(graph)
        for command in (APPLY, DELETE):
            if message:
                assert await talk.fail(command, device="disk", name="one") == message
        assert await whole(graph) == state


async def whole_again(graph: Graph) -> bytes:
    """``whole``, where a failure that comes once may come just then."""
    try:
        return await whole(graph)
    except BlockIOError:
        return await whole(graph)


@pytest.mark.parametrize("request_name", ["preadv", "pwritev", "flush_to_disk"])
@pytest.mark.parametrize("name", ["small", "version-2", "compressed"])
async def test_after_any_request_has_failed_all_is_sound_and_work_goes_on(
    tmp_path: Path, name: str, request_name: str
) -> None:
    source = image(tmp_path, name)
    run("qemu-img", "snapshot", "-c", "before", source)
    io(source, "write -P 7 40k 10k")
    state, before = content(source), of_snapshot(source, "before")
    path = tmp_path / "disk"
    number, failed = 1, True
    while failed:
        shutil.copy(source, path)
        graph = Graph()
        below = {"driver": "file", "filename": str(path), "cache": {"no-flush": True}}
        recorder = await graph.blockdev_add({"driver": "test-recorder", "node-name": "recorder", "file": below})
        await graph.blockdev_add({"driver": "qcow2", "node-name": "disk", "file": "recorder"})
        carry_out, left = getattr(recorder.driver, request_name), number

        async def failing(*arguments: Any, carry_out: Any = carry_out) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise BlockIOError(28, node_name="recorder")
            await carry_out(*arguments)

        setattr(recorder.driver, request_name, failing)
        recorder.refresh_edges()  # which have the method already
        async with talking(QmpServer(graph, lambda: None)) as talk:
            expected, names = state, ["before"]
            for command, arguments in CHANGES:
                answer = await talk.ask({"execute": command, "arguments": {"device": "disk", **arguments}})
                store = graph.find("disk").driver.snapshot_store
                assert store is not None
                found = [entry.name for entry in store.entries]
                if "return" in answer:
                    names = names + ["new"] * (command == CREATE) if command != DELETE else names[1:]
                    expected = before if command == APPLY else expected
                    assert found == names
                elif command == APPLY:
                    expected = await whole_again(graph)
                    assert expected in (state, before)
                else:
                    names = found
                assert await whole_again(graph) == expected
            failed = left <= 0
            left = 0
            await talk.execute(CREATE, device="disk", name="after")
            root = root_of(graph, "disk", READ_WRITE)
            await write(root, 33 * K, b"z" * 20 * K)
            await graph.detach_root(root)
            last = await whole(graph)
        await graph.close()
        if IMAGES[name].get("compat") == "0.10":
            run("qemu-img", "check", "-q", "-r", "all", path, expect=(0, 2, 3))
        else:
            io(path, "read 0 512")  # has a dirty image repaired
        check_image(path, leaks=True)
        assert content(path) == last
        assert of_snapshot(path, "after") == expected
        if "before" in names:
            assert of_snapshot(path, "before") == before
        number += 1 if LONG else 1 + number // 5
    assert number > 4


EVENTS = ["cluster_alloc", "l2_load", "l2_update", "l1_update", "refblock_load", "refblock_update_part"]
CHANGES = ((CREATE, {"name": "new"}), (APPLY, {"name": "before"}), (DELETE, {"name": "before"}))


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("event", EVENTS)
async def test_after_a_failure_the_image_is_sound(tmp_path: Path, event: str, once: bool) -> None:
    path = image(tmp_path, "small")
    run("qemu-img", "snapshot", "-c", "before", path)
    io(path, "write -P 7 40k 10k")
    state, before = content(path), of_snapshot(path, "before")
    graph = Graph()
    rules = [{"event": event, "errno": 28, "once": once}]
    below = {"driver": "file", "filename": str(path)}
    await graph.blockdev_add({"driver": "blkdebug", "node-name": "faults", "image": below, "inject-error": rules})
    async with talking(QmpServer(graph, lambda: None)) as talk:
        await graph.blockdev_add({"driver": "qcow2", "node-name": "disk", "file": "faults"})
        for command, arguments in CHANGES:
            await talk.ask({"execute": command, "arguments": {"device": "disk", **arguments}})
            store = graph.find("disk").driver.snapshot_store
            assert store is not None
            if once:
                assert await whole(graph) in (state, before)
            names = [entry.name for entry in store.entries]
    await graph.close()
    io(path, "read 0 512")  # has a dirty image repaired
    check_image(path, leaks=True)
    assert content(path) in (state, before)
    assert [entry["name"] for entry in info(path).get("snapshots", [])] == names


@pytest.mark.parametrize("seed", range(40 if LONG else 2))
@pytest.mark.parametrize("name", IMAGES)
async def test_after_a_power_cut_all_snapshots_and_the_disk_are_right(tmp_path: Path, name: str, seed: int) -> None:
    path = image(tmp_path, name)
    before, state = path.read_bytes(), content(path)
    rng = random.Random(f"{name}{seed}")
    graph = Graph()
    file = {"driver": "file", "filename": str(path), "cache": {"no-flush": True}}
    await graph.blockdev_add({"driver": "test-recorder", "node-name": "recorder", "file": file})
    journal = recorder_of(graph, "recorder").journal
    await graph.blockdev_add({"driver": "qcow2", "node-name": "disk", "file": "recorder", "discard": "unmap"})
    states: dict[str, bytes] = {}
    #: (length of the journal, what the disk may be, names of snapshots that have to be there, those that may be)
    history: list[tuple[int, list[bytes], set[str], set[str]]] = [(0, [state], set(), set())]
    async with talking(QmpServer(graph, lambda: None)) as talk:
        for number in range(8):
            current = await whole(graph)
            names = history[-1][2] - {""} if number else set()
            verb = rng.choice([CREATE, CREATE, DELETE, APPLY]) if names else CREATE
            chosen = f"s{number}" if verb == CREATE else rng.choice(sorted(names))
            states.setdefault(chosen, current)
            after = states[chosen] if verb == APPLY else current
            changed = names | {chosen} if verb == CREATE else names - {chosen} if verb == DELETE else names
            history.append((len(journal), [current, after], names & changed, names | changed))
            await talk.execute(verb, device="disk", name=chosen)
            root = root_of(graph, "disk", READ_WRITE)
            history.append((len(journal), [after], changed, changed))
            for _ in range(3):
                offset = rng.randrange(150 * K // 512) * 512
                history.append((len(journal), [], changed, changed))
                await write(root, offset, rng.randbytes(rng.choice([512, 9 * K])))
            await root.flush()
            await graph.detach_root(root)
            history.append((len(journal), [await whole(graph)], changed, changed))
    await graph.close()
    for moment in rng.sample(range(len(journal) + 1), 12):
        path.write_bytes(after_power_cut(before, journal[:moment], rng))
        at = max(index for index, entry in enumerate(history) if entry[0] <= moment)
        _, contents, least, most = history[at]
        found = {entry["name"] for entry in info(path).get("snapshots", [])}
        assert least <= found <= most
        assert all(of_snapshot(path, known) == states[known] for known in found)
        assert not contents or content(path) in contents
        if IMAGES[name].get("compat") == "0.10":
            run("qemu-img", "check", "-q", "-r", "all", path, expect=(0, 2, 3))
        else:
            io(path, "read 0 512")  # has a dirty image repaired
        check_image(path, leaks=True)
        assert all(of_snapshot(path, known) == states[known] for known in found)


async def test_a_dirty_image_with_snapshots_is_repaired_when_it_is_opened(tmp_path: Path) -> None:
    path = image(tmp_path, "small")
    run("qemu-img", "snapshot", "-c", "one", path)
    state = of_snapshot(path, "one")
    before = path.read_bytes()
    graph = Graph()
    await graph.blockdev_add(
        {"driver": "test-recorder", "node-name": "recorder", "file": {"driver": "file", "filename": str(path)}}
    )
    await graph.blockdev_add({"driver": "qcow2", "node-name": "disk", "file": "recorder"})
    async with talking(QmpServer(graph, lambda: None)) as talk:
        await talk.execute(CREATE, device="disk", name="two")
    journal = recorder_of(graph, "recorder").journal
    await graph.close()
    flushes = [at for at, entry in enumerate(journal) if entry is None]
    for moment in flushes:
        path.write_bytes(after_power_cut(before, journal[: moment + 1], random.Random(0)))
        async with monitor(path):
            pass
        check_image(path)
        assert of_snapshot(path, "one") == state
