# SPDX-License-Identifier: Apache-2.0
"""Rules about attention and normalisation."""

import numpy as np
import pytest
from onnx import TensorProto, helper

FLOAT, HALF, BF16, BOOL = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.BOOL


def rules(found):
    return [entry.rule for entry in found]


@pytest.mark.parametrize("kind", [HALF, BF16])
def test_attention_that_is_fine(attention, kind) -> None:
    assert attention(kind=kind, is_causal=0, softcap=0.0, qk_matmul_output_mode=0, scale=0.125) == []
    assert attention(kind=kind, is_causal=1) == []
    mask = {"m": (kind, [(1, 1, 8, 8), (1, 1, 16, 16)])}
    assert attention(kind=kind, extra=mask) == []


def test_operands_of_rank_3(attention) -> None:
    found = attention([(1, 8, 256), (1, 16, 256)], q_num_heads=4, kv_num_heads=4)
    assert rules(found) == ["attention-rank"] * 3
    assert found[0].message == "the query has rank 3"


def test_heads_that_change_with_the_sizes(attention) -> None:
    found = attention([(1, 4, 8, 64), (1, 8, 8, 64)])
    assert rules(found) == ["attention-heads"] * 3
    assert found[0].message == "the query's number of heads is 4, 8"


def test_heads_whose_width_changes_with_the_sizes(attention) -> None:
    assert "the key's width of a head is" in attention([(1, 4, 8, 64), (1, 4, 8, 32)])[1].message


def test_a_cache(attention) -> None:
    cache = {
        "m": (HALF, [(1, 1, 8, 16), (1, 1, 16, 24)]),
        "past_k": (HALF, [(1, 4, 8, 64)]),
        "past_v": (HALF, [(1, 4, 8, 64)]),
    }
    found = attention(extra=cache, outputs=["y", "present_k", "present_v"])
    assert sorted(set(rules(found))) == ["attention-input", "attention-output"]
    assert [entry.message for entry in found if entry.rule == "attention-input"] == [
        "it takes past_k",
        "it takes past_v",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"softcap": 30.0}, "softcap is 30"),
        ({"softmax_precision": 1}, "softmax_precision is given"),
        ({"qk_matmul_output_mode": 1}, "qk_matmul_output_mode is 1"),
    ],
)
def test_attributes_that_are_not_implemented(attention, given, message) -> None:
    (found,) = attention(**given)
    assert (found.rule, found.severity, found.message) == ("attention-attribute", "error", message)


@pytest.mark.parametrize(
    ("kind", "shape", "given", "message"),
    [
        (FLOAT, (8, 8), {}, "the mask is float, the query float16"),
        (BOOL, (1, 1, 1, 8, 8), {}, "the mask has rank 5"),
        (BOOL, (8, 8), {"is_causal": 1}, "it is causal and has a mask: TensorRT takes one of them"),
    ],
)
def test_masks(attention, kind, shape, given, message) -> None:
    found = attention([(1, 4, 8, 64)], extra={"m": (kind, [shape])}, **given)
    assert message in [entry.message for entry in found if entry.rule == "attention-mask"]


def test_a_boolean_mask_is_fine(attention) -> None:
    assert attention([(1, 4, 8, 64)], extra={"m": (BOOL, [(8, 8)])}) == []


def test_attention_in_fp32_has_no_fused_kernel(attention) -> None:
    (found,) = attention(kind=FLOAT)
    assert (found.rule, found.severity) == ("attention-unfused", "warning")


# --- normalisation ---


def norm(lint, kind="RMSNormalization", element=HALF, outputs=("y",), **given):
    node = helper.make_node(kind, ["x", "s"], list(outputs), **given)
    scale = {"s": np.ones(8, np.float16 if element == HALF else np.float32)}
    return lint.rules([node], {"x": (element, [(2, 4, 8)])}, scale, outputs=outputs[:1])


def test_normalisations_that_are_fine(lint) -> None:
    assert norm(lint, axis=-1, stash_type=1) == []
    assert norm(lint, axis=2) == []
    assert norm(lint, "LayerNormalization", axis=-1) == []
    assert norm(lint, element=FLOAT) == []


def test_an_inner_axis(lint) -> None:
    assert norm(lint, axis=1) == ["norm-axis"]


def test_a_mean_in_half_precision(lint) -> None:
    assert norm(lint, axis=-1, stash_type=10) == ["norm-precision"]


def test_a_second_output(lint) -> None:
    assert "norm-output" in norm(lint, "LayerNormalization", outputs=("y", "mean"))
