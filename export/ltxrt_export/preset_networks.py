# SPDX-License-Identifier: Apache-2.0
"""The networks of the presets: every precision that one of them asks for, made from the fp32 networks.

Each variant is run on what the fp32 network was fed for one clip, with its own noise, and compared with what that made
of it.
"""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import onnx

from ltxrt.bundle import Bundle
from ltxrt.engine import Array, Engine
from ltxrt.engine_store import Engines, EngineStore
from ltxrt.errors import ExportError
from ltxrt.manifest import NETWORK_NAMES
from ltxrt.preset import load_presets

from .bundle_writer import BundleWriter
from .changed_weights import ChangedWeights
from .networks.spec import NetworkSpec, axis_of
from .parity import ParityRow, limit_of, open_runner, parity_row, tensor_specs
from .quantize.calibrate import CalibrationOptions, run_clip
from .quantize.calibration import Calibration
from .quantize.clips import CLIPS
from .quantize.half import LAYOUT
from .quantize.precision import PrecisionSettings, apply_precision, fp8_bytes, needed, variants
from .quantize.recording import ObservedEngine

__all__ = ["Backend", "PresetNetworks", "Trial", "VariantStep", "preset_fp8_bytes", "record_trials"]

#: What will run the networks. ONNX Runtime has no BF16 kernels for the CPU, so that there FP16 stands for BF16, and
#: fp32 for what leaves the range of FP16.
Backend = Literal["gpu", "cpu"]

#: Speech and a first frame: every network has its part in it.
_CLIP = CLIPS[1]


@dataclass(frozen=True, slots=True)
class Trial:
    """What a network was fed in fp32, and what it made of it."""

    feeds: Mapping[str, Array]
    outputs: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class VariantStep:
    """Progress: ``done`` of ``total`` variants are made.

    Attributes:
        row: The worst output of the latest one, if it was run.
        notes: A line for each tensor of it that leaves the range of FP16.
    """

    done: int
    total: int
    row: ParityRow | None = None
    notes: tuple[str, ...] = ()


def preset_fp8_bytes(specs: Mapping[str, NetworkSpec]) -> int:
    """Most bytes of FP8 weights that all presets together will take."""
    wanted = needed(load_presets(), bf16=True)
    return sum(fp8_bytes(spec.weights.values(), name, wanted[name]) for name, spec in specs.items())


def record_trials(bundle: Bundle, preset: str, options: CalibrationOptions) -> dict[str, tuple[Trial, ...]]:
    """The first and the last run of each network of a preset in one clip, by network name.

    Its noise is that of no clip of the calibration.

    Raises:
        EngineError: A network does not load or run.
    """
    engines = EngineStore(bundle, backend="onnxruntime-cpu").engines(preset)
    runs: dict[str, list[Trial]] = {name: [] for name in NETWORK_NAMES}

    def observe(engine: Engine, feeds: Mapping[str, Array]) -> dict[str, Array]:
        outputs = engine.run(feeds)
        trial = Trial({name: np.array(value) for name, value in feeds.items()}, outputs)
        runs[engine.name] = [*runs[engine.name][:1], trial]
        return outputs

    observed: dict[str, ObservedEngine] = {}
    for name in NETWORK_NAMES:
        engine: Engine = getattr(engines, name)
        observed[name] = ObservedEngine(name, engine.inputs, engine.outputs, partial(observe, engine))
    run_clip(bundle, Engines(**observed), _CLIP, options, options.seed - 1)
    return {name: tuple(trials) for name, trials in runs.items()}


