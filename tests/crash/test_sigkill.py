"""The daemon is killed while it writes: what it leaves opens, is free of errors, and has all that was flushed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from images import SECRET, create_encrypted, io, is_dirty
from mounting import Mount, Qmp, check_image, fusebd, qcow2, raw, run
from powercuts import rounds, tell

from fusebd.drivers.file.syscalls import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from fusebd.runtime import Place

LENGTH = 24 << 20
WRITERS = 4
BLOCK = 512


class Writer(threading.Thread):
    """Writes at random into a part of the node that is its own, with an fsync now and then, until the node is dead.

    With *holes*, some of what it writes are holes.  ``flushed`` is what was there at the last fsync that succeeded.
    ``uncertain`` has the blocks that were written since then, or are being written: they may have any of their contents
    since the last fsync.
    """

    def __init__(self, path: Path, start: int, content: bytes, seed: int, *, holes: bool = False) -> None:
        super().__init__()
        self._path, self._start, self._rng, self._holes = path, start, random.Random(seed), holes
        self.flushed = bytearray(content)
        self.uncertain: dict[int, list[bytes]] = {}
        self.flushes = 0

    def run(self) -> None:
        descriptor = os.open(self._path, os.O_RDWR)
        try:
            while True:
                for _ in range(self._rng.randrange(1, 12)):
                    self._write(descriptor)
                os.fsync(descriptor)
                self._note_flush()
        except OSError:
            pass  # killed
        finally:
            with contextlib.suppress(OSError):  # it says again that there is nobody
                os.close(descriptor)

    def _write(self, descriptor: int) -> None:
        length = int(2 ** self._rng.uniform(0, 8)) * BLOCK
        offset = self._rng.randrange(len(self.flushed) // BLOCK) * BLOCK
        length = min(length, len(self.flushed) - offset)
        punched = self._holes and self._rng.random() < 0.25
        data = bytes(length) if punched else self._rng.randbytes(length)
        for position in range(0, len(data), BLOCK):
            contents = self.uncertain.setdefault(offset + position, [])
            contents.append(data[position : position + BLOCK])
        if punched:
            fallocate(descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, self._start + offset, length)
        else:
            os.pwrite(descriptor, data, self._start + offset)

    def _note_flush(self) -> None:
        for offset, contents in self.uncertain.items():
            self.flushed[offset : offset + BLOCK] = contents[-1]
        self.uncertain.clear()
        self.flushes += 1

    def judge(self, image: bytes) -> None:
        """AssertionError if *image*, the whole disk, is not what was written."""
        found = memoryview(image)[self._start : self._start + len(self.flushed)]
        for offset in range(0, len(self.flushed), BLOCK):
            block = bytes(found[offset : offset + BLOCK])
            if block != self.flushed[offset : offset + BLOCK]:
                assert block in self.uncertain.get(offset, []), f"block at {self._start + offset}"


def _kill_while_writing(mounted: Mount, content: bytes, seed: int, *, holes: bool = False) -> list[Writer]:
    part = LENGTH // WRITERS
    writers = [
        Writer(mounted / "disk", start, content[start : start + part], seed + start, holes=holes)
        for start in range(0, LENGTH, part)
    ]
    for writer in writers:
        writer.start()
    time.sleep(random.Random(seed).uniform(0.2, 0.7))
    mounted.kill()
    for writer in writers:
        writer.join()
    return writers


def _content(image: Path) -> bytes:
    copy = image.with_suffix(".copy")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, copy)
    return copy.read_bytes()


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
def test_a_killed_daemon_leaves_a_sound_qcow2_image(
    mount: Callable[..., Mount], tmp_path: Path, cluster_size: int, backed: bool
) -> None:
    image, backing = tmp_path / "disk.qcow2", tmp_path / "backing.raw"
    options = ["-o", f"cluster_size={cluster_size}"]
    if backed:
        backing.write_bytes(random.Random(0).randbytes(LENGTH - (5 << 20)))
        options += ["-b", str(backing), "-F", "raw"]
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, image, str(LENGTH))
    flushes = 0
    # The same image again and again: half of its clusters are allocated already in the later rounds.
    for seed in range(2):
        content = _content(image)
        mounted = mount(qcow2("disk", image))
        writers = _kill_while_writing(mounted, content, seed)
        fusebd("umount", mounted.point)
        check_image(image, leaks=True)
        content = _content(image)
        for writer in writers:
            writer.judge(content)
            flushes += writer.flushes
        # It can be used again, by us as well.
        mounted = mount(qcow2("disk", image))
        assert (mounted / "disk").read_bytes() == content
        mounted.umount()
        check_image(image, leaks=True)
    assert flushes


#: options of qemu-img create, and what else there is of an image; 200 rounds in all if the run is long
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "small": {"cluster_size": 512},
    "version-2": {"cluster_size": 4096, "compat": "0.10"},
    "wide-refcounts": {"cluster_size": 1024, "refcount_bits": 64},
    "large": {"cluster_size": 2 << 20},
    "backed": {"cluster_size": 16384, "backed": True},
    "subclusters": {"extended_l2": "on", "backed": True},
    "compressed": {"cluster_size": 32768, "compressed": True},
    "data-file": {"cluster_size": 8192, "data_file": True},
    "snapshots": {"cluster_size": 4096, "snapshots": True},
    "lazy": {"cluster_size": 4096, "lazy_refcounts": "on"},
    "luks": {"encrypt.format": "luks", "encrypt.iter-time": 10, "encrypt.key-secret": "key"},
    "aes": {"cluster_size": 4096, "encrypt.format": "aes", "encrypt.key-secret": "key", "backed": True},
}


class Photographer(threading.Thread):
    """Makes snapshots and deletes them until the daemon is dead."""

    def __init__(self, mounted: Mount, seed: int) -> None:
        super().__init__()
        self._qmp, self._rng = Qmp(Place(str(mounted.point)).socket), random.Random(seed)

    def run(self) -> None:
        try:
            while True:
                name = str(self._rng.randrange(4))
                for verb in ("delete-", ""):
                    arguments = {"device": "disk", "name": name}
                    self._qmp.ask({"execute": f"blockdev-snapshot-{verb}internal-sync", "arguments": arguments})
                time.sleep(self._rng.uniform(0, 0.05))
        except (OSError, json.JSONDecodeError):
            pass  # killed
        finally:
            self._qmp.close()


def _image(directory: Path, name: str) -> Path:
    """A new image of one of KINDS."""
    options = dict(KINDS[name])
    backed, compressed = options.pop("backed", False), options.pop("compressed", False)
    options.pop("snapshots", None)
    path, backing = directory / "disk.qcow2", directory / "backing.raw"
    if "data_file" in options:
        options["data_file"] = directory / "disk.data"
    backing.write_bytes(random.Random(0).randbytes(LENGTH - (5 << 20)))
    words: tuple[str | Path, ...] = ("-b", backing, "-F", "raw") if backed else ()
    create_encrypted(path, LENGTH, *words, **options)
    if compressed:
        io(path, *(f"write -c -P {number % 255 + 1} {number * 64}k 64k" for number in range(LENGTH >> 16)))
    return path


@pytest.mark.parametrize("transport", ["devfuse"])  # pyfuse3 has no fallocate
@pytest.mark.parametrize("name", KINDS)
def test_whatever_a_killed_daemon_was_doing_the_image_is_sound(
    mount: Callable[..., Mount], tmp_path: Path, name: str
) -> None:
    image = _image(tmp_path, name)
    key = {"format": KINDS[name].get("encrypt.format"), "key-secret": "key"}
    options = qcow2("disk", image, discard="unmap", **({"encrypt": key} if key["format"] else {}))
    opened = f"json:{json.dumps({'driver': 'qcow2', **options})}" if key["format"] else str(image)

    def shown() -> bytes:
        run("qemu-img", "convert", *SECRET, "-f", "qcow2", "-O", "raw", opened, tmp_path / "copy")
        return (tmp_path / "copy").read_bytes()

    def check(*, leaks: bool) -> None:
        run("qemu-img", "check", *SECRET, "-f", "qcow2", opened, expect=(0, 3) if leaks else (0,))

    content = shown()
    flushes = repairs = 0
    for number in rounds(1, 20):
        mounted = mount(options, options=SECRET)
        photographer = Photographer(mounted, number) if "snapshots" in KINDS[name] else None
        if photographer is not None:
            photographer.start()
        writers = _kill_while_writing(mounted, content, number, holes=True)
        if photographer is not None:
            photographer.join()
        fusebd("umount", mounted.point)
        dirty = is_dirty(image)
        repairs += dirty
        if not dirty:
            check(leaks=True)
        # The daemon that comes next finds all that was flushed, and leaves a sound image.
        mounted = mount(options, options=SECRET)
        content = (mounted / "disk").read_bytes()
        mounted.umount()
        check(leaks=not dirty)
        for writer in writers:
            writer.judge(content)
            flushes += writer.flushes
        assert shown() == content
    tell(flushes, "fsyncs acknowledged,", repairs, "dirty images repaired")
    assert flushes


def test_a_killed_daemon_leaves_everything_that_was_flushed_to_a_raw_image(
    mount: Callable[..., Mount], tmp_path: Path
) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(LENGTH))
    writers = _kill_while_writing(mount(raw("disk", image)), bytes(LENGTH), 5)
    for writer in writers:
        writer.judge(image.read_bytes())
    assert sum(writer.flushes for writer in writers)


def test_umount_clears_what_a_killed_daemon_left(mount: Callable[..., Mount], tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"content" + bytes(4096))
    options = raw("disk", tmp_path / "disk.raw")
    mounted = mount(options)
    mounted.kill()
    with pytest.raises(OSError, match="not connected"):
        (mounted / "disk").read_bytes()
    fusebd("umount", mounted.point)
    assert list(mounted.point.iterdir()) == []
    assert [path for path in (tmp_path / "run").iterdir() if path.suffix != ".log"] == []
    assert "not mounted" in fusebd("umount", mounted.point, expect=(1,))
    mounted = mount(options)
    assert (mounted / "disk").read_bytes().startswith(b"content")
    mounted.umount()


def test_umount_clears_up_while_a_client_still_has_a_file_open(mount: Callable[..., Mount], tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(4096))
    mounted = mount(raw("disk", tmp_path / "disk.raw"))
    descriptor = os.open(mounted / "disk", os.O_RDONLY)
    try:
        mounted.kill()
        fusebd("umount", mounted.point)
        with pytest.raises(OSError, match="not connected"):
            os.read(descriptor, 512)
    finally:
        with contextlib.suppress(OSError):  # where close sends a flush, nobody answers that either
            os.close(descriptor)
    assert list(mounted.point.iterdir()) == []
