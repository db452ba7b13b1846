# SPDX-License-Identifier: Apache-2.0
"""NumPy statement of ``gated_residual``, in float64, and inputs to try it on."""

import numpy as np
from numpy.typing import NDArray

from ..arrays import Arrays, drawn, values_of
from . import GatedResidual

__all__ = ["gated_residual", "generate_inputs", "reference"]

Values = NDArray[np.float64]


def gated_residual(residual: Values, update: Values, gate: Values, token_row: NDArray[np.int64]) -> Values:
    """Add the gated update (see the package).

    Args:
        residual: [N, D].
        update: [N, D].
        gate: A row for each timestep, [R, D].
        token_row: Each token's row of it, [N].
    """
    return residual + update * gate[token_row]


def reference(problem: GatedResidual, inputs: Arrays) -> dict[str, Values]:
    """What a kernel gives for stored inputs, before it is rounded to the type of the output."""
    values = values_of(problem, inputs)
    rows = inputs["token_row"].astype(np.int64)
    return {"out": gated_residual(values["residual"], values["update"], values["gate"], rows)}


def generate_inputs(problem: GatedResidual, seed: int) -> Arrays:
    """Random tensors, every token with a row of its own choice."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    inputs = drawn(problem, generator)
    inputs["token_row"] = generator.integers(0, problem.rows, problem.tokens)
    return inputs
