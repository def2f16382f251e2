"""Reading write logs and replaying them: files made by hand, right ones and hostile ones."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusebd.cli import main
from fusebd.errors import FusebdError, ImageError, OpenError
from fusebd.faults.writelog import LogEntry, Selection, WriteLog, find, listing, replay
from fusebd.ondisk.logwrites import DISCARD, FLUSH, FUA, MARK, METADATA, Entry, Superblock

SIZE = 512


def pad(data: bytes, size: int = SIZE) -> bytes:
    return data + bytes(-len(data) % size)


def entry(sector: int, nr_sectors: int, flags: int = 0, data: bytes = b"", *, data_len: int = 0) -> bytes:
    """An entry as it stands in a log, with *data* behind it."""
    return pad(Entry(sector, nr_sectors, flags, data_len).pack()) + data


def mark(text: bytes) -> bytes:
    return pad(Entry(0, 0, MARK, len(text)).pack() + text)


def log_file(path: Path, *entries: bytes, nr_entries: int | None = None, size: int = SIZE) -> str:
    """A log at *path* of *entries*, as many as the superblock says unless *nr_entries* says otherwise."""
    count = len(entries) if nr_entries is None else nr_entries
    path.write_bytes(pad(Superblock(count, size).pack(), size) + b"".join(entries))
    return str(path)


ENTRIES = (
    entry(0, 2, 0, b"a" * 1024),
    entry(0, 0, FLUSH),
    mark(b"one"),
    entry(1, 1, FUA, b"b" * 512),
    entry(2, 2, FLUSH | METADATA, b"c" * 1024),
    entry(0, 1, DISCARD),
    mark(b"zwei\n"),
    entry(7, 1, 0, b"d" * 512),
)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return log_file(tmp_path / "log", *ENTRIES)


@contextmanager
def refused(message: str, kind: type[FusebdError] = ImageError) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    assert str(caught.value) == message


# --- entries -------------------------------------------------------------------------------------


def test_entries_are_given_with_their_places_in_log_and_disk(path: str) -> None:
    with WriteLog(path) as log:
        found = list(log.entries())
    assert [e.number for e in found] == list(range(8))
    assert [(e.offset, e.length) for e in found] == [
        (0, 1024), (0, 0), (0, 0), (512, 512), (1024, 1024), (0, 512), (0, 0), (3584, 512),
    ]  # fmt: skip
    assert [e.position for e in found] == [512, 2048, 2560, 3072, 4096, 5632, 6144, 6656]
    assert found[-1] == LogEntry(7, 3584, 512, 0, "", 6656, 7168, 7680)


def test_marks_have_their_texts(path: str) -> None:
    with WriteLog(path) as log:
        assert [e.mark for e in log.entries() if e.flags & MARK] == ["one", "zwei\n"]


def test_the_data_of_an_entry_is_given_in_pieces(tmp_path: Path) -> None:
    data = bytes(range(256)) * (5 << 12)
    with WriteLog(log_file(tmp_path / "log", entry(3, len(data) // SIZE, 0, data))) as log:
        pieces = list(log.read_data(next(log.entries())))
    assert [offset for offset, _ in pieces] == [1536 + (i << 20) for i in range(5)]
    assert b"".join(piece for _, piece in pieces) == data


def test_a_log_may_have_sectors_of_another_size(tmp_path: Path) -> None:
    whole = pad(Entry(2, 1, 0).pack(), 4096) + b"x" * 4096
    with WriteLog(log_file(tmp_path / "log", whole, size=4096)) as log:
        (found,) = log.entries()
    assert (found.offset, found.length, found.data) == (8192, 4096, 8192)


def test_a_listing_has_a_line_for_each_entry(path: str) -> None:
    with WriteLog(path) as log:
        lines = list(listing(log, Selection()))
    assert [line.split() for line in lines] == [
        ["0", "write", "offset", "0", "length", "1024"],
        ["1", "flush"],
        ["2", "mark", "one"],
        ["3", "write|fua", "offset", "512", "length", "512"],
        ["4", "write|flush|metadata", "offset", "1024", "length", "1024"],
        ["5", "discard", "offset", "0", "length", "512"],
        ["6", "mark", "zwei\\n"],
        ["7", "write", "offset", "3584", "length", "512"],
    ]


# --- hostile logs --------------------------------------------------------------------------------


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * 1000)
    with refused(f"'{path}': Invalid log superblock magic"):
        WriteLog(str(path))
    path.write_bytes(b"")
    with refused(f"'{path}': The log ends too early"):
        WriteLog(str(path))


def test_a_log_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with refused(f"Could not open '{tmp_path}/log': No such file or directory", OpenError):
        WriteLog(f"{tmp_path}/log")


HOSTILE = [
    (entry(0, 0, 0), "Malformed log entry 1"),
    (entry(0, 1, 0x20, bytes(SIZE)), "Invalid flags 0x20 in log entry 1"),
    (entry(0, 1, 0), "The data of log entry 1 is past the end of the log"),
    (entry(0, 2**64 - 1, 0, bytes(SIZE)), "The data of log entry 1 is past the end of the log"),
    (entry(2**64 - 1, 1, 0, bytes(SIZE)), f"Log entry 1 is about sector {2**64 - 1}, which no disk has"),
    (entry(1, 2**63, DISCARD), "Log entry 1 is about sector 1, which no disk has"),
    (b"", "Log entry 1 is past the end of the log"),
    (entry(0, 0, FLUSH)[:-1], "Log entry 1 is past the end of the log"),
    (pad(Entry(0, 0, FLUSH).pack() + b"x"), "Malformed log entry 1"),
    (entry(0, 0, MARK, data_len=480), "The mark of log entry 1 is longer than its sector"),
    (entry(0, 0, MARK, data_len=2**64 - 1), "The mark of log entry 1 is longer than its sector"),
]


@pytest.mark.parametrize(("hostile", "message"), HOSTILE)
def test_a_malformed_entry_is_refused_when_it_is_come_to(tmp_path: Path, hostile: bytes, message: str) -> None:
    path = log_file(tmp_path / "log", ENTRIES[0], hostile)
    with WriteLog(path) as log:
        entries = log.entries()
        assert next(entries).length == 1024
        with refused(f"'{path}': {message}"):
            next(entries)


def test_a_superblock_that_counts_too_many_entries_does_not_keep_anybody_busy(tmp_path: Path) -> None:
    path = log_file(tmp_path / "log", *ENTRIES, nr_entries=2**64 - 1)
    with WriteLog(path) as log, refused(f"'{path}': Log entry 8 is past the end of the log"):
        list(log.entries())


def test_entries_that_the_superblock_does_not_count_are_not_there(tmp_path: Path) -> None:
    with WriteLog(log_file(tmp_path / "log", *ENTRIES, nr_entries=3)) as log:
        assert len(list(log.entries())) == 3


@settings(derandomize=True, deadline=None, max_examples=300)
@given(edits=st.lists(st.tuples(st.integers(0, 7680), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4))
def test_any_damage_is_an_error_of_the_image_or_none(tmp_path_factory: pytest.TempPathFactory, edits: object) -> None:
    directory = tmp_path_factory.getbasetemp()
    path = log_file(directory / "damaged", *ENTRIES)
    data = bytearray(Path(path).read_bytes())
    assert isinstance(edits, list)
    for offset, new in edits:
        data[offset : offset + len(new)] = new
    Path(path).write_bytes(data)
    target = directory / "target"
    target.write_bytes(bytes(4096))
    try:
        with WriteLog(path) as log:
            replay(log, str(target), Selection())
    except FusebdError as error:
        # errors of the host come from sectors that a disk can have, but no file here
        known = isinstance(error, ImageError) or error.errno in (errno.EFBIG, errno.EINVAL)
        if not known:
            raise


# --- which entries -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "numbers"),
    [
        (Selection(), range(8)),
        (Selection(limit=3), range(3)),
        (Selection(limit=100), range(8)),
        (Selection(start_entry=5), range(5, 8)),
        (Selection(start_entry=5, limit=1), range(5, 6)),
        (Selection(start_mark="one"), range(3, 8)),
        (Selection(end_mark="one"), range(3)),
        (Selection(start_mark="one", end_mark="zwei\n"), range(3, 7)),
        (Selection(stop_flags=FLUSH), range(2)),
        (Selection(start_entry=2, stop_flags=FLUSH), range(2, 5)),
        (Selection(stop_flags=FUA), range(4)),
        (Selection(start_entry=5, stop_flags=FLUSH | FUA), range(5, 8)),
        (Selection(limit=4, stop_flags=FLUSH), range(2)),
    ],
)
def test_a_selection_begins_and_ends_where_it_says(path: str, selection: Selection, numbers: range) -> None:
    with WriteLog(path) as log:
        assert [e.number for e, _ in selection.entries(log)] == list(numbers)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(start_mark="none"), "'{}' has no mark 'none'"),
        (Selection(end_mark="none"), "'{}' has no mark 'none' behind where it is to start"),
        (Selection(start_mark="zwei\n", end_mark="one"), "'{}' has no mark 'one' behind where it is to start"),
        (Selection(start_entry=8), "'{}' has no entry 8, only 8 entries"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_written(
    tmp_path: Path, path: str, selection: Selection, message: str
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"\xff" * 4096)
    with WriteLog(path) as log, refused(message.format(path), FusebdError):
        replay(log, str(target), selection)
    assert target.read_bytes() == b"\xff" * 4096


def test_the_entry_that_ends_a_selection_is_found(path: str) -> None:
    with WriteLog(path) as log:
        assert find(log, Selection(start_mark="one", stop_flags=FLUSH)).number == 4
        with refused(f"'{path}' has no such entry", FusebdError):
            find(log, Selection(start_mark="zwei\n", stop_flags=FLUSH))


# --- replaying -----------------------------------------------------------------------------------


def replayed(tmp_path: Path, path: str, selection: Selection, *, discard: bool = True) -> bytes:
    target = tmp_path / "target"
    target.write_bytes(b"\xff" * 4096)
    with WriteLog(path) as log:
        replay(log, str(target), selection, discard=discard)
    return target.read_bytes()


def test_a_replay_writes_what_was_logged(tmp_path: Path, path: str) -> None:
    expected = bytes(512) + b"b" * 512 + b"c" * 1024 + b"\xff" * 1536 + b"d" * 512
    assert replayed(tmp_path, path, Selection()) == expected


def test_a_replay_stops_where_it_is_told(tmp_path: Path, path: str) -> None:
    assert replayed(tmp_path, path, Selection(end_mark="one")) == b"a" * 1024 + b"\xff" * 3072


def test_discards_can_be_left_out(tmp_path: Path, path: str) -> None:
    assert replayed(tmp_path, path, Selection(), discard=False)[:512] == b"a" * 512


def test_two_replays_of_parts_are_one_of_the_whole(tmp_path: Path, path: str) -> None:
    whole = replayed(tmp_path, path, Selection())
    target = tmp_path / "parts"
    target.write_bytes(b"\xff" * 4096)
    with WriteLog(path) as log:
        assert replay(log, str(target), Selection(end_mark="one")) == 3
        assert replay(log, str(target), Selection(start_mark="one")) == 5
    assert target.read_bytes() == whole


def test_a_file_grows_where_it_is_written_past_its_end_but_not_where_it_is_discarded(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"")
    with WriteLog(log_file(tmp_path / "log", entry(2, 1, 0, b"x" * 512), entry(2, 2**50, DISCARD))) as log:
        replay(log, str(target), Selection())
    assert target.read_bytes() == bytes(1536)


def test_the_log_itself_and_what_is_not_there_are_no_targets(tmp_path: Path, path: str) -> None:
    before = Path(path).read_bytes()
    with WriteLog(path) as log:
        with refused(f"'{tmp_path}/./log' is the log itself", FusebdError):
            replay(log, f"{tmp_path}/./log", Selection())
        with refused(f"Could not open '{tmp_path}/none': No such file or directory", OpenError):
            replay(log, f"{tmp_path}/none", Selection())
    assert Path(path).read_bytes() == before


def test_a_target_that_cannot_be_written_is_one_line(path: str) -> None:
    with WriteLog(path) as log, refused("Could not write '/dev/full': No space left on device", OpenError):
        replay(log, "/dev/full", Selection())


def test_a_hostile_entry_is_found_before_anything_is_written(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"\xff" * 4096)
    with WriteLog(log_file(tmp_path / "log", ENTRIES[0], entry(0, 2**50, 0))) as log, pytest.raises(ImageError):
        replay(log, str(target), Selection())
    assert target.read_bytes() == b"\xff" * 4096


# --- the command line ----------------------------------------------------------------------------


def test_the_command_line_lists_finds_and_replays(
    tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> str:
        assert main(["log", *words]) == 0
        return capsys.readouterr().out

    target = tmp_path / "target"
    target.write_bytes(b"\xff" * 4096)
    assert said("list", path, "--num-entries") == "8\n"
    assert said("list", path, "--start-mark", "one", "--limit", "1").split() == [
        "3",
        "write|fua",
        "offset",
        "512",
        "length",
        "512",
    ]
    assert said("list", path, "--find", "--end-mark", "one") == "2@6\n"
    assert said("list", path, "--find", "--start-entry", "0x2", "--next-flush") == "4@11\n"
    assert said("list", path, "--find", "--next-fua") == "3@8\n"
    assert said("replay", path, str(target), "--next-flush") == "2 entries replayed\n"
    assert said("replay", path, str(target), "--start-entry", "2", "--no-discard") == "6 entries replayed\n"
    assert target.read_bytes() == b"a" * 512 + b"b" * 512 + b"c" * 1024 + b"\xff" * 1536 + b"d" * 512


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("log", "the following arguments are required: ACTION (see fusebd log --help)"),
        ("log list", "the following arguments are required: LOG (see fusebd log list --help)"),
        ("log replay x", "the following arguments are required: TARGET (see fusebd log replay --help)"),
        ("log mark m n", "the following arguments are required: TEXT (see fusebd log mark --help)"),
        ("log list x --limit -1", "argument --limit: '-1' is no number of entries (see fusebd log list --help)"),
        ("log list x --limit 1k", "argument --limit: '1k' is no number of entries (see fusebd log list --help)"),
        (
            "log list x --start-entry 1 --start-mark m",
            "argument --start-mark: not allowed with argument --start-entry (see fusebd log list --help)",
        ),
        ("log list none", "Could not open 'none': No such file or directory"),
        ("log mark ./none n text", "{here}/none: not mounted by fusebd"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSEBD_RUNTIME_DIR", str(tmp_path / "run"))
    assert main(words.split()) == 1
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", f"fusebd: {message.format(here=tmp_path)}\n")


def test_finding_takes_something_to_find(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["log", "list", path, "--find"]) == 1
    assert "--find goes with one of" in capsys.readouterr().err
