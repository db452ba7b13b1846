# SPDX-License-Identifier: Apache-2.0
"""A folder in the converted diffusers layout, opened as the single file, the Gemma folder and the upsampler are.

Each component has a ``config.json`` and its weights, in one file or shards, under the module's own names. The sizes
in the configs are put into the published configuration, the modules are built from that, and what they say of
themselves has to be what the folder says: so the rules of ``architecture`` hold for both layouts, and a setting that
is not a size is refused by name. Tensors stay where they are and keep their names
(huggingface/diffusers scripts/convert_ltx2_to_diffusers.py).
"""

import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ltxrt.errors import ExportError, shown

from . import architecture, keys, published
from .checkpoint import Checkpoint, Gemma, Upsampler
from .kinds import Kind
from .section import Section
from .vae_blocks import block_chains
from .weights import TensorFile, TensorRef, folder_tensors, read_json

__all__ = ["is_diffusers_folder", "open_checkpoint", "open_text_encoder", "open_upsampler"]

_WEIGHTS = "diffusion_pytorch_model"
#: Folder -> component, in the order of ``keys.COMPONENTS``.
_FOLDERS = {"transformer": "transformer", "connectors": "connectors", "vae": "video_vae", "audio_vae": "audio_vae"}
#: Module prefixes that audio-to-video never reads.
_UNREAD = {"audio_vae": ("decoder.",)}
_UPSAMPLER = "latent_upsampler"
_RESAMPLING = {"temporal": "compress_time", "spatial": "compress_space", "spatiotemporal": "compress_all"}
_VERSION = "2.3.0"


def is_diffusers_folder(path: Path) -> bool:
    """Whether this is a folder with a transformer in the diffusers layout."""
    return (path / "transformer" / "config.json").is_file()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Transformer, connectors and VAEs of a folder as a checkpoint: the published keys, each with its stored tensor.

    Raises:
        ExportError: A file is missing or damaged, or a config differs from LTX-2.3 in anything but size.
    """
    _check_distilled(folder)
    given = {name: read_json(folder / name / "config.json") for name in _FOLDERS}
    config = _checkpoint_config(folder, given)
    tensors: dict[str, TensorRef] = {}
    for name, component in _FOLDERS.items():
        key_map = _key_map(component, config)
        for key, ref in folder_tensors(folder / name, _WEIGHTS).items():
            if not key.startswith(_UNREAD.get(component, ())):
                tensors[_published_key(key_map, key, ref)] = ref
    architecture.check_widths(config)
    checkpoint = Checkpoint(folder, _VERSION, config, TensorFile(folder, {}, tensors))
    for name, component in _FOLDERS.items():
        with torch.device("meta"):
            built: Any = checkpoint.component(component).build()
        _check_config(folder / name / "config.json", given[name], built)
    return checkpoint


def open_text_encoder(folder: Path) -> Gemma:
    """The text encoder of a folder, whose tokenizer is a folder of its own.

    Raises:
        ExportError: A file is missing or damaged.
    """
    return Gemma.open(folder / "text_encoder", folder / "tokenizer")


def open_upsampler(folder: Path) -> Upsampler:
    """The upsampler of a folder, or the folder that holds nothing else.

    Raises:
        ExportError: A file is missing or damaged, or it is another upsampler.
    """
    path = folder / _UPSAMPLER if (folder / _UPSAMPLER).is_dir() else folder
    given = read_json(path / "config.json")
    section = Section(str(path / "config.json"), given)
    config = published.upsampler_config() | {
        key: section.size(key) for key in ("in_channels", "mid_channels", "num_blocks_per_stage")
    }
    with torch.device("meta"):
        _check_config(path / "config.json", given, architecture.upsampler(config))
    return Upsampler(path, config, TensorFile(path, {}, folder_tensors(path, _WEIGHTS)))


def _check_distilled(folder: Path) -> None:
    """The scheduler is the only part that tells dev and distilled apart."""
    path = folder / "scheduler" / "scheduler_config.json"
    if path.is_file() and read_json(path).get("use_dynamic_shifting") is True:
        raise ExportError(f"{folder}: this is {Kind.DEV}; allowed: a folder of the distilled model")


def _published_key(key_map: keys.KeyMap, key: str, ref: TensorRef) -> str:
    try:
        return key_map.stored(key)
    except KeyError as error:
        raise ExportError(f"{ref.path}: {key} is no tensor of LTX-2.3") from error


def _key_map(component: str, config: Mapping[str, Any]) -> keys.KeyMap:
    if component != "video_vae":
        return keys.key_map(component)
    encoder, decoder = block_chains(config)
    return keys.video_vae_keys(len(encoder.resampling), len(decoder.resampling))


def _checkpoint_config(folder: Path, given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The published configuration with the sizes of the folder's."""
    config = published.checkpoint_config()
    dit, connectors, vae, audio = (Section(str(folder / name / "config.json"), given[name]) for name in _FOLDERS)
    sizes = config["transformer"]
    for key in (
        "in_channels",
        "out_channels",
        "num_attention_heads",
        "attention_head_dim",
        "cross_attention_dim",
        "audio_in_channels",
        "audio_out_channels",
        "audio_num_attention_heads",
        "audio_attention_head_dim",
        "audio_cross_attention_dim",
        "num_layers",
    ):
        sizes[key] = dit.size(key)
    sizes |= {
        "norm_eps": dit.number("norm_eps"),
        "positional_embedding_theta": dit.number("rope_theta"),
        "positional_embedding_max_pos": [dit.size(k) for k in ("pos_embed_max_pos", "base_height", "base_width")],
        "audio_positional_embedding_max_pos": [dit.size("audio_pos_embed_max_pos")],
        "timestep_scale_multiplier": dit.whole("timestep_scale_multiplier"),
        "av_ca_timestep_scale_multiplier": dit.whole("cross_attn_timestep_scale_multiplier"),
        "caption_channels": connectors.size("caption_channels"),
        "connector_num_layers": connectors.size("video_connector_num_layers"),
        "connector_num_attention_heads": connectors.size("video_connector_num_attention_heads"),
        "connector_attention_head_dim": connectors.size("video_connector_attention_head_dim"),
        "connector_num_learnable_registers": connectors.size("video_connector_num_learnable_registers"),
        "connector_positional_embedding_max_pos": [connectors.size("connector_rope_base_seq_len")],
        "audio_connector_num_layers": connectors.size("audio_connector_num_layers"),
        "audio_connector_num_attention_heads": connectors.size("audio_connector_num_attention_heads"),
        "audio_connector_attention_head_dim": connectors.size("audio_connector_attention_head_dim"),
    }
    config["vae"] |= _vae_blocks(vae)
    config["audio_vae"]["model"]["params"]["ddconfig"] |= {
        "ch": audio.size("base_channels"),
        "ch_mult": audio.required("ch_mult"),
        "num_res_blocks": audio.size("num_res_blocks"),
        "resolution": audio.size("resolution"),
        "z_channels": audio.size("latent_channels"),
    }
    return config


