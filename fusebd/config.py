"""The mount points file: what ``fusebd mount --config FILE`` mounts.  ``mountpoints.example`` documents the format.

TOML; the options of a node are spelt as in QMP.  What FILE says about nodes is only read here; the options are
validated by the drivers' declarations when the node is added, like those of a blockdev-add.
"""

from __future__ import annotations

import os
import re
import tomllib
from bisect import bisect_left
from collections.abc import Iterable, Iterator

from fusebd.block.cachemode import CACHE_MODES, CacheMode
from fusebd.block.options import Json, OptionStruct, convert
from fusebd.errors import FusebdError, OpenError, OptionError, UsageError
from fusebd.settings import Addition, LogLevel, MountSettings, TransportName, qmp_address


class MountTable(OptionStruct, frozen=True):
    """The keys of a ``[[mount]]`` table."""

    point: str
    object: list[dict[str, Json]] = []  # noqa: RUF012  (msgspec copies it)
    blockdev: list[dict[str, Json]] = []  # noqa: RUF012
    qmp: list[str] = []  # noqa: RUF012
    transport: TransportName = "auto"
    read_only: bool = False
    snapshot: bool = False
    allow_other: bool = False
    cache: dict[str, str] = {}  # noqa: RUF012
    log_level: LogLevel = "info"
    log_file: str | None = None


class File(OptionStruct, frozen=True):
    """The top level of the file; its tables are validated one by one, for the place in a message."""

    mount: list[dict[str, Json]] = []  # noqa: RUF012


#: where a value is: the keys and indices that lead to it from the top of the file
_Path = tuple[str | int, ...]


def load(path: str) -> list[MountSettings]:
    """The mount points of the file *path*, in its order; relative names in it are taken from its directory.

    Raises OpenError, and UsageError naming file and line.
    """
    try:
        with open(path, "rb") as file:
            text = file.read().decode()
    except OSError as error:
        raise OpenError.from_os(f"Could not open '{path}'", error) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}") from None
    tree = _parse(path, text)
    places = _Places(path, text, tree)
    try:
        tables = convert(tree, File).mount
    except OptionError as error:
        raise places.error((), error) from None
    found: dict[str, MountSettings] = {}
    for index, table in enumerate(tables):
        settings = _settings(table, places, index, os.path.dirname(os.path.abspath(path)))
        if settings.mountpoint in found:
            message = f"{settings.mountpoint} is mounted by another table already"
            raise places.error(("mount", index), UsageError(message))
        found[settings.mountpoint] = settings
    if not found:
        raise UsageError(f"{path}: it has no [[mount]] table")
    return list(found.values())


