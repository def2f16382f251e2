"""The FUSE protocol from bytes, both directions.  The oracle is the kernel's header, where it is installed."""

from __future__ import annotations

import contextlib
import re
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusebd.errors import FuseProtocolError
from fusebd.fuse import wire
from fusebd.fuse.transport import Attr, DirEntry, Statfs
from fusebd.fuse.wire import Init, InitIn, Layout

HEADER = Path("/usr/include/linux/fuse.h")

needs_header = pytest.mark.skipif(not HEADER.exists(), reason="the kernel's headers are not installed")
pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the bytes here are little-endian")

#: (layout, fields, bytes)
TABLE: list[tuple[Layout[Any], tuple[int, ...], str]] = [
    (
        wire.IN_HEADER,
        (0x50, 15, 0x1122, 2, 1000, 1001, 4711, 3),
        "50000000 0f000000 2211000000000000 0200000000000000 e8030000 e9030000 67120000 0300 0000",
    ),
    (wire.OUT_HEADER, (16, -5, 0x1122), "10000000 fbffffff 2211000000000000"),
    (wire.GETATTR_IN, (1, 7), "01000000 00000000 0700000000000000"),
    (
        wire._SETATTR_IN,
        (0x79, 7, 4096, 1, -2, 3, 4, 0o644, 5, 6),
        "79000000 00000000 0700000000000000 0010000000000000 0000000000000000 0100000000000000 feffffffffffffff"
        "0000000000000000 03000000 04000000 00000000 a4010000 00000000 05000000 06000000 00000000",
    ),
    (wire.OPEN_IN, (0x8002, 1), "02800000 01000000"),
    (
        wire.READ_IN,
        (7, 8192, 4096, 2, 9, 0x8000),
        "0700000000000000 0020000000000000 00100000 02000000 0900000000000000 00800000 00000000",
    ),
    (wire.RELEASE_IN, (7, 2, 1, 9), "0700000000000000 02000000 01000000 0900000000000000"),
    (wire.FLUSH_IN, (7, 9), "0700000000000000 00000000 00000000 0900000000000000"),
    (wire.FSYNC_IN, (7, 1), "0700000000000000 01000000 00000000"),
    (wire.XATTR_IN, (100,), "64000000 00000000"),
    (wire.FALLOCATE_IN, (7, 512, 1024, 3), "0700000000000000 0002000000000000 0004000000000000 03000000 00000000"),
    (wire.LSEEK_IN, (7, 512, 4), "0700000000000000 0002000000000000 04000000 00000000"),
    (
        wire.COPY_FILE_RANGE_IN,
        (7, 512, 2, 8, 1024, 2048, 0),
        "0700000000000000 0002000000000000 0200000000000000 0800000000000000 0004000000000000"
        "0008000000000000 0000000000000000",
    ),
    (wire.STATX_IN, (1, 7, 2, 0xFFF), "01000000 00000000 0700000000000000 02000000 ff0f0000"),
    (
        wire.INIT_OUT,
        (7, 45, 0x20000, 0x40000021, 64, 48, 0x100000, 1, 256, 0, 0x30, 1),
        "07000000 2d000000 00000200 21000040 4000 3000 00001000 01000000 0001 0000 30000000 01000000" + 24 * "00",
    ),
]
IDS = [layout._make.__name__ for layout, _, _ in TABLE]

ATTR = Attr(
    ino=2,
    mode=stat.S_IFREG | 0o644,
    size=0x123456789A,
    blocks=8,
    blksize=4096,
    uid=1000,
    gid=-1,
    atime_ns=1_000_000_002,
    mtime_ns=-1,
    ctime_ns=3_999_999_999,
)
ATTR_BYTES = bytes.fromhex(
    "0200000000000000 9a78563412000000 0800000000000000 0100000000000000 ffffffffffffffff 0300000000000000"
    "02000000 ffc99a3b ffc99a3b a4810000 01000000 e8030000 ffffffff 00000000 00100000 00000000"
)


def view(data: bytes | str) -> memoryview:
    return memoryview(bytes.fromhex(data) if isinstance(data, str) else data)


# -- the declarations ---------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "fields", "text"), TABLE, ids=IDS)
def test_fields_become_bytes(layout: Layout[Any], fields: tuple[int, ...], text: str) -> None:
    assert layout.encode(*fields) == bytes.fromhex(text)


