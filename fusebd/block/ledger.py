"""The ledger: every fault that was injected, and every error that reached a client.

Entries are numbered from 1 on.  The latest are kept in memory; all of them can go to a file, one JSON object a line.
Each injected fault is announced as the event FAULT_INJECTED; errors are what BLOCK_IO_ERROR tells of.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any

from fusebd.block.caller import current_request
from fusebd.errors import OpenError

if TYPE_CHECKING:
    from fusebd.block.node import Node

#: entries that are kept in memory
KEPT = 65536

Entry = dict[str, Any]


class Ledger:
    """*emit* is told of injected faults."""

    def __init__(self, emit: Callable[[str, dict[str, Any]], None]) -> None:
        self._emit = emit
        self._entries: deque[Entry] = deque(maxlen=KEPT)
        self._last = 0
        self._file: IO[str] | None = None
        self._with_time = True

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    @property
    def last_id(self) -> int:
        """The number of the latest entry, 0 if there is none."""
        return self._last

    def record_fault(
        self,
        node: Node,
        *,
        rule: str,
        action: str,
        operation: str,
        offset: int,
        length: int,
        errno: int = 0,
        **details: Any,
    ) -> None:
        """*node* has done *action* to an *operation* on *length* bytes at byte *offset*, because of its *rule*.

        *errno* is what the request fails with, 0 if it does not; *details* are members of the entry that only this
        kind of fault has.
        """
        data = {"rule": rule, "action": action, "operation": operation, "offset": offset, "length": length}
        if errno:
            data["errno"] = errno
        self._emit("FAULT_INJECTED", self._add("fault", node, {**data, **details}))

    def record_error(self, node: Node, *, operation: str, offset: int, length: int, errno: int) -> None:
        """A client of *node* gets *errno* for an *operation* on *length* bytes at byte *offset*."""
        data = {"operation": operation, "offset": offset, "length": length, "errno": errno}
        self._add("error", node, data)

    def _add(self, kind: str, node: Node, data: Entry) -> Entry:
        self._last += 1
        plain: Entry = {"id": self._last, "kind": kind, "node-name": node.public_name, **data}
        request = current_request.get()
        entry = plain if request is None else {**plain, **request.identity()}
        self._entries.append({**entry, "time": time.time()})
        if self._file is not None:
            self._file.write(json.dumps(self._entries[-1] if self._with_time else plain) + "\n")
            self._file.flush()
        return entry

    # -- the file -------------------------------------------------------------------------------

    def open_file(self, path: str, *, with_time: bool = True) -> None:
        """Append what comes from now on to the file *path* too.  Raises OpenError.

        Without times, and without who asked, which is another process each time, two runs can be compared byte by byte.
        """
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise OpenError.from_os(f"Could not open '{path}'", error) from None
        self.close_file()
        self._file = os.fdopen(descriptor, "a", encoding="utf-8")
        self._with_time = with_time

    def close_file(self) -> None:
        """Write no file any more."""
        if self._file is not None:
            self._file.close()
            self._file = None
