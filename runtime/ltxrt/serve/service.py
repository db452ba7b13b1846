# SPDX-License-Identifier: Apache-2.0
"""What every route works with."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

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

_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


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
        coming: Jobs by caller whose inputs are still brought.
    """

    settings: Settings
    jobs: JobLayer
    inputs: InputReader
    keys: Keys
    metrics: Metrics
    model: dict[str, Any]
    telemetry: Telemetry | None = None
    closing: bool = False
    coming: Counter[str] = field(default_factory=Counter[str])

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
        ProblemError: Nobody whom we know, or, where no key is asked for, a page of another site in a browser here.
    """
    service = service_of(request)
    owner = service.keys.owner(request.headers.get("authorization"))
    if owner is None:
        raise ProblemError("unauthenticated", "give a valid key: Authorization: Bearer KEY")
    if service.settings.no_auth:
        _refuse_foreign_page(request, service.settings)
    return owner


def _refuse_foreign_page(request: Request, settings: Settings) -> None:
    """Without keys, that a call comes from this machine is all that lets it in, and so does a browser's.

    A name that leads here (DNS rebinding) shows in Host, a call across origins, which needs no leave to be sent, in
    Origin.
    """
    host = request.headers.get("host", "").lower()
    public = urlsplit(settings.public_url or "").netloc.lower()
    origin = request.headers.get("origin")
    try:
        named = urlsplit(f"//{host}").hostname or ""
        foreign = origin is not None and urlsplit(origin).netloc.lower() not in {host, public} - {""}
    except ValueError:
        named, foreign = "", True
    if foreign or (host != public and named not in (*_LOCAL_NAMES, settings.host)):
        raise ProblemError("foreign_page", "without keys only this machine's own calls are taken; else set public_url")


def base_url(request: Request) -> str:
    """Where the caller reaches this server."""
    public = service_of(request).settings.public_url
    return (public or str(request.base_url)).rstrip("/")
