# SPDX-License-Identifier: Apache-2.0
"""Config to modules: the published sizes, every refusal, and building without memory."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ltxrt.errors import ExportError
from ltxrt_export import architecture, published

PUBLISHED: dict[str, Any] = published.checkpoint_config()
GEMMA: dict[str, Any] = published.gemma_config()
UPSAMPLER: dict[str, Any] = {
    "in_channels": 128,
    "mid_channels": 1024,
    "num_blocks_per_stage": 4,
    "dims": 3,
    "spatial_upsample": True,
    "temporal_upsample": False,
    "spatial_scale": 2.0,
    "rational_resampler": False,
}
BUILDERS: Mapping[str, Callable[[], nn.Module]] = {
    "transformer": lambda: architecture.transformer(PUBLISHED),
    "connectors": lambda: architecture.connectors(PUBLISHED, GEMMA),
    "video_vae": lambda: architecture.video_vae(PUBLISHED),
    "audio_vae": lambda: architecture.audio_vae(PUBLISHED),
    "upsampler": lambda: architecture.upsampler(UPSAMPLER),
    "text_model": lambda: architecture.text_model(GEMMA),
}
PARAMETERS = {
    "transformer": 18_988_838_144,
    "connectors": 3_172_227_584,
    "video_vae": 726_105_969,
    "audio_vae": 21_333_008,
    "upsampler": 497_867_904,
    "text_model": 11_766_034_176,
}
ABSENT = object()


def changed(config: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with the value at a dotted path replaced, or removed if it is ABSENT."""
    copied = copy.deepcopy(dict(config))
    *parents, key = path.split(".")
    target = copied
    for parent in parents:
        target = target[parent]
    if value is ABSENT:
        del target[key]
    else:
        target[key] = value
    return copied


@pytest.mark.parametrize("name", BUILDERS)
def test_published_parameter_counts_on_meta(name: str) -> None:
    with torch.device("meta"):
        module = BUILDERS[name]()
    assert sum(parameter.numel() for parameter in module.parameters()) == PARAMETERS[name]
    assert all(tensor.is_meta for tensor in module.state_dict().values())


@pytest.mark.parametrize("name", BUILDERS)
def test_builds_under_fake_tensors(name: str) -> None:
    with FakeTensorMode():
        module = BUILDERS[name]()
    assert sum(parameter.numel() for parameter in module.parameters()) == PARAMETERS[name]
    assert all(isinstance(tensor, FakeTensor) for tensor in module.state_dict().values())


def test_transformer_reads_what_the_graph_depends_on() -> None:
    config = changed(PUBLISHED, "transformer.positional_embedding_max_pos", [30, 1024, 512])
    config = changed(config, "transformer.av_ca_timestep_scale_multiplier", 500.0)
    config = changed(config, "transformer.norm_eps", 1e-5)
    with torch.device("meta"):
        read = architecture.transformer(config).config
    assert (read.pos_embed_max_pos, read.base_height, read.base_width) == (30, 1024, 512)
    assert (read.timestep_scale_multiplier, read.cross_attn_timestep_scale_multiplier) == (1000, 500)
    assert read.norm_eps == 1e-5
    assert (read.rope_type, read.rope_double_precision, read.rope_theta) == ("split", True, 10000.0)


