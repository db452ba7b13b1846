# SPDX-License-Identifier: Apache-2.0
"""Ranges gathered batch by batch against ranges of everything at once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ltxrt_export.quantize.magnitudes import Magnitudes

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


@given(hnp.arrays(np.float32, st.integers(1, 200), elements=FINITE), st.integers(1, 7))
def test_batches_count_like_the_whole(values: np.ndarray, batches: int) -> None:
    whole, parts = Magnitudes(), Magnitudes()
    whole.update(values)
    for part in np.array_split(values, batches):
        parts.update(part)
    assert parts.amax == whole.amax == np.abs(values).max()
    assert parts.count == values.size
    for rank in (50.0, 99.0, 99.99, 100.0):
        assert parts.percentile(rank) == whole.percentile(rank)


@given(hnp.arrays(np.float32, st.integers(1, 500), elements=FINITE), st.floats(1, 100))
def test_a_percentile_covers_its_share_and_not_much_more(values: np.ndarray, rank: float) -> None:
    counted = Magnitudes()
    counted.update(values)
    found, ordered = counted.percentile(rank), np.sort(np.abs(values))
    exact = ordered[max(0, int(np.ceil(rank / 100 * len(ordered) - 1e-9)) - 1)]
    assert exact <= found <= max(exact * (1 + 1 / 64), np.finfo(np.float32).smallest_normal)


def test_an_outlier_moves_the_maximum_and_not_the_percentile() -> None:
    counted = Magnitudes()
    counted.update(np.linspace(0, 1, 99_999, dtype=np.float32))
    counted.update(np.array([-1000.0], np.float32))
    assert counted.amax == 1000.0
    assert 0.98 < counted.percentile(99.99) < 1.02


def test_nothing_counted_is_zero() -> None:
    counted = Magnitudes()
    counted.update(np.zeros((2, 0), np.float32))
    assert (counted.amax, counted.count, counted.percentile(99.99)) == (0.0, 0, 0.0)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        Magnitudes().update(np.array([1.0, value], np.float32))
