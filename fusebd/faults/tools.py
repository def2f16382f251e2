"""Programs that know a layout: run on a file without a shell, for a bounded time, read-only.

What they print is material to check, never to trust; that is their callers' job.  A program opens the file again
through the descriptor of its caller (/proc/self/fd/N), so that no name can be taken for an option or for syntax.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import fusebd
from fusebd.errors import FusebdError, OpenError

#: seconds that a program may take; a node that lets its requests hang is one reason for more
TIMEOUT = 60.0
#: seconds that a killed program may take to end: its last request may be one that hangs
KILL_TIMEOUT = 5.0
#: bytes of output and of memory that a program may take, whatever an image makes it believe
MAX_OUTPUT = 64 << 20
MAX_MEMORY = 4 << 30
#: where the programs are in Debian, which is not in every user's PATH
SYSTEM_DIRECTORIES = "/usr/local/sbin:/usr/sbin:/sbin"
#: Debian's packages
PACKAGES = {"dumpe2fs": "e2fsprogs", "debugfs": "e2fsprogs", "xfs_db": "xfsprogs", "sfdisk": "fdisk"}


@dataclass(frozen=True)
class Output:
    """What a program has said."""

    tool: str
    status: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        """Its standard output; what is not UTF-8 is replaced."""
        return self.stdout.decode("utf-8", "replace")

    @property
    def complaint(self) -> str:
        """The first line that it has to say about a failure, without its name and the name of the file."""
        for line in (*self.stderr.splitlines(), *self.text.splitlines()):
            line = re.sub(r" *(while trying to open )?/proc/self/fd/\d+(\?offset=\d+)?:? *", " ", line)
            line = line.strip().removeprefix(f"{self.tool}:").strip()
            # e2fsprogs says on standard error who it is
            if line and not re.match(rf"{self.tool} \d+\.", line):
                return line
        return f"exit status {self.status}, and no word"


def find_tool(name: str) -> str:
    """The path of the program *name*; FusebdError says which Debian package it is in."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_DIRECTORIES}")
    if path is None:
        raise FusebdError(f"{name} is not installed", hint=f"it is in Debian's package {PACKAGES[name]}")
    return path


def run_tool(name: str, *arguments: str, descriptor: int, timeout: float | None = None) -> Output:
    """Run the program *name*, which may open the file behind *descriptor* as ``fd_path(descriptor)``.

    Blocks until it has ended, at most *timeout* seconds (default: TIMEOUT).  Raises FusebdError: it is not installed,
    takes too long, prints too much.
    """
    command = [find_tool(name), *arguments]
    timeout = TIMEOUT if timeout is None else timeout
    environment = {"PATH": SYSTEM_DIRECTORIES + ":/usr/bin:/bin", "LC_ALL": "C", "DEBUGFS_PAGER": "__none__"}
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=environment,
                cwd="/",
                pass_fds=(descriptor,),
            )
        except OSError as error:
            raise OpenError.from_os(f"running {name}", error) from None
        _limit(process.pid)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise FusebdError(f"{name} has not ended after {timeout:g} s") from None
        finally:
            _end(process)
        output = Output(name, status, _content(stdout.fileno()), _content(stderr.fileno()).decode("utf-8", "replace"))
    if status < 0:
        raise FusebdError(f"{name} was ended by signal {-status} (it printed {len(output.stdout)} bytes)")
    return output


def fd_path(descriptor: int) -> str:
    """The name under which a program that inherits *descriptor* can open its file."""
    return f"/proc/self/fd/{descriptor}"


def _limit(pid: int) -> None:
    limits = ((resource.RLIMIT_FSIZE, MAX_OUTPUT), (resource.RLIMIT_AS, MAX_MEMORY), (resource.RLIMIT_CORE, 0))
    # A program that has ended already has done no harm.
    with contextlib.suppress(ProcessLookupError):
        for kind, limit in limits:
            _, hard = resource.prlimit(pid, kind)
            lower = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.prlimit(pid, kind, (lower, lower))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill *process* if it runs.  One whose request a node does not answer cannot end before that, and is left."""
    if process.poll() is None:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_TIMEOUT)


def _content(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return file.read()


@contextlib.contextmanager
def window(path: str, offset: int, length: int) -> Iterator[str]:
    """A file that is *length* bytes of *path* from byte *offset* on, for a program that takes whole files only.

    It is a node of a mount of fusebd's own, read-only, which needs no privileges.  Blocks while it is mounted and
    unmounted.  Raises FusebdError.
    """
    driver = "host_device" if stat.S_ISBLK(os.stat(path).st_mode) else "file"
    file = {"driver": driver, "filename": os.path.realpath(path), "read-only": True, "locking": "off"}
    node = {"driver": "raw", "node-name": "window", "read-only": True, "offset": offset, "size": length, "file": file}
    with tempfile.TemporaryDirectory(prefix="fusebd-window-") as directory:
        mountpoint = os.path.join(directory, "mnt")
        os.mkdir(mountpoint)
        log = os.path.join(directory, "log")
        _fusebd("mount", "--read-only", "--log-file", log, "--blockdev", json.dumps(node), mountpoint)
        try:
            yield os.path.join(mountpoint, "window")
        finally:
            _fusebd("umount", "--force", mountpoint)


def _fusebd(*words: str) -> None:
    # Where Python looks for modules first is where this one is, not wherever the caller happens to be.
    command: Sequence[str] = [sys.executable, "-m", "fusebd", *words]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            cwd=os.path.dirname(os.path.dirname(os.path.abspath(fusebd.__file__))),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FusebdError(f"fusebd {words[0]} has not ended after {TIMEOUT:g} s") from None
    if done.returncode:
        complaint = done.stderr.strip().partition("\n")[0].removeprefix("fusebd: ")
        raise FusebdError(f"its bytes cannot be mounted as a file: {complaint or f'exit status {done.returncode}'}")
