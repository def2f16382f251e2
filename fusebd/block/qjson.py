"""JSON as QEMU reads and writes it: in QMP, in ``--blockdev`` and in ``json:{...}`` file names.

Read: RFC 8259, and strings in single quotes, ``\\'`` in strings, any number of values in a row with nothing between
them.  A reader takes its input in pieces of any size, reports what is malformed and goes on behind it.
Written: members in the order of QEMU's hash table of 512 buckets, nothing but ASCII.

Facts: QEMU qobject/json-lexer.c, json-parser.c, json-streamer.c, json-writer.c, qdict.c; docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from fusebd.errors import OptionError

Json = Any

#: bytes of all tokens of one value together
MAX_TOKEN_SIZE = 64 << 20
MAX_TOKEN_COUNT = 2 << 20
MAX_NESTING = 1 << 10

# --- tokens --------------------------------------------------------------------------------------

_START, _RECOVERY = "start", "recovery"
_DQ, _DQ_ESCAPE, _SQ, _SQ_ESCAPE = "dq", "dq-escape", "sq", "sq-escape"
_SIGN, _ZERO, _DIGITS, _POINT, _FRACTION = "sign", "zero", "digits", "point", "fraction"
_E, _E_SIGN, _E_DIGITS, _WORD = "e", "e-sign", "e-digits", "word"

# kinds of tokens; the structural ones are called by their character
_STRING, _INTEGER, _FLOAT, _KEYWORD, _STRAY = "string", "integer", "float", "keyword", "stray"
_STRUCTURAL = frozenset("{}[],:")


def _table(*rows: tuple[str, str]) -> dict[int, str]:
    return {ord(character): state for characters, state in rows for character in characters}


_DIGIT = "0123456789"
# state -> (bytes that it swallows, where other bytes lead, what it is a complete token of)
# A byte for which nothing is said ends the token if it can be complete there; else it is stray.
_STATES: dict[str, tuple[re.Pattern[bytes], dict[int, str], str | None]] = {
    _START: (
        re.compile(rb"[ \t\r\n]*"),
        _table(
            ('"', _DQ),
            ("'", _SQ),
            ("-", _SIGN),
            ("0", _ZERO),
            ("123456789", _DIGITS),
            ("abcdefghijklmnopqrstuvwxyz", _WORD),
        ),
        None,
    ),
    _DQ: (re.compile(rb'[^"\\\x00-\x1f\xfe\xff]*'), _table(("\\", _DQ_ESCAPE)), None),
    _SQ: (re.compile(rb"[^'\\\x00-\x1f\xfe\xff]*"), _table(("\\", _SQ_ESCAPE)), None),
    _DQ_ESCAPE: (re.compile(rb""), dict.fromkeys(range(0x20, 0xFE), _DQ), None),
    _SQ_ESCAPE: (re.compile(rb""), dict.fromkeys(range(0x20, 0xFE), _SQ), None),
    _SIGN: (re.compile(rb""), _table(("0", _ZERO), ("123456789", _DIGITS)), None),
    _ZERO: (re.compile(rb""), _table((_DIGIT, _STRAY), (".", _POINT)), _INTEGER),
    _DIGITS: (re.compile(rb"[0-9]*"), _table((".", _POINT), ("eE", _E)), _INTEGER),
    _POINT: (re.compile(rb""), _table((_DIGIT, _FRACTION)), None),
    _FRACTION: (re.compile(rb"[0-9]*"), _table(("eE", _E)), _FLOAT),
    _E: (re.compile(rb""), _table(("+-", _E_SIGN), (_DIGIT, _E_DIGITS)), None),
    _E_SIGN: (re.compile(rb""), _table((_DIGIT, _E_DIGITS)), None),
    _E_DIGITS: (re.compile(rb"[0-9]*"), {}, _FLOAT),
    _WORD: (re.compile(rb"[a-z]*"), {}, _KEYWORD),
}
_QUOTES = {_DQ: ord('"'), _SQ: ord("'")}
# After a stray byte, reading goes on at the next structural or control character, or byte that is never in UTF-8.
_SKIPPED = re.compile(rb"[^\x00-\x08\x0a-\x1f\xfe\xff{}\[\],:]*")

Token = tuple[str, bytes]


class _Lexer:
    """Bytes to tokens.  It keeps an incomplete token until the next piece; a byte is looked at once."""

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.state = _START
        self.token = bytearray()

    def feed(self, data: bytes) -> Iterator[Token]:
        """The tokens that are complete with *data*; one of kind ``stray`` where something is malformed."""
        at, end = 0, len(data)
        while at < end:
            if self.state == _RECOVERY:
                at = _SKIPPED.match(data, at).end()  # type: ignore[union-attr]
                if at < end:
                    self.state = _START
                continue
            swallow, leads, complete = _STATES[self.state]
            run = swallow.match(data, at).end()  # type: ignore[union-attr]
            if self.state != _START:
                self.token += data[at:run]
                if len(self.token) > self.max_size:
                    yield self._finish(_STRING)
            if (at := run) == end:
                return
            byte = data[at]
            if self.state == _START and chr(byte) in _STRUCTURAL:
                at += 1
                yield chr(byte), b""
            elif byte == _QUOTES.get(self.state):
                at += 1
                self.token.append(byte)
                yield self._finish(_STRING)
            elif (follows := leads.get(byte)) is not None and follows != _STRAY:
                at += 1
                self.token.append(byte)
                self.state = follows
            elif complete is not None and follows is None:
                yield self._finish(complete)
            else:
                at += 1
                self.token.append(byte)
                yield self._finish(_STRAY)
                self.state = _RECOVERY

    def flush(self) -> Iterator[Token]:
        """The input ends here: the last token, if there is one."""
        complete = _STATES[self.state][2] if self.state != _RECOVERY else None
        if complete is not None:
            yield self._finish(complete)
        elif self.state not in (_START, _RECOVERY):
            yield self._finish(_STRAY)
        self.state = _START

    def _finish(self, kind: str) -> Token:
        token = kind, bytes(self.token)
        self.token.clear()
        self.state = _START
        return token


# --- values --------------------------------------------------------------------------------------


def _parse_error(message: str) -> OptionError:
    return OptionError(f"JSON parse error, {message}")


_ESCAPE = re.compile(r"\\(u.{0,4}(?:(?<=[dD][89abAB]..)\\u[0-9A-Fa-f]{4})?|.)", re.DOTALL)
_SIMPLE = {'"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_HEX4 = re.compile(r"[0-9A-Fa-f]{4}\Z")
# Code points that are no characters: QEMU takes them neither as they are nor escaped.
_NONCHARACTER = re.compile(
    "[\ufdd0-\ufdef" + "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF)) + "]"
)
#: U+0000 as QEMU has it in memory, in modified UTF-8, and as os.fsencode makes those two bytes from
_NUL = "\udcc0\udc80"


def _unescape(found: re.Match[str]) -> str:
    text = found[1]
    if text[0] != "u":
        if text not in _SIMPLE:
            raise _parse_error("invalid escape sequence in string")
        return _SIMPLE[text]
    high, low = text[1:5], text[7:]
    point = int(high, 16) if _HEX4.match(high) else -1
    if low:
        trailing = int(low, 16)
        point = 0x10000 + ((point & 0x3FF) << 10) + (trailing & 0x3FF) if trailing & 0xFC00 == 0xDC00 else -1
    if point == 0:
        return _NUL
    if point < 0 or 0xD800 <= point <= 0xDFFF or _NONCHARACTER.match(chr(point)):
        raise _parse_error(f"\\{text[:5]} is not a valid Unicode character")
    return chr(point)


def _string(token: bytes) -> str:
    try:
        text = token[1:-1].decode()
    except UnicodeDecodeError:
        try:
            text = token[1:-1].replace(b"\xc0\x80", b"\\u0000").decode()
        except UnicodeDecodeError:
            raise _parse_error("invalid UTF-8 sequence in string") from None
    if _NONCHARACTER.search(text):
        raise _parse_error("invalid UTF-8 sequence in string")
    return _ESCAPE.sub(_unescape, text) if "\\" in text else text


def _number(kind: str, token: bytes) -> int | float:
    if kind == _INTEGER and len(token) <= 20 and -(2**63) <= (value := int(token)) < 2**64:
        return value
    number = float(token)
    if number in (float("inf"), float("-inf")):
        raise _parse_error("number out of range")
    return number


def _scalar(kind: str, token: bytes) -> Json:
    if kind == _STRING:
        return _string(token)
    if kind in (_INTEGER, _FLOAT):
        return _number(kind, token)
    if kind != _KEYWORD:
        raise _parse_error("expecting value")
    if token not in _KEYWORDS:
        raise _parse_error(f"invalid keyword '{token.decode()[:1000]}'")
    return _KEYWORDS[token]


_KEYWORDS: dict[bytes, Json] = {b"true": True, b"false": False, b"null": None}


def _value(tokens: list[Token]) -> Json:
    """The value that *tokens* make up.  No recursion: nesting is the sender's choice.  Raises OptionError."""
    open_containers: list[tuple[dict[str, Json] | list[Json], str]] = []
    here: dict[str, Json] | list[Json] | None = None
    key = ""
    stream = iter(tokens)

    def take() -> Token:
        token = next(stream, None)
        if token is None:
            raise _parse_error("premature EOI")
        return token

    def take_key(token: Token) -> str:
        if token[0] in "{[" or not isinstance(found := _scalar(*token), str):
            raise _parse_error("key is not a string in object")
        if take()[0] != ":":
            raise _parse_error("missing : in object pair")
        return found

    kind, token = take()
    while True:
        # at the beginning of a value
        value: Json
        if kind in "{[":
            opened: dict[str, Json] | list[Json] = {} if kind == "{" else []
            kind, token = take()
            if kind != ("}" if isinstance(opened, dict) else "]"):
                if here is not None:
                    open_containers.append((here, key))
                else:
                    open_containers.append((opened, ""))
                here = opened
                if isinstance(here, dict):
                    key = take_key((kind, token))
                    kind, token = take()
                continue
            value = opened
        else:
            value = _scalar(kind, token)
        # behind a value: put it where it belongs, and close what ends here
        while True:
            if here is None:
                return value
            if isinstance(here, dict):
                if key in here:
                    raise _parse_error("duplicate key")
                here[key] = value
            else:
                here.append(value)
            kind, token = take()
            if kind == ",":
                kind, token = take()
                if isinstance(here, dict):
                    key = take_key((kind, token))
                    kind, token = take()
                break
            if kind != ("}" if isinstance(here, dict) else "]"):
                raise _parse_error(f"expected separator in {'dict' if isinstance(here, dict) else 'list'}")
            value = here
            outer, key = open_containers.pop()
            here = outer if outer is not value else None


