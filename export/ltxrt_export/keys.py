# SPDX-License-Identifier: Apache-2.0
"""Names of tensors: a module's own (diffusers, transformers) and those of the published files, both ways.

A name is a path of segments between dots. A ``KeyMap`` replaces the longest module prefix that it knows, then
renames whole segments of the rest; both steps are one-to-one, so the map runs backwards too. The published
names follow Lightricks/LTX-2 packages/ltx-core/src/ltx_core/model/*/model_configurator.py, diffusers' ones
huggingface/diffusers scripts/convert_ltx2_to_diffusers.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "COMPONENTS",
    "GEMMA_PREFIXES",
    "UNREAD_GEMMA_PREFIXES",
    "UNREAD_PREFIXES",
    "KeyMap",
    "component_of",
    "gemma_keys",
    "key_map",
    "upsampler_keys",
    "video_vae_keys",
]

COMPONENTS = ("transformer", "connectors", "video_vae", "audio_vae")

#: Parts of the single file that audio-to-video never reads: they may be there or not.
UNREAD_PREFIXES = ("audio_vae.decoder.", "vocoder.")
#: The same for the text encoder's folder.
UNREAD_GEMMA_PREFIXES = (
    "vision_tower.",
    "multi_modal_projector.",
    "lm_head.",
    "language_model.lm_head.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
#: Where the language model lies in it: as published, and as transformers 5 names it.
GEMMA_PREFIXES = ("language_model.model.", "model.language_model.")

_DIT = "model.diffusion_model."
_VIDEO_CONNECTOR = f"{_DIT}video_embeddings_connector."
_AUDIO_CONNECTOR = f"{_DIT}audio_embeddings_connector."
_PROJECTIONS = "text_embedding_projection."

#: Where each component's tensors lie in the single file; the longest prefix that fits a key decides.
_STORED_PREFIXES = {
    _DIT: "transformer",
    _VIDEO_CONNECTOR: "connectors",
    _AUDIO_CONNECTOR: "connectors",
    _PROJECTIONS: "connectors",
    "vae.": "video_vae",
    "audio_vae.encoder.": "audio_vae",
    "audio_vae.per_channel_statistics.": "audio_vae",
}

#: Module prefix -> stored prefix.
_STATISTICS = {
    "latents_mean": "per_channel_statistics.mean-of-means",
    "latents_std": "per_channel_statistics.std-of-means",
}
_PREFIXES: Mapping[str, Mapping[str, str]] = {
    "transformer": {
        "": _DIT,
        "proj_in.": f"{_DIT}patchify_proj.",
        "audio_proj_in.": f"{_DIT}audio_patchify_proj.",
        "time_embed.": f"{_DIT}adaln_single.",
        "audio_time_embed.": f"{_DIT}audio_adaln_single.",
        "prompt_adaln.": f"{_DIT}prompt_adaln_single.",
        "audio_prompt_adaln.": f"{_DIT}audio_prompt_adaln_single.",
        "av_cross_attn_video_scale_shift.": f"{_DIT}av_ca_video_scale_shift_adaln_single.",
        "av_cross_attn_audio_scale_shift.": f"{_DIT}av_ca_audio_scale_shift_adaln_single.",
        "av_cross_attn_video_a2v_gate.": f"{_DIT}av_ca_a2v_gate_adaln_single.",
        "av_cross_attn_audio_v2a_gate.": f"{_DIT}av_ca_v2a_gate_adaln_single.",
    },
    "connectors": {
        "video_connector.": _VIDEO_CONNECTOR,
        "audio_connector.": _AUDIO_CONNECTOR,
        "video_connector.transformer_blocks.": f"{_VIDEO_CONNECTOR}transformer_1d_blocks.",
        "audio_connector.transformer_blocks.": f"{_AUDIO_CONNECTOR}transformer_1d_blocks.",
        "video_text_proj_in.": f"{_PROJECTIONS}video_aggregate_embed.",
        "audio_text_proj_in.": f"{_PROJECTIONS}audio_aggregate_embed.",
    },
    "audio_vae": {
        "encoder.": "audio_vae.encoder.",
        **{name: f"audio_vae.{key}" for name, key in _STATISTICS.items()},
    },
}
#: Module segment -> stored segment, anywhere after the prefix.
_SEGMENTS: Mapping[str, Mapping[str, str]] = {
    "transformer": {
        "norm_q": "q_norm",
        "norm_k": "k_norm",
        "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
        "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
    },
    "connectors": {"norm_q": "q_norm", "norm_k": "k_norm"},
    "audio_vae": {},
}


@dataclass(frozen=True, slots=True)
class KeyMap:
    """The one-to-one map between a module's parameter names and the keys of a stored file.

    Attributes:
        prefixes: Module prefix -> stored prefix; each ends in a dot, is empty or is a whole name.
        segments: Module segment -> stored segment, for what follows the prefix.
    """

    prefixes: Mapping[str, str]
    segments: Mapping[str, str]

    def stored(self, name: str) -> str:
        """The stored key of a module's parameter or buffer.

        Raises:
            KeyError: No prefix fits the name.
        """
        return _renamed(name, self.prefixes, self.segments)

    def module(self, key: str) -> str:
        """The module's name of a stored key, the inverse of ``stored``.

        Raises:
            KeyError: No prefix fits the key.
        """
        return _renamed(key, _inverse(self.prefixes), _inverse(self.segments))


def key_map(component: str) -> KeyMap:
    """The names of ``transformer``, ``connectors`` or ``audio_vae``, which do not depend on the config."""
    return KeyMap(_PREFIXES[component], _SEGMENTS[component])


def video_vae_keys(encoder_levels: int, decoder_levels: int) -> KeyMap:
    """The names of the video VAE: one flat list of blocks stored, levels with resamplers in the module.

    Args:
        encoder_levels: Downsampling blocks of the encoder.
        decoder_levels: Upsampling blocks of the decoder.
    """
    prefixes = {"encoder.": "vae.encoder.", "decoder.": "vae.decoder."}
    for level in range(encoder_levels):
        prefixes[f"encoder.down_blocks.{level}."] = f"vae.encoder.down_blocks.{2 * level}."
        prefixes[f"encoder.down_blocks.{level}.downsamplers.0."] = f"vae.encoder.down_blocks.{2 * level + 1}."
    prefixes["encoder.mid_block."] = f"vae.encoder.down_blocks.{2 * encoder_levels}."
    prefixes["decoder.mid_block."] = "vae.decoder.up_blocks.0."
    for level in range(decoder_levels):
        prefixes[f"decoder.up_blocks.{level}.upsamplers.0."] = f"vae.decoder.up_blocks.{2 * level + 1}."
        prefixes[f"decoder.up_blocks.{level}."] = f"vae.decoder.up_blocks.{2 * level + 2}."
    prefixes |= {name: f"vae.{key}" for name, key in _STATISTICS.items()}
    return KeyMap(prefixes, {"resnets": "res_blocks"})


def upsampler_keys() -> KeyMap:
    """The names of the latent upsampler, which diffusers kept."""
    return KeyMap({"": ""}, {})


def gemma_keys(prefix: str = GEMMA_PREFIXES[0]) -> KeyMap:
    """The names of Gemma's language model in the multimodal model's folder, one of ``GEMMA_PREFIXES``."""
    return KeyMap({"": prefix}, {})


def component_of(key: str) -> str | None:
    """The component that a key of the single file belongs to; None for a key of none of them."""
    fitting = [prefix for prefix in _STORED_PREFIXES if key.startswith(prefix)]
    return _STORED_PREFIXES[max(fitting, key=len)] if fitting else None


def _renamed(name: str, prefixes: Mapping[str, str], segments: Mapping[str, str]) -> str:
    fitting = [
        prefix for prefix in prefixes if name.startswith(prefix) and (prefix[-1:] in ("", ".") or prefix == name)
    ]
    if not fitting:
        raise KeyError(name)
    prefix = max(fitting, key=len)
    rest = [segments.get(segment, segment) for segment in name[len(prefix) :].split(".")]
    return prefixes[prefix] + ".".join(rest)


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {stored: name for name, stored in table.items()}
