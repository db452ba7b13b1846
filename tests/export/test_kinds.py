# SPDX-License-Identifier: Apache-2.0
"""Wrong files in the place of a checkpoint or an upsampler, each named for what it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ltxrt.errors import ExportError
from ltxrt_export import kinds, published
from ltxrt_export.checkpoint import Checkpoint, Gemma, Upsampler
from ltxrt_export.kinds import Kind, kind_of
from ltxrt_export.synthetic import Layout, ModelConfigs, checkpoint_tensors, write_sparse, write_synthetic
from ltxrt_export.tiny.config import checkpoint_config, gemma_config, upsampler_config
from ltxrt_export.weights import TensorFile

DIT = "model.diffusion_model."
VECTOR: Layout = ("BF16", (4,))


@pytest.fixture(scope="module")
def configs() -> ModelConfigs:
    return ModelConfigs(checkpoint_config(), gemma_config(512), upsampler_config())


@pytest.fixture(scope="module")
def tensors(configs: ModelConfigs) -> dict[str, Layout]:
    return checkpoint_tensors(configs)


def written(path: Path, tensors: Mapping[str, Layout], version: str | None = "2.3.0", **config: Any) -> Path:
    metadata = {"config": json.dumps(config)} if config else {}
    write_sparse(path, tensors, metadata | ({} if version is None else {"model_version": version}))
    return path


def refusal(path: Path, *, as_upsampler: bool = False) -> str:
    with pytest.raises(ExportError) as caught:
        Upsampler.open(path) if as_upsampler else Checkpoint.open(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_checkpoint_itself(tmp_path: Path, configs: ModelConfigs) -> None:
    model = write_synthetic(tmp_path, configs)
    assert kind_of(TensorFile.open(model.checkpoint)) is Kind.DISTILLED
    assert Checkpoint.open(model.checkpoint).name == "ltx-2.3-22b-distilled-1.1"
    assert kind_of(TensorFile.open(model.upsampler)) is Kind.UPSAMPLER
    assert kind_of(TensorFile.open(model.text_encoder / "model-00001-of-00001.safetensors")) is Kind.TEXT_ENCODER


@pytest.mark.parametrize("name", ["ltx-2.3-22b-dev.safetensors", "my_DEV.safetensors", "dev.safetensors"])
def test_dev_by_its_name(tmp_path: Path, configs: ModelConfigs, tensors: dict[str, Layout], name: str) -> None:
    path = written(tmp_path / name, tensors, **configs.checkpoint)
    message = refusal(path)
    assert "this is the dev checkpoint of LTX-2.3" in message
    assert "allowed: the distilled single file, as ltx-2.3-22b-distilled-1.1.safetensors" in message
    assert Checkpoint.open(path, allow_dev=True).version == "2.3.0"


@pytest.mark.parametrize("name", ["device.safetensors", "dev-distilled-fused.safetensors", "developed.safetensors"])
def test_names_that_are_not_dev(tmp_path: Path, configs: ModelConfigs, tensors: dict[str, Layout], name: str) -> None:
    Checkpoint.open(written(tmp_path / name, tensors, **configs.checkpoint))


def test_dev_by_its_size(
    tmp_path: Path, configs: ModelConfigs, tensors: dict[str, Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "renamed.safetensors", tensors, **configs.checkpoint)
    Checkpoint.open(path)
    monkeypatch.setattr(kinds.published, "DEV_BYTES", path.stat().st_size)
    assert "this is the dev checkpoint" in refusal(path)


def test_dev_and_distilled_sizes_differ_by_metadata_alone() -> None:
    assert 0 < published.DISTILLED.bytes - published.DEV_BYTES < 1000


def test_ltx_20(tmp_path: Path, configs: ModelConfigs, tensors: dict[str, Layout]) -> None:
    path = written(tmp_path / "ltx-2-19b-distilled.safetensors", tensors, "2.0.0", **configs.checkpoint)
    assert "this is an LTX-2.0 (19B) checkpoint" in refusal(path)
    ungated = {key: layout for key, layout in tensors.items() if "to_gate_logits" not in key}
    assert "this is an LTX-2.0 (19B) checkpoint" in refusal(written(tmp_path / "x.safetensors", ungated, None))


def test_ltx_25(tmp_path: Path, configs: ModelConfigs, tensors: dict[str, Layout]) -> None:
    for name, stored in (("whole", tensors), ("vae", {"vae.decoder.x": VECTOR}), ("head", {"duration_head.w": VECTOR})):
        path = written(tmp_path / f"{name}.safetensors", stored, "2.5.0", **configs.checkpoint)
        assert "this is a file of LTX-2.5" in refusal(path)
        assert "this is a file of LTX-2.5" in refusal(path, as_upsampler=True)


def test_version_in_the_config(tmp_path: Path, tensors: dict[str, Layout]) -> None:
    path = written(tmp_path / "x.safetensors", tensors, None, model_version="2.5.1")
    assert kind_of(TensorFile.open(path)) is Kind.LTX_25


def test_video_only(tmp_path: Path, tensors: dict[str, Layout]) -> None:
    silent = {key: layout for key, layout in tensors.items() if "audio" not in key}
    path = written(tmp_path / "ltxv-13b-0.9.8.safetensors", silent, "0.9.8", transformer={})
    assert "this is an LTX-Video checkpoint without an audio stream" in refusal(path)


LAYER = f"{DIT}transformer_blocks.1.attn1.to_q"
SCALES: dict[str, Layout] = {f"{LAYER}.weight_scale": ("F32", ()), f"{LAYER}.input_scale": ("F32", ())}


def in_fp8(tensors: Mapping[str, Layout], **changes: Layout | None) -> dict[str, Layout]:
    """One layer as in the published FP8 files, then changed by the last part of the name (None removes)."""
    stored = {**tensors, f"{LAYER}.weight": ("F8_E4M3", tensors[f"{LAYER}.weight"][1]), **SCALES}
    for name, layout in changes.items():
        stored.pop(f"{LAYER}.{name}", None)
        if layout is not None:
            stored[f"{LAYER}.{name}"] = layout
    return stored


def test_fp8_as_published(tmp_path: Path, configs: ModelConfigs, tensors: dict[str, Layout]) -> None:
    path = written(tmp_path / "ltx-2.3-22b-distilled-fp8.safetensors", in_fp8(tensors), **configs.checkpoint)
    assert kind_of(TensorFile.open(path)) is Kind.DISTILLED
    Checkpoint.open(path)
    dev = path.rename(tmp_path / "ltx-2.3-22b-dev-fp8.safetensors")
    assert "this is the dev checkpoint of LTX-2.3" in refusal(dev)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_scale": None},
        {"input_scale": None},
        {"weight_scale": ("BF16", ())},
        {"weight_scale": ("F32", (128,))},
        {"weight_scale": ("F32", (1, 2))},
        {"input_scale": ("F32", (2,))},
        {"weight": ("F8_E5M2", (128, 128))},
        {"bias": ("F8_E4M3", (128,))},
    ],
)
def test_fp8_in_another_way(
    tmp_path: Path, configs: ModelConfigs, tensors: dict[str, Layout], changes: dict[str, Layout | None]
) -> None:
    path = written(tmp_path / "ltx-2.3-22b-distilled-fp8.safetensors", in_fp8(tensors, **changes), **configs.checkpoint)
    assert "this is an fp8 checkpoint without the scales of the published ones" in refusal(path)


@pytest.mark.parametrize("layer", [f"{DIT}patchify_proj", "vae.decoder.conv_in.conv", f"{LAYER[:-4]}q_norm"])
def test_fp8_outside_of_the_blocks_linears(
    tmp_path: Path, configs: ModelConfigs, tensors: dict[str, Layout], layer: str
) -> None:
    scales: dict[str, Layout] = {f"{layer}.weight_scale": ("F32", ()), f"{layer}.input_scale": ("F32", ())}
    stored = {**tensors, **scales, f"{layer}.weight": ("F8_E4M3", tensors[f"{layer}.weight"][1])}
    assert "this is an fp8 checkpoint" in refusal(written(tmp_path / "x.safetensors", stored, **configs.checkpoint))


def test_scales_without_a_weight_are_unexpected(
    tmp_path: Path, configs: ModelConfigs, tensors: dict[str, Layout]
) -> None:
    path = written(tmp_path / "x.safetensors", {**tensors, **SCALES}, **configs.checkpoint)
    with pytest.raises(ExportError, match=r"transformer: 2 tensors unexpected .*weight_scale"):
        Checkpoint.open(path).component("transformer")


@pytest.mark.parametrize("suffix", ["lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight"])
def test_lora(tmp_path: Path, suffix: str) -> None:
    stored = {f"diffusion_model.transformer_blocks.0.attn1.to_k.{suffix}": ("BF16", (384, 4096))}
    path = written(tmp_path / "ltx-2.3-22b-distilled-lora-384-1.1.safetensors", stored, None)
    assert "this is a LoRA" in refusal(path)
    assert "this is a LoRA" in refusal(path, as_upsampler=True)


def test_upsampler_and_checkpoint_swapped(tmp_path: Path, configs: ModelConfigs) -> None:
    model = write_synthetic(tmp_path, configs)
    assert refusal(model.upsampler) == (
        f"{model.upsampler}: this is a latent upsampler; allowed: the distilled single file, as"
        " ltx-2.3-22b-distilled-1.1.safetensors"
    )
    assert refusal(model.checkpoint, as_upsampler=True) == (
        f"{model.checkpoint}: this is the distilled LTX-2.3 checkpoint; allowed: the x2 spatial upsampler, as"
        " ltx-2.3-spatial-upscaler-x2-1.1.safetensors"
    )


@pytest.mark.parametrize(
    "key",
    ["language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.norm.weight", "vision_tower.x.weight"],
)
def test_text_encoder(tmp_path: Path, key: str) -> None:
    path = written(tmp_path / "model-00001-of-00005.safetensors", {key: VECTOR}, None, format="pt")
    assert "this is a part of a text encoder" in refusal(path)
    assert "this is a part of a text encoder" in refusal(path, as_upsampler=True)


@pytest.mark.parametrize(
    "key", ["transformer_blocks.0.attn1.to_q.weight", "video_connector.learnable_registers", "latents_mean"]
)
def test_part_of_a_diffusers_folder(tmp_path: Path, key: str) -> None:
    path = written(tmp_path / "diffusion_pytorch_model.safetensors", {key: VECTOR}, None)
    message = refusal(path)
    assert "this is a part of a folder in the diffusers layout" in message
    assert "pass that folder" in message


def test_another_model_is_left_to_the_other_checks(tmp_path: Path) -> None:
    path = written(tmp_path / "sd.safetensors", {"model.unet.weight": VECTOR}, None)
    assert kind_of(TensorFile.open(path)) is Kind.UNKNOWN
    assert "no config in its metadata" in refusal(path)


@pytest.mark.parametrize("config", ["{", "[]", "3"])
def test_a_damaged_config_does_not_hide_the_kind(tmp_path: Path, tensors: dict[str, Layout], config: str) -> None:
    path = tmp_path / "dev.safetensors"
    write_sparse(path, tensors, {"config": config})
    assert kind_of(TensorFile.open(path)) is Kind.DEV


def test_truncated(tmp_path: Path, configs: ModelConfigs, tensors: dict[str, Layout]) -> None:
    path = written(tmp_path / "x.safetensors", tensors, **configs.checkpoint)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    assert f"truncated, {size - 1} bytes where its header needs {size}" in refusal(path)
    with path.open("r+b") as file:
        file.truncate(1000)
    assert "not a safetensors file, or truncated" in refusal(path)


def test_file_in_the_place_of_the_text_encoder(tmp_path: Path, configs: ModelConfigs) -> None:
    model = write_synthetic(tmp_path, configs)
    with pytest.raises(ExportError, match=r"this is a file; allowed: the folder of Gemma 3"):
        Gemma.open(model.checkpoint)
