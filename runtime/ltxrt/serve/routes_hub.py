# SPDX-License-Identifier: Apache-2.0
"""``/api/ai``: the inference hub's shape, the service's first language."""

import asyncio
import base64
import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .body import Body, json_body
from .job import Job
from .model import MODEL_NAMES
from .problems import ProblemError
from .service import caller, service_of
from .sse import hub_events
from .stream import finished, live_response, wants_stream
from .submit import Order, idempotency_key, submit
from .views import hub_generation, result_url, server_timing

__all__ = ["check_model", "router"]

router = APIRouter(tags=["inference hub"])

_ENVELOPE = frozenset(("model", "response_format", "target_namespace", "num_generations"))
_FORMATS = ("url", "b64_json")
_ACTIVE = ("queued", "processing")
_STATES = (*_ACTIVE, "succeeded", "failed", "cancelled")
_MAX_GENERATIONS = 4


@router.post("/api/ai/videos/generate")
async def generate(request: Request) -> Response:
    """Make a clip and answer when it is ready: JSON with its address, or the clip where MP4 is accepted."""
    owner = caller(request)
    body = await json_body(request)
    wanted = body.fields.get("response_format", "url")
    if not (isinstance(wanted, str) and wanted in _FORMATS):
        raise ProblemError("invalid_params", f"response_format: {', '.join(_FORMATS)}", field="response_format")
    if "num_generations" in body.fields:
        raise ProblemError("invalid_params", "num_generations: on the queue only", field="num_generations")
    jobs, own = await submit(service_of(request), _order(request, owner, body))
    del body  # it may be large, and the clip may take long
    if wants_stream(request):
        return await live_response(request, jobs[0], own=own)
    job = await finished(request, jobs[0], own=own)
    if wanted == "url":
        video = {"url": result_url(request, job)}
    else:
        video = {"b64_json": await asyncio.to_thread(_clip_text, request, job)}
    answer = {
        "model": job.model,
        "created": int(time.time()),
        "videos": [video],
        "seed": job.request["seed"],
        "generation_id": job.id,
        "result": job.result,
    }
    return JSONResponse(answer, headers={"Server-Timing": server_timing(job)})


@router.post("/api/ai/queue")
async def enqueue(request: Request) -> Response:
    """Queue one to four clips."""
    owner = caller(request)
    body = await json_body(request)
    count = body.fields.get("num_generations", 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MAX_GENERATIONS:
        raise ProblemError("invalid_params", "num_generations: 1 to 4", field="num_generations")
    jobs, _ = await submit(service_of(request), _order(request, owner, body, generations=count))
    return JSONResponse({"generations": [{"generation_id": job.id, "status": job.state} for job in jobs]})


@router.get("/api/ai/queue")
async def listing(request: Request) -> Response:
    """The caller's jobs, those that are not done unless a status is asked for."""
    owner = caller(request)
    status = request.query_params.get("status")
    if status is not None and status not in _STATES:
        raise ProblemError("invalid_params", f"status: {', '.join(_STATES)}", field="status")
    jobs = service_of(request).jobs.store.of_owner(owner, states=_ACTIVE if status is None else (status,))
    wanted = {"model": request.query_params.get("model"), "media_type": request.query_params.get("media_type")}
    shown = [
        hub_generation(request, job)
        for job in jobs
        if wanted["model"] in (None, job.model) and wanted["media_type"] in (None, "video")
    ]
    return JSONResponse({"count": len(shown), "generations": shown})


@router.get("/api/ai/queue/{generation_id}")
async def one(request: Request, generation_id: str) -> Response:
    """One job."""
    return JSONResponse(hub_generation(request, service_of(request).own(caller(request), generation_id)))


@router.delete("/api/ai/queue/{generation_id}")
async def cancel(request: Request, generation_id: str) -> Response:
    """Cancel a job; one that is done stays as it is."""
    service = service_of(request)
    job = service.own(caller(request), generation_id)
    service.jobs.cancel(job.id)
    return JSONResponse({"status": "success", "generation_id": job.id})


@router.get("/api/ai/models")
async def models(request: Request) -> Response:
    """The model, in a list."""
    caller(request)
    return JSONResponse({"object": "list", "data": [service_of(request).model]})


@router.get("/api/ai/models/search")
async def search(request: Request) -> Response:
    """The model, where what is searched for occurs in its names."""
    caller(request)
    model = service_of(request).model
    wanted = request.query_params.get("search", "").lower()
    named = " ".join(str(model[name]) for name in ("id", "display_name", "summary", "description")).lower()
    return JSONResponse({"object": "list", "data": [model] if wanted in named else []})


@router.get("/api/ai/models/{model_id:path}")
async def model(request: Request, model_id: str) -> Response:
    """The whole model object, with its ``json_request_schema``."""
    caller(request)
    check_model(model_id)
    return JSONResponse(service_of(request).model)


@router.get("/api/events")
async def events(request: Request) -> Response:
    """Server-sent events about all of the caller's jobs."""
    return hub_events(request, caller(request))


def check_model(name: object) -> None:
    """Refuse a model that is not served.

    Raises:
        ProblemError: It is not.
    """
    if name is not None and not (isinstance(name, str) and name in MODEL_NAMES):
        raise ProblemError("resource_not_found", f"Model not found: {str(name)[:100]}", field="model")


def _order(request: Request, owner: str, body: Body, generations: int = 1) -> Order:
    check_model(body.fields.get("model"))
    fields = {name: value for name, value in body.fields.items() if name not in _ENVELOPE}
    return Order(
        owner=owner,
        fields=fields,
        files={},
        digest=body.digest,
        key=idempotency_key(request),
        generations=generations,
    )


def _clip_text(request: Request, job: Job) -> str:
    clip = service_of(request).jobs.clip(job)
    if clip is None:
        raise ProblemError("resource_not_found", "the clip has expired")
    return base64.b64encode(clip.read_bytes()).decode()
