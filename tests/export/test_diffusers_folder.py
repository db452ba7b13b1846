# SPDX-License-Identifier: Apache-2.0
"""The tiny model saved by diffusers and transformers themselves, and read back: the same networks."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import AutoencoderKLLTX2Audio
from onnx import GraphProto, TensorProto
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

from ltxrt.bundle import Bundle
from ltxrt.errors import ExportError
from ltxrt.manifest import NETWORK_NAMES
from ltxrt_export import diffusers_folder, keys
from ltxrt_export.checkpoint import Component
from ltxrt_export.exporter import Sources, export_bundle
from ltxrt_export.tiny.write import TinyPaths
from ltxrt_export.tiny_bundle import TINY_OPTIONS, shipped_tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    return shipped_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def saved(tiny: TinyPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as ``save_pretrained`` makes it, some of it in shards."""
    folder = tmp_path_factory.mktemp("converted")
    sources = Sources.open(tiny.checkpoint, tiny.text_encoder, tiny.upsampler)
    for name, component in (
        ("transformer", sources.checkpoint.component("transformer")),
        ("connectors", sources.checkpoint.component("connectors")),
        ("vae", sources.checkpoint.component("video_vae")),
        ("latent_upsampler", sources.upsampler.component()),
    ):
        module: Any = component.build()
        module.load_state_dict(as_stored(component), assign=True)
        module.save_pretrained(folder / name, max_shard_size="1MB" if name == "transformer" else "5GB")
    encoder = sources.checkpoint.component("audio_vae")
    partial: Any = encoder.build()
    audio: Any = AutoencoderKLLTX2Audio.from_config(partial.config)
    audio.load_state_dict(as_stored(encoder), strict=False, assign=True)
    audio.save_pretrained(folder / "audio_vae")
    save_text_encoder(sources.text_encoder.component(), sources.text_encoder.config, folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny.text_encoder / name, folder / "tokenizer" / name)
    return folder


def save_text_encoder(component: Component, config: Any, folder: Path) -> None:
    vision = SiglipVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    whole = Gemma3Config(text_config=dict(config["text_config"]), vision_config=vision.to_dict())
    model: Any = Gemma3ForConditionalGeneration(whole)
    model.model.language_model.load_state_dict(as_stored(component), assign=True)
    model.save_pretrained(folder, max_shard_size="200KB")


def as_stored(component: Component) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, ref in component.weights.items():
        with safe_open(ref.path, "pt") as file:
            tensors[name] = file.get_tensor(ref.key)
    return tensors


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "converted"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def opened(folder: Path) -> Sources:
    return Sources.open(folder)


def canonical(path: Path) -> GraphProto:
    """A graph whose stored tensors are named by their content, and come in that order."""
    graph = onnx.load(path, load_external_data=False).graph
    names: dict[str, str] = {}
    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            with (path.parent / entries["location"]).open("rb") as file:
                file.seek(int(entries["offset"]))
                data = file.read(int(entries["length"]))
            # Tensors of equal content stay apart by how often they came before.
            digest = hashlib.sha256(data + bytes(str(tensor.dims), "ascii")).hexdigest()
            names[tensor.name] = f"{digest}/{sum(name.startswith(digest) for name in names.values())}"
            del tensor.external_data[:]
            tensor.name = names[tensor.name]
    casts = [node for node in graph.node if node.op_type == "Cast" and node.input[0] in names]
    for cast in casts:
        names[cast.output[0]] = f"{names[cast.input[0]]}/cast"
    for node in graph.node:
        node.input[:] = [names.get(value, value) for value in node.input]
        node.output[:] = [names.get(value, value) for value in node.output]
        if any(node is cast for cast in casts):
            node.name = node.output[0]
    ordered = GraphProto(name=graph.name, input=graph.input, output=graph.output)
    ordered.node.extend(sorted(casts, key=lambda node: node.name))
    ordered.node.extend(node for node in graph.node if not any(node is cast for cast in casts))
    ordered.initializer.extend(sorted(graph.initializer, key=lambda tensor: tensor.name))
    return ordered


