# SPDX-License-Identifier: Apache-2.0
"""All routes in one application, and every refusal in the words of the API that was asked."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match

from ..bundle import Bundle
from ..errors import MediaError, RequestError
from .auth import Keys
from .contract import openapi_document
from .fetch import FetchRules
from .guard import Guard, request_id
from .inputs import InputLimits, InputReader, UploadShelf
from .job import Job
from .jobs import JobLayer, JobOptions, PoolMaker, UnavailableError
from .metrics import Metrics
from .model import model_object
from .problems import ProblemError, problem_response
from .routes_fal import router as fal_routes
from .routes_files import router as file_routes
from .routes_hub import router as hub_routes
from .routes_openai import router as openai_routes
from .routes_operations import router as operations_routes
from .routes_page import router as page_routes
from .sandbox import Sandbox, SandboxLimits
from .service import Service, service_of
from .settings import Settings
from .store import QueueFullError, StoreUnavailableError
from .telemetry import Telemetry, Traced, open_telemetry
from .worker import WorkerOptions

__all__ = ["create_app"]

_LOG = logging.getLogger("ltxrt.serve")
_ROUTERS = (hub_routes, openai_routes, fal_routes, file_routes, operations_routes, page_routes)
_SHELF_SECONDS = 3600.0
_TIDY_SECONDS = 60.0
_STORE_RETRY_SECONDS = "5"
# Most of them wait for some server far away, which must not keep other callers' inputs waiting. The default is a few
# more than there are cores.
_THREADS = 64
_BY_STATUS = {404: "resource_not_found", 405: "method_not_allowed", 413: "body_too_large"}


def create_app(
    settings: Settings, *, factory: str = "ltxrt.serve.worker:open_bundle", telemetry: Telemetry | None = None
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        settings: As loaded.
        factory: ``module:function`` by which workers open their pipeline.
        telemetry: Where spans go; by default as the settings say.

    Raises:
        LtxrtError: The bundle, the keys or the data folder cannot be used.
    """
    bundle = Bundle.open(settings.bundle)
    keys = Keys(() if settings.no_auth else settings.keys())
    metrics = Metrics()
    model = model_object(bundle.manifest.model.name, int(time.time()))
    telemetry = open_telemetry() if settings.otel and telemetry is None else telemetry

    def ended(job: Job) -> None:
        metrics.ended(job)
        if telemetry is not None:
            telemetry.ended(job)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncGenerator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "ltxrt"))
        async with JobLayer(_job_options(settings, ended, factory)).running() as jobs:
            limits = SandboxLimits(audio_seconds=settings.max_audio_seconds)
            sandbox = Sandbox(limits, jobs.incoming_folder.with_name("sandbox"))
            sandbox.prepare()
            shelf = UploadShelf(jobs.incoming_folder.with_name("uploads"), settings.max_uploads)
            inputs = InputReader(_input_limits(settings), sandbox, shelf)
            app.state.service = Service(settings, jobs, inputs, keys, metrics, model, telemetry)
            tidying = asyncio.create_task(_tidy(shelf))
            try:
                yield
            finally:
                tidying.cancel()
                with suppress(asyncio.CancelledError):
                    await tidying
                await sandbox.close()
        if telemetry is not None:
            await asyncio.to_thread(telemetry.close)

    app = FastAPI(title="ltxrt", summary="Audio to video", lifespan=life, docs_url=None, redoc_url=None)
    for router in _ROUTERS:
        app.include_router(router)
    refusals = (ProblemError, MediaError, RequestError, QueueFullError, UnavailableError, StoreUnavailableError)
    for kind in (*refusals, HTTPException, ClientDisconnect):
        app.add_exception_handler(kind, _refused)
    app.openapi = lambda: openapi_document(app)
    if telemetry is not None:
        app.add_middleware(Traced, telemetry=telemetry)
    most, longest = settings.max_body_bytes, settings.max_body_seconds
    app.add_middleware(Guard, max_body_bytes=most, max_body_seconds=longest, metrics=metrics)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    return problem_response(request.url.path, _problem(request, error), request_id(request.scope))


def _problem(request: Request, error: Exception) -> ProblemError:
    match error:
        case ProblemError():
            return error
        case MediaError():
            detail = f"{error.field} {error.problem}; allowed: {error.allowed}"
            return ProblemError("invalid_media", detail, field=error.field)
        case RequestError():
            return ProblemError("invalid_params", str(error), field=error.field)
        case QueueFullError():
            wait = {"Retry-After": str(service_of(request).jobs.seconds_until_free())}
            return ProblemError("queue_full", "try again later", headers=wait)
        case UnavailableError():
            wait = {"Retry-After": str(service_of(request).jobs.seconds_until_free())}
            return ProblemError("draining", "try again on another server, or later", headers=wait)
        case ClientDisconnect():  # nobody reads this, and a traceback would say no more
            return ProblemError("client_closed", "the caller went away")
        case StoreUnavailableError():
            return ProblemError("store_unavailable", "try again later", headers={"Retry-After": _STORE_RETRY_SECONDS})
        case HTTPException():
            kind = _BY_STATUS.get(error.status_code, "bad_request")
            headers = {"Allow": _allowed(request)} if error.status_code == 405 else error.headers
            return ProblemError(kind, str(error.detail), headers=headers)
        case _:
            raise error


def _allowed(request: Request) -> str:
    """Every method of a path; Starlette names those of the first route that has the path alone."""
    routes = [route for router in _ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in matching for method in route.methods or ()})) or "GET, HEAD"


def _job_options(settings: Settings, on_end: Callable[[Job], None], factory: str) -> JobOptions:
    worker = WorkerOptions(
        name="",
        data=settings.data,
        bundle=settings.bundle,
        threads=settings.threads,
        prompt_cache=settings.prompt_cache,
        factory=factory,
        warm_up=settings.warm_up,
        retention_seconds=settings.retention_seconds,
        timeout_seconds=settings.job_timeout_seconds,
        redis=settings.redis,
        lease_seconds=settings.lease_seconds,
    )
    return JobOptions(
        worker=worker,
        devices=settings.devices or (None,) * settings.slots,
        max_queued=settings.max_queued,
        on_end=on_end,
        make_pool=_ray_pool(settings) if settings.ray else None,
    )


def _ray_pool(settings: Settings) -> PoolMaker:
    # Ray reads these on import.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # it prints a stack at SIGTERM
    if settings.ray_address is None:
        # Whatever its name: no other switch keeps a cluster of one machine to loopback.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    from .ray_pool import RayOptions, RayPool

    options = RayOptions(
        address=settings.ray_address,
        gpus=settings.ray_gpus,
        min_replicas=settings.ray_min_replicas,
        max_replicas=settings.ray_max_replicas,
        target_ongoing=settings.ray_target_ongoing,
        idle_seconds=settings.ray_idle_seconds,
    )
    return partial(RayPool, options)


def _input_limits(settings: Settings) -> InputLimits:
    fetching = FetchRules(
        schemes=("https", "http") if settings.fetch_http else ("https",),
        networks=settings.fetch_networks,
        domains=settings.fetch_domains,
        timeout_seconds=settings.fetch_seconds,
    )
    return InputLimits(audio_bytes=settings.max_audio_bytes, image_bytes=settings.max_image_bytes, fetching=fetching)


async def _tidy(shelf: UploadShelf) -> None:
    """Remove uploads that nobody has used."""
    while True:
        await asyncio.sleep(_TIDY_SECONDS)
        shelf.remove_older(time.time() - _SHELF_SECONDS)
