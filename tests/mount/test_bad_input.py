"""Mistakes and bad images: each is one line on standard error, or one QMP error, and leaves nothing behind.

The words are QEMU's where QEMU has the error: they were compared with those of qemu-storage-daemon 10.0.2.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from mounting import FUSEBD, Mount, fusebd, left_behind, mounts_below, qcow2, raw, refusal, run

Json = Any

on_devfuse = pytest.mark.parametrize("transport", ["devfuse"])


def file(name: Json, **options: Json) -> Json:
    return {"driver": "file", "node-name": "n", "filename": name, **options}


def null(**options: Json) -> Json:
    return {"driver": "null-co", "node-name": "n", **options}


def over(driver: str, **options: Json) -> Json:
    return {"driver": driver, "node-name": "n", **options}


def rule(**members: Json) -> Json:
    return over("blkdebug", image={"driver": "null-co"}, **{"inject-error": [members]})


#: options of a node, and what is said about them.  There are the file "raw", the directory "directory", and the nodes
#: "disk" (raw, over the node "storage") and "fixed" (read-only)
MISTAKES = {
    "no driver": ({"node-name": "n"}, "Parameter 'driver' is missing"),
    "unknown driver": (over("nonsense"), "Parameter 'driver' does not accept value 'nonsense'"),
    "driver of a wrong type": (over(5), "Invalid parameter type for 'driver', expected: string"),  # type: ignore[arg-type]
    "no name": ({"driver": "null-co"}, "'node-name' must be specified for the root node"),
    "name taken": (over("null-co") | {"node-name": "disk"}, "Duplicate nodes with node-name='disk'"),
    "bad name": (over("null-co") | {"node-name": "../etc"}, "Invalid node-name: '../etc'"),
    "empty name": (over("null-co") | {"node-name": ""}, "Invalid node-name: ''"),
    "long name": (over("null-co") | {"node-name": "x" * 32}, "Node name too long"),
    "name of a wrong type": (
        over("null-co") | {"node-name": 5},
        "Invalid parameter type for 'node-name', expected: string",
    ),
    "missing file": (file("none"), "Could not open 'none': No such file or directory"),
    "missing directory": (file("none/x"), "Could not open 'none/x': No such file or directory"),
    "file as directory": (file("raw/x"), "Could not open 'raw/x': Not a directory"),
    "directory": (file("directory"), "Could not open 'directory': Is a directory"),
    "read-only directory": (
        file("directory", **{"read-only": True}),
        "'file' driver requires 'directory' to be a regular file",
    ),
    "device as file": (file("/dev/null"), "'file' driver requires '/dev/null' to be a regular file"),
    "file as device": (
        file("raw", driver="host_device"),
        "'host_device' driver requires 'raw' to be either a character or block device",
    ),
    "no file name": (over("file"), "Parameter 'filename' is missing"),
    "empty file name": (file(""), "The 'file' block driver requires a file name"),
    "file name of a wrong type": (file(5), "Invalid parameter type for 'filename', expected: string"),
    "wrong driver": (qcow2("n", Path("raw")), "Image is not in qcow2 format"),
    "unknown option": (null(nonsense=1), "Parameter 'nonsense' is unexpected"),
    "unknown option of a child": (
        over("raw", file={"driver": "null-co", "nonsense": 1}),
        "Parameter 'file.nonsense' is unexpected",
    ),
    "unknown option of all nodes": (null(cache={"x": True}), "Parameter 'cache.x' is unexpected"),
    "number as string": (null(size="512"), "Invalid parameter type for 'size', expected: integer"),
    "fraction": (null(size=0.5), "Invalid parameter type for 'size', expected: integer"),
    "negative": (null(size=-1), "Value '-1' is out of range for parameter 'size'"),
    "too large": (null(size=1 << 64), "Invalid parameter type for 'size', expected: integer"),
    "string as boolean": (
        null(**{"read-zeroes": "on"}),
        "Invalid parameter type for 'read-zeroes', expected: boolean",
    ),
    "null": (null(**{"read-only": None}), "Invalid parameter type for 'read-only', expected: boolean"),
    "number as object": (null(cache=5), "Invalid parameter type for 'cache', expected: object"),
    "word that is no choice": (null(discard="maybe"), "Parameter 'discard' does not accept value 'maybe'"),
    "options that contradict each other": (
        null(**{"detect-zeroes": "unmap"}),
        "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
    ),
    "unknown node": (over("raw", file="none"), "Cannot find device='none' nor node-name='none'"),
    "no child": (over("raw"), "Parameter 'file' is missing"),
    "number as child": (over("raw", file=5), "Invalid parameter type for 'file', expected: BlockdevRef"),
    "null as child": (over("raw", file=None), "Invalid parameter type for 'file', expected: BlockdevRef"),
    "child without driver": (over("raw", file={}), "Parameter 'file.driver' is missing"),
    "child with an unknown driver": (
        over("raw", file={"driver": "nonsense"}),
        "Parameter 'driver' does not accept value 'nonsense'",
    ),
    "child that is missing": (
        over("raw", file={"driver": "file", "filename": "none"}),
        "Could not open 'none': No such file or directory",
    ),
    "part outside of the file": (
        over("raw", file={"driver": "null-co", "size": 1024}, offset=2048),
        "Offset (2048) cannot be greater than size of the containing file (1024)",
    ),
    "unknown event": (rule(event="nonsense"), "Parameter 'event' does not accept value 'nonsense'"),
    "rule without event": (rule(errno=5), "Parameter 'inject-error[0].event' is missing"),
    "missing rules": (
        over("blkdebug", image={"driver": "null-co"}, config="none"),
        "Could not read blkdebug config file: No such file or directory",
    ),
    "half a comparison": (over("blkverify", test={"driver": "null-co"}), "Parameter 'raw' is missing"),
    "writer of a read-only node": (over("qcow2", file="fixed"), "Block node is read-only"),
    "not a qcow2 node": (over("qcow2", file="disk"), "Image is not in qcow2 format"),
}


@pytest.fixture
def place(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a mount point ``mnt``, a file ``raw`` and a directory ``directory``: where commands run."""
    (scratch / "mnt").mkdir()
    (scratch / "directory").mkdir()
    (scratch / "raw").write_bytes(bytes(65536))
    (scratch / "fixed").write_bytes(bytes(65536))
    monkeypatch.chdir(scratch)
    return scratch


