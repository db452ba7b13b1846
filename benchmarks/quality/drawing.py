# SPDX-License-Identifier: Apache-2.0
"""Pictures for people: a sheet of clips with their curves, and how curves are drawn. Pillow only."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ltxrt_export.tiny.measure import Pictures
from ltxrt_export.tiny.mouth import Floats

from .report import Report, Strip

__all__ = ["ENERGY", "INK", "MOUTH", "PAPER", "Box", "draw_curves", "font", "sheet"]

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
INK: Colour = (40, 40, 45)
ENERGY: Colour = (190, 200, 215)
MOUTH: Colour = (200, 45, 60)
_RIGHT, _WRONG = (40, 140, 60), (200, 45, 60)

_TITLE_WIDTH, _THUMBNAIL, _CURVE_WIDTH, _GAP, _SHOWN = 200, 112, 420, 6, 6
_PROMPT_COLUMNS, _PROMPT_PICTURE = 16, 68


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels."""

    left: int
    top: int
    width: int
    height: int


def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow, the same on every machine."""
    return ImageFont.load_default(size)


def draw_curves(
    draw: ImageDraw.ImageDraw, box: Box, energy: Floats, mouth: Floats | None, moments: Sequence[int] = ()
) -> None:
    """What the mouth should do as an area, what it does as a line, and the moments that pictures show.

    Args:
        draw: Where to.
        box: Place; the bottom is 0, the top 1.
        energy: [n] in [0, 1], n > 1.
        mouth: [n] in [0, 1], or None.
        moments: Indices of frames.
    """
    across = box.left + np.arange(len(energy)) * (box.width - 1) / (len(energy) - 1)
    bottom = box.top + box.height - 1

    def points(values: Floats) -> list[tuple[float, float]]:
        down = bottom - np.clip(values, 0, 1) * (box.height - 1)
        return [(float(x), float(y)) for x, y in zip(across, down, strict=True)]

    draw.polygon([(box.left, bottom), *points(energy), (box.left + box.width - 1, bottom)], fill=ENERGY)
    for index in moments:
        x = float(across[index])
        draw.line([(x, box.top), (x, bottom)], fill=INK, width=1)
    draw.line([(box.left, bottom), (box.left + box.width - 1, bottom)], fill=INK, width=1)
    if mouth is not None:
        draw.line(points(mouth), fill=MOUTH, width=2, joint="curve")


def sheet(report: Report, heading: str) -> Image.Image:
    """All strips of a report below each other, then the prompts with one picture each."""
    rows = -(-len(report.prompts) // _PROMPT_COLUMNS)
    width = _TITLE_WIDTH + _SHOWN * (_THUMBNAIL + _GAP) + _CURVE_WIDTH + 3 * _GAP
    top = 30
    height = top + len(report.strips) * (_THUMBNAIL + _GAP) + rows * (_PROMPT_PICTURE + _GAP) + 30
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((_GAP, 8), heading, INK, font(14))
    for strip in report.strips:
        _draw_strip(image, top, strip)
        top += _THUMBNAIL + _GAP
    draw.text(
        (_GAP, top + 4), "held-out prompts, first frame each; the bar says whether all colours are right", INK, font(12)
    )
    top += 24
    for index, (_, picture, right) in enumerate(report.prompts):
        row, column = divmod(index, _PROMPT_COLUMNS)
        place = (_GAP + column * (_PROMPT_PICTURE + _GAP), top + row * (_PROMPT_PICTURE + _GAP))
        image.paste(_scaled(picture, _PROMPT_PICTURE), place)
        foot = place[1] + _PROMPT_PICTURE
        draw.rectangle((place[0], foot, place[0] + _PROMPT_PICTURE - 1, foot + 3), fill=_RIGHT if right else _WRONG)
    return image


def _draw_strip(image: Image.Image, top: int, strip: Strip) -> None:
    draw = ImageDraw.Draw(image)
    title, _, rest = strip.title.partition("\n")
    lines = textwrap.wrap(title, 28)
    draw.multiline_text((_GAP, top + 2), "\n".join(lines), INK, font(13))
    draw.multiline_text((_GAP, top + 6 + 16 * len(lines)), textwrap.fill(rest, 34), INK, font(11))
    left = _TITLE_WIDTH
    for picture in strip.pictures[:_SHOWN]:
        image.paste(_scaled(picture, _THUMBNAIL), (left, top))
        left += _THUMBNAIL + _GAP
    if strip.energy is not None:
        left = _TITLE_WIDTH + _SHOWN * (_THUMBNAIL + _GAP) + _GAP
        draw_curves(draw, Box(left, top + 4, _CURVE_WIDTH, _THUMBNAIL - 8), strip.energy, strip.mouth, strip.moments)


def _scaled(picture: Pictures, side: int) -> Image.Image:
    """A picture in a square of ``side`` pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    if max(image.size) < side:
        scale = side / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return image
