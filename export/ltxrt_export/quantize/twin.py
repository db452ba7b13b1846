# SPDX-License-Identifier: Apache-2.0
"""16-bit graphs as a GPU computes them, on the CPU: an fp32 graph that rounds to 16 bits where the 16-bit graph would.

ONNX Runtime's CPU kernels know BF16 for copies only, and FP16 graphs they compute in fp32, without rounding in between,
so that neither shows what 16 bits cost. The twin computes every node in fp32 and rounds its result, as hardware with
fp32 accumulators does. Run it with ``open_session(..., exact=True)``: optimising removes the casts that round.
"""

from onnx import ModelProto, NodeProto, TensorProto, helper

from .graph import element_types
from .half import LAYOUT

__all__ = ["rounding_twin"]

_KINDS = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
#: Nothing to round: copies are exact already, and FP8 products take their operands and scales unrounded.
_UNROUNDED = LAYOUT | {"DequantizeLinear"}


def rounding_twin(model: ModelProto, *, rounding: bool = True) -> ModelProto:
    """The fp32 twin of a graph with FP16 or BF16 in it.

    Args:
        model: The graph; not changed. Its inputs and outputs are fp32.
        rounding: Round after every node that computes in 16 bits; without it only the constants are rounded.
    """
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    types = element_types(graph)
    stored = [tensor.name for tensor in graph.initializer if tensor.data_type in _KINDS]
    names = {name: f"{name}/twin" for name in stored}
    outputs = {value.name for value in graph.output}
    nodes = [_cast(name, names[name], TensorProto.FLOAT) for name in stored]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        kind = types.get(node.output[0], TensorProto.UNDEFINED)
        if node.op_type == "Cast" and kind in _KINDS:
            next(attribute for attribute in node.attribute if attribute.name == "to").i = TensorProto.FLOAT
        nodes.append(node)
        if rounding and kind in _KINDS and node.op_type not in _UNROUNDED:
            nodes.extend(_rounded(node, kind, outputs))
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def _rounded(node: NodeProto, kind: int, outputs: set[str]) -> list[NodeProto]:
    """Round what ``node`` makes, under the names that its readers know."""
    casts: list[NodeProto] = []
    for index, name in enumerate(list(node.output)):
        if name and name not in outputs:
            exact, narrow = f"{name}/exact", f"{name}/narrow"
            node.output[index] = exact
            casts += [_cast(exact, narrow, kind), _cast(narrow, name, TensorProto.FLOAT)]
    return casts


def _cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"twin/{target}", to=to)
