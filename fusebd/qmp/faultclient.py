"""``fusebd fault``: the commands of the fault filter, in words for the shell."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

from fusebd.block.options import Json, Option, declared_options
from fusebd.errors import OptionError
from fusebd.qmp.client import execute, parse_arguments
from fusebd.qmp.commands import COMMANDS

_ADD = "fault-rule-add"
_SUFFIXES = {"K": 10, "M": 20, "G": 30, "T": 40}
_WITH_SUFFIX = re.compile(r"[0-9]+[kKmMgGtT]\Z")
#: members of a rule in a listing that are said in words
_IN_WORDS = ("id", "action", "matches", "hits", "active")


def add(address: str, node_name: str, words: list[str], path: str | None) -> str:
    """Add the rule that *words* spell; its id.  Raises FusebdError.

    *path* is the file of the node, to look for targets in, None if it is not known.
    """
    target, words = _target(words)
    if len(words) == 1 and words[0].startswith("{"):
        rule: Json = parse_arguments(_ADD, words)
    else:
        prefix = "rule."
        words = [_spelt_out(word, _rule_members()) for word in words]
        try:
            rule = parse_arguments(_ADD, [prefix + word for word in words]).get("rule", {})
        except OptionError as error:
            raise OptionError(str(error).replace(f"'{prefix}", "'")) from None
    if target is not None:
        if path is None:
            raise OptionError("Parameter 'target' needs a mount point to look in")
        # It comes with programs that are not needed for anything else here.
        from fusebd.faults.targets import find

        rule["ranges"] = [{"start": start, "length": length} for start, length in find(path, target)]
    returned = execute(address, _ADD, {"node-name": node_name, "rule": rule})
    assert isinstance(returned, dict)
    return str(returned["id"])


def _target(words: list[str]) -> tuple[str | None, list[str]]:
    """The structure that ``target=`` names, None without it, and the other words."""
    named = [word.removeprefix("target=") for word in words if word.startswith("target=")]
    if len(named) > 1:
        raise OptionError("Parameter 'target' is given twice")
    return (named[0] if named else None), [word for word in words if not word.startswith("target=")]


def _options(command_name: str) -> tuple[Option, ...]:
    """The arguments that the command takes."""
    command = COMMANDS.get(command_name)
    assert command is not None
    assert command.arguments is not None
    return declared_options(command.arguments)


def _rule_members() -> tuple[Option, ...]:
    """The members that a rule can have."""
    return next(option.members for option in _options(_ADD) if option.name == "rule")


def _spelt_out(word: str, options: tuple[Option, ...]) -> str:
    """*word* with ``read,write`` made a list and ``4k`` a number, for those of *options* that are."""
    name, equals, value = word.partition("=")
    option = next((option for option in options if option.name == name), None)
    if option is None or not equals:
        return word
    if option.type_name == "array" and not option.members:
        return f"{name}:={json.dumps(value.split(','))}"
    if option.type_name == "integer" and _WITH_SUFFIX.match(value):
        return f"{name}={int(value[:-1]) << _SUFFIXES[value[-1].upper()]}"
    return word


def remove(address: str, node_name: str, ids: list[str]) -> None:
    """Take the rules *ids* away, or, if there are none, the whole filter.  Raises FusebdError."""
    for ident in ids:
        execute(address, "fault-rule-remove", {"node-name": node_name, "id": ident})
    if not ids:
        found = execute(address, "query-fault-rules", {"node-name": node_name})
        execute(address, "block-filter-remove", {"node-name": found["node-name"]})


def record(address: str, node_name: str, path: str | None) -> None:
    """Have the run of *node_name* recorded in the file *path*; with None, no longer.  Raises FusebdError."""
    if path is None:
        execute(address, "fault-record-end", {"node-name": node_name})
    else:
        execute(address, "fault-record", {"node-name": node_name, "filename": os.path.abspath(path)})


def replay(address: str, node_name: str, path: str) -> None:
    """Put a filter that repeats what the file *path* has above *node_name*.  Raises FusebdError."""
    options = {"driver": "fault", "replay": os.path.abspath(path)}
    execute(address, "block-filter-insert", {"node-name": node_name, "filter": options})


def carry_out(address: str, command: str, node_name: str, words: list[str]) -> str:
    """Have *command* carried out with the arguments *words*; how much it did, in words.  Raises FusebdError."""
    words = [_spelt_out(word, _options(command)) for word in words]
    returned = execute(address, command, {"node-name": node_name, **parse_arguments(command, words)})
    return ", ".join(f"{name} {count}" for name, count in returned.items())


def listing(address: str, node_name: str, *, as_json: bool) -> list[str]:
    """Lines that say all about the fault filter of *node_name*.  Raises FusebdError."""
    found = execute(address, "query-fault-rules", {"node-name": node_name})
    return [json.dumps(found, indent=4)] if as_json else list(_lines(found))


def _lines(found: dict[str, Json]) -> Iterator[str]:
    yield f"filter {found['node-name']}, seed {found['seed']}, state {found['state']}"
    if "recording" in found:
        recording = found["recording"]
        failure = f", ended: {recording['error']}" if "error" in recording else ""
        yield f"recorded: {recording['decisions']} decisions to {recording['filename']}{failure}"
    if "replay" in found:
        replay = found["replay"]
        progress = f"{replay['decisions']} of {replay['recorded']} decisions of {replay['filename']}"
        yield f"replayed: {progress}{_difference(replay['diverged']) if 'diverged' in replay else ''}"
    for rule in found["rules"]:
        said = [option.name for option in _rule_members() if option.name in rule and option.name not in _IN_WORDS]
        members = " ".join(f"{name}={_value(rule[name])}" for name in said)
        activity = "active" if rule["active"] else "not active"
        counted = "done" if rule.get("at-rest") else f"hit by {rule['hits']} of {rule['matches']} requests, {activity}"
        yield f"rule {rule['id']}: {rule['action']}{' ' if members else ''}{members}: {counted}"
    for bad in found["bad-sectors"]:
        yield f"bad: {bad['length']} bytes at {bad['offset']}, rule {bad['rule']}"
    for flipped in found["flipped-bits"]:
        yield f"flipped: bit {flipped['bit']} of byte {flipped['offset']}, rule {flipped['rule']}"
    for held in found["held"]:
        what = f"{held['operation']} of {held['length']} bytes at {held['offset']}"
        process = f" for process {held['pid']}" if held["pid"] else ""
        yield f"held: request {held['request']}, {what}{process}, {held['seconds']} s, rule {held['rule']}"


def _difference(diverged: Json) -> str:
    position = diverged["position"]
    expected, found = (json.dumps(diverged[side]) for side in ("expected", "found"))
    where = f"{position['operation']} {position['number']}" if position["number"] else "the beginning"
    return f", differs at {where}: expected {expected}, found {found}"


def _value(value: Json) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    return value if isinstance(value, str) else json.dumps(value)
