# SPDX-License-Identifier: Apache-2.0
"""What the job layer asks of a store: of any, and of one that several front ends share.

``store.JobStore`` (SQLite) is the first kind, ``store_redis.RedisStore`` both. In each every change of state happens
once, whoever asks, and a worker that has been given up changes nothing any more.
"""

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol

from .job import Job, JobEvent, NewJob

__all__ = ["SharedStore", "Store"]


class Store(Protocol):
    """Jobs and their events."""

    def close(self) -> None:
        """Let go of what is open."""
        ...

    def add(self, job: NewJob, *, max_queued: int) -> Job:
        """Queue a job.

        Raises:
            QueueFullError: ``max_queued`` jobs wait already.
            DuplicateKeyError: Its owner has used its idempotency key before.
        """
        ...

    def get(self, job_id: str) -> Job | None:
        """A job by its id."""
        ...

    def by_key(self, owner: str, idempotency_key: str) -> Job | None:
        """The job that an idempotency key made."""
        ...

    def of_owner(self, owner: str, *, states: tuple[str, ...] = (), limit: int = 1000) -> list[Job]:
        """An owner's jobs, newest first; ``states`` keeps only those."""
        ...

    def count(self, *states: str) -> int:
        """How many jobs are in those states."""
        ...

    def busy(self) -> int:
        """How many jobs run on this server's workers."""
        ...

    def position(self, job_id: str) -> int:
        """How many jobs a worker will take before this one."""
        ...

    def recent_seconds(self) -> list[float]:
        """How long the last clips took, claimed to finished."""
        ...

    def cancel(self, job_id: str) -> Job | None:
        """Cancel a queued job now, ask the worker of a running one to stop, leave a finished one as it is."""
        ...

    def hold(self, on: bool) -> None:
        """Whether this server's workers leave queued jobs where they are, because it is about to end."""
        ...

    def recover(self) -> list[str]:
        """After a start: what workers that are no more were at is queued again, once, with the same seed."""
        ...

    def bury(self, worker: str, error_type: str, message: str) -> list[str]:
        """A worker is dead: fail what it was at. Only its supervisor may say so. Returns the jobs' ids."""
        ...

    def expire(self, job_id: str) -> None:
        """Keep a job no longer than it runs."""
        ...

    def expired(self, now: float) -> list[str]:
        """Jobs whose time is over."""
        ...

    def forget(self, job_id: str) -> None:
        """Remove a finished job and its events; its files are the caller's to remove first."""
        ...

    def events(
        self, after: int, *, job_id: str | None = None, owner: str | None = None, limit: int = -1
    ) -> list[JobEvent]:
        """Events with a larger number, oldest first, of one job or of all jobs of an owner; -1 is no limit."""
        ...

    def last_event(self) -> int:
        """The number of the newest event."""
        ...

    def claim(self, worker: str) -> Job | None:
        """Take the job that has waited longest, or None."""
        ...

    def advance(self, job_id: str, worker: str, done: Mapping[str, Any]) -> bool:
        """Report progress: ``stage, step, steps, progress, seconds_left``. False where the worker is to stop."""
        ...

    def finish(self, job_id: str, worker: str, state: str, outcome: Mapping[str, Any]) -> bool:
        """End a job. Returns whether it was still the worker's to end."""
        ...


class SharedStore(Store, Protocol):
    """A store of several front ends, none of which knows all workers.

    A worker's claim holds for the length of a lease, and it renews the lease while it lives. Once the lease has run
    out, whoever looks queues the job again: once, with the same seed; the second time it fails. A worker's name that
    begins with ``SERVER/`` is of that front end.
    """

    def renew(self, worker: str) -> None:
        """The worker is alive."""
        ...

    def workers(self) -> int:
        """How many workers are alive."""
        ...

    def reclaim(self) -> list[str]:
        """Queue again, or fail, what workers without a lease were at. Returns the jobs' ids."""
        ...

    def requeue(self, worker: str) -> list[str]:
        """The same for a worker that is known to be dead, whatever its lease."""
        ...

    def take_ended(self) -> list[str]:
        """Jobs that have ended; each is told to one front end, once."""
        ...

    def changes(self) -> AsyncGenerator[tuple[str, str]]:
        """Kind and job of every event from now on, while the connection lasts.

        Raises:
            StoreUnavailableError: It is lost.
        """
        ...
