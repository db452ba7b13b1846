# SPDX-License-Identifier: Apache-2.0
"""What a clip of the drawn world shows, measured from its pixels: mouth, colours, and how they go with the sound.

And how near two clips are to each other: PSNR and SSIM.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ltxrt_export.tiny.mouth import Floats, frame_times, mouth_track
from ltxrt_export.tiny.world import COLOURS, MOUTH_BOX, PARTS
from ltxrt_kernels.rgb_to_yuv420 import (
    CB_RANGE,
    CHROMA_OFFSET,
    CHROMA_SCALE,
    CR_RANGE,
    KB,
    KG,
    KR,
    LUMA_OFFSET,
    LUMA_SCALE,
)

__all__ = [
    "CLOSED",
    "Sync",
    "best_lag",
    "correlations",
    "energy_envelope",
    "luma",
    "mouth_opening",
    "nearest_colour",
    "part_colours",
    "pearson",
    "psnr",
    "rgb_pictures",
    "ssim",
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


def correlations(mouth: Floats, envelope: Floats, most: int = 5) -> dict[int, float]:
    """Pearson correlation of a measured mouth with the envelope it should have, by lag, up to ``most`` frames."""
    return {
        lag: pearson(
            mouth[max(0, lag) : len(mouth) + min(0, lag)], envelope[max(0, -lag) : len(envelope) - max(0, lag)]
        )
        for lag in range(-most, most + 1)
    }


def best_lag(scores: Mapping[int, float]) -> int:
    """The lag of the highest correlation; of equal ones the shortest."""
    return max(scores, key=lambda lag: (scores[lag], -abs(lag)))


def synchrony(mouth: Floats, envelope: Floats, most: int = 5) -> Sync:
    """Compare a measured mouth with the envelope it should have, at lags up to ``most`` frames either way."""
    scores = correlations(mouth, envelope, most)
    best = best_lag(scores)
    return Sync(scores[best], best, scores[0])


def luma(frames: Pictures) -> Pictures:
    """The luma planes [n, H, W] of decoded frames [n, 3/2 H, W], planar YUV 4:2:0."""
    return frames[:, : frames.shape[1] * 2 // 3]


def rgb_pictures(frames: Pictures) -> Pictures:
    """Decoded frames as pictures.

    The inverse of ``ltxrt_kernels.rgb_to_yuv420``, chroma interpolated linearly between the middles of its blocks.

    Args:
        frames: [n, 3/2 H, W], planar YUV 4:2:0, BT.709, limited range.

    Returns:
        [n, H, W, 3] uint8.
    """
    count, rows, width = frames.shape
    height = rows * 2 // 3
    blue, red = (
        (_doubled(plane.astype(np.float32)) - np.float32(CHROMA_OFFSET)) / np.float32(CHROMA_SCALE)
        for plane in frames[:, height:].reshape(count, 2, height // 2, width // 2).swapaxes(0, 1)
    )
    grey = (luma(frames).astype(np.float32) - np.float32(LUMA_OFFSET)) / np.float32(LUMA_SCALE)
    r, b = grey + np.float32(CR_RANGE) * red, grey + np.float32(CB_RANGE) * blue
    g = (grey - np.float32(KR) * r - np.float32(KB) * b) / np.float32(KG)
    return np.rint(np.clip(np.stack([r, g, b], axis=-1), 0, 1) * 255).astype(np.uint8)


def psnr(first: Pictures, second: Pictures) -> float:
    """Peak signal to noise ratio of two pictures or clips of uint8, in dB; 100 where they are equal."""
    error = float(np.square(first.astype(np.float64) - second).mean())
    return 10 * float(np.log10(255**2 / error)) if error > 0 else 100.0


def ssim(first: Pictures, second: Pictures) -> float:
    """Mean structural similarity of two clips of one channel, [n, H, W] uint8 each; 1 where they are equal.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
    IEEE Transactions on Image Processing 13(4), 2004, equations 13 to 17: a Gaussian window of 11x11 with a standard
    deviation of 1.5, K1 = 0.01, K2 = 0.03 and L = 255, over the places where the whole window lies in the picture.
    """
    offsets = np.arange(11) - 5
    window = np.exp(-np.square(offsets) / (2 * 1.5**2))
    window /= window.sum()

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        for axis in (1, 2):
            values = np.lib.stride_tricks.sliding_window_view(values, len(window), axis=axis) @ window
        return values

    x, y = first.astype(np.float64), second.astype(np.float64)
    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean())


def _doubled(plane: Floats) -> Floats:
    """A plane [n, h, w] at twice its size, linear between the middles of its pixels."""
    for axis in (1, 2):
        pad = [(int(a == axis), int(a == axis)) for a in range(3)]
        line = np.moveaxis(np.pad(plane, pad, "edge"), axis, 0)
        near, before, after = line[1:-1], line[:-2], line[2:]
        pairs = np.stack([near * 0.75 + before * 0.25, near * 0.75 + after * 0.25], axis=1, dtype=np.float32)
        plane = np.moveaxis(pairs.reshape(2 * len(near), *near.shape[1:]), 0, axis)
    return plane


def _rows(height: int, width: int, top: float, bottom: float) -> slice:
    scale = min(height, width)
    return slice(max(0, round(height / 2 + top * scale)), round(height / 2 + bottom * scale))


def _columns(height: int, width: int, left: float, right: float) -> slice:
    scale = min(height, width)
    return slice(max(0, round(width / 2 + left * scale)), round(width / 2 + right * scale))
