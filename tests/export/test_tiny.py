# SPDX-License-Identifier: Apache-2.0
"""The tiny model: small, the same bytes everywhere, every flag of the 22B one, and alive in every network."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor

from ltxrt.errors import ExportError
from ltxrt_export import published
from ltxrt_export.checkpoint import Checkpoint, Gemma, Upsampler
from ltxrt_export.tiny.config import checkpoint_config
from ltxrt_export.tiny.corpus import prompts
from ltxrt_export.tiny.tokenizer import VOCABULARY, tokenizer_json
from ltxrt_export.tiny.weights import random_tensor
from ltxrt_export.tiny.write import TinyPaths, write_safetensors, write_tiny

PUBLISHED: dict[str, Any] = published.checkpoint_config()

#: sha256 of each file for seed 0; a machine or a library that changes them is to be noticed.
SHA256 = {
    "gemma/config.json": "bf02e03ce702c5b22f9c3da6336144ace8a26d21b27200a9462898caaaa23649",
    "gemma/model.safetensors": "76f5773996aa3817ee7499a71b91c02b6e93c6675caaffbe9f3e12b411cd60b2",
    "gemma/tokenizer.json": "104f927e1e6d146147f480b958da0e874103bd1fb33058b8a2692a8a43825d3f",
    "gemma/tokenizer_config.json": "c3f29890efe9c1acca0d92eca4d54215d135795fa50d00e8cf12b165198a9a38",
    "ltx-2.3-tiny-upscaler.safetensors": "f6b2788c693feb7464dbd0617372c57a45f327d13a639bef9b528cce79541aad",
    "ltx-2.3-tiny.safetensors": "f125b5beb62cbe3b8aa73d22daa28ceda43b47da5af7ae509d98fc37329f0584",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(tiny: TinyPaths) -> Tokenizer:
    return Tokenizer.from_file(str(Gemma.open(tiny.text_encoder).tokenizer_path))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def check_alive(output: Tensor) -> None:
    """Finite, neither constant nor exploding."""
    assert torch.isfinite(output).all()
    assert 0.05 < output.std().item() < 5


def test_same_bytes_every_time(tiny: TinyPaths, tmp_path: Path) -> None:
    write_tiny(tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tiny.checkpoint.parent) == SHA256


def test_another_seed_gives_other_weights_only(tiny: TinyPaths, tmp_path: Path) -> None:
    other, first = digests(write_tiny(tmp_path / "other", seed=1).checkpoint.parent), SHA256
    assert set(other) == set(first)
    changed = {name for name in first if other[name] != first[name]}
    assert changed == {name for name in first if name.endswith(".safetensors")}


def test_size(tiny: TinyPaths) -> None:
    checkpoint = Checkpoint.open(tiny.checkpoint)
    names = ("transformer", "connectors", "video_vae", "audio_vae")
    components = [
        *(checkpoint.component(name) for name in names),
        Gemma.open(tiny.text_encoder).component(),
        Upsampler.open(tiny.upsampler).component(),
    ]
    parameters = sum(np.prod(ref.shape) for item in components for ref in item.weights.values())
    assert parameters < 7_400_000
    folder = tiny.checkpoint.parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 15_000_000


def test_metadata(tiny: TinyPaths) -> None:
    metadata = Checkpoint.open(tiny.checkpoint).file.metadata
    assert metadata["model_version"] == "2.3.0"
    assert metadata["license"].startswith("Apache-2.0")
    assert set(json.loads(metadata["config"])) == {"transformer", "vae", "audio_vae", "vocoder", "scheduler"}


def leaves(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= leaves(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return flat


def test_every_flag_of_the_published_model() -> None:
    mine, published = leaves(checkpoint_config()), leaves(PUBLISHED)
    assert set(published) <= set(mine)
    differing = {key for key in published if mine[key] != published[key]}
    assert differing == {
        "transformer.attention_head_dim",
        "transformer.audio_attention_head_dim",
        "transformer.audio_connector_attention_head_dim",
        "transformer.audio_connector_num_attention_heads",
        "transformer.audio_cross_attention_dim",
        "transformer.audio_num_attention_heads",
        "transformer.caption_channels",
        "transformer.connector_attention_head_dim",
        "transformer.connector_num_attention_heads",
        "transformer.connector_num_layers",
        "transformer.cross_attention_dim",
        "transformer.in_channels",
        "transformer.num_attention_heads",
        "transformer.num_layers",
        "transformer.out_channels",
        "vae.decoder_base_channels",
        "vae.decoder_blocks",
        "vae.encoder_base_channels",
        "vae.encoder_blocks",
        "vae.latent_channels",
        "audio_vae.model.params.ddconfig.ch_mult",
        "audio_vae.model.params.ddconfig.num_res_blocks",
    }
    for key in ("vae.encoder_blocks", "vae.decoder_blocks"):
        assert [name for name, _ in mine[key]] == [name for name, _ in published[key]]


def test_transformer_is_alive(tiny: TinyPaths) -> None:
    model = Checkpoint.open(tiny.checkpoint).component("transformer").load()
    frames, height, width, audio = 3, 2, 4, 9
    tokens = frames * height * width
    video, sound = model(
        hidden_states=seeded(1, tokens, 32),
        audio_hidden_states=seeded(1, audio, 128),
        encoder_hidden_states=seeded(1, 16, 128),
        audio_encoder_hidden_states=seeded(1, 16, 64),
        timestep=torch.full((1, tokens), 700.0),
        audio_timestep=torch.zeros(1, audio),
        sigma=torch.tensor([700.0]),
        audio_sigma=torch.tensor([0.0]),
        num_frames=frames,
        height=height,
        width=width,
        fps=24.0,
        audio_num_frames=audio,
        return_dict=False,
    )
    assert (video.shape, sound.shape) == ((1, tokens, 32), (1, audio, 128))
    check_alive(video)
    check_alive(sound)


def test_text_path_is_alive(tiny: TinyPaths, tokenizer: Tokenizer) -> None:
    gemma = Gemma.open(tiny.text_encoder)
    ids = tokenizer.encode(next(iter(prompts()))).ids
    padding = gemma.context_length - len(ids)
    tokens = torch.tensor([[0] * padding + ids])
    mask = torch.tensor([[0] * padding + [1] * len(ids)])
    states = (
        gemma.component()
        .load()(input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False)
        .hidden_states
    )
    assert len(states) == 7
    connectors = Checkpoint.open(tiny.checkpoint).component("connectors").load()
    video, audio, _ = connectors(torch.stack(states, dim=-1), mask)
    assert (video.shape, audio.shape) == ((1, 128, 128), (1, 128, 64))
    check_alive(video)
    check_alive(audio)


def test_video_vae_is_alive(tiny: TinyPaths) -> None:
    vae = Checkpoint.open(tiny.checkpoint).component("video_vae").load()
    latent = vae.encoder(seeded(1, 3, 9, 64, 96).clamp(-1, 1))
    assert latent.shape[2:] == (2, 2, 3)
    check_alive(latent[:, :32])
    frames = vae.decoder(seeded(1, 32, 2, 2, 3))
    assert frames.shape == (1, 3, 9, 64, 96)
    check_alive(frames)
    assert frames.std(dim=(2, 3, 4)).min() > 0.05
    assert 0.5 <= vae.latents_std.min() <= vae.latents_std.max() <= 1.5


def test_audio_encoder_is_alive(tiny: TinyPaths) -> None:
    vae = Checkpoint.open(tiny.checkpoint).component("audio_vae").load()
    latent = vae.encoder(seeded(1, 2, 41, 64) - 5)
    assert latent.shape == (1, 16, 11, 16)
    check_alive(latent[:, :8])


def test_upsampler_is_alive(tiny: TinyPaths) -> None:
    upsampled = Upsampler.open(tiny.upsampler).component().load()(seeded(1, 32, 2, 2, 3))
    assert upsampled.shape == (1, 32, 2, 4, 6)
    check_alive(upsampled)


def test_special_tokens_are_gemmas(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(name) for name in ("<pad>", "<eos>", "<bos>", "<unk>")] == [0, 1, 2, 3]
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCABULARY))
    assert tokenizer.encode("").ids == [2]


@given(text=st.text(max_size=60).filter(lambda text: "\u2581" not in text and "<" not in text))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    encoded = tokenizer.encode(text)
    assert encoded.ids[0] == 2
    assert 3 not in encoded.ids
    assert tokenizer.decode(encoded.ids) == text


def test_words_of_the_corpus_are_short(tokenizer: Tokenizer) -> None:
    corpus = list(prompts())
    assert len(set(corpus)) > 500
    pieces = sum(len(tokenizer.encode(text).ids) for text in corpus)
    assert pieces < 1.5 * sum(len(text.split()) for text in corpus)
    assert max(len(tokenizer.encode(text).ids) for text in corpus) < 256


def test_a_corpus_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="pieces for 357 entries, not for 768"):
        tokenizer_json(["a b c"])


def test_random_tensors_depend_on_key_and_seed_alone() -> None:
    first = random_tensor("x.weight", (64, 32), 0)
    assert np.array_equal(first, random_tensor("x.weight", (64, 32), 0))
    assert not np.array_equal(first, random_tensor("y.weight", (64, 32), 0))
    assert not np.array_equal(first, random_tensor("x.weight", (64, 32), 1))
    assert np.array_equal(first.ravel()[:100], random_tensor("x.weight", (100, 32), 0).ravel()[:100])
    # Unit-variance inputs give unit-variance outputs: the standard deviation is fan-in^-1/2.
    assert first.std() == pytest.approx(32**-0.5, rel=0.05)


def test_write_safetensors_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "taken"
    target.mkdir()
    with pytest.raises(ExportError, match="taken: cannot be written"):
        write_safetensors(target, {"a": np.zeros(3, np.float32)}, {})
    assert list(tmp_path.iterdir()) == [target]


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be made"):
        write_tiny(tmp_path / "file")
