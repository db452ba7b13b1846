# SPDX-License-Identifier: Apache-2.0
"""Answers that wait for a clip: whole, or as the fragments come. Who goes away cancels the clip."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import BinaryIO, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse

from .job import Job
from .problems import ProblemError
from .service import Service, service_of
from .views import failure

__all__ = ["finished", "live_response", "wants_stream"]

T = TypeVar("T")


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
    """
    service = service_of(request)
    done = await _unless_gone(request, job if own else None, lambda: service.jobs.wait(job.id))
    if done is None:
        raise ProblemError("resource_not_found", "the job is no more")
    if done.state != "succeeded":
        raise failure(done)
    return done


async def live_response(request: Request, job: Job, *, own: bool) -> StreamingResponse:
    """The clip as a fragmented MP4 while it is made; nothing is answered before its first bytes are there.

    Args:
        request: As for ``finished``; so the others.
        job: The job.
        own: Whether this call made it.

    Raises:
        ProblemError: There will be no clip.
    """
    pieces = _pieces(service_of(request), job)
    first = await _unless_gone(request, job if own else None, lambda: anext(pieces))
    headers = {"X-Job-Id": job.id, "X-Seed": str(job.request["seed"])}
    stream = _cancelling(service_of(request), job if own else None, first, pieces)
    return StreamingResponse(stream, 200, headers, "video/mp4")


async def _unless_gone(request: Request, job: Job | None, wait: Callable[[], Coroutine[None, None, T]]) -> T:
    """What is waited for; where the caller goes away first, the job, if there is one, is cancelled."""
    waiting = asyncio.ensure_future(wait())
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        if job is not None:
            service_of(request).jobs.cancel(job.id)
        raise ProblemError("client_closed", "the caller went away")
    finally:
        for task in (waiting, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, ProblemError, StopAsyncIteration):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _cancelling(
    service: Service, job: Job | None, first: bytes, pieces: AsyncGenerator[bytes]
) -> AsyncGenerator[bytes]:
    try:
        yield first
        async for piece in pieces:
            yield piece
    finally:
        await pieces.aclose()
        if job is not None:
            service.jobs.cancel(job.id)  # does nothing to one that is done


async def _pieces(service: Service, job: Job) -> AsyncGenerator[bytes]:
    """The bytes of a clip as its file grows; ends with the clip, raises where there will be none.

    The file may be unlinked while it is read here: what it holds stays readable until it is closed.
    """
    file: BinaryIO | None = None
    sent = False
    try:
        with service.jobs.board.watch(job.id) as watch:
            while True:
                # The state first, then the file: after the end of a job its file grows no more.
                now = service.jobs.store.get(job.id)
                if file is None:
                    with suppress(FileNotFoundError):
                        file = service.jobs.live(job.id).open("rb")
                if file is None and now is not None and (clip := service.jobs.clip(now)) is not None:
                    file = clip.open("rb")
                while file is not None and (piece := file.read(1 << 18)):
                    sent = True
                    yield piece
                if now is None or (now.done and now.state != "succeeded"):
                    raise ProblemError("resource_not_found", "the job is no more") if now is None else failure(now)
                if now.done and sent:
                    return
                await watch.wait()
    finally:
        if file is not None:
            file.close()
