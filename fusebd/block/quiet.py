"""Lines of which there can be as many as requests: at most one of a kind goes into the log in a while."""

from __future__ import annotations

from time import monotonic

#: seconds for which lines of the same kind are counted instead of logged one by one
QUIET_PERIOD = 1.0


class Quiet:
    """Decides which lines are logged.  There should not be more kinds than there are nodes and causes."""

    def __init__(self, period: float = QUIET_PERIOD) -> None:
        self._period = period
        self._kinds: dict[tuple[str, ...], tuple[float, int]] = {}

    def admit(self, *kind: str) -> str | None:
        """What to add to a line of this *kind*, which says how many were left out before; None to leave it out, too."""
        now = monotonic()
        since, left_out = self._kinds.get(kind, (-self._period, 0))
        if now - since < self._period:
            self._kinds[kind] = since, left_out + 1
            return None
        self._kinds[kind] = now, 0
        return f" ({left_out} more since the last line)" if left_out else ""
