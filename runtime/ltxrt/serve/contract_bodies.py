# SPDX-License-Identifier: Apache-2.0
"""What callers send, as JSON schemas: the request of the model, and what each API adds around it."""

from copy import deepcopy
from typing import Any

from .model import MODEL_NAMES, json_request_schema

__all__ = ["fal_body", "hub_body", "openai_body"]

Json = dict[str, Any]

_WRITTEN_SIZE: Json = {"type": "string", "pattern": r"^[0-9]{1,5}\s*[xX]\s*[0-9]{1,5}$"}
_TEXT: Json = {"type": "string", "minLength": 1}
_MODEL: Json = {"anyOf": [{"enum": sorted(MODEL_NAMES)}, {"type": "null"}]}
_ENVELOPE: dict[str, Json] = {
    "response_format": {"enum": ["url", "b64_json"], "default": "url"},
    "num_generations": {"type": "integer", "minimum": 1, "maximum": 4, "default": 1},
}


def hub_body(*envelope: str) -> Json:
    """The inference hub's body: the request's fields beside the envelope's."""
    schema = _request()
    schema["properties"] |= {"model": _MODEL, "target_namespace": {}, **{name: _ENVELOPE[name] for name in envelope}}
    return _body(schema, "application/json")


def fal_body() -> Json:
    """fal's body: two fields under other names, and what its hosted endpoint also takes."""
    schema = _request()
    audio, image = (schema["properties"][name] for name in ("input_audio", "input_image"))
    schema["properties"] |= {
        "audio_url": audio,
        "image_url": image,
        "guidance_scale": {"enum": [1]},
        "enable_prompt_expansion": {"enum": [False]},
        "enable_safety_checker": {"enum": [False]},
        "video_write_mode": {"enum": ["balanced"]},
        "sync_mode": {"enum": [False]},
    }
    schema["required"] = ["prompt"]
    schema["anyOf"] = [{"required": ["audio_url"]}, {"required": ["input_audio"]}]
    return _body(schema, "application/json")


def openai_body(media_types: tuple[str, ...]) -> Json:
    """The body of ``/v1/videos``; in forms every value is text or a file, and is read for what it stands for."""
    schema = _request()
    reference: Json = {"anyOf": [_TEXT, {"type": "object"}]}
    properties: Json = schema["properties"]
    properties |= {
        "model": _MODEL,
        "size": properties["resolution"],
        "fps": properties["frames_per_second"],
        "seconds": {"anyOf": [_TEXT, {"type": "number"}]},
        "width": {"type": "integer"},
        "height": {"type": "integer"},
        "input_reference": reference,
        "image_reference": reference,
        "audio_reference": reference,
    }
    schema["required"] = ["prompt"]
    schema["anyOf"] = [{"required": ["audio_reference"]}, {"required": ["input_audio"]}]
    return _body(schema, *media_types)


def _request() -> Json:
    """The request's schema with the spellings that only its validators know, and without references."""
    schema = deepcopy(json_request_schema())
    size = schema.pop("$defs")["Size"]
    properties: Json = schema["properties"]
    named = properties["resolution"]["anyOf"][0]
    properties["resolution"]["anyOf"] = [named, _WRITTEN_SIZE, size]
    properties["seed"]["anyOf"].append({"const": -1})
    return schema


def _body(schema: Json, *media_types: str) -> Json:
    return {"required": True, "content": {media_type: {"schema": schema} for media_type in media_types}}
