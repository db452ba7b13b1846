# SPDX-License-Identifier: Apache-2.0
"""What a caller names as audio or image, brought to a file of our own: data URIs, uploads, addresses, form parts."""

import asyncio
import base64
import binascii
import re
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import unquote_to_bytes

from ..errors import MediaError
from ..image import IMAGE_ALLOWED
from ..media import AUDIO_ALLOWED
from .addresses import Resolver, resolve
from .fetch import FetchError, FetchRules, fetch, shown_url
from .sandbox import Sandbox

__all__ = ["InputLimits", "InputReader", "UploadShelf", "redacted"]

_SOURCES = "an https address, a data URI, or the address of an upload"
_DATA_URI = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w=.+-]+)*,", re.IGNORECASE)
_UPLOAD = "upload://"
_LONGEST_MEDIA_TYPE = 1000

Kind = Literal["audio", "image"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputLimits:
    """Caps on what callers send.

    Attributes:
        audio_bytes: Largest audio file.
        image_bytes: Largest image file.
        fetching: What may be fetched.
    """

    audio_bytes: int = 100 * 10**6
    image_bytes: int = 32 * 10**6
    fetching: FetchRules = field(default_factory=FetchRules)

    def bytes_of(self, kind: Kind) -> int:
        """The cap of a kind."""
        return self.audio_bytes if kind == "audio" else self.image_bytes


class UploadShelf:
    """Files that were uploaded ahead of the request that uses them; each belongs to one caller.

    Args:
        folder: Where they lie.
        max_files: How many may lie there at once, over all callers.
    """

    def __init__(self, folder: Path, max_files: int) -> None:
        self._folder, self._max_files = folder, max_files
        folder.mkdir(exist_ok=True, mode=0o700)

    @property
    def full(self) -> bool:
        """Whether no more fit."""
        return sum(1 for _ in self._folder.iterdir()) >= self._max_files

    def new(self, owner: str) -> tuple[str, Path]:
        """An address for a request's field, and the file to write."""
        name = secrets.token_urlsafe(24)
        return f"{_UPLOAD}{name}", self._folder / f"{owner}.{name}"

    def find(self, owner: str, address: str) -> Path | None:
        """The file of an address, where it is there and the caller's own."""
        name = address.removeprefix(_UPLOAD)
        path = self._folder / f"{owner}.{name}"
        return path if re.fullmatch(r"[\w-]{32}", name) and path.is_file() else None

    def remove_older(self, than: float) -> None:
        """Remove files that were last written before a time."""
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # another front end was faster
                if path.stat().st_mtime < than:
                    path.unlink()


class InputReader:
    """Brings inputs to files that only our own code has written."""

    def __init__(self, limits: InputLimits, sandbox: Sandbox, shelf: UploadShelf, resolver: Resolver = resolve) -> None:
        self.limits, self.shelf = limits, shelf
        self._sandbox, self._resolver = sandbox, resolver

    async def read(self, owner: str, value: str | BinaryIO, kind: Kind, target: Path) -> dict[str, Any]:
        """Bring an input to ``target``.

        Args:
            owner: The caller.
            value: What the request's field holds, or an open file.
            kind: ``audio`` becomes WAV, ``image`` PNG.
            target: The file to write, in a folder of its own.

        Returns:
            As ``Sandbox.read``.

        Raises:
            MediaError: The input is refused.
        """
        # No name or ending of the caller's ever reaches a decoder.
        raw = target.with_name(secrets.token_hex(8))
        bringing = asyncio.ensure_future(asyncio.to_thread(self._bring, owner, value, kind, raw))
        try:
            await asyncio.shield(bringing)
            return await self._sandbox.read(kind, raw, target, f"input_{kind}")
        finally:
            # A thread goes on when nobody waits for it any more, and would write what has just been removed.
            await asyncio.gather(bringing, return_exceptions=True)
            raw.unlink(missing_ok=True)

    def _bring(self, owner: str, value: str | BinaryIO, kind: Kind, raw: Path) -> None:
        most = self.limits.bytes_of(kind)

        def refuse(problem: str, allowed: str = _SOURCES) -> MediaError:
            shown = redacted(value) if isinstance(value, str) else "file"
            return MediaError(f"input_{kind}", shown, problem, allowed)

        too_large = refuse(f"is larger than {most} bytes", f"at most {most} bytes")
        with raw.open("xb") as file:
            if not isinstance(value, str):
                shutil.copyfileobj(value, file)
            elif value[:5].lower() == "data:":
                if len(value) * 3 // 4 > most + _LONGEST_MEDIA_TYPE:  # before a second copy of it is made
                    raise too_large
                allowed = AUDIO_ALLOWED if kind == "audio" else IMAGE_ALLOWED
                file.write(_data(value, refuse("is a broken data URI", allowed)))
            elif value.startswith(_UPLOAD):
                upload = self.shelf.find(owner, value)
                if upload is None:
                    raise refuse("is an upload that is not there (any more)")
                with upload.open("rb") as source:
                    shutil.copyfileobj(source, file)
            elif "://" in value:
                try:
                    fetch(value, file, most, self.limits.fetching, self._resolver)
                except FetchError as error:
                    raise refuse(str(error)) from error
            else:
                raise refuse("is no address; a server reads no paths")
            if file.tell() > most:
                raise too_large


def redacted(value: str) -> str:
    """An input as logs and records may hold it: no contents, no signatures, no secrets."""
    if value[:5].lower() == "data:":
        return f"{value[:80].partition(',')[0].partition(';')[0]};…"
    return value if value.startswith(_UPLOAD) else shown_url(value)


def _data(uri: str, broken: MediaError) -> bytes:
    match = _DATA_URI.match(uri)
    if match is None:
        raise broken
    body = uri[match.end() :]
    if not match[0].lower().endswith(";base64,"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise broken from error
