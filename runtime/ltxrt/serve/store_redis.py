# SPDX-License-Identifier: Apache-2.0
"""Jobs in Redis: the truth that several front ends and their workers share, wherever they run.

The operations are in ``store_redis.lua``. Redis must be 6.2 or newer, and must write to disk what is not to be lost
with it (``appendonly yes``). Needs the ``redis`` extra.
"""

import json
from collections.abc import AsyncGenerator, Mapping
from importlib.resources import files
from secrets import token_hex, token_urlsafe
from typing import Any, cast
from urllib.parse import urlsplit

import redis
import redis.asyncio
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from ..errors import OutputError
from .job import Job, JobEvent, NewJob
from .store import DuplicateKeyError, QueueFullError, StoreUnavailableError

__all__ = ["RedisStore"]

_SCHEMA_VERSION = "1"
_OLDEST = (6, 2)
_PREFIX = "ltxrt:"
_CONNECT_SECONDS, _ANSWER_SECONDS = 2.0, 5.0
# A front end's event loop waits for no store that is gone; a worker that has half made a clip does, for about a minute.
_HASTY, _PATIENT = Retry(NoBackoff(), 1), Retry(ExponentialBackoff(cap=5, base=0.1), 16)
_WHOLE = ("attempts", "step", "steps")
_SECONDS = ("progress", "seconds_left", "created_at", "started_at", "completed_at", "expires_at")
_PLAIN = ("stage", "error_type", "error_message", "idempotency_key")


