"""A power cut can be repeated: the same seed and the same requests leave the same bytes, and the same ledger."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path

from mounting import Mount, run
from powercuts import cached, cut_later, cut_now

LENGTH = 16 << 20
UUID = "7b1f1f0e-6a58-4f0c-8e0d-9f27a7c7d0f1"
#: no time of the day gets into the file system
ENVIRONMENT = {**os.environ, "E2FSPROGS_FAKE_TIME": "1700000000", "E2FSCK_TIME": "1700000000"}


def _put_files(disk: Path, directory: Path, prefix: str, expect: tuple[int, ...]) -> None:
    """Write files into the file system on *disk*, with debugfs."""
    (directory / "source").write_bytes(random.Random(7).randbytes(300000))
    (directory / "commands").write_text("".join(f"write {directory}/source {prefix}{n}\n" for n in range(8)))
    run("debugfs", "-w", "-f", directory / "commands", disk, env=ENVIRONMENT, expect=expect)


def _cut_twice(mount: Callable[..., Mount], directory: Path, number: int, seed: int) -> tuple[str, bytes]:
    """A digest of the image after two power cuts, and what the ledger says of them."""
    image, ledger = directory / f"{number}.raw", directory / f"{number}.ledger"
    with open(image, "wb") as file:
        file.truncate(LENGTH)
    mounted = mount(cached(image, seed=seed), name=f"mnt{number}")
    mounted.qmp("ledger-open", {"filename": str(ledger), "time": False})
    options = f"hash_seed={UUID},lazy_itable_init=0,nodiscard"
    disk = mounted / "disk"
    run("mke2fs", "-q", "-F", "-t", "ext4", "-U", UUID, "-E", options, disk, env=ENVIRONMENT)
    cut_later(mounted, 40, torn=0.5)
    _put_files(disk, directory, "first", expect=(0, 1))
    assert not mounted.qmp("query-volatile-cache", {"node-name": "disk"})["power"]
    mounted.qmp("power-on", {"node-name": "disk"})
    run("e2fsck", "-f", "-y", disk, env=ENVIRONMENT, expect=(0, 1))
    # What comes now stays in the cache until the end.
    mounted.qmp("fault-rule-add", {"node-name": "disk", "rule": {"action": "lying-flush"}})
    _put_files(disk, directory, "second", expect=(0,))
    cut_now(mounted, torn=0.5)
    mounted.qmp("power-on", {"node-name": "disk"})
    mounted.umount()
    return hashlib.sha256(image.read_bytes()).hexdigest(), ledger.read_bytes()


def test_the_same_seed_twice_leaves_the_same_image_and_the_same_ledger(
    mount: Callable[..., Mount], tmp_path: Path
) -> None:
    (image, ledger), again, other = (_cut_twice(mount, tmp_path, n, seed) for n, seed in enumerate((1, 1, 2)))
    assert ledger.count(b'"torn"') > 5
    assert ledger.count(b'"dropped"') > 5
    assert again == (image, ledger)
    assert other[0] != image
    assert other[1] != ledger
