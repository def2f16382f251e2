"""QMP of a real daemon: the protocol on its socket, its events, and what its commands show."""

from __future__ import annotations

import json
import os
import random
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mounting import Mount, failing, fusebd, left_behind, qcow2, run

from fusebd.runtime import Place

Json = Any
Mounting = Callable[..., Mount]

pytestmark = pytest.mark.parametrize("transport", ["devfuse"])

NULL = {"driver": "null-co", "node-name": "null", "size": 65536, "read-zeroes": True}
NEGOTIATE = {"execute": "qmp_capabilities"}


class Client:
    """A connection on which nothing is said but what the test says."""

    def __init__(self, mounted: Mount) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(Place(str(mounted.point)).socket)
        self._file = self.socket.makefile("rb")

    def send(self, *requests: Json) -> None:
        """Bytes as they are, other values as JSON; all at once."""
        parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in requests]
        self.socket.sendall(b"".join(parts))

    def read(self) -> Json:
        """The next message; None at the end."""
        line = self._file.readline()
        assert line == b"" or line.endswith(b"\r\n")
        return json.loads(line) if line else None

    def ask(self, *requests: Json) -> Json:
        self.send(*requests)
        return self.read()

    def read_event(self, name: str) -> Json:
        """The next event *name*; other events before it are lost."""
        while (message := self.read())["event"] != name:
            pass
        return message

    def close(self) -> None:
        self._file.close()
        self.socket.close()


@contextmanager
def talking(mounted: Mount, *, negotiated: bool = True) -> Iterator[Client]:
    client = Client(mounted)
    try:
        assert "QMP" in client.read()
        if negotiated:
            assert client.ask(NEGOTIATE) == {"return": {}}
        yield client
    finally:
        client.close()


def failure(answer: Json) -> tuple[str, str]:
    return answer["error"]["class"], answer["error"]["desc"]


# --- the protocol ----------------------------------------------------------------------------------


def test_the_greeting_comes_first_and_by_itself(mount: Mounting) -> None:
    mounted = mount()
    client = Client(mounted)
    greeting = client.read()["QMP"]
    assert greeting["version"]["qemu"] == {"major": 10, "minor": 0, "micro": 2}
    assert greeting["version"]["package"].startswith("fusebd-")
    assert greeting["capabilities"] == ["oob"]
    client.close()
    mounted.umount()


def test_before_the_negotiation_nothing_else_is_done(mount: Mounting) -> None:
    mounted = mount(NULL)
    with talking(mounted, negotiated=False) as client:
        expected = ("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'")
        assert failure(client.ask({"execute": "quit"})) == expected
        assert client.ask({**NEGOTIATE, "id": 1}) == {"return": {}, "id": 1}
        expected = ("CommandNotFound", "Capabilities negotiation is already complete, command ignored")
        assert failure(client.ask(NEGOTIATE)) == expected
    mounted.umount()


def test_every_answer_has_the_id_of_its_request(mount: Mounting) -> None:
    mounted = mount()
    with talking(mounted) as client:
        for identifier in (0, -5, "text", None, True, 0.5, [1, {"a": []}], {"x": None}):
            assert client.ask({"execute": "query-commands", "id": identifier})["id"] == identifier
            assert client.ask({"execute": "nonsense", "id": identifier})["id"] == identifier
        assert "id" not in client.ask({"execute": "query-commands"})
    mounted.umount()


def test_requests_that_arrive_together_are_answered_in_order(mount: Mounting) -> None:
    mounted = mount()
    with talking(mounted) as client:
        client.send(*({"execute": "query-version", "id": number} for number in range(200)))
        assert [client.read()["id"] for _ in range(200)] == list(range(200))
    mounted.umount()


def test_a_request_may_arrive_byte_by_byte(mount: Mounting) -> None:
    mounted = mount()
    with talking(mounted) as client:
        for byte in b'{"execute":\n "query-version", "id": "slow"}':
            client.send(bytes([byte]))
            time.sleep(0.001)
        assert client.read()["id"] == "slow"
    mounted.umount()


def test_a_client_that_has_said_all_gets_all_answers(mount: Mounting) -> None:
    mounted = mount()
    with talking(mounted, negotiated=False) as client:
        client.send(NEGOTIATE, *({"execute": "query-version", "id": number} for number in range(50)))
        client.socket.shutdown(socket.SHUT_WR)
        assert client.read() == {"return": {}}
        assert [client.read()["id"] for _ in range(50)] == list(range(50))
        assert client.read() is None
    mounted.umount()


