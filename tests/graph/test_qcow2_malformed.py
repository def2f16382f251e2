"""Images that are not what they should be: refused in QEMU's words, or found out later, and nothing worse."""

from __future__ import annotations

import errno
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from images import create, io, patch, u16, u32, u64
from mounting import run
from support import read, root_of, write

from fusebd.block.child import MAY_UNMAP
from fusebd.block.graph import Graph
from fusebd.block.opening import MAX_CHAIN
from fusebd.block.perms import Perm
from fusebd.block.root import Root
from fusebd.errors import BlockIOError, FusebdError
from fusebd.ondisk import qcow2 as ondisk

Edits = list[tuple[int, bytes]]

# --- headers -------------------------------------------------------------------------------------

END = bytes(8)


def extension(kind: int, body: bytes) -> bytes:
    return u32(kind) + u32(len(body)) + body + bytes(-len(body) % 8)


def features(*entries: tuple[int, int, bytes]) -> bytes:
    return extension(ondisk.EXT_FEATURE_TABLE, b"".join(struct.pack(">BB46s", *entry) for entry in entries)) + END


def bitmaps(number: int, reserved: int, size: int, offset: int) -> bytes:
    return extension(ondisk.EXT_BITMAPS, struct.pack(">IIQQ", number, reserved, size, offset)) + END


