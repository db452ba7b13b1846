# SPDX-License-Identifier: Apache-2.0
"""The job layer that every route stands on: submit, wait, cancel, expire, drain.

Lives in the server's event loop; the store's calls are short enough for it (no disk is waited for). With Redis several
servers, here called front ends, work on the same jobs, and on one data folder that all of them and all workers reach
under the same path.
"""

import asyncio
import fcntl
import logging
import math
import shutil
import statistics
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_hex
from typing import TextIO

from ..errors import OutputError
from .board import Board
from .clip_job import CLIP_NAME, live_name
from .job import Job, NewJob
from .pool import Pool, Slot, WorkerPool
from .shared import Follower
from .store import QueueFullError, StoreUnavailableError
from .store_protocol import SharedStore, Store
from .worker import WorkerOptions

__all__ = ["JobLayer", "JobOptions", "PoolMaker", "UnavailableError"]

_LOG = logging.getLogger("ltxrt.serve")
_JANITOR_SECONDS = 30.0
_GUESSED_SECONDS = 10.0  # of a clip, before one has been made
# Another front end may just be filling it, or streaming from it.
_ABANDONED_SECONDS, _LINGER_SECONDS = 3600.0, 60.0

#: Makes the workers in place of ``WorkerPool``, from their options, the shared store and what to call on a change.
PoolMaker = Callable[[WorkerOptions, SharedStore, Callable[[str], None]], Pool]


