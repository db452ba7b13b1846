# SPDX-License-Identifier: Apache-2.0
"""Bodies as flat fields and files: JSON as it is, forms with their strings read for what they stand for."""

import asyncio
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from starlette.datastructures import UploadFile
from starlette.requests import Request

from .problems import ProblemError
from .service import service_of

__all__ = ["Body", "json_body", "read_body"]

_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_MAX_FILES, _MAX_FIELDS = 4, 64
_CHUNK_BYTES = 1 << 20
_LARGE_BYTES = 1 << 20  # a body that the event loop should not wait for
_TEXTS = frozenset(("prompt", "negative_prompt", "model", "size", "seconds"))


@dataclass(slots=True)
class Body:
    """What a caller sent.

    Attributes:
        fields: By name.
        files: File parts by name.
        digest: SHA-256 of all of it, the same for the same fields and files.
    """

    fields: dict[str, Any]
    files: dict[str, BinaryIO] = field(default_factory=dict[str, BinaryIO])
    digest: str = ""


async def json_body(request: Request) -> Body:
    """A JSON object.

    Raises:
        ProblemError: The body is something else.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ProblemError("unsupported_media_type", "send application/json")
    # Not ``request.body()``, which would keep it as long as the caller waits for a clip.
    data = b"".join([piece async for piece in request.stream()])
    return _parsed(data) if len(data) < _LARGE_BYTES else await asyncio.to_thread(_parsed, data)


def _parsed(data: bytes) -> Body:
    try:
        fields = json.loads(data or b"{}")
    except (ValueError, RecursionError) as error:
        raise ProblemError("bad_request", "the body is not JSON") from error
    if not isinstance(fields, dict):
        raise ProblemError("bad_request", "the body is not a JSON object")
    return Body(fields, digest=_digest(fields, {}))


async def read_body(request: Request) -> Body:
    """A JSON object or a form.

    Raises:
        ProblemError: The body is something else.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in _FORMS:
        return await json_body(request)
    largest = service_of(request).settings.max_body_bytes
    form = await request.form(max_files=_MAX_FILES, max_fields=_MAX_FIELDS, max_part_size=largest)
    body = Body({})
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            body.files[name] = value.file
        else:
            body.fields[name] = value if name in _TEXTS else _meant(value)
    body.digest = await asyncio.to_thread(_digest, body.fields, body.files)
    return body


def _meant(text: str) -> Any:
    """What a form's string stands for: a number, a truth value, an object, or itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, bool | int | float | dict) or value is None else text


def _digest(fields: dict[str, Any], files: dict[str, BinaryIO]) -> str:
    try:
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True, ensure_ascii=False).encode())
    except UnicodeEncodeError as error:  # half of a surrogate pair, which no answer could show again
        raise ProblemError("bad_request", "the body holds text that is not Unicode") from error
    except RecursionError as error:  # a little less deep than what could not be read
        raise ProblemError("bad_request", "the body is nested too deeply") from error
    for name in sorted(files):
        digest.update(name.encode())
        while piece := files[name].read(_CHUNK_BYTES):
            digest.update(piece)
        files[name].seek(0)
    return digest.hexdigest()
