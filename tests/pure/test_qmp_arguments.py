"""Arguments and block devices as people spell them: key=value with the declared types, or JSON."""

from __future__ import annotations

from typing import Any

import pytest

from fusebd.block.driver import parse_blockdev, parse_blockdev_text
from fusebd.errors import OptionError
from fusebd.qmp.client import parse_arguments

BLOCKDEVS: list[tuple[str, Any]] = [
    ("null-co,node-name=n", {"driver": "null-co", "node-name": "n"}),
    ("driver=null-co,size=0x200", {"driver": "null-co", "size": 512}),
    ("null-co,read-zeroes=on,cache.direct=off", {"driver": "null-co", "read-zeroes": True, "cache": {"direct": False}}),
    (
        "driver=raw,size=512,file.driver=file,file.filename=a,,b.img,file.read-only=on",
        {"driver": "raw", "size": 512, "file": {"driver": "file", "filename": "a,b.img", "read-only": True}},
    ),
    ("raw,file=disk0", {"driver": "raw", "file": "disk0"}),
    (
        "raw,file.driver=raw,file.offset=5,file.file.driver=null-co,file.file.size=7",
        {"driver": "raw", "file": {"driver": "raw", "offset": 5, "file": {"driver": "null-co", "size": 7}}},
    ),
    (
        "blkdebug,image=n,inject-error.0.event=read_aio,inject-error.0.once=on,inject-error.1.event=write_aio",
        {
            "driver": "blkdebug",
            "image": "n",
            "inject-error": [{"event": "read_aio", "once": True}, {"event": "write_aio"}],
        },
    ),
    ("{'driver': 'null-co', \"size\": 7}", {"driver": "null-co", "size": 7}),
    ('{"driver": "null-co", "size": "7"}', {"driver": "null-co", "size": "7"}),
    ("", {}),
]
REFUSED = [
    ("{", "JSON parse error, premature EOI"),
    ('{"driver":}', "JSON parse error, expecting value"),
    ("{} {}", "Expecting at most one JSON value"),
    ("null-co,size=1k", "Parameter 'size' expects integer"),
    ("raw,file.driver=null-co,file.size=abc", "Parameter 'file.size' expects integer"),
    ("raw,file.driver=null-co,file.read-zeroes=maybe", "Parameter 'file.read-zeroes' expects 'on' or 'off'"),
    ("raw,file.driver=foo", "Parameter 'driver' does not accept value 'foo'"),
    ("raw,file.size=1", "Parameter 'file.driver' is missing"),
    ("raw,file.driver=null-co,file.0=1", "Parameters 'file.*' used inconsistently"),
    ("raw", "Parameter 'file' is missing"),
    ("node-name=x", "Parameter 'driver' is missing"),
    ("", "Parameter 'driver' is missing"),
    ("5", "Parameter 'driver' does not accept value '5'"),
    ("[]", "Parameter 'driver' does not accept value '[]'"),
    ("null-co,foo=1", "Parameter 'foo' is unexpected"),
    ("=x", "Invalid parameter ''"),
    ("help", "Help is not available for this option"),
    ("null-co,help", "Help is not available for this option"),
    ('{"driver": "null-co", "size": "1k"}', "Invalid parameter type for 'size', expected: integer"),
    ('{"driver": "raw", "file": 5}', "Invalid parameter type for 'file', expected: BlockdevRef"),
]


@pytest.mark.parametrize(("text", "value"), BLOCKDEVS)
def test_a_blockdev_is_read_from_text(text: str, value: Any) -> None:
    assert parse_blockdev_text(text) == value


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_a_blockdev_is_refused_in_qemus_words(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_blockdev(parse_blockdev_text(text))
    assert str(caught.value) == message


ARGUMENTS: list[tuple[str, list[str], Any]] = [
    ("query-block", [], {}),
    ("block_resize", ["node-name=a", "size=512"], {"node-name": "a", "size": 512}),
    ("block_resize", ['{"node-name": "a", "size": 512}'], {"node-name": "a", "size": 512}),
    ("query-named-block-nodes", ["flat=on"], {"flat": True}),
    ("query-named-block-nodes", ["flat:=true"], {"flat": True}),
    ("blockdev-del", ["node-name=5"], {"node-name": "5"}),
    ("blockdev-del", ["node-name=a=b,c"], {"node-name": "a=b,c"}),
    (
        "blockdev-add",
        ["driver=raw", "offset=5", "file.driver=null-co", "file.size=7"],
        {"driver": "raw", "offset": 5, "file": {"driver": "null-co", "size": 7}},
    ),
    (
        "blockdev-add",
        ["driver=blkdebug", "inject-error:=[{'event': 'read_aio'}]"],
        {"driver": "blkdebug", "inject-error": [{"event": "read_aio"}]},
    ),
    (
        "blockdev-reopen",
        ["options.0.driver=raw", "options.0.size=512", "options.0.file.driver=null-co", "options.0.file.size=7"],
        {"options": [{"driver": "raw", "size": 512, "file": {"driver": "null-co", "size": 7}}]},
    ),
    ("blockdev-reopen", ["options:=[5]"], {"options": [5]}),
    ("not-a-command-of-ours", ["a.b=1", "c:=2"], {"a": {"b": "1"}, "c": 2}),
]


@pytest.mark.parametrize(("command", "words", "arguments"), ARGUMENTS)
def test_the_words_behind_a_command(command: str, words: list[str], arguments: Any) -> None:
    assert parse_arguments(command, words) == arguments


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["foo"], "Expected '=' after parameter 'foo'"),
        (["=foo"], "Invalid parameter ''"),
        (["size=x"], "Parameter 'size' expects integer"),
        (["size:=x"], "JSON parse error, invalid keyword 'x'"),
        (["{"], "JSON parse error, premature EOI"),
        (["a=1", "a.b=2"], "Parameters 'a.b' used inconsistently"),
    ],
)
def test_words_that_are_no_arguments(words: list[str], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_arguments("block_resize", words)
    assert str(caught.value) == message
