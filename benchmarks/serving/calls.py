# SPDX-License-Identifier: Apache-2.0
"""One call of each kind, as callers of every sort make them, and what came of it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx2

__all__ = ["KINDS", "Call", "Outcome"]

_RETRY_SECONDS = 0.2
_POLL_SECONDS = 0.1
_TERMINAL = ("succeeded", "failed", "cancelled")
_BAD: tuple[dict[str, Any], ...] = (
    {"num_frames": 482},
    {"prompt": ""},
    {"colour": "red"},
    {"input_audio": "data:audio/wav;base64,AAAA"},
    {"input_audio": "https://127.0.0.1/x.wav"},
    {"resolution": "13x13"},
)


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        number: Which of all; its idempotency key.
        kind: A key of ``KINDS``.
        body: Of the request.
        patience: Seconds after which a caller who goes away does so.
        client: To the server, wherever it is by now.
    """

    number: int
    kind: str
    body: dict[str, Any]
    patience: float
    client: Callable[[], httpx2.AsyncClient]

    @property
    def key(self) -> dict[str, str]:
        """The header by which a call that is made again finds its job."""
        return {"Idempotency-Key": f"call-{self.number}"}


@dataclass
class Outcome:
    """What came of a call.

    Attributes:
        kind: Of the call.
        seconds: From its start to its last byte.
        first_seconds: To the first byte of a clip that was streamed.
        status: The last answer's; 0 where the caller went away.
        state: Of the job as its caller saw it last.
        retries: How often the server was not there.
        problem: What should not have been.
        job: Its id, where the caller learnt it.
    """

    kind: str
    seconds: float = 0.0
    first_seconds: float | None = None
    status: int = 0
    state: str | None = None
    retries: int = 0
    problem: str | None = None
    job: str | None = None


async def made(call: Call) -> Outcome:
    """Make a call to its end."""
    outcome = Outcome(call.kind)
    started = time.monotonic()
    await KINDS[call.kind](call, outcome)
    outcome.seconds = time.monotonic() - started
    return outcome


async def _persistent(outcome: Outcome, ask: Callable[[], Awaitable[httpx2.Response]]) -> httpx2.Response:
    """Ask until the server is there, and, where the queue is full, until it has room."""
    while True:
        try:
            answer = await ask()
            if answer.status_code != 503:
                return answer
        except httpx2.TransportError:
            outcome.retries += 1
        await asyncio.sleep(_RETRY_SECONDS)


async def _submit(call: Call, outcome: Outcome) -> str | None:
    answer = await _persistent(outcome, lambda: call.client().post("/api/ai/queue", json=call.body, headers=call.key))
    outcome.status = answer.status_code
    if answer.status_code != 200:
        outcome.problem = answer.text[:200]
        return None
    outcome.job = answer.json()["generations"][0]["generation_id"]
    return outcome.job


async def _queue(call: Call, outcome: Outcome) -> None:
    name = await _submit(call, outcome)
    if name is not None:
        await _polled(call, outcome, name)


async def _cancel(call: Call, outcome: Outcome) -> None:
    name = await _submit(call, outcome)
    if name is not None:
        await asyncio.sleep(call.patience)
        await _persistent(outcome, lambda: call.client().delete(f"/api/ai/queue/{name}"))
        await _polled(call, outcome, name)


async def _polled(call: Call, outcome: Outcome, name: str) -> None:
    """Ask for a job until it has ended."""
    while outcome.state not in _TERMINAL:
        await asyncio.sleep(_POLL_SECONDS)
        answer = await _persistent(outcome, lambda: call.client().get(f"/api/ai/queue/{name}"))
        if answer.status_code != 200:
            outcome.problem = f"a job is lost: {answer.text[:200]}"
            return
        outcome.state = answer.json()["status"]


async def _sync(call: Call, outcome: Outcome) -> None:
    answer = await _persistent(
        outcome, lambda: call.client().post("/api/ai/videos/generate", json=call.body, headers=call.key)
    )
    outcome.status = answer.status_code
    if answer.status_code == 200:
        outcome.state, outcome.job = "succeeded", answer.json()["generation_id"]
    elif answer.status_code in (499, 500):  # a killed worker's job, or one whose first caller the server lost
        outcome.state = "cancelled" if answer.status_code == 499 else "failed"
        if answer.status_code == 500 and "worker_died" not in answer.text:
            outcome.problem = answer.text[:200]
    else:
        outcome.problem = answer.text[:200]


async def _stream(call: Call, outcome: Outcome) -> None:
    first, started = b"", time.monotonic()
    try:
        async with call.client().stream("POST", "/v1/videos/stream", json=call.body, headers=call.key) as answer:
            outcome.status = answer.status_code
            async for piece in answer.aiter_raw():
                if not first:
                    first, outcome.first_seconds = piece, time.monotonic() - started
    except httpx2.TransportError:
        outcome.retries += 1  # a stream that breaks stays broken; its job is looked at in the end
        return
    if outcome.status == 200:
        outcome.state = "succeeded"
        if first[4:8] != b"ftyp":
            outcome.problem = "not an MP4"
    elif outcome.status not in (499, 500, 503):
        outcome.problem = f"status {outcome.status}"


async def _leave(call: Call, outcome: Outcome, path: str) -> None:
    """A caller who goes away."""
    body = {**call.body, "prompt": "steps=40 pause=0.05"}
    try:
        await asyncio.wait_for(call.client().post(path, json=body, headers=call.key), call.patience)
    except (TimeoutError, httpx2.TransportError):
        return


async def _leave_sync(call: Call, outcome: Outcome) -> None:
    await _leave(call, outcome, "/api/ai/videos/generate")


async def _leave_stream(call: Call, outcome: Outcome) -> None:
    await _leave(call, outcome, "/v1/videos/stream")


async def _bad(call: Call, outcome: Outcome) -> None:
    body = {**call.body, **_BAD[call.number % len(_BAD)]}
    answer = await _persistent(outcome, lambda: call.client().post("/api/ai/queue", json=body, headers=call.key))
    outcome.status = answer.status_code
    if answer.status_code != 422:
        outcome.problem = f"a bad request was answered with {answer.status_code}"


#: Kinds of calls.
KINDS: dict[str, Callable[[Call, Outcome], Awaitable[None]]] = {
    "queue": _queue,
    "sync": _sync,
    "stream": _stream,
    "cancel": _cancel,
    "leave_sync": _leave_sync,
    "leave_stream": _leave_stream,
    "bad": _bad,
}
