# SPDX-License-Identifier: Apache-2.0
"""Convolution kernels as constants, which is how TensorRT's parser takes them.

An exported graph keeps its weights in the checkpoint's type and casts them, and computes what it can compute (the
basis of a Fourier transform). The parser imports the result of any operator as a tensor of the run, and a
convolution with such a kernel needs other kernels, or fails. So what leads to a convolution's kernel or bias is
computed here, in memory, before the parser sees the graph. Source: onnx/onnx-tensorrt onnxOpImporters.cpp (Conv).
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

__all__ = ["fold_convolutions"]

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_OPERANDS = (1, 2)

Reader = Callable[[TensorProto], NDArray[Any]]


def fold_convolutions(model: ModelProto, read_external: Reader) -> dict[str, NDArray[Any]]:
    """Replace every computed constant that a convolution takes as kernel or bias by an initializer.

    Args:
        model: Changed in place: the new initializers point to no file, their values are what is returned; nodes and
            initializers that nothing uses any more are dropped.
        read_external: Gives the value of an initializer that lies in a file.

    Returns:
        Values of the new initializers by name, C-contiguous.
    """
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    wanted = dict.fromkeys(
        node.input[index]
        for node in graph.node
        if node.op_type in _CONVOLUTIONS and not node.domain
        for index in _OPERANDS
        if index < len(node.input) and node.input[index] in producers
    )
    folded: dict[str, NDArray[Any]] = {}
    for name in wanted:
        nodes = _ancestors(name, producers, stored.keys())
        if nodes is not None:
            folded[name] = _value(name, nodes, stored, (model, read_external))
    for name, value in folded.items():
        made = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(value.dtype), dims=value.shape)
        # Marked as external so that the graph carries no data: the parser is given the address instead.
        made.data_location = TensorProto.EXTERNAL
        graph.initializer.append(made)
    _drop_unused(model, folded.keys())
    return folded


def _ancestors(name: str, producers: dict[str, NodeProto], stored: Iterable[str]) -> list[NodeProto] | None:
    """Nodes behind a tensor in an order in which they can run; None where one of them needs an input of the graph."""
    known = set(stored)
    order: list[NodeProto] = []
    pending = [name]
    while pending:
        current = pending[-1]
        node = producers.get(current)
        if current in known:
            pending.pop()
        elif node is None:
            return None
        else:
            missing = [value for value in node.input if value and value not in known]
            if missing:
                pending += missing
            else:
                order.append(node)
                known.update(node.output)
                pending.pop()
    return order


def _value(
    name: str, nodes: list[NodeProto], stored: dict[str, TensorProto], source: tuple[ModelProto, Reader]
) -> NDArray[Any]:
    model, read_external = source
    made = {value for node in nodes for value in node.output}
    taken = dict.fromkeys(value for node in nodes for value in node.input if value and value not in made)
    feeds = {
        value: read_external(stored[value])
        if stored[value].data_location == TensorProto.EXTERNAL
        else np.asarray(numpy_helper.to_array(stored[value]))
        for value in taken
    }
    inputs = [
        helper.make_tensor_value_info(value, stored[value].data_type, list(stored[value].dims)) for value in taken
    ]
    output = helper.make_empty_tensor_value_info(name)
    part = helper.make_model(
        helper.make_graph(nodes, "constant", inputs, [output]),
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
    )
    evaluator: Any = ReferenceEvaluator(part)
    (result,) = evaluator.run(None, feeds)
    return np.ascontiguousarray(result)


def _drop_unused(model: ModelProto, folded: Iterable[str]) -> None:
    """Remove nodes that only led to what is folded now, and weights that only they used."""
    graph = model.graph
    replaced = set(folded)
    needed = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if any(name in needed and name not in replaced for name in node.output):
            kept.append(node)
            needed.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
