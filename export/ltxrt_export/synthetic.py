# SPDX-License-Identifier: Apache-2.0
"""Full-size model files without weights: the published headers over holes, 70 GB that take no room on disk.

Names, shapes and dtypes come from the same modules and key maps that read the real files; audio decoder and
vocoder, which audio-to-video leaves unread, from the diffusers classes (their stored names are those of
Lightricks/LTX-2 packages/ltx-core/src/ltx_core/model/audio_vae/vocoder.py). Every value reads as zero.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import AutoencoderKLLTX2Audio
from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE
from torch import nn

from ltxrt.errors import OutputError

from . import architecture, keys, published, vae_blocks
from .weights import DTYPE_BYTES

__all__ = ["Layout", "ModelConfigs", "SyntheticModel", "checkpoint_tensors", "write_sparse", "write_synthetic"]

#: Dtype and shape of a stored tensor.
Layout = tuple[str, tuple[int, ...]]

#: Shards are cut where they would pass this, as transformers cuts the published ones.
SHARD_BYTES = 5_000_000_000

#: Module segment -> stored segment of the vocoder.
_VOCODER_SEGMENTS = {
    "act_out": "act_post",
    "conv_in": "conv_pre",
    "conv_out": "conv_post",
    "resnets": "resblocks",
    "upsamplers": "ups",
}


@dataclass(frozen=True, slots=True)
class ModelConfigs:
    """The configurations that decide every shape; by default the published ones.

    Attributes:
        checkpoint: Of the single file, by section.
        text_encoder: ``config.json`` of the Gemma folder.
        upsampler: Of the upsampler's file.
        model_version: Of the single file.
    """

    checkpoint: Mapping[str, Any] = field(default_factory=published.checkpoint_config)
    text_encoder: Mapping[str, Any] = field(default_factory=published.gemma_config)
    upsampler: Mapping[str, Any] = field(default_factory=published.upsampler_config)
    model_version: str = "2.3.0"


@dataclass(frozen=True, slots=True)
class SyntheticModel:
    """The files, as ``Sources.open`` takes them."""

    checkpoint: Path
    text_encoder: Path
    upsampler: Path


def write_synthetic(folder: Path, configs: ModelConfigs | None = None) -> SyntheticModel:
    """Write single file, Gemma folder and upsampler into ``folder``, as sparse files under their published names.

    The single file of the published configuration gets the published size, to the byte: what its metadata holds
    beyond the configuration is filled up with spaces.

    Raises:
        OutputError: A file cannot be written.
    """
    full_size = configs is None
    configs = configs or ModelConfigs()
    model = SyntheticModel(
        folder / published.DISTILLED.name, folder / published.GEMMA.folder, folder / published.UPSAMPLER.name
    )
    metadata = {"model_version": configs.model_version, "config": json.dumps(configs.checkpoint)}
    size = published.DISTILLED.bytes if full_size else None
    write_sparse(model.checkpoint, checkpoint_tensors(configs), metadata, size=size)
    upsampler = _stored(lambda: architecture.upsampler(configs.upsampler), keys.upsampler_keys())
    size = published.UPSAMPLER.bytes if full_size else None
    write_sparse(model.upsampler, upsampler, {"config": json.dumps(configs.upsampler)}, size=size)
    _write_gemma(model.text_encoder, configs.text_encoder)
    return model


def checkpoint_tensors(configs: ModelConfigs) -> dict[str, Layout]:
    """Every tensor of the single file."""
    config = configs.checkpoint
    encoder, decoder = vae_blocks.block_chains(config)
    vae_keys = keys.video_vae_keys(len(encoder.resampling), len(decoder.resampling))
    return {
        **_stored(lambda: architecture.transformer(config), keys.key_map("transformer")),
        **_stored(lambda: architecture.connectors(config, configs.text_encoder), keys.key_map("connectors")),
        **_stored(lambda: architecture.video_vae(config), vae_keys),
        **_stored(lambda: architecture.audio_vae(config), keys.key_map("audio_vae")),
        **_unread(config),
    }


def write_sparse(
    path: Path, tensors: Mapping[str, Layout], metadata: Mapping[str, str], *, size: int | None = None
) -> None:
    """Write a safetensors file that is a header and a hole, in the library's order: wider dtypes first, then by name.

    Args:
        path: Replaced if it is there.
        tensors: Dtype and shape by key.
        metadata: Strings by name.
        size: Of the whole file, reached with spaces in a metadata entry of their own.

    Raises:
        OutputError: It cannot be written.
        ValueError: ``size`` is not one that the format can give these tensors.
    """
    ordered = sorted(tensors, key=lambda key: (-DTYPE_BYTES[tensors[key][0]], key))
    entries: dict[str, Any] = {}
    end = 0
    for key in ordered:
        dtype, shape = tensors[key]
        start, end = end, end + prod(shape) * DTYPE_BYTES[dtype]
        entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = _header(entries, metadata)
    if size is not None:
        missing = size - 8 - end - len(_header(entries, {**metadata, "filler": ""}))
        if missing < 0 or missing % 8:
            raise ValueError(f"{path.name} cannot have {size} bytes: its header would have to grow by {missing}")
        header = _header(entries, {**metadata, "filler": " " * missing})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            os.truncate(file.fileno(), 8 + len(header) + end)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error


def _header(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    encoded = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
    return encoded + b" " * (-len(encoded) % 8)


def _stored(build: Callable[[], nn.Module], key_map: keys.KeyMap) -> dict[str, Layout]:
    with torch.device("meta"):
        state = build().state_dict()
    return {key: (_dtype(key), tuple(value.shape)) for key, value in ((key_map.stored(n), v) for n, v in state.items())}


def _unread(config: Mapping[str, Any]) -> dict[str, Layout]:
    """Audio decoder and vocoder. The vocoder's class has the published one's sizes as its defaults."""
    with torch.device("meta"):
        options = dict(architecture.audio_vae(config).config)
        # The loader's own module leaves the decoder out.
        audio: Any = AutoencoderKLLTX2Audio.from_config(options)
        vocoder = LTX2VocoderWithBWE().state_dict()
    stored = {f"audio_vae.{name}": value for name, value in audio.state_dict().items() if name.startswith("decoder.")}
    for name, value in vocoder.items():
        segments = ".".join(_VOCODER_SEGMENTS.get(segment, segment) for segment in name.split("."))
        stored[f"vocoder.{segments.replace('downsample.filter', 'downsample.lowpass.filter')}"] = value
    return {key: (_dtype(key), tuple(value.shape)) for key, value in stored.items()}


def _dtype(key: str) -> str:
    """bf16, but for the DiT's modulation tables."""
    return "F32" if "scale_shift_table" in key else "BF16"


def _write_gemma(folder: Path, config: Mapping[str, Any]) -> None:
    """The language model in shards, with index, config and a tokenizer of a single word."""
    tensors = _stored(lambda: architecture.text_model(config), keys.gemma_keys())
    shards: list[dict[str, Layout]] = [{}]
    room = SHARD_BYTES
    for key, (dtype, shape) in tensors.items():
        nbytes = prod(shape) * DTYPE_BYTES[dtype]
        if nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][key] = (dtype, shape)
        room -= nbytes
    names = [f"model-{index:05}-of-{len(shards):05}.safetensors" for index in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_sparse(folder / name, shard, {"format": "pt"})
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}}
    for name, content in (
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map}),
        ("config.json", config),
        ("tokenizer.json", tokenizer),
        # transformers' "no limit", as published.
        ("tokenizer_config.json", {"model_max_length": 1000000000000000019884624838656}),
    ):
        try:
            (folder / name).write_text(json.dumps(content))
        except OSError as error:
            raise OutputError(f"{folder / name}: cannot be written ({error.strerror})") from error
