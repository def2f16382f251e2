"""ext4 below power cuts: its journal brings it back, and says so if that cannot be."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import KernelLog, Mount, file_system, fusebd, loop_device, run
from powercuts import cached, cut_later, drawn, rounds, tell, until_the_power_is_off

LENGTH = 64 << 20

#: nothing here depends on how requests reach the daemon
pytestmark = pytest.mark.parametrize("transport", ["devfuse"])


@pytest.fixture
def disk(mount: Callable[..., Mount], tmp_path: Path) -> Mount:
    """A mount whose node ``disk``, which is empty, has a volatile cache."""
    image = tmp_path / "disk.raw"
    with open(image, "wb") as file:
        file.truncate(LENGTH)
    return mount(cached(image))


def _make_ext4(mounted: Mount, features: str) -> None:
    run("mkfs.ext4", "-q", "-F", "-b", "1024", "-O", features, mounted / "disk")


class Files:
    """Files that come and go in the new directory *top*.  ``synced`` has the names and content of those on the disk."""

    def __init__(self, top: Path, seed: int) -> None:
        self.synced: dict[str, bytes] = {}
        self._top, self._rng = top, random.Random(seed)
        top.mkdir()

    def work(self, times: int) -> None:
        """Write *times* files, and do other things that nobody waits for.  Raises OSError if the disk fails."""
        for number in range(len(self.synced), len(self.synced) + times):
            directory = self._top / f"directory{number}"
            directory.mkdir()
            (directory / "new").write_bytes(self._rng.randbytes(2000))
            if number:
                (directory / "new").rename(self._top / f"directory{number - 1}" / "moved")
            if number > 1:
                (self._top / f"directory{number - 2}" / "moved").unlink()
            content = self._rng.randbytes(self._rng.randrange(30000))
            with open(self._top / f"file{number}", "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self.synced[f"file{number}"] = content

    def missing(self, count: int | None = None) -> list[str]:
        """Which of ``synced`` (or its first *count*) are not there, or not as they were written."""
        synced = list(self.synced.items())[:count]
        return [name for name, content in synced if _content(self._top / name) != content]


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _work_until_the_power_is_off(mounted: Mount, point: Path, seed: int) -> Files:
    """Files in a directory of their own, ``round`` and *seed*, in the file system that is mounted at *point* for it."""
    with until_the_power_is_off(mounted, point) as top:
        files = Files(top / f"round{seed}", seed)
        run("sync", "-f", top)
        cut_later(mounted, drawn(seed, 10, 250), torn=0.5)
        with pytest.raises(OSError, match=r"Input/output error|Read-only file system"):
            files.work(1000)
    return files


def test_ext4_is_sound_after_every_power_cut(disk: Mount, tmp_path: Path) -> None:
    _make_ext4(disk, "metadata_csum")
    synced = 0
    for seed in rounds(20, 300):
        files = _work_until_the_power_is_off(disk, tmp_path / "fs", seed)
        synced += len(files.synced)
        with loop_device(disk / "disk") as device:
            assert "needs_recovery" in run("dumpe2fs", "-h", device)
            with file_system(device, tmp_path / "fs") as top:
                assert not files.missing()
            run("e2fsck", "-f", "-n", device)
            with file_system(device, tmp_path / "fs") as top:
                run("rm", "-r", top / f"round{seed}")
    tell(synced, "files synced,", len(rounds(20, 300)), "cuts")
    assert synced > len(rounds(20, 300))
    disk.umount()


def test_ext4_without_a_journal_is_not(disk: Mount, tmp_path: Path) -> None:
    damaged = 0
    for seed in rounds(4, 50):
        _make_ext4(disk, "^has_journal")
        _work_until_the_power_is_off(disk, tmp_path / "fs", seed)
        damaged += "WARNING: Filesystem still has errors" in run("e2fsck", "-f", "-n", disk / "disk", expect=(0, 4, 12))
    tell(damaged, "damaged,", len(rounds(4, 50)), "cuts")
    assert damaged
    disk.umount()


#: what is said of a torn commit block, by the kernel, and of other torn blocks and of the first of all, by e2fsck
BAD_COMMIT = "incomplete commit block in transaction"
BAD_BLOCKS = "Journal checksum error found"
NO_LOG = "Journal superblock is corrupt"


def test_a_torn_write_in_the_journal_is_detected(disk: Mount, tmp_path: Path) -> None:
    _make_ext4(disk, "metadata_csum")
    point = tmp_path / "fs"
    ways: list[str] = []
    journal = json.loads(fusebd("targets", "--json", disk / "disk", "ext4:journal"))
    for seed in rounds(5, 100):
        with loop_device(disk / "disk") as device, file_system(device, point) as top:
            older = Files(top / f"older{seed}", seed)
            older.work(5)
        with until_the_power_is_off(disk, point) as top:
            newer = Files(top / f"newer{seed}", seed)
            before = _tear(disk, newer, journal, drawn(seed, 1, 40))
        with loop_device(disk / "disk") as device:
            ways.append(_detected(device, point))
            with file_system(device, point) as top:
                # Nothing is wrong with what was on the disk before, unless nobody can say any more what the log has.
                assert not older.missing()
                assert ways[-1] == NO_LOG or not newer.missing(before)
                run("rm", "-r", "-f", top / f"older{seed}", top / f"newer{seed}")
            run("e2fsck", "-f", "-n", device)
    tell({way: ways.count(way) for way in ways})
    disk.umount()


def _tear(mounted: Mount, files: Files, journal: list[dict[str, int]], nth: int) -> int:
    """Tear the *nth* write into the *journal* while *files* are made; how many of them were synced before.

    The first half kilobyte gets there, with whose first bytes every block of the journal says what it is.
    """
    rule = {"id": "torn", "action": "torn-write", "fill": "random", "ranges": journal, "nth": nth}
    mounted.qmp("fault-rule-add", {"node-name": "disk", "rule": rule})
    before = 0
    while not mounted.qmp("query-fault-rules", {"node-name": "disk"})["rules"][0]["hits"]:
        before = len(files.synced)
        files.work(1)
    files.work(3)
    mounted.qmp("fault-rule-remove", {"node-name": "disk", "id": "torn"})
    return before


def _detected(device: str, point: Path) -> str:
    """How the kernel's recovery says that the journal on *device* is torn.  In the end the file system is sound."""
    kernel_log = KernelLog()
    try:
        said = run("mount", device, point, expect=(0, 32))
        if not said:
            run("umount", point)
            # A commit block that is torn behind its header: the transaction counts all the same.
            assert kernel_log.wait_for(BAD_COMMIT)
            return BAD_COMMIT
        assert kernel_log.wait_for("JBD2: ")
    finally:
        kernel_log.close()
    repaired = run("e2fsck", "-f", "-y", device, expect=(1,))
    (way,) = [way for way in (BAD_BLOCKS, NO_LOG) if way in repaired]
    return way
