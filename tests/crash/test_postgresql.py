"""PostgreSQL below power cuts that tear pages: with full-page writes it recovers, without it reports bad checksums."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, file_system, loop_device, run, sweep
from powercuts import cached, cut_later, drawn, rounds, tell, until_the_power_is_off

LENGTH = 256 << 20
ROWS = 20000
TRANSACTIONS = 250
PAGE = 8192

#: nothing here depends on how requests reach the daemon
pytestmark = pytest.mark.parametrize("transport", ["devfuse"])


def _programs() -> Path:
    """Where PostgreSQL's programs are, the latest version."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    assert found, "PostgreSQL is not installed (Debian: postgresql)"
    return max(found, key=lambda path: int(path.parent.name))


class Server:
    """The database cluster ``data`` in *top*; *place* is for its socket and log.  It refuses to be root's."""

    def __init__(self, top: Path, place: Path, *settings: str) -> None:
        self.data, self._place, self._settings = top / "data", place, settings
        self._bin = _programs()
        self._log = place / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, program: str, *words: str | Path, expect: tuple[int, ...] = (0,), **options: Any) -> str:
        """Run one of PostgreSQL's programs as its user."""
        as_user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        return run(self._bin / program, *words, expect=expect, cwd=self._place, **as_user, **options)

    def create(self) -> None:
        """A cluster with checksums, and in it rows to be changed."""
        self.data.mkdir()
        shutil.chown(self.data, "postgres", "postgres")
        words = ["--data-checksums", "--wal-segsize=1", "--auth=trust", "--locale=C", "--username=postgres"]
        self.run("initdb", "-D", self.data, *words)
        assert self.start()
        self.execute("create table account (id int primary key, balance int, text text) with (fillfactor = 50)")
        self.execute("create table log (number int primary key)")
        self.execute(f"insert into account select n, 0, repeat('x', 80) from generate_series(1, {ROWS}) n")
        self.execute("vacuum analyze")
        self.stop()

    def start(self) -> bool:
        """Whether it starts, and with it recovers; if not, ``log`` says why."""
        settings = ["max_wal_size=16MB", "min_wal_size=2MB", "listen_addresses=", *self._settings]
        words = [word for setting in settings for word in ("-c", setting)]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", self.data, "-k", self._place, *words],
                cwd=self._place,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user="postgres",
                group="postgres",
                extra_groups=[],
            )
        while self._process.poll() is None:
            if "accepting" in self.run("pg_isready", "-h", self._place, expect=(0, 1, 2)):
                return True
            time.sleep(0.05)
        return False

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it, with a checkpoint unless *how* is SIGQUIT."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def execute(self, statements: str, expect: tuple[int, ...] = (0,)) -> str:
        """What psql prints for *statements* up to the first that fails."""
        done = subprocess.run(
            [self._bin / "psql", "-h", self._place, "-U", "postgres", "-XAtq", "-v", "ON_ERROR_STOP=1"],
            input=statements,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in expect, done
        return done.stdout

    def commit(self, seed: int) -> int:
        """Commit transactions until the disk fails or it is enough; how many were acknowledged."""
        script = "".join(
            f"begin; update account set balance = balance + 1 where id = {drawn(seed * TRANSACTIONS + n, 1, ROWS)};"
            f" insert into log values ({n}); commit;\n\\echo {n}\n"
            for n in range(TRANSACTIONS)
        )
        acknowledged = self.execute(script, expect=(0, 2, 3)).splitlines()
        assert acknowledged == [str(n) for n in range(len(acknowledged))]
        return len(acknowledged)

    def committed(self) -> int:
        """How many transactions there are; AssertionError if there are parts of some."""
        numbers = self.execute("select number from log order by number").split()
        assert numbers == [str(n) for n in range(len(numbers))]
        assert self.execute("select sum(balance) from account") == f"{len(numbers)}\n"
        return len(numbers)

    def bad_checksums(self) -> int:
        """In how many blocks pg_checksums finds a wrong one."""
        said = self.run("pg_checksums", "--check", "-D", self.data, expect=(0, 1))
        found = re.search(r"Bad checksums: +(\d+)$", said, re.MULTILINE)
        assert found is not None, said
        return int(found[1])


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that PostgreSQL's user can get to."""
    directory = Path(tempfile.mkdtemp(prefix="fusebd-postgresql-"))
    directory.chmod(0o755)
    shutil.chown(directory, "postgres", "postgres")
    (directory / "fs").mkdir()
    yield directory
    sweep(directory)
    (directory / "fs").rmdir()
    shutil.rmtree(directory)


@pytest.fixture
def pristine(scratch: Path, place: Path) -> Path:
    """An image of ext4 with a cluster on it."""
    image = scratch / "pristine.raw"
    with open(image, "wb") as file:
        file.truncate(LENGTH)
    run("mkfs.ext4", "-q", "-F", image)
    with loop_device(image) as device, file_system(device, place / "fs") as top:
        top.chmod(0o755)
        server = Server(top, place, "fsync=off")
        try:
            server.create()
        finally:
            server.stop(signal.SIGQUIT)
    return image


Rounds = Callable[[range], Iterator[tuple[int, Mount]]]


@pytest.fixture
def rounds_of(mount: Callable[..., Mount], pristine: Path) -> Rounds:
    """For each of some seeds a mount of its own, with a volatile cache over a copy of the image."""

    def make(seeds: range) -> Iterator[tuple[int, Mount]]:
        for seed in seeds:
            image = pristine.with_name("disk.raw")
            run("cp", "--sparse=always", pristine, image)
            mounted = mount(cached(image, seed=seed), name=f"mnt{seed}")
            yield seed, mounted
            mounted.umount()

    return make


@contextmanager
def _running(server: Server) -> Iterator[None]:
    """The server has started, and is not there any more at the end."""
    try:
        assert server.start(), server.log
        yield
    finally:
        server.stop(signal.SIGQUIT)


def _cut_in_transactions(mounted: Mount, place: Path, seed: int, setting: str) -> int:
    """Cut the power while transactions are committed; how many were acknowledged."""
    with until_the_power_is_off(mounted, place / "fs") as top, _running(server := Server(top, place, setting)):
        cut_later(mounted, drawn(seed, 20, 200), operation="flush", torn=0.5)
        acknowledged = server.commit(seed)
    assert 0 < acknowledged < TRANSACTIONS
    return acknowledged


def _cut_in_checkpoint(mounted: Mount, place: Path, seed: int, setting: str) -> int:
    """Commit transactions, and cut the power while the pages go to the disk that they have changed.

    How many pages are torn, at most: a torn page may be as it should be, as there is not much new in it.
    """
    with until_the_power_is_off(mounted, place / "fs") as top, _running(server := Server(top, place, setting)):
        server.execute("checkpoint")
        assert server.commit(seed) == TRANSACTIONS
        cut_later(mounted, drawn(seed, 20, 50), operation="write", keep=1.0, torn=1.0)
        server.execute("checkpoint", expect=(2, 3))
    torn = [entry["length"] // PAGE for entry in mounted.qmp("query-ledger") if entry.get("action") == "torn"]
    assert sum(torn)
    return sum(torn)


def _recovered(mounted: Mount, place: Path) -> int:
    """How many transactions there are when it has recovered."""
    with loop_device(mounted / "disk") as device, file_system(device, place / "fs") as top:
        with _running(server := Server(top, place)):
            assert "automatic recovery in progress" in server.log
            committed = server.committed()
            server.stop()
        assert server.bad_checksums() == 0
    return committed


def test_after_a_power_cut_every_acknowledged_transaction_is_there(rounds_of: Rounds, place: Path) -> None:
    results = []
    for seed, mounted in rounds_of(rounds(2, 40)):
        acknowledged = _cut_in_transactions(mounted, place, seed, "full_page_writes=on")
        results.append((acknowledged, _recovered(mounted, place)))
    tell("acknowledged and found:", results)
    assert {found - acknowledged for acknowledged, found in results} <= {0, 1}


def test_with_full_page_writes_it_recovers_from_torn_pages(rounds_of: Rounds, place: Path) -> None:
    torn = 0
    for seed, mounted in rounds_of(rounds(2, 40)):
        torn += _cut_in_checkpoint(mounted, place, seed, "full_page_writes=on")
        assert _recovered(mounted, place) == TRANSACTIONS
    tell(torn, "pages torn,", len(rounds(2, 40)), "cuts")


def test_without_full_page_writes_it_reports_the_checksums_of_torn_pages(rounds_of: Rounds, place: Path) -> None:
    results = []
    for seed, mounted in rounds_of(rounds(2, 40)):
        torn = _cut_in_checkpoint(mounted, place, seed, "full_page_writes=off")
        with loop_device(mounted / "disk") as device, file_system(device, place / "fs") as top:
            server = Server(top, place)
            try:
                assert not server.start()
            finally:
                server.stop(signal.SIGQUIT)
            assert re.search(r"page verification failed, calculated checksum \d+ but expected \d+", server.log)
            assert "FATAL:  invalid page in block" in server.log
            # Without recovery, the pages are as they are on the disk.
            server.run("pg_resetwal", "-f", "-D", server.data)
            results.append((torn, server.bad_checksums()))
    tell("pages torn and bad:", results)
    assert all(0 < bad <= torn for torn, bad in results)
