# SPDX-License-Identifier: Apache-2.0
"""The FP8 graph pass: chosen linear layers multiply E4M3 by E4M3.

Each becomes ``x -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- E4M3 weight`` with nothing else
in between, the form that TensorRT turns into one FP8 product: the weight is stored [in, out] already, with one scale
per output channel; the activation's scale is static and per tensor, and layers that read one tensor share its pair.
The bias stays where it was, behind the product. Scales have the type of the activations around them. A
DequantizeLinear has no zero point (its input's type says all), a QuantizeLinear an E4M3 zero, which names the type
that it makes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ltxrt.errors import ExportError
from ltxrt_export.weights import TensorRef

from .fp8_weights import FP8_MAX, Fp8Pair
from .graph import Linear, drop_unused, element_types, linears

__all__ = ["SCALE_DTYPES", "quantise"]

#: safetensors name of the scale type that goes with an activation's ONNX type.
SCALE_DTYPES: Mapping[int, str] = {TensorProto.FLOAT: "F32", TensorProto.FLOAT16: "F16", TensorProto.BFLOAT16: "BF16"}

_ONNX_DTYPES = {name: kind for kind, name in SCALE_DTYPES.items()} | {"F8_E4M3": int(TensorProto.FLOAT8E4M3FN)}
_NUMPY: Mapping[int, np.dtype[Any]] = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
_ZERO = "fp8/zero"


def quantise(model: ModelProto, weights: Mapping[str, Fp8Pair], amax: Mapping[str, float], location: str) -> ModelProto:
    """The same network with the layers of ``weights`` in FP8.

    Args:
        model: A finished graph in any float type; not changed.
        weights: Converted weights by checkpoint key; each is the weight of at least one linear layer.
        amax: Magnitude that an activation's range ends at, by the weight key of a layer that reads it. Layers that
            read one tensor share the largest of theirs.
        location: Where the file of the converted weights will lie, relative to the ``.onnx``.

    Raises:
        ExportError: A weight is not one of a linear layer of this graph, or is used in another way too, has another
            shape than its conversion, or an activation has no usable range.
    """
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    types = element_types(graph)
    chosen = [linear for linear in linears(graph) if linear.key in weights]
    _check(graph.name, chosen, weights)
    ranges = _activation_ranges(graph.name, chosen, amax)
    by_output = {linear.node.output[0]: linear for linear in chosen}
    scales = {linear.activation: types[linear.activation] for linear in chosen}
    nodes: list[NodeProto] = []
    placed: set[str] = set()
    for node in graph.node:
        linear = by_output.get(node.output[0])
        if linear is None:
            nodes.append(node)
            continue
        x, key = linear.activation, linear.key
        if x not in placed:
            nodes.extend(_activation_nodes(x))
        if key not in placed:
            nodes.append(_weight_node(key, weights[key]))
        placed.update((x, key))
        node.input[0], node.input[1] = f"{x}/fp8_value", f"{key}/fp8_value"
        _untransposed(node)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(numpy_helper.from_array(np.zeros((), ml_dtypes.float8_e4m3fn), _ZERO))
    graph.initializer.extend(_scale(x, kind, ranges[x]) for x, kind in scales.items())
    for pair in weights.values():
        graph.initializer.extend((_external(pair.weight, location), _external(pair.scale, location)))
    drop_unused(graph)
    _check_replaced(graph.name, {tensor.name for tensor in graph.initializer}, weights)
    return result


def _activation_nodes(x: str) -> tuple[NodeProto, NodeProto]:
    scale, code, value = f"{x}/fp8_scale", f"{x}/fp8", f"{x}/fp8_value"
    return (
        helper.make_node("QuantizeLinear", [x, scale, _ZERO], [code], name=code),
        helper.make_node("DequantizeLinear", [code, scale], [value], name=value),
    )


def _weight_node(key: str, pair: Fp8Pair) -> NodeProto:
    value, inputs = f"{key}/fp8_value", [f"{key}/fp8", f"{key}/fp8_scale"]
    if pair.scale.shape:
        return helper.make_node("DequantizeLinear", inputs, [value], name=value, axis=1)
    return helper.make_node("DequantizeLinear", inputs, [value], name=value)


def _untransposed(node: NodeProto) -> None:
    """A Gemm that turned its weight finds it turned now."""
    for attribute in node.attribute:
        if attribute.name == "transB":
            attribute.i = 0


def _scale(x: str, kind: int, amax: float) -> TensorProto:
    dtype = _NUMPY[kind]
    smallest = np.float32(ml_dtypes.finfo(dtype).smallest_normal)
    value = np.maximum(np.float32(amax / FP8_MAX), smallest).astype(dtype)
    return numpy_helper.from_array(np.array(value, dtype), f"{x}/fp8_scale")


def _external(ref: TensorRef, location: str) -> TensorProto:
    tensor = TensorProto(name=ref.key, data_type=_ONNX_DTYPES[ref.dtype], dims=ref.shape)  # type: ignore[arg-type]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", ref.offset), ("length", ref.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _activation_ranges(name: str, chosen: Sequence[Linear], amax: Mapping[str, float]) -> dict[str, float]:
    ranges: dict[str, float] = {}
    for linear in chosen:
        if linear.key not in amax:
            raise ExportError(f"{name}: no calibrated range for the input of {linear.key}: calibrate again")
        value = amax[linear.key]
        if not 0 <= value < float("inf"):
            raise ExportError(f"{name}: the range of the input of {linear.key} is {value}; allowed: finite, 0 or more")
        ranges[linear.activation] = max(value, ranges.get(linear.activation, 0.0))
    return ranges


def _check(name: str, chosen: Sequence[Linear], weights: Mapping[str, Fp8Pair]) -> None:
    missing = sorted(set(weights) - {linear.key for linear in chosen})
    if missing:
        raise ExportError(f"{name}: {missing[0]} is the weight of no linear layer of this graph")
    for linear in chosen:
        expected = tuple(reversed(linear.shape)) if linear.transposed else linear.shape
        found = weights[linear.key].weight.shape
        if found != expected:
            raise ExportError(f"{name}: {linear.key} was converted to {list(found)}, expected {list(expected)}")


def _check_replaced(name: str, initializers: set[str], weights: Mapping[str, Fp8Pair]) -> None:
    left = sorted(initializers.intersection(weights))
    if left:
        raise ExportError(f"{name}: {left[0]} is FP8 now, but something else still reads it in 16 bits")
