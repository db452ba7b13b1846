# SPDX-License-Identifier: Apache-2.0
"""LoRAs: low-rank changes of a checkpoint's weights, fused before anything is quantised.

A published file holds ``lora_A`` [rank, in] and ``lora_B`` [out, rank] of each layer that it changes, under the layer's
name in the checkpoint or in diffusers, and means W + scale * (alpha / rank) * B @ A. Where no ``alpha`` is stored it
equals the rank (Lightricks/LTX-2 packages/ltx-core/src/ltx_core/loader/fuse_loras.py, sd_ops.py; huggingface/diffusers
src/diffusers/loaders/lora_conversion_utils.py). Every key has to be understood: a part of a LoRA would be another one.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ltxrt.errors import ExportError, shown

from . import keys
from .changed_weights import Change, ChangedWeights, Delta, read_values
from .checkpoint import Checkpoint
from .kinds import Kind, kind_of
from .quantize.fp8_weights import stored_scales
from .weights import TensorFile, TensorRef, few

__all__ = ["Lora", "LoraFile", "changed", "makes_distilled"]

_KEY = re.compile(r"(?P<layer>.+?)\.(?P<part>lora_A|lora_B|lora_down|lora_up|alpha)(?:\.default)?(?:\.weight)?")
_PARTS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha"}
#: Before the layer's name in the checkpoint; what PEFT puts before everything may come first.
_PEFT = "base_model.model."
_DIT = "model.diffusion_model."
_OF_THE_CHECKPOINT = ("model.diffusion_model.", "diffusion_model.")
_OF_DIFFUSERS = "transformer."
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA as the user names it: its file, and how much of it."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "LoraFile":
        """``FILE:SCALE``, or ``FILE`` for scale 1.

        Raises:
            ExportError: The scale is not finite.
        """
        path, colon, number = text.rpartition(":")
        try:
            scale = float(number) if colon else 1.0
        except ValueError:
            return cls(Path(text))  # a colon of the file's name
        if not math.isfinite(scale):
            raise ExportError(f"--lora: {shown(text)} has the scale {number}; allowed: FILE:SCALE with a finite number")
        return cls(Path(path) if colon else Path(text), scale)


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA whose every tensor has its place in a checkpoint.

    Attributes:
        path: Its file.
        scale: How much of it.
        deltas: What it adds, by checkpoint key.
    """

    path: Path
    scale: float
    deltas: Mapping[str, Delta]

    @classmethod
    def open(cls, given: LoraFile, checkpoint: Checkpoint) -> "Lora":
        """Read the header and find the weight behind every tensor.

        Raises:
            ExportError: The file is missing, damaged or no LoRA, or does not fit the checkpoint: a tensor that is not
                understood, a layer that is not there or is of other sizes, half a pair, two ranks in one.
        """
        file = TensorFile.open(given.path)
        kind = kind_of(file)
        if kind is not Kind.LORA:
            raise ExportError(f"{given.path}: this is {kind}; allowed: a LoRA, with lora_A and lora_B of each layer")
        deltas = {
            key: _delta(given, key, parts, checkpoint.file.tensors[key])
            for key, parts in _by_weight(file, checkpoint).items()
        }
        return cls(given.path, given.scale, deltas)


def makes_distilled(loras: Iterable[LoraFile]) -> bool:
    """Whether one of them turns the dev checkpoint into a distilled one, which its name alone tells."""
    return any("distilled" in lora.path.stem.lower() and lora.scale for lora in loras)


def changed(checkpoint: Checkpoint, loras: Sequence[Lora], folder: Path) -> tuple[Checkpoint, ChangedWeights | None]:
    """The checkpoint with LoRAs fused and nothing in E4M3, and the file in ``folder`` that this takes, to be written.

    Raises:
        ExportError: A scale of an FP8 checkpoint cannot be read.
    """
    scales = stored_scales(checkpoint.file)
    touched = {*scales, *(key for lora in loras for key in lora.deltas)}
    changes = {
        key: Change(ref, scales.get(key), tuple(lora.deltas[key] for lora in loras if key in lora.deltas))
        for key, ref in checkpoint.file.tensors.items()
        if key in touched
    }
    if not changes:
        return checkpoint, None
    weights = ChangedWeights.plan(folder / f"{checkpoint.name}-changed.safetensors", changes)
    return checkpoint.with_changed(weights.refs), weights


