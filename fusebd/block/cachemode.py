"""What the kernel may keep of a file that shows a node, and do with it by itself.

``direct``
    Nothing: every read and write reaches the node.
``page``
    What was read, in its page cache.  Writes go through at once.
``writeback``
    What was read and what was written; it writes back when it likes, and at fsync and close.
``passthrough``
    It reads, writes and maps the host's file below the node, and does not ask.
"""

from __future__ import annotations

from typing import Literal, get_args

CacheMode = Literal["direct", "page", "writeback", "passthrough"]
CACHE_MODES: tuple[CacheMode, ...] = get_args(CacheMode)
