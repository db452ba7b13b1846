# SPDX-License-Identifier: Apache-2.0
"""Figures with their targets, the details behind them, and the clips that a person should see."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ltxrt_export.tiny.measure import Pictures
from ltxrt_export.tiny.mouth import Floats

from .studio import Clip

__all__ = ["Figure", "Report", "Strip"]

_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number.

    Attributes:
        question: What was asked.
        name: What of it.
        value: The answer.
        unit: Its unit; empty for correlations and shares.
        at_least: Target from below, or None.
        at_most: Target from above, or None.
    """

    question: str
    name: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def passed(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.at_least is None and self.at_most is None:
            return None
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    @property
    def target(self) -> str:
        """The target in words; empty without one."""
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:g} to {self.at_most:g}"
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"


@dataclass(frozen=True, slots=True)
class Strip:
    """One line of the picture sheet: a few frames and, where there are any, the curves of sound and mouth.

    Attributes:
        title: What is shown.
        pictures: The frames, [H, W, 3] each.
        energy: What the mouth should do, [n], or None.
        mouth: What it does, [n], or None.
        moments: Index of every picture in the curves.
    """

    title: str
    pictures: Sequence[Pictures]
    energy: Floats | None = None
    mouth: Floats | None = None
    moments: tuple[int, ...] = ()

    @classmethod
    def of(cls, title: str, clip: Clip) -> "Strip":
        """Frames of a clip at equal distances, with its curves."""
        pictures = clip.pictures()
        moments = tuple(int(index) for index in np.linspace(0, len(pictures) - 1, _SHOWN).round())
        return cls(title, [pictures[index] for index in moments], clip.shot.energy(), clip.mouth(), moments)


@dataclass(slots=True)
class Report:
    """Everything that a run finds.

    Attributes:
        figures: The numbers.
        details: Numbers of single clips, by question.
        strips: Lines of the picture sheet.
        prompts: Prompt, first picture of its clip and whether all colours are right, for the sheet.
    """

    figures: list[Figure] = field(default_factory=list[Figure])
    details: dict[str, list[dict[str, Any]]] = field(default_factory=dict[str, list[dict[str, Any]]])
    strips: list[Strip] = field(default_factory=list[Strip])
    prompts: list[tuple[str, Pictures, bool]] = field(default_factory=list[tuple[str, Pictures, bool]])

    def detail(self, question: str, **values: Any) -> None:
        """Keep what one clip gave."""
        self.details.setdefault(question, []).append(values)

    def missed(self) -> list[Figure]:
        """Figures whose target is not met."""
        return [figure for figure in self.figures if figure.passed is False]

    def table(self) -> Iterator[str]:
        """The figures as lines of text, by question."""
        for question in dict.fromkeys(figure.question for figure in self.figures):
            yield f"{question}:"
            for figure in self.figures:
                if figure.question == question:
                    value = f"{figure.value:.3f}".rstrip("0").rstrip(".")
                    verdict = {None: "", True: "pass", False: "MISSED"}[figure.passed]
                    yield f"  {figure.name:<52} {value:>8} {figure.unit:<6} {figure.target:>8}  {verdict}".rstrip()

    def as_json(self) -> dict[str, Any]:
        """Figures with verdicts, and the details."""
        figures = [{**asdict(figure), "passed": figure.passed} for figure in self.figures]
        return {"passed": not self.missed(), "figures": figures, "details": self.details}
