# SPDX-License-Identifier: Apache-2.0
"""Rules about attention and normalisation, which become one kernel each or fail.

Sources: onnx/onnx-tensorrt docs/operators.md, onnxOpImporters.cpp, onnxOpCheckers.cpp, attentionHelpers.cpp
(TensorRT 10.15); pytorch/TensorRT attention.py (static heads).
"""

from collections.abc import Iterator, Sequence

from onnx import NodeProto, TensorProto

from .findings import Finding, finding
from .graph import GraphView, attributes, type_name
from .shapes import Shape, Shapes

__all__ = ["check_attention", "check_normalisation"]

_QUERY, _KEY, _VALUE, _MASK = range(4)
_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_NORMS = ("LayerNormalization", "RMSNormalization")


def check_attention(view: GraphView, points: Sequence[Shapes]) -> Iterator[Finding]:
    """Every ``Attention`` node, at all sizes that are given: what changes between them is not known to the compiler."""
    for node in view.nodes:
        if node.op_type == "Attention" and not node.domain:
            yield from _operands(view, node, points)
            yield from _attributes(view, node)
            yield from _mask(view, node, points[0])
            kind = points[0].types.get(view.operand(node, _QUERY), 0)
            if kind == TensorProto.FLOAT and not attributes(node).get("TRT_decomposable", 0):
                message = "it computes in float32; ltxrt-export build lets fp32 networks decompose it"
                yield finding(view.network, node, "attention-unfused", message)


def _operands(view: GraphView, node: NodeProto, points: Sequence[Shapes]) -> Iterator[Finding]:
    for index, label in ((_QUERY, "query"), (_KEY, "key"), (_VALUE, "value")):
        shapes = [point.shapes[name] for point in points if (name := view.operand(node, index)) in point.shapes]
        if not shapes:
            continue
        if len(shapes[0]) != 4:
            yield finding(view.network, node, "attention-rank", f"the {label} has rank {len(shapes[0])}")
            continue
        for axis, what in ((1, "number of heads"), (3, "width of a head")):
            sizes = dict.fromkeys(shape[axis] for shape in shapes)
            if len(sizes) > 1 or None in sizes:
                found = ", ".join("?" if size is None else str(size) for size in sizes)
                yield finding(view.network, node, "attention-heads", f"the {label}'s {what} is {found}")
    for index in range(_MASK + 1, len(node.input)):
        if node.input[index]:
            yield finding(view.network, node, "attention-input", f"it takes {node.input[index]}")
    for name in node.output[1:]:
        if name:
            yield finding(view.network, node, "attention-output", f"it puts out {name}")


def _attributes(view: GraphView, node: NodeProto) -> Iterator[Finding]:
    given = attributes(node)
    if given.get("softcap", 0.0):
        yield finding(view.network, node, "attention-attribute", f"softcap is {given['softcap']:g}")
    # The parser refuses the attribute as such, whatever its value.
    if "softmax_precision" in given:
        yield finding(view.network, node, "attention-attribute", "softmax_precision is given")
    if given.get("qk_matmul_output_mode", 0):
        mode = given["qk_matmul_output_mode"]
        yield finding(view.network, node, "attention-attribute", f"qk_matmul_output_mode is {mode}")


def _mask(view: GraphView, node: NodeProto, shapes: Shapes) -> Iterator[Finding]:
    name = view.operand(node, _MASK)
    if not name:
        return
    kind, query = shapes.types.get(name, 0), shapes.types.get(view.operand(node, _QUERY), 0)
    if kind and query and kind not in (TensorProto.BOOL, query):
        message = f"the mask is {type_name(kind)}, the query {type_name(query)}"
        yield finding(view.network, node, "attention-mask", message)
    if len(shapes.shapes.get(name, ())) > 4:
        yield finding(view.network, node, "attention-mask", f"the mask has rank {len(shapes.shapes[name])}")
    if attributes(node).get("is_causal", 0):
        yield finding(view.network, node, "attention-mask", "it is causal and has a mask: TensorRT takes one of them")


def check_normalisation(view: GraphView, shapes: Shapes) -> Iterator[Finding]:
    """Every normalisation over features."""
    for node in view.nodes:
        if node.op_type not in _NORMS or node.domain:
            continue
        given, operand = attributes(node), view.operand(node, 0)
        shape: Shape | None = shapes.shapes.get(operand)
        axis = int(given.get("axis", -1))
        if node.op_type == "RMSNormalization" and axis != -1 and (shape is None or axis != len(shape) - 1):
            yield finding(view.network, node, "norm-axis", f"the axis is {axis}")
        if shapes.types.get(operand) in _HALVES and int(given.get("stash_type", 1)) != TensorProto.FLOAT:
            kind = type_name(int(given["stash_type"]))
            yield finding(view.network, node, "norm-precision", f"the mean is computed in {kind}")
        for name in node.output[1:]:
            if name:
                yield finding(view.network, node, "norm-output", f"it puts out {name}")
