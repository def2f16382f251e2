"""devfuse under real system calls: a toy file system in a process of its own (``devfuse_toy.py``) is mounted."""

from __future__ import annotations

import concurrent.futures
import ctypes
import errno
import fcntl
import json
import mmap
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from devfuse_toy import SIZE

TOY = Path(__file__).parent.parent / "devfuse_toy.py"
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
MNT_FORCE = 1

pytestmark = pytest.mark.skipif(
    not os.access("/dev/fuse", os.W_OK) or os.geteuid() != 0, reason="needs root and /dev/fuse"
)


class Mounted:
    """A mounted toy.  ``toy("method", ...)`` calls a method of its Control."""

    def __init__(self, path: Path, *options: str) -> None:
        path.mkdir(exist_ok=True)
        self.path = path
        self.process = subprocess.Popen(
            [sys.executable, str(TOY), str(path), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr
            raise AssertionError(self.process.stderr.read().decode())
        return json.loads(line)

    def __call__(self, *words: Any) -> Any:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(words).encode() + b"\n")
        self.process.stdin.flush()
        return self._answer()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def calls(self, method: str) -> int:
        return int(self("calls").get(method, 0))

    def wait(self) -> str:
        """Wait for the end of the server; what it wrote to stderr."""
        _, stderr = self.process.communicate()
        assert self.process.returncode == 0, stderr.decode()
        return stderr.decode()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Mounted]]:
    """Mounts a toy; what is left at the end is unmounted."""
    all_mounted: list[Mounted] = []

    def mount(*options: str, path: Path = tmp_path / "mnt") -> Mounted:
        all_mounted.append(Mounted(path, *options))
        return all_mounted[-1]

    yield mount
    for mounted in all_mounted:
        subprocess.run(["umount", "-l", mounted.path], check=False, capture_output=True)
        mounted.process.kill()
        mounted.process.communicate()


@pytest.fixture
def toy(mount: Callable[..., Mounted]) -> Mounted:
    return mount()


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


# -- names and attributes -----------------------------------------------------------------------


def test_listing_has_names_and_attributes(toy: Mounted) -> None:
    with os.scandir(toy.path) as entries:
        found = {entry.name: (entry.inode(), entry.stat().st_size) for entry in entries}
    assert found["data"] == (2, SIZE)
    assert set(found) == {"data", "cached", "held", "broken", "passed", "away"}


def test_long_listing_goes_on_where_it_stopped(toy: Mounted) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(toy.path, os.O_RDONLY)
    small = ctypes.create_string_buffer(80)
    names, got = b"", 1
    while got > 0:
        got = libc.syscall(217, descriptor, small, 80)  # getdents64 with room for two or three names
        names += small.raw[: max(got, 0)]
    os.close(descriptor)
    assert got == 0
    assert all(name in names for name in (b"data", b"cached", b"held", b"broken", b"passed", b"away"))


def test_stat_shows_all_fields(toy: Mounted) -> None:
    found = os.stat(toy / "data")
    assert stat.S_ISREG(found.st_mode)
    assert (found.st_ino, found.st_size, found.st_blocks, found.st_blksize) == (2, SIZE, SIZE // 512, 4096)
    assert (found.st_uid, found.st_nlink) == (os.getuid(), 1)
    assert abs(found.st_mtime - time.time()) < 1000


def test_statx_with_a_birth_time_is_answered(toy: Mounted) -> None:
    done = subprocess.run(["stat", "--printf=%W %s %b", toy / "data"], check=True, capture_output=True, text=True)
    assert done.stdout == f"0 {SIZE} {SIZE // 512}"


def test_missing_name_is_enoent(toy: Mounted) -> None:
    with pytest.raises(FileNotFoundError):
        os.stat(toy / "nothing")


def test_long_name_spans_the_header(toy: Mounted) -> None:
    with pytest.raises(FileNotFoundError):
        os.stat(toy / ("x" * 255))


def test_attributes_can_be_set(toy: Mounted) -> None:
    path = toy / "data"
    os.chmod(path, 0o600)
    os.chown(path, 12, 34)
    os.utime(path, ns=(1_000_000_001, -5_999_999_999))
    found = os.stat(path)
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o600, 12, 34)
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_000_000_001, -5_999_999_999)


