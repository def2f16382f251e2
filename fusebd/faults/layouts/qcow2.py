"""qcow2, the image file itself: where its metadata and the clusters of its disk are, by its own structures.

Ranges end with the file where that ends inside of a cluster.  Nothing that the image says is used unchecked.

Specification: QEMU docs/interop/qcow2.txt.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, groupby
from typing import Any

from fusebd.errors import FusebdError, ImageError, OptionError
from fusebd.faults.layout import Area, Layout, Range, Target, size
from fusebd.ondisk import qcow2 as ondisk

ENTRY_BYTES = 8
#: the array type of refcounts of so many bytes
_ARRAY_TYPES = {1: "B", 2: "H", 4: "I", 8: "Q"}


def parse_entries(data: bytes) -> array[int]:
    """The 64-bit entries of a table."""
    return _numbers(data[: len(data) // ENTRY_BYTES * ENTRY_BYTES], ENTRY_BYTES)


def parse_refcounts(block: bytes, refcount_order: int) -> Sequence[int]:
    """The entries of a refcount block, which have 2**refcount_order bits each."""
    bits = 1 << refcount_order
    if bits >= 8:
        return _numbers(block, bits // 8)
    mask = (1 << bits) - 1
    return bytes(byte >> shift & mask for byte in block for shift in range(0, 8, bits))


def _numbers(data: bytes, width: int) -> array[int]:
    """*data* as big-endian numbers of *width* bytes."""
    numbers = array(_ARRAY_TYPES[width], data)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


class Qcow2(Layout):
    name = "qcow2"
    noun = "qcow2 image"
    targets = (
        Target("header", "the header cluster: header, extensions, backing file name"),
        Target("l1-table", "the active L1 table"),
        Target("l2-tables", "the L2 tables of the active L1 table"),
        Target("refcount-table", "the refcount table"),
        Target("refcount-blocks", "the refcount blocks"),
        Target("snapshot-table", "the snapshot table"),
        Target("snapshot-l1-tables", "the L1 tables of all snapshots"),
        Target("data", "the clusters of the disk's content"),
        Target("guest", "the clusters of a range of the disk", "OFFSET+LENGTH"),
        Target("unused", "the clusters of the file that nothing uses"),
    )

    @classmethod
    def matches(cls, area: Area) -> bool:
        return area.read(0, len(ondisk.MAGIC)) == ondisk.MAGIC

    def find(self, target: str, value: str) -> Iterable[Range]:
        header = self._header
        match target:
            case "header":
                return [self._cluster(0, "header")]
            case "l1-table":
                return [self._table("l1_table_offset", header["l1_size"] * ENTRY_BYTES, "L1 table")]
            case "l2-tables":
                return [self._cluster(offset, "L2 table") for offset in self._l2_offsets if offset]
            case "refcount-table":
                return [self._table("refcount_table_offset", self._refcount_table_bytes, "refcount table")]
            case "refcount-blocks":
                return [self._cluster(offset, "refcount block") for offset in self._refcount_block_offsets if offset]
            case "snapshot-table":
                return [self._snapshots[0]]
            case "snapshot-l1-tables":
                return self._snapshots[1]
            case "unused":
                return self._unused()
            case "data":
                return self._data(0, header["size"])
            case _:
                return self._data(*self._guest_range(value))

    def absent(self) -> Collection[str]:
        absent = set()
        if not self._header["nb_snapshots"]:
            absent |= {"snapshot-table", "snapshot-l1-tables"}
        if self._header["incompatible_features"] & ondisk.INCOMPAT_DATA_FILE:
            absent |= {"data", "guest"}
        return absent

    # --- tables ---

    @cached_property
    def _header(self) -> dict[str, Any]:
        header = ondisk.parse_header(
            self.area.read(0, ondisk.HEADER_FULL_LENGTH).ljust(ondisk.HEADER_FULL_LENGTH, b"\0")
        )
        if header["version"] not in (2, 3):
            raise ImageError(f"unsupported qcow2 version {header['version']}")
        if not ondisk.MIN_CLUSTER_BITS <= header["cluster_bits"] <= ondisk.MAX_CLUSTER_BITS:
            raise ImageError(f"unsupported cluster size 2^{header['cluster_bits']}")
        if unknown := header["incompatible_features"] & ~ondisk.INCOMPAT_KNOWN:
            raise ImageError(f"unknown incompatible features {unknown:#x}")
        if header["refcount_order"] > ondisk.MAX_REFCOUNT_ORDER:
            raise ImageError("refcounts of more than 64 bits")
        if header["nb_snapshots"] > ondisk.MAX_SNAPSHOTS:
            raise ImageError(f"{header['nb_snapshots']} snapshots")
        if header["l1_size"] * ENTRY_BYTES > ondisk.MAX_L1_BYTES:
            raise ImageError("L1 table too large")
        if header["refcount_table_clusters"] << header["cluster_bits"] > ondisk.MAX_REFCOUNT_TABLE_BYTES:
            raise ImageError("refcount table too large")
        return header

    @property
    def _cluster_size(self) -> int:
        return 1 << int(self._header["cluster_bits"])

    @property
    def _refcount_table_bytes(self) -> int:
        return int(self._header["refcount_table_clusters"]) * self._cluster_size

    def _cluster(self, offset: int, what: str) -> Range:
        """The cluster at *offset*, up to the end of the file; ImageError if a *what* cannot be there."""
        if offset % self._cluster_size:
            raise ImageError(f"the {what} at {offset:#x} does not begin with a cluster")
        if offset >= self.area.length:
            raise ImageError(f"the {what} at {offset:#x} is past the end of the file")
        return offset, min(self._cluster_size, self.area.length - offset)

    def _table(self, field: str, length: int, what: str) -> Range:
        """*length* bytes from where the header's *field* says."""
        offset = int(self._header[field])
        if not length:
            raise FusebdError(f"the {what} is empty")
        if not offset or offset % self._cluster_size or offset + length > self.area.length:
            raise ImageError(f"the {what} cannot be the {length} bytes at {offset:#x}")
        return offset, length

    @cached_property
    def _l2_offsets(self) -> list[int]:
        """The host offset of each L2 table; 0 where there is none."""
        if not self._header["l1_size"]:
            return []
        entries = parse_entries(self.area.read(*next(iter(self.find("l1-table", "")))))
        return [entry & ondisk.OFFSET_MASK for entry in entries]

    @cached_property
    def _refcount_block_offsets(self) -> list[int]:
        """The host offset of each refcount block; 0 where there is none."""
        entries = parse_entries(self.area.read(*next(iter(self.find("refcount-table", "")))))
        return [entry & ondisk.REFCOUNT_TABLE_OFFSET_MASK for entry in entries]

    @cached_property
    def _snapshots(self) -> tuple[Range, list[Range]]:
        """The snapshot table, and the snapshots' L1 tables."""
        start = offset = int(self._header["snapshots_offset"])
        count = int(self._header["nb_snapshots"])
        if not count:
            raise FusebdError("the image has no snapshots")
        if not start or start % self._cluster_size:
            raise ImageError(f"the snapshot table cannot be at {start:#x}")
        tables = []
        for _ in range(count):
            data = self.area.read(offset, ondisk.SNAPSHOT_LENGTH)
            if len(data) < ondisk.SNAPSHOT_LENGTH:
                raise ImageError("the snapshot table is not inside of the file")
            entry = ondisk.SNAPSHOT.parse(data)
            offset += ondisk.SNAPSHOT_LENGTH + entry.extra_data_size + entry.id_str_size + entry.name_size
            offset += -offset % 8
            if entry.l1_size:
                tables.append((entry.l1_table_offset, entry.l1_size * ENTRY_BYTES))
        # What pads the last entry need not be in the file.
        return (start, min(offset, self.area.length) - start), tables

    # --- the disk's content ---

    def _guest_range(self, value: str) -> Range:
        what = "a range like 1M+64k, offset and length"
        offset_text, plus, length_text = value.partition("+")
        if not plus:
            raise OptionError(f"'{value}' is not {what}")
        offset, length = size(offset_text, what), size(length_text, what)
        if not length or offset + length > self._header["size"]:
            raise OptionError(
                f"the disk has no {length} bytes from byte {offset} on, its size is {self._header['size']}"
            )
        return offset, length

    def _data(self, guest_offset: int, length: int) -> Iterable[Range]:
        if self._header["incompatible_features"] & ondisk.INCOMPAT_DATA_FILE:
            raise FusebdError("the clusters are in the external data file")
        # Looked at before the rest, of which there may be much.
        clusters = self._host_clusters(guest_offset, length)
        first = next(clusters, None)
        if first is None:
            raise FusebdError("the image has no cluster for it")
        return chain([first], clusters)

    def _host_clusters(self, guest_offset: int, length: int) -> Iterator[Range]:
        """What the clusters of a range of the disk take in the file, in the disk's order."""
        cluster_bits = int(self._header["cluster_bits"])
        entry_bytes = ENTRY_BYTES << bool(self._header["incompatible_features"] & ondisk.INCOMPAT_EXTENDED_L2)
        per_table = self._cluster_size // entry_bytes
        first, end = guest_offset >> cluster_bits, -(-(guest_offset + length) >> cluster_bits)
        for index, table in enumerate(self._l2_offsets[: -(-end // per_table)]):
            if not table or (index + 1) * per_table <= first:
                continue
            in_table = range(max(first - index * per_table, 0), min(end - index * per_table, per_table))
            start, extent = self._cluster(table, "L2 table")
            at = in_table.start * entry_bytes
            data = self.area.read(start + at, min(in_table.stop * entry_bytes, extent) - at)
            for entry in parse_entries(data)[:: entry_bytes // ENTRY_BYTES]:
                if entry & ondisk.COMPRESSED:
                    host, extent = ondisk.parse_compressed(entry, cluster_bits)
                    # Its last sector need not be whole.
                    if host >= self.area.length:
                        raise ImageError(f"the compressed cluster at {host:#x} is past the end of the file")
                    yield host, min(extent, self.area.length - host)
                elif host := entry & ondisk.OFFSET_MASK:
                    yield self._cluster(host, "cluster")

    def _unused(self) -> Iterator[Range]:
        """The clusters inside of the file whose refcount is zero."""
        order = int(self._header["refcount_order"])
        per_block = self._cluster_size * 8 >> order
        clusters = -(-self.area.length // self._cluster_size)
        blocks = self._refcount_block_offsets[: -(-clusters // per_block)]
        if (end := len(blocks) * per_block) < clusters:
            yield self._clusters(end, clusters - end)
        for index, offset in enumerate(blocks):
            start, count = index * per_block, min(per_block, clusters - index * per_block)
            if not offset:
                yield self._clusters(start, count)
                continue
            block = self.area.read(*self._cluster(offset, "refcount block")).ljust(self._cluster_size, b"\0")
            for used, group in groupby(parse_refcounts(block, order)[:count], bool):
                extent = sum(1 for _ in group)
                if not used:
                    yield self._clusters(start, extent)
                start += extent

    def _clusters(self, index: int, count: int) -> Range:
        """So many clusters of the file, up to its end."""
        start = index * self._cluster_size
        return start, min(count * self._cluster_size, self.area.length - start)
