# SPDX-License-Identifier: Apache-2.0
"""Joining traced parts into one graph: five small traces make a DiT of any depth.

Tracing 48 blocks as one module takes half an hour, because the graph optimiser is quadratic in depth; tracing one
block and copying its nodes takes seconds and gives the same graph.
"""

from collections.abc import Iterable, Mapping

from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper

from .onnx_export import OPSET, TracedGraph, constant_key

__all__ = ["Stitcher"]

#: The ONNX file version that torch's exporter writes too.
_IR_VERSION = 10


class Stitcher:
    """Collects parts into one graph.

    Values of a part get the part's tag as a prefix unless ``wires`` gives them a name of the joint graph;
    weights keep their names, with ``weight_prefix`` exchanged, so that copies of one block point to their own tensors.
    Equal constants are stored once.
    """

    def __init__(self, name: str) -> None:
        self._graph = GraphProto(name=name)
        self._constants: dict[tuple[int, tuple[int, ...], bytes], str] = {}
        #: Joint names of all weights.
        self.weights: set[str] = set()

    def add(
        self,
        part: TracedGraph,
        tag: str,
        wires: Mapping[str, str],
        *,
        weight_prefix: tuple[str, str] = ("", ""),
    ) -> None:
        """Append the nodes of ``part``.

        Args:
            part: What to copy.
            tag: Prefix of node names and of values that nothing outside sees.
            wires: Part's value name to joint name, for everything that crosses the part's border.
            weight_prefix: Old and new start of the weight names.
        """
        names = dict(wires)
        for tensor in part.model.graph.initializer:
            names[tensor.name] = self._constant(tensor)
        old, new = weight_prefix
        for value in part.model.graph.input:
            if value.name in part.weights:
                renamed = new + value.name.removeprefix(old) if value.name.startswith(old) else value.name
                names[value.name] = renamed
                self._declare_weight(renamed, value)
        for node in part.model.graph.node:
            copy = self._graph.node.add()
            copy.CopyFrom(node)
            copy.name = f"{tag}/{node.name}"
            copy.input[:] = [self._name(names, tag, value) for value in node.input]
            copy.output[:] = [self._name(names, tag, value) for value in node.output]

    def model(self, inputs: Iterable[ValueInfoProto], outputs: Iterable[ValueInfoProto]) -> ModelProto:
        """The joint model with these inputs (after the weights, which are inputs still) and outputs."""
        graph = GraphProto()
        graph.CopyFrom(self._graph)
        graph.input.extend(inputs)
        graph.output.extend(outputs)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION)

    def _declare_weight(self, name: str, like: ValueInfoProto) -> None:
        if name not in self.weights:
            self.weights.add(name)
            value = self._graph.input.add()
            value.CopyFrom(like)
            value.name = name

    def _constant(self, tensor: TensorProto) -> str:
        key = constant_key(tensor)
        if key not in self._constants:
            name = f"constant/{len(self._constants)}"
            stored = self._graph.initializer.add()
            stored.CopyFrom(tensor)
            stored.name = name
            self._constants[key] = name
        return self._constants[key]

    @staticmethod
    def _name(names: Mapping[str, str], tag: str, value: str) -> str:
        return value if value == "" else names.get(value, f"{tag}/{value}")
