# SPDX-License-Identifier: Apache-2.0
"""Synthetic files: the published headers to the byte, over holes."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ltxrt.errors import OutputError
from ltxrt_export import keys, published, synthetic
from ltxrt_export.checkpoint import Checkpoint, Gemma, Upsampler
from ltxrt_export.exporter import Sources
from ltxrt_export.synthetic import (
    Layout,
    ModelConfigs,
    SyntheticModel,
    checkpoint_tensors,
    write_sparse,
    write_synthetic,
)
from ltxrt_export.tiny.config import checkpoint_config, gemma_config, upsampler_config

#: sha256 over the sorted lines "key shape" of the vocoder, and of the audio decoder, that Lightricks/LTX-2 v1.2.0
#: builds on the meta device from the same config, prefixed as they are stored.
REFERENCE = {
    "vocoder.": (1227, "41a4c1e1ee2606b3ed0c7e8cf38bd8a338622dd43d105dd7361edd666d78f653"),
    "audio_vae.decoder.": (56, "e90a2c04b9e6b10eba025d2c65b26bac07b835f00f542af9e9e947ffeb4adde9"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SyntheticModel:
    return write_synthetic(tmp_path_factory.mktemp("full"))


def test_published_sizes_without_the_room(model: SyntheticModel) -> None:
    assert model.checkpoint.stat().st_size == published.DISTILLED.bytes
    assert model.upsampler.stat().st_size == published.UPSAMPLER.bytes
    shards = sorted(model.text_encoder.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-0000{index}-of-00005.safetensors" for index in range(1, 6)]
    assert sum(shard.stat().st_size for shard in shards) > 2 * published.PARAMETERS["text_model"]
    used = sum(path.stat().st_blocks * 512 for path in model.checkpoint.parent.rglob("*") if path.is_file())
    assert used < 4_000_000


def test_published_tensors(model: SyntheticModel) -> None:
    checkpoint = Checkpoint.open(model.checkpoint)
    tensors = checkpoint.file.tensors
    assert len(tensors) == published.SINGLE_FILE_TENSORS
    counts = {component: sum(keys.component_of(key) == component for key in tensors) for component in keys.COMPONENTS}
    assert counts == {"transformer": 4186, "connectors": 262, "video_vae": 170, "audio_vae": 46}
    fp32 = [key for key, ref in tensors.items() if ref.dtype == "F32"]
    # Six modulation tables a block, and one at each head.
    assert len(fp32) == 6 * 48 + 2
    assert all("scale_shift_table" in key for key in fp32)
    assert {ref.dtype for ref in tensors.values()} == {"F32", "BF16"}


@pytest.mark.parametrize("prefix", REFERENCE)
def test_names_of_what_is_left_unread(prefix: str) -> None:
    layouts = checkpoint_tensors(ModelConfigs())
    lines = sorted(f"{key} {list(shape)}" for key, (_, shape) in layouts.items() if key.startswith(prefix))
    assert (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()) == REFERENCE[prefix]


def test_opens_as_the_real_files_do(model: SyntheticModel) -> None:
    sources = Sources.open(model.checkpoint, model.text_encoder, model.upsampler)
    assert sources.text_encoder.context_length == 1024
    components = [sources.checkpoint.component(name) for name in keys.COMPONENTS]
    components += [sources.text_encoder.component(), sources.upsampler.component()]
    for component in components:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in component.build().parameters())
        assert parameters == published.PARAMETERS[component.name], component.name


def test_reading_a_tensor_of_46_gb_takes_no_mapping_of_it(model: SyntheticModel) -> None:
    statistics = Checkpoint.open(model.checkpoint).component("video_vae").tensors(("latents_mean",))
    assert torch.equal(statistics["latents_mean"], torch.zeros(128))


def test_the_library_reads_a_sparse_file(tmp_path: Path) -> None:
    layouts: dict[str, Layout] = {"b": ("BF16", (2, 3)), "a": ("BF16", ()), "z": ("F32", (0,)), "y": ("F32", (4,))}
    write_sparse(tmp_path / "x.safetensors", layouts, {"note": "so"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"note": "so"}
        for key, (_, shape) in layouts.items():
            assert tuple(file.get_tensor(key).shape) == shape
        assert torch.equal(file.get_tensor("b"), torch.zeros(2, 3, dtype=torch.bfloat16))
        # The library's own order: wider dtypes first, then by name.
        assert list(file.offset_keys()) == ["y", "z", "a", "b"]


def test_size_to_the_byte(tmp_path: Path) -> None:
    layouts: dict[str, Layout] = {"a": ("BF16", (3,))}
    path = tmp_path / "x.safetensors"
    write_sparse(path, layouts, {}, size=1006)
    assert path.stat().st_size == 1006
    with safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"filler"}
    for size in (1007, 8, 0):
        with pytest.raises(ValueError, match=rf"x\.safetensors cannot have {size} bytes"):
            write_sparse(path, layouts, {}, size=size)


def test_other_configurations(tmp_path: Path) -> None:
    configs = ModelConfigs(checkpoint_config(), gemma_config(512), upsampler_config())
    model = write_synthetic(tmp_path, configs)
    sources = Sources.open(model.checkpoint, model.text_encoder, model.upsampler)
    assert sources.checkpoint.config == json.loads(json.dumps(configs.checkpoint))
    for name in keys.COMPONENTS:
        assert sources.checkpoint.component(name).load().state_dict()
    assert Gemma.open(model.text_encoder).component().weights
    assert Upsampler.open(model.upsampler).component().weights


def test_shards_follow_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "SHARD_BYTES", 100_000)
    configs = ModelConfigs(checkpoint_config(), gemma_config(512), upsampler_config())
    model = write_synthetic(tmp_path, configs)
    shards = list(model.text_encoder.glob("*.safetensors"))
    assert len(shards) > 2
    assert Gemma.open(model.text_encoder).component().weights


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"x\.safetensors: cannot be written \(File exists\)"):
        write_sparse(tmp_path / "file" / "x.safetensors", {}, {})
