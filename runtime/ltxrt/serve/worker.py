# SPDX-License-Identifier: Apache-2.0
"""A worker process: holds one pipeline, claims jobs from the store and makes one clip at a time.

Started by ``WorkerPool`` as ``python -m ltxrt.serve.worker OPTIONS``. Lines on stdin wake it; when stdin ends, its
server is gone, and it ends at once, whatever it is doing. Lines on stdout tell the server what changed. A replica of
``ltxrt serve --ray`` is the same ``Worker`` without that process around it.
"""

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import NoReturn, TextIO

from ..media import bundled_speech
from ..pipeline import Pipeline
from ..request import Request
from .clip_job import ClipJob
from .heartbeat import beating
from .job import Job
from .store import JobStore
from .store_protocol import SharedStore, Store

__all__ = ["REDIS_VARIABLE", "Worker", "WorkerOptions", "main", "open_bundle"]

#: Brings a worker process the address of Redis, which may hold a password: every user sees a command line.
REDIS_VARIABLE = "LTXRT_REDIS"
_WAKE_SECONDS = 1.0  # a lost wake-up costs no more than this


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What a worker process is started with.

    Attributes:
        name: Its name in the store, never used twice.
        data: The server's data folder.
        bundle: Folder of the bundle; None for the tiny one.
        threads: CPU threads within one operator; 0 for every core.
        prompt_cache: Where encoded prompts are kept: ``memory``, ``off``, or a folder.
        factory: ``module:function`` that opens the pipeline from these options.
        warm_up: Presets whose networks are loaded and run once before the worker says that it is ready.
        retention_seconds: How long jobs are kept after their end.
        timeout_seconds: Longest run of one job.
        redis: Address of the Redis that holds the jobs; None for SQLite in the data folder.
        lease_seconds: How long a silent worker counts as alive; with Redis only.
        server: The front end that started it; with Redis only.
    """

    name: str
    data: str
    bundle: str | None = None
    threads: int = 0
    prompt_cache: str = "memory"
    factory: str = "ltxrt.serve.worker:open_bundle"
    warm_up: tuple[str, ...] = ("high",)
    retention_seconds: float = 86_400
    timeout_seconds: float = 3600
    redis: str | None = None
    lease_seconds: float = 30
    server: str = ""

    def as_argument(self) -> str:
        """The options as one command-line argument, but for the address of Redis."""
        return json.dumps({**asdict(self), "redis": None})

    def open_shared(self, *, patient: bool) -> SharedStore | None:
        """The store in Redis, where that is where jobs are.

        Args:
            patient: See ``RedisStore``.

        Raises:
            OutputError: It cannot be used.
        """
        if self.redis is None:
            return None
        from .store_redis import RedisStore  # the redis extra

        return RedisStore(
            self.redis,
            retention_seconds=self.retention_seconds,
            lease_seconds=self.lease_seconds,
            server=self.server,
            patient=patient,
        )

    def open_own(self) -> JobStore:
        """The store in the data folder."""
        return JobStore(Path(self.data) / "jobs.sqlite", retention_seconds=self.retention_seconds)


class Worker:
    """A warm pipeline, and the store whose jobs it makes, one at a time. Not safe to share between threads.

    Args:
        options: What it works with; the name is not used here.
    """

    def __init__(self, options: WorkerOptions) -> None:
        module, _, function = options.factory.partition(":")
        opener: Callable[[WorkerOptions], Pipeline] = getattr(import_module(module), function)
        self._options, self._pipeline = options, opener(options)
        _warm_up(self._pipeline, options.warm_up)
        self.shared = options.open_shared(patient=True)
        self._store: Store = self.shared or options.open_own()
        self.trusted = True

    def turn(self, name: str, tell: Callable[[str], None]) -> bool:
        """Make the next clip, if one waits. After an engine's error ``trusted`` is False.

        Args:
            name: The name under which the job is claimed.
            tell: Called with the job's id whenever others may want to know of it.

        Raises:
            Exception: As ``ClipJob.run``.
        """
        job = self._store.claim(name)
        if job is not None:
            tell(job.id)
            self.trusted = self._clip(job, name, tell).run(self._pipeline)
        return job is not None

    def _clip(self, job: Job, name: str, tell: Callable[[str], None]) -> ClipJob:
        return ClipJob(
            job=job,
            folder=Path(self._options.data) / "jobs" / job.id,
            worker=name,
            store=self._store,
            tell=lambda: tell(job.id),
            timeout_seconds=self._options.timeout_seconds,
            live_stays=self.shared is not None,
        )


def open_bundle(options: WorkerOptions) -> Pipeline:
    """The pipeline of the bundle that the options name."""
    return Pipeline.open(options.bundle, threads=options.threads, prompt_cache=options.prompt_cache)


def main(argument: str) -> None:
    """Serve jobs until stdin ends."""
    options = replace(WorkerOptions(**json.loads(argument)), redis=os.environ.get(REDIS_VARIABLE))
    # Ctrl-C and a service manager's SIGTERM reach the whole group; the server alone decides when a worker ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel = _own_stdout()
    wake = threading.Event()
    threading.Thread(target=_listen, args=(wake,), daemon=True).start()

    def tell(word: str) -> None:
        try:
            channel.write(f"{word}\n")
            channel.flush()
        except BrokenPipeError:
            _end_with_server()  # seen here before stdin's end: not a failure of the job

    worker = Worker(options)
    shared = worker.shared
    with nullcontext() if shared is None else beating(shared, options.name, options.lease_seconds):
        tell("ready")
        while worker.trusted:
            wake.clear()
            if not worker.turn(options.name, tell):
                wake.wait(_WAKE_SECONDS)


def _warm_up(pipeline: Pipeline, presets: tuple[str, ...]) -> None:
    """Load every network and run it once, so that the first caller waits no longer than the hundredth."""
    for preset in presets:
        request = Request(
            prompt="warm-up",
            input_audio=bundled_speech(),
            match_audio_length=False,
            num_frames=9,
            resolution="128x128",
            video_quality=preset,
            seed=0,
        )
        with tempfile.TemporaryFile() as discarded:
            discarded.writelines(pipeline.generate(request))


def _own_stdout() -> TextIO:
    """The way to the server; what libraries print goes to stderr from now on."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return channel


def _listen(wake: threading.Event) -> None:
    for _ in sys.stdin:
        wake.set()
    _end_with_server()


def _end_with_server() -> NoReturn:
    # No clean-up: the store's file and the job's folder are as safe against this as against a crash.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
