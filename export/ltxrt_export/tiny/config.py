# SPDX-License-Identifier: Apache-2.0
"""The tiny model's configs: the flags of the published LTX-2.3 22B model, at a four-thousandth of its size.

Only sizes differ. Five of them are bound by the architecture rather than free: the audio VAE's base width is the
128 features of an audio token (8 channels of 16 mel bins); the video encoder starts at the latent width; a
connector has 128 registers, a constant of the reference, so that the text context is a multiple of 128; both
streams have the same number of heads; the upsampler's width is a multiple of its 32 norm groups.
"""

from typing import Any

__all__ = [
    "AUTO_PIXELS",
    "CONTEXT_TOKENS",
    "LICENCE",
    "MODEL_VERSION",
    "checkpoint_config",
    "gemma_config",
    "upsampler_config",
]

MODEL_VERSION = "2.3.0"
LICENCE = "Apache-2.0 (weights of the ltxrt project's own)"
#: Pixel budget of ``resolution: auto``: 256x128 without an image, 192x192 for a square one.
AUTO_PIXELS = 256 * 192

#: Text tokens of a context; as many as there are registers (the 22B model tiles them eight times).
CONTEXT_TOKENS = 128

_HEADS = 4
_VIDEO_HEAD, _AUDIO_HEAD = 32, 16
_LATENT_CHANNELS = 32
_TEXT_WIDTH = 64


def checkpoint_config() -> dict[str, Any]:
    """The ``config`` of the single file, all sections."""
    return {
        "transformer": _transformer(),
        "vae": _vae(),
        "audio_vae": _audio_vae(),
        "vocoder": _vocoder(),
        "scheduler": {
            "_class_name": "RectifiedFlowScheduler",
            "num_train_timesteps": 1000,
            "sampler": "LinearQuadratic",
        },
    }


def upsampler_config() -> dict[str, Any]:
    """The flat ``config`` of the spatial x2 upsampler's file."""
    return {
        "_class_name": "LatentUpsampler",
        "in_channels": _LATENT_CHANNELS,
        "mid_channels": 32,
        "num_blocks_per_stage": 1,
        "dims": 3,
        "spatial_upsample": True,
        "temporal_upsample": False,
        "spatial_scale": 2.0,
        "rational_resampler": False,
    }


