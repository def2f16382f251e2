"""fusebd without root's rights, and the mounts of one user as another sees them."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mounting import FUSEBD, daemons_of, fusebd, left_behind, mounts_below, refusal, run, sweep

NOBODY = 65534
#: for subprocess: run as a user with no rights
UNPRIVILEGED: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []}


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that everybody can enter, with a mount point ``mnt`` and a runtime directory of nobody's."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs root and /dev/fuse")
    if os.stat("/dev/fuse").st_mode & 0o006 != 0o006 or shutil.which("fusermount3") is None:
        pytest.skip("needs a /dev/fuse for all users, and fusermount3")
    if subprocess.run([*FUSEBD, "--version"], capture_output=True, check=False, **UNPRIVILEGED).returncode:
        pytest.skip("needs a Python and a fusebd that all users can run")
    path = Path(tempfile.mkdtemp(prefix="fusebd-test."))
    path.chmod(0o755)
    for name, mode in (("mnt", 0o755), ("run", 0o700)):
        (path / name).mkdir(mode=mode)
        os.chown(path / name, NOBODY, NOBODY)
    monkeypatch.setenv("FUSEBD_RUNTIME_DIR", str(path / "run"))
    monkeypatch.chdir(path)
    yield path
    sweep(path)
    shutil.rmtree(path)


def as_nobody(*words: str | Path, expect: tuple[int, ...] = (0,)) -> str:
    return run(*words, expect=expect, **UNPRIVILEGED)


def image(path: Path, mode: int, owner: int = 0) -> Path:
    path.write_bytes(b"data" * 16384)
    path.chmod(mode)
    os.chown(path, owner, owner)
    return path


# --- the daemon of a user without rights -------------------------------------------------------------


def test_everything_works_without_root(public: Path, transport: str) -> None:
    image(public / "disk.raw", 0o600, NOBODY)
    node = "file,node-name=disk,filename=disk.raw"
    as_nobody(*FUSEBD, "mount", "--transport", transport, "--blockdev", node, "mnt")
    assert mounts_below(public) == [f"{public}/mnt"]
    assert as_nobody("cat", "mnt/disk") == "data" * 16384
    as_nobody("dd", "if=/dev/zero", "of=mnt/disk", "bs=4k", "count=1")
    assert (public / "disk.raw").read_bytes() == bytes(4096) + b"data" * (16384 - 1024)
    as_nobody(*FUSEBD, "qmp", "mnt", "blockdev-add", "driver=null-co", "node-name=null")
    assert sorted(as_nobody("ls", "mnt").split()) == ["disk", "null"]
    assert as_nobody(*FUSEBD, "umount", "mnt") == ""
    assert left_behind(public) == []


def test_a_busy_mount_is_refused_and_forced_without_root(public: Path, transport: str) -> None:
    as_nobody(*FUSEBD, "mount", "--transport", transport, "--blockdev", "null-co,node-name=null", "mnt")
    command = ["sh", "-c", "exec <mnt/null; echo; exec sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, **UNPRIVILEGED) as user:
        assert user.stdout is not None
        user.stdout.readline()
        message = refusal("umount", "mnt", **UNPRIVILEGED)
        assert message == f"{public}/mnt: Device or resource busy (--force unmounts it all the same)"
        as_nobody(*FUSEBD, "umount", "--force", "mnt")
        user.kill()
    assert [name for name in left_behind(public) if not name.endswith(".log")] == []


def test_what_a_killed_daemon_left_is_cleared_without_root(public: Path) -> None:
    as_nobody(*FUSEBD, "mount", "--blockdev", "null-co,node-name=null", "mnt")
    (pid,) = daemons_of(public)
    os.kill(pid, signal.SIGKILL)
    while daemons_of(public):
        time.sleep(0.01)
    as_nobody(*FUSEBD, "umount", "mnt")
    assert [name for name in left_behind(public) if not name.endswith(".log")] == []


@pytest.mark.parametrize("mode", [0o000, 0o600])
def test_an_image_that_the_user_may_not_read_is_refused(public: Path, mode: int) -> None:
    image(public / "disk.raw", mode)
    node = "file,node-name=disk,filename=disk.raw"
    for more in ("", ",read-only=on", ",auto-read-only=on"):
        message = refusal("mount", "--blockdev", node + more, "mnt", **UNPRIVILEGED)
        assert message == f"--blockdev {node}{more}: Could not open 'disk.raw': Permission denied"
    assert left_behind(public) == []


def test_an_image_that_the_user_may_only_read_is_read_only_if_asked_for(public: Path) -> None:
    image(public / "disk.raw", 0o644)
    node = "file,node-name=disk,filename=disk.raw"
    message = refusal("mount", "--blockdev", node, "mnt", **UNPRIVILEGED)
    assert message == f"--blockdev {node}: Could not open 'disk.raw': Permission denied"
    for more in (",read-only=on", ",auto-read-only=on"):
        as_nobody(*FUSEBD, "mount", "--blockdev", node + more, "mnt")
        assert as_nobody("stat", "--format=%A", "mnt/disk") == "-r--------\n"
        as_nobody(*FUSEBD, "umount", "mnt")
    assert left_behind(public) == []


def test_a_mount_point_of_another_user_is_refused(public: Path) -> None:
    (public / "roots").mkdir()
    message = refusal("mount", "roots", **UNPRIVILEGED)
    assert message.startswith(f"{public}/roots: ")
    assert message.endswith(f"user has no write access to mountpoint {public}/roots")
    assert left_behind(public) == []


def test_a_mount_point_that_cannot_be_seen_is_refused(public: Path) -> None:
    (public / "roots").mkdir(mode=0o700)
    (public / "roots" / "mnt").mkdir()
    assert refusal("mount", "roots/mnt", **UNPRIVILEGED) == f"{public}/roots/mnt: Permission denied"
    assert left_behind(public) == []


def test_a_system_without_the_helper_is_one_line(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    message = refusal("mount", "--blockdev", "null-co,node-name=null", "mnt", **UNPRIVILEGED)
    assert message == "fusermount3: not found (it mounts for users other than root)"
    assert left_behind(public) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--log-file", "log"], "Could not open '{here}/log': Permission denied"),
        (["--qmp", "unix:qmp"], "unix:{here}/qmp: Permission denied"),
    ],
)
def test_files_that_the_user_may_not_make_are_refused(public: Path, words: list[str], message: str) -> None:
    assert refusal("mount", *words, "mnt", **UNPRIVILEGED) == message.format(here=public)
    assert left_behind(public) == []


def test_the_runtime_directory_of_another_user_is_refused(public: Path) -> None:
    os.chown(public / "run", 0, 0)
    message = f"The runtime directory '{public}/run' must be a directory that belongs to you alone (mode 0700)"
    assert refusal("mount", "mnt", **UNPRIVILEGED) == message


# --- other users of a mount ---------------------------------------------------------------------------


@pytest.fixture
def mounted_by_root(public: Path, transport: str) -> Callable[..., Path]:
    """Mounts a node ``disk`` as root; what is mounted."""
    os.chown(public / "run", 0, 0)
    image(public / "disk.raw", 0o600)

    def mount(*options: str) -> Path:
        node = "file,node-name=disk,filename=disk.raw"
        fusebd("mount", "--transport", transport, *options, "--blockdev", node, "mnt")
        return public / "mnt"

    return mount


def refused_with(code: int, *words: str | Path) -> bool:
    return os.strerror(code) in as_nobody(*words, expect=(1, 2))


def test_other_users_are_kept_out(mounted_by_root: Callable[..., Path]) -> None:
    point = mounted_by_root()
    assert refused_with(errno.EACCES, "ls", point)
    assert refused_with(errno.EACCES, "cat", point / "disk")
    fusebd("umount", "mnt")


def test_other_users_are_let_in_to_read(mounted_by_root: Callable[..., Path]) -> None:
    point = mounted_by_root("--allow-other")
    assert as_nobody("stat", "--format=%A", point, point / "disk").split() == ["drwxr-xr-x", "-rw-r--r--"]
    assert as_nobody("cat", point / "disk") == "data" * 16384
    assert refused_with(errno.EACCES, "dd", "if=/dev/zero", f"of={point}/disk", "count=1")
    assert refused_with(errno.EPERM, "chmod", "666", point / "disk")
    fusebd("umount", "mnt")


def test_the_owner_can_let_others_write(mounted_by_root: Callable[..., Path], public: Path) -> None:
    point = mounted_by_root("--allow-other")
    (point / "disk").chmod(0o666)
    as_nobody("dd", "if=/dev/zero", f"of={point}/disk", "bs=512", "count=1")
    (point / "disk").chmod(0o600)
    assert refused_with(errno.EACCES, "cat", point / "disk")
    os.chown(point / "disk", NOBODY, NOBODY)
    assert as_nobody("stat", "--format=%u %g", point / "disk") == f"{NOBODY} {NOBODY}\n"
    as_nobody("dd", "if=/dev/zero", f"of={point}/disk", "bs=512", "count=1", "seek=1", "conv=notrunc")
    assert (public / "disk.raw").read_bytes() == bytes(1024) + b"data" * (16384 - 256)
    fusebd("umount", "mnt")


def test_other_users_do_not_get_at_qmp(mounted_by_root: Callable[..., Path], public: Path) -> None:
    point = mounted_by_root("--allow-other", "--qmp", "unix:qmp")
    message = refusal("qmp", "unix:qmp", "quit", **UNPRIVILEGED)
    assert message == f"Could not connect to unix:{public}/qmp: Permission denied"
    assert os.listdir(point) == ["disk"]
    fusebd("umount", "mnt")
