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
from fusebd.block.cachemode import CACHE_MODES
from fusebd.errors import FusebdError, UsageError
from fusebd.settings import LogLevel, MountSettings, TextBlockdev, TextObject, TransportName, cache_choice, qmp_address


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
        epilog="--blockdev help lists the drivers, --blockdev driver=NAME,help the options of one; "
        "--object help and --object TYPE,help likewise.",
    )
    add = parser.add_argument
    add("mountpoint", metavar="MOUNTPOINT", nargs="?", help="an empty directory; with --config: only this one of FILE")
    add("--blockdev", metavar="OPTS", action="append", default=[], help="add a node: JSON, or key=value,...")
    add("--object", metavar="OPTS", action="append", default=[], help="add an object that nodes refer to, likewise")
    add("--config", metavar="FILE", help="take mount points and nodes from FILE (see mountpoints.example)")
    add("--qmp", metavar="ADDRESS", action="append", default=[], help="QMP on unix:PATH or HOST:PORT too")
    add("--foreground", action="store_true", help="stay, and log to standard error; --qmp stdio is possible then")
    add("--transport", choices=get_args(TransportName), help="how requests come from the kernel (default: auto)")
    add("--read-only", action="store_true", help="mount read-only")
    add("--snapshot", action="store_true", help="leave images as they are: what is written is kept until the end")
    add("--allow-other", action="store_true", help="let other users in, too")
    add("--cache", metavar="NODE=MODE", action="append", default=[], help=f"NODE's file: {', '.join(CACHE_MODES)}")
    add("--log-level", choices=get_args(LogLevel), help="what is logged (default: info)")
    add("--log-file", metavar="FILE", help="log to FILE")
    return parser


def _mount(arguments: Sequence[str]) -> int:
    parsed = _mount_parser().parse_args(arguments)
    for texts, list_options in ((parsed.object, _list_object_options), (parsed.blockdev, _list_options)):
        for text in texts:
            # a doubled comma is part of a value
            items = [] if text.startswith("{") else text.replace(",,", "").split(",")
            if "help" in items or "?" in items:
                return list_options([item for item in items if item not in ("help", "?")])
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
    if parsed.mountpoint == "":
        raise UsageError("MOUNTPOINT is empty")
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
    for option in ("object", "blockdev", "cache", "qmp", "foreground"):
        if len(mounts) > 1 and getattr(parsed, option):
            raise UsageError(f"--{option} is for one mount point, and {parsed.config} has {len(mounts)}: name one")
    for settings in mounts:
        settings.objects += [TextObject(text) for text in parsed.object]
        settings.blockdevs += [TextBlockdev(text) for text in parsed.blockdev]
        settings.qmp += [qmp_address(text, here, stdio=parsed.foreground) for text in parsed.qmp]
        settings.foreground = parsed.foreground
        settings.transport = parsed.transport or settings.transport
        settings.read_only |= parsed.read_only
        settings.snapshot |= parsed.snapshot
        settings.allow_other |= parsed.allow_other
        settings.caches |= dict(map(cache_choice, parsed.cache))
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


def _list_object_options(items: list[str]) -> int:
    """Print the options of the type of object that *items* (``qom-type=TYPE``, or TYPE) ask about, or the types."""
    from fusebd.block.objects import OBJECT_TYPES
    from fusebd.block.options import describe

    names = [item.removeprefix("qom-type=") for item in items if item.startswith("qom-type=") or "=" not in item]
    if not names:
        _print("Objects:", *(f"  {name}" for name in OBJECT_TYPES))
    elif names[0] not in OBJECT_TYPES:
        raise UsageError(f"there is no object type '{names[0]}' (see fusebd mount --object help)")
    else:
        _print(f"Options of {names[0]}:", describe(OBJECT_TYPES[names[0]].options_class))
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
    words = parser.add_argument(
        "words",
        metavar="ARGUMENT",
        nargs=argparse.REMAINDER,
        help="key=value, key:=JSON, or all arguments as one JSON object",
    )
    words.required = False  # for the message that says what is missing
    parsed = parser.parse_args(arguments)
    address = _qmp_server(parsed.where)
    from fusebd.qmp.client import run

    run(address, parsed.command, parsed.words)
    return 0


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


def _on_node(command: str, description: str) -> Callable[[Sequence[str]], int]:
    """A subcommand that runs the QMP *command* on a node."""

    def run_command(arguments: Sequence[str]) -> int:
        parser = _Parser(prog=f"fusebd {command}", allow_abbrev=False, description=description)
        parser.add_argument("where", metavar="MOUNTPOINT|ADDRESS", help="a mount point, unix:PATH or HOST:PORT")
        parser.add_argument("node_name", metavar="NODE")
        parser.add_argument("words", metavar="KEY=VALUE", nargs="*", help="arguments of the QMP command")
        parsed = parser.parse_args(arguments)
        address = _qmp_server(parsed.where)
        from fusebd.qmp.client import run

        run(address, command, [f"node-name={parsed.node_name}", *parsed.words])
        return 0

    return run_command


