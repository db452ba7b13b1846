# SPDX-License-Identifier: Apache-2.0
"""The loader on the tiny model: real values, and one clear error for each fault planted in its files."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltxrt.errors import ExportError
from ltxrt_export import architecture
from ltxrt_export.checkpoint import Checkpoint, Component, Gemma, Upsampler
from ltxrt_export.tiny.config import CONTEXT_TOKENS
from ltxrt_export.tiny.write import TinyPaths, write_tiny

NAMES = ("transformer", "connectors", "video_vae", "audio_vae")
DIT = "model.diffusion_model."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copied(tiny: TinyPaths, tmp_path: Path) -> TinyPaths:
    """A copy to damage."""
    shutil.copytree(tiny.checkpoint.parent, tmp_path / "tiny")
    folder = tmp_path / "tiny"
    return TinyPaths(folder / tiny.checkpoint.name, folder / "gemma", folder / tiny.upsampler.name)


def rewrite(
    path: Path,
    change: Callable[[dict[str, Tensor]], None] = lambda _: None,
    *,
    edit: Callable[[dict[str, Any]], None] = lambda _: None,
    **metadata: str | None,
) -> None:
    """Write the file anew with changed tensors, config or metadata (None removes)."""
    with safe_open(path, "pt") as file:
        kept = dict(file.metadata())
    tensors = load_file(path)
    change(tensors)
    if "config" in kept:
        values = json.loads(kept["config"])
        edit(values)
        kept["config"] = json.dumps(values)
    kept |= {key: value for key, value in metadata.items() if value is not None}
    for key in [key for key, value in metadata.items() if value is None]:
        del kept[key]
    save_file(tensors, path, metadata=kept)


def components(paths: TinyPaths) -> list[Component]:
    checkpoint = Checkpoint.open(paths.checkpoint)
    return [
        *(checkpoint.component(name) for name in NAMES),
        Gemma.open(paths.text_encoder).component(),
        Upsampler.open(paths.upsampler).component(),
    ]


def test_opens(tiny: TinyPaths) -> None:
    checkpoint = Checkpoint.open(tiny.checkpoint)
    assert (checkpoint.path, checkpoint.name, checkpoint.version) == (
        tiny.checkpoint,
        "ltx-2.3-tiny",
        "2.3.0",
    )
    assert checkpoint.config["transformer"]["num_layers"] == 5
    gemma = Gemma.open(tiny.text_encoder)
    assert (gemma.context_length, gemma.tokenizer_path.is_file()) == (CONTEXT_TOKENS, True)
    checkpoint.check_text_encoder(gemma)


def test_components_cover_the_file_once(tiny: TinyPaths) -> None:
    checkpoint = Checkpoint.open(tiny.checkpoint)
    used = [ref.key for name in NAMES for ref in checkpoint.component(name).weights.values()]
    assert sorted(used) == sorted(checkpoint.file.tensors)


def test_load_gives_the_stored_values(tiny: TinyPaths) -> None:
    for component in components(tiny):
        module = component.load()
        state = module.state_dict()
        assert set(state) == set(component.weights)
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        for name, ref in component.weights.items():
            raw = ref.path.read_bytes()[ref.offset : ref.offset + ref.nbytes]
            dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[ref.dtype]
            stored = torch.frombuffer(bytearray(raw), dtype=dtype).reshape(ref.shape)
            assert state[name].dtype == torch.float32
            assert torch.equal(state[name], stored.float()), name


def test_load_in_another_dtype(tiny: TinyPaths) -> None:
    module = Checkpoint.open(tiny.checkpoint).component("transformer").load(torch.bfloat16)
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.bfloat16}


def test_buffers_that_are_not_stored_are_those_of_an_ordinary_build(tiny: TinyPaths) -> None:
    for component in components(tiny):
        loaded, built = component.load(), component.build()
        for name, buffer in built.named_buffers():
            if name not in component.weights:
                assert torch.equal(dict(loaded.named_buffers())[name], buffer), name


def test_build_takes_the_active_device(tiny: TinyPaths) -> None:
    for component in components(tiny):
        with torch.device("meta"):
            assert all(value.is_meta for value in component.build().state_dict().values())


def test_modulation_tables_alone_are_fp32(tiny: TinyPaths) -> None:
    for component in components(tiny):
        for name, ref in component.weights.items():
            assert ref.dtype == ("F32" if "scale_shift_table" in name else "BF16"), name


def test_no_such_component(tiny: TinyPaths) -> None:
    with pytest.raises(ValueError, match="'vocoder' is not a component; allowed: transformer"):
        Checkpoint.open(tiny.checkpoint).component("vocoder")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("transformer", f"{DIT}transformer_blocks.0.attn1.to_q.weight"),
        ("connectors", f"{DIT}video_embeddings_connector.learnable_registers"),
        ("connectors", "text_embedding_projection.video_aggregate_embed.weight"),
        ("video_vae", "vae.per_channel_statistics.std-of-means"),
        ("audio_vae", "audio_vae.encoder.conv_in.conv.bias"),
    ],
)
def test_missing_tensor(copied: TinyPaths, name: str, key: str) -> None:
    rewrite(copied.checkpoint, lambda tensors: tensors.__delitem__(key))
    with pytest.raises(ExportError) as error:
        Checkpoint.open(copied.checkpoint).component(name)
    assert str(error.value) == f"{copied.checkpoint}: {name}: 1 tensors missing ({key})"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("transformer", f"{DIT}transformer_blocks.5.attn1.to_q.weight"),
        ("transformer", f"{DIT}caption_projection.linear_1.weight"),
        ("video_vae", "vae.per_channel_statistics.channel"),
        ("audio_vae", "audio_vae.encoder.mid.attn_1.q.weight"),
    ],
)
def test_unexpected_tensor(copied: TinyPaths, name: str, key: str) -> None:
    rewrite(copied.checkpoint, lambda tensors: tensors.update({key: torch.zeros(2)}))
    with pytest.raises(ExportError) as error:
        Checkpoint.open(copied.checkpoint).component(name)
    assert str(error.value) == f"{copied.checkpoint}: {name}: 1 tensors unexpected ({key})"


def test_all_faults_in_one_line_with_a_few_names(copied: TinyPaths) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for index in range(5):
            block = f"{DIT}transformer_blocks.{index}."
            del tensors[f"{block}ff.net.2.bias"]
            tensors[f"{block}extra"] = torch.zeros(1)
        tensors[f"{DIT}proj_out.bias"] = torch.zeros(31)
        tensors[f"{DIT}proj_out.weight"] = tensors[f"{DIT}proj_out.weight"].to(torch.float64)

    rewrite(copied.checkpoint, change)
    with pytest.raises(ExportError) as error:
        Checkpoint.open(copied.checkpoint).component("transformer")
    message = str(error.value)
    assert "\n" not in message
    assert "5 tensors missing (" in message
    assert "transformer_blocks.3.ff.net.2.bias and 1 more)" in message
    assert "5 tensors unexpected (" in message
    assert f"1 tensors of another shape ({DIT}proj_out.bias [31] for [32])" in message
    assert f"of a dtype other than BF16, F16, F32 ({DIT}proj_out.weight F64)" in message


def test_tensor_of_no_component(copied: TinyPaths) -> None:
    rewrite(copied.checkpoint, lambda tensors: tensors.update({"duration_head.w": torch.zeros(2)}))
    with pytest.raises(ExportError, match=r"1 tensors of no known component \(duration_head\.w\)"):
        Checkpoint.open(copied.checkpoint)


def test_parts_that_are_never_read_may_be_there(copied: TinyPaths) -> None:
    unread = {"vocoder.vocoder.conv_pre.bias": torch.zeros(2), "audio_vae.decoder.x": torch.zeros(2)}
    rewrite(copied.checkpoint, lambda tensors: tensors.update(unread))
    checkpoint = Checkpoint.open(copied.checkpoint)
    assert all(checkpoint.component(name).weights for name in NAMES)


@pytest.mark.parametrize("version", ["2.3.0", "2.3", "2.3.rc1", "2.3-distilled-1.1", "2.3.12"])
def test_versions_that_fit(copied: TinyPaths, version: str) -> None:
    rewrite(copied.checkpoint, model_version=version)
    assert Checkpoint.open(copied.checkpoint).version == version


@pytest.mark.parametrize("version", ["2.4.0", "2.30", "2", "3.2.3", "", "v2.3"])
def test_versions_that_do_not(copied: TinyPaths, version: str) -> None:
    rewrite(copied.checkpoint, model_version=version)
    with pytest.raises(ExportError, match=rf"model_version '{version}' is another generation.*supported: 2\.3"):
        Checkpoint.open(copied.checkpoint)


def test_no_version(copied: TinyPaths) -> None:
    rewrite(copied.checkpoint, model_version=None)
    with pytest.raises(ExportError, match=r"no model_version in its metadata; supported: 2\.3"):
        Checkpoint.open(copied.checkpoint)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no config in its metadata"),
        ("{", "the config in its metadata is not JSON"),
        ("[1]", r"the config in its metadata is \[1\]; allowed: an object"),
        ("{}", "transformer is missing"),
    ],
)
def test_damaged_config(copied: TinyPaths, config: str | None, message: str) -> None:
    rewrite(copied.checkpoint, config=config)
    with pytest.raises(ExportError, match=message):
        Checkpoint.open(copied.checkpoint)


def test_unsupported_flag_is_named(copied: TinyPaths) -> None:
    rewrite(copied.checkpoint, edit=lambda config: config["transformer"].update(rope_type="interleaved"))
    checkpoint = Checkpoint.open(copied.checkpoint)
    with pytest.raises(ExportError, match=r"transformer\.rope_type = 'interleaved'"):
        checkpoint.component("transformer")
    assert checkpoint.component("video_vae").weights


def test_config_of_another_size_is_a_wrong_shape(copied: TinyPaths) -> None:
    rewrite(copied.checkpoint, edit=lambda config: config["vae"].update(decoder_base_channels=16))
    with pytest.raises(ExportError, match=r"video_vae: \d+ tensors of another shape \(vae\.decoder\.conv_in"):
        Checkpoint.open(copied.checkpoint).component("video_vae")


def test_projections_that_are_not_whole_hidden_states(copied: TinyPaths) -> None:
    key = "text_embedding_projection.video_aggregate_embed.weight"
    rewrite(copied.checkpoint, lambda tensors: tensors.update({key: torch.zeros(128, 449)}))
    with pytest.raises(ExportError, match=r"is \[128, 449\]; its columns are not whole hidden states"):
        Checkpoint.open(copied.checkpoint).component("connectors")


@pytest.mark.parametrize("damage", ["truncated", "header", "missing"])
def test_damaged_file(copied: TinyPaths, damage: str) -> None:
    path = copied.checkpoint
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-1000])
    elif damage == "header":
        content[9] ^= 0xFF
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(ExportError) as error:
        Checkpoint.open(path)
    assert "\n" not in str(error.value)


def test_file_that_goes_away_before_loading(copied: TinyPaths) -> None:
    component = Upsampler.open(copied.upsampler).component()
    copied.upsampler.unlink()
    with pytest.raises(ExportError, match=r"upscaler\.safetensors: \S+ cannot be read"):
        component.load()


def test_file_that_becomes_shorter_before_loading(copied: TinyPaths) -> None:
    component = Upsampler.open(copied.upsampler).component()
    os.truncate(copied.upsampler, copied.upsampler.stat().st_size - 1)
    with pytest.raises(ExportError, match=r"upscaler\.safetensors: \S+ cannot be read: the file became shorter"):
        component.load()


def test_some_tensors_alone(tiny: TinyPaths) -> None:
    component = Checkpoint.open(tiny.checkpoint).component("video_vae")
    some = component.tensors(("latents_std", "latents_mean"))
    state = component.load().state_dict()
    assert list(some) == ["latents_std", "latents_mean"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in some.items())


def test_upsampler_of_another_kind(copied: TinyPaths) -> None:
    rewrite(copied.upsampler, edit=lambda config: config.update(temporal_upsample=True))
    with pytest.raises(ExportError, match=r"upsampler\.temporal_upsample = True"):
        Upsampler.open(copied.upsampler).component()


def test_upsampler_is_strict(copied: TinyPaths) -> None:
    rewrite(copied.upsampler, lambda tensors: tensors.update(kernel=torch.zeros(1)))
    with pytest.raises(ExportError, match=r"upsampler: 1 tensors unexpected \(kernel\)"):
        Upsampler.open(copied.upsampler).component()


def shard(folder: Path) -> dict[str, str]:
    """Split ``model.safetensors`` in two, as large models are published; gives the weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {key: names[index % 2] for index, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_gemma_in_shards_is_gemma_in_one_file(tiny: TinyPaths, copied: TinyPaths) -> None:
    shard(copied.text_encoder)
    whole = Gemma.open(tiny.text_encoder).component().load().state_dict()
    split = Gemma.open(copied.text_encoder).component()
    assert len({ref.path for ref in split.weights.values()}) == 2
    loaded = split.load().state_dict()
    assert set(loaded) == set(whole)
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "weight_map is {}"),
        ({"a": "../model.safetensors"}, "'../model.safetensors' is not the name of a file in this folder"),
        ({"a": 3}, "3 is not the name of a file"),
        ({"a": "gone.safetensors"}, r"gone\.safetensors: cannot be read"),
        ({"a": "model-00001-of-00002.safetensors"}, r"1 tensors are not in the shard named \(a\)"),
    ],
)
def test_gemma_with_a_wrong_index(copied: TinyPaths, weight_map: dict[str, Any], message: str) -> None:
    shard(copied.text_encoder)
    index = copied.text_encoder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ExportError, match=message):
        Gemma.open(copied.text_encoder)


