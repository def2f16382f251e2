"""One client's conversation, without any I/O: greeting, capabilities negotiation, then commands.

    NEGOTIATING --qmp_capabilities--> COMMAND

Before the negotiation there is no command but qmp_capabilities and no event; afterwards qmp_capabilities is refused.
With the capability "oob" a request may say ``exec-oob`` instead of ``execute``, and is then carried out at once, ahead
of the ones that wait.

Behaviour and texts: QEMU monitor/qmp.c, monitor/qmp-cmds-control.c, qapi/qmp-dispatch.c; docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from msgspec import UNSET

import fusebd
from fusebd.block.options import Json
from fusebd.errors import CommandError, CommandNotFound, FusebdError
from fusebd.qmp.table import Command, CommandTable

#: the version of QEMU whose block layer and QMP these are: clients choose what they say by it
QEMU_VERSION = {"major": 10, "minor": 0, "micro": 2}
OOB = "oob"


def version_info() -> dict[str, Json]:
    """QAPI VersionInfo."""
    return {"qemu": dict(QEMU_VERSION), "package": f"fusebd-{fusebd.__version__}"}


class State(Enum):
    NEGOTIATING = auto()
    COMMAND = auto()


@dataclass(frozen=True, slots=True)
class Request:
    """A request that is well-formed: a command that exists, and its arguments, not validated yet."""

    command: Command
    arguments: dict[str, Json]


class Monitor:
    """The state of one conversation, and the messages it consists of."""

    def __init__(self, table: CommandTable) -> None:
        self.table = table
        self.state = State.NEGOTIATING
        self.oob = False

    @staticmethod
    def greeting() -> Json:
        return {"QMP": {"version": version_info(), "capabilities": [OOB]}}

    @property
    def wants_events(self) -> bool:
        return self.state is State.COMMAND

    @staticmethod
    def is_out_of_band(value: Json) -> bool:
        """Whether *value* is to be carried out at once rather than in its turn."""
        return isinstance(value, dict) and "exec-oob" in value and "execute" not in value

    def negotiate(self, enable: list[str]) -> None:
        """Enter the command state with the capabilities *enable*."""
        self.oob = OOB in enable
        self.state = State.COMMAND

    def request(self, value: Json) -> Request:
        """*value*, as received, as a request.  Raises CommandError."""
        if not isinstance(value, dict):
            raise CommandError("QMP input must be a JSON object")
        name, out_of_band = self._command_name(value)
        command = self.table.get(name)
        if self.state is State.NEGOTIATING and name != "qmp_capabilities":
            raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
        if self.state is State.COMMAND and name == "qmp_capabilities":
            raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
        if command is None:
            raise CommandNotFound(f"The command {name} has not been found")
        if out_of_band and not command.allow_oob:
            raise CommandError(f"The command {name} does not support OOB")
        return Request(command, value.get("arguments", {}))

    def _command_name(self, value: dict[str, Json]) -> tuple[str, bool]:
        verb = ""
        for member, content in value.items():
            if member == "execute" or (member == "exec-oob" and self.oob):
                if not isinstance(content, str):
                    raise CommandError(f"QMP input member '{member}' must be a string")
                if verb:
                    raise CommandError(f"QMP input member '{member}' clashes with '{verb}'")
                verb = member
            elif member == "arguments":
                if not isinstance(content, dict):
                    raise CommandError("QMP input member 'arguments' must be an object")
            elif member != "id":
                raise CommandError(f"QMP input member '{member}' is unexpected")
        if not verb:
            raise CommandError("QMP input lacks member 'execute'")
        return str(value[verb]), verb == "exec-oob"

    @staticmethod
    def success(value: Json, returned: Json) -> Json:
        """The answer to the request *value*."""
        return _with_id(value, {"return": returned})

    @staticmethod
    def failure(value: Json, error: FusebdError) -> Json:
        """The answer to *value* (UNSET if it could not even be read), which failed with *error*."""
        name = error.qmp_class if isinstance(error, CommandError) else CommandError.qmp_class
        return _with_id(value, {"error": {"class": name, "desc": str(error)}})


def _with_id(value: Json, answer: dict[str, Any]) -> Json:
    given = value.get("id", UNSET) if isinstance(value, dict) else UNSET
    return answer if given is UNSET else {**answer, "id": given}
