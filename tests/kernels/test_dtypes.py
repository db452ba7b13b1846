# SPDX-License-Identifier: Apache-2.0
"""The element types against ml_dtypes and torch, every pattern of them."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ltxrt_kernels.dtypes import FORMATS, STORAGE, decode, encode

THEIRS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float8_e4m3": ml_dtypes.float8_e4m3fn}


def patterns(dtype):
    """Every value that the type has."""
    unsigned = f"uint{8 * np.dtype(STORAGE[dtype]).itemsize}"
    return np.arange(np.iinfo(unsigned).max + 1).astype(unsigned).view(STORAGE[dtype])


@pytest.mark.parametrize("dtype", THEIRS)
def test_every_pattern_is_read_and_written_back(dtype):
    stored = patterns(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        expected = stored.view(THEIRS[dtype]).astype(np.float64)
    found = decode(stored, dtype)
    np.testing.assert_array_equal(found, expected)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(encode(found[finite], dtype), stored[finite])


@pytest.mark.parametrize("dtype", THEIRS)
def test_between_two_neighbours_the_nearer_wins_and_ties_go_to_even(dtype):
    values = decode(patterns(dtype), dtype)
    values = np.unique(values[np.isfinite(values)])
    low, high = values[:-1], values[1:]
    middle = low + (high - low) / 2
    for point in (middle, np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)):
        theirs = point.astype(np.float64).astype(THEIRS[dtype]).astype(np.float64)
        exact = np.where(point < middle, low, np.where(point > middle, high, theirs))
        found = decode(encode(point, dtype), dtype)
        np.testing.assert_array_equal(found, exact)


@given(st.floats(width=32))
def test_e4m3_saturates_as_torch_does_after_a_clamp(value):
    found = encode(np.array([value], np.float64), "float8_e4m3")
    theirs = torch.tensor([value], dtype=torch.float32).clamp(-448, 448).to(torch.float8_e4m3fn)
    if np.isnan(value):
        assert np.isnan(decode(found, "float8_e4m3"))
    else:
        assert found == theirs.view(torch.uint8).numpy()


@given(st.sampled_from(list(FORMATS)), st.floats(-1e4, 1e4))
def test_no_rounding_is_worse_than_its_bound(dtype, value):
    layout, values = FORMATS[dtype], np.array([np.clip(value, -FORMATS[dtype].largest, FORMATS[dtype].largest)])
    nearest = layout.rounded(values)
    bound = np.maximum(layout.rounding_error(values), layout.rounding_error(nearest))
    assert np.all(np.abs(nearest - values) <= bound)


def test_beyond_the_largest():
    big = np.array([1e6, -np.inf])
    assert decode(encode(big, "float8_e4m3"), "float8_e4m3").tolist() == [448, -448]
    assert decode(encode(big, "float16"), "float16").tolist() == [np.inf, -np.inf]
    assert decode(encode(np.array([1e39]), "bfloat16"), "bfloat16").tolist() == [np.inf]


def test_integers_are_rounded():
    assert encode(np.array([0.5, 1.5, 254.6]), "uint8").tolist() == [0, 2, 255]
    assert encode(np.array([3.0]), "int64").dtype == np.int64
