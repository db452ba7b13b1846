# SPDX-License-Identifier: Apache-2.0
"""One job as the store keeps it, and what may become of it."""

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["TERMINAL", "Job", "JobEvent", "NewJob", "State"]

State = Literal["queued", "processing", "succeeded", "failed", "cancelled"]
#: States that nothing leaves.
TERMINAL = frozenset(("succeeded", "failed", "cancelled"))


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job before the store has taken it.

    Attributes:
        id: Unguessable, also the name of the folder with its files.
        owner: Who may see it: a digest of the caller's key.
        request: Fields of ``ltxrt.request.Request``, with a seed and with paths of files of our own making.
        echo: The caller's own fields, to be shown again; data URIs cut to their media type.
        model: Model id as the caller knows it.
        idempotency_key: The caller's, or None.
        payload_hash: SHA-256 of what the caller sent.
    """

    id: str
    owner: str
    request: dict[str, Any]
    echo: dict[str, Any]
    model: str
    idempotency_key: str | None = None
    payload_hash: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(NewJob):
    """A stored job.

    Attributes:
        state: Where it stands. A queued job is cancelled by the store; whatever happens to a job after a worker has
            claimed it is written by that worker, or by the supervisor once that worker is dead.
        stage: Stage of the pipeline that reported last.
        step: Steps of the stage that are done.
        steps: Steps of the stage.
        progress: Part of the whole that is done, 0 to 1, by the usual share of each stage.
        seconds_left: Estimate; None before there is one.
        attempts: How often a worker has claimed it.
        cancel_requested: Its worker will stop at the next step.
        created_at: Unix seconds; so the other times, None where they have not come.
        error_type: Stable name of what went wrong, for programs.
        error_message: The same for people, without paths or secrets.
        result: ``Result.as_json()`` and ``bytes``, the size of the file.
        result_token: Second unguessable part of the result's address.
    """

    state: State
    stage: str | None
    step: int
    steps: int
    progress: float
    seconds_left: float | None
    attempts: int
    cancel_requested: bool
    created_at: float
    started_at: float | None
    completed_at: float | None
    expires_at: float | None
    error_type: str | None
    error_message: str | None
    result: dict[str, Any] | None
    result_token: str

    @property
    def done(self) -> bool:
        """Whether its state is final."""
        return self.state in TERMINAL


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened to a job; ``number`` grows over all jobs and survives restarts."""

    number: int
    job_id: str
    kind: str
    data: dict[str, Any]
