# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document: what every route takes and answers, refusals included.

Routes read their requests themselves, so that each API is refused in its own words; FastAPI therefore knows little
more of them than their paths. The rest is here, as one table, and a test holds the server to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from .contract_bodies import fal_body, hub_body, openai_body
from .contract_schemas import SCHEMAS
from .problems import PROBLEMS

__all__ = ["OPERATIONS", "Operation", "openapi_document"]

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What one route takes and answers.

    Attributes:
        success: Status to media type to name of a schema; None where the body is bytes.
        refusals: Keys of ``PROBLEMS``.
        body: ``requestBody``.
        parameters: Query and header parameters, beyond those in the path.
        open: Whether no key is needed.
    """

    success: Mapping[int, Mapping[str, str | None]]
    refusals: tuple[str, ...] = ()
    body: Json | None = None
    parameters: tuple[Json, ...] = field(default=())
    open: bool = False


def _parameter(where: str, name: str, description: str, **schema: Any) -> Json:
    return {"name": name, "in": where, "description": description, "required": False, "schema": schema}


def _json(name: str, status: int = 200) -> dict[int, dict[str, str | None]]:
    return {status: {"application/json": name}}


_MP4 = {200: {"video/mp4": None}}
_EVENTS = {200: {"text/event-stream": None}}
_KEY = _parameter("header", "Idempotency-Key", "The same call again gives the same jobs.", type="string", minLength=1)
_LAST = _parameter("header", "Last-Event-ID", "Go on after this event.", type="string", pattern="^[0-9]{1,18}$")
_STATES = ["queued", "processing", "succeeded", "failed", "cancelled"]
_MODEL = _parameter("query", "model", "Only jobs of this model.", type="string")
_HUB_FILTERS = (
    _parameter("query", "status", "Only jobs in this state, where not given those not done.", enum=_STATES),
    _MODEL,
    _parameter("query", "media_type", "Only jobs of this kind.", type="string"),
)
_PAGES = (
    _parameter("query", "after", "Go on after this video.", type="string"),
    _parameter("query", "limit", "Length of a page.", type="integer", minimum=1, maximum=100),
    _parameter("query", "order", "By time.", enum=["asc", "desc"]),
)
_SUBMIT = (
    *(
        "bad_request",
        "resource_not_found",
        "body_too_slow",
        "body_too_large",
        "unsupported_media_type",
        "invalid_params",
    ),
    *("invalid_media", "idempotency_mismatch", "too_many_jobs", "queue_full", "draining"),
)
_WAIT = (*_SUBMIT, "cancelled", "generation_failed")
_OPENAI = openai_body(("application/json", "multipart/form-data"))
_EVERYWHERE = ("unauthenticated", "foreign_page", "store_unavailable")  # but on open routes
_VIDEO, _GONE = _json("Video"), ("resource_not_found",)
_QUEUED = "/fal/queue/fal-ai/ltx-2.3-quality/requests/{request_id}"
_ENDPOINT = "fal-ai/ltx-2.3-quality/audio-to-video"

#: Method and path to what is there.
OPERATIONS: dict[tuple[str, str], Operation] = {
    ("post", "/api/ai/videos/generate"): Operation(
        success={200: {"application/json": "Generated", "video/mp4": None}},
        refusals=_WAIT,
        body=hub_body("response_format"),
        parameters=(_KEY,),
    ),
    ("post", "/api/ai/queue"): Operation(
        success=_json("Enqueued"),
        refusals=_SUBMIT,
        body=hub_body("response_format", "num_generations"),
        parameters=(_KEY,),
    ),
    ("get", "/api/ai/queue"): Operation(
        success=_json("Generations"), refusals=("invalid_params",), parameters=_HUB_FILTERS
    ),
    ("get", "/api/ai/queue/{generation_id}"): Operation(success=_json("Generation"), refusals=_GONE),
    ("delete", "/api/ai/queue/{generation_id}"): Operation(success=_json("Cancelled"), refusals=_GONE),
    ("get", "/api/ai/models"): Operation(success=_json("Models")),
    ("get", "/api/ai/models/search"): Operation(
        success=_json("Models"), parameters=(_parameter("query", "search", "Part of a name.", type="string"),)
    ),
    ("get", "/api/ai/models/{model_id}"): Operation(success=_json("Model"), refusals=_GONE),
    ("get", "/api/events"): Operation(success=_EVENTS, refusals=("bad_request",), parameters=(_LAST,)),
    ("post", "/v1/videos"): Operation(success=_VIDEO, refusals=_SUBMIT, body=_OPENAI, parameters=(_KEY,)),
    ("post", "/v1/videos/sync"): Operation(success=_MP4, refusals=_WAIT, body=_OPENAI, parameters=(_KEY,)),
    ("post", "/v1/videos/stream"): Operation(success=_MP4, refusals=_WAIT, body=_OPENAI, parameters=(_KEY,)),
    ("get", "/v1/videos"): Operation(success=_json("Videos"), refusals=("invalid_params",), parameters=_PAGES),
    ("get", "/v1/videos/{video_id}"): Operation(success=_VIDEO, refusals=_GONE),
    ("delete", "/v1/videos/{video_id}"): Operation(success=_json("Deleted"), refusals=_GONE),
    ("post", "/v1/videos/{video_id}/cancel"): Operation(success=_VIDEO, refusals=_GONE),
    ("get", "/v1/videos/{video_id}/events"): Operation(
        success=_EVENTS, refusals=("bad_request", *_GONE), parameters=(_LAST,)
    ),
    ("get", "/v1/videos/{video_id}/content"): Operation(
        success={**_MP4, 206: {"video/mp4": None}},
        refusals=("not_finished", "invalid_params", *_GONE),
        parameters=(_parameter("query", "variant", "What of it.", enum=["video"]),),
    ),
    ("get", "/v1/models"): Operation(success=_json("Models")),
    ("post", "/v1/uploads"): Operation(
        success=_json("Upload", 201),
        refusals=("bad_request", "body_too_slow", "body_too_large", "uploads_full"),
        body={"required": True, "content": {"application/octet-stream": {}}},
    ),
    ("get", "/files/{job_id}/{token}/clip.mp4"): Operation(
        success={**_MP4, 206: {"video/mp4": None}}, refusals=("not_finished", "store_unavailable", *_GONE), open=True
    ),
    ("head", "/files/{job_id}/{token}/clip.mp4"): Operation(
        success=_MP4, refusals=("store_unavailable", *_GONE), open=True
    ),
    ("post", f"/fal/run/{_ENDPOINT}"): Operation(
        success=_json("FalOutput"), refusals=_WAIT, body=fal_body(), parameters=(_KEY,)
    ),
    ("post", f"/fal/queue/{_ENDPOINT}"): Operation(
        success=_json("FalQueued"), refusals=_SUBMIT, body=fal_body(), parameters=(_KEY,)
    ),
    ("get", f"{_QUEUED}/status"): Operation(
        success={200: {"application/json": "FalStatus"}, 202: {"application/json": "FalStatus"}}, refusals=_GONE
    ),
    ("get", _QUEUED): Operation(
        success=_json("FalOutput"), refusals=("bad_request", "cancelled", "generation_failed", *_GONE)
    ),
    ("put", f"{_QUEUED}/cancel"): Operation(success=_json("FalCancel", 202), refusals=("bad_request", *_GONE)),
    ("get", "/health"): Operation(success=_json("Status"), open=True),
    ("get", "/ready"): Operation(
        success=_json("Status"), refusals=("draining", "not_ready", "store_unavailable"), open=True
    ),
    ("get", "/metrics"): Operation(success={200: {"text/plain": None}}),
    ("get", "/version"): Operation(success=_json("Version")),
}


def openapi_document(app: FastAPI) -> Json:
    """The document of an application, whole; made once.

    Args:
        app: With all its routes.
    """
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        made["components"] = {
            "schemas": SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "Off with no_auth."}},
        }
        for (method, path), operation in OPERATIONS.items():
            item: Json = made["paths"][path]
            item[method] = _described(path, item[method], operation)
        app.openapi_schema = made
    return app.openapi_schema


def _described(path: str, made: Json, operation: Operation) -> Json:
    kept = {name: made[name] for name in ("tags", "summary", "description", "operationId") if name in made}
    parameters = [*made.get("parameters", []), *operation.parameters]
    responses = {str(status): _answer("Done", content) for status, content in operation.success.items()}
    refusals = operation.refusals if operation.open else (*operation.refusals, *_EVERYWHERE)
    for kind in sorted(refusals, key=lambda kind: PROBLEMS[kind][0]):
        status, title = PROBLEMS[kind]
        refusal = responses.setdefault(str(status), _refusal(path, status))
        if refusal["description"] != "Done":
            refusal["description"] = f"{refusal['description']}; {title}".removeprefix("; ")
    described = {**kept, "parameters": parameters, "responses": dict(sorted(responses.items()))}
    if operation.body is not None:
        described["requestBody"] = operation.body
    described["security"] = [] if operation.open else [{"key": []}]
    return described


def _answer(description: str, content: Mapping[str, str | None]) -> Json:
    schemas = {
        media_type: {} if name is None else {"schema": {"$ref": f"#/components/schemas/{name}"}}
        for media_type, name in content.items()
    }
    return {"description": description, "content": schemas}


def _refusal(path: str, status: int) -> Json:
    """A refusal as ``problem_response`` words it for this path."""
    if path.startswith("/api/"):
        return _answer("", {"application/json": "HubProblem"})
    if path.startswith("/fal/"):
        return _answer("", {"application/json": "FalInvalid" if status == 422 else "FalProblem"})
    return _answer("", {"application/problem+json": "OpenAIProblem" if path.startswith("/v1/") else "Problem"})
