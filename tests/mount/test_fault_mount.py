"""The fault filter below programs that nobody here wrote, steered from the shell while they have its file open."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, file_system, fusebd, loop_device, raw, refusal, run

LENGTH = 16 << 20
SECTOR = 512

Mounting = Callable[..., Mount]

on_devfuse = pytest.mark.parametrize("transport", ["devfuse"])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(LENGTH))
    return path


def add(mounted: Mount, **members: Any) -> None:
    """Add a rule for ``disk``; ``_`` in names stands for ``-``."""
    rule = {name.replace("_", "-"): value for name, value in members.items()}
    mounted.qmp("fault-rule-add", {"node-name": "disk", "rule": rule})


def faults(mounted: Mount, *, action: str | None = None) -> list[dict[str, Any]]:
    """The faults that the ledger has."""
    entries = mounted.qmp("query-ledger")
    return [entry for entry in entries if entry["kind"] == "fault" and action in (None, entry["action"])]


def errors(mounted: Mount) -> list[dict[str, Any]]:
    """What the ledger has of errors that clients got."""
    return [entry for entry in mounted.qmp("query-ledger") if entry["kind"] == "error"]


def bad_sectors(mounted: Mount) -> list[int]:
    """The numbers of the bad sectors of ``disk``."""
    return [
        number
        for run_ in mounted.qmp("query-fault-rules", {"node-name": "disk"})["bad-sectors"]
        for number in range(run_["offset"] // SECTOR, (run_["offset"] + run_["length"]) // SECTOR)
    ]


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def errno_of(request: Callable[[], object]) -> int:
    """What *request* fails with, 0 if it does not."""
    try:
        request()
    except OSError as error:
        return error.errno or 0
    return 0


def test_a_rule_comes_and_goes_under_an_open_file(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    with opened(mounted / "disk") as descriptor:

        def tried() -> int:
            return errno_of(lambda: os.pwrite(descriptor, b"x" * 4096, 8192))

        assert tried() == 0
        where = ("fault", "add", str(mounted.point), "disk")
        assert fusebd(*where, "action=error", "errno=EROFS", "operations=write,flush", "offset=8k") == "1\n"
        assert tried() == 30
        assert os.pread(descriptor, 4096, 8192) == b"x" * 4096
        assert errno_of(lambda: os.pwrite(descriptor, b"x", 8191)) == 0
        fusebd("fault", "remove", mounted.point, "disk", "1")
        assert tried() == 0
        fusebd("fault", "remove", mounted.point, "disk", "--all")
        assert tried() == 0
        assert refusal("fault", "list", mounted.point, "disk") == "Node 'disk' has no fault driver"
    assert [entry["errno"] for entry in faults(mounted)] == [30]
    mounted.umount()


def test_badblocks_and_ddrescue_find_the_sectors_that_the_list_has(
    mount: Mounting, tmp_path: Path, image: Path
) -> None:
    mounted = mount({"driver": "fault", "node-name": "disk", "file": raw("below", image), "seed": 5})
    add(mounted, action="latent", at_rest=True, count=25)
    # and some that go bad only now
    add(mounted, action="latent", every=400, times=3)
    run("dd", f"if={mounted / 'disk'}", "of=/dev/null", "bs=4k", "conv=noerror")
    listed = bad_sectors(mounted)
    assert len(listed) == 28
    found = run("badblocks", "-b", str(SECTOR), mounted / "disk")
    assert [int(line) for line in found.split()] == listed
    run("ddrescue", "-q", mounted / "disk", tmp_path / "rescued", tmp_path / "map")
    lines = [line.split() for line in (tmp_path / "map").read_text().splitlines() if line.startswith("0x")][1:]
    rescued = [
        number
        for position, size, status in lines
        if status == "-"
        for number in range(int(position, 16) // SECTOR, (int(position, 16) + int(size, 16)) // SECTOR)
    ]
    assert rescued == listed
    # writing repairs them, and only them
    for number in listed:
        data = image.read_bytes()[number * SECTOR : (number + 1) * SECTOR]
        with opened(mounted / "disk") as descriptor:
            os.pwrite(descriptor, data, number * SECTOR)
    assert bad_sectors(mounted) == []
    assert (mounted / "disk").read_bytes() == image.read_bytes()
    mounted.umount()


def test_the_errors_of_dd_are_those_of_the_ledger(mount: Mounting, tmp_path: Path, image: Path) -> None:
    rules = [
        {"action": "latent", "at-rest": True, "count": 12},
        {"action": "error", "operations": ["read"], "every": 50},
    ]
    mounted = mount({"driver": "fault", "node-name": "disk", "file": raw("below", image), "rules": rules})
    trace = tmp_path / "trace"
    run(
        *("strace", "-o", trace, "-e", "trace=read", "-P", mounted / "disk"),
        *("dd", f"if={mounted / 'disk'}", "of=/dev/null", "bs=64k", "conv=noerror,sync"),
    )  # fmt: skip
    seen = [line for line in trace.read_text().splitlines() if "= -1 EIO" in line]
    failed = [entry for entry in faults(mounted) if entry.get("errno") == 5 and entry["operation"] == "read"]
    assert len(seen) == len(failed) == len(errors(mounted)) > 12
    assert [entry["offset"] for entry in failed] == [entry["offset"] for entry in errors(mounted)]
    mounted.umount()


def test_the_kernel_reports_the_sectors_that_the_ledger_has(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    add(mounted, action="latent", at_rest=True, sector=2048, sectors=2, count=2)
    with loop_device(mounted / "disk") as device:
        for sector, status in ((2047, 0), (2048, 1), (2049, 1), (2050, 0)):
            read = ["dd", f"if={device}", "of=/dev/null", "bs=512", "count=1", "iflag=direct", f"skip={sector}"]
            assert ("Input/output error" in run(*read, expect=(status,))) is bool(status)
    failed = {entry["offset"] // SECTOR for entry in faults(mounted, action="latent") if "errno" in entry}
    assert failed == {2048, 2049}
    mounted.umount()


#: percentiles of delays, in seconds: large beside what a busy machine adds
TABLE = {50: 0.02, 75: 0.04, 90: 0.08, 97: 0.16, 100: 0.2}


def test_latencies_that_fio_sees_have_the_distribution_asked_for(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    points = [{"percentile": percentile, "seconds": seconds} for percentile, seconds in TABLE.items()]
    add(mounted, action="delay", distribution="percentiles", percentiles=points, operations=["read"])
    output = run(
        *("fio", "--name=reads", f"--filename={mounted / 'disk'}", "--rw=randread", "--bs=4k", "--direct=1"),
        *("--ioengine=psync", "--thread", "--numjobs=16", "--group_reporting", f"--size={LENGTH}"),
        *("--number_ios=60", "--allow_file_create=0", "--randseed=3", "--output-format=json"),
        *("--percentile_list=25:50:75:90:97",),
        cwd=image.parent,
    )  # fmt: skip
    job = json.loads(output[output.index("{") :])["jobs"][0]["read"]
    assert job["total_ios"] == 960 == len(faults(mounted))
    seen = {float(percentile): ns / 1e9 for percentile, ns in job["clat_ns"]["percentile"].items()}
    for percentile, seconds in {**TABLE, 25: TABLE[50]}.items():
        if percentile < 100:
            assert seconds * 0.8 <= seen[percentile] <= seconds * 1.5 + 0.03, (percentile, seen)
    # what was drawn is in the ledger
    drawn = sorted(entry["seconds"] for entry in faults(mounted))
    for percentile, seconds in list(TABLE.items())[:-1]:
        assert drawn[int(960 * percentile / 100)] == pytest.approx(seconds, rel=0.25)
    mounted.umount()


def test_a_program_hangs_until_it_is_released(mount: Mounting, image: Path, transport: str) -> None:
    mounted = mount(raw("disk", image))
    fusebd("fault", "add", mounted.point, "disk", "action=hang", "operations=read", "id=stuck")
    reader = subprocess.Popen(["dd", f"if={mounted / 'disk'}", "of=/dev/null", "bs=4k", "count=1", "status=none"])
    while not (held := mounted.qmp("query-fault-rules", {"node-name": "disk"})["held"]):
        assert reader.poll() is None
        time.sleep(0.01)
    assert [(entry["operation"], entry["length"]) for entry in held] == [("read", 4096)]
    assert held[0]["pid"] == (reader.pid if transport == "devfuse" else 0)
    listing = fusebd("fault", "list", mounted.point, "disk").splitlines()
    assert listing[1] == "rule stuck: hang operations=read: hit by 1 of 1 requests, active"
    assert re.fullmatch(
        r"held: request 1, read of 4096 bytes at 0( for process \d+)?, [\d.]+ s, rule stuck", listing[2]
    )
    assert reader.poll() is None
    assert fusebd("fault", "release", mounted.point, "disk", "id=stuck") == "released 1\n"
    assert reader.wait(60) == 0
    mounted.umount()


def test_a_mount_with_a_program_that_hangs_can_be_given_up(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    add(mounted, action="hang", operations=["read"])
    reader = subprocess.Popen(
        ["dd", f"if={mounted / 'disk'}", "of=/dev/null", "bs=4k", "count=1"], stderr=subprocess.DEVNULL
    )
    while not mounted.qmp("query-fault-rules", {"node-name": "disk"})["held"]:
        time.sleep(0.01)
    mounted.hang_up()
    fusebd("umount", "--force", mounted.point)
    reader.wait(60)  # with an error, or with what was read in the last moment
    mounted.wait_end()


@on_devfuse
def test_faults_may_be_for_one_process_alone(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    with opened(mounted / "disk") as descriptor:
        add(mounted, action="error", pid=os.getpid(), operations=["read"])
        assert errno_of(lambda: os.pread(descriptor, 512, 0)) == 5
        run("dd", f"if={mounted / 'disk'}", "of=/dev/null", "bs=4k", "count=4")
        mounted.qmp("fault-rule-remove", {"node-name": "disk", "id": "1"})
        assert errno_of(lambda: os.pread(descriptor, 512, 0)) == 0
        add(mounted, action="error", uid=12345)
        assert errno_of(lambda: os.pread(descriptor, 512, 0)) == 0
        add(mounted, action="error", uid=os.getuid(), operations=["read"])
        assert errno_of(lambda: os.pread(descriptor, 512, 0)) == 5
    mounted.umount()


def test_flipped_bits_are_seen_from_outside_and_healed(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    add(mounted, action="bit-flip", at_rest=True, count=40)
    listed = mounted.qmp("query-fault-rules", {"node-name": "disk"})["flipped-bits"]
    expected = bytearray(image.read_bytes())
    for flipped in listed:
        expected[flipped["offset"]] ^= 1 << flipped["bit"]
    assert (mounted / "disk").read_bytes() == expected
    compared = run("cmp", "-l", image, mounted / "disk", expect=(1,))
    assert len(compared.splitlines()) == len({flipped["offset"] for flipped in listed})
    assert fusebd("fault", "heal", mounted.point, "disk", "offset=0", "length=8M").startswith("bits ")
    assert fusebd("fault", "heal", mounted.point, "disk").endswith(", sectors 0\n")
    run("cmp", image, mounted / "disk")
    mounted.umount()


FLIPS = 30


def test_btrfs_finds_and_heals_the_bits_that_the_ledger_has(mount: Mounting, tmp_path: Path) -> None:
    images = [tmp_path / "one.raw", tmp_path / "other.raw"]
    for image in images:
        image.write_bytes(b"")
        os.truncate(image, 200 << 20)
    mounted = mount(*(raw(image.stem, image) for image in images))
    content = random.Random(2).randbytes(20 << 20)
    with loop_device(mounted / "one") as one, loop_device(mounted / "other") as other:
        run("mkfs.btrfs", "-q", "-f", "-d", "raid1", "-m", "raid1", one, other)
        run("btrfs", "device", "scan", one, other)
        with file_system(one, tmp_path / "fs") as top:
            (top / "file").write_bytes(content)
        disk = images[1].read_bytes()
        for number in random.Random(3).sample(range(len(content) // 4096), FLIPS):
            place = disk.index(content[number * 4096 : (number + 1) * 4096])
            rule = {"action": "bit-flip", "at-rest": True, "offset": place, "length": 4096}
            mounted.qmp("fault-rule-add", {"node-name": "other", "rule": rule})
        with file_system(one, tmp_path / "fs") as top:
            scrubbed = run("btrfs", "scrub", "start", "-B", "-R", top, expect=(0, 3))
            counted = {name: int(count) for name, count in re.findall(r"(\w+_errors): (\d+)", scrubbed)}
            assert (counted["csum_errors"], counted["corrected_errors"]) == (FLIPS, FLIPS)
            assert "csum_errors: 0" in run("btrfs", "scrub", "start", "-B", "-R", top)
            assert (top / "file").read_bytes() == content
    assert sum(len(entry["bits"]) for entry in faults(mounted, action="bit-flip")) == FLIPS
    assert mounted.qmp("query-fault-rules", {"node-name": "other"})["flipped-bits"] == []
    mounted.umount()


def test_the_end_of_a_disk_is_where_it_was_said_to_be(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    fusebd("fault", "add", mounted.point, "disk", "action=disk-full", "after-bytes=1000k")
    write = ["dd", "if=/dev/zero", f"of={mounted / 'disk'}", "bs=64k", "conv=notrunc"]
    assert "No space left on device" in run(*write, expect=(1,))
    before = random.Random(1).randbytes(LENGTH)
    mounted.umount()
    assert image.read_bytes() == bytes(1000 << 10) + before[1000 << 10 :]


def test_a_disk_that_has_less_than_it_says(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    add(mounted, action="wrap", capacity=4 << 20, advertised=64 << 20, id="fake")
    assert (mounted / "disk").stat().st_size == 64 << 20
    # each megabyte says which it is; what is left are the last four
    with opened(mounted / "disk") as descriptor:
        for number in range(64):
            os.pwrite(descriptor, bytes([number]) * (1 << 20), number << 20)
        assert {os.pread(descriptor, 1, number << 20)[0] for number in range(64)} == {60, 61, 62, 63}
    mounted.qmp("fault-rule-remove", {"node-name": "disk", "id": "fake"})
    assert (mounted / "disk").stat().st_size == LENGTH
    mounted.umount()
    assert image.read_bytes()[4 << 20 :] == random.Random(1).randbytes(LENGTH)[4 << 20 :]


SILENT = [
    {"action": "torn-write", "pattern": "random", "fill": "random", "probability": 0.05},
    {"action": "lost-write", "probability": 0.05},
    {"action": "misdirect", "operations": ["write"], "probability": 0.05, "unit": 4096},
    {"action": "duplicate", "probability": 0.05},
]
UUID = "7b1f1f0e-6a58-4f0c-8e0d-9f27a7c7d0f1"


def make_file_system(mounted: Mount, directory: Path) -> None:
    """The same requests each time: a file system is made, and files are put into it."""
    source = directory / "source"
    source.write_bytes(random.Random(7).randbytes(1 << 20))
    environment = {**os.environ, "E2FSPROGS_FAKE_TIME": "1700000000"}
    disk = mounted / "disk"
    options = f"hash_seed={UUID},lazy_itable_init=0,nodiscard"
    # both read what they wrote, and may notice: how they end is not the point
    run("mke2fs", "-q", "-F", "-t", "ext4", "-U", UUID, "-E", options, disk, env=environment, expect=(0, 1))
    commands = directory / "commands"
    commands.write_text("".join(f"write {source} file{number}\n" for number in range(5)))
    run("debugfs", "-w", "-f", commands, disk, env=environment, expect=(0, 1))


def test_the_same_seed_twice_gives_the_same_image_and_the_same_ledger(mount: Mounting, tmp_path: Path) -> None:
    seen = []
    for number, seed in enumerate((11, 11, 12)):
        path, ledger = tmp_path / f"{number}.raw", tmp_path / f"{number}.ledger"
        path.write_bytes(bytes(LENGTH))
        below = {"driver": "file", "filename": str(path)}
        faulty = {"driver": "fault", "node-name": "disk", "file": below, "seed": seed, "rules": SILENT}
        mounted = mount(faulty, name=f"mnt{number}")
        mounted.qmp("ledger-open", {"filename": str(ledger), "time": False})
        make_file_system(mounted, tmp_path)
        mounted.umount()
        seen.append((hashlib.sha256(path.read_bytes()).hexdigest(), ledger.read_text()))
    assert seen[0] == seen[1]
    assert len(seen[0][1].splitlines()) > 20
    assert seen[0][0] != seen[2][0]
    assert seen[0][1] != seen[2][1]


def test_a_structure_is_hit_by_its_name(mount: Mounting, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"")
    os.truncate(path, 64 << 20)
    run("mkfs.ext4", "-q", path)
    mounted = mount(raw("disk", path))
    where = ("fault", "add", str(mounted.point), "disk", "action=error", "errno=EIO")
    assert refusal(*where, "target=ext4:nonsense").startswith("ext4 has no target 'nonsense'")
    assert refusal("fault", "add", f"unix:{tmp_path}/none", "disk", "action=error", "target=ext4:journal") == (
        "Parameter 'target' needs a mount point to look in"
    )
    with loop_device(mounted / "disk") as device, file_system(device, tmp_path / "fs") as top:
        (top / "before").write_bytes(b"x" * 5000)
        os.sync()
        fusebd(*where, "target=ext4:journal", "operations=write")
        (top / "after").write_bytes(b"x" * 5000)
        with opened(top, os.O_RDONLY) as descriptor:
            assert errno_of(lambda: os.fsync(descriptor)) != 0
        failed = faults(mounted)
        assert failed
        fusebd("fault", "remove", mounted.point, "disk", "1")
    # debugfs says, too, where inode 8, the journal, is: nothing else was hit
    block = int(re.findall(r"Block size: *(\d+)", run("dumpe2fs", "-h", path))[0])
    found = re.findall(r"\(\d+(?:-\d+)?\):(\d+)(?:-(\d+))?", run("debugfs", "-R", "stat <8>", path))
    journal = [(int(first) * block, (int(last or first) + 1) * block) for first, last in found]
    for entry in failed:
        assert any(start <= entry["offset"] < end for start, end in journal), (entry, journal)
    mounted.umount()


@on_devfuse
def test_a_mistake_on_the_command_line_is_one_line(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    add = ("fault", "add", mounted.point, "disk")
    said = {
        ("action=error", "errno=EWHAT"): "Parameter 'errno' does not accept value 'EWHAT'",
        ("action=error", "operations=read,eat"): "Parameter 'null' does not accept value 'eat'",
        ("errno=EIO",): "Parameter 'rule.action' is missing",
        ("{",): "JSON parse error, premature EOI",
        ("action",): "Expected '=' after parameter 'action'",
    }
    for words, message in said.items():
        assert refusal(*add, *words) == message
    assert refusal("fault", "list", mounted.point, "none") == "Cannot find device='' nor node-name='none'"
    hint = "name the rules to remove, or say --all (see fusebd fault remove --help)"
    assert refusal("fault", "remove", mounted.point, "disk") == hint
    assert refusal("fault", "remove", mounted.point, "disk", "1", "--all") == hint
    assert mounted.qmp("query-ledger") == []
    mounted.umount()
