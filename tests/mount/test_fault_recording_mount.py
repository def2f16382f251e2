"""Runs of programs that nobody here wrote, recorded below them, and repeated."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, fusebd, raw, refusal, run

LENGTH = 16 << 20
UUID = "7b1f1f0e-6a58-4f0c-8e0d-9f27a7c7d0f1"

Mounting = Callable[..., Mount]

SILENT = [
    {"action": "torn-write", "pattern": "random", "fill": "random", "probability": 0.05},
    {"action": "lost-write", "probability": 0.05},
    {"action": "misdirect", "operations": ["write"], "probability": 0.05, "unit": 4096},
    {"action": "bit-flip", "operations": ["write"], "probability": 0.02},
]
FAILING = [{"action": "error", "errno": "EIO", "operations": ["write"], "probability": 0.2}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(random.Random(7).randbytes(1 << 20))
    return path


def make_file_system(disk: Path, source: Path, between: Callable[[], None] = lambda: None) -> str:
    """The same requests each time: a file system is made, *between* called, and files written; what is printed."""
    environment = {**os.environ, "E2FSPROGS_FAKE_TIME": "1700000000"}
    options = f"hash_seed={UUID},lazy_itable_init=0,nodiscard"
    made = run(
        *("mke2fs", "-q", "-F", "-t", "ext4", "-U", UUID, "-E", options, disk), env=environment, expect=(0, 1)
    )  # fmt: skip
    between()
    commands = source.with_name("commands")
    commands.write_text("".join(f"write {source} file{number}\n" for number in range(5)))
    written = run("debugfs", "-w", "-f", commands, disk, env=environment, expect=(0, 1))
    return (made + written).replace(str(disk), "disk")


def fresh(path: Path) -> Any:
    """The options of a file of zeroes."""
    path.write_bytes(bytes(LENGTH))
    return {"driver": "file", "filename": str(path)}


def replay_of(mounted: Mount) -> Any:
    return mounted.qmp("query-fault-rules", {"node-name": "disk"})["replay"]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_recorded_run_is_repeated_byte_by_byte(mount: Mounting, tmp_path: Path, source: Path) -> None:
    recording, seen = tmp_path / "recording", []
    for options in ({"seed": 11, "rules": SILENT, "record": str(recording)}, {"replay": str(recording)}):
        name = "replayed" if "replay" in options else "recorded"
        image, ledger = tmp_path / f"{name}.raw", tmp_path / f"{name}.ledger"
        mounted = mount({"driver": "fault", "node-name": "disk", "file": fresh(image), **options}, name=name)
        mounted.qmp("ledger-open", {"filename": str(ledger), "time": False})

        def change(mounted: Mount = mounted, name: str = name) -> None:
            if name == "recorded":
                rule = {"action": "duplicate", "unit": 4096, "every": 20}
                mounted.qmp("fault-rule-add", {"node-name": "disk", "rule": rule})
                mounted.qmp("fault-rule-remove", {"node-name": "disk", "id": "2"})

        printed = make_file_system(mounted / "disk", source, change)
        if name == "replayed":
            replay = replay_of(mounted)
            assert "diverged" not in replay
            assert replay["decisions"] == replay["recorded"] > 20
        mounted.umount()
        seen.append((digest(image), ledger.read_text(), printed))
    assert seen[0] == seen[1]
    kinds = {json.loads(line).get("kind") for line in recording.read_text().splitlines()}
    assert {"add", "remove", "decision"} <= kinds


def test_a_recorded_run_that_fails_fails_again(mount: Mounting, tmp_path: Path, source: Path) -> None:
    recording, seen = tmp_path / "recording", []
    mounted = mount(raw("disk", Path(fresh(tmp_path / "recorded.raw")["filename"])), name="recorded")
    fusebd("fault", "record", mounted.point, "disk", recording)
    for rule in FAILING:
        mounted.qmp("fault-rule-add", {"node-name": "disk", "rule": rule})
    seen.append(make_file_system(mounted / "disk", source))
    assert f"decisions to {recording}" in fusebd("fault", "list", mounted.point, "disk")
    mounted.kill()  # what was decided is in the file all the same
    assert "Input/output error" in seen[0]

    mounted = mount(raw("disk", Path(fresh(tmp_path / "replayed.raw")["filename"])), name="replayed")
    fusebd("fault", "replay", mounted.point, "disk", recording)
    seen.append(make_file_system(mounted / "disk", source))
    replay = replay_of(mounted)
    assert "diverged" not in replay
    assert replay["decisions"] == replay["recorded"] > 0
    mounted.umount()
    assert seen[0] == seen[1]
    assert digest(tmp_path / "recorded.raw") == digest(tmp_path / "replayed.raw")


def test_another_run_differs_and_the_shell_says_where(mount: Mounting, tmp_path: Path) -> None:
    recording = tmp_path / "recording"
    mounted = mount(raw("disk", Path(fresh(tmp_path / "disk.raw")["filename"])))
    where = (mounted.point, "disk")
    hint = "name the file to record to, or say --end (see fusebd fault record --help)"
    assert refusal("fault", "record", *where) == hint
    fusebd("fault", "record", *where, recording)
    fusebd("fault", "add", *where, "action=lost-write", "every=2")
    run("dd", "if=/dev/zero", f"of={mounted / 'disk'}", "bs=4k", "count=4", "conv=notrunc")
    fusebd("fault", "record", *where, "--end")
    fusebd("fault", "remove", *where, "--all")
    fusebd("fault", "replay", *where, recording)
    run("dd", "if=/dev/zero", f"of={mounted / 'disk'}", "bs=4k", "count=4", "seek=1", "conv=notrunc")
    listing = fusebd("fault", "list", *where)
    assert f"replayed: 0 of 2 decisions of {recording}, differs at write 2: expected {{" in listing
    events = mounted.log.read_text()
    assert "FAULT_REPLAY_DIVERGED" in events
    recording.write_text("{")
    fusebd("fault", "remove", *where, "--all")
    assert refusal("fault", "replay", *where, recording) == f"'{recording}', line 1: the line is cut off"
    mounted.umount()