def test_every_command_that_is_listed_is_there(mount: Mounting) -> None:
    mounted = mount()
    with talking(mounted) as client:
        names = {command["name"] for command in client.ask({"execute": "query-commands"})["return"]}
        wanted = "query-version query-commands query-named-block-nodes query-block query-blockstats quit"
        wanted += " x-debug-query-block-graph blockdev-add blockdev-del block_resize qmp_capabilities"
        assert set(wanted.split()) <= names
        for name in names - {"qmp_capabilities", "quit"}:
            answer = client.ask({"execute": name, "arguments": {"nonsense": 1}})
            assert answer["error"]["class"] == "GenericError", (name, answer)
    mounted.umount()


# --- several clients ----------------------------------------------------------------------------------


def test_many_clients_are_served_at_the_same_time(mount: Mounting) -> None:
    mounted = mount()
    clients = [Client(mounted) for _ in range(50)]
    for client in clients:
        assert "QMP" in client.read()
        client.send(NEGOTIATE)
    for number, client in enumerate(clients):
        assert client.read() == {"return": {}}
        client.send({"execute": "blockdev-add", "arguments": {**NULL, "node-name": f"n{number}"}, "id": number})
    for number, client in enumerate(clients):
        assert client.read() == {"return": {}, "id": number}
    assert len(os.listdir(mounted.point)) == 50
    for client in clients:
        client.close()
    mounted.umount()


def test_each_client_negotiates_for_itself(mount: Mounting) -> None:
    mounted = mount()
    with talking(mounted), talking(mounted, negotiated=False) as other:
        assert failure(other.ask({"execute": "query-version"}))[0] == "CommandNotFound"
    mounted.umount()


def test_a_client_that_goes_away_disturbs_no_other(mount: Mounting) -> None:
    mounted = mount(NULL)
    with talking(mounted) as client:
        for number in range(20):
            other = Client(mounted)
            if number % 2:
                other.send(NEGOTIATE, b'{"execute": "query-')
            other.close()
        assert client.ask({"execute": "query-version", "id": 1})["id"] == 1
    assert os.listdir(mounted.point) == ["null"]
    mounted.umount()


def test_a_command_of_a_client_that_has_gone_is_carried_out(mount: Mounting) -> None:
    mounted = mount()
    with talking(mounted) as client:
        client.send({"execute": "blockdev-add", "arguments": NULL})
    while os.listdir(mounted.point) != ["null"]:
        time.sleep(0.01)
    mounted.umount()


def test_a_client_that_does_not_read_holds_no_other_up(mount: Mounting) -> None:
    mounted = mount(*({**NULL, "node-name": f"n{number}"} for number in range(100)))
    with talking(mounted) as lazy, talking(mounted) as client:
        lazy.socket.setblocking(False)
        request = json.dumps({"execute": "query-named-block-nodes"}).encode()
        with pytest.raises(BlockingIOError):  # its requests are read only as long as it takes the answers
            lazy.socket.sendall(request * 100_000)
        for number in range(20):
            assert client.ask({"execute": "query-version", "id": number})["id"] == number
    mounted.umount()


# --- malformed and oversized input -----------------------------------------------------------------------

MALFORMED = [
    (b"nonsense", "JSON parse error, invalid keyword 'nonsense'"),
    (b"{]", "JSON parse error, expecting value"),
    (b'{"execute": }', "JSON parse error, expecting value"),
    (b'{"execute": "quit",}', "JSON parse error, expecting value"),
    (b'{"a": 1, "a": 2}', "JSON parse error, duplicate key"),
    (b'{"execute": "quit" "id": 1}', "JSON parse error, expected separator in dict"),
    (b'{"execute": "\\ud800"}', "JSON parse error, \\ud800 is not a valid Unicode character"),
    (b'{"execute": "\xff"}', None),
    (b"[]", "QMP input must be a JSON object"),
    (b"5 ", "QMP input must be a JSON object"),
    (b'"quit"', "QMP input must be a JSON object"),
    (b"{}", "QMP input lacks member 'execute'"),
    (b'{"execute": 5}', "QMP input member 'execute' must be a string"),
    (b'{"execute": "quit", "arguments": []}', "QMP input member 'arguments' must be an object"),
    (b'{"execute": "quit", "nonsense": 1}', "QMP input member 'nonsense' is unexpected"),
    (b'{"exec-oob": "quit"}', "QMP input member 'exec-oob' is unexpected"),
]


@pytest.mark.parametrize("negotiated", [False, True])
def test_malformed_input_is_an_error_and_the_conversation_goes_on(mount: Mounting, negotiated: bool) -> None:
    mounted = mount(NULL)
    for data, message in MALFORMED:
        with talking(mounted, negotiated=negotiated) as client:
            kind, description = failure(client.ask(data + b"\n"))
            assert kind == "GenericError", data
            assert message is None or description == message, data
            client.send(b"\xff")  # after this, whatever came before, there is a fresh start
            client.send({"execute": "query-version" if negotiated else "qmp_capabilities", "id": "after"})
            while (answer := client.read()).get("id") != "after":
                assert answer["error"]["class"] == "GenericError"
            assert "return" in answer
    assert os.listdir(mounted.point) == ["null"]
    mounted.umount()


