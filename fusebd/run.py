"""From settings to running daemons: log, state file, and what becomes of them at the end."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import signal
from collections.abc import Callable
from functools import partial

from fusebd import daemon
from fusebd.errors import FusebdError, OpenError
from fusebd.runtime import Place, State
from fusebd.settings import MountSettings

log = logging.getLogger(__name__)

_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def run_foreground(settings: MountSettings) -> None:
    """Serve *settings* in this process until it is told to end; logs to standard error unless a file is given.

    Raises FusebdError if it could not start, or did not end well.
    """
    file = settings.log_file
    _start_logging(settings, _log_file(file) if file else logging.StreamHandler())
    failure = _serve(settings, Place(settings.mountpoint), file, lambda: None)
    if failure is not None:
        raise FusebdError(f"{settings.mountpoint}: {failure}")


def start_daemons(mounts: list[MountSettings]) -> list[str]:
    """A daemon for each of *mounts*; returns when all of them serve.

    The result says what went wrong, a line for each that failed; if there is one, none of them runs any more.
    """
    daemons: list[daemon.Daemon] = []
    try:
        for settings in mounts:
            place = Place(settings.mountpoint)
            log_path = settings.log_file or place.log
            daemons.append(daemon.start(partial(_serve_as_daemon, settings, place, log_path), log_path))
        failures = [started.wait_ready() for started in daemons]
    except BaseException:
        for started in daemons:
            started.stop()
        raise
    if any(failures):
        for started in daemons:
            started.stop()
    return [failure for failure in failures if failure]


def _serve_as_daemon(settings: MountSettings, place: Place, log_path: str, ready: Callable[[], None]) -> int:
    noticed = _start_logging(settings, _log_file(log_path))

    def leave() -> None:
        logging.shutdown()
        if not noticed.anything and log_path == place.log and not os.path.exists(place.state_path):
            # Nobody asked for this file, and there is nothing in it that somebody would look for.  Where there is a
            # state file, the log is that of another daemon, which serves the mount point.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(log_path)

    try:
        failure = _serve(settings, place, log_path, ready)
    except FusebdError:  # the caller hears of it
        leave()
        raise
    if failure is None:
        leave()
    return 0 if failure is None else 1


class _Noticing(logging.Handler):
    """Remembers whether there was a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.anything = False

    def emit(self, record: logging.LogRecord) -> None:
        self.anything = True


def _log_file(path: str) -> logging.Handler:
    """Raises OpenError."""
    try:
        # A path that is no UTF-8 is logged too.
        return logging.handlers.WatchedFileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OpenError.from_os(f"Could not open '{path}'", error) from None


def _start_logging(settings: MountSettings, handler: logging.Handler) -> _Noticing:
    noticing = _Noticing()
    level = settings.log_level.upper()
    logging.basicConfig(level=level, format=_FORMAT, handlers=[handler, noticing])
    logging.captureWarnings(True)
    return noticing


def _serve(settings: MountSettings, place: Place, log_path: str | None, ready: Callable[[], None]) -> str | None:
    """Serve until the end; what went wrong at the end.  Raises FusebdError if it could not start."""
    # Only now, after the fork: these are most of what there is to import.
    import trio

    from fusebd.engine import SIGNALS
    from fusebd.serve import serve

    os.chdir(settings.directory)
    # Whoever has a state file ends only when it is cleared away, or says why not: the engine takes signals meanwhile.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    file = place.claim()
    state = State(settings.mountpoint, os.getpid(), log_path)
    file.write(state)

    def serving(addresses: list[str]) -> None:
        state.qmp = addresses
        file.write(state)
        ready()

    try:
        failure = trio.run(serve, settings, place.socket, serving)
    except BaseException:
        place.clear()
        raise
    state.end = failure
    file.write(state)
    if failure is None:
        place.clear()
    else:
        log.error("%s: %s", settings.mountpoint, failure)
    return failure
