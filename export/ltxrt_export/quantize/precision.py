# SPDX-License-Identifier: Apache-2.0
"""From a finished fp32 graph to the precision that a preset asks for: the one door of this package for the exporter.

``needed`` says what the presets ask for, ``apply_precision`` makes one of them, ``variants`` maps a preset to
its own::

    for precision in needed(load_presets(), bf16=False)[name]:
        variant = apply_precision(model, name, precision, weights, settings)
        keys[name, precision] = writer.add_network(spec, variant.model, precision)
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

from onnx import ModelProto, TensorProto

from ltxrt.bundle import file_sha256
from ltxrt.errors import ExportError, shown
from ltxrt.preset import Preset
from ltxrt_export.weights import DTYPE_BYTES, TensorRef

from .calibration import Calibration
from .fp8 import SCALE_DTYPES, quantise
from .fp8_weights import FP8_MAX, Fp8Pair, Fp8Request, StoredScale, write_fp8
from .graph import element_types, linears
from .half import to_half
from .ranges import Excess, excesses, wide_nodes
from .recipe import RECIPES, Recipe, Selection, load_recipe

__all__ = ["PrecisionSettings", "Variant", "apply_precision", "fp8_bytes", "needed", "variants"]

Float = Literal["fp32", "fp16", "bf16"]
_FLOAT_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionSettings:
    """What all networks of an export share.

    Attributes:
        folder: Where files of FP8 weights are written; kept between runs they are reused.
        location: Where such a file will lie, relative to the graph (``BundleWriter.location``).
        calibration: Ranges of activations: FP8 needs them, and FP16 without them is not checked for overflow.
        surroundings: Type of everything in an FP8 graph that is not FP8.
        wide: What computes where FP16 would overflow: ``fp32`` where nothing runs BF16.
        together: Precisions that will be made; their FP8 weights share one file.
        stored_scales: Scales of weights that the checkpoint holds in E4M3, by key (``fp8_weights.stored_scales``).
        sha256: Hash of a weight file; give one that remembers (``BundleWriter.sha256``).
    """

    folder: Path
    location: Callable[[Path], str]
    calibration: Calibration | None = None
    surroundings: Float = "fp16"
    wide: Literal["bf16", "fp32"] = "bf16"
    together: frozenset[str] = frozenset()
    stored_scales: Mapping[str, StoredScale] = field(default_factory=dict[str, StoredScale])
    sha256: Callable[[Path], str] = file_sha256


@dataclass(frozen=True, slots=True)
class Variant:
    """A graph in one precision.

    Attributes:
        model: The graph.
        selection: What the FP8 recipe did; None for the other precisions.
        excesses: Tensors beyond FP16, whose nodes compute in ``PrecisionSettings.wide``.
    """

    model: ModelProto
    selection: Selection | None = None
    excesses: tuple[Excess, ...] = ()


def variants(preset: Preset, *, bf16: bool) -> dict[str, str]:
    """The precision of each network for a preset, by network name.

    Args:
        preset: The preset.
        bf16: Whether the backend runs BF16. ONNX Runtime on the CPU does not; FP16 stands in there.

    Raises:
        ExportError: The preset asks for a precision that the network does not come in.
    """
    chosen: dict[str, str] = {}
    for network, precision in preset.precision.items():
        _check(network, precision)
        chosen[network] = "fp16" if precision == "bf16" and not bf16 else precision
    return chosen


def needed(presets: Iterable[Preset], *, bf16: bool) -> dict[str, tuple[str, ...]]:
    """The precisions that some presets ask for together, by network name, each once."""
    table: dict[str, dict[str, None]] = {}
    for preset in presets:
        for network, precision in variants(preset, bf16=bf16).items():
            table.setdefault(network, {})[precision] = None
    return {network: tuple(precisions) for network, precisions in table.items()}


def fp8_bytes(weights: Iterable[TensorRef], network: str, precisions: Iterable[str]) -> int:
    """Most bytes of E4M3 and scales that the recipes among ``precisions`` will write, before there is a graph.

    Args:
        weights: Stored tensors of the network; what is dead in the graph may be among them.
        network: Its name.
        precisions: Any of ``ltxrt.manifest.PRECISIONS``.
    """
    recipes = [load_recipe(network, kind) for kind in precisions if kind in RECIPES.get(network, ())]
    stored = {ref.key: ref for ref in weights if len(ref.shape) == 2}
    chosen = [ref for key, ref in stored.items() if any(recipe.names(key) for recipe in recipes)]
    scale = max(DTYPE_BYTES[name] for name in SCALE_DTYPES.values())
    return sum(prod(ref.shape) + scale * max(ref.shape) for ref in chosen)


def apply_precision(
    model: ModelProto, network: str, precision: str, weights: Mapping[str, TensorRef], settings: PrecisionSettings
) -> Variant:
    """A network's graph in another precision; inputs and outputs keep their types.

    Args:
        model: The finished graph in fp32; not changed, and given back as it is for ``fp32``.
        network: Its name.
        precision: One of ``ltxrt.manifest.PRECISIONS``.
        weights: Stored tensors by checkpoint key, at least those of the linear layers.
        settings: What all networks share.

    Raises:
        ExportError: The network does not come in that precision, a recipe or the calibration does not fit the graph, or
            a weight cannot be converted.
        OutputError: FP8 weights cannot be written.
    """
    _check(network, precision)
    if precision == "fp32":
        return Variant(model)
    eight_bit = precision in RECIPES.get(network, ())
    floats: str = settings.surroundings if eight_bit else precision
    found = _excesses(model, network, settings) if floats == "fp16" else ()
    if floats == "fp32":
        retyped = model
    else:
        wide = wide_nodes(model, found)
        retyped = to_half(model, network, _FLOAT_TYPES[floats], wide, _FLOAT_TYPES[settings.wide])
    if not eight_bit:
        return Variant(retyped, excesses=found)
    selection = load_recipe(network, precision).select(linear.key for linear in linears(retyped.graph))
    selection = _with_stored(selection, retyped, settings)
    pairs = _convert(retyped, network, weights, settings)
    recipe = load_recipe(network, precision)
    chosen = {key: pairs[key] for key in selection.quantised}
    location = settings.location(next(iter(chosen.values())).weight.path)
    finished = quantise(retyped, chosen, _ranges(network, selection, recipe, settings), location)
    return Variant(finished, selection, found)


def _check(network: str, precision: str) -> None:
    allowed = ["fp32", "fp16", "bf16", *RECIPES.get(network, ())]
    if precision not in allowed:
        raise ExportError(f"{network} does not come in {shown(precision)}; allowed: {', '.join(allowed)}")


def _excesses(model: ModelProto, network: str, settings: PrecisionSettings) -> tuple[Excess, ...]:
    if settings.calibration is None or network not in settings.calibration.networks:
        return ()
    return excesses(model, network, settings.calibration.networks[network].large)


def _with_stored(selection: Selection, model: ModelProto, settings: PrecisionSettings) -> Selection:
    """Layers that the checkpoint holds in E4M3 have no 16-bit weights: they are FP8 whatever the recipe says."""
    stored = [linear.key for linear in linears(model.graph) if linear.key in settings.stored_scales]
    quantised = tuple(dict.fromkeys((*selection.quantised, *stored)))
    kept = {key: reason for key, reason in selection.kept.items() if key not in settings.stored_scales}
    return Selection(quantised=quantised, kept=kept, matches=selection.matches)


def _convert(
    model: ModelProto, network: str, weights: Mapping[str, TensorRef], settings: PrecisionSettings
) -> dict[str, Fp8Pair]:
    """Every weight that one of the wanted recipes quantises, in one file."""
    layers = linears(model.graph)
    keys = [linear.key for linear in layers]
    wanted = [kind for kind in RECIPES[network] if kind in settings.together] or list(RECIPES[network])
    selections = [load_recipe(network, kind).select(keys).quantised for kind in wanted]
    chosen = {*settings.stored_scales, *(key for selection in selections for key in selection)}
    types = element_types(model.graph)
    requests = {
        linear.key: Fp8Request(
            weights[linear.key],
            SCALE_DTYPES[types[linear.activation]],
            linear.transposed,
            settings.stored_scales.get(linear.key),
        )
        for linear in layers
        if linear.key in chosen
    }
    return write_fp8(settings.folder, network, list(requests.values()), sha256=settings.sha256)


def _ranges(network: str, selection: Selection, recipe: Recipe, settings: PrecisionSettings) -> dict[str, float]:
    """Calibrated ranges, or where there is no calibration those that the checkpoint states."""
    if settings.calibration is not None:
        return settings.calibration.ranges(network, selection.quantised, recipe.activations)
    stated = {key: scale.activation for key, scale in settings.stored_scales.items()}
    lacking = [key for key in selection.quantised if stated.get(key) is None]
    if lacking:
        raise ExportError(
            f"{network}: FP8 needs the range of the input of {lacking[0]} ({len(lacking)} layers in all):"
            " give a calibration"
        )
    return {key: FP8_MAX * value for key, value in stated.items() if value is not None}