@pytest.mark.parametrize(("layout", "fields", "text"), TABLE, ids=IDS)
def test_bytes_become_fields(layout: Layout[Any], fields: tuple[int, ...], text: str) -> None:
    assert layout.decode(view(text)) == fields
    assert layout.decode(view(text + "ffff")) == fields


@pytest.mark.parametrize(("layout", "fields", "text"), TABLE, ids=IDS)
def test_truncated_structure_is_refused_at_every_length(
    layout: Layout[Any], fields: tuple[int, ...], text: str
) -> None:
    whole = view(text)
    for length in range(len(whole)):
        with pytest.raises(FuseProtocolError):
            layout.decode(whole[:length])


@needs_header
def test_opcodes_are_those_of_the_header() -> None:
    values = {name: int(value) for name, value in re.findall(r"\bFUSE_(\w+)\s*= (\d+),", HEADER.read_text())}
    known = {opcode.name: opcode.value for opcode in wire.Opcode if opcode.name in values}
    assert len(known) > 40
    assert known == {name: values[name] for name in known}
    notify = {f"NOTIFY_{code.name}": code.value for code in wire.Notify}
    assert notify == {name: values[name] for name in notify}


@needs_header
@pytest.mark.parametrize(("prefix", "flags"), [("FUSE", Init), ("FOPEN", wire.Fopen), ("FATTR", wire.Fattr)])
def test_flags_are_those_of_the_header(prefix: str, flags: type[Init | wire.Fopen | wire.Fattr]) -> None:
    found = re.findall(rf"#define {prefix}_(\w+)\s+\(1(?:ULL)? << (\d+)\)", HEADER.read_text())
    values = {name: 1 << int(shift) for name, shift in found}
    known = {flag.name: flag.value for flag in flags if flag.name in values}
    assert len(known) >= 4
    assert known == {name: values[name] for name in known}


