"""What is left to chance, and yet the same each time: everything follows from the seed and from a name.

Only ``random.Random.random`` is drawn from, whose sequence Python promises to keep, so that other versions and other
machines draw the same.  Delays are rounded to nanoseconds, which hides the last bits of the C library's logarithm.
"""

from __future__ import annotations

import base64
import binascii
import bisect
import hashlib
import math
import random
import struct
from collections.abc import Callable
from statistics import NormalDist

from msgspec import UNSET, UnsetType

from fusebd.drivers.fault.options import FaultRule
from fusebd.errors import OptionError

_STANDARD = NormalDist()
#: the smallest number above 0 that is a multiple of what ``random`` draws in
_LEAST = 2.0**-53
#: the state of a sequence: 624 words, and how many of them are used up
_STATE = struct.Struct("<625I")
_WORDS = 624


class Dice:
    """A sequence of draws that follows from *seed* and *name* alone."""

    __slots__ = ("_name", "_random", "_sequence")

    def __init__(self, seed: int, name: str) -> None:
        self._name = f"{seed}/{name}"
        self._sequence = random.Random(self._name)
        self._random = self._sequence.random

    @property
    def is_fresh(self) -> bool:
        """Whether nothing has been drawn."""
        return self._sequence.getstate() == random.Random(self._name).getstate()

    @property
    def state(self) -> str:
        """Where in its sequence it is, for ``restore``."""
        return base64.b64encode(_STATE.pack(*self._sequence.getstate()[1])).decode()

    def restore(self, state: str) -> None:
        """Go on as from *state*.  Raises OptionError."""
        try:
            words = _STATE.unpack(base64.b64decode(state, validate=True))
        except (binascii.Error, ValueError, struct.error):
            words = (_WORDS + 1,)
        if not 0 < words[-1] <= _WORDS:
            raise OptionError("Parameter 'dice' expects the state of a sequence")
        self._sequence.setstate((3, words, None))

    def share(self) -> float:
        """From 0 up to 1, without 1."""
        return self._random()

    def below(self, count: int) -> int:
        """One of the *count* numbers from 0 on."""
        return min(int(self._random() * count), count - 1)

    def distinct(self, count: int, total: int) -> list[int]:
        """*count* of the *total* numbers from 0 on, or all if there are no more, in ascending order."""
        drawn: set[int] = set()
        for last in range(max(total - count, 0), total):  # Floyd's algorithm
            number = self.below(last + 1)
            drawn.add(last if number in drawn else number)
        return sorted(drawn)

    def normal(self) -> float:
        """Standard normal."""
        return _STANDARD.inv_cdf(max(self._random(), _LEAST))

    def bytes(self, length: int) -> bytes:
        """*length* bytes."""
        # a megabyte in single draws would hold up everybody else
        return hashlib.shake_128(self._random().hex().encode()).digest(length)


Distribution = Callable[[Dice], float]


def distribution(rule: FaultRule) -> Distribution:
    """How the seconds of the delay *rule*, which is valid, are drawn."""
    kind = "fixed" if rule.distribution is UNSET else rule.distribution
    seconds = _given(rule.seconds, 0.0)
    least, most = _given(rule.minimum, 0.0), _given(rule.maximum, math.inf)
    if kind == "uniform":
        return lambda dice: round(least + (most - least) * dice.share(), 9)
    if kind == "normal":
        deviation = _given(rule.deviation, 0.0)
        return lambda dice: _within(seconds + deviation * dice.normal(), least, most)
    if kind == "lognormal":
        sigma = _given(rule.sigma, 0.0)
        return lambda dice: _within(seconds * math.exp(sigma * dice.normal()), least, most)
    if kind == "percentiles":
        assert rule.percentiles is not UNSET
        points = [(point.percentile / 100, point.seconds) for point in rule.percentiles]
        return lambda dice: round(_between(points, dice.share()), 9)
    return lambda dice: seconds


def _given(value: float | UnsetType, otherwise: float) -> float:
    return otherwise if value is UNSET else float(value)


def _within(seconds: float, least: float, most: float) -> float:
    return round(min(max(seconds, least), most), 9)


def _between(points: list[tuple[float, float]], share: float) -> float:
    """The value at *share* of the curve through *points*, which is level before the first and after the last."""
    index = bisect.bisect_right(points, (share, math.inf))
    if index == 0:
        return points[0][1]
    if index == len(points):
        return points[-1][1]
    (left, low), (right, high) = points[index - 1], points[index]
    return low + (high - low) * (share - left) / (right - left)
