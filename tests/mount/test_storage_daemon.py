"""``fusebd storage-daemon``: qemu-storage-daemon's command line and exports, each a file mounted over another."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mounting import FUSEBD, Qmp, check_image, loop_device, run

LENGTH = 4 << 20
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16


def _mounts(directory: Path) -> list[str]:
    """What is mounted in *directory*."""
    points = [line.split(" ")[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [point for point in points if Path(point).is_relative_to(directory)]


class StorageDaemon:
    """A running storage daemon, started with *words*; ``wait`` says how it ended."""

    def __init__(self, directory: Path, *words: str | Path) -> None:
        self.directory = directory
        self.pid_file = directory / "pid"
        self.process = subprocess.Popen(
            [*FUSEBD, "storage-daemon", *map(str, words), "--pidfile", str(self.pid_file)],
            cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait_ready(self) -> None:
        while not self.pid_file.exists() or not self.pid_file.read_text():
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)

    def wait(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send the signal *number*, unless it is 0; the exit status, and what was said on standard error."""
        if number:
            self.process.send_signal(number)
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said

    def sweep(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        for point in _mounts(self.directory):
            run("umount", "-l", point)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., StorageDaemon]]:
    """Starts a storage daemon in ``tmp_path`` and waits for its pid file."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs root and /dev/fuse")
    daemons: list[StorageDaemon] = []

    def start_daemon(*words: str | Path) -> StorageDaemon:
        daemons.append(StorageDaemon(tmp_path, *words))
        daemons[-1].wait_ready()
        return daemons[-1]

    yield start_daemon
    for daemon in daemons:
        daemon.sweep()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A raw image of LENGTH bytes, not zero."""
    path = tmp_path / "disk.raw"
    path.write_bytes(b"\x5a" * LENGTH)
    (tmp_path / "file").touch()
    return path


NODE = ["--blockdev", "file,node-name=disk,filename=disk.raw,discard=unmap"]
EXPORT = "fuse,id=e,node-name=disk,mountpoint=file"


