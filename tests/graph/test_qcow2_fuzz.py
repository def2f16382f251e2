"""qcow2 images cut short or changed at random open or are refused: never another error, a hang, or much memory."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
from collections.abc import AsyncIterator, Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from images import SECRET, create, create_encrypted, info, io, u32, u64
from mounting import run
from msgspec import UNSET
from support import READ_WRITE, read, root_of, write

from fusebd.block import snapshots
from fusebd.block.blockstatus import block_status_above
from fusebd.block.child import MAY_UNMAP
from fusebd.block.graph import Graph
from fusebd.block.perms import Perm
from fusebd.errors import FusebdError
from fusebd.ondisk import qcow2 as ondisk

pytestmark = pytest.mark.usefixtures("limited_memory")


#: twenty thousand images of each kind, rather than hundreds
LONG = bool(os.environ.get("FUSEBD_LONG"))


def disk(path: Path, encryption: str, *, read_only: bool) -> dict[str, Any]:
    encrypt = {"encrypt": {"format": encryption, "key-secret": "key"}} if encryption else {}
    return {
        **encrypt,
        "driver": "qcow2",
        "node-name": "disk",
        "discard": "unmap",
        "read-only": read_only,
        "cache": {"no-flush": True},
        "file": {"driver": "file", "filename": str(path)},
    }


@contextlib.asynccontextmanager
async def graph_with_secret() -> AsyncIterator[Graph]:
    graph = Graph()
    await graph.objects.add({"qom-type": "secret", "id": "key", "data": "open sesame"})
    try:
        yield graph
    finally:
        await graph.close()


async def exercise_what_is_kept(path: Path, encryption: str) -> bool:
    """Open the image and do a little with its snapshots and bitmaps; whether it could be opened."""
    async with graph_with_secret() as graph:
        try:
            node = await graph.blockdev_add(disk(path, encryption, read_only=False))
        except FusebdError:
            return False
        store = snapshots.store_of(node)
        assert store is not None
        names = [entry.name for entry in store.entries]
        reader = {"driver": "internal-snapshot", "node-name": "reader", "image": "disk", "read-only": True}
        for name in (*names[:2], "new"):
            with contextlib.suppress(FusebdError):
                await graph.blockdev_add({**reader, "snapshot-name": name})
                root = root_of(graph, "reader", Perm.CONSISTENT_READ)
                with contextlib.suppress(FusebdError):
                    await read(root, 0, min(root.length, 100 << 10))
                await graph.detach_root(root)
            with contextlib.suppress(FusebdError):
                await graph.blockdev_del("reader")
            with contextlib.suppress(FusebdError):
                async with graph.lock, graph.drained(node):
                    await snapshots.create(graph, "disk", f"{name}-again")
            root = root_of(graph, "disk", READ_WRITE)
            with contextlib.suppress(FusebdError):
                await write(root, 0, b"x" * min(5000, root.length))
            await graph.detach_root(root)
            for bitmap in list(node.dirty_bitmaps)[:1]:
                with contextlib.suppress(FusebdError):
                    assert node.driver.bitmap_store is not None
                    await node.driver.bitmap_store.remove(bitmap.name)
                node.dirty_bitmaps.remove(bitmap)
            with contextlib.suppress(FusebdError):
                await snapshots.apply(graph, "disk", None, name)
            with contextlib.suppress(FusebdError):
                await snapshots.delete(graph, "disk", None, name)
        return True


async def exercise(path: Path, encryption: str, *, read_only: bool, check: bool = False) -> bool:
    """Open the image and do a little of everything, *check* it if asked to; whether it could be opened.

    Only FusebdErrors are expected.
    """
    async with graph_with_secret() as graph:
        try:
            node = await graph.blockdev_add(disk(path, encryption, read_only=read_only))
        except FusebdError:
            return False
        root = root_of(graph, "disk", Perm.CONSISTENT_READ if read_only else READ_WRITE | Perm.RESIZE)
        length = root.length
        part = min(length, 40 << 10)
        requests: list[Any] = [read(root, 0, part), read(root, length - part, part)]
        if not read_only and part:
            requests += [
                write(root, part // 2, b"x" * (part // 3)),
                root.pwrite_zeroes(0, part // 4, MAY_UNMAP),
                root.pdiscard(part // 4, part // 4),
                root.flush(),
                root.truncate(length // 2 // 512 * 512),
                root.truncate(length),
                write(root, length - part, b"y" * part),
                read(root, 0, part),
            ]
        for request in requests:
            with contextlib.suppress(FusebdError):
                await request
        with contextlib.suppress(FusebdError):
            await block_status_above(node, 0, length)
        if check:
            command = node.driver.commands["blockdev-check"]
            for fix in (UNSET,) if read_only else (UNSET, "all"):
                with contextlib.suppress(FusebdError):
                    await command.method(node.driver, command.arguments(fix=fix))
        return True


#: small images that have everything: how each is made
KINDS: dict[str, dict[str, Any]] = {
    "v3": {"cluster_size": 512},
    "v2": {"cluster_size": 512, "compat": "0.10"},
    "wide": {"cluster_size": 1024, "refcount_bits": 64, "lazy_refcounts": "on"},
    "subclusters": {"cluster_size": "16k", "extended_l2": "on"},
    "luks": {"cluster_size": 4096, "encrypt.format": "luks", "encrypt.iter-time": 10},
    "aes": {"cluster_size": 512, "encrypt.format": "aes"},
}
Small = Callable[[str], tuple[Path, str]]


def encryption_of(name: str) -> str:
    return str(KINDS[name].get("encrypt.format", ""))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """The image of a name in KINDS, and the format of its encryption, if it has any."""
    directory = tmp_path_factory.mktemp("small")
    base = create(directory / "base", "200k", cluster_size=512)
    io(base, "write -P 7 0 200k")

    @cache
    def image(name: str) -> tuple[Path, str]:
        encryption = encryption_of(name)
        secret = {"encrypt.key-secret": "key"} if encryption else {}
        path = create_encrypted(directory / name, "256k", "-b", base, "-F", "qcow2", **KINDS[name], **secret)
        opened = named(path, encryption)
        compressed = [] if encryption else [f"write -c -P 2 64k {info(path)['cluster-size']}"]
        io(opened, "write -P 1 5k 30k", *compressed, "write -z 20k 4k", options=SECRET)
        run("qemu-img", "snapshot", *SECRET, "-c", "one", opened)
        io(opened, "write -P 3 10k 3k", options=SECRET)
        if name == "v3":
            run("qemu-img", "bitmap", "--add", path, "bitmap")
        return path, encryption

    return image


def named(path: Path, encryption: str) -> str:
    """What QEMU's programs open."""
    options = disk(path, encryption, read_only=False)
    return (
        f"json:{json.dumps({key: options[key] for key in ('driver', 'file', 'encrypt')})}" if encryption else str(path)
    )


