"""The command line where nothing is mounted: what it understands, what it lists, and its one line about a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusebd import __version__
from fusebd.block.driver import driver_class, driver_names
from fusebd.block.options import declared_options
from fusebd.cli import COMMANDS, main
from fusebd.fuse.mountpoint import location
from fusebd.runtime import Place, directory


@pytest.fixture(autouse=True)
def runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSEBD_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that succeeds prints."""
    assert main(words) == 0
    output = capsys.readouterr()
    assert not output.err
    return output.out


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on standard error, without the name in front; exit status 1, and nothing on standard output."""
    assert main(words) == 1
    output = capsys.readouterr()
    assert not output.out
    line, newline, rest = output.err.partition("\n")
    assert newline
    assert not rest
    return line.removeprefix("fusebd: ")


MISTAKES = [
    ("", "a command is missing (see fusebd --help)"),
    ("nonsense", "unknown command 'nonsense' (see fusebd --help)"),
    ("--nonsense", "unknown command '--nonsense' (see fusebd --help)"),
    ("mount", "the following arguments are required: MOUNTPOINT (see fusebd mount --help)"),
    ("mount --nonsense m", "unrecognized arguments: --nonsense (see fusebd mount --help)"),
    ("mount --read m", "unrecognized arguments: --read (see fusebd mount --help)"),
    ("mount a b", "unrecognized arguments: b (see fusebd mount --help)"),
    ("mount --blockdev", "argument --blockdev: expected one argument (see fusebd mount --help)"),
    ("mount --qmp nonsense m", "Invalid QMP address 'nonsense', expected: unix:PATH or HOST:PORT"),
    ("mount --qmp unix: m", "Invalid QMP address 'unix:', expected: unix:PATH or HOST:PORT"),
    ("mount --qmp host:65536 m", "Invalid QMP address 'host:65536', expected: unix:PATH or HOST:PORT"),
    ("mount --qmp :4444 m", "Invalid QMP address ':4444', expected: unix:PATH or HOST:PORT"),
    ("mount --qmp stdio m", "The QMP address 'stdio' is for a mount in the foreground"),
    ("mount --cache disk m", "Invalid cache mode 'disk', expected: NODE=direct|page|writeback|passthrough"),
    ("mount --config none", "Could not open 'none': No such file or directory"),
    ("mount --config .", "Could not open '.': Is a directory"),
    ("mount --blockdev nonsense,help", "Parameter 'driver' does not accept value 'nonsense'"),
    ("umount", "the following arguments are required: MOUNTPOINT (see fusebd umount --help)"),
    ("umount a b", "unrecognized arguments: b (see fusebd umount --help)"),
    ("qmp", "the following arguments are required: MOUNTPOINT|ADDRESS, COMMAND (see fusebd qmp --help)"),
    ("qmp m", "the following arguments are required: COMMAND (see fusebd qmp --help)"),
    ("qmp nonsense quit", "Invalid QMP address 'nonsense', expected: unix:PATH or HOST:PORT"),
    ("qmp unix:none quit", "Could not connect to unix:{here}/none: No such file or directory"),
    ("qmp unix:none quit foo", "Expected '=' after parameter 'foo'"),
    ("qmp unix:none quit {{", "JSON parse error, premature EOI"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, words: str, message: str) -> None:
    assert refusal(capsys, *words.format().split()) == message.format(here=tmp_path)


@pytest.mark.parametrize("option", ["--transport", "--log-level"])
def test_a_word_that_is_none_of_the_choices_is_refused_with_the_choices(
    capsys: pytest.CaptureFixture[str], option: str
) -> None:
    message = refusal(capsys, "mount", option, "nonsense", "m")
    assert message.startswith(f"argument {option}: invalid choice: 'nonsense' (choose from ")


def test_an_empty_mount_point_is_not_the_working_directory(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "mount", "") == "MOUNTPOINT is empty"


@pytest.mark.parametrize("command", ["umount", "qmp"])
@pytest.mark.parametrize("place", ["directory", "file", "./nothing"])
def test_what_is_not_mounted_is_said_to_be_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, place: str
) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("")
    words = [command, f"./{place}"] + (["query-version"] if command == "qmp" else [])
    assert refusal(capsys, *words) == f"{tmp_path / place}: not mounted by fusebd"


def test_a_message_is_one_line_whatever_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "two\nlines \x1b[31m \udcff") == (
        "unknown command 'two\\nlines \\x1b[31m \\udcff' (see fusebd --help)"
    )


def test_a_working_directory_that_is_gone_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    assert refusal(capsys, "mount", "m") == "No such file or directory"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version") == f"fusebd {__version__}\n"


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str], word: str) -> None:
    text = said(capsys, word)
    for name, command in COMMANDS.items():
        assert f"  {name} " in text
        assert command.summary in text


@pytest.mark.parametrize("command", ["mount", "umount", "qmp"])
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: fusebd {command} ")


def test_the_help_of_mount_has_every_option_of_the_design(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["mount", "--help"])
    text = capsys.readouterr().out
    options = ("blockdev", "config", "qmp", "foreground", "transport", "read-only", "allow-other", "cache", "log-level")
    for option in options:
        assert f"  --{option} " in text


# --- listings of drivers and options --------------------------------------------------------------


@pytest.mark.parametrize("text", ["help", "?"])
def test_the_drivers_are_listed(capsys: pytest.CaptureFixture[str], text: str) -> None:
    listed = said(capsys, "mount", "--blockdev", text).splitlines()
    assert listed == ["Drivers:", *(f"  {name}" for name in driver_names())]
    assert {"  blkdebug", "  blkverify", "  file", "  host_device", "  null-co", "  qcow2", "  raw"} < set(listed)


@pytest.mark.parametrize("spelling", ["{},help", "driver={},help", "help,driver={}", "driver={},node-name=x,?"])
def test_the_options_of_a_driver_are_listed(capsys: pytest.CaptureFixture[str], spelling: str) -> None:
    text = said(capsys, "mount", "--blockdev", spelling.format("qcow2"))
    assert text.startswith("Options of the driver qcow2:\n")
    for option in declared_options(driver_class("qcow2").options_class):
        assert f"\n  {option.name}=<" in text


def test_every_driver_has_a_listing(capsys: pytest.CaptureFixture[str]) -> None:
    for name in driver_names():
        assert said(capsys, "mount", "--blockdev", f"{name},help").startswith(f"Options of the driver {name}:\n")


def test_a_listing_needs_no_mount_point_and_does_nothing_else(
    capsys: pytest.CaptureFixture[str], runtime_directory: Path
) -> None:
    said(capsys, "mount", "--blockdev", "nonsense", "--blockdev", "help", "/nonsense")
    assert not runtime_directory.exists()


def test_help_in_a_value_is_no_question(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "mount", "--config", "none", "--blockdev", "file,filename=x,,help")
    assert message == "Could not open 'none': No such file or directory"


# --- the process -----------------------------------------------------------------------------------


def test_python_runs_the_package() -> None:
    command = [sys.executable, "-m", "fusebd", "--version"]
    assert subprocess.run(command, capture_output=True, check=True).stdout == f"fusebd {__version__}\n".encode()


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fusebd", "mount", "--blockdev", "help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert done.stderr == b""


# --- the files of a daemon -------------------------------------------------------------------------


def test_the_runtime_directory_is_made_for_its_user_alone(runtime_directory: Path) -> None:
    assert directory() == str(runtime_directory)
    assert runtime_directory.stat().st_mode & 0o7777 == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701])
def test_a_runtime_directory_that_others_can_enter_is_refused(
    capsys: pytest.CaptureFixture[str], runtime_directory: Path, tmp_path: Path, mode: int
) -> None:
    runtime_directory.mkdir()
    runtime_directory.chmod(mode)
    (tmp_path / "m").mkdir()
    message = f"The runtime directory '{runtime_directory}' must be a directory that belongs to you alone (mode 0700)"
    assert refusal(capsys, "mount", "m") == message


def test_a_runtime_directory_that_is_a_link_is_refused(
    capsys: pytest.CaptureFixture[str], runtime_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    runtime_directory.symlink_to("elsewhere")
    assert "must be a directory that belongs to you alone" in refusal(capsys, "umount", "m")


def test_a_runtime_directory_that_cannot_be_made_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSEBD_RUNTIME_DIR", str(tmp_path / "file" / "run"))
    message = f"Could not make the runtime directory '{tmp_path}/file/run': Not a directory"
    assert refusal(capsys, "umount", "m") == message


def test_a_mount_point_has_its_own_place_whatever_it_is_called() -> None:
    places = [Place(f"/m{name}") for name in ("", "2", "\n", "\udcff", "é" * 2000)]
    assert len({place.socket for place in places}) == len(places)
    assert len({len(place.socket) for place in places}) == 1


def test_a_state_file_of_another_version_is_no_state(runtime_directory: Path) -> None:
    place = Place("/m")
    Path(place.state_path).write_text('{"mountpoint": "/m", "something": "else"}')
    file = place.find()
    assert file is not None
    assert file.read() is None
    file.close()


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("m", "{here}/m"),
        ("./m/", "{here}/m"),
        ("sub/../m", "{here}/m"),
        ("link", "{here}/m"),
        ("link-to-link", "{here}/m"),
        ("sub-link/point", "{here}/sub/point"),
        ("sub-link/../m", "{here}/m"),
        ("nothing", "{here}/nothing"),
    ],
)
def test_a_mount_point_is_found_whatever_leads_to_it(tmp_path: Path, path: str, place: str) -> None:
    for name in ("m", "sub", "sub/point"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("m")
    (tmp_path / "link-to-link").symlink_to("link")
    (tmp_path / "sub-link").symlink_to(tmp_path / "sub")
    assert location(path) == place.format(here=tmp_path)
    assert os.path.realpath(path) == place.format(here=tmp_path)
