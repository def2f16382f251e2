"""Objects of a real daemon: limits that a client feels, changed while it is mounted, and mistakes.

Durations are judged from below alone: a busy machine may make everything slower, but nothing faster than its limit.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mounting import FUSEBD, Mount, fusebd, raw, refusal, run

Mounter = Callable[..., Mount]
GROUP = {"qom-type": "throttle-group", "id": "limits"}
MIB = 1 << 20


def throttled(name: str, path: Path, group: str = "limits") -> Any:
    """The options of a throttle node over the new file *path*."""
    path.write_bytes(os.urandom(4 * MIB))
    return {
        "driver": "throttle",
        "node-name": name,
        "throttle-group": group,
        "file": {"driver": "file", "filename": str(path)},
        "discard": "unmap",
    }


def seconds(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def test_dd_is_as_slow_as_the_limit(mount: Mounter, tmp_path: Path) -> None:
    group = {**GROUP, "limits": {"bps-read": 4 * MIB}}
    mounted = mount(throttled("disk", tmp_path / "image"), options=["--object", json.dumps(group)])
    copy = tmp_path / "copy"
    # 4 MiB; the first 1 MiB may go at once, and a request more
    assert seconds(lambda: run("dd", f"if={mounted / 'disk'}", f"of={copy}", "bs=256k", "iflag=direct")) > 0.6
    assert copy.read_bytes() == (tmp_path / "image").read_bytes()
    mounted.umount()


def test_fio_gets_no_more_operations_than_the_limit_at_any_depth(mount: Mounter, tmp_path: Path) -> None:
    group = "throttle-group,id=limits,limits.iops-total=200"
    mounted = mount(throttled("disk", tmp_path / "image"), options=["--object", group])
    output = run(
        "fio", "--name=job", f"--filename={mounted / 'disk'}", "--rw=randrw", "--bs=4k", "--ioengine=libaio",
        "--iodepth=16", "--direct=1", "--time_based", "--runtime=2", "--size=4M", "--randseed=1",
        "--output-format=json",
    )  # fmt: skip
    job = json.loads(output[output.index("{") :])["jobs"][0]
    operations = job["read"]["total_ios"] + job["write"]["total_ios"]
    elapsed = max(job["read"]["runtime"], job["write"]["runtime"]) / 1000
    assert operations <= 200 * (elapsed + 0.1) + 17
    assert job["write"]["total_ios"] > 0
    mounted.umount()


def test_limits_change_while_a_client_waits(mount: Mounter, tmp_path: Path) -> None:
    mounted = mount(raw("unused", _image(tmp_path / "unused")))
    mounted.qmp("object-add", {**GROUP, "limits": {"bps-total": 1}})
    mounted.qmp("blockdev-add", throttled("disk", tmp_path / "image"))
    found = []
    descriptor = os.open(mounted / "disk", os.O_RDONLY)
    os.pread(descriptor, 4096, 0)  # this one goes, and is paid for in more than an hour
    reader = threading.Thread(target=lambda: found.append(os.pread(descriptor, MIB, 0)))
    reader.start()
    time.sleep(0.3)
    assert not found
    mounted.qmp("qom-set", {"path": "limits", "property": "limits", "value": {"bps-total": 0}})
    reader.join(60)
    assert found == [(tmp_path / "image").read_bytes()[:MIB]]
    os.close(descriptor)
    assert mounted.qmp("qom-get", {"path": "/objects/limits", "property": "limits"})["bps-total"] == 0
    mounted.umount()


def test_a_mount_ends_while_requests_wait_for_limits(mount: Mounter, tmp_path: Path) -> None:
    group = {**GROUP, "limits": {"bps-total": 1}}
    mounted = mount(throttled("disk", tmp_path / "image"), options=["--object", json.dumps(group)])
    client = subprocess.Popen(
        ["dd", f"if={mounted / 'disk'}", "of=/dev/null", "bs=4k", "iflag=direct"], stderr=subprocess.DEVNULL
    )
    time.sleep(0.5)
    assert client.poll() is None
    mounted.qmp("quit")
    mounted.wait_end()
    client.wait(60)
    log = mounted.log.read_text()
    assert " ERROR " not in log, log
    assert "Traceback" not in log, log


def test_a_killed_client_leaves_nothing_of_its_request(mount: Mounter, tmp_path: Path) -> None:
    mounted = mount(raw("unused", _image(tmp_path / "unused")))
    mounted.qmp("object-add", {**GROUP, "limits": {"iops-total": 1, "iops-total-max": 2}})
    mounted.qmp("blockdev-add", throttled("disk", tmp_path / "image"))
    run("timeout", "-s", "KILL", "0.5", "dd", f"if={mounted / 'disk'}", "of=/dev/null", "bs=4k", "iflag=direct",
        expect=(-9, 137))  # fmt: skip
    mounted.qmp("qom-set", {"path": "limits", "property": "limits", "value": {"iops-total": 0, "iops-total-max": 0}})
    assert (mounted / "disk").read_bytes() == (tmp_path / "image").read_bytes()
    mounted.qmp("blockdev-del", {"node-name": "disk"})
    mounted.qmp("object-del", {"id": "limits"})
    mounted.umount()


@pytest.mark.parametrize("transport", ["devfuse"])  # pyfuse3 has no fallocate
def test_holes_are_punched_and_counted_as_writes(mount: Mounter, tmp_path: Path) -> None:
    group = {**GROUP, "limits": {"iops-write": 10}}
    mounted = mount(throttled("disk", tmp_path / "image"), options=["--object", json.dumps(group)])

    def punch() -> None:
        for number in range(8):
            run("fallocate", "--punch-hole", "-o", str(number * 65536), "-l", "65536", mounted / "disk")

    assert seconds(punch) > 0.5
    assert (mounted / "disk").read_bytes()[: 8 * 65536] == bytes(8 * 65536)
    mounted.umount()


def test_a_throttle_node_is_shown_as_in_qemu(mount: Mounter, tmp_path: Path) -> None:
    group = {**GROUP, "limits": {"iops-total": 1000}}
    mounted = mount(throttled("disk", tmp_path / "image"), options=["--object", json.dumps(group)])
    (shown,) = (node for node in mounted.qmp("query-named-block-nodes", {"flat": True}) if node["node-name"] == "disk")
    # the limits that these members are about are a device's own, not those of a filter's group
    assert {name: shown[name] for name in shown if name.startswith(("iops", "bps"))} == dict.fromkeys(
        ("iops", "iops_rd", "iops_wr", "bps", "bps_rd", "bps_wr"), 0
    )
    assert "group" not in shown
    assert shown["file"] == (
        'json:{"throttle-group": "limits", "driver": "throttle", "file": {"driver": "file", "filename": '
        f'"{tmp_path}/image"}}}}'
    )
    mounted.umount()


def test_qmp_answers_with_qemus_words(mount: Mounter, tmp_path: Path) -> None:
    mounted = mount(throttled("disk", tmp_path / "image"), options=["--object", "throttle-group,id=limits"])

    def error(command: str, **arguments: Any) -> tuple[str, str]:
        answer = mounted.qmp.ask(
            {"execute": command, "arguments": {name.replace("_", "-"): value for name, value in arguments.items()}}
        )["error"]
        return answer["class"], answer["desc"]

    assert error("object-del", id="limits") == ("GenericError", "object 'limits' is in use, can not be deleted")
    assert error("qom-get", path="/objects/nope", property="limits") == (
        "DeviceNotFound",
        "Device '/objects/nope' not found",
    )
    assert error("blockdev-add", driver="throttle", node_name="x", file="disk", throttle_group="nope") == (
        "GenericError",
        "Throttle group 'nope' does not exist",
    )
    mounted.qmp("blockdev-del", {"node-name": "disk"})
    mounted.qmp("object-del", {"id": "limits"})
    mounted.umount()


def test_objects_in_a_mount_points_file_are_there_before_the_nodes(scratch: Path) -> None:
    image, point = scratch / "image", scratch / "mnt"
    throttled("disk", image)
    point.mkdir()
    (scratch / "mounts.toml").write_text(f"""
        [[mount]]
        point = "{point}"
        [[mount.blockdev]]
        driver = "throttle"
        node-name = "disk"
        throttle-group = "limits"
        file = {{ driver = "file", filename = "image" }}
        [[mount.object]]
        qom-type = "throttle-group"
        id = "limits"
        limits = {{ iops-total = 1000, iops-total-max = 100000 }}
        [[mount.object]]
        qom-type = "secret"
        id = "password"
        file = "image"
        format = "raw"
    """)
    # the secret is longer than a secret can be, and its table is the one that is blamed
    message = refusal("mount", "--config", scratch / "mounts.toml")
    assert message == (
        f"{scratch}/mounts.toml:13: mount[0].object[1]: Unable to read image: it has more than 1048576 bytes"
    )
    text = (scratch / "mounts.toml").read_text().replace('file = "image"', 'data = "secret"')
    (scratch / "mounts.toml").write_text(text)
    fusebd("mount", "--config", scratch / "mounts.toml")
    assert (point / "disk").read_bytes() == image.read_bytes()
    fusebd("umount", point)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("throttle-group", "Parameter 'id' is missing"),
        (
            "throttle-group,id=1x",
            "Parameter 'id' expects an identifier "
            "(Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.)",
        ),
        ("throttle-group,id=g,limits.iops-total=x", "Parameter 'limits.iops-total' expects integer"),
        ("nope,id=x", "Parameter 'qom-type' does not accept value 'nope'"),
        ("id=x", "Parameter 'qom-type' is missing"),
        ("can-bus,id=c", "invalid object type: can-bus"),
        ('{"qom-type"', "JSON parse error, premature EOI"),
    ],
)
def test_a_mistake_in_an_object_is_one_line(scratch: Path, text: str, message: str) -> None:
    (scratch / "mnt").mkdir()
    assert refusal("mount", "--object", text, scratch / "mnt") == f"--object {text}: {message}"


def test_types_of_objects_and_their_options_are_listed() -> None:
    listed = run(*FUSEBD, "mount", "--object", "help").split()
    assert listed == ["Objects:", "iothread", "main-loop", "secret", "throttle-group"]
    listed = run(*FUSEBD, "mount", "--object", "throttle-group,help").split()
    assert "limits.iops-total-max-length=<integer>" in listed
    assert "no object type 'nope'" in refusal("mount", "--object", "nope,help")


def _image(path: Path) -> Path:
    path.write_bytes(bytes(MIB))
    return path
