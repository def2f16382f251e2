"""The arithmetic of I/O limits: buckets that requests fill and that leak at the rate of the limit.

There is a bucket for each limit that is set: operations and bytes per second, of reads, of writes, and of both
together.  A request may go as long as no bucket that it counts in is too full, whatever its own size; it is put into
them then, and what is too much in a bucket has to leak before the next request may go.  So a bucket's capacity is what
may pass at once, on top of the rate:

* with ``avg`` alone it is what flows in a tenth of a second, so that not every other request has to wait;
* with ``max`` it is ``max`` times ``max-length`` (seconds, 1 unless given).  Where that is more than a second, another
  bucket that leaks at the rate ``max``, with a capacity of a tenth of a second, limits how fast the first is filled.

Nothing here knows a clock: *now* is in seconds from any origin, and never goes back.

Meaning of the options: QAPI ThrottleLimits.  Behaviour and texts: QEMU docs/throttle.txt, util/throttle.c,
block/throttle-groups.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from fusebd.block.options import Int, OptionStruct
from fusebd.errors import OptionError

#: directions of requests; discards and zero writes are writes
READ, WRITE = 0, 1

#: the highest rate that can be set, per second
MAX_RATE = 10**15
#: the longest burst that can be set, in seconds
MAX_BURST_LENGTH = 2**32 - 1

_OPERATIONS, _BYTES = "iops", "bps"
_SCOPES = ("total", "read", "write")
#: shorter waits are none: they are what is left over by rounding, and sleeping as long would not end them
_SHORTEST_WAIT = 1e-9

_Rate = Int | UnsetType


class ThrottleLimits(OptionStruct, frozen=True, kw_only=True):
    """QAPI ThrottleLimits.  0 means no limit; what is left out stays as it is."""

    iops_total: Annotated[_Rate, Meta(description="operations per second")] = UNSET
    iops_total_max: Annotated[_Rate, Meta(description="operations per second during bursts")] = UNSET
    iops_total_max_length: Annotated[_Rate, Meta(description="how long bursts may last, in seconds")] = UNSET
    iops_read: Annotated[_Rate, Meta(description="read operations per second")] = UNSET
    iops_read_max: Annotated[_Rate, Meta(description="read operations per second during bursts")] = UNSET
    iops_read_max_length: Annotated[_Rate, Meta(description="how long bursts may last, in seconds")] = UNSET
    iops_write: Annotated[_Rate, Meta(description="write operations per second")] = UNSET
    iops_write_max: Annotated[_Rate, Meta(description="write operations per second during bursts")] = UNSET
    iops_write_max_length: Annotated[_Rate, Meta(description="how long bursts may last, in seconds")] = UNSET
    bps_total: Annotated[_Rate, Meta(description="bytes per second")] = UNSET
    bps_total_max: Annotated[_Rate, Meta(description="bytes per second during bursts")] = UNSET
    bps_total_max_length: Annotated[_Rate, Meta(description="how long bursts may last, in seconds")] = UNSET
    bps_read: Annotated[_Rate, Meta(description="bytes read per second")] = UNSET
    bps_read_max: Annotated[_Rate, Meta(description="bytes read per second during bursts")] = UNSET
    bps_read_max_length: Annotated[_Rate, Meta(description="how long bursts may last, in seconds")] = UNSET
    bps_write: Annotated[_Rate, Meta(description="bytes written per second")] = UNSET
    bps_write_max: Annotated[_Rate, Meta(description="bytes written per second during bursts")] = UNSET
    bps_write_max_length: Annotated[_Rate, Meta(description="how long bursts may last, in seconds")] = UNSET
    iops_size: Annotated[_Rate, Meta(description="a longer request counts as several operations, in bytes")] = UNSET


def is_length(name: str) -> bool:
    """Whether the limit *name* is the length of a burst."""
    return name.endswith("-max-length")


#: limits that limit nothing, all of them, by their QAPI names
NO_LIMITS: Mapping[str, int] = {name: 1 if is_length(name) else 0 for name in ThrottleLimits.__struct_encode_fields__}


def changed_limits(limits: Mapping[str, int], change: ThrottleLimits) -> dict[str, int]:
    """*limits* with those that *change* has.  Raises OptionError if they are not valid together then."""
    new = {**limits, **msgspec.to_builtins(change)}
    for name in NO_LIMITS:
        if is_length(name) and new[name] > MAX_BURST_LENGTH:
            raise OptionError(f"{name} value must be in the range [0, {MAX_BURST_LENGTH}]")
    check_limits(new)
    return new


def check_limits(limits: Mapping[str, int]) -> None:
    """Raises OptionError if *limits*, complete, contradict each other."""
    for name in (_OPERATIONS, _BYTES):
        for suffix in ("", "-max"):
            total, read, write = (limits[f"{name}-{scope}{suffix}"] for scope in _SCOPES)
            if total and (read or write):
                raise OptionError("bps/iops/max total values and read/write values cannot be used at the same time")
    if limits["iops-size"] and not any(limits[f"iops-{scope}"] for scope in _SCOPES):
        raise OptionError("iops size requires an iops value to be set")
    for name in (_BYTES, _OPERATIONS):
        for scope in _SCOPES:
            _check_bucket(*(limits[f"{name}-{scope}{suffix}"] for suffix in ("", "-max", "-max-length")))


def _check_bucket(rate: int, burst_rate: int, burst_length: int) -> None:
    if not (0 <= rate <= MAX_RATE and 0 <= burst_rate <= MAX_RATE):
        raise OptionError(f"bps/iops/max values must be within [0, {MAX_RATE}]")
    if not burst_length:
        raise OptionError("the burst length cannot be 0")
    if burst_length != 1 and not burst_rate:
        raise OptionError("burst length set without burst rate")
    # a negative length is one beyond all measure: QEMU keeps it as an unsigned number
    if burst_rate and not 0 < burst_length <= MAX_RATE // burst_rate:
        raise OptionError("burst length too high for this burst rate")
    if burst_rate and not rate:
        raise OptionError("bps_max/iops_max require corresponding bps/iops values")
    if burst_rate and burst_rate < rate:
        raise OptionError("bps_max/iops_max cannot be lower than bps/iops")


class LeakyBucket:
    """One limit.  ``level`` is what is in its bucket, ``burst_level`` in the one for bursts: bytes or operations."""

    __slots__ = ("_avg", "_burst_size", "_bursts", "_max", "_size", "burst_level", "level")

    def __init__(self, avg: int, maximum: int, burst_length: int) -> None:
        self._avg, self._max = avg, maximum
        self._size = maximum * burst_length if maximum else avg / 10
        self._bursts = burst_length > 1
        self._burst_size = maximum / 10
        self.level = self.burst_level = 0.0

    def leak(self, seconds: float) -> None:
        """*seconds* have passed."""
        self.level = max(self.level - self._avg * seconds, 0.0)
        if self._bursts:
            self.burst_level = max(self.burst_level - self._max * seconds, 0.0)

    def wait(self) -> float:
        """Seconds until there is no more in the bucket than fits."""
        excess = self.level - self._size
        if excess > 0:
            return excess / self._avg
        if self._bursts:
            excess = self.burst_level - self._burst_size
            if excess > 0:
                return excess / self._max
        return 0.0

    def fill(self, amount: float) -> None:
        """*amount* goes."""
        self.level += amount
        if self._bursts:
            self.burst_level += amount


class ThrottleState:
    """What has passed under *limits* (complete and valid, see ``changed_limits``): nothing yet."""

    def __init__(self, limits: Mapping[str, int]) -> None:
        self._iops_size = limits["iops-size"]
        self._leaked_at = float("-inf")

        def buckets(name: str, *scopes: str) -> list[LeakyBucket]:
            given = [[limits[f"{name}-{scope}{suffix}"] for suffix in ("", "-max", "-max-length")] for scope in scopes]
            return [LeakyBucket(*numbers) for numbers in given if numbers[0]]

        operations = {scope: buckets(_OPERATIONS, scope) for scope in _SCOPES}
        byte_rates = {scope: buckets(_BYTES, scope) for scope in _SCOPES}
        self._operations = tuple(operations["total"] + operations[scope] for scope in ("read", "write"))
        self._bytes = tuple(byte_rates["total"] + byte_rates[scope] for scope in ("read", "write"))
        self._concerned = tuple(map(list.__add__, self._operations, self._bytes))
        self._all = [bucket for each in (operations, byte_rates) for found in each.values() for bucket in found]

    def is_limited(self, direction: int) -> bool:
        """Whether there is a limit for requests in *direction*."""
        return bool(self._concerned[direction])

    def wait(self, direction: int, now: float) -> float:
        """Seconds from *now* until a request in *direction* may go if none goes before it; 0.0 if it may now."""
        self._leak(now)
        longest = 0.0
        for bucket in self._concerned[direction]:
            delay = bucket.wait()
            if delay > longest:
                longest = delay
        return longest if longest >= _SHORTEST_WAIT else 0.0

    def charge(self, direction: int, size: int, now: float) -> None:
        """A request of *size* bytes in *direction* goes *now*."""
        self._leak(now)
        for bucket in self._bytes[direction]:
            bucket.fill(size)
        operations = size / self._iops_size if 0 < self._iops_size < size else 1.0
        for bucket in self._operations[direction]:
            bucket.fill(operations)

    def _leak(self, now: float) -> None:
        seconds = now - self._leaked_at
        if seconds > 0:
            self._leaked_at = now
            for bucket in self._all:
                bucket.leak(seconds)
