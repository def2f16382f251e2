"""What is known about the daemons that run: one state file, QMP socket and log per mount point.

They are in a directory of the user's own, named by a hash of the resolved mount point.  A daemon holds a lock on its
state file as long as it lives, so whether it lives is asked of the kernel and never guessed from a process id.  A
state file without a lock is what a killed daemon left, or one that ended badly and says so in ``end``.

Imports nothing heavy: the short-lived commands use it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass, field

from fusebd.errors import OpenError, UsageError

#: the environment variable that names another directory than the default one
DIRECTORY_VARIABLE = "FUSEBD_RUNTIME_DIR"


def directory() -> str:
    """The directory of this user's state files: made if missing, refused unless it is the user's alone.

    Raises OpenError, UsageError.
    """
    user = os.geteuid()
    session = os.environ.get("XDG_RUNTIME_DIR")
    if DIRECTORY_VARIABLE in os.environ:
        path = os.path.abspath(os.environ[DIRECTORY_VARIABLE])
    elif user == 0:
        path = "/run/fusebd"
    elif session and os.path.isdir(session):
        path = os.path.join(session, "fusebd")
    else:
        path = f"/tmp/fusebd-{user}"
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.lstat(path)
    except OSError as error:
        raise OpenError.from_os(f"Could not make the runtime directory '{path}'", error) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise UsageError(f"The runtime directory '{path}' must be a directory that belongs to you alone (mode 0700)")
    return path


@dataclass
class State:
    """What a daemon says about itself.  ``end`` is None while it runs, and then what went wrong at its end."""

    mountpoint: str
    pid: int
    log: str | None
    qmp: list[str] = field(default_factory=list)
    end: str | None = None


class Place:
    """The files that belong to one mount point (*mountpoint*: absolute, symbolic links resolved)."""

    def __init__(self, mountpoint: str) -> None:
        self.mountpoint = mountpoint
        stem = os.path.join(directory(), hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16])
        self.state_path, self.socket, self.log = stem + ".json", stem + ".qmp", stem + ".log"

    def claim(self) -> StateFile:
        """Lock the state file for the daemon that calls this; a stale socket is removed.

        Raises UsageError if another daemon serves the mount point, OpenError.
        """
        while True:
            try:
                descriptor = os.open(self.state_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise OpenError.from_os(f"Could not open '{self.state_path}'", error) from None
            file = StateFile(descriptor, self)
            if not file.try_lock():
                state = file.read()
                file.close()
                by = f" (process {state.pid})" if state else ""
                raise UsageError(f"{self.mountpoint}: already mounted by fusebd{by}")
            if file.is_current():
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.socket)
                return file
            file.close()  # its daemon removed it between the two calls

    def find(self) -> StateFile | None:
        """The state file as it is, not locked; None if there is none."""
        try:
            return StateFile(os.open(self.state_path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), self)
        except FileNotFoundError:
            return None

    def clear(self) -> None:
        """Remove the state file and the socket; the log stays."""
        for path in (self.socket, self.state_path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


class StateFile:
    """A state file that is open.  Whoever has it open can still read it after its daemon removed it."""

    def __init__(self, descriptor: int, place: Place) -> None:
        self.descriptor = descriptor
        self.place = place

    def try_lock(self) -> bool:
        """Take the lock if no daemon has it; whether that worked."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def wait_lock(self) -> None:
        """Wait until the daemon has ended."""
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)

    def is_current(self) -> bool:
        """Whether the file is still the one that its path names."""
        try:
            return os.path.samestat(os.stat(self.place.state_path), os.fstat(self.descriptor))
        except FileNotFoundError:
            return False

    def read(self) -> State | None:
        """What the daemon has written; None before it has, and if it is no state of this version."""
        try:
            return State(**json.loads(os.pread(self.descriptor, 1 << 20, 0)))
        except (ValueError, TypeError):
            return None

    def write(self, state: State) -> None:
        """Replace the content."""
        data = json.dumps(asdict(state), indent=1).encode() + b"\n"
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, data, 0)

    def close(self) -> None:
        """Close the file, and with it give up the lock."""
        os.close(self.descriptor)
