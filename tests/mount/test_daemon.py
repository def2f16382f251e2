"""A daemon's life as its user sees it: the start and what it reports, the log, and every way in which it ends."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from mounting import (
    FUSEBD,
    Mount,
    Qmp,
    check_image,
    daemons_of,
    failing,
    fusebd,
    left_behind,
    mounts_below,
    qcow2,
    refusal,
    run,
)

from fusebd.runtime import Place, State

NULL = {"driver": "null-co", "node-name": "null", "size": 65536}
UNREADABLE = failing("disk", event="read_aio")
#: whatever was written, it cannot be flushed
UNFLUSHABLE = failing("disk", event="flush_to_disk")
on_devfuse = pytest.mark.parametrize("transport", ["devfuse"])


def state_of(point: Path) -> State:
    """What the daemon of *point* says about itself."""
    file = Place(str(point)).find()
    assert file is not None
    state = file.read()
    file.close()
    assert state is not None
    return state


def blockdev(value: Any) -> list[str]:
    return ["--blockdev", json.dumps(value)]


# --- the start -----------------------------------------------------------------------------------


def test_the_command_returns_when_the_mount_serves(scratch: Path, transport: str) -> None:
    point = scratch / "mnt"
    point.mkdir()
    output = fusebd("mount", "--transport", transport, *blockdev(NULL), point)
    assert output == ""
    assert os.listdir(point) == ["null"]
    assert mounts_below(scratch) == [str(point)]


@on_devfuse
def test_the_daemon_has_left_its_caller(mount: Callable[..., Mount], scratch: Path) -> None:
    mounted = mount()
    process = Path(f"/proc/{mounted.pid}")
    assert os.getsid(mounted.pid) == mounted.pid
    links = {name: os.readlink(process / "fd" / name) for name in ("0", "1", "2")}
    assert links == {"0": "/dev/null", "1": str(mounted.log), "2": str(mounted.log)}
    assert os.readlink(process / "cwd") == os.getcwd()


def test_the_daemon_keeps_no_descriptor_of_its_caller(scratch: Path) -> None:
    reading, writing = os.pipe()
    point = scratch / "mnt"
    point.mkdir()
    subprocess.run([*FUSEBD, "mount", str(point)], pass_fds=[writing], stdin=subprocess.DEVNULL, check=True)
    os.close(writing)
    assert os.read(reading, 1) == b""  # nobody has the other end any more
    os.close(reading)
    fusebd("umount", point)


def test_the_standard_descriptors_may_be_closed(scratch: Path) -> None:
    point = scratch / "mnt"
    point.mkdir()
    command = " ".join([*FUSEBD, "mount", str(point)])
    run("sh", "-c", f"{command} <&- >&- 2>&-")
    assert mounts_below(scratch) == [str(point)]
    fusebd("umount", point)
    assert left_behind(scratch) == []


@on_devfuse
def test_the_state_file_says_where_everything_is(mount: Callable[..., Mount], scratch: Path) -> None:
    address = f"unix:{scratch}/more.qmp"
    mounted = mount(options=["--qmp", address])
    place = Place(str(mounted.point))
    expected = State(str(mounted.point), mounted.pid, str(mounted.log), [f"unix:{place.socket}", address])
    assert state_of(mounted.point) == expected
    assert Path(place.state_path).parent == scratch / "run"
    for path in (place.state_path, place.socket, f"{scratch}/more.qmp"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


@on_devfuse
def test_the_mounted_directory_says_who_serves_it(mount: Callable[..., Mount]) -> None:
    mounted = mount()
    state = state_of(mounted.point)
    assert os.getxattr(mounted.point, "user.fusebd.pid") == str(mounted.pid).encode()
    assert os.getxattr(mounted.point, "user.fusebd.qmp") == state.qmp[0].encode()


@on_devfuse
def test_a_port_may_be_chosen_by_the_host(mount: Callable[..., Mount]) -> None:
    mounted = mount(options=["--qmp", "127.0.0.1:0"])
    address = state_of(mounted.point).qmp[1]
    host, port = address.split(":")
    assert (host, int(port) > 0) == ("127.0.0.1", True)
    assert '"package": "fusebd-' in fusebd("qmp", address, "query-version")


def test_names_are_taken_from_the_directory_of_the_call(scratch: Path, transport: str) -> None:
    (scratch / "mnt").mkdir()
    (scratch / "link").symlink_to("mnt")
    (scratch / "disk.raw").write_bytes(b"data" * 1024)
    words = ["mount", "--transport", transport, "--blockdev", "file,node-name=disk,filename=disk.raw", "link"]
    run(*FUSEBD, *words, "--qmp", "unix:q", "--log-file", "log", cwd=scratch)
    assert (scratch / "mnt" / "disk").read_bytes() == b"data" * 1024
    assert state_of(scratch / "mnt").qmp[1] == f"unix:{scratch}/q"
    assert (scratch / "log").exists()
    run(*FUSEBD, "qmp", "link", "query-version", cwd=scratch)
    run(*FUSEBD, "umount", "link", cwd=scratch)
    assert left_behind(scratch) == []


@pytest.mark.parametrize(
    "name", [b"with space", b"line\nbreak", b"comma,back\\slash", b"no utf8 \xff\xfe", b"-", b"#x"]
)
@on_devfuse
def test_a_mount_point_may_have_any_name(mount: Callable[..., Mount], name: bytes) -> None:
    mounted = mount(NULL, name=os.fsdecode(name))
    assert os.listdir(mounted.point) == ["null"]
    fusebd("qmp", mounted.point, "query-block")
    mounted.umount()


@on_devfuse
def test_a_second_daemon_for_a_mount_point_is_refused(mount: Callable[..., Mount]) -> None:
    mounted = mount(NULL)
    message = refusal("mount", *blockdev(NULL), mounted.point)
    assert message == f"{mounted.point}: already mounted by fusebd (process {mounted.pid})"
    assert os.listdir(mounted.point) == ["null"]
    mounted.umount()


def test_a_daemon_that_is_refused_leaves_the_log_of_the_one_that_serves(scratch: Path) -> None:
    point = scratch / "mnt"
    point.mkdir()
    fusebd("mount", *blockdev(NULL), point)
    refusal("mount", *blockdev(NULL), point)
    assert " null: added" in Path(state_of(point).log or "").read_text()
    fusebd("umount", point)


def test_of_many_started_at_once_one_serves(scratch: Path) -> None:
    point = scratch / "mnt"
    point.mkdir()
    command = [*FUSEBD, "mount", *blockdev(NULL), str(point)]
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda _: subprocess.run(command, capture_output=True, text=True, check=False), range(6)))
    assert sorted(one.returncode for one in done) == [0, 1, 1, 1, 1, 1]
    for one in done:
        assert one.returncode == 0 or "already mount" in one.stderr, one
    assert mounts_below(scratch) == [str(point)]
    fusebd("umount", point)
    assert left_behind(scratch) == []


@on_devfuse
def test_an_image_serves_one_daemon_only(mount: Callable[..., Mount], scratch: Path) -> None:
    image = scratch / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    mount(qcow2("disk", image))
    (scratch / "second").mkdir()
    message = refusal("mount", *blockdev(qcow2("disk", image)), scratch / "second")
    assert message.endswith(f'Failed to get "write" lock (Is another process using the image [{image}]?)')
    assert len(mounts_below(scratch)) == 1


@on_devfuse
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_start_that_is_interrupted_leaves_nothing(mount: Callable[..., Mount], scratch: Path, number: int) -> None:
    # An image that takes four seconds to look at.
    mounted = mount({"driver": "null-co", "node-name": "slow", "latency-ns": 4 * 10**9})
    (scratch / "second").mkdir()
    command = [*FUSEBD, "mount", *blockdev(qcow2("disk", mounted / "slow")), str(scratch / "second")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        place = Place(str(scratch / "second"))
        while (file := place.find()) is None or (state := file.read()) is None:
            time.sleep(0.01)
        file.close()
        if number == signal.SIGINT:  # Ctrl-C reaches the command, which waits
            process.send_signal(number)
        else:
            os.kill(state.pid, number)
        _, errors = process.communicate()
    assert (process.returncode, errors.count("\n")) == ((130, 0) if number == signal.SIGINT else (1, 1)), errors
    mounted.umount()
    assert left_behind(scratch) == []


# --- the log -------------------------------------------------------------------------------------


@on_devfuse
def test_the_log_tells_of_nodes_failures_and_the_end(mount: Callable[..., Mount]) -> None:
    mounted = mount(UNREADABLE)
    with open(mounted / "disk", "rb", buffering=0) as file, pytest.raises(OSError, match=os.strerror(errno.EIO)):
        file.read(512)
    mounted.qmp("blockdev-del", {"node-name": "disk"})
    mounted.umount()
    lines = [line.split(" ", 2)[2] for line in mounted.log.read_text().splitlines()]
    assert lines[0] == "INFO disk: added (raw, 65536 bytes, read-write)"
    assert lines[1] == f"INFO {mounted.point}: mounted"
    assert "WARNING disk: read failed: Input/output error" in lines
    assert "INFO disk: removed" in lines
    assert lines[-1] == f"INFO {mounted.point}: unmounted"


@on_devfuse
def test_the_log_tells_where_data_differs(mount: Callable[..., Mount], scratch: Path) -> None:
    (scratch / "a").write_bytes(bytes(4096))
    (scratch / "b").write_bytes(bytes(1024) + b"x" + bytes(3071))
    sides = {side: {"driver": "file", "filename": str(scratch / name)} for side, name in (("test", "a"), ("raw", "b"))}
    mounted = mount({"driver": "blkverify", "node-name": "disk", **sides})
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (mounted / "disk").read_bytes()
    log = mounted.log.read_text()
    assert "WARNING BLKVERIFY_MISMATCH: node-name=disk operation=read offset=0 length=4096 " in log
    assert "mismatch-offset=1024" in log


@on_devfuse
@pytest.mark.parametrize(("level", "said"), [("debug", True), ("info", True), ("warning", False), ("error", False)])
def test_the_level_says_what_is_logged(mount: Callable[..., Mount], level: str, said: bool) -> None:
    mounted = mount(NULL, options=["--log-level", level])
    mounted.umount()
    assert (" INFO null: added" in mounted.log.read_text()) is said


@on_devfuse
def test_a_log_that_was_moved_away_is_made_anew(mount: Callable[..., Mount]) -> None:
    mounted = mount()
    moved = mounted.log.rename(mounted.log.with_suffix(".1"))
    mounted.qmp("blockdev-add", NULL)
    assert " null: added" not in moved.read_text()
    assert " null: added" in mounted.log.read_text()
    mounted.umount()


def test_without_a_name_the_log_is_beside_the_socket_and_goes_if_nothing_is_in_it(scratch: Path) -> None:
    point = scratch / "mnt"
    point.mkdir()
    fusebd("mount", *blockdev(NULL), point)
    log = state_of(point).log
    assert log == Place(str(point)).log
    assert " null: added" in Path(log).read_text()
    fusebd("umount", point)
    assert left_behind(scratch) == []


def test_a_log_with_a_warning_stays(scratch: Path) -> None:
    point = scratch / "mnt"
    point.mkdir()
    fusebd("mount", *blockdev(UNREADABLE), point)
    log = Path(state_of(point).log or "")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (point / "disk").read_bytes()
    fusebd("umount", point)
    assert left_behind(scratch) == [log.name]
    assert " WARNING disk: read failed: " in log.read_text()


# --- the end -------------------------------------------------------------------------------------


def written(mount: Callable[..., Mount], scratch: Path) -> tuple[Mount, Path]:
    """A mounted qcow2 image to which something was written that is flushed nowhere yet."""
    image = scratch / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    mounted = mount(qcow2("disk", image))
    with open(mounted / "disk", "r+b", buffering=0) as file:
        file.write(b"data" * 1024)
    return mounted, image


def assert_all_is_there(scratch: Path, image: Path) -> None:
    """What ``written`` wrote is in the image, which is sound, and nothing is left of the daemon."""
    assert [name for name in left_behind(scratch) if not name.endswith(".log")] == []
    check_image(image)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, scratch / "raw")
    assert (scratch / "raw").read_bytes()[:4096] == b"data" * 1024


def test_umount_returns_when_everything_is_on_disk_and_the_daemon_gone(
    mount: Callable[..., Mount], scratch: Path
) -> None:
    mounted, image = written(mount, scratch)
    assert fusebd("umount", mounted.point) == ""
    assert_all_is_there(scratch, image)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_and_flushes(mount: Callable[..., Mount], scratch: Path, number: int) -> None:
    mounted, image = written(mount, scratch)
    os.kill(mounted.pid, number)
    mounted.wait_end()
    assert_all_is_there(scratch, image)
    assert f"{signal.Signals(number).name} received" in mounted.log.read_text()


@on_devfuse
def test_more_signals_do_not_cut_the_end_short(mount: Callable[..., Mount], scratch: Path) -> None:
    mounted = mount({"driver": "null-co", "node-name": "slow", "latency-ns": 10**9})
    with open(mounted / "slow", "r+b", buffering=0) as file:
        file.write(b"x")
    os.kill(mounted.pid, signal.SIGTERM)
    while f"{mounted.point}: unmounted" not in mounted.log.read_text() and daemons_of(scratch):
        with suppress(ProcessLookupError):
            os.kill(mounted.pid, signal.SIGTERM)
        time.sleep(0.02)
    mounted.wait_end()
    assert f"{mounted.point}: unmounted" in mounted.log.read_text()
    assert left_behind(scratch) == []


def test_unmounting_by_other_means_ends_the_daemon(mount: Callable[..., Mount], scratch: Path) -> None:
    mounted, image = written(mount, scratch)
    run("umount", mounted.point)
    mounted.wait_end()
    assert_all_is_there(scratch, image)


def test_quit_ends_the_daemon(mount: Callable[..., Mount], scratch: Path) -> None:
    mounted, image = written(mount, scratch)
    mounted.qmp("quit")
    mounted.wait_end()
    assert_all_is_there(scratch, image)


@on_devfuse
def test_a_terminal_that_goes_away_leaves_the_daemon(mount: Callable[..., Mount]) -> None:
    mounted = mount(NULL)
    os.kill(mounted.pid, signal.SIGHUP)
    assert (mounted / "null").read_bytes() == bytes(65536)
    mounted.umount()


@on_devfuse
def test_a_qmp_client_that_stays_holds_nothing_up(mount: Callable[..., Mount], scratch: Path) -> None:
    mounted = mount(NULL)
    clients = [Qmp(Place(str(mounted.point)).socket) for _ in range(3)]
    fusebd("umount", mounted.point)
    assert left_behind(scratch) == []
    for client in clients:
        client.close()


def test_an_open_file_refuses_the_umount_and_works_on(mount: Callable[..., Mount], scratch: Path) -> None:
    mounted, image = written(mount, scratch)
    with open(mounted / "disk", "r+b", buffering=0) as file:
        message = f"{mounted.point}: Device or resource busy (--force unmounts it all the same)"
        assert refusal("umount", mounted.point) == message
        assert file.read(4096) == b"data" * 1024
        assert os.listdir(mounted.point) == ["disk"]
    fusebd("umount", mounted.point)
    assert_all_is_there(scratch, image)


def test_force_unmounts_under_an_open_file(mount: Callable[..., Mount], scratch: Path) -> None:
    mounted, image = written(mount, scratch)
    file = os.open(mounted / "disk", os.O_RDWR)
    os.pwrite(file, b"more", 8192)
    fusebd("umount", "--force", mounted.point)
    with pytest.raises(OSError, match=f"{os.strerror(errno.ENOTCONN)}|{os.strerror(errno.EIO)}"):
        os.pread(file, 1, 0)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.close(file)
    assert_all_is_there(scratch, image)
    assert (scratch / "raw").read_bytes()[8192:8196] == b"more"


def test_a_signal_ends_the_daemon_under_an_open_file(mount: Callable[..., Mount], scratch: Path) -> None:
    mounted, image = written(mount, scratch)
    file = os.open(mounted / "disk", os.O_RDWR)
    os.kill(mounted.pid, signal.SIGTERM)
    mounted.wait_end()
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.close(file)
    assert_all_is_there(scratch, image)
    assert f"WARNING {mounted.point} is in use: its users lose it" in mounted.log.read_text()


@on_devfuse
def test_force_ends_requests_that_wait(mount: Callable[..., Mount], scratch: Path) -> None:
    hour = {"driver": "null-co", "node-name": "slow", "latency-ns": 3600 * 10**9}
    mounted = mount(hour)
    reader = subprocess.Popen(["dd", f"if={mounted / 'slow'}", "of=/dev/null", "count=1"], stderr=subprocess.DEVNULL)
    while "slow" not in os.readlink(f"/proc/{reader.pid}/fd/0"):
        time.sleep(0.01)
    fusebd("umount", "--force", mounted.point)
    assert reader.wait() == 1
    assert left_behind(scratch) == []


def test_umount_tells_what_went_wrong_at_the_end(mount: Callable[..., Mount], scratch: Path) -> None:
    mounted = mount(UNFLUSHABLE)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (mounted / "disk").write_bytes(b"x")
    message = refusal("umount", mounted.point)
    assert message.startswith(f"{mounted.point}: disk: #block")
    assert message.endswith(f": flush at close failed: Input/output error (the log is {mounted.log})")
    assert left_behind(scratch) == []
    assert "flush at close failed: Input/output error\n" in mounted.log.read_text()


def test_what_went_wrong_at_the_end_is_kept_until_somebody_asks(mount: Callable[..., Mount], scratch: Path) -> None:
    mounted = mount(UNFLUSHABLE)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (mounted / "disk").write_bytes(b"x")
    os.kill(mounted.pid, signal.SIGTERM)
    mounted.wait_end()
    assert mounts_below(scratch) == []
    assert "flush at close failed" in refusal("umount", mounted.point)
    assert left_behind(scratch) == []
    assert refusal("umount", mounted.point) == f"{mounted.point}: not mounted by fusebd"


def test_what_is_left_of_a_bad_end_does_not_keep_from_mounting(mount: Callable[..., Mount]) -> None:
    mounted = mount(UNFLUSHABLE)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (mounted / "disk").write_bytes(b"x")
    os.kill(mounted.pid, signal.SIGTERM)
    mounted.wait_end()
    again = mount(NULL)
    assert os.listdir(again.point) == ["null"]
    mounted.log.unlink()
    assert fusebd("umount", again.point) == ""


# --- a daemon that was killed ----------------------------------------------------------------------


def test_a_killed_daemon_leaves_nothing_that_umount_cannot_clear(mount: Callable[..., Mount], scratch: Path) -> None:
    mounted = mount(NULL)
    file = os.open(mounted / "null", os.O_RDWR)
    mounted.kill()
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.listdir(mounted.point)
    assert fusebd("umount", mounted.point) == ""
    assert left_behind(scratch) == []
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.close(file)
    assert refusal("umount", mounted.point) == f"{mounted.point}: not mounted by fusebd"


@on_devfuse
def test_a_killed_daemons_mount_point_is_refused_with_the_remedy(mount: Callable[..., Mount]) -> None:
    mounted = mount(NULL)
    mounted.kill()
    assert refusal("mount", mounted.point) == (
        f"{mounted.point}: already a mount point, left by a daemon that is gone "
        f"('fusebd umount {mounted.point}' clears it)"
    )
    fusebd("umount", mounted.point)
    mount(NULL).umount()


@on_devfuse
def test_a_killed_daemon_answers_no_qmp(mount: Callable[..., Mount]) -> None:
    mounted = mount(NULL)
    mounted.kill()
    address = f"unix:{Place(str(mounted.point)).socket}"
    assert refusal("qmp", mounted.point, "query-version") == f"Could not connect to {address}: Connection refused"


@on_devfuse
def test_a_killed_daemons_files_are_in_nobodys_way(mount: Callable[..., Mount], scratch: Path) -> None:
    mounted = mount(NULL, options=["--qmp", f"unix:{scratch}/more.qmp"])
    mounted.kill()
    run("umount", "-l", mounted.point)
    again = mount(NULL, options=["--qmp", f"unix:{scratch}/more.qmp"])
    assert os.listdir(again.point) == ["null"]
    again.umount()
    assert left_behind(scratch) == []
    assert not (scratch / "more.qmp").exists()


@on_devfuse
def test_a_daemon_that_is_killed_while_it_unmounts_is_reported(mount: Callable[..., Mount], scratch: Path) -> None:
    mounted = mount(NULL)
    with open(mounted / "null", "rb", buffering=0), ThreadPoolExecutor(1) as pool:
        # For as long as the file is open, unmounting takes its time.
        message = pool.submit(refusal, "umount", "--force", mounted.point)
        while "ending" not in mounted.log.read_text():
            time.sleep(0.01)
        mounted.kill()
        assert message.result() == f"{mounted.point}: the daemon was killed while it unmounted"
    assert left_behind(scratch) == []


@on_devfuse
def test_a_mount_is_unmounted_without_its_runtime_directory(
    mount: Callable[..., Mount], monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    mounted = mount(NULL)
    with monkeypatch.context() as patch:
        patch.setenv("FUSEBD_RUNTIME_DIR", str(scratch / "run2"))
        fusebd("umount", mounted.point)
    mounted.wait_end()
    assert left_behind(scratch) == []


# --- several mount points ---------------------------------------------------------------------------


def configured(scratch: Path, **blockdevs: str) -> Path:
    """A file with a mount point for each of *blockdevs*, a line of its node's options."""
    tables = []
    for name, options in blockdevs.items():
        (scratch / name).mkdir()
        tables.append(f"[[mount]]\npoint = '{name}'\n[[mount.blockdev]]\nnode-name = 'disk'\n{options}\n")
    file = scratch / "mounts.toml"
    file.write_text("".join(tables))
    return file