def test_touch_sets_the_present_time(toy: Mounted) -> None:
    os.utime(toy / "data", ns=(0, 0))
    os.utime(toy / "data")
    assert abs(os.stat(toy / "data").st_mtime - time.time()) < 1000


def test_truncate_with_and_without_an_open_file(toy: Mounted) -> None:
    os.truncate(toy / "data", 1000)
    assert os.stat(toy / "data").st_size == 1000
    assert toy("last", "setattr") == [2, -1]
    descriptor = os.open(toy / "data", os.O_RDWR)
    os.ftruncate(descriptor, 5000)
    assert os.fstat(descriptor).st_size == 5000
    assert toy("last", "setattr")[1] > 1000
    os.close(descriptor)


def test_open_with_o_trunc_is_one_request(toy: Mounted) -> None:
    os.close(os.open(toy / "data", os.O_WRONLY | os.O_TRUNC))
    assert toy("last", "open")[1] & os.O_TRUNC
    assert toy.calls("setattr") == 0
    assert os.stat(toy / "data").st_size == SIZE


@pytest.mark.parametrize("operation", ["create", "mkdir", "unlink", "rename", "symlink", "link"])
def test_directory_cannot_be_changed(toy: Mounted, operation: str) -> None:
    new, old = toy / "new", toy / "data"
    attempt: dict[str, Callable[[], object]] = {
        "create": lambda: os.open(new, os.O_CREAT | os.O_RDWR),
        "mkdir": lambda: os.mkdir(new),
        "unlink": lambda: os.unlink(old),
        "rename": lambda: os.rename(old, new),
        "symlink": lambda: os.symlink("target", new),
        "link": lambda: os.link(old, new),
    }
    with pytest.raises(OSError, match="not permitted") as caught:
        attempt[operation]()
    assert caught.value.errno == errno.EPERM


def test_extended_attributes(toy: Mounted) -> None:
    assert os.listxattr(toy / "data") == ["user.toy", "user.other"]
    assert os.getxattr(toy / "data", "user.toy") == b"a value"
    with pytest.raises(OSError, match="No data"):
        os.getxattr(toy / "data", "user.none")
    with pytest.raises(OSError, match="not supported"):
        os.setxattr(toy / "data", "user.toy", b"another")


def test_extended_attribute_in_too_small_a_buffer_is_erange(toy: Mounted) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    path = os.fsencode(toy / "data")
    assert libc.getxattr(path, b"user.toy", None, 0) == 7
    assert libc.getxattr(path, b"user.toy", ctypes.create_string_buffer(3), 3) == -1
    assert ctypes.get_errno() == errno.ERANGE


def test_statvfs(toy: Mounted) -> None:
    found = os.statvfs(toy.path)
    assert (found.f_bsize, found.f_blocks, found.f_bfree, found.f_bavail) == (4096, 123, 45, 44)
    assert (found.f_files, found.f_namemax) == (6, 31)


# -- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data", "cached", "away"])
@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (511, 3), (4096, 4096), (1000, 70000), (0, SIZE), (SIZE - 1, 1), (777, SIZE - 777)]
)
def test_what_is_written_is_read(toy: Mounted, name: str, offset: int, length: int) -> None:
    data = os.urandom(length)
    writer = os.open(toy / name, os.O_WRONLY)
    assert os.pwrite(writer, data, offset) == length
    os.close(writer)
    reader = os.open(toy / name, os.O_RDONLY)
    assert os.pread(reader, length + 10, offset) == data + bytes(min(10, SIZE - offset - length))
    os.close(reader)


