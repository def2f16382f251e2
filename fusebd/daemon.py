"""A process of its own for one mount point, which reports to its parent whether it got as far as serving.

One fork and a new session are enough: the daemon opens no terminal.  It says "ready", or what went wrong, through
a pipe, so that the command returns only when the mount can be used.  The fork happens before any thread exists.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable

from fusebd.errors import FusebdError, OpenError

_READY = b"\0"
_REPORT_LENGTH = 1 << 16

#: called once when requests are served
Ready = Callable[[], None]


class Daemon:
    """The parent's view of a daemon that is starting."""

    def __init__(self, pid: int, pipe: int) -> None:
        self.pid = pid
        self._pipe = pipe
        self._status: int | None = None

    def wait_ready(self) -> str | None:
        """Wait until the daemon serves (None), or has ended; then what it said went wrong."""
        said = b""
        while len(said) < _REPORT_LENGTH and (data := os.read(self._pipe, _REPORT_LENGTH)):
            said += data
            if said == _READY:
                os.close(self._pipe)
                return None
        os.close(self._pipe)
        status = self.wait_end()
        return said.decode(errors="replace") or f"the daemon ended before it served (status {status})"

    def stop(self) -> None:
        """Tell the daemon to end if it still runs, and wait until it has."""
        if self._status is None:
            os.kill(self.pid, signal.SIGTERM)
            self.wait_end()

    def wait_end(self) -> int:
        """Wait for the process; its exit status, or a signal's number made negative."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status


def start(run: Callable[[Ready], int], log_path: str) -> Daemon:
    """Run *run* in a new daemon whose standard output and error go to *log_path*, and return at once.

    *run* gets a function to call when it serves; its result is the daemon's exit status.  A FusebdError that it
    raises before is what the parent's ``wait_ready`` gets to hear.  Raises OpenError if the log cannot be written, or
    the host has no process to give.
    """
    null = _open_null()
    try:
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise OpenError.from_os(f"Could not open '{log_path}'", error) from None
    reading, writing = os.pipe()
    try:
        pid = os.fork()
    except OSError as error:
        raise OpenError.from_os("Could not start a daemon", error) from None
    if pid:
        os.close(null)
        os.close(log)
        os.close(writing)
        return Daemon(pid, reading)
    status = 1
    try:
        _detach(null, log, writing)
        status = _run(run, writing)
    finally:
        # never back into the parent's code, whatever happened
        os._exit(status)


def _open_null() -> int:
    """/dev/null, on a descriptor that is none of the three standard ones: the caller may have closed those.

    What is opened after it is none of them either.  Raises OpenError.
    """
    while True:
        try:
            descriptor = os.open(os.devnull, os.O_RDWR)
        except OSError as error:
            raise OpenError.from_os(f"Could not open '{os.devnull}'", error) from None
        if descriptor > 2:
            return descriptor


def _detach(null: int, log: int, keep: int) -> None:
    """Leave the terminal and every descriptor of the caller's, but for *keep*."""
    os.setsid()
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.closerange(3, keep)
    os.closerange(keep + 1, os.sysconf("SC_OPEN_MAX"))


def _run(run: Callable[[Ready], int], pipe: int) -> int:
    waiting = True

    def report(text: bytes) -> None:
        nonlocal waiting
        if waiting:
            waiting = False
            with contextlib.suppress(BrokenPipeError):  # nobody waits any more
                os.write(pipe, text)
            os.close(pipe)

    try:
        return run(lambda: report(_READY))
    except FusebdError as error:
        report(error.with_hint_in_line().encode(errors="replace")[:_REPORT_LENGTH])
        return 1
    except BaseException as error:
        import traceback

        traceback.print_exc()
        report(f"internal error: {error!r}; the log has more".encode(errors="replace"))
        return 1
