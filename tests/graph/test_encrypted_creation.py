"""Encrypted disks that blockdev-create makes, and their key slots, compared with those of QEMU, which opens them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from creations import daemon, finished, job_by_qemu, node
from images import create_encrypted, patch, u32
from mounting import run
from qemuprograms import storage_daemon
from qmptalk import Talk
from support import read, root_of, write

from fusebd.block.graph import Graph

Json = Any
M = 1 << 20
FAST = {"iter-time": 1}
SECRETS = {"key": "open sesame", "new": "open barley", "other": "open wheat"}
OBJECTS = [word for name, text in SECRETS.items() for word in ("--object", f"secret,id={name},data={text}")]

#: the parameters of encryption
PARAMETERS: dict[str, dict[str, Json]] = {
    "default": {},
    "cbc-essiv": {"cipher-mode": "cbc", "ivgen-alg": "essiv"},
    "cbc-plain": {"cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "plain", "hash-alg": "sha1"},
    "cbc-sha224": {"cipher-mode": "cbc", "hash-alg": "sha224"},
    "xts-128": {"cipher-alg": "aes-128", "hash-alg": "sha512", "ivgen-hash-alg": "sha256"},
    "ecb": {"cipher-mode": "ecb", "hash-alg": "ripemd160"},
}
#: those that QEMU makes, too, for which it measures the processor for seconds
MADE_BY_QEMU = ("default", "cbc-essiv")
REFUSED: dict[str, dict[str, Json]] = {
    "no secret": {"size": M, "file": "image"},
    "unknown secret": {"key-secret": "none", "size": M, "file": "image"},
    "too large": {"key-secret": "key", "size": 2**63 - 512, "file": "image", **FAST},
    "cipher": {"key-secret": "key", "size": M, "file": "image", "cipher-alg": "aes-512"},
    "mode": {"key-secret": "key", "size": M, "file": "image", "cipher-mode": "gcm"},
    "no size": {"key-secret": "key", "file": "image"},
    "essiv": {"key-secret": "key", "size": M, "file": "image", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha1", **FAST},
}
QCOW2_REFUSED: dict[str, dict[str, Json]] = {
    "no format": {"key-secret": "key"},
    "format": {"format": "rot13", "key-secret": "key"},
    "no secret": {"format": "luks"},
    "no aes secret": {"format": "qcow"},
    "unknown secret": {"format": "luks", "key-secret": "none"},
    "aes with a cipher": {"format": "qcow", "key-secret": "key", "cipher-alg": "aes-128"},
}
QCOW2: dict[str, dict[str, Json]] = {
    "luks": {"encrypt": {"format": "luks", **FAST}},
    "luks-small": {"encrypt": {"format": "luks", **FAST}, "cluster-size": 512},
    "luks-narrow": {"encrypt": {"format": "luks", **FAST}, "cluster-size": 4096, "refcount-bits": 1},
    "luks-subclusters": {"encrypt": {"format": "luks", **FAST, **PARAMETERS["xts-128"]}, "extended-l2": True},
    "luks-v2": {"encrypt": {"format": "luks", **FAST}, "version": "v2"},
    "luks-full": {"encrypt": {"format": "luks", **FAST}, "preallocation": "full"},
    "luks-metadata": {"encrypt": {"format": "luks", **FAST}, "preallocation": "metadata"},
    "luks-data-file": {"encrypt": {"format": "luks", **FAST}, "data-file": "other"},
    "luks-backed": {"encrypt": {"format": "luks", **FAST}, "backing-file": "backing", "backing-fmt": "raw"},
    "aes": {"encrypt": {"format": "qcow"}},
    "aes-full": {"encrypt": {"format": "qcow"}, "preallocation": "full", "version": "v2"},
}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ``image`` and ``other`` are nodes."""
    monkeypatch.chdir(tmp_path)
    for name in ("image", "other"):
        (tmp_path / name).touch()
    return tmp_path


async def prepared(graph: Graph, directory: Path) -> None:
    for name, text in SECRETS.items():
        await graph.objects.add({"qom-type": "secret", "id": name, "data": text})
    for name in ("image", "other"):
        await graph.blockdev_add(node(directory / name, name))


