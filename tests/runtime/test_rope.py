# SPDX-License-Identifier: Apache-2.0
"""The per-axis position tables against exact positions, and, expanded to tokens, against diffusers' class."""

import math
from fractions import Fraction

import numpy as np
import pytest

from ltxrt.rope import RopeGrid, rope_tables
from ltxrt.shapes import LatentShape, audio_token_count

THETA = 10_000.0
MAXIMUM = (20.0, 2048.0, 2048.0)
RATES = [Fraction(24), Fraction(24000, 1001), Fraction(60)]
# Width and heads of the video stream and width of the cross-modal one: the 22B model, and a small one that
# pads its heads differently.
WIDTHS = [(4096, 32, 2048), (64, 2, 32)]


def frequencies(count):
    return (THETA ** np.linspace(0.0, 1.0, count) * np.pi / 2).astype(np.float32)


def grid_of(width, cross):
    return RopeGrid(frequencies(width // 6), frequencies(cross // 2), MAXIMUM)


def test_shapes_and_dtypes():
    tables = rope_tables(grid_of(64, 32), LatentShape(3, 4, 5), Fraction(24), 17)
    assert {name: table.shape for name, table in tables.items()} == {
        "rope_time": (2, 3, 10),
        "rope_height": (2, 4, 10),
        "rope_width": (2, 5, 10),
        "rope_cross_time": (2, 3, 16),
        "rope_audio": (2, 17, 16),
    }
    assert {table.dtype for table in tables.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("rate", [*RATES, Fraction(1), Fraction(25, 2)])
def test_positions_are_the_middles_of_what_a_token_covers(rate):
    # With one frequency of 1 rad the table shows the position itself.
    slow = RopeGrid(np.ones(1, np.float32), np.ones(1, np.float32), MAXIMUM)
    tables = rope_tables(slow, LatentShape(4, 3, 2), rate, 4)
    frames = [Fraction(0 + 1, 2), Fraction(1 + 9, 2), Fraction(9 + 17, 2), Fraction(17 + 25, 2)]
    mels = [Fraction(0 + 1, 2), Fraction(1 + 5, 2), Fraction(5 + 9, 2), Fraction(9 + 13, 2)]
    expected = {
        "rope_time": [2 * middle / rate / 20 - 1 for middle in frames],
        "rope_cross_time": [2 * middle / rate / 20 - 1 for middle in frames],
        "rope_height": [Fraction(2 * (32 * index + 16), 2048) - 1 for index in range(3)],
        "rope_width": [Fraction(2 * (32 * index + 16), 2048) - 1 for index in range(2)],
        "rope_audio": [2 * middle / 100 / 20 - 1 for middle in mels],
    }
    assert set(expected) == set(tables)
    for name, angles in expected.items():
        np.testing.assert_allclose(tables[name][0, :, 0], [math.cos(angle) for angle in angles], atol=3e-7, rtol=0)
        np.testing.assert_allclose(tables[name][1, :, 0], [math.sin(angle) for angle in angles], atol=3e-7, rtol=0)


def expanded(axes, padded, heads):
    """Per-token tables ``[heads, tokens, padded / heads]``: frequency major, axis minor, padding in front."""
    tokens = axes[0].shape[1:-1]
    flat = np.stack(axes, axis=-1).reshape(2, math.prod(tokens), -1)
    front = np.zeros((2, flat.shape[1], padded - flat.shape[2]), np.float32)
    front[0] = 1
    whole = np.concatenate([front, flat], axis=2)
    return whole.reshape(2, flat.shape[1], heads, -1).swapaxes(1, 2)


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.models.transformers.transformer_ltx2")
    return module.LTX2AudioVideoRotaryPosEmbed


def worst(ours, theirs):
    return max(float(np.abs(ours[part] - theirs[part][0].numpy()).max()) for part in (0, 1))


@pytest.mark.parametrize(("width", "heads", "cross"), WIDTHS)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("shape", [LatentShape(2, 4, 4), LatentShape(16, 6, 10), LatentShape(5, 1, 30)])
def test_video_tables_are_diffusers(reference, shape, rate, width, heads, cross):
    embed = reference(width, rope_type="split", num_attention_heads=heads)
    theirs = embed(embed.prepare_video_coords(1, *shape, "cpu", fps=float(rate)))
    tables = rope_tables(grid_of(width, cross), shape, rate, 4)
    size = (2, *shape, width // 6)
    axes = [
        np.broadcast_to(tables["rope_time"][:, :, None, None], size),
        np.broadcast_to(tables["rope_height"][:, None, :, None], size),
        np.broadcast_to(tables["rope_width"][:, None, None, :], size),
    ]
    assert worst(expanded(axes, width // 2, heads), theirs) < 2e-6


@pytest.mark.parametrize(("width", "heads", "cross"), WIDTHS)
@pytest.mark.parametrize("rate", RATES)
def test_cross_and_audio_tables_are_diffusers(reference, rate, width, heads, cross):
    shape = LatentShape(61, 2, 3)
    audio_tokens = audio_token_count(481, rate)
    tables = rope_tables(grid_of(width, cross), shape, rate, audio_tokens)
    audio = reference(cross, modality="audio", scale_factors=(4,), rope_type="split", num_attention_heads=heads)
    theirs = audio(audio.prepare_audio_coords(1, audio_tokens, "cpu"))
    assert worst(expanded([tables["rope_audio"]], cross // 2, heads), theirs) < 2e-6
    # Time of the video on the cross-modal width: every token of a frame has the frame's own.
    video = reference(cross, rope_type="split", num_attention_heads=heads)
    theirs = video(video.prepare_video_coords(1, *shape, "cpu", fps=float(rate))[:, :1])
    ours = np.broadcast_to(tables["rope_cross_time"][:, :, None, None], (2, *shape, cross // 2))
    assert worst(expanded([ours], cross // 2, heads), theirs) < 2e-6
