"""Mounting a graph as a directory, from the checks of the mount point to the unmount at the end."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from functools import partial
from typing import Literal

import trio

from fusebd.block.graph import Graph
from fusebd.errors import UsageError
from fusebd.fuse import mountpoint as mounting
from fusebd.fuse.mountpoint import clear_dead_mount, is_mounted
from fusebd.fuse.transport import MAX_REQUEST, FileSystem, Transport
from fusebd.fuse.tree import Tree

__all__ = ["TransportName", "clear_dead_mount", "is_mounted", "run_mount"]

log = logging.getLogger(__name__)

TransportName = Literal["auto", "pyfuse3", "devfuse"]

#: how long a mount that is in use may keep the daemon from ending, and how often it is tried meanwhile, in seconds
BUSY_GRACE = 2.0
_BUSY_RETRY = 0.1


def _make_transport(name: TransportName, fs: FileSystem, descriptor: int) -> Transport:
    """Only the one that is used is imported: pyfuse3 takes as long to load as all the rest."""
    if name == "pyfuse3":
        from fusebd.fuse.libfuse import LibfuseTransport

        return LibfuseTransport(fs, descriptor)
    from fusebd.fuse.devfuse import DevfuseTransport

    return DevfuseTransport(fs, descriptor)


async def run_mount(
    graph: Graph,
    mountpoint: str,
    *,
    transport: TransportName = "auto",
    read_only: bool = False,
    allow_other: bool = False,
    info: Mapping[str, str] | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mount *graph* at *mountpoint* and serve it; returns after it was unmounted from outside.

    *task_status* is told when requests are served.  When cancelled, it unmounts; if the mount stays in use for
    ``BUSY_GRACE``, it is detached, and those who use it get ENOTCONN from then on.  Whatever the end, what was written
    is flushed.  *info* are extended attributes of the directory (see ``Tree``).  Raises UsageError, one line
    that names what is wrong, before anything is mounted.
    """
    mounting.check(mountpoint)
    tree = Tree(graph, read_only=read_only, allow_other=allow_other, info=info)
    try:
        await _serve(tree, mountpoint, transport, read_only, allow_other, task_status)
    finally:
        tree.transport = None
        with trio.CancelScope(shield=True):
            await tree.aclose()


async def _serve(
    tree: Tree,
    mountpoint: str,
    name: TransportName,
    read_only: bool,
    allow_other: bool,
    task_status: trio.TaskStatus[None],
) -> None:
    descriptor = mounting.mount(mountpoint, read_only=read_only, allow_other=allow_other, max_read=MAX_REQUEST)
    try:
        transport = _make_transport(name, tree, descriptor)
    except BaseException:
        mounting.unmount(mountpoint, lazy=True)
        raise
    tree.transport = transport
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
            await nursery.start(serve)
            try:
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
