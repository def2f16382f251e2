"""Partition tables, GPT and MBR: partitions by sfdisk, and what GPT's own headers say about where they are.

Sources: sfdisk(8); UEFI 2.10, sections 5.2 and 5.3.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from fusebd.errors import FusebdError, ImageError
from fusebd.faults.layout import Area, Layout, Range, Target, number
from fusebd.ondisk import gpt

MBR_LENGTH = 512
BOOT_SIGNATURE = b"\x55\xaa"
_SIGNATURE_OFFSET = 510
#: of the first of the four partition entries, and in there
_ENTRIES_OFFSET, _ENTRY_LENGTH, _TYPE_OFFSET = 446, 16, 4
PROTECTIVE_TYPE = 0xEE
_PARTITION = Target("partition", "a partition", "NUMBER", container=True)


def parse_sfdisk(text: str) -> tuple[str, dict[int, Range]]:
    """``sfdisk --json``: the label (gpt, dos, ...), and the partitions in bytes by their number.  Raises ImageError."""
    try:
        table = json.loads(text)["partitiontable"]
        device, sector_size = table["device"], int(table.get("sectorsize", 512))
        partitions = {
            # "/dev/sda1", but "/dev/loop0p1"
            int(entry["node"].removeprefix(device).removeprefix("p")): (
                int(entry["start"]) * sector_size,
                int(entry["size"]) * sector_size,
            )
            for entry in table.get("partitions", ())
        }
        return str(table["label"]), partitions
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ImageError("sfdisk prints no partition table") from None


class PartitionTable(Layout):
    """What both kinds have: partitions, as sfdisk sees them."""

    label: str

    @cached_property
    def _partitions(self) -> dict[int, Range]:
        self.check_sector_size()
        output = self.area.run("sfdisk", "--json", self.area.file)
        if output.status:
            raise ImageError(f"sfdisk: {output.complaint}")
        label, partitions = parse_sfdisk(output.text)
        if label != self.label:
            raise ImageError(f"sfdisk takes it for a partition table of type {label}")
        return partitions

    def check_sector_size(self) -> None:
        """Raise FusebdError if sfdisk cannot know the size of sector that the table counts in."""

    def containers(self) -> list[tuple[str, Range]]:
        return [(str(partition), place) for partition, place in sorted(self._partitions.items())]

    def _partition(self, value: str) -> Range:
        wanted = number(value, "the number of a partition")
        if wanted not in self._partitions:
            there = ", ".join(map(str, sorted(self._partitions))) or "none"
            raise FusebdError(f"there is no partition {wanted} (there are: {there})")
        return self._partitions[wanted]


class Mbr(PartitionTable):
    name = "mbr"
    noun = "MBR partition table"
    label = "dos"
    targets = (
        Target("boot-record", "the master boot record, with the table"),
        _PARTITION,
    )

    @classmethod
    def matches(cls, area: Area) -> bool:
        record = area.read(0, MBR_LENGTH)
        types = record[_ENTRIES_OFFSET + _TYPE_OFFSET : _SIGNATURE_OFFSET : _ENTRY_LENGTH]
        # A file system's boot sector has the signature, too; its partitions are of type 0, or sfdisk knows better.
        return record[_SIGNATURE_OFFSET:] == BOOT_SIGNATURE and any(types) and PROTECTIVE_TYPE not in types

    def find(self, target: str, value: str) -> Iterable[Range]:
        return [(0, MBR_LENGTH)] if target == "boot-record" else [self._partition(value)]


class Gpt(PartitionTable):
    name = "gpt"
    noun = "GUID partition table"
    label = "gpt"
    targets = (
        Target("protective-mbr", "the protective master boot record"),
        Target("primary-header", "the header at the beginning"),
        Target("primary-entries", "the entry array at the beginning"),
        Target("backup-header", "the header at the end"),
        Target("backup-entries", "the entry array at the end"),
        _PARTITION,
    )

    @classmethod
    def matches(cls, area: Area) -> bool:
        return _sector_size(area) is not None

    def find(self, target: str, value: str) -> Iterable[Range]:
        match target:
            case "protective-mbr":
                return [(0, MBR_LENGTH)]
            case "partition":
                return [self._partition(value)]
            case "primary-header":
                return [self._sectors(gpt.PRIMARY_LBA)]
            case "backup-header":
                return [self._sectors(self._backup_lba)]
        primary, backup = self._primary, self._backup
        length = self._entries_length
        if target == "primary-entries":
            return [(self._sectors(primary["partition_entry_lba"] if primary else gpt.PRIMARY_ENTRIES_LBA)[0], length)]
        if backup:
            return [(self._sectors(backup["partition_entry_lba"])[0], length)]
        # They are right before the header, in whole sectors.
        return [self._sectors(self._backup_lba - -(-length // self._sector_size), -(-length // self._sector_size))]

    def check_sector_size(self) -> None:
        if self._sector_size != gpt.SECTOR_SIZES[0] and not self.area.is_device:
            raise FusebdError(
                f"it is made for sectors of {self._sector_size} bytes, and sfdisk knows those of devices only",
                hint=f"losetup --sector-size {self._sector_size} makes one",
            )

    @cached_property
    def _sector_size(self) -> int:
        return _sector_size(self.area) or gpt.SECTOR_SIZES[0]

    @cached_property
    def _primary(self) -> dict[str, Any] | None:
        return gpt.parse_header(self.area.read(*self._sectors(gpt.PRIMARY_LBA)))

    @cached_property
    def _backup_lba(self) -> int:
        """Where the primary header says that the other is; if it is damaged, the last sector."""
        if self._primary:
            return int(self._primary["alternate_lba"])
        return self.area.length // self._sector_size - 1

    @cached_property
    def _backup(self) -> dict[str, Any] | None:
        start, length = self._sectors(self._backup_lba)
        return gpt.parse_header(self.area.read(start, length)) if start < self.area.length else None

    @property
    def _entries_length(self) -> int:
        header = self._primary or self._backup
        if header is None:
            raise ImageError("both headers are damaged")
        length: int = header["number_of_partition_entries"] * header["size_of_partition_entry"]
        if not 0 < length <= gpt.MAX_ENTRIES_BYTES:
            raise ImageError(f"its entry array would have {length} bytes")
        return length

    def _sectors(self, lba: int, count: int = 1) -> Range:
        return lba * self._sector_size, count * self._sector_size


def _sector_size(area: Area) -> int | None:
    """The size of sector with which *area* has the signature of a header in its second or last sector."""
    for size in gpt.SECTOR_SIZES:
        for start in (gpt.PRIMARY_LBA * size, area.length // size * size - size):
            if start > 0 and area.read(start, len(gpt.SIGNATURE)) == gpt.SIGNATURE:
                return size
    return None
