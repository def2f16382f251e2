"""What a FUSE request asks of a disk: as the kernel's bytes, and in the block layer's words."""

from __future__ import annotations

import pytest

from fusebd.block.caller import Asked
from fusebd.fuse import wire
from fusebd.fuse.asked import ENOUGH, asked
from fusebd.fuse.wire import Opcode

REQUESTS = {
    "read": (Opcode.READ, wire.READ_IN.encode(1, 4096, 512, 0, 0, 0), Asked("read", 4096, 512)),
    "write": (Opcode.WRITE, wire.READ_IN.encode(1, 4096, 999, 0, 0, 0) + bytes(999), Asked("write", 4096, 999)),
    "flush": (Opcode.FLUSH, wire.FLUSH_IN.encode(1, 0), Asked("flush")),
    "fsync": (Opcode.FSYNC, wire.FSYNC_IN.encode(1, 0), Asked("flush")),
    "hole": (Opcode.FALLOCATE, wire.FALLOCATE_IN.encode(1, 512, 1024, 3), Asked("write-zeroes", 512, 1024)),
    "growth": (Opcode.FALLOCATE, wire.FALLOCATE_IN.encode(1, 512, 1024, 0), Asked("resize", 512, 1024)),
    "truncate": (
        Opcode.SETATTR,
        wire._SETATTR_IN.encode(wire.Fattr.SIZE, 1, 65536, 0, 0, 0, 0, 0, 0, 0),
        Asked("resize", 65536),
    ),
    "seek": (Opcode.LSEEK, wire.LSEEK_IN.encode(1, 8192, 3), Asked("block-status", 8192)),
    "copy": (Opcode.COPY_FILE_RANGE, wire.COPY_FILE_RANGE_IN.encode(1, 7, 2, 2, 8, 9, 0), Asked("copy", 7, 9)),
    "release": (Opcode.RELEASE, wire.RELEASE_IN.encode(1, 0, 0, 0), Asked("close")),
    "lookup": (Opcode.LOOKUP, b"disk\0", Asked("other")),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_told_by_its_beginning(name: str) -> None:
    opcode, body, expected = REQUESTS[name]
    header = wire.IN_HEADER.encode(wire.IN_HEADER.size + len(body), opcode, 1, 2, 3, 4, 5, 0)
    assert asked(memoryview(header + body)[:ENOUGH]) == expected
    # in a buffer, whatever was there before follows
    assert asked(memoryview((header + body + b"\xff" * ENOUGH)[:ENOUGH])) == expected
