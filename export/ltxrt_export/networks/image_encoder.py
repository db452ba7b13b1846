# SPDX-License-Identifier: Apache-2.0
"""The video VAE encoder on a single picture: the first frame of a clip as normalised tokens.

A picture is a clip of one frame, which the causal encoder continues into the past by repeating it. Of the
latent distribution only the mean is used.

Numerics: diffusers src/diffusers/models/autoencoders/autoencoder_kl_ltx2.py (LTX2VideoEncoder3d, used as it is),
Lightricks/LTX-2 packages/ltx-core/src/ltx_core/model/video_vae/video_vae.py.
"""

from collections.abc import Mapping

from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video, LTX2VideoEncoder3d
from torch import Tensor, nn

from ltxrt.errors import ExportError
from ltxrt.shapes import SPATIAL_COMPRESSION
from ltxrt_export.weights import TensorRef

from .spec import Axis, NetworkSpec, Port

__all__ = ["ImageEncoder", "spec"]


class ImageEncoder(nn.Module):
    """A picture to normalised latent tokens.

    Args:
        vae: Its encoder and latent statistics are used; parameter names stay the VAE's.
    """

    def __init__(self, vae: AutoencoderKLLTX2Video) -> None:
        super().__init__()
        self.encoder: LTX2VideoEncoder3d = vae.encoder
        self.latents_mean: Tensor
        self.latents_std: Tensor
        self.register_buffer("latents_mean", vae.latents_mean)
        self.register_buffer("latents_std", vae.latents_std)

    def forward(self, image: Tensor) -> Tensor:
        """Encode ``image[1, 3, 1, H, W]`` in [-1, 1], sides multiples of 32, to tokens [1, h*w, 128], row by row."""
        mean = self.encoder(image)[:, : self.latents_mean.shape[0]]
        return (mean.flatten(2).transpose(1, 2) - self.latents_mean) / self.latents_std


def spec(vae: AutoencoderKLLTX2Video, weights: Mapping[str, TensorRef]) -> NetworkSpec:
    """The ``image_encoder`` network.

    Args:
        vae: In eval mode; real or fake tensors.
        weights: Stored tensors by the VAE's parameter names; those of the decoder are not used.

    Raises:
        ExportError: The VAE does not compress 32x32 pixels to one latent position.
    """
    ratio = vae.spatial_compression_ratio
    if ratio != SPATIAL_COMPRESSION:
        raise ExportError(f"video VAE encoder: spatial compression {ratio}; allowed: {SPATIAL_COMPRESSION}")
    module = ImageEncoder(vae).eval()
    return NetworkSpec(
        name="image_encoder",
        module=module,
        inputs=(Port("image", "float32", (1, 3, 1, f"{ratio}*h", f"{ratio}*w")),),
        outputs=(Port("image_tokens", "float32", (1, "tokens", module.latents_mean.shape[0])),),
        axes={"h": Axis(1, 128, 2), "w": Axis(1, 128, 3), "tokens": Axis(1, 128 * 128, 6)},
        weights={name: weights[name] for name in module.state_dict()},
    )
