"""``fusebd storage-daemon``: qemu-storage-daemon's command line over the same engine.

The options are carried out in the order in which they are given.  Without a monitor or an export there is nothing to
do, but the daemon stays, as qemu-storage-daemon does.

Options and behaviour: qemu-storage-daemon(1), QEMU storage-daemon/qemu-storage-daemon.c.
"""

from __future__ import annotations

import argparse
import logging
import logging.handlers
import os
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, NoReturn, get_args

from msgspec import Meta

from fusebd import __version__, daemon
from fusebd.block.driver import parse_blockdev, parse_blockdev_text
from fusebd.block.export import parse_export, parse_export_text
from fusebd.block.objects import OBJECT_TYPES, parse_object_text
from fusebd.block.options import OptionStruct, convert, declared_options, parse_keyval, type_keyval
from fusebd.engine import Engine, run_engine
from fusebd.errors import FusebdError, OptionError, UsageError
from fusebd.pidfile import PidFile
from fusebd.qmp.chardev import Chardev, backends, make_chardev
from fusebd.settings import LogLevel

_DESCRIPTION = """\
Serve block nodes: create nodes, objects and exports as the options say, in their order, and take QMP commands.

  --blockdev [driver=]DRIVER,node-name=NAME,...       add a node
  --chardev socket|stdio,id=ID,...                    a character device for a monitor
  --export [type=]fuse,id=ID,node-name=NAME,mountpoint=FILE
           [,growable=on|off][,writable=on|off][,allow-other=on|off|auto]
           [,cache=direct|page|writeback|passthrough]
                                                      show a node as FILE, a regular file that exists
  --monitor [chardev=]ID[,mode=control][,pretty=on]   QMP on a character device
  --object TYPE,id=ID,...                             create an object
"""


class MonitorOptions(OptionStruct, frozen=True, kw_only=True):
    """QAPI MonitorOptions."""

    chardev: Annotated[str, Meta(description="character device")]
    mode: Literal["control", "readline"] = "control"
    pretty: Annotated[bool, Meta(description="indent what is sent")] = False
    id: Annotated[str, Meta(description="name of the monitor")] = ""


@dataclass
class _Run:
    """What the options have made so far."""

    engine: Engine
    daemonize: bool
    chardevs: dict[str, Chardev] = field(default_factory=dict)

    async def blockdev(self, text: str) -> None:
        await self.engine.graph.add(parse_blockdev(parse_blockdev_text(text)))

    async def object(self, text: str) -> None:
        await self.engine.graph.objects.add(parse_object_text(text))

    async def export(self, text: str) -> None:
        if text in ("help", "?"):
            raise OptionError("Help is not available for this option")
        await self.engine.exports.add(parse_export(parse_export_text(text)))

    async def chardev(self, text: str) -> None:
        chardev = make_chardev(text, daemonize=self.daemonize)
        if chardev.name in self.chardevs:
            raise OptionError(f"Duplicate ID '{chardev.name}' for chardev")
        await chardev.open()
        self.chardevs[chardev.name] = chardev

    async def monitor(self, text: str) -> None:
        tree = parse_keyval(text, implied_key="chardev")
        options = convert(type_keyval(tree, declared_options(MonitorOptions)), MonitorOptions)
        chardev = self.chardevs.get(options.chardev)
        if options.mode != "control":
            raise OptionError("Only QMP is supported")
        if chardev is None:
            raise OptionError(f'chardev "{options.chardev}" not found')
        if chardev.in_use:
            raise OptionError(f"chardev '{chardev.name}' is already in use")
        chardev.in_use = True
        conversation = partial(self.engine.qmp.serve_stream, pretty=options.pretty)
        self.engine.nursery.start_soon(chardev.serve, conversation)


#: options that make something, in the order of the command line
_STEPS: dict[str, Callable[[_Run, str], Awaitable[None]]] = {
    "blockdev": _Run.blockdev,
    "chardev": _Run.chardev,
    "export": _Run.export,
    "monitor": _Run.monitor,
    "object": _Run.object,
}


