# SPDX-License-Identifier: Apache-2.0
"""What an exported network is: an export-friendly module, its named ports, and where its weights lie."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ltxrt_export.weights import TensorRef

__all__ = ["Axis", "NetworkSpec", "Port", "dynamic_shapes", "example_inputs"]

_SYMBOLIC = re.compile(r"(?:([1-9][0-9]*)\*)?([A-Za-z_]\w*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Axis:
    """A symbolic size: the range that the network serves and the size that it is traced at.

    Trace at 2 or more: torch.export turns sizes 0 and 1 into constants. ``minimum`` may be below that, and
    ``traced_maximum`` is for the case that the tracer can prove less than the graph serves.
    """

    minimum: int
    maximum: int
    example: int
    traced_maximum: int | None = None


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output: name, NumPy dtype name, and per axis a size, a symbol or ``"32*symbol"``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """Everything that the exporter needs to know of one network.

    Attributes:
        name: ``text_encoder``, ``audio_encoder``, ``image_encoder``, ``denoiser``, ``upsampler`` or
            ``video_decoder``.
        module: Takes the inputs positionally, returns one tensor or a tuple in the order of ``outputs``.
        inputs: Input ports, in the order of ``module.forward``.
        outputs: Output ports.
        axes: Every symbol that occurs in a port's shape.
        weights: Stored tensor behind every parameter and buffer of ``module`` that comes from a checkpoint.
        constants: Values of the module's other buffers, by name: they are computed, not stored, and a trace
            on fake tensors does not know them.
    """

    name: str
    module: torch.nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    axes: Mapping[str, Axis]
    weights: Mapping[str, TensorRef]
    constants: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def axis_of(entry: int | str) -> tuple[int, str] | None:
    """``"32*h"`` as (32, "h"), ``"h"`` as (1, "h"); None for a fixed size."""
    if isinstance(entry, int):
        return None
    match = _SYMBOLIC.fullmatch(entry)
    if match is None:
        raise ValueError(f"{entry!r} is neither a size, a symbol nor size*symbol")
    return int(match[1] or 1), match[2]


def example_inputs(spec: NetworkSpec) -> tuple[torch.Tensor, ...]:
    """Zero tensors of the example sizes, for tracing."""
    sizes = {name: axis.example for name, axis in spec.axes.items()}
    return tuple(
        torch.zeros([concrete(entry, sizes) for entry in port.shape], dtype=getattr(torch, port.dtype))
        for port in spec.inputs
    )


def concrete(entry: int | str, sizes: Mapping[str, int]) -> int:
    """The size that a shape entry stands for."""
    parsed = axis_of(entry)
    return int(entry) if parsed is None else parsed[0] * sizes[parsed[1]]


def dynamic_shapes(spec: NetworkSpec) -> tuple[dict[int, Any], ...]:
    """The ``dynamic_shapes`` argument of ``torch.export.export`` for this network's inputs."""
    dims = {
        name: torch.export.Dim(name, min=max(2, axis.minimum), max=axis.traced_maximum or axis.maximum)
        for name, axis in spec.axes.items()
    }
    shapes: list[dict[int, Any]] = []
    for port in spec.inputs:
        parsed = {index: axis_of(entry) for index, entry in enumerate(port.shape)}
        shapes.append({i: dims[p[1]] if p[0] == 1 else p[0] * dims[p[1]] for i, p in parsed.items() if p is not None})
    return tuple(shapes)


def random_feeds(spec: NetworkSpec, sizes: Mapping[str, int], seed: int) -> dict[str, NDArray[Any]]:
    """Fresh standard-normal inputs (zeros for integer ports) at the given sizes."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    feeds: dict[str, NDArray[Any]] = {}
    for port in spec.inputs:
        shape = [concrete(entry, sizes) for entry in port.shape]
        normal = generator.standard_normal(shape, dtype=np.float32)
        feeds[port.name] = normal if port.dtype == "float32" else np.zeros(shape, port.dtype)
    return feeds
