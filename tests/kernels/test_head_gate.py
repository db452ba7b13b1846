# SPDX-License-Identifier: Apache-2.0
"""The gate on heads: reference against torch, kernel against reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ltxrt_kernels.head_gate import HeadGate
from ltxrt_kernels.head_gate.reference import head_gate
from ltxrt_kernels.ops import OPS

#: Head widths that are and are not a multiple of the widest access, and blocks that end early.
PROBLEMS = (
    HeadGate(tokens=3, heads=5, head_width=7),
    HeadGate(tokens=11, heads=4, head_width=24, dtype="float16"),
    HeadGate(tokens=9, heads=3, head_width=20, dtype="float32"),
    HeadGate(tokens=5, heads=6, head_width=12, quantise=True),
    HeadGate(tokens=2, heads=3, head_width=5, dtype="float16", quantise=True),
)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32))
def test_reference_is_what_the_attention_does(tokens, heads, width, seed):
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(1, tokens, heads, width, generator=generator, dtype=torch.float64)
    logits = 8 * torch.randn(1, tokens, heads, generator=generator, dtype=torch.float64)
    # As in ltxrt_export.networks.attention.gated_attention, before the output projection.
    expected = (out * (2.0 * torch.sigmoid(logits)).unsqueeze(-1)).flatten(2)
    found = head_gate(out.flatten(2)[0].numpy(), logits[0].numpy())
    np.testing.assert_allclose(found, expected[0].numpy(), rtol=1e-13)


def test_a_logit_of_zero_changes_nothing():
    attended = np.arange(12.0).reshape(2, 6)
    assert np.array_equal(head_gate(attended, np.zeros((2, 3))), attended)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_kernel_on_the_cpu(problem, emulated):
    assert emulated(problem, PROBLEMS) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [*PROBLEMS, *OPS["head_gate"].production], ids=str)
def test_kernel_on_the_gpu(problem, on_gpu):
    assert on_gpu(problem) <= 1