class PresetNetworks:
    """Makes the variants of one export.

    Args:
        writer: The bundle, with the fp32 networks in it.
        specs: All networks.
        keys: Key of each fp32 network in the bundle.
        calibration: Their ranges.
        backend: What the bundle is for.
        changes: Weights that are not as the checkpoint stores them; those in E4M3 go into FP8 networks as they are.
    """

    def __init__(
        self,
        writer: BundleWriter,
        specs: Mapping[str, NetworkSpec],
        keys: Mapping[str, str],
        calibration: Calibration,
        backend: Backend,
        changes: ChangedWeights | None = None,
    ) -> None:
        self._writer, self._specs, self._keys = writer, specs, keys
        self._bf16 = backend == "gpu"
        scales = {} if changes is None else changes.stored_scales
        self._eight_bit = {} if changes is None else {key: changes.changes[key].source for key in scales}
        self._settings = PrecisionSettings(
            folder=writer.weights_folder,
            location=writer.location,
            calibration=calibration,
            wide="bf16" if self._bf16 else "fp32",
            stored_scales=scales,
            sha256=writer.sha256,
        )

    def make(
        self, trials: Mapping[str, tuple[Trial, ...]] | None
    ) -> Generator[VariantStep, None, dict[str, dict[str, str]]]:
        """Add every variant to the bundle, each once; returns the keys of each preset's networks, by preset and name.

        Args:
            trials: Inputs and fp32 outputs to compare it with (``record_trials``); None leaves it unchecked.

        Raises:
            ExportError: A recipe or the calibration does not fit, or a variant misses its limit.
            EngineError: A variant does not load or run.
            OutputError: The bundle cannot be written.
        """
        presets = load_presets()
        wanted = [
            (name, kind) for name, kinds in needed(presets, bf16=self._bf16).items() for kind in dict.fromkeys(kinds)
        ]
        made: dict[tuple[str, str], str] = {}
        yield VariantStep(0, len(wanted))
        for name, precision in wanted:
            together = frozenset(kind for other, kind in wanted if other == name)
            made[name, precision], notes = self._add(name, precision, together)
            row = None if trials is None else self._check(name, precision, made[name, precision], trials[name])
            yield VariantStep(len(made), len(wanted), row, notes)
        return {
            preset.name: {name: made[name, kind] for name, kind in variants(preset, bf16=self._bf16).items()}
            for preset in presets
        }

    def _add(self, name: str, precision: str, together: frozenset[str]) -> tuple[str, tuple[str, ...]]:
        """Key of the new network, and notes."""
        spec = self._specs[name]
        model = onnx.load(self._writer.path_of(self._keys[name]), load_external_data=False)
        weights = {ref.key: ref for ref in spec.weights.values()} | self._eight_bit
        settings = replace(self._settings, together=together)
        variant = apply_precision(model, name, precision, weights, settings)
        notes = tuple(
            f"{name} {precision}: {excess.tensor} reaches {excess.amax:g}, too much for FP16, and is"
            f" {settings.wide.upper()} ({excess.operator} near {excess.weight})"
            for excess in variant.excesses
            if excess.operator not in LAYOUT  # which only hand on what others made
        )
        return self._writer.add_network(spec, variant.model, precision), notes

    def _check(self, name: str, precision: str, key: str, trials: tuple[Trial, ...]) -> ParityRow:
        """Run a variant on what the fp32 network was fed; its worst output."""
        rows = list(self._rows(name, precision, key, trials))
        worst = max(rows, key=lambda row: row.error / row.limit)
        if not worst.passed:
            raise ExportError(
                f"{worst.network}: {worst.output} at {dict(worst.sizes)} is off from fp32 by {worst.error:.3g}"
                f" {worst.unit}, the limit is {worst.limit:g}"
            )
        return worst

    def _rows(self, name: str, precision: str, key: str, trials: tuple[Trial, ...]) -> Iterator[ParityRow]:
        spec, label = self._specs[name], f"{name} {precision}"
        runner = open_runner(label, self._writer.path_of(key), tensor_specs(spec.inputs), tensor_specs(spec.outputs))
        limit = limit_of(name, precision)
        for trial in trials:
            found, sizes = runner.run(trial.feeds), _sizes(spec, trial.feeds)
            for output, expected in trial.outputs.items():
                yield parity_row((label, output), sizes, found[output], expected, limit)


def _sizes(spec: NetworkSpec, feeds: Mapping[str, Array]) -> dict[str, int]:
    """What the symbols of a network's inputs stand for in ``feeds``."""
    parsed = [
        (axis_of(entry), size)
        for port in spec.inputs
        for entry, size in zip(port.shape, feeds[port.name].shape, strict=True)
    ]
    return {axis[1]: size // axis[0] for axis, size in parsed if axis is not None}
