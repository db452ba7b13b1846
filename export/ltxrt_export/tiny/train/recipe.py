# SPDX-License-Identifier: Apache-2.0
"""The whole training: five phases in order, each with its share of the time, then the published layout."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from ltxrt_export.tiny.captions import tokenizer_corpus
from ltxrt_export.tiny.corpus import prompts
from ltxrt_export.tiny.mouth import Floats
from ltxrt_export.tiny.sound import espeak, espeak_available
from ltxrt_export.tiny.tokenizer import tokenizer_json
from ltxrt_export.tiny.train.denoiser import DenoiserPhase
from ltxrt_export.tiny.train.model import TinyModel
from ltxrt_export.tiny.train.program import Phase, Progress, run_phase
from ltxrt_export.tiny.train.sound_encoder import AudioPhase
from ltxrt_export.tiny.train.text import TextPhase
from ltxrt_export.tiny.train.upsample import UpsamplerPhase
from ltxrt_export.tiny.train.vae import VideoVaePhase
from ltxrt_export.tiny.write import TinyPaths, write_tiny

__all__ = ["PHASES", "tiny_tokenizer", "train_tiny", "trained_paths"]

#: Phases in order, with their shares of the time.
PHASES = {"video_vae": 0.5, "audio_vae": 0.05, "text": 0.03, "upsampler": 0.02, "denoiser": 0.4}

_RECORDINGS = 260


def train_tiny(folder: Path, minutes: float, seed: int = 0) -> Iterator[Progress]:
    """Train the tiny model and write it to ``trained_paths(folder)``; an interrupted run goes on where it was.

    The arithmetic runs on torch's default device; clips are drawn on the CPU.

    Args:
        folder: For checkpoints and the result; made if it is not there.
        minutes: Wall time of all training steps together.
        seed: Of weights, clips and noise. Two runs are not equal: what a step takes decides how many there are.
    """
    work = folder / "checkpoints"
    work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = TinyModel.fresh(seed), tiny_tokenizer()
    recordings = _recordings(work / "speech.npz", seed)
    builders: dict[str, Callable[[], Phase]] = {
        "video_vae": lambda: VideoVaePhase(model, seed),
        "audio_vae": lambda: AudioPhase(model, seed, recordings),
        "text": lambda: TextPhase(model, tokenizer, seed),
        "upsampler": lambda: UpsamplerPhase(model, seed, recordings),
        "denoiser": lambda: DenoiserPhase(model, tokenizer, seed, recordings),
    }
    for index, (name, share) in enumerate(PHASES.items(), start=1):
        yield from run_phase(model, builders[name], share * minutes, work / f"{index}-{name}.pt")
    write_tiny(folder / "model", trained=_plain(model))


def trained_paths(folder: Path) -> TinyPaths:
    """Where ``train_tiny`` writes its result."""
    model = folder / "model"
    return TinyPaths(model / "ltx-2.3-tiny.safetensors", model / "gemma", model / "ltx-2.3-tiny-upscaler.safetensors")


def tiny_tokenizer() -> Tokenizer:
    """The tokenizer that ``write_tiny`` writes."""
    return Tokenizer.from_str(json.dumps(tokenizer_json((*prompts(), *tokenizer_corpus()))))


def _plain(model: TinyModel) -> dict[str, dict[str, torch.Tensor]]:
    state: dict[str, Any] = model.state()
    return {name: {key: value.contiguous() for key, value in tensors.items()} for name, tensors in state.items()}


def _recordings(path: Path, seed: int) -> list[Floats]:
    """Sentences by espeak-ng's training voices, made once; none where it is not installed."""
    if not espeak_available():
        return []
    if not path.exists():
        random = np.random.default_rng([seed, 9])
        np.savez(path, *(espeak(random, held_out=False) for _ in range(_RECORDINGS)))
    with np.load(path) as stored:
        return list(stored.values())
