"""From L2 entries to what is behind them: arithmetic only, no I/O.

Where clusters have subclusters, one whose subclusters are all alike has the entry in memory that it would have without
them; the others have the flag ``MIXED`` (a bit that is reserved on disk), and a bitmap beside the entry.

Meaning of the entries: QEMU docs/interop/qcow2.txt, "L2 table entry", "Extended L2 Entries".
"""

from __future__ import annotations

from collections.abc import Sequence

from fusebd.ondisk.qcow2 import COMPRESSED as _COMPRESSED_FLAG
from fusebd.ondisk.qcow2 import COPIED as _COPIED_FLAG
from fusebd.ondisk.qcow2 import OFFSET_MASK
from fusebd.ondisk.qcow2 import ZERO as _ZERO_FLAG

#: kinds of clusters: not in this image; zero; zero with a host cluster; data; compressed data; of several kinds
UNALLOCATED, ZERO_PLAIN, ZERO_ALLOCATED, DATA, COMPRESSED, SEVERAL = range(6)
#: of an entry in memory: its subclusters are of several kinds, or of one that no cluster can be of
MIXED = 2


def kind_of(entry: int) -> int:
    """The kind of cluster that the L2 *entry* describes."""
    if entry & (_COMPRESSED_FLAG | MIXED):
        return COMPRESSED if entry & _COMPRESSED_FLAG else SEVERAL
    if entry & _ZERO_FLAG:
        return ZERO_ALLOCATED if entry & OFFSET_MASK else ZERO_PLAIN
    return DATA if entry & OFFSET_MASK else UNALLOCATED


def is_mixed(entry: int) -> bool:
    """Whether there is a bitmap beside *entry*."""
    return entry & (_COMPRESSED_FLAG | MIXED) == MIXED


def needs_allocation(entry: int) -> bool:
    """Whether a write into the cluster of *entry* takes a new host cluster."""
    return not (entry & _COPIED_FLAG and not entry & _COMPRESSED_FLAG and entry & OFFSET_MASK)


def extent(entries: Sequence[int], at: int, limit: int, cluster_size: int) -> tuple[int, int, int]:
    """What the clusters from entry *at* on are, not looking at *limit* and beyond: (kind, host offset, number).

    They are of one kind; those that have host clusters have them in a row.  Compressed ones, with their entry in place
    of the host offset, and those of several kinds come one at a time.
    """
    entry = entries[at]
    kind = kind_of(entry)
    if kind == COMPRESSED:
        return kind, entry, 1
    if kind == SEVERAL:
        return kind, entry & OFFSET_MASK, 1
    host_offset = expected = entry & OFFSET_MASK
    number = at + 1
    step = cluster_size if host_offset else 0
    while number < limit:
        entry = entries[number]
        expected += step
        if entry & OFFSET_MASK != expected or kind_of(entry) != kind:
            break
        number += 1
    return kind, host_offset, number - at


def allocation_run(entries: Sequence[int], at: int, limit: int) -> int:
    """How many entries in a row from *at* on, below *limit*, need a new host cluster when they are written."""
    number = at
    while number < limit and needs_allocation(entries[number]):
        number += 1
    return number - at
