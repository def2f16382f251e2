"""QMP's framing and QEMU's JSON dialect, read and written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusebd.block.qjson import MAX_NESTING, Reader, dumps, loads
from fusebd.errors import OptionError
from fusebd.qmp.codec import MAX_REQUEST_SIZE, MAX_REQUEST_TOKENS, Decoder, encode


def read(pieces: Iterable[bytes], reader: Reader | None = None) -> list[Any]:
    """What *pieces* contain; errors as ``!text``."""
    reader = reader or Reader()
    found = [value for piece in pieces for value in reader.feed(piece)]
    found += reader.flush()
    return [f"!{value}" if isinstance(value, OptionError) else value for value in found]


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


VALUES: list[tuple[bytes, list[Any]]] = [
    (b"{}", [{}]),
    (b'{"execute": "quit"}', [{"execute": "quit"}]),
    (b'{"a":{"b":[1,[],{},[2,[3]]],"c":null}}', [{"a": {"b": [1, [], {}, [2, [3]]], "c": None}}]),
    (b'{"a":\r\n\t{"b" : true ,\n"c":false}}\n', [{"a": {"b": True, "c": False}}]),
    (b"{}{}[]", [{}, {}, []]),
    (b"{'a': 'b\"c'}", [{"a": 'b"c'}]),
    (b"""{"a'": "'"}""", [{"a'": "'"}]),
    (rb"""{'\'': "\'\"\/\\\b\f\n\r\t"}""", [{"'": "'\"/\\\b\f\n\r\t"}]),
    (rb'"\u00e9\u20AC\ud83d\ude00"', ["é€\U0001f600"]),
    ('"é€😀"'.encode(), ["é€😀"]),
    (b"0 -0 7 -12 ", [0, 0, 7, -12]),
    (b"9223372036854775807 -9223372036854775808 ", [2**63 - 1, -(2**63)]),
    (b"18446744073709551615 18446744073709551616 ", [2**64 - 1, 2.0**64]),
    (b"1.5 -1e3 2E+2 25e-1 0.5 ", [1.5, -1000.0, 200.0, 2.5, 0.5]),
    (b"[1,2]3", [[1, 2], 3]),
    (b'"a"true"b"', ["a", True, "b"]),
    (b" \t\r\n", []),
]
MALFORMED: list[tuple[bytes, list[Any]]] = [
    (b"{", ["!JSON parse error, premature EOI"]),
    (b'{"a"', ["!JSON parse error, premature EOI"]),
    (b'{"a":1,}', ["!JSON parse error, expecting value"]),
    (b'{"a" 1}', ["!JSON parse error, missing : in object pair"]),
    (b'{"a":1 "b":2}', ["!JSON parse error, expected separator in dict"]),
    (b"[1 2]", ["!JSON parse error, expected separator in list"]),
    (b"[,]", ["!JSON parse error, expecting value"]),
    (b'{"a":1,"a":2}', ["!JSON parse error, duplicate key"]),
    (b"{1:2}", ["!JSON parse error, key is not a string in object"]),
    (b"{[]:2}", ["!JSON parse error, key is not a string in object"]),
    (b"{]{}", ["!JSON parse error, expecting value", {}]),
    (b"}{}", ["!JSON parse error, expecting value", {}]),
    (b",", ["!JSON parse error, expecting value"]),
    (b"nul ", ["!JSON parse error, invalid keyword 'nul'"]),
    (b"[tru]{}", ["!JSON parse error, invalid keyword 'tru'", {}]),
    (b"01", ["!JSON parse error, stray '01'"]),
    (b"1.]{}", ["!JSON parse error, stray '1.]'", {}]),
    (b"-", ["!JSON parse error, stray '-'"]),
    (b"1e999 ", ["!JSON parse error, number out of range"]),
    (b'"abc', ["!JSON parse error, stray '\"abc'"]),
    (b'"a\nb" {}', ["!JSON parse error, stray '\"a\n'", {}]),
    (rb'"\x"', ["!JSON parse error, invalid escape sequence in string"]),
    (rb'"\u12"', ["!JSON parse error, \\u12 is not a valid Unicode character"]),
    (rb'"\ud83d"', ["!JSON parse error, \\ud83d is not a valid Unicode character"]),
    (rb'"\ud83d\u0041"', ["!JSON parse error, \\ud83d is not a valid Unicode character"]),
    (rb'"\ude00"', ["!JSON parse error, \\ude00 is not a valid Unicode character"]),
    (rb'"\uffff"', ["!JSON parse error, \\uffff is not a valid Unicode character"]),
    (b'"\xc3"', ["!JSON parse error, invalid UTF-8 sequence in string"]),
    (b'"\xed\xa0\x80"', ["!JSON parse error, invalid UTF-8 sequence in string"]),
    (b'{"a": \xff{}', ["!JSON parse error, stray '\ufffd'", {}]),
    (b"@ skipped {}", ["!JSON parse error, stray '@'", {}]),
    (b"\x01{}", ["!JSON parse error, stray '\x01'", {}]),
    (b'"open string \xff{}', ["!JSON parse error, stray '\"open string \ufffd'", {}]),
]


@pytest.mark.parametrize(("data", "values"), VALUES + MALFORMED)
def test_reading_in_one_piece(data: bytes, values: list[Any]) -> None:
    assert read([data]) == values


@pytest.mark.parametrize(("data", "values"), VALUES + MALFORMED)
def test_reading_byte_by_byte(data: bytes, values: list[Any]) -> None:
    assert read(bytewise(data)) == values


@pytest.mark.parametrize(("data", "values"), [row for row in VALUES if len(row[1]) == 1])
def test_what_was_read_is_written_and_read_again(data: bytes, values: list[Any]) -> None:
    assert loads(dumps(loads(data.decode()))) == values[0]


def test_a_value_is_given_with_its_last_byte() -> None:
    decoder = Decoder()
    assert list(decoder.feed(b'{"a": [1')) == []
    assert list(decoder.feed(b"]")) == []
    assert list(decoder.feed(b"}")) == [{"a": [1]}]


def test_the_decoder_goes_on_after_0xff_whatever_came_before() -> None:
    for junk in (b'{"a": {', b"[[[", b'"', b"{'x", b"\\", b"nul", b"-", b"1e"):
        decoder = Decoder()
        list(decoder.feed(junk + b"\xff"))
        assert list(decoder.feed(b'{"execute": "quit"}')) == [{"execute": "quit"}], junk


def test_nesting_as_deep_as_the_limit_is_read_and_written() -> None:
    text = "[" * MAX_NESTING + "]" * MAX_NESTING
    assert dumps(loads(text)) == text


def test_nesting_beyond_the_limit_is_refused() -> None:
    assert read([b"[" * (MAX_NESTING + 1)]) == ["!JSON nesting depth limit exceeded"]


def test_objects_and_arrays_count_together_for_the_nesting_limit() -> None:
    half = MAX_NESTING // 2
    assert read([b'{"a":[' * half + b"[" + b"\xff"])[0] == "!JSON nesting depth limit exceeded"


def test_too_many_tokens_are_refused() -> None:
    reader = Reader(max_tokens=10)
    assert [str(value) for value in reader.feed(b"[1,1,1,1,1,")] == ["JSON token count limit exceeded"]
    assert list(reader.feed(b"{}")) == [{}]


def test_a_token_that_never_ends_is_refused_before_it_takes_memory() -> None:
    reader = Reader(max_size=1000)
    found = list(reader.feed(b'"' + b"x" * 5000))
    assert str(found[0]) == "JSON token size limit exceeded"


def test_a_request_has_tighter_limits_than_json() -> None:
    piece = b"x" * 65536
    decoder = Decoder()
    list(decoder.feed(b'"'))
    found = [str(value) for _ in range(MAX_REQUEST_SIZE // len(piece) + 1) for value in decoder.feed(piece)]
    assert found[0] == "JSON token size limit exceeded"
    found = [str(value) for value in Decoder().feed(b"[" + b"1," * MAX_REQUEST_TOKENS)]
    assert found[0] == "JSON token count limit exceeded"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting a JSON value"),
        ("  ", "Expecting a JSON value"),
        ("{} {}", "Expecting at most one JSON value"),
        ("{", "JSON parse error, premature EOI"),
        ("{}]", "Expecting at most one JSON value"),
    ],
)
def test_a_text_has_exactly_one_value(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        loads(text)
    assert str(caught.value) == message


def test_nul_becomes_the_bytes_that_qemu_has_for_it() -> None:
    text = loads(r'"a\u0000b"')
    assert os.fsencode(text) == b"a\xc0\x80b"
    assert dumps(text) == r'"a\u0000b"'


def test_bytes_that_are_no_utf8_are_written_as_replacement_characters() -> None:
    assert dumps(os.fsdecode(b"a\xff\xfe")) == r'"a\uFFFD\uFFFD"'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("\"\\/\b\f\n\r\t'", r'''"\"\\/\b\f\n\r\t'"'''),
        ("\x00\x1f\x7f\u00e9\u20ac", r'"\u0000\u001F\u007F\u00E9\u20AC"'),
        ("\U0001f600", r'"\uD83D\uDE00"'),
        (2**64 - 1, "18446744073709551615"),
        (1e20, "1e+20"),
        (0.1, "0.10000000000000001"),
        (2.5, "2.5"),
        ([True, False, None], "[true, false, null]"),
        ((1, 2), "[1, 2]"),
        ({}, "{}"),
        ([], "[]"),
        ({"a": {"b": []}}, '{"a": {"b": []}}'),
    ],
)
def test_writing(value: Any, text: str) -> None:
    assert dumps(value) == text


# Answers of qemu-storage-daemon 10.0.2, as it printed them.
REAL_ANSWERS = [
    '{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "x"}, "capabilities": ["oob"]}}',
    '{"id": {"a": [1, 2.5]}, "error": {"class": "GenericError", "desc": "QMP input member \'x\' is unexpected"}}',
    '{"return": [{"iops_rd": 0, "detect_zeroes": "off", "active": true, "image": {"virtual-size": 1073741824, '
    '"filename": "null-co://", "format": "null-co", "actual-size": 0}, "iops_wr": 0, "ro": false, "node-name": "n", '
    '"backing_file_depth": 0, "drv": "null-co", "iops": 0, "bps_wr": 0, "write_threshold": 0, "encrypted": false, '
    '"bps": 0, "bps_rd": 0, "cache": {"no-flush": false, "direct": false, "writeback": true}, "file": "null-co://"}]}',
    '{"return": [{"stats": {"unmap_operations": 0, "unmap_merged": 0, "failed_zone_append_operations": 0, '
    '"flush_total_time_ns": 0, "wr_highest_offset": 0, "wr_total_time_ns": 0, "failed_wr_operations": 0, '
    '"failed_rd_operations": 0, "wr_merged": 0, "wr_bytes": 0, "timed_stats": [], "failed_unmap_operations": 0, '
    '"zone_append_merged": 0, "failed_flush_operations": 0, "account_invalid": false, "rd_total_time_ns": 0, '
    '"invalid_unmap_operations": 0, "flush_operations": 0, "wr_operations": 0, "unmap_bytes": 0, "rd_merged": 0, '
    '"rd_bytes": 0, "unmap_total_time_ns": 0, "invalid_flush_operations": 0, "account_failed": false, '
    '"zone_append_total_time_ns": 0, "zone_append_operations": 0, "rd_operations": 0, "zone_append_bytes": 0, '
    '"invalid_zone_append_operations": 0, "invalid_wr_operations": 0, "invalid_rd_operations": 0}, '
    '"node-name": "n"}]}',
    '{"return": {"edges": [{"name": "file", "parent": 2, "shared-perm": ["resize", "write-unchanged", "write", '
    '"consistent-read"], "perm": [], "child": 1}], "nodes": [{"name": "r", "type": "block-driver", "id": 2}]}}',
    '{"driver": "raw", "file": {"set-state.0.event": "read_aio", "inject-error.0.once": true, "image": '
    '{"driver": "file", "filename": "a.raw"}, "driver": "blkdebug", "set-state.0.new_state": 2, "align": 1024}}',
]


@pytest.mark.parametrize("text", REAL_ANSWERS)
def test_members_are_written_in_qemus_order(text: str) -> None:
    def shuffled(value: Any) -> Any:  # but members of one bucket stay as they must have been entered
        if isinstance(value, dict):
            return {key: shuffled(value[key]) for key in reversed(value)}
        return [shuffled(item) for item in value] if isinstance(value, list) else value

    assert dumps(shuffled(json.loads(text))) == text


def test_members_of_one_bucket_are_written_the_latest_first() -> None:
    first, second = "inject-error.0.event", "inject-error.1.event"
    assert dumps({first: 0, second: 1}) == f'{{"{second}": 1, "{first}": 0}}'


def test_a_message_ends_with_cr_lf() -> None:
    assert encode({"return": {}}) == b'{"return": {}}\r\n'


def test_a_pretty_message_is_indented_by_four() -> None:
    assert encode({"return": {"a": [1, {}]}}, pretty=True) == (
        b'{\r\n    "return": {\r\n        "a": [\r\n            1,\r\n            {\r\n            }\r\n        ]\r\n'
        b"    }\r\n}\r\n"
    )


@given(st.binary(max_size=200))
def test_no_bytes_break_the_decoder(data: bytes) -> None:
    found = read([data])
    assert read(bytewise(data)) == found
    decoder = Decoder()
    list(decoder.feed(data + b"\xff"))
    assert [value for value in decoder.feed(b"{}") if not isinstance(value, OptionError)] == [{}]


@given(st.text(alphabet="""{}[],:"'\\u0d8c1-.eE truefalsn\n\x00\xff""", max_size=60), st.integers(0, 60))
def test_what_is_found_does_not_depend_on_the_pieces(text: str, cut: int) -> None:
    data = text.encode("latin-1")
    assert read([data[:cut], data[cut:]]) == read([data])


def characters() -> st.SearchStrategy[str]:
    return st.characters(exclude_categories=("Cs", "Cn", "Cc", "Co"))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(characters()),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(characters()), inner),
    )
)
def test_values_survive_writing_and_reading(value: Any) -> None:
    assert loads(dumps(value)) == value
    assert json.loads(dumps(value)) == value
    assert loads(json.dumps(value)) == value
