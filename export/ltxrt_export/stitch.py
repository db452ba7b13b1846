# SPDX-License-Identifier: Apache-2.0
"""Joining traced parts into one graph: five small traces make a DiT of any depth.

Tracing 48 blocks as one module takes half an hour, because the graph optimiser is quadratic in depth; tracing one
block and copying its nodes takes seconds and gives the same graph.
"""

from collections.abc import Mapping

from onnx import GraphProto, ModelProto, TensorProto, helper

from .onnx_export import OPSET, TracedGraph, constant_key

__all__ = ["Stitcher"]


class Stitcher:
    """Collects parts into one graph.

    Values of a part get the part's tag as a prefix unless ``wires`` gives them a name of the joint graph;
    weights keep their names, with ``weight_prefix`` exchanged, so that copies of one block point to their own tensors.
    Equal constants are stored once.
    """

    def __init__(self, name: str) -> None:
        self._graph = GraphProto(name=name)
        self._constants: dict[tuple[int, tuple[int, ...], bytes], str] = {}
        self._inputs: dict[str, TensorProto.DataType] = {}
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
        for value in part.model.graph.input:
            if value.name in part.weights:
                old, new = weight_prefix
                renamed = new + value.name.removeprefix(old) if value.name.startswith(old) else value.name
                names[value.name] = renamed
                self.weights.add(renamed)
                self._declare(renamed, value)
        for node in part.model.graph.node:
            copy = self._graph.node.add()
            copy.CopyFrom(node)
            copy.name = f"{tag}/{node.name}"
            copy.input[:] = [self._name(names, tag, value) for value in node.input]
            copy.output[:] = [self._name(names, tag, value) for value in node.output]

    def model(self, inputs: GraphProto, opset: int = OPSET) -> ModelProto:
        """The joint model; ``inputs`` carries the typed graph inputs and outputs."""
        declared = {value.name for value in self._graph.input}
        self._graph.input.extend(value for value in inputs.input if value.name not in declared)
        self._graph.output.extend(inputs.output)
        return helper.make_model(self._graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)

    def _declare(self, name: str, like: object) -> None:
        if name in self._inputs:
            return
        self._inputs[name] = TensorProto.FLOAT
        value = self._graph.input.add()
        value.CopyFrom(like)  # type: ignore[arg-type]
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
