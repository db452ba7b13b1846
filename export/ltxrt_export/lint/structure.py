# SPDX-License-Identifier: Apache-2.0
"""Rules about a graph as such: opset, operators, types and operands, whatever the sizes.

Sources: onnx/onnx-tensorrt docs/operators.md, onnxOpCheckers.cpp, onnxOpImporters.cpp (TensorRT 10.15).
"""

from collections import Counter
from collections.abc import Iterator

from onnx import NodeProto, TensorProto

from .findings import Finding, finding
from .graph import GraphView, attributes, type_name
from .operators import (
    CONSTANT_OPERANDS,
    CONTROL_FLOW,
    DATA_DEPENDENT,
    LEAST_OPSET,
    MOST_OPSET,
    ONE_TYPE,
    OPERAND_TYPES,
)
from .shapes import Shapes

__all__ = ["check_file", "check_operators"]

_STANDARD = ("", "ai.onnx")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_RESIZE = {
    "mode": ("nearest", "linear"),
    "keep_aspect_ratio_policy": ("stretch",),
    "antialias": (0,),
    "coordinate_transformation_mode": (
        "half_pixel",
        "pytorch_half_pixel",
        "tf_half_pixel_for_nn",
        "asymmetric",
        "align_corners",
    ),
}


def check_file(view: GraphView) -> Iterator[Finding]:
    """Opset, domains, functions and names."""
    if not LEAST_OPSET <= view.opset <= MOST_OPSET:
        yield finding(view.network, "opset", "opset", f"the graph is of opset {view.opset or 'none'}")
    for entry in view.model.opset_import:
        if entry.domain not in _STANDARD:
            yield finding(view.network, "opset", "domain", f"the graph imports {entry.domain} {entry.version}")
    for function in view.model.functions:
        yield finding(view.network, function.name, "local-function", "the graph defines an operator of its own")
    for name in view.duplicates():
        yield finding(view.network, name, "name", "two tensors have this name")
    names = Counter(node.name for node in view.nodes)
    for name, count in names.items():
        if not name:
            yield finding(view.network, "nodes", "node-name", f"{count} nodes have no name")
        elif count > 1:
            yield finding(view.network, name, "node-name", f"{count} nodes have this name")


def check_operators(view: GraphView, shapes: Shapes) -> Iterator[Finding]:
    """Every node by itself: operator, types, constant operands, settings."""
    for value in view.model.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.INT64:
            yield finding(view.network, value.name, "int64", "this input is int64")
    for node in view.nodes:
        yield from _operator(view, node)
        if node.op_type in OPERAND_TYPES:
            yield from _types(view, node, shapes)
            yield from _operands(view, node)
            yield from _settings(view, node)


def _operator(view: GraphView, node: NodeProto) -> Iterator[Finding]:
    if node.domain not in _STANDARD:
        yield finding(view.network, node, "domain", f"the operator is of domain {node.domain}")
    elif node.op_type in CONTROL_FLOW:
        yield finding(view.network, node, "control-flow", "the graph branches or loops")
    elif node.op_type in DATA_DEPENDENT:
        yield finding(view.network, node, "data-dependent", "the size of its output depends on values")
    elif node.op_type not in OPERAND_TYPES:
        yield finding(view.network, node, "operator", f"there is no {node.op_type}")
    elif node.op_type == "ScatterND":
        yield finding(view.network, node, "scatter", "the graph scatters")


def _types(view: GraphView, node: NodeProto, shapes: Shapes) -> Iterator[Finding]:
    kinds = [shapes.types.get(name, 0) for name in node.input]
    data = kinds[1] if node.op_type == "Where" and len(kinds) > 1 else (kinds[0] if kinds else 0)
    if data and data not in OPERAND_TYPES[node.op_type]:
        yield finding(view.network, node, "operand-type", f"it takes {type_name(data)}")
    for name in node.output:
        if shapes.types.get(name) == TensorProto.UINT8 and not (node.op_type == "Cast" and name in view.outputs):
            yield finding(view.network, node, "operand-type", "uint8 is for outputs of the graph, made by a Cast")
        if shapes.types.get(name) == TensorProto.DOUBLE:
            yield finding(view.network, node, "operand-type", "it gives double, which would be cut to float32")
    floats = {kind for kind in kinds if kind in _FLOATS}
    if node.op_type in ONE_TYPE and len(floats) > 1:
        yield finding(view.network, node, "mixed-types", f"it takes {' and '.join(sorted(map(type_name, floats)))}")
    computed = (name for name in node.output if shapes.types.get(name) == TensorProto.INT64)
    if any(name not in shapes.values and not view.is_constant(name) for name in computed):
        yield finding(view.network, node, "int64", "it computes data in int64")


def _operands(view: GraphView, node: NodeProto) -> Iterator[Finding]:
    for index in CONSTANT_OPERANDS.get(node.op_type, ()):
        name = view.operand(node, index)
        if name and view.stored_value(name) is None:
            yield finding(view.network, node, "constant-operand", f"operand {index + 1}, {name}, is computed")
    if node.op_type in ("Conv", "ConvTranspose"):
        for index in (1, 2):
            name = view.operand(node, index)
            if name and not view.is_constant(name):
                yield finding(view.network, node, "conv-kernel", f"operand {index + 1}, {name}, depends on inputs")
            elif name and name in view.producers and view.producers[name].op_type not in ("Constant", "Cast"):
                yield finding(view.network, node, "folded-kernel", f"operand {index + 1}, {name}, is computed")


def _settings(view: GraphView, node: NodeProto) -> Iterator[Finding]:
    given = attributes(node)
    if node.op_type == "Resize":
        for name, allowed in _RESIZE.items():
            if name in given and given[name] not in allowed:
                yield finding(view.network, node, "attribute", f"{name} is {given[name]}")
    if node.op_type == "ScatterND" and given.get("reduction", "none") != "none":
        yield finding(view.network, node, "attribute", f"reduction is {given['reduction']}")
    if node.op_type == "Constant" and given.keys() & {"sparse_value", "value_string", "value_strings"}:
        yield finding(view.network, node, "attribute", "the constant is sparse or text")
    if node.op_type in ("MaxPool", "AveragePool", "LpPool") and set(given.get("dilations", (1,))) != {1}:
        yield finding(view.network, node, "attribute", f"dilations are {list(given['dilations'])}")
