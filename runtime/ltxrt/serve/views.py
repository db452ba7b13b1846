# SPDX-License-Identifier: Apache-2.0
"""A job as each API shows it."""

from typing import Any

from starlette.requests import Request

from .job import Job
from .problems import ProblemError
from .service import base_url, service_of

__all__ = ["failure", "fal_status", "hub_generation", "openai_video", "result_url", "server_timing"]

_OPENAI_STATES = {
    "queued": "queued",
    "processing": "in_progress",
    "succeeded": "completed",
    "failed": "failed",
    "cancelled": "failed",
}


def result_url(request: Request, job: Job) -> str | None:
    """Where the finished clip is; two unguessable parts stand in for a key."""
    if job.state != "succeeded":
        return None
    return f"{base_url(request)}/files/{job.id}/{job.result_token}/clip.mp4"


def hub_generation(request: Request, job: Job) -> dict[str, Any]:
    """The inference hub's generation object, with the caller's fields at the same level."""
    return {
        **job.echo,
        "generation_id": job.id,
        "model_name": job.model,
        "media_type": "video",
        "status": job.state,
        "result_url": result_url(request, job),
        "error_message": job.error_message,
        "enqueued_at": int(job.created_at),
        "started_at": None if job.started_at is None else int(job.started_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        **_progress(request, job),
        "result": job.result,
    }


def openai_video(request: Request, job: Job) -> dict[str, Any]:
    """The video object of ``/v1/videos``."""
    result = job.result or {}
    error = None
    if job.state == "failed":
        error = {"code": job.error_type, "message": job.error_message}
    elif job.state == "cancelled":
        error = {"code": "cancelled", "message": "the job was cancelled"}
    progress = _progress(request, job)
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": _OPENAI_STATES[job.state],
        "progress": 100 if job.state == "succeeded" else int(100 * job.progress),
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        "expires_at": None if job.expires_at is None else int(job.expires_at),
        "prompt": job.echo["prompt"],
        "size": f"{result['width']}x{result['height']}" if result else None,
        "seconds": f"{result['duration_seconds']:.6g}" if result else None,
        "seed": job.echo["seed"],
        "error": error,
        "remixed_from_video_id": None,
        "queue_position": progress["queue_position"],
        "stage": job.stage,
        "step": job.step,
        "steps": job.steps,
        "seconds_left": job.seconds_left,
        "result": job.result,
    }


def fal_status(request: Request, job: Job, app: str) -> dict[str, Any]:
    """The state of a queued call in fal's words."""
    response_url = f"{base_url(request)}/fal/queue/{app}/requests/{job.id}"
    shown: dict[str, Any] = {"request_id": job.id, "response_url": response_url, "logs": []}
    if job.state == "queued":
        return {**shown, "status": "IN_QUEUE", "queue_position": service_of(request).jobs.store.position(job.id)}
    if job.state == "processing":
        message = f"{job.stage or 'start'} {job.step}/{job.steps}"
        return {**shown, "status": "IN_PROGRESS", "logs": [{"message": message, "level": "INFO"}]}
    metrics = {} if job.result is None else {"inference_time": job.result["wall_seconds"]}
    done = {**shown, "status": "COMPLETED", "metrics": metrics}
    if job.state == "succeeded":
        return done
    problem = failure(job)
    return {**done, "error": problem.detail, "error_type": problem.kind}


def failure(job: Job) -> ProblemError:
    """Why a job that has ended has no clip."""
    if job.state == "cancelled":
        return ProblemError("cancelled", "the job was cancelled")
    if job.error_type in ("invalid_media", "invalid_params"):
        return ProblemError(job.error_type, job.error_message or "")
    return ProblemError("generation_failed", f"{job.error_type}: {job.error_message}")


def server_timing(job: Job) -> str:
    """The ``Server-Timing`` header of a finished clip: waiting, then every stage, in milliseconds."""
    spans = {"queue": (job.started_at or job.created_at) - job.created_at}
    if job.result is not None:
        spans |= job.result["stage_seconds"]
    return ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in spans.items())


def _progress(request: Request, job: Job) -> dict[str, Any]:
    waits = job.state == "queued"
    return {
        "stage": job.stage,
        "step": job.step,
        "steps": job.steps,
        "progress": 1.0 if job.state == "succeeded" else job.progress,
        "seconds_left": job.seconds_left,
        "queue_position": service_of(request).jobs.store.position(job.id) if waits else None,
    }
