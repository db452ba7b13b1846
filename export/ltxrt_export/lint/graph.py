# SPDX-License-Identifier: Apache-2.0
"""A graph as the rules look at it: who makes a tensor, who uses it, what is constant."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

__all__ = ["GraphView", "attributes", "type_name"]


class GraphView:
    """A loaded model, indexed.

    Attributes:
        network: Key of the network, for findings.
        model: Loaded without its external data.
        folder: Where the graph lies; None where it was not read from a file.
        nodes: In the file's order.
        producers: Node behind every tensor that a node makes.
        users: Nodes that take a tensor, one entry per use.
        initializers: Stored tensors.
    """

    def __init__(self, network: str, model: ModelProto, folder: Path | None = None) -> None:
        self.network = network
        self.model = model
        self.folder = folder
        self.nodes: tuple[NodeProto, ...] = tuple(model.graph.node)
        self.initializers: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers: dict[str, NodeProto] = {}
        self.users: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            self.producers.update((name, node) for name in node.output if name)
            for name in filter(None, node.input):
                self.users.setdefault(name, []).append(node)
        self.outputs = frozenset(value.name for value in model.graph.output)
        self._constants: dict[str, bool] = {}

    @property
    def opset(self) -> int:
        """Version of the standard domain; 0 where the model names none."""
        return next((entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), 0)

    def operand(self, node: NodeProto, index: int) -> str:
        """Name of an operand, empty where it is left out."""
        return node.input[index] if index < len(node.input) else ""

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is the same in every run: stored, or computed from what is stored."""
        if name not in self._constants:
            pending = [name]
            while pending:
                current = pending[-1]
                node = self.producers.get(current)
                if node is None:
                    self._constants[current] = current in self.initializers
                else:
                    unknown = [value for value in node.input if value and value not in self._constants]
                    if unknown:
                        pending += unknown
                        continue
                    self._constants[current] = all(self._constants[value] for value in node.input if value)
                pending.pop()
        return self._constants[name]

    def stored_value(self, name: str) -> NDArray[Any] | None:
        """Value of a stored or ``Constant`` tensor; None where it lies in a file or is not stored."""
        tensor = self.initializers.get(name)
        if tensor is None:
            node = self.producers.get(name)
            if node is None or node.op_type != "Constant":
                return None
            tensor = attributes(node).get("value")
        if not isinstance(tensor, TensorProto) or tensor.data_location == TensorProto.EXTERNAL:
            return None
        return np.asarray(numpy_helper.to_array(tensor))

    def duplicates(self) -> Iterable[str]:
        """Names that stand for more than one tensor."""
        names = Counter(name for node in self.nodes for name in node.output if name)
        names.update(value.name for value in self.model.graph.input)
        inputs = {value.name for value in self.model.graph.input}
        # Up to IR version 3 an initializer was listed among the inputs as well: that is one tensor.
        names.update(tensor.name for tensor in self.model.graph.initializer if tensor.name not in inputs)
        return sorted(name for name, count in names.items() if count > 1)


def attributes(node: NodeProto) -> Mapping[str, Any]:
    """A node's attributes by name, strings as text."""
    values: dict[str, Any] = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        values[attribute.name] = value.decode() if attribute.type == AttributeProto.STRING else value
    return values


def type_name(kind: int) -> str:
    """An element type in lower case, for example ``float16``."""
    return TensorProto.DataType.Name(kind).lower() if kind else "unknown"