def peak_memory(mounted: Mount) -> int:
    """The most memory that the daemon ever had, in bytes."""
    status = Path(f"/proc/{mounted.pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))


@pytest.mark.parametrize(
    ("begin", "more", "limit"),
    [
        (b'{"execute": "', b"x" * 65536, "JSON token size limit exceeded"),
        (b"", b"[" * 2000, "JSON nesting depth limit exceeded"),
        (b"", b'{"a":' * 2000, "JSON nesting depth limit exceeded"),
        (b"[0", b",0" * 32768, "JSON token count limit exceeded"),
    ],
    ids=["string", "arrays", "objects", "tokens"],
)
def test_input_without_end_is_an_error_and_takes_no_memory(
    mount: Mounting, begin: bytes, more: bytes, limit: str
) -> None:
    mounted = mount(NULL)
    before = peak_memory(mounted)
    with talking(mounted) as client:
        client.send(begin)
        rest = b""
        # Whoever goes on without reading the answers is not read any more.
        while not select.select([client.socket], [client.socket], [])[0]:
            rest = rest or more
            rest = rest[client.socket.send(rest, socket.MSG_DONTWAIT) :]
        assert failure(client.read()) == ("GenericError", limit)
    with talking(mounted) as client:
        assert client.ask({"execute": "query-version", "id": 1})["id"] == 1
    assert peak_memory(mounted) - before < 128 << 20
    mounted.umount()


def test_random_bytes_do_the_daemon_no_harm(mount: Mounting) -> None:
    mounted = mount(NULL)
    rng = random.Random(7)
    words = [
        b'{"execute": "blockdev-add", "arguments": {"driver": ',
        b'"raw"',
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b'"',
    ]
    words += [b"null", b"-1e99", b"0.5", b'"\\u0000"', b"\xff", b"\0", b"'", b"quit", b"}}\n", b' "node-name": "x"']
    for _ in range(30):
        client = Client(mounted)
        client.send(NEGOTIATE)
        client.send(b"".join(rng.choice(words) for _ in range(300)))
        client.send(rng.randbytes(1000))
        client.socket.shutdown(socket.SHUT_WR)
        while client.socket.recv(65536):
            pass
        client.close()
    assert os.listdir(mounted.point) == ["null"]
    mounted.umount()


# --- events ----------------------------------------------------------------------------------------------


def attempt_read(path: Path, offset: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    with pytest.raises(OSError, match="Input/output error"):
        os.pread(descriptor, 512, offset)
    os.close(descriptor)


def assert_recent(event: Json) -> None:
    stamp = event["timestamp"]
    assert time.time() - 60 < stamp["seconds"] <= time.time()
    assert 0 <= stamp["microseconds"] < 1_000_000


def test_a_failed_read_is_an_event_for_every_client(mount: Mounting) -> None:
    mounted = mount(failing("disk", event="read_aio"))
    with talking(mounted) as one, talking(mounted) as two, talking(mounted, negotiated=False) as silent:
        attempt_read(mounted / "disk")
        for client in (one, two):
            event = client.read_event("BLOCK_IO_ERROR")
            assert event["data"] == {
                "device": "",
                "node-name": "disk",
                "operation": "read",
                "action": "report",
                "nospace": False,
                "reason": "Input/output error",
            }
            assert_recent(event)
        assert silent.ask(NEGOTIATE) == {"return": {}}  # and no event before it
    mounted.umount()


def test_a_full_disk_is_marked_as_such(mount: Mounting) -> None:
    mounted = mount(failing("disk", event="write_aio", iotype="write", errno=28))
    with talking(mounted) as client:
        descriptor = os.open(mounted / "disk", os.O_WRONLY)
        with pytest.raises(OSError, match="No space left on device"):
            os.pwrite(descriptor, b"x", 0)
        os.close(descriptor)
        data = client.read_event("BLOCK_IO_ERROR")["data"]
        assert (data["operation"], data["nospace"], data["reason"]) == ("write", True, "No space left on device")
    mounted.umount()


def test_a_flood_of_failures_is_one_event_a_second(mount: Mounting) -> None:
    mounted = mount(failing("disk", event="read_aio"), NULL)
    with talking(mounted) as client:
        for _ in range(500):
            attempt_read(mounted / "disk")
        client.send({"execute": "query-version", "id": "end"})
        messages = []
        while (message := client.read()).get("id") != "end":
            messages.append(message["event"])
        assert 1 <= messages.count("BLOCK_IO_ERROR") < 100
        client.read_event("BLOCK_IO_ERROR")  # The last of those that were held back comes all the same.
    mounted.umount()


def test_a_mismatch_is_an_event_that_says_where(mount: Mounting, scratch: Path) -> None:
    (scratch / "a").write_bytes(bytes(65536))
    (scratch / "b").write_bytes(bytes(5000) + b"\x01\x02" + bytes(65536 - 5002))
    sides = {side: {"driver": "file", "filename": str(scratch / name)} for side, name in (("test", "a"), ("raw", "b"))}
    mounted = mount({"driver": "blkverify", "node-name": "disk", **sides})
    with talking(mounted) as client:
        attempt_read(mounted / "disk", 4608)
        event = client.read_event("BLKVERIFY_MISMATCH")
        assert_recent(event)
        data = event["data"]
        assert (data["node-name"], data["operation"], data["offset"], data["length"]) == ("disk", "read", 4608, 512)
        assert data["mismatch-offset"] == 5000
        assert data["test-data"].startswith("0000")
        assert data["raw-data"].startswith("0102")
        assert client.read_event("BLOCK_IO_ERROR")["data"]["node-name"] == "disk"
    fusebd("umount", mounted.point)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda mounted: mounted.qmp("quit"), "host-qmp-quit"),
        (lambda mounted: os.kill(mounted.pid, 15), "host-signal"),
        (lambda mounted: os.kill(mounted.pid, 2), "host-signal"),
        (lambda mounted: run("umount", mounted.point), "host-ui"),
    ],
    ids=["quit", "SIGTERM", "SIGINT", "umount"],
)
def test_the_end_is_an_event_with_its_cause(mount: Mounting, end: Callable[[Mount], Any], reason: str) -> None:
    mounted = mount(NULL)
    with talking(mounted) as client:
        end(mounted)
        event = client.read()
        assert (event["event"], event["data"]) == ("SHUTDOWN", {"guest": False, "reason": reason})
        assert_recent(event)
        assert client.read() is None
    mounted.wait_end()


