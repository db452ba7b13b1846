# SPDX-License-Identifier: Apache-2.0
"""Every network of a bundle against the torch class that it came from, in every precision that a preset names.

For each network the class runs first, on fresh random inputs: at sizes that tracing never saw, at the corners of what
the bundle allows, and for the video decoder as the stream that the runtime makes of it. Then it is dropped, and each
variant of the network runs on the same inputs; so the two are never in memory together. The weights that a graph reads
are compared with the model's as well, one by one.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ltxrt.bundle import Bundle
from ltxrt.decode import VideoDecoder
from ltxrt.engine_store import backends
from ltxrt.errors import ExportError
from ltxrt.manifest import NETWORK_NAMES, NetworkEntry
from ltxrt.preset import load_preset

from .exporter import Sources, network_specs
from .networks.denoiser import Semantics
from .networks.spec import NetworkSpec
from .parity import Limit, ParityRow, Runner, limit_of, open_runner, parity_row
from .references import REFERENCES, Reference
from .weight_check import weight_rows

__all__ = ["LARGEST", "EngineReport", "NetworkReport", "VerifyOptions", "VerifyStep", "corner_sizes", "verify_bundle"]

#: Where a bundle allows more than a torch class should be asked for on a CPU: 20 seconds of sound, as 481 frames at 24
#: a second take. Every other bound is gone to.
LARGEST = {"samples": 320_640, "Na": 501}
#: Latent size of the clip that is streamed; it has a whole chunk of every preset behind the first, and a shorter one.
_STREAM_SIZE = (2, 3)

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What may be chosen.

    Attributes:
        networks: Names of the networks to check.
        seed: Of all inputs.
    """

    networks: Sequence[str] = NETWORK_NAMES
    seed: int = 0


@dataclass(frozen=True, slots=True)
class NetworkReport:
    """One network in one precision.

    Attributes:
        key: In the manifest.
        network: Its name.
        precision: What it computes in.
        presets: The presets that use it.
        rows: Every comparison.
    """

    key: str
    network: str
    precision: str
    presets: tuple[str, ...]
    rows: tuple[ParityRow, ...]

    @property
    def passed(self) -> bool:
        """Whether every comparison is within its limit."""
        return all(row.passed for row in self.rows)


@dataclass(frozen=True, slots=True)
class EngineReport:
    """A compiled engine of the bundle, which was not run."""

    key: str
    network: str
    gpu: str
    reason: str


@dataclass(frozen=True, slots=True)
class VerifyStep:
    """Progress: ``done`` of ``total`` runs of a network, and the report of a variant that is finished."""

    network: str
    done: int
    total: int
    report: NetworkReport | None = None


@dataclass(frozen=True, slots=True)
class _Case:
    """Something to run, and what the class makes of it."""

    sizes: Mapping[str, int]
    expected: Arrays
    run: Callable[[Runner], Arrays] = field(repr=False)


def verify_bundle(bundle: Bundle, sources: Sources, options: VerifyOptions) -> Generator[VerifyStep]:
    """Check the networks of a bundle that some preset uses.

    A generator: nothing runs until it is consumed.

    Args:
        bundle: The bundle, its files checked.
        sources: The model that it was made from.
        options: What to check.

    Raises:
        ExportError: The bundle's networks are not those of this model at all, or one has an unknown precision.
        EngineError: A graph does not load or run.
    """
    specs, _ = network_specs(sources, Semantics(bundle.manifest.model.semantics))
    for name in options.networks:
        variants = _used(bundle, name)
        for _, entry in variants:
            _check_ports(entry, specs[name])
        yield from _verify_network(bundle, sources, specs[name], variants, options.seed)


def engines_not_run(bundle: Bundle, networks: Sequence[str]) -> list[EngineReport]:
    """The compiled engines of some networks; what is compared is the graph that they were compiled from."""
    manifest = bundle.manifest
    reason = next(backend.reason for backend in backends() if backend.name == "tensorrt")
    return [
        EngineReport(key, entry.network, entry.key.gpu_name, reason)
        for key, entry in manifest.engines.items()
        if manifest.networks[entry.network].network in networks
    ]


def corner_sizes(reference: Reference, shape_range: Mapping[str, tuple[int, int]]) -> list[dict[str, int]]:
    """Everything at its smallest, and then each symbol in turn at its largest; less what the reference tries anyway."""
    symbols = reference.sizes[0]
    low = {symbol: max(shape_range[symbol][0], reference.least.get(symbol, 0)) for symbol in symbols}
    high = {symbol: min(shape_range[symbol][1], LARGEST.get(symbol, shape_range[symbol][1])) for symbol in symbols}
    corners = [low, *({**low, symbol: high[symbol]} for symbol in symbols)]
    unique = list({tuple(sizes.values()): sizes for sizes in corners}.values())
    return [sizes for sizes in unique if sizes not in reference.sizes]


