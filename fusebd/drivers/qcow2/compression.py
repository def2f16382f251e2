"""Decompressing the clusters of qcow2 images: raw deflate and zstd.

Source: QEMU docs/interop/qcow2.txt ("Compressed Clusters Descriptor", "compression_type") and block/qcow2-threads.c;
RFC 8878 for the window that a zstd decoder has to offer.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import zstandard

from fusebd.ondisk import qcow2 as ondisk

_DEFLATE_WINDOW_BITS = 12  #: QEMU's, and the largest that it reads
_ZSTD_WINDOW_BYTES = 8 << 20  #: what RFC 8878 recommends to support: an image cannot make the daemon take more


def decompress(compression_type: int, data: bytes | bytearray, size: int) -> bytes:
    """The *size* bytes that *data* holds, which may go on after them up to the end of its last sector.

    *compression_type* is the header's.  Raises ValueError if *data* is damaged or too short.
    """
    cluster = _DECOMPRESSORS[compression_type](data, size)
    if len(cluster) != size:
        raise ValueError(f"{len(cluster)} bytes instead of {size}")
    return cluster


def _inflate(data: bytes | bytearray, size: int) -> bytes:
    try:
        return zlib.decompressobj(-_DEFLATE_WINDOW_BITS).decompress(data, size)
    except zlib.error as error:
        raise ValueError(f"damaged: {error}") from None


def _unzstd(data: bytes | bytearray, size: int) -> bytes:
    """A cluster may be several frames.  Reading from a stream bounds what a frame can make of itself."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    try:
        with decompressor.stream_reader(data, read_across_frames=True) as stream:
            return stream.read(size)
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged: {error}") from None


_DECOMPRESSORS: dict[int, Callable[[bytes | bytearray, int], bytes]] = {
    ondisk.COMPRESSION_ZLIB: _inflate,
    ondisk.COMPRESSION_ZSTD: _unzstd,
}