def test_component_by_component(tiny: TinyPaths, saved: Path) -> None:
    single, folder = Sources.open(tiny.checkpoint, tiny.text_encoder, tiny.upsampler), opened(saved)
    pairs = [(single.checkpoint.component(n), folder.checkpoint.component(n)) for n in ("transformer", "connectors")]
    pairs += [(single.checkpoint.component(n), folder.checkpoint.component(n)) for n in ("video_vae", "audio_vae")]
    pairs.append((single.text_encoder.component(), folder.text_encoder.component()))
    pairs.append((single.upsampler.component(), folder.upsampler.component()))
    for one, other in pairs:
        mine, theirs = as_stored(one), as_stored(other)
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name
    assert folder.text_encoder.context_length == single.text_encoder.context_length
    assert folder.checkpoint.version == single.checkpoint.version
    for key in ("transformer", "vae", "audio_vae"):
        assert normal(folder.checkpoint.config[key]) == normal(single.checkpoint.config[key]), key


def normal(value: Any) -> Any:
    """A config without what the single file leaves to its default."""
    if isinstance(value, dict):
        optional = ("audio_connector_num_layers", "audio_in_channels")
        return {k: normal(v) for k, v in value.items() if k not in optional}
    return value


@pytest.mark.slow
def test_a_bundle_of_it_has_the_graphs_of_the_single_file(saved: Path, tmp_path: Path) -> None:
    for _ in export_bundle(opened(saved), tmp_path / "bundle", replace(TINY_OPTIONS, check=False)):
        pass
    bundle = Bundle.open(tmp_path / "bundle", verify=True)
    files = {Path(name).name for name in bundle.manifest.files if name.endswith(".safetensors")}
    # Five files of one name, each under that of its folder too but the first.
    assert {WEIGHTS, f"connectors-{WEIGHTS}", f"vae-{WEIGHTS}", f"latent_upsampler-{WEIGHTS}"} & files
    sources = opened(saved)
    parts = [sources.checkpoint.component(name) for name in keys.COMPONENTS]
    parts += [sources.text_encoder.component(), sources.upsampler.component()]
    # Shards of the vision tower alone stay out.
    assert len(files) == len({ref.path for part in parts for ref in part.weights.values()})
    assert len(files) < len(set(saved.rglob("*.safetensors")))
    assert bundle.manifest.model.name == "converted0"
    shipped = Bundle.open()
    if shipped.manifest.made_with != bundle.manifest.made_with:
        pytest.skip(f"the shipped graphs were made with {shipped.manifest.made_with}")
    for name in NETWORK_NAMES:
        one, other = (canonical(of.file(of.network("high", name).file)) for of in (shipped, bundle))
        assert len(one.initializer) > 1
        assert one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True), name


def test_is_a_folder_of_this_kind(saved: Path, tiny: TinyPaths) -> None:
    assert diffusers_folder.is_diffusers_folder(saved)
    assert not diffusers_folder.is_diffusers_folder(saved / "transformer")
    assert not diffusers_folder.is_diffusers_folder(tiny.text_encoder)
    assert not diffusers_folder.is_diffusers_folder(tiny.checkpoint)


def test_parts_of_either_layout_go_together(saved: Path, tiny: TinyPaths) -> None:
    assert Sources.open(saved, tiny.text_encoder, tiny.upsampler).upsampler.path == tiny.upsampler
    mixed = Sources.open(tiny.checkpoint, tiny.text_encoder, saved / "latent_upsampler")
    assert mixed.upsampler.component().weights
    with pytest.raises(ExportError, match="is no folder in the diffusers layout; name text encoder and upsampler too"):
        Sources.open(tiny.checkpoint)


def test_names_of_transformers_5(copied: Path) -> None:
    (index,) = (copied / "text_encoder").glob("*.index.json")
    before = opened(copied).text_encoder.component().weights.keys()
    old, new = "language_model.model.", "model.language_model."
    names = json.loads(index.read_text())["weight_map"]
    stored = old if any(name.startswith(old) for name in names) else new
    other = new if stored == old else old

    def renamed(key: str) -> str:
        return other + key.removeprefix(stored) if key.startswith(stored) else key

    for shard in (copied / "text_encoder").glob("*.safetensors"):
        save_file({renamed(key): tensor for key, tensor in load_file(shard).items()}, shard)
    edit(index, lambda values: values.update(weight_map={renamed(key): name for key, name in names.items()}))
    assert opened(copied).text_encoder.component().weights.keys() == before


