# SPDX-License-Identifier: Apache-2.0
"""Norm and rotary embedding: reference against diffusers and the exported graph, kernel against reference."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ltxrt.rope import RopeGrid, rope_tables
from ltxrt.shapes import LatentShape
from ltxrt_kernels.norm_rope import NormRope
from ltxrt_kernels.norm_rope.reference import reference
from ltxrt_kernels.ops import OPS

#: Widths whose frequencies fill every pair and leave some unturned; accesses of every width down to one value; a head
#: of one pair; one axis with and without a canvas; and runs of tokens, the last one short.
PROBLEMS = (
    NormRope(grid=(2, 3, 5), heads=3, head_width=10),
    NormRope(grid=(3, 2, 2), heads=4, head_width=16, dtype="float16"),
    NormRope(grid=(2, 1, 3), heads=5, head_width=2, dtype="float32"),
    NormRope(grid=(1, 3, 2), heads=9, head_width=128, epsilon=1e-5),
    NormRope(grid=(3, 2, 3), heads=2, head_width=24, axes=1),
    NormRope(grid=(7, 1, 1), heads=3, head_width=36, axes=1, dtype="float16"),
    NormRope(grid=(11, 15, 50), heads=33, head_width=2),
)


@settings(max_examples=30, deadline=None)
@given(
    grid=st.tuples(*[st.integers(1, 3)] * 3),
    heads=st.integers(1, 4),
    pairs=st.integers(2, 5),
    axes=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**32),
)
def test_reference_is_what_diffusers_does(grid, heads, pairs, axes, seed):
    theirs = pytest.importorskip("diffusers.models.transformers.transformer_ltx2")
    problem = NormRope(grid=grid, heads=heads, head_width=2 * pairs, axes=axes, dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, problem.tokens, problem.width, generator=generator)
    weight = torch.randn(problem.width, generator=generator)
    tables = the_runtime_s_tables(problem)
    cosine, sine = expanded(problem, tables)
    normal = F.rms_norm(x, (problem.width,), weight, problem.epsilon)
    expected = theirs.apply_split_rotary_emb(normal, (cosine, sine))[0]
    used = {port.name: tables[name] for port, name in zip(problem.inputs[2:], names(axes), strict=True)}
    found = reference(problem, {"x": x[0].numpy(), "weight": weight.numpy(), **used})["out"]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=2e-6)


def names(axes):
    return ("rope_time", "rope_height", "rope_width") if axes == 3 else ("rope_cross_time",)


def the_runtime_s_tables(problem):
    frequencies = np.linspace(0.5, 40, problem.frequencies, dtype=np.float32)
    cross = frequencies if problem.axes == 1 else np.ones(problem.width // 2, np.float32)
    own = frequencies if problem.axes == 3 else np.ones(problem.width // 6, np.float32)
    grid = RopeGrid(video=own, cross=cross, max_position=(20.0, 2048.0, 2048.0))
    return rope_tables(grid, LatentShape(*problem.grid), Fraction(24), 4)


def expanded(problem, tables):
    """Cosine and sine per head, as the exported denoiser makes them of the same tables."""
    denoiser = pytest.importorskip("ltxrt_export.networks.denoiser", reason="no diffusers")
    sizes = {"num_attention_heads": problem.heads, "attention_head_dim": problem.head_width}
    config = SimpleNamespace(**sizes, audio_num_attention_heads=problem.heads)
    ordered = ("rope_time", "rope_height", "rope_width", "rope_cross_time", "rope_audio")
    every = denoiser.RopeExpansion(SimpleNamespace(config=config))(
        *(torch.from_numpy(tables[name]) for name in ordered)
    )
    return every[:2] if problem.axes == 3 else every[2:4]


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="axes: 2 is not allowed"):
        NormRope(grid=(1, 1, 1), heads=1, head_width=4, axes=2)
    with pytest.raises(ValueError, match="head_width: 5 is not allowed"):
        NormRope(grid=(1, 1, 1), heads=1, head_width=5)


def test_runs_cover_every_token():
    long = PROBLEMS[-1]
    blocks, run = long.launch().grid[0], long.launch().integers[-1]
    assert run > 1
    assert (blocks - 1) * run < long.tokens < blocks * run
    assert PROBLEMS[0].launch().integers[-1] == 1


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_kernel_on_the_cpu(problem, emulated):
    assert emulated(problem, PROBLEMS) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [*PROBLEMS, *OPS["norm_rope"].production], ids=str)
def test_kernel_on_the_gpu(problem, on_gpu):
    assert on_gpu(problem) <= 1
