# SPDX-License-Identifier: Apache-2.0
"""What the server answers, as JSON schemas."""

from typing import Any

__all__ = ["SCHEMAS"]

Json = dict[str, Any]

_TEXT: Json = {"type": "string"}
_NUMBER: Json = {"type": "number"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_TRUTH: Json = {"type": "boolean"}
_OBJECT: Json = {"type": "object"}


def _maybe(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _all(**properties: Json) -> Json:
    """An object that has all of these, and perhaps more."""
    return {"type": "object", "properties": properties, "required": sorted(properties)}


def _many(schema: Json) -> Json:
    return {"type": "array", "items": schema}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


_STATE: Json = {"enum": ["queued", "processing", "succeeded", "failed", "cancelled"]}
_SHARE: Json = {"type": "number", "minimum": 0, "maximum": 1}
_PROGRESS: dict[str, Json] = {
    "stage": _maybe(_TEXT),
    "step": _COUNT,
    "steps": _COUNT,
    "seconds_left": _maybe(_NUMBER),
    "queue_position": _maybe(_COUNT),
    "result": _maybe(_OBJECT),
}
_PROBLEM: dict[str, Json] = {
    "type": {"type": "string", "pattern": "^urn:ltxrt:problem:[a-z_]+$"},
    "title": _TEXT,
    "status": {"type": "integer", "minimum": 400, "maximum": 599},
    "detail": _TEXT,
    "request_id": _TEXT,
}

#: By the names under which ``contract.py`` refers to them.
SCHEMAS: dict[str, Json] = {
    "Generated": _all(
        model=_TEXT,
        created=_COUNT,
        videos={
            **_many({"anyOf": [_all(url={"type": "string", "format": "uri"}), _all(b64_json=_TEXT)]}),
            "minItems": 1,
        },
        seed=_COUNT,
        generation_id=_TEXT,
        result=_OBJECT,
    ),
    "Enqueued": _all(generations={**_many(_all(generation_id=_TEXT, status=_STATE)), "minItems": 1, "maxItems": 4}),
    "Generation": _all(
        generation_id=_TEXT,
        model_name=_TEXT,
        prompt=_TEXT,
        media_type={"const": "video"},
        status=_STATE,
        result_url=_maybe({"type": "string", "format": "uri"}),
        error_message=_maybe(_TEXT),
        enqueued_at=_COUNT,
        started_at=_maybe(_COUNT),
        completed_at=_maybe(_COUNT),
        seed=_COUNT,
        progress=_SHARE,
        **_PROGRESS,
    ),
    "Generations": _all(count=_COUNT, generations=_many(_ref("Generation"))),
    "Cancelled": _all(status={"const": "success"}, generation_id=_TEXT),
    "Model": _all(
        id=_TEXT,
        object={"const": "model"},
        created=_COUNT,
        owned_by=_TEXT,
        display_name=_TEXT,
        endpoint=_TEXT,
        capabilities=_all(input=_many(_TEXT), output=_many(_TEXT)),
        request_schema=_OBJECT,
        json_request_schema=_OBJECT,
    ),
    "Models": _all(object={"const": "list"}, data=_many(_ref("Model"))),
    "Video": _all(
        id=_TEXT,
        object={"const": "video"},
        model=_TEXT,
        status={"enum": ["queued", "in_progress", "completed", "failed"]},
        progress={"type": "integer", "minimum": 0, "maximum": 100},
        created_at=_COUNT,
        completed_at=_maybe(_COUNT),
        expires_at=_maybe(_COUNT),
        prompt=_TEXT,
        size=_maybe({"type": "string", "pattern": "^[0-9]+x[0-9]+$"}),
        seconds=_maybe(_TEXT),
        seed=_COUNT,
        error=_maybe(_all(code=_TEXT, message=_TEXT)),
        **_PROGRESS,
    ),
    "Videos": _all(
        object={"const": "list"},
        data=_many(_ref("Video")),
        first_id=_maybe(_TEXT),
        last_id=_maybe(_TEXT),
        has_more=_TRUTH,
    ),
    "Deleted": _all(id=_TEXT, object={"const": "video.deleted"}, deleted={"const": True}),
    "Upload": _all(url={"type": "string", "pattern": "^upload://"}, bytes={"type": "integer", "minimum": 1}),
    "FalOutput": _all(
        video=_all(
            url={"type": "string", "format": "uri"},
            content_type={"const": "video/mp4"},
            file_name=_TEXT,
            file_size={"type": "integer", "minimum": 1},
        ),
        seed=_COUNT,
        prompt=_TEXT,
    ),
    "FalQueued": _all(
        request_id=_TEXT,
        response_url=_TEXT,
        status_url=_TEXT,
        cancel_url=_TEXT,
        queue_position=_COUNT,
        status={"const": "IN_QUEUE"},
    ),
    "FalStatus": _all(
        request_id=_TEXT,
        response_url=_TEXT,
        logs=_many(_OBJECT),
        status={"enum": ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]},
    ),
    "FalCancel": _all(status={"const": "CANCELLATION_REQUESTED"}),
    "Status": _all(status=_TEXT),
    "Version": _all(ltxrt=_TEXT, model=_TEXT),
    "Problem": _all(**_PROBLEM),
    "OpenAIProblem": _all(**_PROBLEM, error=_all(message=_TEXT, type=_TEXT, param=_maybe(_TEXT), code=_TEXT)),
    "HubProblem": _all(
        error=_all(type=_TEXT, title=_TEXT, detail=_TEXT, message=_TEXT),
        status={"const": "error"},
        status_message=_TEXT,
        request_id=_TEXT,
    ),
    "FalInvalid": _all(detail=_many(_all(loc=_many(_TEXT), msg=_TEXT, type=_TEXT))),
    "FalProblem": {
        "anyOf": [_all(detail=_TEXT, error_type=_TEXT), _all(status={"const": "ALREADY_COMPLETED"})],
    },
}