# Left what is changed in an image of 1 MiB with clusters of 64 KiB, right what QEMU 10.0.2 says.
REFUSED: dict[str, tuple[Edits, str]] = {
    "magic": ([(0, b"QFIx")], "Image is not in qcow2 format"),
    "version 1": ([(4, u32(1))], "Unsupported qcow2 version 1"),
    "version 4": ([(4, u32(4))], "Unsupported qcow2 version 4"),
    "no cluster": ([(20, u32(0))], "Unsupported cluster size: 2^0"),
    "small cluster": ([(20, u32(8))], "Unsupported cluster size: 2^8"),
    "large cluster": ([(20, u32(22))], "Unsupported cluster size: 2^22"),
    "largest cluster": ([(20, u32(2**32 - 1))], "Unsupported cluster size: 2^4294967295"),
    "short header": ([(100, u32(103))], "qcow2 header too short"),
    "no header": ([(100, u32(0))], "qcow2 header too short"),
    "long header": ([(100, u32(65537))], "qcow2 header exceeds cluster size"),
    "odd header": ([(100, u32(108))], "Header extension too large"),
    "backing name outside": ([(8, u64(65537))], "Invalid backing file offset"),
    "backing name far outside": ([(8, u64(2**64 - 1))], "Invalid backing file offset"),
    "backing name at the end": ([(8, u64(65536)), (16, u32(1))], "Backing file name too long"),
    "backing name too long": ([(8, u64(1024)), (16, u32(1024))], "Backing file name too long"),
    "backing name over the end": ([(8, u64(65000)), (16, u32(1000))], "Backing file name too long"),
    "backing name endless": ([(8, u64(1024)), (16, u32(2**32 - 1))], "Backing file name too long"),
    "compression unflagged": ([(104, b"\1")], "qcow2: Compression type incompatible feature bit must be set"),
    "compression unknown": ([(104, b"\2")], "qcow2: unknown compression type: 2"),
    "compression flagged": ([(72, u64(8))], "qcow2: Compression type incompatible feature bit must not be set"),
    "unknown feature": (
        [(72, u64(1 << 5))], "Unsupported qcow2 feature(s): Unknown incompatible feature: 20",
    ),
    "unknown features": (
        [(72, u64(1 << 63 | 1 << 6))], "Unsupported qcow2 feature(s): Unknown incompatible feature: 8000000000000040",
    ),
    "named feature": (
        [(72, u64(1 << 5)), (112, features((0, 5, b"tesseract")))], "Unsupported qcow2 feature(s): tesseract",
    ),
    "named and unnamed features": (
        [(72, u64(3 << 5)), (112, features((0, 5, b"tesseract"), (1, 6, b"no"), (2, 6, b"neither")))],
        "Unsupported qcow2 feature(s): tesseract, Unknown incompatible feature: 40",
    ),
    "features in the table's order": (
        [(72, u64(3 << 5)), (112, features((0, 6, b"six"), (0, 5, b"five"), (0, 70, b"seventy")))],
        "Unsupported qcow2 feature(s): six, five",
    ),
    "end of the feature table": (
        [(72, u64(3 << 5)), (112, features((0, 6, b""), (0, 5, b"five")))],
        "Unsupported qcow2 feature(s): Unknown incompatible feature: 60",
    ),
    "nonsense after the feature table": (
        [(72, u64(1 << 5)), (112, features((0, 5, b"tesseract"))[:-8] + u32(5) + u32(2**32 - 1))],
        "Unsupported qcow2 feature(s): tesseract",
    ),
    "refcounts too wide": (
        [(96, u32(7))], "Reference count entry width too large; may not exceed 64 bits",
    ),
    "no refcount table": ([(56, u32(0))], "Image does not contain a reference count table"),
    "refcount table too large": ([(56, u32(129))], "Reference count table too large"),
    "refcount table endless": ([(56, u32(2**32 - 1))], "Reference count table too large"),
    "refcount table unaligned": ([(48, u64(1))], "Reference count table offset invalid"),
    "refcount table past all": ([(48, u64(1 << 63))], "Reference count table offset invalid"),
    "refcount table over the end": ([(48, u64((1 << 63) - 65536))], "Reference count table offset invalid"),
    "snapshots too many": ([(60, u32(65537))], "Snapshot table too large"),
    "snapshot table unaligned": ([(64, u64(1))], "Snapshot table offset invalid"),
    "snapshot table past all": ([(60, u32(1)), (64, u64(1 << 63))], "Snapshot table offset invalid"),
    "snapshot with too much data": (
        [(60, u32(1)), (64, u64(0x30000)), (0x30000 + 36, u32(1025))],
        "Too much extra metadata in snapshot table entry 0",
    ),
    "L1 table too small": ([(36, u32(0))], "L1 table is too small"),
    "L1 table too small for the disk": ([(24, u64(1 << 40))], "L1 table is too small"),
    "L1 table too large": ([(36, u32((4 << 20) + 1))], "Active L1 table too large"),
    "L1 table endless": ([(36, u32(2**32 - 1))], "Active L1 table too large"),
    "L1 table unaligned": ([(40, u64(1))], "Active L1 table offset invalid"),
    "L1 table past all": ([(40, u64(1 << 63))], "Active L1 table offset invalid"),
    "disk too large": ([(24, u64(1 << 62))], "Image is too big"),
    "extension past the cluster": ([(112, u32(0x12345) + u32(65536 - 119))], "Header extension too large"),
    "extension endless": ([(112, u32(0x12345) + u32(2**32 - 1))], "Header extension too large"),
    "backing format too long": (
        [(112, extension(ondisk.EXT_BACKING_FORMAT, b"a" * 16) + END)],
        "ERROR: ext_backing_format: len=16 too large (>=16)",
    ),
    "unexpected encryption": (
        [(112, extension(ondisk.EXT_CRYPTO_HEADER, bytes(16)) + END)],
        "CRYPTO header extension only expected with LUKS encryption method",
    ),
    "bitmaps of a wrong length": (
        [(112, extension(ondisk.EXT_BITMAPS, bytes(23)) + END)], "bitmaps_ext: Invalid extension length",
    ),
    "no bitmaps": ([(88, u64(1)), (112, bitmaps(0, 0, 0, 0))], "found bitmaps extension with zero bitmaps"),
    "bitmaps reserved": ([(88, u64(1)), (112, bitmaps(1, 1, 0, 0))], "bitmaps_ext: Reserved field is not zero"),
    "too many bitmaps": (
        [(88, u64(1)), (112, bitmaps(65536, 0, 0, 0))],
        "bitmaps_ext: Image has 65536 bitmaps, exceeding the QEMU supported maximum of 65535",
    ),
    "bitmaps unaligned": (
        [(88, u64(1)), (112, bitmaps(1, 0, 100, 1))], "bitmaps_ext: invalid bitmap directory offset",
    ),
    "bitmap directory too large": (
        [(88, u64(1)), (112, bitmaps(1, 0, 1 << 40, 65536))],
        "bitmaps_ext: bitmap directory size (1099511627776) exceeds the maximum supported size (67107840)",
    ),
    "raw data without a data file": ([(88, u64(2))], "data-file-raw requires a data file"),
    "aes": ([(32, u32(1))], "Parameter 'encrypt.key-secret' is required for cipher"),
    "luks without a header": ([(32, u32(2))], "Missing CRYPTO header for crypt method 2"),
    "no such encryption": ([(32, u32(3))], "Unsupported encryption method 3"),
    "luks header elsewhere": (
        [(32, u32(2)), (112, extension(ondisk.EXT_CRYPTO_HEADER, u64(512) + u64(4096)) + END)],
        "Encryption header offset '512' is not a multiple of cluster size '65536'",
    ),
    "luks header's length": (
        [(32, u32(2)), (112, extension(ondisk.EXT_CRYPTO_HEADER, u64(512)) + END)],
        "CRYPTO header extension size 8, but expected size 16",
    ),
    "data file without a name": ([(72, u64(4))], "'data-file' is required for this image"),
}  # fmt: skip