def _parse(path: str, text: str) -> dict[str, Json]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UsageError(f"{path}: it is nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, and what int() says of a number that is too long
        raise UsageError(_with_line(path, text, str(error))) from None


def _with_line(path: str, text: str, message: str) -> str:
    """tomllib's *message* with the line in front: ``FILE:3: ...``; it does not count the lines if it means the end."""
    if found := re.fullmatch(r"(?s)(.*) \(at line (\d+), column (\d+)\)", message):
        return f"{path}:{found[2]}: {found[1]} (column {found[3]})"
    if message.endswith("(at end of document)"):
        return f"{path}:{len(text.splitlines()) or 1}: {message}"
    return f"{path}: {message}"


def _settings(tree: dict[str, Json], places: _Places, index: int, directory: str) -> MountSettings:
    place = ("mount", index)
    try:
        table = convert(tree, MountTable)
        if not table.point:
            raise OptionError("Parameter 'point' is empty")
        for name in (table.point, table.log_file or "", *table.qmp):
            if "\0" in name:
                raise OptionError(f"'{name}' has a NUL character")
        addresses = [qmp_address(address, directory) for address in table.qmp]
        caches = dict(_cache(name, mode) for name, mode in table.cache.items())
    except (OptionError, UsageError) as error:
        raise places.error(place, error) from None
    return MountSettings(
        mountpoint=os.path.realpath(os.path.join(directory, table.point)),
        objects=[_Table(tree, places, (*place, "object", number)) for number, tree in enumerate(table.object)],
        blockdevs=[_Table(tree, places, (*place, "blockdev", number)) for number, tree in enumerate(table.blockdev)],
        qmp=addresses,
        transport=table.transport,
        read_only=table.read_only,
        snapshot=table.snapshot,
        allow_other=table.allow_other,
        caches=caches,
        log_level=table.log_level,
        log_file=None if table.log_file is None else os.path.join(directory, table.log_file),
        directory=directory,
    )


def _cache(name: str, mode: str) -> tuple[str, CacheMode]:
    for known in CACHE_MODES:
        if mode == known:
            return name, known
    raise OptionError(f"Parameter '{name}' does not accept value '{mode}'")


class _Table(Addition):
    """A ``[[mount.blockdev]]`` or ``[[mount.object]]`` table."""

    def __init__(self, tree: dict[str, Json], places: _Places, place: _Path) -> None:
        self._tree = tree
        self._places, self._place = places, place

    def parse(self) -> Json:
        return self._tree

    def where(self, message: str) -> str:
        return self._places.where(self._place, message)


# --- lines ---------------------------------------------------------------------------------------

_REFUSED_VALUE = re.compile(r"Parameter '([^']*)' does not accept value '(.*)'")
_PARAMETER = re.compile(r"[Pp]arameter (?:type for )?'([^']*)'")


class _Places:
    """On which line of the file something is.  tomllib does not say.

    But the first lines of a file are a file too, unless they end inside a value.  So a value ends with the line with
    which it first appears, and begins behind the longest shorter file.  This is done only for an error.
    """

    def __init__(self, path: str, text: str, tree: dict[str, Json]) -> None:
        self._path = path
        self._lines = text.split("\n")
        self._tree = tree
        self._parsed: dict[int, dict[str, Json] | None] = {}

    def error(self, place: _Path, error: FusebdError) -> UsageError:
        """*error*, which the value at *place* is responsible for, with the line in front."""
        return UsageError(f"{self.where(place, str(error))}: {error}")

    def where(self, place: _Path, message: str) -> str:
        """``FILE:LINE: mount[0].blockdev[2]``: *place*, and the line of what *message* is about there."""
        tree: Json = self._tree
        for key in place:
            tree = tree[key]
        name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place)
        where = f"{self._path}:{self._line((*place, *_subject(tree, message)))}"
        return f"{where}: {name[1:]}" if name else where

    def _line(self, place: _Path) -> int:
        """The line on which the value at *place* begins."""
        numbers = range(1, len(self._lines) + 1)
        last = numbers[bisect_left(numbers[:-1], True, key=lambda number: self._is_there(place, number))]
        return next(number for number in range(last - 1, -1, -1) if self._first(number) is not None) + 1

    def _is_there(self, place: _Path, number: int) -> bool:
        """Whether the value at *place* is complete within the first *number* lines."""
        while (tree := self._first(number)) is None:
            number -= 1
        return len(_walk(tree, place)) == len(place)

    def _first(self, number: int) -> dict[str, Json] | None:
        """What the first *number* lines say; None if they end inside a value."""
        if number not in self._parsed:
            try:
                self._parsed[number] = tomllib.loads("\n".join([*self._lines[:number], ""]))
            except ValueError:
                self._parsed[number] = None
        return self._parsed[number]


def _subject(tree: Json, message: str) -> _Path:
    """Where in *tree* that is which *message* is about: the parameter that it names, or a value that it quotes.

    Of a parameter that *tree* does not have, the table in which it should be.
    """
    if found := _REFUSED_VALUE.search(message):  # named without the path to it
        return next((path for path, value in _leaves(tree) if (path[-1], str(value)) == found.groups()), ())
    if found := _PARAMETER.search(message):
        return _walk(tree, re.findall(r"[^.\[\]]+", found[1]))
    quoted = re.findall(r"'([^']*)'", message)
    return next((path for path, value in _leaves(tree) if value in quoted), ())


def _walk(tree: Json, path: Iterable[str | int]) -> _Path:
    """As much of *path* as there is in *tree*."""
    found: list[str | int] = []
    for key in path:
        if isinstance(tree, list) and str(key).isdecimal() and int(key) < len(tree):
            found.append(int(key))
        elif isinstance(tree, dict) and key in tree:
            found.append(key)
        else:
            break
        tree = tree[found[-1]]
    return tuple(found)


def _leaves(tree: Json, path: _Path = ()) -> Iterator[tuple[_Path, Json]]:
    """Every value in *tree* that has none in it, and its place."""
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, (*path, key))
    else:
        yield path, tree