@needs_header
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("in_header", wire.IN_HEADER.size),
        ("out_header", wire.OUT_HEADER.size),
        ("getattr_in", wire.GETATTR_IN.size),
        ("setattr_in", wire._SETATTR_IN.size),
        ("open_in", wire.OPEN_IN.size),
        ("read_in", wire.READ_IN.size),
        ("write_in", wire.READ_IN.size),
        ("release_in", wire.RELEASE_IN.size),
        ("flush_in", wire.FLUSH_IN.size),
        ("fsync_in", wire.FSYNC_IN.size),
        ("getxattr_in", wire.XATTR_IN.size),
        ("fallocate_in", wire.FALLOCATE_IN.size),
        ("lseek_in", wire.LSEEK_IN.size),
        ("copy_file_range_in", wire.COPY_FILE_RANGE_IN.size),
        ("init_in", wire._INIT_IN.size + wire._INIT_EXT.size),
        ("init_out", wire.INIT_OUT.size),
        ("attr", wire._ATTR.size),
        ("kstatfs", wire._STATFS_OUT.size),
        ("open_out", wire._OPEN_OUT.size),
        ("write_out", wire._WRITE_OUT.size),
        ("dirent", wire._DIRENT.size),
        ("notify_inval_inode_out", wire._INVAL_INODE_OUT.size),
        ("notify_inval_entry_out", wire._INVAL_ENTRY_OUT.size),
        ("notify_delete_out", wire._DELETE_OUT.size),
    ],
)
def test_sizes_are_those_of_the_header(name: str, size: int) -> None:
    body = re.search(rf"struct fuse_{name} \{{(.*?)\n\}}", HEADER.read_text(), re.DOTALL)
    assert body
    fields = re.findall(r"u?int(\d+)_t\s+\w+(?:\[(\d+)\])?;", body[1])
    assert size == sum(int(bits) // 8 * int(count or 1) for bits, count in fields)


# -- requests -----------------------------------------------------------------------------------


def message(opcode: int, body: bytes, *, length: int | None = None, extensions: int = 0) -> memoryview:
    total = 40 + len(body) if length is None else length
    return view(wire.IN_HEADER.encode(total, opcode, 5, 2, 0, 0, 1, extensions) + body)


def test_header_and_body_are_told_apart() -> None:
    header, body = wire.decode_header(message(wire.Opcode.OPEN, b"12345678"))
    assert (header.opcode, header.unique, header.nodeid) == (14, 5, 2)
    assert bytes(body) == b"12345678"


def test_extensions_are_no_part_of_the_body() -> None:
    _, body = wire.decode_header(message(wire.Opcode.OPEN, b"12345678" + bytes(16), extensions=2))
    assert bytes(body) == b"12345678"


@pytest.mark.parametrize("length", [0, 39, 47, 49, 0xFFFFFFFF])
def test_request_with_another_length_than_it_says_is_refused(length: int) -> None:
    with pytest.raises(FuseProtocolError):
        wire.decode_header(message(wire.Opcode.OPEN, b"12345678", length=length))


def test_extensions_longer_than_the_request_are_refused() -> None:
    with pytest.raises(FuseProtocolError):
        wire.decode_header(message(wire.Opcode.OPEN, b"12345678", extensions=2))


@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize(
    ("layout", "fields", "where"),
    [
        (wire.READ_IN, (1, 0, 1, 0, 0, 0), 1),
        (wire.FALLOCATE_IN, (1, 0, 0, 0), 1),
        (wire.FALLOCATE_IN, (1, 0, 0, 0), 2),
        (wire.LSEEK_IN, (1, 0, 0), 1),
        (wire.COPY_FILE_RANGE_IN, (1, 0, 2, 3, 0, 0, 0), 1),
        (wire.COPY_FILE_RANGE_IN, (1, 0, 2, 3, 0, 0, 0), 4),
        (wire.COPY_FILE_RANGE_IN, (1, 0, 2, 3, 0, 0, 0), 5),
    ],
)
def test_offset_beyond_the_greatest_is_refused(
    layout: Layout[Any], fields: tuple[int, ...], where: int, offset: int
) -> None:
    data = layout.encode(*fields[:where], offset, *fields[where + 1 :])
    with pytest.raises(FuseProtocolError):
        layout.decode(view(data))


def test_write_has_its_data() -> None:
    request, data = wire.decode_write(view(wire.READ_IN.encode(7, 512, 3, 0, 0, 0) + b"abc"))
    assert (request.fh, request.offset, bytes(data)) == (7, 512, b"abc")


@pytest.mark.parametrize("size", [0, 2, 4, 0xFFFFFFFF])
def test_write_with_other_data_than_it_says_is_refused(size: int) -> None:
    with pytest.raises(FuseProtocolError):
        wire.decode_write(view(wire.READ_IN.encode(7, 512, size, 0, 0, 0) + b"abc"))


def test_write_across_the_greatest_offset_is_refused() -> None:
    with pytest.raises(FuseProtocolError):
        wire.decode_write(view(wire.READ_IN.encode(7, (1 << 63) - 2, 3, 0, 0, 0) + b"abc"))


def test_setattr_refuses_a_size_that_is_no_size_only_if_it_counts() -> None:
    for valid, refused in ((0, False), (wire.Fattr.SIZE, True)):
        data = view(wire._SETATTR_IN.encode(valid, 0, 1 << 63, 0, 0, 0, 0, 0, 0, 0))
        if refused:
            with pytest.raises(FuseProtocolError):
                wire.decode_setattr(data)
        else:
            assert wire.decode_setattr(data).valid == 0


def test_setattr_refuses_a_time_with_too_many_nanoseconds() -> None:
    with pytest.raises(FuseProtocolError):
        wire.decode_setattr(view(wire._SETATTR_IN.encode(16, 0, 0, 0, 0, 10**9, 0, 0, 0, 0)))


def test_name_is_what_comes_before_the_nul() -> None:
    assert wire.decode_name(view(b"disk0\0")) == b"disk0"
    assert wire.decode_name(view(b"x" * 4095 + b"\0")) == b"x" * 4095


@pytest.mark.parametrize("data", [b"", b"\0", b"disk0", b"disk\x000", b"disk0\0\0", b"x" * 4096 + b"\0"])
def test_name_that_does_not_end_where_it_should_is_refused(data: bytes) -> None:
    with pytest.raises(FuseProtocolError):
        wire.decode_name(view(data))


def test_getxattr_has_room_and_name() -> None:
    assert wire.decode_getxattr(view("40000000 00000000 757365722e7800")) == (64, b"user.x")
    with pytest.raises(FuseProtocolError):
        wire.decode_getxattr(view("40000000 00000000"))


DECODERS: list[Callable[[memoryview], object]] = [
    wire.decode_header,
    wire.decode_init,
    wire.decode_setattr,
    wire.decode_write,
    wire.decode_name,
    wire.decode_getxattr,
    *(layout.decode for layout, _, _ in TABLE),
]


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    results = 0
    for decode in DECODERS:
        with contextlib.suppress(FuseProtocolError):
            decode(view(data))
        results += 1
    assert results == len(DECODERS)


# -- INIT ---------------------------------------------------------------------------------------

OFFERED = (1 << 64) - 1
EVERYTHING = Init(OFFERED)


def negotiated(init: InitIn, wanted: Init = EVERYTHING) -> tuple[wire.Session | None, wire.InitOut]:
    session, answer = wire.negotiate(init, wanted, 1 << 20, 64)
    return session, wire.INIT_OUT.decode(memoryview(answer))


def test_init_has_flags_of_64_bits_if_it_says_so() -> None:
    old = view(struct.pack("=IIII", 7, 35, 131072, 0x21))
    assert wire.decode_init(old) == (7, 35, 131072, 0x21)
    extended = view(struct.pack("=IIIII44x", 7, 45, 131072, 0x40000021, 0x30))
    assert wire.decode_init(extended) == (7, 45, 131072, 0x30_4000_0021)


def test_init_that_says_it_is_extended_and_is_not_is_refused() -> None:
    data = struct.pack("=IIIII44x", 7, 45, 131072, 0x40000021, 0x30)
    for length in range(len(data)):
        with pytest.raises(FuseProtocolError):
            wire.decode_init(view(data[:length]))


def test_newest_protocol_gets_everything_that_is_wanted() -> None:
    wanted = Init.ASYNC_READ | Init.MAX_PAGES | Init.PASSTHROUGH | Init.DIRECT_IO_ALLOW_MMAP
    session, out = negotiated(InitIn(7, 45, 131072, OFFERED), wanted)
    assert session == (45, wanted | Init.INIT_EXT, 1 << 20)
    assert (out.major, out.minor, out.max_write, out.max_pages) == (7, 45, 1 << 20, 256)
    assert (out.flags, out.flags2, out.max_stack_depth) == (0x40400001, 0x30, 1)
    assert (out.max_background, out.congestion_threshold, out.max_readahead, out.time_gran) == (64, 48, 131072, 1)


def test_later_minor_version_is_answered_with_ours() -> None:
    session, out = negotiated(InitIn(7, 99, 131072, 0))
    assert session
    assert (session.minor, out.minor) == (45, 45)


def test_oldest_protocol_gets_small_writes_and_no_new_flags() -> None:
    session, out = negotiated(InitIn(7, 23, 131072, int(Init.ASYNC_READ | Init.BIG_WRITES)))
    assert session == (23, Init.ASYNC_READ | Init.BIG_WRITES, 131072)
    assert (out.minor, out.max_write, out.max_pages, out.flags2, out.max_stack_depth) == (23, 131072, 0, 0, 0)


@pytest.mark.parametrize(("major", "minor"), [(7, 22), (7, 0), (6, 99), (0, 0)])
def test_older_protocol_is_refused_clearly(major: int, minor: int) -> None:
    with pytest.raises(FuseProtocolError, match=rf"protocol {major}\.{minor}, at least 7\.23 is needed"):
        negotiated(InitIn(major, minor, 131072, 0))


def test_later_major_version_is_asked_to_step_down() -> None:
    session, out = negotiated(InitIn(8, 3, 131072, OFFERED))
    assert session is None
    assert out.major == 7


def test_what_is_not_wanted_is_not_taken() -> None:
    session, out = negotiated(InitIn(7, 45, 131072, OFFERED), Init.ASYNC_DIO)
    assert session
    assert (session.flags, out.flags, out.flags2) == (Init.ASYNC_DIO, 1 << 15, 0)


def test_passthrough_gives_way_to_writeback() -> None:
    session, out = negotiated(InitIn(7, 45, 131072, OFFERED), Init.PASSTHROUGH | Init.WRITEBACK_CACHE)
    assert session
    assert session.flags == Init.WRITEBACK_CACHE
    assert out.max_stack_depth == 0


# -- answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (wire.encode_reply(5), "10000000 00000000 0500000000000000"),
        (wire.encode_reply(5, b"abc"), "13000000 00000000 0500000000000000 616263"),
        (wire.encode_error(5, 28), "10000000 e4ffffff 0500000000000000"),
        (wire.encode_open_out(7, 0x41), "0700000000000000 41000000 00000000"),
        (wire.encode_open_out(7, 0x80, 3), "0700000000000000 80000000 03000000"),
        (wire.encode_write_out(4096), "00100000 00000000"),
        (wire.encode_u64(1 << 40), "0000000000010000"),
        (
            wire.encode_statfs_out(Statfs(4096, 10, 3, 2, 5, 31)),
            "0a00000000000000 0300000000000000 0200000000000000 0500000000000000 0000000000000000"
            "00100000 1f000000 00100000" + 28 * "00",
        ),
        (
            wire.encode_inval_inode(2),
            "28000000 02000000 0000000000000000 0200000000000000 0000000000000000 0000000000000000",
        ),
        (
            wire.encode_inval_inode(2, 4096, 512),
            "28000000 02000000 0000000000000000 0200000000000000 0010000000000000 0002000000000000",
        ),
        (
            wire.encode_inval_inode(2, -1),
            "28000000 02000000 0000000000000000 0200000000000000 ffffffffffffffff 0000000000000000",
        ),
        (
            wire.encode_inval_entry(1, b"abc"),
            "24000000 03000000 0000000000000000 0100000000000000 03000000 00000000 61626300",
        ),
        (
            wire.encode_delete(1, 2, b"abc"),
            "2c000000 06000000 0000000000000000 0100000000000000 0200000000000000 03000000 00000000 61626300",
        ),
        (wire.encode_backing_map(9), "09000000 00000000 0000000000000000"),
    ],
)
def test_answer_is_these_bytes(answer: bytes, text: str) -> None:
    assert answer == bytes.fromhex(text)


