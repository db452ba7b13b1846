# SPDX-License-Identifier: Apache-2.0
"""``ltxrt bench``: how long clips take on this machine with this bundle.

One clip is made unrecorded, then ``repeats`` more of the same request; reported are median and 90th percentile of
those. Nothing is written but into memory.
"""

import resource
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .cli_report import columns, size_text
from .media import bundled_speech
from .pipeline import Pipeline
from .request import Request
from .result import Progress, Result

__all__ = ["BenchOptions", "BenchReport", "Spread", "bench", "run_bench"]

_PROMPT = "A close-up of a friendly face that looks into the camera and speaks, soft light."


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is measured.

    Attributes:
        bundle: Folder of the bundle; None for the tiny one.
        frames: Frames of the clip, at 24 a second.
        resolution: As in a request.
        video_quality: Preset.
        repeats: Recorded runs.
        threads: CPU threads within one operator; 0 uses every core.
        prompt_cache: See ``Pipeline.open``; ``off`` lets the text encoder run every time.
    """

    bundle: Path | None = None
    frames: int = 121
    resolution: str = "256x256"
    video_quality: str = "high"
    repeats: int = 5
    threads: int = 0
    prompt_cache: str = "off"

    def request(self) -> Request:
        """The clip: the speech that ships with ltxrt, always the same noise.

        Raises:
            RequestError: A field is refused.
        """
        return Request(
            prompt=_PROMPT,
            input_audio=bundled_speech(),
            match_audio_length=False,
            num_frames=self.frames,
            resolution=self.resolution,
            video_quality=self.video_quality,
            seed=0,
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """Of a figure over the recorded runs."""

    p50: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Nearest ranks."""
        ordered = sorted(values)
        p50, p90 = (round(ordered[round(share * (len(ordered) - 1))], 4) for share in (0.5, 0.9))
        return cls(p50, p90)


@dataclass(slots=True)
class BenchReport:
    """What was measured.

    Attributes:
        options: What was asked for.
        opened_seconds: From opening the bundle to having every network loaded.
        peak_memory_bytes: Most memory of the process so far, the interpreter and its libraries included.
        first: The unrecorded run.
        runs: The recorded ones.
    """

    options: BenchOptions
    opened_seconds: float = 0.0
    peak_memory_bytes: int = 0
    first: Result | None = None
    runs: list[Result] = field(default_factory=list[Result])

    def as_json(self) -> dict[str, Any]:
        """The report as plain JSON values; times in seconds."""
        last = self.runs[-1]
        bundle = self.options.bundle
        return {
            "clip": {
                "frames": last.frames,
                "width": last.width,
                "height": last.height,
                "frames_per_second": str(last.rate),
            },
            "model": last.model,
            "engine": last.engine,
            "options": {**asdict(self.options), "bundle": None if bundle is None else str(bundle)},
            "opened_seconds": round(self.opened_seconds, 4),
            "first_run_seconds": None if self.first is None else round(self.first.wall_seconds, 4),
            "peak_memory_bytes": self.peak_memory_bytes,
            **{name: asdict(spread) for name, spread in self._figures().items()},
            "stages": {name: asdict(spread) for name, spread in self._stages().items()},
            "backends": {
                name: asdict(spread) for name, spread in _by_name([run.backend_seconds for run in self.runs]).items()
            },
        }

    def lines(self) -> Iterator[str]:
        """The report for people."""
        last, figures = self.runs[-1], self._figures()
        yield (
            f"{last.frames} frames, {last.width}x{last.height}, quality {last.video_quality}, model {last.model}, "
            f"engine {last.engine}, {len(self.runs)} runs after one that is not counted"
        )
        rows = [("", "p50", "p90")]
        rows += [(name.replace("_", " "), f"{s.p50:.3f} s", f"{s.p90:.3f} s") for name, s in self._stages().items()]
        for name, unit in (("first_fragment_seconds", " s"), ("wall_seconds", " s"), ("real_time_factor", "")):
            spread = figures[name]
            rows.append(
                (name.removesuffix("_seconds").replace("_", " "), f"{spread.p50:.3f}{unit}", f"{spread.p90:.3f}")
            )
        yield from columns(rows)
        yield f"outside engines and codecs {figures['outside_backends_share'].p50:.1%}"
        yield f"bundle opened and networks loaded in {self.opened_seconds:.3f} s"
        yield f"most memory {size_text(self.peak_memory_bytes)}"

    def _figures(self) -> dict[str, Spread]:
        runs = self.runs
        return {
            "wall_seconds": Spread.of([run.wall_seconds for run in runs]),
            "first_fragment_seconds": Spread.of([run.marks_seconds["first_fragment"] for run in runs]),
            "real_time_factor": Spread.of([run.real_time_factor for run in runs]),
            "outside_backends_share": Spread.of(
                [1 - sum(run.backend_seconds.values()) / run.wall_seconds for run in runs]
            ),
        }

    def _stages(self) -> dict[str, Spread]:
        return _by_name([run.stage_seconds for run in self.runs])


def bench(options: BenchOptions) -> Generator[Progress, None, BenchReport]:
    """Measure; progress counts runs, the one that is not recorded included. The generator returns the report.

    Raises:
        LtxrtError: As ``Pipeline.open`` and ``Pipeline.events``.
    """
    request, report = options.request(), BenchReport(options)
    begin = time.perf_counter()
    pipeline = Pipeline.open(options.bundle, threads=options.threads, prompt_cache=options.prompt_cache)
    pipeline.store.engines(options.video_quality)
    report.opened_seconds = time.perf_counter() - begin
    for number in range(options.repeats + 1):
        result = _run(pipeline, request)
        if number == 0:
            report.first = result
        else:
            report.runs.append(result)
        yield Progress("run", number + 1, options.repeats + 1)
    scale = 1 if sys.platform == "darwin" else 1024
    report.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return report


def run_bench(options: BenchOptions) -> BenchReport:
    """``bench``, with its progress on stderr."""
    from .cli_progress import reporter

    steps = bench(options)
    with reporter() as progress:
        while True:
            try:
                progress.show(next(steps))
            except StopIteration as end:
                return end.value


def _run(pipeline: Pipeline, request: Request) -> Result:
    result: Result | None = None
    for event in pipeline.events(request):
        result = event if isinstance(event, Result) else result
    assert result is not None  # events end with it
    return result


def _by_name(runs: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """The spread of each figure; all runs have the same names."""
    return {name: Spread.of([run[name] for run in runs]) for name in runs[-1]}