class Reader:
    """A stream of JSON values in pieces of any size.

    What it returns is a value, or an OptionError where the input was malformed; it goes on behind that.
    A byte 0xFF brings it to a known state, at the price of one error.  A value may have *max_size* bytes (of tokens)
    and *max_tokens* tokens.
    """

    def __init__(self, *, max_size: int = MAX_TOKEN_SIZE, max_tokens: int = MAX_TOKEN_COUNT) -> None:
        self._max_size, self._max_tokens = max_size, max_tokens
        self._lexer = _Lexer(max_size)
        self._reset()

    def _reset(self) -> None:
        self._tokens: list[Token] = []
        self._size = self._braces = self._brackets = 0

    def feed(self, data: bytes) -> Iterator[Json]:
        """The values (and errors) that are complete with *data*.  To be iterated to the end."""
        for token in self._lexer.feed(data):
            yield from self._take(token)

    def flush(self) -> Iterator[Json]:
        """The input ends here: what is left of it, a value or an error."""
        for token in self._lexer.flush():
            yield from self._take(token)
        if self._tokens:
            yield self._complete()

    def _take(self, token: Token) -> Iterator[Json]:
        kind, text = token
        if kind == _STRAY:
            self._reset()
            shown = text.decode(errors="replace").partition("\0")[0]
            yield _parse_error(f"stray '{shown[:1000]}'")
            return
        self._braces += (kind == "{") - (kind == "}")
        self._brackets += (kind == "[") - (kind == "]")
        size = len(text) or 1
        for exceeded, what in (
            (self._size + size + 1 > self._max_size, "token size"),
            (len(self._tokens) + 1 > self._max_tokens, "token count"),
            (self._braces + self._brackets > MAX_NESTING, "nesting depth"),
        ):
            if exceeded:
                self._reset()
                yield OptionError(f"JSON {what} limit exceeded")
                return
        self._size += size
        self._tokens.append(token)
        if self._braces >= 0 and self._brackets >= 0 and (self._braces or self._brackets):
            return
        yield self._complete()

    def _complete(self) -> Json:
        tokens = self._tokens
        self._reset()
        try:
            return _value(tokens)
        except OptionError as error:
            return error


