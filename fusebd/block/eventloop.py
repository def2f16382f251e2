"""iothread, main-loop: how QEMU's event loops are to wait.

fusebd has one event loop, trio's, which needs no such advice; the objects exist so that command lines and scripts
made for QEMU work.  Their properties are kept, and checked as QEMU does, and have no effect.

Options: QAPI EventLoopBaseProperties, IothreadProperties.  Texts: QEMU event-loop-base.c, iothread.c, util/main-loop.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from msgspec import UNSET, Meta, UnsetType

from fusebd.block.options import Int, Json
from fusebd.block.userobject import ObjectOptions, UserObject
from fusebd.errors import OptionError

if TYPE_CHECKING:
    from fusebd.block.objects import Objects

_INT_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1


class EventLoopOptions(ObjectOptions, frozen=True, kw_only=True):
    aio_max_batch: Annotated[Int | UnsetType, Meta(description="no effect here")] = UNSET
    thread_pool_min: Annotated[Int | UnsetType, Meta(description="no effect here")] = UNSET
    thread_pool_max: Annotated[Int | UnsetType, Meta(description="no effect here")] = UNSET


class _EventLoop(UserObject):
    qom_parent = "event-loop-base"
    options_class: ClassVar[type[ObjectOptions]] = EventLoopOptions
    defaults: ClassVar[dict[str, Json]] = {"aio-max-batch": 0, "thread-pool-min": 0, "thread-pool-max": 64}

    def put(self, name: str, value: Json) -> None:
        if value < 0:
            raise OptionError(f"{name} value must be in range [0, {_INT64_MAX}]")
        new = {**self.values, name: value}
        if self.completed:
            _check_pool(new)
        self.values = new

    async def complete(self, objects: Objects) -> None:
        _check_pool(self.values)


def _check_pool(values: dict[str, Json]) -> None:
    if not values["thread-pool-min"] <= values["thread-pool-max"] <= _INT_MAX or not values["thread-pool-max"]:
        raise OptionError("bad thread-pool-min/thread-pool-max values")


class MainLoop(_EventLoop):
    """The options of the one main loop; it cannot be deleted."""

    qom_type = "main-loop"

    async def complete(self, objects: Objects) -> None:
        if any(isinstance(other, MainLoop) and other is not self for other in objects):
            raise OptionError("only one main-loop instance allowed")
        await super().complete(objects)

    @property
    def in_use(self) -> bool:
        return True


class IothreadOptions(EventLoopOptions, frozen=True, kw_only=True):
    poll_max_ns: Annotated[Int | UnsetType, Meta(description="no effect here")] = UNSET
    poll_grow: Annotated[Int | UnsetType, Meta(description="no effect here")] = UNSET
    poll_shrink: Annotated[Int | UnsetType, Meta(description="no effect here")] = UNSET


class IoThread(_EventLoop):
    qom_type = "iothread"
    options_class = IothreadOptions
    defaults: ClassVar[dict[str, Json]] = {
        **_EventLoop.defaults,
        "poll-max-ns": 32768,
        "poll-grow": 0,
        "poll-shrink": 0,
    }