async def job(talk: Talk, command: str, **arguments: Json) -> str | None:
    """The error of the command, or of the job that it starts."""
    answer = await talk.ask({"execute": command, "arguments": {"job-id": "making", **arguments}})
    if "error" in answer:
        error: str = answer["error"]["desc"]
        return error
    told: str | None = (await finished(talk, "making")).get("error")
    return told


def opts(path: Path, driver: str, secret: str = "key") -> str:
    prefix = "encrypt." if driver == "qcow2" else ""
    return f"driver={driver},file.filename={path},{prefix}key-secret={secret}"


def io(path: Path, driver: str, *commands: str, secret: str = "key", expect: int = 0) -> str:
    words = [word for command in commands for word in ("-c", command)]
    return run("qemu-io", *OBJECTS, "--image-opts", opts(path, driver, secret), *words, expect=(expect,))


def content(path: Path, driver: str) -> bytes:
    copy = path.with_name("content")
    run("qemu-img", "convert", *OBJECTS, "--image-opts", opts(path, driver), "-O", "raw", copy)
    return copy.read_bytes()


def described(path: Path, driver: str) -> Json:
    """What QEMU says of the encryption, but for what chance has its part in."""
    text = run("qemu-img", "info", "--output=json", *OBJECTS, "--image-opts", opts(path, driver))
    found = json.loads(text)["format-specific"]["data"]
    found = found["encrypt"] if driver == "qcow2" else found
    for name in ("uuid", "master-key-iters"):
        found.pop(name)
    for slot in found["slots"]:
        slot.pop("iters", None)
    return found


@pytest.mark.parametrize("name", PARAMETERS)
async def test_qemu_opens_a_disk_that_was_made(directory: Path, name: str) -> None:
    parameters = {"key-secret": "key", **PARAMETERS[name]}
    path = directory / "image"
    data = random.Random(name).randbytes(3000 * 100)
    async with daemon() as (graph, talk):
        await prepared(graph, directory)
        options = {"driver": "luks", "file": "image", "size": M, **FAST, **parameters}
        assert await job(talk, "blockdev-create", options=options) is None
        await talk.execute("blockdev-add", driver="luks", node_name="disk", file="image", key_secret="key")
        root = root_of(graph, "disk")
        assert root.length == M
        await write(root, 512 * 3, data)
        await graph.detach_root(root)
    model = content(path, "luks")
    assert len(model) == M
    assert model[512 * 3 :][: len(data)] == data
    if name not in MADE_BY_QEMU:
        return
    theirs = directory / "theirs"
    create_encrypted(theirs, M, image_format="luks", **parameters)
    assert theirs.stat().st_size == path.stat().st_size
    assert described(path, "luks") == described(theirs, "luks")


