# SPDX-License-Identifier: Apache-2.0
"""What a clip of the drawn world shows, measured from its pixels: mouth, colours, and how they go with the sound."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ltxrt_export.tiny.mouth import Floats, frame_times, mouth_track
from ltxrt_export.tiny.world import COLOURS, MOUTH_BOX, PARTS

__all__ = [
    "CLOSED",
    "Sync",
    "energy_envelope",
    "mouth_opening",
    "nearest_colour",
    "part_colours",
    "pearson",
    "psnr",
    "synchrony",
]

Pictures = NDArray[np.uint8]

#: Openings below this count as a closed mouth.
CLOSED = 0.12

#: Half height of the closed mouth and what full opening adds, as ``world`` draws them.
_CLOSED_HEIGHT, _OPENS = 0.011, 0.105
#: Where each part's colour is read: left, top, right, bottom in units of the shorter side, origin at the middle.
_PATCHES = {
    "background": ((-0.5, -0.5, -0.42, -0.1), (0.42, -0.5, 0.5, -0.1)),
    "skin": ((-0.05, -0.16, 0.05, -0.04), (-0.24, 0.0, -0.19, 0.1), (0.19, 0.0, 0.24, 0.1)),
    "shirt": ((-0.2, 0.4, 0.2, 0.49),),
}


class Sync(NamedTuple):
    """How a mouth follows a sound: the best Pearson correlation within some lags, and that lag in frames.

    A positive lag is a mouth that comes late. ``at_zero`` is the correlation without a lag.
    """

    correlation: float
    lag: int
    at_zero: float


def energy_envelope(waveform: Floats, frames: int, frames_per_second: float) -> Floats:
    """What the mouth should do at each frame, [frames] in [0, 1]; ``waveform`` is mono at 16 kHz."""
    return mouth_track(waveform, frame_times(frames, frames_per_second)).opening


def mouth_opening(pictures: Pictures) -> Floats:
    """Measured opening of every frame, [frames], 0 closed and 1 fully open; ``pictures`` [frames, H, W, 3].

    The height of the dark column in the middle of the face: darkness relative to the skin, summed over rows.
    """
    height, width = pictures.shape[1:3]
    left, top, right, bottom = -0.03, MOUTH_BOX[1] + 0.07, 0.03, MOUTH_BOX[3]
    box = pictures[:, _rows(height, width, top, bottom), _columns(height, width, left, right)].astype(np.float32)
    skin = part_colours(pictures)["skin"]
    mouth = np.array([45, 8, 18], np.float32)
    axis = skin - mouth
    # How far each pixel lies from the skin's colour towards the mouth's.
    dark = np.clip(((skin - box) @ axis) / np.maximum(axis @ axis, 1), 0, 1).mean(axis=2)
    tall = dark.sum(axis=1) / min(height, width) / 2
    return np.asarray(np.clip((tall - _CLOSED_HEIGHT) / _OPENS, 0, 1), np.float32)


def part_colours(pictures: Pictures) -> dict[str, NDArray[np.float32]]:
    """The median colour of background, skin and shirt over all frames, sRGB in 0 to 255."""
    height, width = pictures.shape[1:3]
    result: dict[str, NDArray[np.float32]] = {}
    for part in PARTS:
        patches = [
            pictures[:, _rows(height, width, top, bottom), _columns(height, width, left, right)].reshape(-1, 3)
            for left, top, right, bottom in _PATCHES[part]
        ]
        result[part] = np.median(np.concatenate(patches), axis=0).astype(np.float32)
    return result


def nearest_colour(colour: NDArray[np.float32]) -> str:
    """The named colour that is nearest to an sRGB one."""
    return min(COLOURS, key=lambda name: float(np.square(np.asarray(COLOURS[name]) - colour).sum()))


def pearson(first: Floats, second: Floats) -> float:
    """Pearson correlation; 0 where one of them does not vary."""
    a, b = first - first.mean(), second - second.mean()
    scale = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float((a * b).sum() / scale) if scale > 1e-9 else 0.0


def synchrony(mouth: Floats, envelope: Floats, most: int = 5) -> Sync:
    """Compare a measured mouth with the envelope it should have, at lags up to ``most`` frames either way."""
    scores = {
        lag: pearson(
            mouth[max(0, lag) : len(mouth) + min(0, lag)], envelope[max(0, -lag) : len(envelope) - max(0, lag)]
        )
        for lag in range(-most, most + 1)
    }
    best = max(scores, key=lambda lag: (scores[lag], -abs(lag)))
    return Sync(scores[best], best, scores[0])


def psnr(first: Pictures, second: Pictures) -> float:
    """Peak signal to noise ratio of two pictures or clips of uint8, in dB; 100 where they are equal."""
    error = float(np.square(first.astype(np.float64) - second).mean())
    return 10 * float(np.log10(255**2 / error)) if error > 0 else 100.0


def _rows(height: int, width: int, top: float, bottom: float) -> slice:
    scale = min(height, width)
    return slice(max(0, round(height / 2 + top * scale)), round(height / 2 + bottom * scale))


def _columns(height: int, width: int, left: float, right: float) -> slice:
    scale = min(height, width)
    return slice(max(0, round(width / 2 + left * scale)), round(width / 2 + right * scale))
