# SPDX-License-Identifier: Apache-2.0
"""Recipes: what they select at full size, and that a pattern or a layer without a counterpart is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ltxrt.errors import ExportError
from ltxrt.preset import load_presets
from ltxrt_export import architecture, keys, published
from ltxrt_export.quantize.recipe import RECIPES, BlockRule, load_recipe, parse_recipe

RECIPE = """
network = "denoiser"
precision = "fp8"
description = "d"
activations = "amax"
[[quantise]]
pattern = 'to_q\\.weight'
reason = "r"
[[keep]]
pattern = 'gate\\.weight'
reason = "one column a head"
"""


@pytest.fixture(scope="module")
def full_size() -> dict[str, int]:
    """Linear weights of the 22B denoiser's graph and their sizes; the last block's dead parts are not in it."""
    with torch.device("meta"):
        state = architecture.transformer(published.checkpoint_config()).state_dict()
    key_map = keys.key_map("transformer")
    stored = {key_map.stored(name): value for name, value in state.items() if value.ndim == 2 and "table" not in name}
    last = "transformer_blocks.47."
    dead = tuple(f"{last}{part}" for part in ("video_to_audio_attn.", "audio_ff."))
    return {
        key: math.prod(value.shape)
        for key, value in stored.items()
        if not any(part in key for part in (*dead, "audio_proj_out"))
    }


def test_fp8_takes_28_linears_of_every_block(full_size: dict[str, int]) -> None:
    selection = load_recipe("denoiser", "fp8").select(full_size)
    assert len(selection.quantised) == 48 * 28 - 6
    assert sum(full_size[key] for key in selection.quantised) == 18_463_326_208
    assert not any("gate" in key or "adaln" in key or "proj_out" in key for key in selection.quantised)


def test_fp8_mixed_keeps_the_first_block_and_the_last_five(full_size: dict[str, int]) -> None:
    everything = set(load_recipe("denoiser", "fp8").select(full_size).quantised)
    selection = load_recipe("denoiser", "fp8-mixed").select(full_size)
    left = {int(key.split("transformer_blocks.")[1].split(".")[0]) for key in everything - set(selection.quantised)}
    assert left == {0, 43, 44, 45, 46, 47}
    assert set(selection.quantised) < everything
    assert set(selection.quantised) | set(selection.kept) == set(full_size)


def test_every_precision_of_a_preset_that_needs_a_recipe_has_one() -> None:
    wanted = {(name, kind) for preset in load_presets() for name, kind in preset.precision.items() if "fp8" in kind}
    assert wanted
    for network, precision in wanted:
        recipe = load_recipe(network, precision)
        assert (recipe.network, recipe.precision) == (network, precision)
        assert all(len(rule.reason) > 20 for rule in (*recipe.quantise, *recipe.keep))


def test_the_recipes_differ_in_their_blocks_alone() -> None:
    plain, mixed = (load_recipe("denoiser", kind) for kind in ("fp8", "fp8-mixed"))
    assert (plain.quantise, plain.keep) == (mixed.quantise, mixed.keep)
    assert plain.blocks is None
    assert mixed.blocks is not None


@given(st.integers(1, 100))
def test_blocks_scale_with_depth_and_keep_at_least_one_at_each_end(depth: int) -> None:
    rule = BlockRule(r"blocks\.(\d+)\.", of=48, first=1, last=5, reason="r")
    kept = {int(key.split(".")[1]) for key in rule.kept(f"blocks.{index}.w" for index in range(depth))}
    first, last = math.ceil(depth / 48), math.ceil(5 * depth / 48)
    assert kept == {*range(min(first, depth)), *range(max(0, depth - last), depth)}


def test_reasons_and_counts_are_reported() -> None:
    selection = parse_recipe(RECIPE, "r.toml").select(["b.0.to_q.weight", "b.0.gate.weight", "b.1.to_q.weight"])
    assert selection.quantised == ("b.0.to_q.weight", "b.1.to_q.weight")
    assert selection.kept == {"b.0.gate.weight": "one column a head"}
    assert selection.matches == {r"to_q\.weight": 2, r"gate\.weight": 1}


def test_a_pattern_without_a_layer_is_refused() -> None:
    with pytest.raises(ExportError, match=r"gate.*matches no linear layer"):
        parse_recipe(RECIPE, "r.toml").select(["b.0.to_q.weight"])


def test_a_block_rule_without_a_block_is_refused() -> None:
    blocks = "[blocks]\npattern = 'blocks\\.(\\d+)'\nof = 48\nfirst = 1\nlast = 1\nreason = 'r'\n"
    with pytest.raises(ExportError, match=r"blocks.*matches no linear layer"):
        parse_recipe(RECIPE + blocks, "r.toml").select(["to_q.weight", "gate.weight"])


def test_a_layer_without_a_pattern_is_refused() -> None:
    with pytest.raises(ExportError, match=r"1 linear layers are matched by no pattern, b\.0\.to_new\.weight"):
        parse_recipe(RECIPE, "r.toml").select(["b.0.to_q.weight", "b.0.gate.weight", "b.0.to_new.weight"])


def test_patterns_begin_at_a_segment() -> None:
    with pytest.raises(ExportError, match="matched by no pattern"):
        parse_recipe(RECIPE, "r.toml").select(["to_q.weight", "gate.weight", "b.not_to_q.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("network =", "networks ="), "unknown or missing"),
        (('"amax"', '"largest"'), "allowed: amax, percentile"),
        (('reason = "r"', 'reason = " "'), "has no reason"),
        (("pattern = 'to_q", "pattern = '(to_q"), "r.toml"),
        (('description = "d"', "description ="), "r.toml"),
        (("[[keep]]", "[[keep]]\nweight = 1"), "weight"),
    ],
)
def test_malformed_files_are_named(change: tuple[str, str], message: str) -> None:
    text = RECIPE.replace(*change)
    assert text != RECIPE
    with pytest.raises(ExportError, match=message):
        parse_recipe(text, "r.toml")


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ExportError, match="denoiser fp8, denoiser fp8-mixed, text_encoder fp8"):
        load_recipe("upsampler", "fp8")
    assert set(RECIPES) == {"denoiser", "text_encoder"}
