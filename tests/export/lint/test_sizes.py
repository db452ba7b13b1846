# SPDX-License-Identifier: Apache-2.0
"""Rules about sizes: followed through the graph's own arithmetic, at more than one point."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from ltxrt.manifest import NetworkEntry, TensorEntry
from ltxrt_export.lint.graph import GraphView
from ltxrt_export.lint.shapes import infer_shapes
from ltxrt_export.lint.sizes import MAX_ELEMENTS, check_ports

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def node(kind, *inputs, output="y", **given):
    return helper.make_node(kind, list(inputs), [output], **given)


def ints(*values):
    return np.array(values, np.int64)


# --- following sizes ---


def test_sizes_are_followed_through_arithmetic(lint) -> None:
    nodes = [
        node("Shape", "x", output="shape"),
        node("Gather", "shape", "axis", output="rows"),
        node("Mul", "rows", "two", output="twice"),
        node("Cast", "twice", output="as_float", to=FLOAT),
        node("Cast", "as_float", output="limit", to=INT64),
        node("Squeeze", "limit", output="scalar"),
        node("Range", "zero", "scalar", "one", output="indices"),
        node("Unsqueeze", "indices", "axis", output="line"),
        node("Concat", "axis", "twice", output="target", axis=0),
        node("Expand", "line", "target"),
    ]
    constants = {"axis": ints(1), "two": ints(2), "zero": np.array(0), "one": np.array(1)}
    model = lint.model(nodes, {"x": (FLOAT, [(2, 3)])}, constants)
    first, second = infer_shapes(GraphView("net", model), [({"x": (2, 3)}, {"n": 3}), ({"x": (2, 5)}, {"n": 5})])
    assert (first.values["limit"].tolist(), second.values["limit"].tolist()) == ([6], [10])
    assert (first.shapes["indices"], second.shapes["indices"]) == ((6,), (10,))
    assert first.shapes["y"] == (6, 6)
    assert first.problems == []


def test_a_part_of_a_shape(lint) -> None:
    model = lint.model([node("Shape", "x", start=1, end=-1)], {"x": (FLOAT, [(2, 3, 4, 5)])})
    (found,) = infer_shapes(GraphView("net", model), [({"x": (2, 3, 4, 5)}, {})])
    assert found.values["y"].tolist() == [3, 4]


def test_sizes_that_do_not_fit_together(lint) -> None:
    inputs = {"x": (FLOAT, [(2, 4), (2, 5)]), "w": (FLOAT, [(4, 3)])}
    (found,) = lint.findings([node("MatMul", "x", "w")], inputs)
    assert (found.rule, found.severity) == ("inconsistent", "error")
    assert found.message.startswith("at set 2 = 2: ")


def test_a_size_that_depends_on_values(lint) -> None:
    inputs = {"x": (FLOAT, [(2, 4)]), "t": (INT64, [(2,)])}
    assert lint.rules([node("Reshape", "x", "t")], inputs) == ["data-dependent"]
    assert lint.rules([node("Expand", "x", "t")], inputs) == ["data-dependent"]
    assert lint.rules([node("Slice", "x", "t", "t")], inputs) == ["data-dependent"]
    assert lint.rules([node("Reshape", "x", "c")], {"x": (FLOAT, [(2, 4)])}, {"c": ints(4, 2)}) == []


def test_what_lies_behind_an_unknown_size_is_not_reported_again(lint) -> None:
    inputs = {"x": (FLOAT, [(2, 4)]), "t": (INT64, [(2,)])}
    assert lint.rules([node("Reshape", "x", "t", output="z"), node("Relu", "z")], inputs) == ["data-dependent"]


# --- limits ---


@pytest.mark.parametrize(("rank", "clean"), [(8, True), (9, False)])
def test_ranks(lint, rank, clean) -> None:
    target = {"t": ints(*[1] * rank)}
    assert lint.rules([node("Reshape", "x", "t")], {"x": (FLOAT, [(1,)])}, target) == ([] if clean else ["rank"])


def test_elements(lint) -> None:
    inputs = {"a": (FLOAT, [(2, 1), (46341, 1)]), "b": (FLOAT, [(1, 2), (1, 46341)])}
    (found,) = lint.findings([node("Add", "a", "b")], inputs)
    assert (found.rule, found.node) == ("elements", "y (Add)")
    assert found.message == "y has 1.00 x 2^31 elements (46341, 46341) at set 2 = 2"
    assert 46341**2 > MAX_ELEMENTS > 46340**2
    inputs = {"a": (FLOAT, [(46340, 1)]), "b": (FLOAT, [(1, 46340)])}
    assert lint.findings([node("Add", "a", "b")], inputs) == []


# --- empty tensors ---


def test_an_empty_input_is_noted(lint) -> None:
    inputs = {"x": (FLOAT, [(4,), (4,)]), "p": (FLOAT, [(1,), (0,)])}
    (found,) = lint.findings([node("Concat", "p", "x", axis=0)], inputs)
    assert (found.rule, found.node, found.severity, found.message) == (
        "empty-input",
        "p",
        "note",
        "it is empty at set 2 = 2",
    )


@pytest.mark.parametrize("kind", ["Relu", "Sigmoid", "Cast", "Transpose"])
def test_operators_that_do_nothing_for_an_empty_tensor(lint, kind) -> None:
    given = {"to": TensorProto.FLOAT16} if kind == "Cast" else {}
    assert lint.rules([node(kind, "x", **given)], {"x": (FLOAT, [(0, 4)])}) == []


@pytest.mark.parametrize(("kind", "given"), [("ReduceMean", {}), ("Softmax", {}), ("MatMul", {})])
def test_operators_that_may_do_odd_things_to_an_empty_tensor(lint, kind, given) -> None:
    operands = ("x", "w") if kind == "MatMul" else ("x",)
    constants = {"w": np.ones((4, 2), np.float32)}
    assert lint.rules([node(kind, *operands, **given)], {"x": (FLOAT, [(0, 4)])}, constants) == ["empty-operand"]


@pytest.mark.parametrize(
    ("target", "given", "clean"),
    [((4, -1), {}, False), ((4, 0), {}, False), ((4, 0), {"allowzero": 1}, True), ((0, -1), {}, False)],
)
def test_reshaping_an_empty_tensor(lint, target, given, clean) -> None:
    found = lint.rules([node("Reshape", "x", "t", **given)], {"x": (FLOAT, [(0, 4)])}, {"t": ints(*target)})
    assert ("empty-reshape" in found) is not clean


# --- ports ---


def ports(shape, dims, ranges=("h",), name="x"):
    value = helper.make_tensor_value_info("x", FLOAT, dims)
    graph = helper.make_graph([node("Relu", "x")], "g", [value], [helper.make_empty_tensor_value_info("y")])
    view = GraphView("net", helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))
    entry = NetworkEntry(
        network="upsampler",
        file="x.onnx",
        weights=(),
        precision="fp16",
        opset=23,
        inputs=(TensorEntry(name=name, dtype="float32", shape=shape),),
        outputs=(),
        shape_range={"h": (1, 4)},
    )
    return [entry.message for entry in check_ports(view, entry, [frozenset(ranges)])]


def test_ports_of_the_manifest_and_of_the_graph() -> None:
    assert ports((1, "32*h"), [1, "32*h"]) == []
    assert ports((1, "32*h"), [2, "32*h"]) == ["the graph has [2, '32*h'], the manifest [1, '32*h']"]
    assert ports((1, "w"), [1, "w"]) == ["no profile has a range for w"]
    assert ports((1,), [1], name="other") == [
        "the manifest does not list this input",
        "the manifest lists an input that the graph does not have",
    ]


def test_weights_among_the_inputs_are_no_ports() -> None:
    values = [helper.make_tensor_value_info(name, FLOAT, [4]) for name in ("x", "w")]
    stored = [numpy_helper.from_array(np.ones(4, np.float32), "w")]
    outputs = [helper.make_empty_tensor_value_info("y")]
    graph = helper.make_graph([node("Add", "x", "w")], "g", values, outputs, stored)
    view = GraphView("net", helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))
    entry = NetworkEntry(
        network="upsampler",
        file="x.onnx",
        weights=(),
        precision="fp16",
        opset=23,
        inputs=(TensorEntry(name="x", dtype="float32", shape=(4,)),),
        outputs=(),
        shape_range={},
    )
    assert list(check_ports(view, entry, [])) == []
