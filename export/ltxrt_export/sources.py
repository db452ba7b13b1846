# SPDX-License-Identifier: Apache-2.0
"""The files of a model, opened together: what every export, calibration and verification starts from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ltxrt.errors import ExportError

from . import diffusers_folder
from .changed_weights import ChangedWeights
from .checkpoint import Checkpoint, Gemma, Upsampler
from .lora import Lora, LoraFile, changed, makes_distilled

__all__ = ["Sources"]


@dataclass(frozen=True, slots=True)
class Sources:
    """The three parts of a model, opened and checked."""

    checkpoint: Checkpoint
    text_encoder: Gemma
    upsampler: Upsampler
    loras: tuple[Lora, ...] = ()

    @classmethod
    def open(
        cls,
        checkpoint: Path,
        text_encoder: Path | None = None,
        upsampler: Path | None = None,
        loras: Sequence[LoraFile] = (),
    ) -> "Sources":
        """Open the single file, the Gemma folder and the upsampler file, or a folder in the diffusers layout.

        Args:
            checkpoint: The single file, or the folder.
            text_encoder: Gemma's folder; None for that of the diffusers folder.
            upsampler: The upsampler's file, or its folder; None for that of the diffusers folder.
            loras: To be fused; one that makes a distilled model opens the dev checkpoint too.

        Raises:
            ExportError: One of them is missing, damaged, unknown, or does not fit the others.
        """
        whole = diffusers_folder.is_diffusers_folder(checkpoint)
        if not whole and (text_encoder is None or upsampler is None):
            raise ExportError(
                f"{checkpoint}: is no folder in the diffusers layout; name text encoder and upsampler too"
            )
        opened = (
            diffusers_folder.open_checkpoint(checkpoint)
            if whole
            else Checkpoint.open(checkpoint, allow_dev=makes_distilled(loras))
        )
        sources = cls(
            opened,
            diffusers_folder.open_text_encoder(checkpoint) if text_encoder is None else Gemma.open(text_encoder),
            _opened_upsampler(upsampler or checkpoint),
            tuple(Lora.open(given, opened) for given in loras),
        )
        sources.checkpoint.check_text_encoder(sources.text_encoder)
        return sources

    def with_changes(self, folder: Path) -> "tuple[Sources, ChangedWeights | None]":
        """The model with its LoRAs fused and nothing in E4M3, and the file in ``folder`` that has yet to be written.

        Raises:
            ExportError: A scale of an FP8 checkpoint cannot be read.
        """
        checkpoint, weights = changed(self.checkpoint, self.loras, folder)
        return replace(self, checkpoint=checkpoint), weights


def _opened_upsampler(path: Path) -> Upsampler:
    return diffusers_folder.open_upsampler(path) if path.is_dir() else Upsampler.open(path)
