# SPDX-License-Identifier: Apache-2.0
"""The bundle that ships with ltxrt, made again from its own weights.

A bundle holds the published files of its model, byte for byte, but for the Gemma folder's configs; those of the tiny
model follow from its architecture. So the shipped bundle is all that it takes to export the tiny model anew.
"""

import json
import shutil
from pathlib import Path

from ltxrt.bundle import Bundle
from ltxrt.errors import ExportError

from .exporter import ExportOptions
from .tiny.config import AUTO_PIXELS, LICENCE, gemma_config
from .tiny.tokenizer import VOCABULARY, tokenizer_config
from .tiny.write import TinyPaths

__all__ = ["TINY_OPTIONS", "shipped_tiny"]

#: How the shipped bundle is exported.
TINY_OPTIONS = ExportOptions(auto_pixels=AUTO_PIXELS, licence=LICENCE, backend="cpu")


def shipped_tiny(folder: Path) -> TinyPaths:
    """The published files of the tiny model, copied into ``folder`` (what is exported may share its weight files).

    Raises:
        BundleError: The shipped bundle is damaged.
        ExportError: A file cannot be copied into ``folder``.
    """
    bundle = Bundle.open()
    networks, gemma = bundle.path / "networks", folder / "gemma"
    paths = TinyPaths(folder / "ltx-2.3-tiny.safetensors", gemma, folder / "ltx-2.3-tiny-upscaler.safetensors")
    copies = {
        networks / paths.checkpoint.name: paths.checkpoint,
        networks / paths.upsampler.name: paths.upsampler,
        networks / "model.safetensors": gemma / "model.safetensors",
        bundle.file("tokenizer.json"): gemma / "tokenizer.json",
    }
    configs = {
        "config.json": gemma_config(VOCABULARY),
        "tokenizer_config.json": tokenizer_config(bundle.manifest.model.context_tokens),
    }
    try:
        gemma.mkdir(parents=True)
        for source, target in copies.items():
            shutil.copyfile(source, target)
        for name, config in configs.items():
            (gemma / name).write_text(json.dumps(config), "utf-8")
    except OSError as error:
        raise ExportError(f"{error.filename}: the tiny model cannot be copied: {error.strerror}") from error
    return paths
