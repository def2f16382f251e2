"""Every kind of qcow2 image that qemu-img makes: fusebd and QEMU read in it what both have written.

A kind is one value for each of ``AXES``.  There are 74,517, and FUSEBD_LONG=1 takes them all, which lasts for many
hours; a usual run takes so many that any two values that can go together meet in one of them, or that each is in one.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from images import SECRET, create_encrypted, io
from mounting import run
from support import READ_WRITE, read, root_of, write

from fusebd.block.child import COMPRESSED, MAY_UNMAP
from fusebd.block.graph import Graph
from fusebd.block.root import Root

LONG = bool(os.environ.get("FUSEBD_LONG"))
SEED = 1
ROUNDS = 10

# --- kinds of images -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """How an image is made: options of ``qemu-img create``, but for ``data_file``, ``encrypt`` and ``backing``."""

    compat: str
    cluster_size: int
    refcount_bits: int
    compression_type: str
    data_file: str  #: "none", "plain" or "raw"
    lazy_refcounts: str
    preallocation: str
    extended_l2: str
    encrypt: str  #: the format of the encryption, or "none"
    backing: str  #: the format of the backing file, or "none"

    def __str__(self) -> str:
        return "-".join(f"{value}" for value in vars(self).values())

    @property
    def size(self) -> int:
        """Of the disk, in bytes: several L2 tables of small clusters, and never a whole number of clusters."""
        return max(300 << 10, self.cluster_size * 5 // 2) + 1536

    @property
    def backing_size(self) -> int:
        return self.size * 2 // 3 // 512 * 512

    @property
    def compresses(self) -> bool:
        """Whether a cluster that was used before can be compressed."""
        return self.data_file == "none" and self.encrypt == "none" and self.discards

    @property
    def discards(self) -> bool:
        """Whether what is discarded reads as zeroes, rather than as before."""
        return self.compat != "0.10" or self.backing == "none"

    def create(self, path: Path, backing: Callable[[str, int], Path]) -> Path:
        """A new image at *path*."""
        options = {name: value for name, value in vars(self).items() if name not in ("data_file", "encrypt", "backing")}
        if self.data_file != "none":
            options["data_file"] = data_file(path)
            options["data_file_raw"] = "on" if self.data_file == "raw" else "off"
        if self.encrypt != "none":
            options |= {"encrypt.format": self.encrypt, "encrypt.key-secret": "key"}
        if self.encrypt == "luks":
            options["encrypt.iter-time"] = 10
        words: list[str | Path] = []
        if self.backing != "none":
            words = ["-b", backing(self.backing, self.backing_size), "-F", self.backing]
        return create_encrypted(path, self.size, *words, **options)


AXES: dict[str, tuple[Any, ...]] = {
    "compat": ("1.1", "0.10"),
    "cluster_size": tuple(512 << shift for shift in range(13)),
    "refcount_bits": (16, 1, 2, 4, 8, 32, 64),
    "compression_type": ("zlib", "zstd"),
    "data_file": ("none", "plain", "raw"),
    "lazy_refcounts": ("off", "on"),
    "preallocation": ("off", "metadata", "falloc", "full"),
    "extended_l2": ("off", "on"),
    "encrypt": ("none", "aes", "luks"),
    "backing": ("none", "raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed"),
}
_NOT_16, _BACKED = {1, 2, 4, 8, 32, 64}, set(AXES["backing"]) - {"none"}
#: what qemu-img says of kinds that have one of the values on each of the axes
REFUSED: dict[str, dict[str, set[Any]]] = {
    "Different refcount widths than 16 bits require compatibility level 1.1": {
        "compat": {"0.10"}, "refcount_bits": _NOT_16,
    },
    "Non-zlib compression type is only supported with compatibility level 1.1": {
        "compat": {"0.10"}, "compression_type": {"zstd"},
    },
    "External data files are only supported with compatibility level 1.1": {
        "compat": {"0.10"}, "data_file": {"plain", "raw"},
    },
    "Lazy refcounts only supported with compatibility level 1.1": {"compat": {"0.10"}, "lazy_refcounts": {"on"}},
    "Extended L2 entries are only supported with compatibility level 1.1": {"compat": {"0.10"}, "extended_l2": {"on"}},
    "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes": {
        "cluster_size": {512, 1024, 2048, 4096, 8192}, "extended_l2": {"on"},
    },
    "Backing file and data-file-raw cannot be used at the same time": {"data_file": {"raw"}, "backing": _BACKED},
    "Backing file and preallocation can only be used at the same time if extended_l2": {
        "preallocation": {"metadata", "falloc", "full"}, "extended_l2": {"off"}, "backing": _BACKED,
    },
}  # fmt: skip


def refusals(values: dict[str, Any]) -> list[str]:
    """What qemu-img has against a kind that has *values*, which need not be all."""
    return [
        message for message, refused in REFUSED.items() if all(values.get(axis) in refused[axis] for axis in refused)
    ]


def all_kinds() -> list[Kind]:
    """All that qemu-img makes."""
    found: list[dict[str, Any]] = [{}]
    for axis, values in AXES.items():
        found = [more for some in found for value in values if not refusals(more := {**some, axis: value})]
    return [Kind(**values) for values in found]


def drawn(rng: random.Random, values: dict[str, Any]) -> Kind:
    """One that qemu-img makes, with *values*, some of which there are."""
    while True:
        found = dict(values)
        for axis in (axis for axis in AXES if axis not in values):
            possible = [value for value in AXES[axis] if not refusals({**found, axis: value})]
            if not possible:
                break
            found[axis] = rng.choice(possible)
        else:
            return Kind(**{axis: found[axis] for axis in AXES})


def sample(strength: int) -> list[Kind]:
    """Some that qemu-img makes: any *strength* values that can be together are so in one of these."""

    def met_in(kind: Kind) -> set[tuple[tuple[str, Any], ...]]:
        return set(itertools.combinations(vars(kind).items(), strength))

    rng = random.Random(SEED)
    every = [(axis, value) for axis, values in AXES.items() for value in values]
    wanted = {
        values
        for values in itertools.combinations(every, strength)
        if len(dict(values)) == strength and not refusals(dict(values))
    }
    chosen = []
    while wanted:
        candidates = [drawn(rng, dict(min(wanted))) for _ in range(20)]
        # qemu-img takes two seconds to find out how many iterations a password of LUKS gets
        best = max(candidates, key=lambda kind: len(wanted & met_in(kind)) / (4 if kind.encrypt == "luks" else 1))
        wanted -= met_in(best)
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_left_out_is_what_qemu_img_refuses(tmp_path: Path, message: str) -> None:
    rng = random.Random(SEED)
    drawn = ({axis: rng.choice(AXES[axis]) for axis in AXES} for _ in range(100_000))
    for values in itertools.islice((values for values in drawn if refusals(values) == [message]), 5):
        with pytest.raises(AssertionError, match=message):
            Kind(**values).create(
                tmp_path / "image", lambda image_format, size: backing_file(tmp_path, image_format, size)
            )


# --- their images --------------------------------------------------------------------------------


def data_file(path: Path) -> Path:
    return path.with_suffix(".data")


@cache
def backing_file(directory: Path, image_format: str, size: int) -> Path:
    """A disk of *size* bytes, or what the format makes of that, half of which has data."""
    path = directory / f"backing{size}.{image_format}"
    raw = directory / f"backing{size}.raw"
    with raw.open("wb") as file:
        file.truncate(size)
        step = max(size // 8 // 512 * 512, 512)
        for offset in range(0, size, 2 * step):
            file.seek(offset)
            file.write(random.Random(offset).randbytes(min(step, size - offset)))
    if image_format != "raw":
        run("qemu-img", "convert", "-f", "raw", "-O", image_format, raw, path)
    return path


@pytest.fixture(scope="module")
def backing(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Backing files, of a format and a length."""
    directory = tmp_path_factory.mktemp("backing")
    return lambda image_format, size: backing_file(directory, image_format, size)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory that is gone afterwards: thousands of images would fill the disk."""
    yield tmp_path
    shutil.rmtree(tmp_path)


# --- their use -----------------------------------------------------------------------------------

#: how fusebd opens an image, as chance has it
OPTIONS: list[dict[str, Any]] = [{}, {"cache-size": 0}, {"overlap-check": "all"}]


def image_of(kind: Kind, path: Path) -> dict[str, Any]:
    """The options by which QEMU and fusebd open the image."""
    image: dict[str, Any] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
    if kind.encrypt != "none":
        image["encrypt"] = {"format": kind.encrypt, "key-secret": "key"}
    return image


def name_of(kind: Kind, path: Path) -> str:
    """What QEMU's programs open."""
    return f"json:{json.dumps(image_of(kind, path))}" if kind.encrypt != "none" else str(path)


