"""blockdev-create and the jobs that it starts, compared with those of a qemu-storage-daemon."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from creations import create, daemon, finished, job_by_qemu, node
from images import check_image, info
from mounting import run
from qemuprograms import storage_daemon
from qmptalk import disk
from support import read, root_of, write

from fusebd.block.jobs import Jobs
from fusebd.errors import CommandError

Json = Any
M = 1 << 20
UMASK = os.umask(0)
os.umask(UMASK)

#: options of qcow2 beside the file, and those of another node that they refer to
IMAGES: dict[str, dict[str, Json]] = {
    "default": {"size": 64 * M},
    "empty": {"size": 0},
    "small-clusters": {"size": 3 * M + 512, "cluster-size": 512},
    "large-clusters": {"size": 100 * M, "cluster-size": 2 * M},
    "version-2": {"size": 8 * M, "version": "v2"},
    "lazy-refcounts": {"size": 8 * M, "lazy-refcounts": True},
    "narrow-refcounts": {"size": 8 * M, "refcount-bits": 1, "cluster-size": 4096},
    "wide-refcounts": {"size": 8 * M, "refcount-bits": 64, "cluster-size": 1024},
    "zstd": {"size": 8 * M, "compression-type": "zstd"},
    "backed": {"size": 8 * M, "backing-file": "base.img"},
    "backed-by-format": {"size": 8 * M, "backing-file": "base.img", "backing-fmt": "raw"},
    "backed-small": {"size": 8 * M, "backing-file": "b" * 300, "backing-fmt": "qcow2", "cluster-size": 512},
    "metadata": {"size": 3 * M, "preallocation": "metadata", "cluster-size": 4096},
    "huge": {"size": 64 << 40},
    "data-file": {"size": 8 * M, "data-file": "other"},
    "data-file-raw": {"size": 8 * M, "data-file": "other", "data-file-raw": True},
}
REFUSED: dict[str, dict[str, Json]] = {
    "odd-size": {"size": 1},
    "lazy-v2": {"size": M, "version": "v2", "lazy-refcounts": True},
    "cluster-size": {"size": M, "cluster-size": 3},
    "cluster-too-large": {"size": M, "cluster-size": 4 * M},
    "format-alone": {"size": M, "backing-fmt": "raw"},
    "preallocated-backed": {"size": M, "preallocation": "full", "backing-file": "b"},
    "refcount-bits": {"size": M, "refcount-bits": 3},
    "refcount-negative": {"size": M, "refcount-bits": -1},
    "refcount-v2": {"size": M, "refcount-bits": 8, "version": "v2"},
    "raw-alone": {"size": M, "data-file-raw": True},
    "raw-backed": {"size": M, "data-file": "other", "data-file-raw": True, "backing-file": "b"},
    "data-file-v2": {"size": M, "data-file": "other", "version": "v2"},
    "zstd-v2": {"size": M, "version": "v2", "compression-type": "zstd"},
    "subclusters-v2": {"size": M, "version": "v2", "extended-l2": True},
    "subclusters-small": {"size": M, "cluster-size": 8192, "extended-l2": True},
    "too-large": {"size": 1 << 62},
    "negative": {"size": -512},
    "name-too-long": {"size": M, "backing-file": "b" * 1024, "backing-fmt": "raw"},
    "name-no-room": {"size": M, "cluster-size": 512, "backing-file": "b" * 420, "backing-fmt": "raw"},
    "no-such-node": {"size": M, "file": "nowhere"},
    "no-such-file": {"size": M, "file": {"driver": "file", "filename": "nowhere"}},
    "no-such-version": {"size": M, "version": "v4"},
    "no-such-format": {"size": M, "backing-file": "b", "backing-fmt": "nope"},
    "no-size": {},
}


async def both(directory: Path, given: dict[str, Json]) -> tuple[tuple[str | None, bytes, bytes], ...]:
    """Errors, image and data file of QEMU's and of our making, in the same place."""
    image, other = directory / "image", directory / "other"
    options = {"driver": "qcow2", "file": "image", **given}

    def result(error: str | None) -> tuple[str | None, bytes, bytes]:
        made = error, image.read_bytes(), other.read_bytes()
        os.truncate(image, 0)
        os.truncate(other, 0)
        return made

    image.touch()
    other.touch()
    with storage_daemon() as monitor:
        monitor("blockdev-add", node(image))
        monitor("blockdev-add", node(other, "other"))
        theirs = job_by_qemu(monitor, "blockdev-create", options=options)
    expected = result(theirs)
    async with daemon() as (graph, talk):
        await graph.blockdev_add(node(image))
        await graph.blockdev_add(node(other, "other"))
        answer = await talk.ask({"execute": "blockdev-create", "arguments": {"job-id": "making", "options": options}})
        ours = answer["error"]["desc"] if "error" in answer else (await finished(talk, "making")).get("error")
    return expected, result(ours)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", IMAGES)
