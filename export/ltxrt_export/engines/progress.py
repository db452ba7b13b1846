# SPDX-License-Identifier: Apache-2.0
"""Watching and stopping a compilation that runs in a thread.

TensorRT holds the thread that it compiles in, and reports from threads of its own. A signal handler, Ctrl-C's too,
runs in the main thread alone: so the compilation gets a thread, and the main one stays free to listen. It stops at
the compiler's next step, which can be minutes away for a large network.
"""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event
from typing import Any, TypeVar

__all__ = ["BuildProgress", "Phase", "progress_monitor"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Phase:
    """Where the compiler is: ``done`` of ``steps`` of a phase; phases nest, ``parent`` is None for an outermost one."""

    name: str
    parent: str | None
    done: int
    steps: int


class BuildProgress:
    """What a compiler reports, and the wish that it stops. Safe to use from several threads."""

    def __init__(self) -> None:
        self._reports: SimpleQueue[Phase | None] = SimpleQueue()
        self._phases: dict[str, Phase] = {}
        self._cancelled = Event()

    @property
    def cancelled(self) -> bool:
        """Whether the compilation should stop."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Let the compilation stop at its next step."""
        self._cancelled.set()

    def started(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        self._report(Phase(name, parent, 0, steps))

    def stepped(self, name: str, step: int) -> bool:
        """Step ``step``, counted from 0, is done. Returns whether to go on."""
        phase = self._phases.get(name)
        if phase is not None:
            self._report(Phase(name, phase.parent, min(step + 1, phase.steps), phase.steps))
        return not self.cancelled

    def finished(self, name: str) -> None:
        """A phase ends, whether or not all of its steps were reported."""
        phase = self._phases.pop(name, None)
        if phase is not None and phase.done < phase.steps:
            self._reports.put(Phase(name, phase.parent, phase.steps, phase.steps))

    def watch(self, work: Callable[[], T]) -> Generator[Phase, None, T]:
        """Run ``work`` in a thread and yield its reports; what it returns or raises is the generator's own end.

        However the consumer leaves (Ctrl-C, closing the generator), the work is cancelled and waited for.
        """
        with ThreadPoolExecutor(1, "engine-build") as pool:
            future = pool.submit(work)
            future.add_done_callback(lambda _: self._reports.put(None))
            try:
                while (report := self._reports.get()) is not None:
                    yield report
            finally:
                if not future.done():
                    self.cancel()
            return future.result()

    def _report(self, phase: Phase) -> None:
        self._phases[phase.name] = phase
        self._reports.put(phase)


def progress_monitor(tensorrt: Any, progress: BuildProgress) -> Any:
    """TensorRT's ``IProgressMonitor`` on ``progress``; must live as long as the builder's configuration."""

    class Monitor(tensorrt.IProgressMonitor):
        def __init__(self) -> None:
            tensorrt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.started(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            progress.finished(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.stepped(phase_name, step)

    return Monitor()
