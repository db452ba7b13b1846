# SPDX-License-Identifier: Apache-2.0
"""Rules about sizes, at points that the profiles' clips really have.

Empty tensors: TensorRT's profiles take a smallest size of 0 (docstring of ``IOptimizationProfile.set_shape``), and a
length-0 axis follows the rules of any other length; but a -1 in a reshape cannot be told from an empty tensor, and
a binding needs an address even where no byte is read.
"""

from collections.abc import Iterator, Mapping, Sequence

from onnx import NodeProto

from ltxrt.manifest import NetworkEntry

from .findings import Finding, finding
from .graph import GraphView, attributes
from .operators import CALM_WHEN_EMPTY, DATA_DEPENDENT, SIZE_OPERANDS
from .shapes import Shapes

__all__ = ["MAX_ELEMENTS", "MAX_RANK", "check_ports", "check_sizes"]

MAX_RANK = 8
MAX_ELEMENTS = 2**31 - 1


def check_ports(view: GraphView, network: NetworkEntry, ranges: Sequence[frozenset[str]]) -> Iterator[Finding]:
    """The graph's inputs against the manifest, and every free axis against the profiles.

    Args:
        view: The graph.
        network: What the manifest says of it.
        ranges: Symbols that each profile has a range for.
    """
    declared = {port.name: port for port in network.inputs}
    for value in view.model.graph.input:
        if value.name in view.initializers:
            continue
        if value.name not in declared:
            yield finding(view.network, value.name, "profile", "the manifest does not list this input")
            continue
        port = declared.pop(value.name)
        axes = [axis.dim_value or axis.dim_param for axis in value.type.tensor_type.shape.dim]
        if [entry for entry in axes if isinstance(entry, int)] != [e for e in port.shape if isinstance(e, int)]:
            yield finding(view.network, value.name, "profile", f"the graph has {axes}, the manifest {list(port.shape)}")
        symbols = {entry.rpartition("*")[2] for entry in port.shape if isinstance(entry, str)}
        for symbol in sorted(symbols):
            if not ranges or any(symbol not in known for known in ranges):
                yield finding(view.network, value.name, "profile", f"no profile has a range for {symbol}")
    for name in declared:
        yield finding(view.network, name, "profile", "the manifest lists an input that the graph does not have")


def check_sizes(view: GraphView, points: Sequence[Shapes]) -> Iterator[Finding]:
    """Ranks, numbers of elements, sizes that depend on data, empty tensors; each once, at the worst point."""
    for node in view.nodes:
        yield from _limits(view, node, points)
        yield from _followed(view, node, points[0])
        yield from _empty(view, node, points)
    for value in view.model.graph.input:
        sizes = next((p.sizes for p in points if p.elements(value.name) == 0), None)
        if sizes is not None:
            yield finding(view.network, value.name, "empty-input", f"it is empty at {_at(sizes)}")


def _limits(view: GraphView, node: NodeProto, points: Sequence[Shapes]) -> Iterator[Finding]:
    for name in node.output:
        rank = len(points[0].shapes.get(name, ()))
        if rank > MAX_RANK:
            yield finding(view.network, node, "rank", f"{name} has rank {rank}")
        worst = max(points, key=lambda point: point.elements(name) or 0)
        elements = worst.elements(name) or 0
        if elements > MAX_ELEMENTS:
            message = f"{name} has {elements / 2**31:.2f} x 2^31 elements {worst.shapes[name]} at {_at(worst.sizes)}"
            yield finding(view.network, node, "elements", message)
    problem = next((p for point in points for p in point.problems if p.node is node), None)
    if problem is not None:
        sizes = next(point.sizes for point in points if problem in point.problems)
        yield finding(view.network, node, "inconsistent", f"at {_at(sizes)}: {problem.message}")


def _followed(view: GraphView, node: NodeProto, shapes: Shapes) -> Iterator[Finding]:
    """Where following sizes ended: at a node whose inputs are known and whose output is not."""
    unknown = [name for name in node.output if name and None in shapes.shapes.get(name, (None,))]
    known = all(None not in shapes.shapes.get(name, (None,)) for name in node.input if name)
    if not unknown or not known or node.op_type in DATA_DEPENDENT or any(p.node is node for p in shapes.problems):
        return
    operands = [view.operand(node, index) for index in SIZE_OPERANDS.get(node.op_type, ())]
    computed = [name for name in operands if name and name not in shapes.values and not view.is_constant(name)]
    if computed:
        yield finding(view.network, node, "data-dependent", f"its size depends on the values of {computed[0]}")
    else:
        yield finding(view.network, node, "shape-unknown", f"the size of {unknown[0]} is not known")


def _empty(view: GraphView, node: NodeProto, points: Sequence[Shapes]) -> Iterator[Finding]:
    for point in points:
        empty = [name for name in node.input if name and point.elements(name) == 0]
        if not empty:
            continue
        if node.op_type == "Reshape":
            target = point.values.get(view.operand(node, 1))
            vague = target is None or -1 in target or (0 in target and not attributes(node).get("allowzero", 0))
            if vague and empty[0] == node.input[0]:
                yield finding(view.network, node, "empty-reshape", f"{empty[0]} is empty at {_at(point.sizes)}")
                return
        elif node.op_type not in CALM_WHEN_EMPTY:
            yield finding(view.network, node, "empty-operand", f"{empty[0]} is empty at {_at(point.sizes)}")
            return


def _at(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{symbol} = {size}" for symbol, size in sizes.items())
