"""Power cuts below real programs: what they were promised is there afterwards, and a lying disk is found out."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from mounting import Mount, file_system, fusebd, loop_device, raw, run
from powercuts import cached, cut_later, drawn, rounds, tell, until_the_power_is_off

LENGTH = 64 << 20
#: transactions that a client of the database commits at most; the power is cut before it has, or at the end
TRANSACTIONS = 1000


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with open(path, "wb") as file:
        file.truncate(LENGTH)
    return path


def test_the_shell_cuts_the_power_and_switches_it_on_again(
    mount: Callable[..., Mount], image: Path, tmp_path: Path
) -> None:
    mounted = mount(cached(image))
    descriptor = os.open(mounted / "disk", os.O_RDWR)
    os.pwrite(descriptor, b"flushed." * 64, 0)
    os.fsync(descriptor)
    # The flush that comes next finds the power off.
    fusebd("power-cut", mounted.point, "disk", "keep=0", "operation=flush", "nth=1")
    os.pwrite(descriptor, b"pending." * 64, 0)
    with pytest.raises(OSError, match="Input/output"):
        os.fsync(descriptor)
    with pytest.raises(OSError, match="Input/output"):
        os.pread(descriptor, 512, 0)
    (entry,) = [entry for entry in mounted.qmp("query-ledger") if entry["kind"] == "fault"]
    assert (entry["action"], entry["offset"], entry["length"]) == ("dropped", 0, 512)
    fusebd("power-on", mounted.point, "disk")
    assert os.pread(descriptor, 512, 0) == b"flushed." * 64
    os.close(descriptor)
    assert "no volatile-cache driver" in _refused(mount, image, tmp_path)
    mounted.umount()
    assert image.read_bytes()[:512] == b"flushed." * 64


def _refused(mount: Callable[..., Mount], image: Path, tmp_path: Path) -> str:
    (tmp_path / "plain.raw").write_bytes(bytes(4096))
    plain = mount(raw("plain", tmp_path / "plain.raw"), name="other")
    said = fusebd("power-cut", plain.point, "plain", expect=(1,))
    plain.umount()
    return said


# --- sqlite ---

#: a client that commits transactions until the disk fails, and says which were acknowledged
SQLITE_CLIENT = """
import sqlite3, sys
path, journal_mode, synchronous, transactions = sys.argv[1:]
connection = sqlite3.connect(path)
connection.execute(f"pragma journal_mode={journal_mode}")
connection.execute(f"pragma synchronous={synchronous}")
try:
    for number in range(int(transactions)):
        connection.execute("insert into log values (?, ?)", (number, "x" * 300))
        connection.commit()
        print(number, flush=True)
except sqlite3.Error:
    pass
