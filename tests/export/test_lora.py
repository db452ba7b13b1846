# SPDX-License-Identifier: Apache-2.0
"""LoRAs: fused as the formula says and as peft means it, and refused by name where a part has no place."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltxrt.errors import ExportError
from ltxrt_export.changed_weights import ChangedWeights
from ltxrt_export.checkpoint import Checkpoint
from ltxrt_export.exporter import Sources, network_specs
from ltxrt_export.lora import Lora, LoraFile, changed, makes_distilled
from ltxrt_export.networks.denoiser import Semantics
from ltxrt_export.parity import relative_error
from ltxrt_export.references import REFERENCES

DIT = "model.diffusion_model."
QUERY = "transformer_blocks.0.attn1.to_q"
FEED = "transformer_blocks.2.ff.net.2"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def stored(shipped_sources: Sources) -> Tensors:
    """Every tensor of the shipped checkpoint, as it is stored."""
    return load_file(shipped_sources.checkpoint.path)


@pytest.fixture
def checkpoint(shipped_sources: Sources) -> Checkpoint:
    return shipped_sources.checkpoint


def pair(weight: Tensor, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A and B of about the weight's own size."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, weight.shape[1], generator=generator)
    up = torch.randn(weight.shape[0], rank, generator=generator) * float(weight.float().std()) / rank**0.5
    return down.to(dtype), up.to(dtype)


def lora_of(stored: Tensors, layers: Mapping[str, int], prefix: str = "diffusion_model.") -> Tensors:
    """A published LoRA of some layers, given their ranks."""
    made: Tensors = {}
    for seed, (layer, rank) in enumerate(layers.items()):
        made[f"{prefix}{layer}.lora_A.weight"], made[f"{prefix}{layer}.lora_B.weight"] = pair(
            stored[f"{DIT}{layer}.weight"], rank, seed
        )
    return made


def saved(path: Path, tensors: Tensors) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def fused(checkpoint: Checkpoint, files: list[LoraFile], folder: Path) -> tuple[Checkpoint, ChangedWeights]:
    result, weights = changed(checkpoint, [Lora.open(file, checkpoint) for file in files], folder)
    assert weights is not None
    assert list(weights.write())[-1] == weights.bytes == weights.path.stat().st_size
    return result, weights


def test_fused_as_the_formula_says(tmp_path: Path, checkpoint: Checkpoint, stored: Tensors) -> None:
    lora = lora_of(stored, {QUERY: 4, FEED: 7})
    lora[f"diffusion_model.{FEED}.alpha"] = torch.tensor(3.5)
    result, weights = fused(checkpoint, [LoraFile(saved(tmp_path / "style.safetensors", lora), 0.75)], tmp_path)
    found = load_file(weights.path)
    assert set(found) == {f"{DIT}{QUERY}.weight", f"{DIT}{FEED}.weight"}
    for layer, factor in ((QUERY, 0.75), (FEED, 0.75 * 3.5 / 7)):
        down, up = (lora[f"diffusion_model.{layer}.lora_{part}.weight"].double() for part in "AB")
        original = stored[f"{DIT}{layer}.weight"]
        expected = original.double() + factor * up @ down
        value = found[f"{DIT}{layer}.weight"]
        assert value.dtype == original.dtype == torch.bfloat16
        # Rounded once: within half a unit in the last of bf16's 8 bits.
        assert ((value.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-7).all()
        assert not torch.equal(value, original)
    transformer = result.component("transformer").weights
    assert {name: ref.path for name, ref in transformer.items() if ref.path != checkpoint.path} == dict.fromkeys(
        (f"{QUERY}.weight", f"{FEED}.weight"), weights.path
    )
    assert result.sha256() == checkpoint.sha256()


def test_several_add_up_before_they_are_rounded(tmp_path: Path, checkpoint: Checkpoint, stored: Tensors) -> None:
    one, other = lora_of(stored, {QUERY: 2}), lora_of(stored, {FEED: 3, QUERY: 5})
    files = [
        LoraFile(saved(tmp_path / "one.safetensors", one), 1.0),
        LoraFile(saved(tmp_path / "other.safetensors", other), -0.5),
    ]
    _, weights = fused(checkpoint, files, tmp_path)
    key, name = f"{DIT}{QUERY}.weight", f"diffusion_model.{QUERY}"
    expected = stored[key].double()
    for lora, scale in ((one, 1.0), (other, -0.5)):
        expected += scale * lora[f"{name}.lora_B.weight"].double() @ lora[f"{name}.lora_A.weight"].double()
    found = load_file(weights.path)[key].double()
    assert ((found - expected).abs() <= expected.abs() * 2**-8 + 1e-7).all()


def test_rows_in_runs_are_the_same_as_at_once(
    tmp_path: Path, checkpoint: Checkpoint, stored: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = LoraFile(saved(tmp_path / "a.safetensors", lora_of(stored, {FEED: 3})))
    _, whole = fused(checkpoint, [file], tmp_path)
    at_once = whole.path.read_bytes()
    monkeypatch.setattr("ltxrt_export.changed_weights._CHUNK", 5 * stored[f"{DIT}{FEED}.weight"].shape[1])
    _, again = fused(checkpoint, [file], tmp_path)
    values = np.frombuffer(at_once, np.uint16).astype(int) - np.frombuffer(again.path.read_bytes(), np.uint16)
    # BLAS may sum in another order for other heights: a unit in the last place of a few.
    assert np.abs(values).max() <= 1
    assert (values != 0).mean() < 0.01


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"base_model.model.{key}",
        lambda key: f"model.{key}",
        lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace("diffusion_model.", "transformer."),
    ],
)
def test_names_of_other_writers(
    tmp_path: Path, checkpoint: Checkpoint, stored: Tensors, rename: Callable[[str], str]
) -> None:
    lora = lora_of(stored, {QUERY: 2})
    opened = Lora.open(LoraFile(saved(tmp_path / "a.safetensors", lora)), checkpoint)
    renamed = {rename(key): value for key, value in lora.items()}
    other = Lora.open(LoraFile(saved(tmp_path / "b.safetensors", renamed)), checkpoint)
    assert list(other.deltas) == list(opened.deltas) == [f"{DIT}{QUERY}.weight"]


def test_names_of_diffusers_modules(tmp_path: Path, checkpoint: Checkpoint, stored: Tensors) -> None:
    layers = {"adaln_single.linear": 2, "patchify_proj": 3}
    lora = lora_of(stored, layers)
    names = {"adaln_single": "time_embed", "patchify_proj": "proj_in", "diffusion_model": "transformer"}
    for old, new in names.items():
        lora = {key.replace(old, new): value for key, value in lora.items()}
    opened = Lora.open(LoraFile(saved(tmp_path / "a.safetensors", lora)), checkpoint)
    assert set(opened.deltas) == {f"{DIT}{layer}.weight" for layer in layers}


def test_the_denoiser_is_the_one_that_peft_would_fuse(
    tmp_path: Path, shipped_sources: Sources, stored: Tensors
) -> None:
    """The torch class with low-rank branches beside its layers, unfused, against the class on the fused weights."""
    layers = {
        QUERY: 4,
        FEED: 4,
        "transformer_blocks.3.audio_to_video_attn.to_out.0": 2,
        "adaln_single.linear": 3,
    }
    lora = lora_of(stored, layers)
    file = LoraFile(saved(tmp_path / "a.safetensors", lora), 0.6)
    sources = Sources.open(
        shipped_sources.checkpoint.path,
        shipped_sources.text_encoder.path,
        shipped_sources.upsampler.path,
        [file],
    )
    with_lora, weights = sources.with_changes(tmp_path)
    assert weights is not None
    list(weights.write())
    spec = network_specs(with_lora, Semantics.R3)[0]["denoiser"]
    reference = REFERENCES["denoiser"](with_lora, spec)
    feeds = reference.feeds({"f": 3, "h": 2, "w": 2, "Na": 7}, 5)
    with torch.no_grad():
        found = reference.outputs(feeds)["latent_next"]
        plain = REFERENCES["denoiser"](shipped_sources, spec).outputs(feeds)["latent_next"]
    modules = {layer: layer.replace("adaln_single", "time_embed") for layer in layers}

    def branched(module: torch.nn.Module, down: Tensor, up: Tensor) -> None:
        module.register_forward_hook(lambda _, args, output: output + 0.6 * (args[0] @ down.T) @ up.T)

    # The reference builds its own model: give it one with branches.
    component = shipped_sources.checkpoint.component("transformer")
    model = component.load()
    for layer, module in modules.items():
        branched(
            model.get_submodule(module),
            lora[f"diffusion_model.{layer}.lora_A.weight"],
            lora[f"diffusion_model.{layer}.lora_B.weight"],
        )

    class Branched:
        def component(self, name: str) -> "Branched":
            assert name == "transformer"
            return self

        def load(self) -> torch.nn.Module:
            return model

        config = shipped_sources.checkpoint.config

    class BranchedSources:
        checkpoint = Branched()

    with torch.no_grad():
        expected = REFERENCES["denoiser"](BranchedSources(), spec).outputs(feeds)["latent_next"]  # type: ignore[arg-type]
    change, error = relative_error(expected, plain), relative_error(found, expected)
    assert change > 1e-2
    # What is left is the rounding of the fused weights to bf16.
    assert error < change / 10
    assert error < 3e-3


def refused(path: Path, checkpoint: Checkpoint, scale: float = 1.0) -> str:
    with pytest.raises(ExportError) as caught:
        Lora.open(LoraFile(path, scale), checkpoint)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_model_in_the_place_of_a_lora(checkpoint: Checkpoint, shipped_sources: Sources) -> None:
    assert "this is the distilled LTX-2.3 checkpoint; allowed: a LoRA" in refused(checkpoint.path, checkpoint)
    assert "this is a latent upsampler; allowed: a LoRA" in refused(shipped_sources.upsampler.path, checkpoint)


def test_a_lora_in_the_place_of_a_model(tmp_path: Path, stored: Tensors) -> None:
    with pytest.raises(ExportError, match="this is a LoRA, which only changes a checkpoint"):
        Checkpoint.open(saved(tmp_path / "a.safetensors", lora_of(stored, {QUERY: 2})))


def test_a_layer_that_is_not_there(tmp_path: Path, checkpoint: Checkpoint, stored: Tensors) -> None:
    lora = lora_of(stored, {QUERY: 2})
    lora |= {key.replace("blocks.0", "blocks.47"): value.clone() for key, value in lora.items()}
    message = refused(saved(tmp_path / "a.safetensors", lora), checkpoint)
    assert "2 tensors are for layers that ltx-2.3-tiny.safetensors does not have" in message
    assert "diffusion_model.transformer_blocks.47.attn1.to_q.lora_A.weight" in message


@pytest.mark.parametrize("name", ["dora_scale", "diff_b", "lora_B.bias", "hada_w1_a", "lora_magnitude_vector.weight"])
def test_another_kind_of_adapter(tmp_path: Path, checkpoint: Checkpoint, stored: Tensors, name: str) -> None:
    lora = lora_of(stored, {QUERY: 2}) | {f"diffusion_model.{QUERY}.{name}": torch.zeros(3)}
    message = refused(saved(tmp_path / "a.safetensors", lora), checkpoint)
    assert f"1 tensors are no part of a plain LoRA (diffusion_model.{QUERY}.{name})" in message


@pytest.mark.parametrize(("part", "lacking"), [("lora_A", "lora_B"), ("lora_B", "lora_A")])
def test_half_a_pair(tmp_path: Path, checkpoint: Checkpoint, stored: Tensors, part: str, lacking: str) -> None:
    lora = {key: value for key, value in lora_of(stored, {QUERY: 2}).items() if part in key}
    assert f"{DIT}{QUERY}.weight has no {lacking}" in refused(saved(tmp_path / "a.safetensors", lora), checkpoint)


def test_two_ranks(tmp_path: Path, checkpoint: Checkpoint, stored: Tensors) -> None:
    lora = lora_of(stored, {QUERY: 4})
    lora[f"diffusion_model.{QUERY}.lora_A.weight"] = lora[f"diffusion_model.{QUERY}.lora_A.weight"][:3].contiguous()
    message = refused(saved(tmp_path / "a.safetensors", lora), checkpoint)
    assert "lora_B.weight is of rank 4" in message
    assert "lora_A.weight of rank 3" in message


def test_another_width(tmp_path: Path, checkpoint: Checkpoint, stored: Tensors) -> None:
    wide = torch.zeros(4 * stored[f"{DIT}{QUERY}.weight"].shape[0], 8)
    lora = lora_of(stored, {QUERY: 4})
    lora[f"diffusion_model.{QUERY}.lora_B.weight"] = wide[:, :4].contiguous()
    shape = list(stored[f"{DIT}{QUERY}.weight"].shape)
    message = refused(saved(tmp_path / "a.safetensors", lora), checkpoint)
    assert f"change a weight {[4 * shape[0], shape[1]]}; {DIT}{QUERY}.weight is {shape}" in message


def test_what_no_lora_can_change(tmp_path: Path, checkpoint: Checkpoint) -> None:
    name = f"diffusion_model.{QUERY.replace('to_q', 'q_norm')}"
    lora = {f"{name}.lora_A.weight": torch.zeros(1, 4), f"{name}.lora_B.weight": torch.zeros(4, 1)}
    assert "which no LoRA can change; allowed: linear layers" in refused(
        saved(tmp_path / "a.safetensors", lora), checkpoint
    )


def test_two_names_of_one_layer(tmp_path: Path, checkpoint: Checkpoint, stored: Tensors) -> None:
    lora = lora_of(stored, {QUERY: 2})
    lora |= {key.replace("diffusion_model", "transformer"): value.clone() for key, value in lora.items()}
    assert f"are both for {DIT}{QUERY}.weight" in refused(saved(tmp_path / "a.safetensors", lora), checkpoint)


@pytest.mark.parametrize("alpha", [torch.tensor([1.0, 2.0]), torch.tensor(float("nan"))])
def test_a_strange_alpha(tmp_path: Path, checkpoint: Checkpoint, stored: Tensors, alpha: Tensor) -> None:
    lora = lora_of(stored, {QUERY: 2}) | {f"diffusion_model.{QUERY}.alpha": alpha}
    assert "allowed: one finite number" in refused(saved(tmp_path / "a.safetensors", lora), checkpoint)


def test_integers(tmp_path: Path, checkpoint: Checkpoint, stored: Tensors) -> None:
    lora = {key: value.to(torch.int32) for key, value in lora_of(stored, {QUERY: 2}).items()}
    assert "allowed: a matrix of F32, F16, BF16" in refused(saved(tmp_path / "a.safetensors", lora), checkpoint)


def test_infinities_are_refused_and_leave_nothing(tmp_path: Path, checkpoint: Checkpoint, stored: Tensors) -> None:
    lora = {key: value * 1e30 for key, value in lora_of(stored, {QUERY: 2}).items()}
    opened = Lora.open(LoraFile(saved(tmp_path / "a.safetensors", lora), 1e10), checkpoint)
    folder = tmp_path / "out"
    folder.mkdir()
    _, weights = changed(checkpoint, [opened], folder)
    assert weights is not None
    with pytest.raises(ExportError, match=rf"{QUERY}\.weight is not finite in BF16 with all that is added"):
        list(weights.write())
    assert not any(folder.iterdir())


def test_nothing_to_change(tmp_path: Path, checkpoint: Checkpoint) -> None:
    assert changed(checkpoint, [], tmp_path) == (checkpoint, None)


@given(scale=st.floats(allow_nan=False, allow_infinity=False), name=st.from_regex(r"[a-z:/. ]*[a-z]", fullmatch=True))
def test_file_and_scale(scale: float, name: str) -> None:
    assert LoraFile.parse(f"{name}:{scale!r}") == LoraFile(Path(name), scale)


@pytest.mark.parametrize(
    ("text", "path"),
    [("a.safetensors", "a.safetensors"), ("a:b.safetensors", "a:b.safetensors"), ("c:1,5", "c:1,5")],
)
def test_a_file_without_a_scale(text: str, path: str) -> None:
    assert LoraFile.parse(text) == LoraFile(Path(path), 1.0)


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf"])
def test_a_scale_that_is_no_number(scale: str) -> None:
    with pytest.raises(ExportError, match=r"--lora: .* allowed: FILE:SCALE with a finite number"):
        LoraFile.parse(f"a.safetensors:{scale}")


def test_only_a_distilled_lora_opens_dev(tmp_path: Path, shipped_sources: Sources, stored: Tensors) -> None:
    assert makes_distilled([LoraFile(Path("ltx-2.3-22b-distilled-lora-384-1.1.safetensors"))])
    assert not makes_distilled([LoraFile(Path("style.safetensors")), LoraFile(Path("distilled.safetensors"), 0.0)])
    dev = tmp_path / "ltx-2.3-22b-dev.safetensors"
    dev.write_bytes(shipped_sources.checkpoint.path.read_bytes())
    lora = lora_of(stored, {QUERY: 2})
    rest = shipped_sources.text_encoder.path, shipped_sources.upsampler.path
    distilled = LoraFile(saved(tmp_path / "distilled-lora.safetensors", lora))
    assert len(Sources.open(dev, *rest, [distilled]).loras) == 1
    for files in ([], [LoraFile(saved(tmp_path / "style.safetensors", lora))]):
        with pytest.raises(ExportError, match="this is the dev checkpoint"):
            Sources.open(dev, *rest, files)
