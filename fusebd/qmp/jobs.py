"""The commands that follow and steer jobs.

Arguments and results: QEMU's qapi/job.json; texts: job-qmp.c.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from fusebd.block.jobs import Jobs
from fusebd.block.options import Json, OptionStruct
from fusebd.qmp.table import Command, CommandTable, Context, NoArguments

COMMANDS = CommandTable()
command = COMMANDS.command


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
