# SPDX-License-Identifier: Apache-2.0
"""Rules about FP8: what makes a MatMul run on FP8 tensor cores, and what silently keeps it from doing so.

Sources: onnx/onnx-tensorrt onnxOpImporters.cpp (QuantizeLinear, DequantizeLinear); NVIDIA/TensorRT NvInfer.h
(IQuantizeLayer); NVIDIA/Model-Optimizer's FP8 exporter (nothing between DequantizeLinear and MatMul).
"""

import re
from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from .findings import Finding, finding
from .graph import GraphView, attributes, type_name
from .shapes import Shapes

__all__ = ["UNQUANTISED", "check_fp8"]

#: Weights that must stay in 16 bit, by name.
UNQUANTISED = re.compile(r"(^|[._/])(to_gate_logits|gate_logits)([._/]|$)")
_ALIGNMENT = 16
_NARROW = {
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E4M3FNUZ,
    TensorProto.FLOAT8E5M2,
    TensorProto.FLOAT8E5M2FNUZ,
    TensorProto.INT8,
    TensorProto.UINT8,
}
_PRODUCTS = ("MatMul", "Gemm")


def check_fp8(view: GraphView, shapes: Shapes) -> Iterator[Finding]:
    """Every ``QuantizeLinear``, ``DequantizeLinear`` and the products behind them."""
    for node in view.nodes:
        if node.op_type == "QuantizeLinear":
            yield from _quantise(view, node, shapes)
            yield from _scale(view, node, shapes)
        elif node.op_type == "DequantizeLinear":
            yield from _dequantise(view, node, shapes)
            yield from _scale(view, node, shapes)
        elif node.op_type in _PRODUCTS:
            yield from _product(view, node, shapes)


def _quantise(view: GraphView, node: NodeProto, shapes: Shapes) -> Iterator[Finding]:
    yield from _kind(view, node, shapes.types.get(node.output[0], 0))
    users = view.users.get(node.output[0], [])
    if not users or any(user.op_type != "DequantizeLinear" for user in users) or node.output[0] in view.outputs:
        yield finding(view.network, node, "fp8-pair", "its output does not go to a DequantizeLinear alone")
    for user in users:
        if user.op_type == "DequantizeLinear" and not _same_scale(view, node, user):
            yield finding(view.network, node, "fp8-pair", f"{user.name} dequantises with another scale")
    if view.is_constant(node.input[0]):
        yield finding(view.network, node, "fp8-stored", f"{node.input[0]} is constant and quantised in the graph")


def _dequantise(view: GraphView, node: NodeProto, shapes: Shapes) -> Iterator[Finding]:
    source = view.producers.get(node.input[0])
    if node.input[0] in view.initializers:
        yield from _kind(view, node, shapes.types.get(node.input[0], 0))
    elif source is None or source.op_type != "QuantizeLinear":
        yield finding(view.network, node, "fp8-pair", f"{node.input[0]} is neither quantised nor a stored weight")
    users = view.users.get(node.output[0], [])
    for user in users:
        if user.op_type not in _PRODUCTS:
            yield finding(view.network, node, "fp8-consumer", f"its output goes to {user.name} ({user.op_type})")
    if not users:
        yield finding(view.network, node, "fp8-consumer", "nothing uses its output")


def _kind(view: GraphView, node: NodeProto, kind: int) -> Iterator[Finding]:
    if kind != TensorProto.FLOAT8E4M3FN:
        yield finding(view.network, node, "fp8-type", f"the quantised type is {type_name(kind)}")


def _scale(view: GraphView, node: NodeProto, shapes: Shapes) -> Iterator[Finding]:
    """Scale, zero point and attributes of one node."""
    name, given = view.operand(node, 1), attributes(node)
    scale = view.stored_value(name)
    high = node.input[0] if node.op_type == "QuantizeLinear" else node.output[0]
    kind, expected = shapes.types.get(name, 0), shapes.types.get(high, 0)
    if kind and expected and kind != expected:
        yield finding(view.network, node, "fp8-scale", f"the scale is {type_name(kind)}, {high} {type_name(expected)}")
    if not view.is_constant(name):
        yield finding(view.network, node, "fp8-scale", f"the scale {name} is computed")
    elif scale is not None:
        values = scale.astype(np.float64)
        if not (np.isfinite(values).all() and (values > 0).all()):
            yield finding(view.network, node, "fp8-scale", f"the scale {name} is not positive and finite throughout")
    zero = view.operand(node, 2)
    if zero:
        value = view.stored_value(zero)
        if value is None or np.asarray(value.astype(np.float32)).any():
            yield finding(view.network, node, "fp8-zero-point", f"the zero point {zero} is not 0")
    if given.get("block_size", 0):
        yield finding(view.network, node, "fp8-block", f"block_size is {given['block_size']}")
    yield from _scale_shape(view, node, shapes)


def _scale_shape(view: GraphView, node: NodeProto, shapes: Shapes) -> Iterator[Finding]:
    shape, data = shapes.shapes.get(view.operand(node, 1)), shapes.shapes.get(node.input[0])
    if shape is None or data is None or None in shape:
        return
    if all(size == 1 for size in shape):  # the parser takes any tensor of one element as a scalar
        return
    if not view.is_constant(node.input[0]):
        yield finding(view.network, node, "fp8-scale-shape", f"an activation has scales of shape {list(shape)}")
    elif len(shape) != 1:
        yield finding(view.network, node, "fp8-scale-shape", f"the scales have shape {list(shape)}")
    else:
        axis = int(attributes(node).get("axis", 1)) % len(data)
        if data[axis] != shape[0]:
            message = f"{shape[0]} scales along axis {axis} of {list(data)}"
            yield finding(view.network, node, "fp8-scale-shape", message)
        for user in view.users.get(node.output[0], []):
            if user.op_type in _PRODUCTS and axis != _output_axis(user, len(data)):
                message = f"the scales lie along axis {axis}, the output channels of {user.name} along another"
                yield finding(view.network, node, "fp8-scale-shape", message)


def _product(view: GraphView, node: NodeProto, shapes: Shapes) -> Iterator[Finding]:
    """A product with a quantised operand."""
    sources = [view.producers.get(name) for name in node.input[:2]]
    quantised = [
        source is not None and source.op_type == "DequantizeLinear" and shapes.types.get(source.input[0]) in _NARROW
        for source in sources
    ]
    if not any(quantised):
        return
    if not all(quantised):
        yield finding(view.network, node, "fp8-operands", f"{node.input[quantised.index(False)]} is not quantised")
    weight = sources[1].input[0] if sources[1] is not None else ""
    if UNQUANTISED.search(weight):
        yield finding(view.network, node, "fp8-gate", f"{weight} is quantised")
    shape = shapes.shapes.get(weight, ())
    for size in shape[-2:]:
        if size is not None and size % _ALIGNMENT:
            yield finding(view.network, node, "fp8-alignment", f"{weight} has shape {list(shape)}")
            break


def _output_axis(node: NodeProto, rank: int) -> int:
    """Axis of a weight, a product's second operand, that the output channels lie along."""
    return 0 if node.op_type == "Gemm" and attributes(node).get("transB", 0) else rank - 1


def _same_scale(view: GraphView, first: NodeProto, second: NodeProto) -> bool:
    if view.operand(first, 1) == view.operand(second, 1):
        return True
    values = view.stored_value(view.operand(first, 1)), view.stored_value(view.operand(second, 1))
    return values[0] is not None and values[1] is not None and np.array_equal(values[0], values[1])
