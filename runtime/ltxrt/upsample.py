# SPDX-License-Identifier: Apache-2.0
"""Between the stages: the half-size latent to the full size."""

from .engine import Engine, Tensor, run_resident
from .latent import grid_of, tokens_of
from .shapes import LatentShape

__all__ = ["upsample"]


def upsample(engine: Engine, tokens: Tensor, shape: LatentShape) -> Tensor:
    """Tokens [1, Nv, 128] of ``shape`` to tokens [1, 4 * Nv, 128] of twice the height and width, where they are.

    The network normalises over the whole clip, so it cannot be fed in parts.
    """
    return tokens_of(run_resident(engine, {"latent": grid_of(tokens, shape)})["upsampled"])
