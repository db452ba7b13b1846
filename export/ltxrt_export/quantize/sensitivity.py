# SPDX-License-Identifier: Apache-2.0
"""Which layers FP8 hurts: one group of layers quantised at a time, and what that does to a sampling step.

A group's figure is the relative L2 error of ``latent_next`` over steps of both stages of one calibration clip, against
the fp32 graph. Errors of many layers add up roughly as the root of the sum of squares, so the table shows where 16 bits
buy most. Layers that the recipes keep in 16 bits are measured as well: what they would cost is why they are kept, or
shows that they need not be.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from ltxrt.bundle import Bundle
from ltxrt.engine import Array
from ltxrt.engine_store import EngineStore

from .calibrate import CalibrationOptions, run_clip
from .calibration import Calibration
from .clips import CLIPS
from .fp8 import quantise
from .fp8_weights import Fp8Pair, Fp8Request, write_fp8
from .graph import linears, stored_tensors
from .recipe import RECIPES, load_recipe
from .recording import ObservedEngine, link_weights, open_session

__all__ = ["GROUPINGS", "SensitivityRow", "record_feeds", "sensitivity", "table"]

#: Steps of a clip that are compared: the first, two in the middle and the last of stage 1, first and last of stage 2.
_STEPS = (0, 3, 5, 7, 8, 10)
#: Before every key of the denoiser.
_DIT = "model.diffusion_model."

GROUPINGS: Mapping[str, Callable[[str], str]] = {
    "layer": lambda key: key.removesuffix(".weight"),
    "block": lambda key: re.sub(r"(\.\d+)\..*$", r"\1", key.removeprefix(_DIT).removesuffix(".weight")),
    "kind": lambda key: re.sub(r"^\w+\.\d+\.", "", key.removeprefix(_DIT)).removesuffix(".weight"),
}


@dataclass(frozen=True, slots=True)
class SensitivityRow:
    """One group.

    Attributes:
        group: Its name.
        layers: Linear layers in it.
        quantised: How many of them each recipe of the denoiser quantises, by its precision.
        parameters: Weights in it.
        error: Relative L2 error of the output with this group alone in FP8.
    """

    group: str
    layers: int
    quantised: Mapping[str, int]
    parameters: int
    error: float


def record_feeds(bundle: Bundle, preset: str, clip: int = 1) -> list[dict[str, Array]]:
    """What the denoiser is fed in some steps of a calibration clip."""
    engines = EngineStore(bundle, backend="onnxruntime-cpu").engines(preset)
    seen: list[dict[str, Array]] = []

    def observe(feeds: Mapping[str, Array]) -> dict[str, Array]:
        seen.append({name: np.array(value) for name, value in feeds.items()})
        return engines.denoiser.run(feeds)

    engine = engines.denoiser
    observed = ObservedEngine(engine.name, engine.inputs, engine.outputs, observe)
    run_clip(bundle, replace(engines, denoiser=observed), CLIPS[clip], CalibrationOptions(), seed=1)
    return [seen[step] for step in _STEPS]


def sensitivity(
    graph: Path, calibration: Calibration, feeds: Iterable[Mapping[str, Array]], grouping: str, folder: Path
) -> Iterator[SensitivityRow]:
    """Quantise one group after the other and measure, in graph order.

    Args:
        graph: The denoiser's fp32 graph, its weights beside it.
        calibration: Its ranges.
        feeds: Recorded inputs.
        grouping: Name in ``GROUPINGS``.
        folder: An empty folder to work in, on the file system of ``graph`` if it is large.

    Raises:
        ExportError: The calibration does not fit the graph.
    """
    model = onnx.load(graph, load_external_data=False)
    keys = tuple(dict.fromkeys(linear.key for linear in linears(model.graph)))
    recipes = {precision: load_recipe("denoiser", precision) for precision in RECIPES["denoiser"]}
    chosen = {precision: set(recipe.select(keys).quantised) for precision, recipe in recipes.items()}
    weights = stored_tensors(model, graph.parent)
    link_weights(model, graph.parent, folder)
    pairs = write_fp8(folder, "denoiser", [Fp8Request(weights[key], "F32") for key in keys])
    amax = calibration.ranges("denoiser", keys, "amax")
    feeds = list(feeds)
    expected = _outputs(model, folder, feeds)
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(GROUPINGS[grouping](key), []).append(key)
    for name, members in groups.items():
        variant = _quantised(model, {key: pairs[key] for key in members}, amax)
        error = _error(_outputs(variant, folder, feeds), expected)
        quantised = {precision: len(found.intersection(members)) for precision, found in chosen.items()}
        yield SensitivityRow(name, len(members), quantised, sum(prod(weights[key].shape) for key in members), error)


def table(rows: Iterable[SensitivityRow]) -> str:
    """The rows as text, most sensitive first; below each recipe's name, how many of the layers it quantises."""
    ordered = sorted(rows, key=lambda row: -row.error)
    width = max((len(row.group) for row in ordered), default=5)
    recipes = "  ".join(RECIPES["denoiser"])
    lines = [f"{'group':{width}}  layers  {recipes}  parameters      error"]
    for row in ordered:
        counts = "  ".join(f"{row.quantised[name]:{len(name)}}" for name in RECIPES["denoiser"])
        lines.append(f"{row.group:{width}}  {row.layers:6}  {counts}  {row.parameters:10}  {row.error:9.2e}")
    return "\n".join(lines)


def _quantised(model: ModelProto, pairs: Mapping[str, Fp8Pair], amax: Mapping[str, float]) -> ModelProto:
    location = next(iter(pairs.values())).weight.path.name
    return quantise(model, pairs, amax, location)


def _outputs(model: ModelProto, folder: Path, feeds: Iterable[Mapping[str, Array]]) -> list[Array]:
    session = open_session(model, folder)
    return [np.asarray(session.run(["latent_next"], dict(feed))[0], np.float64) for feed in feeds]


def _error(found: list[Array], expected: list[Array]) -> float:
    """Root mean square of the steps' relative errors."""
    squares = [(np.linalg.norm(a - b) / np.linalg.norm(b)) ** 2 for a, b in zip(found, expected, strict=True)]
    return float(np.sqrt(np.mean(squares)))