def test_every_mount_point_of_the_file_is_mounted(scratch: Path) -> None:
    file = configured(scratch, a="driver = 'null-co'\nsize = 512", b="driver = 'null-co'\nsize = 1024")
    assert fusebd("mount", "--config", file) == ""
    assert [(scratch / name / "disk").stat().st_size for name in "ab"] == [512, 1024]
    assert state_of(scratch / "a").pid != state_of(scratch / "b").pid
    fusebd("umount", scratch / "a")
    assert (scratch / "b" / "disk").read_bytes() == bytes(1024)
    fusebd("umount", scratch / "b")
    assert left_behind(scratch) == []


@pytest.mark.parametrize("order", ["abc", "bca", "cab"])
def test_if_one_of_the_mount_points_fails_none_is_mounted(scratch: Path, order: str) -> None:
    options = {"a": "driver = 'null-co'", "b": "driver = 'file'\nfilename = 'none'", "c": "driver = 'null-aio'"}
    file = configured(scratch, **{name: options[name] for name in order})
    index = order.index("b")
    message = refusal("mount", "--config", file)
    assert message.startswith(f"{file}:{5 * index + 6}: mount[{index}].blockdev[0]: ")
    assert message.endswith(": Could not open 'none': No such file or directory")
    assert left_behind(scratch) == []