def loads(text: str) -> Json:
    """The one JSON value in *text*.  Raises OptionError in QEMU's words."""
    reader = Reader()
    found = [*reader.feed(text.encode(errors="surrogateescape")), *reader.flush()]
    if not found:
        raise OptionError("Expecting a JSON value")
    if isinstance(found[0], OptionError):
        raise found[0]
    if len(found) > 1:
        raise OptionError("Expecting at most one JSON value")
    return found[0]


# --- output --------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def bucket(key: str) -> int:
    data = key.encode(errors="surrogateescape")
    value = 0x238F13AF * len(data) + sum(byte << (5 * index % 24) for index, byte in enumerate(data))
    return ((1103515243 * value + 12345) & 0xFFFFFFFF) % 512


def ordered(value: dict[str, Json]) -> list[tuple[str, Json]]:
    """The members of *value* as QEMU would list them: by bucket, and within one the last entered first."""
    latest_first = list(reversed(value.items()))
    return sorted(latest_first, key=lambda member: bucket(member[0]))


_ESCAPED = re.compile(f"{_NUL}|[^ !#-\\[\\]-~]")
_SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", _NUL: "\\u0000"}


def _escape(found: re.Match[str]) -> str:
    text = found[0]
    if text in _SHORT:
        return _SHORT[text]
    point = ord(text)
    if 0xD800 <= point <= 0xDFFF:
        point = 0xFFFD  # a byte that is not UTF-8
    if point > 0xFFFF:
        point -= 0x10000
        return f"\\u{0xD800 + (point >> 10):04X}\\u{0xDC00 + (point & 0x3FF):04X}"
    return f"\\u{point:04X}"


