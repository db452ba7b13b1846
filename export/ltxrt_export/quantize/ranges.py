# SPDX-License-Identifier: Apache-2.0
"""The FP16 range check: which tensors leave the range of fp16, and which nodes therefore compute in BF16."""

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import ModelProto, NodeProto

from ltxrt.errors import ExportError

from .graph import producers
from .half import LAYOUT, fp32_nodes

__all__ = ["FP16_MAX", "MARGIN", "Excess", "excesses", "wide_nodes"]

#: Largest finite fp16 number.
FP16_MAX = 65504.0
#: A calibration sees a sample: what comes within this factor of the limit counts as beyond it.
MARGIN = 2.0


@dataclass(frozen=True, slots=True)
class Excess:
    """A tensor that fp16 cannot be trusted with.

    Attributes:
        tensor: Its name in the graph.
        amax: Largest magnitude that was seen.
        node: The node that makes it.
        operator: That node's operator.
        weight: Checkpoint key of the nearest weight at or before the node, for people.
    """

    tensor: str
    amax: float
    node: str
    operator: str
    weight: str


def excesses(model: ModelProto, network: str, amax: Mapping[str, float], margin: float = MARGIN) -> tuple[Excess, ...]:
    """The tensors whose magnitude exceeds 65504 / ``margin`` and that would be fp16, largest first.

    Args:
        model: The fp32 graph.
        network: Its name.
        amax: Largest magnitude by tensor; tensors that are not named were within range.
        margin: Safety factor.

    Raises:
        ExportError: A tensor is not one of this graph: it was measured on another.
    """
    made = producers(model.graph)
    unknown = sorted(set(amax) - set(made))
    if unknown:
        raise ExportError(
            f"{network}: the ranges name {unknown[0]} ({len(unknown)} in all), which this graph does not have:"
            " calibrate again"
        )
    exact = fp32_nodes(model, network)
    stored = {tensor.name for tensor in model.graph.initializer}
    found = [
        Excess(name, largest, made[name].name, made[name].op_type, _nearest_weight(made[name], made, stored))
        for name, largest in amax.items()
        if largest * margin > FP16_MAX and made[name].name not in exact
    ]
    return tuple(sorted(found, key=lambda excess: (-excess.amax, excess.tensor)))


def wide_nodes(model: ModelProto, found: tuple[Excess, ...]) -> frozenset[str]:
    """Names of the nodes that make or read one of the tensors; data movements follow what they are given."""
    tensors = {excess.tensor for excess in found}
    # What only moves an oversized tensor hands it on.
    names: set[str] = set()
    for node in model.graph.node:
        touched = tensors.intersection((*node.input, *node.output))
        if touched and node.op_type in LAYOUT:
            tensors.update(node.output)
        elif touched:
            names.add(node.name)
    return frozenset(names)


def _nearest_weight(node: NodeProto, made: Mapping[str, NodeProto], stored: set[str]) -> str:
    """Breadth first: the first stored tensor with a checkpoint's dotted name."""
    level, seen = [node], {node.name}
    while level:
        for candidate in level:
            for name in candidate.input:
                if name in stored and "." in name:
                    return name
        following = [made[name] for candidate in level for name in candidate.input if name in made]
        level = [candidate for candidate in following if candidate.name not in seen]
        seen.update(candidate.name for candidate in level)
    return ""
