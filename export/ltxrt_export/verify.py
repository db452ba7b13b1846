# SPDX-License-Identifier: Apache-2.0
"""Every network of a bundle against the torch class that it came from, in every precision that a preset names.

For each network the class runs first, on fresh random inputs: at sizes that tracing never saw, at the corners of what
the bundle allows, and for the video decoder as the stream that the runtime makes of it. Then it is dropped, and each
variant of the network runs on the same inputs; so the two are never in memory together. The weights that a graph reads
are compared with the model's as well, one by one. Engines that were compiled for this machine run as well, at the
corners of their profiles.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ltxrt.bundle import Bundle
from ltxrt.decode import VideoDecoder
from ltxrt.errors import ExportError
from ltxrt.manifest import NETWORK_NAMES, NetworkEntry
from ltxrt.preset import load_preset

from .exporter import Sources, network_specs
from .networks.denoiser import Semantics
from .networks.spec import NetworkSpec
from .parity import Limit, ParityRow, Runner, limit_of, open_runner, parity_row
from .references import REFERENCES, Reference
from .verify_engines import CompiledNetwork, compiled_networks, feed_sizes, serves, stream_sizes
from .weight_check import weight_rows

__all__ = ["LARGEST", "NetworkReport", "VerifyOptions", "VerifyStep", "corner_sizes", "verify_bundle"]

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
        engine: Key of the engine that was run; empty for the graph.
    """

    key: str
    network: str
    precision: str
    presets: tuple[str, ...]
    rows: tuple[ParityRow, ...]
    engine: str = ""

    @property
    def passed(self) -> bool:
        """Whether every comparison is within its limit, and there is one."""
        return bool(self.rows) and all(row.passed for row in self.rows)


@dataclass(frozen=True, slots=True)
class VerifyStep:
    """Progress: ``done`` of ``total`` runs of a network, and the report of a variant that is finished."""

    network: str
    done: int
    total: int
    report: NetworkReport | None = None


@dataclass(frozen=True, slots=True)
class _Case:
    """Something to run, and what the class makes of it.

    Attributes:
        sizes: For people.
        expected: By output.
        run: Gives the same of an engine.
        calls: The sizes of every symbol at each call of the network.
        engines_only: It is there for the profiles of engines.
    """

    sizes: Mapping[str, int]
    expected: Arrays
    run: Callable[[Runner], Arrays] = field(repr=False)
    calls: list[Mapping[str, int]]
    engines_only: bool = False


@dataclass(frozen=True, slots=True)
class _Variant:
    """A network in one precision, who uses it, and what was compiled from it for this machine."""

    key: str
    presets: tuple[str, ...]
    entry: NetworkEntry
    engine: CompiledNetwork | None

    def open(self, bundle: Bundle) -> Runner:
        """The graph on the CPU."""
        inputs, outputs = (tuple(tensor.spec() for tensor in side) for side in (self.entry.inputs, self.entry.outputs))
        return open_runner(self.entry.network, bundle.file(self.entry.file), inputs, outputs)


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
        for variant in variants:
            _check_ports(variant.entry, specs[name])
        yield from _verify_network(bundle, sources, specs[name], variants, options.seed)


def corner_sizes(reference: Reference, shape_range: Mapping[str, tuple[int, int]]) -> list[dict[str, int]]:
    """Everything at its smallest, and then each symbol in turn at its largest; less what the reference tries anyway."""
    symbols = reference.sizes[0]
    low = {symbol: max(shape_range[symbol][0], reference.least.get(symbol, 0)) for symbol in symbols}
    high = {symbol: min(shape_range[symbol][1], LARGEST.get(symbol, shape_range[symbol][1])) for symbol in symbols}
    corners = [low, *({**low, symbol: high[symbol]} for symbol in symbols)]
    unique = list({tuple(sizes.values()): sizes for sizes in corners}.values())
    return [sizes for sizes in unique if sizes not in reference.sizes]


def _used(bundle: Bundle, name: str) -> list[_Variant]:
    """The variants of a network that presets name, and what was compiled from them for this machine."""
    users: dict[str, list[str]] = {}
    for preset, networks in bundle.manifest.presets.items():
        users.setdefault(networks[name], []).append(preset)  # type: ignore[index]
    compiled = compiled_networks(bundle)
    return [
        _Variant(key, tuple(presets), bundle.manifest.networks[key], compiled.get(key))
        for key, presets in users.items()
    ]


def _check_ports(entry: NetworkEntry, spec: NetworkSpec) -> None:
    for kind, declared, ports in (("input", entry.inputs, spec.inputs), ("output", entry.outputs, spec.outputs)):
        found = [(tensor.name, tensor.dtype, tensor.shape) for tensor in declared]
        expected = [(port.name, port.dtype, port.shape) for port in ports]
        if found != expected:
            wrong = next((pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]), (found, expected))
            raise ExportError(f"{spec.name}: {kind} {wrong[0]} of the bundle is {wrong[1]} of this model")


