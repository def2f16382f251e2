"""Mounting nodes as files, from the checks of the mount point to the unmount at the end."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from functools import partial
from typing import Literal

import trio

from fusebd.block.cachemode import CacheMode
from fusebd.block.graph import Graph
from fusebd.errors import UsageError, single_error
from fusebd.fuse import mountpoint as mounting
from fusebd.fuse.files import Files
from fusebd.fuse.mountpoint import clear_dead_mount, is_mounted
from fusebd.fuse.transport import MAX_REQUEST, FileSystem, Transport
from fusebd.fuse.tree import Tree

__all__ = ["TransportName", "clear_dead_mount", "is_mounted", "run_mount", "serve_mounted"]

log = logging.getLogger(__name__)

TransportName = Literal["auto", "pyfuse3", "devfuse"]

#: how long a mount that is in use may keep the daemon from ending, and how often it is tried meanwhile, in seconds
BUSY_GRACE = 2.0
_BUSY_RETRY = 0.1


def _make_transport(name: TransportName, fs: FileSystem, descriptor: int, *, writeback: bool) -> Transport:
    """Only the one that is used is imported: pyfuse3 takes as long to load as all the rest."""
    if name == "pyfuse3":
        from fusebd.fuse.libfuse import LibfuseTransport

        return LibfuseTransport(fs, descriptor)
    from fusebd.fuse.devfuse import DevfuseTransport

    return DevfuseTransport(fs, descriptor, writeback=writeback)


async def run_mount(
    graph: Graph,
    mountpoint: str,
    *,
    transport: TransportName = "auto",
    read_only: bool = False,
    allow_other: bool = False,
    info: Mapping[str, str] | None = None,
    caches: Mapping[str, CacheMode] | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mount *graph* as a directory at *mountpoint* and serve it, as ``serve_mounted`` does.

    *info* are extended attributes of the directory, *caches* the cache modes of files (see ``Tree``).
    """
    mounting.check(mountpoint)
    tree = Tree(graph, read_only=read_only, allow_other=allow_other, info=info, caches=caches)
    await serve_mounted(
        tree,
        mountpoint,
        transport=transport,
        read_only=read_only,
        allow_other=allow_other,
        task_status=task_status,
    )


async def serve_mounted(
    fs: Files,
    mountpoint: str,
    *,
    transport: TransportName = "auto",
    read_only: bool = False,
    allow_other: bool = False,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mount *fs* at *mountpoint* and serve it; returns after it was unmounted from outside.

    *task_status* is told when requests are served.  When cancelled, it unmounts; if the mount stays in use for
    ``BUSY_GRACE``, it is detached, and those who use it get ENOTCONN from then on.  Whatever the end, what was written
    is flushed, and *fs* closed.  Raises UsageError, one line that names what is wrong; nothing is mounted then.
    """
    try:
        with single_error():
            await _serve(fs, mountpoint, transport, read_only, allow_other, task_status)
    finally:
        fs.transport = None
        with trio.CancelScope(shield=True):
            await fs.aclose()


async def _serve(
    fs: Files,
    mountpoint: str,
    name: TransportName,
    read_only: bool,
    allow_other: bool,
    task_status: trio.TaskStatus[None],
) -> None:
    # In a thread: the mount point may be in a directory that this very process serves.
    descriptor = await trio.to_thread.run_sync(
        partial(mounting.mount, mountpoint, read_only=read_only, allow_other=allow_other, max_read=MAX_REQUEST)
    )
    try:
        writeback = "writeback" in fs.wanted_caches().values()
        transport = _make_transport(name, fs, descriptor, writeback=writeback)
    except BaseException:
        mounting.unmount(mountpoint, lazy=True)
        raise
    fs.transport, fs.mountpoint = transport, mountpoint
    # Requests must be answered while the kernel unmounts: only after that the server is cancelled.
    server = trio.CancelScope(shield=True)
    ended = trio.Event()

    async def serve(*, task_status: trio.TaskStatus[None]) -> None:
        with server:
            try:
                await transport.serve(task_status=task_status)
            finally:
                ended.set()

    try:
        async with trio.open_nursery() as nursery:
            try:
                # Shielded like what it starts: a server that comes up while this is cancelled is not cancelled itself,
                # and there would be nobody to end it.
                with trio.CancelScope(shield=True):
                    await nursery.start(serve)
                await fs.check_caches()
                task_status.started()
                await ended.wait()
            finally:
                with trio.CancelScope(shield=True):
                    await _unmount(mountpoint)
                server.cancel()
    finally:
        transport.close()


async def _unmount(mountpoint: str) -> None:
    """Unmount if that was not done from outside; what stays in use is detached after a while."""
    deadline = trio.current_time() + BUSY_GRACE
    lazy = False
    while mounting.is_mounted(mountpoint):
        try:
            await trio.to_thread.run_sync(partial(mounting.unmount, mountpoint, lazy=lazy))
        except UsageError as error:
            if lazy or error.errno != errno.EBUSY:
                log.error("could not unmount: %s", error)
                return
            if trio.current_time() >= deadline:
                log.warning("%s is in use: its users lose it", mountpoint)
                lazy = True
            else:
                await trio.sleep(_BUSY_RETRY)
