# SPDX-License-Identifier: Apache-2.0
"""Folding what leads to a convolution's kernel, and nothing else."""

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ltxrt_export.engines.constants import fold_convolutions
from ltxrt_export.engines.weights import compiled_weight_bytes


def graph(nodes, initializers, inputs=("x",)):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 8]) for name in inputs]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    made = helper.make_graph(nodes, "g", values, outputs, initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def external(name, kind, shape):
    tensor = TensorProto(name=name, data_type=kind, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    return tensor


def no_file(tensor):
    raise AssertionError(f"{tensor.name} was read")


def test_a_cast_of_a_stored_kernel() -> None:
    kernel = np.arange(3, dtype=ml_dtypes.bfloat16).reshape(1, 1, 3)
    model = graph(
        [
            helper.make_node("Cast", ["w"], ["w32"], to=TensorProto.FLOAT),
            helper.make_node("Conv", ["x", "w32", "b"], ["y"]),
        ],
        [external("w", TensorProto.BFLOAT16, [1, 1, 3]), numpy_helper.from_array(np.ones(1, np.float32), "b")],
    )
    folded = fold_convolutions(model, lambda tensor: kernel)
    np.testing.assert_array_equal(folded["w32"], [[[0.0, 1.0, 2.0]]])
    assert folded["w32"].dtype == np.float32
    assert [node.op_type for node in model.graph.node] == ["Conv"]
    assert {tensor.name for tensor in model.graph.initializer} == {"b", "w32"}
    (made,) = (tensor for tensor in model.graph.initializer if tensor.name == "w32")
    assert (made.data_type, list(made.dims), made.data_location) == (TensorProto.FLOAT, [1, 1, 3], TensorProto.EXTERNAL)


def test_a_computed_kernel_that_two_convolutions_share() -> None:
    model = graph(
        [
            helper.make_node("Add", ["a", "a"], ["twice"]),
            helper.make_node("Reshape", ["twice", "shape"], ["w"]),
            helper.make_node("Conv", ["x", "w"], ["z"]),
            helper.make_node("Conv", ["z", "w"], ["y"]),
        ],
        [
            numpy_helper.from_array(np.ones(3, np.float32), "a"),
            numpy_helper.from_array(np.array([1, 1, 3], np.int64), "shape"),
        ],
    )
    folded = fold_convolutions(model, no_file)
    assert list(folded) == ["w"]
    assert folded["w"].tolist() == [[[2.0, 2.0, 2.0]]]
    assert [tensor.name for tensor in model.graph.initializer] == ["w"]


def test_a_kernel_that_depends_on_an_input_stays() -> None:
    nodes = [helper.make_node("Add", ["k", "a"], ["w"]), helper.make_node("Conv", ["x", "w"], ["y"])]
    model = graph(nodes, [numpy_helper.from_array(np.ones(8, np.float32), "a")], inputs=("x", "k"))
    before = model.SerializeToString()
    assert fold_convolutions(model, no_file) == {}
    assert model.SerializeToString() == before


def test_what_is_used_elsewhere_stays() -> None:
    model = graph(
        [
            helper.make_node("Add", ["a", "a"], ["b"]),
            helper.make_node("Mul", ["b", "b"], ["w"]),
            helper.make_node("Conv", ["x", "w"], ["z"]),
            helper.make_node("Add", ["z", "b"], ["y"]),
        ],
        [numpy_helper.from_array(np.ones((1, 1, 3), np.float32), "a")],
    )
    assert list(fold_convolutions(model, no_file)) == ["w"]
    assert [node.op_type for node in model.graph.node] == ["Add", "Conv", "Add"]
    assert {tensor.name for tensor in model.graph.initializer} == {"a", "w"}


def test_a_graph_without_convolutions_is_not_touched() -> None:
    model = graph([helper.make_node("Add", ["x", "x"], ["y"])], [])
    before = onnx.ModelProto.FromString(model.SerializeToString())
    assert fold_convolutions(model, no_file) == {}
    assert model == before


def test_weights_count_in_the_type_that_they_are_used_in() -> None:
    model = graph(
        [
            helper.make_node("Cast", ["w"], ["w32"], to=TensorProto.FLOAT),
            helper.make_node("Cast", ["v"], ["v16"], to=TensorProto.FLOAT16),
            helper.make_node("Add", ["v", "u"], ["y"]),
        ],
        [
            external("w", TensorProto.BFLOAT16, [10, 3]),
            external("v", TensorProto.BFLOAT16, [10]),
            external("u", TensorProto.FLOAT8E4M3FN, [10]),
        ],
    )
    assert compiled_weight_bytes(model) == 30 * 4 + (10 * 2 + 10 * 2) + 10
