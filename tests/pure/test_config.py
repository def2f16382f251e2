"""The mount points file: what it says is mounted, and each mistake in it is reported with its line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fusebd.config import load
from fusebd.errors import FusebdError, OpenError
from fusebd.settings import MountSettings

EXAMPLE = Path(__file__).parents[2] / "mountpoints.example"


def loaded(directory: Path, text: str) -> list[MountSettings]:
    (directory / "mounts.toml").write_text(text)
    return load(str(directory / "mounts.toml"))


def refusal(directory: Path, text: str | bytes) -> str:
    """The message about a file that says *text*, without the directory of the file."""
    file = directory / "mounts.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FusebdError) as caught:
        load(str(file))
    return str(caught.value).replace(f"{directory}/", "")


def test_the_documented_sample_is_understood() -> None:
    disks, faults = load(str(EXAMPLE))
    assert (disks.mountpoint, faults.mountpoint) == ("/mnt/fusebd/disks", "/mnt/fusebd/faults")
    assert disks.qmp == [f"unix:{EXAMPLE.parent}/disks.qmp"]
    assert faults.log_file == f"{EXAMPLE.parent}/faults.log"
    names = [[blockdev.parse()["node-name"] for blockdev in mount.blockdevs] for mount in (disks, faults)]
    assert names == [["disk", "filesystem"], ["bad-sector", "original", "verified"]]


def test_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    (settings,) = loaded(tmp_path, "[[mount]]\npoint = '/m'")
    assert settings == MountSettings("/m", directory=str(tmp_path))


def test_everything_can_be_said(tmp_path: Path) -> None:
    (settings,) = loaded(
        tmp_path,
        "[[mount]]\npoint = '/m'\nqmp = ['unix:/q', 'localhost:4444']\ntransport = 'devfuse'\nread-only = true\n"
        "snapshot = true\n"
        "allow-other = true\nlog-level = 'debug'\nlog-file = '/log'\ncache = {a = 'page', b = 'writeback'}",
    )
    assert settings == MountSettings(
        "/m",
        qmp=["unix:/q", "localhost:4444"],
        transport="devfuse",
        read_only=True,
        snapshot=True,
        allow_other=True,
        caches={"a": "page", "b": "writeback"},
        log_level="debug",
        log_file="/log",
        directory=str(tmp_path),
    )


def test_relative_names_are_taken_from_the_directory_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mounts.toml").write_text("[[mount]]\npoint = 'm'\nqmp = ['unix:q']\nlog-file = 'log'")
    monkeypatch.chdir(tmp_path / "elsewhere")
    (settings,) = load("../mounts.toml")
    assert settings.mountpoint == f"{tmp_path}/m"
    assert os.path.realpath(settings.qmp[0].removeprefix("unix:")) == f"{tmp_path}/q"
    assert os.path.realpath(str(settings.log_file)) == f"{tmp_path}/log"
    assert os.path.samefile(settings.directory, tmp_path)


def test_a_mount_point_is_known_by_where_its_links_lead(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert loaded(tmp_path, "[[mount]]\npoint = 'link'")[0].mountpoint == f"{tmp_path}/real"


def test_nodes_are_in_the_order_of_the_file(tmp_path: Path) -> None:
    tables = "".join(f"[[mount.blockdev]]\nnode-name = 'n{number}'\n" for number in (3, 1, 2))
    (settings,) = loaded(tmp_path, f"[[mount]]\npoint = 'm'\n{tables}")
    assert [blockdev.parse() for blockdev in settings.blockdevs] == [
        {"node-name": f"n{number}"} for number in (3, 1, 2)
    ]


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OpenError) as caught:
        load(f"{tmp_path}/none")
    assert str(caught.value) == f"Could not open '{tmp_path}/none': No such file or directory"


MISTAKES = [
    ("", "mounts.toml: it has no [[mount]] table"),
    ("# nothing", "mounts.toml: it has no [[mount]] table"),
    (b"[[mount]]\n\xff", "mounts.toml: not UTF-8 at byte 10"),
    ("x =", "mounts.toml:1: Invalid value (at end of document)"),
    ("\nx = \n", "mounts.toml:2: Invalid value (column 5)"),
    ("[[mount]]\npoint = 'm", 'mounts.toml:2: Expected "\'" (at end of document)'),
    ("\n[[mount]\n", "mounts.toml:2: Expected ']]' at the end of an array declaration (column 8)"),
    ("a = 1\na = 2\n", "mounts.toml:2: Cannot overwrite a value (column 6)"),
    ("x = " + "[" * 100000, "mounts.toml: it is nested too deeply"),
    ("[[mount]]\npoint = 'm'\nx = " + "9" * 10000, None),
    ("\ntop = 1\n[[mount]]\npoint = 'm'", "mounts.toml:2: Parameter 'top' is unexpected"),
    ("[top]\n[[mount]]\npoint = 'm'", "mounts.toml:1: Parameter 'top' is unexpected"),
    ("\nmount = 5", "mounts.toml:2: Invalid parameter type for 'mount', expected: array"),
    ("[mount]\npoint = 'm'", "mounts.toml:1: Invalid parameter type for 'mount', expected: array"),
    ("\nmount = [{point = 'm'}, 5]", "mounts.toml:2: Invalid parameter type for 'mount[1]', expected: object"),
    ("\n[[mount]]\nlog-level = 'info'", "mounts.toml:2: mount[0]: Parameter 'point' is missing"),
    ("[[mount]]\npoint = ''", "mounts.toml:2: mount[0]: Parameter 'point' is empty"),
    ('[[mount]]\npoint = "a\\u0000b"', "mounts.toml:2: mount[0]: 'a\0b' has a NUL character"),
    (
        "[[mount]]\n\npoint = 2020-01-01",
        "mounts.toml:3: mount[0]: Invalid parameter type for 'point', expected: string",
    ),
    ("[[mount]]\npoint = 'm'\nx.y = 1", "mounts.toml:3: mount[0]: Parameter 'x' is unexpected"),
    ("[[mount]]\npoint = 'm'\n[mount.x]\ny = 1", "mounts.toml:3: mount[0]: Parameter 'x' is unexpected"),
    (
        "[[mount]]\npoint = 'm'\n[mount.cache]\na = 'page'\nb = 'nonsense'",
        "mounts.toml:5: mount[0]: Parameter 'b' does not accept value 'nonsense'",
    ),
    (
        "[[mount]]\npoint = 'm'\n[mount.cache]\na = 5",
        "mounts.toml:3: mount[0]: Invalid parameter type for 'cache[...]', expected: string",
    ),
    ("[[mount]]\npoint = 'm'\nread_only = true", "mounts.toml:3: mount[0]: Parameter 'read_only' is unexpected"),
    (
        "[[mount]]\npoint = 'm'\n# read-only = 1\nread-only = 1",
        "mounts.toml:4: mount[0]: Invalid parameter type for 'read-only', expected: boolean",
    ),
    (
        "[[mount]]\npoint = 'm'\nlog-level = 'loud'",
        "mounts.toml:3: mount[0]: Parameter 'log-level' does not accept value 'loud'",
    ),
    (
        "[[mount]]\npoint = 'm'\nqmp = [\n  'unix:a',\n  'nonsense',\n]",
        "mounts.toml:3: mount[0]: Invalid QMP address 'nonsense', expected: unix:PATH or HOST:PORT",
    ),
    (
        "[[mount]]\npoint = 'm'\nqmp = ['stdio']",
        "mounts.toml:3: mount[0]: The QMP address 'stdio' is for a mount in the foreground",
    ),
    (
        "[[mount]]\npoint = 'm'\n[mount.blockdev]\ndriver = 'null-co'",
        "mounts.toml:3: mount[0]: Invalid parameter type for 'blockdev', expected: array",
    ),
    ("[[mount]]\npoint = 'a'\n[[mount]]\npoint = 'b'\nx = 1", "mounts.toml:5: mount[1]: Parameter 'x' is unexpected"),
    ("mount = [\n  {point = 'a'},\n  {point = 'b', x = 1},\n]", "mounts.toml:1: mount[1]: Parameter 'x' is unexpected"),
    (
        "[[mount]]\npoint = 'a'\nlog-file = '''\n[[mount]]\n'''\n[[ 'mount' ]]\npoint = 'b'\nx = 1",
        "mounts.toml:8: mount[1]: Parameter 'x' is unexpected",
    ),
    ("[[mount]]\r\npoint = 'a'\r\nx = 1\r\n", "mounts.toml:3: mount[0]: Parameter 'x' is unexpected"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str | bytes, message: str | None) -> None:
    found = refusal(tmp_path, text)
    if message is None:  # the words are Python's
        assert found.startswith("mounts.toml: ")
    else:
        assert found == message


def test_two_tables_for_one_mount_point_are_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, "[[mount]]\npoint = 'm'\n[[mount]]\npoint = './m'")
    assert message == "mounts.toml:3: mount[1]: m is mounted by another table already"


# --- where an error in a node's options is put down to --------------------------------------------

NODES = """\
[[mount]]
point = "m"

