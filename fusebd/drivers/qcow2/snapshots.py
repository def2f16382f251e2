"""The table of internal snapshots: what is in it, and what of the image is protected because of it.

Layout: QEMU docs/interop/qcow2.txt, "Snapshots".  Limits and messages: qcow2_do_read_snapshots
(block/qcow2-snapshot.c).
"""

from __future__ import annotations

import errno
from array import array
from dataclasses import dataclass
from typing import Any

import trio

from fusebd.block.child import Child
from fusebd.block.snapshots import SnapshotInfo
from fusebd.drivers.qcow2.header import Header, read_bytes
from fusebd.drivers.qcow2.image import Image
from fusebd.drivers.qcow2.options import OL_INACTIVE_L1, OL_INACTIVE_L2
from fusebd.errors import ImageError
from fusebd.ondisk import qcow2 as ondisk

#: clusters of L1 tables that are remembered one by one; beyond that it takes longer to find them, but less memory
_MOST_CLUSTERS = 1 << 16
_FAILURE = "Failed to read snapshot table"
_NO_ICOUNT = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(SnapshotInfo):
    """One entry of the table.  ``extra_data``, and the names as they are in the image, are kept byte for byte."""

    l1_table_offset: int
    l1_size: int
    disk_size: int
    extra_data: bytes
    id_str: bytes
    name_str: bytes

    def build(self) -> bytes:
        """The entry as it is in the table, without the zeroes that may follow."""
        large: bytes = ondisk.SNAPSHOT_EXTRA_DATA.build(
            {
                "vm_state_size_large": self.vm_state_size,
                "disk_size": self.disk_size,
                "icount": _NO_ICOUNT if self.icount is None else self.icount,
            }
        )
        extra = large + self.extra_data[len(large) :]
        head = {
            "l1_table_offset": self.l1_table_offset,
            "l1_size": self.l1_size,
            "id_str_size": len(self.id_str),
            "name_size": len(self.name_str),
            "date_sec": self.date_sec,
            "date_nsec": self.date_nsec,
            "vm_clock_nsec": self.vm_clock_nsec,
            "vm_state_size": self.vm_state_size if self.vm_state_size < 1 << 32 else 0,
            "extra_data_size": len(extra),
        }
        data: bytes = ondisk.SNAPSHOT.build(head)
        return data + extra + self.id_str + self.name_str


async def protect_snapshots(image: Image, snapshots: list[Snapshot]) -> None:
    """Enter the tables of *snapshots*, and of no others, into the map of metadata.

    Suspends while L1 tables are read, which is only if their L2 tables are to be protected.  Raises BlockIOError.
    """
    image.metadata.forget(OL_INACTIVE_L1 | OL_INACTIVE_L2)
    tables = {(s.l1_table_offset, s.l1_size * 8) for s in snapshots if s.l1_size * 8 <= ondisk.MAX_L1_BYTES}
    if sum(length // image.cluster_size + 2 for _, length in tables) <= _MOST_CLUSTERS:
        for offset, length in tables:
            image.metadata.add(OL_INACTIVE_L1, offset, length)
    else:
        image.metadata.set_areas(OL_INACTIVE_L1, list(tables))
    if image.metadata.enabled & OL_INACTIVE_L2:
        found: set[int] = set()
        for offset, length in tables:
            l1 = array("Q", bytes(await image.read(offset, length)))
            l1.byteswap()
            found.update(entry & ondisk.OFFSET_MASK for entry in l1)
        for offset in found - {0}:
            image.metadata.add(OL_INACTIVE_L2, offset, image.cluster_size)


async def read_snapshots(file: Child, header: Header) -> tuple[list[Snapshot], int]:
    """The snapshots of the image in *file*, and the length of their table in bytes.

    Where their L1 tables are is not checked, as nobody may ever look.  Suspends while *file* is read.  Raises
    ImageError, BlockIOError.
    """
    found: list[Snapshot] = []
    at = header.snapshots_offset
    for number in range(header.nb_snapshots):
        if number % 256 == 255:
            await trio.lowlevel.checkpoint()  # there may be many
        at = (at + 7) & ~7
        head: Any = ondisk.SNAPSHOT.parse(await read_bytes(file, at, ondisk.SNAPSHOT_LENGTH, _FAILURE))
        at += ondisk.SNAPSHOT_LENGTH
        if head.extra_data_size > ondisk.MAX_SNAPSHOT_EXTRA_DATA:
            raise ImageError(f"Too much extra metadata in snapshot table entry {number}", errno=errno.EFBIG)
        rest = head.extra_data_size + head.id_str_size + head.name_size
        data = await read_bytes(file, at, rest, _FAILURE)
        at += rest
        if at - header.snapshots_offset > ondisk.MAX_SNAPSHOT_TABLE_BYTES:
            raise ImageError(f"{_FAILURE}: File too large", errno=errno.EFBIG)
        extra, names = data[: head.extra_data_size], data[head.extra_data_size :]
        icount = int.from_bytes(extra[16:24], "big") if len(extra) >= 24 else _NO_ICOUNT
        id_str, name_str = names[: head.id_str_size], names[head.id_str_size :]
        found.append(
            Snapshot(
                id=id_str.decode("utf-8", "replace"),
                name=name_str.decode("utf-8", "replace"),
                vm_state_size=int.from_bytes(extra[:8], "big") if len(extra) >= 8 else head.vm_state_size,
                date_sec=head.date_sec,
                date_nsec=head.date_nsec,
                vm_clock_nsec=head.vm_clock_nsec,
                icount=None if icount == _NO_ICOUNT else icount,
                l1_table_offset=head.l1_table_offset,
                l1_size=head.l1_size,
                disk_size=int.from_bytes(extra[8:16], "big") if len(extra) >= 16 else header.size,
                extra_data=extra,
                id_str=id_str,
                name_str=name_str,
            )
        )
    return found, at - header.snapshots_offset
