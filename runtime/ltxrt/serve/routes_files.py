# SPDX-License-Identifier: Apache-2.0
"""Results by their unguessable addresses, and uploads ahead of a request."""

import hmac

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .problems import ProblemError
from .service import caller, service_of
from .stream import clip_response

__all__ = ["router"]

router = APIRouter(tags=["files"])


@router.get("/files/{job_id}/{token}/clip.mp4")
@router.head("/files/{job_id}/{token}/clip.mp4")
async def result(request: Request, job_id: str, token: str) -> Response:
    """A finished clip. The address is its key, so that a player or a download tool can use it."""
    job = service_of(request).jobs.store.get(job_id)
    given = token.encode("utf-8", "surrogateescape")
    if job is None or not hmac.compare_digest(given, job.result_token.encode()) or job.state != "succeeded":
        raise ProblemError("resource_not_found", "there is no such clip (any more)")
    return clip_response(request, job)


@router.post("/v1/uploads", status_code=201)
async def upload(request: Request) -> Response:
    """Take a file, the body as it is, for ``input_audio`` or ``input_image`` of a later request."""
    owner = caller(request)
    service = service_of(request)
    if service.inputs.shelf.full:
        wait = {"Retry-After": str(service.jobs.seconds_until_free())}
        raise ProblemError("uploads_full", "try again later", headers=wait)
    limits = service.inputs.limits
    most = max(limits.audio_bytes, limits.image_bytes)
    address, path = service.inputs.shelf.new(owner)
    received, whole = 0, False
    try:
        with path.open("xb") as file:
            async for piece in request.stream():
                received += len(piece)
                if received > most:
                    raise ProblemError("body_too_large", f"at most {most} bytes are read")
                file.write(piece)
        whole = received > 0
    finally:
        if not whole:
            path.unlink(missing_ok=True)
    if not whole:
        raise ProblemError("bad_request", "the body is empty")
    return JSONResponse({"url": address, "bytes": received}, 201)
