# SPDX-License-Identifier: Apache-2.0
"""Shape and rate arithmetic against its definition in exact fractions, and against the reference's published table."""

import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ltxrt.shapes import (
    LatentShape,
    PixelShape,
    audio_token_count,
    covering_frames,
    frame_rate,
    frames_covering_audio,
    samples_for_frames,
)

rates = st.one_of(
    st.sampled_from([1, 12.5, 23.976, 24, 25, 29.97, 30, 59.94, 60]),
    st.floats(1, 60, allow_nan=False),
    st.decimals(1, 60, places=2).map(float),
)
sample_rates = st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])


# --- grids ---


@pytest.mark.parametrize(
    ("pixel", "latent", "tokens"),
    [
        ((121, 704, 1280), (16, 22, 40), 14_080),
        ((121, 352, 640), (16, 11, 20), 3_520),
        ((481, 704, 1280), (61, 22, 40), 53_680),
        ((9, 128, 128), (2, 4, 4), 32),
        ((1, 64, 64), (1, 2, 2), 4),
    ],
)
def test_latent_grids(pixel, latent, tokens):
    shape = PixelShape(*pixel).to_latent()
    assert shape == latent
    assert shape.tokens == tokens
    assert shape.tokens_per_frame * shape.frames == tokens
    assert shape.to_pixel() == pixel


@given(st.integers(1, 61), st.integers(1, 64), st.integers(1, 64))
def test_latent_to_pixel_and_back(frames, height, width):
    shape = LatentShape(frames, height, width)
    assert shape.to_pixel().to_latent() == shape


@pytest.mark.parametrize("pixel", [(8, 64, 64), (120, 64, 64), (0, 64, 64), (-7, 64, 64), (9, 65, 64), (9, 64, 48)])
def test_what_is_off_the_grid_is_refused(pixel):
    with pytest.raises(ValueError, match=r"grid|multiple"):
        PixelShape(*pixel).to_latent()


@given(st.integers(1, 32), st.integers(1, 32))
def test_half_a_canvas_is_on_the_grid(height, width):
    canvas = PixelShape(9, 64 * height, 64 * width)
    half, full = canvas.halved().to_latent(), canvas.to_latent()
    assert (2 * half.height, 2 * half.width, half.frames) == (full.height, full.width, full.frames)


# --- frame rates ---


@pytest.mark.parametrize(
    ("decimal", "exact"),
    [
        (23.976, Fraction(24000, 1001)),
        (23.98, Fraction(24000, 1001)),
        (24000 / 1001, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (30000 / 1001, Fraction(30000, 1001)),
        (47.952, Fraction(48000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (60000 / 1001, Fraction(60000, 1001)),
        (12.5, Fraction(25, 2)),
        (7.3, Fraction(73, 10)),
        (24.37, Fraction(2437, 100)),
        (1, Fraction(1)),
        (1.0, Fraction(1)),
        (24, Fraction(24)),
        (24.0, Fraction(24)),
        (25, Fraction(25)),
        (30, Fraction(30)),
        (60, Fraction(60)),
        (59.9999999, Fraction(60)),
        (float(Fraction(1002, 1001)), Fraction(1002, 1001)),
        (float(Fraction(1003, 1002)), Fraction(1002, 1001)),
    ],
)
def test_frame_rates(decimal, exact):
    assert frame_rate(decimal) == exact


@given(rates)
def test_a_frame_rate_stays_near_and_in_range(decimal):
    exact = frame_rate(decimal)
    assert 1 <= exact <= 60
    assert exact.denominator <= 1001
    assert abs(exact - Fraction(decimal)) <= Fraction(decimal) / 1000
    assert frame_rate(float(exact)) == exact


# --- lengths ---


@given(st.integers(1, 2000))
@example(9)
@example(10)
@example(481)
def test_covering_frames_is_the_smallest_that_covers(frames):
    covering = covering_frames(frames)
    candidates = [count for count in range(9, 2100, 8) if count >= frames]
    assert covering == candidates[0]


@given(samples=st.integers(1, 10**7), sample_rate=sample_rates, decimal=rates)
@example(samples=48_000, sample_rate=48_000, decimal=24)
@example(samples=48_001, sample_rate=48_000, decimal=24)
@example(samples=1, sample_rate=96_000, decimal=1)
def test_frames_cover_the_audio_and_no_more(samples, sample_rate, decimal):
    rate = frame_rate(decimal)
    frames = frames_covering_audio(samples, sample_rate, rate)
    assert frames == math.ceil(Fraction(samples, sample_rate) * rate)
    assert frames / rate >= Fraction(samples, sample_rate) > (frames - 1) / rate


def test_a_whole_number_of_frames_is_not_rounded_up():
    # 1001 / 24000 s a frame: 2002 samples at 48 kHz, where the float product is 1 + 2e-16.
    for frames in range(1, 482):
        assert frames_covering_audio(frames * 2002, 48_000, Fraction(24000, 1001)) == frames


def test_no_audio_is_one_frame():
    assert frames_covering_audio(0, 48_000, Fraction(24)) == 1


@given(frames=st.integers(1, 481), sample_rate=sample_rates, decimal=rates)
def test_samples_for_frames_are_within_half_a_sample(frames, sample_rate, decimal):
    rate = frame_rate(decimal)
    samples = samples_for_frames(frames, rate, sample_rate)
    assert isinstance(samples, int)
    assert abs(samples - frames / rate * sample_rate) <= Fraction(1, 2)


@pytest.mark.parametrize(
    ("frames", "rate", "tokens"),
    [
        (121, Fraction(24), 126),
        (121, Fraction(25), 121),
        (97, Fraction(24), 101),
        (241, Fraction(24), 251),
        (481, Fraction(24), 501),
        (121, Fraction(60), 50),
        (9, Fraction(24), 9),
        (9, Fraction(60), 4),
        (481, Fraction(1), 12_025),
        (121, Fraction(24000, 1001), 126),
        (9, Fraction(10), 22),  # 22.5, half to even
        (27, Fraction(50), 14),  # 13.5, half to even
    ],
)
def test_audio_token_counts(frames, rate, tokens):
    assert audio_token_count(frames, rate) == tokens