[[mount.blockdev]]
driver = "raw"
node-name = "plain"
file = { driver = "file", filename = "a.raw" }

[[mount.blockdev]]
driver = "blkdebug"
node-name = "faulty"
inject-error = [
  { event = "read_aio" },
  { event = "nonsense" },
]
[mount.blockdev.image]
driver = "raw"
node-name = "inner"
file.driver = "file"
file.filename = "b.raw"
"""
PLACES = [
    (0, "Parameter 'driver' does not accept value 'raw'", 5),
    (0, "Invalid parameter type for 'file.filename', expected: string", 7),
    (0, "Parameter 'file.locking' is missing", 7),
    (0, "Parameter 'size' is missing", 4),
    (0, "Could not open 'a.raw': Permission denied", 7),
    (0, "Duplicate nodes with node-name='plain'", 6),
    (0, "Something else altogether", 4),
    (1, "Parameter 'event' does not accept value 'nonsense'", 12),
    (1, "Parameter 'driver' does not accept value 'file'", 19),
    (1, "Parameter 'inject-error[1].event' is unexpected", 12),
    (1, "Parameter 'image.node-name' is unexpected", 18),
    (1, "Parameter 'image.size' is missing", 16),
    (1, "Cannot find device='inner' nor node-name='inner'", 18),
    (1, "Could not open 'b.raw': No such file or directory", 20),
]


@pytest.mark.parametrize(("number", "message", "line"), PLACES)
def test_a_message_about_a_node_has_the_line_of_what_it_is_about(
    tmp_path: Path, number: int, message: str, line: int
) -> None:
    (settings,) = loaded(tmp_path, NODES)
    assert settings.blockdevs[number].where(message) == f"{tmp_path}/mounts.toml:{line}: mount[0].blockdev[{number}]"