class _Parser(argparse.ArgumentParser):
    """argparse, with mistakes in the words of getopt_long and qemu-storage-daemon."""

    def error(self, message: str) -> NoReturn:
        if found := re.match(r"argument (?:-\S/)?(--\S+): expected one argument", message):
            message = f"option '{found[1]}' requires an argument"
        elif found := re.match(r"argument (?:-\S/)?(--\S+): ignored explicit argument", message):
            message = f"option '{found[1]}' doesn't allow an argument"
        elif found := re.match(r"unrecognized arguments: (-\S+)", message):
            message = f"unrecognized option '{found[1]}'"
        elif found := re.match(r"unrecognized arguments: (.*)", message):
            message = f"{found[1]}: Unexpected argument"
        raise UsageError(message)


class _Step(argparse.Action):
    """Appends (option, value) to the list of all steps."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: object = None) -> None:
        namespace.steps.append((self.dest, values))


def _parser() -> _Parser:
    parser = _Parser(
        prog="fusebd storage-daemon",
        usage="fusebd storage-daemon [options]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    for name in _STEPS:
        add(f"--{name}", action=_Step, metavar="OPTS", help=argparse.SUPPRESS)
    add("--daemonize", action="store_true", help="go to the background once everything is set up")
    add("--pidfile", metavar="PATH", help="write the process id to PATH once everything is set up")
    add("--log-level", choices=get_args(LogLevel), default="error", help="what is logged (default: error)")
    add("--log-file", metavar="FILE", help="log to FILE instead of standard error")
    add("-V", "--version", action="version", version=f"fusebd storage-daemon version {__version__}")
    parser.set_defaults(steps=[])
    return parser


def _listing(steps: Sequence[tuple[str, str]]) -> list[str]:
    """What one of *steps* asks to be listed, if one does."""
    for option, text in steps:
        if text in ("help", "?") and option == "chardev":
            return ["Available chardev backend types:", *(f"  {name}" for name in backends())]
        if text in ("help", "?") and option == "object":
            return ["List of user creatable objects:", *(f"  {name}" for name in sorted(OBJECT_TYPES))]
    return []


def main(arguments: Sequence[str]) -> int:
    """Run the storage daemon with *arguments*; the exit status.  Raises FusebdError if it could not start."""
    parsed = _parser().parse_args(arguments)
    if listing := _listing(parsed.steps):
        sys.stdout.write("\n".join(listing) + "\n")
        return 0
    if not parsed.daemonize:
        failure = _serve(parsed, lambda: None)
        if failure is not None:
            raise FusebdError(failure)
        return 0
    started = daemon.start(partial(_serve_as_daemon, parsed), parsed.log_file or os.devnull)
    failure = started.wait_ready()
    if failure is not None:
        raise UsageError(failure)
    return 0


def _serve_as_daemon(parsed: argparse.Namespace, ready: daemon.Ready) -> int:
    return 0 if _serve(parsed, ready) is None else 1


def _serve(parsed: argparse.Namespace, ready: daemon.Ready) -> str | None:
    """Serve until told to end; what went wrong at the end."""
    import trio

    file = parsed.log_file
    logging.basicConfig(
        level=parsed.log_level.upper(),
        # on standard error like qemu-storage-daemon, which has neither times nor levels
        format="%(asctime)s %(levelname)s %(message)s" if file else "%(message)s",
        handlers=[logging.handlers.WatchedFileHandler(file) if file else logging.StreamHandler()],
    )
    logging.captureWarnings(True)
    return trio.run(_run, parsed, ready)


async def _run(parsed: argparse.Namespace, ready: daemon.Ready) -> str | None:
    runs: list[_Run] = []
    pid_files: list[PidFile] = []

    async def start(engine: Engine) -> None:
        run = _Run(engine, parsed.daemonize)
        runs.append(run)
        for option, text in parsed.steps:
            try:
                await _STEPS[option](run, text)
            except FusebdError as error:
                raise error.prefixed(f"--{option} {text}") from None
        if parsed.pidfile is not None:
            pid_files.append(PidFile(parsed.pidfile))
        ready()

    try:
        return await run_engine(start, hangup=not parsed.daemonize)
    finally:
        for run in runs:
            for chardev in run.chardevs.values():
                chardev.close()
        for pid_file in pid_files:
            pid_file.remove()
