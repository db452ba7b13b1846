# SPDX-License-Identifier: Apache-2.0
"""safetensors files as tables of tensors: where each tensor's bytes lie, without reading them.

A safetensors file is an 8-byte little-endian header length, a JSON header and raw row-major bytes, so an
ONNX initializer can point straight into it (github huggingface/safetensors, README, section Format).
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ltxrt.errors import ExportError

__all__ = ["DTYPE_BYTES", "TensorFile", "TensorRef"]

#: Bytes an element, by safetensors dtype name.
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I8": 1,
    "U8": 1,
}

_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One stored tensor: its file, its key there, and the bytes ``[offset, offset + nbytes)`` of it."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The header of one safetensors file."""

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorRef]

    @classmethod
    def open(cls, path: Path) -> "TensorFile":
        """Read and check the header of ``path``.

        Raises:
            ExportError: The file is missing, not safetensors, truncated or inconsistent.
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                prefix = file.read(8)
                length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
                if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                    raise ExportError(
                        f"{path}: not a safetensors file (header length {length}, file {size} bytes)"
                    )
                header: dict[str, Any] = json.loads(file.read(length))
        except OSError as error:
            raise ExportError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ExportError(f"{path}: not a safetensors file: {error}") from error
        metadata = header.pop("__metadata__", {})
        tensors = {key: _tensor_ref(path, key, entry, 8 + length) for key, entry in header.items()}
        end = max((ref.offset + ref.nbytes for ref in tensors.values()), default=8 + length)
        if end > size:
            raise ExportError(f"{path}: truncated, {size} bytes where its header needs {end}")
        return cls(path, metadata, tensors)


def _tensor_ref(path: Path, key: str, entry: Mapping[str, Any], base: int) -> TensorRef:
    dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise ExportError(f"{path}: {key} has dtype {dtype}; known: {', '.join(DTYPE_BYTES)}")
    nbytes = prod(shape) * DTYPE_BYTES[dtype]
    if stop - start != nbytes:
        raise ExportError(
            f"{path}: {key} takes {stop - start} bytes where {dtype}{list(shape)} needs {nbytes}"
        )
    return TensorRef(path, key, dtype, shape, base + start, nbytes)
