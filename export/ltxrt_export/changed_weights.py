# SPDX-License-Identifier: Apache-2.0
"""Tensors that are not what the checkpoint stores, in a file of their own beside it: dequantised, or with LoRAs fused.

Only they are written, row by row, and everything else stays where it is. Where they will lie is known before anything
is written, so that a model can be checked as a whole first.
"""

import json
import os
import struct
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ltxrt.errors import ExportError, OutputError

from .disk import require_room
from .quantize.fp8_weights import StoredScale
from .weights import DTYPE_BYTES, TensorRef

__all__ = ["Change", "ChangedWeights", "Delta", "read_values"]

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
#: Type of a weight that is stored in E4M3 and needed in 16 bits: that of its neighbours, and of the file that it was
#: rounded from.
_WIDE = "BF16"
#: Elements that are held in fp32 at a time.
_CHUNK = 1 << 22
_MARGIN_BYTES = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class Delta:
    """What one LoRA adds to a weight [out, in]: factor * up @ down.

    Attributes:
        down: ``lora_A``, [rank, in].
        up: ``lora_B``, [out, rank].
        factor: Scale * alpha / rank.
    """

    down: TensorRef
    up: TensorRef
    factor: float


@dataclass(frozen=True, slots=True)
class Change:
    """A weight that is made anew: stored value * scale + deltas, in fp32, rounded once.

    Attributes:
        source: The stored weight.
        scale: Where it is stored in E4M3, its scales.
        deltas: LoRAs, in the order in which they are added.
    """

    source: TensorRef
    scale: StoredScale | None = None
    deltas: tuple[Delta, ...] = ()

    @property
    def dtype(self) -> str:
        """What it is rounded to: the stored dtype, BF16 for E4M3."""
        return _WIDE if self.scale is not None else self.source.dtype


@dataclass(frozen=True, slots=True)
class ChangedWeights:
    """The file of the changed weights, written or not yet.

    Attributes:
        path: Where it lies, or will.
        changes: What becomes of each weight, by checkpoint key.
        header: Its first bytes.
        refs: Where each weight lies, or will, by checkpoint key.
    """

    path: Path
    changes: Mapping[str, Change]
    header: bytes
    refs: Mapping[str, TensorRef]

    @classmethod
    def plan(cls, path: Path, changes: Mapping[str, Change]) -> "ChangedWeights":
        """Lay the file out."""
        entries: dict[str, Any] = {}
        end = 0
        for key, change in changes.items():
            start, end = end, end + prod(change.source.shape) * DTYPE_BYTES[change.dtype]
            entries[key] = {"dtype": change.dtype, "shape": list(change.source.shape), "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        refs = {
            key: TensorRef(
                path, key, entry["dtype"], tuple(entry["shape"]), base + entry["data_offsets"][0], _length(entry)
            )
            for key, entry in entries.items()
        }
        return cls(path, dict(changes), struct.pack("<Q", len(text)) + text, refs)

    @property
    def bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(ref.nbytes for ref in self.refs.values())

    @property
    def stored_scales(self) -> dict[str, StoredScale]:
        """Scales of the weights that are the checkpoint's own E4M3 values still, by key."""
        return {
            key: change.scale for key, change in self.changes.items() if change.scale is not None and not change.deltas
        }

    def write(self) -> Generator[int]:
        """Write the file, under another name until it is whole; yields the bytes done after every weight.

        Raises:
            ExportError: A tensor cannot be read, or what becomes of a weight is not finite in its type.
            OutputError: The file cannot be written, or the disk has no room for it.
        """
        require_room(self.path.parent, self.bytes + _MARGIN_BYTES, "changed weights")
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            with _open(partial) as file:
                _write(partial, file, self.header)
                done = len(self.header)
                for key, change in self.changes.items():
                    for values in _values(change):
                        _write(partial, file, values.tobytes())
                    done += self.refs[key].nbytes
                    yield done
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
        finally:
            with suppress(OSError):
                partial.unlink()


def read_values(ref: TensorRef, rows: slice | None = None) -> NDArray[np.float32]:
    """A stored tensor, or some of its rows, in fp32.

    Raises:
        ExportError: It cannot be read, or is of no type that weights have.
    """
    if ref.dtype not in _DTYPES:
        raise ExportError(f"{ref.path}: {ref.key} is {ref.dtype}; allowed: {', '.join(_DTYPES)}")
    start, count, shape = 0, prod(ref.shape), ref.shape
    if rows is not None:
        first, last, _ = rows.indices(ref.shape[0])
        row = prod(ref.shape[1:])
        start, count, shape = first * row, (last - first) * row, (last - first, *ref.shape[1:])
    dtype = _DTYPES[ref.dtype]
    try:
        values = np.fromfile(ref.path, dtype, count, offset=ref.offset + start * dtype.itemsize)
    except OSError as error:
        raise ExportError(f"{ref.path}: {ref.key} cannot be read: {error.strerror}") from error
    if len(values) < count:
        raise ExportError(f"{ref.path}: {ref.key} cannot be read: the file became shorter")
    return values.astype(np.float32).reshape(shape)


def _values(change: Change) -> Iterator[NDArray[Any]]:
    """Runs of rows of a changed weight, in its type."""
    source, dtype = change.source, _DTYPES[change.dtype]
    rows, columns = source.shape
    step = max(1, _CHUNK // max(1, columns))
    scale = None if change.scale is None else read_values(change.scale.weight)
    deltas = [(read_values(delta.down), read_values(delta.up), np.float32(delta.factor)) for delta in change.deltas]
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        values = read_values(source, part)
        # What is beyond the type becomes infinite, which is what is looked for.
        with np.errstate(over="ignore", invalid="ignore"):
            if scale is not None:
                values *= scale.reshape(-1, 1)[part] if scale.size > 1 else scale.reshape(())
            for down, up, factor in deltas:
                values += factor * (up[part] @ down)
            rounded = values.astype(dtype)
        if not np.isfinite(rounded).all():
            raise ExportError(f"{source.path}: {source.key} is not finite in {change.dtype} with all that is added")
        yield rounded


def _length(entry: Mapping[str, Any]) -> int:
    start, stop = entry["data_offsets"]
    return stop - start


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("wb")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error


def _write(path: Path, file: BinaryIO, data: bytes) -> None:
    try:
        file.write(data)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
