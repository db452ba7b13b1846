# SPDX-License-Identifier: Apache-2.0
"""The latent upsampler in ONNX Runtime against the diffusers class."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel
from safetensors.torch import save_file

from ltxrt.errors import ExportError
from ltxrt_export.networks import upsampler
from ltxrt_export.onnx_export import export_model
from ltxrt_export.weights import TensorFile


def random_upsampler(**changes: Any) -> LTX2LatentUpsamplerModel:
    """As published, but narrow and of two residual blocks."""
    options = {"mid_channels": 64, "num_blocks_per_stage": 1, "use_rational_resampler": False, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LTX2LatentUpsamplerModel(**options).eval().requires_grad_(False)


def random_statistics() -> Any:
    """What the upsampler needs of a video VAE."""
    generator = torch.Generator().manual_seed(1)
    mean, spread = torch.randn(128, generator=generator), torch.rand(128, generator=generator)
    return SimpleNamespace(latents_mean=mean, latents_std=0.5 + spread)


class Exported:
    """An upsampler as an ONNX file beside its weights, in a session."""

    def __init__(self, folder: Path) -> None:
        self.model, self.vae = random_upsampler(), random_statistics()
        save_file(dict(self.model.state_dict()), folder / "upsampler.safetensors")
        save_file(vars(self.vae), folder / "vae.safetensors")
        self.weights = TensorFile.open(folder / "upsampler.safetensors").tensors
        self.vae_weights = TensorFile.open(folder / "vae.safetensors").tensors
        self.spec = upsampler.spec(self.model, self.vae, self.weights, self.vae_weights)
        self.graph = export_model(self.spec)
        path = folder / "upsampler.onnx"
        onnx.save_model(self.graph, path)
        onnx.checker.check_model(path, full_check=True)
        self.session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("upsampler"))


# The trace is at 3 x 2 x 4.
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 3), (5, 3, 1), (4, 5, 6)])
def test_latents_equal_the_diffusers_class(exported: Exported, shape: tuple[int, int, int]) -> None:
    latent = torch.randn(1, 128, *shape, generator=torch.Generator().manual_seed(shape[0]))
    (actual,) = exported.session.run(None, {"latent": latent.numpy()})
    mean, std = (values.view(1, -1, 1, 1, 1) for values in (exported.vae.latents_mean, exported.vae.latents_std))
    expected = ((exported.model(latent * std + mean) - mean) / std).numpy()
    assert actual.shape == expected.shape == (1, 128, shape[0], 2 * shape[1], 2 * shape[2])
    assert np.linalg.norm(actual - expected) / np.linalg.norm(expected) < 1e-5


def test_graph_holds_no_foreign_operator(exported: Exported) -> None:
    operators = {node.op_type for node in exported.graph.graph.node}
    assert not [name for name in operators if name.startswith(("Sequence", "Split", "Scatter", "NonZero", "Loop"))]
    assert "GroupNormalization" in operators


def test_spec_names_every_weight_in_its_own_file(exported: Exported) -> None:
    spec = exported.spec
    assert set(spec.weights) == set(spec.module.state_dict())
    # The class has a child called "upsampler" too: only the wrapper's prefix goes.
    assert spec.weights["upsampler.upsampler.0.weight"] is exported.weights["upsampler.0.weight"]
    assert spec.weights["upsampler.initial_conv.bias"] is exported.weights["initial_conv.bias"]
    assert spec.weights["latents_std"] is exported.vae_weights["latents_std"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_rational_resampler": True}, "use_rational_resampler is True; allowed: False"),
        ({"spatial_upsample": False, "temporal_upsample": True}, "spatial_upsample is False; allowed: True"),
        ({"temporal_upsample": True}, "temporal_upsample is True; allowed: False"),
        ({"dims": 2}, "dims is 2; allowed: 3"),
    ],
)
def test_other_upsamplers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=f"^latent upsampler: {message}"):
        upsampler.Upsampler(random_upsampler(**changes), random_statistics())
