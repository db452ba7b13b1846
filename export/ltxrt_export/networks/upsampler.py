# SPDX-License-Identifier: Apache-2.0
"""The latent upsampler between the two stages: twice the height and width, the same frames.

It works on un-normalised latents, so the video VAE's statistics are applied around it. Its group norms pool
over the whole clip, which therefore goes through in one piece.

Numerics: diffusers src/diffusers/pipelines/ltx2/latent_upsampler.py (LTX2LatentUpsamplerModel, used as it is),
Lightricks/LTX-2 packages/ltx-core/src/ltx_core/model/upsampler/model.py (upsample_video).
"""

from collections.abc import Mapping

from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from torch import Tensor, nn

from ltxrt.errors import ExportError
from ltxrt_export.weights import TensorRef

from .spec import Axis, NetworkSpec, Port

__all__ = ["Upsampler", "spec"]


class Upsampler(nn.Module):
    """Normalised latents to normalised latents of twice the size.

    Args:
        upsampler: The x2 spatial upsampler without rational resampling.
        vae: The video VAE, for its latent statistics.

    Raises:
        ExportError: It is another kind of upsampler.
    """

    def __init__(self, upsampler: LTX2LatentUpsamplerModel, vae: AutoencoderKLLTX2Video) -> None:
        super().__init__()
        config = upsampler.config
        expected = {
            "dims": 3,
            "spatial_upsample": True,
            "temporal_upsample": False,
            "use_rational_resampler": False,
        }
        for field, value in expected.items():
            if config[field] != value:
                raise ExportError(f"latent upsampler: {field} is {config[field]}; allowed: {value}")
        self.upsampler = upsampler
        self.latents_mean: Tensor
        self.latents_std: Tensor
        self.register_buffer("latents_mean", vae.latents_mean)
        self.register_buffer("latents_std", vae.latents_std)

    def forward(self, latent: Tensor) -> Tensor:
        """Upsample ``latent[1, 128, F, h, w]`` to [1, 128, F, 2h, 2w], both normalised."""
        mean, std = (values.view(1, -1, 1, 1, 1) for values in (self.latents_mean, self.latents_std))
        return (self.upsampler(latent * std + mean) - mean) / std


def spec(
    upsampler: LTX2LatentUpsamplerModel,
    vae: AutoencoderKLLTX2Video,
    weights: Mapping[str, TensorRef],
    vae_weights: Mapping[str, TensorRef],
) -> NetworkSpec:
    """The ``upsampler`` network.

    Args:
        upsampler: In eval mode; real or fake tensors.
        vae: The video VAE whose latents it upsamples.
        weights: Stored tensors by the upsampler's parameter names.
        vae_weights: Stored tensors by the VAE's parameter names; only its latent statistics are used.

    Raises:
        ExportError: As ``Upsampler``.
    """
    module = Upsampler(upsampler, vae).eval()
    channels = module.latents_mean.shape[0]
    stored = {f"upsampler.{name}": weights[name] for name in upsampler.state_dict()}
    stored |= {name: vae_weights[name] for name in ("latents_mean", "latents_std")}
    return NetworkSpec(
        name="upsampler",
        module=module,
        inputs=(Port("latent", "float32", (1, channels, "f", "h", "w")),),
        outputs=(Port("upsampled", "float32", (1, channels, "f", "2*h", "2*w")),),
        axes={"f": Axis(1, 61, 3), "h": Axis(1, 64, 2), "w": Axis(1, 64, 4)},
        weights=stored,
    )
