# SPDX-License-Identifier: Apache-2.0
"""The clips that engines are built for, as data: ``buckets.toml``, or a file like it."""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ltxrt.errors import ExportError
from ltxrt.plan import auto_size
from ltxrt.request import MAX_FRAMES, MAX_SIDE, MIN_SIDE
from ltxrt.shapes import CANVAS_MULTIPLE, PixelShape, covering_frames, frame_rate

__all__ = ["Bucket", "Buckets", "Clip", "load_buckets"]

_WIDEST = Fraction(16, 9)
_Frames = Annotated[int, Field(ge=1, le=MAX_FRAMES)]
_Side = Annotated[int, Field(ge=MIN_SIDE, le=MAX_SIDE, multiple_of=CANVAS_MULTIPLE)]
_Rate = Annotated[float, Field(ge=1, le=60)]


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip: its canvas (frames on the grid 8k + 1) and exact frame rate."""

    canvas: PixelShape
    rate: Fraction


class Bucket(BaseModel):
    """A class of clips; triples are smallest, tuned for, largest.

    Attributes:
        name: Of the profiles.
        frames: Frames of the result.
        frames_per_second: Frame rates.
        canvases: Largest width and height, several times: every size up to one of them, or to its transpose.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    frames: tuple[_Frames, _Frames, _Frames]
    frames_per_second: tuple[_Rate, _Rate, _Rate]
    canvases: Annotated[tuple[tuple[_Side, _Side], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _ordered(self) -> "Bucket":
        for name, triple in (("frames", self.frames), ("frames_per_second", self.frames_per_second)):
            if list(triple) != sorted(triple):
                raise ValueError(f"{name} {list(triple)} do not rise")
        return self

    def both_ways(self) -> tuple[tuple[int, int], ...]:
        """Every canvas and its transpose, width and height, each once."""
        given = ((a, b) for width, height in self.canvases for a, b in ((width, height), (height, width)))
        return tuple(dict.fromkeys(given))

    def tuned(self, canvas: tuple[int, int], budget_pixels: int) -> Clip:
        """What profiles of a canvas are tuned for: ``resolution: auto`` at the canvas's aspect, at most 16:9."""
        aspect = min(max(Fraction(*canvas), 1 / _WIDEST), _WIDEST)
        width, height = map(min, auto_size(aspect, budget_pixels), canvas)
        return Clip(PixelShape(covering_frames(self.frames[1]), height, width), frame_rate(self.frames_per_second[1]))

    def extremes(self, canvas: tuple[int, int]) -> Iterator[Clip]:
        """Clips between which everything that a network sees rises or falls steadily."""
        sides = product((MIN_SIDE, canvas[0]), (MIN_SIDE, canvas[1]))
        for (width, height), frames, rate in product(sides, self.frames[::2], self.frames_per_second[::2]):
            yield Clip(PixelShape(covering_frames(frames), height, width), frame_rate(rate))


class Buckets(BaseModel):
    """All buckets, in the order in which a runtime tries them, and the usual length of a prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens: Annotated[int, Field(ge=1)]
    bucket: Annotated[tuple[Bucket, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _named(self) -> "Buckets":
        names = [bucket.name for bucket in self.bucket]
        if len(set(names)) < len(names):
            raise ValueError(f"names {names} recur")
        return self


def load_buckets(path: Path | None = None) -> Buckets:
    """The buckets of a TOML file, or those that come with the package.

    Raises:
        ExportError: The file cannot be read or is not of that form.
    """
    try:
        if path is None:
            text = resources.files("ltxrt_export.engines").joinpath("buckets.toml").read_text("utf-8")
        else:
            text = path.read_text("utf-8")
        return Buckets.model_validate(tomllib.loads(text))
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        finding = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in finding["loc"])
        raise ExportError(f"{path}: {where}: {finding['msg']}") from None
    except ValueError as error:
        raise ExportError(f"{path} is not TOML: {error}") from error