class UnavailableError(Exception):
    """The server takes no new jobs, because it is about to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """How jobs are kept.

    Attributes:
        worker: What the workers are started with; names the data folder.
        devices: One slot each; the value of ``CUDA_VISIBLE_DEVICES``, None to leave it as it is.
        max_queued: Jobs that may wait.
        on_end: Called once for every job that ends while this server runs; with several front ends, in one of them.
        make_pool: Where workers are other than processes of this server; with a shared store only.
    """

    worker: WorkerOptions
    devices: tuple[str | None, ...] = (None,)
    max_queued: int = 100
    on_end: Callable[[Job], None] = lambda job: None
    make_pool: PoolMaker | None = None


class JobLayer:
    """Jobs, their files, and the workers that make the clips.

    Raises:
        OutputError: The data folder cannot be made, another server uses it, or the job store cannot be used.
    """

    def __init__(self, options: JobOptions) -> None:
        self._options = options
        self._data = Path(options.worker.data).absolute()  # workers elsewhere have another current folder
        self.jobs_folder, self.incoming_folder = self._data / "jobs", self._data / "incoming"
        worker = replace(options.worker, data=str(self._data), server=token_hex(8))
        with ExitStack() as opened:
            # First, so that where it cannot be used no folder is made.
            self._shared = worker.open_shared(patient=False)
            if self._shared is not None:
                opened.callback(self._shared.close)
            try:
                for folder in (self._data, self.jobs_folder, self.incoming_folder):
                    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._lock = opened.enter_context(_locked(self._data, shared=self._shared is not None))
            except OSError as error:
                taken = isinstance(error, BlockingIOError)
                reason = "another server uses this data folder" if taken else f"no data folder ({error.strerror})"
                raise OutputError(f"{options.worker.data}: {reason}") from error
            self.store: Store = self._shared or worker.open_own()
            opened.pop_all()  # all is well: ``running`` closes them
        self.board = Board()
        self.pool = self._pool(worker)
        self.draining = False
        self._ended: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def _pool(self, worker: WorkerOptions) -> Pool:
        if self._options.make_pool is not None and self._shared is not None:
            return self._options.make_pool(worker, self._shared, self._changed)
        slots = tuple(Slot(number, device) for number, device in enumerate(self._options.devices))
        return WorkerPool(worker, slots, self.store, self._changed)

    # --- life ---

    @asynccontextmanager
    async def running(self) -> AsyncGenerator["JobLayer"]:
        """Recover what a former server left, start the workers; at the end stop them."""
        recovered = self.store.recover()
        self._sweep()
        _LOG.info("jobs recovered", extra={"event": "jobs_recovered", "count": len(recovered)})
        self.pool.start()
        self._tasks = [asyncio.create_task(self._tidy())]
        if self._shared is not None:
            follower = Follower(
                store=self._shared,
                lease_seconds=self._options.worker.lease_seconds,
                changed=self.board.changed,
                ended=self._see_off,
                queued=self.pool.wake,
            )
            self._tasks.append(asyncio.create_task(follower.run()))
        try:
            yield self
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self.pool.stop()
            self.store.close()
            self._lock.close()

    async def drain(self, seconds: float) -> bool:
        """Take no more jobs and wait for those that run, at most so long; queued ones are left for the next start.

        Returns:
            Whether none is running any more.
        """
        self.draining = True
        left = True
        with suppress(StoreUnavailableError):  # one that is gone is not waited for
            # A worker that finishes would take the next job, so it is told that there is none.
            self.store.hold(True)
            end = time.monotonic() + seconds
            with self.board.watch(None) as watch:
                while (left := self.store.busy() > 0) and time.monotonic() < end:
                    await watch.wait(min(1.0, max(0.0, end - time.monotonic())))
        self.board.ring_all()
        return not left

    # --- what routes do ---

    def folder(self, job_id: str) -> Path:
        """Where a job's files are."""
        return self.jobs_folder / job_id

    def submit(self, job: NewJob, files: Path) -> Job:
        """Queue a job whose files are in ``files``; that folder becomes the job's, or is removed.

        Raises:
            UnavailableError: The server drains.
            QueueFullError: Too many jobs wait.
            DuplicateKeyError: The idempotency key has been used.
        """
        files.rename(self.folder(job.id))
        try:
            if self.draining:
                raise UnavailableError
            stored = self.store.add(job, max_queued=self._options.max_queued)
        except BaseException:
            shutil.rmtree(self.folder(job.id), ignore_errors=True)
            raise
        self.pool.wake()
        self.board.changed(job.id)
        return stored

    def check_room(self, count: int = 1) -> None:
        """Refuse early, before inputs are fetched, what ``submit`` would refuse.

        Raises:
            UnavailableError: The server drains.
            QueueFullError: Too many jobs wait.
        """
        if self.draining:
            raise UnavailableError
        if self.store.count("queued") + count > self._options.max_queued:
            raise QueueFullError

    def cancel(self, job_id: str) -> Job | None:
        """Cancel a job: at once where it waits, at its next step where it runs."""
        job = self.store.cancel(job_id)
        self._changed(job_id)
        return job

    def discard(self, job_id: str) -> None:
        """Cancel a job where it is not done, and have it removed as soon as it is."""
        self.store.expire(job_id)
        self.cancel(job_id)
        self._see_off()
        self.remove_expired(time.time())

    async def wait(self, job_id: str) -> Job | None:
        """The job once it is done; None once it is forgotten."""
        with self.board.watch(job_id) as watch:
            while True:
                job = self.store.get(job_id)
                if job is None or job.done:
                    return job
                await watch.wait()

    def clip(self, job: Job) -> Path | None:
        """The finished clip."""
        path = self.folder(job.id) / CLIP_NAME
        return path if job.state == "succeeded" and path.is_file() else None

    def live(self, job: Job) -> Path:
        """Where the clip grows while it is made; another file for every attempt."""
        return self.folder(job.id) / live_name(job.attempts)

    def seconds_until_free(self) -> int:
        """When the queue may have room again: its length times the median clip, over all slots. At least 1."""
        seconds = statistics.median(self.store.recent_seconds() or [_GUESSED_SECONDS])
        waiting = self.store.count("queued", "processing")
        workers = max(1, len(self.pool.slots), self._shared.workers() if self._shared is not None else 0)
        return max(1, math.ceil(seconds * waiting / workers))

    # --- within ---

    def _changed(self, job_id: str) -> None:
        # Who sees to the end of a shared job is settled by the store.
        if self._shared is None and job_id not in self._ended:
            job = self.store.get(job_id)
            if job is not None and job.done:
                self._ended.add(job_id)
                self._prune(job)
                self._take_leave(job)
        self.board.changed(job_id)

    def _see_off(self) -> None:
        """See to the shared jobs that have ended and that no other front end has seen to."""
        for job_id in () if self._shared is None else self._shared.take_ended():
            job = self.store.get(job_id)
            if job is not None:
                self._prune(job, keep=live_name(job.attempts))
                asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._prune, job)
                self._take_leave(job)

    def _take_leave(self, job: Job) -> None:
        self._options.on_end(job)
        if job.expires_at is not None and job.expires_at <= time.time():
            self.remove_expired(time.time())

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(_JANITOR_SECONDS)
            try:
                self.remove_expired(time.time())
            except StoreUnavailableError as error:  # a full disk, say, of which it is what makes room
                _LOG.error("jobs not tidied", extra={"event": "tidy_failed", "reason": str(error)})

    def remove_expired(self, now: float) -> list[str]:
        """Remove the files, then the records, of jobs whose time is over."""
        ids = self.store.expired(now)
        for job_id in ids:
            shutil.rmtree(self.folder(job_id), ignore_errors=True)
            self.store.forget(job_id)
            self._ended.discard(job_id)
        return ids

    def _prune(self, job: Job, keep: str = "") -> None:
        """Leave of a finished job's files the clip, or nothing: what the caller sent is needed no more."""
        with suppress(FileNotFoundError):
            for file in self.folder(job.id).iterdir():
                if file.name != keep and (job.state != "succeeded" or file.name != CLIP_NAME):
                    file.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what a crash left between a folder and its record, and half-received inputs."""
        age = 0.0 if self._shared is None else _ABANDONED_SECONDS
        for folder in self.jobs_folder.iterdir():
            job = self.store.get(folder.name)
            if job is None and _older(folder, age):
                shutil.rmtree(folder, ignore_errors=True)
            elif job is not None and job.done:
                lingers = self._shared is not None and time.time() - (job.completed_at or 0) < _LINGER_SECONDS
                self._prune(job, keep=live_name(job.attempts) if lingers else "")
        for left in self.incoming_folder.iterdir():
            if _older(left, age):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _older(path: Path, seconds: float) -> bool:
    """Whether nothing has been put into a folder for so long; one that is gone meanwhile has not."""
    with suppress(FileNotFoundError):
        return not seconds or time.time() - path.stat().st_mtime > seconds
    return False


def _locked(folder: Path, *, shared: bool) -> TextIO:
    """The lock file of a data folder, locked until it is closed; several may share it, but not with one that does not.

    Open for reading too, as a network file system wants it for a lock that is shared.
    """
    lock = (folder / "lock").open("a+")
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise
    return lock
