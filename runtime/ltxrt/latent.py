# SPDX-License-Identifier: Apache-2.0
"""The two layouts of a video latent: tokens [1, Nv, 128] and grid [1, 128, f, h, w].

Tokens run frame-major, then height, then width (Lightricks/LTX-2
packages/ltx-core/src/ltx_core/components/patchifiers.py, patch size 1).
"""

import numpy as np
from numpy.typing import NDArray

from .engine import Tensor
from .memory import DeviceTensor
from .shapes import LatentShape

__all__ = ["grid_of", "to_grid", "to_tokens", "tokens_of"]


def grid_of(tokens: Tensor, shape: LatentShape) -> Tensor:
    """``to_grid`` where the tokens are: on a device that has kernels by a kernel, otherwise on the host."""
    if isinstance(tokens, DeviceTensor) and tokens.device.layout is not None:
        return tokens.device.layout.to_grid(tokens, shape)
    return to_grid(np.asarray(tokens, np.float32), shape)


def tokens_of(grid: Tensor) -> Tensor:
    """``to_tokens`` where the grid is."""
    if isinstance(grid, DeviceTensor) and grid.device.layout is not None:
        return grid.device.layout.to_tokens(grid)
    return to_tokens(np.asarray(grid, np.float32))


def to_grid(tokens: NDArray[np.float32], shape: LatentShape) -> NDArray[np.float32]:
    """Tokens [1, Nv, channels] to a C-contiguous grid [1, channels, f, h, w]."""
    channels = tokens.shape[2]
    return np.ascontiguousarray(tokens.transpose(0, 2, 1).reshape(1, channels, *shape))


def to_tokens(grid: NDArray[np.float32]) -> NDArray[np.float32]:
    """A grid [1, channels, f, h, w] to C-contiguous tokens [1, f * h * w, channels]."""
    channels = grid.shape[1]
    return np.ascontiguousarray(grid.reshape(1, channels, -1).transpose(0, 2, 1))
