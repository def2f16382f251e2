"""What a user may call a node, an export, an object, a character device or a job (QEMU id_wellformed, util/id.c)."""

from __future__ import annotations

import re

_WELL_FORMED = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")


def is_well_formed(name: str) -> bool:
    """Whether *name* is a letter, and then letters, digits, ``-``, ``.`` and ``_``."""
    return _WELL_FORMED.match(name) is not None
