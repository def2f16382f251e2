"""Events as messages, and the rate at which they go out.

Some events can come as fast as requests fail.  As in QEMU, of those one a second goes out for each thing they are
about; of the ones that come meanwhile the last is sent when the second is over.

Rates: QEMU monitor/monitor.c (monitor_qapi_event_conf).
"""

from __future__ import annotations

import time
from typing import Any

from fusebd.block.options import Json

#: event -> the members of its data that tell apart what it is about
_LIMITED = {
    "BLOCK_IO_ERROR": ("node-name", "operation"),
    "QUORUM_FAILURE": (),
    "QUORUM_REPORT_BAD": ("node-name",),
}
PERIOD = 1.0


def message(event: str, data: dict[str, Any]) -> Json:
    """The event as it is sent, stamped with the time of this call."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    stamp = {"seconds": seconds, "microseconds": nanoseconds // 1000}
    return {"event": event, **({"data": data} if data else {}), "timestamp": stamp}


class RateLimiter:
    """Decides which events go out when.  Knows no clock: *now* is in seconds, and never goes back."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, ...], tuple[float, Json]] = {}

    def offer(self, event: Json, now: float) -> bool:
        """Whether *event* (a message) goes out at once; if not, it may come from ``due`` later."""
        members = _LIMITED.get(event["event"])
        if members is None:
            return True
        key = (event["event"], *(str(event["data"].get(member)) for member in members))
        until, _ = self._held.get(key, (now, None))
        if now < until:
            self._held[key] = until, event
            return False
        self._held[key] = now + PERIOD, None
        return True

    def due(self, now: float) -> list[Json]:
        """The held-back events whose time has come."""
        found = []
        for key, (until, event) in list(self._held.items()):
            if until > now:
                continue
            if event is None:
                del self._held[key]
            else:
                found.append(event)
                self._held[key] = now + PERIOD, None
        return found

    @property
    def next_time(self) -> float | None:
        """When ``due`` is worth calling; None if nothing is held back."""
        return min((until for until, event in self._held.values() if event is not None), default=None)