def _by_weight(file: TensorFile, checkpoint: Checkpoint) -> dict[str, dict[str, TensorRef]]:
    """The parts ``down``, ``up`` and ``alpha`` of each weight, by the weight's checkpoint key."""
    found: dict[str, dict[str, TensorRef]] = {}
    strange: list[str] = []
    homeless: list[str] = []
    for name, ref in file.tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            strange.append(name)
            continue
        key = _checkpoint_key(match["layer"], checkpoint)
        if key is None:
            homeless.append(name)
            continue
        parts, part = found.setdefault(key, {}), _PARTS[match["part"]]
        if part in parts:
            raise ExportError(f"{file.path}: {name} and {parts[part].key} are both for {key}")
        parts[part] = ref
    if strange:
        raise ExportError(
            f"{file.path}: {len(strange)} tensors are no part of a plain LoRA ({few(strange)});"
            " allowed: lora_A, lora_B and alpha of each layer"
        )
    if homeless:
        raise ExportError(
            f"{file.path}: {len(homeless)} tensors are for layers that {checkpoint.path.name} does not have"
            f" ({few(homeless)}); allowed: a LoRA of LTX-2.3"
        )
    return found


def _checkpoint_key(layer: str, checkpoint: Checkpoint) -> str | None:
    """The key of a layer's weight; None where there is none."""
    weight = f"{layer.removeprefix(_PEFT)}.weight"
    candidates = [_DIT + weight.removeprefix(prefix) for prefix in _OF_THE_CHECKPOINT if weight.startswith(prefix)]
    if weight.startswith(_OF_DIFFUSERS):
        name = weight.removeprefix(_OF_DIFFUSERS)
        candidates += [keys.key_map("transformer").stored(name), _DIT + name]
    return next((key for key in candidates if key in checkpoint.file.tensors), None)


def _delta(given: LoraFile, key: str, parts: Mapping[str, TensorRef], weight: TensorRef) -> Delta:
    """The checked change of one weight."""
    path, lacking = given.path, {"down", "up"} - parts.keys()
    if lacking:
        names = {"down": "lora_A", "up": "lora_B"}
        raise ExportError(f"{path}: {key} has no {names[lacking.pop()]}; allowed: lora_A and lora_B together")
    down, up = parts["down"], parts["up"]
    for ref in (down, up):
        if ref.dtype not in _FLOATS or len(ref.shape) != 2:
            raise ExportError(
                f"{path}: {ref.key} is {ref.dtype}{list(ref.shape)}; allowed: a matrix of {', '.join(_FLOATS)}"
            )
    if len(weight.shape) != 2:
        raise ExportError(f"{path}: {key} is {list(weight.shape)}, which no LoRA can change; allowed: linear layers")
    rank = down.shape[0]
    if up.shape[1] != rank or not rank:
        raise ExportError(f"{path}: {up.key} is of rank {up.shape[1]} and {down.key} of rank {rank}")
    if (up.shape[0], down.shape[1]) != weight.shape:
        raise ExportError(
            f"{path}: {down.key} and {up.key} change a weight {[up.shape[0], down.shape[1]]};"
            f" {key} is {list(weight.shape)}"
        )
    return Delta(down, up, given.scale * _alpha(parts.get("alpha"), rank) / rank)


def _alpha(ref: TensorRef | None, rank: int) -> float:
    if ref is None:
        return float(rank)
    values = read_values(ref).reshape(-1)
    if len(values) != 1 or not math.isfinite(values[0]):
        raise ExportError(f"{ref.path}: {ref.key} is {values[:4].tolist()}; allowed: one finite number")
    return float(values[0])