@dataclass
class Disk:
    """An image at *path*, and in ``model`` what it has to contain.

    No power is cut here, so that nobody need wait for the medium.
    """

    kind: Kind
    path: Path
    model: bytearray
    rng: random.Random

    def somewhere(self) -> tuple[int, int]:
        """Offset and length of a request; often they are those of clusters."""
        size, cluster = len(self.model), self.kind.cluster_size
        start = self.rng.choice([self.rng.randrange(size), self.rng.randrange(size) // cluster * cluster])
        length = self.rng.choice([1, 512, 4096, cluster, cluster, 3 * cluster, 40_000])
        return start, min(length, size - start)

    def whole_clusters(self) -> tuple[int, int]:
        """Offset and length of one or two clusters, of which the last one may be incomplete."""
        cluster = self.kind.cluster_size
        start = self.rng.randrange(len(self.model)) // cluster * cluster
        return start, min(self.rng.randint(1, 2) * cluster, len(self.model) - start)

    def set(self, start: int, data: bytes) -> None:
        self.model[start : start + len(data)] = data

    def check(self) -> None:
        """AssertionError if QEMU does not find an image without errors and leaks that contains the model."""
        run("qemu-img", "check", *SECRET, "-f", "qcow2", name_of(self.kind, self.path))
        mirror = self.path.with_suffix(".raw")
        mirror.write_bytes(self.model)
        said = run("qemu-img", "compare", *SECRET, "-f", "qcow2", "-F", "raw", name_of(self.kind, self.path), mirror)
        assert said == "Images are identical.\n"  # and no warning that one is longer
        if self.kind.data_file == "raw" and self.kind.encrypt == "none":
            data = data_file(self.path).read_bytes()
            assert data[: len(self.model)] == self.model
            assert not any(data[len(self.model) :])  # the rest of the last cluster

    def use_qemu(self, count: int) -> None:
        """Random requests by qemu-io, and some compressed clusters."""
        commands = []
        for _ in range(count):
            action = self.rng.choice(["write", "write", "write -z", "write -z -u", "discard"])
            start, length = self.whole_clusters() if action == "discard" else self.somewhere()
            if action == "write":
                pattern = self.rng.randrange(1, 256)
                commands.append(f"write -P {pattern} {start} {length}")
                self.set(start, bytes([pattern]) * length)
            else:
                commands.append(f"{action} {start} {length}")
                if action != "discard" or self.kind.discards:
                    self.set(start, bytes(length))
        self._io(*commands)
        if self.kind.compresses:
            self._compress()

    def _compress(self) -> None:
        """In a process of its own, and once in it: QEMU 10.0.2 puts compressed data where freed ones were, even if the
        place was given to others since.
        """
        start, length = self.whole_clusters()
        pattern = self.rng.randrange(1, 256)
        # only a cluster that has no place yet can be compressed
        self._io(f"discard {start} {length}", f"write -c -P {pattern} {start} {length}")
        self.set(start, bytes([pattern]) * length)

    def _io(self, *commands: str) -> None:
        io(name_of(self.kind, self.path), *commands, options=("-t", "unsafe", *SECRET))

    async def use_fusebd(self, count: int) -> None:
        """Read it all, and do random requests."""
        graph = Graph()
        try:
            await graph.objects.add({"qom-type": "secret", "id": "key", "data": "open sesame"})
            image = image_of(self.kind, self.path)
            options = {"discard": "unmap", "cache": {"no-flush": True}, **self.rng.choice(OPTIONS)}
            await graph.blockdev_add({**image, "node-name": "disk", **options})
            root = root_of(graph, "disk", READ_WRITE)
            assert root.length == len(self.model)
            assert await read(root, 0, len(self.model)) == self.model
            for _ in range(count):
                await self._request(root)
            await graph.detach_root(root)
        finally:
            await graph.close()
        assert not graph.close_failures

    async def _request(self, root: Root) -> None:
        action = self.rng.choice(
            ["write", "write", "write", "zero", "unmap", "discard", "compress", "read", "read", "flush"]
        )
        start, length = self.whole_clusters() if action in ("discard", "compress") else self.somewhere()
        if action == "write":
            data = self.rng.randbytes(length)
            self.set(start, data)
            await write(root, start, data)
        elif action in ("zero", "unmap"):
            self.set(start, bytes(length))
            await root.pwrite_zeroes(start, length, MAY_UNMAP if action == "unmap" else 0)
        elif action == "discard":
            if self.kind.discards:
                self.set(start, bytes(length))
            await root.pdiscard(start, length)
        elif action == "compress":
            if self.kind.compresses:
                data = (self.rng.randbytes(self.rng.randrange(1, 100)) * length)[:length]
                self.set(start, data)
                await root.pdiscard(start, length)
                await root.pwritev(start, (memoryview(data),), COMPRESSED)
        elif action == "read":
            assert await read(root, start, length) == self.model[start : start + length]
        else:
            await root.flush()


def new_disk(kind: Kind, directory: Path, backing: Callable[[str, int], Path]) -> Disk:
    """A new image; half of it has data that QEMU has written, compressed if it can."""
    path = kind.create(directory / "image", backing)
    raw = directory / "image.raw"
    run("qemu-img", "convert", *SECRET, "-f", "qcow2", "-O", "raw", name_of(kind, path), raw)
    disk = Disk(kind, path, bytearray(raw.read_bytes()), random.Random(f"{kind}"))
    disk.use_qemu(8)
    return disk


@pytest.mark.parametrize("kind", all_kinds() if LONG else sample(2), ids=str)
async def test_random_requests_leave_what_they_wrote(
    directory: Path, backing: Callable[[str, int], Path], kind: Kind
) -> None:
    disk = new_disk(kind, directory, backing)
    await disk.use_fusebd(40)
    disk.check()


@pytest.mark.parametrize("kind", all_kinds() if LONG else sample(1), ids=str)
async def test_fusebd_and_qemu_take_turns(directory: Path, backing: Callable[[str, int], Path], kind: Kind) -> None:
    disk = new_disk(kind, directory, backing)
    for _ in range(ROUNDS):
        await disk.use_fusebd(12)
        disk.check()
        disk.use_qemu(6)
        disk.check()
