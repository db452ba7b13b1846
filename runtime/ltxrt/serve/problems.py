# SPDX-License-Identifier: Apache-2.0
"""What is refused, in the words of the API that was asked; everywhere else RFC 9457 problem details."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

__all__ = ["PROBLEMS", "ProblemError", "problem_response"]

#: Stable types, their status and title.
PROBLEMS: dict[str, tuple[int, str]] = {
    "bad_request": (400, "The request cannot be read"),
    "unauthenticated": (401, "A valid key is required"),
    "foreign_page": (403, "A page of another site may not call a server without keys"),
    "resource_not_found": (404, "There is no such thing"),
    "method_not_allowed": (405, "The method is not allowed here"),
    "body_too_slow": (408, "The body comes too slowly"),
    "not_finished": (409, "The clip is not finished"),
    "body_too_large": (413, "The body is too large"),
    "unsupported_media_type": (415, "The body's type is not read here"),
    "invalid_params": (422, "A field is refused"),
    "invalid_media": (422, "The audio or image is refused"),
    "idempotency_mismatch": (422, "The idempotency key was used for another request"),
    "too_many_jobs": (429, "Too many unfinished jobs of this key"),
    "client_closed": (499, "The caller went away"),
    "generation_failed": (500, "The clip could not be made"),
    "cancelled": (499, "The job was cancelled"),
    "internal_error": (500, "The server has failed"),
    "queue_full": (503, "Too many jobs wait"),
    "uploads_full": (503, "Too many uploads lie ready"),
    "draining": (503, "The server is about to end"),
    "store_unavailable": (503, "The job store does not answer"),
    "not_ready": (503, "The server is not ready"),
}


class ProblemError(Exception):
    """A refusal.

    Args:
        kind: A key of ``PROBLEMS``.
        detail: What exactly, in one line.
        field: Field of the request that it is about.
        headers: Further headers of the answer.
    """

    def __init__(
        self, kind: str, detail: str, *, field: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.field = kind, detail, field
        self.status, self.title = PROBLEMS[kind]
        self.headers = dict(headers or {})


def problem_response(path: str, problem: ProblemError, request_id: str) -> JSONResponse:
    """The answer, in the shape of the API that the path belongs to."""
    plain = _details(problem, request_id)
    media_type = "application/problem+json"
    if path.startswith("/api/"):
        media_type = "application/json"
        error = {"type": problem.kind, "title": problem.title, "detail": problem.detail, "message": problem.detail}
        body = {"error": error, "status": "error", "status_message": problem.kind, "request_id": request_id}
    elif path.startswith("/fal/"):
        media_type = "application/json"
        body = _fal(problem)
    elif path.startswith("/v1/"):
        error = {"message": problem.detail, "type": problem.kind, "param": problem.field, "code": problem.kind}
        body = {**plain, "error": error}
    else:
        body = plain
    headers = {**problem.headers, **({"WWW-Authenticate": "Bearer"} if problem.status == 401 else {})}
    if path.startswith("/fal/"):
        headers["X-Fal-Error-Type"] = problem.kind
    return JSONResponse(body, problem.status, headers, media_type)


def _details(problem: ProblemError, request_id: str) -> dict[str, Any]:
    details: dict[str, Any] = {
        "type": f"urn:ltxrt:problem:{problem.kind}",
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
        "request_id": request_id,
    }
    if problem.field is not None:
        details["errors"] = [{"pointer": f"/{problem.field}", "detail": problem.detail}]
    return details


def _fal(problem: ProblemError) -> dict[str, Any]:
    if problem.status == 422:
        loc = ["body", problem.field] if problem.field else ["body"]
        return {"detail": [{"loc": loc, "msg": problem.detail, "type": problem.kind}]}
    return {"detail": problem.detail, "error_type": problem.kind}
