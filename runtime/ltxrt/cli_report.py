# SPDX-License-Identifier: Apache-2.0
"""What the command line says, as text: summaries, tables, and errors as JSON."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .errors import MediaError, RequestError
from .preset import Preset

if TYPE_CHECKING:
    from .engine_store import Backend
    from .readback import ClipReport
    from .result import Result

__all__ = [
    "columns",
    "engine_line",
    "error_json",
    "preset_json",
    "preset_lines",
    "report_json",
    "report_lines",
    "result_lines",
    "size_text",
]


def columns(rows: Iterable[Sequence[str]], indent: int = 0) -> Iterator[str]:
    """Rows as lines with aligned columns."""
    rows = list(rows)
    widths = [
        max(len(row[index]) for row in rows if index < len(row)) for index in range(max(map(len, rows), default=0))
    ]
    for row in rows:
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        yield f"{' ' * indent}{cells}".rstrip()


def size_text(size_bytes: int) -> str:
    """A file size in the largest decimal unit that gives at least 1."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} bytes"


def engine_line(chosen: "Backend", backends: Iterable["Backend"]) -> str:
    """Which backend runs, and why each of the others does not."""
    off = "; ".join(f"{backend.name}: {backend.reason}" for backend in backends if not backend.available)
    return f"engine: {chosen.name}" + (f" (off: {off})" if off else "")


def result_lines(result: "Result", size_bytes: int) -> Iterator[str]:
    """A finished clip for people."""
    audio = (
        "no audio"
        if result.audio_samples is None
        else f"{result.audio_samples} audio samples at {result.audio_rate} Hz"
    )
    rate = f"{float(result.rate):.6g}"
    yield (
        f"{result.frames} frames, {result.duration_seconds:.3f} s, {result.width}x{result.height} at {rate} frames a "
        f"second, {audio}, {size_text(size_bytes)}"
    )
    yield f"seed {result.seed}, quality {result.video_quality}, model {result.model}, engine {result.engine}"
    yield ", ".join(f"{stage.replace('_', ' ')} {seconds:.2f} s" for stage, seconds in result.stage_seconds.items())
    yield f"{result.wall_seconds:.2f} s in all, {result.real_time_factor:.2f} s of work per second of video"
    yield from (f"note: {note}" for note in result.notes)


def report_lines(report: "ClipReport") -> Iterator[str]:
    """A read-back report: what the clip is, then a table of checks."""
    seconds = float(report.video_duration_seconds)
    rate = f"{float(report.frame_rate):.6g}"
    yield f"{report.frames} frames, {seconds:.3f} s, {report.width}x{report.height} at {rate} frames a second"
    yield from columns([("ok" if passed else "FAILED", name, detail) for name, passed, detail in report.checks])
    failed = len(report.problems)
    yield f"{len(report.checks)} checks, {failed or 'none'} failed"


def report_json(report: "ClipReport") -> dict[str, Any]:
    """A read-back report as plain JSON values; frame rates are exact, as text."""
    return {
        "ok": report.ok,
        "frames": report.frames,
        "frames_per_second": str(report.frame_rate),
        "width": report.width,
        "height": report.height,
        "video_start_seconds": float(report.video_start_seconds),
        "video_duration_seconds": float(report.video_duration_seconds),
        "audio_start_seconds": _float(report.audio_start_seconds),
        "audio_duration_seconds": _float(report.audio_duration_seconds),
        "audio_samples": report.audio_samples,
        "audio_rate": report.audio_rate,
        "checks": [check._asdict() for check in report.checks],
    }


def preset_lines(presets: Iterable[Preset]) -> Iterator[str]:
    """Presets as a table; ``steps`` is stage 1 + stage 2."""
    rows = [(preset.name, _steps(preset), str(preset.crf), preset.description) for preset in presets]
    yield from columns([("preset", "steps", "crf", "what it is"), *rows])


def preset_json(preset: Preset) -> dict[str, Any]:
    """A preset as plain JSON values."""
    return asdict(preset)


def error_json(error: BaseException, message: str, exit_code: int) -> dict[str, Any]:
    """An error as JSON; a refused field is named, with what it allows."""
    described: dict[str, Any] = {"type": type(error).__name__, "message": message, "exit_code": exit_code}
    if isinstance(error, RequestError):
        described |= {"field": error.field, "allowed": error.allowed}
    if isinstance(error, MediaError):
        described["problem"] = error.problem
    return {"error": described}


def _steps(preset: Preset) -> str:
    return f"{len(preset.stage_1_sigmas) - 1} + {len(preset.stage_2_sigmas) - 1}"


def _float(seconds: Any) -> float | None:
    return None if seconds is None else float(seconds)