def test_quit_is_answered_and_then_the_daemon_ends(mount: Mounting, scratch: Path) -> None:
    mounted = mount(NULL)
    with talking(mounted) as client:
        client.send({"execute": "quit", "id": "last"})
        messages = []
        while (message := client.read()) is not None:
            messages.append(message.get("event") or message)
        assert {"return": {}, "id": "last"} in messages
        assert "SHUTDOWN" in messages
    mounted.wait_end()
    assert [name for name in left_behind(scratch) if not name.endswith(".log")] == []


# --- what the commands show -----------------------------------------------------------------------------


def test_the_counters_are_those_of_what_was_done(mount: Mounting, scratch: Path) -> None:
    image = scratch / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    mounted = mount(qcow2("disk", image))
    with open(mounted / "disk", "r+b", buffering=0) as file:
        for _ in range(3):
            file.write(b"x" * 4096)
        file.seek(0)
        for _ in range(2):
            file.read(8192)
        os.fsync(file.fileno())
    (entry,) = mounted.qmp("query-blockstats")
    stats = entry["stats"]
    assert entry["node-name"] == "disk"
    assert (stats["wr_operations"], stats["wr_bytes"]) == (3, 3 * 4096)
    assert (stats["rd_operations"], stats["rd_bytes"]) == (2, 2 * 8192)
    assert stats["flush_operations"] >= 1
    assert stats["failed_rd_operations"] == 0
    assert stats["wr_highest_offset"] == 3 * 4096
    for name in ("rd_total_time_ns", "wr_total_time_ns", "flush_total_time_ns"):
        assert stats[name] > 0
    assert entry["parent"]["stats"]["wr_bytes"] >= 3 * 4096
    mounted.umount()


def test_a_failure_is_counted(mount: Mounting) -> None:
    mounted = mount(failing("disk", event="read_aio"))
    for _ in range(3):
        attempt_read(mounted / "disk")
    (entry,) = mounted.qmp("query-blockstats")
    assert entry["stats"]["failed_rd_operations"] == 3
    mounted.umount()


def test_an_open_file_is_in_the_graph(mount: Mounting) -> None:
    mounted = mount(NULL)
    with open(mounted / "null", "r+b", buffering=0):
        graph = mounted.qmp("x-debug-query-block-graph")
        assert sorted(node["type"] for node in graph["nodes"]) == ["block-backend", "block-driver"]
        (edge,) = graph["edges"]
        assert set(edge["perm"]) == {"consistent-read", "write"}
    mounted.umount()