async def test_an_image_has_the_bytes_that_qemu_gives_it(directory: Path, name: str) -> None:
    expected, made = await both(directory, IMAGES[name])
    assert made[0] is expected[0] is None
    assert made[1].rstrip(b"\0") == expected[1].rstrip(b"\0")  # an L1 table fills its clusters here
    assert made[2] == expected[2]


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_made_is_refused_in_qemus_words(directory: Path, name: str) -> None:
    expected, made = await both(directory, REFUSED[name])
    assert made[0] == expected[0] is not None


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
async def test_a_preallocated_image_has_a_place_for_each_cluster(directory: Path, preallocation: str) -> None:
    path = directory / "image"
    path.touch()
    async with daemon() as (_, talk):
        await talk.execute("blockdev-add", **node(path))
        assert await create(talk, driver="qcow2", file="image", size=5 * M, preallocation=preallocation) is None
    check_image(path)
    assert path.stat().st_size >= 5 * M
    assert (path.stat().st_blocks * 512 >= 5 * M) == (preallocation != "metadata")
    extents = json.loads(run("qemu-img", "map", "--output=json", path))
    assert all("offset" in extent for extent in extents)


async def test_what_was_made_is_used(directory: Path) -> None:
    async with daemon() as (graph, talk):
        assert await create(talk, driver="file", filename="image", size=0) is None
        file = {"driver": "file", "filename": "image"}
        assert await create(talk, driver="qcow2", file=file, size=2 * M) is None
        await talk.execute("blockdev-add", driver="qcow2", node_name="disk", file=file)
        root = root_of(graph, "disk")
        await write(root, M, b"data" * 1000)
        assert await read(root, M, 4000) == b"data" * 1000
        await graph.detach_root(root)
    check_image(directory / "image")
    assert info(directory / "image")["virtual-size"] == 2 * M


async def test_a_file_is_made_with_its_length(directory: Path) -> None:
    path = directory / "made"
    path.write_bytes(b"something else")
    async with daemon() as (_, talk):
        for preallocation, size in (("off", 12345), ("falloc", 3 * M), ("full", M + 1)):
            options = {"filename": "made", "size": size, "preallocation": preallocation, "nocow": True}
            options["extent-size-hint"] = 65536
            assert await create(talk, driver="file", **options) is None
            assert path.read_bytes() == bytes(size)
            assert (path.stat().st_blocks > 0) == (preallocation != "off")
    assert path.stat().st_mode & 0o777 == 0o644 & ~UMASK


FILES_REFUSED: dict[str, dict[str, Json]] = {
    "no-directory": {"filename": "nowhere/made", "size": M},
    "metadata": {"filename": "made", "size": M, "preallocation": "metadata"},
    "hint": {"filename": "made", "size": M, "extent-size-hint": 1 << 33},
    "too-large": {"filename": "made", "size": 2**63},
    "no-size": {"filename": "made"},
    "directory": {"filename": ".", "size": M},
    "in-use": {"filename": "image", "size": M},
}


@pytest.mark.parametrize("name", FILES_REFUSED)
async def test_a_file_that_cannot_be_made_is_refused_in_qemus_words(directory: Path, name: str) -> None:
    image = directory / "image"
    run("qemu-img", "create", "-f", "qcow2", image, "1M")
    before = image.read_bytes()
    with storage_daemon() as monitor:
        monitor("blockdev-add", disk(image))
        expected = job_by_qemu(monitor, "blockdev-create", options={"driver": "file", **FILES_REFUSED[name]})
    async with daemon() as (_, talk):
        await talk.execute("blockdev-add", **disk(image))
        arguments = {"job-id": "making", "options": {"driver": "file", **FILES_REFUSED[name]}}
        answer = await talk.ask({"execute": "blockdev-create", "arguments": arguments})
        made = answer["error"]["desc"] if "error" in answer else (await finished(talk, "making")).get("error")
    assert made == expected
    assert made is not None
    assert image.read_bytes() == before


