"""qcow2 images through a mount, judged by qemu-img."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import Mount, check_image, qcow2, run

CLUSTER_SIZES = [1 << bits for bits in range(9, 22)]
LENGTH = (12 << 20) + 3 * 512
WRITES = 40


def _create(path: Path, compat: str, cluster_size: int, backing: Path | None) -> None:
    options = ["-F", "qcow2", "-b", str(backing)] if backing else []
    run(
        "qemu-img", "create", "-q", "-f", "qcow2", *options,
        "-o", f"compat={compat},cluster_size={cluster_size}", path, str(LENGTH),
    )  # fmt: skip


def _backing(path: Path, length: int) -> Path:
    """An image with data, zeroes and holes, shorter than its overlays."""
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(length))
    commands = ["write -P 17 0 1M", "write -P 34 3M 700k", "write -z 3200k 96k", f"write -P 51 {length - 5000} 5000"]
    run("qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), path)
    return path


def _write_at_random(seed: int, *paths: Path) -> None:
    """The same writes into each of *paths*, of all sizes and at any offset."""
    rng = random.Random(seed)
    descriptors = [os.open(path, os.O_RDWR) for path in paths]
    for _ in range(WRITES):
        offset = rng.randrange(LENGTH)
        if rng.random() < 0.5:
            offset &= ~4095
        data = rng.randbytes(min(int(2 ** rng.uniform(0, 18)), LENGTH - offset))
        for descriptor in descriptors:
            assert os.pwrite(descriptor, data, offset) == len(data)
    for descriptor in descriptors:
        os.fsync(descriptor)
        os.close(descriptor)


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_images_of_every_cluster_size_are_right_after_random_writes(
    mount: Callable[..., Mount], tmp_path: Path, compat: str, backed: bool
) -> None:
    backing = _backing(tmp_path / "backing.qcow2", 7 << 20) if backed else None
    images = {size: tmp_path / f"{size}.qcow2" for size in CLUSTER_SIZES}
    mirrors = {size: tmp_path / f"{size}.raw" for size in CLUSTER_SIZES}
    for size, image in images.items():
        _create(image, compat, size, backing)
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, mirrors[size])
    mounted = mount(*(qcow2(f"disk{size}", image) for size, image in images.items()))
    for size in CLUSTER_SIZES:
        _write_at_random(size, mounted / f"disk{size}", mirrors[size])
        assert (mounted / f"disk{size}").read_bytes() == mirrors[size].read_bytes(), f"cluster size {size}"
    mounted.umount()
    for size, image in images.items():
        check_image(image)
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", mirrors[size], image)


def test_images_that_qemu_io_wrote_read_back(mount: Callable[..., Mount], tmp_path: Path) -> None:
    images = [tmp_path / f"disk{size}.qcow2" for size in CLUSTER_SIZES]
    for number, image in enumerate(images):
        _create(image, "1.1", CLUSTER_SIZES[number], None)
        rng = random.Random(number)
        words = []
        for _ in range(12):
            offset, length = rng.randrange(LENGTH // 512) * 512, rng.randrange(1, 600) * 512
            kind = rng.choice(["write -q -P 1", "write -q -P 99", "write -q -z", "write -q -z -u", "discard -q"])
            words += ["-c", f"{kind} {offset} {min(length, LENGTH - offset)}"]
        run("qemu-io", "-f", "qcow2", "-d", "unmap", *words, image)
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, image.with_suffix(".raw"))
    mounted = mount(*(qcow2(image.stem, image, **{"read-only": True}) for image in images))
    for image in images:
        assert (mounted / image.stem).read_bytes() == image.with_suffix(".raw").read_bytes(), image.stem
    mounted.umount()


def test_compressed_images_read_back(mount: Callable[..., Mount], tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(b"".join(bytes([number % 251]) * 3000 for number in range(2000)))
    image = tmp_path / "compressed.qcow2"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", source, image)
    mounted = mount(qcow2("disk", image))
    assert (mounted / "disk").read_bytes()[: source.stat().st_size] == source.read_bytes()
    mounted.umount()
    check_image(image)


def test_a_written_compressed_image_is_right(mount: Callable[..., Mount], tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(bytes(1000) * 3 + b"text" * ((LENGTH - 3000) // 4))
    image = tmp_path / "compressed.qcow2"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", source, image)
    mounted = mount(qcow2("disk", image))
    _write_at_random(1, mounted / "disk", source)
    mounted.umount()
    check_image(image)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, image)
