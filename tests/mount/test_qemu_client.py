"""QEMU's programs as clients: a node is a raw disk to them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import Mount, check_image, qcow2, run

LENGTH = 16 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(LENGTH))
    return path


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_qemu_io_works_on_a_node(mount: Callable[..., Mount], image: Path, cache: str) -> None:
    mounted = mount(qcow2("disk", image))
    commands = ["write -P 1 64k 128k", "write -P 2 100k 512", "aio_write -P 3 1M 1M", "aio_write -P 4 2M 1M"]
    commands += ["aio_flush", "flush", "read -P 1 64k 36k", "read -P 2 100k 512", "read -P 3 1M 1M", "read -P 4 2M 1M"]
    words = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", "-f", "raw", "-t", cache, *words, mounted / "disk")
    assert "failed" not in said
    assert "error" not in said.lower()
    mounted.umount()
    check_image(image)
    said = run("qemu-io", "-f", "qcow2", "-c", "read -P 3 1M 1M", "-c", "read -P 0 4M 1M", image)
    assert "failed" not in said


def test_qemu_img_converts_into_a_node_and_out_of_it(mount: Callable[..., Mount], tmp_path: Path, image: Path) -> None:
    source, result = tmp_path / "source.raw", tmp_path / "result.qcow2"
    source.write_bytes(b"".join(bytes([number % 256]) * 5000 for number in range(2000)).ljust(LENGTH, b"\0"))
    mounted = mount(qcow2("disk", image))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, mounted / "disk")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", mounted / "disk", result)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, mounted / "disk")
    mounted.umount()
    check_image(image)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, image)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, result)


def test_qemu_system_works_on_a_node(mount: Callable[..., Mount], image: Path) -> None:
    mounted = mount(qcow2("disk", image))
    disk = {"driver": "raw", "node-name": "d", "file": {"driver": "file", "filename": str(mounted / "disk")}}
    requests: list[object] = [{"execute": "qmp_capabilities"}]
    for command in ("write -P 7 1M 1M", "flush", "read -P 7 1M 1M"):
        arguments = {"command-line": f'qemu-io d "{command}"'}
        requests.append({"execute": "human-monitor-command", "arguments": arguments})
    # No machine is needed for its block layer; one would need a BIOS.
    program = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"]
    done = subprocess.run(
        [*program, "-blockdev", json.dumps(disk), "-qmp", "stdio"],
        input="\n".join(json.dumps(request) for request in [*requests, {"execute": "quit"}]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stdout.lower(), done.stdout
    assert "failed" not in done.stdout, done.stdout
    mounted.umount()
    check_image(image)
    assert "failed" not in run("qemu-io", "-f", "qcow2", "-c", "read -P 7 1M 1M", "-c", "read -P 0 0 1M", image)


def test_a_running_virtual_machine_keeps_an_image_from_being_mounted(
    mount: Callable[..., Mount], tmp_path: Path, image: Path
) -> None:
    holder = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0
    )
    try:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write("write 0 64k\n")
        assert "wrote" in holder.stdout.readline() + holder.stdout.readline()
        with pytest.raises(AssertionError, match=r"Failed to get .*lock"):
            mount(qcow2("disk", image))
    finally:
        holder.communicate("quit\n")
    mounted = mount(qcow2("disk", image))
    assert (mounted / "disk").stat().st_size == LENGTH
    mounted.umount()
