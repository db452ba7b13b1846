# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs as tables: who makes a tensor, who reads it, what type it has, and which nodes are linear layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from ltxrt.errors import ExportError
from ltxrt_export.weights import TensorFile, TensorRef

__all__ = [
    "FLOATS",
    "Linear",
    "consumers",
    "drop_unused",
    "element_types",
    "external_location",
    "linears",
    "output_type",
    "producers",
    "stored_tensors",
]

#: Element types that a precision pass may exchange for one another.
FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})

# Operators whose output type is not that of their first input.
_FIXED_TYPES = {"Shape": TensorProto.INT64, "Size": TensorProto.INT64}
_COMPARISONS = frozenset({"And", "Equal", "Greater", "GreaterOrEqual", "IsNaN", "Less", "LessOrEqual", "Not", "Or"})
_TYPE_INPUT = {"DequantizeLinear": 1, "QuantizeLinear": 2, "RMSNormalization": 1, "Where": 1}


@dataclass(frozen=True, slots=True)
class Linear:
    """A MatMul or Gemm that multiplies an activation by a stored weight.

    Attributes:
        node: The MatMul or Gemm.
        key: Initializer name of the weight, which is its checkpoint key.
        activation: Tensor that is multiplied.
        transposed: Whether the weight is stored [out, in] and turned on its way to the product, as ``nn.Linear`` is.
        shape: Stored shape of the weight.
    """

    node: NodeProto
    key: str
    activation: str
    transposed: bool
    shape: tuple[int, ...]

    @property
    def output_axis(self) -> int:
        """Axis of the stored weight that runs over output channels."""
        return 0 if self.transposed else 1


def producers(graph: GraphProto) -> dict[str, NodeProto]:
    """The node behind every tensor that a node makes."""
    return {name: node for node in graph.node for name in node.output if name}


def consumers(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """The nodes that read each tensor, in graph order."""
    table: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            if name:
                table.setdefault(name, []).append(node)
    return table


def element_types(graph: GraphProto) -> dict[str, int]:
    """ONNX element type of every tensor, propagated from inputs and initializers.

    Covers the operators that the exporter emits; anything else is taken to keep the type of its first input.
    """
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        made = output_type(node, types)
        types |= {name: made for name in node.output if name}
    return types


def output_type(node: NodeProto, types: Mapping[str, int]) -> int:
    """Element type of a node's outputs, given those of its inputs."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to":
            return attribute.i
        if attribute.type == AttributeProto.TENSOR:  # Constant, ConstantOfShape
            return attribute.t.data_type
    if node.op_type in _FIXED_TYPES:
        return _FIXED_TYPES[node.op_type]
    if node.op_type in _COMPARISONS:
        return TensorProto.BOOL
    index = _TYPE_INPUT.get(node.op_type, 0)
    return types[node.input[index]]


def linears(graph: GraphProto) -> list[Linear]:
    """Every product with a stored weight, in graph order; casts and one transposition may lie between."""
    made, initializers = producers(graph), {tensor.name: tensor for tensor in graph.initializer}
    found: list[Linear] = []
    for node in graph.node:
        if node.op_type not in ("Gemm", "MatMul"):
            continue
        name, transposed = node.input[1], _flag(node, "transB")
        while name in made and made[name].op_type in ("Cast", "Transpose"):
            transposed ^= made[name].op_type == "Transpose"
            name = made[name].input[0]
        tensor = initializers.get(name)
        if tensor is not None and len(tensor.dims) == 2 and tensor.data_location == TensorProto.EXTERNAL:
            found.append(Linear(node, name, node.input[0], transposed, tuple(tensor.dims)))
    return found


def drop_unused(graph: GraphProto) -> None:
    """Remove nodes that nothing reads, then initializers that no node reads."""
    needed = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(initializers)


def external_location(tensor: TensorProto) -> str:
    """File name of an external initializer, relative to the graph."""
    return next(entry.value for entry in tensor.external_data if entry.key == "location")


def stored_tensors(model: ModelProto, folder: Path) -> dict[str, TensorRef]:
    """The stored tensor behind every external initializer of a graph that lies in ``folder``.

    Raises:
        ExportError: A weight file is missing or damaged, or lacks a tensor.
    """
    files: dict[str, TensorFile] = {}
    refs: dict[str, TensorRef] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        location = external_location(tensor)
        if location not in files:
            files[location] = TensorFile.open(folder / location)
        if tensor.name not in files[location].tensors:
            raise ExportError(f"{folder / location}: lacks {tensor.name}, which the graph {model.graph.name} needs")
        refs[tensor.name] = files[location].tensors[tensor.name]
    return refs


def _flag(node: NodeProto, name: str) -> bool:
    return any(attribute.name == name and attribute.i for attribute in node.attribute)