def _quoted(text: str) -> str:
    return f'"{_ESCAPED.sub(_escape, text)}"'


def dumps(value: Json, *, pretty: bool = False) -> str:
    """*value* as QEMU prints it, on one line or indented by four.  Tuples count as lists."""
    parts: list[str] = []
    # a frame: what is left to write of a container, what closes it, and whether a member was written before
    stack: list[list[Any]] = []

    def newline() -> str:
        return "\n" + "    " * len(stack) if pretty else ""

    def write(item: Json) -> None:
        if isinstance(item, dict):
            parts.append("{")
            stack.append([iter(ordered(item)), "}", False])
        elif isinstance(item, (list, tuple)):
            parts.append("[")
            stack.append([iter(item), "]", False])
        elif isinstance(item, str):
            parts.append(_quoted(item))
        elif item is None or isinstance(item, bool):
            parts.append({None: "null", True: "true", False: "false"}[item])
        else:
            parts.append(f"{item:.17g}" if isinstance(item, float) else str(int(item)))

    write(value)
    while stack:
        frame = stack[-1]
        try:
            member = next(frame[0])
        except StopIteration:
            stack.pop()
            parts.append(newline() + frame[1])
            continue
        parts.append(("," + (newline() or " ")) if frame[2] else newline())
        frame[2] = True
        if frame[1] == "}":
            parts.append(_quoted(member[0]) + ": ")
            member = member[1]
        write(member)
    return "".join(parts)
