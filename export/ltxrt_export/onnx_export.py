# SPDX-License-Identifier: Apache-2.0
"""Torch module to ONNX graph, with every weight left where it is.

A traced graph takes its weights as extra graph inputs while it is optimised, so that no pass can fold,
transpose or rename them; afterwards they become initializers that point into the checkpoint file under the
checkpoint's own names. Nothing here reads a weight, so a module of fake tensors exports as well as a real one.
"""

import logging
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from numpy.typing import NDArray
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    checker,
    helper,
    numpy_helper,
    shape_inference,
)
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

from ltxrt.errors import ExportError

from .networks.spec import NetworkSpec, Port, dynamic_shapes, example_inputs
from .weights import TensorRef

__all__ = ["OPSET", "Location", "TracedGraph", "attach_weights", "beside", "export_model", "trace"]

#: The first opset with Attention and RMSNormalization as single nodes.
OPSET = 23

#: ONNX element type by safetensors dtype name.
_ONNX_DTYPES = {
    "F64": TensorProto.DOUBLE,
    "F32": TensorProto.FLOAT,
    "F16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "F8_E4M3": TensorProto.FLOAT8E4M3FN,
    "F8_E5M2": TensorProto.FLOAT8E5M2,
    "I64": TensorProto.INT64,
    "I32": TensorProto.INT32,
    "I8": TensorProto.INT8,
    "U8": TensorProto.UINT8,
}


@dataclass(frozen=True, slots=True)
class TracedGraph:
    """A traced module: its graph with weights still as graph inputs, and their module names."""

    model: ModelProto
    weights: frozenset[str]


#: Where a weight file will lie, relative to the ``.onnx``.
Location = Callable[[Path], str]


def beside(path: Path) -> str:
    """The default ``Location``: under its own name beside the graph."""
    return path.name


def export_model(spec: NetworkSpec, location: Location = beside) -> ModelProto:
    """The finished ONNX model of a network: ports named as in ``spec``, weights external.

    Initializers are named by checkpoint key and point into the file that holds them, by its bare name: that file
    must lie beside the ``.onnx``. A tensor stored in another dtype than the graph computes in is cast in the
    graph, once.
    """
    with fake_mode(spec.module):
        inputs = example_inputs(spec)
    traced = trace(
        spec.module,
        inputs,
        dynamic_shapes(spec),
        ([port.name for port in spec.inputs], [port.name for port in spec.outputs]),
        constants=spec.constants,
    )
    name_axes(traced.model.graph, spec)
    attach_weights(traced.model, {name: spec.weights[name] for name in traced.weights}, location)
    return finished(traced.model, spec.name)


def trace(
    module: torch.nn.Module,
    inputs: tuple[Any, ...],
    dynamic: tuple[Any, ...] | None,
    names: tuple[list[str], list[str]],
    *,
    constants: Mapping[str, NDArray[Any]] | None = None,
) -> TracedGraph:
    """Trace ``module`` on ``inputs`` and optimise the graph with its weights out of reach.

    Args:
        module: In eval mode; parameters and persistent buffers are its weights.
        inputs: Example inputs, positional; tuples among them are flattened into consecutive graph inputs.
        dynamic: ``dynamic_shapes`` of ``torch.export.export``.
        names: Graph input and output names.
        constants: Values of non-persistent buffers, needed where the module holds fake tensors.

    Raises:
        ExportError: A buffer is a fake tensor and has no value in ``constants``.
    """
    with _quiet_exporter(), fake_mode(module):
        exported = torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic, strict=False)
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            input_names=names[0],
            output_names=names[1],
            optimize=False,
            verbose=False,
        )
        assert program is not None  # returned whenever dynamo=True
        graph = program.model.graph
        stored = set(module.state_dict())
        for name in list(graph.initializers):
            value = graph.initializers[name]
            if name in stored:
                del graph.initializers[name]
                value.const_value = None
                graph.inputs.append(value)
            elif constants is not None and name in constants:
                data = np.ascontiguousarray(constants[name].astype(value.dtype.numpy()))  # type: ignore[union-attr]
                value.const_value = onnx_ir.Tensor(data, name=name)
            elif isinstance(getattr(value.const_value, "raw", None), FakeTensor):
                raise ExportError(f"{type(module).__name__}: {name} is a fake tensor, and its value is not given")
        program.optimize()
    model = onnx_ir.to_proto(program.model)
    weights = frozenset(value.name for value in model.graph.input if value.name in stored)
    return TracedGraph(model, weights)


