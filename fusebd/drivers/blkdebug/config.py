"""blkdebug's configuration file: ``[inject-error]`` and ``[set-state]`` sections of ``key = "value"`` lines.

    # a comment, in column 0
    [inject-error "an-id"]
    event = "read_aio"
    errno = "5"

Format: QEMU's -readconfig (docs/devel/testing/blkdebug.rst).  Errors say which line is wrong; where QEMU takes
a malformed line for something else (a value without quotes, an open quote), it is an error here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import trio

from fusebd.block.options import Json, Option, convert, declared_options
from fusebd.drivers.blkdebug.rules import IDENTIFIER, InjectErrorOptions, SetStateOptions
from fusebd.errors import OpenError, OptionError

#: QEMU reads lines into a buffer of this many bytes, the terminating zero included
_LINE_LENGTH = 1024
#: more than any collection of rules needs, in bytes
_MAX_SIZE = 1 << 20

_SECTION = re.compile(r'\[\s*([^\s"\]]+)(?:\s*"([^"]*)")?\s*\]')
_SETTING = re.compile(r'\s*(\S{1,63})\s*=\s*"([^"]*)"')
_NUMBER = re.compile(r"\s*[+-]?(?:0[xX][0-9a-fA-F]+|[0-9]+)\Z")

_TRUE, _FALSE = ("on", "yes", "true", "y"), ("off", "no", "false", "n")
_SECTIONS: dict[str, type[InjectErrorOptions] | type[SetStateOptions]] = {
    "inject-error": InjectErrorOptions,
    "set-state": SetStateOptions,
}


@dataclass(slots=True)
class _Section:
    name: str
    id: str | None
    line: int
    values: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ConfiguredRule:
    """One section of the file: the rule it describes, and the id that it gives it, if any."""

    options: InjectErrorOptions | SetStateOptions
    id: str | None


async def read_config(path: str) -> list[ConfiguredRule]:
    """The rules in the file *path*, in its order.  Suspends while the file is read.

    Raises OpenError if it cannot be read, OptionError for what is wrong in it.
    """
    try:
        data = await trio.to_thread.run_sync(_read, path)
    except OSError as error:
        raise OpenError.from_os("Could not read blkdebug config file", error) from None
    if len(data) > _MAX_SIZE:
        raise OptionError(f"{path}: configuration file is too long")
    return parse_config(data.decode(errors="surrogateescape"), path)


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = b""
        while len(data) <= _MAX_SIZE and (more := os.read(descriptor, _MAX_SIZE)):
            data += more
        return data
    except OSError as error:
        raise OpenError.from_os("Cannot read config file", error) from None
    finally:
        os.close(descriptor)


def parse_config(text: str, path: str) -> list[ConfiguredRule]:
    """The rules that *text*, the content of the file called *path*, describes.  Raises OptionError."""
    return [_rule(section, path) for section in list(_sections(text, path))]


def _sections(text: str, path: str) -> Iterator[_Section]:
    section: _Section | None = None
    ids: set[tuple[str, str]] = set()
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path}:{number}"
        if len(line) >= _LINE_LENGTH:
            raise OptionError(f"{where}: line is longer than {_LINE_LENGTH - 1} characters")
        if line.startswith("#") or not line.rstrip("\r"):
            continue
        if line.startswith("["):
            if section is not None:
                yield section
            section = _open_section(line, where, number, ids)
            continue
        setting = _SETTING.match(line)
        if setting is None and section is not None:
            raise OptionError(f"{where}: parse error")
        if section is None:
            raise OptionError(f"{where}: no group defined")
        assert setting is not None
        key, value = setting.groups()
        _set(section, key, value, where)
    if section is not None:
        yield section


def _open_section(line: str, where: str, number: int, ids: set[tuple[str, str]]) -> _Section:
    found = _SECTION.match(line)
    if found is None:
        raise OptionError(f"{where}: parse error")
    name, ident = found.groups()
    if name not in _SECTIONS:
        raise OptionError(f"{where}: There is no option group '{name}'")
    if ident is not None:
        if not IDENTIFIER.match(ident):
            raise OptionError(f"{where}: Parameter 'id' expects an identifier")
        if (name, ident) in ids:
            raise OptionError(f"{where}: Duplicate ID '{ident}' for {name}")
        ids.add((name, ident))
    return _Section(name, ident, number)


def _set(section: _Section, key: str, value: str, where: str) -> None:
    """Put *value* into *section* as the type that its option is declared with; a later value replaces an earlier."""
    option = next((o for o in declared_options(_SECTIONS[section.name]) if o.name == key), None)
    if option is None:
        raise OptionError(f"{where}: Invalid parameter '{key}'")
    section.values[key] = _typed(option, value, where)


def _typed(option: Option, value: str, where: str) -> Json:
    if option.choices and value not in option.choices:
        raise OptionError(f"{where}: invalid parameter value: {value}")
    if option.type_name == "boolean":
        if value not in _TRUE + _FALSE:
            raise OptionError(f"{where}: Parameter '{option.name}' expects 'on' or 'off'")
        return value in _TRUE
    if option.type_name == "integer":
        if not _NUMBER.match(value):
            raise OptionError(f"{where}: Parameter '{option.name}' expects a number")
        digits = value.strip().lstrip("+-")
        octal = digits.startswith("0") and digits.isdecimal()
        try:
            number = int(value, 8 if octal else 0)
        except ValueError:
            raise OptionError(f"{where}: Parameter '{option.name}' expects a number") from None
        if abs(number) >= 2**63:
            raise OptionError(f"{where}: Value '{value}' is too large for parameter '{option.name}'")
        return number
    return value


def _rule(section: _Section, path: str) -> ConfiguredRule:
    if "event" not in section.values:
        raise OptionError(f"{path}:{section.line}: Missing event name for rule")
    if section.name == "set-state":
        section.values.setdefault("new_state", 0)
    try:
        return ConfiguredRule(convert(section.values, _SECTIONS[section.name]), section.id)
    except OptionError as error:
        raise error.prefixed(f"{path}:{section.line}") from None