# --- log -----------------------------------------------------------------------------------------


def _log(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="fusebd log",
        allow_abbrev=False,
        description="Set marks in the log that a blklogwrites node writes, and list and replay such logs.",
        epilog="The logs are those of the kernel's dm-log-writes, the options those of xfstests' replay-log.",
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    summary = "set a mark in the log of a node, or of one below it"
    mark = actions.add_parser("mark", allow_abbrev=False, help=summary, description=summary)
    mark.add_argument("where", metavar="MOUNTPOINT|ADDRESS", help="a mount point, unix:PATH or HOST:PORT")
    mark.add_argument("node_name", metavar="NODE")
    mark.add_argument("text", metavar="TEXT")
    summary = "print the entries of a log: number, kind, place in bytes"
    listing = actions.add_parser("list", allow_abbrev=False, help=summary, description=summary)
    listing.add_argument("--find", action="store_true", help="print the last entry alone: NUMBER@SECTOR of the log")
    listing.add_argument("--num-entries", action="store_true", help="print how many entries there are")
    summary = "write what is in a log to a file or block device that is as the node was when the log began"
    replaying = actions.add_parser("replay", allow_abbrev=False, help=summary, description=summary)
    replaying.add_argument("--no-discard", action="store_true", help="leave what was discarded as it is")
    for action in (listing, replaying):
        action.add_argument("log", metavar="LOG")
        start = action.add_mutually_exclusive_group()
        start.add_argument("--start-entry", metavar="N", type=_number, default=0, help="begin with entry N (from 0)")
        start.add_argument("--start-mark", metavar="TEXT", help="begin behind the mark TEXT")
        action.add_argument("--limit", metavar="N", type=_number, default=0, help="end after N entries")
        action.add_argument("--end-mark", metavar="TEXT", help="end with the mark TEXT")
        action.add_argument("--next-flush", action="store_true", help="end with the next flush")
        action.add_argument("--next-fua", action="store_true", help="end with the next write with FUA")
    replaying.add_argument("target", metavar="TARGET", help="what to replay onto")
    parsed = parser.parse_args(arguments)
    if parsed.action == "mark":
        address = _qmp_server(parsed.where)
        from fusebd.qmp.client import run

        run(address, "blklogwrites-mark", [f"node-name={parsed.node_name}", f"mark={parsed.text}"])
        return 0
    return _read_log(parsed)


def _number(text: str) -> int:
    """*text*, a number that is not negative: decimal, or 0x and hexadecimal."""
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of entries")
    return number


def _read_log(parsed: argparse.Namespace) -> int:
    from fusebd.faults.writelog import Selection, WriteLog, find, listing, replay
    from fusebd.ondisk.logwrites import FLUSH, FUA

    selection = Selection(
        start_entry=parsed.start_entry,
        start_mark=parsed.start_mark,
        limit=parsed.limit,
        end_mark=parsed.end_mark,
        stop_flags=(FLUSH if parsed.next_flush else 0) | (FUA if parsed.next_fua else 0),
    )
    with WriteLog(parsed.log) as log:
        if parsed.action == "replay":
            _print(f"{replay(log, parsed.target, selection, discard=not parsed.no_discard)} entries replayed")
        elif parsed.num_entries:
            _print(str(log.nr_entries))
        elif parsed.find:
            if not selection.ends:
                raise UsageError("--find goes with one of --limit, --end-mark, --next-flush, --next-fua")
            entry = find(log, selection)
            _print(f"{entry.number}@{entry.end // log.sector_size}")
        else:
            for line in listing(log, selection):
                _print(line)
    return 0


# --- storage-daemon ------------------------------------------------------------------------------


def _storage_daemon(arguments: Sequence[str]) -> int:
    from fusebd.storagedaemon import main

    return main(arguments)


# --- fault ---------------------------------------------------------------------------------------


def _fault(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="fusebd fault",
        allow_abbrev=False,
        description="Have requests of a node fail, wait or go wrong by rules, while it is in use.",
        epilog="Example: fusebd fault add mnt disk action=error errno=ENOSPC operations=write every=10",
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)

    def action(name: str, summary: str, epilog: str = "") -> argparse.ArgumentParser:
        made = actions.add_parser(name, allow_abbrev=False, help=summary, description=summary, epilog=epilog)
        made.add_argument("where", metavar="MOUNTPOINT|ADDRESS", help="a mount point, unix:PATH or HOST:PORT")
        made.add_argument("node_name", metavar="NODE")
        return made

    add = action(
        "add",
        "add a rule, and print what it is called; a node without a fault filter gets one",
        "key=value, key:=JSON, or the whole rule as one JSON object; fusebd mount --blockdev fault,help lists the "
        "members of rules.  Several operations are separated by commas; with a mount point, target=ext4:journal and "
        "whatever else fusebd targets knows stands for the ranges where that is.",
    )
    add.add_argument("words", metavar="KEY=VALUE", nargs="+", help="what the rule says")
    listing = action("list", "print the rules and what they have done, damage, and requests that hang")
    listing.add_argument("--json", action="store_true", help="as JSON")
    remove = action("remove", "take rules away; the damage that they have done stays")
    remove.add_argument("ids", metavar="ID", nargs="*", help="a rule")
    remove.add_argument("--all", action="store_true", help="take the filter away, with its rules and all damage")
    heal = action("heal", "undo damage: flipped bits and bad sectors")
    heal.add_argument("words", metavar="KEY=VALUE", nargs="*", help="id=RULE, offset=BYTE, length=BYTES: only that")
    release = action("release", "let requests go on that hang")
    release.add_argument("words", metavar="KEY=VALUE", nargs="*", help="id=RULE, request=NUMBER: only those")
    record = action("record", "record rules, changes and decisions from now on; a node without a fault filter gets one")
    record.add_argument("file", metavar="FILE", nargs="?", help="file to write, over what is there")
    record.add_argument("--end", action="store_true", help="end the recording")
    replay = action("replay", "put a filter above the node that repeats a recording, and reports where it differs")
    replay.add_argument("file", metavar="FILE", help="the recording")
    parsed = parser.parse_args(arguments)
    address, name = _qmp_server(parsed.where), parsed.node_name
    from fusebd.qmp import faultclient

    if parsed.action == "add":
        path = os.path.join(parsed.where, name) if os.path.isdir(parsed.where) else None
        _print(faultclient.add(address, name, parsed.words, path))
    elif parsed.action == "list":
        _print(*faultclient.listing(address, name, as_json=parsed.json))
    elif parsed.action == "remove":
        if bool(parsed.ids) is parsed.all:
            raise UsageError("name the rules to remove, or say --all (see fusebd fault remove --help)")
        faultclient.remove(address, name, parsed.ids)
    elif parsed.action == "record":
        if bool(parsed.file) is parsed.end:
            raise UsageError("name the file to record to, or say --end (see fusebd fault record --help)")
        faultclient.record(address, name, parsed.file)
    elif parsed.action == "replay":
        faultclient.replay(address, name, parsed.file)
    else:
        _print(faultclient.carry_out(address, f"fault-{parsed.action}", name, parsed.words))
    return 0


# --- targets ---------------------------------------------------------------------------------------


def _targets(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="fusebd targets",
        allow_abbrev=False,
        description="List the structures that a file system, partition table or qcow2 image has, or print where "
        "one of them is: start and length in bytes of PATH.",
        epilog="Examples: fusebd targets disk.img ext4:journal; "
        "fusebd targets --sectors mnt/disk gpt:partition=1/xfs:file=/etc/passwd",
    )
    parser.add_argument("path", metavar="PATH", help="an image, a block device, a node of a mount")
    parser.add_argument("target", metavar="TARGET", nargs="?", help="a name that the list has; without it: the list")
    parser.add_argument("--sectors", action="store_true", help="in sectors of 512 bytes: those that it takes a part of")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parsed = parser.parse_args(arguments)
    import json

    from fusebd.faults.targets import find, in_sectors, names

    if parsed.target is None:
        found = names(parsed.path)
        width = max(map(len, found))
        lines = [f"{name:<{width}}  {summary}" for name, summary in found.items()]
        listing: object = [{"name": name, "description": summary} for name, summary in found.items()]
    else:
        ranges = find(parsed.path, parsed.target)
        if parsed.sectors:
            ranges = in_sectors(ranges)
        lines = [f"{start} {length}" for start, length in ranges]
        listing = [{"start": start, "length": length} for start, length in ranges]
    _print(json.dumps(listing) if parsed.json else "\n".join(lines))
    return 0


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
    "power-cut": Command(
        "cut the power of a node with a volatile cache",
        _on_node(
            "power-cut", "Drop a part of what is in the volatile cache of a node, and fail its requests from then on."
        ),
    ),
    "power-on": Command(
        "switch it on again",
        _on_node("power-on", "Serve the requests of a node again after a power cut."),
    ),
    "log": Command("marks in write logs, and replaying them", _log),
    "fault": Command("faults of a node: add, list and remove rules, heal, release, record, replay", _fault),
    "targets": Command("name the structures of an image, and say where they are", _targets),
    "storage-daemon": Command("qemu-storage-daemon's command line", _storage_daemon),
}


def _usage() -> str:
    commands = "\n".join(f"  {name:<15} {command.summary}" for name, command in COMMANDS.items())
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
    except OSError as error:
        # The host's refusal is no bug of fusebd's: the working directory is gone, a disk is full.
        _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
        return 1
