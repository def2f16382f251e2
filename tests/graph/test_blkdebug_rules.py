"""blkdebug's rules: the same rules and requests through fusebd and through qemu-io, with one outcome for both.

The outcomes in SCENARIOS were read from qemu-io 10.0.2; 7.2 gives the same, so the qemu-io that is installed is asked
each time.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import subprocess
from dataclasses import dataclass, field
from typing import Any

import pytest
from support import READ_WRITE, read, root_of

from fusebd.block.blockstatus import block_status
from fusebd.block.child import FUA, MAY_UNMAP
from fusebd.block.graph import Graph
from fusebd.block.root import Root
from fusebd.drivers.blkdebug import EVENTS, IO_TYPES, InjectErrorOptions, SetStateOptions
from fusebd.drivers.blkdebug.rules import RuleSet
from fusebd.errors import BlockIOError, CommandError, OptionError

MIB = 1 << 20
Rule = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """Rules, and requests (qemu-io's commands) with what each of them ends with.

    The stack is raw over blkdebug over null-co; without *raw*, the blkdebug node itself gets the requests.
    """

    name: str
    requests: dict[str, str] | list[tuple[str, str]]
    #: a failing flush is "failed", one whose outcome qemu-io does not tell "any"
    inject: list[Rule] = field(default_factory=list)
    states: list[Rule] = field(default_factory=list)
    raw: bool = True

    @property
    def commands(self) -> list[str]:
        return [command for command, _ in self._pairs]

    @property
    def outcomes(self) -> list[str]:
        return [outcome for _, outcome in self._pairs]

    @property
    def _pairs(self) -> list[tuple[str, str]]:
        return list(self.requests.items()) if isinstance(self.requests, dict) else self.requests

    @property
    def blkdebug(self) -> dict[str, Any]:
        image = {"driver": "null-co", "size": MIB, "read-zeroes": True}
        return {"driver": "blkdebug", "image": image, "inject-error": self.inject, "set-state": self.states}


SCENARIOS = [
    Scenario("no rules", {"read 0 512": "ok", "write 0 512": "ok", "discard 0 4096": "ok", "flush": "ok"}),
    Scenario(
        "a rule goes on failing all requests until another event replaces it",
        [
            ("write 0 512", "ok"),
            ("read 0 512", "EIO"),
            ("write 0 512", "EIO"),
            ("write -z 0 4096", "EIO"),
            ("discard 0 4096", "EIO"),
            ("read 4096 512", "EIO"),
            ("alloc 0 4096", "ok"),
        ],
        inject=[{"event": "read_aio"}],
    ),
    Scenario(
        "matching rules of an event replace the active ones",
        {"read 0 512": "EIO", "write 0 512": "ENOSPC", "discard 0 4096": "ENOSPC", "read 512 512": "EIO"},
        inject=[{"event": "read_aio"}, {"event": "write_aio", "errno": errno.ENOSPC}],
    ),
    Scenario(
        "an event whose rules do not match the state leaves the active ones",
        {"read 0 512": "EIO", "write 0 512": "EIO"},
        inject=[{"event": "read_aio"}, {"event": "write_aio", "errno": errno.ENOSPC, "state": 2}],
    ),
    Scenario(
        "an event without rules leaves the active ones",
        {"read 0 512": "EIO", "write 0 512": "EIO"},
        inject=[{"event": "read_aio"}],
        states=[{"event": "write_aio", "new_state": 7}],
    ),
    Scenario(
        "once",
        [("write 0 512", "EIO"), ("write 0 512", "ok"), ("read 0 512", "ok")],
        inject=[{"event": "write_aio", "once": True}],
    ),
    Scenario(
        "once counts only for the request that it fails",
        [("write 0 512", "ok"), ("write 512 512", "EIO"), ("write 512 512", "ok")],
        inject=[{"event": "write_aio", "once": True, "sector": 1}],
    ),
    Scenario(
        "a rule that is once makes room for the next of its event",
        [("write 0 512", "ENOSPC"), ("write 0 512", "EPERM"), ("write 0 512", "EPERM")],
        inject=[
            {"event": "write_aio", "errno": errno.ENOSPC, "once": True},
            {"event": "write_aio", "errno": errno.EPERM},
        ],
    ),
    Scenario(
        "the first rule in the order of configuration wins",
        {"write 0 512": "ENOSPC", "write 512 512": "EPERM"},
        inject=[
            {"event": "write_aio", "errno": errno.ENOSPC, "sector": 0},
            {"event": "write_aio", "errno": errno.EPERM},
            {"event": "write_aio", "errno": errno.EIO},
        ],
    ),
    Scenario(
        "errno 0 lets the request through and hides later rules",
        {"write 0 512": "ok", "write 512 512": "EIO"},
        inject=[{"event": "write_aio", "errno": 0, "sector": 0}, {"event": "write_aio"}],
    ),
    Scenario(
        "errno 0 is never used up",
        [("write 0 512", "ok"), ("write 0 512", "ok")],
        inject=[{"event": "write_aio", "errno": 0, "once": True}, {"event": "write_aio"}],
    ),
    Scenario(
        "a sector inside of the request matches, one outside does not",
        {
            "read 0 512": "ok",
            "read 512 512": "EIO",
            "read 0 1024": "EIO",
            "read 512 4096": "EIO",
            "read 1024 512": "ok",
            "write -z 0 4096": "EIO",
            "write -z 4096 4096": "ok",
            "discard 0 4096": "EIO",
            "discard 4096 4096": "ok",
        },
        inject=[{"event": "none", "sector": 1}],
    ),
    Scenario(
        "a part of a sector counts as far as its first byte",
        {"read 600 8": "ok", "read 512 8": "EIO", "read 511 1": "ok", "read 511 2": "EIO"},
        inject=[{"event": "none", "sector": 1}],
    ),
    Scenario(
        "a sector never matches a flush",
        {"write 4096 512": "ok", "flush": "ok"},
        inject=[{"event": "none", "sector": 0}],
    ),
    Scenario("a flush fails by default", {"write 0 512": "ok", "flush": "failed"}, [{"event": "flush_to_os"}]),
    Scenario("a flush without a write before never gets there", {"flush": "ok"}, [{"event": "flush_to_os"}]),
    Scenario(
        "a flush after a failed write gets there",
        {"write 0 512": "EIO", "flush": "any", "read 0 512": "EIO"},
        inject=[{"event": "write_aio", "once": True}, {"event": "flush_to_disk", "iotype": "read"}],
    ),
    Scenario("iotype read", {"read 0 512": "EIO", "write 0 512": "ok"}, [{"event": "none", "iotype": "read"}]),
    Scenario(
        "iotype write",
        # a zero write that null-co does not support becomes writes below blkdebug
        {"read 0 512": "ok", "write 0 512": "EIO", "write -z 0 4096": "ok", "discard 0 4096": "ok"},
        inject=[{"event": "none", "iotype": "write"}],
    ),
    Scenario(
        "iotype write-zeroes",
        {"write 0 512": "ok", "write -z 0 4096": "EIO", "write -z -u 0 4096": "EIO", "discard 0 4096": "ok"},
        inject=[{"event": "none", "iotype": "write-zeroes"}],
    ),
    Scenario(
        "iotype discard",
        {"write -z -u 0 4096": "ok", "discard 0 4096": "EIO"},
        inject=[{"event": "none", "iotype": "discard"}],
    ),
    Scenario(
        "iotype flush",
        {"read 0 512": "ok", "write 0 512": "ok", "flush": "failed"},
        inject=[{"event": "none", "iotype": "flush"}],
    ),
    Scenario(
        "iotype block-status",
        {"read 0 512": "ok", "alloc 0 4096": "EIO", "write 0 512": "ok"},
        inject=[{"event": "none", "iotype": "block-status"}],
    ),
    Scenario(
        "discards that are not supported do nothing",
        {"discard 0 4096": "ok"},
        [{"event": "none", "errno": errno.ENOTSUP}],
    ),
    Scenario(
        "zero writes that are not supported become writes",
        {"write -z 0 4096": "ok", "write 0 512": "ok"},
        inject=[{"event": "none", "iotype": "write-zeroes", "errno": errno.ENOTSUP}],
    ),
    Scenario(
        "set-state decides from the next event on",
        [("read 0 512", "ok"), ("write 0 512", "ok"), ("read 0 512", "EIO"), ("write 0 512", "EIO")],
        inject=[{"event": "read_aio", "state": 42}],
        states=[{"event": "write_aio", "new_state": 42}],
    ),
    Scenario(
        "the state before the event counts",
        [("write 0 512", "ok"), ("write 0 512", "EIO"), ("write 0 512", "EIO")],
        inject=[{"event": "write_aio", "state": 2}],
        states=[{"event": "write_aio", "state": 1, "new_state": 2}, {"event": "write_aio", "state": 2, "new_state": 3}],
    ),
    Scenario(
        "several set-state: the one configured first decides",
        [("write 0 512", "ok"), ("read 0 512", "ENOSPC")],
        inject=[
            {"event": "read_aio", "state": 2, "errno": errno.ENOSPC},
            {"event": "read_aio", "state": 3, "errno": errno.EPERM},
        ],
        states=[{"event": "write_aio", "new_state": 2}, {"event": "write_aio", "new_state": 3}],
    ),
    Scenario(
        "a set-state whose state does not match is passed over",
        [("write 0 512", "ok"), ("read 0 512", "EPERM")],
        inject=[
            {"event": "read_aio", "state": 2, "errno": errno.ENOSPC},
            {"event": "read_aio", "state": 3, "errno": errno.EPERM},
        ],
        states=[{"event": "write_aio", "state": 9, "new_state": 2}, {"event": "write_aio", "new_state": 3}],
    ),
    Scenario(
        "the n-th request fails",
        [("write 0 512", "ok"), ("write 0 512", "ok"), ("write 0 512", "EIO"), ("write 0 512", "ok")],
        inject=[{"event": "write_aio", "state": 3, "once": True}],
        states=[{"event": "write_aio", "state": 1, "new_state": 2}, {"event": "write_aio", "state": 2, "new_state": 3}],
    ),
    Scenario(
        "state 0 is any state",
        [("write 0 512", "ok"), ("read 0 512", "EIO")],
        inject=[{"event": "read_aio", "state": 0}],
        states=[{"event": "write_aio", "state": 0, "new_state": 99}],
    ),
    Scenario(
        "the state can become 0",
        [("write 0 512", "ok"), ("read 0 512", "ok"), ("read 0 512", "ok")],
        inject=[{"event": "read_aio", "state": 1}],
        states=[{"event": "write_aio", "new_state": 0}],
    ),
    Scenario("none happens once, in state 1", {"read 0 512": "EIO"}, [{"event": "none", "state": 1}]),
    Scenario(
        "none arms nothing in another state",
        [("read 0 512", "ok"), ("read 0 512", "ok")],
        inject=[{"event": "none", "state": 2}],
        states=[{"event": "read_aio", "new_state": 2}],
    ),
    Scenario(
        "none changes the state before the first request",
        {"read 0 512": "EIO"},
        inject=[{"event": "read_aio", "state": 5}],
        states=[{"event": "none", "new_state": 5}],
    ),
    Scenario(
        "an error that comes immediately",
        {"read 0 512": "EIO", "write 0 512": "EIO"},
        inject=[{"event": "none", "immediately": True}],
    ),
    Scenario(
        "events of the edge reach a blkdebug that gets the requests itself",
        [("read 0 512", "ok"), ("write 0 512", "EIO"), ("read 0 512", "EIO")],
        inject=[{"event": "pwritev"}],
        raw=False,
    ),
    Scenario(
        "the event at the end of a write comes after it",
        [("write 0 512", "ok"), ("write 0 512", "EIO")],
        inject=[{"event": "pwritev_done"}],
        raw=False,
    ),
    Scenario(
        "a failed write ends with its event all the same",
        [("write 0 512", "EIO"), ("read 0 512", "ENOSPC")],
        inject=[
            {"event": "pwritev"},
            {"event": "pwritev_done", "errno": errno.ENOSPC},
        ],
        raw=False,
    ),
    Scenario(
        "zero writes have an event of their own",
        [("write 0 512", "ok"), ("write -z 0 4096", "EIO")],
        inject=[{"event": "pwritev_zero"}],
        raw=False,
    ),
    Scenario(
        "raw events are none of those of the edge",
        {"read 0 512": "ok", "write 0 512": "ok"},
        inject=[{"event": "read_aio"}, {"event": "write_aio"}],
        raw=False,
    ),
    Scenario(
        "flush events come from the node above only",
        {"write 0 512": "ok", "flush": "ok"},
        inject=[{"event": "flush_to_os"}, {"event": "flush_to_disk"}],
        raw=False,
    ),
    Scenario(
        "a write through to the disk is no flush",
        {"write -f 0 512": "ok"},
        inject=[{"event": "none", "iotype": "flush"}],
    ),
]


def errno_name(text: str) -> str:
    return next(name for code, name in errno.errorcode.items() if os.strerror(code) == text)


def ask_qemu_io(scenario: Scenario) -> list[str]:
    """The outcomes in qemu-io.  It says nothing of a flush; one that fails shows in the exit status alone."""
    blkdebug = {key: value for key, value in scenario.blkdebug.items() if value != []}
    options = {"driver": "raw", "file": blkdebug} if scenario.raw else blkdebug
    words = [word for command in scenario.commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-t", "writeback", "-d", "unmap", *words, "json:" + json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr, done.stderr
    lines = re.findall(r"^.* failed: (.*)$|^((?:wrote|read|discard)? ?\d+/\d+ bytes.*)$", done.stdout, re.MULTILINE)
    said = ["ok" if well else errno_name(failure) for failure, well in lines]
    flush = "any" if set(said) - {"ok"} else "failed" if done.returncode else "ok"
    found = [flush if command == "flush" else said.pop(0) for command in scenario.commands]
    assert not said
    return found


async def carry_out(root: Root, command: str) -> str:
    """What the qemu-io command *command* does, done to *root*."""
    words = command.split()
    options = {word for word in words if word.startswith("-")}
    offset, length, *_ = *(int(word) for word in words[1:] if word not in options), 0, 0
    try:
        match words[0]:
            case "read":
                await read(root, offset, length)
            case "write" if "-z" in options:
                await root.pwrite_zeroes(offset, length, MAY_UNMAP if "-u" in options else 0)
            case "write":
                await root.pwritev(offset, (memoryview(b"\xcd" * length),), FUA if "-f" in options else 0)
            case "discard":
                await root.pdiscard(offset, length)
            case "flush":
                await root.flush()
            case "truncate":
                await root.truncate(offset)
            case "alloc":
                await block_status(root.node, offset, length)
    except BlockIOError as error:
        return "failed" if words[0] == "flush" else errno.errorcode[error.errno]
    return "ok"


async def ask_fusebd(graph: Graph, scenario: Scenario) -> list[str]:
    """The outcomes in fusebd."""
    options = {"driver": "raw", "file": scenario.blkdebug} if scenario.raw else scenario.blkdebug
    await graph.blockdev_add({"node-name": "top", "discard": "unmap", **options})
    root = root_of(graph, "top", READ_WRITE)
    return [await carry_out(root, command) for command in scenario.commands]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
async def test_each_request_ends_as_it_should(graph: Graph, scenario: Scenario) -> None:
    found = await ask_fusebd(graph, scenario)
    assert [o if e != "any" else e for o, e in zip(found, scenario.outcomes, strict=True)] == scenario.outcomes


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_each_request_ends_in_qemu_io_as_it_does_here(scenario: Scenario) -> None:
    assert ask_qemu_io(scenario) == scenario.outcomes


def random_scenario(seed: int) -> Scenario:
    """Rules and requests that nobody has thought of."""
    rng = random.Random(seed)
    events = [
        "none",
        "read_aio",
        "write_aio",
        "pwritev",
        "pwritev_zero",
        "pwritev_done",
        "flush_to_os",
        "flush_to_disk",
    ]
    inject: list[Rule] = []
    for _ in range(rng.randrange(1, 6)):
        rule: Rule = {"event": rng.choice(events)}
        rule |= {"state": rng.randrange(4)} if rng.random() < 0.4 else {}
        rule |= {"iotype": rng.choice(IO_TYPES)} if rng.random() < 0.3 else {}
        rule |= {"sector": rng.randrange(-1, 8)} if rng.random() < 0.4 else {}
        codes = (0, errno.EIO, errno.ENOSPC, errno.EPERM, errno.ENOTSUP)
        rule |= {"errno": rng.choice(codes)} if rng.random() < 0.7 else {}
        rule |= {"once": rng.random() < 0.5, "immediately": rng.random() < 0.5}
        inject.append(rule)
    states = [
        {"event": rng.choice(events), "state": rng.randrange(4), "new_state": rng.randrange(4)}
        for _ in range(rng.randrange(4))
    ]
    requests = []
    for _ in range(20):
        offset, length = rng.randrange(8) * 512, rng.randrange(1, 9) * 512
        verb = rng.choice(["read", "read", "write", "write", "write -f", "write -z", "write -z -u", "discard", "alloc"])
        requests.append(("flush" if rng.random() < 0.1 else f"{verb} {offset} {length}", "?"))
    return Scenario(f"seed {seed}", requests, inject, states, raw=rng.random() < 0.7)


@pytest.mark.parametrize("seed", range(60))
async def test_random_rules_decide_as_in_qemu_io(graph: Graph, seed: int) -> None:
    scenario = random_scenario(seed)
    expected = ask_qemu_io(scenario)
    found = await ask_fusebd(graph, scenario)
    pairs = list(zip(scenario.commands, found, expected, strict=True))
    assert [pair for pair in pairs if pair[1] != pair[2] and pair[0] != "flush"] == [], scenario


# --- the engine by itself ------------------------------------------------------------------------


def inject(event: str = "read_aio", **more: Any) -> InjectErrorOptions:
    return InjectErrorOptions(event=event, **more)  # type: ignore[arg-type]


def set_state(event: str, new_state: int, **more: Any) -> SetStateOptions:
    return SetStateOptions(event=event, new_state=new_state, **more)  # type: ignore[arg-type]


def test_the_event_names_are_those_that_qemu_knows() -> None:
    blkdebug = {
        "driver": "blkdebug",
        "image": {"driver": "null-co"},
        "inject-error": [{"event": event} for event in EVENTS],
    }
    known = subprocess.run(
        ["qemu-io", "-c", "length", "json:" + json.dumps(blkdebug)], capture_output=True, text=True, check=False
    )
    assert (known.returncode, known.stderr) == (0, "")
    assert len(EVENTS) == len(set(EVENTS)) == 48
    assert len(IO_TYPES) == 6


def test_rules_get_numbers_or_the_ids_that_are_given() -> None:
    rules = RuleSet()
    assert [rules.add(inject()).id, rules.add(inject(), "mine").id, rules.add(set_state("none", 2)).id] == [
        "1",
        "mine",
        "2",
    ]
    with pytest.raises(OptionError, match=r"^Duplicate ID 'mine' for blkdebug rule$"):
        rules.add(inject(), "mine")
    assert len(list(rules)) == 3


@pytest.mark.parametrize("code", [-1, -5, 512, 1 << 40])
def test_an_errno_that_no_request_can_fail_with_is_refused(code: int) -> None:
    # QEMU takes them: a negative one makes requests succeed with a length, a large one upsets whoever gets it.
    with pytest.raises(OptionError, match=rf"^Value '{code}' is out of range for parameter 'errno'$"):
        RuleSet().add(inject(errno=code))


def test_hits_count_what_a_rule_decided() -> None:
    rules = RuleSet()
    failing, passing = rules.add(inject(sector=0)), rules.add(inject(errno=0))
    stating = rules.add(set_state("read_aio", 5, state=1))
    rules.announce("read_aio")
    assert rules.fire("read", 0, 512) is failing
    assert rules.fire("read", 512, 512) is None
    assert rules.fire("block-status", 0, 512) is None
    rules.announce("read_aio")
    assert (failing.hits, passing.hits, stating.hits, rules.state) == (1, 1, 1, 5)


def test_a_rule_that_is_removed_is_active_no_more() -> None:
    rules = RuleSet()
    rule = rules.add(inject(), "r")
    rules.announce("read_aio")
    rules.remove("r")
    assert rules.fire("read", 0, 512) is None
    assert rules.active == []
    assert rule not in list(rules)
    with pytest.raises(CommandError, match=r"^No blkdebug rule with id 'r'$"):
        rules.remove("r")


def test_a_rule_that_is_once_is_gone_when_it_has_fired() -> None:
    rules = RuleSet()
    rules.add(inject(once=True), "r")
    rules.announce("read_aio")
    rules.announce("read_aio")
    assert rules.fire("read", 0, 512) is not None
    assert "r" not in rules
    rules.announce("read_aio")
    assert rules.fire("read", 0, 512) is None


def test_a_rule_can_start_at_once_beside_those_that_are_active() -> None:
    rules = RuleSet()
    first = rules.add(inject(sector=0))
    rules.announce("read_aio")
    later, wrong_state = rules.add(inject("none")), rules.add(inject("none", state=9))
    rules.start(later)
    rules.start(wrong_state)
    assert rules.active == [first, later]
    rules.start(rules.add(set_state("none", 9)))
    assert rules.state == 9


def test_a_breakpoint_ignores_the_state_and_is_used_up() -> None:
    rules = RuleSet()
    rules.add_breakpoint("read_aio", "A")
    rules.add_breakpoint("read_aio", "B")
    rules.announce("none")
    rules.state = 77
    assert rules.announce("write_aio") == []
    assert rules.announce("read_aio") == ["A", "B"]
    assert rules.announce("read_aio") == []
    assert list(rules) == []


def test_breakpoints_are_removed_by_their_tag() -> None:
    rules = RuleSet()
    for event, tag in (("read_aio", "A"), ("write_aio", "A"), ("write_aio", "B")):
        rules.add_breakpoint(event, tag)
    assert (rules.remove_breakpoints("A"), rules.remove_breakpoints("A")) == (2, 0)
    assert rules.announce("write_aio") == ["B"]