def test_gemma_with_a_vision_tower(copied: TinyPaths) -> None:
    extra = {
        "vision_tower.vision_model.embeddings.position_embedding.weight": torch.zeros(2),
        "multi_modal_projector.mm_input_projection_weight": torch.zeros(2),
        "lm_head.weight": torch.zeros(2),
    }
    rewrite(copied.text_encoder / "model.safetensors", lambda tensors: tensors.update(extra))
    assert len(Gemma.open(copied.text_encoder).component().weights) == 80


def test_gemma_is_strict(copied: TinyPaths) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["audio_tower.weight"] = torch.zeros(2)
        del tensors["language_model.model.norm.weight"]

    rewrite(copied.text_encoder / "model.safetensors", change)
    with pytest.raises(
        ExportError,
        match=r"text_model: 1 tensors missing \(language_model\.model\.norm\.weight\); 1 tensors unexpected"
        r" \(audio_tower\.weight\)",
    ):
        Gemma.open(copied.text_encoder).component()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_gemma_without_a_file(copied: TinyPaths, name: str) -> None:
    (copied.text_encoder / name).unlink()
    with pytest.raises(ExportError, match=rf"{name}: cannot be read"):
        Gemma.open(copied.text_encoder)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "config.json: not JSON"), ("[]", r"config.json: \[\]; allowed: an object")]
)
def test_gemma_with_a_damaged_config(copied: TinyPaths, content: str, message: str) -> None:
    (copied.text_encoder / "config.json").write_text(content)
    with pytest.raises(ExportError, match=message):
        Gemma.open(copied.text_encoder)


