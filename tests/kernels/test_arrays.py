# SPDX-License-Identifier: Apache-2.0
"""Comparing outputs: what is tolerated, and that the rest is not."""

import numpy as np
import pytest

from ltxrt_kernels.arrays import excess, values_of
from ltxrt_kernels.dtypes import encode
from ltxrt_kernels.head_gate import HeadGate
from ltxrt_kernels.ops import OPS
from ltxrt_kernels.spec import Port, Tolerance

TOLERANCE = Tolerance(of_value=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3"])
def test_the_nearest_value_is_right_and_the_second_next_is_not(dtype):
    expected = np.linspace(1.01, 60, 50)
    port = Port("out", dtype, expected.shape)
    found = encode(expected, dtype)
    assert excess(found, expected, port, TOLERANCE) <= 1
    if dtype == "float32":
        found = (found.view(np.uint32) + 64).view(np.float32)
    else:
        found = (found.view(f"uint{8 * found.itemsize}") + 2).view(found.dtype)
    assert excess(found, expected, port, TOLERANCE) > 1


def test_what_is_not_finite_is_wrong():
    port = Port("out", "float32", (2,))
    assert excess(np.array([1, np.nan], np.float32), np.ones(2), port, TOLERANCE) == np.inf
    assert excess(np.array([1, np.inf], np.float32), np.ones(2), port, TOLERANCE) == np.inf
    assert excess(np.ones(3, np.float32), np.ones(2), port, TOLERANCE) == np.inf


def test_saturated_values_are_compared_with_the_largest():
    port = Port("out", "float8_e4m3", (2,))
    assert excess(encode(np.array([448.0, -448.0]), "float8_e4m3"), np.array([9e3, -449.0]), port, TOLERANCE) <= 1
    assert excess(encode(np.array([416.0, -448.0]), "float8_e4m3"), np.array([9e3, -449.0]), port, TOLERANCE) > 1


def test_tolerance_of_the_peak_counts_for_small_values():
    port, expected = Port("out", "float32", (2,)), np.array([1000.0, 0.001])
    found = (expected + np.array([0, 5e-4])).astype(np.float32)
    assert excess(found, expected, port, Tolerance(of_value=1e-6)) > 1
    assert excess(found, expected, port, Tolerance(of_peak=1e-6)) <= 1


def test_levels():
    port, expected = Port("frames", "uint8", (4000,)), np.full(4000, 100.0)
    tolerance = Tolerance(differing=1e-3)
    found = np.full(4000, 100, np.uint8)
    found[:4] = 101
    assert excess(found, expected, port, tolerance) == 1
    found[4] = 99
    assert excess(found, expected, port, tolerance) > 1
    found[:5] = 100
    found[0] = 102
    assert excess(found, expected, port, tolerance) == np.inf
    assert excess(np.array([101], np.uint8), expected[:1], Port("frames", "uint8", (1,)), Tolerance()) > 1


def test_inputs_are_checked():
    problem = HeadGate(tokens=2, heads=1, head_width=3)
    inputs = OPS["head_gate"].generate_inputs(problem, 0)
    with pytest.raises(ValueError, match=r"head_gate: logits has shape \(2, 2\); allowed: \(2, 1\)"):
        values_of(problem, inputs | {"logits": np.zeros((2, 2), np.uint16)})
    del inputs["attended"]
    with pytest.raises(ValueError, match="attended has shape None"):
        values_of(problem, inputs)
