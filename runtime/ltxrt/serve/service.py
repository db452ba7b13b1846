# SPDX-License-Identifier: Apache-2.0
"""What every route works with."""

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from .auth import Keys
from .inputs import InputReader
from .job import Job
from .jobs import JobLayer
from .metrics import Metrics
from .problems import ProblemError
from .settings import Settings
from .telemetry import Telemetry

__all__ = ["Service", "base_url", "caller", "service_of"]


@dataclass(slots=True)
class Service:
    """The parts of a running server.

    Attributes:
        settings: As loaded.
        jobs: The job layer.
        inputs: Reader of what callers send.
        keys: Who may call.
        metrics: Counters.
        model: The model object of the models endpoints.
        telemetry: Makes spans, where they are wanted.
        closing: The server ends; streams are to end too.
    """

    settings: Settings
    jobs: JobLayer
    inputs: InputReader
    keys: Keys
    metrics: Metrics
    model: dict[str, Any]
    telemetry: Telemetry | None = None
    closing: bool = False

    def own(self, owner: str, job_id: str) -> Job:
        """A caller's job; one of somebody else's is not there.

        Raises:
            ProblemError: There is none.
        """
        job = self.jobs.store.get(job_id)
        if job is None or job.owner != owner:
            raise ProblemError("resource_not_found", f"there is no job {job_id[:64]!r} (any more)")
        return job


def service_of(request: Request) -> Service:
    """The service behind a request."""
    return request.app.state.service


def caller(request: Request) -> str:
    """Who calls.

    Raises:
        ProblemError: Nobody whom we know.
    """
    owner = service_of(request).keys.owner(request.headers.get("authorization"))
    if owner is None:
        raise ProblemError("unauthenticated", "give a valid key: Authorization: Bearer KEY")
    return owner


def base_url(request: Request) -> str:
    """Where the caller reaches this server."""
    public = service_of(request).settings.public_url
    return (public or str(request.base_url)).rstrip("/")
