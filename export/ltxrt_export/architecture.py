# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint's config to modules: diffusers' LTX-2 classes and transformers' Gemma 3, no weights.

Pure functions that build under any device or tensor mode (``torch.device("meta")``, ``FakeTensorMode``). Each
checks its section completely (``section.py``) and refuses what differs from LTX-2.3 in anything but size.

What the config keys mean: Lightricks/LTX-2 packages/ltx-core/src/ltx_core/model/{transformer,audio_vae,upsampler}/
model_configurator.py and text_encoders/gemma/ (v1.2.0). The video VAE is in ``video_vae.py``.
"""

from collections.abc import Mapping
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video
from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import AutoencoderKLLTX2Audio
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from transformers import Gemma3TextConfig, Gemma3TextModel

from ltxrt.errors import ExportError
from ltxrt.shapes import AUDIO_LATENTS_PER_SECOND, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from ltxrt_export.section import Section, refused
from ltxrt_export.vae_blocks import video_vae_options

__all__ = ["audio_vae", "check_widths", "connectors", "text_model", "transformer", "upsampler", "video_vae"]

_TRANSFORMER_FIXED: Mapping[str, Any] = {
    "_class_name": "AVTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "apply_gated_attention": True,
    "attention_bias": True,
    "av_cross_ada_norm": True,
    "caption_proj_before_connector": True,
    "caption_proj_input_norm": False,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "causal_temporal_positioning": True,
    "connector_apply_gated_attention": True,
    "connector_norm_output": True,
    "cross_attention_adaln": True,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "frequencies_precision": "float64",
    "norm_elementwise_affine": False,
    "only_cross_attention": False,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "rope_type": "split",
    "share_ff": False,
    "standardization_norm": "rms_norm",
    "text_encoder_norm_type": "per_token_rms",
    "upcast_attention": False,
    "use_audio_video_cross_attention": True,
    "use_embeddings_connector": True,
    "use_linear_projection": False,
    "use_middle_indices_grid": True,
}
#: Without effect on inference, or of later generations, whose absence means the value here.
_TRANSFORMER_OPTIONAL: Mapping[str, Any] = {
    "attention_type": "default",
    "audio_ff_bias": True,
    "connector_ff_bias": True,
    "dropout": 0.0,
    "ff_bias": True,
    "norm_num_groups": 32,
    "num_embeds_ada_norm": 1000,
    "num_vector_embeds": None,
    "use_keyframes_abs_pos_embedding": False,
    "use_prompt_adaln_single": True,
}
_TRANSFORMER_SIZES = (
    "attention_head_dim",
    "audio_attention_head_dim",
    "audio_connector_attention_head_dim",
    "audio_connector_num_attention_heads",
    "audio_connector_num_layers",
    "audio_cross_attention_dim",
    "audio_in_channels",
    "audio_num_attention_heads",
    "audio_out_channels",
    "audio_positional_embedding_max_pos",
    "av_ca_timestep_scale_multiplier",
    "caption_channels",
    "connector_attention_head_dim",
    "connector_learnable_registers_std",  # how the registers were initialised
    "connector_num_attention_heads",
    "connector_num_layers",
    "connector_num_learnable_registers",
    "connector_positional_embedding_max_pos",
    "cross_attention_dim",
    "in_channels",
    "norm_eps",
    "num_attention_heads",
    "num_layers",
    "out_channels",
    "positional_embedding_max_pos",
    "positional_embedding_theta",
    "timestep_scale_multiplier",
)
#: Token width of the audio stream where the config is silent, as in the reference: 8 channels of 16 mel bins.
_AUDIO_CHANNELS = 128

_AUDIO_FIXED: Mapping[str, Any] = {
    "attn_resolutions": [],
    "causality_axis": "height",
    "double_z": True,
    "in_channels": 2,
    "mel_bins": 64,
    "mid_block_add_attention": False,
    "norm_type": "pixel",
    "out_ch": 2,
}
_AUDIO_OPTIONAL: Mapping[str, Any] = {
    "attn_type": "vanilla",
    "downsample_time": False,
    "dropout": 0.0,
    "resamp_with_conv": True,
}
_STFT_FIXED: Mapping[str, Any] = {"filter_length": 1024, "hop_length": 160, "win_length": 1024}
_MEL_FIXED: Mapping[str, Any] = {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000}
_SAMPLE_RATE = 16000

_UPSAMPLER_FIXED: Mapping[str, Any] = {"dims": 3, "spatial_upsample": True, "temporal_upsample": False}
_UPSAMPLER_OPTIONAL: Mapping[str, Any] = {
    "_class_name": "LatentUpsampler",
    "rational_resampler": False,
    "spatial_scale": 2.0,
}
_UPSAMPLER_SIZES = ("in_channels", "mid_channels", "num_blocks_per_stage")
#: GroupNorm groups, a constant of the class.
_UPSAMPLER_GROUPS = 32

_GEMMA_FIXED: Mapping[str, Any] = {
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma3_text",
    "use_bidirectional_attention": False,
}


def transformer(config: Mapping[str, Any]) -> LTX2VideoTransformer3DModel:
    """The dual-stream DiT of ``config["transformer"]``.

    Raises:
        ExportError: A key is unknown, missing or has a value that is not supported.
    """
    section = _transformer_section(config)
    frames, height, width = section.sizes("positional_embedding_max_pos", 3)
    (audio_frames,) = section.sizes("audio_positional_embedding_max_pos", 1)
    return LTX2VideoTransformer3DModel(
        in_channels=section.size("in_channels"),
        out_channels=section.size("out_channels"),
        num_attention_heads=section.size("num_attention_heads"),
        attention_head_dim=section.size("attention_head_dim"),
        cross_attention_dim=section.size("cross_attention_dim"),
        vae_scale_factors=(TEMPORAL_COMPRESSION, SPATIAL_COMPRESSION, SPATIAL_COMPRESSION),
        pos_embed_max_pos=frames,
        base_height=height,
        base_width=width,
        gated_attn=True,
        cross_attn_mod=True,
        audio_in_channels=section.size("audio_in_channels", _AUDIO_CHANNELS),
        audio_out_channels=section.size("audio_out_channels"),
        audio_num_attention_heads=section.size("audio_num_attention_heads"),
        audio_attention_head_dim=section.size("audio_attention_head_dim"),
        audio_cross_attention_dim=section.size("audio_cross_attention_dim"),
        audio_pos_embed_max_pos=audio_frames,
        audio_sampling_rate=_SAMPLE_RATE,
        audio_hop_length=_STFT_FIXED["hop_length"],
        audio_gated_attn=True,
        audio_cross_attn_mod=True,
        num_layers=section.size("num_layers"),
        norm_eps=section.number("norm_eps"),
        rope_theta=section.number("positional_embedding_theta"),
        rope_double_precision=True,
        timestep_scale_multiplier=section.whole("timestep_scale_multiplier"),
        # The reference falls back to 1 where this key is absent, which is wrong for 2.3.
        cross_attn_timestep_scale_multiplier=section.whole("av_ca_timestep_scale_multiplier"),
        rope_type="split",
        use_prompt_embeddings=False,
    )


def connectors(config: Mapping[str, Any], gemma_config: Mapping[str, Any]) -> LTX2TextConnectors:
    """Text projections and connectors of ``config["transformer"]``, fed by all hidden states of Gemma.

    Raises:
        ExportError: A value is not supported, or the text model has another width than the projections.
    """
    section = _transformer_section(config)
    text = _gemma_text_config(gemma_config)
    caption_channels = section.size("caption_channels")
    if text.hidden_size != caption_channels:
        raise section.refuse("caption_channels", f"{text.hidden_size}, the width of the text encoder")
    (rope_length,) = section.sizes("connector_positional_embedding_max_pos", 1)
    registers, layers = section.size("connector_num_learnable_registers"), section.size("connector_num_layers")
    return LTX2TextConnectors(
        caption_channels=caption_channels,
        text_proj_in_factor=text.num_hidden_layers + 1,
        video_connector_num_attention_heads=section.size("connector_num_attention_heads"),
        video_connector_attention_head_dim=section.size("connector_attention_head_dim"),
        video_connector_num_layers=layers,
        video_connector_num_learnable_registers=registers,
        video_gated_attn=True,
        audio_connector_num_attention_heads=section.size("audio_connector_num_attention_heads"),
        audio_connector_attention_head_dim=section.size("audio_connector_attention_head_dim"),
        audio_connector_num_layers=section.size("audio_connector_num_layers", layers),
        audio_connector_num_learnable_registers=registers,
        audio_gated_attn=True,
        connector_rope_base_seq_len=rope_length,
        rope_theta=10000.0,  # the reference does not read positional_embedding_theta here
        rope_double_precision=True,
        rope_type="split",
        per_modality_projections=True,
        video_hidden_dim=section.size("cross_attention_dim"),
        audio_hidden_dim=section.size("audio_cross_attention_dim"),
        proj_bias=True,
    )


def video_vae(config: Mapping[str, Any]) -> AutoencoderKLLTX2Video:
    """The video VAE of ``config["vae"]``, its widths derived from the block lists.

    Raises:
        ExportError: A key or a block is not supported.
    """
    return AutoencoderKLLTX2Video(**video_vae_options(config))


def audio_vae(config: Mapping[str, Any]) -> AutoencoderKLLTX2Audio:
    """The audio VAE of ``config["audio_vae"]`` without its decoder, which audio-to-video never reads.

    Raises:
        ExportError: A key is unknown, missing or has a value that is not supported.
    """
    section = Section.of(config, "audio_vae")
    section.only(("model", "preprocessing", "variables"))
    params = section.child("model").child("params")
    params.only(("ddconfig", "sampling_rate"))
    params.expect({"sampling_rate": _SAMPLE_RATE})
    _check_audio_front_end(section)
    ddconfig = params.child("ddconfig")
    sizes = ("ch", "ch_mult", "num_res_blocks", "resolution", "z_channels")
    ddconfig.only(_AUDIO_FIXED, _AUDIO_OPTIONAL, sizes)
    ddconfig.expect(_AUDIO_FIXED)
    ddconfig.expect(_AUDIO_OPTIONAL, optional=True)
    # Two halvings of a 100 Hz mel: 25 latents a second.
    halvings = (_SAMPLE_RATE // _STFT_FIXED["hop_length"] // AUDIO_LATENTS_PER_SECOND).bit_length() - 1
    base, z_channels = ddconfig.size("ch"), ddconfig.size("z_channels")
    features = z_channels * (_MEL_FIXED["n_mel_channels"] >> halvings)
    if base != features:
        raise ddconfig.refuse("ch", f"{features}: the latent statistics have ch entries, one a latent feature")
    model = AutoencoderKLLTX2Audio(
        base_channels=base,
        ch_mult=ddconfig.sizes("ch_mult", halvings + 1),
        num_res_blocks=ddconfig.size("num_res_blocks"),
        resolution=ddconfig.size("resolution"),
        latent_channels=z_channels,
        norm_type="pixel",
        causality_axis="height",
        mel_bins=_MEL_FIXED["n_mel_channels"],
    )
    del model.decoder
    return model


def upsampler(config: Mapping[str, Any]) -> LTX2LatentUpsamplerModel:
    """The spatial x2 latent upsampler; ``config`` is the flat config of its own file.

    Raises:
        ExportError: It is another upsampler (temporal, x1.5, rational) or a key is unknown.
    """
    section = Section("upsampler", config)
    section.only(_UPSAMPLER_FIXED, _UPSAMPLER_OPTIONAL, _UPSAMPLER_SIZES)
    section.expect(_UPSAMPLER_FIXED)
    section.expect(_UPSAMPLER_OPTIONAL, optional=True)
    if section.size("mid_channels") % _UPSAMPLER_GROUPS:
        raise section.refuse("mid_channels", f"a multiple of {_UPSAMPLER_GROUPS}")
    return LTX2LatentUpsamplerModel(
        in_channels=section.size("in_channels"),
        mid_channels=section.size("mid_channels"),
        num_blocks_per_stage=section.size("num_blocks_per_stage"),
        use_rational_resampler=False,
    )


def text_model(gemma_config: Mapping[str, Any]) -> Gemma3TextModel:
    """The Gemma 3 language model (no lm_head, no vision) of a Hugging Face ``config.json``.

    Raises:
        ExportError: It is not Gemma 3, or a setting is not supported.
    """
    return Gemma3TextModel(_gemma_text_config(gemma_config))


def check_widths(config: Mapping[str, Any]) -> None:
    """Check the widths that two sections share: a token is what its VAE makes of one latent position.

    Raises:
        ExportError: The DiT takes or gives tokens of another width than the VAEs make.
    """
    dit, vae = Section.of(config, "transformer"), Section.of(config, "vae")
    latents = vae.size("latent_channels")
    for key in ("in_channels", "out_channels"):
        if dit.size(key) != latents:
            raise dit.refuse(key, f"{latents}, vae.latent_channels")
    audio = Section.of(config, "audio_vae").child("model").child("params").child("ddconfig").size("ch")
    for key in ("audio_in_channels", "audio_out_channels"):
        if dit.size(key, _AUDIO_CHANNELS) != audio:
            raise dit.refuse(key, f"{audio}, the features of an audio token")


def _transformer_section(config: Mapping[str, Any]) -> Section:
    """``config["transformer"]``, fully checked: flags, and widths that have to agree."""
    section = Section.of(config, "transformer")
    section.only(_TRANSFORMER_FIXED, _TRANSFORMER_OPTIONAL, _TRANSFORMER_SIZES)
    section.expect(_TRANSFORMER_FIXED)
    section.expect(_TRANSFORMER_OPTIONAL, optional=True)
    heads = section.size("num_attention_heads")
    if section.size("audio_num_attention_heads") != heads:
        raise section.refuse("audio_num_attention_heads", f"{heads}, the heads of the video stream")
    for prefix in ("", "audio_"):
        width = section.size(f"{prefix}num_attention_heads") * section.size(f"{prefix}attention_head_dim")
        connector = section.size(f"{prefix}connector_num_attention_heads")
        connector_head = section.size(f"{prefix}connector_attention_head_dim")
        if section.size(f"{prefix}cross_attention_dim") != width:
            raise section.refuse(f"{prefix}cross_attention_dim", f"{width}, the width of its stream")
        if connector * connector_head != width:
            raise section.refuse(
                f"{prefix}connector_attention_head_dim", f"heads x head width = {width}, the width of its stream"
            )
    return section


def _check_audio_front_end(section: Section) -> None:
    """The log-mel settings: they are part of the exported graph, not of the VAE module."""
    preprocessing = section.child("preprocessing")
    preprocessing.only(("stft", "mel"))
    stft, mel = preprocessing.child("stft"), preprocessing.child("mel")
    # The released front end uses a centred STFT whatever "causal" says (ltx_core/model/audio_vae/ops.py).
    stft.only(_STFT_FIXED, ("causal", "causal_padding"))
    stft.expect(_STFT_FIXED)
    mel.only(_MEL_FIXED)
    mel.expect(_MEL_FIXED)
    if "variables" in section.values:
        section.child("variables").expect({"mel_bins": _MEL_FIXED["n_mel_channels"]}, optional=True)


def _gemma_text_config(config: Mapping[str, Any]) -> Gemma3TextConfig:
    """The text part of a Gemma ``config.json``; what it leaves out has transformers' Gemma 3 default."""
    if config.get("model_type") != "gemma3":
        raise refused("model_type", config.get("model_type"), "'gemma3' (Gemma 3 with its text_config)")
    section = Section.of(config, "text_config")
    try:
        text = Gemma3TextConfig(**section.values)
    except (TypeError, ValueError, KeyError) as error:
        raise ExportError(f"config: text_config is not a Gemma 3 text config: {error}") from error
    resolved = Section("text_config", {key: getattr(text, key, None) for key in _GEMMA_FIXED})
    resolved.expect(_GEMMA_FIXED)
    for layer_type in sorted(set(text.layer_types or ())):
        if layer_type not in ("full_attention", "sliding_attention"):
            raise refused("text_config.layer_types", layer_type, "full_attention, sliding_attention")
    for layer_type, rope in (text.rope_parameters or {}).items():
        if rope.get("rope_type") not in ("default", "linear"):
            raise refused(f"text_config.rope_parameters.{layer_type}", rope, "rope_type default or linear")
    return text