def test_o_direct_requests_have_a_mebibyte(toy: Mounted) -> None:
    descriptor = os.open(toy / "data", os.O_RDWR | os.O_DIRECT)
    memory = mmap.mmap(-1, SIZE)
    memory.write(os.urandom(SIZE))
    assert os.pwritev(descriptor, [memory], 0) == SIZE
    assert toy.calls("write") == SIZE >> 20
    again = mmap.mmap(-1, SIZE)
    assert os.preadv(descriptor, [again], 0) == SIZE
    assert toy.calls("read") == SIZE >> 20
    assert again[:] == memory[:]
    os.close(descriptor)


def test_read_at_the_end_is_short(toy: Mounted) -> None:
    with open(toy / "data", "rb", buffering=0) as file:
        file.seek(SIZE - 10)
        assert len(file.read(100)) == 10
        assert file.read(100) == b""


def test_error_of_the_file_system_is_the_errno(toy: Mounted) -> None:
    with open(toy / "broken", "r+b", buffering=0) as file, pytest.raises(OSError, match="No space"):
        file.write(b"x")


def test_bug_in_the_file_system_is_eio_and_ends_nothing(toy: Mounted) -> None:
    with open(toy / "broken", "rb", buffering=0) as file, pytest.raises(OSError, match="Input/output"):
        file.read(1)
    assert len((toy / "data").read_bytes()) == SIZE
    subprocess.run(["umount", toy.path], check=True)
    assert "a bug" in toy.wait()


def test_fsync_fdatasync_flush_and_release(toy: Mounted) -> None:
    descriptor = os.open(toy / "data", os.O_RDWR)
    os.fsync(descriptor)
    assert toy("last", "fsync")[1] is False
    os.fdatasync(descriptor)
    assert toy("last", "fsync")[1] is True
    os.close(descriptor)
    wait_until(lambda: toy.calls("release") == 1)
    assert toy.calls("flush") == 1


def test_fallocate(toy: Mounted) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(toy / "data", os.O_RDWR)
    mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    assert libc.fallocate(descriptor, mode, ctypes.c_long(4096), ctypes.c_long(8192)) == 0
    assert toy("last", "fallocate") == [mode, 4096, 8192]
    os.posix_fallocate(descriptor, 0, SIZE)
    assert toy("last", "fallocate") == [0, 0, SIZE]
    os.close(descriptor)


def test_lseek_for_data_and_holes(toy: Mounted) -> None:
    descriptor = os.open(toy / "data", os.O_RDONLY)
    assert os.lseek(descriptor, 1000, os.SEEK_DATA) == 5096
    assert toy("last", "lseek") == [1000, os.SEEK_DATA]
    assert os.lseek(descriptor, 2000, os.SEEK_HOLE) == 6096
    assert os.lseek(descriptor, 0, os.SEEK_END) == SIZE
    os.close(descriptor)


def test_copy_file_range_is_done_by_the_server(toy: Mounted) -> None:
    toy("fill", "data", 7)
    source, target = os.open(toy / "data", os.O_RDONLY), os.open(toy / "away", os.O_RDWR)
    assert os.copy_file_range(source, target, 100_000, 5, 10) == 100_000
    assert os.pread(target, 100_003, 9) == b"\0" + b"\7" * 100_000 + b"\0\0"
    assert toy.calls("read") == 1
    os.close(source)
    os.close(target)


def test_ioctl_is_enotty(toy: Mounted) -> None:
    with open(toy / "data", "rb", buffering=0) as file, pytest.raises(OSError, match="Inappropriate") as caught:
        fcntl.ioctl(file, 0x1234)
    assert caught.value.errno == errno.ENOTTY


def test_shared_mapping_of_a_direct_file(toy: Mounted) -> None:
    if "shared-mmap" not in toy("capabilities"):
        pytest.skip("the kernel has no FUSE_DIRECT_IO_ALLOW_MMAP")
    toy("fill", "data", 3)
    with open(toy / "data", "r+b", buffering=0) as file:
        with mmap.mmap(file.fileno(), SIZE) as mapping:
            assert mapping[100_000] == 3
            mapping[8192:8195] = b"abc"
            mapping.flush()
        assert os.pread(file.fileno(), 5, 8191) == b"\3abc\3"


