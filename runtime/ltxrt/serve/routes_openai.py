# SPDX-License-Identifier: Apache-2.0
"""``/v1/videos``: the OpenAI shape, JSON or forms, and what open servers have added to it."""

import json
from typing import Any, cast

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .body import Body, read_body
from .job import Job
from .problems import ProblemError
from .routes_hub import check_model
from .service import caller, service_of
from .sse import job_events
from .stream import clip_response, finished, live_response, wants_stream
from .submit import Order, idempotency_key, submit
from .views import openai_video, server_timing

__all__ = ["router"]

router = APIRouter(tags=["OpenAI videos"])

_POLL = {"openai-poll-after-ms": "500"}
_MAX_PAGE = 100
_ORDERS = ("asc", "desc")
_ALIASES = {"size": "resolution", "fps": "frames_per_second"}
_REFERENCES = {
    "input_reference": ("input_image", "image_url"),
    "image_reference": ("input_image", "image_url"),
    "audio_reference": ("input_audio", "audio_url"),
}


@router.post("/v1/videos")
async def create(request: Request) -> Response:
    """Queue a clip."""
    job, _ = await _submitted(request)
    return JSONResponse(openai_video(request, job), headers=_POLL)


@router.post("/v1/videos/sync")
async def create_and_wait(request: Request) -> Response:
    """Make a clip and answer with its bytes when it is ready; as a stream where only MP4 is accepted."""
    job, own = await _submitted(request)
    if wants_stream(request):
        return await live_response(request, job, own=own)
    done = await finished(request, job, own=own)
    headers = {"Server-Timing": server_timing(done), "X-Job-Id": done.id, "X-Seed": str(done.request["seed"])}
    if done.result is not None:
        headers["x-inference-time-s"] = str(done.result["wall_seconds"])
    return clip_response(request, done, headers)


@router.post("/v1/videos/stream")
async def create_and_stream(request: Request) -> Response:
    """Make a clip and send it, as a fragmented MP4, while it is made."""
    job, own = await _submitted(request)
    return await live_response(request, job, own=own)


@router.get("/v1/videos")
async def listing(request: Request) -> Response:
    """The caller's jobs, newest first unless ``order=asc``."""
    query = request.query_params
    jobs = service_of(request).jobs.store.of_owner(caller(request))
    order = query.get("order", "desc")
    if order not in _ORDERS:
        raise ProblemError("invalid_params", f"order: {', '.join(_ORDERS)}", field="order")
    if order == "asc":
        jobs.reverse()
    after = query.get("after")
    if after is not None:
        ids = [job.id for job in jobs]
        jobs = jobs[ids.index(after) + 1 :] if after in ids else []
    text = query.get("limit", "20")
    limit = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else 0
    if not 1 <= limit <= _MAX_PAGE:
        raise ProblemError("invalid_params", f"limit: 1 to {_MAX_PAGE}", field="limit")
    page = [openai_video(request, job) for job in jobs[:limit]]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return JSONResponse({"object": "list", "data": page, **ends, "has_more": len(jobs) > limit})


@router.get("/v1/videos/{video_id}")
async def one(request: Request, video_id: str) -> Response:
    """One job."""
    return JSONResponse(openai_video(request, service_of(request).own(caller(request), video_id)), headers=_POLL)


@router.get("/v1/videos/{video_id}/content")
async def content(request: Request, video_id: str) -> Response:
    """The clip; ranges are served."""
    variant = request.query_params.get("variant", "video")
    if variant != "video":
        raise ProblemError("invalid_params", "variant: video", field="variant")
    return clip_response(request, service_of(request).own(caller(request), video_id))


@router.get("/v1/videos/{video_id}/events")
async def events(request: Request, video_id: str) -> Response:
    """Server-sent events about one job."""
    return job_events(request, service_of(request).own(caller(request), video_id))


@router.post("/v1/videos/{video_id}/cancel")
async def cancel(request: Request, video_id: str) -> Response:
    """Cancel a job and keep its record."""
    service = service_of(request)
    job = service.jobs.cancel(service.own(caller(request), video_id).id)
    assert job is not None  # it was there a moment ago
    return JSONResponse(openai_video(request, job))


@router.delete("/v1/videos/{video_id}")
async def delete(request: Request, video_id: str) -> Response:
    """Cancel a job where it is not done, and let go of its clip."""
    service = service_of(request)
    job = service.own(caller(request), video_id)
    service.jobs.discard(job.id)
    return JSONResponse({"id": job.id, "deleted": True, "object": "video.deleted"})


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The model, in a list."""
    caller(request)
    return JSONResponse({"object": "list", "data": [service_of(request).model]})


async def _submitted(request: Request) -> tuple[Job, bool]:
    owner = caller(request)
    try:
        body = await read_body(request)
        check_model(body.fields.pop("model", None))
        jobs, own = await submit(service_of(request), _order(request, owner, body))
    finally:
        await request.close()  # a form's files, which are not needed while the clip is made
    return jobs[0], own


def _order(request: Request, owner: str, body: Body) -> Order:
    fields = {_ALIASES.get(name, name): value for name, value in body.fields.items()}
    files = dict(body.files)
    for name, (field, key) in _REFERENCES.items():
        if name in files:
            files[field] = files.pop(name)
        if name in fields:
            fields[field] = _reference(fields.pop(name), name, key)
    if "seconds" in fields:
        fields |= _length(fields.pop("seconds"), fields.get("frames_per_second", 24))
    if {"width", "height"} <= fields.keys():
        fields["resolution"] = {"width": fields.pop("width"), "height": fields.pop("height")}
    unknown = sorted(files.keys() - {"input_audio", "input_image"})
    if unknown:
        raise ProblemError("invalid_params", f"{unknown[0][:60]}: no such file part", field=unknown[0][:60])
    return Order(owner=owner, fields=fields, files=files, digest=body.digest, key=idempotency_key(request))


def _reference(value: Any, name: str, key: str) -> Any:
    """An address, or an object (also as JSON text) that holds it under ``key``."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ProblemError("invalid_params", f"{name}: broken JSON", field=name) from error
    return cast("dict[str, Any]", value).get(key) if isinstance(value, dict) else value


def _length(seconds: Any, rate: Any) -> dict[str, Any]:
    """Seconds as a number of frames."""
    try:
        frames = round(float(seconds) * float(rate))
    except (TypeError, ValueError, OverflowError) as error:
        raise ProblemError("invalid_params", "seconds: a number", field="seconds") from error
    return {"num_frames": frames, "match_audio_length": False}
