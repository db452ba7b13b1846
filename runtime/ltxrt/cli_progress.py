# SPDX-License-Identifier: Apache-2.0
"""Progress on stderr: a bar per stage on a terminal, a few plain lines a stage anywhere else."""

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from .result import Progress

__all__ = ["Bar", "Lines", "Reporter", "reporter"]

_LINES_PER_STAGE = 4


class Reporter(Protocol):
    """Shows progress events while it is entered."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, progress: Progress) -> None:
        """Show that a stage got this far."""
        ...


def reporter(stages: Sequence[str] = (), stream: TextIO | None = None) -> Reporter:
    """Bars where ``stream`` (stderr) is a terminal that can move its cursor, lines otherwise.

    Args:
        stages: Names of the stages in their order, where they are known beforehand.
        stream: Where to write.
    """
    target = stream or sys.stderr
    # Console reads TERM and NO_COLOR; FORCE_COLOR must not put bars into a log file, so the stream itself is asked.
    console = Console(file=target)
    return Bar(stages, console) if target.isatty() and not console.is_dumb_terminal else Lines(target)


class Bar:
    """A bar per stage, with the time left (see ``Reporter``)."""

    def __init__(self, stages: Sequence[str], console: Console) -> None:
        self._stages = stages
        self._tasks: dict[str, TaskID] = {}
        self._bars = Bars(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, progress: Progress) -> None:
        """See ``Reporter.show``."""
        self._bars.update(self._task(progress.stage), completed=progress.step, total=progress.steps)
        following = self._after(progress.stage)
        if progress.step == progress.steps and following is not None:
            # It has begun, though its first step may take a while: a bar that moves without a length.
            self._task(following)

    def _task(self, stage: str) -> TaskID:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(_label(stage), total=None)
        return self._tasks[stage]

    def _after(self, stage: str) -> str | None:
        if stage not in self._stages:
            return None
        following = self._stages[self._stages.index(stage) + 1 :]
        return following[0] if following else None


class Lines:
    """A line at every quarter of a stage, with the time left (see ``Reporter``)."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._stage = ""
        self._began = self._latest = clock()
        self._shown = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()

    def show(self, progress: Progress) -> None:
        """See ``Reporter.show``."""
        if progress.stage != self._stage:
            # A stage begins where the one before it ended; its own first event comes after work.
            self._stage, self._began, self._shown = progress.stage, self._latest, 0
        self._latest = self._clock()
        quarter = _LINES_PER_STAGE * progress.step // progress.steps
        if quarter <= self._shown:
            return
        self._shown = quarter
        seconds = self._latest - self._began
        left = seconds * (progress.steps - progress.step) / progress.step
        time_text = f"{left:.0f} s left" if progress.step < progress.steps else f"done in {seconds:.1f} s"
        self._stream.write(f"{_label(progress.stage)}: {progress.step}/{progress.steps}, {time_text}\n")
        self._stream.flush()


def _label(stage: str) -> str:
    return stage.replace("_", " ")
