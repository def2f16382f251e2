"""Processes of a benchmark: started, watched, measured and ended by their ids."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

#: how long a server may take to start or to end, in seconds
PATIENCE = 20.0
_TICKS = os.sysconf("SC_CLK_TCK")


class BenchmarkError(Exception):
    """A benchmark cannot be run; the text says why."""


def pinned(command: Sequence[str], cores: str | None) -> list[str]:
    """*command*, restricted to *cores* (in taskset's spelling) if there are any."""
    return list(command) if cores is None else ["taskset", "-c", cores, *command]


@contextlib.contextmanager
def running(command: Sequence[str], log: str, cores: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run *command* with its output in the file *log*; ended when the context is left, by force if it has to be."""
    with open(log, "ab") as output:
        # A session of its own: ^C is for the harness, which ends its servers in the right order.
        process = subprocess.Popen(
            pinned(command, cores), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask *process* to end, and make it end if it does not."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_pid(pid: int) -> None:
    """The same for a daemon, which is not a child."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + PATIENCE
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
            time.sleep(0.01)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: str, what: str) -> None:
    """Wait until *condition* holds.  Raises BenchmarkError if *process* ends before, or takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            with open(log, errors="replace") as file:
                raise BenchmarkError(f"{what} did not start: {file.read().strip()}")
        time.sleep(0.005)


def output_of(*command: str) -> str:
    """What *command* prints on standard output.  Raises BenchmarkError with what it says on standard error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise BenchmarkError(f"{command[0]}: {error.strerror}") from None
    if done.returncode != 0:
        raise BenchmarkError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def unmount(mountpoint: str) -> None:
    """Unmount whatever is mounted at *mountpoint*, busy or dead."""
    subprocess.run(["umount", "-l", mountpoint], capture_output=True, check=False)


def is_mounted(path: str) -> bool:
    """Whether *path*, a directory or a file, is a mount point."""
    with open("/proc/self/mounts") as mounts:
        return any(line.split(" ")[1] == path for line in mounts)


@dataclass(frozen=True)
class Usage:
    """What a server has used: *cpu* seconds in total, at most *memory* bytes since ``reset_peak``."""

    cpu: float
    memory: int


def reset_peak(pids: Sequence[int]) -> None:
    """Let the peak memory of *pids* begin anew."""
    for pid in pids:
        with open(f"/proc/{pid}/clear_refs", "w") as file:
            file.write("5")


def usage(pids: Sequence[int]) -> Usage:
    """The usage of *pids* together."""
    cpu, memory = 0.0, 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        cpu += (int(fields[11]) + int(fields[12])) / _TICKS
        with open(f"/proc/{pid}/status") as file:
            memory += next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM:"))
    return Usage(cpu, memory)
