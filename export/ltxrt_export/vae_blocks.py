# SPDX-License-Identifier: Apache-2.0
"""The video VAE's block lists: from Lightricks' config to the widths and layer counts of diffusers' class.

Encoder blocks run as listed: ``res_x`` (n residual blocks), then a compressing block that multiplies the width,
and so on, a last ``res_x``. Decoder blocks are listed output side first and run reversed; each expanding block
divides the width by its multiplier. Sources: Lightricks/LTX-2 packages/ltx-core/src/ltx_core/model/video_vae/
video_vae.py, conv_video_decoder.py (execution order, widths); huggingface/diffusers
src/diffusers/models/autoencoders/autoencoder_kl_ltx2.py (what the class takes).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ltxrt.shapes import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from ltxrt_export.section import Section, refused

__all__ = ["BlockChain", "block_chains", "video_vae_options"]

_FIXED: Mapping[str, Any] = {
    "_class_name": "CausalVideoAutoencoder",
    "causal_decoder": False,
    "dims": 3,
    "in_channels": 3,
    "latent_log_var": "uniform",
    "norm_layer": "pixel_norm",
    "normalize_latent_channels": False,
    "out_channels": 3,
    "patch_size": 4,
    "scaling_factor": 1.0,
    "spatial_padding_mode": "zeros",
    "timestep_conditioning": False,
    "use_quant_conv": False,
}
_OPTIONAL: Mapping[str, Any] = {"encoder_spatial_padding_mode": "zeros"}
_SIZES = (
    "decoder_base_channels",
    "decoder_blocks",
    "encoder_base_channels",
    "encoder_blocks",
    "latent_channels",
)
#: Resampling block name, less the encoder's suffix "_res": diffusers' name and (time, height, width) stride.
_RESAMPLING = {
    "compress_time": ("temporal", (2, 1, 1)),
    "compress_space": ("spatial", (1, 2, 2)),
    "compress_all": ("spatiotemporal", (2, 2, 2)),
}


@dataclass(frozen=True, slots=True)
class BlockChain:
    """One half of the VAE in the order of execution: layers[0], resampling[0], layers[1], ..., layers[-1].

    Attributes:
        layers: Residual blocks per level, one more entry than ``resampling``.
        resampling: Resampling block names less "_res".
        multipliers: By what each resampling block multiplies (encoder) or divides (decoder) the width.
    """

    layers: tuple[int, ...]
    resampling: tuple[str, ...]
    multipliers: tuple[int, ...]


def block_chains(config: Mapping[str, Any]) -> tuple[BlockChain, BlockChain]:
    """Encoder and decoder chain of ``config["vae"]``.

    Raises:
        ExportError: A block is unknown, out of place or has an option that is not supported.
    """
    section = Section.of(config, "vae")
    return _chain(section, "encoder_blocks", "_res"), _chain(section, "decoder_blocks", "")


def video_vae_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor options of ``diffusers.AutoencoderKLLTX2Video`` for ``config["vae"]``.

    Raises:
        ExportError: A key or a block is not supported.
    """
    section = Section.of(config, "vae")
    section.only(_FIXED, _OPTIONAL, _SIZES)
    section.expect(_FIXED)
    section.expect(_OPTIONAL, optional=True)
    encoder, decoder = block_chains(config)
    latents = section.size("latent_channels")
    if section.size("encoder_base_channels") != latents:
        # The reference does not read this key: its encoder starts at the latent width.
        raise section.refuse("encoder_base_channels", f"{latents}, the latent width")
    for key, chain in (("encoder_blocks", encoder), ("decoder_blocks", decoder)):
        _check_compression(section, key, chain)
    widths = _encoder_widths(section, encoder, latents)
    decoder_widths = _decoder_widths(decoder, section.size("decoder_base_channels"))
    levels = len(decoder.resampling)
    return {
        "latent_channels": latents,
        "block_out_channels": widths[1:],
        "down_block_types": ("LTX2VideoDownBlock3D",) * len(encoder.resampling),
        "layers_per_block": encoder.layers,
        "spatio_temporal_scaling": (True,) * len(encoder.resampling),
        "downsample_type": tuple(_RESAMPLING[name][0] for name in encoder.resampling),
        # The class reverses all of these but upsample_type.
        "decoder_block_out_channels": decoder_widths[-2::-1],
        "decoder_layers_per_block": decoder.layers[::-1],
        "decoder_spatio_temporal_scaling": (True,) * levels,
        "decoder_inject_noise": (False,) * (levels + 1),
        "upsample_type": tuple(_RESAMPLING[name][0] for name in decoder.resampling),
        "upsample_residual": (False,) * levels,
        "upsample_factor": decoder.multipliers[::-1],
        "timestep_conditioning": False,
        "patch_size": _FIXED["patch_size"],
        "encoder_causal": True,
        "decoder_causal": False,
        "encoder_spatial_padding_mode": "zeros",
        "decoder_spatial_padding_mode": "zeros",
        "spatial_compression_ratio": SPATIAL_COMPRESSION,
        "temporal_compression_ratio": TEMPORAL_COMPRESSION,
    }


