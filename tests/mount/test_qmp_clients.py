"""The programs with which people talk QMP: qemu.qmp's client and its qmp-shell, and ``fusebd qmp``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mounting import FUSEBD, Mount, failing, fusebd, raw, refusal

from fusebd.runtime import Place

Json = Any
Mounting = Callable[..., Mount]

pytestmark = pytest.mark.parametrize("transport", ["devfuse"])

NULL = {"driver": "null-co", "node-name": "null", "size": 65536, "read-zeroes": True}


# --- qemu.qmp ---------------------------------------------------------------------------------------------


def test_the_client_of_qemu_qmp_works(mount: Mounting) -> None:
    from qemu.qmp import EventListener, ExecuteError, QMPClient

    mounted = mount(failing("disk", event="read_aio"))

    async def talk() -> None:
        client = QMPClient("test")
        await client.connect(Place(str(mounted.point)).socket)
        version: Json = await client.execute("query-version")
        assert version["qemu"]["major"] == 10
        await client.execute("blockdev-add", NULL)
        with pytest.raises(ExecuteError, match="Duplicate nodes with node-name='null'"):
            await client.execute("blockdev-add", NULL)
        answers: list[Json] = await asyncio.gather(*(client.execute("query-block") for _ in range(20)))
        assert {len(answer) for answer in answers} == {2}
        with client.listener("BLOCK_IO_ERROR") as failures:
            assert isinstance(failures, EventListener)
            with pytest.raises(OSError, match="Input/output error"):
                await asyncio.to_thread((mounted / "disk").read_bytes)
            event: Json = await failures.get()
        assert event["data"]["node-name"] == "disk"
        with client.listener("SHUTDOWN") as ends:
            await client.execute("quit")
            end: Json = await ends.get()
            assert end["data"]["reason"] == "host-qmp-quit"
        with contextlib.suppress(EOFError):  # the daemon may be gone before the client says goodbye
            await client.disconnect()

    asyncio.run(talk())
    mounted.wait_end()


def qmp_shell(mounted: Mount, *lines: str, options: tuple[str, ...] = ()) -> list[str]:
    """What qmp-shell prints for *lines*, one entry for each."""
    program = [sys.executable, "-m", "qemu.qmp.qmp_shell", *options, Place(str(mounted.point)).socket]
    done = subprocess.run(
        program,
        input="\n".join([*lines, ""]),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HOME": "/"},
    )
    return done.stdout.split("(QEMU) ")[1:]


def test_qmp_shell_works(mount: Mounting, scratch: Path) -> None:
    (scratch / "disk.raw").write_bytes(bytes(1 << 20))
    mounted = mount(raw("disk", scratch / "disk.raw"))
    answers = qmp_shell(
        mounted,
        "query-version",
        "blockdev-add driver=null-co node-name=more size=1024 read-only=true",
        'blockdev-add driver=raw node-name=upper file={"driver":"null-co","size":512}',
        "block_resize node-name=disk size=4096",
        "blockdev-del node-name=none",
        "query-named-block-nodes flat=true",
    )
    assert json.loads(answers[0])["return"]["qemu"]["major"] == 10
    assert [json.loads(answer) for answer in answers[1:4]] == [{"return": {}}] * 3
    assert json.loads(answers[4])["error"]["desc"] == "Failed to find node with node-name='none'"
    nodes = {node["node-name"]: node for node in json.loads(answers[5])["return"]}
    assert {"disk", "more", "upper"} < set(nodes)
    assert nodes["more"]["ro"] is True
    assert (mounted / "disk").stat().st_size == 4096
    mounted.umount()


def test_qmp_shell_prints_prettily(mount: Mounting) -> None:
    mounted = mount()
    (answer, _) = qmp_shell(mounted, "query-version", options=("-p",))
    assert json.loads(answer)["return"]["package"].startswith("fusebd-")
    mounted.umount()


# --- fusebd qmp -------------------------------------------------------------------------------------------


def test_the_command_takes_words_or_json(mount: Mounting) -> None:
    mounted = mount()
    fusebd("qmp", mounted.point, "blockdev-add", "driver=null-co", "node-name=one", "size=512", "read-zeroes=on")
    fusebd("qmp", mounted.point, "blockdev-add", json.dumps(NULL))
    fusebd("qmp", mounted.point, "blockdev-add", "driver=raw", "node-name=two", 'file:={"driver": "null-co"}')
    assert sorted(os.listdir(mounted.point)) == ["null", "one", "two"]
    assert (mounted / "one").read_bytes() == bytes(512)
    mounted.umount()


def test_the_command_prints_what_is_returned_as_json(mount: Mounting) -> None:
    mounted = mount(NULL)
    (node,) = json.loads(fusebd("qmp", mounted.point, "query-named-block-nodes", "flat=on"))
    assert node["node-name"] == "null"
    assert json.loads(fusebd("qmp", mounted.point, "blockdev-del", "node-name=null")) == {}
    mounted.umount()


def test_the_command_finds_the_daemon_by_mount_point_or_address(mount: Mounting, scratch: Path) -> None:
    mounted = mount(options=["--qmp", "127.0.0.1:0", "--qmp", f"unix:{scratch}/more.qmp"])
    (scratch / "link").symlink_to(mounted.point)
    address = fusebd("qmp", mounted.point, "query-version")
    file = Place(str(mounted.point)).find()
    assert file is not None
    state = file.read()
    file.close()
    assert state is not None
    for where in (*state.qmp, f"{mounted.point}/", str(scratch / "link"), f"{scratch}/mnt/../mnt"):
        assert fusebd("qmp", where, "query-version") == address
    mounted.umount()


def test_the_command_reports_an_error_in_one_line(mount: Mounting) -> None:
    mounted = mount()
    assert refusal("qmp", mounted.point, "nonsense") == "The command nonsense has not been found"
    message = refusal("qmp", mounted.point, "blockdev-add", "driver=file", "node-name=x", "filename=/no\nsuch")
    assert message == "Could not open '/no\\nsuch': No such file or directory"
    mounted.umount()


def test_the_command_can_end_the_daemon(mount: Mounting) -> None:
    mounted = mount(NULL)
    assert json.loads(fusebd("qmp", mounted.point, "quit")) == {}
    mounted.wait_end()


def test_the_command_works_while_the_mount_is_busy(mount: Mounting) -> None:
    slow = {"driver": "null-co", "node-name": "slow", "latency-ns": 4 * 10**9}
    mounted = mount(slow, NULL)
    with subprocess.Popen(["dd", f"if={mounted / 'slow'}", "of=/dev/null", "count=1", "status=none"]) as reader:
        while "slow" not in os.readlink(f"/proc/{reader.pid}/fd/0"):
            time.sleep(0.01)
        assert refusal("qmp", mounted.point, "blockdev-del", "node-name=slow") == "Node slow is in use"
        fusebd("qmp", mounted.point, "blockdev-del", "node-name=null")
        assert reader.poll() is None
    mounted.umount()


def test_a_server_that_hangs_up_is_one_line(mount: Mounting, scratch: Path) -> None:
    path = scratch / "other"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        command = [*FUSEBD, "qmp", f"unix:{path}", "query-version"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            listening.accept()[0].close()
            _, errors = process.communicate()
    assert process.returncode == 1
    assert len(errors.splitlines()) == 1
    assert errors.startswith(f"fusebd: Could not connect to unix:{path}: ")
