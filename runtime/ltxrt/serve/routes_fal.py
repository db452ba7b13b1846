# SPDX-License-Identifier: Apache-2.0
"""``/fal/run`` and ``/fal/queue``: the run and queue hosts of fal, as paths of this one.

A client of fal is pointed here with ``FAL_RUN_HOST=HOST/fal/run`` and ``FAL_QUEUE_RUN_HOST=HOST/fal/queue``. It speaks
https only, so a proxy that ends TLS stands in front.
"""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .body import Body, json_body
from .job import Job
from .problems import ProblemError
from .service import base_url, caller, service_of
from .stream import finished
from .submit import Order, idempotency_key, submit
from .views import failure, fal_status, result_url

__all__ = ["router"]

router = APIRouter(tags=["fal queue"])

_APP = "fal-ai/ltx-2.3-quality"
_ENDPOINT = f"{_APP}/audio-to-video"
_QUEUED = f"/fal/queue/{_APP}/requests/{{request_id}}"
_ALIASES = {"audio_url": "input_audio", "image_url": "input_image"}
#: What the hosted endpoint also takes: accepted where it asks for nothing that is not done here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "guidance_scale": (1,),
    "enable_prompt_expansion": (False,),
    "enable_safety_checker": (False,),
    "video_write_mode": ("balanced",),
    "sync_mode": (False,),
}


@router.post(f"/fal/run/{_ENDPOINT}")
async def run(request: Request) -> Response:
    """Make a clip and answer when it is ready."""
    owner = caller(request)
    (job, *_), own = await submit(service_of(request), _order(request, owner, await json_body(request)))
    return _output(request, await finished(request, job, own=own))


@router.post(f"/fal/queue/{_ENDPOINT}")
async def enqueue(request: Request) -> Response:
    """Queue a clip."""
    owner = caller(request)
    if "fal_webhook" in request.query_params:
        raise ProblemError("invalid_params", "fal_webhook: webhooks are not sent", field="fal_webhook")
    (job, *_), _ = await submit(service_of(request), _order(request, owner, await json_body(request)))
    address = f"{base_url(request)}/fal/queue/{_APP}/requests/{job.id}"
    answer = {
        "request_id": job.id,
        "response_url": address,
        "status_url": f"{address}/status",
        "cancel_url": f"{address}/cancel",
        "queue_position": service_of(request).jobs.store.position(job.id),
    }
    return JSONResponse({**answer, "status": "IN_QUEUE"}, headers={"X-Fal-Request-Id": job.id})


@router.get(f"{_QUEUED}/status")
async def status(request: Request, request_id: str) -> Response:
    """How far a queued call is."""
    job = service_of(request).own(caller(request), request_id)
    return JSONResponse(fal_status(request, job, _APP), status_code=200 if job.done else 202)


@router.get(_QUEUED)
async def output(request: Request, request_id: str) -> Response:
    """What a queued call has made."""
    job = service_of(request).own(caller(request), request_id)
    if not job.done:
        raise ProblemError("bad_request", "Request is still in progress")
    return _output(request, job)


@router.put(f"{_QUEUED}/cancel")
async def cancel(request: Request, request_id: str) -> Response:
    """Cancel a queued call."""
    service = service_of(request)
    job = service.own(caller(request), request_id)
    if job.done:
        return JSONResponse({"status": "ALREADY_COMPLETED"}, status_code=400)
    service.jobs.cancel(job.id)
    return JSONResponse({"status": "CANCELLATION_REQUESTED"}, status_code=202)


def _order(request: Request, owner: str, body: Body) -> Order:
    fields = {_ALIASES.get(name, name): value for name, value in body.fields.items()}
    for name, allowed in _NEUTRAL.items():
        if name in fields and fields.pop(name) not in allowed:
            raise ProblemError("invalid_params", f"{name}: only {allowed[0]!r} is done here", field=name)
    return Order(owner=owner, fields=fields, files={}, digest=body.digest, key=idempotency_key(request))


def _output(request: Request, job: Job) -> Response:
    if job.state != "succeeded" or job.result is None:
        raise failure(job)
    video = {
        "url": result_url(request, job),
        "content_type": "video/mp4",
        "file_name": "clip.mp4",
        "file_size": job.result["bytes"],
    }
    answer = {"video": video, "seed": job.request["seed"], "prompt": job.request["prompt"]}
    return JSONResponse(answer, headers={"X-Fal-Request-Id": job.id})