# What QEMU 10.0.2 opens, and how long the disk is then.
ACCEPTED: dict[str, tuple[Edits, int]] = {
    "zstd": ([(72, u64(8)), (104, b"\1")], 1 << 20),
    "extended L2": ([(72, u64(16))], 1 << 20),
    "header of a whole cluster": ([(100, u32(65536))], 1 << 20),
    "backing name without length": ([(8, u64(1024)), (16, u32(0))], 1 << 20),
    "backing name in the header": ([(8, u64(8)), (16, u32(10))], 1 << 20),
    "L1 table past the end of the file": ([(40, u64(1 << 56))], 1 << 20),
    "L1 table as large as can be": ([(36, u32(4 << 20))], 1 << 20),
    "refcount table past the end of the file": ([(48, u64(1 << 55))], 1 << 20),
    "refcount table as large as can be": ([(56, u32(128))], 1 << 20),
    "snapshots past the end of the file": ([(60, u32(2)), (64, u64(1 << 55))], 1 << 20),
    "snapshot with an L1 table that cannot be": (
        [(60, u32(1)), (64, u64(0x30000)), (0x30000, u64(12345) + u32(2**32 - 1) + bytes(28))], 1 << 20,
    ),
    "part of a sector": ([(24, u64(1000))], 512),
    "no disk": ([(24, u64(0))], 0),
    "unknown extension up to the end": ([(112, u32(0x12345) + u32(65536 - 120))], 1 << 20),
    "data file extension": ([(112, extension(ondisk.EXT_DATA_FILE, b"name") + END)], 1 << 20),
    "bitmaps that are out of date": ([(112, bitmaps(0, 0, 0, 0))], 1 << 20),
    "unknown autoclear bits": ([(88, u64(0xF0))], 1 << 20),
    "unknown compatible bits": ([(80, u64(0xF0))], 1 << 20),
}  # fmt: skip


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create(tmp_path_factory.mktemp("empty") / "image", "1M")


def disk(path: Path, *, read_only: bool = False, **options: Any) -> dict[str, Any]:
    file = {"driver": "file", "filename": str(path)}
    return {"driver": "qcow2", "node-name": "disk", "discard": "unmap", "read-only": read_only, "file": file, **options}


async def refusal(graph: Graph, path: Path, *, read_only: bool = False) -> str:
    """The message with which the image is not opened."""
    with pytest.raises(FusebdError) as caught:
        await graph.blockdev_add(disk(path, read_only=read_only))
    assert not graph.nodes
    return str(caught.value)


@pytest.mark.parametrize("read_only", [False, True], ids=["read-write", "read-only"])
@pytest.mark.parametrize("name", REFUSED)
async def test_a_malformed_header_is_refused_in_qemus_words(
    graph: Graph, empty: Path, tmp_path: Path, name: str, read_only: bool
) -> None:
    edits, message = REFUSED[name]
    path = patch(Path(shutil.copy(empty, tmp_path)), *edits)
    assert await refusal(graph, path, read_only=read_only) == message


@pytest.mark.parametrize("name", REFUSED)
def test_qemu_itself_refuses_the_header_in_these_words(empty: Path, tmp_path: Path, name: str) -> None:
    edits, message = REFUSED[name]
    path = patch(Path(shutil.copy(empty, tmp_path)), *edits)
    said = io(path, "quit", options=["-r"], expect=(1,)).splitlines()[0]
    assert said == f"qemu-io: can't open device {path}: {message}"


@pytest.mark.parametrize("name", ACCEPTED)
async def test_what_qemu_opens_is_opened(graph: Graph, empty: Path, tmp_path: Path, name: str) -> None:
    edits, length = ACCEPTED[name]
    path = patch(Path(shutil.copy(empty, tmp_path)), *edits)
    io(path, "quit", options=["-r"])
    for read_only in (True, False):
        node = await graph.blockdev_add(disk(path, read_only=read_only))
        assert node.driver.length == length
        await graph.blockdev_del("disk")


