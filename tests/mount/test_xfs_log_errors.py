"""XFS whose log cannot be written: it shuts down, and is sound again when it can; errors in a file leave it alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blockerrors import block_errors
from mounting import KernelLog, Mount, file_system, fusebd, loop_device, raw, run

LENGTH = 300 << 20  # the least that mkfs.xfs accepts

#: nothing here depends on how requests reach the daemon
pytestmark = pytest.mark.parametrize("transport", ["devfuse"])


@pytest.fixture
def kernel_log() -> Iterator[KernelLog]:
    log = KernelLog()
    yield log
    log.close()


def _write(top: Path, numbers: range) -> None:
    """Make a file for each of *numbers*, and wait for it to be on the disk."""
    for number in numbers:
        with open(top / str(number), "wb") as file:
            file.write(str(number).encode() * 1000)
            file.flush()
            os.fsync(file.fileno())


def _fail(mounted: Mount, *rule: str) -> None:
    """Have requests to the log fail by *rule*."""
    fusebd("fault", "add", mounted.point, "disk", "action=error", "target=xfs:log", *rule)


def test_xfs_shuts_down_when_its_log_fails_and_recovers_when_it_works_again(
    mount: Callable[..., Mount], tmp_path: Path, kernel_log: KernelLog
) -> None:
    with open(tmp_path / "disk.raw", "wb") as file:
        file.truncate(LENGTH)
    mounted = mount(raw("disk", tmp_path / "disk.raw"))
    with loop_device(mounted / "disk") as device, block_errors(device, tmp_path) as errors:
        name = os.path.basename(device)
        run("mkfs.xfs", "-q", device)
        with file_system(device, tmp_path / "fs") as top:
            _write(top, range(50))
            assert errors() == []
            # As long as there is no rule that matches, all is well.
            _fail(mounted, "id=idle", "operations=read")
            _write(top, range(50, 100))
            assert errors() == []

            _fail(mounted, "id=log", "operations=write")
            with pytest.raises(OSError, match="Input/output error"):
                _write(top, range(100, 200))
            assert kernel_log.wait_for(f"XFS ({name}): Filesystem has been shut down due to log error")
            with pytest.raises(OSError, match="Input/output error"):
                (top / "another").touch()

        rules = {rule["id"]: rule["hits"] for rule in mounted.qmp("query-fault-rules", {"node-name": "disk"})["rules"]}
        found = errors()
        assert found
        assert rules == {"idle": 0, "log": len(found)}
        (log,) = json.loads(fusebd("targets", "--json", mounted / "disk", "xfs:log"))
        for error in found:
            assert ("W" in error.kind, error.errno) == (True, 5)
            assert 0 <= error.offset - log["start"] <= log["length"] - error.length
        faults = [entry for entry in mounted.qmp("query-ledger") if entry["kind"] == "fault"]
        assert [entry["rule"] for entry in faults] == ["log"] * len(found)
        assert [entry["offset"] for entry in faults] == [error.offset for error in found]
        assert [entry["length"] for entry in faults] == [error.length for error in found]

        fusebd("fault", "remove", mounted.point, "disk", "log", "idle")
        with file_system(device, tmp_path / "fs") as top:
            assert kernel_log.wait_for(f"XFS ({name}): Ending recovery")
            for number in range(100):
                assert (top / str(number)).read_bytes() == str(number).encode() * 1000
            _write(top, range(100, 110))
        run("xfs_repair", "-n", device)
        assert len(errors()) == len(found)
    mounted.umount()


def test_the_kernel_counts_as_many_errors_as_the_rule_has_hits_and_xfs_goes_on(
    mount: Callable[..., Mount], tmp_path: Path
) -> None:
    with open(tmp_path / "disk.raw", "wb") as file:
        file.truncate(LENGTH)
    mounted = mount(raw("disk", tmp_path / "disk.raw"))
    with loop_device(mounted / "disk") as device, block_errors(device, tmp_path) as errors:
        run("mkfs.xfs", "-q", device)
        with file_system(device, tmp_path / "fs") as top:
            (top / "large").write_bytes(bytes(4 << 20))
            for action in ("--freeze", "--unfreeze"):  # brings all of it to its place
                run("fsfreeze", action, top)
            rule = ["action=error", "operations=read", "every=3", "target=xfs:file=/large"]
            fusebd("fault", "add", mounted.point, "disk", *rule)
            read = ["dd", f"if={top / 'large'}", "of=/dev/null", "bs=64k", "iflag=direct", "conv=noerror"]
            failed = run(*read).count("Input/output error")
            (rule_now,) = mounted.qmp("query-fault-rules", {"node-name": "disk"})["rules"]
            assert (rule_now["hits"], len(errors())) == (failed, failed)
            assert failed == 64 // 3
            fusebd("fault", "remove", mounted.point, "disk", rule_now["id"])
            _write(top, range(10))
        run("xfs_repair", "-n", device)
    mounted.umount()
