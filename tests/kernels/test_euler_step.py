# SPDX-License-Identifier: Apache-2.0
"""The Euler step: reference against the exported denoiser, kernel against reference."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ltxrt_kernels.euler_step import EulerStep
from ltxrt_kernels.euler_step.reference import euler_step, generate_inputs
from ltxrt_kernels.ops import OPS

#: Channels that are and are not a multiple of the widest access, and blocks that end early.
PROBLEMS = (
    EulerStep(tokens=5, channels=12),
    EulerStep(tokens=9, channels=7, dtype="float16"),
    EulerStep(tokens=3, channels=128, dtype="float32"),
    EulerStep(tokens=1, channels=1),
)


@settings(deadline=None)  # the first example imports diffusers
@given(st.integers(1, 6), st.integers(1, 9), st.floats(0.01, 1), st.floats(0, 1), st.integers(0, 2**32))
def test_reference_is_what_the_denoiser_does(tokens, channels, sigma, share, seed):
    denoiser = pytest.importorskip("ltxrt_export.networks.denoiser", reason="no diffusers")
    generator = torch.Generator().manual_seed(seed)
    latent, clean = torch.randn(2, 1, tokens, channels, generator=generator, dtype=torch.float64)
    velocity = torch.randn(1, tokens, channels, generator=generator).double()
    mask = torch.rand(1, tokens, 1, generator=generator, dtype=torch.float64).round(decimals=1)
    levels = torch.tensor([sigma], dtype=torch.float64), torch.tensor([sigma * share], dtype=torch.float64)
    # The denoiser's own tail, with an output head that passes the velocity through.
    head = {"norm_out": nn.Identity(), "proj_out": nn.Identity()}
    post = denoiser.Post(SimpleNamespace(scale_shift_table=torch.zeros(2, channels), **head))
    row = torch.zeros(tokens, dtype=torch.int64)
    expected = post(velocity, torch.zeros(1, 1, channels), row, (latent, clean, mask), levels)[0]
    arrays = (latent[0].numpy(), velocity[0].numpy(), clean[0].numpy(), mask[0, :, 0].numpy())
    found = euler_step(*arrays, (levels[0].numpy(), levels[1].numpy()))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12, atol=1e-12)


def test_a_conditioned_token_ends_where_it_is_held():
    problem = PROBLEMS[0]
    inputs = generate_inputs(problem, 5)
    latent, clean = (inputs[name].astype(np.float64) for name in ("latent", "clean"))
    out = euler_step(latent, latent, clean, np.zeros(problem.tokens), (np.array([0.7]), np.array([0.0])))
    np.testing.assert_allclose(out, clean, atol=1e-12)


def test_out_may_be_the_latent(emulated):
    assert emulated(PROBLEMS[0], PROBLEMS, in_place="latent") <= 1


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_kernel_on_the_cpu(problem, emulated):
    assert emulated(problem, PROBLEMS) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [*PROBLEMS, *OPS["euler_step"].production], ids=str)
def test_kernel_on_the_gpu(problem, on_gpu):
    assert on_gpu(problem) <= 1
