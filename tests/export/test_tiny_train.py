# SPDX-License-Identifier: Apache-2.0
"""Training the tiny model: its parts are the exported arithmetic, the loss falls, and a run can be taken up again."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ltxrt_export.checkpoint import Checkpoint, Gemma, Upsampler
from ltxrt_export.networks.denoiser import DenoiseStep, Semantics
from ltxrt_export.networks.text_encoder import TextEncoder
from ltxrt_export.tiny.config import CONTEXT_TOKENS
from ltxrt_export.tiny.mouth import MouthTrack, frame_times
from ltxrt_export.tiny.train.clips import Kind
from ltxrt_export.tiny.train.flow import LEVELS, Conditions, Denoiser, position_tables, rope_grid, stage_2_mix
from ltxrt_export.tiny.train.model import TinyModel
from ltxrt_export.tiny.train.optimiser import Average, Optimiser
from ltxrt_export.tiny.train.program import run_phase
from ltxrt_export.tiny.train.recipe import tiny_tokenizer
from ltxrt_export.tiny.train.sample import SCHEDULES
from ltxrt_export.tiny.train.text import encode_prompts, token_ids
from ltxrt_export.tiny.train.vae import VideoVaePhase
from ltxrt_export.tiny.world import DEFAULTS, Scene, code_of
from ltxrt_export.tiny.write import write_tiny


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel.fresh(0)


class Line:
    """The smallest phase: a weight that learns to be 3."""

    name = "line"

    def __init__(self, model: TinyModel, steps: list[float]) -> None:
        self._weight = model.upsampler.final_conv.bias.requires_grad_(True)
        self._optimiser = Optimiser([("bias", self._weight)], 0.02, 0.05)
        self._average = Average([self._weight], 0.5)
        self._steps = steps

    def step(self, progress: float) -> float:
        loss = (self._weight - 3).square().mean()
        loss.backward()
        self._optimiser.step(0.3)
        self._average.update()
        self._steps.append(progress)
        if len(self._steps) == 12:
            raise KeyboardInterrupt
        return float(loss.detach())

    def evaluate(self) -> dict[str, float]:
        return {"weight": float(self._weight.detach().mean())}

    def finish(self) -> None:
        self._average.swap()
        self._weight.requires_grad_(False)

    def state(self) -> dict[str, Any]:
        return {"optimiser": self._optimiser.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._optimiser.restore(state["optimiser"])


def test_a_phase_is_taken_up_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A step lasts 8 seconds, a save is due after 60.
    clock = itertools.count(step=8.0)
    monkeypatch.setattr("ltxrt_export.tiny.train.program.time.monotonic", lambda: next(clock))
    path, steps = tmp_path / "line.pt", list[float]()
    first = TinyModel.fresh(0)
    with pytest.raises(KeyboardInterrupt):
        list(run_phase(first, lambda: Line(first, steps), 3.0, path))
    assert path.exists()
    second, resumed = TinyModel.fresh(1), [0.0] * 100
    *_, last = run_phase(second, lambda: Line(second, resumed), 3.0, path)
    assert resumed[100] == pytest.approx(64 / 180)
    assert last.share == 1
    assert last.figures["weight"] > 0.5
    third = TinyModel.fresh(2)
    assert list(run_phase(third, lambda: Line(third, resumed), 3.0, path)) == []
    assert torch.equal(third.upsampler.final_conv.bias, second.upsampler.final_conv.bias)


def test_an_average_follows_and_swaps() -> None:
    weight = nn.Parameter(torch.zeros(3))
    average = Average([weight], 0.5)
    with torch.no_grad():
        weight.fill_(1)
    average.update()
    average.swap()
    assert 0 < weight.detach().max() < 1
    average.swap()
    assert weight.detach().max() == 1


def test_the_optimiser_turns_a_matrix() -> None:
    torch.manual_seed(0)
    weight, bias, target = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(4)), torch.randn(6, 4)
    optimiser = Optimiser([("weight", weight), ("bias", bias)], 0.3, 1e-2)
    losses: list[float] = []
    for index in range(60):
        loss = (weight + bias - target).square().mean()
        loss.backward()
        optimiser.step(index / 60)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_the_batched_denoiser_is_the_exported_step(model: TinyModel) -> None:
    torch.manual_seed(3)
    kind, sigma = Kind(2, 3, 25.0, 2), 0.725
    tokens, first = kind.shape.tokens, kind.shape.tokens_per_frame
    latent, clean = torch.randn(2, tokens, 32), torch.randn(2, tokens, 32)
    audio = torch.randn(2, kind.audio_tokens, 128)
    contexts = torch.randn(2, CONTEXT_TOKENS, 128), torch.randn(2, CONTEXT_TOKENS, 64)
    tables = position_tables(rope_grid(model.transformer), kind.shape, kind.rate, kind.audio_tokens)
    free = torch.tensor([0.3, 1.0])
    given = Conditions(audio, contexts, tables, free)
    with torch.no_grad():
        velocity = Denoiser(model.transformer).velocity(latent, kind.shape, torch.full((2,), sigma), given)
        for index in range(2):
            mask = torch.ones(1, tokens, 1)
            mask[:, :first] = free[index]
            row = (torch.arange(tokens) >= first).long()
            one = slice(index, index + 1)
            inputs = (latent[one], clean[one], mask, audio[one], contexts[0][one], contexts[1][one], row)
            levels = torch.tensor([sigma]), torch.tensor([0.0])
            stepped = DenoiseStep(model.transformer, Semantics.R3)(*inputs, *levels, *tables)
            wanted = (latent[one] - velocity[one] * mask * sigma) * mask + clean[one] * (1 - mask)
            torch.testing.assert_close(stepped, wanted, rtol=1e-4, atol=1e-5)


def test_prompts_in_a_batch_are_the_exported_contexts(model: TinyModel) -> None:
    tokenizer = tiny_tokenizer()
    prompts = ["a face", "A purple-skinned person in a green shirt talks to the camera."]
    encoder = TextEncoder(model.text_model, model.connectors, CONTEXT_TOKENS)
    with torch.no_grad():
        batched = encode_prompts(encoder, token_ids(tokenizer, prompts))
        for index, prompt in enumerate(prompts):
            alone = encoder(torch.tensor([tokenizer.encode(prompt).ids]))
            for mine, theirs in zip(batched, alone, strict=True):
                torch.testing.assert_close(mine[index], theirs[0], rtol=1e-4, atol=1e-4)


def test_the_second_stage_starts_from_the_upsampled_latent_and_ends_in_the_clean_one() -> None:
    clean, upsampled, noise = (torch.randn(1, 4, 32) for _ in range(3))

    def mix(sigma: float) -> Tensor:
        return stage_2_mix(clean, upsampled, noise, torch.tensor([sigma]))

    torch.testing.assert_close(mix(LEVELS[5]), torch.lerp(upsampled, noise, LEVELS[5]))
    torch.testing.assert_close(mix(0.0), clean)


def test_the_levels_are_those_of_the_schedules() -> None:
    used = {level for stages in SCHEDULES.values() for sigmas in stages for level in sigmas}
    assert used == {*LEVELS, 0.0}


def test_a_code_holds_what_a_clip_shows() -> None:
    times = frame_times(17, 24)
    mouth = MouthTrack(np.linspace(0, 1, 17, dtype=np.float32), np.full(17, 0.5, np.float32))
    code = code_of(Scene.draw(np.random.default_rng(0), DEFAULTS), mouth, times)
    assert code.shape == (3, 32)
    np.testing.assert_allclose(code[1, 9:17] / 4 + 0.25, mouth.opening[1:9], atol=1e-6)
    np.testing.assert_allclose(code[0, 9:17] / 4 + 0.25, 0, atol=1e-6)
    assert np.ptp(code[:, :9], axis=0).max() == 0


def test_given_weights_are_written(model: TinyModel, tmp_path: Path) -> None:
    paths = write_tiny(tmp_path, trained=model.state())
    checkpoint = Checkpoint.open(paths.checkpoint)
    loaded = {
        name: checkpoint.component(name).load() for name in ("transformer", "connectors", "video_vae", "audio_vae")
    }
    loaded["text_model"] = Gemma.open(paths.text_encoder).component().load()
    loaded["upsampler"] = Upsampler.open(paths.upsampler).component().load()
    for name, module in loaded.items():
        for entry, value in model.state()[name].items():
            torch.testing.assert_close(module.state_dict()[entry], value.bfloat16().float(), rtol=1e-2, atol=1e-5)


@pytest.mark.slow
# The compiler's own imports.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
# The compiler looks at the gradient of a tensor that is no leaf, which torch itself warns of.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_video_vae_learns_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "vae.pt"
    first = TinyModel.fresh(0)
    losses = [
        progress.loss for progress in run_phase(first, lambda: VideoVaePhase(first, 0, 6, {(64, 64): 1}), 0.34, path)
    ]
    second = TinyModel.fresh(1)
    assert list(run_phase(second, lambda: VideoVaePhase(second, 0, 6, {(64, 64): 1}), 0.34, path)) == []
    for mine, theirs in zip(second.video_vae.parameters(), first.video_vae.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert losses[-1] < 0.9