def _refused(tmp_path: Path, *words: str) -> str:
    """What the daemon says that does not start with *words*; it leaves nothing behind."""
    done = subprocess.run(
        [*FUSEBD, "storage-daemon", *words, "--pidfile", str(tmp_path / "pid")],
        cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert not (tmp_path / "pid").exists()
    assert _mounts(tmp_path) == []
    assert done.stderr.startswith("fusebd: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("fusebd: ").rstrip("\n")


# --- exports -------------------------------------------------------------------------------------


def test_an_exported_node_is_read_and_written_in_place_of_the_file_below(
    start: Callable[..., StorageDaemon], disk: Path, tmp_path: Path
) -> None:
    daemon = start(*NODE, "--export", f"{EXPORT},writable=on")
    file = tmp_path / "file"
    assert file.stat().st_size == LENGTH
    assert file.read_bytes() == b"\x5a" * LENGTH
    with open(file, "r+b") as writing:
        writing.seek(1000)
        writing.write(b"hello")
    assert daemon.wait() == (0, "")
    assert disk.read_bytes()[995:1010] == b"\x5a" * 5 + b"hello" + b"\x5a" * 5
    assert file.read_bytes() == b""


def test_the_file_has_the_attributes_that_qemu_gives_it(
    start: Callable[..., StorageDaemon], disk: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").touch()
    daemon = start(
        *NODE, "--export", f"{EXPORT},writable=on",
        "--export", "fuse,id=e2,node-name=disk,mountpoint=other",
    )  # fmt: skip
    found = (tmp_path / "file").stat()
    assert stat.S_ISREG(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert (found.st_nlink, found.st_uid, found.st_blocks * 512) == (1, os.geteuid(), LENGTH)
    assert stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o400
    daemon.wait()


def test_a_read_only_export_refuses_to_be_written_and_resized(
    start: Callable[..., StorageDaemon], disk: Path, tmp_path: Path
) -> None:
    daemon = start(*NODE, "--export", EXPORT)
    with pytest.raises(PermissionError):
        os.open(tmp_path / "file", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.truncate(tmp_path / "file", 10)
    with pytest.raises(OSError, match="Read-only"):
        (tmp_path / "file").chmod(0o600)
    assert daemon.wait() == (0, "")
    assert disk.stat().st_size == LENGTH


def test_a_growable_export_becomes_longer_by_writes_past_its_end(
    start: Callable[..., StorageDaemon], disk: Path, tmp_path: Path
) -> None:
    daemon = start(*NODE, "--export", f"{EXPORT},writable=on,growable=on")
    with open(tmp_path / "file", "r+b") as file:
        file.seek(LENGTH + 5000)
        file.write(b"the end")
    assert (tmp_path / "file").stat().st_size == LENGTH + 5007
    daemon.wait()
    assert disk.read_bytes() == b"\x5a" * LENGTH + bytes(5000) + b"the end"


def test_writes_past_the_end_of_others_are_cut_off(
    start: Callable[..., StorageDaemon], disk: Path, tmp_path: Path
) -> None:
    daemon = start(*NODE, "--export", f"{EXPORT},writable=on")
    descriptor = os.open(tmp_path / "file", os.O_RDWR)
    assert os.pwrite(descriptor, b"abcd", LENGTH - 2) == 2
    with pytest.raises(OSError, match="No space"):
        os.pwrite(descriptor, b"abcd", LENGTH)
    os.close(descriptor)
    os.truncate(tmp_path / "file", LENGTH + 512)
    daemon.wait()
    assert disk.read_bytes()[LENGTH - 3 :] == b"\x5aab" + bytes(512)


def test_many_writers_past_the_end_keep_each_others_data(start: Callable[..., StorageDaemon], tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "disk.qcow2", "64k")
    (tmp_path / "file").touch()
    daemon = start(
        "--blockdev", "qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2",
        "--export", f"{EXPORT},writable=on,growable=on",
    )  # fmt: skip
    blocks = list(range(1024))
    random.Random(1).shuffle(blocks)

    def write(block: int) -> None:
        with open(tmp_path / "file", "r+b", buffering=0) as file:
            file.seek(block * 4096)
            assert file.write(block.to_bytes(4, "big") * 1024) == 4096

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, blocks))
    assert daemon.wait() == (0, "")
    check_image(tmp_path / "disk.qcow2")
    run("qemu-img", "convert", "-O", "raw", tmp_path / "disk.qcow2", tmp_path / "disk.raw")
    expected = b"".join(block.to_bytes(4, "big") * 1024 for block in range(1024))
    assert (tmp_path / "disk.raw").read_bytes() == expected


def test_fallocate_does_what_qemu_does(start: Callable[..., StorageDaemon], disk: Path, tmp_path: Path) -> None:
    from fusebd.drivers.file.syscalls import fallocate

    daemon = start(*NODE, "--export", f"{EXPORT},writable=on,growable=on")
    descriptor = os.open(tmp_path / "file", os.O_RDWR)
    fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, 65536, 65536)
    fallocate(descriptor, ZERO_RANGE, 1 << 20, 4096)
    fallocate(descriptor, ZERO_RANGE, LENGTH - 4096, 8192)
    fallocate(descriptor, 0, LENGTH + 4096, 4096)
    for mode, offset, code in [
        (0, 0, errno.EOPNOTSUPP),
        (PUNCH_HOLE, 0, errno.EOPNOTSUPP),  # the kernel's own answer
        (0x08, 0, errno.EOPNOTSUPP),
    ]:
        with pytest.raises(OSError, match=r".") as failure:
            fallocate(descriptor, mode, offset, 4096)
        assert failure.value.errno == code
    assert os.lseek(descriptor, 0, os.SEEK_HOLE) == 65536
    assert os.lseek(descriptor, 65536, os.SEEK_DATA) == 131072
    os.close(descriptor)
    daemon.wait()
    expected = bytearray(b"\x5a" * LENGTH + bytes(8192))
    expected[65536:131072] = bytes(65536)
    expected[1 << 20 : (1 << 20) + 4096] = bytes(4096)
    expected[LENGTH - 4096 : LENGTH] = bytes(4096)
    assert disk.read_bytes() == bytes(expected)
    assert disk.stat().st_blocks * 512 < LENGTH


def test_a_loop_device_discards_through_an_export(
    start: Callable[..., StorageDaemon], disk: Path, tmp_path: Path
) -> None:
    daemon = start(*NODE, "--export", f"{EXPORT},writable=on")
    with loop_device(tmp_path / "file") as device:
        run("blkdiscard", device)
    daemon.wait()
    assert disk.stat().st_blocks == 0
    assert disk.read_bytes() == bytes(LENGTH)


def test_a_writethrough_export_flushes_what_it_writes(start: Callable[..., StorageDaemon], tmp_path: Path) -> None:
    # written in place, so that nothing is flushed on the way
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=full", tmp_path / "disk.qcow2", "1M")
    (tmp_path / "file").touch()
    daemon = start(
        "--blockdev", "qcow2,node-name=disk,file.driver=blkdebug,file.image.driver=file,"
        "file.image.filename=disk.qcow2,file.inject-error.0.event=none,file.inject-error.0.iotype=flush,"
        "file.inject-error.0.once=on",
        "--export", f"{EXPORT},writable=on,writethrough=on",
    )  # fmt: skip
    descriptor = os.open(tmp_path / "file", os.O_RDWR)
    with pytest.raises(OSError, match="Input/output"):
        os.pwrite(descriptor, b"durable", 0)
    assert os.pwrite(descriptor, b"durable", 0) == 7
    os.close(descriptor)
    assert daemon.wait() == (0, "")


def test_an_export_ends_when_it_is_unmounted(start: Callable[..., StorageDaemon], disk: Path, tmp_path: Path) -> None:
    daemon = start(*NODE, "--export", EXPORT, *_listen(tmp_path))
    qmp = Qmp(str(tmp_path / "qmp"))
    run("umount", tmp_path / "file")
    while qmp("query-block-exports"):
        time.sleep(0.01)
    assert [event["data"] for event in qmp.events if event["event"] == "BLOCK_EXPORT_DELETED"] == [{"id": "e"}]
    qmp("blockdev-del", {"node-name": "disk"})
    qmp.close()
    assert daemon.wait() == (0, "")


def test_one_daemon_serves_many_exports(start: Callable[..., StorageDaemon], tmp_path: Path) -> None:
    words: list[str] = []
    for number in range(20):
        (tmp_path / f"{number}.raw").write_bytes(bytes([number]) * 8192)
        (tmp_path / f"{number}.file").touch()
        words += [
            "--blockdev", f"file,node-name=n{number},filename={number}.raw",
            "--export", f"fuse,id=e{number},node-name=n{number},mountpoint={number}.file,writable=on",
        ]  # fmt: skip
    daemon = start(*words)
    for number in range(20):
        assert (tmp_path / f"{number}.file").read_bytes() == bytes([number]) * 8192
    assert daemon.wait() == (0, "")
    assert _mounts(tmp_path) == []


# --- QMP -----------------------------------------------------------------------------------------


def _listen(tmp_path: Path) -> list[str]:
    return ["--chardev", f"socket,id=ch,path={tmp_path / 'qmp'},server=on,wait=off", "--monitor", "ch"]


def _error(qmp: Qmp, command: str, **arguments: Any) -> str:
    with pytest.raises(AssertionError) as failure:
        qmp(command, arguments)
    text: str = failure.value.args[0]["error"]["desc"]
    return text


def test_exports_come_and_go_over_qmp(start: Callable[..., StorageDaemon], disk: Path, tmp_path: Path) -> None:
    daemon = start(*NODE, *_listen(tmp_path))
    qmp = Qmp(str(tmp_path / "qmp"))
    export = {"type": "fuse", "id": "e", "node-name": "disk", "mountpoint": str(tmp_path / "file"), "writable": True}
    qmp("block-export-add", export)
    assert (tmp_path / "file").stat().st_size == LENGTH
    assert qmp("query-block-exports") == [
        {"id": "e", "type": "fuse", "node-name": "disk", "shutting-down": False},
    ]
    assert _error(qmp, "blockdev-del", **{"node-name": "disk"}) == "Node disk is in use"
    assert _error(qmp, "block-export-add", **export) == "Block export id 'e' is already in use"
    again = {**export, "id": "e2"}
    assert _error(qmp, "block-export-add", **again) == f"There already is a FUSE export on '{tmp_path / 'file'}'"
    assert _error(qmp, "block-export-del", id="other") == "Export 'other' is not found"
    qmp("block-export-del", {"id": "e"})
    assert (tmp_path / "file").stat().st_size == 0
    assert qmp.events[-1]["event"] == "BLOCK_EXPORT_DELETED"
    assert qmp.events[-1]["data"] == {"id": "e"}
    assert qmp("query-block-exports") == []
    qmp("blockdev-del", {"node-name": "disk"})
    qmp("quit")
    qmp.close()
    assert daemon.wait(0) == (0, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "1e"}, "Invalid block export id"),
        ({"node-name": "other"}, "Cannot find device='' nor node-name='other'"),
        ({"mountpoint": "none"}, "Failed to stat 'none': No such file or directory"),
        ({"mountpoint": "/"}, "'/' is not a regular file"),
        ({"iothread": "io"}, 'iothread "io" not found'),
        ({"type": "vduse"}, "Parameter 'type' does not accept value 'vduse'"),
        ({"growable": 1}, "Invalid parameter type for 'growable', expected: boolean"),
        ({"speed": 1}, "Parameter 'speed' is unexpected"),
    ],
)
def test_a_refused_export_leaves_its_node_alone(
    start: Callable[..., StorageDaemon], disk: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    daemon = start(*NODE, *_listen(tmp_path))
    qmp = Qmp(str(tmp_path / "qmp"))
    export = {"type": "fuse", "id": "e", "node-name": "disk", "mountpoint": str(tmp_path / "file")}
    assert _error(qmp, "block-export-add", **{**export, **change}) == message
    assert qmp("query-block-exports") == []
    qmp("blockdev-del", {"node-name": "disk"})
    qmp.close()
    assert daemon.wait() == (0, "")


def test_a_node_that_is_read_only_cannot_be_exported_writable(
    start: Callable[..., StorageDaemon], disk: Path, tmp_path: Path
) -> None:
    daemon = start("--blockdev", "file,node-name=disk,filename=disk.raw,read-only=on", *_listen(tmp_path))
    qmp = Qmp(str(tmp_path / "qmp"))
    export = {"type": "fuse", "id": "e", "node-name": "disk", "mountpoint": "file", "writable": True}
    assert _error(qmp, "block-export-add", **export) == "Cannot export read-only node as writable"
    qmp.close()
    daemon.wait()


# --- the process ---------------------------------------------------------------------------------


def test_the_process_keeps_its_pid_and_its_pid_file_while_it_runs(
    start: Callable[..., StorageDaemon], tmp_path: Path
) -> None:
    daemon = start()
    assert int(daemon.pid_file.read_text()) == daemon.process.pid
    with open(daemon.pid_file, "r+b") as file, pytest.raises(BlockingIOError):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert daemon.wait() == (0, "")
    assert not daemon.pid_file.exists()


def test_a_second_daemon_does_not_get_the_pid_file_of_the_first(
    start: Callable[..., StorageDaemon], tmp_path: Path
) -> None:
    daemon = start()
    pid = daemon.pid_file.read_text()
    done = subprocess.run(
        [*FUSEBD, "storage-daemon", "--pidfile", str(daemon.pid_file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "fusebd: cannot create PID file: Cannot lock pid file: Resource temporarily unavailable\n"
    assert daemon.pid_file.read_text() == pid
    daemon.wait()


def test_daemonize_returns_when_the_export_is_there(disk: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs root and /dev/fuse")
    pid_file = tmp_path / "pid"
    run(*FUSEBD, "storage-daemon", *NODE, "--export", EXPORT, "--daemonize", "--pidfile", pid_file, cwd=tmp_path)
    pid = int(pid_file.read_text())
    try:
        assert (tmp_path / "file").stat().st_size == LENGTH
    finally:
        os.kill(pid, signal.SIGTERM)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)
    assert not pid_file.exists()
    assert _mounts(tmp_path) == []


def test_daemonize_says_what_went_wrong(disk: Path, tmp_path: Path) -> None:
    said = _refused(tmp_path, "--daemonize", *NODE, "--export", "fuse,id=e,node-name=disk,mountpoint=none")
    assert said == "--export fuse,id=e,node-name=disk,mountpoint=none: Failed to stat 'none': No such file or directory"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_unmount_and_end_with_success(
    start: Callable[..., StorageDaemon], disk: Path, tmp_path: Path, number: int
) -> None:
    daemon = start(*NODE, "--export", EXPORT)
    assert daemon.wait(number) == (0, "")
    assert _mounts(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--zork"], "unrecognized option '--zork'"),
        (["stray"], "stray: Unexpected argument"),
        (["--blockdev"], "option '--blockdev' requires an argument"),
        (["--daemonize=1"], "option '--daemonize' doesn't allow an argument"),
        (
            ["--blockdev", "driver=foo,node-name=x"],
            "--blockdev driver=foo,node-name=x: Parameter 'driver' does not accept value 'foo'",
        ),
        (["--export", "fuse,id=e,node-name=x"], "--export fuse,id=e,node-name=x: Parameter 'mountpoint' is missing"),
        (["--monitor", "ch"], '--monitor ch: chardev "ch" not found'),
        (["--chardev", "stdio"], "--chardev stdio: chardev: no id specified"),
        (["--chardev", "pipe,id=a"], "--chardev pipe,id=a: 'pipe' is not a valid char driver name"),
        (["--chardev", "socket,id=a,path=x,zork=5"], "--chardev socket,id=a,path=x,zork=5: Invalid parameter 'zork'"),
        (
            ["--chardev", "socket,id=a,path=no/x"],
            "--chardev socket,id=a,path=no/x: Failed to connect to 'no/x': No such file or directory",
        ),
        (
            ["--chardev", "socket,id=a,path=no/x,server=on,wait=off"],
            "--chardev socket,id=a,path=no/x,server=on,wait=off: Failed to bind socket to no/x: "
            "No such file or directory",
        ),
        (
            ["--chardev", "socket,id=a,path=x,wait=off"],
            "--chardev socket,id=a,path=x,wait=off: 'wait' option is incompatible with socket in client connect mode",
        ),
        (
            ["--chardev", "socket,id=a,path=x,host=y"],
            "--chardev socket,id=a,path=x,host=y: None or one of 'path', 'fd' or 'host' option required.",
        ),
        (
            ["--chardev", "socket,id=a,host=127.0.0.1"],
            "--chardev socket,id=a,host=127.0.0.1: chardev: socket: no port given",
        ),
        (
            ["--chardev", "stdio,id=a", "--chardev", "stdio,id=b"],
            "--chardev stdio,id=b: cannot use stdio by multiple character devices",
        ),
        (
            ["--chardev", "stdio,id=a", "--monitor", "a", "--monitor", "a"],
            "--monitor a: chardev 'a' is already in use",
        ),
        (
            ["--chardev", "stdio,id=a", "--monitor", "a,mode=readline"],
            "--monitor a,mode=readline: Only QMP is supported",
        ),
        (["--daemonize", "--chardev", "stdio,id=a"], "--chardev stdio,id=a: cannot use stdio with -daemonize"),
        (["--object", "iothread"], "--object iothread: Parameter 'id' is missing"),
        (["--object", "foo,id=a"], "--object foo,id=a: Parameter 'qom-type' does not accept value 'foo'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_in_qemus_words(
    tmp_path: Path, words: list[str], message: str
) -> None:
    assert _refused(tmp_path, *words) == message


def test_options_are_carried_out_in_their_order(disk: Path, tmp_path: Path) -> None:
    said = _refused(tmp_path, "--export", EXPORT, *NODE)
    assert said == f"--export {EXPORT}: Cannot find device='' nor node-name='disk'"


def test_objects_are_there_for_the_options_behind_them(
    start: Callable[..., StorageDaemon], disk: Path, tmp_path: Path
) -> None:
    daemon = start(
        "--object", "iothread,id=io", "--object", '{"qom-type": "throttle-group", "id": "tg"}',
        "--object", "secret,id=s,data=password",
        "--blockdev", "throttle,node-name=disk,throttle-group=tg,file.driver=file,file.filename=disk.raw",
        "--export", f"{EXPORT},iothread=io",
    )  # fmt: skip
    assert (tmp_path / "file").stat().st_size == LENGTH
    daemon.wait()


# --- character devices ---------------------------------------------------------------------------


def test_a_monitor_on_standard_input_and_output(tmp_path: Path) -> None:
    requests = [{"execute": "qmp_capabilities"}, {"execute": "query-version", "id": 1}, {"execute": "quit"}]
    done = subprocess.run(
        [*FUSEBD, "storage-daemon", "--chardev", "stdio,id=ch", "--monitor", "chardev=ch,pretty=on"],
        input="".join(map(json.dumps, requests)), capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.splitlines()[:2] == ["{", '    "QMP": {']
    assert '    "id": 1' in done.stdout


def test_a_monitor_that_connects_to_a_socket(start: Callable[..., StorageDaemon], tmp_path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "qmp"))
    listening.listen()
    daemon = start("--chardev", f"socket,id=ch,path={tmp_path / 'qmp'}", "--monitor", "ch")
    listening.settimeout(60)
    connected, _ = listening.accept()
    with connected, connected.makefile("rwb") as file:
        assert b"QMP" in file.readline()
        file.write(b'{"execute": "qmp_capabilities"}{"execute": "quit"}')
        file.flush()
        assert b"return" in file.readline()
        assert b"SHUTDOWN" in file.readline()
    listening.close()
    assert daemon.wait(0) == (0, "")


def test_a_server_waits_for_its_client_before_it_goes_on(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs root and /dev/fuse")
    daemon = StorageDaemon(tmp_path, "--chardev", "socket,id=ch,path=qmp,server=on", "--monitor", "ch")
    try:
        while not (tmp_path / "qmp").exists():
            assert daemon.process.poll() is None, daemon.process.communicate()
            time.sleep(0.01)
        assert not daemon.pid_file.exists()
        first = Qmp(str(tmp_path / "qmp"))
        daemon.wait_ready()
        first.close()
        second = Qmp(str(tmp_path / "qmp"))
        second("quit")
        second.close()
        assert daemon.wait(0) == (0, "")
        assert not (tmp_path / "qmp").exists()
    finally:
        daemon.sweep()


def test_a_descriptor_that_is_no_socket_is_refused(tmp_path: Path) -> None:
    said = _refused(tmp_path, "--chardev", "socket,id=ch,fd=2")
    assert said == "--chardev socket,id=ch,fd=2: File descriptor '2' is not a socket"


def test_help_names_every_option(tmp_path: Path) -> None:
    said = run(*FUSEBD, "storage-daemon", "--help")
    for option in ("blockdev", "chardev", "daemonize", "export", "monitor", "object", "pidfile", "version", "help"):
        assert f"--{option}" in said
    assert "socket" in run(*FUSEBD, "storage-daemon", "--chardev", "help")
    assert "throttle-group" in run(*FUSEBD, "storage-daemon", "--object", "help")
    assert run(*FUSEBD, "storage-daemon", "--version").startswith("fusebd storage-daemon version ")
