# SPDX-License-Identifier: Apache-2.0
"""Answers that wait for a clip: whole, or as the fragments come. Who goes away cancels the clip."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import closing, suppress
from hashlib import sha256
from typing import BinaryIO, TypeVar

from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .job import Job
from .jobs import JobLayer, UnavailableError
from .problems import ProblemError
from .service import Service, service_of
from .views import failure

__all__ = ["clip_response", "finished", "live_response", "wants_stream"]

T = TypeVar("T")
_LOG = logging.getLogger("ltxrt.serve")
_PIECE_BYTES = 1 << 18


def wants_stream(request: Request) -> bool:
    """Whether the caller asks for the clip itself in place of JSON."""
    return "video/mp4" in request.headers.get("accept", "")


async def finished(request: Request, job: Job, *, own: bool) -> Job:
    """The job once its clip is there.

    Args:
        request: Of the caller, who cancels the job by going away,
        job: this one,
        own: unless an earlier call made it.

    Raises:
        ProblemError: There will be no clip.
        UnavailableError: The server ends first; the job waits for the next start.
    """
    service = service_of(request)
    done = await _unless_gone(request, job if own else None, lambda: service.jobs.wait(job.id))
    if done is None:
        raise ProblemError("resource_not_found", "the job is no more")
    if done.state != "succeeded":
        raise failure(done)
    return done


def clip_response(request: Request, job: Job, headers: dict[str, str] | None = None) -> Response:
    """A finished clip, with ETag and ranges.

    Raises:
        ProblemError: It is not finished, or has expired.
    """
    clip = service_of(request).jobs.clip(job)
    if clip is None:
        raise ProblemError("not_finished", f"the job is {job.state}")
    private = {"Cache-Control": "private, max-age=3600"}
    return FileResponse(clip, headers={**private, **(headers or {})}, media_type="video/mp4")


async def live_response(request: Request, job: Job, *, own: bool) -> Response:
    """The clip as a fragmented MP4 while it is made; nothing is answered before its first bytes are there.

    A clip that fails later breaks the answer off before its last chunk. HTTP/1.0 knows no chunks, and whoever speaks it
    (proxies do, unless told otherwise) would take half a clip for the whole, so there the finished clip is sent.

    Args:
        request: As for ``finished``; so the others.
        job: The job.
        own: Whether this call made it.

    Raises:
        ProblemError: There will be no clip.
        UnavailableError: As for ``finished``.
    """
    headers = {"X-Job-Id": job.id, "X-Seed": str(job.request["seed"])}
    if request.scope["http_version"] == "1.0":
        return clip_response(request, await finished(request, job, own=own), headers)
    pieces = _pieces(service_of(request), job)
    first = await _unless_gone(request, job if own else None, lambda: anext(pieces))
    stream = _cancelling(service_of(request), job if own else None, first, pieces)
    return _LiveResponse(stream, 200, {**headers, "X-Accel-Buffering": "no"}, "video/mp4")


class _LiveResponse(StreamingResponse):
    """Ends without its last chunk where the clip does, which the HTTP server makes a broken connection of."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await super().__call__(scope, receive, send)
        except (ProblemError, UnavailableError) as error:
            details = {"event": "stream_broken", "job": self.headers["X-Job-Id"], "reason": str(error)}
            _LOG.warning("stream broken off", extra=details)


async def _unless_gone(request: Request, job: Job | None, wait: Callable[[], Coroutine[None, None, T]]) -> T:
    """What is waited for; where the caller goes away first, the job, if there is one, is cancelled."""
    waiting = asyncio.ensure_future(wait())
    gone = asyncio.create_task(_gone(request))
    closing = asyncio.create_task(_closing(service_of(request)))
    try:
        await asyncio.wait((waiting, gone, closing), return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        if closing.done():
            raise UnavailableError
        if job is not None:
            service_of(request).jobs.cancel(job.id)
        raise ProblemError("client_closed", "the caller went away")
    finally:
        for task in (waiting, gone, closing):
            task.cancel()
            with suppress(asyncio.CancelledError, ProblemError, StopAsyncIteration):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _closing(service: Service) -> None:
    with service.jobs.board.watch(None) as watch:
        while not service.closing:
            await watch.wait()


async def _cancelling(
    service: Service, job: Job | None, first: bytes, pieces: AsyncGenerator[bytes]
) -> AsyncGenerator[bytes]:
    try:
        yield first
        async for piece in pieces:
            yield piece
    finally:
        await pieces.aclose()
        # The server's own end is not the caller's: what it was at is made by the next start.
        if job is not None and not service.closing:
            service.jobs.cancel(job.id)  # does nothing to one that is done


async def _pieces(service: Service, job: Job) -> AsyncGenerator[bytes]:
    """The bytes of a clip as its file grows; ends with the clip, raises where there will be none."""
    with closing(_Growing(service.jobs)) as clip, service.jobs.board.watch(job.id) as watch:
        while True:
            # The state first, then the file: after the end of a job its file grows no more.
            now = service.jobs.store.get(job.id)
            if now is not None:
                clip.follow(now)
            while piece := clip.read():
                yield piece
            if now is None:
                raise ProblemError("resource_not_found", "the job is no more")
            if now.done and now.state != "succeeded":
                raise failure(now)
            if now.done and clip.sent:
                clip.require_attempt(now.attempts)
                return
            if service.closing:
                raise UnavailableError
            await watch.wait()


class _Growing:
    """The file of a clip that grows; when its worker is lost, that of the next attempt, from where the other stopped.

    The same seed gives the same bytes on the same kind of machine. Where it does not, the stream cannot go on.
    A file may be unlinked while it is read here: what it holds stays readable until it is closed.
    """

    def __init__(self, jobs: JobLayer) -> None:
        self._jobs = jobs
        self._file: BinaryIO | None = None
        self._attempt = 0
        self._digest = sha256()  # of what was sent
        self._again, self._skip = sha256(), 0  # of what another attempt has of it, and how much is to come
        self.sent = 0

    def follow(self, job: Job) -> None:
        """Open the file of the job's attempt, as soon as there is one."""
        if self._file is not None and self._attempt == job.attempts:
            return
        with suppress(FileNotFoundError):
            self._take(self._jobs.live(job).open("rb"), job.attempts)
        if self._file is None and (clip := self._jobs.clip(job)) is not None:
            self._take(clip.open("rb"), job.attempts)

    def _take(self, file: BinaryIO, attempt: int) -> None:
        self.close()
        self._file, self._attempt = file, attempt
        self._again, self._skip = sha256(), self.sent

    def read(self) -> bytes:
        """What is new; nothing where nothing is.

        Raises:
            ProblemError: Another attempt did not begin as the one before it.
        """
        if self._file is None:
            return b""
        while self._skip:
            piece = self._file.read(min(_PIECE_BYTES, self._skip))
            if not piece:
                return b""
            self._again.update(piece)
            self._skip -= len(piece)
            if not self._skip and self._again.digest() != self._digest.digest():
                raise _other_clip()
        piece = self._file.read(_PIECE_BYTES)
        self._digest.update(piece)
        self.sent += len(piece)
        return piece

    def require_attempt(self, number: int) -> None:
        """Whether what was sent is the clip that was finished.

        Raises:
            ProblemError: It is not: another attempt was, whose file has gone.
        """
        if self._attempt != number or self._skip:
            raise _other_clip()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _other_clip() -> ProblemError:
    return ProblemError("generation_failed", "the clip was made again, and is not the one that was sent")
