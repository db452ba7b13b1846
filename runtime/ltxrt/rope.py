# SPDX-License-Identifier: Apache-2.0
"""Rotary position tables per axis: small cosine/sine tables that the denoiser graph expands to tokens.

Positions and angles are fp32 with an fp64 frequency grid rounded once, exactly as in the reference: angles reach 15,708
rad, where another order of rounding already changes the cosine by 1e-3. Sources: Lightricks/LTX-2
packages/ltx-core/src/ltx_core/model/transformer/rope.py, components/patchifiers.py, tools.py.
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from .shapes import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, LatentShape

__all__ = ["RopeGrid", "rope_tables"]

Table = NDArray[np.float32]

#: Mel frames a second and mel frames an audio latent.
_MEL_RATE, _MEL_PER_LATENT = 100, 4


@dataclass(frozen=True, slots=True)
class RopeGrid:
    """Frequencies and ranges of a model.

    Attributes:
        video: Frequencies of each of the three video axes, [n] fp32.
        cross: Frequencies of the one-axis tables (audio, A<->V), [m] fp32.
        max_position: Range of time (seconds), height and width (pixels).
    """

    video: Table
    cross: Table
    max_position: tuple[float, float, float]


def rope_tables(grid: RopeGrid, latent: LatentShape, rate: Fraction, audio_tokens: int) -> dict[str, Table]:
    """The denoiser's five RoPE inputs for one stage.

    Args:
        grid: The model's frequencies.
        latent: Latent grid of the stage; pixel positions count on this stage's own canvas.
        rate: Frames a second.
        audio_tokens: Audio tokens.

    Returns:
        ``rope_time`` [2, f, n], ``rope_height`` [2, h, n], ``rope_width`` [2, w, n], ``rope_cross_time`` [2, f, m],
        ``rope_audio`` [2, Na, m]; cosine first, then sine.
    """
    seconds, high, wide = (np.float32(value) for value in grid.max_position)
    time = _middles_of_frames(latent.frames, rate)
    height = _middles_of_pixels(latent.height)
    width = _middles_of_pixels(latent.width)
    return {
        "rope_time": _table(time, seconds, grid.video),
        "rope_height": _table(height, high, grid.video),
        "rope_width": _table(width, wide, grid.video),
        "rope_cross_time": _table(time, seconds, grid.cross),
        "rope_audio": _table(_middles_of_audio(audio_tokens), seconds, grid.cross),
    }


def _middles_of_frames(frames: int, rate: Fraction) -> Table:
    """Middle of every latent frame in seconds; the first one is a single pixel frame (causal fix)."""
    edges = np.arange(frames + 1, dtype=np.float32) * np.float32(TEMPORAL_COMPRESSION)
    shifted = np.maximum(edges + np.float32(1 - TEMPORAL_COMPRESSION), np.float32(0)) / np.float32(float(rate))
    return np.asarray((shifted[:-1] + shifted[1:]) / np.float32(2), np.float32)


def _middles_of_pixels(count: int) -> Table:
    """Middle of every latent position in pixels."""
    edges = np.arange(count + 1, dtype=np.float32) * np.float32(SPATIAL_COMPRESSION)
    return np.asarray((edges[:-1] + edges[1:]) / np.float32(2), np.float32)


def _middles_of_audio(count: int) -> Table:
    """Middle of every audio latent in seconds; the first one covers a single mel frame."""
    edges = np.arange(count + 1, dtype=np.float32) * np.float32(_MEL_PER_LATENT)
    shifted = np.maximum(edges + np.float32(1 - _MEL_PER_LATENT), np.float32(0))
    seconds = shifted * np.float32(160) / np.float32(160 * _MEL_RATE)
    return np.asarray((seconds[:-1] + seconds[1:]) / np.float32(2), np.float32)


def _table(middles: Table, maximum: np.float32, frequencies: Table) -> Table:
    fraction = middles / maximum * np.float32(2) - np.float32(1)
    angles = fraction[:, None] * frequencies
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