def fake_mode(module: torch.nn.Module) -> AbstractContextManager[Any]:
    """The mode under which the module's fake tensors can be used; does nothing for a real module."""
    return detect_fake_mode(tuple(module.parameters())) or nullcontext()


@contextmanager
def _quiet_exporter() -> Generator[None]:
    """Silence what torch's exporter says on every call and nobody can act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(copyreg|torch\..*)")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|onnxscript)\..*")
            warnings.filterwarnings("ignore", message="# The axis name: .* will not be used")
            yield
    finally:
        logger.setLevel(level)


def name_axes(graph: GraphProto, spec: NetworkSpec) -> None:
    """Give the graph's inputs and outputs the dimensions that the spec declares."""
    ports = {port.name: port for port in (*spec.inputs, *spec.outputs)}
    for value in (*graph.input, *graph.output):
        if value.name in ports:
            value.CopyFrom(value_info(ports[value.name]))


def value_info(port: Port) -> ValueInfoProto:
    """A port as a graph declares it."""
    return helper.make_tensor_value_info(port.name, helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype)), port.shape)


def attach_weights(model: ModelProto, weights: Mapping[str, TensorRef], location: Location = beside) -> None:
    """Turn weight inputs into initializers that point into their files.

    Args:
        model: Changed in place; every name in ``weights`` is one of its graph inputs.
        weights: Graph input name to stored tensor. Two names may share one stored tensor.
        location: Where each weight file will lie, relative to the ``.onnx``.

    Raises:
        ExportError: Two files hold a tensor of the same key.
    """
    graph = model.graph
    dtypes = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    kept = [value for value in graph.input if value.name not in weights]
    stored: dict[str, TensorRef] = {}
    casts: dict[str, NodeProto] = {}
    renamed: dict[str, str] = {}
    for name, ref in sorted(weights.items(), key=lambda item: (item[1].key, item[0])):
        other = stored.setdefault(ref.key, ref)
        if other.path != ref.path:
            raise ExportError(f"{ref.key} is a tensor of both {other.path} and {ref.path}; a graph can have but one")
        target, dtype = ref.key, dtypes[name]
        if _ONNX_DTYPES[ref.dtype] != dtype:
            # One cast a tensor, however many names it has.
            target = f"{ref.key}/cast"
            casts[target] = helper.make_node("Cast", [ref.key], [target], name=target, to=dtype)
        renamed[name] = target
    nodes = [*casts.values(), *graph.node]
    for node in graph.node:
        node.input[:] = [renamed.get(value, value) for value in node.input]
    del graph.input[:], graph.node[:]
    graph.input.extend(kept)
    graph.node.extend(nodes)
    graph.initializer.extend(_external(ref, location) for ref in stored.values())


def _external(ref: TensorRef, location: Location) -> TensorProto:
    tensor = TensorProto(name=ref.key, data_type=_ONNX_DTYPES[ref.dtype], dims=ref.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location(ref.path)), ("offset", ref.offset), ("length", ref.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def finished(model: ModelProto, name: str) -> ModelProto:
    """Strip what differs between machines and runs (paths, traces), and set producer and name."""
    graph = model.graph
    graph.name = name
    model.producer_name, model.producer_version, model.doc_string = "ltxrt-export", "", ""
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    return model


def check_graph(name: str, path: Path) -> None:
    """Check a written graph, its types and shapes included; its weight files must lie beside it.

    The checker reads no weight, but refuses one in a hard link, which is how a file of 46 GB gets beside a graph
    without a copy. It is therefore given the weights as inputs, and where they lie is checked here.

    Raises:
        ExportError: It is not valid ONNX, or a weight is not where it says.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    external = [tensor for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    for tensor in external:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = path.parent / entries["location"]
        if not file.is_file() or file.stat().st_size < int(entries["offset"]) + int(entries["length"]):
            raise ExportError(f"{name}: not a valid graph: {tensor.name} does not lie in {file.name}")
        graph.initializer.remove(tensor)
    graph.input.extend(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in external)
    try:
        checker.check_model(model, full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        raise ExportError(f"{name}: not a valid graph: {' '.join(str(error).split())}") from error


def constant_key(tensor: TensorProto) -> tuple[int, tuple[int, ...], bytes]:
    """What makes two constants equal: dtype, shape, bytes."""
    array = numpy_helper.to_array(tensor)
    return tensor.data_type, tuple(tensor.dims), array.tobytes()
