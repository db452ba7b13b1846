# SPDX-License-Identifier: Apache-2.0
"""Names of tensors: both directions, and against the state dicts of Lightricks' own modules."""

import hashlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ltxrt_export import architecture, keys, published, vae_blocks

PUBLISHED: dict[str, Any] = published.checkpoint_config()
GEMMA: dict[str, Any] = published.gemma_config()

#: Tensors of each component in the published file, and sha256 over the sorted lines "key shape" of the modules
#: that Lightricks/LTX-2 v1.2.0 builds on the meta device from the same config, prefixed as they are stored.
REFERENCE = {
    "transformer": (4186, "e84ab4b0d99b6707058ab63db89e888df7d09795e52866d10e08bb5bb0c70e57"),
    "connectors": (262, "e61c5356a290d701588176548e5c9ec83954a7f77da8ad4297b76fbf34337e02"),
    "video_vae": (170, "a0f35e7b7abf546bd447df7e49e975e81854254ea64857cd48d6b5a76754f6af"),
    "audio_vae": (46, "7780df67fd44bbb3f859739238b87396bd5fb334a9ab0eedf96687ec690111a2"),
}
#: What audio-to-video does not read: the audio decoder (102 - 46) and the vocoder.
UNREAD = (102 - 46) + 1227
PUBLISHED_TENSORS = 5947


def key_map(name: str) -> keys.KeyMap:
    if name != "video_vae":
        return keys.key_map(name)
    encoder, decoder = vae_blocks.block_chains(PUBLISHED)
    return keys.video_vae_keys(len(encoder.resampling), len(decoder.resampling))


def names_and_shapes(name: str) -> dict[str, tuple[int, ...]]:
    build = {
        "transformer": lambda: architecture.transformer(PUBLISHED),
        "connectors": lambda: architecture.connectors(PUBLISHED, GEMMA),
        "video_vae": lambda: architecture.video_vae(PUBLISHED),
        "audio_vae": lambda: architecture.audio_vae(PUBLISHED),
    }[name]
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in build().state_dict().items()}


@pytest.mark.parametrize("name", keys.COMPONENTS)
def test_published_names_and_shapes_are_those_of_the_reference(name: str) -> None:
    stored = {key_map(name).stored(key): shape for key, shape in names_and_shapes(name).items()}
    lines = "".join(f"{key} {list(shape)}\n" for key, shape in sorted(stored.items()))
    assert (len(stored), hashlib.sha256(lines.encode()).hexdigest()) == REFERENCE[name]


def test_counts_add_up_to_the_published_file() -> None:
    assert sum(len(names_and_shapes(name)) for name in keys.COMPONENTS) + UNREAD == PUBLISHED_TENSORS


def test_modulation_tables_are_290() -> None:
    names = names_and_shapes("transformer")
    assert sum("scale_shift_table" in name for name in names) == 290


@pytest.mark.parametrize("name", keys.COMPONENTS)
def test_maps_run_backwards_and_keys_belong_to_their_component(name: str) -> None:
    mapped = key_map(name)
    for key in names_and_shapes(name):
        assert mapped.module(mapped.stored(key)) == key
        assert keys.component_of(mapped.stored(key)) == name


