"""Encrypted disks, LUKS by itself and inside of qcow2, and qcow2's AES, in turn with QEMU's programs."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import disks
import pytest
from disks import change, closed
from images import SECRET, create_encrypted, patch, u32
from mounting import run
from support import read, write

from fusebd.block.graph import Graph
from fusebd.block.root import Root
from fusebd.errors import FusebdError
from fusebd.ondisk import luks as ondisk

K = 1024
SIZE = 600 * K
FAST = {"iter-time": 10}
Maker = Callable[[Path, str], Path]

LUKS: dict[str, dict[str, Any]] = {
    "default": {},
    "cbc-essiv": {"cipher-mode": "cbc", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha256"},
    "cbc-plain": {"cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "plain", "hash-alg": "sha1"},
    "xts-128": {"cipher-alg": "aes-128", "hash-alg": "sha512"},
    "ecb": {"cipher-mode": "ecb"},
}
QCOW2: dict[str, dict[str, Any]] = {
    "luks": {"encrypt.format": "luks"},
    "luks-essiv": {"encrypt.format": "luks", **{f"encrypt.{name}": value for name, value in LUKS["cbc-essiv"].items()}},
    "luks-small": {"encrypt.format": "luks", "cluster_size": 4096},
    "luks-subclusters": {"encrypt.format": "luks", "cluster_size": "16k", "extended_l2": "on"},
    "luks-backed": {"encrypt.format": "luks", "backed": True},
    "luks-snapshot": {"encrypt.format": "luks", "snapshot": True, "backed": True},
    "luks-data-file": {"encrypt.format": "luks", "data_file": True},
    "luks-metadata": {"encrypt.format": "luks", "preallocation": "metadata"},
    "aes": {"encrypt.format": "aes"},
    "aes-v2": {"encrypt.format": "aes", "compat": "0.10", "backed": True},
    "aes-snapshot": {"encrypt.format": "aes", "snapshot": True, "cluster_size": 2048},
}


@pytest.fixture(scope="module")
def luks(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Makes a copy of the LUKS volume of a name in LUKS."""
    directory = tmp_path_factory.mktemp("luks")

    @cache
    def template(name: str) -> Path:
        return create_encrypted(
            directory / name, SIZE, image_format="luks", **{"key-secret": "key"}, **FAST, **LUKS[name]
        )

    return lambda path, name: Path(shutil.copy(template(name), path))


