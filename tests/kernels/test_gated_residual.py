# SPDX-License-Identifier: Apache-2.0
"""The gated residual: reference against torch, kernel against reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ltxrt_kernels.gated_residual import GatedResidual
from ltxrt_kernels.gated_residual.reference import gated_residual
from ltxrt_kernels.ops import OPS

#: Widths that are and are not a multiple of the widest access, and blocks that end early.
PROBLEMS = (
    GatedResidual(tokens=7, width=45, rows=3),
    GatedResidual(tokens=5, width=136, dtype="float16"),
    GatedResidual(tokens=13, width=30, rows=1, dtype="float32"),
    GatedResidual(tokens=1, width=1),
)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32))
def test_reference_is_what_the_block_does(tokens, width, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x, update = torch.randn(2, 1, tokens, width, generator=generator, dtype=torch.float64)
    gate = torch.randn(1, rows, width, generator=generator, dtype=torch.float64)
    token_row = torch.randint(rows, (tokens,), generator=generator)
    # As in ltxrt_export.networks.denoiser.Block, where a row is gathered to the tokens first.
    expected = x + update * gate.index_select(1, token_row)
    found = gated_residual(x[0].numpy(), update[0].numpy(), gate[0].numpy(), token_row.numpy())
    np.testing.assert_allclose(found, expected[0].numpy(), rtol=1e-13, atol=1e-13)


def test_out_may_be_the_residual(emulated):
    assert emulated(PROBLEMS[0], PROBLEMS, in_place="residual") <= 1


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_kernel_on_the_cpu(problem, emulated):
    assert emulated(problem, PROBLEMS) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [*PROBLEMS, *OPS["gated_residual"].production], ids=str)
def test_kernel_on_the_gpu(problem, on_gpu):
    assert on_gpu(problem) <= 1
