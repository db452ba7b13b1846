# SPDX-License-Identifier: Apache-2.0
"""safetensors files as tables of tensors: where each tensor's bytes lie, without reading them.

A safetensors file is an 8-byte little-endian header length, a JSON header and raw row-major bytes, so an
ONNX initializer can point straight into it (github huggingface/safetensors, README, section Format).
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ltxrt.errors import ExportError, shown

__all__ = ["DTYPE_BYTES", "TensorFile", "TensorRef", "few", "folder_tensors", "read_json"]

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
#: How other files begin that end up under a checkpoint's name.
_FOREIGN = (
    (b"", "an empty file"),
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was not fetched"),
    (b"<", "a web page: the download was refused"),
    (b"GGUF", "a GGUF file"),
    (b"PK\x03\x04", "a zip or PyTorch file"),
    (b"\x80\x02", "a pickled PyTorch file"),
)
_NAMES_SHOWN = 4


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
        size, header_bytes = _header_bytes(path)
        try:
            header: object = json.loads(header_bytes)
        except (ValueError, RecursionError) as error:
            raise ExportError(f"{path}: not a safetensors file: its header is not JSON: {error}") from error
        if not isinstance(header, dict):
            raise ExportError(f"{path}: not a safetensors file: its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ExportError(f"{path}: __metadata__ is {shown(metadata, 60)}; allowed: strings by name")
        base = 8 + len(header_bytes)
        tensors = {key: _tensor_ref(path, key, entry, base) for key, entry in header.items()}
        _check_layout(path, tensors, base, size)
        return cls(path, metadata, tensors)


def _header_bytes(path: Path) -> tuple[int, bytes]:
    """File size and the bytes of the JSON header."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                return size, file.read(length)
            beginning = prefix + file.read(56)
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror}") from error
    for magic, what in _FOREIGN:
        if beginning.startswith(magic) if magic else not beginning:
            raise ExportError(f"{path}: not a safetensors file but {what}")
    raise ExportError(f"{path}: not a safetensors file, or truncated (header length {length}, file {size} bytes)")


def _tensor_ref(path: Path, key: str, entry: Any, base: int) -> TensorRef:
    """The checked header entry of one tensor; ``base`` is where the data begins."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise ExportError(f"{path}: {key} has a damaged header entry {shown(entry, 80)}")
    if dtype not in DTYPE_BYTES:
        raise ExportError(f"{path}: {key} has dtype {shown(dtype)}; known: {', '.join(DTYPE_BYTES)}")
    (start, stop), nbytes = offsets, prod(shape) * DTYPE_BYTES[dtype]
    if stop - start != nbytes:
        raise ExportError(f"{path}: {key} takes {stop - start} bytes where {dtype}{list(shape)} needs {nbytes}")
    return TensorRef(path, key, dtype, shape, base + start, nbytes)


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A JSON list of whole numbers; None for anything else."""
    whole = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
    return tuple(value) if whole else None


def _check_layout(path: Path, tensors: Mapping[str, TensorRef], base: int, size: int) -> None:
    """The data is one run without gap or overlap from ``base`` to the end of the file, as the format has it."""
    end = base
    for ref in sorted(tensors.values(), key=lambda ref: (ref.offset, ref.nbytes)):
        if ref.offset != end:
            raise ExportError(f"{path}: {ref.key} lies at byte {ref.offset} where {end} is expected")
        end += ref.nbytes
    if end > size:
        raise ExportError(f"{path}: truncated, {size} bytes where its header needs {end}")
    if end < size:
        raise ExportError(f"{path}: {size - end} bytes too long for its header, which ends at {end}")


def folder_tensors(folder: Path, stem: str) -> dict[str, TensorRef]:
    """Tensors of ``<stem>.safetensors`` or of the shards that ``<stem>.safetensors.index.json`` names.

    Raises:
        ExportError: A file is missing or damaged, or the shards are not those of the index.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        return dict(TensorFile.open(folder / f"{stem}.safetensors").tensors)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ExportError(f"{index}: weight_map is {shown(weight_map, 60)}; allowed: file names by tensor")
    names: set[Any] = set(weight_map.values())
    foreign = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if foreign:
        raise ExportError(f"{index}: {shown(foreign[0])} is not the name of a file in this folder")
    shards = {name: TensorFile.open(folder / name) for name in sorted(names)}
    astray = [key for key, name in weight_map.items() if key not in shards[name].tensors]
    if astray:
        raise ExportError(f"{index}: {len(astray)} tensors are not in the shard named ({few(astray)})")
    return {key: shards[name].tensors[key] for key, name in weight_map.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ExportError: It cannot be read, or is something else.
    """
    try:
        value: object = json.loads(path.read_bytes())
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path}: {shown(value, 60)}; allowed: an object")
    return value


def few(names: Iterable[str]) -> str:
    """The first names of many, for a message."""
    names = list(names)
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
