# SPDX-License-Identifier: Apache-2.0
"""FP8 weights, streamed tensor by tensor from the checkpoint into one safetensors file beside the graph.

Each weight [out, in] is stored turned, [in, out], because TensorRT wants nothing between DequantizeLinear and MatMul,
and with one scale per output channel: E4M3(clamp(W / scale, -448, 448)), round to nearest even. Weights that the
checkpoint already holds in E4M3 are taken as they are, with the scale that lies beside them (W = w8 * weight_scale;
inputs are divided by input_scale: Lightricks/LTX-2 packages/ltx-core/src/ltx_core/quantization/fp8_scaled_mm.py).

The file's name holds a digest of everything that decides its bytes, so a finished file is reused, and one that was cut
off is continued where it ended.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ltxrt.bundle import file_sha256
from ltxrt.errors import ExportError, OutputError
from ltxrt_export.weights import DTYPE_BYTES, TensorFile, TensorRef

__all__ = ["FP8_MAX", "Fp8Pair", "Fp8Request", "StoredScale", "convert", "is_finished", "stored_scales", "write_fp8"]

#: Largest finite E4M3 number.
FP8_MAX = 448.0

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
# Elements that are held in fp32 at a time: 4 MB, which stays in cache (a third faster than 16) and bounds memory.
_CHUNK = 1 << 20
_LAYOUT_VERSION = 1
_NAME = re.compile(r"[a-z_]+-fp8-[0-9a-f]{12}\.safetensors")

Sha256 = Callable[[Path], str]


@dataclass(frozen=True, slots=True)
class StoredScale:
    """Scales that a published FP8 checkpoint holds for one layer.

    Attributes:
        weight: ``weight_scale``, a scalar or one per output channel.
        activation: ``input_scale``; None where there is none or it is the placeholder 1.0.
    """

    weight: TensorRef
    activation: float | None


@dataclass(frozen=True, slots=True)
class Fp8Request:
    """One weight to convert.

    Attributes:
        source: Where it lies, [out, in].
        scale_dtype: Type of its scale, ``F32``, ``F16`` or ``BF16``: that of the activations around it.
        transposed: Whether it is stored [out, in], as ``nn.Linear`` does.
        stored: Its scales, where the checkpoint holds it in E4M3.
    """

    source: TensorRef
    scale_dtype: str
    transposed: bool = True
    stored: StoredScale | None = None

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """[out], or [] for a published scalar."""
        channels = self.source.shape[0 if self.transposed else 1]
        return (channels,) if self.stored is None else ((channels,) if prod(self.stored.weight.shape) > 1 else ())


@dataclass(frozen=True, slots=True)
class Fp8Pair:
    """A converted weight, [in, out] E4M3, and its scale, [out] or []."""

    weight: TensorRef
    scale: TensorRef


def stored_scales(file: TensorFile) -> dict[str, StoredScale]:
    """The scales of every E4M3 weight of a published FP8 checkpoint, by the weight's key.

    Raises:
        ExportError: An E4M3 weight has no ``weight_scale``, or a scale is of another shape than the convention's.
    """
    scales: dict[str, StoredScale] = {}
    for key, ref in file.tensors.items():
        if ref.dtype != "F8_E4M3":
            continue
        layer = key.removesuffix(".weight")
        scale, activation = file.tensors.get(f"{layer}.weight_scale"), file.tensors.get(f"{layer}.input_scale")
        if scale is None:
            raise ExportError(f"{file.path}: {key} is E4M3 without {layer}.weight_scale; plain casts are not supported")
        if prod(scale.shape) not in (1, ref.shape[0]):
            raise ExportError(f"{scale.path}: {scale.key} is {list(scale.shape)}; allowed: one scale, or one a row")
        value = None if activation is None else _scalar(activation)
        scales[key] = StoredScale(scale, None if value == 1.0 else value)
    return scales


def is_finished(path: Path) -> bool:
    """Whether a file is one that ``write_fp8`` finished, by its name; one that was cut off has another."""
    return _NAME.fullmatch(path.name) is not None


def write_fp8(
    folder: Path, network: str, requests: Sequence[Fp8Request], *, sha256: Sha256 = file_sha256
) -> dict[str, Fp8Pair]:
    """Convert weights into ``folder`` and say where each lies, by checkpoint key.

    Args:
        folder: Where the file goes; it is made if need be.
        network: Start of the file's name.
        requests: What to convert, in the order of the file.
        sha256: Hash of a source file; give one that remembers.

    Raises:
        ExportError: A weight cannot be read, is not finite, or another process is writing the same file.
        OutputError: The file cannot be written, or the disk has no room for it.
    """
    header = _header(requests)
    path = folder / f"{network}-fp8-{_digest(requests, header, sha256)}.safetensors"
    if not path.exists():
        needed = len(header) + sum(prod(r.source.shape) + _scale_bytes(r) for r in requests)
        with _written(path):
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, header, requests, needed)
    tensors = TensorFile.open(path).tensors
    keys = [request.source.key for request in requests]
    return {key: Fp8Pair(tensors[f"{key}/fp8"], tensors[f"{key}/fp8_scale"]) for key in keys}


def _write(path: Path, header: bytes, requests: Sequence[Fp8Request], needed: int) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with _exclusive(partial) as file:
        size = partial.stat().st_size
        free = shutil.disk_usage(path.parent).free
        if needed - size > free:
            raise OutputError(f"{path}: needs {needed - size} bytes more, {path.parent} has {free} free")
        done, position = _resume(file, header, requests, size)
        file.seek(position)
        file.truncate()
        for request in requests[done:]:
            try:
                weight, scale = convert(request)
            except ExportError:
                partial.unlink()  # no later run could finish it
                raise
            file.write(weight.tobytes())
            file.write(scale.tobytes())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def convert(request: Fp8Request) -> tuple[NDArray[Any], NDArray[Any]]:
    """One weight as E4M3 [in, out], and its scale, [out] or [].

    Raises:
        ExportError: It cannot be read or is not finite.
    """
    rows, columns = request.source.shape
    turned = np.empty((columns, rows) if request.transposed else (rows, columns), _DTYPES["F8_E4M3"])
    scales = np.empty(request.scale_shape, _DTYPES[request.scale_dtype])
    if request.stored is not None:
        scales[...] = _array(request.stored.weight).astype(np.float32).reshape(request.scale_shape)
    elif not request.transposed:
        scales[...] = _scale(_column_amax(request.source), request)
    for start, values in _chunks(request.source):
        stop = start + len(values)
        if request.stored is None:
            wide = values.astype(np.float32)
            if request.transposed:
                scales[start:stop] = _scale(np.abs(wide).max(axis=1), request)
            divisor = scales[start:stop, None] if request.transposed else scales
            values = _e4m3(wide, divisor.astype(np.float32))
        # As bytes: NumPy turns a type that is not its own element by element.
        codes, target = values.view(np.uint8), turned.view(np.uint8)
        if request.transposed:
            target[:, start:stop] = codes.T
        else:
            target[start:stop] = codes
    return turned, scales


def _e4m3(values: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[Any]:
    np.divide(values, scale, out=values)
    np.clip(values, -FP8_MAX, FP8_MAX, out=values)
    return values.astype(_DTYPES["F8_E4M3"])


def _scale(amax: NDArray[np.float32], request: Fp8Request) -> NDArray[Any]:
    """amax / 448 in the scale's own type, never below that type's smallest normal number (a channel may be zero)."""
    if not np.isfinite(amax).all():
        raise ExportError(f"{request.source.path}: {request.source.key} holds infinities or NaN")
    dtype = _DTYPES[request.scale_dtype]
    return np.maximum(amax / np.float32(FP8_MAX), np.float32(ml_dtypes.finfo(dtype).smallest_normal)).astype(dtype)


def _column_amax(ref: TensorRef) -> NDArray[np.float32]:
    amax = np.zeros(ref.shape[1], np.float32)
    for _, values in _chunks(ref):
        np.maximum(amax, np.abs(values.astype(np.float32)).max(axis=0), out=amax)
    return amax


def _chunks(ref: TensorRef) -> Iterator[tuple[int, NDArray[Any]]]:
    """First row and values of runs of whole rows."""
    rows, columns = ref.shape
    step, dtype = max(1, _CHUNK // max(1, columns)), _DTYPES[ref.dtype]
    try:
        with ref.path.open("rb") as file:
            file.seek(ref.offset)
            for start in range(0, rows, step):
                count = min(step, rows - start) * columns
                values = np.fromfile(file, dtype, count)
                if len(values) < count:
                    raise ExportError(f"{ref.path}: {ref.key} is truncated")
                yield start, values.reshape(-1, columns)
    except OSError as error:
        raise ExportError(f"{ref.path}: {ref.key} cannot be read: {error.strerror}") from error


def _array(ref: TensorRef) -> NDArray[Any]:
    try:
        return np.fromfile(ref.path, _DTYPES[ref.dtype], prod(ref.shape), offset=ref.offset).reshape(ref.shape)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"{ref.path}: {ref.key} cannot be read as a scale: {error}") from error


def _scalar(ref: TensorRef) -> float:
    values = _array(ref).astype(np.float64).reshape(-1)
    if len(values) != 1 or not np.isfinite(values[0]) or values[0] <= 0:
        raise ExportError(f"{ref.path}: {ref.key} is {values[:4].tolist()}; allowed: one number above 0")
    return float(values[0])


def _scale_bytes(request: Fp8Request) -> int:
    return prod(request.scale_shape) * DTYPE_BYTES[request.scale_dtype]


def _header(requests: Iterable[Fp8Request]) -> bytes:
    """The safetensors header of the finished file."""
    entries: dict[str, Any] = {}
    offset = 0
    for request in requests:
        key, shape = request.source.key, request.source.shape
        turned = list(reversed(shape)) if request.transposed else list(shape)
        for name, dtype, size in (
            (f"{key}/fp8", "F8_E4M3", turned),
            (f"{key}/fp8_scale", request.scale_dtype, list(request.scale_shape)),
        ):
            nbytes = prod(size) * DTYPE_BYTES[dtype]
            entries[name] = {"dtype": dtype, "shape": size, "data_offsets": [offset, offset + nbytes]}
            offset += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _digest(requests: Sequence[Fp8Request], header: bytes, sha256: Sha256) -> str:
    """Twelve hex digits over all that decides the file's bytes."""
    files = {ref.path for request in requests for ref in _sources(request)}
    wanted = {
        "version": _LAYOUT_VERSION,
        "files": sorted(sha256(path) for path in files),
        "tensors": [[ref.key, ref.dtype, ref.offset] for request in requests for ref in _sources(request)],
    }
    return hashlib.sha256(header + json.dumps(wanted).encode()).hexdigest()[:12]


def _sources(request: Fp8Request) -> tuple[TensorRef, ...]:
    return (request.source,) if request.stored is None else (request.source, request.stored.weight)


def _resume(file: BinaryIO, header: bytes, requests: Sequence[Fp8Request], size: int) -> tuple[int, int]:
    """How many weights need no work, and where the next one goes; the last whole one is made again, to be safe."""
    file.seek(0)
    if size < len(header) or file.read(len(header)) != header:
        file.seek(0)
        file.write(header)
        return 0, len(header)
    done, position, ends = 0, len(header), [len(header)]
    for request in requests:
        position += prod(request.source.shape) + _scale_bytes(request)
        if position > size:
            break
        ends.append(position)
    done = max(0, len(ends) - 2)
    return done, ends[done]


@contextmanager
def _exclusive(partial: Path) -> Generator[BinaryIO]:
    """The partial file, opened for reading and writing by this process alone."""
    with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ExportError(f"{partial}: another export is writing it") from error
        yield file


@contextmanager
def _written(path: Path) -> Generator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
