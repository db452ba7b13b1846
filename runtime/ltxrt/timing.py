# SPDX-License-Identifier: Apache-2.0
"""Where the time of one clip goes: wall seconds by stage and seconds inside the backends."""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

from .engine import Array, Capture, Engine, LoopCapture, Tensor, TensorSpec, run_resident

__all__ = ["TimedEngine", "Timings"]


class Timings:
    """Seconds by stage and by backend call, for one clip. Not safe for concurrent use.

    Attributes:
        stages: Wall seconds by stage, in the order in which they began.
        backend: Seconds inside engines, encoders and decoders that are not this package's own code, by name.
        marks: Seconds from the start to named moments, for example ``first_fragment``.
    """

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.backend: dict[str, float] = {}
        self.marks: dict[str, float] = {}
        self._start = time.perf_counter()

    @property
    def wall_seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def mark(self, name: str) -> None:
        """Note that something happened now; the first time counts."""
        self.marks.setdefault(name, self.wall_seconds)

    def note(self, name: str) -> None:
        """Note that something happened now; the last time counts."""
        self.marks[name] = self.wall_seconds

    def add_backend(self, name: str, seconds: float) -> None:
        """Add time spent outside this package's own code."""
        self.backend[name] = self.backend.get(name, 0.0) + seconds

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Count the wall time of the block as that stage's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def backend_call(self, name: str) -> Generator[None]:
        """Count the wall time of the block as spent in that backend."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_backend(name, time.perf_counter() - start)


class TimedEngine:
    """An engine whose calls are counted in a clip's timings (see ``Engine``)."""

    def __init__(self, engine: Engine, timings: Timings) -> None:
        self._engine = engine
        self._timings = timings

    @property
    def name(self) -> str:
        """The network's name."""
        return self._engine.name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The network's inputs."""
        return self._engine.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The network's outputs."""
        return self._engine.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See ``Engine.run``."""
        with self._timings.backend_call(self.name):
            return self._engine.run(feeds)

    def capture(self, feeds: Mapping[str, Array]) -> Capture:
        """See ``Engine.capture``."""
        with self._timings.backend_call(self.name):
            capture = self._engine.capture(feeds)
        kind = _TimedLoop if isinstance(capture, LoopCapture) else _TimedCapture
        return kind(capture, self.name, self._timings)

    def run_resident(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See ``ltxrt.engine.run_resident``; on a device the time counts in which the work is handed over."""
        with self._timings.backend_call(self.name):
            return run_resident(self._engine, feeds)


class _TimedCapture:
    def __init__(self, capture: Capture, name: str, timings: Timings) -> None:
        self._capture = capture
        self._name = name
        self._timings = timings

    @property
    def inputs(self) -> Mapping[str, Array]:
        return self._capture.inputs

    @property
    def outputs(self) -> Mapping[str, Array]:
        return self._capture.outputs

    def replay(self) -> None:
        with self._timings.backend_call(self._name):
            self._capture.replay()


class _TimedLoop(_TimedCapture):
    def iterate(
        self, steps: Sequence[Mapping[str, Array]], carried: Mapping[str, str]
    ) -> Iterator[Mapping[str, Tensor]]:
        assert isinstance(self._capture, LoopCapture)  # what this class is chosen for
        outputs = self._capture.iterate(steps, carried)
        while True:
            with self._timings.backend_call(self._name):
                step = next(outputs, None)
            if step is None:
                return
            yield step