def _used(bundle: Bundle, name: str) -> list[tuple[tuple[str, ...], NetworkEntry]]:
    """The variants of a network and the presets that name each."""
    users: dict[str, list[str]] = {}
    for preset, networks in bundle.manifest.presets.items():
        users.setdefault(networks[name], []).append(preset)  # type: ignore[index]
    return [(tuple(presets), bundle.manifest.networks[key]) for key, presets in users.items()]


def _check_ports(entry: NetworkEntry, spec: NetworkSpec) -> None:
    for kind, declared, ports in (("input", entry.inputs, spec.inputs), ("output", entry.outputs, spec.outputs)):
        found = [(tensor.name, tensor.dtype, tensor.shape) for tensor in declared]
        expected = [(port.name, port.dtype, port.shape) for port in ports]
        if found != expected:
            wrong = next((pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]), (found, expected))
            raise ExportError(f"{spec.name}: {kind} {wrong[0]} of the bundle is {wrong[1]} of this model")


def _verify_network(
    bundle: Bundle,
    sources: Sources,
    spec: NetworkSpec,
    variants: Sequence[tuple[tuple[str, ...], NetworkEntry]],
    seed: int,
) -> Generator[VerifyStep]:
    presets = [preset for users, _ in variants for preset in users]
    reference = REFERENCES[spec.name](sources, spec)
    sizes = [*reference.sizes, *corner_sizes(reference, variants[0][1].shape_range)]
    makers = [_single(reference, at, seed + index) for index, at in enumerate(sizes)]
    if spec.name == "video_decoder":
        makers += [_streamed(bundle, reference, spec, chunk, seed) for chunk in _chunks(presets)]
    total, cases = len(makers) * (1 + len(variants)), list[_Case]()
    for make in makers:
        yield VerifyStep(spec.name, len(cases), total)
        cases.append(make())
    # The class takes as much memory as the network.
    del reference, makers
    model = {ref.key: ref for ref in spec.weights.values()}
    done = len(cases)
    for users, entry in variants:
        path, limit = bundle.file(entry.file), limit_of(spec.name, entry.precision)
        rows = weight_rows(spec.name, path, model)
        inputs, outputs = (tuple(tensor.spec() for tensor in ports) for ports in (entry.inputs, entry.outputs))
        runner = open_runner(spec.name, path, inputs, outputs)
        for case in cases:
            yield VerifyStep(spec.name, done, total)
            rows += _compared(spec.name, case, runner, limit)
            done += 1
        key = path.name.removesuffix(path.suffix)
        report = NetworkReport(key, spec.name, entry.precision, users, tuple(rows))
        yield VerifyStep(spec.name, done, total, report)


def _compared(network: str, case: _Case, runner: Runner, limit: Limit) -> list[ParityRow]:
    found = case.run(runner)
    return [parity_row((network, name), case.sizes, found[name], value, limit) for name, value in case.expected.items()]


def _single(reference: Reference, sizes: Mapping[str, int], seed: int) -> Callable[[], _Case]:
    def make() -> _Case:
        feeds = reference.feeds(sizes, seed)
        with torch.no_grad():
            expected = reference.outputs(feeds)
        return _Case(sizes, expected, lambda runner: runner.run(feeds))

    return make


def _chunks(presets: Iterable[str]) -> list[int]:
    """The chunk lengths of some presets, and the smallest that there can be."""
    return sorted({1, *(load_preset(preset).decode_chunk_latents for preset in presets)})


def _streamed(bundle: Bundle, reference: Reference, spec: NetworkSpec, chunk: int, seed: int) -> Callable[[], _Case]:
    """A clip in the runtime's chunks, which together have to be what the class makes of it at once."""
    stream = bundle.manifest.model.stream
    latents = stream.first_chunk_latents + chunk + max(1, chunk - 1)
    sizes = {"n": latents, "h": _STREAM_SIZE[0], "w": _STREAM_SIZE[1]}

    def make() -> _Case:
        latent = reference.feeds(sizes, seed + chunk)["latent"]
        with torch.no_grad():
            frames = reference.outputs({"latent": latent})["frames"]

        def run(runner: Runner) -> Arrays:
            engine: Any = runner
            parts = VideoDecoder(engine, stream, chunk).chunks(latent, len(frames), Fraction(24))
            return {"stream": np.concatenate([part.frames for part in parts])}

        return _Case({**sizes, "chunk": chunk}, {"stream": frames}, run)

    return make