def gemma_config(vocabulary: int) -> dict[str, Any]:
    """The ``config.json`` of the text encoder: five sliding layers and a full one, as Gemma 3 repeats them."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "model_type": "gemma3",
        "pad_token_id": 0,
        "text_config": {
            "head_dim": 16,
            "hidden_size": _TEXT_WIDTH,
            "intermediate_size": 128,
            "max_position_embeddings": 1024,
            "model_type": "gemma3_text",
            "num_attention_heads": 4,
            "num_hidden_layers": 6,
            "num_key_value_heads": 2,
            "query_pre_attn_scalar": 16,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            "vocab_size": vocabulary,
        },
    }


def _transformer() -> dict[str, Any]:
    """In the order in which the published file writes it."""
    return {**_video_stream(), **_audio_stream_and_text()}


def _video_stream() -> dict[str, Any]:
    return {
        "_class_name": "AVTransformer3DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": _VIDEO_HEAD,
        "attention_type": "default",
        "caption_channels": _TEXT_WIDTH,
        "cross_attention_dim": _HEADS * _VIDEO_HEAD,
        "double_self_attention": False,
        "dropout": 0.0,
        "in_channels": _LATENT_CHANNELS,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "num_attention_heads": _HEADS,
        "num_embeds_ada_norm": 1000,
        "num_layers": 5,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "cross_attention_norm": True,
        "out_channels": _LATENT_CHANNELS,
        "upcast_attention": False,
        "use_linear_projection": False,
        "qk_norm": "rms_norm",
        "standardization_norm": "rms_norm",
        "positional_embedding_type": "rope",
        "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": [20, 2048, 2048],
        "timestep_scale_multiplier": 1000,
        "av_ca_timestep_scale_multiplier": 1000.0,
        "causal_temporal_positioning": True,
    }


def _audio_stream_and_text() -> dict[str, Any]:
    return {
        "audio_num_attention_heads": _HEADS,
        "audio_attention_head_dim": _AUDIO_HEAD,
        "use_audio_video_cross_attention": True,
        "share_ff": False,
        "audio_out_channels": 128,
        "audio_cross_attention_dim": _HEADS * _AUDIO_HEAD,
        "audio_positional_embedding_max_pos": [20],
        "av_cross_ada_norm": True,
        "use_embeddings_connector": True,
        "connector_attention_head_dim": _VIDEO_HEAD,
        "connector_num_attention_heads": _HEADS,
        "connector_num_layers": 2,
        "connector_positional_embedding_max_pos": [4096],
        "connector_num_learnable_registers": 128,
        "connector_norm_output": True,
        "use_middle_indices_grid": True,
        "apply_gated_attention": True,
        "connector_apply_gated_attention": True,
        "caption_projection_first_linear": False,
        "caption_projection_second_linear": False,
        "caption_proj_input_norm": False,
        "connector_learnable_registers_std": 1,
        "caption_proj_before_connector": True,
        "audio_connector_attention_head_dim": _AUDIO_HEAD,
        "audio_connector_num_attention_heads": _HEADS,
        "cross_attention_adaln": True,
        "text_encoder_norm_type": "per_token_rms",
        "rope_type": "split",
        "frequencies_precision": "float64",
    }


def _vae() -> dict[str, Any]:
    layer = {"num_layers": 1}
    return {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": _LATENT_CHANNELS,
        "encoder_blocks": [
            ["res_x", layer],
            ["compress_space_res", {"multiplier": 1}],
            ["res_x", layer],
            ["compress_time_res", {"multiplier": 1}],
            ["res_x", layer],
            ["compress_all_res", {"multiplier": 1}],
            ["res_x", layer],
            ["compress_all_res", {"multiplier": 2}],
            ["res_x", layer],
        ],
        # Listed output side first. Narrowing at once, next to the latents, leaves the budget to full resolution.
        "decoder_blocks": [
            ["res_x", layer],
            ["compress_space", {"multiplier": 1}],
            ["res_x", layer],
            ["compress_time", {"multiplier": 1}],
            ["res_x", layer],
            ["compress_all", {"multiplier": 1}],
            ["res_x", layer],
            ["compress_all", {"multiplier": 2}],
            ["res_x", layer],
        ],
        "scaling_factor": 1.0,
        "norm_layer": "pixel_norm",
        "patch_size": 4,
        "latent_log_var": "uniform",
        "use_quant_conv": False,
        "causal_decoder": False,
        "timestep_conditioning": False,
        "normalize_latent_channels": False,
        "encoder_base_channels": _LATENT_CHANNELS,
        "decoder_base_channels": 32,
        "spatial_padding_mode": "zeros",
    }


def _audio_vae() -> dict[str, Any]:
    return {
        "model": {
            "params": {
                "ddconfig": {
                    "double_z": True,
                    "mel_bins": 64,
                    "z_channels": 8,
                    "resolution": 256,
                    "downsample_time": False,
                    "in_channels": 2,
                    "out_ch": 2,
                    "ch": 128,
                    "ch_mult": [1, 1, 1],
                    "num_res_blocks": 1,
                    "attn_resolutions": [],
                    "dropout": 0.0,
                    "mid_block_add_attention": False,
                    "norm_type": "pixel",
                    "causality_axis": "height",
                },
                "sampling_rate": 16000,
            }
        },
        "preprocessing": {
            "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
            "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
        },
    }


def _vocoder() -> dict[str, Any]:
    """The published description; the tiny file holds no vocoder, which audio-to-video never reads."""
    shared = {
        "activation": "snakebeta",
        "resblock": "AMP1",
        "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
        "resblock_kernel_sizes": [3, 7, 11],
        "stereo": True,
        "use_bias_at_final": False,
        "use_tanh_at_final": False,
    }
    return {
        "vocoder": {
            **shared,
            "upsample_initial_channel": 1536,
            "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
            "upsample_rates": [5, 2, 2, 2, 2, 2],
        },
        "bwe": {
            **shared,
            "upsample_initial_channel": 512,
            "upsample_kernel_sizes": [12, 11, 4, 4, 4],
            "upsample_rates": [6, 5, 2, 2, 2],
            "n_fft": 512,
            "hop_length": 80,
            "num_mels": 64,
            "input_sampling_rate": 16000,
            "output_sampling_rate": 48000,
        },
    }
