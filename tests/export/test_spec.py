# SPDX-License-Identifier: Apache-2.0
"""Ports and symbols of a network."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ltxrt_export.networks.spec import (
    Axis,
    NetworkSpec,
    Port,
    axis_of,
    concrete,
    dynamic_shapes,
    example_inputs,
    random_feeds,
)

SYMBOLS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True)


def two_axes() -> NetworkSpec:
    return NetworkSpec(
        name="pair",
        module=torch.nn.Identity(),
        inputs=(
            Port("image", "float32", (1, 3, "32*h", "w")),
            Port("row", "int64", ("w",)),
            Port("sigma", "float32", (1,)),
        ),
        outputs=(Port("out", "float32", (1, "h", "2*w")),),
        axes={"h": Axis(1, 8, 3), "w": Axis(4, 64, 6, traced_maximum=60)},
        weights={},
    )


@given(size=st.integers(0, 1 << 40))
def test_a_number_is_a_fixed_size(size: int) -> None:
    assert axis_of(size) is None
    assert concrete(size, {}) == size


@given(symbol=SYMBOLS, factor=st.integers(1, 10_000), size=st.integers(0, 10_000))
def test_symbols_with_and_without_a_factor(symbol: str, factor: int, size: int) -> None:
    assert axis_of(symbol) == (1, symbol)
    assert axis_of(f"{factor}*{symbol}") == (factor, symbol)
    assert concrete(symbol, {symbol: size, "?": 1}) == size
    assert concrete(f"{factor}*{symbol}", {symbol: size}) == factor * size


@pytest.mark.parametrize("entry", ["", "3", "*h", "h*3", "3*", "3 * h", "-1*h", "h+1", "0*h", "h\n", "2*3*h"])
def test_anything_else_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(repr(entry))} is neither a size, a symbol nor size\*symbol$"):
        axis_of(entry)


def test_an_unknown_symbol_is_an_error() -> None:
    with pytest.raises(KeyError):
        concrete("h", {"w": 1})


def test_example_inputs_are_zeros_of_the_example_sizes() -> None:
    image, row, sigma = example_inputs(two_axes())
    assert (image.shape, row.shape, sigma.shape) == ((1, 3, 96, 6), (6,), (1,))
    assert (image.dtype, row.dtype) == (torch.float32, torch.int64)
    assert not image.any()


def test_dynamic_shapes_carry_range_factor_and_identity() -> None:
    image, row, sigma = dynamic_shapes(two_axes())
    assert set(image) == {2, 3}
    assert set(row) == {0}
    assert sigma == {}
    # One symbol is one dimension wherever it recurs.
    assert row[0] is image[3]
    assert (row[0].__name__, row[0].min, row[0].max) == ("w", 4, 60)
    # torch.export would make constants of sizes 0 and 1.
    assert (image[2].__name__, image[2].root.__name__) == ("32*h", "h")
    assert (image[2].root.min, image[2].root.max) == (2, 8)


def test_dynamic_shapes_are_what_torch_export_takes() -> None:
    class Sum(torch.nn.Module):
        def forward(self, image: torch.Tensor, row: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return image.sum((0, 1)) + row + sigma

    spec = two_axes()
    exported = torch.export.export(Sum(), example_inputs(spec), dynamic_shapes=dynamic_shapes(spec))
    found = exported.module()(torch.ones(1, 3, 64, 5), torch.arange(5), torch.zeros(1))
    assert torch.equal(found, 3 + torch.arange(5.0).expand(64, 5))


def test_random_feeds() -> None:
    spec, sizes = two_axes(), {"h": 2, "w": 5}
    feeds = random_feeds(spec, sizes, 0)
    assert {name: (value.shape, value.dtype.name) for name, value in feeds.items()} == {
        "image": ((1, 3, 64, 5), "float32"),
        "row": ((5,), "int64"),
        "sigma": ((1,), "float32"),
    }
    assert not feeds["row"].any()
    assert abs(feeds["image"].std() - 1) < 0.1
    assert abs(feeds["image"].mean()) < 0.1
    again, other = random_feeds(spec, sizes, 0), random_feeds(spec, sizes, 1)
    np.testing.assert_array_equal(feeds["image"], again["image"])
    assert not np.array_equal(feeds["image"], other["image"])