def test_gemma_rope_scaling_is_for_full_attention_only() -> None:
    with torch.device("meta"):
        config = architecture.text_model(GEMMA).config
    full, sliding = config.rope_parameters["full_attention"], config.rope_parameters["sliding_attention"]
    assert (full["rope_type"], full["factor"], full["rope_theta"]) == ("linear", 8.0, 1e6)
    assert (sliding["rope_type"], sliding["rope_theta"]) == ("default", 1e4)
    assert config.layer_types[:6] == ["sliding_attention"] * 5 + ["full_attention"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("rope_type", "interleaved", r"transformer\.rope_type = 'interleaved' .* supported: 'split'"),
        ("cross_attention_adaln", False, r"transformer\.cross_attention_adaln = False .* supported: True"),
        ("apply_gated_attention", False, "apply_gated_attention"),
        ("connector_apply_gated_attention", False, "connector_apply_gated_attention"),
        ("frequencies_precision", "float32", "frequencies_precision = 'float32'"),
        ("caption_proj_before_connector", False, "caption_proj_before_connector"),
        ("attention_bias", 1, "attention_bias = 1 .* supported: True"),
        ("ff_bias", False, "ff_bias = False"),
        ("use_prompt_adaln_single", False, "use_prompt_adaln_single"),
        ("use_keyframes_abs_pos_embedding", True, "use_keyframes_abs_pos_embedding"),
        ("av_ca_timestep_scale_multiplier", ABSENT, "av_ca_timestep_scale_multiplier is missing; there is no"),
        ("av_ca_timestep_scale_multiplier", 0.5, "av_ca_timestep_scale_multiplier = 0.5"),
        ("use_middle_indices_grid", ABSENT, "use_middle_indices_grid is missing"),
        ("a_later_flag", True, "transformer.a_later_flag = True is an unknown key"),
        ("num_layers", 0, "num_layers = 0 .* at least 1"),
        ("num_layers", "48", "num_layers = '48'"),
        ("norm_eps", float("nan"), "norm_eps = nan"),
        ("positional_embedding_max_pos", [20, 2048], "positional_embedding_max_pos"),
        ("audio_num_attention_heads", 16, "audio_num_attention_heads = 16 .* 32, the heads of the video"),
        ("cross_attention_dim", 2048, "cross_attention_dim = 2048 .* 4096, the width of its stream"),
        ("audio_cross_attention_dim", 4096, "audio_cross_attention_dim = 4096"),
        ("connector_attention_head_dim", 64, "connector_attention_head_dim = 64"),
        ("audio_connector_num_attention_heads", 30, "audio_connector_attention_head_dim"),
    ],
)
def test_transformer_section_refuses(path: str, value: Any, message: str) -> None:
    config = changed(PUBLISHED, f"transformer.{path}", value)
    with torch.device("meta"), pytest.raises(ExportError, match=message):
        architecture.transformer(config)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rope_type", "interleaved"),
        ("text_encoder_norm_type", "layer_norm"),
        ("connector_norm_output", False),
        ("connector_num_layers", ABSENT),
        ("connector_num_learnable_registers", None),
        ("connector_positional_embedding_max_pos", []),
    ],
)
def test_connectors_refuse(path: str, value: Any) -> None:
    config = changed(PUBLISHED, f"transformer.{path}", value)
    with torch.device("meta"), pytest.raises(ExportError, match=rf"transformer\.{path}"):
        architecture.connectors(config, GEMMA)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("preprocessing.stft.hop_length", 128, r"audio_vae\.preprocessing\.stft\.hop_length = 128"),
        ("preprocessing.mel.mel_fmax", 7600, r"mel\.mel_fmax = 7600"),
        ("preprocessing.mel", ABSENT, r"audio_vae\.preprocessing\.mel is missing"),
        ("model.params.sampling_rate", 24000, r"sampling_rate = 24000 .* supported: 16000"),
        ("model.params.ddconfig.causality_axis", "width", "causality_axis = 'width'"),
        ("model.params.ddconfig.norm_type", "group", "norm_type = 'group'"),
        ("model.params.ddconfig.double_z", False, "double_z"),
        ("model.params.ddconfig.attn_resolutions", [16], r"attn_resolutions = \[16\]"),
        ("model.params.ddconfig.ch_mult", [1, 2], "ch_mult"),
        ("model.params.ddconfig.ch", 64, "ch = 64 .* 128: the latent statistics"),
        ("model.params.ddconfig.tanh_out", True, "tanh_out = True is an unknown key"),
        ("new", {}, r"audio_vae\.new"),
    ],
)
def test_audio_vae_refuses(path: str, value: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        architecture.audio_vae(changed(PUBLISHED, f"audio_vae.{path}", value))


def test_audio_vae_has_no_decoder() -> None:
    with torch.device("meta"):
        names = set(architecture.audio_vae(PUBLISHED).state_dict())
    assert {name.split(".")[0] for name in names} == {"encoder", "latents_mean", "latents_std"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("temporal_upsample", True, r"upsampler\.temporal_upsample = True .* supported: False"),
        ("spatial_scale", 1.5, r"upsampler\.spatial_scale = 1\.5 .* supported: 2\.0"),
        ("rational_resampler", True, "rational_resampler = True"),
        ("dims", 2, "dims = 2"),
        ("mid_channels", 48, "mid_channels = 48 .* a multiple of 32"),
        ("mid_channels", ABSENT, "mid_channels is missing"),
        ("kernel", 5, "kernel = 5 is an unknown key"),
    ],
)
def test_upsampler_refuses(key: str, value: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        architecture.upsampler(changed(UPSAMPLER, key, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "gemma4_unified", "model_type = 'gemma4_unified' .* supported: 'gemma3'"),
        ("model_type", ABSENT, "model_type = None"),
        ("text_config", ABSENT, "text_config is missing"),
        ("text_config", 3, "text_config = 3"),
        ("text_config.attention_bias", True, r"text_config\.attention_bias = True"),
        ("text_config.attn_logit_softcapping", 50.0, "attn_logit_softcapping = 50.0"),
        ("text_config.hidden_activation", "silu", "hidden_activation = 'silu'"),
        ("text_config.model_type", "gemma2", "model_type = 'gemma2'"),
        ("text_config.layer_types", ["chunked_attention"] * 48, "chunked_attention"),
    ],
)
def test_text_model_refuses(path: str, value: Any, message: str) -> None:
    with torch.device("meta"), pytest.raises(ExportError, match=message):
        architecture.text_model(changed(GEMMA, path, value))


def test_connectors_need_the_width_of_the_text_model() -> None:
    gemma = changed(GEMMA, "text_config.hidden_size", 2560)
    with torch.device("meta"), pytest.raises(ExportError, match=r"caption_channels = 3840 .* 2560, the width"):
        architecture.connectors(PUBLISHED, gemma)


@pytest.mark.parametrize("key", ["in_channels", "out_channels", "audio_out_channels", "audio_in_channels"])
def test_sections_agree_on_token_widths(key: str) -> None:
    architecture.check_widths(PUBLISHED)
    with pytest.raises(ExportError, match=rf"transformer\.{key} = 64 .* supported: 128"):
        architecture.check_widths(changed(PUBLISHED, f"transformer.{key}", 64))
