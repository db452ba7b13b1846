# SPDX-License-Identifier: Apache-2.0
"""Exported graphs against the torch classes that they came from, on inputs and shapes that tracing never saw.

The references are the diffusers and transformers classes themselves, run in fp32 on the checkpoint's own weights;
nothing of ``networks/`` takes part. Two of them need help: the audio front end is restated with ``torch.stft``, and
the DiT's A<->V modulation is fed by the rules of the bundle's generation, which the class alone does not follow.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from ltxrt.engine import TensorSpec, check_feeds
from ltxrt.engine_onnx import OnnxEngine
from ltxrt.errors import ExportError

from .networks.spec import NetworkSpec, Port
from .quantize.graph import element_types
from .quantize.half import LAYOUT
from .quantize.recording import open_session
from .quantize.twin import rounding_twin
from .references import REFERENCES

if TYPE_CHECKING:
    from .exporter import Sources

__all__ = [
    "LIMIT",
    "LIMITS",
    "Limit",
    "ParityRow",
    "Runner",
    "check_network",
    "limit_of",
    "open_runner",
    "parity_row",
    "relative_error",
]

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How far a network may be from the fp32 torch class.

    Attributes:
        precision: What the graph computes in.
        network: The network that it is for; None for all that have none of their own.
        relative: Largest relative L2 error of an output.
        levels: The same for 8-bit frames: largest mean absolute error, in levels.
        reason: Why this much.
    """

    precision: str
    network: str | None = None
    relative: float
    levels: float
    reason: str


#: Measured is the worst of all networks of the tiny model, untrained and trained, at all sizes of ``verify``; for FP8
#: the worst of 16 seeds. Limits leave room for other weights and more depth. FP8's cannot tell every wrong weight from
#: rounding: ``weight_check`` does.
LIMITS = (
    Limit(
        precision="fp32",
        relative=1e-4,
        levels=0.01,
        reason="the same sums in another order: measured 5e-6 and 7e-5 levels, 8e-6 at 48 blocks",
    ),
    Limit(
        precision="fp16",
        relative=5e-3,
        levels=0.25,
        reason="11 bits: measured 7.9e-4 and 2.5e-2 levels; errors of more layers add up like a root",
    ),
    Limit(
        precision="bf16",
        relative=5e-2,
        levels=2.0,
        reason="8 bits, eight times the rounding of fp16: measured 1.0e-2 and 0.31 levels",
    ),
    Limit(
        precision="fp8",
        relative=2.5e-1,
        levels=4.0,
        reason="4 bits in weights and inputs of every block: measured 9.0e-2, on inputs unlike the calibrated ones",
    ),
    Limit(
        precision="fp8",
        network="text_encoder",
        relative=3e-1,
        levels=4.0,
        reason="measured 1.1e-1 on a full context of random tokens: a last norm scales states and errors up alike",
    ),
    Limit(
        precision="fp8-mixed",
        relative=2.5e-1,
        levels=4.0,
        reason="as fp8, measured 8.9e-2: 16-bit blocks at both ends help real inputs and not random ones",
    ),
)


def limit_of(network: str, precision: str) -> Limit:
    """The limit of a network in a precision.

    Raises:
        ExportError: There is none for that precision.
    """
    fitting = [entry for entry in LIMITS if entry.precision == precision and entry.network in (None, network)]
    if not fitting:
        known = ", ".join(dict.fromkeys(entry.precision for entry in LIMITS))
        raise ExportError(f"{network}: no limit is known for precision {precision!r}; known: {known}")
    return max(fitting, key=lambda entry: entry.network is not None)


#: Largest relative L2 error of an fp32 graph.
LIMIT = limit_of("", "fp32").relative


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


class Runner(Protocol):
    """What runs a network: an engine, or the stand-in of one that this machine lacks."""

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name."""
        ...


@dataclass(frozen=True, slots=True)
class _Emulated:
    """A graph with BF16 in it, which ONNX Runtime has no CPU kernels for, as its rounding fp32 twin."""

    name: str
    inputs: tuple[TensorSpec, ...]
    session: Any

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        check_feeds(self.name, self.inputs, feeds)
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, map(np.asarray, self.session.run(names, dict(feeds))), strict=True))


def open_runner(name: str, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Runner:
    """A written graph, ready to run on the CPU; what computes in BF16 is emulated in fp32, rounding as BF16 would.

    Raises:
        EngineError: The graph does not load.
    """
    model = onnx.load(path, load_external_data=False)
    if not computes_in_bf16(model):
        return OnnxEngine(name, path, inputs, outputs)
    return _Emulated(name, inputs, open_session(rounding_twin(model), path.parent, exact=True))


def computes_in_bf16(model: ModelProto) -> bool:
    """Whether a node does more with BF16 than move it: weights stored in BF16 alone are no matter."""
    types, moves = element_types(model.graph), LAYOUT | {"Cast"}
    return any(
        node.op_type not in moves and types.get(node.output[0]) == TensorProto.BFLOAT16 for node in model.graph.node
    )


def check_network(sources: "Sources", spec: NetworkSpec, path: Path, precision: str = "fp32") -> Iterator[ParityRow]:
    """Compare a written graph with its reference.

    Args:
        sources: The model.
        spec: The network, as it was exported.
        path: The graph, its weights beside it.
        precision: What it computes in, one of those in ``LIMITS``.

    Raises:
        ExportError: An output misses its limit.
        EngineError: The graph does not load or run.
    """
    engine = open_runner(spec.name, path, tensor_specs(spec.inputs), tensor_specs(spec.outputs))
    limit = limit_of(spec.name, precision)
    reference = REFERENCES[spec.name](sources, spec)
    for seed, sizes in enumerate(reference.sizes):
        feeds = reference.feeds(sizes, seed)
        found = engine.run(feeds)
        with torch.no_grad():
            expected = reference.outputs(feeds)
        for name, value in expected.items():
            row = parity_row((spec.name, name), sizes, found[name], value, limit)
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


def parity_row(
    where: tuple[str, str], sizes: Mapping[str, int], found: NDArray[Any], expected: NDArray[Any], limit: Limit
) -> ParityRow:
    """The comparison of one output; ``where`` is network and output."""
    if expected.dtype == np.uint8:
        same = found.shape == expected.shape and found.dtype == np.uint8
        error = float(np.abs(found.astype(int) - expected.astype(int)).mean()) if same else float("inf")
        return ParityRow(*where, sizes, error, limit.levels, "levels (mean absolute)")
    return ParityRow(*where, sizes, relative_error(found, expected), limit.relative, "(relative L2)")


def tensor_specs(ports: tuple[Port, ...]) -> tuple[TensorSpec, ...]:
    """Ports as an engine takes them."""
    return tuple(TensorSpec(port.name, port.dtype, port.shape) for port in ports)
