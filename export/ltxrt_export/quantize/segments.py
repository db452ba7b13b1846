# SPDX-License-Identifier: Apache-2.0
"""A graph cut into runs of nodes, so that a network can run whose weights do not fit into memory together.

Every segment is a graph of its own, with the tensor names of the whole one. A cut may fall anywhere: nodes keep their
order, and what lies on both sides of a cut is an output here and an input there. Casts and transpositions of weights
belong to the nodes that read them, and are made again where two segments do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from .graph import element_types, producers

__all__ = ["Segment", "cut", "weight_bytes"]

#: What an element of a weight takes where it is computed with, whatever it is stored as.
_FP32_BYTES = 4
#: What only brings a weight into the form that a layer wants.
_FORMING = ("Cast", "Transpose")


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a graph.

    Attributes:
        model: Its graph; inputs and outputs are what it shares with its surroundings.
        needed_later: The tensors, feeds among them, that a later segment reads or the whole graph gives.
    """

    model: ModelProto
    needed_later: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Origin:
    """The initializer that a weight comes from, and the nodes that form it, by position in the graph."""

    stored: str
    nodes: tuple[int, ...] = ()


def weight_bytes(graph: GraphProto) -> int:
    """What the stored weights of a graph take in fp32."""
    return sum(map(_bytes, graph.initializer))


def cut(model: ModelProto, budget_bytes: int) -> tuple[Segment, ...]:
    """Cut a graph into as few segments as its order allows.

    Args:
        model: The graph; not changed. Its nodes stand in an order in which they can run.
        budget_bytes: Most bytes of weights in fp32 that a segment holds, unless a single node reads more.
    """
    graph = _narrow_gathers(model.graph)
    origins = _origins(graph)
    sizes = {tensor.name: _bytes(tensor) for tensor in graph.initializer}
    runs: list[list[NodeProto]] = [[]]
    held: set[str] = set()
    for node in graph.node:
        if node.output[0] in origins:
            continue
        needed = {origins[name].stored for name in node.input if name in origins}
        if runs[-1] and not needed <= held and sum(sizes[name] for name in held | needed) > budget_bytes:
            runs.append([])
            held = set()
        runs[-1].append(node)
        held |= needed
    parts: list[Segment] = []
    later = frozenset(value.name for value in graph.output)
    types = element_types(graph)
    for run in reversed(runs):
        part = _part(graph, run, origins, later, types)
        whole = helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
        parts.append(Segment(whole, later))
        later = (later - {name for node in run for name in node.output}) | {value.name for value in part.input}
    return tuple(reversed(parts))


def _part(
    graph: GraphProto,
    run: Sequence[NodeProto],
    origins: Mapping[str, _Origin],
    wanted: frozenset[str],
    types: Mapping[str, int],
) -> GraphProto:
    """The graph of consecutive nodes."""
    read = list(dict.fromkeys(name for node in run for name in node.input if name))
    weights = [origins[name] for name in read if name in origins]
    stored = {weight.stored for weight in weights}
    forming = [graph.node[index] for index in sorted({index for weight in weights for index in weight.nodes})]
    here = {name for node in run for name in node.output}
    # ONNX Runtime takes no graph without an output.
    given = sorted(here & wanted) or [run[-1].output[0]]
    part = GraphProto(name=graph.name)
    part.node.extend((*forming, *run))
    part.initializer.extend(tensor for tensor in graph.initializer if tensor.name in stored)
    part.input.extend(_value(name, types) for name in read if name not in here and name not in origins)
    part.output.extend(_value(name, types) for name in given)
    return part


def _origins(graph: GraphProto) -> dict[str, _Origin]:
    """Every stored weight, and what is formed of it."""
    origins = {tensor.name: _Origin(tensor.name) for tensor in graph.initializer}
    for index, node in enumerate(graph.node):
        source = origins.get(node.input[0]) if node.op_type in _FORMING else None
        if source is not None:
            origins[node.output[0]] = _Origin(source.stored, (*source.nodes, index))
    return origins


def _narrow_gathers(graph: GraphProto) -> GraphProto:
    """A copy that looks rows up first and casts them then: a table of embeddings is never there as a whole in fp32."""
    result = GraphProto()
    result.CopyFrom(graph)
    made, stored = producers(graph), {tensor.name for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in result.node:
        nodes.append(node)
        cast = made.get(node.input[0]) if node.op_type == "Gather" else None
        if cast is not None and cast.op_type == "Cast" and cast.input[0] in stored:
            wanted, rows = node.output[0], f"{node.output[0]}/stored"
            node.input[0], node.output[0] = cast.input[0], rows
            wide = NodeProto()
            wide.CopyFrom(cast)
            wide.name, wide.input[0], wide.output[0] = rows, rows, wanted
            nodes.append(wide)
    del result.node[:]
    result.node.extend(nodes)
    return result


def _value(name: str, types: Mapping[str, int]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, types[name], None)


def _bytes(tensor: TensorProto) -> int:
    return prod(tensor.dims) * _FP32_BYTES
