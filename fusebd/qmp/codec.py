"""QMP's framing: bytes to JSON values and back, without any I/O.

Values follow each other with nothing between them, over as many lines as the sender likes; what is sent ends with
CR LF.  Specification: QEMU docs/interop/qmp-spec.rst; the dialect is in ``fusebd.block.qjson``.
"""

from __future__ import annotations

from fusebd.block.qjson import Json, Reader, dumps

#: Below QEMU's own limits (64 MiB, 2 Mi): parsing holds up every other task, and no command needs that much.
MAX_REQUEST_SIZE = 16 << 20
MAX_REQUEST_TOKENS = 1 << 18


class Decoder(Reader):
    """What a client sends, in pieces of any size; yields values, and an OptionError for what is malformed."""

    def __init__(self) -> None:
        super().__init__(max_size=MAX_REQUEST_SIZE, max_tokens=MAX_REQUEST_TOKENS)


def encode(message: Json, *, pretty: bool = False) -> bytes:
    """*message* as it goes over the wire."""
    return dumps(message, pretty=pretty).replace("\n", "\r\n").encode() + b"\r\n"
