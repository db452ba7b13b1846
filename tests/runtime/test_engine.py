# SPDX-License-Identifier: Apache-2.0
"""What every backend refuses before it is touched: names, then dtypes, then shapes, one sentence each."""

import numpy as np
import pytest

from ltxrt.engine import TensorSpec, check_feeds, concrete_shape, iterate, run_resident, symbol_sizes
from ltxrt.errors import EngineError
from ltxrt.testing import FakeEngine

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


# --- symbols ---

IMAGE = (TensorSpec("image", "float32", (1, 3, 1, "32*h", "32*w")), TensorSpec("grid", "float32", ("h", "w")))


def test_symbols_are_told_from_shapes_and_give_shapes():
    sizes = symbol_sizes("image_encoder", IMAGE, {"image": (1, 3, 1, 64, 96), "grid": (2, 3)})
    assert sizes == {"h": 2, "w": 3}
    assert [concrete_shape(spec.shape, sizes) for spec in IMAGE] == [(1, 3, 1, 64, 96), (2, 3)]


@pytest.mark.parametrize("shapes", [{"image": (1, 3, 1, 65, 96)}, {"image": (1, 3, 1, 64, 96), "grid": (2, 4)}])
def test_shapes_that_do_not_go_together(shapes):
    specs = [spec for spec in IMAGE if spec.name in shapes]
    with pytest.raises(EngineError, match=r"^image_encoder: (image|grid) has shape .*, expected"):
        symbol_sizes("image_encoder", specs, shapes)


def test_what_is_no_symbol():
    with pytest.raises(EngineError, match="'h-1' is neither a symbol nor size"):
        concrete_shape(("h-1",), {})


# --- on an engine that computes in host memory ---


def doubling():
    return FakeEngine("toy", (TensorSpec("x", "float32", ("n",)),), (TensorSpec("y", "float32", ("n",)),), value=7)


def test_run_resident_is_a_run():
    engine = doubling()
    np.testing.assert_array_equal(run_resident(engine, {"x": np.zeros(3, np.float32)})["y"], 7)
    assert len(engine.calls) == 1


def test_iterate_is_a_replay_for_each_step_when_it_is_asked_for():
    engine = doubling()
    steps = iterate(
        engine.capture({"x": np.zeros(3, np.float32)}), [{"x": np.full(3, i, np.float32)} for i in (1, 2)], {}
    )
    assert engine.calls == []
    next(steps)
    assert [call["x"][0] for call in engine.calls] == [1]
    next(steps)
    assert [call["x"][0] for call in engine.calls] == [1, 2]
    assert next(steps, None) is None


def test_what_is_carried_is_the_next_input():
    engine = doubling()
    found = [step["y"][0] for step in iterate(engine.capture({"x": np.zeros(3, np.float32)}), [{}, {}], {"y": "x"})]
    assert found == [7, 7]
    assert [call["x"][0] for call in engine.calls] == [0, 7]
