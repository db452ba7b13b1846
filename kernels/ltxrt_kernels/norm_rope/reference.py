# SPDX-License-Identifier: Apache-2.0
"""NumPy statement of ``norm_rope``, in float64, and inputs to try it on."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..arrays import Arrays, drawn, values_of
from ..dtypes import encode
from . import NormRope

__all__ = ["generate_inputs", "norm_rope", "reference"]

Values = NDArray[np.float64]


def norm_rope(x: Values, weight: Values, tables: Sequence[Values], heads: int, grid: tuple[int, int, int]) -> Values:
    """Turn the heads of normalised queries or keys (see the package).

    Args:
        x: Already divided by its root mean square, [N, W].
        weight: Of the norm, [W].
        tables: Of each axis, [2, extent, n]: three, or the first one alone.
        heads: How many heads W holds.
        grid: Extents; their product is N.
    """
    half = x.shape[1] // 2
    turned = np.stack(np.broadcast_arrays(*spread_tables(tables, grid)), axis=-1)
    turned = turned.reshape(2, x.shape[0], -1)
    still = np.broadcast_to(np.array([1.0, 0.0]).reshape(2, 1, 1), (2, x.shape[0], half - turned.shape[2]))
    cosine, sine = np.concatenate([still, turned], axis=2).reshape(2, x.shape[0], heads, -1)
    first, second = np.split((x * weight).reshape(x.shape[0], heads, -1), 2, axis=2)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=2).reshape(x.shape)


def spread_tables(tables: Sequence[Values], grid: tuple[int, int, int]) -> list[Values]:
    """Each table as [2, frames, height, width, n], or 1 where it does not vary; one alone is repeated in full."""
    placed = [
        table.reshape(2, *(extent if axis == place else 1 for place, extent in enumerate(grid)), -1)
        for axis, table in enumerate(tables)
    ]
    return placed if len(tables) > 1 else [np.broadcast_to(placed[0], (2, *grid, placed[0].shape[-1]))]


def reference(problem: NormRope, inputs: Arrays) -> dict[str, Values]:
    """What a kernel gives for stored inputs, before it is rounded to the type of the output."""
    values = values_of(problem, inputs)
    x = values["x"]
    normal = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + problem.epsilon)
    tables = [values[port.name] for port in problem.inputs[2:]]
    return {"out": norm_rope(normal, values["weight"], tables, problem.heads, problem.grid)}


def generate_inputs(problem: NormRope, seed: int) -> Arrays:
    """Random projections and weights, with tables of random angles: no two entries are alike by accident."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    inputs = drawn(problem, generator)
    for port in problem.inputs[2:]:
        angles = generator.uniform(0, 2 * np.pi, port.shape[1:])
        inputs[port.name] = encode(np.stack([np.cos(angles), np.sin(angles)]), port.dtype)
    return inputs
