# SPDX-License-Identifier: Apache-2.0
"""Exported graphs against the torch classes that they came from, on inputs and shapes that tracing never saw.

The references are the diffusers and transformers classes themselves, run on the checkpoint's own weights; nothing
of ``networks/`` takes part. Two of them need help: the audio front end is restated with ``torch.stft``, and the DiT's
A<->V modulation is fed by the rules of the bundle's generation, which the class alone does not follow.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ltxrt.engine import TensorSpec
from ltxrt.engine_onnx import OnnxEngine
from ltxrt.errors import ExportError

from .networks.spec import NetworkSpec
from .references import REFERENCES

if TYPE_CHECKING:
    from .exporter import Sources

__all__ = ["LIMIT", "ParityRow", "check_network", "relative_error"]

#: Largest relative L2 error of an fp32 graph.
LIMIT = 1e-4

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One output at one shape: relative L2 error, or for 8-bit frames the mean absolute error in levels."""

    network: str
    output: str
    sizes: Mapping[str, int]
    error: float
    limit: float
    unit: str

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit."""
        return self.error <= self.limit


def check_network(sources: "Sources", spec: NetworkSpec, path: Path) -> Iterator[ParityRow]:
    """Compare a written graph with its reference.

    Raises:
        ExportError: An output misses its limit.
        EngineError: The graph does not load or run.
    """
    engine = OnnxEngine(spec.name, path, _ports(spec.inputs), _ports(spec.outputs))
    reference = REFERENCES[spec.name](sources, spec)
    for seed, sizes in enumerate(reference.sizes):
        feeds = reference.feeds(sizes, seed)
        found = engine.run(feeds)
        with torch.no_grad():
            expected = reference.outputs(feeds)
        for name, value in expected.items():
            row = _row(spec.name, name, sizes, found[name], value)
            if not row.passed:
                raise ExportError(
                    f"{row.network}: {row.output} at {dict(sizes)} is off by {row.error:.3g} {row.unit}, "
                    f"the limit is {row.limit:g}"
                )
            yield row


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Relative L2 error; infinite where the shapes differ or a value on either side is not finite."""
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    wanted = np.asarray(expected, np.float64)
    difference = np.linalg.norm(np.asarray(found, np.float64) - wanted)
    return float(difference / max(np.linalg.norm(wanted), 1e-30))


def _row(network: str, name: str, sizes: Mapping[str, int], found: NDArray[Any], expected: NDArray[Any]) -> ParityRow:
    if found.dtype == np.uint8:
        same = found.shape == expected.shape
        error = float(np.abs(found.astype(int) - expected.astype(int)).mean()) if same else float("inf")
        return ParityRow(network, name, sizes, error, 0.01, "levels (mean absolute)")
    return ParityRow(network, name, sizes, relative_error(found, expected), LIMIT, "(relative L2)")


def _ports(ports: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(port.name, port.dtype, port.shape) for port in ports)
