# SPDX-License-Identifier: Apache-2.0
"""BF16 graphs on the CPU: an fp32 graph that rounds to BF16 where the BF16 graph would.

ONNX Runtime's CPU kernels know BF16 for copies only. The twin computes every node in fp32 and rounds its result, which
is what hardware with fp32 accumulators does. Run it with ``open_session(..., exact=True)``: optimising removes the
pairs of casts that do the rounding.
"""

from onnx import ModelProto, NodeProto, TensorProto, helper

from .graph import element_types
from .half import LAYOUT

__all__ = ["bf16_twin"]


def bf16_twin(model: ModelProto, *, rounding: bool = True) -> ModelProto:
    """The fp32 twin of a graph with BF16 in it.

    Args:
        model: The graph; not changed. Its inputs and outputs are fp32, its weights may be stored in BF16.
        rounding: Round after every node that computes in BF16; without it only the weights are BF16's.
    """
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    types = element_types(graph)
    stored = [tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.BFLOAT16]
    names = {name: f"{name}/twin" for name in stored}
    outputs = {value.name for value in graph.output}
    nodes = [_cast(name, names[name], TensorProto.FLOAT) for name in stored]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        rounded = types.get(node.output[0]) == TensorProto.BFLOAT16
        if node.op_type == "Cast" and rounded:
            next(attribute for attribute in node.attribute if attribute.name == "to").i = TensorProto.FLOAT
        nodes.append(node)
        if rounded and rounding and node.op_type not in LAYOUT:
            nodes.extend(_rounded(node, outputs))
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def _rounded(node: NodeProto, outputs: set[str]) -> list[NodeProto]:
    """Round what ``node`` makes, under the names that its readers know."""
    casts: list[NodeProto] = []
    for index, name in enumerate(list(node.output)):
        if name and name not in outputs:
            exact, narrow = f"{name}/exact", f"{name}/narrow"
            node.output[index] = exact
            casts += [_cast(exact, narrow, TensorProto.BFLOAT16), _cast(narrow, name, TensorProto.FLOAT)]
    return casts


def _cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"twin/{target}", to=to)