# --- the corrupt bit -----------------------------------------------------------------------------


async def test_a_corrupt_image_is_refused_for_writing_and_read_otherwise(graph: Graph, tmp_path: Path) -> None:
    path = create(tmp_path / "image", "1M")
    io(path, "write -P 5 0 64k")
    patch(path, (ondisk.INCOMPATIBLE_OFFSET, u64(ondisk.INCOMPAT_CORRUPT)))
    assert await refusal(graph, path) == "qcow2: Image is corrupt; cannot be opened read/write"
    node = await graph.blockdev_add(disk(path, read_only=True))
    assert await read(root_of(graph, "disk", Perm.CONSISTENT_READ), 0, 65536) == b"\5" * 65536
    specific = node.driver.format_info()["format-specific"]
    assert isinstance(specific, dict)
    assert specific["data"]["corrupt"] is True


# --- corruption found later ----------------------------------------------------------------------

# Where things are in an image of 1 MiB in which qemu-io has written the first 128 KiB.
TABLE, BLOCK, L1, L2, DATA = (number << 16 for number in range(1, 6))
COPIED = ondisk.COPIED


@dataclass(frozen=True)
class Corruption:
    """*edits* make the image corrupt; *request* finds that out."""

    edits: Edits
    request: str
    message: str
    where: tuple[int, int] | None = None  #: offset and size in the event
    compat: str = "1.1"


