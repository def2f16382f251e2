"""``python -m benchmarks``: the command line."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from types import FrameType

from benchmarks.load import Plan, Sample, measure
from benchmarks.processes import BenchmarkError
from benchmarks.report import Results, machine, startup_text, write_json
from benchmarks.servers import BARE, SERVERS, Setting, find_qsd
from benchmarks.stacks import CELLS, FILTERED, STACKS, USUAL_CELLS, USUAL_STACKS
from benchmarks.startup import Start, measure_starts

_FULL_ROUNDS = 5
_ENDING = (signal.SIGINT, signal.SIGTERM)


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    names = list(known)

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in names:
                raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(names)}")
        return chosen

    return parse


def _size(text: str) -> int:
    shift = {"m": 20, "g": 30}.get(text[-1:].lower(), 0)
    number = int(text[:-1] if shift else text) << shift
    if number <= 0 or number % (1 << 20):
        raise argparse.ArgumentTypeError("a multiple of 1M is wanted")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="fusebd beside qemu-storage-daemon, taking turns on the same machine.",
        epilog=f"Stacks: {', '.join(STACKS)}.  Cells: {', '.join(CELLS)}.  Servers: {', '.join(SERVERS)}.",
    )
    add = parser.add_argument
    add("what", choices=("fio", "filters", "startup"), nargs="?", default="fio", help="what to measure (default: fio)")
    add("--stacks", type=_names(STACKS), metavar="A,B", help=f"of fio (default: {','.join(USUAL_STACKS)}), or filters")
    add("--cells", type=_names(CELLS), metavar="A,B", help=f"default: {','.join(USUAL_CELLS)}, or the stack's own")
    add("--servers", type=_names(SERVERS), metavar="A,B", help="default: all that can be run")
    add("--rounds", type=int, default=_FULL_ROUNDS, metavar="N", help="default: %(default)s, which is a full run")
    add("--runtime", type=float, default=3.0, metavar="SECONDS", help="of one cell (default: %(default)s)")
    add("--size", type=_size, default=256 << 20, metavar="SIZE", help="of the images (default: 256M)")
    add("--qsd", metavar="PROGRAM", help="the qemu-storage-daemon (default: $QSD, else the newest on the PATH)")
    add("--pin-servers", metavar="CORES", help="the cores that the servers may use, as taskset wants them")
    add("--pin-client", metavar="CORES", help="the cores that fio may use")
    add("--directory", default=tempfile.gettempdir(), help="where the images are made (default: %(default)s)")
    add("--json", metavar="FILE", help="write everything to FILE too; - is standard output")
    add("--quiet", action="store_true", help="do not say on standard error what is being measured")
    return parser


def _runnable(names: Sequence[str] | None, log: Callable[[str], None]) -> list[str]:
    """*names*, or all servers whose programs are there."""
    if names is not None:
        return list(names)
    chosen = list(SERVERS)
    if shutil.which("nbdfuse") is None:
        log("qsd-nbdfuse is left out: nbdfuse not found (Debian's package libnbd-bin has it)")
        chosen.remove("qsd-nbdfuse")
    return chosen


class _Progress:
    """One line on standard error that is written over."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._open = False

    def __call__(self, text: str) -> None:
        if not self._quiet and sys.stderr.isatty():
            sys.stderr.write(f"\r{text:<78}")
            sys.stderr.flush()
            self._open = True

    def log(self, text: str) -> None:
        """A line that stays."""
        sys.stderr.write("\n" * self._open + text + "\n")
        self._open = False


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End the run: once, as a second signal would keep the first one's cleaning up from its end."""
    for ignored in _ENDING:
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt


def _measure(parsed: argparse.Namespace, plan: Plan, servers: list[str]) -> Generator[Sample | Start, None, None]:
    """What is asked for, as it comes in; groups of stacks that are compared with each other take turns together."""
    if parsed.what == "startup":
        yield from measure_starts(plan)
    elif parsed.what == "filters":
        for plain, filtered in FILTERED.items():
            asked = [stack for stack in filtered if parsed.stacks is None or stack in parsed.stacks]
            if asked:
                yield from measure(plan, (plain, *asked), [server for server in servers if server != BARE])
    else:
        for stack in parsed.stacks or USUAL_STACKS:
            yield from measure(plan, [stack], servers)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that *arguments* ask for; 0 if all of them could be run."""
    parsed = _parser().parse_args(arguments)
    progress = _Progress(parsed.quiet)
    try:
        plan = Plan(
            rounds=parsed.rounds,
            runtime=parsed.runtime,
            length=parsed.size,
            directory=os.path.abspath(parsed.directory),
            client_cores=parsed.pin_client,
            setting=Setting(find_qsd(parsed.qsd), parsed.pin_servers),
            cells=None if parsed.cells is None else tuple(parsed.cells),
            progress=progress,
        )
        servers = _runnable(parsed.servers, progress.log)
    except BenchmarkError as error:
        progress.log(f"benchmarks: {error}")
        return 1
    # Servers, mounts and images go with the contexts that made them: SIGTERM has to unwind like ^C.
    for number in _ENDING:
        signal.signal(number, _interrupt)
    facts = machine(plan.setting.qsd)
    samples: list[Sample] = []
    starts: list[Start] = []
    try:
        with contextlib.closing(_measure(parsed, plan, servers)) as measured:
            for one in measured:
                if isinstance(one, Start):
                    starts.append(one)
                else:
                    samples.append(one)
    except KeyboardInterrupt:
        plan.failures["the rest"] = "interrupted"
    except BenchmarkError as error:
        plan.failures["the rest"] = str(error)
    progress.log("")
    results = Results(samples)
    text: dict[str, Callable[[], str]] = {
        "fio": results.text,
        "filters": results.filters_text,
        "startup": partial(startup_text, starts),
    }
    left_out = [f"left out: {what}: {why}" for what, why in plan.failures.items()]
    if parsed.json != "-":
        parts = ["\n".join(f"{name}: {fact}" for name, fact in facts.items()), text[parsed.what](), "\n".join(left_out)]
        sys.stdout.write("\n\n".join(filter(None, parts)) + "\n")
    if parsed.json is not None:
        write_json(
            parsed.json,
            facts,
            vars(parsed),
            results=results.json(),
            startup=[asdict(start) for start in starts],
            left_out=plan.failures,
        )
    return 1 if plan.failures else 0


if __name__ == "__main__":
    sys.exit(main())