def test_attributes() -> None:
    assert wire.encode_attr_out(ATTR, 1.5) == struct.pack("=QI4x", 1, 500_000_000) + ATTR_BYTES


def test_entry() -> None:
    expected = struct.pack("=QQQQII", 2, 0, 2, 0, 250_000_000, 0) + ATTR_BYTES
    assert wire.encode_entry_out(ATTR, 2.25, 0.0) == expected


def test_statx_says_what_stat_says() -> None:
    answer = wire.encode_statx_out(ATTR, 1.0)
    assert len(answer) == 288
    assert struct.unpack_from("=QI", answer) == (1, 0)
    mask, blksize, _, nlink, uid, gid, mode, ino, size, blocks = struct.unpack_from("=IIQIIIH2xQQQ", answer, 32)
    assert (mask, blksize, nlink, uid, gid) == (0x7FF, 4096, 1, 1000, 0xFFFFFFFF)
    assert (mode, ino, size, blocks) == (ATTR.mode, 2, ATTR.size, 8)
    times = struct.unpack_from("=qI4xqI4xqI4xqI4x", answer, 32 + 64)
    assert times == (1, 2, 0, 0, 3, 999_999_999, -1, 999_999_999)


def test_the_fast_path_sees_what_the_structures_say() -> None:
    body = wire.READ_IN.encode(7, 4096, 512, wire.WRITE_CACHE, 1 << 40, 2)
    message = wire.IN_HEADER.struct.pack(80 + 512, wire.Opcode.WRITE, 9, 2, 0, 0, 0, 0) + body
    assert wire.IO_REQUEST.unpack_from(message) == (80 + 512, wire.Opcode.WRITE, 9, 2, 7, 4096, 512, 1)
    assert wire.IO_REQUEST.size == len(message)


