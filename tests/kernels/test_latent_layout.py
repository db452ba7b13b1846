# SPDX-License-Identifier: Apache-2.0
"""The layouts of a latent: reference against the runtime and torch, kernel against reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ltxrt.latent import to_grid, to_tokens
from ltxrt.shapes import LatentShape
from ltxrt_kernels.latent_layout import LatentLayout
from ltxrt_kernels.latent_layout.reference import pack, unpack
from ltxrt_kernels.ops import OPS

#: Both ways; sides that are and are not a multiple of the tile, and of the widest access; one that is shorter.
PROBLEMS = (
    LatentLayout(tokens=67, channels=12),
    LatentLayout(tokens=132, channels=70, target="float16"),
    LatentLayout(tokens=65, channels=128, target="float32"),
    LatentLayout(tokens=129, channels=66, pack=True, source="bfloat16", target="float32"),
    LatentLayout(tokens=72, channels=128, pack=True, source="float16", target="bfloat16"),
    LatentLayout(tokens=1, channels=3, pack=True, source="float32"),
)


@given(st.tuples(*[st.integers(1, 4)] * 3), st.integers(1, 5), st.integers(0, 2**32))
def test_reference_is_the_runtime_s_layout_and_the_networks_statistics(grid, channels, seed):
    shape = LatentShape(*grid)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, int(np.prod(grid)), channels, generator=generator, dtype=torch.float64)
    mean = torch.randn(channels, generator=generator, dtype=torch.float64)
    std = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5
    # As in ltxrt_export.networks.video_decoder and image_encoder.
    statistics = (1, -1, 1, 1, 1)
    plain = torch.from_numpy(to_grid(tokens.numpy(), shape)) * std.view(statistics) + mean.view(statistics)
    found = unpack(tokens[0].numpy(), mean.numpy(), std.numpy())
    np.testing.assert_allclose(found.reshape(1, channels, *grid), plain.numpy(), rtol=1e-13, atol=1e-13)
    back = pack(found, mean.numpy(), std.numpy())
    np.testing.assert_allclose(back, tokens[0].numpy(), rtol=1e-11, atol=1e-11)
    expected = (torch.from_numpy(to_tokens(plain.numpy())) - mean) / std
    np.testing.assert_allclose(back, expected[0].numpy(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_kernel_on_the_cpu(problem, emulated):
    assert emulated(problem, PROBLEMS) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [*PROBLEMS, *OPS["latent_layout"].production], ids=str)
def test_kernel_on_the_gpu(problem, on_gpu):
    assert on_gpu(problem) <= 1
