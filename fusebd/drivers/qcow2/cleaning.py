"""Caches of metadata that shrink again: what was not used for a time goes, if the file has it.

Option: ``cache-clean-interval``.  Behaviour: QEMU cache_clean_timer_cb (block/qcow2.c), qcow2_cache_clean_unused.
"""

from __future__ import annotations

from typing import Protocol

import trio

from fusebd.drivers.qcow2.image import Image


class Cache(Protocol):
    def drop_unused(self) -> None:
        """Drop what is not dirty and was not used since the last call."""


class Cleaner:
    """Cleans *caches*, under ``Image.lock``, every *interval* seconds, from ``start`` to ``stop``; never if 0."""

    def __init__(self, image: Image, interval: int, *caches: Cache) -> None:
        self._image, self._interval, self._caches = image, interval, caches
        self._scope = trio.CancelScope()

    def start(self) -> None:
        if self._interval:
            trio.lowlevel.spawn_system_task(self._run)

    def stop(self) -> None:
        self._scope.cancel()

    async def _run(self) -> None:
        with self._scope:
            while True:
                await trio.sleep(self._interval)
                async with self._image.lock:
                    for cache in self._caches:
                        cache.drop_unused()
