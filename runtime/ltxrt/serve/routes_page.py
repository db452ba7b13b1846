# SPDX-License-Identifier: Apache-2.0
"""The workbench: a page at ``/`` from which a person runs the model, tunes a request and compares clips.

It is static and needs no key; what it does goes through the same routes, with the caller's key, as everyone's calls.
Its policy lets nothing in that this server did not send: no inline script or style, no other host, no markup made by
scripts.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..media import bundled_speech
from .problems import ProblemError

__all__ = ["PAGE_HEADERS", "router"]

router = APIRouter(include_in_schema=False)

_FOLDER = resources.files("ltxrt.serve") / "page"
_INDEX = "index.html"
_SAMPLE = "speech.flac"
# Not from the machine's own tables, which differ.
_TYPES = {
    "css": "text/css; charset=utf-8",
    "flac": "audio/flac",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

#: Headers of the page and of all that belongs to it. ``blob:`` is what the page itself holds: files that were picked,
#: clips that stream.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; "
        "media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(self)",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Asked for again each time, answered with 304: a server that is replaced never meets scripts of the one before.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _Asset:
    data: bytes
    media_type: str
    tag: str


@cache
def _assets() -> dict[str, _Asset]:
    """Every file of the page, and the package's speech as its sample, by name."""
    files = {item.name: item.read_bytes() for item in _FOLDER.iterdir() if item.name.rpartition(".")[2] in _TYPES}
    files[_SAMPLE] = bundled_speech().read_bytes()
    return {
        name: _Asset(data, _TYPES[name.rpartition(".")[2]], f'"{hashlib.sha256(data).hexdigest()[:32]}"')
        for name, data in files.items()
    }


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The page."""
    return _answer(request, _assets()[_INDEX])


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def asset(request: Request, name: str) -> Response:
    """Something that the page loads."""
    found = None if name == _INDEX else _assets().get(name)
    if found is None:
        raise ProblemError("resource_not_found", "there is no such file")
    return _answer(request, found)


def _answer(request: Request, asset: _Asset) -> Response:
    headers = {**PAGE_HEADERS, "ETag": asset.tag}
    seen = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if asset.tag in seen:
        return Response(status_code=304, headers=headers)
    return Response(asset.data, headers=headers, media_type=asset.media_type)
