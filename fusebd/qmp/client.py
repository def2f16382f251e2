"""One QMP command from the shell: ``fusebd qmp ADDRESS COMMAND [KEY=VALUE | KEY:=JSON | JSON]...``

``key=value`` is a string, or what the command's declaration makes of it (for blockdev-add the driver's, for object-add
the type's); keys may be dotted.  ``key:=JSON`` is taken as it stands.  One word that is a JSON object has them all.
The conversation itself is qemu.qmp's, which is imported only when there is something to say.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys

from fusebd.block.driver import type_blockdev
from fusebd.block.objects import type_object
from fusebd.block.options import Json, declared_options, tree_from_dotted, type_keyval
from fusebd.block.qjson import loads
from fusebd.errors import CommandError, OpenError, OptionError
from fusebd.qmp.commands import COMMANDS
from fusebd.qmp.server import parse_host_port


def run(address: str, command: str, words: list[str]) -> None:
    """Execute *command* with the arguments *words* on the daemon at *address*; print what it returns as JSON.

    Raises FusebdError if the command failed or could not be given.
    """
    returned = execute(address, command, parse_arguments(command, words))
    sys.stdout.write(json.dumps(returned, indent=4) + "\n")


def execute(address: str, command: str, arguments: dict[str, Json]) -> Json:
    """Execute *command* on the daemon at *address*; what it returns.  Raises FusebdError."""
    return asyncio.run(_execute(address, command, arguments))


def parse_arguments(command: str, words: list[str]) -> dict[str, Json]:
    """The arguments object that *words* spell.  Raises OptionError."""
    if len(words) == 1 and words[0].startswith("{"):
        whole = loads(words[0])
        assert isinstance(whole, dict)
        return whole
    flat: dict[str, Json] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.removesuffix(":"):
            raise OptionError(f"Expected '=' after parameter '{key}'" if key else "Invalid parameter ''")
        if key.endswith(":"):
            flat[key.removesuffix(":")] = loads(value)
        else:
            flat[key] = value
    tree = tree_from_dotted(flat)
    if command == "blockdev-add":
        return type_blockdev(tree)
    if command == "blockdev-reopen" and isinstance(tree.get("options"), list):
        tree["options"] = [
            type_blockdev(item, f"options.{index}.") if isinstance(item, dict) else item
            for index, item in enumerate(tree["options"])
        ]
        return tree
    if command == "object-add":
        return type_object(tree)
    declared = COMMANDS.get(command)
    if declared is None or declared.arguments is None:
        return tree
    return type_keyval(tree, declared_options(declared.arguments))


async def _execute(address: str, command: str, arguments: dict[str, Json]) -> Json:
    from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError

    # What goes wrong arrives as an exception; the library's log would say it a second time.
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
    logging.getLogger("qemu.qmp").propagate = False
    place = address.removeprefix("unix:") if address.startswith("unix:") else parse_host_port(address)
    client = QMPClient("fusebd qmp")
    try:
        await client.connect(place)
    except ConnectError as error:
        code = error.exc.errno if isinstance(error.exc, OSError) else None
        cause = os.strerror(code) if code and code > 0 else error.exc
        raise OpenError(f"Could not connect to {address}: {cause}") from None
    try:
        return await client.execute(command, arguments or None)
    except ExecuteError as error:
        raise CommandError(str(error)) from None
    except QMPError as error:
        raise OpenError(f"{address}: {error}") from None
    finally:
        try:
            await client.disconnect()
        except (QMPError, EOFError, OSError) as error:
            logging.getLogger(__name__).debug("%s: %s", address, error)
