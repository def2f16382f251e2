"""The commands that start jobs, and those that follow and steer them.

Arguments and results: QEMU's qapi/job.json, qapi/block-core.json; texts: job-qmp.c, block/create.c.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from fusebd.block.creation import parse_creation
from fusebd.block.jobs import Jobs
from fusebd.block.options import Json, OptionStruct
from fusebd.qmp.table import Command, CommandTable, Context, NoArguments

COMMANDS = CommandTable()
command = COMMANDS.command


class BlockdevCreate(OptionStruct, frozen=True, kw_only=True):
    job_id: Annotated[str, Meta(description="name of the job")]
    options: Annotated[dict[str, Json], Meta(description="the driver, and what it takes to make an image")]


@command("blockdev-create", BlockdevCreate)
async def blockdev_create(context: Context, arguments: BlockdevCreate) -> None:
    create = parse_creation(context.graph, arguments.options, "options.")
    context.service(Jobs).start(arguments.job_id, "create", create)


@command("query-jobs")
async def query_jobs(context: Context, arguments: NoArguments) -> Json:
    return context.service(Jobs).query()


class JobNamed(OptionStruct, frozen=True, kw_only=True):
    id: Annotated[str, Meta(description="the job")]


def _verb(verb: str) -> Command:
    async def run(context: Context, arguments: JobNamed) -> None:
        context.service(Jobs).apply(arguments.id, verb)

    return Command(f"job-{verb}", JobNamed, run)


for _name in ("pause", "resume", "cancel", "complete", "dismiss", "finalize"):
    COMMANDS.add(_verb(_name))
