"""The command line: what is asked for is read here, and everything else is imported when it is needed.

A mistake is one line on standard error and exit status 1.  Subcommands are a table (``COMMANDS``); each has its own
parser, so that one with a foreign command line (qemu-storage-daemon's) fits in.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, get_args

from fusebd import __version__
from fusebd.errors import FusebdError, UsageError
from fusebd.settings import LogLevel, MountSettings, TextBlockdev, TransportName, qmp_address


class _Parser(argparse.ArgumentParser):
    """argparse, with mistakes as UsageError."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


# --- mount ---------------------------------------------------------------------------------------


def _mount_parser() -> _Parser:
    parser = _Parser(
        prog="fusebd mount",
        allow_abbrev=False,
        description="Mount a directory in which every named block node is a file.",
        epilog="--blockdev help lists the drivers, --blockdev driver=NAME,help the options of one.",
    )
    add = parser.add_argument
    add("mountpoint", metavar="MOUNTPOINT", nargs="?", help="an empty directory; with --config: only this one of FILE")
    add("--blockdev", metavar="OPTS", action="append", default=[], help="add a node: JSON, or key=value,...")
    add("--config", metavar="FILE", help="take mount points and nodes from FILE (see mountpoints.example)")
    add("--qmp", metavar="ADDRESS", action="append", default=[], help="QMP on unix:PATH or HOST:PORT too")
    add("--foreground", action="store_true", help="stay, and log to standard error; --qmp stdio is possible then")
    add("--transport", choices=get_args(TransportName), help="how requests come from the kernel (default: auto)")
    add("--read-only", action="store_true", help="mount read-only")
    add("--allow-other", action="store_true", help="let other users in, too")
    add("--log-level", choices=get_args(LogLevel), help="what is logged (default: info)")
    add("--log-file", metavar="FILE", help="log to FILE")
    return parser


def _mount(arguments: Sequence[str]) -> int:
    parsed = _mount_parser().parse_args(arguments)
    for text in parsed.blockdev:
        items = [] if text.startswith("{") else text.split(",")
        if "help" in items or "?" in items:
            return _list_options([item for item in items if item not in ("help", "?")])
    mounts = _mounts(parsed)
    if parsed.foreground:
        from fusebd.run import run_foreground

        run_foreground(mounts[0])
        return 0
    from fusebd.run import start_daemons

    failures = start_daemons(mounts)
    for failure in failures:
        _complain(failure)
    return 1 if failures else 0


def _mounts(parsed: argparse.Namespace) -> list[MountSettings]:
    """What is to be mounted, from the command line and the file that it names."""
    here = os.getcwd()
    mountpoint = None if parsed.mountpoint is None else os.path.realpath(parsed.mountpoint)
    if parsed.config is None:
        if mountpoint is None:
            raise UsageError("the following arguments are required: MOUNTPOINT (see fusebd mount --help)")
        mounts = [MountSettings(mountpoint, directory=here)]
    else:
        from fusebd.config import load

        mounts = load(parsed.config)
        if mountpoint is not None:
            mounts = [settings for settings in mounts if settings.mountpoint == mountpoint]
            if not mounts:
                raise UsageError(f"{parsed.config}: it has no mount point '{parsed.mountpoint}'")
    for option in ("blockdev", "qmp", "foreground"):
        if len(mounts) > 1 and getattr(parsed, option):
            raise UsageError(f"--{option} is for one mount point, and {parsed.config} has {len(mounts)}: name one")
    for settings in mounts:
        settings.blockdevs += [TextBlockdev(text) for text in parsed.blockdev]
        settings.qmp += [qmp_address(text, here, stdio=parsed.foreground) for text in parsed.qmp]
        settings.foreground = parsed.foreground
        settings.transport = parsed.transport or settings.transport
        settings.read_only |= parsed.read_only
        settings.allow_other |= parsed.allow_other
        settings.log_level = parsed.log_level or settings.log_level
        if parsed.log_file is not None:
            settings.log_file = os.path.join(here, parsed.log_file)
    return mounts


