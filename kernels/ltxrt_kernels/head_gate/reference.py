# SPDX-License-Identifier: Apache-2.0
"""NumPy statement of ``head_gate``, in float64, and inputs to try it on."""

import numpy as np
from numpy.typing import NDArray

from ..arrays import Arrays, drawn, values_of
from ..dtypes import encode
from . import HeadGate

__all__ = ["generate_inputs", "head_gate", "reference"]

Values = NDArray[np.float64]


def head_gate(attended: Values, logits: Values) -> Values:
    """Scale every head (see the package).

    Args:
        attended: [N, W].
        logits: One for each head, [N, heads].
    """
    heads = attended.reshape(*logits.shape, -1)
    return (heads * (2 / (1 + np.exp(-logits)))[..., None]).reshape(attended.shape)


def reference(problem: HeadGate, inputs: Arrays) -> dict[str, Values]:
    """What a kernel gives for stored inputs, before it is rounded to the type of the output."""
    values = values_of(problem, inputs)
    out = head_gate(values["attended"], values["logits"])
    return {"out": out / values["output_scale"] if problem.quantise else out}


def generate_inputs(problem: HeadGate, seed: int) -> Arrays:
    """Random heads with gates from nearly shut to fully open; some of a quantised result saturates."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    inputs = drawn(problem, generator)
    inputs["logits"] = encode(generator.uniform(-12, 12, (problem.tokens, problem.heads)), problem.dtype)
    if problem.quantise:
        inputs["output_scale"] = np.array([4 / 448], np.float32)
    return inputs