@pytest.fixture(scope="module")
def qcow2(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Makes a copy of the image of a name in QCOW2, or that image where a copy would share its data file."""

    @cache
    def template(name: str) -> Path:
        return new_qcow2(tmp_path_factory.mktemp(name) / name, name)

    def make(path: Path, name: str) -> Path:
        if "data_file" in QCOW2[name]:
            return new_qcow2(path, name)
        return Path(shutil.copy(template(name), path))

    return make


def new_qcow2(path: Path, name: str) -> Path:
    """The image of a name in QCOW2, with something in it."""
    options = dict(QCOW2[name])
    backed, snapshot, data_file = (options.pop(word, False) for word in ("backed", "snapshot", "data_file"))
    options["encrypt.key-secret"] = "key"
    if options["encrypt.format"] == "luks":
        options |= {f"encrypt.{word}": value for word, value in FAST.items()}
    if data_file:
        options["data_file"] = path.with_name("data")
    words: list[str | Path] = []
    if backed:
        backing = path.with_name("backing")
        backing.write_bytes(random.Random(0).randbytes(SIZE // 2))
        words = ["-b", backing, "-F", "raw"]
    create_encrypted(path, SIZE, *words, **options)
    io(path, "qcow2", "write -P 1 10k 100k", "write -z 200k 64k")
    if snapshot:
        run("qemu-img", "snapshot", *SECRET, "-c", "one", "--image-opts", opts(path, "qcow2"))
        io(path, "qcow2", "write -P 2 20k 10k")
    return path


def opts(path: Path, driver: str) -> str:
    """The image for ``--image-opts``."""
    prefix = "encrypt." if driver == "qcow2" else ""
    return f"driver={driver},file.filename={path},{prefix}key-secret=key"


def io(path: Path, driver: str, *commands: str, secret: tuple[str, str] = SECRET, expect: int = 0) -> str:
    words = [word for command in commands for word in ("-c", command)]
    return run("qemu-io", *secret, "--image-opts", opts(path, driver), *words, expect=(expect,))


def content(path: Path, driver: str) -> bytes:
    copy = path.with_name("content")
    run("qemu-img", "convert", *SECRET, "--image-opts", opts(path, driver), "-O", "raw", copy)
    return copy.read_bytes()


def check(path: Path) -> None:
    run("qemu-img", "check", *SECRET, "--image-opts", opts(path, "qcow2"))


async def with_secret(graph: Graph, text: str = "open sesame") -> None:
    await graph.objects.add({"qom-type": "secret", "id": "key", "data": text})


async def opened(graph: Graph, path: Path, driver: str, **options: Any) -> Root:
    key: Any = {"key-secret": "key"}
    if driver == "qcow2":
        key = {"encrypt": {"format": QCOW2_FORMAT[path.name], **key}}
    return await disks.opened(graph, path, driver=driver, **key, **options)


QCOW2_FORMAT = {name: str(options["encrypt.format"]) for name, options in QCOW2.items()}


@pytest.mark.parametrize("name", LUKS)
async def test_a_luks_disk_in_turn_with_qemu(graph: Graph, tmp_path: Path, luks: Maker, name: str) -> None:
    path = luks(tmp_path / name, name)
    await with_secret(graph)
    rng = random.Random(name)
    for round_ in range(3):
        model = bytearray(content(path, "luks"))
        root = await opened(graph, path, "luks")
        assert root.length == SIZE
        await change(root, model, rng, 12, 4096)
        assert await read(root, 0, len(model)) == model
        await closed(graph, root)
        assert content(path, "luks") == model
        io(path, "luks", f"write -P {round_ + 1} {round_ * 7}k 30k")
    assert b"open sesame" not in path.read_bytes()


@pytest.mark.parametrize("name", QCOW2)
async def test_an_encrypted_image_in_turn_with_qemu(graph: Graph, tmp_path: Path, name: str, qcow2: Maker) -> None:
    path = qcow2(tmp_path / name, name)
    await with_secret(graph)
    rng = random.Random(name)
    for round_ in range(4):
        model = bytearray(content(path, "qcow2"))
        root = await opened(graph, path, "qcow2")
        await change(root, model, rng, 12, 4096)
        assert await read(root, 0, len(model)) == model
        await write(root, 64 * K, b"plain text " * 1000)
        model[64 * K : 64 * K + 11000] = b"plain text " * 1000
        await closed(graph, root)
        check(path)
        assert content(path, "qcow2") == model
        io(path, "qcow2", f"write -P {round_ + 1} {round_ * 7}k 30k", f"write -z {round_ * 50}k 64k")
    for file in tmp_path.iterdir():
        if file.name not in ("content", "backing"):
            assert b"plain text " not in file.read_bytes()


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc"])
async def test_an_encrypted_image_grows_by_zeroes(
    graph: Graph, tmp_path: Path, preallocation: Any, qcow2: Maker
) -> None:
    path = qcow2(tmp_path / "luks", "luks")
    await with_secret(graph)
    model = content(path, "qcow2")
    root = await opened(graph, path, "qcow2")
    await root.truncate(2 * SIZE, prealloc=preallocation)
    assert await read(root, 0, 2 * SIZE) == model + bytes(SIZE)
    await closed(graph, root)
    check(path)
    assert content(path, "qcow2") == model + bytes(SIZE)


async def test_the_refcounts_of_a_dirty_image_are_made_anew(graph: Graph, tmp_path: Path, qcow2: Maker) -> None:
    """The encryption header has clusters of its own."""
    path = qcow2(tmp_path / "luks", "luks")
    model = content(path, "qcow2")
    patch(path, (72, struct.pack(">Q", 1)))
    await with_secret(graph)
    root = await opened(graph, path, "qcow2")
    assert await read(root, 0, SIZE) == model
    await closed(graph, root)
    check(path)


async def test_it_is_said_how_a_disk_is_encrypted(graph: Graph, tmp_path: Path, luks: Maker, qcow2: Maker) -> None:
    await with_secret(graph)
    volume = luks(tmp_path / "x", "cbc-essiv")
    for driver, path in (("luks", volume), ("qcow2", qcow2(tmp_path / "luks-essiv", "luks-essiv"))):
        root = await opened(graph, path, driver)
        ours = root.driver.format_info()
        await closed(graph, root)
        theirs = json.loads(run("qemu-img", "info", "--output=json", *SECRET, "--image-opts", opts(path, driver)))
        ours_data, theirs_data = ours["format-specific"]["data"], theirs["format-specific"]["data"]
        if driver == "qcow2":
            ours_data, theirs_data = ours_data["encrypt"], theirs_data["encrypt"]
        ours_data.pop("detached-header")  # since 9.0
        assert ours_data == theirs_data
        assert ours["encrypted"] is theirs["encrypted"] is True


async def test_a_header_in_another_node(graph: Graph, tmp_path: Path, luks: Maker) -> None:
    path = luks(tmp_path / "whole", "default")
    io(path, "luks", "write -P 7 0 600k")
    data = path.read_bytes()
    offset = ondisk.HEADER.parse(data[: ondisk.HEADER_LENGTH]).payload_offset
    header, payload = tmp_path / "header", tmp_path / "payload"
    header.write_bytes(data[: offset * 512])
    patch(header, (104, u32(0)))
    payload.write_bytes(data[offset * 512 :])
    await with_secret(graph)
    root = await opened(graph, payload, "luks", header={"driver": "file", "filename": str(header)})
    assert root.length == SIZE
    assert await read(root, 0, SIZE) == b"\7" * SIZE
    await closed(graph, root)


REFUSED: dict[str, tuple[str, list[tuple[int, bytes]]]] = {
    "wrong password": ("shut", []),
    "not luks": ("open sesame", [(0, b"LUKX")]),
    "version": ("open sesame", [(6, b"\0\2")]),
    "cipher": ("open sesame", [(8, b"serpant")]),
    "mode": ("open sesame", [(40, b"xtsplain64")]),
    "no such mode": ("open sesame", [(40, b"xyz-plain64")]),
    "no such vector": ("open sesame", [(40, b"xts-plain65")]),
    "hash": ("open sesame", [(72, b"sha257")]),
    "unending cipher": ("open sesame", [(8, b"a" * 32)]),
    "unending mode": ("open sesame", [(40, b"a" * 32)]),
    "unending hash": ("open sesame", [(72, b"a" * 32)]),
    "payload": ("open sesame", [(104, u32(1))]),
    "huge key": ("open sesame", [(108, u32(2**20))]),
    "iterations": ("open sesame", [(164, u32(0))]),
    "slot state": ("open sesame", [(208, u32(1))]),
    "slot iterations": ("open sesame", [(212, u32(0))]),
    "slot place": ("open sesame", [(248, u32(1))]),
    "slot far away": ("open sesame", [(248, u32(2**31))]),
    "stripes": ("open sesame", [(252, u32(4001))]),
    "no slot": ("open sesame", [(208, u32(0xDEAD))]),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_opened_is_refused_in_qemus_words(
    graph: Graph, tmp_path: Path, luks: Maker, name: str
) -> None:
    password, edits = REFUSED[name]
    path = patch(luks(tmp_path / "image", "default"), *edits)
    secret = ("--object", f"secret,id=key,data={password}")
    said = io(path, "luks", "read 0 512", secret=secret, expect=1)
    await with_secret(graph, password)
    with pytest.raises(FusebdError) as caught:
        await opened(graph, path, "luks")
    assert said.partition(": can't open: ")[2].splitlines()[0] == str(caught.value)
    assert list(graph.nodes) == []


async def test_options_have_to_fit_the_image(graph: Graph, tmp_path: Path, luks: Maker, qcow2: Maker) -> None:
    await with_secret(graph)
    plain = tmp_path / "plain"
    run("qemu-img", "create", "-q", "-f", "qcow2", plain, "1M")
    encrypted, aes = qcow2(tmp_path / "luks", "luks"), qcow2(tmp_path / "aes", "aes")
    cases: list[tuple[Path, Any, str]] = [
        (plain, {"format": "luks"}, "No encryption in image header, but options specified format 'luks'"),
        (encrypted, {"format": "aes"}, "Header reported 'luks' encryption format but options specify 'aes'"),
        (aes, {"format": "luks"}, "Header reported 'aes' encryption format but options specify 'luks'"),
        (encrypted, {"format": "luks"}, "Parameter 'encrypt.key-secret' is required for cipher"),
        (aes, None, "Parameter 'encrypt.key-secret' is required for cipher"),
        (encrypted, {"format": "luks", "key-secret": "none"}, "No secret with id 'none'"),
        (encrypted, {}, "Parameter 'encrypt.format' is missing"),
        (encrypted, {"format": "rot13"}, "Parameter 'format' does not accept value 'rot13'"),
    ]
    for path, encrypt, message in cases:
        options = {} if encrypt is None else {"encrypt": encrypt}
        file = {"driver": "file", "filename": str(path)}
        with pytest.raises(FusebdError) as caught:
            await graph.blockdev_add({"driver": "qcow2", "node-name": "disk", "file": file, **options})
        assert str(caught.value) == message
    file = {"driver": "file", "filename": str(luks(tmp_path / "x", "default"))}
    with pytest.raises(FusebdError, match=r"^Parameter 'key-secret' is required for cipher$"):
        await graph.blockdev_add({"driver": "luks", "node-name": "disk", "file": file})
    assert list(graph.nodes) == []


async def test_damaged_headers_open_or_are_refused(graph: Graph, tmp_path: Path, luks: Maker) -> None:
    await with_secret(graph)
    source = luks(tmp_path / "source", "default")
    path = tmp_path / "image"
    found = 0
    for seed in range(60):
        rng = random.Random(seed)
        shutil.copy(source, path)
        at = rng.randrange(ondisk.HEADER_LENGTH)
        # not an iteration count of billions, which is work and no fault
        if at in range(164, 168) or (at >= 208 and (at - 208) % 48 in range(4, 8)):
            continue
        patch(path, (at, bytes([rng.randrange(256)])))
        try:
            root = await opened(graph, path, "luks")
        except FusebdError:
            continue
        found += 1
        await closed(graph, root)
    assert found > 5
