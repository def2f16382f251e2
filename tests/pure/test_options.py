"""The option model: QEMU's messages, both spellings, and the listings."""

from __future__ import annotations

from typing import Any

import pytest

from fusebd.block.driver import driver_class, parse_blockdev, parse_blockdev_text
from fusebd.block.options import describe, parse_keyval, tree_from_dotted
from fusebd.errors import OptionError

FILE = {"driver": "file", "filename": "t.raw"}


# Left what is asked for, right what qemu-storage-daemon 10.0.2 answers to it.
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"driver": "file"}, "Parameter 'filename' is missing"),
        ({"driver": "file", "filename": 3}, "Invalid parameter type for 'filename', expected: string"),
        ({"node-name": "x"}, "Parameter 'driver' is missing"),
        ({"driver": "nosuch"}, "Parameter 'driver' does not accept value 'nosuch'"),
        ({"driver": "raw"}, "Parameter 'file' is missing"),
        ({"driver": "raw", "file": {**FILE, "foo": 1}}, "Parameter 'file.foo' is unexpected"),
        ({"driver": "raw", "file": 5}, "Invalid parameter type for 'file', expected: BlockdevRef"),
        ({"driver": "raw", "file": None}, "Invalid parameter type for 'file', expected: BlockdevRef"),
        ({"driver": "raw", "file": {"filename": "x"}}, "Parameter 'file.driver' is missing"),
        ({"driver": "raw", "file": FILE, "size": "1M"}, "Invalid parameter type for 'size', expected: integer"),
        ({"driver": "raw", "file": FILE, "size": 1.5}, "Invalid parameter type for 'size', expected: integer"),
        (
            {"driver": "raw", "file": FILE, "read-only": "on"},
            "Invalid parameter type for 'read-only', expected: boolean",
        ),
        ({**FILE, "detect-zeroes": "foo"}, "Parameter 'detect-zeroes' does not accept value 'foo'"),
        ({**FILE, "cache": {"direct": 1}}, "Invalid parameter type for 'cache.direct', expected: boolean"),
        ({**FILE, "cache": {"foo": True}}, "Parameter 'cache.foo' is unexpected"),
        ({**FILE, "node_name": "x"}, "Parameter 'node_name' is unexpected"),
    ],
)
def test_a_wrong_option_is_refused_in_the_words_of_qemu(value: Any, message: str) -> None:
    with pytest.raises(OptionError) as refused:
        parse_blockdev(value)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("driver=file", "Parameter 'filename' is missing"),
        ("filename=x", "Parameter 'driver' is missing"),
        ("driver=raw,file.driver=file,file.filename=x,read-only=1", "Parameter 'read-only' expects 'on' or 'off'"),
        ("driver=raw,file.driver=file,file.filename=x,file=b", "Parameters 'file.*' used inconsistently"),
        ("driver=raw,=3", "Invalid parameter ''"),
        ("driver=raw,node-name", "Expected '=' after parameter 'node-name'"),
        ("driver=raw,file=x,size=zz", "Parameter 'size' expects integer"),
        ("driver=raw,file=x,size=1k", "Parameter 'size' expects integer"),
    ],
)
def test_a_wrong_key_value_option_is_refused_in_the_words_of_qemu(text: str, message: str) -> None:
    with pytest.raises(OptionError) as refused:
        parse_blockdev(parse_blockdev_text(text))
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("a=1,b.c=2,b.d=3", {"a": "1", "b": {"c": "2", "d": "3"}}),
        ("a=x,,y", {"a": "x,y"}),
        ("a=,,,,", {"a": ",,"}),
        ("a=", {"a": ""}),
        ("l.0=p,l.1.q=r", {"l": ["p", {"q": "r"}]}),
        ("a=b=c", {"a": "b=c"}),
        ("", {}),
    ],
)
def test_key_value_text_becomes_a_tree(text: str, tree: dict[str, Any]) -> None:
    assert parse_keyval(text) == tree


def test_a_list_with_a_gap_is_refused() -> None:
    with pytest.raises(OptionError, match=r"^Parameter 'l\.0' missing$"):
        parse_keyval("l.1=x")


def test_both_spellings_give_the_same_options() -> None:
    text = "driver=raw,node-name=a,size=1024,read-only=on,cache.no-flush=on,file.driver=file,file.filename=x"
    value = {
        "driver": "raw",
        "node-name": "a",
        "size": 1024,
        "read-only": True,
        "cache": {"no-flush": True},
        "file": {"driver": "file", "filename": "x"},
    }
    assert parse_blockdev_text(text) == value
    assert parse_blockdev(value).read_only is True


def test_dotted_keys_of_a_json_name_become_a_tree() -> None:
    flat = {"driver": "raw", "file.driver": "file", "file": {"filename": "x"}, "l.0": 1, "l.1": 2}
    assert tree_from_dotted(flat) == {"driver": "raw", "file": {"driver": "file", "filename": "x"}, "l": [1, 2]}


def test_the_listing_names_every_option_with_its_type() -> None:
    listing = describe(driver_class("raw").options_class)
    assert "file=<BlockdevRef>" in listing
    assert "required" in listing
    assert "cache.direct=<boolean>" in listing
    assert "detect-zeroes=<off|on|unmap>" in listing
