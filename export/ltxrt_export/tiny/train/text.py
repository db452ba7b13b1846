# SPDX-License-Identifier: Apache-2.0
"""Phase 3: Gemma and the connectors learn which colour belongs to which part, read off by a head that is dropped.

From the denoiser's loss alone the binding of colours to parts comes late; as a classification it takes a minute.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from ltxrt_export.networks.attention import gated_attention, rms_norm
from ltxrt_export.networks.text_encoder import TextEncoder
from ltxrt_export.tiny.captions import caption, held_out_captions, random_names
from ltxrt_export.tiny.config import CONTEXT_TOKENS
from ltxrt_export.tiny.train.model import TinyModel
from ltxrt_export.tiny.train.optimiser import Optimiser
from ltxrt_export.tiny.world import COLOURS, PARTS

__all__ = ["TextBatch", "TextPhase", "encode_prompts", "token_ids", "trainable_text"]

_BATCH = 32
_MUON_RATE, _ADAM_RATE = 0.01, 2e-3

#: Padded token ids [B, n] int64 and their true lengths [B].
TextBatch = tuple[Tensor, Tensor]


def token_ids(tokenizer: Tokenizer, prompts: Sequence[str]) -> TextBatch:
    """Token ids of prompts, padded behind their ends; the tokenizer puts <bos> in front."""
    rows = [tokenizer.encode(prompt).ids[:CONTEXT_TOKENS] for prompt in prompts]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return ids, torch.tensor([len(row) for row in rows])


def encode_prompts(encoder: TextEncoder, batch: TextBatch) -> tuple[Tensor, Tensor]:
    """Both contexts of a batch: ``TextEncoder.forward`` for several prompts of different lengths.

    Gemma is causal, so padding behind a prompt changes nothing in front of it, and the registers then take the
    padded places, as they do in the exported graph.
    """
    ids, lengths = batch
    states = encoder.text_model(ids)
    features = (states * torch.rsqrt(states.pow(2).mean(dim=2, keepdim=True) + 1e-6)).flatten(2)
    connectors, config = encoder.connectors, encoder.connectors.config
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    contexts: list[Tensor] = []
    for name, width in (("video", config.video_hidden_dim), ("audio", config.audio_hidden_dim)):
        connector = getattr(connectors, f"{name}_connector")
        tokens = getattr(connectors, f"{name}_text_proj_in")(features * math.sqrt(width / config.caption_channels))
        tiled = connector.learnable_registers.repeat(CONTEXT_TOKENS // len(connector.learnable_registers), 1)
        registers = tiled.unsqueeze(0).expand(len(ids), -1, -1)
        head = torch.where(real.unsqueeze(-1), tokens, registers[:, : ids.shape[1]])
        x = torch.cat([head, registers[:, ids.shape[1] :]], dim=1)
        ones, rope = (
            getattr(encoder, f"{name}_ones"),
            (getattr(encoder, f"{name}_cos"), getattr(encoder, f"{name}_sin")),
        )
        for block in connector.transformer_blocks:
            x = x + gated_attention(block.attn1, rms_norm(x, ones, block.norm1.eps), query_rope=rope)
            x = x + block.ff(rms_norm(x, ones, block.norm2.eps))
        contexts.append(rms_norm(x, ones, connector.norm_out.eps))
    return contexts[0], contexts[1]


def trainable_text(model: TinyModel) -> list[tuple[str, nn.Parameter]]:
    """The parameters behind the contexts, with gradients switched on."""
    parts = {"text_model": model.text_model, "connectors": model.connectors}
    named = [(f"{part}.{name}", p) for part, module in parts.items() for name, p in module.named_parameters()]
    for _, parameter in named:
        parameter.requires_grad_(True)
    return named


class TextPhase:
    """Trains the text model and the connectors as a classifier of colours.

    Args:
        model: Its ``text_model`` and ``connectors`` are trained.
        tokenizer: The tiny tokenizer.
        seed: Of the prompts.
    """

    name = "text"

    def __init__(self, model: TinyModel, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._encoder = TextEncoder(model.text_model, model.connectors, CONTEXT_TOKENS)
        self._random = np.random.default_rng([seed, 3])
        self._heads = nn.ModuleList(
            _Reader(width, len(PARTS), len(COLOURS))
            for width in (model.connectors.config.video_hidden_dim, model.connectors.config.audio_hidden_dim)
        )
        heads = [(f"head.{name}.table", parameter) for name, parameter in self._heads.named_parameters()]
        self._optimiser = Optimiser([*trainable_text(model), *heads], _MUON_RATE, _ADAM_RATE)
        self._model = model
        test = held_out_captions()
        self._test = token_ids(tokenizer, [text for text, _ in test]), _classes([names for _, names in test])

    def step(self, progress: float) -> float:
        """One update; the cross-entropy."""
        drawn = [caption(self._random, random_names(self._random)) for _ in range(_BATCH)]
        batch = token_ids(self._tokenizer, [text for text, _ in drawn])
        wanted = _classes([names for _, names in drawn])
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            contexts = encode_prompts(self._encoder, batch)
        losses = [
            F.cross_entropy(head(context.float()).flatten(0, 1), wanted.flatten())
            for head, context in zip(self._heads, contexts, strict=True)
        ]
        loss = losses[0] + 0.3 * losses[1]
        loss.backward()
        self._optimiser.step(progress)
        return float(losses[0].detach())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Share of colours right in held-out prompts."""
        batch, wanted = self._test
        guessed = self._heads[0](encode_prompts(self._encoder, batch)[0]).argmax(dim=-1)
        return {"accuracy": float((guessed == wanted).float().mean())}

    def finish(self) -> None:
        """Freeze; the heads are dropped."""
        self._model.text_model.requires_grad_(False)
        self._model.connectors.requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """What ``restore`` takes."""
        return {"optimiser": self._optimiser.state(), "heads": self._heads.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._optimiser.restore(state["optimiser"])
        self._heads.load_state_dict(state["heads"])


class _Reader(nn.Module):
    """One attention query a part over a context, and a linear classifier of what it finds."""

    def __init__(self, width: int, parts: int, classes: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(parts, width) / width**0.5)
        self.classifier = nn.Linear(width, classes)

    def forward(self, context: Tensor) -> Tensor:
        """[B, n, width] to logits [B, parts, classes]."""
        weights = torch.softmax(self.queries @ context.transpose(1, 2), dim=-1)
        return self.classifier(weights @ context)


def _classes(names: Sequence[Mapping[str, str]]) -> Tensor:
    """Indices of the parts' colours, [B, parts]."""
    colours = list(COLOURS)
    return torch.tensor([[colours.index(row[part]) for part in PARTS] for row in names])