async def test_a_header_of_its_own(directory: Path) -> None:
    async with daemon() as (graph, talk):
        await prepared(graph, directory)
        options = {"driver": "luks", "file": "image", "header": "other", "size": M, "key-secret": "key", **FAST}
        assert await job(talk, "blockdev-create", options=options) is None
        disk = {"driver": "luks", "file": "image", "header": "other", "key-secret": "key"}
        await graph.blockdev_add({**disk, "node-name": "disk"})
        root = root_of(graph, "disk")
        assert root.length == M
        await write(root, 0, b"secret" * 1000)
        assert await read(root, 0, 6000) == b"secret" * 1000
        await graph.detach_root(root)
        await talk.execute("blockdev-del", node_name="disk")
    assert (directory / "image").stat().st_size == M
    assert b"secret" not in (directory / "image").read_bytes()
    header, payload = (directory / "other").read_bytes(), (directory / "image").read_bytes()
    whole = directory / "whole"
    whole.write_bytes(header + payload)
    patch(whole, (104, u32(len(header) // 512)))
    assert content(whole, "luks")[:6000] == b"secret" * 1000
    async with daemon() as (graph, talk):
        await prepared(graph, directory)
        options = {"driver": "luks", "header": "image", "size": M, "key-secret": "key", **FAST}
        assert await job(talk, "blockdev-create", options=options) is None
    assert (directory / "image").stat().st_size == len(header)


@pytest.mark.parametrize("mode", ["cbc", "ecb"])
async def test_keys_that_qemu_cannot_have(directory: Path, mode: str) -> None:
    """Key material of 192 bits ends in the midst of a sector, which ends QEMU; other programs have them."""
    async with daemon() as (graph, talk):
        await prepared(graph, directory)
        options = {"driver": "luks", "file": "image", "size": M, "key-secret": "key", "cipher-alg": "aes-192", **FAST}
        assert await job(talk, "blockdev-create", options={**options, "cipher-mode": mode}) is None
        await graph.blockdev_add({"driver": "luks", "node-name": "disk", "file": "image", "key-secret": "key"})
        root = root_of(graph, "disk")
        await write(root, 0, b"secret" * 1000)
        assert await read(root, 0, 6000) == b"secret" * 1000
        await graph.detach_root(root)


@pytest.mark.parametrize("name", REFUSED)
async def test_a_disk_that_cannot_be_made_is_refused_in_qemus_words(directory: Path, name: str) -> None:
    options = {"driver": "luks", **REFUSED[name]}
    with storage_daemon(*OBJECTS) as monitor:
        for file in ("image", "other"):
            monitor("blockdev-add", node(directory / file, file))
        theirs = job_by_qemu(monitor, "blockdev-create", options=options)
    async with daemon() as (graph, talk):
        await prepared(graph, directory)
        assert await job(talk, "blockdev-create", options=options) == theirs is not None


@pytest.mark.parametrize("name", QCOW2)
async def test_qemu_opens_an_encrypted_image_that_was_made(directory: Path, name: str) -> None:
    given = QCOW2[name]
    kind = "luks" if given["encrypt"]["format"] == "luks" else "aes"
    (directory / "backing").write_bytes(b"backing" * 10000)
    path = directory / "image"
    data = random.Random(name).randbytes(100_000)
    async with daemon() as (graph, talk):
        await prepared(graph, directory)
        encrypt = {**given["encrypt"], "key-secret": "key"}
        options = {"driver": "qcow2", "file": "image", "size": M, **given, "encrypt": encrypt}
        assert await job(talk, "blockdev-create", options=options) is None
        key = {"format": kind, "key-secret": "key"}
        data_file = {"data-file": "other"} if "data-file" in given else {}
        await graph.blockdev_add({"driver": "qcow2", "node-name": "disk", "file": "image", "encrypt": key, **data_file})
        root = root_of(graph, "disk")
        expected = bytearray(b"backing" * 10000 if "backing-file" in given else b"").ljust(M, b"\0")
        assert await read(root, 0, M) == expected
        await write(root, 200_192, data)
        expected[200_192 : 200_192 + len(data)] = data
        await graph.detach_root(root)
    assert content(path, "qcow2") == expected
    run("qemu-img", "check", *OBJECTS, "--image-opts", opts(path, "qcow2"))
    assert data[:64] not in path.read_bytes() + (directory / "other").read_bytes()
    io(path, "qcow2", "write -P 3 100k 300k", "read -P 3 100k 300k")
    run("qemu-img", "check", *OBJECTS, "--image-opts", opts(path, "qcow2"))


@pytest.mark.parametrize("name", QCOW2_REFUSED)
async def test_an_image_that_cannot_be_made_is_refused_in_qemus_words(directory: Path, name: str) -> None:
    options = {"driver": "qcow2", "file": "image", "size": M, "encrypt": QCOW2_REFUSED[name]}
    with storage_daemon(*OBJECTS) as monitor:
        monitor("blockdev-add", node(directory / "image", "image"))
        theirs = job_by_qemu(monitor, "blockdev-create", options=options)
    async with daemon() as (graph, talk):
        await prepared(graph, directory)
        assert await job(talk, "blockdev-create", options=options) == theirs is not None


async def test_what_only_a_newer_qemu_has_is_refused_in_its_words(directory: Path) -> None:
    async with daemon() as (graph, talk):
        await prepared(graph, directory)
        options = {"driver": "luks", "size": M, "key-secret": "key", **FAST}
        for given, message in (
            ({}, "Either the parameter 'header' or 'file' must be specified"),
            (
                {"header": "image", "preallocation": "full"},
                "Parameter 'preallocation' requires 'file' to be specified for formatting LUKS disk",
            ),
            ({"header": "image", "file": "other", "size": 2**63}, "The requested file size is too large"),
        ):
            assert await job(talk, "blockdev-create", options={**options, **given}) == message


async def test_what_qemu_does_not_look_at_is_refused(directory: Path) -> None:
    """An iter-time of 0 ends QEMU by a division."""
    async with daemon() as (graph, talk):
        await prepared(graph, directory)
        options = {"driver": "luks", "file": "image", "size": M, "key-secret": "key"}
        for value in (0, -1):
            assert await job(talk, "blockdev-create", options={**options, "iter-time": value}) == (
                "iter-time must be greater than 0"
            )
        assert await job(talk, "blockdev-create", options={**options, "cipher-alg": "serpent-256"}) == (
            "Unsupported cipher algorithm serpent-256 with xts mode"
        )


#: one after another: the change, whether it is forced, and the secrets that open the disk afterwards
CHANGES: tuple[tuple[dict[str, Json], bool, set[str]], ...] = (
    ({"state": "active", "new-secret": "new", **FAST}, False, {"key", "new"}),
    ({"state": "active", "new-secret": "new", "keyslot": 1, **FAST}, False, {"key", "new"}),
    ({"state": "active", "new-secret": "other", "keyslot": 1, **FAST}, True, {"key", "other"}),
    ({"state": "active", "new-secret": "new", "keyslot": 7, "secret": "other", **FAST}, False, {"key", "new", "other"}),
    ({"state": "active", "new-secret": "new", "keyslot": 8, **FAST}, False, {"key", "new", "other"}),
    ({"state": "active", "new-secret": "new", "keyslot": -1, **FAST}, False, {"key", "new", "other"}),
    ({"state": "active", **FAST}, False, {"key", "new", "other"}),
    ({"state": "active", "new-secret": "none", **FAST}, False, {"key", "new", "other"}),
    ({"state": "active", "new-secret": "new", "old-secret": "key", **FAST}, False, {"key", "new", "other"}),
    ({"state": "inactive"}, False, {"key", "new", "other"}),
    ({"state": "inactive", "new-secret": "new"}, False, {"key", "new", "other"}),
    ({"state": "inactive", "iter-time": 5}, False, {"key", "new", "other"}),
    ({"state": "inactive", "secret": "key"}, False, {"key", "new", "other"}),
    ({"state": "inactive", "keyslot": 9}, False, {"key", "new", "other"}),
    ({"state": "inactive", "keyslot": 3}, False, {"key", "new", "other"}),
    ({"state": "inactive", "keyslot": 3}, True, {"key", "new", "other"}),
    ({"state": "inactive", "keyslot": 1, "old-secret": "key"}, False, {"key", "new", "other"}),
    ({"state": "inactive", "keyslot": 1, "old-secret": "other"}, False, {"key", "new"}),
    ({"state": "inactive", "old-secret": "other"}, False, {"key", "new"}),
    ({"state": "inactive", "old-secret": "new"}, False, {"key"}),
    ({"state": "inactive", "old-secret": "key"}, False, {"key"}),
    ({"state": "inactive", "keyslot": 0}, False, {"key"}),
    ({"state": "active", "new-secret": "new", "secret": "other", **FAST}, False, {"key"}),
    ({"state": "passive"}, False, {"key"}),
    ({}, False, {"key"}),
    ({"state": "active", "new-secret": "new", "keyslot": 4, **FAST}, False, {"key", "new"}),
    ({"state": "inactive", "keyslot": 0}, False, {"new"}),
)


SOME_CHANGES = (*CHANGES[:2], ({"state": "inactive", "keyslot": 0}, False, {"new"}))


@pytest.mark.parametrize("driver", ["luks", "qcow2"])
async def test_key_slots_change_as_qemus_do(directory: Path, driver: str) -> None:
    path = directory / "image"
    data = random.Random(driver).randbytes(50_000)
    async with daemon() as (graph, talk):
        await prepared(graph, directory)
        parameters = {"key-secret": "key", **FAST}
        made = parameters if driver == "luks" else {"encrypt": {"format": "luks", **parameters}}
        assert (
            await job(talk, "blockdev-create", options={"driver": driver, "file": "image", "size": M, **made}) is None
        )
        opening = {"key-secret": "key"} if driver == "luks" else {"encrypt": {"format": "luks", "key-secret": "key"}}
        disk = {"driver": driver, "node-name": "disk", "file": "image", **opening}
        await graph.blockdev_add(disk)
        root = root_of(graph, "disk")
        await write(root, 1000, data)
        theirs = directory / "theirs"
        theirs.write_bytes(path.read_bytes())
        with storage_daemon(*OBJECTS) as monitor:
            monitor("blockdev-add", node(theirs, "image"))
            monitor("blockdev-add", disk)
            for given, force, opens in CHANGES if driver == "luks" else SOME_CHANGES:
                change = given if driver == "luks" else {"encrypt": {"format": "luks", **given}}
                arguments = {"node-name": "disk", "options": {"driver": driver, **change}, "force": force}
                expected = job_by_qemu(monitor, "x-blockdev-amend", **arguments)
                assert await job(talk, "x-blockdev-amend", **arguments) == expected, arguments
                assert await read(root, 1000, len(data)) == data
                (told,) = [n for n in await talk.execute("query-named-block-nodes") if n["node-name"] == "disk"]
                ours = told["image"]["format-specific"]["data"]
                slots = (ours["encrypt"] if driver == "qcow2" else ours)["slots"]
                assert sum(slot["active"] for slot in slots) == len(opens)
                for secret in SECRETS:
                    locked = run(
                        "qemu-io", *OBJECTS, "-U", "-r", "--image-opts", opts(path, driver, secret), "-c", "read 0 512",
                        expect=(0, 1),
                    )  # fmt: skip
                    assert ("Invalid password" not in locked) == (secret in opens), locked
        await graph.detach_root(root)
    assert content(path, driver)[1000 : 1000 + len(data)] == data if "key" in opens else True
    io(path, driver, "read 0 1M", secret="new")


@pytest.mark.parametrize(
    ("made", "opened", "changed", "message"),
    [
        (None, None, "luks", "image is not encrypted, can't amend"),
        ("qcow", "aes", "luks", "Only LUKS encryption options can be amended for qcow2 with blockdev-amend"),
        ("luks", "luks", "qcow", "Amend can't be used to change the qcow2 encryption format"),
    ],
)
async def test_only_luks_can_be_amended(
    directory: Path, made: str | None, opened: str | None, changed: str, message: str
) -> None:
    async with daemon() as (graph, talk):
        await prepared(graph, directory)
        options: Json = {"driver": "qcow2", "file": "image", "size": M}
        disk: Json = {"driver": "qcow2", "node-name": "disk", "file": "image"}
        if made is not None:
            options["encrypt"] = {"format": made, "key-secret": "key", **(FAST if made == "luks" else {})}
            disk["encrypt"] = {"format": opened, "key-secret": "key"}
        assert await job(talk, "blockdev-create", options=options) is None
        await graph.blockdev_add(disk)
        change = {"format": changed, **({"state": "inactive"} if changed == "luks" else {})}
        amend = {"node-name": "disk", "options": {"driver": "qcow2", "encrypt": change}}
        assert await job(talk, "x-blockdev-amend", **amend) == message


async def test_a_disk_is_shared_but_for_its_key_slots(directory: Path) -> None:
    """Two nodes over one file, as QEMU has it."""
    async with daemon() as (graph, talk):
        await prepared(graph, directory)
        options = {"driver": "luks", "file": "image", "size": M, "key-secret": "key", **FAST}
        assert await job(talk, "blockdev-create", options=options) is None
        for name in ("one", "two"):
            await graph.blockdev_add({"driver": "luks", "node-name": name, "file": "image", "key-secret": "key"})
        roots = [root_of(graph, name) for name in ("one", "two")]
        await write(roots[0], 0, b"one" * 1000)
        assert await read(roots[1], 0, 3000) == b"one" * 1000
        await graph.detach_root(roots[1])
        amend: Json = {
            "node-name": "one",
            "options": {"driver": "luks", "state": "active", "new-secret": "new", **FAST},
        }
        refused = await job(talk, "x-blockdev-amend", **amend)
        assert refused is not None
        assert refused.startswith("Permission conflict on node 'image': permissions '")
        await write(roots[0], 0, b"two" * 1000)
        await talk.execute("blockdev-del", node_name="two")
        assert await job(talk, "x-blockdev-amend", **amend) is None
        await graph.blockdev_add({"driver": "luks", "node-name": "two", "file": "image", "key-secret": "new"})
        await graph.detach_root(roots[0])