@pytest.mark.parametrize(
    ("name", "module", "stored"),
    [
        ("transformer", "proj_in.weight", "model.diffusion_model.patchify_proj.weight"),
        ("transformer", "audio_proj_in.bias", "model.diffusion_model.audio_patchify_proj.bias"),
        ("transformer", "proj_out.weight", "model.diffusion_model.proj_out.weight"),
        ("transformer", "time_embed.linear.bias", "model.diffusion_model.adaln_single.linear.bias"),
        (
            "transformer",
            "audio_prompt_adaln.linear.bias",
            "model.diffusion_model.audio_prompt_adaln_single.linear.bias",
        ),
        (
            "transformer",
            "av_cross_attn_audio_v2a_gate.emb.timestep_embedder.linear_1.weight",
            "model.diffusion_model.av_ca_v2a_gate_adaln_single.emb.timestep_embedder.linear_1.weight",
        ),
        (
            "transformer",
            "transformer_blocks.47.audio_to_video_attn.norm_k.weight",
            "model.diffusion_model.transformer_blocks.47.audio_to_video_attn.k_norm.weight",
        ),
        (
            "transformer",
            "transformer_blocks.0.video_a2v_cross_attn_scale_shift_table",
            "model.diffusion_model.transformer_blocks.0.scale_shift_table_a2v_ca_video",
        ),
        (
            "connectors",
            "audio_connector.transformer_blocks.7.attn1.norm_q.weight",
            "model.diffusion_model.audio_embeddings_connector.transformer_1d_blocks.7.attn1.q_norm.weight",
        ),
        (
            "connectors",
            "video_connector.learnable_registers",
            "model.diffusion_model.video_embeddings_connector.learnable_registers",
        ),
        (
            "connectors",
            "video_text_proj_in.bias",
            "text_embedding_projection.video_aggregate_embed.bias",
        ),
        (
            "video_vae",
            "encoder.down_blocks.3.downsamplers.0.conv.conv.bias",
            "vae.encoder.down_blocks.7.conv.conv.bias",
        ),
        (
            "video_vae",
            "encoder.mid_block.resnets.1.conv1.conv.weight",
            "vae.encoder.down_blocks.8.res_blocks.1.conv1.conv.weight",
        ),
        (
            "video_vae",
            "decoder.mid_block.resnets.0.conv2.conv.weight",
            "vae.decoder.up_blocks.0.res_blocks.0.conv2.conv.weight",
        ),
        (
            "video_vae",
            "decoder.up_blocks.3.upsamplers.0.conv.conv.weight",
            "vae.decoder.up_blocks.7.conv.conv.weight",
        ),
        (
            "video_vae",
            "decoder.up_blocks.3.resnets.3.conv1.conv.bias",
            "vae.decoder.up_blocks.8.res_blocks.3.conv1.conv.bias",
        ),
        ("video_vae", "latents_std", "vae.per_channel_statistics.std-of-means"),
        ("audio_vae", "latents_mean", "audio_vae.per_channel_statistics.mean-of-means"),
        ("audio_vae", "encoder.mid.block_1.conv1.conv.bias", "audio_vae.encoder.mid.block_1.conv1.conv.bias"),
    ],
)
def test_examples(name: str, module: str, stored: str) -> None:
    assert key_map(name).stored(module) == stored
    assert key_map(name).module(stored) == module


def test_gemma_and_upsampler() -> None:
    name, key = "layers.3.self_attn.q_norm.weight", "language_model.model.layers.3.self_attn.q_norm.weight"
    assert keys.gemma_keys().stored(name) == key
    assert keys.gemma_keys().module(key) == name
    assert keys.upsampler_keys().stored("upsampler.0.weight") == "upsampler.0.weight"
    with pytest.raises(KeyError):
        keys.gemma_keys().module("vision_tower.vision_model.head.weight")


@given(encoder=st.integers(0, 12), decoder=st.integers(0, 12))
def test_video_vae_map_is_one_to_one_at_any_depth(encoder: int, decoder: int) -> None:
    mapped = keys.video_vae_keys(encoder, decoder)
    assert len(set(mapped.prefixes.values())) == len(mapped.prefixes)
    for level in range(encoder):
        name = f"encoder.down_blocks.{level}.downsamplers.0.conv.conv.weight"
        assert mapped.stored(name) == f"vae.encoder.down_blocks.{2 * level + 1}.conv.conv.weight"
        assert mapped.module(mapped.stored(name)) == name
    for level in range(decoder):
        name = f"decoder.up_blocks.{level}.resnets.0.conv1.conv.weight"
        assert mapped.stored(name) == f"vae.decoder.up_blocks.{2 * level + 2}.res_blocks.0.conv1.conv.weight"
        assert mapped.module(mapped.stored(name)) == name


@pytest.mark.parametrize(
    ("key", "component"),
    [
        ("model.diffusion_model.proj_out.bias", "transformer"),
        ("model.diffusion_model.audio_embeddings_connector.learnable_registers", "connectors"),
        ("vae.decoder.conv_in.conv.bias", "video_vae"),
        ("audio_vae.per_channel_statistics.std-of-means", "audio_vae"),
        ("audio_vae.decoder.conv_in.conv.bias", None),
        ("vocoder.vocoder.conv_pre.bias", None),
        ("text_embedding_projection", None),
        ("lora.vae.x", None),
    ],
)
def test_component_of(key: str, component: str | None) -> None:
    assert keys.component_of(key) == component
