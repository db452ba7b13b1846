# SPDX-License-Identifier: Apache-2.0
"""What a running clip reports: progress, bytes, and the result."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .bundle import Bundle
from .plan import Plan
from .readback import Expectation
from .timing import Timings

__all__ = ["STAGES", "Fragment", "Progress", "Result", "summarise"]

#: Stages in the order in which they report progress.
STAGES = ("load", "encode", "denoise_1", "upsample", "denoise_2", "decode")


@dataclass(frozen=True, slots=True)
class Progress:
    """``step`` of ``steps`` of a stage is done; ``decode`` counts frames."""

    stage: str
    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Fragment:
    """The next bytes of the fragmented MP4."""

    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished clip.

    Attributes:
        seed: The seed that was used.
        frames: Frames of the clip.
        frames_generated: Frames that the model made, the least 8k + 1 that covers them.
        width: Pixels.
        height: Pixels.
        rate: Exact frames a second.
        video_quality: The preset.
        model: Name of the model.
        engine: Backend that ran it.
        image_strength: As used; None without an image.
        audio_samples: Samples of the audio track; None without one.
        audio_rate: Their rate; None without a track.
        notes: What the caller should know about how the request was read.
        stage_seconds: Wall seconds by stage.
        backend_seconds: Seconds inside engines and codecs.
        marks_seconds: Moments since the start: ``last_denoise_step``, ``first_fragment``, ``last_chunk_decoded``.
        wall_seconds: Seconds from request to last byte.
    """

    seed: int
    frames: int
    frames_generated: int
    width: int
    height: int
    rate: Fraction
    video_quality: str
    model: str
    engine: str
    image_strength: float | None
    audio_samples: int | None
    audio_rate: int | None
    notes: tuple[str, ...]
    stage_seconds: dict[str, float]
    backend_seconds: dict[str, float]
    marks_seconds: dict[str, float]
    wall_seconds: float

    @property
    def duration_seconds(self) -> float:
        """Length of the clip."""
        return float(self.frames / self.rate)

    @property
    def real_time_factor(self) -> float:
        """Seconds of work per second of video; below 1 is faster than real time."""
        return self.wall_seconds / self.duration_seconds

    @property
    def expectation(self) -> Expectation:
        """What reading the file back must find."""
        return Expectation(
            frames=self.frames,
            frame_rate=self.rate,
            width=self.width,
            height=self.height,
            audio_samples=self.audio_samples,
            audio_rate=self.audio_rate,
        )

    def as_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return {
            "seed": self.seed,
            "frames": self.frames,
            "frames_generated": self.frames_generated,
            "width": self.width,
            "height": self.height,
            "frames_per_second": str(self.rate),
            "duration_seconds": self.duration_seconds,
            "video_quality": self.video_quality,
            "model": self.model,
            "engine": self.engine,
            "image_strength": self.image_strength,
            "negative_prompt_used": False,  # guidance is 1: the distilled model has no use for it
            "audio_samples": self.audio_samples,
            "audio_rate": self.audio_rate,
            "notes": list(self.notes),
            "stage_seconds": _rounded(self.stage_seconds),
            "backend_seconds": _rounded(self.backend_seconds),
            "marks_seconds": _rounded(self.marks_seconds),
            "wall_seconds": round(self.wall_seconds, 4),
            "real_time_factor": round(self.real_time_factor, 4),
        }


def summarise(plan: Plan, notes: tuple[str, ...], timings: Timings, bundle: Bundle, engine: str) -> Result:
    """The result of a plan that has been carried out."""
    audio = plan.output_audio
    return Result(
        seed=plan.seed,
        frames=plan.frames,
        frames_generated=plan.canvas.frames,
        width=plan.canvas.width,
        height=plan.canvas.height,
        rate=plan.rate,
        video_quality=plan.preset.name,
        model=bundle.manifest.model.name,
        engine=engine,
        image_strength=None if plan.image is None else plan.request.image_strength,
        audio_samples=None if audio is None else audio.sample_count,
        audio_rate=None if audio is None else audio.sample_rate,
        notes=(*plan.notes, *notes),
        stage_seconds=dict(timings.stages),
        backend_seconds=dict(timings.backend),
        marks_seconds=dict(timings.marks),
        wall_seconds=timings.wall_seconds,
    )


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in seconds.items()}