class RedisStore:
    """Jobs and their events; a ``SharedStore``. Safe to share between threads, processes and machines.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        retention_seconds: How long a job is kept after its end.
        lease_seconds: How long a worker that is silent counts as alive.
        server: The front end that asks, or whose worker does; no other front end's, nor one of its earlier starts.
        patient: Wait about a minute for a Redis that is gone, rather than fail at once.

    Raises:
        OutputError: No Redis answers there, it is too old, or holds jobs of another version of ltxrt.
    """

    def __init__(
        self,
        url: str,
        *,
        retention_seconds: float,
        lease_seconds: float = 30.0,
        server: str = "",
        patient: bool = False,
    ) -> None:
        self._url = url
        self._settings = (retention_seconds, lease_seconds, server)
        self._redis = redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_connect_timeout=_CONNECT_SECONDS,
            socket_timeout=_ANSWER_SECONDS,
            retry=_PATIENT if patient else _HASTY,
        )
        source = files("ltxrt.serve").joinpath("store_redis.lua").read_text("utf-8")
        self._script = self._redis.register_script(source)
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        where = _shown(self._url)
        try:
            version = str(self._redis.info("server")["redis_version"])
            if tuple(map(int, version.split(".")[:2])) < _OLDEST:
                raise OutputError(f"{where}: Redis {version}; needed: {'.'.join(map(str, _OLDEST))} or newer")
            schema = str(self._call("open", _SCHEMA_VERSION))
        except (RedisError, StoreUnavailableError) as error:
            cause = error.__cause__ or error
            raise OutputError(f"{where}: cannot be used as a job store ({type(cause).__name__})") from error
        if schema != _SCHEMA_VERSION:
            raise OutputError(f"{where}: jobs of schema version {schema}, expected {_SCHEMA_VERSION}")

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    # --- what the server does; see ``store_protocol.Store`` ---

    def add(self, job: NewJob, *, max_queued: int) -> Job:
        """See ``Store``."""
        fields = {
            "request": json.dumps(job.request),
            "echo": json.dumps(job.echo),
            "model": job.model,
            "payload_hash": job.payload_hash,
            "result_token": token_urlsafe(24),
        }
        if job.idempotency_key is not None:
            fields["idempotency_key"] = job.idempotency_key
        outcome, flat = self._call("add", job.id, job.owner, max_queued, *_flat(fields))
        if outcome == "full":
            raise QueueFullError
        stored = _required(flat)
        if outcome == "used":
            raise DuplicateKeyError(stored)
        return stored

    def get(self, job_id: str) -> Job | None:
        """See ``Store``."""
        return _job(self._call("get", job_id))

    def by_key(self, owner: str, idempotency_key: str) -> Job | None:
        """See ``Store``."""
        return _job(self._call("by_key", owner, idempotency_key))

    def of_owner(self, owner: str, *, states: tuple[str, ...] = (), limit: int = 1000) -> list[Job]:
        """See ``Store``."""
        return [_required(flat) for flat in self._call("of_owner", owner, limit, *states)]

    def count(self, *states: str) -> int:
        """See ``Store``."""
        return int(self._call("count", *states))

    def busy(self) -> int:
        """See ``Store``."""
        return int(self._call("busy"))

    def position(self, job_id: str) -> int:
        """See ``Store``."""
        return int(self._call("position", job_id))

    def recent_seconds(self) -> list[float]:
        """See ``Store``."""
        return [float(seconds) for seconds in self._call("recent")]

    def cancel(self, job_id: str) -> Job | None:
        """See ``Store``."""
        return _job(self._call("cancel", job_id))

    def hold(self, on: bool) -> None:
        """See ``Store``; other front ends' workers go on."""
        self._call("hold", int(on))

    def recover(self) -> list[str]:
        """See ``Store``; what other front ends' workers are at stays theirs."""
        self.hold(False)
        return self.reclaim()

    def bury(self, worker: str, error_type: str, message: str) -> list[str]:
        """See ``Store``."""
        return self._call("bury", worker, error_type, message)

    def expire(self, job_id: str) -> None:
        """See ``Store``."""
        self._call("expire", job_id)

    def expired(self, now: float) -> list[str]:
        """See ``Store``."""
        return self._call("expired", repr(now))

    def forget(self, job_id: str) -> None:
        """See ``Store``."""
        self._call("forget", job_id)

    def events(
        self, after: int, *, job_id: str | None = None, owner: str | None = None, limit: int = -1
    ) -> list[JobEvent]:
        """See ``Store``."""
        kind, name = ("job", job_id) if job_id is not None else ("owner", owner or "")
        return [_event(text) for text in self._call("events", kind, name, after, limit)]

    def last_event(self) -> int:
        """See ``Store``."""
        return int(self._call("last_event"))

    # --- what a worker does ---

    def claim(self, worker: str) -> Job | None:
        """See ``Store``; the claim holds for the length of a lease."""
        # A call whose answer was lost is sent again, and must not take a second job.
        return _job(self._call("claim", worker, token_hex(16)))

    def advance(self, job_id: str, worker: str, done: Mapping[str, Any]) -> bool:
        """See ``Store``."""
        values = [done[name] for name in ("stage", "step", "steps", "progress")]
        left = () if done["seconds_left"] is None else (repr(done["seconds_left"]),)
        return bool(self._call("advance", job_id, worker, json.dumps(dict(done)), *values, *left))

    def finish(self, job_id: str, worker: str, state: str, outcome: Mapping[str, Any]) -> bool:
        """See ``Store``."""
        fields = {name: json.dumps(value) if name == "result" else value for name, value in outcome.items()}
        return bool(self._call("finish", job_id, worker, state, *_flat(fields)))

    # --- what only a store that is shared needs; see ``store_protocol.SharedStore`` ---

    def renew(self, worker: str) -> None:
        """See ``SharedStore``."""
        self._call("renew", worker)

    def workers(self) -> int:
        """See ``SharedStore``."""
        return int(self._call("workers"))

    def reclaim(self) -> list[str]:
        """See ``SharedStore``."""
        return self._call("reclaim")

    def requeue(self, worker: str) -> list[str]:
        """See ``SharedStore``."""
        return self._call("requeue", worker)

    def take_ended(self) -> list[str]:
        """See ``SharedStore``."""
        return self._call("take_ended")

    async def changes(self) -> AsyncGenerator[tuple[str, str]]:
        """See ``SharedStore``."""
        connection = redis.asyncio.Redis.from_url(
            self._url, decode_responses=True, socket_connect_timeout=_CONNECT_SECONDS
        )
        try:
            async with connection.pubsub() as channel:
                await channel.subscribe(f"{_PREFIX}changes")
                async for message in channel.listen():
                    if message["type"] == "message":
                        kind, _, job_id = str(message["data"]).partition(" ")
                        yield kind, job_id
        except RedisError as error:
            raise StoreUnavailableError(type(error).__name__) from error
        finally:
            await connection.aclose()

    def _call(self, operation: str, *arguments: str | float) -> Any:
        try:
            return self._script(keys=[_PREFIX], args=[operation, *self._settings, *arguments])
        except RedisError as error:
            raise StoreUnavailableError(type(error).__name__) from error


def _flat(fields: Mapping[str, str]) -> list[str]:
    return [text for pair in fields.items() for text in pair]


def _event(text: str) -> JobEvent:
    number, job_id, kind, data = text.split("\n", 3)
    return JobEvent(int(number), job_id, kind, json.loads(data))


def _job(flat: list[str]) -> Job | None:
    return _required(flat) if flat else None


def _required(flat: list[str]) -> Job:
    found = dict(zip(flat[::2], flat[1::2], strict=True))
    fields: dict[str, Any] = {name: found[name] for name in ("id", "owner", "model", "payload_hash", "result_token")}
    fields |= {name: found.get(name) for name in _PLAIN}
    fields |= {name: int(found[name]) for name in _WHOLE}
    fields |= {name: float(found[name]) if name in found else None for name in _SECONDS}
    fields |= {name: json.loads(found[name]) if name in found else None for name in ("request", "echo", "result")}
    return Job(**fields, state=cast("Any", found["state"]), cancel_requested=found["cancel_requested"] == "1")


def _shown(url: str) -> str:
    """The address without a password, and without options that may hold one."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"