def _list_options(items: list[str]) -> int:
    """Print the options of the driver that *items* (``driver=NAME``, or NAME) ask about; without one, the drivers."""
    from fusebd.block.driver import driver_class, driver_names
    from fusebd.block.options import describe

    names = [item.removeprefix("driver=") for item in items if item.startswith("driver=") or "=" not in item]
    if not names:
        _print("Drivers:", *(f"  {name}" for name in driver_names()))
        return 0
    driver = driver_class(names[0])
    _print(f"Options of the driver {names[0]}:", describe(driver.options_class))
    return 0


# --- umount, qmp ---------------------------------------------------------------------------------


def _umount(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="fusebd umount",
        allow_abbrev=False,
        description="Unmount, and wait until the daemon has flushed all its nodes and ended. "
        "Clears what a daemon left that was killed.",
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument("--force", action="store_true", help="even if files in it are open; they fail from then on")
    parsed = parser.parse_args(arguments)
    from fusebd.fuse.mountpoint import location
    from fusebd.unmount import unmount

    unmount(location(parsed.mountpoint), force=parsed.force)
    return 0


def _qmp(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="fusebd qmp",
        allow_abbrev=False,
        description="Run one QMP command and print what it returns.",
        epilog="Example: fusebd qmp /mnt/fusebd blockdev-del node-name=disk0",
    )
    parser.add_argument("where", metavar="MOUNTPOINT|ADDRESS", help="a mount point, unix:PATH or HOST:PORT")
    parser.add_argument("command", metavar="COMMAND")
    parser.add_argument(
        "words", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="key=value, or all arguments as a JSON object"
    )
    parsed = parser.parse_args(arguments)
    address = _qmp_server(parsed.where)
    from fusebd.qmp.client import run

    return run(address, parsed.command, parsed.words)


def _qmp_server(where: str) -> str:
    """The address that *where*, a mount point or an address, means."""
    if ("/" not in where.removeprefix("unix:") and not os.path.isdir(where)) or where.startswith("unix:"):
        return qmp_address(where, os.getcwd())
    from fusebd.fuse.mountpoint import location
    from fusebd.runtime import Place

    place = Place(location(where))
    if not os.path.exists(place.socket):
        raise UsageError(f"{place.mountpoint}: not mounted by fusebd")
    return f"unix:{place.socket}"


# --- all of it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A subcommand; *run* gets the arguments behind its name and returns the exit status."""

    summary: str
    run: Callable[[Sequence[str]], int]


COMMANDS = {
    "mount": Command("mount block nodes as files in a directory", _mount),
    "umount": Command("flush, unmount, and wait for the daemon's end", _umount),
    "qmp": Command("run one QMP command", _qmp),
}


def _usage() -> str:
    commands = "\n".join(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: fusebd COMMAND ...\n"
        "       fusebd --help | --version\n\n"
        "A graph of virtual block devices, mounted as a directory.\n\n"
        f"commands (fusebd COMMAND --help says more):\n{commands}"
    )


def _print(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


def _run(arguments: Sequence[str]) -> int:
    if not arguments:
        raise UsageError("a command is missing (see fusebd --help)")
    name, *rest = arguments
    if name in ("--help", "-h"):
        _print(_usage())
        return 0
    if name == "--version":
        _print(f"fusebd {__version__}")
        return 0
    if name not in COMMANDS:
        raise UsageError(f"unknown command '{name}' (see fusebd --help)")
    return COMMANDS[name].run(rest)


def _complain(message: str) -> None:
    """Say on standard error what is wrong, in one line whatever *message* contains."""
    text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in message)
    sys.stderr.write(f"fusebd: {text}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line *arguments* (default: the process's); the exit status."""
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except FusebdError as error:
        _complain(error.with_hint_in_line())
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone; nothing more can be said to them.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
