"""What a request of the FUSE protocol asks of a disk, for records of it.  No I/O here."""

from __future__ import annotations

from fusebd.block.caller import Asked
from fusebd.fuse import wire
from fusebd.fuse.wire import Opcode

#: bytes of a request, its header with them, that ``asked`` wants to see
ENOUGH = 256


def asked(message: memoryview) -> Asked:
    """What the request is for of which *message* is the beginning, ``ENOUGH`` bytes, or all if it is shorter.

    A copy is said to be of what it reads, though what it writes may be what is under way.
    """
    opcode, body = wire.IN_HEADER.decode(message).opcode, message[wire.IN_HEADER.size :]
    match opcode:
        case Opcode.READ | Opcode.WRITE:
            request = wire.READ_IN.decode(body)
            return Asked("read" if opcode == Opcode.READ else "write", request.offset, request.size)
        case Opcode.FALLOCATE:
            area = wire.FALLOCATE_IN.decode(body)
            return Asked("write-zeroes" if area.mode else "resize", area.offset, area.length)
        case Opcode.SETATTR:
            return Asked("resize", wire.decode_setattr(body).size)
        case Opcode.LSEEK:
            return Asked("block-status", wire.LSEEK_IN.decode(body).offset)
        case Opcode.COPY_FILE_RANGE | Opcode.COPY_FILE_RANGE_64:
            copy = wire.COPY_FILE_RANGE_IN.decode(body)
            return Asked("copy", copy.offset_in, copy.length)
        case Opcode.FLUSH | Opcode.FSYNC:
            return Asked("flush")
        case _:
            return Asked("close" if opcode == Opcode.RELEASE else "other")
