# SPDX-License-Identifier: Apache-2.0
"""Measuring how near two clips are, and reading the runtime's frames; the rest is tested with what draws the clips."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltxrt_export.tiny.measure import best_lag, correlations, luma, psnr, rgb_pictures, ssim
from ltxrt_export.tiny.mouth import MouthTrack, frame_times
from ltxrt_export.tiny.world import Scene, render
from ltxrt_kernels.rgb_to_yuv420.reference import rgb_to_yuv420


def decoded(pictures: np.ndarray) -> np.ndarray:
    """Pictures as the decoder gives them."""
    return rgb_to_yuv420(pictures.transpose(0, 3, 1, 2) / 127.5 - 1)


def drawn(height: int = 128, width: int = 192) -> np.ndarray:
    half_open = MouthTrack(np.full(2, 0.5, np.float32), np.full(2, 0.5, np.float32))
    scene = Scene((45, 90, 210), (240, 220, 70), (205, 40, 40))
    return render(scene, half_open, frame_times(2, 24), height, width)


@given(st.integers(1, 4), st.integers(1, 8), st.tuples(*[st.integers(0, 255)] * 3))
def test_plain_colours_come_back(rows: int, columns: int, colour: tuple[int, int, int]) -> None:
    plain = np.full((2, rows * 4, columns * 4, 3), colour, np.uint8)
    found = rgb_pictures(decoded(plain))
    assert found.shape == plain.shape
    # 219 and 224 levels for 256.
    assert np.abs(found.astype(int) - plain).max() <= 3


def test_a_drawn_clip_comes_back() -> None:
    pictures = drawn()
    found = rgb_pictures(decoded(pictures))
    assert psnr(found, pictures) > 32  # what the halved chroma leaves
    # It lies where it should: a shift by a pixel either way is farther off.
    for shift in (-1, 1):
        moved = [np.roll(pictures, shift, axis) for axis in (1, 2)]
        assert all(psnr(found, other) < 30 for other in moved)


def test_chroma_is_interpolated_between_the_middles_of_blocks() -> None:
    frames = np.full((1, 6, 8), 128, np.uint8)
    frames[0, 5] = [128, 128, 188, 188, 128, 128, 188, 188]  # the plane of Cr: two rows of 128, 128, 188, 188
    red = rgb_pictures(frames)[0, 0, :, 0].astype(float)
    assert np.all(np.diff(red) >= 0)
    # Between the second and the third block a quarter and three quarters of the step.
    share = (red[3:5] - red[0]) / (red[-1] - red[0])
    assert share == pytest.approx([0.25, 0.75], abs=0.01)


def test_luma_is_the_first_plane() -> None:
    frames = np.arange(2 * 12 * 8).reshape(2, 12, 8).astype(np.uint8)
    np.testing.assert_array_equal(luma(frames), frames[:, :8])


def test_ssim_of_equal_clips_is_one() -> None:
    grey = luma(decoded(drawn()))
    assert ssim(grey, grey) == pytest.approx(1)


@given(st.integers(0, 255), st.integers(0, 255))
def test_ssim_of_plain_pictures_is_the_likeness_of_their_levels(first: int, second: int) -> None:
    one, other = (np.full((1, 12, 13), level, np.uint8) for level in (first, second))
    c1 = (0.01 * 255) ** 2
    # Without structure only the first factor of equation 13 is left.
    assert ssim(one, other) == pytest.approx((2 * first * second + c1) / (first**2 + second**2 + c1))


def test_ssim_by_its_definition_at_one_place() -> None:
    random = np.random.default_rng(4)
    first, second = random.integers(0, 256, (2, 1, 11, 11), np.uint8)
    away = np.square(np.arange(11) - 5)
    weights = np.exp(-(away[:, None] + away[None, :]) / 4.5)
    weights /= weights.sum()
    x, y = first[0].astype(float), second[0].astype(float)
    mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
    variances = (weights * (x - mean_x) ** 2).sum() + (weights * (y - mean_y) ** 2).sum()
    covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))
    assert ssim(first, second) == pytest.approx(expected)


def test_ssim_falls_with_noise() -> None:
    grey = luma(decoded(drawn()))
    noise = np.random.default_rng(5).normal(0, 1, grey.shape)
    values = [ssim(grey, np.clip(grey + noise * level, 0, 255).astype(np.uint8)) for level in (2, 8, 32)]
    assert 1 > values[0] > values[1] > values[2] > 0


def test_lags_are_those_of_the_mouth() -> None:
    wave = np.random.default_rng(6).random(60).astype(np.float32)
    scores = correlations(wave[:-2], wave[2:], most=3)
    assert list(scores) == list(range(-3, 4))
    # The mouth does now what the sound did two frames ago.
    assert best_lag(scores) == 2
    assert scores[2] == pytest.approx(1)


def test_of_equal_correlations_the_shortest_lag_counts() -> None:
    assert best_lag({-2: 0.5, -1: 0.5, 0: 0.4, 1: 0.2}) == -1
