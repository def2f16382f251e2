"""Jobs: what a command starts and a client then follows, by JOB_STATUS_CHANGE and query-jobs, until it dismisses it.

    created -> running -> waiting -> pending -> concluded -> null
                       `-> aborting ---------^

States, verbs and texts: QEMU job.c, qapi/job.json.  All jobs here finalize themselves and wait to be dismissed, as
those of blockdev-create and x-blockdev-amend do; none has a point at which it could be paused.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from fusebd.block.identifiers import is_well_formed
from fusebd.block.options import Json
from fusebd.errors import BlockIOError, CommandError, FusebdError

_UNFINISHED = frozenset({"created", "running"})
#: in which states a job accepts which verb
_VERBS = {
    "cancel": _UNFINISHED | {"waiting", "pending"},
    "pause": _UNFINISHED,
    "resume": _UNFINISHED,
    "complete": frozenset[str](),  # is for jobs that become ready first
    "finalize": frozenset({"pending"}),
    "dismiss": frozenset({"concluded"}),
}


class Job:
    """One job; *kind* is its QAPI JobType.  Its progress is 0 of 1 until it is finished."""

    def __init__(self, id: str, kind: str) -> None:  # noqa: A002
        self.id = id
        self.kind = kind
        self.status = "undefined"
        self.error: str | None = None
        self.paused = False
        self.scope = trio.CancelScope()

    def info(self) -> dict[str, Json]:
        """QAPI JobInfo."""
        info: dict[str, Json] = {
            "id": self.id,
            "type": self.kind,
            "status": self.status,
            "current-progress": int(self.status not in _UNFINISHED),
            "total-progress": 1,
        }
        return info if self.error is None else {**info, "error": self.error}


class Jobs:
    """All jobs of one daemon.  They run in *nursery*; *emit* is called with each event's name and data."""

    def __init__(self, nursery: trio.Nursery, emit: Callable[[str, dict[str, Any]], None]) -> None:
        self._nursery = nursery
        self._emit = emit
        self._jobs: dict[str, Job] = {}

    def start(self, id: str, kind: str, work: Callable[[], Awaitable[None]]) -> None:  # noqa: A002
        """Have the new job *id* carry out *work*, whose FusebdError is the job's error.  Raises CommandError."""
        if not is_well_formed(id):
            raise CommandError(f"Invalid job ID '{id}'")
        if id in self._jobs:
            raise CommandError(f"Job ID '{id}' already in use")
        job = self._jobs[id] = Job(id, kind)
        self._enter(job, "created")
        self._enter(job, "running")
        self._nursery.start_soon(self._run, job, work)

    async def _run(self, job: Job, work: Callable[[], Awaitable[None]]) -> None:
        with job.scope:
            try:
                await work()
            except BlockIOError as error:
                job.error = error.reason
            except FusebdError as error:
                job.error = str(error)
        if job.scope.cancelled_caught:
            job.error = os.strerror(errno.ECANCELED)
        for status in ("waiting", "pending") if job.error is None else ("aborting",):
            self._enter(job, status)
        self._enter(job, "concluded")

    def _enter(self, job: Job, status: str) -> None:
        job.status = status
        self._emit("JOB_STATUS_CHANGE", {"status": status, "id": job.id})

    def query(self) -> Json:
        """QAPI query-jobs: the latest first."""
        return [job.info() for job in reversed(self._jobs.values())]

    def _find(self, id: str, verb: str) -> Job:  # noqa: A002
        job = self._jobs.get(id)
        if job is None:
            raise CommandError("Job not found")
        if verb == "pause" and job.paused:
            raise CommandError("Job is already paused")
        if verb == "resume" and not job.paused:
            raise CommandError("Can't resume a job that was not paused")
        if job.status not in _VERBS[verb]:
            raise CommandError(f"Job '{id}' in state '{job.status}' cannot accept command verb '{verb}'")
        return job

    def apply(self, id: str, verb: str) -> None:  # noqa: A002
        """Do *verb* (``cancel``, ``pause``, ...) to the job *id*.  Raises CommandError in QEMU's words."""
        job = self._find(id, verb)
        if verb == "cancel":
            job.scope.cancel()
        elif verb in ("pause", "resume"):
            job.paused = verb == "pause"
        elif verb == "dismiss":
            del self._jobs[id]
            self._enter(job, "null")

    def dismiss_all(self) -> None:
        """The daemon ends: those that have concluded are dismissed, the latest first."""
        for job in [job for job in reversed(self._jobs.values()) if job.status == "concluded"]:
            self.apply(job.id, "dismiss")
