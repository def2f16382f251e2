"""What becomes of data that should be the same on two sides, and is not.

It is logged, with both sides around the first byte that differs, and announced as the event BLKVERIFY_MISMATCH.  What
else is done is a choice of the user (the option ``on-mismatch``): the request fails, or it goes on as the side under
test answered it, or the program ends as QEMU's programs do.
"""

from __future__ import annotations

import errno
import logging
from typing import Any, Literal

from fusebd.block.node import Node
from fusebd.block.quiet import Quiet
from fusebd.errors import BlockIOError

log = logging.getLogger(__name__)

OnMismatch = Literal["error", "report", "stop"]

#: how many bytes of either side an event shows, from the first that differs on
_SHOWN = 16
#: bytes in a line of a dump, how many such lines there are at most, and how many of them before the first difference
_LINE = 16
_LINES = 8
_BEFORE = 1


class Mismatches:
    """What *node*, whose requests go to two sides, does about their differences.

    *sides* are the names of the side under test and of the one that is right.  The log has at most one mismatch a
    second; the events are complete.
    """

    def __init__(self, node: Node, action: OnMismatch, sides: tuple[str, str]) -> None:
        self._node, self._action, self._sides = node, action, sides
        self._quiet = Quiet()

    def contents(self, title: str, offset: int, size: int, at: int, test: memoryview, raw: memoryview) -> None:
        """A read of *size* bytes from *offset* on differs: *test* and *raw*, of one length, begin *at* bytes into it.

        *title* is how QEMU's line about it begins.  Raises BlockIOError if the read is to fail.
        """
        found, expected = bytes(test), bytes(raw)
        first = first_difference(found, expected)
        where = offset + at + first
        details = {
            "mismatch-offset": where,
            "test-data": found[first : first + _SHOWN].hex(),
            "raw-data": expected[first : first + _SHOWN].hex(),
        }
        dump = dump_difference(offset + at, first, found, expected, self._sides)
        self._mismatch(title, "read", offset, size, f"contents mismatch at offset {where}", details, dump)

    def outcomes(self, title: str, operation: str, offset: int, size: int, test_errno: int, raw_errno: int) -> None:
        """An *operation* ended with different errnos, 0 for success.  Raises BlockIOError if it is to fail for that."""
        reason = f"return value mismatch {-test_errno} != {-raw_errno}"
        details = {"test-errno": test_errno, "raw-errno": raw_errno}
        self._mismatch(title, operation, offset, size, reason, details, [])

    def _mismatch(
        self, title: str, operation: str, offset: int, size: int, reason: str, details: dict[str, Any], dump: list[str]
    ) -> None:
        line = f"{title} offset={offset} bytes={size} {reason}"
        more = self._quiet.admit()
        if more is not None:
            log.error("%s%s", line, more)
            for text in dump:
                log.error("%s", text)
        name = self._node.public_name
        data = {"node-name": name, "operation": operation, "offset": offset, "length": size}
        self._node.emit("BLKVERIFY_MISMATCH", {**data, "reason": reason, **details})
        if self._action == "stop":
            self._node.graph.fail(f"{name}: {line}")
        if self._action != "report":
            raise BlockIOError(errno.EIO, node_name=self._node.name, operation=operation, offset=offset, reason=reason)


def first_difference(a: bytes, b: bytes) -> int:
    """The index of the first byte in which *a* and *b*, of one length and not equal, differ."""
    low, high = 0, len(a)
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def dump_difference(offset: int, first: int, a: bytes, b: bytes, sides: tuple[str, str]) -> list[str]:
    """Lines that show *a* and *b*, which begin at byte *offset* and first differ at index *first*, around there.

    Where they are the same, one line stands for both.
    """
    width = max(map(len, (*sides, "both")))
    lines = []
    start = (offset + first) // _LINE * _LINE - _BEFORE * _LINE
    for line in range(start, min(start + _LINES * _LINE, offset + len(a)), _LINE):
        if line + _LINE <= offset:
            continue
        begin, end = max(line - offset, 0), line - offset + _LINE
        same = a[begin:end] == b[begin:end]
        for name, data in (("both", a),) if same else zip(sides, (a, b), strict=True):
            shown = data[begin:end]
            missing = begin - (line - offset)  # bytes of the line that are before the data
            codes = "   " * missing + shown.hex(" ")
            text = " " * missing + "".join(chr(byte) if 32 <= byte < 127 else "." for byte in shown)
            lines.append(f"{line:08x}  {name:<{width}}  {codes:<{3 * _LINE - 1}}  |{text}|")
    return lines