# -- caching ------------------------------------------------------------------------------------


def test_page_cache_is_used_where_it_may(toy: Mounted) -> None:
    for _ in range(2):
        (toy / "cached").read_bytes()
        seen = toy.calls("read")
        (toy / "cached").read_bytes()
        assert toy.calls("read") == seen


def test_direct_file_is_read_each_time(toy: Mounted) -> None:
    for byte in (1, 2):
        toy("fill", "data", byte)
        assert (toy / "data").read_bytes() == bytes([byte]) * SIZE


def test_invalidated_inode_is_asked_for_again(toy: Mounted) -> None:
    toy("timeouts", 3600)
    (toy / "cached").read_bytes()
    os.stat(toy / "cached")  # reading has made the access time stale
    toy("resize", "cached", 5000)
    toy("fill", "cached", 9)
    assert os.stat(toy / "cached").st_size == SIZE
    toy("invalidate", "cached")
    wait_until(lambda: os.stat(toy / "cached").st_size == 5000)
    assert (toy / "cached").read_bytes() == b"\x09" * 5000


def test_invalidated_name_is_looked_up_again(toy: Mounted) -> None:
    toy("timeouts", 3600)
    os.stat(toy / "data")
    toy("rename", "data", "other")
    wait_until(lambda: not (toy / "data").exists())
    assert os.stat(toy / "other").st_ino == 2


def test_removed_file_is_gone(toy: Mounted) -> None:
    toy("timeouts", 3600)
    os.stat(toy / "data")
    toy("remove", "data")
    wait_until(lambda: not (toy / "data").exists())
    assert "data" not in os.listdir(toy.path)


def test_invalidation_while_the_kernel_has_dirty_pages(mount: Callable[..., Mounted]) -> None:
    toy = mount("--writeback")
    descriptor = os.open(toy / "cached", os.O_RDWR)
    os.pwrite(descriptor, b"x" * 100_000, 0)
    assert toy.calls("write") == 0
    toy("invalidate", "cached")
    wait_until(lambda: toy.calls("write") > 0)
    assert os.pread(descriptor, 3, 0) == b"xxx"
    os.close(descriptor)


def test_a_length_in_a_mount_that_writes_back_is_the_one_that_a_setattr_is_answered(
    mount: Callable[..., Mounted],
) -> None:
    toy = mount("--writeback")
    assert "writeback" in toy("capabilities")
    assert "passthrough" not in toy("capabilities")
    descriptor = os.open(toy / "cached", os.O_RDWR | os.O_TRUNC)
    assert toy("last", "setattr")[1] == -1
    assert os.fstat(descriptor).st_size == 0
    toy("resize", "cached", 12345)
    assert os.fstat(descriptor).st_size == 0
    os.close(descriptor)