@pytest.mark.parametrize(
    ("folder", "change", "message"),
    [
        ("transformer", {"gated_attn": False}, "gated_attn = False is not supported; supported: True"),
        ("transformer", {"cross_attn_mod": None}, "cross_attn_mod = None is not supported"),
        ("transformer", {"rope_type": "interleaved"}, "rope_type = 'interleaved' is not supported; supported: 'split'"),
        ("transformer", {"vae_scale_factors": [8, 16, 16]}, "vae_scale_factors"),
        ("transformer", {"new_flag": 1}, "new_flag = 1 is an unknown key"),
        ("transformer", {"num_layers": 0}, r"num_layers = 0 is not supported; supported: a whole number"),
        ("connectors", {"audio_connector_num_learnable_registers": 64}, "audio_connector_num_learnable_registers = 64"),
        ("connectors", {"per_modality_projections": False}, "per_modality_projections = False"),
        ("connectors", {"text_proj_in_factor": 49}, "text_proj_in_factor = 49 is not supported; supported: 7"),
        ("vae", {"timestep_conditioning": True}, "timestep_conditioning = True"),
        ("vae", {"decoder_spatial_padding_mode": "reflect"}, "decoder_spatial_padding_mode = 'reflect'"),
        ("vae", {"upsample_residual": [True] * 4}, "upsample_residual"),
        ("vae", {"upsample_type": ["spatial"]}, "is not supported"),
        ("vae", {"upsample_type": "spatial"}, "a list of temporal, spatial, spatiotemporal"),
        ("vae", {"block_out_channels": [33, 32, 32, 32]}, "is not supported"),
        ("audio_vae", {"norm_type": "group"}, "norm_type = 'group'"),
        ("audio_vae", {"ch_mult": 1}, "ch_mult = 1 is not supported"),
        ("latent_upsampler", {"use_rational_resampler": True}, "use_rational_resampler = True"),
        ("latent_upsampler", {"temporal_upsample": True}, "temporal_upsample = True"),
    ],
)
def test_settings_that_are_not_sizes(copied: Path, folder: str, change: dict[str, Any], message: str) -> None:
    edit(copied / folder / "config.json", lambda values: values.update(change))
    with pytest.raises(ExportError, match=message) as caught:
        opened(copied)
    assert "\n" not in str(caught.value)


def test_settings_that_are_absent_have_the_class_s_default(copied: Path) -> None:
    edit(copied / "transformer" / "config.json", lambda values: values.pop("audio_ff_bias"))
    opened(copied)
    # Its default is the gate of 2.0: none.
    edit(copied / "transformer" / "config.json", lambda values: values.pop("gated_attn"))
    with pytest.raises(ExportError, match="gated_attn = False is not supported"):
        opened(copied)


def test_tensors_that_do_not_belong(copied: Path) -> None:
    path = copied / "connectors" / WEIGHTS
    save_file({**load_file(path), "extra.weight": torch.zeros(1)}, path)
    with pytest.raises(ExportError, match=r"connectors/\S+: extra\.weight is no tensor of LTX-2\.3"):
        opened(copied)


def test_tensors_that_are_missing(copied: Path) -> None:
    path = copied / "vae" / WEIGHTS
    tensors = load_file(path)
    del tensors["decoder.conv_in.conv.bias"]
    save_file(tensors, path)
    with pytest.raises(ExportError, match=r"video_vae: 1 tensors missing \(vae\.decoder\.conv_in\.conv\.bias\)"):
        opened(copied).checkpoint.component("video_vae")


@pytest.mark.parametrize("part", ["vae/config.json", "connectors", "tokenizer/tokenizer.json", "latent_upsampler"])
def test_parts_that_are_missing(copied: Path, part: str) -> None:
    path = copied / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ExportError, match="cannot be read"):
        opened(copied)


def test_dev_folder(copied: Path) -> None:
    (copied / "scheduler").mkdir()
    scheduler = copied / "scheduler" / "scheduler_config.json"
    scheduler.write_text('{"use_dynamic_shifting": false, "shift_terminal": null}')
    opened(copied)
    scheduler.write_text('{"use_dynamic_shifting": true, "shift_terminal": 0.1}')
    with pytest.raises(ExportError, match=r"this is the dev checkpoint of LTX-2\.3"):
        opened(copied)
