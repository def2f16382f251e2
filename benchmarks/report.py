"""Tables of medians and ratios, and the facts about the machine that they were made on."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.load import Sample
from benchmarks.processes import BenchmarkError, output_of
from benchmarks.servers import FUSEBD, QSD, SERVERS
from benchmarks.stacks import CELLS, FILTERED, STACKS
from benchmarks.startup import Start


def machine(qsd: str | None) -> dict[str, str]:
    """What the figures depend on."""
    facts = {
        "cores": str(os.cpu_count()),
        "processor": _processor(),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') >> 20} MiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "fusebd": _version(*FUSEBD),
    }
    for name, program in (("qsd", qsd), ("fio", shutil.which("fio")), ("nbdfuse", shutil.which("nbdfuse"))):
        facts[name] = _version(program) if program is not None else "none"
    return facts


def _version(*program: str) -> str:
    try:
        lines = output_of(*program, "--version").splitlines()
    except BenchmarkError as error:
        return str(error)
    return lines[0] if lines else "unknown"


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        found = re.search(r"model name\s*: (.*)", file.read())
    return found[1] if found else platform.machine()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """*rows* under *head* in columns; the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = []
    for row in (head, ["-" * width for width in widths], *rows):
        first, *others = (
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


Key = tuple[str, str, str]  # stack, cell, server


class Results:
    """All samples of a run, and what they come to."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = list(samples)
        self._by_key: dict[Key, list[Sample]] = defaultdict(list)
        for sample in samples:
            self._by_key[sample.stack, sample.cell, sample.server].append(sample)

    def median(self, key: Key, value: Callable[[Sample], float | None]) -> float | None:
        """The median of *value* over the rounds; None where there is none."""
        found = [number for sample in self._by_key.get(key, ()) if (number := value(sample)) is not None]
        return statistics.median(found) if found else None

    def figure(self, key: Key) -> float | None:
        """The median that is of interest: MiB/s of sequential cells, requests a second of the others."""
        if CELLS[key[1]].sequential:
            bandwidth = self.median(key, lambda sample: sample.bandwidth)
            return None if bandwidth is None else bandwidth / (1 << 20)
        return self.median(key, lambda sample: sample.iops)

    def ratio(self, key: Key, to: Key) -> float | None:
        """How many times the figure of *to* that of *key* is."""
        mine, theirs = self.figure(key), self.figure(to)
        return mine / theirs if mine is not None and theirs else None

    def names(self, value: Callable[[Sample], str]) -> list[str]:
        """The different values of an attribute, in order of appearance."""
        return list(dict.fromkeys(map(value, self.samples)))

    def _columns(self, stack: str, servers: Sequence[str]) -> list[str]:
        return [server for server in servers if any(key[0] == stack and key[2] == server for key in self._by_key)]

    def text(self) -> str:
        """A table for each stack: figures, ratios to qemu-storage-daemon's FUSE export, memory, CPU time."""
        servers = self.names(lambda sample: sample.server)
        parts = []
        for stack in self.names(lambda sample: sample.stack):
            columns = self._columns(stack, servers)
            rated = [server for server in columns if server != QSD] if QSD in columns else []
            head = ["cell", *columns, *(f"{server}/qsd" for server in rated)]
            cells = [cell for cell in CELLS if any((stack, cell, server) in self._by_key for server in columns)]
            figures, memory, cpu = [], [], []
            for cell in cells:
                keys = [(stack, cell, server) for server in columns]
                ratios = [self.ratio((stack, cell, server), (stack, cell, QSD)) for server in rated]
                unit = "MiB/s" if CELLS[cell].sequential else "IOPS"
                name = f"{cell} {unit}"
                figures.append([name, *(_number(self.figure(key)) for key in keys), *(_number(r, 2) for r in ratios)])
                peaks = [self.peak(key) for key in keys]
                memory.append([cell, *(_number(None if peak is None else peak / (1 << 20), 1) for peak in peaks)])
                costs = [self.median(key, lambda sample: sample.cpu) for key in keys]
                cpu.append([cell, *(_number(None if cost is None else cost * 1e6, 1) for cost in costs)])
            parts += [
                f"{stack}: {STACKS[stack].summary}",
                table(head, figures),
                table(["peak memory of the server, MiB", *columns], memory),
                table(["CPU time of the server, us a request", *columns], cpu),
            ]
        notes = [f"{server}: {note}" for server in servers if (note := SERVERS[server].note)]
        return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])

    def peak(self, key: Key) -> int | None:
        """The highest memory peak of the rounds, in bytes."""
        return max((sample.memory for sample in self._by_key.get(key, ()) if sample.memory is not None), default=None)

    def filters_text(self) -> str:
        """What a filter costs: figures with it as a part of those without."""
        parts = []
        for plain, filtered in FILTERED.items():
            for server in self.names(lambda sample: sample.server):
                rows = [
                    [
                        cell,
                        _number(self.figure((plain, cell, server))),
                        *(_number(self.ratio((stack, cell, server), (plain, cell, server)), 2) for stack in filtered),
                    ]
                    for cell in CELLS
                    if (plain, cell, server) in self._by_key
                ]
                if rows:
                    head = [f"{server}", plain, *(f"{stack}/{plain}" for stack in filtered)]
                    parts.append(table(head, rows))
        return "\n\n".join(parts)

    def json(self) -> list[dict[str, Any]]:
        """The medians and every sample behind them."""
        return [
            {
                "stack": key[0],
                "cell": key[1],
                "server": key[2],
                "iops": self.median(key, lambda sample: sample.iops),
                "bandwidth": self.median(key, lambda sample: sample.bandwidth),
                "latency": self.median(key, lambda sample: sample.latency),
                "cpu": self.median(key, lambda sample: sample.cpu),
                "memory": self.peak(key),
                "ratio_to_qsd": self.ratio(key, (key[0], key[1], QSD)),
                "samples": [asdict(sample) for sample in samples],
            }
            for key, samples in self._by_key.items()
        ]


def startup_text(starts: Sequence[Start]) -> str:
    """The table of ``startup``."""
    by_program: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for start in starts:
        by_program[start.program][start.nodes].append(start.seconds)
    counts = sorted({start.nodes for start in starts})
    rows = [
        [
            program,
            *(_number(1000 * statistics.median(times[n]), 0) if times[n] else "-" for n in counts),
            *(_number(1000 * max(times[n]), 0) if times[n] else "-" for n in counts),
        ]
        for program, times in by_program.items()
    ]
    head = ["ms to the first read", *(f"{n} nodes" for n in counts), *(f"{n} nodes, worst" for n in counts)]
    return table(head, rows)


def _number(number: float | None, digits: int = 0) -> str:
    return "-" if number is None else f"{number:.{digits}f}"


def write_json(path: str, facts: dict[str, str], arguments: dict[str, Any], **content: Any) -> None:
    """Write everything to *path* (``-``: standard output)."""
    text = json.dumps({"machine": facts, "arguments": arguments, **content}, indent=1) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    with open(path, "w") as file:
        file.write(text)