@pytest.mark.parametrize("name", KINDS)
async def test_a_truncated_image_opens_or_is_refused(small: Small, tmp_path: Path, name: str) -> None:
    source, encryption = small(name)
    data = source.read_bytes()
    # LUKS has megabytes that mean nothing, and a guess at a password for each image
    lengths = set(range(0, len(data), len(data) // 50 + 1))
    if encryption != "luks":
        lengths |= {*range(0, 130, 3), *range(0, len(data), 509), *range(0, 16384, 256)}
    opened = 0
    for length in sorted(lengths):
        path = tmp_path / "image"
        path.write_bytes(data[:length])
        opened += await exercise(path, encryption, read_only=bool(length % 2))
    assert 0 < opened < len(lengths)


#: words that tend to hurt
NASTY = [0, 1, 2, 0x1FF, 0x200, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 512, 2**63, 2**64 - 512, 2**64 - 1]


def mutated(data: bytes, rng: random.Random, tables: list[int]) -> bytes:
    """*data* with some bytes, words and flags changed, mostly where metadata is: in the header or one of *tables*."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        start = rng.choice([0, 0, *tables])
        at = start + rng.randrange(112 if not start else 512)
        at = min(at, len(changed) - 8)
        kind = rng.randrange(5)
        if kind == 0:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            at &= ~7
            changed[at : at + 8] = u64(rng.choice(NASTY))
        elif kind == 3:
            at &= ~3
            changed[at : at + 4] = u32(rng.choice(NASTY) % 2**32)
        else:
            at &= ~7
            other = rng.randrange(0, len(data) - 8, 8)
            changed[at : at + 8] = data[other : other + 8]
    return bytes(changed)


def with_iterations(changed: bytes, data: bytes, volume: int) -> bytes:
    """*changed*, with the iterations in the LUKS header at byte *volume* as in *data*: billions are no fault."""
    if not volume:
        return changed
    kept = bytearray(changed)
    for at in (volume + 164, *(volume + 208 + 48 * slot + 4 for slot in range(8))):
        kept[at : at + 4] = data[at : at + 4]
    return bytes(kept)


@pytest.mark.parametrize("name", KINDS)
async def test_a_mutated_image_opens_or_is_refused(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.CRITICAL)  # thousands of corruptions
    source, encryption = small(name)
    data = source.read_bytes()
    header = ondisk.parse_header(data[:112])
    tables = [header["refcount_table_offset"], header["l1_table_offset"], header["snapshots_offset"]]
    tables += [int.from_bytes(data[at : at + 8], "big") & ondisk.OFFSET_MASK for at in tables[:2]]
    volume = 0
    if encryption == "luks":
        place = data.index(u32(ondisk.EXT_CRYPTO_HEADER)) + ondisk.EXTENSION_HEADER_LENGTH
        volume = int.from_bytes(data[place : place + 8], "big")
        tables += [volume, volume]
    opened = 0
    path = tmp_path / "image"
    rounds = 20000 if LONG else 100 if encryption == "luks" else 1000
    for seed in range(rounds):
        path.write_bytes(with_iterations(mutated(data, random.Random(seed), tables), data, volume))
        try:
            opened += await exercise(path, encryption, read_only=seed % 4 == 0, check=seed % 8 == 7)
        except Exception as error:
            pytest.fail(f"seed {seed}: {error!r}")
    assert rounds / 10 < opened < rounds


@pytest.mark.parametrize("name", KINDS)
async def test_snapshots_and_bitmaps_of_a_mutated_image_are_used_or_refused(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.CRITICAL)
    path = tmp_path / "image"
    source, encryption = small(name)
    path.write_bytes(source.read_bytes())
    run("qemu-img", "snapshot", *SECRET, "-c", "two", named(path, encryption))
    if name == "v3":
        run("qemu-img", "bitmap", "--add", "-g", "512", path, "fine")
        io(path, "write 0 9k")
    data = path.read_bytes()
    header = ondisk.parse_header(data[:112])
    table = header["snapshots_offset"]
    tables = [table, table, int.from_bytes(data[table : table + 8], "big"), header["l1_table_offset"]]
    if name == "v3":
        directory = int.from_bytes(data[(at := data.index(u32(ondisk.EXT_BITMAPS)) + 24) : at + 8], "big")
        tables += [directory, directory, int.from_bytes(data[directory : directory + 8], "big")]
    opened = 0
    rounds = 20000 if LONG else 40 if encryption == "luks" else 150
    for seed in range(rounds):
        path.write_bytes(mutated(data, random.Random(seed), tables))
        try:
            opened += await exercise_what_is_kept(path, encryption)
        except Exception as error:
            pytest.fail(f"seed {seed}: {error!r}")
    assert rounds / 10 < opened < rounds
