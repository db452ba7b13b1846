# SPDX-License-Identifier: Apache-2.0
"""NumPy statement of ``latent_layout``, in float64, and inputs to try it on."""

import numpy as np
from numpy.typing import NDArray

from ..arrays import Arrays, drawn, values_of
from ..dtypes import encode
from . import LatentLayout

__all__ = ["generate_inputs", "pack", "reference", "unpack"]

Values = NDArray[np.float64]


def pack(grid: Values, mean: Values, std: Values) -> Values:
    """A grid [C, N] as normalised tokens [N, C]; ``mean`` and ``std`` [C]."""
    return (grid.T - mean) / std


def unpack(tokens: Values, mean: Values, std: Values) -> Values:
    """Normalised tokens [N, C] as a grid [C, N]; ``mean`` and ``std`` [C]."""
    return (tokens * std + mean).T


def reference(problem: LatentLayout, inputs: Arrays) -> dict[str, Values]:
    """What a kernel gives for stored inputs, before it is rounded to the type of the output."""
    values = values_of(problem, inputs)
    return {"out": (pack if problem.pack else unpack)(values["source"], values["mean"], values["std"])}


def generate_inputs(problem: LatentLayout, seed: int) -> Arrays:
    """Random latents; deviations between a half and two."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    inputs = drawn(problem, generator)
    inputs["std"] = encode(np.exp2(generator.uniform(-1, 1, problem.channels)), "float32")
    return inputs