# The messages are QEMU 10.0.2's.
CORRUPTIONS = {
    "L2 table unaligned, read": Corruption(
        [(L1, u64(COPIED | L2 | 0x200))], "read 0 512", "L2 table offset 0x40200 unaligned (L1 index: 0)"
    ),
    "L2 table unaligned, write": Corruption(
        [(L1, u64(COPIED | L2 | 0x200))], "write 0 512", "L2 table offset 0x40200 unaligned (L1 index: 0)"
    ),
    "data unaligned, read": Corruption(
        [(L2 + 8, u64(COPIED | DATA | 0x200))],
        "read 0x10000 512",
        "Cluster allocation offset 0x50200 unaligned (L2 offset: 0x40000, L2 index: 0x1)",
    ),
    "data unaligned, write": Corruption(
        [(L2 + 8, u64(COPIED | DATA | 0x200))],
        "write 0x10000 512",
        "Data cluster offset 0x50200 unaligned (guest offset: 0x10000)",
    ),
    "data unaligned, copy on write": Corruption(
        [(L2, u64(DATA | 0x200))],
        "write 0 512",
        "Cluster allocation offset 0x50200 unaligned (L2 offset: 0x40000, L2 index: 0)",
    ),
    "zero cluster unaligned, read": Corruption(
        [(L2, u64(COPIED | DATA | 0x201))],
        "read 0 512",
        "Cluster allocation offset 0x50200 unaligned (L2 offset: 0x40000, L2 index: 0)",
    ),
    "zero cluster unaligned, write": Corruption(
        [(L2, u64(COPIED | DATA | 0x201))],
        "write 0 512",
        "Preallocated zero cluster offset 0x50200 unaligned (guest offset: 0)",
    ),
    "zero cluster in version 2, read": Corruption(
        [(L2, u64(COPIED | DATA | 1))],
        "read 0 512",
        "Zero cluster entry found in pre-v3 image (L2 offset: 0x40000, L2 index: 0)",
        compat="0.10",
    ),
    "zero cluster in version 2, write": Corruption(
        [(L2, u64(1))],
        "write 0 512",
        "Zero cluster entry found in pre-v3 image (L2 offset: 0x40000, L2 index: 0)",
        compat="0.10",
    ),
    "refcount block unaligned": Corruption(
        [(TABLE, u64(BLOCK | 0x200))], "write 0x80000 512", "Refblock offset 0x20200 unaligned (reftable index: 0)"
    ),
    "refcount of the header lost": Corruption(
        [(BLOCK, u16(0))],
        "write 0x80000 512",
        "Preventing invalid write on metadata (overlaps with qcow2_header)",
        (0, 65536),
    ),
    "refcount of the refcount table lost": Corruption(
        [(BLOCK + 2, u16(0))],
        "write 0x80000 512",
        "Preventing invalid write on metadata (overlaps with refcount table)",
        (TABLE, 512),
    ),
    "refcount of the refcount block lost": Corruption(
        [(BLOCK + 4, u16(0))],
        "write 0x80000 512",
        "Preventing invalid write on metadata (overlaps with refcount block)",
        (BLOCK, 512),
    ),
    "refcount of the L1 table lost": Corruption(
        [(BLOCK + 6, u16(0))],
        "write 0x80000 512",
        "Preventing invalid write on metadata (overlaps with active L1 table)",
        (L1, 512),
    ),
    "refcount of the L2 table lost": Corruption(
        [(BLOCK + 8, u16(0))],
        "write 0x80000 512",
        "Preventing invalid write on metadata (overlaps with active L2 table)",
        (L2, 512),
    ),
    "refcount of the header lost, no L2 table": Corruption(
        [(BLOCK, u16(0)), (L1, u64(0))], "write 0 512", "Preventing invalid allocation of L2 table at offset 0"
    ),
    "data in the L2 table": Corruption(
        [(L2, u64(COPIED | L2))],
        "write 0 512",
        "Preventing invalid write on metadata (overlaps with active L2 table)",
        (L2, 512),
    ),
    "data in the L1 table": Corruption(
        [(L2, u64(COPIED | L1))],
        "write 0 512",
        "Preventing invalid write on metadata (overlaps with active L1 table)",
        (L1, 512),
    ),
    "data in the refcount block": Corruption(
        [(L2, u64(COPIED | BLOCK))],
        "write 512 1024",
        "Preventing invalid write on metadata (overlaps with refcount block)",
        (BLOCK + 512, 1024),
    ),
    "data in the refcount table": Corruption(
        [(L2, u64(COPIED | TABLE))],
        "write 0 512",
        "Preventing invalid write on metadata (overlaps with refcount table)",
        (TABLE, 512),
    ),
    "L1 table as its own L2 table": Corruption(
        [(L1, u64(COPIED | L1))],
        "write 0 512",
        "Preventing invalid write on metadata (overlaps with active L1 table)",
        (L1, 512),
    ),
}
every_corruption = pytest.mark.parametrize("name", CORRUPTIONS)


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An image of each version, with clusters of data."""
    directory = tmp_path_factory.mktemp("used")
    images = {compat: create(directory / compat, "1M", compat=compat) for compat in ("0.10", "1.1")}
    for path in images.values():
        io(path, "write -P 1 0 128k")
    return images


async def request(root: Root, words: str) -> None:
    kind, offset, length = words.split()
    if kind == "read":
        await read(root, int(offset, 0), int(length))
    else:
        await write(root, int(offset, 0), b"x" * int(length))


def corrupted_events(graph: Graph) -> list[dict[str, Any]]:
    """The data of each BLOCK_IMAGE_CORRUPTED from now on."""
    found: list[dict[str, Any]] = []

    def listen(event: str, data: dict[str, Any]) -> None:
        if event == "BLOCK_IMAGE_CORRUPTED":
            found.append(data)

    graph.event_listeners.append(listen)
    return found


@every_corruption
async def test_a_corruption_is_announced_and_ends_the_use_of_the_image(
    graph: Graph, used: dict[str, Path], tmp_path: Path, name: str
) -> None:
    corruption = CORRUPTIONS[name]
    path = patch(Path(shutil.copy(used[corruption.compat], tmp_path / "image")), *corruption.edits)
    events = corrupted_events(graph)
    await graph.blockdev_add(disk(path))
    root = root_of(graph, "disk")
    with pytest.raises(BlockIOError) as caught:
        await request(root, corruption.request)
    assert caught.value.errno == errno.EIO
    expected = {"device": "", "node-name": "disk", "msg": corruption.message, "fatal": True}
    if corruption.where is not None:
        expected["offset"], expected["size"] = corruption.where
    assert events == [expected]
    for other in (read(root, 0x20000, 512), write(root, 0x90000, b"x"), root.pwrite_zeroes(0, 65536)):
        with pytest.raises(BlockIOError) as caught:
            await other
        assert caught.value.errno == errno.ENOMEDIUM
    await root.flush()
    await graph.detach_root(root)
    await graph.blockdev_del("disk")
    assert len(events) == 1
    assert not graph.close_failures
    if corruption.compat == "1.1":
        assert await refusal(graph, path) == "qcow2: Image is corrupt; cannot be opened read/write"
    await graph.blockdev_add(disk(path, read_only=True))


@every_corruption
def test_qemu_itself_calls_the_corruption_so(used: dict[str, Path], tmp_path: Path, name: str) -> None:
    corruption = CORRUPTIONS[name]
    path = patch(Path(shutil.copy(used[corruption.compat], tmp_path / "image")), *corruption.edits)
    said = io(path, corruption.request, expect=(0, 1))
    assert f"qcow2: Marking image as corrupt: {corruption.message}; further corruption events" in said


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if CORRUPTIONS[name].request.startswith("read")])
async def test_a_corruption_of_a_read_only_image_is_announced_once(
    graph: Graph, used: dict[str, Path], tmp_path: Path, name: str
) -> None:
    corruption = CORRUPTIONS[name]
    path = patch(Path(shutil.copy(used[corruption.compat], tmp_path / "image")), *corruption.edits)
    before = path.read_bytes()
    events = corrupted_events(graph)
    await graph.blockdev_add(disk(path, read_only=True))
    root = root_of(graph, "disk", Perm.CONSISTENT_READ)
    for _ in range(3):
        with pytest.raises(BlockIOError) as caught:
            await request(root, corruption.request)
        assert caught.value.errno == errno.EIO
    assert events == [{"device": "", "node-name": "disk", "msg": corruption.message, "fatal": False}]
    await graph.detach_root(root)
    await graph.blockdev_del("disk")
    assert path.read_bytes() == before


@pytest.mark.parametrize("words", ["discard", "unmap"])
async def test_an_unaligned_cluster_is_not_freed_and_that_is_announced(
    graph: Graph, used: dict[str, Path], tmp_path: Path, words: str
) -> None:
    path = patch(Path(shutil.copy(used["1.1"], tmp_path / "image")), (L2, u64(COPIED | DATA | 0x200)))
    events = corrupted_events(graph)
    await graph.blockdev_add(disk(path))
    root = root_of(graph, "disk")
    await (root.pdiscard(0, 65536) if words == "discard" else root.pwrite_zeroes(0, 65536, MAY_UNMAP))
    assert await read(root, 0, 65536) == bytes(65536)
    assert [(event["msg"], event["fatal"]) for event in events] == [("Cannot free unaligned cluster 0x50200", False)]


@pytest.mark.parametrize("offset", [(1 << 64) - 0x10000, (1 << 63) - 0x10000, 1 << 62], ids=hex)
async def test_a_refcount_block_where_no_file_reaches_is_an_io_error(
    graph: Graph, used: dict[str, Path], tmp_path: Path, offset: int
) -> None:
    path = patch(Path(shutil.copy(used["1.1"], tmp_path / "image")), (TABLE, u64(offset)))
    await graph.blockdev_add(disk(path))
    root = root_of(graph, "disk")
    with pytest.raises(BlockIOError) as caught:
        await write(root, 0x80000, b"x")
    assert caught.value.errno == errno.EIO
    assert await read(root, 0, 65536) == b"\1" * 65536


async def test_tables_past_the_end_of_the_file_read_as_zeroes(
    graph: Graph, used: dict[str, Path], tmp_path: Path
) -> None:
    path = patch(Path(shutil.copy(used["1.1"], tmp_path / "image")), (L1, u64(COPIED | 1 << 55)))
    await graph.blockdev_add(disk(path, read_only=True))
    assert await read(root_of(graph, "disk", Perm.CONSISTENT_READ), 0, 65536) == bytes(65536)


async def test_data_past_the_end_of_the_file_reads_as_zeroes_and_cannot_be_written(
    graph: Graph, used: dict[str, Path], tmp_path: Path
) -> None:
    path = patch(Path(shutil.copy(used["1.1"], tmp_path / "image")), (L2, u64(COPIED | 1 << 55)))
    await graph.blockdev_add(disk(path))
    root = root_of(graph, "disk")
    assert await read(root, 0, 65536) == bytes(65536)
    with pytest.raises(BlockIOError) as caught:
        await write(root, 0, b"x" * 512)
    assert caught.value.errno == errno.EFBIG
    await write(root, 0x80000, b"x" * 512)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("damage", ["bytes", "offset"])
async def test_a_compressed_cluster_that_cannot_be_decompressed_is_an_io_error(
    graph: Graph, tmp_path: Path, damage: str, compression: str
) -> None:
    path = create(tmp_path / "image", "1M", compression_type=compression)
    io(path, "write -c -P 1 0 64k", "write -c -P 2 64k 64k")
    entry = int.from_bytes(path.read_bytes()[L2 : L2 + 8], "big")
    offset, _ = ondisk.parse_compressed(entry, 16)
    if damage == "bytes":
        patch(path, (offset + 2, b"\xff\xff\xff\xff"))
    else:
        patch(path, (L2, u64(entry | 1 << 50)))
    await graph.blockdev_add(disk(path))
    root = root_of(graph, "disk")
    for request in (read(root, 0, 512), write(root, 0, b"x")):  # which has to copy the rest
        with pytest.raises(BlockIOError) as caught:
            await request
        assert caught.value.errno == errno.EIO
    assert await read(root, 65536, 65536) == b"\2" * 65536
    await write(root, 0, b"y" * 65536)
    assert await read(root, 0, 65536) == b"y" * 65536


# --- images that lead to themselves --------------------------------------------------------------


def named(path: Path, backing: str) -> Path:
    """An image whose backing file is called *backing*, whether there is such a file or not."""
    made = path.with_name("made")  # qemu-img would not make an image that is its own backing file
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2", made, "1M")
    return made.rename(path)


def without_format(path: Path) -> Path:
    """The image with its backing format forgotten, so that it is probed."""
    data = path.read_bytes()
    at = data.index(u32(ondisk.EXT_BACKING_FORMAT))
    return patch(path, (at, u32(0x12345)))


@pytest.mark.parametrize("read_only", [False, True], ids=["read-write", "read-only"])
@pytest.mark.parametrize("probed", [False, True], ids=["format", "probed"])
@pytest.mark.parametrize("name", ["image", "./image", "../{directory}/image", "{path}", "file:{path}"])
async def test_an_image_that_is_its_own_backing_file_is_refused(
    graph: Graph, tmp_path: Path, name: str, probed: bool, read_only: bool
) -> None:
    path = tmp_path / "image"
    named(path, name.format(path=path, directory=tmp_path.name))
    if probed:
        without_format(path)
    assert "creates an infinite loop" in await refusal(graph, path, read_only=read_only)


async def test_images_that_back_each_other_are_refused(graph: Graph, tmp_path: Path) -> None:
    for name, backing in (("a", "b"), ("b", "c"), ("c", "a")):
        named(tmp_path / name, backing)
    for read_only in (False, True):
        message = await refusal(graph, tmp_path / "a", read_only=read_only)
        assert message.startswith("Could not open backing file: " * 3 + "Backing file '")
        assert message.endswith("/a' creates an infinite loop.")


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"qcow2","file.filename":"PATH"}',
        'json:{"file":{"driver":"file","filename":"PATH"},"driver":"qcow2"}',
        "blkdebug::PATH",
        'json:{"driver":"raw","file":{"driver":"qcow2","file.filename":"PATH"}}',
    ],
)
async def test_a_loop_by_other_names_is_refused(graph: Graph, tmp_path: Path, name: str) -> None:
    path = tmp_path / "image"
    named(path, name.replace("PATH", str(path)))
    assert "creates an infinite loop" in await refusal(graph, path, read_only=True)


async def test_a_chain_that_is_too_long_is_refused_in_one_line(graph: Graph, tmp_path: Path) -> None:
    named(tmp_path / "template", str(tmp_path / f"{0:08}"))
    template = (tmp_path / "template").read_bytes()
    at = template.index(str(tmp_path).encode()) + len(str(tmp_path)) + 1
    for number in range(MAX_CHAIN + 2):
        data = template[:at] + f"{number + 1:08}".encode() + template[at + 8 :]
        (tmp_path / f"{number:08}").write_bytes(data)
    create(tmp_path / f"{MAX_CHAIN + 2:08}", "1M")
    message = await refusal(graph, tmp_path / f"{1:08}", read_only=True)
    assert message == f"Backing file chain has more than {MAX_CHAIN} images"
    await graph.blockdev_add(disk(tmp_path / f"{2:08}", read_only=True))
    root = root_of(graph, "disk", Perm.CONSISTENT_READ)
    assert await read(root, 0, 65536) == bytes(65536)


# --- images that would take much memory or time --------------------------------------------------


@pytest.mark.usefixtures("limited_memory")
async def test_snapshots_with_enormous_l1_tables_take_no_memory_and_are_protected(
    graph: Graph, used: dict[str, Path], tmp_path: Path
) -> None:
    rest = dict.fromkeys(
        ("id_str_size", "name_size", "date_sec", "date_nsec", "vm_clock_nsec", "vm_state_size", "extra_data_size"), 0
    )
    table = b"".join(
        ondisk.SNAPSHOT.build({"l1_table_offset": (1 << 40) + (number << 25), "l1_size": 4 << 20, **rest})
        for number in range(64)
    )
    start, number = 1 << 20, 65536
    path = patch(
        Path(shutil.copy(used["1.1"], tmp_path / "image")),
        (60, u32(number) + u64(start)),
        (start, table * (number // 64)),
        (L2 + 8, u64(COPIED | (1 << 40) + (5 << 25) + 65536)),
    )
    await graph.blockdev_add(disk(path))
    root = root_of(graph, "disk")
    await write(root, 0, b"data")
    with pytest.raises(BlockIOError, match="overlaps with inactive L1 table"):
        await write(root, 0x10000, b"data")


@pytest.mark.usefixtures("limited_memory")
async def test_a_disk_of_the_largest_size_takes_no_memory(graph: Graph, tmp_path: Path) -> None:
    path = create(tmp_path / "image", "64P", cluster_size=2 << 20)
    await graph.blockdev_add(disk(path))
    root = root_of(graph, "disk")
    for offset in (0, (64 << 50) - 4096):
        await write(root, offset, b"data")
        assert await read(root, offset, 4) == b"data"
    await root.pdiscard(0, 1 << 40)


def dirty(path: Path) -> None:
    patch(path, (ondisk.INCOMPATIBLE_OFFSET, u64(ondisk.INCOMPAT_DIRTY)))


@pytest.mark.usefixtures("limited_memory")
async def test_repair_reads_a_table_once_however_often_it_is_used(graph: Graph, tmp_path: Path) -> None:
    path = create(tmp_path / "image", "1M", refcount_bits=64)
    io(path, "write -P 1 0 1M")
    entries = 1 << 16
    end = -(-path.stat().st_size // 65536) * 65536
    patch(path, (36, u32(entries) + u64(end)), (end, u64(COPIED | L2) * entries))
    dirty(path)
    await graph.blockdev_add(disk(path))
    root = root_of(graph, "disk")
    assert await read(root, 0, 65536) == b"\1" * 65536
    await write(root, 0, b"mine")
    assert await read(root, 0, 8) == b"mine\1\1\1\1"
    assert await read(root, 65536, 65536) == b"\1" * 65536


@pytest.mark.usefixtures("limited_memory")
@pytest.mark.parametrize(
    ("edits", "message"),
    [
        pytest.param([(L2, u64(COPIED | 1 << 55))], "refcount block 16777216 is missing", id="data far away"),
        pytest.param(
            [(L2, b"".join(u64(COPIED | n << 40) for n in range(1, 8193)))], "refcount block", id="data everywhere"
        ),
        pytest.param([(L1, u64(COPIED | 1 << 55))], "past the end of the file", id="L2 table far away"),
        pytest.param([(L1, u64(COPIED | L2 | 0x200))], "unaligned", id="L2 table unaligned"),
        pytest.param([(L2, u64(COPIED | DATA | 0x200))], "unaligned", id="data unaligned"),
        pytest.param([(TABLE, u64(BLOCK) * 8192)], "used 8192 times", id="one refcount block for all"),
        pytest.param([(TABLE, u64(1 << 55))], "past the end of the file", id="refcount block far away"),
        pytest.param([(TABLE, u64(0))], "refcount block 0 is missing", id="no refcount block"),
        pytest.param([(L2 + 8 * n, u64(COPIED | DATA)) for n in range(70000 // 8)], "", id="data shared"),
        pytest.param(
            [(60, u32(1) + u64(0x80000)), (0x80000, u64(12345) + u32(5) + bytes(28))],
            "Snapshot L1 table offset invalid",
            id="snapshot unaligned",
        ),
    ],
)
async def test_a_dirty_image_that_cannot_be_right_is_not_repaired(
    graph: Graph, used: dict[str, Path], tmp_path: Path, edits: Edits, message: str
) -> None:
    path = patch(Path(shutil.copy(used["1.1"], tmp_path / "image")), *edits)
    dirty(path)
    if message:
        said = await refusal(graph, path)
        assert said.startswith("Could not repair dirty image: ")
        assert message in said
    else:
        await graph.blockdev_add(disk(path))
        await graph.blockdev_del("disk")
    await graph.blockdev_add(disk(path, read_only=True))
