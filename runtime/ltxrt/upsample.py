# SPDX-License-Identifier: Apache-2.0
"""Between the stages: the half-size latent to the full size."""

import numpy as np
from numpy.typing import NDArray

from .engine import Engine, Tensor
from .latent import to_grid, to_tokens
from .shapes import LatentShape

__all__ = ["upsample"]


def upsample(engine: Engine, tokens: Tensor, shape: LatentShape) -> NDArray[np.float32]:
    """Tokens [1, Nv, 128] of ``shape`` to tokens [1, 4 * Nv, 128] of twice the height and width.

    The network normalises over the whole clip, so it cannot be fed in parts.
    """
    upsampled = engine.run({"latent": to_grid(np.asarray(tokens, np.float32), shape)})["upsampled"]
    return to_tokens(np.asarray(upsampled, np.float32))
