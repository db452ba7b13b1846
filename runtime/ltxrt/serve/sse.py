# SPDX-License-Identifier: Apache-2.0
"""Server-sent events, from the store: what a caller missed while it was away comes first.

Lines end with LF and JSON is compact, because clients of the inference hub compare whole lines.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from .job import TERMINAL, Job, JobEvent
from .problems import ProblemError
from .service import Service, service_of
from .views import openai_video, result_url

__all__ = ["hub_events", "job_events"]

_KEEP_ALIVE_SECONDS = 15.0
_AT_ONCE = 200  # events; others have their turn before the next ones are read
# Documented clients of the hub queue a clip and listen only then. What has ended in the meantime they would wait for
# in vain, so whoever opens the stream without saying where to go on hears of it first.
_JUST_ENDED_SECONDS = 10.0
# The documented shell client reads through awk, and Debian's awk looks at a pipe only when 4096 bytes have come. In
# short lines, since a long one would have it wait for twice as many from then on.
_COMPLETED = "media_generation_completed"
_PADDING = (b":" + b" " * 62 + b"\n") * 65 + b"\n"
_HEADERS = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}

#: An event and its job to the event's name and data; None for what is not told.
Shown = Callable[[JobEvent, Job], tuple[str, dict[str, Any]] | None]


def hub_events(request: Request, owner: str) -> StreamingResponse:
    """Everything that happens to a caller's jobs from now on (or since ``Last-Event-ID``), in the hub's words.

    Without ``Last-Event-ID``, what ended in the last seconds comes first.
    """
    service = service_of(request)
    after = _last_seen(request)

    def shown(event: JobEvent, job: Job) -> tuple[str, dict[str, Any]] | None:
        data = {"generation_id": job.id, "status": event.kind, "media_type": "video", "model": job.model}
        if event.kind == "succeeded":
            return _COMPLETED, {**data, "url": result_url(request, job)}
        if event.kind == "failed":
            return _COMPLETED, {**data, "error": job.error_message}
        return "media_generation_progress", {**data, **event.data}

    if after is not None:
        return _response(_stream(service, shown, after, owner=owner))
    start = service.jobs.store.last_event()
    ended = list(_just_ended(service, shown, start, owner))
    return _response(_stream(service, shown, start, owner=owner, opening=ended))


def job_events(request: Request, job: Job) -> StreamingResponse:
    """What happens to one job, from its beginning (or since ``Last-Event-ID``) to its end."""

    def shown(event: JobEvent, job: Job) -> tuple[str, dict[str, Any]]:
        if event.kind == "progress":
            return "progress", event.data
        return event.kind, openai_video(request, job)

    return _response(_stream(service_of(request), shown, _last_seen(request) or 0, job=job))


def _response(content: AsyncGenerator[bytes]) -> StreamingResponse:
    return StreamingResponse(content, 200, _HEADERS, "text/event-stream")


def _last_seen(request: Request) -> int | None:
    text = request.headers.get("last-event-id")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ProblemError("bad_request", "Last-Event-ID: a number that this server sent")
    return int(text)


async def _stream(
    service: Service,
    shown: Shown,
    after: int,
    *,
    job: Job | None = None,
    owner: str | None = None,
    opening: Iterable[bytes] = (),
) -> AsyncGenerator[bytes]:
    store = service.jobs.store
    quiet_since, position = time.monotonic(), None
    yield b": connected\n\n"
    for block in opening:
        yield block
    with service.jobs.board.watch(job.id if job else None) as watch:
        while not service.closing:
            which = {"job_id": job.id} if job else {"owner": owner}
            events = store.events(after, **which, limit=_AT_ONCE)
            for event in events:
                after = event.number
                for block in _blocks(service, shown, event):
                    yield block
                if job and event.kind in TERMINAL:
                    return
            now = store.get(job.id) if job else None
            if job and (now is None or (now.done and not events)):  # forgotten, or its end was seen before
                return
            if now is not None and now.state == "queued" and (ahead := store.position(now.id)) != position:
                position = ahead
                yield _block(None, "position", {"queue_position": ahead})
                events = [*events, None]
            if events:
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > _KEEP_ALIVE_SECONDS:
                quiet_since = time.monotonic()
                yield b": keep-alive\n\n"
            # There is more to read, a day's perhaps, or there will be.
            await (asyncio.sleep(0) if len(events) >= _AT_ONCE else watch.wait())


def _just_ended(service: Service, shown: Shown, until: int, owner: str) -> Iterator[bytes]:
    store = service.jobs.store
    since = time.time() - _JUST_ENDED_SECONDS
    for job in reversed(store.of_owner(owner, states=("succeeded", "failed"), limit=100)):
        if job.completed_at is not None and job.completed_at > since:
            end = store.events(0, job_id=job.id)[-1]
            if end.number <= until:  # or the stream itself brings it
                yield from _blocks(service, shown, end)


def _blocks(service: Service, shown: Shown, event: JobEvent) -> Iterator[bytes]:
    job = service.jobs.store.get(event.job_id)
    told = None if job is None else shown(event, job)
    if told is not None:
        yield _block(event.number, *told)
        if told[0] == _COMPLETED:
            yield _PADDING


def _block(number: int | None, name: str, data: dict[str, Any]) -> bytes:
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()