def entries() -> list[DirEntry]:
    return [DirEntry(b"." * (n + 1) if n < 2 else b"x" * n, ATTR, n + 1) for n in range(12)]


def test_listing_has_aligned_records() -> None:
    data = wire.encode_dirents(entries()[2:4], 4096)
    assert data == bytes.fromhex(
        "0200000000000000 0300000000000000 02000000 08000000 7878000000000000"
        "0200000000000000 0400000000000000 03000000 08000000 7878780000000000"
    )


def test_listing_takes_as_many_as_fit() -> None:
    whole = wire.encode_dirents(entries(), 4096)
    for room in range(len(whole)):
        part = wire.encode_dirents(entries(), room)
        assert len(part) <= room
        assert whole.startswith(part)
        assert len(part) % 8 == 0
    assert wire.encode_dirents(entries(), len(whole)) == whole


def test_listing_with_attributes_looks_up_no_dots() -> None:
    data = wire.encode_direntplus(entries()[:3], 4096, 1.0, 1.0)
    assert data[:128] == bytes(128)
    assert data[160:288] == bytes(128)
    assert data[320:448] == wire.encode_entry_out(ATTR, 1.0, 1.0)


def test_ioctl_numbers() -> None:
    assert (wire.DEV_IOC_BACKING_OPEN, wire.DEV_IOC_BACKING_CLOSE) == (0x4010E501, 0x4004E502)
