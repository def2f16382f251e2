"""Cache modes on a real mount: what reaches the node, what the kernel keeps, and that nobody ever sees old data."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, check_image, qcow2, raw, refusal, run

LENGTH = 4 << 20
PAGE = 4096
Mounting = Callable[..., Mount]


def _by_mode(*pairs: tuple[str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("mode", "transport"), [pytest.param(*pair, id="-".join(pair)) for pair in pairs])


#: what can be had through which transport
_BOTH = [(mode, name) for name in ("devfuse", "pyfuse3") for mode in ("direct", "page")]
_ALL = [*_BOTH, ("writeback", "devfuse"), ("passthrough", "devfuse")]
#: pyfuse3 has no shared mappings of files that bypass the page cache
_MAPPED = [pair for pair in _ALL if pair != ("direct", "pyfuse3")]
in_all_modes = _by_mode(*_ALL)
where_writes_end = _by_mode(*_BOTH)
with_a_cache = _by_mode(("page", "devfuse"), ("page", "pyfuse3"), ("writeback", "devfuse"))
in_both_transports = pytest.mark.parametrize("transport", ["devfuse", "pyfuse3"])
by_devfuse = pytest.mark.parametrize("transport", ["devfuse"])


@contextmanager
def fails(code: int) -> Iterator[None]:
    """A block that fails with the errno *code*."""
    with pytest.raises(OSError, match=re.escape(os.strerror(code))) as caught:
        yield
    assert caught.value.errno == code


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def closed(mounted: Mount) -> None:
    """Wait until the daemon has heard that no file is open any more, which close(2) does not wait for."""
    wait_until(lambda: not any(file["open-files"] for file in mounted.qmp("query-fuse-files")))


@pytest.fixture
def image(scratch: Path) -> Path:
    """A raw file of LENGTH bytes, no two sectors of which are alike."""
    path = scratch / "disk.raw"
    path.write_bytes(b"".join(number.to_bytes(4, "big") * 128 for number in range(LENGTH // 512)))
    return path


def cached(mount: Mounting, image: Path, mode: str, *more: Any, **options: Any) -> Mount:
    """A mount of the raw node ``disk`` over *image*, cached in *mode*."""
    return mount(raw("disk", image, **options), *more, options=["--cache", f"disk={mode}"])


def operations(mounted: Mount, name: str = "disk") -> tuple[int, int]:
    """How many reads and writes have reached the node *name*."""
    (stats,) = (entry["stats"] for entry in mounted.qmp("query-blockstats") if entry["node-name"] == name)
    return stats["rd_operations"], stats["wr_operations"]


def modes(mounted: Mount) -> dict[str, str]:
    return {file["node-name"]: file["cache"] for file in mounted.qmp("query-fuse-files")}


def complaint(mounted: Mount, command: str, arguments: Any) -> str:
    """The description of the error with which *command* is refused."""
    text: str = mounted.qmp.ask({"execute": command, "arguments": arguments})["error"]["desc"]
    return text


# --- what reaches the node -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "transport", "reads", "writes"),
    [
        ("direct", "devfuse", 10, 10),
        ("direct", "pyfuse3", 10, 10),
        ("page", "devfuse", 0, 10),
        ("page", "pyfuse3", 0, 10),
        ("writeback", "devfuse", 0, 0),
        ("passthrough", "devfuse", 0, 0),
    ],
)
def test_the_mode_decides_what_reaches_the_node(
    mount: Mounting, image: Path, mode: str, reads: int, writes: int
) -> None:
    mounted = cached(mount, image, mode)
    with opened(mounted / "disk", os.O_RDWR) as disk:
        os.pread(disk, PAGE, 0)  # what is kept, is there now
        before = operations(mounted)
        for _ in range(10):
            os.pread(disk, PAGE, 0)
        between = operations(mounted)
        for number in range(10):
            os.pwrite(disk, b"x", number)
        after = operations(mounted)
    assert (between[0] - before[0], after[1] - between[1]) == (reads, writes)
    mounted.umount()
    assert image.read_bytes()[:11] == b"x" * 10 + b"\0"


def test_the_mode_is_an_extended_attribute(mount: Mounting, image: Path) -> None:
    mounted = cached(mount, image, "page", {"driver": "null-co", "node-name": "other"})
    assert os.getxattr(mounted / "disk", "user.fusebd.cache") == b"page"
    assert os.getxattr(mounted / "other", "user.fusebd.cache") == b"direct"
    mounted.umount()


def test_a_node_that_comes_later_is_cached_as_was_asked_for(mount: Mounting, image: Path) -> None:
    mounted = mount(options=["--cache", "disk=page"])
    mounted.qmp("blockdev-add", raw("disk", image))
    assert modes(mounted) == {"disk": "page"}
    mounted.qmp("blockdev-del", {"node-name": "disk"})
    mounted.qmp("blockdev-add", raw("disk", image))
    assert modes(mounted) == {"disk": "page"}
    mounted.umount()


@by_devfuse
def test_what_is_written_back_is_there_after_fsync_and_after_close(mount: Mounting, image: Path) -> None:
    mounted = cached(mount, image, "writeback")
    with opened(mounted / "disk", os.O_RDWR) as disk:
        os.pwrite(disk, b"first", 0)
        os.fsync(disk)
        assert image.read_bytes()[:5] == b"first"
        os.pwrite(disk, b"second", 1 << 20)
    assert image.read_bytes()[1 << 20 : (1 << 20) + 6] == b"second"
    mounted.umount()


@by_devfuse
def test_what_is_written_back_is_not_lost_at_unmount(mount: Mounting, image: Path) -> None:
    mounted = cached(mount, image, "writeback")
    with opened(mounted / "disk", os.O_RDWR) as disk:
        mapped = mmap.mmap(disk, LENGTH)
    mapped[1000:1004] = b"last"
    mapped.close()
    mounted.umount()
    assert image.read_bytes()[1000:1004] == b"last"


# --- everybody sees the same -----------------------------------------------------------------------


class Clients:
    """Ways to one file: through the page cache as far as the mode has it, by O_DIRECT, by a shared mapping."""

    def __init__(self, path: Path, *, mapped: bool) -> None:
        self._path = path
        self._fds = {
            "read-write": os.open(path, os.O_RDWR),
            "read-only": os.open(path, os.O_RDONLY),
            "direct": os.open(path, os.O_RDWR | os.O_DIRECT),
            "synchronous": os.open(path, os.O_RDWR | os.O_DSYNC),
        }
        self._mapping = mmap.mmap(self._fds["read-write"], LENGTH) if mapped else None
        self._page = mmap.mmap(-1, 16 * PAGE)

    @property
    def readers(self) -> list[str]:
        return [*self._fds, *(["mapping"] if self._mapping is not None else [])]

    @property
    def writers(self) -> list[str]:
        return [name for name in self.readers if name != "read-only"]

    def read(self, name: str, offset: int, length: int) -> bytes:
        if name == "mapping":
            assert self._mapping is not None
            return self._mapping[offset : offset + length]
        if name == "direct":
            start = offset & -PAGE
            size = -(-(offset + length - start) // PAGE) * PAGE
            os.preadv(self._fds[name], [memoryview(self._page)[:size]], start)
            return self._page[offset - start : offset - start + length]
        return os.pread(self._fds[name], length, offset)

    def write(self, name: str, offset: int, data: bytes) -> None:
        if name == "mapping":
            assert self._mapping is not None
            self._mapping[offset : offset + len(data)] = data
        elif name == "direct":
            self._page[: len(data)] = data
            assert os.pwritev(self._fds[name], [memoryview(self._page)[: len(data)]], offset) == len(data)
        else:
            assert os.pwrite(self._fds[name], data, offset) == len(data)

    def reopen(self, name: str) -> None:
        flags = {"read-only": os.O_RDONLY, "direct": os.O_RDWR | os.O_DIRECT, "synchronous": os.O_RDWR | os.O_DSYNC}
        if name in flags:
            os.close(self._fds[name])
            self._fds[name] = os.open(self._path, flags[name])

    def sync(self) -> None:
        if self._mapping is not None:
            self._mapping.flush()
        os.fsync(self._fds["read-write"])

    def close(self) -> None:
        if self._mapping is not None:
            self._mapping.close()
        for descriptor in self._fds.values():
            os.close(descriptor)


def exercise(clients: Clients, model: bytearray, *, seed: int, steps: int) -> None:
    """Writes by any client, each read back by all."""
    rng = random.Random(seed)
    for _ in range(steps):
        writer = rng.choice(clients.writers)
        offset, length = rng.randrange(LENGTH - 8 * PAGE), rng.randrange(1, 7 * PAGE)
        if writer == "direct":
            offset, length = offset & -PAGE, (length + PAGE) & -PAGE
        data = rng.randbytes(length)
        clients.write(writer, offset, data)
        model[offset : offset + length] = data
        start, end = max(offset - 100, 0), offset + length + 100
        for reader in rng.sample(clients.readers, len(clients.readers)):
            assert clients.read(reader, start, end - start) == model[start:end], (writer, reader, offset, length)
        if rng.random() < 0.2:
            clients.reopen(rng.choice(clients.readers))
        if rng.random() < 0.1:
            clients.sync()


@in_all_modes
def test_buffered_direct_and_mapped_clients_see_what_each_other_writes(
    mount: Mounting, image: Path, mode: str, transport: str
) -> None:
    mounted = cached(mount, image, mode, cache={"no-flush": True})
    model = bytearray(image.read_bytes())
    clients = Clients(mounted / "disk", mapped=(mode, transport) in _MAPPED)
    exercise(clients, model, seed=1, steps=150)
    clients.sync()
    assert image.read_bytes() == model
    clients.close()
    mounted.umount()
    assert image.read_bytes() == model


@in_both_transports
def test_what_is_read_while_a_direct_write_is_under_way_is_not_kept(mount: Mounting, image: Path) -> None:
    group = {"qom-type": "throttle-group", "id": "slow", "limits": {"bps-write": 64 * PAGE}}
    node = {"driver": "throttle", "node-name": "disk", "throttle-group": "slow", "file": raw("inner", image)}
    mounted = mount(node, options=["--object", json.dumps(group), "--cache", "disk=page"])
    page = mmap.mmap(-1, PAGE)
    with opened(mounted / "disk", os.O_RDONLY) as reader, opened(mounted / "disk", os.O_RDWR | os.O_DIRECT) as writer:
        with ThreadPoolExecutor() as pool:
            os.pwrite(writer, bytes(mmap.mmap(-1, 32 * PAGE)), 1 << 20)  # uses up what goes at once
            page.write(b"new!" * (PAGE // 4))
            writing = pool.submit(os.pwritev, writer, [page], 0)
            reads = 0
            while not writing.done():
                os.pread(reader, PAGE, 0)
                reads += 1
        assert os.pread(reader, PAGE, 0) == page[:]
    assert reads > 1
    mounted.umount()


@by_devfuse
@pytest.mark.parametrize("mode", ["page", "direct"])
def test_other_files_of_a_mount_that_writes_back_are_as_right(mount: Mounting, image: Path, mode: str) -> None:
    node = raw("disk", image, cache={"no-flush": True})
    mounted = mount(node, options=["--cache", f"disk={mode}", "--cache", "other=writeback"])
    model = bytearray(image.read_bytes())
    clients = Clients(mounted / "disk", mapped=True)
    exercise(clients, model, seed=2, steps=100)
    before = operations(mounted)[1]
    clients.write("read-write", 0, b"at once")
    assert operations(mounted)[1] == before + 1
    clients.close()
    mounted.umount()
    assert image.read_bytes() == b"at once" + model[7:]


@in_all_modes
@pytest.mark.parametrize("engine", ["libaio-direct", "psync-buffered"])
def test_fio_verifies_what_it_wrote(mount: Mounting, scratch: Path, mode: str, engine: str) -> None:
    _fio_verify(mount, scratch, mode, engine)


@_by_mode(*_MAPPED)
def test_fio_verifies_what_it_wrote_into_a_mapping(mount: Mounting, scratch: Path, mode: str) -> None:
    _fio_verify(mount, scratch, mode, "mmap")


def _fio_verify(mount: Mounting, scratch: Path, mode: str, engine: str) -> None:
    sizes = "4k/65:12k/15:64k/15:1m/5" if engine == "mmap" else "512/10:4k/50:12k/15:64k/20:1m/5"
    length = 12 << 20
    (scratch / "disk.raw").write_bytes(bytes(length))
    mounted = cached(mount, scratch / "disk.raw", mode)
    name, _, way = engine.partition("-")
    run(
        "fio", "--name=verify", f"--filename={mounted / 'disk'}", f"--size={length}", "--allow_file_create=0",
        "--rw=randwrite", f"--bssplit={sizes}", f"--blockalign={sizes.partition('/')[0]}", f"--ioengine={name}",
        f"--direct={int(way == 'direct')}", "--iodepth=16", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1",
        "--verify_dump=0", "--fsync=300", "--randseed=7",
        cwd=scratch,
    )  # fmt: skip
    mounted.umount()


@by_devfuse
def test_a_qcow2_image_that_is_written_back_is_whole(mount: Mounting, scratch: Path) -> None:
    image = scratch / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(LENGTH))
    mounted = mount(qcow2("disk", image, cache={"no-flush": True}), options=["--cache", "disk=writeback"])
    model = bytearray(LENGTH)
    clients = Clients(mounted / "disk", mapped=True)
    exercise(clients, model, seed=3, steps=100)
    clients.close()
    mounted.umount()
    check_image(image)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, scratch / "converted")
    assert (scratch / "converted").read_bytes() == model


# --- changes on another way ------------------------------------------------------------------------


def stacked(mount: Mounting, image: Path, *caches: str) -> Mount:
    """Three files of the same bytes, one node above the other: ``disk``, ``middle`` and ``upper``."""
    options = [word for cache in caches for word in ("--cache", cache)]
    middle = {"driver": "raw", "node-name": "middle", "file": "disk"}
    upper = {"driver": "raw", "node-name": "upper", "file": "middle"}
    return mount(raw("disk", image), middle, upper, options=options)


STACK = ("disk", "middle", "upper")


@in_both_transports
@pytest.mark.parametrize("written", STACK)
def test_a_write_through_another_node_is_seen_at_once(mount: Mounting, image: Path, written: str) -> None:
    mounted = stacked(mount, image, *(f"{name}=page" for name in STACK))
    readers = {name: os.open(mounted / name, os.O_RDONLY) for name in STACK}
    model = bytearray(image.read_bytes())
    rng = random.Random(4)
    with opened(mounted / written, os.O_RDWR) as writer:
        for _ in range(50):
            for name, reader in readers.items():
                assert os.pread(reader, LENGTH, 0) == model, name
            offset, data = rng.randrange(LENGTH - 10000), rng.randbytes(rng.randrange(1, 10000))
            os.pwrite(writer, data, offset)
            model[offset : offset + len(data)] = data
            for name, reader in readers.items():
                assert os.pread(reader, len(data), offset) == data, name
    for reader in readers.values():
        os.close(reader)
    mounted.umount()


@in_both_transports
def test_a_mapping_sees_what_is_written_through_another_node(mount: Mounting, image: Path) -> None:
    mounted = stacked(mount, image, "disk=page", "upper=page")
    with opened(mounted / "disk", os.O_RDONLY) as reader, opened(mounted / "upper", os.O_WRONLY) as writer:
        mapped = mmap.mmap(reader, LENGTH, mmap.MAP_SHARED, mmap.PROT_READ)
        for number in range(1, 50):
            os.pwrite(writer, bytes([number]) * 100, number * 1000)
            assert mapped[number * 1000 : number * 1000 + 100] == bytes([number]) * 100
        mapped.close()
    mounted.umount()


@by_devfuse
def test_zeroes_and_copies_through_another_node_are_seen_at_once(mount: Mounting, image: Path) -> None:
    from fusebd.drivers.file.syscalls import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate

    mounted = stacked(mount, image, "disk=page")
    model = bytearray(image.read_bytes())
    with opened(mounted / "disk", os.O_RDONLY) as reader, opened(mounted / "upper", os.O_RDWR) as writer:
        assert os.pread(reader, LENGTH, 0) == model
        fallocate(writer, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 8192, 8192)
        model[8192:16384] = bytes(8192)
        assert os.pread(reader, LENGTH, 0) == model
        assert os.copy_file_range(writer, writer, 65536, 1 << 20, 2 << 20) == 65536
        model[2 << 20 : (2 << 20) + 65536] = model[1 << 20 : (1 << 20) + 65536]
        assert os.pread(reader, LENGTH, 0) == model
    mounted.umount()


@in_both_transports
def test_a_filter_that_is_inserted_is_seen_by_who_has_the_file_open(mount: Mounting, image: Path) -> None:
    mounted = cached(mount, image, "page")
    with opened(mounted / "disk", os.O_RDONLY) as disk:
        os.pread(disk, PAGE, 0)
        rule = {"event": "none", "iotype": "read", "errno": 5, "sector": 0}
        mounted.qmp(
            "block-filter-insert",
            {"node-name": "disk", "filter": {"driver": "blkdebug", "node-name": "debug", "inject-error": [rule]}},
        )

        def fails_now() -> bool:
            try:
                os.pread(disk, PAGE, 0)
            except OSError as error:
                return error.errno == errno.EIO
            return False

        wait_until(fails_now)
    mounted.umount()


@in_both_transports
def test_opening_again_shows_what_was_changed_from_outside(mount: Mounting, image: Path) -> None:
    mounted = cached(mount, image, "page")
    for number in range(1, 5):
        assert (mounted / "disk").read_bytes()[:1] != bytes([number + 100])
        closed(mounted)
        with open(image, "r+b") as outside:
            outside.write(bytes([number + 100]))
        assert (mounted / "disk").read_bytes()[:1] == bytes([number + 100])
    mounted.umount()


@in_both_transports
def test_opening_once_more_keeps_what_is_cached(mount: Mounting, image: Path) -> None:
    mounted = cached(mount, image, "page")
    with opened(mounted / "disk", os.O_RDONLY) as disk:
        os.pread(disk, 65536, 0)
        before = operations(mounted)[0]
        with opened(mounted / "disk", os.O_RDONLY) as again:
            os.pread(again, 65536, 0)
        assert operations(mounted)[0] == before
    mounted.umount()


# --- the length ------------------------------------------------------------------------------------


@in_both_transports
def test_a_resize_under_a_client_with_cached_pages_is_seen(mount: Mounting, image: Path) -> None:
    mounted = cached(mount, image, "page")
    data = image.read_bytes()
    with opened(mounted / "disk", os.O_RDONLY) as disk:
        for length in (LENGTH // 2 + 100, LENGTH, 1000, LENGTH):
            assert len(os.pread(disk, LENGTH, 0)) == os.fstat(disk).st_size
            mounted.qmp("block_resize", {"node-name": "disk", "size": length})
            assert os.fstat(disk).st_size == length
            data = data[:length] + bytes(length - len(data[:length]))
            wait_until(lambda data=data: os.pread(disk, LENGTH, 0) == data)  # type: ignore[misc]
    mounted.umount()


@by_devfuse
def test_a_resize_while_nobody_has_it_open_is_seen_in_a_mount_that_writes_back(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image), options=["--cache", "disk=writeback"])
    data = image.read_bytes()
    for length in (LENGTH * 2, 4096, LENGTH):
        before = (mounted / "disk").stat()
        mounted.qmp("block_resize", {"node-name": "disk", "size": length})
        after = (mounted / "disk").stat()
        assert after.st_size == length
        assert after.st_ino != before.st_ino
        data = data[:length] + bytes(length - len(data[:length]))
        assert (mounted / "disk").read_bytes() == data
        closed(mounted)
    with os.scandir(mounted.point) as entries:
        assert [(entry.name, entry.stat().st_size) for entry in entries] == [("disk", LENGTH)]
    mounted.umount()


@by_devfuse
@pytest.mark.parametrize("name", ["disk", "other"])
def test_a_resize_under_an_open_file_is_refused_in_a_mount_that_writes_back(
    mount: Mounting, image: Path, name: str
) -> None:
    # the kernel goes by its own knowledge of the lengths of all files of the mount
    mounted = mount(raw(name, image), options=["--cache", "disk=writeback"])
    with opened(mounted / name, os.O_RDONLY) as disk:
        assert complaint(mounted, "block_resize", {"node-name": name, "size": 512}) == (
            f"Permission conflict on node '{name}': permissions 'resize' are both required by an unnamed block device "
            f"(uses node '{name}' as 'root' child) and unshared by an open file (uses node '{name}' as 'root' child)."
        )
        assert os.fstat(disk).st_size == LENGTH
    closed(mounted)
    mounted.qmp("block_resize", {"node-name": name, "size": 512})
    assert (mounted / name).stat().st_size == 512
    mounted.umount()


@by_devfuse
def test_a_client_can_truncate_what_is_written_back(mount: Mounting, image: Path) -> None:
    mounted = cached(mount, image, "writeback")
    with opened(mounted / "disk", os.O_RDWR) as disk, opened(mounted / "disk", os.O_RDONLY) as reader:
        os.pwrite(disk, b"x" * 10000, 0)
        for length in (5000, LENGTH * 2, LENGTH):
            os.ftruncate(disk, length)
            assert (os.fstat(reader).st_size, image.stat().st_size) == (length, length)
            assert os.pread(reader, 10000, 0) == b"x" * 5000 + bytes(5000 if length > 5000 else 0)
        os.truncate(mounted / "disk", 512)
        assert os.fstat(disk).st_size == 512
    mounted.umount()
    assert image.read_bytes() == b"x" * 512


@by_devfuse
def test_opening_with_o_trunc_changes_nothing_in_a_mount_that_writes_back(mount: Mounting, image: Path) -> None:
    mounted = cached(mount, image, "writeback")
    data = image.read_bytes()
    with opened(mounted / "disk", os.O_RDWR | os.O_TRUNC) as disk:
        assert os.fstat(disk).st_size == LENGTH
        assert os.pread(disk, LENGTH, 0) == data
    run("dd", "if=/dev/zero", f"of={mounted / 'disk'}", "bs=4k", "count=1", "status=none")
    mounted.umount()
    assert image.read_bytes() == bytes(4096) + data[4096:]


@by_devfuse
def test_writing_to_the_end_runs_out_of_space_in_a_mount_that_writes_back(mount: Mounting, image: Path) -> None:
    mounted = cached(mount, image, "writeback")
    output = run("dd", "if=/dev/zero", f"of={mounted / 'disk'}", "bs=64k", expect=[1])
    assert "No space left on device" in output
    closed(mounted)
    assert (mounted / "disk").stat().st_size == LENGTH
    assert (mounted / "disk").read_bytes() == bytes(LENGTH)
    mounted.umount()
    assert image.read_bytes() == bytes(LENGTH)


@by_devfuse
def test_a_write_across_the_end_is_reported_by_fsync_where_it_is_held_back(mount: Mounting, image: Path) -> None:
    mounted = cached(mount, image, "writeback")
    with opened(mounted / "disk", os.O_RDWR) as disk:
        os.pwrite(disk, b"y" * 8192, LENGTH - 4096)
        with fails(errno.ENOSPC):
            os.fsync(disk)
        wait_until(lambda: _code_of(lambda: os.pwrite(disk, b"z", 0)) == errno.ENOSPC)
        os.ftruncate(disk, LENGTH)  # tells the kernel where the end is
        os.pwrite(disk, b"z", 0)
        os.fsync(disk)
    assert image.read_bytes()[-4096:] == b"y" * 4096
    assert image.read_bytes()[:1] == b"z"
    mounted.umount()


def _code_of(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0


@where_writes_end
def test_writing_ends_at_the_end(mount: Mounting, image: Path, mode: str) -> None:
    mounted = cached(mount, image, mode)
    with opened(mounted / "disk", os.O_RDWR) as disk:
        assert os.pwrite(disk, b"x" * 10000, LENGTH - 5000) == 5000
        with fails(errno.ENOSPC):
            os.pwrite(disk, b"x", LENGTH)
        assert os.fstat(disk).st_size == LENGTH
    mounted.umount()
    assert image.read_bytes()[-5000:] == b"x" * 5000


# --- who else may write ----------------------------------------------------------------------------


@by_devfuse
def test_nobody_else_writes_what_is_written_back(mount: Mounting, image: Path) -> None:
    mounted = stacked(mount, image, "middle=writeback")
    with opened(mounted / "middle", os.O_RDWR), opened(mounted / "middle", os.O_RDWR):
        for name in ("disk", "upper"):
            with fails(errno.EBUSY):
                os.open(mounted / name, os.O_RDWR)
            os.close(os.open(mounted / name, os.O_RDONLY))
    closed(mounted)
    for name in ("disk", "upper"):
        with opened(mounted / name, os.O_RDWR):
            with fails(errno.EBUSY):
                os.open(mounted / "middle", os.O_RDWR)
            os.close(os.open(mounted / "middle", os.O_RDONLY))
        closed(mounted)
    mounted.umount()


@by_devfuse
def test_closing_and_opening_again_in_quick_succession_is_no_conflict(mount: Mounting, image: Path) -> None:
    mounted = cached(mount, image, "writeback", cache={"no-flush": True})
    for number in range(200):
        with opened(mounted / "disk", os.O_RDWR) as disk:
            os.pwrite(disk, bytes([number]), number)
    mounted.umount()
    assert image.read_bytes()[:200] == bytes(range(200))


def test_a_node_that_another_one_writes_to_cannot_be_written_back(scratch: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", scratch / "disk.qcow2", "1M")
    (scratch / "mnt").mkdir()
    node = qcow2("disk", scratch / "disk.qcow2")
    node["file"]["node-name"] = "storage"
    words = ["--cache", "storage=writeback", "--blockdev", json.dumps(node)]
    assert refusal("mount", *words, scratch / "mnt") == (
        f"{scratch}/mnt: Node 'storage' cannot have cache mode 'writeback': Permission conflict on node 'storage': "
        "permissions 'write, resize' are both required by node 'disk' (uses node 'storage' as 'file' child) "
        "and unshared by an open file (uses node 'storage' as 'root' child)."
    )


# --- errors ----------------------------------------------------------------------------------------


def faulty(mount: Mounting, image: Path, mode: str, **rule: Any) -> Mount:
    below = {"driver": "file", "filename": str(image)}
    node = {
        "driver": "raw",
        "node-name": "disk",
        "file": {"driver": "blkdebug", "image": below, "inject-error": [rule]},
    }
    return mount(node, options=["--cache", f"disk={mode}"])


@in_both_transports
def test_a_write_that_fails_is_reported_at_once_where_it_goes_through(mount: Mounting, image: Path) -> None:
    mounted = faulty(mount, image, "page", event="write_aio", errno=errno.EREMOTEIO, once=True)
    with opened(mounted / "disk", os.O_RDWR) as disk:
        with fails(errno.EREMOTEIO):
            os.pwrite(disk, b"lost", 0)
        assert os.pread(disk, 4, 0) == image.read_bytes()[:4]
        os.fsync(disk)
    mounted.umount()


@with_a_cache
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_mapped_write_that_fails_is_reported_by_fsync(mount: Mounting, image: Path, mode: str, code: int) -> None:
    mounted = faulty(mount, image, mode, event="write_aio", errno=code, once=True)
    with opened(mounted / "disk", os.O_RDWR) as disk:
        mapped = mmap.mmap(disk, LENGTH)
        mapped[0:4] = b"lost"
        with fails(code):
            os.fsync(disk)
        os.fsync(disk)
        mapped.close()
    mounted.umount()


@by_devfuse
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_write_that_was_held_back_and_fails_is_reported_by_fsync(mount: Mounting, image: Path, code: int) -> None:
    mounted = faulty(mount, image, "writeback", event="write_aio", errno=code, once=True)
    with opened(mounted / "disk", os.O_RDWR) as disk:
        os.pwrite(disk, b"lost", 0)
        with fails(code):
            os.fsync(disk)
        os.fsync(disk)
    mounted.umount()


@by_devfuse
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_write_that_was_held_back_and_fails_is_reported_by_close(mount: Mounting, image: Path, code: int) -> None:
    mounted = faulty(mount, image, "writeback", event="write_aio", errno=code, once=True)
    disk = os.open(mounted / "disk", os.O_WRONLY)
    os.pwrite(disk, b"lost", 0)
    with fails(code):
        os.close(disk)
    mounted.umount()


@with_a_cache
@pytest.mark.parametrize("call", ["fsync", "close"])
def test_a_flush_that_fails_is_reported(mount: Mounting, image: Path, mode: str, call: str) -> None:
    mounted = faulty(mount, image, mode, event="flush_to_disk", once=True)
    disk = os.open(mounted / "disk", os.O_WRONLY)
    os.pwrite(disk, b"x", 0)
    with fails(errno.EIO):
        os.fsync(disk) if call == "fsync" else os.close(disk)
    if call == "fsync":
        os.close(disk)
    mounted.umount()


@with_a_cache
def test_a_read_that_fails_is_not_kept(mount: Mounting, image: Path, mode: str) -> None:
    # the kernel tries a second time by itself, so once is not enough
    mounted = faulty(mount, image, mode, event="read_aio", sector=(LENGTH - PAGE) // 512)
    with opened(mounted / "disk", os.O_RDONLY) as disk:
        for _ in range(3):
            with fails(errno.EIO):
                os.pread(disk, PAGE, LENGTH - PAGE)
            assert os.pread(disk, PAGE, 0) == image.read_bytes()[:PAGE]
    mounted.umount()


# --- changing the mode of a running mount ----------------------------------------------------------


@in_both_transports
def test_a_change_of_mode_holds_for_what_is_opened_from_then_on(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    with opened(mounted / "disk", os.O_RDONLY) as before:
        mounted.qmp("fuse-set-cache", {"node-name": "disk", "cache": "page"})
        assert os.getxattr(mounted / "disk", "user.fusebd.cache") == b"page"
        with opened(mounted / "disk", os.O_RDONLY) as after:
            os.pread(after, PAGE, 0)
            reads = operations(mounted)[0]
            os.pread(after, PAGE, 0)
            assert operations(mounted)[0] == reads
            os.pread(before, PAGE, 0)
            assert operations(mounted)[0] == reads + 1
    mounted.umount()


@in_both_transports
def test_files_opened_in_different_modes_see_the_same(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image))
    descriptors = []
    for mode in ("direct", "page", "direct"):
        mounted.qmp("fuse-set-cache", {"node-name": "disk", "cache": mode})
        descriptors.append(os.open(mounted / "disk", os.O_RDWR))
    for number in range(60):
        for descriptor in descriptors:
            assert len({os.pread(reader, 10, number * 100) for reader in descriptors}) == 1
            os.pwrite(descriptor, os.urandom(10), number * 100)
    for descriptor in descriptors:
        os.close(descriptor)
    mounted.umount()


def test_the_modes_can_be_asked_for(mount: Mounting, image: Path) -> None:
    mounted = cached(mount, image, "page", {"driver": "null-co", "node-name": "other"})
    with opened(mounted / "disk", os.O_RDONLY):
        common = {"mountpoint": str(mounted.point)}
        assert mounted.qmp("query-fuse-files") == [
            {"node-name": "disk", "cache": "page", "wanted-cache": "page", "open-files": 1, **common},
            {"node-name": "other", "cache": "direct", "wanted-cache": "direct", "open-files": 0, **common},
        ]
    mounted.umount()


def test_a_node_without_a_file_has_no_mode(mount: Mounting) -> None:
    mounted = mount()
    asked = {"node-name": "none", "cache": "page"}
    assert complaint(mounted, "fuse-set-cache", asked) == "Node 'none' is not shown as a file"
    asked["cache"] = "nonsense"
    assert complaint(mounted, "fuse-set-cache", asked) == "Parameter 'cache' does not accept value 'nonsense'"
    mounted.umount()


@pytest.mark.parametrize(
    ("transport", "reason"),
    [("devfuse", "the mount was made without it"), ("pyfuse3", "it takes the devfuse transport")],
)
def test_writing_back_has_to_be_asked_for_at_the_mount(mount: Mounting, image: Path, reason: str) -> None:
    mounted = mount(raw("disk", image))
    asked = {"node-name": "disk", "cache": "writeback"}
    text = f"Node 'disk' cannot have cache mode 'writeback': {reason}"
    assert complaint(mounted, "fuse-set-cache", asked) == text
    assert modes(mounted) == {"disk": "direct"}
    mounted.umount()


@by_devfuse
def test_a_mount_that_writes_back_can_do_so_for_other_nodes_later(mount: Mounting, image: Path) -> None:
    mounted = mount(raw("disk", image), options=["--cache", "later=writeback"])
    mounted.qmp("fuse-set-cache", {"node-name": "disk", "cache": "writeback"})
    with opened(mounted / "disk", os.O_RDWR) as disk:
        os.pwrite(disk, b"held", 0)
        assert operations(mounted)[1] == 0
    assert operations(mounted)[1] == 1
    mounted.umount()


# --- exports ---------------------------------------------------------------------------------------


def export(mounted: Mount, file: Path, **options: Any) -> dict[str, Any]:
    file.touch()
    return {
        "type": "fuse",
        "id": file.name,
        "node-name": "disk",
        "mountpoint": str(file),
        "writable": True,
        **options,
    }


def test_an_export_has_a_mode_of_its_own(mount: Mounting, image: Path, scratch: Path) -> None:
    mounted = mount(raw("disk", image))
    file = scratch / "export"
    mounted.qmp("block-export-add", export(mounted, file, cache="page"))
    with opened(file, os.O_RDWR) as exported, opened(mounted / "disk", os.O_RDWR) as disk:
        assert os.pread(exported, 4, 0) == image.read_bytes()[:4]
        reads = operations(mounted)[0]
        os.pread(exported, 4, 0)
        assert operations(mounted)[0] == reads
        os.pwrite(disk, b"from the mount", 0)
        assert os.pread(exported, 14, 0) == b"from the mount"
        os.pwrite(exported, b"an export", 5)
        assert os.pread(disk, 14, 0) == b"from an export"
    asked = {"node-name": "disk", "cache": "direct"}
    assert complaint(mounted, "fuse-set-cache", asked) == (
        "Node 'disk' is shown as a file more than once: 'mountpoint' must say which"
    )
    mounted.qmp("fuse-set-cache", {**asked, "mountpoint": str(file)})
    assert os.getxattr(file, "user.fusebd.cache") == b"direct"
    mounted.qmp("block-export-del", {"id": "export"})
    mounted.umount()


@by_devfuse
def test_an_export_that_grows_can_be_written_back(mount: Mounting, image: Path, scratch: Path) -> None:
    mounted = mount(raw("disk", image))
    file = scratch / "export"
    options = export(mounted, file, cache="writeback")
    assert complaint(mounted, "block-export-add", options) == (
        "cache=writeback takes growable=on: the kernel lets writes past the end"
    )
    mounted.qmp("block-export-add", {**options, "growable": True})
    with fails(errno.EBUSY):
        os.open(mounted / "disk", os.O_RDWR)
    assert "permissions 'resize' are both required" in complaint(
        mounted, "block_resize", {"node-name": "disk", "size": 512}
    )
    with opened(file, os.O_RDWR) as exported:
        os.pwrite(exported, b"far away", LENGTH + 100_000)
        assert image.stat().st_size == LENGTH
        os.fsync(exported)
        assert image.stat().st_size == LENGTH + 100_008
    assert file.stat().st_size == LENGTH + 100_008
    mounted.qmp("block-export-del", {"id": "export"})
    mounted.umount()
    assert image.read_bytes()[LENGTH:] == bytes(100_000) + b"far away"
