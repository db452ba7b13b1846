# SPDX-License-Identifier: Apache-2.0
"""The two layouts of a video latent: tokens [1, Nv, 128] and grid [1, 128, f, h, w].

Tokens run frame-major, then height, then width (Lightricks/LTX-2
packages/ltx-core/src/ltx_core/components/patchifiers.py, patch size 1).
"""

import numpy as np
from numpy.typing import NDArray

from .shapes import LatentShape

__all__ = ["to_grid", "to_tokens"]


def to_grid(tokens: NDArray[np.float32], shape: LatentShape) -> NDArray[np.float32]:
    """Tokens [1, Nv, channels] to a C-contiguous grid [1, channels, f, h, w]."""
    channels = tokens.shape[2]
    return np.ascontiguousarray(tokens.transpose(0, 2, 1).reshape(1, channels, *shape))


def to_tokens(grid: NDArray[np.float32]) -> NDArray[np.float32]:
    """A grid [1, channels, f, h, w] to C-contiguous tokens [1, f * h * w, channels]."""
    channels = grid.shape[1]
    return np.ascontiguousarray(grid.reshape(1, channels, -1).transpose(0, 2, 1))
