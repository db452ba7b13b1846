# SPDX-License-Identifier: Apache-2.0
"""Rules about FP8: a clean quantised product, and each way to spoil it."""

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

FP8 = ml_dtypes.float8_e4m3fn
E4M3 = TensorProto.FLOAT8E4M3FN
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


@dataclass
class Product:
    """``y = x @ w`` in FP8: Q, DQ, DQ, MatMul; fields change one thing each."""

    kind: Any = FP8
    output_dtype: int = E4M3
    weight: tuple[int, ...] = (32, 64)
    weight_name: str = "block.0.ff.weight"
    weight_scale: Any = field(default_factory=lambda: np.ones(64, np.float16))
    axis: int = 1
    scale: Any = field(default_factory=lambda: np.array(0.5, np.float16))
    other_scale: Any = None
    between_x: str = ""
    between_w: str = ""
    transposed: bool = False
    quantise_x: bool = True
    quantise_w: bool = True
    stored: bool = True
    zero_point: Any = None
    block_size: int = 0

    def graph(self):
        constants = {self.weight_name: np.ones(self.weight, self.kind), "sw": self.weight_scale, "sx": self.scale}
        nodes = []
        x, w = "x", self.weight_name
        if self.quantise_x:
            zero = ["z"] if self.zero_point is not None else []
            given = {} if zero else {"output_dtype": self.output_dtype}
            nodes.append(helper.make_node("QuantizeLinear", ["x", "sx", *zero], ["xq"], name="q", **given))
            second = "sx" if self.other_scale is None else "sx2"
            nodes.append(helper.make_node("DequantizeLinear", ["xq", second, *zero], ["xd"], name="dqx"))
            x = "xd"
            if self.other_scale is not None:
                constants["sx2"] = self.other_scale
            if zero:
                constants["z"] = self.zero_point
        if not self.quantise_w:
            constants[w] = np.ones(self.weight, np.float16)
        elif not self.stored:
            constants[w] = np.ones(self.weight, np.float16)
            q = helper.make_node("QuantizeLinear", [w, "sw"], ["wq"], name="qw", axis=self.axis, output_dtype=E4M3)
            nodes += [q, helper.make_node("DequantizeLinear", ["wq", "sw"], ["wd"], name="dqw", axis=self.axis)]
            w = "wd"
        else:
            given = {"axis": self.axis} | ({"block_size": self.block_size} if self.block_size else {})
            nodes.append(helper.make_node("DequantizeLinear", [w, "sw"], ["wd"], name="dqw", **given))
            w = "wd"
        for name, operator in (("x", self.between_x), ("w", self.between_w)):
            if operator:
                nodes.append(
                    helper.make_node(operator, [x if name == "x" else w], [f"{name}b"], name=f"between_{name}")
                )
                x, w = (f"{name}b", w) if name == "x" else (x, f"{name}b")
        if self.transposed:
            nodes.append(helper.make_node("Gemm", [x, w], ["y"], name="product", transB=1))
        else:
            nodes.append(helper.make_node("MatMul", [x, w], ["y"], name="product"))
        return nodes, {"x": (HALF, [(8, 32), (16, 32)])}, constants

    def found(self, lint):
        return [(entry.rule, entry.message) for entry in lint.findings(*self.graph()) if entry.severity != "note"]


def test_a_product_that_is_fine(lint) -> None:
    assert Product().found(lint) == []
    assert Product(weight_scale=np.array(0.5, np.float16)).found(lint) == []  # one scale for the whole weight
    assert Product(weight_scale=np.array([0.5], np.float16)).found(lint) == []
    assert Product(quantise_x=False, quantise_w=False).found(lint) == []  # no FP8 at all
    assert Product(transposed=True, weight=(64, 32), axis=0).found(lint) == []
    assert Product(zero_point=np.array(0, FP8)).found(lint) == []
    assert Product(other_scale=np.array(0.5, np.float16)).found(lint) == []  # equal, though under another name


