"""The null-co and null-aio drivers: lengths, latency, what they promise."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import trio
import trio.testing
from support import READ_WRITE, read, root_of, write

from fusebd.block.blockstatus import block_status_above
from fusebd.block.child import FUA
from fusebd.block.filename import options_for
from fusebd.block.graph import Graph
from fusebd.block.naming import node_filename
from fusebd.block.status import Status
from fusebd.errors import BlockIOError, FusebdError, OptionError

DRIVERS = ["null-co", "null-aio"]
both = pytest.mark.parametrize("driver", DRIVERS)


async def add(graph: Graph, driver: str, **options: Any) -> None:
    given = {name.replace("_", "-"): value for name, value in options.items()}
    await graph.blockdev_add({"driver": driver, "node-name": "n", **given})


@both
async def test_the_length_is_a_gibibyte_unless_given(graph: Graph, driver: str) -> None:
    await add(graph, driver)
    assert graph.find("n").driver.length == 1 << 30


@pytest.mark.parametrize("size", [0, 1, 511, 1 << 20, 2**63 - 2**30])
async def test_the_length_is_the_one_given(graph: Graph, size: int) -> None:
    await add(graph, "null-co", size=size)
    assert root_of(graph, "n").length == size


# The messages are those of qemu-storage-daemon 10.0.2, which aborts at the first after it has said this.
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": -1}, "Value '-1' is out of range for parameter 'size'"),
        ({"size": 2**63 - 1}, "Could not refresh total sector count: File too large"),
        ({"size": 2**64}, "Invalid parameter type for 'size', expected: integer"),
        ({"size": "1M"}, "Invalid parameter type for 'size', expected: integer"),
        ({"latency-ns": -1}, "latency-ns is invalid"),
        ({"latency-ns": 1.5}, "Invalid parameter type for 'latency-ns', expected: integer"),
        ({"read-zeroes": "on"}, "Invalid parameter type for 'read-zeroes', expected: boolean"),
        ({"bogus": 1}, "Parameter 'bogus' is unexpected"),
    ],
    ids=str,
)
async def test_bad_options_are_refused(graph: Graph, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FusebdError) as refused:
        await graph.blockdev_add({"driver": "null-co", "node-name": "n", **options})
    assert str(refused.value) == message
    assert not graph.nodes


@both
@pytest.mark.parametrize("read_zeroes", [False, True])
async def test_reads_give_zeroes_and_writes_vanish(graph: Graph, driver: str, read_zeroes: bool) -> None:
    await add(graph, driver, size=8192, read_zeroes=read_zeroes)
    root = root_of(graph, "n", READ_WRITE)
    await write(root, 100, b"gone")
    await root.pwritev(200, (memoryview(b"gone"),), FUA)
    await root.pwrite_zeroes(0, 8192)
    await root.pdiscard(0, 8192)
    await root.flush()
    found = memoryview(bytearray(b"\xff" * 8192))
    await root.preadv(0, (found[:7], found[7:]))
    assert found == bytes(8192)


@both
async def test_requests_past_the_end_fail(graph: Graph, driver: str) -> None:
    await add(graph, driver, size=1000)
    root = root_of(graph, "n", READ_WRITE)
    for request in (read(root, 999, 2), write(root, 1000, b"x")):
        with pytest.raises(BlockIOError):
            await request


@both
async def test_it_cannot_be_resized(graph: Graph, driver: str) -> None:
    await add(graph, driver, size=1024)
    with pytest.raises(BlockIOError, match="Image format driver does not support resize"):
        await graph.block_resize("n", 2048)


# --- waiting -------------------------------------------------------------------------------------


async def test_null_co_answers_at_once(graph: Graph) -> None:
    await add(graph, "null-co")
    root = root_of(graph, "n", READ_WRITE)
    with trio.testing.assert_no_checkpoints():
        await use(root)


async def test_null_aio_answers_after_a_trip_through_the_scheduler(graph: Graph) -> None:
    await add(graph, "null-aio")
    root = root_of(graph, "n", READ_WRITE)
    for request in (read(root, 0, 512), write(root, 0, b"x"), root.flush()):
        with trio.testing.assert_checkpoints():
            await request


async def use(root: Any) -> None:
    await write(root, 0, b"x")
    await read(root, 0, 512)
    await root.flush()


@both
async def test_reads_writes_and_flushes_take_their_time(
    graph: Graph, autojump_clock: trio.testing.MockClock, driver: str
) -> None:
    await add(graph, driver, latency_ns=3_000_000_000)
    root = root_of(graph, "n", READ_WRITE)
    began = trio.current_time()
    await use(root)
    assert trio.current_time() - began == pytest.approx(9)


@both
async def test_requests_take_their_time_side_by_side(
    graph: Graph, autojump_clock: trio.testing.MockClock, driver: str
) -> None:
    await add(graph, driver, latency_ns=1_000_000_000)
    root = root_of(graph, "n", READ_WRITE)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(read, root, number * 512, 512)
    assert trio.current_time() - began == pytest.approx(1)


# --- what is shown -------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("read_zeroes", [False, True])
async def test_block_status_promises_zeroes_if_asked_to(graph: Graph, driver: str, read_zeroes: bool) -> None:
    options = {"driver": driver, "size": 65536, "read-zeroes": read_zeroes}
    await graph.blockdev_add({**options, "node-name": "n"})
    status = await block_status_above(graph.find("n"), 0, 65536)
    said = subprocess.run(
        ["qemu-img", "map", "--output=json", "json:" + json.dumps(options)], capture_output=True, text=True, check=True
    ).stdout
    (extent,) = json.loads(said)
    assert (bool(status.flags & Status.ZERO), bool(status.flags & Status.DATA), status.length) == (
        extent["zero"],
        extent["data"],
        extent["length"],
    )


@both
async def test_nothing_is_allocated(graph: Graph, driver: str) -> None:
    await add(graph, driver)
    assert graph.find("n").driver.allocated_bytes() == 0


@both
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "{}://"),
        ({"latency-ns": 5}, "{}://"),
        ({"size": 1 << 30}, 'json:{{"driver": "{}", "size": 1073741824}}'),
        ({"read-zeroes": False}, 'json:{{"read-zeroes": false, "driver": "{}"}}'),
    ],
    ids=str,
)
async def test_the_name_is_short_if_that_says_it_all(
    graph: Graph, driver: str, options: dict[str, Any], name: str
) -> None:
    # the names are those of qemu-storage-daemon 10.0.2
    await graph.blockdev_add({"driver": driver, "node-name": "n", **options})
    assert node_filename(graph.find("n")) == name.format(driver)


@both
async def test_the_short_name_is_understood(graph: Graph, driver: str) -> None:
    node = await graph.open_node(await options_for(f"{driver}://", "raw", graph.probe))
    node.monitor_owned = True
    assert node.children["file"].node.driver_name == driver


@both
@pytest.mark.parametrize("rest", ["", "/", "//x"])
async def test_other_names_are_refused(graph: Graph, driver: str, rest: str) -> None:
    with pytest.raises(OptionError, match=rf"^The only allowed filename for this driver is '{driver}://'$"):
        await options_for(f"{driver}:{rest}", "raw", graph.probe)
