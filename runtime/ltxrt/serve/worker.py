# SPDX-License-Identifier: Apache-2.0
"""A worker process: holds one pipeline, claims jobs from the store and makes one clip at a time.

Started by ``WorkerPool`` as ``python -m ltxrt.serve.worker OPTIONS``. Lines on stdin wake it; when stdin ends, its
server is gone, and it ends at once, whatever it is doing. Lines on stdout tell the server what changed.
"""

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn, TextIO

from ..media import bundled_speech
from ..pipeline import Pipeline
from ..request import Request
from .clip_job import ClipJob
from .store import JobStore

__all__ = ["WorkerOptions", "main", "open_bundle"]

_WAKE_SECONDS = 1.0  # a lost wake-up costs no more than this


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What a worker process is started with.

    Attributes:
        name: Its name in the store, never used twice.
        data: The server's data folder.
        bundle: Folder of the bundle; None for the tiny one.
        threads: CPU threads within one operator; 0 for every core.
        factory: ``module:function`` that opens the pipeline from these options.
        warm_up: Presets whose networks are loaded and run once before the worker says that it is ready.
        retention_seconds: How long jobs are kept after their end.
        timeout_seconds: Longest run of one job.
    """

    name: str
    data: str
    bundle: str | None = None
    threads: int = 0
    factory: str = "ltxrt.serve.worker:open_bundle"
    warm_up: tuple[str, ...] = ("high",)
    retention_seconds: float = 86_400
    timeout_seconds: float = 3600

    def as_argument(self) -> str:
        """The options as one command-line argument."""
        return json.dumps(asdict(self))


def open_bundle(options: WorkerOptions) -> Pipeline:
    """The pipeline of the bundle that the options name."""
    return Pipeline.open(options.bundle, threads=options.threads)


def main(argument: str) -> None:
    """Serve jobs until stdin ends."""
    options = WorkerOptions(**json.loads(argument))
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

    module, _, function = options.factory.partition(":")
    opener: Callable[[WorkerOptions], Pipeline] = getattr(import_module(module), function)
    pipeline = opener(options)
    _warm_up(pipeline, options.warm_up)
    store = JobStore(Path(options.data) / "jobs.sqlite", retention_seconds=options.retention_seconds)
    tell("ready")
    trusted = True
    while trusted:
        wake.clear()
        job = store.claim(options.name)
        if job is None:
            wake.wait(_WAKE_SECONDS)
            continue
        tell(job.id)
        clip = ClipJob(
            job=job,
            folder=Path(options.data) / "jobs" / job.id,
            worker=options.name,
            store=store,
            tell=lambda job_id=job.id: tell(job_id),
            timeout_seconds=options.timeout_seconds,
        )
        trusted = clip.run(pipeline)


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
