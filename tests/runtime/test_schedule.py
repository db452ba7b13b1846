# SPDX-License-Identifier: Apache-2.0
"""Schedules that are taken and refused, and the noised latent that a stage starts from."""

import numpy as np
import pytest

from ltxrt.errors import BundleError
from ltxrt.preset import load_presets
from ltxrt.schedule import check_sigmas, noised, steps

STAGE_1 = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
STAGE_2 = (0.909375, 0.725, 0.421875, 0.0)


def test_steps_are_neighbours():
    assert steps((0.9, 0.5, 0.0)) == [(0.9, 0.5), (0.5, 0.0)]
    assert len(steps(STAGE_1)) == 8
    assert len(steps(STAGE_2)) == 3


@pytest.mark.parametrize("width", [np.float64, np.float32])
def test_every_preset_fits_the_distilled_checkpoint(width):
    for preset in load_presets():
        check_sigmas(preset.stage_1_sigmas, [float(sigma) for sigma in np.array(STAGE_1, width)], preset.name)
        check_sigmas(preset.stage_2_sigmas, [float(sigma) for sigma in np.array(STAGE_2, width)], preset.name)


@pytest.mark.parametrize("wanted", [STAGE_1, STAGE_1[4:], STAGE_1[::2], (1.0, 0.0), (0.421875, 0.0)])
def test_falling_parts_are_taken(wanted):
    check_sigmas(wanted, STAGE_1, "preset low, stage 1")


@pytest.mark.parametrize(
    "wanted",
    [
        (1.0, 0.5, 0.0),  # a level that was not distilled
        (1.0, 0.725),  # stops with noise left
        (0.725, 0.909375, 0.0),  # rises
        (1.0, 1.0, 0.0),  # stands still
        (1.0, 0.725, 0.0, 0.0),
        (0.0,),  # no step
        (),
        (float("nan"), 0.0),
        (1.0, -0.725, 0.0),
    ],
)
def test_schedules_that_are_refused(wanted):
    with pytest.raises(BundleError, match=r"^preset low, stage 1: sigmas \[.*\] are not a falling part of .*0\.99375"):
        check_sigmas(wanted, STAGE_1, "preset low, stage 1")


def arrays(seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, 6, 4)).astype(np.float32) for _ in range(3)]


@pytest.mark.parametrize("sigma", [1.0, 0.909375, 0.421875, 0.0])
def test_noised_is_two_interpolations(sigma):
    initial, clean, noise = arrays(0)
    mask = np.array([0, 0.3, 0.5, 1, 1, 1], np.float32).reshape(1, 6, 1)
    expected = np.empty((1, 6, 4))
    for token in range(6):
        blended = (1 - sigma) * initial[0, token].astype(np.float64) + sigma * noise[0, token]
        share = float(mask[0, token, 0])
        expected[0, token] = (1 - share) * clean[0, token] + share * blended
    found = noised(initial, clean, noise, sigma, mask)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_ends_of_the_interpolations_are_exact():
    initial, clean, noise = arrays(1)
    ones, zeros = np.ones((1, 6, 1), np.float32), np.zeros((1, 6, 1), np.float32)
    np.testing.assert_array_equal(noised(np.zeros_like(initial), clean, noise, 1.0, ones), noise)
    np.testing.assert_array_equal(noised(initial, clean, noise, 0.0, ones), initial)
    np.testing.assert_array_equal(noised(initial, clean, noise, 0.909375, zeros), clean)
