# SPDX-License-Identifier: Apache-2.0
"""NumPy statement of ``rgb_to_yuv420``, in float64, and inputs to try it on."""

import numpy as np
from numpy.typing import NDArray

from ..arrays import Arrays, values_of
from ..dtypes import encode
from . import CB_RANGE, CHROMA_OFFSET, CHROMA_SCALE, CR_RANGE, KB, KG, KR, LUMA_OFFSET, LUMA_SCALE, RgbToYuv420

__all__ = ["generate_inputs", "reference", "rgb_to_yuv420"]


def rgb_to_yuv420(rgb: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Convert ``rgb[T, 3, H, W]`` in [-1, 1] to I420 pictures ``[T, 3H/2, W]`` (see the package).

    Raises:
        ValueError: Not four axes with three channels, H not a multiple of 4 or W not of 2.
    """
    if rgb.ndim != 4 or rgb.shape[1] != 3 or rgb.shape[2] % 4 or rgb.shape[3] % 2:
        raise ValueError(f"rgb has shape {rgb.shape}; allowed: [T, 3, H, W] with H a multiple of 4 and W of 2")
    frames, _, height, width = rgb.shape
    unit = np.clip((rgb.astype(np.float64) + 1) / 2, 0, 1)
    blocks = unit.reshape(frames, 3, height // 2, 2, width // 2, 2).mean(axis=(3, 5))
    chroma = CHROMA_OFFSET + CHROMA_SCALE * np.stack(
        [(blocks[:, 2] - luma(blocks)) / CB_RANGE, (blocks[:, 0] - luma(blocks)) / CR_RANGE], axis=1
    )
    picture = np.concatenate(
        [LUMA_OFFSET + LUMA_SCALE * luma(unit), chroma.reshape(frames, height // 2, width)], axis=1
    )
    return np.rint(picture).astype(np.uint8)


def luma(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Y' of ``rgb[T, 3, H, W]`` in [0, 1], as ``[T, H, W]``."""
    return KR * rgb[:, 0] + KG * rgb[:, 1] + KB * rgb[:, 2]


def reference(problem: RgbToYuv420, inputs: Arrays) -> dict[str, NDArray[np.float64]]:
    """What a kernel gives for stored inputs."""
    return {"frames": rgb_to_yuv420(values_of(problem, inputs)["rgb"]).astype(np.float64)}


def generate_inputs(problem: RgbToYuv420, seed: int) -> Arrays:
    """Random ``rgb[T, 3, H, W]``: waves with noise, a little beyond [-1, 1] as a decoder goes."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    frames, height, width = problem.frames, problem.height, problem.width
    frame, row, column = np.ogrid[:frames, :height, :width]
    phase = 2 * np.pi * (frame / frames + row / height + column / width)
    offsets = generator.uniform(0, 2 * np.pi, (1, 3, 1, 1))
    noise = generator.standard_normal((frames, 3, height, width))
    return {"rgb": encode(1.1 * np.sin(phase[:, None] + offsets) + 0.1 * noise, problem.dtype)}