"""


class Cut(NamedTuple):
    """A power cut: how many transactions were acknowledged before, and found after it; None if it is malformed."""

    acknowledged: int
    found: int | None

    @property
    def lost(self) -> bool:
        return self.found is None or self.found < self.acknowledged


def _commit(top: Path, journal_mode: str, synchronous: str) -> int:
    """Commit transactions until the power is off, or it is enough; how many were acknowledged."""
    words = [str(top / "log.db"), journal_mode, synchronous, str(TRANSACTIONS)]
    # A process of its own: writing to a mapped file of a disk that fails is a signal that ends it.
    client = subprocess.run(
        [sys.executable, "-S", "-I", "-c", SQLITE_CLIENT, *words], capture_output=True, text=True, check=False
    )
    assert client.returncode in (0, -signal.SIGBUS), client
    acknowledged = client.stdout.splitlines()
    assert acknowledged == [str(number) for number in range(len(acknowledged))], client
    return len(acknowledged)


def _create(top: Path) -> None:
    """An empty database, which is on the medium."""
    for path in top.glob("log.db*"):
        path.unlink()
    connection = sqlite3.connect(top / "log.db")
    connection.execute("create table log (number integer primary key, text text)")
    connection.close()
    run("sync", "-f", top)


def _find(database: Path) -> int | None:
    """How many transactions are in *database*, None if it is malformed."""
    connection = sqlite3.connect(database)
    try:
        if connection.execute("pragma integrity_check").fetchall() != [("ok",)]:
            return None
        numbers = [number for (number,) in connection.execute("select number from log order by number")]
    except sqlite3.DatabaseError:
        return None
    finally:
        connection.close()
    return len(numbers) if numbers == list(range(len(numbers))) else None


def _cut_power(mounted: Mount, point: Path, seeds: range, journal_mode: str, synchronous: str) -> list[Cut]:
    """What happens to a database on ext4 when the power is cut, once for each of *seeds*."""
    cuts = []
    for seed in seeds:
        with until_the_power_is_off(mounted, point) as top:
            _create(top)
            cut_later(mounted, drawn(seed, 50, 400))
            acknowledged = _commit(top, journal_mode, synchronous)
        cuts.append(Cut(acknowledged, _recovered(mounted, point)))
    return cuts


def _recovered(mounted: Mount, point: Path) -> int | None:
    """How many transactions are there after a power cut that leaves ext4 sound."""
    with loop_device(mounted / "disk") as device:
        with file_system(device, point) as top:  # recovers the journal
            found = _find(top / "log.db")
        run("e2fsck", "-f", "-n", device)
    return found


@pytest.fixture
def disk(mount: Callable[..., Mount], image: Path) -> Mount:
    """A mount whose node ``disk`` has a volatile cache, and ext4 on it."""
    run("mkfs.ext4", "-q", "-F", "-b", "4096", image)
    return mount(cached(image))


@pytest.mark.parametrize(("journal_mode", "synchronous"), [("wal", "full"), ("delete", "extra")])
def test_sqlite_loses_no_acknowledged_transaction(
    disk: Mount, tmp_path: Path, journal_mode: str, synchronous: str
) -> None:
    # In rollback mode the deletion of the journal is the commit, and it takes "extra" to have that on the disk.
    cuts = _cut_power(disk, tmp_path / "fs", rounds(25, 300), journal_mode, synchronous)
    tell(sum(cut.acknowledged for cut in cuts), "acknowledged,", len(cuts), "cuts")
    assert not [cut for cut in cuts if cut.lost]
    # What was under way is there or not.
    assert {cut.found - cut.acknowledged for cut in cuts if cut.found is not None} <= {0, 1}
    assert sum(cut.acknowledged for cut in cuts) > 2 * len(cuts)
    disk.umount()


@pytest.mark.parametrize("journal_mode", ["wal", "delete"])
def test_sqlite_without_syncing_loses_transactions_or_is_malformed(
    disk: Mount, tmp_path: Path, journal_mode: str
) -> None:
    cuts = []
    for seed in rounds(12, 100):
        with until_the_power_is_off(disk, tmp_path / "fs") as top:
            _create(top)
            acknowledged = _commit(top, journal_mode, "off")
            # The kernel has begun to write it all out, as it does some seconds later.
            cut_later(disk, drawn(seed, 2, 12), torn=0.5)
            run("sync", "-f", top, expect=(0, 1))
        cuts.append(Cut(acknowledged, _recovered(disk, tmp_path / "fs")))
    lost, malformed = sum(cut.lost for cut in cuts), sum(cut.found is None for cut in cuts)
    tell(lost, "cuts of", len(cuts), "lose transactions,", malformed, "of these leave it malformed")
    assert lost
    disk.umount()


@pytest.mark.parametrize(("journal_mode", "synchronous"), [("wal", "full"), ("delete", "extra")])
def test_sqlite_loses_transactions_if_flushes_are_lies(
    disk: Mount, tmp_path: Path, journal_mode: str, synchronous: str
) -> None:
    cuts = []
    for seed in rounds(8, 100):
        with until_the_power_is_off(disk, tmp_path / "fs") as top:
            _create(top)
            rule = disk.qmp("fault-rule-add", {"node-name": "disk", "rule": {"action": "lying-flush"}})
            cut_later(disk, drawn(seed, 50, 400))
            acknowledged = _commit(top, journal_mode, synchronous)
        disk.qmp("fault-rule-remove", {"node-name": "disk", "id": rule["id"]})
        cuts.append(Cut(acknowledged, _repaired(disk, tmp_path / "fs")))
    faults = [entry for entry in disk.qmp("query-ledger") if entry.get("action") == "lying-flush"]
    lost, malformed = sum(cut.lost for cut in cuts), sum(cut.found is None for cut in cuts)
    tell(lost, "cuts of", len(cuts), "lose transactions,", malformed, "of these leave it malformed")
    tell(len(faults), "lies")
    assert lost
    assert len(faults) > len(cuts)
    disk.umount()


def _repaired(mounted: Mount, point: Path) -> int | None:
    """How many transactions are there after a power cut that ext4 need not survive, as its journal was lied to as well.

    None if there is no database either.  The file system is made anew.
    """
    with loop_device(mounted / "disk") as device:
        run("e2fsck", "-f", "-y", device, expect=(0, 1))
        with file_system(device, point) as top:
            found = _find(top / "log.db") if (top / "log.db").exists() else None
        run("mkfs.ext4", "-q", "-F", "-b", "4096", device)
    return found