@pytest.mark.parametrize(
    ("change", "rule", "message"),
    [
        ({"output_dtype": TensorProto.FLOAT8E5M2}, "fp8-type", "the quantised type is float8e5m2"),
        ({"output_dtype": TensorProto.INT8}, "fp8-type", "the quantised type is int8"),
        ({"kind": ml_dtypes.float8_e5m2}, "fp8-type", "the quantised type is float8e5m2"),
        ({"kind": np.int8}, "fp8-type", "the quantised type is int8"),
        ({"other_scale": np.array(0.25, np.float16)}, "fp8-pair", "dqx dequantises with another scale"),
        (
            {"between_w": "Transpose", "weight": (64, 32), "axis": 0},
            "fp8-consumer",
            "its output goes to between_w (Transpose)",
        ),
        ({"between_x": "Relu"}, "fp8-consumer", "its output goes to between_x (Relu)"),
        ({"quantise_w": False}, "fp8-operands", "block.0.ff.weight is not quantised"),
        ({"quantise_x": False}, "fp8-operands", "x is not quantised"),
        ({"scale": np.array(0.0, np.float16)}, "fp8-scale", "the scale sx is not positive and finite throughout"),
        ({"scale": np.array(-1.0, np.float16)}, "fp8-scale", "the scale sx is not positive and finite throughout"),
        ({"scale": np.array(np.nan, np.float16)}, "fp8-scale", "the scale sx is not positive and finite throughout"),
        ({"weight_scale": np.ones(32, np.float16)}, "fp8-scale-shape", "32 scales along axis 1 of [32, 64]"),
        ({"weight_scale": np.ones((2, 64), np.float16)}, "fp8-scale-shape", "the scales have shape [2, 64]"),
        (
            {"weight": (64, 64), "axis": 0},
            "fp8-scale-shape",
            "the scales lie along axis 0, the output channels of product along another",
        ),
        ({"scale": np.ones(8, np.float16)}, "fp8-scale-shape", "an activation has scales of shape [8]"),
        ({"zero_point": np.array(1, FP8)}, "fp8-zero-point", "the zero point z is not 0"),
        ({"block_size": 16}, "fp8-block", "block_size is 16"),
        ({"stored": False}, "fp8-stored", "block.0.ff.weight is constant and quantised in the graph"),
        (
            {"weight_name": "block.0.attn1.to_gate_logits.weight"},
            "fp8-gate",
            "block.0.attn1.to_gate_logits.weight is quantised",
        ),
        (
            {"weight": (32, 24), "weight_scale": np.ones(24, np.float16)},
            "fp8-alignment",
            "block.0.ff.weight has shape [32, 24]",
        ),
    ],
)
def test_what_spoils_it(lint, change, rule, message) -> None:
    assert (rule, message) in Product(**change).found(lint)


def test_scales_of_another_type_than_the_tensor(lint) -> None:
    found = Product(scale=np.array(0.5, np.float32)).found(lint)
    assert ("fp8-scale", "the scale is float, x float16") in found


def test_a_computed_scale(lint) -> None:
    nodes, inputs, constants = Product().graph()
    amax = helper.make_node("ReduceMax", ["x"], ["sx"], name="amax", keepdims=0)
    del constants["sx"]
    found = [entry.message for entry in lint.findings([amax, *nodes], inputs, constants) if entry.rule == "fp8-scale"]
    assert "the scale sx is computed" in found


def test_a_quantised_tensor_that_goes_elsewhere(lint) -> None:
    nodes, inputs, constants = Product().graph()
    nodes.append(helper.make_node("Cast", ["xq"], ["aside"], name="aside", to=FLOAT))
    rules = lint.rules(nodes, inputs, constants, outputs=("y", "aside"))
    assert "fp8-pair" in rules


def test_a_dequantised_tensor_that_was_not_quantised(lint) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["c"], to=E4M3), helper.make_node("DequantizeLinear", ["c", "s"], ["y"])]
    found = lint.findings(nodes, {"x": (HALF, [(4, 4)])}, {"s": np.array(1, np.float16)})
    assert {"c is neither quantised nor a stored weight", "nothing uses its output"} <= {e.message for e in found}
