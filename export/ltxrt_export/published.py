# SPDX-License-Identifier: Apache-2.0
"""What is published, as data: files, sizes, parameter counts, configurations and the terms that they come under.

Sizes and counts are those of public listings and of the module classes (Lightricks/LTX-2 MODELS-LTX-2.3.md;
huggingface/diffusers scripts/convert_ltx2_to_diffusers.py). The configurations in ``configs/`` are the ones that
the files carry in their metadata.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

__all__ = [
    "DEV_BYTES",
    "DISTILLED",
    "GEMMA",
    "PARAMETERS",
    "SINGLE_FILE_TENSORS",
    "SOURCES",
    "UPSAMPLER",
    "PublishedFile",
    "PublishedRepository",
    "checkpoint_config",
    "gemma_config",
    "upsampler_config",
]


@dataclass(frozen=True, slots=True)
class PublishedRepository:
    """A repository on the Hugging Face hub.

    Attributes:
        name: ``owner/name``.
        patterns: What an export needs of it, as shell patterns of file names.
        folder: Where these files go, below the download folder; empty for the folder itself.
        terms: Name of the licence.
        terms_page: Where it is written.
    """

    name: str
    patterns: tuple[str, ...]
    folder: str
    terms: str
    terms_page: str

    @property
    def page(self) -> str:
        """The repository's page, where its terms are accepted."""
        return f"https://huggingface.co/{self.name}"


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """One published file and its size."""

    name: str
    bytes: int


#: The checkpoint that the schedules are made for, and the upsampler between its two stages.
DISTILLED = PublishedFile("ltx-2.3-22b-distilled-1.1.safetensors", 46_149_345_334)
UPSAMPLER = PublishedFile("ltx-2.3-spatial-upscaler-x2-1.1.safetensors", 995_743_560)
#: ``ltx-2.3-22b-dev.safetensors`` has the same tensors under a header that is 360 bytes shorter.
DEV_BYTES = 46_149_344_974

LTX = PublishedRepository(
    name="Lightricks/LTX-2.3",
    patterns=(DISTILLED.name, UPSAMPLER.name),
    folder="",
    terms="LTX-2 Community License",
    terms_page="https://huggingface.co/Lightricks/LTX-2.3",
)
GEMMA = PublishedRepository(
    name="google/gemma-3-12b-it-qat-q4_0-unquantized",
    patterns=(
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
        "model*.safetensors",
    ),
    folder="gemma-3-12b-it-qat-q4_0-unquantized",
    terms="Gemma Terms of Use",
    terms_page="https://ai.google.dev/gemma/terms",
)
#: Everything that an export needs.
SOURCES = (LTX, GEMMA)

#: Tensors of the single file: DiT, connectors, video VAE, audio VAE, vocoder.
SINGLE_FILE_TENSORS = 4186 + 262 + 170 + 102 + 1227
#: Parameters by component; ``audio_vae`` is the encoder.
PARAMETERS: Mapping[str, int] = {
    "transformer": 18_988_838_144,
    "connectors": 3_172_227_584,
    "video_vae": 726_105_969,
    "audio_vae": 21_333_008,
    "upsampler": 497_867_904,
    "text_model": 11_766_034_176,
}


def checkpoint_config() -> dict[str, Any]:
    """The ``config`` in the metadata of the 22B single file."""
    return _config("ltx-2.3-22b.json")


def gemma_config() -> dict[str, Any]:
    """The ``config.json`` of the text encoder, less its vision part."""
    return _config("gemma-3-12b.json")


def upsampler_config() -> dict[str, Any]:
    """The ``config`` in the metadata of the x2 spatial upsampler."""
    return _config("ltx-2.3-spatial-upscaler-x2.json")


def _config(name: str) -> dict[str, Any]:
    return json.loads(resources.files("ltxrt_export").joinpath("configs", name).read_text("utf-8"))