def good_nodes(place: Path) -> list[Json]:
    """The nodes that MISTAKES speaks of."""
    disk = raw("disk", place / "raw")
    disk["file"]["node-name"] = "storage"
    return [disk, {"driver": "file", "node-name": "fixed", "filename": str(place / "fixed"), "read-only": True}]


def nodes_of(mounted: Mount) -> list[str]:
    return sorted(node["node-name"] for node in mounted.qmp("query-named-block-nodes"))


def error(mounted: Mount, command: str, arguments: Json) -> Json:
    """The description of the one error that *command* is answered with."""
    answer = mounted.qmp.ask({"execute": command, "arguments": arguments})
    assert answer["error"]["class"] in ("GenericError", "CommandNotFound"), answer
    return answer["error"]["desc"]


def open_files(mounted: Mount) -> list[str]:
    """What the daemon has open, but for /dev/fuse, of which it has more or less as there is more or less to do."""
    found = []
    for link in Path(f"/proc/{mounted.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(link))
    return sorted(name for name in found if name != "/dev/fuse")


# --- nodes that cannot be added --------------------------------------------------------------------


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_node_on_the_command_line_is_one_line(place: Path, mistake: str) -> None:
    options, message = MISTAKES[mistake]
    words = [word for node in (*good_nodes(place), options) for word in ("--blockdev", json.dumps(node))]
    assert refusal("mount", *words, "mnt") == f"--blockdev {json.dumps(options)}: {message}"
    assert left_behind(place) == []


@on_devfuse
def test_a_bad_node_is_one_qmp_error_and_leaves_nothing(mount: Callable[..., Mount], place: Path) -> None:
    mounted = mount(*good_nodes(place))
    nodes, files = nodes_of(mounted), open_files(mounted)
    for mistake, (options, message) in MISTAKES.items():
        assert error(mounted, "blockdev-add", options) == message, mistake
        assert nodes_of(mounted) == nodes, mistake
        assert open_files(mounted) == files, mistake
        assert sorted(os.listdir(mounted.point)) == ["disk", "fixed", "storage"], mistake
    mounted.umount()


#: what --blockdev is given, and what is said about it
SPELLING_MISTAKES = [
    ("", "Parameter 'driver' is missing"),
    ("{", "JSON parse error, premature EOI"),
    ('{"driver": "null-co"} x', "Expecting at most one JSON value"),
    ("null-co,node-name", "Expected '=' after parameter 'node-name'"),
    ("null-co,node-name=n,size=1k", "Parameter 'size' expects integer"),
    ("null-co,node-name=n,read-zeroes=true", "Parameter 'read-zeroes' expects 'on' or 'off'"),
    ("null-co,node-name=n,cache.nonsense=on", "Parameter 'cache.nonsense' is unexpected"),
    ("raw,node-name=n,file.driver=null-co,file=x", "Parameters 'file.*' used inconsistently"),
    ("blkdebug,image=x,inject-error.1.event=read_aio", "Parameter 'inject-error.0' missing"),
]


@pytest.mark.parametrize(("text", "message"), SPELLING_MISTAKES)
def test_a_badly_spelt_node_is_one_line(place: Path, text: str, message: str) -> None:
    assert refusal("mount", "--blockdev", text, "mnt") == f"--blockdev {text}: {message}"
    assert left_behind(place) == []


#: command, arguments, and what is said about them
COMMANDS: list[tuple[str, Json, str]] = [
    ("nonsense", {}, "The command nonsense has not been found"),
    ("query-version", {"x": 1}, "Parameter 'x' is unexpected"),
    ("blockdev-del", {}, "Parameter 'node-name' is missing"),
    ("blockdev-del", {"node-name": 5}, "Invalid parameter type for 'node-name', expected: string"),
    ("blockdev-del", {"node-name": "none"}, "Failed to find node with node-name='none'"),
    ("blockdev-del", {"node-name": "storage"}, "Node storage is not owned by the monitor"),
    ("blockdev-del", {"node-name": "lower"}, "Block device lower is in use"),
    ("blockdev-del", {"node-name": "upper"}, "Node upper is in use"),
    ("block_resize", {"node-name": "none", "size": 512}, "Cannot find device='' nor node-name='none'"),
    ("block_resize", {"size": 512}, "Cannot find device='' nor node-name=''"),
    ("block_resize", {"node-name": "disk"}, "Parameter 'size' is missing"),
    ("block_resize", {"node-name": "disk", "size": -1}, "Parameter 'size' expects a >0 size"),
    ("block_resize", {"node-name": "disk", "size": "1"}, "Invalid parameter type for 'size', expected: integer"),
    ("query-named-block-nodes", {"flat": "x"}, "Invalid parameter type for 'flat', expected: boolean"),
    ("query-blockstats", {"query-nodes": 1}, "Invalid parameter type for 'query-nodes', expected: boolean"),
    ("quit", {"x": 1}, "Parameter 'x' is unexpected"),
]


@on_devfuse
def test_a_bad_command_is_one_error_and_changes_nothing(mount: Callable[..., Mount], place: Path) -> None:
    lower, upper = null(size=4096) | {"node-name": "lower"}, over("raw", file="lower") | {"node-name": "upper"}
    mounted = mount(*good_nodes(place), lower, upper)
    before = mounted.qmp("query-named-block-nodes")
    with open(mounted / "upper", "rb"):
        for command, arguments, message in COMMANDS:
            assert error(mounted, command, arguments) == message, (command, arguments)
    assert mounted.qmp("query-named-block-nodes") == before
    mounted.umount()


@on_devfuse
def test_a_bad_command_of_the_shell_is_one_line(mount: Callable[..., Mount], place: Path) -> None:
    mounted = mount(*good_nodes(place))
    message = refusal("qmp", mounted.point, "blockdev-add", "driver=raw", "node-name=n", "file=none")
    assert message == "Cannot find device='none' nor node-name='none'"
    assert refusal("qmp", mounted.point, "nonsense") == "The command nonsense has not been found"
    assert refusal("qmp", mounted.point, "block_resize", "size=x") == "Parameter 'size' expects integer"
    mounted.umount()


# --- mount points ------------------------------------------------------------------------------------


def test_a_mount_point_that_is_missing_is_refused(place: Path) -> None:
    assert refusal("mount", "none") == f"{place}/none: No such file or directory"
    assert left_behind(place) == []


def test_a_mount_point_that_is_no_directory_is_refused(place: Path) -> None:
    assert refusal("mount", "raw") == f"{place}/raw: not a directory"
    assert left_behind(place) == []


def test_a_mount_point_that_is_not_empty_is_refused(place: Path) -> None:
    (place / "mnt" / "something").write_text("")
    assert refusal("mount", "mnt") == f"{place}/mnt: directory is not empty"
    assert left_behind(place) == []


def test_a_mount_point_that_is_in_use_is_refused(place: Path) -> None:
    run("mount", "-t", "tmpfs", "none", place / "mnt")
    assert refusal("mount", "mnt") == f"{place}/mnt: already a mount point"
    assert left_behind(place) == [f"{place}/mnt"]


def test_what_is_not_fusebds_is_not_unmounted(place: Path) -> None:
    run("mount", "-t", "tmpfs", "none", place / "mnt")
    assert refusal("umount", "mnt") == f"{place}/mnt: not mounted by fusebd"
    assert mounts_below(place) == [f"{place}/mnt"]


def test_the_mount_point_is_looked_at_before_the_nodes(place: Path) -> None:
    # What is opened for nothing may be locked, or take long.
    assert (
        refusal("mount", "--blockdev", json.dumps(file("none")), "none") == f"{place}/none: No such file or directory"
    )


# --- /dev/fuse ---------------------------------------------------------------------------------------


def without_dev_fuse(place: Path, commands: str) -> tuple[int, str]:
    """Exit status and standard error of an attempt to mount, in a mount namespace where *commands* changed /dev."""
    command = shlex.join([*FUSEBD, "mount", "--blockdev", "null-co,node-name=n", str(place / "mnt")])
    script = f"set -e\nmount -t tmpfs none {place}/directory\n{commands}\n{command}\n"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_no_dev_fuse_is_one_line(place: Path) -> None:
    commands = f"mknod -m 666 {place}/directory/null c 1 3; mount --bind {place}/directory /dev"
    assert without_dev_fuse(place, commands) == (1, "fusebd: /dev/fuse: No such file or directory\n")
    assert left_behind(place) == []


def test_an_empty_dev_is_one_line(place: Path) -> None:
    commands = f"mount --bind {place}/directory /dev"
    assert without_dev_fuse(place, commands) == (1, "fusebd: Could not open '/dev/null': No such file or directory\n")
    assert left_behind(place) == []


# --- addresses and files of the daemon ----------------------------------------------------------------


@contextmanager
def listening(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        yield


def test_a_socket_path_where_somebody_listens_is_refused(place: Path) -> None:
    with listening(place / "qmp"):
        assert refusal("mount", "--qmp", "unix:qmp", "mnt") == f"unix:{place}/qmp: Address already in use"
    assert (place / "qmp").exists()
    assert left_behind(place) == []


def test_a_socket_path_that_is_a_file_is_refused_and_the_file_kept(place: Path) -> None:
    (place / "qmp").write_text("precious")
    assert refusal("mount", "--qmp", "unix:qmp", "mnt") == f"unix:{place}/qmp: Address already in use"
    assert (place / "qmp").read_text() == "precious"
    assert left_behind(place) == []


def test_a_socket_path_in_no_directory_is_refused(place: Path) -> None:
    assert refusal("mount", "--qmp", "unix:none/qmp", "mnt") == f"unix:{place}/none/qmp: No such file or directory"
    assert left_behind(place) == []


def test_a_socket_path_that_is_too_long_is_refused(place: Path) -> None:
    name = "x" * 200
    assert refusal("mount", "--qmp", f"unix:{name}", "mnt") == f"unix:{place}/{name}: AF_UNIX path too long"
    assert left_behind(place) == []


def test_a_port_where_somebody_listens_is_refused(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        message = refusal("mount", "--qmp", "unix:qmp", "--qmp", address, "mnt")
    assert message.startswith(f"{address}: ")
    assert message.endswith("ddress already in use")
    assert not (place / "qmp").exists()
    assert left_behind(place) == []


def test_an_address_that_is_given_twice_is_refused(place: Path) -> None:
    message = refusal("mount", "--qmp", "unix:qmp", "--qmp", "unix:./qmp", "mnt")
    assert message == f"unix:{place}/./qmp: Address already in use"
    assert not (place / "qmp").exists()
    assert left_behind(place) == []


@pytest.mark.parametrize(("name", "why"), [("none/log", "No such file or directory"), ("directory", "Is a directory")])
def test_a_log_that_cannot_be_written_is_refused(place: Path, name: str, why: str) -> None:
    assert refusal("mount", "--log-file", name, "mnt") == f"Could not open '{place}/{name}': {why}"
    assert left_behind(place) == []


def test_a_foreground_log_that_cannot_be_written_is_refused(place: Path) -> None:
    words = ["mount", "--foreground", "--log-file", "none/log", "mnt"]
    assert refusal(*words) == f"Could not open '{place}/none/log': No such file or directory"
    assert left_behind(place) == []


def test_a_mistake_in_the_configuration_is_one_line_with_its_number(place: Path) -> None:
    (place / "mounts.toml").write_text(
        "[[mount]]\npoint = 'mnt'\n[[mount.blockdev]]\ndriver = 'raw'\nnode-name = 'n'\nfile.driver = 'null-co'\n"
        "file.size = 'big'\n"
    )
    message = "Invalid parameter type for 'file.size', expected: integer"
    assert refusal("mount", "--config", "mounts.toml") == f"mounts.toml:7: mount[0].blockdev[0]: {message}"
    assert left_behind(place) == []


# --- qcow2 images ---------------------------------------------------------------------------------------


def image(path: Path) -> bytes:
    """A small qcow2 image with data, a backing file name and a snapshot."""
    run("qemu-img", "create", "-q", "-f", "qcow2", path.with_name("backing.qcow2"), "1M")
    backing = ["-b", "backing.qcow2", "-F", "qcow2"]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", *backing, path, "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 64k", "-c", "write -q -z 64k 64k", path)
    run("qemu-img", "snapshot", "-c", "one", path)
    return path.read_bytes()


#: what is written where into a header, and what is said about the image
HEADERS = [
    (0, b"XXXX", "Image is not in qcow2 format"),
    (4, struct.pack(">I", 4), "Unsupported qcow2 version 4"),
    (20, struct.pack(">I", 3), "Unsupported cluster size: 2^3"),
    (20, struct.pack(">I", 99), "Unsupported cluster size: 2^99"),
    (24, struct.pack(">Q", 1 << 62), "Image is too big"),
    (36, struct.pack(">I", 0), "L1 table is too small"),
    (36, struct.pack(">I", 0xFFFFFFFF), "Active L1 table too large"),
    (40, struct.pack(">Q", 1), "Active L1 table offset invalid"),
    (40, struct.pack(">Q", 1 << 63), "Active L1 table offset invalid"),
    (48, struct.pack(">Q", 7), "Reference count table offset invalid"),
    (56, struct.pack(">I", 0), "Image does not contain a reference count table"),
    (56, struct.pack(">I", 0xFFFFFFFF), "Reference count table too large"),
    (60, struct.pack(">I", 0xFFFFFFFF), "Snapshot table too large"),
    (64, struct.pack(">Q", 7), "Snapshot table offset invalid"),
    (72, struct.pack(">Q", 1 << 40), "Unsupported qcow2 feature(s): Unknown incompatible feature: 10000000000"),
    (72, struct.pack(">Q", 2), "qcow2: Image is corrupt; cannot be opened read/write"),
    (8, struct.pack(">Q", 1 << 60), "Invalid backing file offset"),
    (16, struct.pack(">I", 5000), "Backing file name too long"),
    (96, struct.pack(">I", 7), "Reference count entry width too large; may not exceed 64 bits"),
    (100, struct.pack(">I", 8), "qcow2 header too short"),
    (100, struct.pack(">I", 0xFFFFFFF0), "qcow2 header exceeds cluster size"),
    (112, struct.pack(">II", 0xE2792ACA, 0xFFFFFFFF), "Header extension too large"),
]


@on_devfuse
def test_a_malformed_header_is_one_error_in_qemus_words(mount: Callable[..., Mount], place: Path) -> None:
    good = image(place / "good.qcow2")
    mounted = mount()
    mounted.qmp("query-version")
    files = open_files(mounted)
    for offset, data, message in HEADERS:
        (place / "bad.qcow2").write_bytes(good[:offset] + data + good[offset + len(data) :])
        assert error(mounted, "blockdev-add", qcow2("n", place / "bad.qcow2")) == message, (offset, data)
        assert open_files(mounted) == files
    mounted.umount()


def test_a_malformed_image_on_the_command_line_is_one_line(place: Path) -> None:
    good = image(place / "good.qcow2")
    (place / "bad.qcow2").write_bytes(good[:36] + b"\xff\xff\xff\xff" + good[40:])
    options = json.dumps(qcow2("n", place / "bad.qcow2"))
    assert refusal("mount", "--blockdev", options, "mnt") == f"--blockdev {options}: Active L1 table too large"
    assert left_behind(place) == []


@pytest.mark.parametrize("length", [0, 1, 4, 50, 72, 103])
def test_a_truncated_header_is_one_line(place: Path, length: int) -> None:
    good = image(place / "good.qcow2")
    (place / "bad.qcow2").write_bytes(good[:length])
    options = json.dumps(qcow2("n", place / "bad.qcow2"))
    message = {0: "Image is not in qcow2 format", 1: "Image is not in qcow2 format", 4: "Unsupported qcow2 version 0"}
    expected = message.get(length, "qcow2 header too short")
    assert refusal("mount", "--blockdev", options, "mnt") == f"--blockdev {options}: {expected}"
    assert left_behind(place) == []


def resident(mounted: Mount) -> int:
    """The most memory that the daemon ever had, in bytes."""
    status = Path(f"/proc/{mounted.pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))


def attempt(action: Callable[..., object], *arguments: object) -> None:
    """An error of the file is what a damaged image may answer."""
    with suppress(OSError):
        action(*arguments)


def use(mounted: Mount, options: Json, seed: int) -> None:
    """Add a node, read and write all over it as far as that works, and remove it."""
    answer = mounted.qmp.ask({"execute": "blockdev-add", "arguments": options})
    if "error" in answer:
        assert answer["error"]["class"] == "GenericError"
        assert "nternal error" not in answer["error"]["desc"], answer
        return
    rng = random.Random(seed)
    descriptor = os.open(mounted / "n", os.O_RDWR)
    for _ in range(20):
        offset, length = rng.randrange(1 << 20), rng.randrange(1 << 16)
        if rng.random() < 0.5:
            attempt(os.pread, descriptor, length, offset)
        else:
            attempt(os.pwrite, descriptor, rng.randbytes(length), offset)
    attempt(os.close, descriptor)
    mounted.qmp("blockdev-del", {"node-name": "n"})


@on_devfuse
def test_damaged_images_do_the_daemon_no_harm(mount: Callable[..., Mount], place: Path) -> None:
    good = image(place / "good.qcow2")
    mounted = mount(null(size=512) | {"node-name": "other"})
    mounted.qmp("query-version")
    files, memory = open_files(mounted), resident(mounted)
    rng = random.Random(20260101)
    for number in range(250):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 5)):
            # half of the damage in the header, the rest where tables and data are
            offset = rng.randrange(152) if rng.random() < 0.5 else rng.randrange(len(data) - 8)
            data[offset : offset + rng.randrange(1, 9)] = rng.choice(
                (b"\xff" * 8, bytes(8), rng.randbytes(8), struct.pack(">Q", 1 << rng.randrange(64)))
            )
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        (place / "bad.qcow2").write_bytes(data)
        use(mounted, qcow2("n", place / "bad.qcow2"), number)
        assert open_files(mounted) == files, number
    assert (mounted / "other").read_bytes() == bytes(512)
    assert resident(mounted) - memory < 256 << 20
    mounted.hang_up()
    subprocess.run([*FUSEBD, "umount", str(mounted.point)], capture_output=True, check=False)
    log = mounted.log.read_text()
    assert "Traceback" not in log, log
    assert "internal error" not in log, log
    assert mounts_below(place) == []


# --- images and their other users -------------------------------------------------------------------


@on_devfuse
def test_an_image_that_qemu_has_open_is_one_error(mount: Callable[..., Mount], place: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "disk.qcow2", "1M")
    mounted = mount()
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", "disk.qcow2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as io:
        assert io.stdin is not None
        assert io.stdout is not None
        io.stdin.write(b"length\n")
        io.stdin.flush()
        assert b"1 MiB" in io.stdout.readline()
        message = error(mounted, "blockdev-add", qcow2("n", place / "disk.qcow2"))
        assert message == 'Failed to get "write" lock'
        io.stdin.close()
    mounted.qmp("blockdev-add", qcow2("n", place / "disk.qcow2"))
    mounted.umount()


@on_devfuse
def test_a_node_in_use_is_not_removed(mount: Callable[..., Mount], place: Path) -> None:
    mounted = mount(*good_nodes(place))
    with open(mounted / "disk", "rb"):
        assert error(mounted, "blockdev-del", {"node-name": "disk"}) == "Node disk is in use"
        assert refusal("qmp", mounted.point, "blockdev-del", "node-name=disk") == "Node disk is in use"
    fusebd("qmp", mounted.point, "blockdev-del", "node-name=disk")
    assert sorted(os.listdir(mounted.point)) == ["fixed"]
    mounted.umount()
