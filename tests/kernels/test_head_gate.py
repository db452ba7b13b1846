# SPDX-License-Identifier: Apache-2.0
"""The gate on heads: reference against torch, kernel against reference."""

import pytest

from ltxrt_kernels.head_gate import HeadGate

#: Head widths that are and are not a multiple of the widest access, and blocks that end early.
PROBLEMS = (
    HeadGate(tokens=3, heads=5, head_width=7),
    HeadGate(tokens=11, heads=4, head_width=24, dtype="float16"),
    HeadGate(tokens=9, heads=3, head_width=20, dtype="float32"),
    HeadGate(tokens=5, heads=6, head_width=12, quantise=True),
    HeadGate(tokens=2, heads=3, head_width=5, dtype="float16", quantise=True),
)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_kernel_on_the_cpu(problem, emulated):
    assert emulated(problem, PROBLEMS) <= 1
