"""Subclusters: the 32 parts of a cluster in images with extended L2 entries.  Arithmetic only, no I/O.

The bitmap of a cluster has bit n for "subcluster n is allocated", bit 32 + n for "it reads as zeroes", as the second
word of its entry on disk does.

Specification: QEMU docs/interop/qcow2.txt, "Extended L2 Entries".  What is copied on write: QEMU calculate_l2_meta
(block/qcow2-cluster.c).
"""

from __future__ import annotations

from array import array

from fusebd.drivers.qcow2 import mapping
from fusebd.ondisk import qcow2 as ondisk

NUMBER = ondisk.SUBCLUSTERS
_FLAGS = ondisk.ZERO | mapping.MIXED
_RESERVED = 0x1FF
_BITMAPS = {
    mapping.UNALLOCATED: 0,
    mapping.ZERO_PLAIN: ondisk.ALL_ZERO,
    mapping.ZERO_ALLOCATED: ondisk.ALL_ZERO,
    mapping.DATA: ondisk.ALL_ALLOCATED,
    mapping.COMPRESSED: 0,
}


def bitmap_of(entry: int, bitmaps: dict[int, int], index: int) -> int:
    """The bitmap of the cluster with the *entry* of number *index*; *bitmaps* has those of mixed clusters."""
    return bitmaps[index] if mapping.is_mixed(entry) else _BITMAPS[mapping.kind_of(entry)]


def with_bitmap(entry: int, bitmap: int) -> int:
    """*entry* as it is in memory if the cluster has *bitmap*: with MIXED if only that says what it is."""
    if entry & ondisk.COMPRESSED:
        return entry
    entry &= ~_FLAGS
    if bitmap == ondisk.ALL_ZERO:
        return entry | ondisk.ZERO
    if bitmap == (ondisk.ALL_ALLOCATED if entry & ondisk.OFFSET_MASK else 0):
        return entry
    return entry | mapping.MIXED


def first_words(entries: array[int]) -> array[int]:
    """The first words of the *entries*, without the bits that are reserved there."""
    return array("Q", (entry if entry & ondisk.COMPRESSED else entry & ~_RESERVED for entry in entries))


def interleaved(firsts: array[int], bitmaps: array[int]) -> array[int]:
    """Extended entries of these first and second words."""
    words = array("Q", bytes(16 * len(firsts)))
    words[::2], words[1::2] = firsts, bitmaps
    return words


def is_valid(entry: int, bitmap: int) -> bool:
    """Whether there can be a cluster with the two."""
    return not (bitmap >> NUMBER & bitmap if entry & ondisk.OFFSET_MASK else bitmap & ondisk.ALL_ALLOCATED)


def kind_at(entry: int, bitmap: int, number: int) -> int:
    """The kind of subcluster *number* of the mixed cluster."""
    allocated = bool(entry & ondisk.OFFSET_MASK)
    if bitmap >> NUMBER + number & 1:
        return mapping.ZERO_ALLOCATED if allocated else mapping.ZERO_PLAIN
    return mapping.DATA if bitmap >> number & 1 else mapping.UNALLOCATED


def run(entry: int, bitmap: int, first: int, end: int) -> int:
    """How many subclusters from *first* on, below *end*, are of one kind."""
    kind = kind_at(entry, bitmap, first)
    number = first + 1
    while number < end and kind_at(entry, bitmap, number) == kind:
        number += 1
    return number - first


def bits(first: int, end: int) -> int:
    """Bits *first* up to *end*."""
    return (1 << end) - (1 << first)


def written(bitmap: int, first: int, end: int) -> int:
    """*bitmap* when there is data in subclusters *first* up to *end*."""
    mask = bits(first, end)
    return (bitmap | mask) & ~(mask << NUMBER)


def zeroed(bitmap: int, first: int, end: int) -> int:
    """*bitmap* when subclusters *first* up to *end* read as zeroes."""
    mask = bits(first, end)
    return (bitmap | mask << NUMBER) & ~mask


def copied_from(entry: int, bitmap: int, number: int) -> int:
    """The first subcluster that a new host cluster gets if a write begins in subcluster *number*."""
    if entry & ondisk.COMPRESSED:
        return 0
    allocated = bitmap & ondisk.ALL_ALLOCATED
    return min(number, (allocated & -allocated).bit_length() - 1) if allocated else number


def copied_until(entry: int, bitmap: int, number: int) -> int:
    """The end of what it gets if a write ends in subcluster *number*."""
    if entry & ondisk.COMPRESSED:
        return NUMBER
    return max(number + 1, (bitmap & ondisk.ALL_ALLOCATED).bit_length())
