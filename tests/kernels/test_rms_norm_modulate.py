# SPDX-License-Identifier: Apache-2.0
"""Norm, scale and shift: reference against torch, kernel against reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ltxrt_kernels.arrays import values_of
from ltxrt_kernels.dtypes import encode
from ltxrt_kernels.ops import OPS
from ltxrt_kernels.rms_norm_modulate import RmsNormModulate
from ltxrt_kernels.rms_norm_modulate.reference import generate_inputs, reference, rms_norm_modulate

#: One warp and several, rows that do not fill the last access of a thread, accesses of every width down to one value,
#: more than two accesses a thread.
PROBLEMS = (
    RmsNormModulate(tokens=5, width=33, rows=3),
    RmsNormModulate(tokens=3, width=520, dtype="float16"),
    RmsNormModulate(tokens=4, width=1028, rows=1, dtype="float32"),
    RmsNormModulate(tokens=2, width=1101, epsilon=1e-5),
    RmsNormModulate(tokens=6, width=264, quantise=True),
    RmsNormModulate(tokens=3, width=35, dtype="float16", quantise=True),
)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**32))
def test_reference_is_what_the_block_does(tokens, width, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, width, generator=generator, dtype=torch.float64)
    scale, shift = torch.randn(2, 1, rows, width, generator=generator, dtype=torch.float64)
    token_row = torch.randint(rows, (tokens,), generator=generator)
    # As in ltxrt_export.networks.denoiser.Block, where rows are gathered to the tokens first.
    rows_of_tokens = [table.index_select(1, token_row) for table in (scale, shift)]
    expected = F.rms_norm(x, (width,), None, 1e-6) * (1 + rows_of_tokens[0]) + rows_of_tokens[1]
    found = rms_norm_modulate(x[0].numpy(), scale[0].numpy(), shift[0].numpy(), token_row.numpy(), 1e-6)
    np.testing.assert_allclose(found, expected[0].numpy(), rtol=1e-12, atol=1e-12)


def test_quantised_output_is_that_of_quantize_linear():
    problem = RmsNormModulate(tokens=9, width=64, dtype="float32", quantise=True)
    inputs = generate_inputs(problem, 3)
    expected = reference(problem, inputs)["out"]
    values = values_of(problem, inputs)
    plain = rms_norm_modulate(values["x"], values["scale"], values["shift"], inputs["token_row"], problem.epsilon)
    theirs = torch.from_numpy(plain / values["output_scale"]).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert np.array_equal(encode(expected, "float8_e4m3"), theirs.view(torch.uint8).numpy())
    assert np.abs(expected).max() > 448  # some saturate


def test_zeros_stay_finite(emulated):
    problem = PROBLEMS[0]
    inputs = generate_inputs(problem, 4)
    inputs["x"][...] = 0
    assert emulated(problem, PROBLEMS, inputs) <= 1


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_kernel_on_the_cpu(problem, emulated):
    assert emulated(problem, PROBLEMS) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [*PROBLEMS, *OPS["rms_norm_modulate"].production], ids=str)
def test_kernel_on_the_gpu(problem, on_gpu):
    assert on_gpu(problem) <= 1
