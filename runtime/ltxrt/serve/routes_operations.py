# SPDX-License-Identifier: Apache-2.0
"""Health, readiness, metrics, version: for whoever runs the server."""

from importlib.metadata import version as package_version

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .problems import ProblemError
from .service import caller, service_of

__all__ = ["router"]

router = APIRouter(tags=["operations"])


@router.get("/health")
@router.get("/healthz", include_in_schema=False)
@router.get("/ping", include_in_schema=False)
async def health() -> Response:
    """The server lives."""
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Every worker has loaded and warmed its model, and new jobs are taken."""
    jobs = service_of(request).jobs
    if jobs.draining:
        raise ProblemError("draining", "no new jobs are taken")
    if not jobs.pool.ready:
        waiting = sum(not slot.ready for slot in jobs.pool.slots)
        raise ProblemError("not_ready", f"{waiting} of {len(jobs.pool.slots)} workers are not ready")
    jobs.store.count("queued")  # refuses where a shared store does not answer
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    service = service_of(request)
    if not service.settings.open_metrics:
        caller(request)
    return Response(service.metrics.exposition(service.jobs), media_type="text/plain; version=0.0.4")


@router.get("/version")
async def version(request: Request) -> Response:
    """What runs here."""
    caller(request)
    return JSONResponse({"ltxrt": package_version("ltxrt"), "model": service_of(request).model["source_model"]})
