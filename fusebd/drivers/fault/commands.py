"""The arguments of the fault filter's commands, each of which takes ``node-name``, too."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from fusebd.block.options import OptionStruct, Size
from fusebd.drivers.fault.options import FaultRule


class FaultRuleAdd(OptionStruct, frozen=True, kw_only=True):
    rule: Annotated[FaultRule, Meta(description="the rule to add behind those there are")]


class FaultRuleRemove(OptionStruct, frozen=True, kw_only=True):
    id: Annotated[str, Meta(description="the rule to take away; requests that it holds go on")]


class QueryFaultRules(OptionStruct, frozen=True, kw_only=True):
    """Nothing but the node."""


class FaultRelease(OptionStruct, frozen=True, kw_only=True):
    id: Annotated[str | UnsetType, Meta(description="the rule whose requests go on; all that are held if absent")] = (
        UNSET
    )
    request: Annotated[Size | UnsetType, Meta(description="this one alone, by its number")] = UNSET


class FaultHeal(OptionStruct, frozen=True, kw_only=True):
    id: Annotated[str | UnsetType, Meta(description="what this rule has done; all damage if absent")] = UNSET
    offset: Annotated[Size, Meta(description="from this byte on")] = 0
    length: Annotated[Size | UnsetType, Meta(description="in so many bytes; up to the end if absent")] = UNSET


class FaultRecord(OptionStruct, frozen=True, kw_only=True):
    filename: Annotated[str, Meta(description="file to record in what happens from now on; it is overwritten")]


class FaultRecordEnd(OptionStruct, frozen=True, kw_only=True):
    """Nothing but the node."""
