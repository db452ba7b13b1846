# SPDX-License-Identifier: Apache-2.0
"""Weights of a graph as the parser takes them: addresses in mapped files, so that no copy is made on the way.

The files are mapped read-only; a page is read when the compiler first looks at it and can be dropped again, so a
checkpoint larger than the machine's memory is no obstacle.
"""

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from ltxrt.errors import BundleError

__all__ = ["ExternalTensor", "MappedWeights", "compiled_weight_bytes", "external_tensors", "tensor_bytes"]


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """One initializer whose data lies in a file: name, file, first byte, length in bytes."""

    name: str
    path: Path
    offset: int
    nbytes: int


def external_tensors(model: ModelProto, folder: Path) -> tuple[ExternalTensor, ...]:
    """Every initializer of a graph that lies in a file.

    Args:
        model: Loaded without its external data.
        folder: Where the graph lies; locations are relative to it.
    """
    found: list[ExternalTensor] = []
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            expected = tensor_bytes(tensor)
            offset, length = int(entries.get("offset", "0")), int(entries.get("length", expected))
            if length != expected:
                raise BundleError(f"{folder}: {tensor.name} takes {expected} bytes, the graph points to {length}")
            found.append(ExternalTensor(tensor.name, folder / entries["location"], offset, length))
    return tuple(found)


def tensor_bytes(tensor: TensorProto) -> int:
    """Size of a tensor's data as the file formats store it."""
    return prod(tensor.dims) * _item_bytes(tensor.data_type)


def compiled_weight_bytes(model: ModelProto) -> int:
    """Bytes that the weights take in an engine: a tensor that is only cast counts in the type that it is cast to."""
    users: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    total = 0
    for tensor in model.graph.initializer:
        casts = [node for node in users.get(tensor.name, []) if node.op_type == "Cast"]
        types = {attribute.i for node in casts for attribute in node.attribute if attribute.name == "to"}
        if len(casts) < len(users.get(tensor.name, [])) or not types:
            types.add(tensor.data_type)
        total += sum(prod(tensor.dims) * _item_bytes(kind) for kind in types)
    return total


class MappedWeights:
    """The files behind a graph's weights, mapped; a context manager.

    Addresses are valid until it is closed: the parser and the compiler read through them, so close it after both.

    Args:
        tensors: What will be asked for.

    Raises:
        BundleError: A file cannot be read or is too short.
    """

    def __init__(self, tensors: Iterable[ExternalTensor]) -> None:
        self.tensors = tuple(tensors)
        self._files: dict[Path, NDArray[np.uint8]] = {}
        for tensor in self.tensors:
            if tensor.path not in self._files:
                self._files[tensor.path] = _mapped(tensor.path)
            if tensor.offset + tensor.nbytes > self._files[tensor.path].nbytes:
                raise BundleError(f"{tensor.path} is too short: {tensor.name} ends beyond it")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A mapping ends with the last array on it; there is nothing else to release.
        self._files.clear()

    def address(self, tensor: ExternalTensor) -> int:
        """Address of a tensor's first byte."""
        return int(self._files[tensor.path].ctypes.data) + tensor.offset

    def value(self, proto: TensorProto) -> NDArray[Any]:
        """A tensor's value, without a copy."""
        tensor = next(tensor for tensor in self.tensors if tensor.name == proto.name)
        data = self._files[tensor.path][tensor.offset : tensor.offset + tensor.nbytes]
        return data.view(helper.tensor_dtype_to_np_dtype(proto.data_type)).reshape(tuple(proto.dims))


def _mapped(path: Path) -> NDArray[np.uint8]:
    try:
        with path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        reason = error.strerror if isinstance(error, OSError) else "it is empty"
        raise BundleError(f"{path} cannot be read: {reason}") from error


def _item_bytes(kind: int) -> int:
    return helper.tensor_dtype_to_np_dtype(kind).itemsize
