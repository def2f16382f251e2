"""Decompressing qcow2 clusters, from bytes: what follows them, several frames, damage, greed."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

import pytest
import zstandard

from fusebd.drivers.qcow2.compression import decompress
from fusebd.ondisk.qcow2 import COMPRESSION_ZLIB, COMPRESSION_ZSTD

SIZE = 65536
CLUSTER = random.Random(1).randbytes(SIZE // 2) + bytes(SIZE // 2)


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-12)
    return compressor.compress(data) + compressor.flush()


def zstd(data: bytes, window_bits: int = 21) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=window_bits)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # which does not know the size
    return compressor.compress(data) + compressor.flush()


COMPRESSORS: dict[int, Callable[[bytes], bytes]] = {COMPRESSION_ZLIB: deflated, COMPRESSION_ZSTD: zstd}


@pytest.mark.parametrize("kind", COMPRESSORS)
@pytest.mark.parametrize("behind", [b"", bytes(100), b"another cluster"])
def test_a_cluster_ends_before_its_last_sector_does(kind: int, behind: bytes) -> None:
    assert decompress(kind, bytearray(COMPRESSORS[kind](CLUSTER) + behind), SIZE) == CLUSTER


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_no_more_is_made_than_a_cluster(kind: int) -> None:
    assert decompress(kind, COMPRESSORS[kind](bytes(64 << 20)), SIZE) == bytes(SIZE)


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_what_is_too_short_is_refused(kind: int) -> None:
    compressed = COMPRESSORS[kind](CLUSTER)
    for data in (b"", compressed[: len(compressed) // 2], COMPRESSORS[kind](CLUSTER[:-1])):
        with pytest.raises(ValueError, match="bytes instead of 65536"):
            decompress(kind, data, SIZE)


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_what_is_damaged_is_refused(kind: int) -> None:
    with pytest.raises(ValueError, match="damaged"):
        decompress(kind, b"\xff" * 512, SIZE)


def test_a_cluster_may_be_several_zstd_frames() -> None:
    frames = zstd(CLUSTER[:1000]) + zstd(CLUSTER[1000:])
    assert decompress(COMPRESSION_ZSTD, frames, SIZE) == CLUSTER


def test_a_zstd_frame_cannot_ask_for_a_large_window() -> None:
    assert decompress(COMPRESSION_ZSTD, zstd(CLUSTER, 23), SIZE) == CLUSTER
    with pytest.raises(ValueError, match=r"damaged: .*too much memory"):
        decompress(COMPRESSION_ZSTD, zstd(CLUSTER, 24), SIZE)
