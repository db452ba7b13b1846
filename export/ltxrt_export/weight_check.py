# SPDX-License-Identifier: Apache-2.0
"""The weights that a written graph reads, against those of the model: byte by byte, or within E4M3's rounding.

Where a graph computes in FP8 its outputs may be so far off that a single wrong weight hides among them; here it cannot.
"""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from ltxrt.errors import ExportError

from .parity import ParityRow
from .weights import DTYPE_BYTES, TensorRef

__all__ = ["E4M3_LIMIT", "weight_rows"]

#: Relative L2 error of a tensor in E4M3: 3 mantissa bits round by at most 1/16 of a value, 2.6e-2 on average, and
#: values 2^14 below the largest of their channel by more.
E4M3_LIMIT = 5e-2

_FP8 = "/fp8"
_SCALE = "/fp8_scale"
_DTYPES: Mapping[int, tuple[str, np.dtype[Any]]] = {
    TensorProto.DOUBLE: ("F64", np.dtype(np.float64)),
    TensorProto.FLOAT: ("F32", np.dtype(np.float32)),
    TensorProto.FLOAT16: ("F16", np.dtype(np.float16)),
    TensorProto.BFLOAT16: ("BF16", np.dtype(ml_dtypes.bfloat16)),
    TensorProto.FLOAT8E4M3FN: ("F8_E4M3", np.dtype(ml_dtypes.float8_e4m3fn)),
}
_NUMPY: Mapping[str, np.dtype[Any]] = {name: dtype for name, dtype in _DTYPES.values()}
_CHUNK_BYTES = 8 * 1024**2
#: Elements that are held in fp64 at a time.
_CHUNK = 1 << 20


def weight_rows(network: str, graph: Path, model: Mapping[str, TensorRef]) -> list[ParityRow]:
    """One row for the weights that the graph has as they are stored, and one for those that it has in FP8, if any.

    Args:
        network: Name, for the rows.
        graph: The ``.onnx``, its weights beside it.
        model: Stored tensors of the model by key.

    Raises:
        ExportError: A weight of the graph is none of the model's, or cannot be read.
    """
    refs = dict(_external(network, graph))
    plain = {key: _difference(network, ref, model) for key, ref in refs.items() if _FP8 not in key}
    eight_bit = {
        key: _fp8_difference(ref, refs.get(key.removesuffix(_FP8) + _SCALE), _of_model(network, key, model))
        for key, ref in refs.items()
        if key.endswith(_FP8)
    }
    rows = [_row(network, "weights", plain, 0.0)] if plain else []
    return rows + ([_row(network, "fp8 weights", eight_bit, E4M3_LIMIT)] if eight_bit else [])


def _row(network: str, name: str, errors: Mapping[str, float], limit: float) -> ParityRow:
    worst = max(errors, key=lambda key: errors[key])
    row = ParityRow(network, name, {"tensors": len(errors)}, errors[worst], limit, "(relative L2 of the worst)")
    return row if row.passed else ParityRow(network, f"{name}: {worst}", row.sizes, row.error, limit, row.unit)


def _external(network: str, graph: Path) -> Iterator[tuple[str, TensorRef]]:
    """What an engine reads for every initializer outside of the graph, by name."""
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        dtype, path = _DTYPES.get(tensor.data_type), graph.parent / entries["location"]
        shape, offset = tuple(tensor.dims), int(entries["offset"])
        if dtype is None or path.stat().st_size < offset + prod(shape) * DTYPE_BYTES[dtype[0]]:
            raise ExportError(f"{network}: {tensor.name} does not lie in {path.name}")
        yield tensor.name, TensorRef(path, tensor.name, dtype[0], shape, offset, prod(shape) * DTYPE_BYTES[dtype[0]])


def _of_model(network: str, key: str, model: Mapping[str, TensorRef]) -> TensorRef:
    name = key.removesuffix(_FP8)
    if name not in model:
        raise ExportError(f"{network}: the graph reads {name}, which is no weight of the model")
    return model[name]


def _difference(network: str, found: TensorRef, model: Mapping[str, TensorRef]) -> float:
    """Relative L2 error of a weight that should be the model's own; exactly 0 where the bytes are equal."""
    expected = _of_model(network, found.key, model)
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return float("inf")
    if _same_bytes(found, expected):
        return 0.0
    wanted = _mapped(expected).astype(np.float64)
    # NaN compares with nothing, and would pass for the smallest.
    error = np.linalg.norm(_mapped(found).astype(np.float64) - wanted) / max(np.linalg.norm(wanted), 1e-30)
    return float(error) if np.isfinite(error) and error > 0 else float("inf")


def _same_bytes(found: TensorRef, expected: TensorRef) -> bool:
    with found.path.open("rb") as one, expected.path.open("rb") as other:
        one.seek(found.offset)
        other.seek(expected.offset)
        left = found.nbytes
        while left:
            size = min(left, _CHUNK_BYTES)
            if one.read(size) != other.read(size):
                return False
            left -= size
    return True


def _fp8_difference(found: TensorRef, scale: TensorRef | None, expected: TensorRef) -> float:
    """Relative L2 error of an E4M3 weight, [in, out] or as it is stored, with its scale [out] or []."""
    if scale is None or found.dtype != "F8_E4M3":
        return float("inf")
    factors = _mapped(scale).astype(np.float64)
    turned = tuple(reversed(expected.shape)) == found.shape
    tried = [_fp8_error(found, factors, expected, turned=True)] if turned else []
    if found.shape == expected.shape and not (tried and tried[0] <= E4M3_LIMIT):
        tried.append(_fp8_error(found, factors, expected, turned=False))
    return min(tried, default=float("inf"))


def _fp8_error(found: TensorRef, factors: NDArray[np.float64], expected: TensorRef, *, turned: bool) -> float:
    codes, weights = _mapped(found), _mapped(expected)
    codes = codes.T if turned else codes
    if factors.shape not in ((), (codes.shape[0 if turned else 1],)):
        return float("inf")
    per_row = factors[:, None] if turned and factors.ndim else factors
    difference = norm = 0.0
    step = max(1, _CHUNK // max(1, codes.shape[1]))
    for start in range(0, codes.shape[0], step):
        rows = slice(start, start + step)
        scale = per_row[rows] if turned and factors.ndim else per_row
        wanted = weights[rows].astype(np.float64)
        difference += float(np.square(codes[rows].astype(np.float64) * scale - wanted).sum())
        norm += float(np.square(wanted).sum())
    error = float(np.sqrt(difference / max(norm, 1e-60)))
    return error if np.isfinite(error) else float("inf")


def _mapped(ref: TensorRef) -> NDArray[Any]:
    """A stored tensor, read as it is used."""
    if not ref.nbytes:
        return np.zeros(ref.shape, _NUMPY[ref.dtype])
    return np.memmap(ref.path, _NUMPY[ref.dtype], "r", ref.offset, ref.shape)
