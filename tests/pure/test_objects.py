"""User-creatable objects and the commands for them, answered as qemu-storage-daemon 10.0.2 answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusebd.block.graph import Graph
from fusebd.block.objects import Objects, parse_object_text
from fusebd.errors import FusebdError, OptionError
from fusebd.qmp.commands import COMMANDS
from fusebd.qmp.monitor import Monitor
from fusebd.qmp.table import Context

Json = Any
GROUP = {"qom-type": "throttle-group", "id": "g"}
IOTHREAD = {"qom-type": "iothread", "id": "t"}
MAIN_LOOP = {"qom-type": "main-loop", "id": "m"}
SECRET = {"qom-type": "secret", "id": "s"}
NO_LIMITS = {
    f"{unit}-{scope}{suffix}": 1 if suffix == "-max-length" else 0
    for unit in ("iops", "bps")
    for scope in ("total", "read", "write")
    for suffix in ("", "-max", "-max-length")
} | {"iops-size": 0}


@pytest.fixture
def context() -> Context:
    """An empty daemon, as far as commands see it."""
    return Context(Graph(), COMMANDS, Monitor(COMMANDS), lambda: None)


async def run(context: Context, command: str, **arguments: Json) -> Json:
    """What *command* returns."""
    found = COMMANDS.get(command)
    assert found is not None
    return await found.run(context, {name.replace("_", "-"): value for name, value in arguments.items()})


async def refusal(context: Context, command: str, **arguments: Json) -> str:
    """The QMP error, ``class: description``, that *command* ends with; the class only if it is not GenericError."""
    with pytest.raises(FusebdError) as refused:
        await run(context, command, **arguments)
    name = getattr(refused.value, "qmp_class", "GenericError")
    return str(refused.value) if name == "GenericError" else f"{name}: {refused.value}"


async def add(context: Context, *objects: Json) -> None:
    for each in objects:
        await run(context, "object-add", **each)


async def names(context: Context) -> list[str]:
    return [each["name"] for each in await run(context, "qom-list", path="/objects")][1:]


# --- making and deleting -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "Parameter 'qom-type' is missing"),
        ({"id": "g"}, "Parameter 'qom-type' is missing"),
        ({"qom-type": 5, "id": "g"}, "Invalid parameter type for 'qom-type', expected: string"),
        ({"qom-type": "nope", "id": "g"}, "Parameter 'qom-type' does not accept value 'nope'"),
        ({"qom-type": "can-bus", "id": "g"}, "invalid object type: can-bus"),
        ({"qom-type": "can-bus"}, "Parameter 'id' is missing"),
        ({"qom-type": "iothread", "foo": 1}, "Parameter 'id' is missing"),
        ({"qom-type": "iothread", "id": 5}, "Invalid parameter type for 'id', expected: string"),
        ({**GROUP, "id": ""}, "Parameter 'id' expects an identifier"),
        ({**GROUP, "id": "1g"}, "Parameter 'id' expects an identifier"),
        ({**GROUP, "id": "a/b"}, "Parameter 'id' expects an identifier"),
        ({**GROUP, "id": "g\n"}, "Parameter 'id' expects an identifier"),
        ({**GROUP, "id": "type"}, "attempt to add duplicate property 'type' to object (type 'container')"),
        ({**GROUP, "x": 1}, "Parameter 'x' is unexpected"),
        ({**GROUP, "limits": 1}, "Invalid parameter type for 'limits', expected: object"),
        ({**GROUP, "limits": {"foo": 1}}, "Parameter 'limits.foo' is unexpected"),
        (
            {**GROUP, "limits": {"iops-total": "1"}},
            "Invalid parameter type for 'limits.iops-total', expected: integer",
        ),
        (
            {**GROUP, "limits": {"iops-total": 2**63}},
            "Invalid parameter type for 'limits.iops-total', expected: integer",
        ),
        ({**GROUP, "limits": {"iops-total-max-length": 0}}, "the burst length cannot be 0"),
        ({**GROUP, "x-iops-total": "9"}, "Invalid parameter type for 'x-iops-total', expected: integer"),
        ({**GROUP, "x-iops-total": -10}, "Property values cannot be negative"),
        ({**GROUP, "x-iops-total": 10**15 + 1}, "bps/iops/max values must be within [0, 1000000000000000]"),
        ({**GROUP, "x-iops-total-max-length": 0}, "the burst length cannot be 0"),
        (
            {**GROUP, "x-iops-total-max-length": 2**32},
            "x-iops-total-max-length value must be in therange [0, 4294967295]",
        ),
        (
            {**GROUP, "x-iops-total": 10, "x-iops-read": 20},
            "bps/iops/max total values and read/write values cannot be used at the same time",
        ),
        # QEMU looks at the limits when it sets them, and sets x-iops-write only after that
        (
            {**GROUP, "x-iops-size": 5, "x-iops-write": 7, "limits": {"bps-read": 3}},
            "iops size requires an iops value to be set",
        ),
        ({**IOTHREAD, "poll-max-ns": "5"}, "Invalid parameter type for 'poll-max-ns', expected: integer"),
        ({**IOTHREAD, "poll-max-ns": -1}, "poll-max-ns value must be in range [0, 9223372036854775807]"),
        ({**IOTHREAD, "thread-pool-min": 65}, "bad thread-pool-min/thread-pool-max values"),
        ({**IOTHREAD, "thread-pool-max": 0}, "bad thread-pool-min/thread-pool-max values"),
        ({**IOTHREAD, "thread-pool-max": 2**31}, "bad thread-pool-min/thread-pool-max values"),
        ({**MAIN_LOOP, "poll-max-ns": 1}, "Parameter 'poll-max-ns' is unexpected"),
        (SECRET, "Either 'file' or 'data' must be provided"),
        ({**SECRET, "data": "a", "file": "b"}, "'file' and 'data' are mutually exclusive"),
        ({**SECRET, "data": "a", "loaded": True}, "Parameter 'loaded' is unexpected"),
        ({**SECRET, "data": "a", "format": "hex"}, "Parameter 'format' does not accept value 'hex'"),
        ({**SECRET, "data": "YW Jj", "format": "base64"}, "Base64 data contains invalid characters"),
        ({**SECRET, "data": "=YWJ", "format": "base64"}, "Base64 data is malformed"),
        ({**SECRET, "data": "a", "keyid": "k"}, "No secret with id 'k'"),
        (
            {**SECRET, "file": "/nowhere"},
            "Unable to read /nowhere: Failed to open file \u201c/nowhere\u201d: No such file or directory",
        ),
        ({**SECRET, "file": "/"}, "Unable to read /: Error reading file \u201c/\u201d: Is a directory"),
        ({**SECRET, "file": "/dev/zero"}, "Unable to read /dev/zero: it has more than 1048576 bytes"),
    ],
    ids=str,
)
async def test_an_impossible_object_is_refused(context: Context, value: Json, message: str) -> None:
    assert await refusal(context, "object-add", **value) == message
    assert await names(context) == []


async def test_ids_are_well_formed_and_of_any_length(context: Context) -> None:
    for name in ("a", "Abc.d-e_F9", "x" * 300):
        await add(context, {**GROUP, "id": name})
    assert await names(context) == ["a", "Abc.d-e_F9", "x" * 300]


async def test_an_id_is_taken_once_whatever_the_type(context: Context) -> None:
    await add(context, GROUP)
    message = "attempt to add duplicate property 'g' to object (type 'container')"
    assert await refusal(context, "object-add", **{**IOTHREAD, "id": "g"}) == message
    await run(context, "object-del", id="g")
    await add(context, {**IOTHREAD, "id": "g"})


async def test_an_object_that_is_not_there_cannot_be_deleted(context: Context) -> None:
    assert await refusal(context, "object-del", id="nope") == "object 'nope' not found"
    assert await refusal(context, "object-del") == "Parameter 'id' is missing"


async def test_a_group_with_members_cannot_be_deleted(context: Context) -> None:
    await add(context, GROUP)
    member = context.graph.objects.throttle_group("g").join()
    assert await refusal(context, "object-del", id="g") == "object 'g' is in use, can not be deleted"
    member.leave()
    await run(context, "object-del", id="g")
    assert await names(context) == []


async def test_there_is_one_main_loop_which_stays(context: Context) -> None:
    await add(context, MAIN_LOOP)
    assert await refusal(context, "object-add", **{**MAIN_LOOP, "id": "n"}) == "only one main-loop instance allowed"
    assert await refusal(context, "object-del", id="m") == "object 'm' is in use, can not be deleted"


async def test_a_failed_main_loop_leaves_room_for_another(context: Context) -> None:
    assert await refusal(context, "object-add", **MAIN_LOOP, thread_pool_max=0)
    await add(context, MAIN_LOOP)


async def test_only_objects_of_the_right_type_are_found(context: Context) -> None:
    await add(context, GROUP, IOTHREAD)
    objects = context.graph.objects
    assert objects.throttle_group("g").id == "g"
    assert objects.is_iothread("t")
    assert not objects.is_iothread("g")
    with pytest.raises(OptionError, match=r"^Throttle group 't' does not exist$"):
        objects.throttle_group("t")
    with pytest.raises(OptionError, match=r"^Object with id 't' is not a secret$"):
        objects.secret("t")


# --- secrets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"data": "abc"}, b"abc"),
        ({"data": ""}, b""),
        ({"data": "\u00e4"}, "\u00e4".encode()),
        ({"data": "YWJj", "format": "base64"}, b"abc"),
        ({"data": "/w==", "format": "base64"}, b"\xff"),
        ({"data": "YW\nJj\n", "format": "base64"}, b"abc"),
        ({"data": "YWJjYW", "format": "base64"}, b"abc"),
    ],
    ids=str,
)
async def test_a_secret_is_what_was_given(options: Json, value: bytes) -> None:
    objects = Objects()
    await objects.add({**SECRET, **options})
    assert objects.secret("s").value == value


@pytest.mark.parametrize(("options", "value"), [({}, b"\xff\n"), ({"format": "base64"}, None)], ids=str)
async def test_a_secret_can_be_in_a_file(tmp_path: Path, options: Json, value: bytes | None) -> None:
    (tmp_path / "file").write_bytes(b"\xff\n")
    objects = Objects()
    given = {**SECRET, "file": str(tmp_path / "file"), **options}
    if value is None:
        with pytest.raises(OptionError, match="Base64 data contains invalid characters"):
            await objects.add(given)
    else:
        await objects.add(given)
        assert objects.secret("s").value == value


# AES-256-CBC of "secret" with a key of 32 "k" and a vector of 16 "v", by openssl(1)
ENCRYPTED = {"data": "e/LMMk/81s3VF4WhO4CfHg==", "format": "base64", "iv": "dnZ2dnZ2dnZ2dnZ2dnZ2dg==", "keyid": "k"}


async def test_a_secret_may_be_encrypted_with_another_one(context: Context) -> None:
    await add(context, SECRET | {"id": "k", "data": "k" * 32})
    await add(context, SECRET | ENCRYPTED)
    assert context.graph.objects.password("s") == b"secret"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"iv": None}, "IV is required to decrypt secret"),
        ({"iv": "QUJD"}, "IV should be 16 bytes in length not 3"),
        ({"iv": "%%%"}, "Base64 data contains invalid characters"),
        ({"data": "x", "format": "raw"}, "Length 1 must be a multiple of block size 16"),
        ({"data": "QUJDREVGR0hJSktMTU5PUA=="}, "Incorrect number of padding bytes (254) found on decrypted data"),
        ({"keyid": "short"}, "Key should be 32 bytes in length"),
        ({"keyid": "nowhere"}, "No secret with id 'nowhere'"),
    ],
    ids=str,
)
async def test_a_secret_that_cannot_be_decrypted_is_refused(context: Context, given: Json, message: str) -> None:
    await add(context, SECRET | {"id": "k", "data": "k" * 32})
    await add(context, SECRET | {"id": "short", "data": "abc"})
    value = {name: option for name, option in (SECRET | ENCRYPTED | given).items() if option is not None}
    assert await refusal(context, "object-add", **value) == message


# --- QOM -----------------------------------------------------------------------------------------


async def test_limits_are_shown_whole(context: Context) -> None:
    await add(context, {**GROUP, "limits": {"iops-total": 10, "iops-total-max": 20, "iops-total-max-length": 3}})
    shown = await run(context, "qom-get", path="/objects/g", property="limits")
    assert shown == {**NO_LIMITS, "iops-total": 10, "iops-total-max": 20, "iops-total-max-length": 3}
    assert await run(context, "qom-get", path="g", property="x-iops-total") == 10
    assert await run(context, "qom-get", path="g", property="x-iops-total-max-length") == 3


async def test_limits_given_one_by_one_come_after_those_given_together(context: Context) -> None:
    await add(context, {**GROUP, "x-iops-write": 7, "x-bps-total": 5, "limits": {"iops-write": 3}})
    shown = await run(context, "qom-get", path="g", property="limits")
    assert shown == {**NO_LIMITS, "iops-write": 7, "bps-total": 5}


async def test_qom_set_changes_only_the_limits_that_it_names(context: Context) -> None:
    await add(context, {**GROUP, "limits": {"iops-total": 10}})
    await run(context, "qom-set", path="/objects/g", property="limits", value={"bps-total": 7})
    shown = await run(context, "qom-get", path="g", property="limits")
    assert shown == {**NO_LIMITS, "iops-total": 10, "bps-total": 7}


async def test_a_refused_qom_set_leaves_the_limits(context: Context) -> None:
    await add(context, {**GROUP, "limits": {"iops-total": 10, "iops-total-max": 20}})
    before = await run(context, "qom-get", path="g", property="limits")
    for value, message in (
        (5, "Invalid parameter type for 'limits', expected: object"),
        ({"foo": 5}, "Parameter 'limits.foo' is unexpected"),
        ({"iops-total": "5"}, "Invalid parameter type for 'limits.iops-total', expected: integer"),
        ({"iops-total": 0}, "bps_max/iops_max require corresponding bps/iops values"),
        ({"iops-read": 1}, "bps/iops/max total values and read/write values cannot be used at the same time"),
    ):
        assert await refusal(context, "qom-set", path="g", property="limits", value=value) == message
    assert await run(context, "qom-get", path="g", property="limits") == before


async def test_properties_that_cannot_be_set_say_why(context: Context) -> None:
    await add(context, GROUP)
    for path, name, message in (
        ("g", "x-iops-total", "Property cannot be set after initialization"),
        ("g", "type", "Property 'throttle-group.type' is not writable"),
        ("g", "nope", "Property 'throttle-group.nope' not found"),
        ("g", "id", "Property 'throttle-group.id' not found"),
        ("/objects", "g", "Property 'container.g' is not writable"),
        ("/objects", "type", "Property 'container.type' is not writable"),
        ("/objects", "nope", "Property 'container.nope' not found"),
        ("/objects/nope", "limits", "DeviceNotFound: Device '/objects/nope' not found"),
        ("nope", "limits", "DeviceNotFound: Device 'nope' not found"),
    ):
        assert await refusal(context, "qom-set", path=path, property=name, value=5) == message
    assert await refusal(context, "qom-set", path="g", property="limits") == "Parameter 'value' is missing"


async def test_properties_of_event_loops_are_kept(context: Context) -> None:
    await add(context, IOTHREAD, MAIN_LOOP)
    for name, value in (("poll-max-ns", 32768), ("poll-grow", 0), ("aio-max-batch", 0), ("thread-pool-max", 64)):
        assert await run(context, "qom-get", path="t", property=name) == value
    await run(context, "qom-set", path="t", property="poll-max-ns", value=5)
    assert await run(context, "qom-get", path="t", property="poll-max-ns") == 5
    await run(context, "qom-set", path="m", property="aio-max-batch", value=7)
    assert await run(context, "qom-get", path="m", property="aio-max-batch") == 7


async def test_a_refused_property_of_an_event_loop_stays_as_it_was(context: Context) -> None:
    await add(context, IOTHREAD)
    for name, value, message in (
        ("poll-grow", -5, "poll-grow value must be in range [0, 9223372036854775807]"),
        ("poll-grow", None, "Invalid parameter type for 'poll-grow', expected: integer"),
        ("thread-pool-min", 100, "bad thread-pool-min/thread-pool-max values"),
        ("thread-pool-max", 0, "bad thread-pool-min/thread-pool-max values"),
    ):
        assert await refusal(context, "qom-set", path="t", property=name, value=value) == message
    await run(context, "qom-set", path="t", property="thread-pool-min", value=64)


async def test_a_secret_shows_how_it_was_given(context: Context) -> None:
    await add(context, SECRET | {"data": "YWJj", "format": "base64"})
    shown = {name: await run(context, "qom-get", path="s", property=name) for name in ("data", "file", "format", "iv")}
    assert shown == {"data": "YWJj", "file": "", "format": "base64", "iv": ""}
    await run(context, "qom-set", path="s", property="data", value="other")
    assert context.graph.objects.secret("s").value == b"abc"


async def test_the_tree_is_listed(context: Context) -> None:
    await add(context, GROUP, IOTHREAD)
    type_property = {"name": "type", "type": "string"}
    assert {"name": "objects", "type": "child<container>"} in await run(context, "qom-list", path="/")
    assert await run(context, "qom-list", path="//objects/") == [
        type_property,
        {"name": "g", "type": "child<throttle-group>"},
        {"name": "t", "type": "child<iothread>"},
    ]
    properties = await run(context, "qom-list", path="g")
    assert {"name": "limits", "type": "ThrottleLimits"} in properties
    assert {each["name"] for each in properties} == {"type", "limits", *(f"x-{name}" for name in NO_LIMITS)}
    assert await run(context, "qom-list-properties", typename="throttle-group") == properties
    assert await refusal(context, "qom-list", path="/objects/g/x") == "DeviceNotFound: Device '/objects/g/x' not found"


async def test_objects_and_containers_have_a_type(context: Context) -> None:
    await add(context, GROUP)
    assert await run(context, "qom-get", path="g", property="type") == "throttle-group"
    assert await run(context, "qom-get", path="/objects", property="type") == "container"
    assert await run(context, "qom-get", path="/objects", property="g") == "/objects/g"
    assert await run(context, "qom-get", path="/", property="objects") == "/objects"


async def test_a_partial_path_has_to_lead_to_one_thing(context: Context) -> None:
    await add(context, {**GROUP, "id": "objects"})
    assert await refusal(context, "qom-list", path="objects") == "Path 'objects' is ambiguous"
    assert await refusal(context, "qom-list", path="") == "Path '' is ambiguous"
    message = "DeviceNotFound: Device 'objects' not found"
    assert await refusal(context, "qom-get", path="objects", property="type") == message
    assert await run(context, "qom-get", path="objects/objects", property="type") == "throttle-group"


async def test_types_are_listed(context: Context) -> None:
    made = [
        {"name": "iothread", "parent": "event-loop-base"},
        {"name": "main-loop", "parent": "event-loop-base"},
        {"name": "secret", "parent": "secret_common"},
        {"name": "throttle-group", "parent": "object"},
    ]
    assert await run(context, "qom-list-types", implements="user-creatable") == made
    assert await run(context, "qom-list-types") == [{"name": "container", "parent": "object"}, *made]
    assert await run(context, "qom-list-types", implements="event-loop-base") == made[:2]
    assert await run(context, "qom-list-types", implements="nope") == []
    with_abstract = await run(context, "qom-list-types", implements="event-loop-base", abstract=True)
    assert with_abstract == [{"name": "event-loop-base", "abstract": True, "parent": "object"}, *made[:2]]
    message = "DeviceNotFound: Class 'nope' not found"
    assert await refusal(context, "qom-list-properties", typename="nope") == message


# --- --object ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("throttle-group,id=g", GROUP),
        ("qom-type=throttle-group,id=g", GROUP),
        ("throttle-group,id=g,limits.iops-total=0x10", {**GROUP, "limits": {"iops-total": 16}}),
        ("throttle-group,id=g,x-iops-total=7", {**GROUP, "x-iops-total": 7}),
        ("secret,id=s,data=a,,b", {**SECRET, "data": "a,b"}),
        ("nope,id=g", {"qom-type": "nope", "id": "g"}),
        ("id=g", {"id": "g"}),
        ("", {}),
        ('{"qom-type": "throttle-group", "id": "g"}', GROUP),
    ],
)
def test_objects_are_spelt_as_json_or_key_value(text: str, value: Json) -> None:
    assert parse_object_text(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("throttle-group,id", "Expected '=' after parameter 'id'"),
        ("throttle-group,id=g,limits.iops-total=x", "Parameter 'limits.iops-total' expects integer"),
        ("iothread,id=t,poll-max-ns=9M", "Parameter 'poll-max-ns' expects integer"),
        ('{"qom-type"', "JSON parse error, premature EOI"),
    ],
)
def test_a_misspelt_object_is_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError) as refused:
        parse_object_text(text)
    assert str(refused.value) == message
