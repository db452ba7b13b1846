# SPDX-License-Identifier: Apache-2.0
"""The tensors of a problem as NumPy arrays: drawn, read as numbers, compared."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import FORMATS, decode, encode
from .spec import Port, Problem, Tolerance

__all__ = ["Arrays", "drawn", "excess", "values_of"]

#: Tensors by name, each in the storage type of its port.
Arrays = dict[str, NDArray[Any]]


def drawn(problem: Problem, generator: np.random.Generator) -> Arrays:
    """Every floating-point input from the standard normal distribution."""
    return {
        port.name: encode(generator.standard_normal(port.shape), port.dtype)
        for port in problem.inputs
        if port.dtype in FORMATS
    }


def values_of(problem: Problem, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
    """The values of every input.

    Raises:
        ValueError: An input is missing, or has another shape than the problem says.
    """
    for port in problem.inputs:
        shape = inputs[port.name].shape if port.name in inputs else None
        if shape != port.shape:
            raise ValueError(f"{problem.op}: {port.name} has shape {shape}; allowed: {port.shape}")
    return {port.name: decode(inputs[port.name], port.dtype) for port in problem.inputs}


def excess(found: NDArray[Any], expected: NDArray[np.float64], port: Port, tolerance: Tolerance) -> float:
    """How much of its tolerance an output uses up: at most 1 where it is right.

    Args:
        found: What the kernel wrote, in the storage type of ``port``.
        expected: What the reference says; NaN nowhere.
        port: The output.
        tolerance: Of the op. Rounding to the type of ``port`` comes on top.
    """
    values = decode(found, port.dtype)
    if values.shape != expected.shape or not np.isfinite(values).all():
        return np.inf
    if port.dtype not in FORMATS:
        return _levels_excess(values, expected, tolerance)
    layout = FORMATS[port.dtype]
    wanted = np.clip(expected, -layout.largest, layout.largest) if layout.saturates else expected
    # Of both: at a power of two the steps on either side differ, and the kernel may fall on the coarser one.
    rounding = np.maximum(layout.rounding_error(layout.rounded(wanted)), layout.rounding_error(wanted))
    arithmetic = tolerance.of_value * np.abs(wanted) + tolerance.of_peak * np.abs(wanted).max(initial=0)
    return float((np.abs(values - wanted) / (arithmetic + rounding)).max(initial=0))


def _levels_excess(values: NDArray[np.float64], expected: NDArray[np.float64], tolerance: Tolerance) -> float:
    """Of integers: none off by more than one level, and few off at all."""
    apart = np.abs(values - expected)
    differing = int(np.count_nonzero(apart))
    if differing == 0:
        return 0.0
    if tolerance.differing is None or apart.max() > 1:
        return np.inf
    return differing / max(1, tolerance.differing * apart.size)
