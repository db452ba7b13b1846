# SPDX-License-Identifier: Apache-2.0
"""The six modules of the tiny model while they are trained."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ltxrt_export import architecture
from ltxrt_export.tiny.config import checkpoint_config, gemma_config, upsampler_config
from ltxrt_export.tiny.tokenizer import VOCABULARY

__all__ = ["TinyModel"]


@dataclass(frozen=True, slots=True)
class TinyModel:
    """The modules, by the names that ``Component`` gives them, in fp32 and without gradients."""

    transformer: Any
    connectors: Any
    video_vae: Any
    audio_vae: Any
    upsampler: Any
    text_model: Any

    @classmethod
    def fresh(cls, seed: int) -> "TinyModel":
        """Randomly initialised modules; the global torch generator is seeded."""
        torch.manual_seed(seed)
        config, gemma = checkpoint_config(), gemma_config(VOCABULARY)
        model = cls(
            architecture.transformer(config),
            architecture.connectors(config, gemma),
            architecture.video_vae(config),
            architecture.audio_vae(config),
            architecture.upsampler(upsampler_config()),
            architecture.text_model(gemma),
        )
        for module in model.modules().values():
            module.eval().requires_grad_(False)
        return model

    def modules(self) -> dict[str, nn.Module]:
        """All modules by name."""
        return {name: cast(nn.Module, getattr(self, name)) for name in self.__slots__}

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """State dicts by module name."""
        return {name: module.state_dict() for name, module in self.modules().items()}

    def restore(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Take over what ``state`` gave."""
        for name, module in self.modules().items():
            module.load_state_dict(state[name])
