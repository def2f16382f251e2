"""Unmounting: together with the daemon where there is one, and clearing up after one that is gone."""

from __future__ import annotations

import contextlib
import errno
import os
import signal

from fusebd.errors import FusebdError, UsageError
from fusebd.fuse import mountpoint as mounting
from fusebd.runtime import Place, StateFile


def unmount(mountpoint: str, *, force: bool) -> None:
    """Unmount *mountpoint* (absolute, links resolved), and wait until its daemon has flushed everything and ended.

    With *force* even if files in it are open.  Raises FusebdError: it is busy, nothing is mounted there, or what the
    daemon says went wrong at its end.
    """
    place = Place(mountpoint)
    file = place.find()
    if file is None:
        _unmount_without_daemon(mountpoint)
        return
    with contextlib.closing(file):
        served = not file.try_lock()
        if served:
            _ask_to_end(mountpoint, file, force=force)
            file.wait_lock()
        state = file.read()
        left_behind = file.is_current()
        if left_behind:
            # The daemon was killed, or has left its last words.
            mounting.clear_dead_mount(mountpoint)
            place.clear()
    if state is not None and state.end is not None:
        raise FusebdError(f"{mountpoint}: {state.end} (the log is {state.log})")
    if served and left_behind:
        raise FusebdError(f"{mountpoint}: the daemon was killed while it unmounted")


def _ask_to_end(mountpoint: str, file: StateFile, *, force: bool) -> None:
    """Unmount what a daemon serves, which is how it learns that it has to end."""
    state = file.read()
    try:
        if not force and mounting.is_mounted(mountpoint):
            mounting.unmount(mountpoint)
            return
    except UsageError as error:
        if error.errno == errno.EBUSY:
            raise UsageError(str(error), errno=error.errno, hint="--force unmounts it all the same") from None
        if error.errno != errno.EINVAL:  # not mounted any more
            raise
    if state is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.pid, signal.SIGTERM)


def _unmount_without_daemon(mountpoint: str) -> None:
    """A fusebd mount of which this user has no state file: another user's, or one left when the directory was lost."""
    if mounting.mounted_type(mountpoint) != "fuse.fusebd":
        raise UsageError(f"{mountpoint}: not mounted by fusebd")
    if not mounting.clear_dead_mount(mountpoint):
        mounting.unmount(mountpoint)
