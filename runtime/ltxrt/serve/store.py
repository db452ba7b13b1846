# SPDX-License-Identifier: Apache-2.0
"""Jobs in SQLite (WAL): the one truth that server and workers share, and that survives both.

Every change of state is one statement with the state it comes from in its WHERE clause, so that two processes that
want to change the same job cannot both succeed. A worker's writes name the worker: one that has been given up for dead
and still writes changes nothing.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_urlsafe
from typing import Any, cast

from .job import Job, JobEvent, NewJob

__all__ = ["DuplicateKeyError", "JobStore", "QueueFullError", "StoreUnavailableError"]

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, request TEXT NOT NULL, echo TEXT NOT NULL, model TEXT NOT NULL,
    idempotency_key TEXT, payload_hash TEXT NOT NULL, result_token TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'queued', worker TEXT, attempts INTEGER NOT NULL DEFAULT 0,
    stage TEXT, step INTEGER NOT NULL DEFAULT 0, steps INTEGER NOT NULL DEFAULT 0,
    progress REAL NOT NULL DEFAULT 0, seconds_left REAL, cancel_requested INTEGER NOT NULL DEFAULT 0,
    created_at REAL NOT NULL, started_at REAL, completed_at REAL, expires_at REAL,
    error_type TEXT, error_message TEXT, result TEXT
);
CREATE INDEX jobs_by_state ON jobs (state, seq);
CREATE INDEX jobs_by_owner ON jobs (owner, seq);
CREATE UNIQUE INDEX jobs_by_key ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT NOT NULL, owner TEXT NOT NULL, kind TEXT NOT NULL,
    data TEXT NOT NULL
);
CREATE INDEX events_by_job ON events (job_id, number);
CREATE INDEX events_by_owner ON events (owner, number);
CREATE TABLE control (hold INTEGER NOT NULL);
INSERT INTO control VALUES (0);
"""
_FIELDS = (
    "id, owner, request, echo, model, idempotency_key, payload_hash, result_token, state, attempts, stage, step, steps,"
    " progress, seconds_left, cancel_requested, created_at, started_at, completed_at, expires_at, error_type,"
    " error_message, result"
)
# How often a job may be claimed: once more after a server that ended while it ran.
_MAX_ATTEMPTS = 2
_RECENT = 20


class QueueFullError(Exception):
    """As many jobs wait as may wait."""


class DuplicateKeyError(Exception):
    """The owner has used the idempotency key before; ``job`` is what it made."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.id)
        self.job = job


class StoreUnavailableError(Exception):
    """The store does not answer: Redis is gone, or SQLite's disk is full or its file locked for too long."""


