# SPDX-License-Identifier: Apache-2.0
"""Rules about operators, types and names: each fault planted in a graph that is clean without it."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from ltxrt_export.lint.operators import OPERAND_TYPES

FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
X = {"x": (FLOAT, [(2, 4)])}


def node(kind, *inputs, output="y", **given):
    return helper.make_node(kind, list(inputs), [output], **given)


def test_a_clean_graph_has_no_findings(lint) -> None:
    weights = {"w": np.ones((4, 3), np.float32)}
    assert lint.findings([node("MatMul", "x", "w", output="z"), node("Relu", "z")], X, weights) == []


# --- the file ---


@pytest.mark.parametrize(("opset", "clean"), [(8, False), (9, True), (18, True), (24, True), (25, False)])
def test_opsets(lint, opset, clean) -> None:
    assert ("opset" in lint.rules([node("Relu", "x")], X, opset=opset)) is not clean


def test_other_domains(lint) -> None:
    model = lint.model([node("Relu", "x", output="z"), helper.make_node("Swish", ["z"], ["y"], domain="mine")], X)
    model.opset_import.append(helper.make_opsetid("mine", 3))
    found = [(entry.rule, entry.message) for entry in lint.of(model, X)]
    assert ("domain", "the graph imports mine 3") in found
    assert ("domain", "the operator is of domain mine") in found


def test_local_functions(lint) -> None:
    model = lint.model([node("Relu", "x")], X)
    model.functions.append(
        helper.make_function("mine", "Twice", ["a"], ["b"], [node("Add", "a", "a", output="b")], model.opset_import)
    )
    assert [entry.rule for entry in lint.of(model, X)] == ["local-function"]


def test_two_tensors_of_one_name(lint) -> None:
    assert "name" in lint.rules([node("Relu", "x", output="z"), node("Abs", "x", output="z"), node("Neg", "z")], X)
    assert "name" in lint.rules([node("Relu", "x")], X, {"y": np.ones(1, np.float32)})
    model = lint.model([node("Add", "x", "w")], {**X, "w": (FLOAT, [(4,)])}, {"w": np.ones(4, np.float32)})
    assert lint.of(model, X) == []  # an initializer that is also listed as an input is one tensor


def test_names_of_nodes(lint) -> None:
    model = lint.model([node("Relu", "x", output="z"), node("Abs", "z")], X)
    model.graph.node[0].name = model.graph.node[1].name = "same"
    (found,) = lint.of(model, X)
    assert (found.rule, found.severity, found.node, found.message) == (
        "node-name",
        "warning",
        "same",
        "2 nodes have this name",
    )
    model.graph.node[0].name = model.graph.node[1].name = ""
    assert lint.of(model, X)[0].message == "2 nodes have no name"


# --- operators ---


@pytest.mark.parametrize("kind", ["DynamicQuantizeLinear", "Col2Im", "BitShift", "MatMulInteger", "SequenceEmpty"])
def test_operators_that_the_parser_does_not_have(lint, kind) -> None:
    assert kind not in OPERAND_TYPES
    found = lint.findings([node(kind, "x")], X)
    assert ("operator", "error", f"y ({kind})", f"there is no {kind}") in [
        (entry.rule, entry.severity, entry.node, entry.message) for entry in found
    ]


@pytest.mark.parametrize("kind", ["NonZero", "Unique", "Compress", "NonMaxSuppression"])
def test_outputs_whose_size_depends_on_values(lint, kind) -> None:
    assert "data-dependent" in lint.rules([node(kind, "x")], X)


@pytest.mark.parametrize("kind", ["If", "Loop", "Scan"])
def test_branches_and_loops(lint, kind) -> None:
    assert "control-flow" in lint.rules([node(kind, "x")], X)


def test_scatter(lint) -> None:
    inputs = {**X, "i": (INT64, [(1, 1)]), "u": (FLOAT, [(1, 4)])}
    assert lint.rules([node("ScatterND", "x", "i", "u")], inputs) == ["scatter"]
    found = lint.findings([node("ScatterND", "x", "i", "u", reduction="add")], inputs)
    assert "reduction is add" in [entry.message for entry in found if entry.rule == "attribute"]


# --- types ---


@pytest.mark.parametrize(
    ("kind", "element", "clean"),
    [
        ("MatMul", TensorProto.INT32, False),
        ("Sigmoid", TensorProto.DOUBLE, False),
        ("Round", HALF, True),
        ("Clip", TensorProto.INT64, False),
        ("Transpose", TensorProto.BOOL, True),
        ("Transpose", TensorProto.UINT8, False),
        ("Neg", TensorProto.INT32, True),
        ("Neg", TensorProto.INT8, False),
    ],
)
def test_types_of_operands(lint, kind, element, clean) -> None:
    operands = ("x", "x") if kind == "MatMul" else ("x",)
    rules = lint.rules([node(kind, *operands)], {"x": (element, [(4, 4)])})
    assert ("operand-type" in rules) is not clean


def test_the_data_of_a_where_is_its_second_operand(lint) -> None:
    inputs = {"c": (TensorProto.BOOL, [(4,)]), "x": (HALF, [(4,)])}
    assert lint.rules([node("Where", "c", "x", "x")], inputs) == []


def test_bytes_are_for_outputs(lint) -> None:
    to_bytes = node("Cast", "x", to=TensorProto.UINT8)
    assert lint.rules([to_bytes], X) == []
    inside = [node("Cast", "x", output="z", to=TensorProto.UINT8), node("Cast", "z", to=FLOAT)]
    assert lint.rules(inside, X) == ["operand-type"]


def test_operands_of_two_types(lint) -> None:
    found = lint.findings([node("Add", "x", "h")], {**X, "h": (HALF, [(2, 4)])})
    assert "it takes float and float16" in [entry.message for entry in found if entry.rule == "mixed-types"]


def test_integers_of_64_bit_are_noted_where_they_are_data(lint) -> None:
    inputs = {"i": (INT64, [(3,), (5,)]), "x": (FLOAT, [(7, 2)])}
    found = lint.findings([node("Add", "i", "i", output="j"), node("Gather", "x", "j")], inputs)
    assert [(entry.rule, entry.node) for entry in found] == [("int64", "i"), ("int64", "j (Add)")]
    sizes = [
        node("Shape", "x", output="s"),
        node("Concat", "s", "one", output="t", axis=0),
        node("Reshape", "x", "t"),
    ]
    assert lint.findings(sizes, X, {"one": np.array([1], np.int64)}) == []  # sizes are not data


# --- operands and settings ---


def test_axes_must_be_constant(lint) -> None:
    inputs = {**X, "a": (INT64, [(1,)])}
    assert "constant-operand" in lint.rules([node("ReduceMean", "x", "a")], inputs)
    assert lint.rules([node("ReduceMean", "x", "a")], X, {"a": np.array([1], np.int64)}) == []


def test_kernels_of_convolutions(lint) -> None:
    x = {"x": (FLOAT, [(1, 2, 9)])}
    kernel = np.ones((3, 2, 3), np.float32)
    assert lint.findings([node("Conv", "x", "w")], x, {"w": kernel}) == []
    cast = [node("Cast", "w", output="v", to=FLOAT), node("Conv", "x", "v")]
    assert lint.findings(cast, x, {"w": kernel.astype(np.float16)}) == []
    computed = lint.findings([node("Add", "w", "w", output="v"), node("Conv", "x", "v")], x, {"w": kernel})
    assert [(entry.rule, entry.severity) for entry in computed] == [("folded-kernel", "note")]
    dynamic = {**x, "k": (FLOAT, [(3, 2, 3)])}
    assert lint.rules([node("Conv", "x", "k")], dynamic) == ["conv-kernel"]
    assert lint.rules([node("Conv", "x", "w", "b")], {**x, "b": (FLOAT, [(3,)])}, {"w": kernel}) == ["conv-kernel"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "cubic"}, "mode is cubic"),
        ({"antialias": 1}, "antialias is 1"),
        (
            {"coordinate_transformation_mode": "tf_crop_and_resize"},
            "coordinate_transformation_mode is tf_crop_and_resize",
        ),
        ({"keep_aspect_ratio_policy": "not_larger"}, "keep_aspect_ratio_policy is not_larger"),
        ({"mode": "nearest"}, None),
    ],
)
def test_settings_of_resize(lint, given, message) -> None:
    x = {"x": (FLOAT, [(1, 1, 4, 4)])}
    scales = {"s": np.array([1, 1, 2, 2], np.float32)}
    found = lint.findings([node("Resize", "x", "", "s", **given)], x, scales)
    assert [entry.message for entry in found if entry.rule == "attribute"] == ([message] if message else [])


def test_dilated_pooling(lint) -> None:
    x = {"x": (FLOAT, [(1, 1, 8, 8)])}
    assert lint.rules([node("MaxPool", "x", kernel_shape=[2, 2], dilations=[2, 2])], x) == ["attribute"]
    assert lint.rules([node("MaxPool", "x", kernel_shape=[2, 2])], x) == []
