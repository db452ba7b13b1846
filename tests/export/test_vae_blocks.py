# SPDX-License-Identifier: Apache-2.0
"""Block lists to widths and layer counts, on the published config and on reduced ones."""

import copy
from typing import Any

import pytest

from ltxrt.errors import ExportError
from ltxrt_export import published
from ltxrt_export.vae_blocks import block_chains, video_vae_options

PUBLISHED = published.checkpoint_config()


def changed(path: list[Any], value: Any) -> dict[str, Any]:
    """The published config with one value of its vae section replaced."""
    config = copy.deepcopy(PUBLISHED)
    target = config["vae"]
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return config


def test_published_chains_run_from_pixels_and_from_latents() -> None:
    encoder, decoder = block_chains(PUBLISHED)
    assert encoder.layers == (4, 6, 4, 2, 2)
    assert encoder.resampling == ("compress_space", "compress_time", "compress_all", "compress_all")
    assert encoder.multipliers == (2, 2, 2, 1)
    assert decoder.layers == (2, 2, 4, 6, 4)
    assert decoder.resampling == ("compress_all", "compress_all", "compress_time", "compress_space")
    assert decoder.multipliers == (2, 1, 2, 2)


def test_published_options() -> None:
    options = video_vae_options(PUBLISHED)
    assert options["block_out_channels"] == (256, 512, 1024, 1024)
    assert options["layers_per_block"] == (4, 6, 4, 2, 2)
    assert options["downsample_type"] == ("spatial", "temporal", "spatiotemporal", "spatiotemporal")
    # The class reverses widths, layers and factors, but not the kinds of upsampling.
    assert options["decoder_block_out_channels"] == (256, 512, 512, 1024)
    assert options["decoder_layers_per_block"] == (4, 6, 4, 2, 2)
    assert options["upsample_factor"] == (2, 2, 1, 2)
    assert options["upsample_type"] == ("spatiotemporal", "spatiotemporal", "temporal", "spatial")


def test_layers_may_be_a_plain_number() -> None:
    config = changed(["encoder_blocks", 0, 1], 3)
    assert video_vae_options(config)["layers_per_block"] == (3, 6, 4, 2, 2)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["timestep_conditioning"], True, r"vae\.timestep_conditioning = True .* supported: False"),
        (["spatial_padding_mode"], "reflect", r"vae\.spatial_padding_mode = 'reflect' .* supported: 'zeros'"),
        (["_class_name"], "CausalDiffusionVAE", r"vae\._class_name = 'CausalDiffusionVAE'"),
        (["latent_log_var"], "per_channel", r"vae\.latent_log_var"),
        (["causal_decoder"], True, r"vae\.causal_decoder"),
        (["new_flag"], 1, r"vae\.new_flag = 1 is an unknown key"),
        (["encoder_base_channels"], 64, r"vae\.encoder_base_channels = 64 .* supported: 128, the latent"),
        (["encoder_blocks"], [], r"vae\.encoder_blocks = \[\] .* an odd number of blocks"),
        (["decoder_blocks"], 3, r"vae\.decoder_blocks = 3"),
        (["encoder_blocks", 0], "res_x", r"vae\.encoder_blocks\[0\] = 'res_x' .* \[name, options\]"),
        (["encoder_blocks", 0, 0], "attn", r"vae\.encoder_blocks\[0\] = 'attn' .* supported: res_x"),
        (["encoder_blocks", 1, 0], "compress_space", r"encoder_blocks\[1\] = 'compress_space' .*_res"),
        (["decoder_blocks", 1, 0], "compress_all_res", r"decoder_blocks\[1\] = 'compress_all_res'"),
        (["decoder_blocks", 0, 1], {"num_layers": 4, "inject_noise": True}, r"inject_noise = True"),
        (["decoder_blocks", 1, 1], {"multiplier": 2, "residual": True}, r"residual = True"),
        (["decoder_blocks", 1, 1], {}, r"decoder_blocks\[1\]\.multiplier is missing"),
        (["decoder_blocks", 0, 1], None, r"decoder_blocks\[0\] = None"),
        (["encoder_blocks", 0, 1], 0, r"encoder_blocks\[0\]\.num_layers = 0"),
        (["encoder_blocks", 1, 0], "compress_all_res", r"vae\.encoder_blocks = 'compression 16 x 32 x 32'"),
        (["encoder_blocks", 1, 1], {"multiplier": 3}, r"encoder_blocks\[1\]\.multiplier = 3 .* divisor of 4"),
    ],
)
def test_refuses(path: list[Any], value: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        video_vae_options(changed(path, value))