def _vae_blocks(section: Section) -> dict[str, Any]:
    """The block lists that give the widths of a diffusers config (the inverse of ``vae_blocks.video_vae_options``)."""
    down, up = _resampling(section, "downsample_type"), _resampling(section, "upsample_type")
    latents = section.size("latent_channels")
    widths = (latents, *section.sizes("block_out_channels", len(down)))
    factors = section.sizes("upsample_factor", len(up))
    decoder_widths = section.sizes("decoder_block_out_channels", len(up))
    return {
        "latent_channels": latents,
        "encoder_base_channels": latents,
        "decoder_base_channels": decoder_widths[0] // factors[0],
        "encoder_blocks": _blocks(
            section.sizes("layers_per_block", len(down) + 1),
            [f"{name}_res" for name in down],
            [after // before for before, after in pairwise(widths)],
        ),
        # Listed output side first, as the class takes all of these but the types.
        "decoder_blocks": _blocks(section.sizes("decoder_layers_per_block", len(up) + 1), up[::-1], factors),
    }


def _resampling(section: Section, key: str) -> list[str]:
    """The resampling blocks that a list of types stands for."""
    kinds = section.required(key)
    if not isinstance(kinds, list) or not kinds or not all(kind in list(_RESAMPLING) for kind in kinds):
        raise section.refuse(key, f"a list of {', '.join(_RESAMPLING)}")
    return [_RESAMPLING[str(kind)] for kind in kinds]


def _blocks(layers: Sequence[int], names: Sequence[str], multipliers: Sequence[int]) -> list[Any]:
    blocks: list[Any] = [["res_x", {"num_layers": layers[0]}]]
    for count, name, multiplier in zip(layers[1:], names, multipliers, strict=True):
        blocks += [[name, {"multiplier": multiplier}], ["res_x", {"num_layers": count}]]
    return blocks


def _check_config(path: Path, given: Mapping[str, Any], built: Any) -> None:
    """Compare a config with that of the module which was built in its place; what is absent has the class's default."""
    parameters = inspect.signature(type(built).__init__).parameters
    for key, value in given.items():
        if not key.startswith("_") and key not in built.config:
            raise ExportError(f"{path}: {key} = {shown(value, 60)} is an unknown key; supported: the keys of LTX-2.3")
    for key, value in built.config.items():
        if key.startswith("_") or key not in parameters:
            continue
        found = given.get(key, parameters[key].default)
        if _plain(found) != _plain(value):
            raise ExportError(f"{path}: {key} = {shown(found, 60)} is not supported; supported: {shown(value, 60)}")


def _plain(value: Any) -> Any:
    """A value as JSON has it; an empty list is as good as none."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value] or None
    return value
