"""Compressing and decompressing the clusters of qcow2 images: raw deflate and zstd.

Source: QEMU docs/interop/qcow2.txt ("Compressed Clusters Descriptor", "compression_type") and block/qcow2-threads.c;
RFC 8878 for the window that a zstd decoder has to offer.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import trio
import zstandard

from fusebd.ondisk import qcow2 as ondisk

_DEFLATE_WINDOW_BITS = 12  #: QEMU's, and the largest that it reads
#: bytes that take a tenth of a millisecond and more, in which others get their turn
_LONG = 32 << 10
_ZSTD_WINDOW_BYTES = 8 << 20  #: what RFC 8878 recommends to support: an image cannot make the daemon take more


def compress(compression_type: int, cluster: bytes) -> bytes | None:
    """*cluster* in fewer bytes; None if that cannot be.  *compression_type* is the header's."""
    data = _COMPRESSORS[compression_type](cluster)
    return data if len(data) < len(cluster) else None


async def compress_in_thread(compression_type: int, cluster: bytes) -> bytes | None:
    """``compress`` in a worker thread, but for clusters that take less time than to wake one."""
    if len(cluster) < _LONG:
        return compress(compression_type, cluster)
    return await trio.to_thread.run_sync(compress, compression_type, cluster)


async def decompress_in_thread(compression_type: int, data: bytes | bytearray, size: int) -> bytes:
    """``decompress`` likewise."""
    if size < _LONG:
        return decompress(compression_type, data, size)
    return await trio.to_thread.run_sync(decompress, compression_type, data, size)


def _deflate(cluster: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-_DEFLATE_WINDOW_BITS, memLevel=9)
    return compressor.compress(cluster) + compressor.flush()


def _zstd(cluster: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(cluster)


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


_COMPRESSORS: dict[int, Callable[[bytes], bytes]] = {
    ondisk.COMPRESSION_ZLIB: _deflate,
    ondisk.COMPRESSION_ZSTD: _zstd,
}
_DECOMPRESSORS: dict[int, Callable[[bytes | bytearray, int], bytes]] = {
    ondisk.COMPRESSION_ZLIB: _inflate,
    ondisk.COMPRESSION_ZSTD: _unzstd,
}
