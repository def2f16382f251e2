"""x-blockdev-amend of what goes through the whole image: its version, and the width of its refcounts."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from disks import change
from images import after_power_cut, check_image, content, create, info, io
from mounting import run
from support import READ_WRITE, read, recorder_of, root_of, write

from fusebd.block.child import MAY_UNMAP
from fusebd.block.graph import Graph
from fusebd.block.options import convert
from fusebd.errors import BlockIOError, FusebdError

Json = Any
K = 1024
SIZE = 600 * K
#: how images are made: options of qemu-img, and words of this module
IMAGES: dict[str, dict[str, Json]] = {
    "plain": {},
    "small": {"cluster_size": 512},
    "backed": {"cluster_size": 4096, "backed": True},
    "snapshots": {"cluster_size": 2048, "snapshots": True},
    "backed-snapshots": {"cluster_size": 1024, "backed": True, "snapshots": True},
    "zstd": {"compression_type": "zstd"},
    "wide": {"refcount_bits": 64, "cluster_size": 512, "backed": True},
    "lazy": {"lazy_refcounts": "on"},
}
Images = Callable[[str], Path]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """The image of a name in IMAGES, with data, zero clusters and holes, in all snapshots something else."""
    directory = tmp_path_factory.mktemp("images")
    (directory / "backing").write_bytes(random.Random(0).randbytes(SIZE // 3 * 2))

    @cache
    def image(name: str) -> Path:
        options = dict(IMAGES[name])
        backed, snapshots = (options.pop(word, False) for word in ("backed", "snapshots"))
        path = directory / name
        create(path, str(SIZE), backing=directory / "backing" if backed else None, backing_format="raw", **options)
        io(path, "write -P 1 0 100k", "write -P 2 300k 200k", "write -z 50k 30k", "write -z -u 350k 64k")
        if snapshots:
            run("qemu-img", "snapshot", "-c", "one", path)
            io(path, "write -P 3 20k 100k", "write -z 330k 100k", "discard 0 8k")
            run("qemu-img", "snapshot", "-c", "two", path)
            run("qemu-img", "snapshot", "-c", "three", path)
            io(path, "write -z 0 64k", "write -P 4 400k 4k")
        return path

    return image


def contents(path: Path) -> list[bytes]:
    """What the disk shows, and what each snapshot does."""
    shown = [content(path)]
    for number in range(len(info(path).get("snapshots", []))):
        copy = path.with_name("snapshot")
        name = ("one", "two", "three")[number]
        run("qemu-img", "convert", "-l", f"snapshot.name={name}", "-O", "raw", path, copy)
        shown.append(copy.read_bytes())
    return shown


async def amended(path: Path, **options: Json) -> str | None:
    """The error that amending the image ends with; it is used before and after."""
    graph = Graph()
    model = bytearray(content(path))
    rng = random.Random(1)
    try:
        node = await graph.blockdev_add(
            {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": str(path)}}
        )
        root = root_of(graph, "disk", READ_WRITE)
        await change(root, model, rng, 6, 4096)
        given = {"driver": "qcow2", **{name.replace("_", "-"): value for name, value in options.items()}}
        assert node.driver.amend_options is not None
        error = None
        async with graph.lock, graph.drained(node):
            try:
                await node.driver.amend(convert(given, node.driver.amend_options))
            except FusebdError as failure:
                error = str(failure)
        assert await read(root, 0, len(model)) == model
        await change(root, model, rng, 6, 4096)
        assert await read(root, 0, len(model)) == model
        await graph.detach_root(root)
    finally:
        await graph.close()
    check_image(path)
    assert content(path) == model
    return error


WIDTHS = (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", ["plain", "small", "backed-snapshots", "wide", "lazy"])
async def test_refcounts_of_another_width(images: Images, tmp_path: Path, name: str, bits: int) -> None:
    path, theirs = (Path(shutil.copy(images(name), tmp_path / word)) for word in ("image", "theirs"))
    before = contents(path)[1:]
    said = run("qemu-img", "amend", "-f", "qcow2", "-o", f"refcount_bits={bits}", theirs, expect=(0, 1))
    error = await amended(path, refcount_bits=bits)
    if said:
        # the clusters differ, since ours have been written to
        assert error is not None
        assert error.partition("Cluster at")[0] == said.partition("qemu-img: ")[2].partition("Cluster at")[0]
        assert error.startswith("Cannot decrease refcount entry width")
    else:
        assert error is None
        assert info(path)["format-specific"]["data"]["refcount-bits"] == bits
    assert contents(path)[1:] == before
    io(path, "write -P 9 0 600k")
    check_image(path)


@pytest.mark.parametrize("name", ["plain", "small", "backed", "snapshots", "backed-snapshots", "zstd", "lazy"])
async def test_an_image_for_an_old_qemu(images: Images, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copy(images(name), tmp_path / "image"))
    before = contents(path)[1:]
    assert await amended(path, version="v2") is None
    found = info(path)["format-specific"]["data"]
    assert found["compat"] == "0.10"
    assert path.read_bytes()[4:8] == b"\0\0\0\2"
    assert contents(path)[1:] == before
    for snapshot in ("three", "two", "one") if before else ():  # nothing was lost or shared that is not
        run("qemu-img", "snapshot", "-a", snapshot, path)
        check_image(path)
        run("qemu-img", "snapshot", "-d", snapshot, path)
        check_image(path)
    assert await amended(path, version="v3") is None
    assert info(path)["format-specific"]["data"]["compat"] == "1.1"


async def test_the_header_is_the_one_that_qemu_makes(images: Images, tmp_path: Path) -> None:
    path, theirs = (Path(shutil.copy(images("backed"), tmp_path / word)) for word in ("image", "theirs"))
    run("qemu-img", "amend", "-f", "qcow2", "-o", "compat=0.10", theirs)
    assert await amended(path, version="v2") is None
    assert path.read_bytes()[:4096] == theirs.read_bytes()[:4096]


REFUSED: dict[str, tuple[str, dict[str, Json], dict[str, Json]]] = {
    "wide": ("", {"refcount_bits": 32}, {"version": "v2"}),
    "no width": ("", {}, {"refcount_bits": 3}),
    "negative width": ("", {}, {"refcount_bits": -1}),
    "old and wide": ("", {"compat": "0.10"}, {"refcount_bits": 8}),
    "data file": ("", {"data_file": "data"}, {"version": "v2"}),
    "no data file": ("", {}, {"data_file": "data"}),
    "raw": ("", {"data_file": "data"}, {"data_file_raw": True}),
    "subclusters": ("", {"extended_l2": "on"}, {"version": "v2"}),
    "zstd": ("write -c 0 64k", {"compression_type": "zstd"}, {"version": "v2"}),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_is_refused_in_qemus_words(tmp_path: Path, name: str) -> None:
    command, made, change = REFUSED[name]
    path = tmp_path / "image"
    options = {key: tmp_path / value if key == "data_file" else value for key, value in made.items()}
    create(path, str(SIZE), **options)
    io(path, *([command] if command else []), "write -P 1 100k 10k")
    text = ",".join(
        f"{'compat' if key == 'version' else key}={'on' if value is True else value}" for key, value in change.items()
    )
    said = run("qemu-img", "amend", "-f", "qcow2", "-o", text, path, expect=(1,))
    before = path.read_bytes()[:512]
    assert await amended(path, **change) == said.partition("qemu-img: ")[2].splitlines()[0]
    assert path.read_bytes()[:512] == before


async def test_another_name_of_the_data_file(tmp_path: Path) -> None:
    path, data = tmp_path / "image", tmp_path / "data"
    create(path, str(SIZE), data_file=data, data_file_raw="on")
    io(path, "write -P 1 100k 10k")
    other = data.rename(tmp_path / "other")
    data.symlink_to(other)
    assert await amended(path, data_file=str(other), data_file_raw=False) is None
    data.unlink()
    found = info(path)["format-specific"]["data"]
    assert (found["data-file"], found["data-file-raw"]) == (str(other), False)
    check_image(path)


async def test_an_encrypted_image_for_an_old_qemu(tmp_path: Path) -> None:
    """Where a backing file shows through, zeroes become data, which have to be encrypted."""
    path = tmp_path / "image"
    (tmp_path / "backing").write_bytes(b"b" * SIZE)
    secret = ("--object", "secret,id=key,data=open sesame")
    backing = ("-b", tmp_path / "backing", "-F", "raw")
    encrypt = "encrypt.format=aes,encrypt.key-secret=key"
    run("qemu-img", "create", "-q", *secret, "-f", "qcow2", *backing, "-o", encrypt, path)
    graph = Graph()
    await graph.objects.add({"qom-type": "secret", "id": "key", "data": "open sesame"})
    file = {"driver": "file", "filename": str(path)}
    key = {"format": "aes", "key-secret": "key"}
    node = await graph.blockdev_add({"driver": "qcow2", "node-name": "disk", "file": file, "encrypt": key})
    root = root_of(graph, "disk", READ_WRITE)
    await root.pwrite_zeroes(64 * K, 128 * K)
    await write(root, 10 * K, b"w" * K)
    assert node.driver.amend_options is not None
    async with graph.lock, graph.drained(node):
        await node.driver.amend(convert({"driver": "qcow2", "version": "v2"}, node.driver.amend_options))
    expected = bytearray(b"b" * SIZE)
    expected[10 * K : 11 * K] = b"w" * K
    expected[64 * K : 192 * K] = bytes(128 * K)
    assert await read(root, 0, SIZE) == expected
    await graph.close()
    opts = f"driver=qcow2,file.filename={path},encrypt.key-secret=key"
    run("qemu-img", "convert", *secret, "--image-opts", opts, "-O", "raw", tmp_path / "content")
    assert (tmp_path / "content").read_bytes() == expected


@pytest.mark.parametrize("change", [{"version": "v2"}, {"refcount_bits": 64}, {"refcount_bits": 4}], ids=str)
@pytest.mark.parametrize("name", ["small", "backed", "backed-snapshots"])
async def test_a_power_cut_leaves_one_image_or_the_other(
    images: Images, tmp_path: Path, name: str, change: dict[str, Json]
) -> None:
    path = Path(shutil.copy(images(name), tmp_path / "image"))
    expected, before = contents(path), path.read_bytes()
    graph = Graph()
    file = {"driver": "file", "filename": str(path), "cache": {"no-flush": True}}
    await graph.blockdev_add({"driver": "test-recorder", "node-name": "recorder", "file": file})
    node = await graph.blockdev_add({"driver": "qcow2", "node-name": "disk", "file": "recorder"})
    journal = recorder_of(graph, "recorder").journal
    given = {"driver": "qcow2", **{key.replace("_", "-"): value for key, value in change.items()}}
    assert node.driver.amend_options is not None
    await node.driver.amend(convert(given, node.driver.amend_options))
    await graph.close()
    assert contents(path) == expected
    rng = random.Random(name)
    moments = range(len(journal) + 1)
    for moment in moments if len(moments) < 20 else sorted(rng.sample(moments, 20)):
        path.write_bytes(after_power_cut(before, journal[:moment], rng))
        check_image(path, leaks=True)
        assert contents(path) == expected


@pytest.mark.parametrize("code", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("change", [{"version": "v2"}, {"refcount-bits": 64}], ids=str)
async def test_an_error_at_any_write_leaves_an_image_that_works_on(
    images: Images, tmp_path: Path, change: dict[str, Json], code: str
) -> None:

    source = images("backed-snapshots")
    expected = contents(source)
    for number in range(1, 200):
        path = Path(shutil.copy(source, tmp_path / "image"))
        graph = Graph()
        file = {"driver": "file", "filename": str(path), "cache": {"no-flush": True}}
        rule = {"operations": ["write"], "nth": number, "action": "error", "errno": code}
        await graph.blockdev_add({"driver": "fault", "node-name": "fault", "file": file, "rules": [rule]})
        node = await graph.blockdev_add({"driver": "qcow2", "node-name": "disk", "file": "fault"})
        assert node.driver.amend_options is not None
        failed = False
        try:
            await node.driver.amend(convert({"driver": "qcow2", **change}, node.driver.amend_options))
        except FusebdError:
            failed = True
        if not failed:
            await graph.close()
            break
        root = root_of(graph, "disk", READ_WRITE)
        assert await read(root, 0, SIZE) == expected[0]
        await root.pwrite_zeroes(0, 512, MAY_UNMAP)
        await write(root, 0, expected[0][:512])
        await graph.close()
        check_image(path, leaks=True)
        assert contents(path) == expected
    else:
        pytest.fail("it never got as far as the end")
    assert number > 3


async def test_an_image_whose_header_is_in_doubt_is_not_used(images: Images, tmp_path: Path) -> None:
    """The header was written, and could neither be flushed nor be put back."""
    path = Path(shutil.copy(images("small"), tmp_path / "image"))
    expected = contents(path)
    graph = Graph()
    file = {"driver": "file", "filename": str(path)}
    header = {"operations": ["write"], "offset": 0, "length": 512, "times": 1}
    rules = [
        {"action": "delay", "seconds": 0.0, **header, "set-state": 2},
        {"action": "error", "operations": ["write", "flush"], "state": 2},
    ]
    await graph.blockdev_add({"driver": "fault", "node-name": "fault", "file": file, "rules": rules})
    node = await graph.blockdev_add({"driver": "qcow2", "node-name": "disk", "file": "fault"})
    root = root_of(graph, "disk", READ_WRITE)
    assert node.driver.amend_options is not None
    with pytest.raises(BlockIOError):
        await node.driver.amend(convert({"driver": "qcow2", "refcount-bits": 64}, node.driver.amend_options))
    with pytest.raises(BlockIOError) as caught:
        await read(root, 0, 512)
    assert caught.value.errno == errno.ENOMEDIUM
    await graph.close()
    check_image(path)
    assert info(path)["format-specific"]["data"]["refcount-bits"] == 64
    assert contents(path) == expected
