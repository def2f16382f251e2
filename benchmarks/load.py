"""The loads: fio over one served file, for each contender in turn."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.processes import BenchmarkError, output_of, pinned, reset_peak, usage
from benchmarks.servers import BARE, SERVERS, Served, Setting, span
from benchmarks.stacks import CELLS, STACKS, USUAL_CELLS, Cell, Stack, write_page_by_page


@dataclass(frozen=True)
class Sample:
    """One measurement.  ``cpu`` is the server's CPU seconds per request, ``memory`` its peak in bytes."""

    stack: str
    cell: str
    server: str
    round: int
    iops: float
    bandwidth: float
    latency: float
    cpu: float | None
    memory: int | None


@dataclass(frozen=True)
class Plan:
    """What to measure, and how long: *runtime* in seconds a cell, *length* of the images in bytes."""

    rounds: int
    runtime: float
    length: int
    directory: str
    client_cores: str | None
    setting: Setting
    cells: tuple[str, ...] | None
    progress: Callable[[str], None]
    failures: dict[str, str] = field(default_factory=dict)
    """What had to be left out, and why."""


def cells_of(stack: Stack, plan: Plan) -> list[str]:
    """The cells of *stack* that are asked for."""
    own = stack.cells or USUAL_CELLS
    if plan.cells is None:
        return list(own)
    return [cell for cell in plan.cells if not stack.cells or cell in stack.cells]


@dataclass
class Contender:
    """A server with a stack of its own; those of one group take turns."""

    stack: str
    server: str
    start: Callable[[], contextlib.AbstractContextManager[Served]]
    served: Served | None = None


@contextlib.contextmanager
def _started(plan: Plan, stack_name: str, server_name: str, top: str) -> Iterator[Served]:
    """A server over fresh images, or over those that are shared, and all gone at the end."""
    stack = STACKS[stack_name]
    directory = os.path.join(top, stack_name if stack.shared else f"{stack_name}-{server_name}")
    try:
        if not os.path.exists(directory):
            os.mkdir(directory)
            stack.images(directory, plan.length)
            write_page_by_page(directory)
        with SERVERS[server_name].serve(plan.setting, stack, directory, plan.length) as served:
            yield served
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _may_serve(stack: Stack, server: str) -> bool:
    if server == BARE:
        return stack.bare
    return not stack.servers or server in stack.servers


def measure(plan: Plan, stack_names: Sequence[str], server_names: Sequence[str]) -> Iterator[Sample]:
    """Measure all of *stack_names* with all of *server_names*, taking turns; they are up side by side meanwhile."""
    with contextlib.ExitStack() as exit_stack:
        top = exit_stack.enter_context(tempfile.TemporaryDirectory(prefix="fusebd-bench.", dir=plan.directory))
        contenders = [
            Contender(stack, server, partial(_started, plan, stack, server, top))
            for stack in stack_names
            for server in server_names
            if _may_serve(STACKS[stack], server)
        ]
        running = [contender for contender in contenders if _try_start(plan, contender, exit_stack)]
        for cell in _in_order(cell for name in stack_names for cell in cells_of(STACKS[name], plan)):
            for number in range(plan.rounds):
                # Every second round goes the other way: nobody always runs after the same neighbour.
                for contender in list(running if number % 2 == 0 else reversed(running)):
                    if cell not in cells_of(STACKS[contender.stack], plan):
                        continue
                    plan.progress(f"{contender.stack} {cell} {number + 1}/{plan.rounds} {contender.server}")
                    try:
                        yield _measure_one(plan, contender, cell, number)
                    except BenchmarkError as error:
                        plan.failures[f"{contender.stack} {cell}, {contender.server}"] = str(error)
                        running.remove(contender)


def _try_start(plan: Plan, contender: Contender, exit_stack: contextlib.ExitStack) -> bool:
    """Start *contender*, if it is not started for each measurement anew; whether it can take part."""
    if not STACKS[contender.stack].fresh:
        plan.progress(f"{contender.stack} {contender.server}")
        try:
            contender.served = exit_stack.enter_context(contender.start())
        except BenchmarkError as error:
            plan.failures[f"{contender.stack}, {contender.server}"] = str(error)
            return False
    return True


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _measure_one(plan: Plan, contender: Contender, cell: str, number: int) -> Sample:
    if contender.served is not None:
        return _sample(plan, contender, cell, number, contender.served)
    with contender.start() as served:
        return _sample(plan, contender, cell, number, served)


def _sample(plan: Plan, contender: Contender, cell: str, number: int, served: Served) -> Sample:
    stack = STACKS[contender.stack]
    _settle(served.directory, forget=stack.cold)
    reset_peak(served.pids)
    before = usage(served.pids)
    result = _fio(plan, stack, CELLS[cell], served.path, contender.server)
    after = usage(served.pids)
    requests = int(result["total_ios"])
    if not requests:
        raise BenchmarkError(f"{contender.stack}, {contender.server}: fio made no request")
    return Sample(
        stack=contender.stack,
        cell=cell,
        server=contender.server,
        round=number,
        iops=float(result["iops"]),
        bandwidth=float(result["bw_bytes"]),
        latency=float(result["lat_ns"]["mean"]) / 1e9,
        cpu=(after.cpu - before.cpu) / requests if served.pids else None,
        memory=after.memory if served.pids else None,
    )


def _settle(directory: str, *, forget: bool) -> None:
    """Write back what is dirty of the images in *directory*; with *forget*, empty the page cache of them."""
    for name in os.listdir(directory):
        if name.endswith((".raw", ".qcow2")):
            descriptor = os.open(os.path.join(directory, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
                if forget:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _fio(plan: Plan, stack: Stack, cell: Cell, path: str, server: str) -> dict[str, Any]:
    """The figures of fio for *cell*: those of its reads or of its writes."""
    options = {
        "name": "cell",
        "filename": path,
        "size": str(span(stack, plan.length)),
        "rw": cell.rw,
        "bs": cell.block_size,
        "iodepth": str(cell.depth),
        "ioengine": "libaio",
        "direct": "0" if server == BARE else "1",
        "runtime": f"{plan.runtime * 1000:.0f}ms",
        "allow_file_create": "0",
        "norandommap": "1",
        # Otherwise fio empties the page cache of a bare file, which it cannot do below a server.
        "invalidate": "0",
        "group_reporting": "1",
        "thread": "1",
        "output-format": "json",
        **stack.fio,
    }
    if stack.fresh:
        options["number_ios"] = str(cell.requests)
    else:
        options["time_based"] = "1"
    command = pinned(["fio", *(f"--{name}={value}" for name, value in options.items())], plan.client_cores)
    try:
        text = output_of(*command)
        job = json.loads(text[text.index("{") :])["jobs"][0]
    except ValueError:
        raise BenchmarkError(f"fio's output is not understood: {text[:200]}") from None
    if job["error"]:
        raise BenchmarkError(f"fio failed with error {job['error']}")
    figures: dict[str, Any] = job["read" if "read" in cell.rw else "write"]
    return figures
