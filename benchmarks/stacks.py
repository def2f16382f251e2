"""What is measured: stacks of block nodes over fresh images, as the options of blockdev-add."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.processes import output_of

#: the name of the node that is measured
NODE = "disk"
#: the virtual length of an image that is filled while it is measured: most requests meet an unallocated cluster
EMPTY_LENGTH = 8 << 30

Options = dict[str, Any]

#: what no other server can do
FUSEBD = ("fusebd-devfuse", "fusebd-pyfuse3")
#: rules of the fault filter that no request comes to
_ELSEWHERE = [{"action": "error", "operations": ["read", "write"], "offset": 1 << 40, "length": 4096}]


@dataclass(frozen=True)
class Stack:
    """A chain of nodes.

    ``images`` makes the images that it needs in a directory; ``blockdev`` gives its options.  With ``fresh``, each
    measurement gets new images and new servers.  The bare file is measured beside it if ``bare``; ``cold`` means that
    the host's page cache is emptied of the images before each measurement.  With ``shared``, all servers have the same
    images: where in memory they are cached makes a tenth of difference.  ``servers`` restricts the servers that can
    do it; ``fusebd`` has further options of ``fusebd mount``, ``fio`` of the load.
    """

    summary: str
    images: Callable[[str, int], None]
    blockdev: Callable[[str, int], Options]
    cells: tuple[str, ...] = ()
    fresh: bool = False
    bare: bool = False
    cold: bool = False
    shared: bool = False
    servers: tuple[str, ...] = ()
    fusebd: tuple[str, ...] = ()
    fio: dict[str, str] = field(default_factory=dict)


def _no_images(directory: str, length: int) -> None:
    pass


def _raw_image(directory: str, length: int) -> None:
    _fill(os.path.join(directory, "disk.raw"), length)


def _two_raw_images(directory: str, length: int) -> None:
    for name in ("disk.raw", "twin.raw"):
        _fill(os.path.join(directory, name), length)


def _qcow2_image(directory: str, length: int) -> None:
    """All clusters allocated, by writing them: preallocation alone would leave holes in the file."""
    path = os.path.join(directory, "disk.qcow2")
    output_of("qemu-img", "create", "-q", "-f", "qcow2", path, str(length))
    step = min(length, 64 << 20)
    for offset in range(0, length, step):
        output_of("qemu-io", "-f", "qcow2", "-c", f"write -q -P 0x5a {offset} {min(step, length - offset)}", path)


def _empty_qcow2_image(directory: str, length: int) -> None:
    output_of("qemu-img", "create", "-q", "-f", "qcow2", os.path.join(directory, "disk.qcow2"), str(EMPTY_LENGTH))


def _fill(path: str, length: int) -> None:
    block = b"\x5a" * (1 << 20)
    with open(path, "wb") as file:
        for offset in range(0, length, len(block)):
            file.write(block[: length - offset])


def write_page_by_page(directory: str) -> None:
    """Have the page cache hold the images in pages.

    What was written in one piece lies there in one large folio, and ext4 (Linux 6.18) takes up to 9 us for a 4 KiB
    write into such a one, 1.8 us into a page: for all servers alike, and more than there is to measure.
    """
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        with open(path, "rb") as image, open(path + ".pages", "wb", buffering=0) as copy:
            while block := image.read(4096):
                if block.count(0) == len(block):
                    copy.seek(len(block), os.SEEK_CUR)
                else:
                    copy.write(block)
            copy.truncate(os.path.getsize(path))
        os.replace(path + ".pages", path)


def _file(directory: str, name: str = "disk.raw", **options: Any) -> Options:
    return {"driver": "file", "filename": os.path.join(directory, name), **options}


def _raw(file: Options) -> Options:
    return {"driver": "raw", "file": file}


def _qcow2(file: Options) -> Options:
    return {"driver": "qcow2", "file": file}


def _direct(aio: str) -> Callable[[str, int], Options]:
    return lambda directory, length: _raw(_file(directory, aio=aio, cache={"direct": True}))


def _blkdebug(image: Options, rules: bool) -> Options:
    options: Options = {"driver": "blkdebug", "image": image}
    if rules:
        # Armed at every read and write, and never matching: no request reaches that far.
        sector = (1 << 60) // 512
        options["inject-error"] = [
            {"event": event, "sector": sector, "errno": 5} for event in ("none", "read_aio", "write_aio")
        ]
    return options


STACKS = {
    "null-co": Stack(
        "null-co: the transport alone",
        _no_images,
        lambda directory, length: {"driver": "null-co", "size": length},
    ),
    "raw": Stack(
        "raw over file, in the host's page cache",
        _raw_image,
        lambda directory, length: _raw(_file(directory)),
        bare=True,
    ),
    "passthrough": Stack(
        "raw over file, passed through by the kernel, fio without O_DIRECT",
        _raw_image,
        lambda directory, length: _raw(_file(directory)),
        bare=True,
        shared=True,
        servers=("fusebd-devfuse",),
        fusebd=("--cache", f"{NODE}=passthrough"),
        fio={"direct": "0"},
    ),
    "qcow2": Stack(
        "qcow2 with all clusters allocated",
        _qcow2_image,
        lambda directory, length: _qcow2(_file(directory, "disk.qcow2")),
    ),
    "qcow2-empty": Stack(
        "qcow2, empty: each write allocates",
        _empty_qcow2_image,
        lambda directory, length: _qcow2(_file(directory, "disk.qcow2")),
        cells=("seqwrite-4k-qd16", "randwrite-4k-qd1", "randwrite-4k-qd16", "write-1m"),
        fresh=True,
    ),
    "qcow2-blkdebug": Stack(
        "qcow2 over blkdebug without rules",
        _qcow2_image,
        lambda directory, length: _qcow2(_blkdebug(_file(directory, "disk.qcow2"), rules=False)),
    ),
    "qcow2-blkdebug-rules": Stack(
        "qcow2 over blkdebug with rules of which none matches",
        _qcow2_image,
        lambda directory, length: _qcow2(_blkdebug(_file(directory, "disk.qcow2"), rules=True)),
    ),
    "raw-blkdebug": Stack(
        "raw over blkdebug without rules",
        _raw_image,
        lambda directory, length: _raw(_blkdebug(_file(directory), rules=False)),
    ),
    "raw-blkdebug-rules": Stack(
        "raw over blkdebug with rules of which none matches",
        _raw_image,
        lambda directory, length: _raw(_blkdebug(_file(directory), rules=True)),
    ),
    "raw-fault": Stack(
        "raw over fault without rules",
        _raw_image,
        lambda directory, length: _raw({"driver": "fault", "file": _file(directory)}),
        servers=FUSEBD,
    ),
    "raw-fault-rules": Stack(
        "raw over fault with rules for reads and writes elsewhere",
        _raw_image,
        lambda directory, length: _raw({"driver": "fault", "file": _file(directory), "rules": _ELSEWHERE}),
        servers=FUSEBD,
    ),
    "blkverify": Stack(
        "blkverify of raw against a file",
        _two_raw_images,
        lambda directory, length: {
            "driver": "blkverify",
            "test": _raw(_file(directory)),
            "raw": _file(directory, "twin.raw"),
        },
    ),
    "direct-io_uring": Stack(
        "raw over file, cache.direct=on, cold (qemu-storage-daemon: aio=io_uring)",
        _raw_image,
        _direct("io_uring"),
        cells=("randread-4k-qd16",),
        bare=True,
        cold=True,
        fio={"direct": "1"},
    ),
    "direct-native": Stack(
        "raw over file, cache.direct=on, cold (qemu-storage-daemon: aio=native)",
        _raw_image,
        _direct("native"),
        cells=("randread-4k-qd16",),
        bare=True,
        cold=True,
        fio={"direct": "1"},
    ),
}
#: the stacks that a run without --stacks measures
USUAL_STACKS = tuple(
    name for name in STACKS if not name.endswith("-rules") and name not in ("raw-blkdebug", "raw-fault")
)
#: each with those that add a filter to it: what ``filters`` compares
FILTERED = {
    "raw": ("raw-blkdebug", "raw-blkdebug-rules", "raw-fault", "raw-fault-rules"),
    "qcow2": ("qcow2-blkdebug", "qcow2-blkdebug-rules"),
}


@dataclass(frozen=True)
class Cell:
    """A load.  ``requests`` bounds it on stacks that are filled while it runs."""

    rw: str
    block_size: str
    depth: int
    requests: int

    @property
    def sequential(self) -> bool:
        """Whether the figure of interest is the bandwidth."""
        return self.block_size == "1m"


CELLS = {
    "randread-4k-qd1": Cell("randread", "4k", 1, 0),
    "randread-4k-qd16": Cell("randread", "4k", 16, 0),
    "randwrite-4k-qd1": Cell("randwrite", "4k", 1, 20_000),
    "randwrite-4k-qd16": Cell("randwrite", "4k", 16, 30_000),
    "read-1m": Cell("read", "1m", 1, 0),
    "write-1m": Cell("write", "1m", 1, 1024),
    "read-1m-qd16": Cell("read", "1m", 16, 0),
    "write-1m-qd16": Cell("write", "1m", 16, 1024),
    "seqwrite-4k-qd16": Cell("write", "4k", 16, 100_000),
}
#: the cells that a run without --cells measures, on stacks that name none themselves
USUAL_CELLS = tuple(CELLS)[:6]