def _chain(section: Section, key: str, suffix: str) -> BlockChain:
    """The blocks under ``key``, which alternate between residual and resampling ones."""
    blocks = section.required(key)
    if not isinstance(blocks, list | tuple) or len(blocks) % 2 == 0:
        raise section.refuse(key, "an odd number of blocks: res_x, then a resampling block and res_x each")
    layers: list[int] = []
    names: list[str] = []
    multipliers: list[int] = []
    for index, block in enumerate(blocks):
        if not isinstance(block, list | tuple) or len(block) != 2:
            raise refused(f"{section.path}.{key}[{index}]", block, "[name, options]")
        name, options = block
        path = f"{section.path}.{key}[{index}]"
        known = {"res_x"} if index % 2 == 0 else {resampling + suffix for resampling in _RESAMPLING}
        if name not in known:
            raise refused(path, name, ", ".join(sorted(known)))
        option = Section.of({path: {"num_layers": options} if isinstance(options, int) else options}, path)
        if index % 2 == 0:
            option.only(("num_layers", "inject_noise"))
            option.expect({"inject_noise": False}, optional=True)
            layers.append(option.size("num_layers"))
        else:
            option.only(("multiplier", "residual"))
            option.expect({"residual": False}, optional=True)
            names.append(name.removesuffix(suffix))
            multipliers.append(option.size("multiplier"))
    step = 1 if suffix else -1
    return BlockChain(tuple(layers[::step]), tuple(names[::step]), tuple(multipliers[::step]))


def _check_compression(section: Section, key: str, chain: BlockChain) -> None:
    """The runtime's compression factors are constants: 8 frames and 32 pixels to one latent."""
    time, space = 1, int(_FIXED["patch_size"])
    for name in chain.resampling:
        stride = _RESAMPLING[name][1]
        time, space = time * stride[0], space * stride[1]
    if (time, space) != (TEMPORAL_COMPRESSION, SPATIAL_COMPRESSION):
        raise refused(
            f"{section.path}.{key}",
            f"compression {time} x {space} x {space}",
            f"{TEMPORAL_COMPRESSION} x {SPATIAL_COMPRESSION} x {SPATIAL_COMPRESSION}",
        )


def _encoder_widths(section: Section, chain: BlockChain, base: int) -> tuple[int, ...]:
    """Width of each level. A downsampler averages groups of its folded input onto its output: both must divide."""
    widths = [base]
    for index, (name, multiplier) in enumerate(zip(chain.resampling, chain.multipliers, strict=True)):
        stride = _RESAMPLING[name][1]
        cells = stride[0] * stride[1] * stride[2]
        if cells % multiplier or widths[-1] * multiplier % cells:
            raise refused(
                f"{section.path}.encoder_blocks[{2 * index + 1}].multiplier",
                multiplier,
                f"a divisor of {cells} that makes {widths[-1]} channels a multiple of {cells}",
            )
        widths.append(widths[-1] * multiplier)
    return tuple(widths)


def _decoder_widths(chain: BlockChain, base: int) -> tuple[int, ...]:
    """Width of each level, from the latent side to ``base`` at the output side."""
    widths = [base]
    for multiplier in reversed(chain.multipliers):
        widths.append(widths[-1] * multiplier)
    return tuple(reversed(widths))
