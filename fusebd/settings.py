"""What one daemon is to do, as the command line and the mount points file both say it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from fusebd.block.cachemode import CACHE_MODES, CacheMode
from fusebd.errors import UsageError

TransportName = Literal["auto", "devfuse", "pyfuse3"]
LogLevel = Literal["debug", "info", "warning", "error"]


class Addition:
    """Something to add at the start, a node or an object: where it was asked for, and its options."""

    def parse(self) -> Any:
        """The options as the JSON object of a blockdev-add or object-add.  Raises OptionError."""
        raise NotImplementedError

    def where(self, message: str) -> str:
        """The place that an error with *message* is put down to."""
        raise NotImplementedError


class TextBlockdev(Addition):
    """``--blockdev OPTS``: JSON, or ``key=value,...``."""

    def __init__(self, text: str) -> None:
        self._text = text

    def parse(self) -> Any:
        from fusebd.block.driver import parse_blockdev_text

        return parse_blockdev_text(self._text)

    def where(self, message: str) -> str:
        return f"--blockdev {self._text}"


class TextObject(Addition):
    """``--object OPTS``: JSON, or ``key=value,...``."""

    def __init__(self, text: str) -> None:
        self._text = text

    def parse(self) -> Any:
        from fusebd.block.objects import parse_object_text

        return parse_object_text(self._text)

    def where(self, message: str) -> str:
        return f"--object {self._text}"


@dataclass
class MountSettings:
    """One mount point and everything about it.

    ``mountpoint`` is absolute with symbolic links resolved; ``qmp`` has addresses whose paths are absolute;
    relative file names of nodes are taken from ``directory``.
    """

    mountpoint: str
    objects: list[Addition] = field(default_factory=list)
    blockdevs: list[Addition] = field(default_factory=list)
    qmp: list[str] = field(default_factory=list)
    foreground: bool = False
    transport: TransportName = "auto"
    read_only: bool = False
    snapshot: bool = False
    allow_other: bool = False
    caches: dict[str, CacheMode] = field(default_factory=dict)
    log_level: LogLevel = "info"
    log_file: str | None = None
    directory: str = "."


def cache_choice(text: str) -> tuple[str, CacheMode]:
    """The node-name and the mode of ``NODE=MODE``.  Raises UsageError."""
    name, _, mode = text.partition("=")
    for known in CACHE_MODES:
        if name and mode == known:
            return name, known
    raise UsageError(f"Invalid cache mode '{text}', expected: NODE={'|'.join(CACHE_MODES)}")


def qmp_address(text: str, directory: str, *, stdio: bool = False) -> str:
    """*text* checked, and with its path made absolute: ``unix:PATH``, ``HOST:PORT``, or ``stdio`` if allowed.

    Raises UsageError.
    """
    if text == "stdio":
        if not stdio:
            raise UsageError("The QMP address 'stdio' is for a mount in the foreground")
        return text
    if text.startswith("unix:") and len(text) > len("unix:"):
        return "unix:" + os.path.join(directory, text.removeprefix("unix:"))
    if re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:/\s]+):\d{1,5}", text) and int(text.rpartition(":")[2]) < 65536:
        return text
    raise UsageError(f"Invalid QMP address '{text}', expected: unix:PATH or HOST:PORT")
