# SPDX-License-Identifier: Apache-2.0
"""The world of the tiny model: a drawn face that speaks, in flat shapes with soft edges.

Lengths are in units of the shorter side of the picture, with the origin at its middle and y downwards, so that
every size and frame rate shows the same scene. What the prompt names are three colours; what is left to chance
(place, sway, blinks) is small, so that prompt and sound nearly determine a clip.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ltxrt_export.tiny.mouth import Floats, MouthTrack

__all__ = ["COLOURS", "DEFAULTS", "MOUTH_BOX", "PARTS", "Colour", "Scene", "code_of", "render"]

Colour = tuple[int, int, int]

#: sRGB of the colours that prompts name, far apart from each other and from the dark of the mouth.
COLOURS: dict[str, Colour] = {
    "red": (205, 40, 40),
    "orange": (245, 140, 35),
    "yellow": (240, 220, 70),
    "green": (60, 165, 70),
    "blue": (45, 90, 210),
    "purple": (135, 60, 175),
    "pink": (245, 160, 200),
    "white": (242, 242, 242),
}
#: What a prompt may name, and the colour of a part that it does not name.
DEFAULTS = {"background": "blue", "skin": "yellow", "shirt": "red"}
PARTS = tuple(DEFAULTS)

_HAIR = (45, 30, 25)
_MOUTH = (45, 8, 18)
_WHITE, _PUPIL = (250, 250, 250), (20, 20, 25)

_HEAD_CENTRE_Y, _HEAD = -0.05, (0.32, 0.38)
_SHIRT_CENTRE_Y, _SHIRT = 0.60, (0.46, 0.31)
_EYE_X, _EYE_Y, _EYE, _PUPIL_RADIUS = 0.135, -0.085, (0.066, 0.05), 0.028
_MOUTH_Y = 0.175
#: Half height of the closed mouth and what full opening adds; half width of the narrowest and what the widest adds.
_CLOSED, _OPENS, _NARROW, _WIDENS = 0.011, 0.105, 0.09, 0.07
#: Left, top, right, bottom of where the mouth can be, in units.
MOUTH_BOX = (-0.25, -0.05, 0.25, 0.29)

#: Width over which one colour turns into the next: soft, so that a picture does not hang on where a pixel's edge lies.
_SOFT = 0.03
_BLINK_SECONDS = 0.16
_LONGEST_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Scene:
    """A face: its colours and what chance decides.

    Attributes:
        background: Colour behind.
        skin: Colour of the face.
        shirt: Colour of the shirt.
        place: Middle of the head, x and y, in units from where it belongs.
        sway: Amplitude in units, hertz and phase of the slow movement along x and along y, [2, 3].
        blinks: Seconds at which the eyes are shut.
    """

    background: Colour
    skin: Colour
    shirt: Colour
    place: tuple[float, float] = (0.0, 0.0)
    sway: tuple[tuple[float, float, float], ...] = ((0.0, 0.1, 0.0), (0.0, 0.1, 0.0))
    blinks: tuple[float, ...] = ()

    @classmethod
    def draw(cls, random: np.random.Generator, names: dict[str, str]) -> "Scene":
        """A scene with the colours ``names`` gives to ``PARTS``; the rest is drawn from ``random``."""
        waits = random.exponential(3.5, 24) + 0.5
        blinks = np.cumsum(waits) - 0.5 * float(random.random())
        return cls(
            *(COLOURS[names[part]] for part in PARTS),
            place=(float(random.uniform(-0.006, 0.006)), float(random.uniform(-0.003, 0.003))),
            sway=(
                (float(random.uniform(0, 0.006)), float(random.uniform(0.1, 0.35)), float(random.uniform(0, 6.28))),
                (float(random.uniform(0, 0.0025)), float(random.uniform(0.1, 0.35)), float(random.uniform(0, 6.28))),
            ),
            blinks=tuple(float(moment) for moment in blinks if moment < _LONGEST_SECONDS),
        )


def code_of(scene: Scene, mouth: MouthTrack, times: Floats) -> Floats:
    """All that a clip shows, in 32 numbers of about unit variance for each latent frame, [1 + frames // 8, 32].

    Latent frame 0 stands for one frame and every later one for eight, as in the video VAE. The numbers: the three
    colours (9), opening and width of the mouth at each of the frames (8 and 8), the lids in the first and in the second
    half (2), the place of the head (2), and 3 that are always 0.
    """
    colours = np.array([scene.background, scene.skin, scene.shirt], np.float32).ravel() / 127.5 - 1
    places = [
        place + amplitude * np.sin(2 * np.pi * hertz * times + phase)
        for place, (amplitude, hertz, phase) in zip(scene.place, scene.sway, strict=True)
    ]
    tracks = np.stack(
        [(mouth.opening - 0.25) * 4, (mouth.width - 0.55) * 4, _shut(scene.blinks, times) * 2, *np.array(places) * 100]
    )
    chunks = np.concatenate([np.repeat(tracks[:, :1], 8, axis=1), tracks[:, 1:]], axis=1).reshape(5, -1, 8)
    code = np.zeros((chunks.shape[1], 32), np.float32)
    code[:, :9] = colours
    code[:, 9:25] = np.concatenate([chunks[0], chunks[1]], axis=1)
    code[:, 25:27] = chunks[2].reshape(-1, 2, 4).mean(axis=2)
    code[:, 27:29] = chunks[3:].mean(axis=2).T
    return code


def render(scene: Scene, mouth: MouthTrack, times: Floats, height: int, width: int) -> NDArray[np.uint8]:
    """Draw the clip.

    Args:
        scene: Who.
        mouth: What the mouth does at ``times``.
        times: Seconds, [frames].
        height: Pixels.
        width: Pixels.

    Returns:
        Pictures [frames, height, width, 3] uint8, sRGB.
    """
    scale = float(min(height, width))
    x = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / scale)[None, None, :]
    y = ((np.arange(height, dtype=np.float32) + 0.5 - height / 2) / scale)[None, :, None]
    head_x, head_y = (
        _column(place + amplitude * np.sin(2 * np.pi * hertz * times + phase))
        for place, (amplitude, hertz, phase) in zip(scene.place, scene.sway, strict=True)
    )
    head_y = np.asarray(head_y + np.float32(_HEAD_CENTRE_Y), np.float32)
    picture = np.empty((len(times), height, width, 3), np.float32)
    picture[...] = np.asarray(scene.background, np.float32)

    def part(left: float, top: float, right: float, bottom: float) -> _Canvas:
        rows = slice(max(0, int(height / 2 + top * scale)), max(0, int(height / 2 + bottom * scale) + 1))
        columns = slice(max(0, int(width / 2 + left * scale)), max(0, int(width / 2 + right * scale) + 1))
        return _Canvas(picture[:, rows, columns], x[:, :, columns] - head_x, y[:, rows] - head_y, scale)

    body = part(-0.56, 0.2, 0.56, 0.6)
    shirt_x = np.asarray(body.x + np.float32(0.5) * head_x, np.float32)
    shirt_y = np.asarray(body.y + head_y - np.float32(_SHIRT_CENTRE_Y), np.float32)
    body.paint(scene.shirt, _ellipse(shirt_x, shirt_y, *_SHIRT))
    head = part(-0.43, -0.52, 0.43, 0.4)
    head.paint(_HAIR, _ellipse(head.x, head.y + 0.02, _HEAD[0] + 0.025, _HEAD[1] + 0.02))
    head.paint(scene.skin, np.maximum(_ellipse(head.x, head.y, *_HEAD), -0.2 - head.y))
    lids = np.float32(_EYE[1]) * (1 - _column(_shut(scene.blinks, times))) + np.float32(0.006)
    for side in (-_EYE_X, _EYE_X):
        eye = part(side - 0.15, -0.24, side + 0.15, -0.03)
        white = _ellipse(eye.x - side, eye.y - _EYE_Y, _EYE[0], lids)
        eye.paint(_WHITE, white)
        pupil = _ellipse(eye.x - side, eye.y - _EYE_Y, _PUPIL_RADIUS, _PUPIL_RADIUS)
        eye.paint(_PUPIL, np.maximum(pupil, white))
    half_height = _column(_CLOSED + _OPENS * mouth.opening)
    half_width = _column(_NARROW + _WIDENS * mouth.width)
    lips = part(*MOUTH_BOX)
    lips.paint(_MOUTH, _ellipse(lips.x, lips.y - _MOUTH_Y, half_width, half_height))
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class _Canvas:
    """A part of the pictures, with the places of its pixels relative to the middle of the head."""

    picture: Floats
    x: Floats
    y: Floats
    scale: float

    def paint(self, colour: Colour, distance: Floats) -> None:
        """Colour what lies inside of a shape, given the signed distance to it in units."""
        cover = np.clip(0.5 - distance / np.float32(max(_SOFT, 1 / self.scale)), 0, 1)
        self.picture[...] += cover[..., None] * (np.asarray(colour, np.float32) - self.picture)


def _column(values: NDArray[np.floating]) -> Floats:
    """[frames] to [frames, 1, 1]."""
    return np.asarray(values, np.float32)[:, None, None]


def _ellipse(x: Floats, y: Floats, radius_x: float | Floats, radius_y: float | Floats) -> Floats:
    """About the signed distance to an ellipse around the origin, negative inside."""
    u, v = x / np.float32(radius_x), y / np.float32(radius_y)
    level = np.sqrt(u * u + v * v)
    slope = np.sqrt(np.square(u / np.float32(radius_x)) + np.square(v / np.float32(radius_y)))
    return np.asarray(level * (level - 1) / np.maximum(slope, 1e-6), np.float32)


def _shut(blinks: tuple[float, ...], times: Floats) -> Floats:
    """How far the lids are down, 0 to 1, [frames]."""
    if not blinks:
        return np.zeros(len(times), np.float32)
    away = np.abs(times[:, None] - np.asarray(blinks, np.float32)).min(axis=1)
    return np.clip(2 * (1 - away / (_BLINK_SECONDS / 2)), 0, 1).astype(np.float32)
