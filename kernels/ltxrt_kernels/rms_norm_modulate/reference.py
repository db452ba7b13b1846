# SPDX-License-Identifier: Apache-2.0
"""NumPy statement of ``rms_norm_modulate``, in float64, and inputs to try it on."""

import numpy as np
from numpy.typing import NDArray

from ..arrays import Arrays, drawn, values_of
from ..dtypes import encode
from . import RmsNormModulate

__all__ = ["generate_inputs", "reference", "rms_norm_modulate"]

Values = NDArray[np.float64]


def rms_norm_modulate(x: Values, scale: Values, shift: Values, token_row: NDArray[np.int64], epsilon: float) -> Values:
    """Norm, scale and shift (see the package).

    Args:
        x: Tokens, [N, D].
        scale: A row for each timestep, [R, D].
        shift: [R, D].
        token_row: Each token's row of both, [N].
        epsilon: Added to the mean square.
    """
    normal = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + epsilon)
    return normal * (1 + scale[token_row]) + shift[token_row]


def reference(problem: RmsNormModulate, inputs: Arrays) -> dict[str, Values]:
    """What a kernel gives for stored inputs, before it is rounded to the type of the output."""
    values = values_of(problem, inputs)
    rows = inputs["token_row"].astype(np.int64)
    out = rms_norm_modulate(values["x"], values["scale"], values["shift"], rows, problem.epsilon)
    return {"out": out / values["output_scale"] if problem.quantise else out}


def generate_inputs(problem: RmsNormModulate, seed: int) -> Arrays:
    """Tokens of very different size, as in a residual stream; some of a quantised result saturates."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    inputs = drawn(problem, generator)
    sizes = np.exp2(generator.uniform(-6, 6, (problem.tokens, 1)))
    inputs["x"] = encode(generator.standard_normal((problem.tokens, problem.width)) * sizes, problem.dtype)
    inputs["token_row"] = generator.integers(0, problem.rows, problem.tokens)
    if problem.quantise:
        inputs["output_scale"] = np.array([4 / 448], np.float32)
    return inputs
