# SPDX-License-Identifier: Apache-2.0
"""What every backend refuses before it is touched: names, then dtypes, then shapes, one sentence each."""

import numpy as np
import pytest

from ltxrt.engine import TensorSpec, check_feeds
from ltxrt.errors import EngineError

SPECS = (
    TensorSpec("latent", "float32", (1, "Nv", 4)),
    TensorSpec("mask", "float32", (1, "Nv", 1)),
    TensorSpec("row", "int64", ("Nv",)),
)


def feeds(**changes):
    whole = {
        "latent": np.zeros((1, 6, 4), np.float32),
        "mask": np.zeros((1, 6, 1), np.float32),
        "row": np.zeros(6, np.int64),
        **changes,
    }
    return {name: value for name, value in whole.items() if value is not None}


def refusal(**changes):
    with pytest.raises(EngineError) as caught:
        check_feeds("denoiser", SPECS, feeds(**changes))
    return str(caught.value)


def test_a_spec_reads_as_it_is_declared():
    assert str(SPECS[0]) == "latent float32[1, Nv, 4]"


def test_feeds_that_fit_give_the_sizes():
    assert check_feeds("denoiser", SPECS, feeds()) == {"Nv": 6}
    assert check_feeds("denoiser", (), {}) == {}


def test_empty_axes_fit_a_symbol():
    empty = feeds(
        latent=np.zeros((1, 0, 4), np.float32), mask=np.zeros((1, 0, 1), np.float32), row=np.zeros(0, np.int64)
    )
    assert check_feeds("decoder", SPECS, empty) == {"Nv": 0}


def test_a_missing_tensor_is_named():
    assert refusal(mask=None, row=None) == "denoiser: the feed lacks mask, row"


def test_an_unknown_tensor_is_named():
    assert refusal(sigma=np.zeros(1)) == "denoiser: the feed does not take sigma"


def test_a_misspelt_tensor_is_both():
    assert refusal(mask=None, masks=np.zeros(1)) == "denoiser: the feed lacks mask and does not take masks"


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, ">f4"])
def test_a_wrong_dtype_is_named(dtype):
    found = np.dtype(dtype)
    assert refusal(mask=np.zeros((1, 6, 1), found)) == f"denoiser: mask is {found}, expected float32"


def test_a_wrong_rank_is_named():
    message = "denoiser: mask has shape (6, 1), expected mask float32[1, Nv, 1]"
    assert refusal(mask=np.zeros((6, 1), np.float32)) == message


def test_a_wrong_fixed_size_is_named():
    message = "denoiser: latent has shape (1, 6, 5), expected latent float32[1, Nv, 4] with 4 = 4"
    assert refusal(latent=np.zeros((1, 6, 5), np.float32)) == message


def test_a_symbol_means_one_size_everywhere():
    message = "denoiser: mask has shape (1, 7, 1), expected mask float32[1, Nv, 1] with Nv = 6"
    assert refusal(mask=np.zeros((1, 7, 1), np.float32)) == message


def test_a_symbol_means_one_size_within_a_tensor():
    square = (TensorSpec("x", "float32", ("n", "n")),)
    assert check_feeds("net", square, {"x": np.zeros((3, 3), np.float32)}) == {"n": 3}
    with pytest.raises(EngineError, match="with n = 3"):
        check_feeds("net", square, {"x": np.zeros((3, 4), np.float32)})


def test_names_come_before_dtypes_and_dtypes_before_shapes():
    wrong = {"latent": np.zeros((9, 9), np.float16), "mask": np.zeros((9, 9), np.float32)}
    assert refusal(**wrong, row=None) == "denoiser: the feed lacks row"
    assert refusal(**wrong) == "denoiser: latent is float16, expected float32"
    assert refusal(mask=wrong["mask"]).startswith("denoiser: mask has shape (9, 9)")