def test_passthrough_does_without_the_server(mount: Callable[..., Mounted], tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(b"b" * SIZE)
    toy = mount("--backing", str(backing))
    if "passthrough" not in toy("capabilities"):
        pytest.skip("the kernel has no FUSE_PASSTHROUGH")
    first, second = os.open(toy / "passed", os.O_RDWR), os.open(toy / "passed", os.O_RDONLY)
    os.pwrite(first, b"hello", 10)
    assert os.pread(second, 7, 9) == b"bhellob"
    assert backing.read_bytes()[9:16] == b"bhellob"
    os.close(first)
    os.close(second)
    wait_until(lambda: toy.calls("release") == 2)
    assert (toy / "passed").read_bytes()[9:16] == b"bhellob"
    assert toy.calls("read") == toy.calls("write") == 0


# -- requests under way -------------------------------------------------------------------------


def test_slow_request_delays_no_other(toy: Mounted) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        slow = pool.submit((toy / "held").read_bytes)
        wait_until(lambda: toy("held") > 0)
        assert len((toy / "data").read_bytes()) == SIZE
        assert not slow.done()
        toy("let_go")
        assert len(slow.result()) == SIZE


def test_thousand_requests_under_way(toy: Mounted) -> None:
    toy("fill", "held", 5)
    descriptor = os.open(toy / "held", os.O_RDONLY)
    with concurrent.futures.ThreadPoolExecutor(1000) as pool:
        reads = [pool.submit(os.pread, descriptor, 512, 512 * index) for index in range(1000)]
        wait_until(lambda: toy("held") == 1000)
        toy("let_go")
        assert all(read.result() == b"\5" * 512 for read in reads)
    os.close(descriptor)
    assert len((toy / "data").read_bytes()) == SIZE


def test_killed_client_leaves_nothing_behind(toy: Mounted) -> None:
    client = subprocess.Popen(["head", "-c1", toy / "held"], stdout=subprocess.DEVNULL)
    wait_until(lambda: toy("held") > 0)
    client.send_signal(signal.SIGKILL)
    toy("let_go")
    client.wait()
    wait_until(lambda: toy.calls("release") == 1)
    assert toy("held") == 0
    subprocess.run(["umount", toy.path], check=True)
    assert toy.wait() == ""


def test_signal_does_not_end_a_request(toy: Mounted) -> None:
    client = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, signal, sys; signal.signal(signal.SIGUSR1, lambda *a: None); "
            "signal.siginterrupt(signal.SIGUSR1, True); print(len(os.read(os.open(sys.argv[1], 0), 100)))",
            toy / "held",
        ],
        stdout=subprocess.PIPE,
    )
    wait_until(lambda: toy("held") > 0)
    client.send_signal(signal.SIGUSR1)
    assert len((toy / "data").read_bytes()) == SIZE
    toy("let_go")
    stdout, _ = client.communicate()
    assert stdout == b"100\n"


def test_forced_unmount_with_a_request_under_way_ends_the_server(toy: Mounted) -> None:
    client = subprocess.Popen(["cat", toy / "held"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(lambda: toy("held") > 0)
    subprocess.run(["umount", "-f", "-l", toy.path], check=True)
    _, stderr = client.communicate()
    assert client.returncode == 1
    assert b"not connected" in stderr or b"aborted" in stderr
    toy("let_go")
    assert toy.wait() == ""


def test_lazy_unmount_serves_who_has_files_open(toy: Mounted) -> None:
    toy("fill", "data", 1)
    with open(toy / "data", "rb", buffering=0) as file:
        subprocess.run(["umount", "-l", toy.path], check=True)
        assert os.listdir(toy.path) == []
        assert file.read(3) == b"\1\1\1"
    assert toy.wait() == ""


def test_killed_server_leaves_errors_and_no_hanging_client(toy: Mounted) -> None:
    descriptor = os.open(toy / "data", os.O_RDONLY)
    toy.process.kill()
    toy.process.wait()
    with pytest.raises(OSError, match=r"not connected|aborted"):
        os.read(descriptor, 3)
    with pytest.raises(OSError, match=r"not connected|aborted"):
        os.close(descriptor)


def test_mounted_by_another_user_through_fusermount3(mount: Callable[..., Mounted], tmp_path: Path) -> None:
    helper = shutil.which("fusermount3")
    if helper is None or not os.stat(helper).st_mode & stat.S_ISUID or not os.stat("/dev/fuse").st_mode & 0o006:
        pytest.skip("fusermount3 is not there for users")
    path = Path("/tmp") / f"devfuse-{os.getpid()}"
    path.mkdir()
    shutil.chown(path, "nobody")
    try:
        toy = mount("--user", "nobody", path=path)
        as_nobody = ["setpriv", "--reuid", "nobody", "--regid", str(pwd.getpwnam("nobody").pw_gid), "--clear-groups"]
        done = subprocess.run([*as_nobody, "head", "-c3", path / "data"], check=True, capture_output=True)
        assert done.stdout == bytes(3)
        subprocess.run([*as_nobody, "fusermount3", "-u", path], check=True)
        assert toy.wait() == ""
    finally:
        subprocess.run(["umount", "-l", path], check=False, capture_output=True)
        path.rmdir()
