"""How an opened file is used in each cache mode: the whole table."""

from __future__ import annotations

import os

import pytest

from fusebd.block.cachemode import CACHE_MODES, CacheMode
from fusebd.block.perms import Perm
from fusebd.errors import UsageError
from fusebd.fuse.caching import access
from fusebd.settings import cache_choice

R, RW, D = os.O_RDONLY, os.O_RDWR, os.O_DIRECT
READ, WRITE, RESIZE, ALL = Perm.CONSISTENT_READ, Perm.WRITE, Perm.RESIZE, Perm.ALL

TABLE: list[tuple[CacheMode, int, bool, bool, Perm, Perm]] = [
    # mode, flags, mount with a writeback cache: through the page cache, taken, not shared
    ("direct", R, False, False, READ, Perm.NONE),
    ("direct", RW, False, False, READ | WRITE, Perm.NONE),
    ("direct", R, True, False, READ, RESIZE),
    ("direct", RW, True, False, READ | WRITE, RESIZE),
    ("page", R, False, True, READ, Perm.NONE),
    ("page", RW, False, True, READ | WRITE, Perm.NONE),
    ("page", R | D, False, False, READ, Perm.NONE),
    ("page", RW | D, False, False, READ | WRITE, Perm.NONE),
    ("page", R, True, True, READ, RESIZE),
    ("page", RW, True, False, READ | WRITE, RESIZE),
    ("writeback", R, True, True, READ, RESIZE),
    ("writeback", RW, True, True, READ | WRITE, RESIZE | WRITE),
    ("writeback", os.O_WRONLY, True, True, READ | WRITE, RESIZE | WRITE),
    ("writeback", RW | D, True, False, READ | WRITE, RESIZE),
    ("passthrough", R, False, False, READ, Perm.NONE),
    ("passthrough", RW, False, False, READ | WRITE | RESIZE, Perm.NONE),
    ("passthrough", RW | D, False, False, READ | WRITE | RESIZE, Perm.NONE),
]


@pytest.mark.parametrize(("mode", "flags", "kernel_lengths", "cached", "taken", "unshared"), TABLE)
def test_what_an_open_file_comes_to(
    mode: CacheMode, flags: int, kernel_lengths: bool, cached: bool, taken: Perm, unshared: Perm
) -> None:
    found = access(mode, flags, kernel_lengths=kernel_lengths)
    assert (found.mode, found.cached, found.keep_cache) == (mode, cached, False)
    assert found.writable == (flags & os.O_ACCMODE != os.O_RDONLY)
    assert found.needs == (taken, ALL & ~unshared)
    assert found.passed == (mode == "passthrough")


@pytest.mark.parametrize(("mode", "flags", "kernel_lengths", "cached", "taken", "unshared"), TABLE)
def test_what_is_cached_is_kept_only_while_it_is_watched_over(
    mode: CacheMode, flags: int, kernel_lengths: bool, cached: bool, taken: Perm, unshared: Perm
) -> None:
    assert access(mode, flags, kernel_lengths=kernel_lengths, cache_in_use=True).keep_cache == cached
    assert not access(mode, flags, kernel_lengths=kernel_lengths, cache_in_use=False).keep_cache


@pytest.mark.parametrize("mode", CACHE_MODES)
def test_a_writer_of_an_unaligned_end_may_move_it(mode: CacheMode) -> None:
    assert access(mode, RW, unaligned_end=True).needs.perm & RESIZE
    assert not access(mode, R, unaligned_end=True).needs.perm & RESIZE


@pytest.mark.parametrize("mode", CACHE_MODES)
def test_a_choice_is_a_node_and_a_mode(mode: CacheMode) -> None:
    assert cache_choice(f"disk={mode}") == ("disk", mode)


@pytest.mark.parametrize("text", ["", "disk", "disk=", "=page", "disk=nonsense", "disk=page=page", "page"])
def test_what_is_no_choice_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        cache_choice(text)
    assert str(caught.value) == f"Invalid cache mode '{text}', expected: NODE=direct|page|writeback|passthrough"
