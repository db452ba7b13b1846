# SPDX-License-Identifier: Apache-2.0
"""Runs phases one after the other within their shares of the time, with checkpoints and progress."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ltxrt_export.tiny.train.model import TinyModel

__all__ = ["Phase", "Progress", "run_phase"]

_SAVE_SECONDS, _REPORT_SECONDS, _EVALUATE_SECONDS = 60.0, 15.0, 120.0
_LONGEST_STEP_SECONDS = 10.0


class Phase(Protocol):
    """One part of the training."""

    name: str

    def step(self, progress: float) -> float:
        """One update; gives the loss."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Figures on data that is held out."""
        ...

    def finish(self) -> None:
        """Leave the model as the next phase takes it."""
        ...

    def state(self) -> dict[str, Any]:
        """What ``restore`` takes."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """How a phase stands.

    Attributes:
        phase: Its name.
        share: Of its time, 0 to 1.
        steps: Done so far in this run.
        loss: Mean since the last report.
        figures: Of the evaluation, where one was due.
    """

    phase: str
    share: float
    steps: int
    loss: float
    figures: Mapping[str, float]


def run_phase(model: TinyModel, build: Callable[[], Phase], minutes: float, path: Path) -> Iterator[Progress]:
    """Train one phase, saving to ``path`` on the way; a saved phase goes on where it was.

    Args:
        model: What is trained; restored from ``path`` if that exists.
        build: Makes the phase, after the model was restored.
        minutes: Wall time of its steps.
        path: The phase's checkpoint.
    """
    saved: dict[str, Any] | None = (
        torch.load(path, weights_only=True, map_location=torch.get_default_device()) if path.exists() else None
    )
    if saved is not None:
        model.restore(saved["model"])
        if saved["done"]:
            return
    phase = build()
    elapsed = 0.0
    if saved is not None:
        phase.restore(saved["phase"])
        elapsed = float(saved["elapsed"])
    steps, losses = 0, list[float]()
    budget = minutes * 60
    last_save = last_report = last_evaluation = elapsed
    while (elapsed := _agreed(elapsed)) < budget:
        start = time.monotonic()
        losses.append(phase.step(elapsed / budget))
        steps += 1
        # A machine that slept in between has not trained.
        elapsed += min(time.monotonic() - start, _LONGEST_STEP_SECONDS)
        if elapsed - last_report >= _REPORT_SECONDS or elapsed >= budget:
            due = elapsed - last_evaluation >= _EVALUATE_SECONDS or elapsed >= budget
            figures = phase.evaluate() if due else {}
            last_evaluation = elapsed if due else last_evaluation
            last_report = elapsed
            yield Progress(phase.name, min(1.0, elapsed / budget), steps, sum(losses) / len(losses), figures)
            losses.clear()
        if elapsed - last_save >= _SAVE_SECONDS:
            last_save = elapsed
            _save(path, {"model": model.state(), "phase": phase.state(), "elapsed": elapsed, "done": False})
    phase.finish()
    _save(path, {"model": model.state(), "phase": {}, "elapsed": elapsed, "done": True})


def _agreed(seconds: float) -> float:
    """The first process's clock, where several train together."""
    if not dist.is_initialized():
        return seconds
    clock = torch.tensor([seconds], dtype=torch.float64)
    dist.broadcast(clock, 0)
    return float(clock)


def _save(path: Path, content: Mapping[str, Any]) -> None:
    if dist.is_initialized() and dist.get_rank():
        return
    partial = path.with_name(f"{path.name}.partial")
    torch.save(dict(content), partial)
    partial.replace(path)