def test_every_mount_point_that_fails_has_a_line(scratch: Path) -> None:
    file = configured(scratch, a="driver = 'x'", b="driver = 'null-co'", c="driver = 'y'")
    done = subprocess.run([*FUSEBD, "mount", "--config", str(file)], capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines)) == (1, 2)
    assert lines[0].endswith("mount[0].blockdev[0]: Parameter 'driver' does not accept value 'x'")
    assert lines[1].endswith("mount[2].blockdev[0]: Parameter 'driver' does not accept value 'y'")
    assert left_behind(scratch) == []


def test_one_mount_point_of_the_file_can_be_named(scratch: Path) -> None:
    file = configured(scratch, a="driver = 'null-co'", b="driver = 'nonsense'")
    fusebd("mount", "--config", file, "--blockdev", "null-co,node-name=more", scratch / "a")
    assert mounts_below(scratch) == [f"{scratch}/a"]
    assert sorted(os.listdir(scratch / "a")) == ["disk", "more"]
    fusebd("umount", scratch / "a")


def test_a_mount_point_that_is_not_in_the_file_is_refused(scratch: Path) -> None:
    file = configured(scratch, a="driver = 'null-co'")
    assert refusal("mount", "--config", file, scratch / "b") == f"{file}: it has no mount point '{scratch}/b'"


@pytest.mark.parametrize("words", [["--blockdev", "null-co,node-name=x"], ["--qmp", "unix:x"], ["--foreground"]])
def test_what_is_for_one_mount_point_is_refused_for_several(scratch: Path, words: list[str]) -> None:
    file = configured(scratch, a="driver = 'null-co'", b="driver = 'null-co'")
    message = refusal("mount", "--config", file, *words)
    assert message == f"{words[0]} is for one mount point, and {file} has 2: name one"
    assert left_behind(scratch) == []


def test_the_command_line_is_stronger_than_the_file(scratch: Path) -> None:
    (scratch / "mnt").mkdir()
    (scratch / "mounts.toml").write_text("[[mount]]\npoint = 'mnt'\nlog-level = 'info'\nlog-file = 'a.log'\n")
    fusebd("mount", "--config", scratch / "mounts.toml", "--log-level", "error", "--log-file", scratch / "b.log")
    assert not (scratch / "a.log").exists()
    fusebd("umount", scratch / "mnt")
    assert (scratch / "b.log").read_text() == ""
