# SPDX-License-Identifier: Apache-2.0
"""Writes the tiny model as the 22B one is published: single file, Gemma folder, upsampler file."""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ltxrt.errors import ExportError
from ltxrt_export import architecture, keys, vae_blocks
from ltxrt_export.tiny.captions import tokenizer_corpus
from ltxrt_export.tiny.config import (
    CONTEXT_TOKENS,
    MODEL_VERSION,
    checkpoint_config,
    gemma_config,
    upsampler_config,
)
from ltxrt_export.tiny.corpus import prompts
from ltxrt_export.tiny.tokenizer import VOCABULARY, tokenizer_config, tokenizer_json
from ltxrt_export.tiny.weights import random_tensor

__all__ = ["TinyPaths", "write_safetensors", "write_tiny"]

_LICENSE = "Apache-2.0. Made by the ltxrt project: a model of the LTX-2.3 architecture with weights of its own."

#: State dicts by component.
Trained = Mapping[str, Mapping[str, torch.Tensor]]

_DTYPE_NAMES = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16"}


@dataclass(frozen=True, slots=True)
class TinyPaths:
    """What ``write_tiny`` wrote: the single file, the Gemma folder and the upsampler file."""

    checkpoint: Path
    text_encoder: Path
    upsampler: Path


def write_tiny(folder: Path, seed: int = 0, trained: Trained | None = None) -> TinyPaths:
    """Write the tiny model into ``folder``.

    Args:
        folder: Where to; made if it is not there.
        seed: Of random weights: the same bytes for the same seed, everywhere.
        trained: State dicts to write instead, by component; the tokenizer then knows the captions of the drawn world.

    Raises:
        ExportError: A file cannot be written.
    """
    paths = TinyPaths(
        folder / "ltx-2.3-tiny.safetensors", folder / "gemma", folder / "ltx-2.3-tiny-upscaler.safetensors"
    )
    try:
        paths.text_encoder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{paths.text_encoder}: cannot be made: {error.strerror}") from error
    source = _Source(seed, trained)
    _write_checkpoint(paths.checkpoint, source)
    _write_gemma(paths.text_encoder, source)
    config = upsampler_config()
    tensors = source.tensors("upsampler", lambda: architecture.upsampler(config), keys.upsampler_keys())
    write_safetensors(paths.upsampler, tensors, _metadata(config))
    return paths


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write float32 and bfloat16 tensors as a safetensors file, the wider first so that all stay aligned.

    The safetensors library orders the metadata by a random hash; this writer is deterministic.

    Raises:
        ExportError: The file cannot be written; nothing is left then.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, array in ordered:
        header[key] = {
            "dtype": _DTYPE_NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    _write(path, [struct.pack("<Q", len(encoded)), encoded, *(array.tobytes() for _, array in ordered)])


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the values come from."""

    seed: int
    trained: Trained | None

    def tensors(self, name: str, build: Callable[[], nn.Module], key_map: keys.KeyMap) -> dict[str, NDArray[Any]]:
        """The weights of a component under their stored keys, in the published dtypes."""
        if self.trained is not None:
            state = self.trained[name]
            arrays = {key_map.stored(entry): value.detach().float().cpu().numpy() for entry, value in state.items()}
        else:
            with torch.device("meta"):
                shapes = {key_map.stored(entry): tuple(value.shape) for entry, value in build().state_dict().items()}
            arrays = {key: random_tensor(key, shape, self.seed) for key, shape in shapes.items()}
        return {key: array.astype(_dtype(key)) for key, array in arrays.items()}

    def corpus(self) -> tuple[str, ...]:
        """What the tokenizer is made from."""
        return tuple(prompts()) if self.trained is None else (*prompts(), *tokenizer_corpus())


def _write_checkpoint(path: Path, source: _Source) -> None:
    config = checkpoint_config()
    gemma = gemma_config(VOCABULARY)
    encoder, decoder = vae_blocks.block_chains(config)
    builders: Mapping[str, Callable[[], nn.Module]] = {
        "transformer": lambda: architecture.transformer(config),
        "connectors": lambda: architecture.connectors(config, gemma),
        "audio_vae": lambda: architecture.audio_vae(config),
    }
    tensors: dict[str, NDArray[Any]] = {}
    for name, build in builders.items():
        tensors |= source.tensors(name, build, keys.key_map(name))
    vae_keys = keys.video_vae_keys(len(encoder.resampling), len(decoder.resampling))
    tensors |= source.tensors("video_vae", lambda: architecture.video_vae(config), vae_keys)
    write_safetensors(path, tensors, {**_metadata(config), "model_version": MODEL_VERSION})


def _write_gemma(folder: Path, source: _Source) -> None:
    config = gemma_config(VOCABULARY)
    tensors = source.tensors("text_model", lambda: architecture.text_model(config), keys.gemma_keys())
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt", "license": _LICENSE})
    for name, content in (
        ("config.json", config),
        ("tokenizer.json", tokenizer_json(source.corpus())),
        ("tokenizer_config.json", tokenizer_config(CONTEXT_TOKENS)),
    ):
        _write(folder / name, [json.dumps(content, indent=1, ensure_ascii=False).encode(), b"\n"])


def _dtype(key: str) -> np.dtype[Any]:
    """bf16, except the DiT's modulation tables, which are published in fp32."""
    return np.dtype(np.float32 if "scale_shift_table" in key else ml_dtypes.bfloat16)


def _metadata(config: Mapping[str, Any]) -> dict[str, str]:
    return {"config": json.dumps(config), "license": _LICENSE}


def _write(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file under a temporary name and move it into place."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.writelines(parts)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ExportError(f"{path}: cannot be written: {error.strerror}") from error
