# SPDX-License-Identifier: Apache-2.0
"""The image encoder in ONNX Runtime against the diffusers VAE."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import AutoencoderKLLTX2Video
from safetensors.torch import save_file

from ltxrt.errors import ExportError
from ltxrt_export import published
from ltxrt_export.networks import image_encoder
from ltxrt_export.networks.spec import NetworkSpec
from ltxrt_export.onnx_export import export_model
from ltxrt_export.vae_blocks import video_vae_options
from ltxrt_export.weights import TensorFile

PUBLISHED = published.checkpoint_config()


def random_vae(**changes: Any) -> AutoencoderKLLTX2Video:
    """As in LTX-2.3, but narrow and of one residual block a level."""
    options = {
        **video_vae_options(PUBLISHED),
        "block_out_channels": (128, 128, 128, 128),
        "decoder_block_out_channels": (32, 64, 64, 128),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLLTX2Video(**{**options, **changes}).eval().requires_grad_(False)
        vae.latents_mean.normal_()
        vae.latents_std.uniform_(0.5, 1.5)
    return vae


class Exported:
    """A VAE, and its image encoder as an ONNX file beside its weights, in a session."""

    def __init__(self, folder: Path) -> None:
        self.vae = random_vae()
        weights = folder / "vae.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in self.vae.state_dict().items()}, weights)
        self.spec: NetworkSpec = image_encoder.spec(self.vae, TensorFile.open(weights).tensors)
        self.model = export_model(self.spec)
        path = folder / "image_encoder.onnx"
        onnx.save_model(self.model, path)
        onnx.checker.check_model(path, full_check=True)
        self.session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("image"))


# The trace is at 2 x 3 latents.
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (5, 1), (4, 3)])
def test_tokens_equal_the_diffusers_class(exported: Exported, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    image = torch.rand(1, 3, 1, 32 * rows, 32 * columns, generator=generator) * 2 - 1
    (actual,) = exported.session.run(None, {"image": image.numpy()})
    vae = exported.vae
    mode = vae.encode(image).latent_dist.mode()
    latent = (mode - vae.latents_mean.view(1, -1, 1, 1, 1)) / vae.latents_std.view(1, -1, 1, 1, 1)
    expected = latent.permute(0, 2, 3, 4, 1).reshape(1, rows * columns, 128).numpy()
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) / np.linalg.norm(expected) < 1e-5


def test_graph_holds_no_foreign_operator(exported: Exported) -> None:
    operators = {node.op_type for node in exported.model.graph.node}
    assert not [name for name in operators if name.startswith(("Sequence", "Split", "Scatter", "NonZero", "Loop"))]


def test_spec_takes_the_encoder_and_the_statistics(exported: Exported) -> None:
    names = set(exported.spec.weights)
    assert names == set(exported.spec.module.state_dict())
    assert names == {name for name in exported.vae.state_dict() if name.startswith(("encoder.", "latents_"))}


def test_other_compression_is_refused() -> None:
    with pytest.raises(ExportError, match="spatial compression 16; allowed: 32"):
        image_encoder.spec(random_vae(spatial_compression_ratio=16), {})
