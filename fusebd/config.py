"""The mount points file: what ``fusebd mount --config FILE`` mounts.  ``mountpoints.example`` documents the format.

TOML; the options of a node are spelt as in QMP.  What FILE says about nodes is only read here; the options are
validated by the drivers' declarations when the node is added, like those of a blockdev-add.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator

from fusebd.block.options import Json, OptionStruct, convert
from fusebd.errors import OpenError, OptionError, UsageError
from fusebd.settings import Blockdev, LogLevel, MountSettings, TransportName, qmp_address


class MountTable(OptionStruct, frozen=True):
    """The keys of a ``[[mount]]`` table."""

    point: str
    blockdev: list[dict[str, Json]] = []  # noqa: RUF012  (msgspec copies it)
    qmp: list[str] = []  # noqa: RUF012
    transport: TransportName = "auto"
    read_only: bool = False
    allow_other: bool = False
    log_level: LogLevel = "info"
    log_file: str | None = None


class File(OptionStruct, frozen=True):
    """The top level of the file; its tables are validated one by one, for the place in a message."""

    mount: list[dict[str, Json]]


def load(path: str) -> list[MountSettings]:
    """The mount points of the file *path*, in its order; relative names in it are taken from its directory.

    Raises OpenError, and UsageError naming file and line.
    """
    try:
        with open(path, "rb") as file:
            text = file.read().decode()
        tree = tomllib.loads(text)
    except OSError as error:
        raise OpenError.from_os(f"Could not open '{path}'", error) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(_with_line(path, str(error))) from None
    try:
        tables = convert(tree, File).mount
    except OptionError as error:
        raise UsageError(f"{path}: {error}") from None
    lines = _Lines(path, text, tables)
    found: dict[str, MountSettings] = {}
    for index, table in enumerate(tables):
        settings = _settings(table, lines, index, os.path.dirname(os.path.abspath(path)))
        if settings.mountpoint in found:
            raise UsageError(f"{lines.where(index)}: {settings.mountpoint} is mounted by another table already")
        found[settings.mountpoint] = settings
    if not found:
        raise UsageError(f"{path}: it has no [[mount]] table")
    return list(found.values())


def _settings(tree: dict[str, Json], lines: _Lines, index: int, directory: str) -> MountSettings:
    try:
        table = convert(tree, MountTable)
    except OptionError as error:
        raise UsageError(f"{lines.where(index, parameter=_parameter(str(error)))}: {error}") from None
    try:
        addresses = [qmp_address(address, directory) for address in table.qmp]
    except UsageError as error:
        raise UsageError(f"{lines.where(index, parameter='qmp')}: {error}") from None
    return MountSettings(
        mountpoint=os.path.realpath(os.path.join(directory, table.point)),
        blockdevs=[ConfigBlockdev(tree, lines, index, number) for number, tree in enumerate(table.blockdev)],
        qmp=addresses,
        transport=table.transport,
        read_only=table.read_only,
        allow_other=table.allow_other,
        log_level=table.log_level,
        log_file=None if table.log_file is None else os.path.join(directory, table.log_file),
        directory=directory,
    )


class ConfigBlockdev(Blockdev):
    """A ``[[mount.blockdev]]`` table."""

    def __init__(self, tree: dict[str, Json], lines: _Lines, mount: int, number: int) -> None:
        self._tree = tree
        self._lines, self._mount, self._number = lines, mount, number

    def parse(self) -> Json:
        return self._tree

    def where(self, message: str) -> str:
        return self._lines.where(self._mount, self._number, _parameter(message))


def _with_line(path: str, message: str) -> str:
    """tomllib's *message* with the line in front: ``FILE:3: ...``; at the end of the file it knows none."""
    found = re.fullmatch(r"(?s)(.*) \(at line (\d+), column (\d+)\)", message)
    if found is None:
        return f"{path}: {message}"
    return f"{path}:{found[2]}: {found[1]} (column {found[3]})"


def _parameter(message: str) -> str:
    """The parameter that an OptionError's *message* is about, '' if it names none."""
    found = re.search(r"[Pp]arameter (?:type for )?'([^']*)'", message)
    return found[1] if found else ""


class _Lines:
    """Where the tables of the file begin; tomllib keeps no line numbers.

    The headers are found by looking for them.  Where that does not give the tables that tomllib has
    found (arrays written inline), errors are placed by the path of the table alone.
    """

    def __init__(self, path: str, text: str, tables: list[dict[str, Json]]) -> None:
        self._path = path
        self._text = text.splitlines()
        self._mounts = [number for number, name in self._headers() if name == "[[mount]]"]
        self._blockdevs: list[list[int]] = [[] for _ in self._mounts]
        for number, name in self._headers():
            if name == "[[mount.blockdev]]" and self._mounts and number > self._mounts[0]:
                self._blockdevs[sum(1 for start in self._mounts if start < number) - 1].append(number)
        counts = [len(blockdevs) if isinstance(blockdevs := table.get("blockdev", []), list) else 0 for table in tables]
        self._known = counts == [len(numbers) for numbers in self._blockdevs]

    def _headers(self) -> Iterator[tuple[int, str]]:
        for number, line in enumerate(self._text, 1):
            if line.lstrip().startswith("["):
                yield number, re.sub(r"[\s\"']", "", line.partition("#")[0])

    def where(self, mount: int, blockdev: int | None = None, parameter: str = "") -> str:
        """``FILE:LINE: mount[0].blockdev[2]``, the line being that of *parameter* if it is found in the table."""
        name = f"mount[{mount}]" if blockdev is None else f"mount[{mount}].blockdev[{blockdev}]"
        if not self._known:
            return f"{self._path}: {name}"
        start = self._mounts[mount] if blockdev is None else self._blockdevs[mount][blockdev]
        ends = [number for number, header in self._headers() if number > start and header.startswith("[[mount")]
        end = min(ends, default=len(self._text) + 1)
        key = parameter.partition(".")[0].partition("[")[0]
        pattern = re.compile(rf"\s*(?:\[+mount\.blockdev\.)?[\"']?{re.escape(key)}[\"']?\s*[=.\]]")
        inside = (n for n in range(start + 1, end) if key and pattern.match(self._text[n - 1]))
        return f"{self._path}:{next(inside, start)}: {name}"
