# SPDX-License-Identifier: Apache-2.0
"""Noise schedules and the arithmetic around them; the Euler step itself is part of the denoiser graph.

Sources: Lightricks/LTX-2 packages/ltx-pipelines/src/ltx_pipelines/utils/constants.py (sigmas),
packages/ltx-core/src/ltx_core/components/noisers.py (noising).
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError

__all__ = ["check_sigmas", "noised", "steps"]


def steps(sigmas: Sequence[float]) -> list[tuple[float, float]]:
    """The (sigma, next sigma) pairs of a schedule."""
    return list(pairwise(sigmas))


def check_sigmas(wanted: Sequence[float], known: Sequence[float], where: str) -> None:
    """Refuse a schedule with noise levels that the checkpoint was not distilled for.

    Levels are compared as the fp32 that the denoiser takes, so that a bundle may store them in either width.

    Raises:
        BundleError: ``wanted`` is not a falling part of ``known`` that has a step and ends in 0.
    """
    levels, distilled = np.asarray(wanted, np.float32), np.asarray(known, np.float32)
    falls_to_zero = levels.size > 1 and levels[-1] == 0 and bool(np.all(np.diff(levels) < 0))
    if not falls_to_zero or not np.isin(levels, distilled).all():
        raise BundleError(f"{where}: sigmas {list(wanted)} are not a falling part of the bundle's {list(known)}")


def noised(
    initial: NDArray[np.float32],
    clean: NDArray[np.float32],
    noise: NDArray[np.float32],
    sigma: float,
    mask: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The latent that a stage starts from: ``lerp(clean, lerp(initial, noise, sigma), mask)``, fp32.

    Args:
        initial: Zeros in the first stage, the upsampled latent in the second, [1, Nv, 128].
        clean: What conditioned tokens are held to (elsewhere it does not matter), [1, Nv, 128].
        noise: Standard normal, [1, Nv, 128].
        sigma: First noise level of the stage.
        mask: 1 where a token is denoised, 1 - strength where it is conditioned, [1, Nv, 1].
    """
    level = np.float32(sigma)
    blended = initial + (noise - initial) * level
    return np.asarray(clean * (np.float32(1) - mask) + blended * mask, np.float32)
