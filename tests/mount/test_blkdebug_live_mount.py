"""blkdebug steered while programs that nobody here wrote have its file open: rules, breakpoints, and their ledger."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mounting import FUSEBD, KernelLog, Mount, check_image, file_system, fusebd, loop_device, qcow2, raw, run

Json = Any
Mounting = Callable[..., Mount]

LENGTH = 1 << 20
BLOCK = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(LENGTH))
    return path


def debugged(image: Path, *names: str) -> list[Json]:
    """A blkdebug node ``debug`` over *image*, and raw nodes *names* over that."""
    below = {"driver": "file", "filename": str(image)}
    debug = {"driver": "blkdebug", "node-name": "debug", "image": below}
    return [debug, *({"driver": "raw", "node-name": name, "file": "debug"} for name in names)]


def command(mounted: Mount, name: str, **arguments: Json) -> Json:
    """What the command *name* to the node ``debug`` returns."""
    return mounted.qmp(name, {"node-name": "debug", **arguments})


class Writer:
    """A dd that writes a block of *byte* to block number *number* of *path*."""

    def __init__(self, path: Path, byte: bytes, number: int = 0) -> None:
        source = path.parent.parent / f"source-{byte.hex()}"
        source.write_bytes(byte * BLOCK)
        self.process = subprocess.Popen(
            ["dd", f"if={source}", f"of={path}", f"bs={BLOCK}", f"seek={number}", "conv=notrunc", "oflag=direct"],
            stderr=subprocess.DEVNULL,
        )

    def wait(self) -> int:
        """Its exit status."""
        return self.process.wait(60)


def stop_next(mounted: Mount, tag: str, start: Callable[[], Writer], event: str = "write_aio") -> tuple[Writer, Json]:
    """The writer that *start* starts, stopped as *tag*, and what is said about that."""
    command(mounted, "blkdebug-break", event=event, tag=tag)
    writer = start()
    return writer, command(mounted, "blkdebug-wait-break", tag=tag, timeout=60)


# --- breakpoints ---------------------------------------------------------------------------------


# pyfuse3 cannot have two writes to one file under way, but to two
@pytest.mark.parametrize(
    ("transport", "files"),
    [("devfuse", ("one", "one")), ("devfuse", ("one", "other")), ("pyfuse3", ("one", "other"))],
)
def test_two_writers_are_released_in_reverse_order_and_the_later_data_wins(
    mount: Mounting, image: Path, transport: str, files: tuple[str, str]
) -> None:
    mounted = mount(*debugged(image, "one", "other"))
    first, stopped = stop_next(mounted, "first", lambda: Writer(mounted / files[0], b"1", 5))
    second, _ = stop_next(mounted, "second", lambda: Writer(mounted / files[1], b"2", 5))
    held = command(mounted, "query-blkdebug")["held"]
    pids = (first.process.pid, second.process.pid) if transport == "devfuse" else (0, 0)
    where = {"event": "write_aio", "operation": "write", "offset": 5 * BLOCK, "length": BLOCK}
    assert [{name: value for name, value in entry.items() if name != "seconds"} for entry in held] == [
        {"request": 1, "tag": "first", "pid": pids[0], **where},
        {"request": 2, "tag": "second", "pid": pids[1], **where},
    ]
    assert held[0]["seconds"] >= held[1]["seconds"] > 0
    assert {name: value for name, value in held[0].items() if name != "seconds"} == stopped
    assert image.read_bytes() == bytes(LENGTH)
    command(mounted, "blkdebug-resume", tag="second")
    assert second.wait() == 0
    assert image.read_bytes()[5 * BLOCK : 6 * BLOCK] == b"2" * BLOCK
    assert first.process.poll() is None
    command(mounted, "blkdebug-resume", tag="first")
    assert first.wait() == 0
    told = [event["data"]["tag"] for event in mounted.qmp.events if event["event"] == "BLKDEBUG_BREAK"]
    assert told == ["first", "second"]
    mounted.umount()
    assert image.read_bytes() == bytes(5 * BLOCK) + b"1" * BLOCK + bytes(LENGTH - 6 * BLOCK)


def test_a_client_that_is_killed_while_it_is_stopped_ends_when_it_is_released(mount: Mounting, image: Path) -> None:
    mounted = mount(*debugged(image, "disk"))
    writer, _ = stop_next(mounted, "A", lambda: Writer(mounted / "disk", b"k"))
    writer.process.kill()
    # a disk does not forget a request because nobody waits for it any more
    time.sleep(0.2)
    assert writer.process.poll() is None
    assert [entry["tag"] for entry in command(mounted, "query-blkdebug")["held"]] == ["A"]
    command(mounted, "blkdebug-resume", tag="A")
    assert writer.wait() == -signal.SIGKILL
    assert command(mounted, "query-blkdebug")["held"] == []
    assert (mounted / "disk").read_bytes()[:BLOCK] == b"k" * BLOCK
    assert Writer(mounted / "disk", b"n", 1).wait() == 0
    mounted.umount()
    assert image.read_bytes()[: 2 * BLOCK] == b"k" * BLOCK + b"n" * BLOCK


def test_a_qmp_client_that_is_killed_while_it_waits_is_missed_by_nobody(mount: Mounting, image: Path) -> None:
    mounted = mount(*debugged(image, "disk"))
    command(mounted, "blkdebug-break", event="write_aio", tag="A")
    words = ["qmp", str(mounted.point), "blkdebug-wait-break", "node-name=disk", "tag=A"]
    waiting = subprocess.Popen([*FUSEBD, *words], stdout=subprocess.PIPE, text=True)
    killed = subprocess.Popen([*FUSEBD, *words], stdout=subprocess.PIPE, text=True)
    sockets = Path("/proc/net/unix")
    path = fusebd_socket(mounted)
    while sockets.read_text().count(path) < 4:  # the listening one, and three connections: these and our own
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    writer = Writer(mounted / "disk", b"w")
    said, _ = waiting.communicate(timeout=60)
    assert json.loads(said)["tag"] == "A"
    fusebd("qmp", mounted.point, "blkdebug-resume", "node-name=disk", "tag=A")
    assert writer.wait() == 0
    mounted.umount()


def fusebd_socket(mounted: Mount) -> str:
    return os.getxattr(mounted.point, "user.fusebd.qmp").decode().removeprefix("unix:")


@pytest.mark.parametrize("end", ["signal", "force", "quit"])
@pytest.mark.parametrize("event", ["write_aio", "cluster_free"])
def test_the_daemon_ends_though_a_request_is_stopped(
    mount: Mounting, tmp_path: Path, transport: str, end: str, event: str
) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(LENGTH))
    run("qemu-io", "-f", "qcow2", "-c", f"write -c -P 7 0 {LENGTH}", path)
    options = qcow2("disk", path)
    mounted = mount({**options, "file": {"driver": "blkdebug", "node-name": "debug", "image": options["file"]}})
    # where a compressed cluster is freed, the write is not to be interrupted
    writer, _ = stop_next(mounted, "A", lambda: Writer(mounted / "disk", b"e"), event)
    command(mounted, "blkdebug-break", event="flush_to_disk", tag="B")
    if end == "signal":
        os.kill(mounted.pid, signal.SIGTERM)
    elif end == "quit":
        mounted.qmp("quit")
    else:
        fusebd("umount", "--force", mounted.point)
    mounted.wait_end()
    assert writer.wait() == 0
    check_image(path)
    data = run("qemu-io", "-f", "qcow2", "-c", f"read -P 0x65 0 {BLOCK}", "-c", f"read -P 7 {BLOCK} 512", path)
    assert "Pattern verification failed" not in data


def test_a_node_that_a_request_is_stopped_on_gets_a_filter(mount: Mounting, image: Path) -> None:
    mounted = mount(*debugged(image, "disk"))
    writer, _ = stop_next(mounted, "A", lambda: Writer(mounted / "disk", b"f"))
    mounted.qmp("block-filter-insert", {"node-name": "disk", "filter": {"driver": "blkdebug"}})
    assert writer.wait() == 0
    assert command(mounted, "query-blkdebug")["held"] == []
    mounted.umount()


# --- rules ---------------------------------------------------------------------------------------


def test_rules_are_added_listed_and_removed_from_the_shell(mount: Mounting, image: Path) -> None:
    mounted = mount(*debugged(image, "disk"))
    rule = ["rule.inject-error.event=read_aio", "rule.inject-error.sector=8", "rule.inject-error.iotype=read"]
    read = ["dd", f"if={mounted / 'disk'}", "of=/dev/null", "bs=512", "count=1", "skip=8"]
    said = fusebd("qmp", mounted.point, "blkdebug-rule-add", "node-name=disk", "rule.id=bad", *rule)
    assert json.loads(said) == {"node-name": "debug", "id": "bad"}
    fusebd(
        *("qmp", mounted.point, "blkdebug-rule-add", "node-name=disk"),
        *("rule.set-state.event=write_aio", "rule.set-state.new_state=7"),
    )  # fmt: skip
    assert "Input/output error" in run(*read, expect=(1,))
    assert Writer(mounted / "disk", b"s").wait() == 0
    found = json.loads(fusebd("qmp", mounted.point, "query-blkdebug", "node-name=disk"))
    assert found["state"] == 7
    assert found["rules"] == [
        {
            "id": "bad",
            "hits": 1,
            "active": True,
            "inject-error": {"event": "read_aio", "sector": 8, "iotype": "read"},
        },
        {"id": "1", "hits": 1, "set-state": {"event": "write_aio", "new_state": 7}},
    ]
    fusebd("qmp", mounted.point, "blkdebug-rule-remove", "node-name=disk", "id=bad")
    run(*read)
    mounted.umount()


def entries(mounted: Mount, kind: str) -> list[Json]:
    """What the ledger has of *kind*: fault or error."""
    return [entry for entry in mounted.qmp("query-ledger") if entry["kind"] == kind]


def written(mounted: Mount) -> int:
    """How many writes to ``disk`` have succeeded."""
    nodes = mounted.qmp("query-blockstats", {"query-nodes": True})
    return next(int(node["stats"]["wr_operations"]) for node in nodes if node["node-name"] == "disk")


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    """Wait until *holds*, while *process* runs."""
    while not holds():
        assert process.poll() is None, "it has ended"
        time.sleep(0.02)


FIO_LENGTH = 32 << 20
BLOCKS = FIO_LENGTH // BLOCK


def test_fio_fails_on_an_open_file_only_while_a_rule_says_so(mount: Mounting, tmp_path: Path) -> None:
    """The filter comes and goes above the node that is open, and fio never notices but for its errors."""
    path = tmp_path / "disk.raw"
    path.write_bytes(b"\xee" * FIO_LENGTH)
    mounted = mount(raw("disk", path))
    trace, result = tmp_path / "trace", tmp_path / "result"
    fio = subprocess.Popen(
        [
            *("strace", "-f", "--seccomp-bpf", "-o", trace, "-e", "trace=openat", "-P", mounted / "disk"),
            *("fio", "--name=steered", f"--filename={mounted / 'disk'}", f"--size={FIO_LENGTH}", "--rw=randwrite"),
            *("--bs=4k", "--ioengine=libaio", "--direct=1", "--iodepth=8", "--rate_iops=2000", "--thread"),
            *("--allow_file_create=0", "--continue_on_error=all", "--verify=crc32c", "--do_verify=1", "--randseed=7"),
            *("--output-format=json", f"--output={result}"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    try:
        wait_until(lambda: written(mounted) > 300, fio)
        opened = len(trace.read_text().splitlines())
        debug = {"driver": "blkdebug", "node-name": "debug"}
        mounted.qmp("block-filter-insert", {"node-name": "disk", "filter": debug})
        count = written(mounted)
        wait_until(lambda: written(mounted) > count + 300, fio)
        assert mounted.qmp("query-ledger") == []
        rule = {"id": "fail", "inject-error": {"event": "none", "iotype": "write"}}
        began = time.time()
        mounted.qmp("blkdebug-rule-add", {"node-name": "disk", "rule": rule})
        wait_until(lambda: command(mounted, "query-blkdebug")["rules"][0]["hits"] > 300, fio)
        (listed,) = command(mounted, "query-blkdebug")["rules"]
        mounted.qmp("blkdebug-rule-remove", {"node-name": "disk", "id": "fail"})
        ended = time.time()
        count = written(mounted)
        wait_until(lambda: written(mounted) > count + 300, fio)
        mounted.qmp("block-filter-remove", {"node-name": "debug"})
        count = written(mounted)
        wait_until(lambda: written(mounted) > count + 300, fio)
        assert len(trace.read_text().splitlines()) == opened > 0
    finally:
        fio.wait(120)
    faults, errors = entries(mounted, "fault"), entries(mounted, "error")
    assert {entry["rule"] for entry in faults} == {"fail"}
    assert all(began <= entry["time"] <= ended for entry in faults)
    assert len(faults) == len(errors) >= listed["hits"] > 300
    (job,) = json.loads(result.read_text())["jobs"]
    assert (job["total_err"], job["error"]) == (len(errors), 5)
    # all others have been written, and read back by fio
    assert job["write"]["total_ios"] == BLOCKS
    assert job["read"]["total_ios"] == BLOCKS - len(errors)
    mounted.umount()
    data = path.read_bytes()
    untouched = {at for at in range(0, FIO_LENGTH, BLOCK) if data[at : at + BLOCK] == b"\xee" * BLOCK}
    assert untouched == {entry["offset"] for entry in faults}


def change_until_refused(top: Path) -> bool:
    """Whether the file system at *top* turns read-only when directories are made, and the journal has to have them."""
    for number in range(100):
        try:
            (top / str(number)).mkdir()
            run("sync", top, expect=(0, 1))
        except OSError as error:
            return error.errno == errno.EROFS
    return False


def test_a_journal_is_aborted_only_after_the_rule_was_added(mount: Mounting, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"")
    os.truncate(path, 64 << 20)
    mounted = mount(*debugged(path, "disk"))
    # of the kernel's log, what comes while the device is ours
    with loop_device(mounted / "disk") as device, closing(KernelLog()) as kernel_log:
        aborted = f"Aborting journal on device {os.path.basename(device)}"
        run("mkfs.ext4", "-q", "-b", "4096", device)
        with file_system(device, tmp_path / "fs") as top:
            (top / "before").write_bytes(b"before" * 1000)
            run("sync", "-f", top)
            assert not kernel_log.has(aborted)
            assert mounted.qmp("query-ledger") == []
            rule = {"id": "journal", "inject-error": {"event": "write_aio", "iotype": "write"}}
            command(mounted, "blkdebug-rule-add", rule=rule)
            assert change_until_refused(top)
            assert kernel_log.wait_for(aborted)
            (listed,) = command(mounted, "query-blkdebug")["rules"]
            command(mounted, "blkdebug-rule-remove", id="journal")
            faults = entries(mounted, "fault")
            assert (top / "before").read_bytes() == b"before" * 1000
        assert listed["hits"] == len(faults) == len(entries(mounted, "error")) > 0
        assert {(entry["rule"], entry["errno"]) for entry in faults} == {("journal", 5)}
        # the journal is sound, and so is what it brings back
        run("e2fsck", "-f", "-p", device, expect=(0, 1))
        run("e2fsck", "-f", "-n", device)
        with file_system(device, tmp_path / "fs") as top:
            assert (top / "before").read_bytes() == b"before" * 1000
    mounted.umount()
