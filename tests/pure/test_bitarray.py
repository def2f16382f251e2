"""Bit arrays behave like a list of booleans, however they are kept."""

from __future__ import annotations

import hashlib
import random
from itertools import pairwise

import pytest

from fusebd.block.bitarray import CHUNK, BitArray

SIZES = [1, 7, 8, 64, 65, 1000, CHUNK * 8 - 1, CHUNK * 8, CHUNK * 8 + 1, 3 * CHUNK * 8 + 77]


def as_bytes(model: list[bool]) -> bytes:
    value = sum(1 << at for at, bit in enumerate(model) if bit)
    return value.to_bytes(-(-len(model) // 64) * 8, "little")


def check(array: BitArray, model: list[bool]) -> None:
    data = as_bytes(model)
    assert array.size == len(model)
    assert array.nb_bytes == len(data)
    assert array.count() == sum(model)
    assert array.read(0, len(data)) == data
    assert array.sha256() == hashlib.sha256(data or bytes(8)).hexdigest()
    found = [False] * len(model)
    runs = list(array.runs())
    assert all(first < end for first, end in runs)
    assert all(a[1] <= b[0] for a, b in pairwise(runs))
    for first, end in runs:
        found[first:end] = [True] * (end - first)
    assert found == model


@pytest.mark.parametrize("size", SIZES)
def test_an_array_is_like_a_list_of_booleans(size: int) -> None:
    rng = random.Random(size)
    array, model = BitArray(size), [False] * size
    check(array, model)
    for _ in range(12):
        first = rng.randrange(size)
        end = min(first + rng.choice([1, 2, 9, 64, 1000, CHUNK * 8, 2 * CHUNK * 8]), size)
        array.set(first, end)
        model[first:end] = [True] * (end - first)
    check(array, model)
    kept = array.copy()
    other = BitArray(size)
    other.set(size // 3, size)
    array.merge(other)
    model[size // 3 :] = [True] * (size - size // 3)
    check(array, model)
    array.take(kept)
    assert array.read(0, array.nb_bytes) == kept.read(0, kept.nb_bytes)
    array.clear()
    check(array, [False] * size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("new", SIZES)
def test_an_array_can_be_resized(size: int, new: int) -> None:
    array = BitArray(size)
    array.set(size // 5, size)
    model = ([False] * (size // 5) + [True] * (size - size // 5) + [False] * new)[:new]
    array.resize(new)
    check(array, model)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("piece", [512, CHUNK, 2 * CHUNK])
def test_what_is_read_in_pieces_can_be_written(size: int, piece: int) -> None:
    rng = random.Random(size)
    array = BitArray(size)
    for _ in range(5):
        first = rng.randrange(size)
        array.set(first, first + rng.choice([3, 3 * CHUNK * 8]))
    other = BitArray(size)
    for offset in range(0, array.nb_bytes, piece):
        other.write(offset, array.read(offset, piece))
    assert other.read(0, other.nb_bytes) == array.read(0, array.nb_bytes)
    other = BitArray(size)
    other.write(0, b"\xff" * (array.nb_bytes + 100))  # more than there are
    check(other, [True] * size)


def test_long_arrays_that_are_all_ones_take_little_memory() -> None:
    array = BitArray(1 << 34)
    array.set(0, 1 << 34)
    assert array.count() == 1 << 34
    assert array.memory <= 1 << 25