class JobStore:
    """Jobs and their events; a ``Store``. Safe to share between threads, and between processes that open the same file.

    Args:
        path: The database file; made where it is missing.
        retention_seconds: How long a job is kept after its end.

    Raises:
        sqlite3.DatabaseError: The file is no job store, or one of another version.
    """

    def __init__(self, path: Path, *, retention_seconds: float) -> None:
        self._retention = retention_seconds
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode = WAL")
        # A crash of the machine may lose the last moments, never the file; a crash of the server loses nothing.
        self._db.execute("PRAGMA synchronous = NORMAL")
        with self._transaction():
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _SCHEMA.split(";\n"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            elif version != _SCHEMA_VERSION:
                raise sqlite3.DatabaseError(f"{path} has schema version {version}, expected {_SCHEMA_VERSION}")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    # --- what the server does ---

    def add(self, job: NewJob, *, max_queued: int) -> Job:
        """Queue a job.

        Raises:
            QueueFullError: ``max_queued`` jobs wait already.
            DuplicateKeyError: Its owner has used its idempotency key before.
        """
        with self._transaction():
            if job.idempotency_key is not None and (earlier := self.by_key(job.owner, job.idempotency_key)):
                raise DuplicateKeyError(earlier)
            if self.count("queued") >= max_queued:
                raise QueueFullError
            row = self._db.execute(
                "INSERT INTO jobs (id, owner, request, echo, model, idempotency_key, payload_hash, result_token,"
                f" created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING {_FIELDS}",
                (
                    job.id,
                    job.owner,
                    json.dumps(job.request),
                    json.dumps(job.echo),
                    job.model,
                    job.idempotency_key,
                    job.payload_hash,
                    token_urlsafe(24),
                    time.time(),
                ),
            ).fetchone()
            self._note(job.id, "queued", {})
        return _job(row)

    def get(self, job_id: str) -> Job | None:
        """A job by its id."""
        return next(self._jobs("WHERE id = ?", (job_id,)), None)

    def by_key(self, owner: str, idempotency_key: str) -> Job | None:
        """The job that an idempotency key made."""
        return next(self._jobs("WHERE owner = ? AND idempotency_key = ?", (owner, idempotency_key)), None)

    def of_owner(self, owner: str, *, states: tuple[str, ...] = (), limit: int = 1000) -> list[Job]:
        """An owner's jobs, newest first; ``states`` keeps only those."""
        marks = ", ".join("?" * len(states))
        where = f"WHERE owner = ? {f'AND state IN ({marks})' if states else ''} ORDER BY seq DESC LIMIT ?"
        return list(self._jobs(where, (owner, *states, limit)))

    def count(self, *states: str) -> int:
        """How many jobs are in those states."""
        marks = ", ".join("?" * len(states))
        return int(self._value(f"SELECT count(*) FROM jobs WHERE state IN ({marks})", states))

    def busy(self) -> int:
        """How many jobs run on this server's workers: every one that runs."""
        return self.count("processing")

    def position(self, job_id: str) -> int:
        """How many jobs a worker will take before this one."""
        return int(
            self._value(
                "SELECT count(*) FROM jobs WHERE state = 'queued' AND seq < (SELECT seq FROM jobs WHERE id = ?)",
                (job_id,),
            )
        )

    def recent_seconds(self) -> list[float]:
        """How long the last clips took, claimed to finished."""
        rows = self._rows(
            "SELECT completed_at - started_at FROM jobs WHERE state = 'succeeded' ORDER BY completed_at DESC LIMIT ?",
            (_RECENT,),
        )
        return [float(row[0]) for row in rows]

    def cancel(self, job_id: str) -> Job | None:
        """Cancel a queued job now, ask the worker of a running one to stop, leave a finished one as it is."""
        with self._transaction():
            self._end(job_id, "state = 'queued'", (), "cancelled", {})
            self._db.execute("UPDATE jobs SET cancel_requested = 1 WHERE id = ? AND state = 'processing'", (job_id,))
            return self.get(job_id)

    def hold(self, on: bool) -> None:
        """Whether queued jobs stay where they are, because the server is about to end."""
        with self._transaction():
            self._db.execute("UPDATE control SET hold = ?", (on,))

    def recover(self) -> list[str]:
        """After a start: what a former server's workers were at is queued again, once, with the same seed."""
        with self._transaction():
            self.hold(False)
            jobs = list(self._jobs("WHERE state = 'processing'", ()))
            for job in jobs:
                if job.cancel_requested:
                    self._end(job.id, "state = 'processing'", (), "cancelled", {})
                elif job.attempts >= _MAX_ATTEMPTS:
                    error = {"error_type": "interrupted", "error_message": "the server ended twice while it ran"}
                    self._end(job.id, "state = 'processing'", (), "failed", error)
                else:
                    self._db.execute(
                        "UPDATE jobs SET state = 'queued', worker = NULL, stage = NULL, step = 0, steps = 0,"
                        " progress = 0, seconds_left = NULL WHERE id = ?",
                        (job.id,),
                    )
                    self._note(job.id, "queued", {})
        return [job.id for job in jobs]

    def bury(self, worker: str, error_type: str, message: str) -> list[str]:
        """A worker is dead: fail what it was at. Only its supervisor may say so. Returns the jobs' ids."""
        with self._transaction():
            ids = [
                str(row[0])
                for row in self._db.execute("SELECT id FROM jobs WHERE state = 'processing' AND worker = ?", (worker,))
            ]
            for job_id in ids:
                self.finish(job_id, worker, "failed", {"error_type": error_type, "error_message": message})
        return ids

    def expire(self, job_id: str) -> None:
        """Keep a job no longer than it runs."""
        with self._transaction():
            self._db.execute("UPDATE jobs SET expires_at = ? WHERE id = ?", (time.time(), job_id))

    def expired(self, now: float) -> list[str]:
        """Jobs whose time is over."""
        return [
            str(row[0])
            for row in self._rows("SELECT id FROM jobs WHERE expires_at <= ? AND completed_at IS NOT NULL", (now,))
        ]

    def forget(self, job_id: str) -> None:
        """Remove a finished job and its events; its files are the caller's to remove first."""
        with self._transaction():
            self._db.execute("DELETE FROM jobs WHERE id = ? AND completed_at IS NOT NULL", (job_id,))
            self._db.execute("DELETE FROM events WHERE job_id = ?", (job_id,))

    def events(
        self, after: int, *, job_id: str | None = None, owner: str | None = None, limit: int = -1
    ) -> list[JobEvent]:
        """Events with a larger number, oldest first, of one job or of all jobs of an owner; -1 is no limit."""
        column, value = ("job_id", job_id) if job_id is not None else ("owner", owner)
        rows = self._rows(
            f"SELECT number, job_id, kind, data FROM events WHERE {column} = ? AND number > ? ORDER BY number LIMIT ?",
            (value, after, limit),
        )
        return [JobEvent(row[0], row[1], row[2], json.loads(row[3])) for row in rows]

    def last_event(self) -> int:
        """The number of the newest event."""
        return int(self._value("SELECT coalesce(max(number), 0) FROM events", ()))

    # --- what a worker does ---

    def claim(self, worker: str) -> Job | None:
        """Take the job that has waited longest, or None."""
        if not self.count("queued"):  # a read, so that an idle worker never asks for the write lock
            return None
        with self._transaction():
            row = self._db.execute(
                "UPDATE jobs SET state = 'processing', worker = ?, started_at = ?, attempts = attempts + 1 WHERE seq ="
                " (SELECT seq FROM jobs WHERE state = 'queued' AND NOT (SELECT hold FROM control) ORDER BY seq LIMIT 1)"
                f" RETURNING {_FIELDS}",
                (worker, time.time()),
            ).fetchone()
            if row is None:
                return None
            self._note(row["id"], "processing", {})
        return _job(row)

    def advance(self, job_id: str, worker: str, done: Mapping[str, Any]) -> bool:
        """Report progress: ``stage, step, steps, progress, seconds_left``.

        Returns:
            False where the worker is to stop: the job was cancelled, or is the worker's no more.
        """
        with self._transaction():
            row = self._db.execute(
                "UPDATE jobs SET stage = :stage, step = :step, steps = :steps, progress = :progress,"
                " seconds_left = :seconds_left WHERE id = :id AND worker = :worker AND state = 'processing'"
                " RETURNING cancel_requested",
                {**done, "id": job_id, "worker": worker},
            ).fetchone()
            if row is not None:
                self._note(job_id, "progress", done)
        return row is not None and not row["cancel_requested"]

    def finish(self, job_id: str, worker: str, state: str, outcome: Mapping[str, Any]) -> bool:
        """End a job: ``outcome`` is ``{"result": {...}}`` or ``{"error_type": ..., "error_message": ...}``.

        Returns:
            Whether the job was still the worker's to end.
        """
        with self._transaction():
            return self._end(job_id, "state = 'processing' AND worker = ?", (worker,), state, outcome)

    # --- within ---

    def _end(self, job_id: str, where: str, values: tuple[str, ...], state: str, outcome: Mapping[str, Any]) -> bool:
        now = time.time()
        result = json.dumps(outcome["result"]) if "result" in outcome else None
        changed = self._db.execute(
            "UPDATE jobs SET state = ?, completed_at = ?, expires_at = min(coalesce(expires_at, 1e12), ?), result = ?,"
            f" error_type = ?, error_message = ?, seconds_left = NULL WHERE id = ? AND {where}",
            (
                state,
                now,
                now + self._retention,
                result,
                outcome.get("error_type"),
                outcome.get("error_message"),
                job_id,
                *values,
            ),
        ).rowcount
        if changed:
            self._note(job_id, state, {name: value for name, value in outcome.items() if name != "result"})
        return bool(changed)

    def _note(self, job_id: str, kind: str, data: Mapping[str, Any]) -> None:
        self._db.execute(
            "INSERT INTO events (job_id, owner, kind, data) SELECT id, owner, ?, ? FROM jobs WHERE id = ?",
            (kind, json.dumps(dict(data)), job_id),
        )

    @contextmanager
    def _transaction(self) -> Generator[None]:
        with self._lock, _available():
            if self._db.in_transaction:  # part of a larger one
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:  # it did not end well, and SQLite has not rolled it back by itself
                    self._db.execute("ROLLBACK")

    def _rows(self, query: str, values: tuple[Any, ...]) -> list[sqlite3.Row]:
        with self._lock, _available():
            return self._db.execute(query, values).fetchall()

    def _value(self, query: str, values: tuple[Any, ...]) -> float:
        return cast("float", self._rows(query, values)[0][0])

    def _jobs(self, where: str, values: tuple[Any, ...]) -> Iterator[Job]:
        return map(_job, self._rows(f"SELECT {_FIELDS} FROM jobs {where}", values))


@contextmanager
def _available() -> Generator[None]:
    """Give what the machine does to a store, not what is wrong with a query, the name that callers know."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StoreUnavailableError(str(error)) from error


def _job(row: sqlite3.Row) -> Job:
    fields: dict[str, Any] = dict(row)
    for name in ("request", "echo", "result"):
        fields[name] = None if fields[name] is None else json.loads(fields[name])
    fields["cancel_requested"] = bool(fields["cancel_requested"])
    return Job(**fields)