async def test_an_image_is_not_made_where_one_is_in_use(directory: Path) -> None:
    async with daemon() as (_, talk):
        assert await create(talk, driver="file", filename="image", size=0) is None
        await talk.execute("blockdev-add", **node(directory / "image"))
        assert await create(talk, driver="qcow2", file="image", size=M) is None
        await talk.execute("blockdev-add", driver="qcow2", node_name="user", file="image")
        refused = await create(talk, driver="qcow2", file="image", size=M)
        assert refused.startswith("Permission conflict on node 'image': permissions 'write, resize' are both required")
        await talk.execute("blockdev-del", node_name="user")
        await talk.execute("blockdev-del", node_name="image")


async def test_other_drivers_make_nothing() -> None:
    async with daemon() as (_, talk):
        for driver in ("raw", "null-co", "host_device"):
            options = {"driver": driver}
            message = await talk.fail("blockdev-create", job_id="making", options=options)
            assert message == "Driver does not support blockdev-create"
        options = {"driver": "blurb"}
        message = await talk.fail("blockdev-create", job_id="making", options=options)
        assert message == "Parameter 'driver' does not accept value 'blurb'"
        assert await talk.fail("blockdev-create", job_id="making", options={}) == (
            "Parameter 'options.driver' is missing"
        )
        assert await talk.execute("query-jobs") == []


# --- jobs ----------------------------------------------------------------------------------------

SCRIPT: tuple[tuple[str, Json], ...] = (
    ("blockdev-create", {"job-id": "a", "options": {"driver": "file", "filename": "a", "size": M}}),
    *((f"job-{verb}", {"id": "a"}) for verb in ("cancel", "complete", "finalize", "pause", "resume")),
    ("blockdev-create", {"job-id": "a", "options": {"driver": "file", "filename": "b", "size": M}}),
    ("blockdev-create", {"job-id": "b", "options": {"driver": "file", "filename": "nowhere/b", "size": M}}),
    ("blockdev-create", {"job-id": "bad id", "options": {"driver": "file", "filename": "b", "size": M}}),
    ("blockdev-create", {"job-id": "", "options": {"driver": "file", "filename": "b", "size": M}}),
    ("query-jobs", {}),
    ("job-dismiss", {"id": "a"}),
    ("job-dismiss", {"id": "a"}),
    ("query-jobs", {}),
    ("job-dismiss", {"id": "b"}),
)


async def test_jobs_answer_and_report_as_qemus_do(directory: Path) -> None:
    def settled(jobs: Json) -> bool:
        return all(job["status"] == "concluded" for job in jobs)

    expected = []
    with storage_daemon() as monitor:
        for command, arguments in SCRIPT:
            expected.append(monitor.ask({"execute": command, "arguments": arguments}))
            while not settled(monitor("query-jobs")):
                pass
        events = [event["data"] for event in monitor.events]
    answers = []
    async with daemon() as (_, talk):
        for command, arguments in SCRIPT:
            answers.append(await talk.ask({"execute": command, "arguments": arguments}))
            while not settled(await talk.execute("query-jobs")):
                await trio.sleep(0.01)
        assert [event["data"] for event in talk.events] == events
    assert answers == expected


async def test_a_job_is_cancelled_while_it_runs() -> None:
    events: list[tuple[str, Json]] = []
    async with trio.open_nursery() as nursery:
        jobs = Jobs(nursery, lambda name, data: events.append((name, data["status"])))
        jobs.start("slow", "create", trio.sleep_forever)
        jobs.apply("slow", "pause")
        with pytest.raises(CommandError, match=r"^Job is already paused$"):
            jobs.apply("slow", "pause")
        jobs.apply("slow", "resume")
        with pytest.raises(CommandError, match=r"^Job 'slow' in state 'running' cannot accept command verb 'dismiss'$"):
            jobs.apply("slow", "dismiss")
        await trio.testing.wait_all_tasks_blocked()
        jobs.apply("slow", "cancel")
    (job,) = jobs.query()
    assert (job["status"], job["error"]) == ("concluded", "Operation canceled")
    jobs.dismiss_all()
    assert [status for _, status in events] == ["created", "running", "aborting", "concluded", "null"]
    assert jobs.query() == []
