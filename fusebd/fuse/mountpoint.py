"""Mount points: checking, mounting and unmounting them, as root by mount(2), for others through fusermount3.

Nothing here knows what is served.  Imports nothing heavy: short-lived commands use it.

Specification: mount(2), Linux Documentation/filesystems/fuse.rst (mount options), fusermount3(1), proc(5) (mountinfo).
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import re
import shutil
import socket
import stat
import subprocess
from typing import NoReturn

from fusebd.errors import UsageError

DEVICE = "/dev/fuse"

_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_OCTAL = re.compile(r"\\([0-7]{3})")


def _refuse(what: str, code: int) -> NoReturn:
    raise UsageError(f"{what}: {os.strerror(code)}", errno=code)


def location(path: str) -> str:
    """*path* without symbolic links, found without asking the file system that is mounted there.

    That may hang, or be served by the very thread that asks: realpath would call lstat on it.
    """
    path = os.path.abspath(path)
    for _ in range(40):  # as many links as the kernel follows
        above, name = os.path.split(path)
        path = os.path.join(os.path.realpath(above), name)
        try:
            path = os.path.join(os.path.dirname(path), os.readlink(path))
        except OSError:
            break
    return path


def mounted_type(path: str) -> str | None:
    """The file system type of what is mounted at *path* itself (the topmost), None if nothing is.

    Asks only the kernel's table, so that it does not wait for a file system that hangs.
    """
    wanted = location(path)
    found = None
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            fields = line.split(" ")
            place = _OCTAL.sub(lambda octal: chr(int(octal[1], 8)), fields[4])
            if place.encode("latin-1", "ignore") == wanted.encode("latin-1", "ignore") or place == wanted:
                found = fields[fields.index("-") + 1]
    return found


def is_mounted(path: str) -> bool:
    """Whether something is mounted at *path* itself."""
    return mounted_type(path) is not None


def is_dead(path: str) -> bool:
    """Whether *path* is a FUSE mount whose daemon is gone."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def check(mountpoint: str) -> None:
    """Raise UsageError unless *mountpoint* is an empty directory that nothing is mounted on, and FUSE is there."""
    try:
        descriptor = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        _refuse(DEVICE, error.errno or errno.EIO)
    os.close(descriptor)
    if is_dead(mountpoint):
        raise UsageError(
            f"{mountpoint}: already a mount point, left by a daemon that is gone",
            errno=errno.ENOTCONN,
            hint=f"'fusebd umount {mountpoint}' clears it",
        )
    if is_mounted(mountpoint):
        raise UsageError(f"{mountpoint}: already a mount point", errno=errno.EBUSY)
    try:
        if not stat.S_ISDIR(os.stat(mountpoint).st_mode):
            raise UsageError(f"{mountpoint}: not a directory", errno=errno.ENOTDIR)
        with os.scandir(mountpoint) as entries:
            if next(entries, None) is not None:
                raise UsageError(f"{mountpoint}: directory is not empty", errno=errno.ENOTEMPTY)
    except OSError as error:
        _refuse(mountpoint, error.errno or errno.EIO)


def mount(mountpoint: str, *, read_only: bool, allow_other: bool, max_read: int) -> int:
    """Mount a FUSE file system at *mountpoint*; the descriptor of /dev/fuse through which it is to be served.

    The mount is there when this returns, and everything done in it waits to be served.  Closing the descriptor
    leaves it dead.  Raises UsageError.
    """
    options = ["default_permissions", f"max_read={max_read}"]
    if allow_other:
        options.append("allow_other")
    if os.geteuid() == 0:
        return _mount_as_root(mountpoint, options, read_only)
    return _mount_by_helper(mountpoint, options, read_only)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _mount_as_root(mountpoint: str, options: list[str], read_only: bool) -> int:
    kind = stat.S_IFMT(os.stat(mountpoint).st_mode)
    descriptor = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    fixed = [f"fd={descriptor}", f"rootmode={kind:o}", f"user_id={os.geteuid()}", f"group_id={os.getegid()}"]
    flags = _MS_NOSUID | _MS_NODEV | (_MS_RDONLY if read_only else 0)
    data = ",".join(fixed + options).encode()
    place = os.fsencode(location(mountpoint))
    if _libc().mount(b"fusebd", place, b"fuse.fusebd", ctypes.c_ulong(flags), data):
        code = ctypes.get_errno()
        os.close(descriptor)
        _refuse(mountpoint, code)
    return descriptor


def _helper() -> str:
    helper = shutil.which("fusermount3")
    if helper is None:
        raise UsageError("fusermount3: not found (it mounts for users other than root)", errno=errno.ENOENT)
    return helper


def _mount_by_helper(mountpoint: str, options: list[str], read_only: bool) -> int:
    """fusermount3 mounts, and sends the descriptor through a socket."""
    options = [*options, "fsname=fusebd", "subtype=fusebd", "nosuid", "nodev", *(["ro"] if read_only else [])]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = subprocess.run(
            [_helper(), "-o", ",".join(options), "--", location(mountpoint)],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        theirs.close()
        room = socket.CMSG_LEN(array.array("i").itemsize)
        _, received, _, _ = ours.recvmsg(1, room, socket.MSG_CMSG_CLOEXEC)
        descriptors = array.array("i")
        for level, kind, payload in received:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
    if done.returncode or not descriptors:
        raise UsageError(f"{mountpoint}: {_said(done.stderr)}", errno=errno.EPERM)
    return descriptors[0]


def _said(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "fusermount3 failed"


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Take away what is mounted at *mountpoint*; *lazy* does so even if it is in use, for new users.

    Waits for the kernel, so not for the event loop's thread.  Raises UsageError: EBUSY if it is in use, EINVAL if
    nothing is mounted there.
    """
    place = location(mountpoint)
    if not is_mounted(place):
        raise UsageError(f"{mountpoint}: not mounted", errno=errno.EINVAL)
    if os.geteuid() == 0:
        if _libc().umount2(os.fsencode(place), _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)):
            _refuse(mountpoint, ctypes.get_errno())
        return
    command = [_helper(), "-u", *(["-z"] if lazy else []), "--", place]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        busy = os.strerror(errno.EBUSY).encode() in done.stderr
        text = os.strerror(errno.EBUSY) if busy else _said(done.stderr)
        raise UsageError(f"{mountpoint}: {text}", errno=errno.EBUSY if busy else errno.EPERM)


def clear_dead_mount(mountpoint: str) -> bool:
    """Take away a mount whose daemon is gone (it was killed); whether there was one.  Raises UsageError."""
    if not is_dead(mountpoint):
        return False
    unmount(mountpoint, lazy=True)
    return True
