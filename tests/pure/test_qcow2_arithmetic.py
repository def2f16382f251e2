"""What the qcow2 driver computes without I/O: refcounts of every width, extents, the map of metadata, cache sizes."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusebd.block.options import convert
from fusebd.drivers.qcow2 import mapping
from fusebd.drivers.qcow2.counting import in_a_row
from fusebd.drivers.qcow2.image import MetadataMap
from fusebd.drivers.qcow2.options import Qcow2Options, cache_sizes, overlap_mask
from fusebd.drivers.qcow2.refblock import RefcountWidth
from fusebd.errors import OptionError
from fusebd.ondisk import qcow2 as ondisk

BLOCK = 16  #: bytes of the refcount blocks here; every width fills them without a rest
every_order = pytest.mark.parametrize("order", range(7))
repeatable = settings(deadline=None, derandomize=True, max_examples=50)


# --- refcounts -----------------------------------------------------------------------------------


def counts_for(order: int) -> st.SearchStrategy[list[int]]:
    """All entries of a block; zeroes and ones in runs are what matters."""
    entries = BLOCK * 8 >> order
    maximum = (1 << (1 << order)) - 1
    run = st.tuples(st.sampled_from([0, 1, maximum]) | st.integers(0, maximum), st.integers(1, entries))
    return st.lists(run, max_size=12).map(
        lambda runs: ([value for value, length in runs for _ in range(length)] + [0] * entries)[:entries]
    )


def block_of(order: int, counts: list[int]) -> bytearray:
    """The bytes of a refcount block, put together here."""
    bits = 1 << order
    if bits >= 8:
        return bytearray(b"".join(count.to_bytes(bits // 8, "big") for count in counts))
    # Within a byte the first entry is in the least significant bits.
    per_byte = 8 // bits
    return bytearray(
        sum(counts[at + number] << number * bits for number in range(per_byte))
        for at in range(0, len(counts), per_byte)
    )


@every_order
def test_the_largest_count_fills_the_width(order: int) -> None:
    width = RefcountWidth(order)
    assert (width.bits, width.maximum) == (1 << order, 2 ** (1 << order) - 1)


@every_order
@given(st.data())
@repeatable
def test_counts_are_read_where_the_specification_puts_them(order: int, data: st.DataObject) -> None:
    counts = data.draw(counts_for(order))
    block = block_of(order, counts)
    assert [RefcountWidth(order).get(block, index) for index in range(len(counts))] == counts


@every_order
@given(st.data())
@repeatable
def test_a_count_that_is_set_changes_no_other(order: int, data: st.DataObject) -> None:
    counts = data.draw(counts_for(order))
    block = block_of(order, counts)
    width = RefcountWidth(order)
    for _ in range(8):
        index = data.draw(st.integers(0, len(counts) - 1))
        counts[index] = data.draw(st.integers(0, width.maximum))
        width.set(block, index, counts[index])
        assert block == block_of(order, counts)


@every_order
@given(st.data())
@repeatable
def test_ones_are_set_in_their_range_only(order: int, data: st.DataObject) -> None:
    counts = data.draw(counts_for(order))
    block = block_of(order, counts)
    start = data.draw(st.integers(0, len(counts)))
    end = data.draw(st.integers(start, len(counts)))
    RefcountWidth(order).set_ones(block, start, end)
    counts[start:end] = [1] * (end - start)
    assert block == block_of(order, counts)


@every_order
@given(st.data())
@repeatable
def test_the_first_zero_from_a_place_on_is_found(order: int, data: st.DataObject) -> None:
    counts = data.draw(counts_for(order))
    start = data.draw(st.integers(0, len(counts)))
    expected = next((index for index in range(start, len(counts)) if not counts[index]), -1)
    assert RefcountWidth(order).find_zero(block_of(order, counts), start) == expected


@every_order
def test_no_zero_is_found_in_a_full_block(order: int) -> None:
    width = RefcountWidth(order)
    full = block_of(order, [width.maximum] * (BLOCK * 8 >> order))
    assert width.find_zero(full, 0) == -1


@every_order
@given(st.data())
@repeatable
def test_zeroes_in_a_row_are_counted_up_to_the_end(order: int, data: st.DataObject) -> None:
    counts = data.draw(counts_for(order))
    start = data.draw(st.integers(0, len(counts)))
    end = data.draw(st.integers(start, len(counts)))
    expected = next((index for index in range(start, end) if counts[index]), end) - start
    assert RefcountWidth(order).count_zeroes(block_of(order, counts), start, end) == expected


@every_order
@given(st.data())
@repeatable
def test_ones_in_a_range_are_told_from_others(order: int, data: st.DataObject) -> None:
    counts = data.draw(counts_for(order))
    start = data.draw(st.integers(0, len(counts)))
    end = data.draw(st.integers(start, len(counts)))
    width, block = RefcountWidth(order), block_of(order, counts)
    assert width.are_ones(block, start, end) == all(count == 1 for count in counts[start:end])
    width.set_ones(block, start, end)
    assert width.are_ones(block, start, end)


@every_order
@given(st.data())
@repeatable
def test_the_last_that_is_not_zero_is_found(order: int, data: st.DataObject) -> None:
    counts = data.draw(counts_for(order))
    expected = max((index for index, count in enumerate(counts) if count), default=-1)
    assert RefcountWidth(order).last(block_of(order, counts)) == expected


# --- L2 entries ----------------------------------------------------------------------------------

CLUSTER_BITS = 12
CLUSTER = 1 << CLUSTER_BITS

COPIED = ondisk.COPIED


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([COPIED | 4 * CLUSTER, COPIED | 5 * CLUSTER], True),
        ([4 * CLUSTER, 5 * CLUSTER, 6 * CLUSTER], True),
        ([4 * CLUSTER], True),
        ([4 * CLUSTER, COPIED | 5 * CLUSTER], False),
        ([4 * CLUSTER, 6 * CLUSTER], False),
        ([5 * CLUSTER, 4 * CLUSTER], False),
        ([0, CLUSTER], False),
        ([4 * CLUSTER + 512, 5 * CLUSTER + 512], False),
        ([4 * CLUSTER | ondisk.ZERO, 5 * CLUSTER | ondisk.ZERO], False),
        ([4 * CLUSTER | ondisk.COMPRESSED, 5 * CLUSTER | ondisk.COMPRESSED], False),
        ([2**64 - CLUSTER, 0], False),
        ([COPIED | ondisk.OFFSET_MASK & ~(CLUSTER - 1), 0], False),
    ],
)
def test_clusters_in_a_row(entries: list[int], expected: bool) -> None:
    assert in_a_row(array("Q", entries), CLUSTER) is expected


#: entries as they are in images; few host clusters, so that neighbours follow each other often
entries = st.builds(
    lambda kind, cluster, copied: {
        "unallocated": 0,
        "zero": ondisk.ZERO,
        "zero-allocated": cluster * CLUSTER | ondisk.ZERO | copied,
        "data": cluster * CLUSTER | copied,
        "compressed": ondisk.build_compressed(cluster * CLUSTER + 77, 1000, CLUSTER_BITS),
    }[kind],
    st.sampled_from(["unallocated", "zero", "zero-allocated", "data", "data", "compressed"]),
    st.integers(1, 4),
    st.sampled_from([0, ondisk.COPIED]),
)
runs_of_entries = st.lists(
    st.tuples(entries, st.integers(1, 4)).map(
        lambda run: [
            run[0] + number * CLUSTER if run[0] & ondisk.OFFSET_MASK and not run[0] & ondisk.COMPRESSED else run[0]
            for number in range(run[1])
        ]
    ),
    min_size=1,
    max_size=8,
).map(lambda runs: [entry for run in runs for entry in run])


@given(st.integers(0, 2**64 - 1))
@repeatable
def test_the_kind_of_an_entry_follows_from_the_declaration(word: int) -> None:
    if not word & ondisk.COMPRESSED:
        word &= ~mapping.MIXED  # reserved, and taken away before
    entry = ondisk.L2_STANDARD_ENTRY.parse(word.to_bytes(8, "big"))
    if entry.compressed:
        expected = mapping.COMPRESSED
    elif entry.zero:
        expected = mapping.ZERO_ALLOCATED if entry.offset else mapping.ZERO_PLAIN
    else:
        expected = mapping.DATA if entry.offset else mapping.UNALLOCATED
    assert mapping.kind_of(word) == expected


@pytest.mark.parametrize(
    ("entry", "kind", "needs_allocation"),
    [
        (0, mapping.UNALLOCATED, True),
        (ondisk.COPIED, mapping.UNALLOCATED, True),
        (ondisk.ZERO, mapping.ZERO_PLAIN, True),
        (CLUSTER | ondisk.ZERO, mapping.ZERO_ALLOCATED, True),
        (CLUSTER | ondisk.ZERO | ondisk.COPIED, mapping.ZERO_ALLOCATED, False),
        (CLUSTER, mapping.DATA, True),
        (CLUSTER | ondisk.COPIED, mapping.DATA, False),
        (CLUSTER | ondisk.COMPRESSED, mapping.COMPRESSED, True),
        (CLUSTER | ondisk.COMPRESSED | ondisk.ZERO, mapping.COMPRESSED, True),
        (CLUSTER | ondisk.COMPRESSED | ondisk.COPIED, mapping.COMPRESSED, True),
    ],
)
def test_only_clusters_of_their_own_are_written_in_place(entry: int, kind: int, needs_allocation: bool) -> None:
    assert mapping.kind_of(entry) == kind
    assert mapping.needs_allocation(entry) == needs_allocation


@given(runs_of_entries, st.data())
@repeatable
def test_an_extent_is_the_longest_run_of_one_kind(table: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(table) - 1))
    limit = data.draw(st.integers(at + 1, len(table)))
    kind, host_offset, number = mapping.extent(table, at, limit, CLUSTER)
    assert kind == mapping.kind_of(table[at])
    assert 1 <= number <= limit - at
    if kind == mapping.COMPRESSED:
        assert (host_offset, number) == (table[at], 1)
        return
    has_host_cluster = kind in (mapping.DATA, mapping.ZERO_ALLOCATED)
    places = [host_offset + n * CLUSTER if has_host_cluster else 0 for n in range(limit - at)]
    same = [
        mapping.kind_of(entry) == kind and entry & ondisk.OFFSET_MASK == place
        for entry, place in zip(table[at:limit], places, strict=True)
    ]
    assert all(same[:number])
    assert number == limit - at or not same[number]


@given(runs_of_entries, st.data())
@repeatable
def test_an_allocation_takes_all_that_needs_a_cluster(table: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(table) - 1))
    limit = data.draw(st.integers(at + 1, len(table)))
    needed = [mapping.needs_allocation(entry) for entry in table[at:limit]]
    assert mapping.allocation_run(table, at, limit) == (needed.index(False) if False in needed else limit - at)


# --- the metadata map ----------------------------------------------------------------------------

KINDS = [1 << bit for bit in range(9)]


@pytest.mark.parametrize("seed", range(4))
def test_the_metadata_map_finds_every_overlap_and_no_other(seed: int) -> None:
    rng = random.Random(seed)
    enabled = sum(rng.sample(KINDS, 7))
    metadata = MetadataMap(enabled, CLUSTER_BITS)
    areas: list[tuple[int, int, int]] = []
    for _ in range(300):
        if areas and rng.random() < 0.4:
            kind, offset, length = areas.pop(rng.randrange(len(areas)))
            metadata.remove(kind, offset, length)
        else:
            # A table has clusters of its own, whatever its length.
            area = (rng.choice(KINDS), rng.randrange(200) * CLUSTER, rng.randrange(1, 5 * CLUSTER))
            first, last = area[1], area[1] + area[2] + CLUSTER
            if not any(offset < last and first < offset + length + CLUSTER for _, offset, length in areas):
                areas.append(area)
                metadata.add(*area)
        offset, length = rng.randrange(220 * CLUSTER), rng.randrange(1, 3 * CLUSTER)
        ignore = rng.choice([0, *KINDS])
        first, last = offset // CLUSTER, (offset + length - 1) // CLUSTER
        hit = [
            kind
            for kind, start, size in areas
            if kind & enabled & ~ignore and start // CLUSTER <= last and first <= (start + size - 1) // CLUSTER
        ]
        assert metadata.overlap(offset, length, ignore) == min(hit, default=0)


def test_the_metadata_map_finds_areas_that_are_not_remembered_cluster_by_cluster() -> None:
    metadata = MetadataMap(1 | 4, CLUSTER_BITS)
    metadata.add(1, 5 * CLUSTER, CLUSTER)
    metadata.set_areas(4, [(40 * CLUSTER, 3 * CLUSTER), (20 * CLUSTER, 1 << 50), (41 * CLUSTER, 10)])
    assert not metadata.simple
    found = {place: metadata.overlap(place * CLUSTER, 1) for place in (4, 5, 6, 19, 20, 41, 1 << 30, 1 << 40)}
    assert found == {4: 0, 5: 1, 6: 0, 19: 0, 20: 4, 41: 4, 1 << 30: 4, 1 << 40: 0}
    assert metadata.overlap(0, 50 * CLUSTER) == 1
    assert metadata.overlap(19 * CLUSTER, 2 * CLUSTER, ignore=4) == 0


# --- options -------------------------------------------------------------------------------------

MIB = 1 << 20
#: of an 8 GiB disk with clusters of 64 KiB: its L2 tables are 1 MiB together, and 4 refcount blocks are the fewest;
#: parts of tables take 600 bytes more than they have
SIZES: list[tuple[dict[str, int], tuple[int, int, int]]] = [
    ({}, (65536, 16, 4)),
    ({"cache-size": MIB}, (4096, 167, 4)),
    ({"cache-size": MIB, "l2-cache-size": MIB // 2}, (4096, 111, 8)),
    ({"cache-size": MIB, "refcount-cache-size": MIB // 2}, (4096, 111, 8)),
    ({"cache-size": 64 * MIB}, (65536, 16, 1008)),
    ({"cache-size": 0}, (4096, 2, 4)),
    ({"l2-cache-size": 0}, (4096, 2, 4)),
    ({"l2-cache-size": 1 << 62}, (65536, 16, 4)),
    ({"l2-cache-entry-size": 512}, (512, 2048, 4)),
]
# Right what QEMU 10.0.2 says.
REFUSED_SIZES: list[tuple[dict[str, int], str]] = [
    (
        {"cache-size": MIB, "l2-cache-size": MIB, "refcount-cache-size": MIB},
        "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
    ),
    ({"cache-size": MIB, "l2-cache-size": 2 * MIB}, "l2-cache-size may not exceed cache-size"),
    ({"cache-size": MIB, "refcount-cache-size": 2 * MIB}, "refcount-cache-size may not exceed cache-size"),
    *(
        (
            {"l2-cache-entry-size": size},
            "L2 cache entry size must be a power of two between 512 and the cluster size (65536)",
        )
        for size in (100, 256, 1000, 131072)
    ),
    ({"refcount-cache-size": 1 << 62}, "Refcount cache size too big"),
    ({"l2-cache-size": -1}, "Value '-1' is out of range for parameter 'l2-cache-size'"),
    ({"cache-size": -5}, "Value '-5' is out of range for parameter 'cache-size'"),
    ({"cache-clean-interval": 1 << 32}, "Cache clean interval too big"),
    ({"cache-clean-interval": -1}, "Cache clean interval too big"),
]


def options(values: dict[str, object]) -> Qcow2Options:
    return convert({"driver": "qcow2", "file": "node", **values}, Qcow2Options)


@pytest.mark.parametrize(("values", "expected"), SIZES, ids=[" ".join(values) or "default" for values, _ in SIZES])
def test_cache_sizes_are_shared_out(values: dict[str, object], expected: tuple[int, int, int]) -> None:
    sizes = cache_sizes(options(values), size=8 << 30, cluster_bits=16, l2_entry_bytes=8)
    assert (sizes.slice_bytes, sizes.slices, sizes.refcount_blocks) == expected


@pytest.mark.parametrize(("values", "message"), REFUSED_SIZES)
def test_cache_sizes_that_cannot_be_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        cache_sizes(options(values), size=8 << 30, cluster_bits=16, l2_entry_bytes=8)
    assert str(caught.value) == message


ALL, INACTIVE_L1, INACTIVE_L2 = 0x1FF, 1 << 6, 1 << 7


@pytest.mark.parametrize(
    ("value", "mask"),
    [
        ("none", 0),
        ("constant", 1 << 0 | 1 << 3 | 1 << 5 | 1 << 8),
        ("cached", ALL & ~INACTIVE_L2),
        ("all", ALL),
        ({}, ALL & ~INACTIVE_L2),
        ({"template": "none", "inactive-l2": True}, INACTIVE_L2),
        ({"template": "all", "inactive-l1": False}, ALL & ~INACTIVE_L1),
        ({"inactive-l1": False}, ALL & ~INACTIVE_L1 & ~INACTIVE_L2),
    ],
)
def test_overlap_checks_are_a_template_and_what_differs_from_it(value: object, mask: int) -> None:
    assert overlap_mask(options({"overlap-check": value}).overlap_check) == mask
