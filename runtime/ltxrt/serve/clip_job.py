# SPDX-License-Identifier: Apache-2.0
"""One job on a pipeline: fragments to a file that others may read meanwhile, progress to the store, then the clip."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..clip_file import faststart
from ..errors import (
    BundleError,
    CapacityError,
    EngineError,
    LtxrtError,
    MediaError,
    OutputError,
    RequestError,
    VerificationError,
)
from ..pipeline import Pipeline
from ..readback import check_clip, require
from ..request import Request
from ..result import STAGES, Fragment, Progress, Result
from .job import Job
from .store import StoreUnavailableError
from .store_protocol import Store

__all__ = ["CLIP_NAME", "ClipJob", "live_name", "public_error"]

#: The finished clip.
CLIP_NAME = "clip.mp4"

# Usual share of each stage in the whole, for the one number that a progress bar shows.
_SHARES: dict[str, float] = dict(zip(STAGES, (0.02, 0.06, 0.27, 0.02, 0.43, 0.20), strict=True))
_EARLY = 0.05  # below this much progress, time left is a guess that nobody should see


def live_name(attempt: int) -> str:
    """The stream as it grows; gone when the job is over. Every attempt has its own.

    A worker that has been given up for dead may not be: what it still writes, and removes when it finds out, must not
    be the file of the worker that makes the clip again.
    """
    return f"live-{attempt}.mp4"


class _StopJobError(Exception):
    """The job is to end here; ``state`` and ``outcome`` say how, None where it is this worker's no more."""

    def __init__(self, state: str, **outcome: str) -> None:
        super().__init__(state)
        self.state, self.outcome = state, outcome


@dataclass(slots=True)
class ClipJob:
    """Carries out one claimed job and writes what becomes of it.

    Attributes:
        job: The job.
        folder: Its folder.
        worker: The name under which this process claimed it.
        store: Where its states go.
        tell: Called after every change that others may wait for.
        timeout_seconds: Longest run.
        live_stays: Leave the stream's file to the front ends, one of which may be reading it on another machine.
    """

    job: Job
    folder: Path
    worker: str
    store: Store
    tell: Callable[[], None]
    timeout_seconds: float
    live_stays: bool = False
    _started: float = field(default_factory=time.monotonic)

    def run(self, pipeline: Pipeline) -> bool:
        """Make the clip.

        Returns:
            Whether the pipeline is still to be trusted: after an engine's error it is not, unless nothing has run.

        Raises:
            StoreUnavailableError: The store is gone; the job is its worker's until the lease ends.
            Exception: Whatever nobody foresaw, after the job has been marked as failed.
        """
        try:
            result = self._make(pipeline)
        except StoreUnavailableError:
            raise  # whose job it is by now, only the store knows
        except _StopJobError as stopped:
            self._end(stopped.state, stopped.outcome)
        except (LtxrtError, OSError) as error:
            kind, message = public_error(error)
            self._end("failed", {"error_type": kind, "error_message": message})
            return isinstance(error, CapacityError) or not isinstance(error, EngineError)
        except BaseException as error:
            message = f"the worker failed ({type(error).__name__}); its log says more"
            self._end("failed", {"error_type": "internal_error", "error_message": message})
            raise
        else:
            self._end("succeeded", {"result": result})
        return True

    @property
    def _live(self) -> Path:
        return self.folder / live_name(self.job.attempts)

    @property
    def _checked(self) -> Path:
        return self.folder / f"checked-{self.job.attempts}.mp4"

    def _make(self, pipeline: Pipeline) -> dict[str, Any]:
        live = self._live
        result: Result | None = None
        with closing(pipeline.events(Request(**self.job.request))) as events, live.open("wb") as file:
            for event in events:
                if isinstance(event, Progress):
                    self._advance(event)
                elif isinstance(event, Fragment):
                    file.write(event.data)
                    file.flush()
                else:
                    result = event
                self.tell()
        assert result is not None  # events end with it
        faststart(live, self._checked)
        require(check_clip(self._checked, result.expectation))
        self._checked.replace(self.folder / CLIP_NAME)
        return {**result.as_json(), "bytes": (self.folder / CLIP_NAME).stat().st_size}

    def _advance(self, event: Progress) -> None:
        elapsed = time.monotonic() - self._started
        if elapsed > self.timeout_seconds:
            message = f"the clip took longer than {self.timeout_seconds:g} s"
            raise _StopJobError("failed", error_type="timeout", error_message=message)
        before = sum(_SHARES[stage] for stage in STAGES[: STAGES.index(event.stage)])
        progress = round(before + _SHARES[event.stage] * event.step / max(event.steps, 1), 4)
        done = {
            "stage": event.stage,
            "step": event.step,
            "steps": event.steps,
            "progress": progress,
            "seconds_left": round(elapsed / progress * (1 - progress), 1) if progress > _EARLY else None,
        }
        if not self.store.advance(self.job.id, self.worker, done):
            raise _StopJobError("cancelled")

    def _end(self, state: str, outcome: dict[str, Any]) -> None:
        self._checked.unlink(missing_ok=True)
        # First the state, then the file: whoever reads the stream ends when the job is over and nothing more comes.
        if self.store.finish(self.job.id, self.worker, state, outcome) and state != "succeeded":
            (self.folder / CLIP_NAME).unlink(missing_ok=True)
        if not self.live_stays:
            self._live.unlink(missing_ok=True)
        self.tell()


def public_error(error: LtxrtError | OSError) -> tuple[str, str]:
    """A stable type and a message that names no path of ours."""
    match error:
        case MediaError():
            return "invalid_media", f"{error.field} {error.problem}; allowed: {error.allowed}"
        case RequestError():
            return "invalid_params", str(error)
        case EngineError():
            return "engine_error", str(error)
        case BundleError():
            return "bundle_error", "the model cannot be loaded"
        case VerificationError():
            return "verification_error", str(error)
        case OutputError() | OSError():
            return "storage_error", "the clip cannot be written"
        case _:
            return "internal_error", type(error).__name__
