# SPDX-License-Identifier: Apache-2.0
"""What a safetensors file is, from its header: so that a wrong file is named for what it is.

Files of this family look alike from outside and differ in a few names (Lightricks/LTX-2
packages/ltx-core/src/ltx_core/model/*/model_configurator.py, loader/sd_ops.py, quantization/fp8_cast.py). Only the
dev checkpoint has exactly the tensors of the distilled one; its file name and its size give it away.
"""

import json
import re
from collections.abc import Mapping
from enum import StrEnum
from math import prod
from typing import Any

from ltxrt.errors import ExportError

from . import published
from .weights import TensorFile

__all__ = ["Kind", "is_scale", "kind_of", "require_kind"]


class Kind(StrEnum):
    """Kinds of files, each in the words of an error message."""

    DISTILLED = "the distilled LTX-2.3 checkpoint"
    DEV = "the dev checkpoint of LTX-2.3, which needs about 30 guided steps and not the distilled schedule"
    LTX_20 = "an LTX-2.0 (19B) checkpoint"
    LTX_25 = "a file of LTX-2.5, another architecture in one file per component"
    VIDEO_ONLY = "an LTX-Video checkpoint without an audio stream"
    FP8 = "an fp8 checkpoint without the scales of the published ones, weight_scale and input_scale of each layer"
    LORA = "a LoRA, which only changes a checkpoint"
    UPSAMPLER = "a latent upsampler"
    TEXT_ENCODER = "a part of a text encoder"
    DIFFUSERS = "a part of a folder in the diffusers layout, which is read as a whole: pass that folder"
    UNKNOWN = "a safetensors file of another model"


#: Names of the files that go in the place of each kind.
_WANTED: Mapping[Kind, str] = {
    Kind.DISTILLED: f"the distilled single file, as {published.DISTILLED.name}",
    Kind.UPSAMPLER: f"the x2 spatial upsampler, as {published.UPSAMPLER.name}",
}
_DIT = "model.diffusion_model."
_LORA = re.compile(r"\.(lora_[AB]|lora_down|lora_up|lora_A\.default|lora_B\.default)(\.weight)?$")
#: What Lightricks' FP8 files hold in E4M3, and the scales beside it.
_FP8_LAYER = re.compile(r"model\.diffusion_model\.transformer_blocks\.\d+\..+\.weight")
_SCALES = (".weight_scale", ".input_scale")
_DEV_NAME = re.compile(r"(?:^|[-_. ])dev(?:[-_. ]|$)", re.IGNORECASE)
_UPSAMPLER_KEYS = ("initial_conv.", "upsampler.", "post_upsample_res_blocks.")
_TEXT_KEYS = ("language_model.", "model.language_model.", "model.layers.", "vision_tower.", "model.vision_tower.")
#: Modules of the diffusers classes that the single file has under other names.
_DIFFUSERS_KEYS = (
    "transformer_blocks.",
    "proj_in.",
    "time_embed.",
    "video_connector.",
    "audio_connector.",
    "latents_mean",
    "encoder.",
    "decoder.",
)


def kind_of(file: TensorFile) -> Kind:
    """The kind of a file, from its tensors' names and dtypes, its metadata and, to tell dev from distilled, its name.

    ``DISTILLED`` is said of every checkpoint of the 2.3 architecture that is nothing else.
    """
    names = file.tensors
    if any(_LORA.search(name) for name in names):
        return Kind.LORA
    version = _version(file)
    if version is not None and version[:2] == (2, 5):
        return Kind.LTX_25
    if not _published_fp8(file):
        return Kind.FP8
    if any(name.startswith(_DIT) for name in names):
        return _checkpoint_kind(file, version)
    for prefixes, kind in (
        (_UPSAMPLER_KEYS, Kind.UPSAMPLER),
        (_TEXT_KEYS, Kind.TEXT_ENCODER),
        (_DIFFUSERS_KEYS, Kind.DIFFUSERS),
    ):
        if any(name.startswith(prefixes) for name in names):
            return kind
    return Kind.UNKNOWN


def require_kind(file: TensorFile, wanted: Kind, *also: Kind) -> None:
    """Refuse a file that is recognised as something else than ``wanted`` or one of ``also``.

    Raises:
        ExportError: Naming what the file is, and what belongs in its place.
    """
    kind = kind_of(file)
    if kind not in (wanted, *also, Kind.UNKNOWN):
        raise ExportError(f"{file.path}: this is {kind}; allowed: {_WANTED[wanted]}")


def is_scale(file: TensorFile, key: str) -> bool:
    """Whether a tensor is a scale of a weight that is stored in E4M3."""
    weight = next((f"{key.removesuffix(suffix)}.weight" for suffix in _SCALES if key.endswith(suffix)), "")
    return weight in file.tensors and file.tensors[weight].dtype == "F8_E4M3"


def _published_fp8(file: TensorFile) -> bool:
    """Whether everything in FP8 is as in Lightricks' FP8 files; true of a file that has nothing in FP8.

    Linear layers of the DiT's blocks in E4M3, each with a scalar for its weight and a static one for its input, fp32
    (Lightricks/LTX-2 packages/ltx-core/src/ltx_core/quantization/fp8_scaled_mm.py).
    """
    tensors = file.tensors
    for key, ref in tensors.items():
        if not ref.dtype.startswith("F8_"):
            continue
        layer = key.removesuffix(".weight")
        scales = [tensors.get(f"{layer}{suffix}") for suffix in _SCALES]
        scaled = all(scale is not None and scale.dtype == "F32" and prod(scale.shape) == 1 for scale in scales)
        if not (ref.dtype == "F8_E4M3" and _FP8_LAYER.fullmatch(key) and len(ref.shape) == 2 and scaled):
            return False
    return True


def _checkpoint_kind(file: TensorFile, version: tuple[int, ...] | None) -> Kind:
    if not any(name.startswith(f"{_DIT}audio_patchify_proj.") for name in file.tensors):
        return Kind.VIDEO_ONLY
    gated = any(name.endswith(".to_gate_logits.weight") for name in file.tensors)
    if not gated or (version is not None and version[:2] == (2, 0)):
        return Kind.LTX_20
    size = file.path.stat().st_size
    stem = file.path.stem.lower()
    if size == published.DEV_BYTES or (_DEV_NAME.search(stem) and "distilled" not in stem):
        return Kind.DEV
    return Kind.DISTILLED


def _version(file: TensorFile) -> tuple[int, ...] | None:
    """The leading numbers of ``model_version``; None where there are none."""
    text = file.metadata.get("model_version")
    if text is None:
        config = _config(file)
        text = str(config.get("model_version", ""))
    numbers = re.match(r"\d+(?:[.-]\d+)*", text)
    return tuple(int(number) for number in re.split("[.-]", numbers[0])) if numbers else None


def _config(file: TensorFile) -> Mapping[str, Any]:
    try:
        config = json.loads(file.metadata.get("config", "{}"))
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