def _verify_network(
    bundle: Bundle, sources: Sources, spec: NetworkSpec, variants: Sequence[_Variant], seed: int
) -> Generator[VerifyStep]:
    makers = list(_makers(bundle, REFERENCES[spec.name](sources, spec), variants, seed))
    runs = [(variant, engine) for variant in variants for engine in (None, variant.engine)[: 1 + bool(variant.engine)]]
    total, cases = len(makers) * (1 + len(runs)), list[_Case]()
    # A maker holds the class, which takes as much memory as the network.
    while makers:
        yield VerifyStep(spec.name, len(cases), total)
        cases.append(makers.pop(0)())
    model = {ref.key: ref for ref in spec.weights.values()}
    done = len(cases)
    for variant, engine in runs:
        rows = weight_rows(spec.name, bundle.file(variant.entry.file), model) if engine is None else []
        runner = variant.open(bundle) if engine is None else engine.load()
        limit = limit_of(spec.name, variant.entry.precision)
        for case in cases:
            yield VerifyStep(spec.name, done, total)
            if not case.engines_only if engine is None else serves(engine.entry.key, case.calls):
                rows += _compared(spec.name, case, runner, limit)
            done += 1
        key, name = variant.key, "" if engine is None else engine.key
        report = NetworkReport(key, spec.name, variant.entry.precision, variant.presets, tuple(rows), name)
        yield VerifyStep(spec.name, done, total, report)


def _makers(
    bundle: Bundle, reference: Reference, variants: Sequence[_Variant], seed: int
) -> Iterator[Callable[[], _Case]]:
    """What to run: for graphs and engines alike, and then what only the profiles of engines ask for."""
    entry = variants[0].entry
    sizes = [*reference.sizes, *corner_sizes(reference, entry.shape_range)]
    chunks = _chunks([preset for variant in variants for preset in variant.presets])
    streams = [(_STREAM_SIZE, chunk) for chunk in chunks] if entry.network == "video_decoder" else []
    more_sizes, more_streams = list[Mapping[str, int]](), list[tuple[tuple[int, int], int]]()
    for profile in (profile for variant in variants if variant.engine for profile in variant.engine.entry.key.profiles):
        box = {symbol: (low, high) for symbol, (low, _, high) in profile.sizes.items()}
        more_sizes += [at for at in corner_sizes(reference, box) if at not in sizes and at not in more_sizes]
        if streams:
            canvas = box["h"][0], box["w"][0]
            more_streams += [(canvas, chunk) for chunk in chunks if (canvas, chunk) not in (*streams, *more_streams)]
    for index, at in enumerate((*sizes, *more_sizes)):
        yield _single(reference, entry, at, seed + index, engines_only=index >= len(sizes))
    for index, (canvas, chunk) in enumerate((*streams, *more_streams)):
        yield _streamed(bundle, reference, (canvas, chunk), seed, engines_only=index >= len(streams))


def _compared(network: str, case: _Case, runner: Runner, limit: Limit) -> list[ParityRow]:
    found = case.run(runner)
    return [parity_row((network, name), case.sizes, found[name], value, limit) for name, value in case.expected.items()]


def _single(
    reference: Reference, entry: NetworkEntry, sizes: Mapping[str, int], seed: int, *, engines_only: bool
) -> Callable[[], _Case]:
    def make() -> _Case:
        feeds = reference.feeds(sizes, seed)
        with torch.no_grad():
            expected = reference.outputs(feeds)
        return _Case(sizes, expected, lambda runner: runner.run(feeds), [feed_sizes(entry, feeds)], engines_only)

    return make


def _chunks(presets: Iterable[str]) -> list[int]:
    """The chunk lengths of some presets, and the smallest that there can be."""
    return sorted({1, *(load_preset(preset).decode_chunk_latents for preset in presets)})


def _streamed(
    bundle: Bundle, reference: Reference, at: tuple[tuple[int, int], int], seed: int, *, engines_only: bool
) -> Callable[[], _Case]:
    """A clip in the runtime's chunks, which together have to be what the class makes of it at once."""
    stream = bundle.manifest.model.stream
    canvas, chunk = at
    first = stream.first_chunk_latents
    latents = first + chunk + max(1, chunk - 1)
    sizes = {"n": latents, "h": canvas[0], "w": canvas[1]}

    def make() -> _Case:
        latent = reference.feeds(sizes, seed + chunk)["latent"]
        with torch.no_grad():
            frames = reference.outputs({"latent": latent})["frames"]

        def run(runner: Runner) -> Arrays:
            engine: Any = runner
            parts = VideoDecoder(engine, stream, chunk).chunks(latent, len(frames), Fraction(24))
            return {"stream": np.concatenate([part.frames for part in parts])}

        calls = stream_sizes(latents, first, chunk, canvas)
        return _Case({**sizes, "chunk": chunk}, {"stream": frames}, run, calls, engines_only)

    return make