@pytest.mark.parametrize(("limit", "length"), [(1e30, 1024), (1025, 1024), (1024, 1024), (512, 512)])
def test_context_length_is_capped(copied: TinyPaths, limit: float, length: int) -> None:
    path = copied.text_encoder / "tokenizer_config.json"
    path.write_text(json.dumps({"model_max_length": limit}))
    assert Gemma.open(copied.text_encoder).context_length == length


@pytest.mark.parametrize("limit", [None, 0, -5, True, "256", float("nan")])
def test_context_length_that_is_none(copied: TinyPaths, limit: Any) -> None:
    path = copied.text_encoder / "tokenizer_config.json"
    path.write_text(json.dumps({"model_max_length": limit}))
    with pytest.raises(ExportError, match="model_max_length = "):
        Gemma.open(copied.text_encoder)


def test_text_encoder_of_another_depth(copied: TinyPaths) -> None:
    path = copied.text_encoder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["num_hidden_layers"] = 12
    path.write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"'num_hidden_layers': 12\}; ltx-2\.3-tiny\.safetensors needs"):
        Checkpoint.open(copied.checkpoint).check_text_encoder(Gemma.open(copied.text_encoder))


def test_context_that_registers_do_not_tile(copied: TinyPaths) -> None:
    path = copied.text_encoder / "tokenizer_config.json"
    path.write_text(json.dumps({"model_max_length": 200}))
    with pytest.raises(ExportError, match="model_max_length 200 is not a multiple of the 128 registers"):
        Checkpoint.open(copied.checkpoint).check_text_encoder(Gemma.open(copied.text_encoder))


def test_connectors_from_both_configs_are_those_from_the_checkpoint_alone(tiny: TinyPaths) -> None:
    checkpoint, gemma = Checkpoint.open(tiny.checkpoint), Gemma.open(tiny.text_encoder)
    with torch.device("meta"):
        both = architecture.connectors(checkpoint.config, gemma.config)
        alone = checkpoint.component("connectors").build()
    assert dict(both.config) == dict(alone.config)
