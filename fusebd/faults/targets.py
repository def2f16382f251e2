"""Names of structures, turned into the bytes that they take: what rules for faults are aimed at.

A target is ``LAYOUT:NAME``, with ``=VALUE`` where the name takes a parameter: ``ext4:journal``, ``qcow2:guest=1M+64k``,
``ext4:file=/etc/passwd``.  A partition may have another target behind it: ``gpt:partition=1/xfs:log``.  A path is all
that is left of the text, whatever is in it.

Everything here blocks, runs other programs, and is for a process of its own: in a daemon it would wait for itself.
What was found is true at that moment.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass

from fusebd.errors import FusebdError, ImageError, OptionError
from fusebd.faults.layout import Area, Layout, Range, Target, merged, opened
from fusebd.faults.layouts.ext4 import Ext4
from fusebd.faults.layouts.partitions import Gpt, Mbr
from fusebd.faults.layouts.qcow2 import Qcow2
from fusebd.faults.layouts.xfs import Xfs

log = logging.getLogger(__name__)

LAYOUTS: dict[str, type[Layout]] = {layout.name: layout for layout in (Gpt, Mbr, Ext4, Xfs, Qcow2)}
#: partition tables inside of partitions that a listing goes down into
MAX_DEPTH = 3


@dataclass(frozen=True)
class Step:
    """A part of a target: a name in a layout, and the value of its parameter (empty: none)."""

    layout: type[Layout]
    target: Target
    value: str


def find(path: str, target: str, offset: int = 0, length: int | None = None) -> list[Range]:
    """Where *target* is in the file or block device *path*: start and length in bytes of it, sorted, none touching.

    *offset* and *length* (None: up to the end) say which bytes of it to look in.  Each range is inside of these, and
    there is at least one.

    Raises OptionError for the target's text, OpenError, ImageError for what is malformed, FusebdError if there is no
    such structure or a program is not installed; all say where.
    """
    steps = parse(target)
    with opened(path, offset, length) as area:
        try:
            for step in steps[:-1]:
                area = area.part(*_find(area, step)[0])
            return [(area.offset + start, extent) for start, extent in _find(area, steps[-1])]
        except FusebdError as error:
            raise error.prefixed(f"{path}: {target}") from None


def names(path: str, offset: int = 0, length: int | None = None) -> dict[str, str]:
    """The targets that the file or block device *path* has, each with what it is.

    A parameter is in capitals, in brackets if it can be left out: ``ext4:inode-tables[=GROUP]``.  What is inside of a
    partition and cannot be read is a warning in the log.  Raises as ``find``; FusebdError if there is none.
    """
    with opened(path, offset, length) as area:
        try:
            found = dict(_names(area, "", MAX_DEPTH))
        except FusebdError as error:
            raise error.prefixed(path) from None
    if not found:
        raise FusebdError(f"{path}: none of {', '.join(LAYOUTS)} is in it")
    return found


def in_sectors(ranges: list[Range], sector: int = 512) -> list[Range]:
    """Byte *ranges* as first sector and number of sectors: all sectors of which they take a part."""
    in_bytes = [(start // sector, -(-(start + length) // sector) - start // sector) for start, length in ranges]
    return merged(in_bytes, sum(max(in_bytes, default=(0, 0))))


def parse(text: str) -> list[Step]:
    """The steps of a target; all but the last are containers.  Raises OptionError."""
    steps = []
    rest = text
    while True:
        found = re.match(r"([a-z0-9]+):([a-z0-9-]+)(?:=|/|\Z)", rest)
        if found is None:
            raise OptionError(f"'{rest}' is no target: it would be LAYOUT:NAME or LAYOUT:NAME=VALUE")
        layout, target = _look_up(found[1], found[2])
        with_value = found[0].endswith("=")
        value, rest = (rest[found.end() :], "") if with_value else ("", rest[found.end(2) :])
        inner = ""
        if target.container:
            value, inner, rest = value.partition("/")
        if target.parameter and not value and (with_value or not target.optional):
            raise OptionError(f"{layout.name}:{target.name} needs a parameter: {_spelt(layout, target)}")
        if with_value and not target.parameter:
            raise OptionError(f"{layout.name}:{target.name} takes no parameter")
        steps.append(Step(layout, target, value))
        if inner:
            continue
        if rest:
            raise OptionError(f"{layout.name}:{target.name} has no other layout inside of it")
        return steps


def _look_up(layout_name: str, name: str) -> tuple[type[Layout], Target]:
    layout = LAYOUTS.get(layout_name)
    if layout is None:
        raise OptionError(f"there is no layout '{layout_name}' (there are: {', '.join(LAYOUTS)})")
    for target in layout.targets:
        if target.name == name:
            return layout, target
    there = ", ".join(target.name for target in layout.targets)
    raise OptionError(f"{layout_name} has no target '{name}' (it has: {there})")


def _spelt(layout: type[Layout], target: Target) -> str:
    parameter = f"={target.parameter}" if target.parameter else ""
    return f"{layout.name}:{target.name}" + (f"[{parameter}]" if target.optional else parameter)


def _find(area: Area, step: Step) -> list[Range]:
    if not step.layout.matches(area):
        raise ImageError(f"there is no {step.layout.noun}")
    return merged(step.layout(area).find(step.target.name, step.value), area.length)


def _names(area: Area, prefix: str, depth: int) -> Iterator[tuple[str, str]]:
    for kind in LAYOUTS.values():
        if not kind.matches(area):
            continue
        layout = kind(area)
        absent = layout.absent()
        for target in kind.targets:
            if target.container:
                for value, place in layout.containers():
                    name = f"{prefix}{kind.name}:{target.name}={value}"
                    try:
                        inside = area.part(*merged([place], area.length)[0])
                    except ImageError as error:
                        log.warning("%s: %s", name, error)
                        continue
                    yield name, target.summary
                    if depth:
                        yield from _names_inside(inside, name, depth - 1)
            elif target.name not in absent:
                yield prefix + _spelt(kind, target), target.summary


def _names_inside(area: Area, name: str, depth: int) -> Iterator[tuple[str, str]]:
    try:
        yield from _names(area, f"{name}/", depth)
    except FusebdError as error:
        log.warning("%s: %s", name, error.with_hint_in_line())
