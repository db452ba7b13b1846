# SPDX-License-Identifier: Apache-2.0
"""The one model that a server has, as the models endpoints show it, and its request's JSON schema."""

from typing import Any

from ..request import Request

__all__ = ["MODEL_ID", "MODEL_NAMES", "json_request_schema", "model_object"]

MODEL_ID = "ltx-2-3-quality-audio-to-video"
#: Names under which callers may ask for it.
MODEL_NAMES = frozenset((MODEL_ID, "fal-ai/ltx-2.3-quality/audio-to-video"))

_BASIC = ("prompt", "input_audio", "input_image")
_RENDER = {"input_audio": "audio-url", "input_image": "image-url"}


def json_request_schema() -> dict[str, Any]:
    """The request's JSON schema, with the extension keys that a page draws its form from."""
    schema = Request.model_json_schema()
    for name, render in _RENDER.items():
        schema["properties"][name] |= {"renderType": render, "format": "uri"}
    return {**schema, "basic": list(_BASIC), "x-order": list(Request.model_fields)}


def model_object(bundle_name: str, created: int) -> dict[str, Any]:
    """The whole model object.

    Args:
        bundle_name: Name of the model in the bundle that is served.
        created: Unix seconds.
    """
    schema = json_request_schema()
    return {
        "id": MODEL_ID,
        "object": "model",
        "created": created,
        "owned_by": "ltxrt",
        "display_name": "LTX-2.3 audio to video",
        "summary": "Motion that follows the supplied audio.",
        "description": "Sound, a prompt and a first frame in; a clip whose lips and gestures follow the sound out.",
        "model_type": "base",
        "endpoint": "/videos/generate",
        "capabilities": {"input": ["text", "audio", "image"], "output": ["video"]},
        "pricing": None,
        "fine_tuning": None,
        "deployments": [],
        "developer": {"name": "ltxrt", "logo": None},
        "source_model": bundle_name,
        "image_url": None,
        "released_at": None,
        "request_schema": schema,
        "json_request_schema": schema,
    }
