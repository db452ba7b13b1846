# SPDX-License-Identifier: Apache-2.0
"""Shapes and types of every tensor of a graph at given input sizes.

ONNX's own inference node by node, with the values of small tensors computed along the way: what a ``Shape``
gives, what is sliced and joined from it, and what a ``Reshape`` then makes of it. So a size that depends on the
input sizes alone is followed through any arithmetic, and a size that depends on data shows as unknown.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, TypeProto, defs, helper, numpy_helper
from onnx.checker import ValidationError
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import InferenceError, infer_node_outputs

from .graph import GraphView, attributes
from .operators import SIZE_OPERANDS

__all__ = ["Problem", "Shape", "Shapes", "infer_shapes"]

Shape = tuple[int | None, ...]
#: Tensors of at most this many elements are values, not only shapes.
_SMALL = 64
#: Operators that ONNX defines by a function and infers nothing for; all give what their first operand is.
_LIKE_FIRST = frozenset({"GroupNormalization"})


@dataclass(frozen=True, slots=True)
class Problem:
    """A node whose output could not be inferred, or whose inputs do not fit together."""

    node: NodeProto
    message: str


@dataclass(frozen=True, slots=True)
class Shapes:
    """What is known at one set of sizes.

    Attributes:
        sizes: The sizes.
        shapes: Shape by tensor; an unknown size is None, an unknown shape is not there.
        types: Element type by tensor.
        values: Values of small tensors.
        problems: Where inference failed.
    """

    sizes: Mapping[str, int]
    shapes: dict[str, Shape] = field(default_factory=dict[str, Shape])
    types: dict[str, int] = field(default_factory=dict[str, int])
    values: dict[str, NDArray[Any]] = field(default_factory=dict[str, NDArray[Any]])
    problems: list[Problem] = field(default_factory=list[Problem])

    def elements(self, name: str) -> int | None:
        """Number of elements of a tensor, None where a size is unknown."""
        total = 1
        for size in self.shapes.get(name, (None,)):
            if size is None:
                return None
            total *= size
        return total


_Types = tuple[tuple[int, Shape | None], ...]


class _Inference:
    """Inference of one graph; equal nodes on equal inputs are inferred once."""

    def __init__(self, view: GraphView) -> None:
        self.view = view
        self.known: dict[tuple[Any, ...], tuple[tuple[tuple[int, Shape | None] | None, ...], str]] = {}

    def node(self, node: NodeProto, found: Shapes) -> None:
        names = [name for name in node.input if name]
        if node.op_type == "Shape" and names and names[0] in found.shapes:
            self._shape(node, found)
            return
        if any(name not in found.types for name in names):
            return
        signature: _Types = tuple((found.types[name], found.shapes.get(name)) for name in names)
        data = {name: found.values[name] for name in names if name in found.values}
        if any(self.view.operand(node, i) not in {"", *data} for i in SIZE_OPERANDS.get(node.op_type, ())):
            # What ONNX infers then can be wrong: for Expand it is the shape of the operand.
            found.types.update((name, signature[0][0]) for name in node.output if name)
            return
        if names and len(data) == len(set(names)) and self._evaluate(node, data, found):
            return
        key = (
            node.op_type,
            tuple(attribute.SerializeToString() for attribute in node.attribute),
            tuple(bool(name) for name in node.input),
            len(node.output),
            signature,
            tuple((index, data[name].tobytes()) for index, name in enumerate(names) if name in data),
        )
        if key not in self.known:
            self.known[key] = self._infer(node, found, data)
        results, message = self.known[key]
        if message:
            found.problems.append(Problem(node, message))
        for name, result in zip(node.output, results, strict=True):
            if name and result is not None:
                found.types[name] = result[0]
                if result[1] is not None:
                    found.shapes[name] = result[1]

    def _infer(
        self, node: NodeProto, found: Shapes, data: Mapping[str, NDArray[Any]]
    ) -> tuple[tuple[tuple[int, Shape | None] | None, ...], str]:
        """Types of the outputs, and what went wrong."""
        nothing = tuple(None for _ in node.output)
        if node.op_type in _LIKE_FIRST:
            return ((found.types[node.input[0]], found.shapes.get(node.input[0])),), ""
        try:
            schema = defs.get_schema(node.op_type, self.view.opset, node.domain)
            inputs = {name: _type_proto(found.types[name], found.shapes.get(name)) for name in node.input if name}
            values = {name: numpy_helper.from_array(np.array(value), name) for name, value in data.items()}
            outputs = infer_node_outputs(schema, node, inputs, values)
        except (defs.SchemaError, InferenceError, RuntimeError, ValidationError) as error:
            return nothing, " ".join(str(error).split())
        return tuple(_parsed(outputs[name]) if name in outputs else None for name in node.output), ""

    def _shape(self, node: NodeProto, found: Shapes) -> None:
        shape = found.shapes[node.input[0]]
        given = attributes(node)
        part = shape[int(given.get("start", 0)) : int(given.get("end", len(shape)))]
        found.types[node.output[0]] = TensorProto.INT64
        found.shapes[node.output[0]] = (len(part),)
        if None not in part:
            found.values[node.output[0]] = np.array(part, np.int64)

    def _evaluate(self, node: NodeProto, data: Mapping[str, NDArray[Any]], found: Shapes) -> bool:
        """Compute a node of small tensors; returns whether that was possible."""
        if node.domain or any(attribute.HasField("g") for attribute in node.attribute):
            return False
        try:
            evaluator: Any = ReferenceEvaluator(node, opsets={"": self.view.opset})
            results: list[Any] = evaluator.run(None, dict(data))
        except (IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError, ZeroDivisionError):
            return False
        arrays = [np.asarray(result) for result in results]
        if not all(map(_is_small, arrays)):
            return False
        for name, array in zip(node.output, arrays, strict=True):
            found.types[name] = helper.np_dtype_to_tensor_dtype(array.dtype)
            found.shapes[name] = array.shape
            found.values[name] = array
        return True


def infer_shapes(
    view: GraphView, points: Iterable[tuple[Mapping[str, tuple[int, ...]], Mapping[str, int]]]
) -> tuple[Shapes, ...]:
    """Shapes, types and small values of every tensor, at one or more sets of sizes.

    Args:
        view: The graph, in topological order.
        points: Concrete shape of every input, and the sizes that they come from, for messages.
    """
    inference = _Inference(view)
    return tuple(_inferred(inference, *point) for point in points)


def _inferred(inference: _Inference, input_shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> Shapes:
    view, found = inference.view, Shapes(sizes)
    for name, tensor in view.initializers.items():
        found.types[name], found.shapes[name] = tensor.data_type, tuple(tensor.dims)
        value = view.stored_value(name)
        if value is not None and _is_small(value):
            found.values[name] = value
    for value in view.model.graph.input:
        if value.name not in view.initializers:
            found.types[value.name] = value.type.tensor_type.elem_type
            if value.name in input_shapes:
                found.shapes[value.name] = input_shapes[value.name]
    for node in view.nodes:
        inference.node(node, found)
    return found


def _is_small(value: NDArray[Any]) -> bool:
    return value.size <= _SMALL and value.dtype.kind in "ibf"


def _type_proto(kind: int, shape: Shape | None) -> TypeProto:
    return helper.make_tensor_type_proto(kind, shape)


def _parsed(proto: TypeProto) -> tuple[int, Shape | None]:
    tensor = proto.tensor_type
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    return tensor.elem_type, tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in tensor.shape.dim)
