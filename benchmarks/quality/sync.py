# SPDX-License-Identifier: Apache-2.0
"""Lip sync of several clips: how well the measured mouths go with their sounds, and how late they come."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ltxrt_export.tiny.measure import best_lag, correlations, synchrony
from ltxrt_export.tiny.mouth import Floats

from .report import Figure, Report
from .studio import Clip

__all__ = ["AT_24_FPS", "AT_OTHER_RATES", "Sample", "mean_correlation", "report_sync"]

#: Least mean correlations.
AT_24_FPS, AT_OTHER_RATES = 0.8, 0.7


@dataclass(frozen=True, slots=True)
class Sample:
    """A measured mouth [n] and what it should do [n]."""

    mouth: Floats
    energy: Floats

    @classmethod
    def of(cls, clip: Clip) -> "Sample":
        """What a clip shows."""
        return cls(clip.mouth(), clip.shot.energy())


def mean_correlation(samples: Sequence[Sample]) -> float:
    """Mean over the clips, each at its best lag within 5 frames."""
    return float(np.mean([synchrony(sample.mouth, sample.energy).correlation for sample in samples]))


def report_sync(report: Report, question: str, name: str, samples: Sequence[Sample], at_least: float) -> None:
    """Mean and 10th percentile at every clip's best lag, and the lag at which the mean over all clips is highest.

    The lag has a target at 24 frames a second only, which is where ``at_least`` is ``AT_24_FPS``.
    """
    found = [synchrony(sample.mouth, sample.energy) for sample in samples]
    scores = [correlations(sample.mouth, sample.energy) for sample in samples]
    lag = best_lag({lag: float(np.mean([score[lag] for score in scores])) for lag in scores[0]})
    values = [sync.correlation for sync in found]
    bounds = (-1.0, 1.0) if at_least == AT_24_FPS else (None, None)
    report.figures += [
        Figure(question, f"{name}: mean correlation", mean_correlation(samples), "", at_least),
        Figure(question, f"{name}: 10th percentile", float(np.quantile(values, 0.1))),
        Figure(question, f"{name}: lag", float(lag), "frames", *bounds),
        Figure(question, f"{name}: clips within one frame", float(np.mean([abs(sync.lag) <= 1 for sync in found]))),
    ]
    for sync in found:
        report.detail(question, of=name, **{key: round(value, 4) for key, value in sync._asdict().items()})
