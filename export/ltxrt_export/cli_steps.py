# SPDX-License-Identifier: Apache-2.0
"""What the commands share that take a model: flags that name it, and an export's steps shown on stderr."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ltxrt.cli_progress import reporter
from ltxrt.result import Progress

if TYPE_CHECKING:
    from .exporter import ExportStep

__all__ = ["CheckpointFlag", "JsonFlag", "LoraFlag", "SemanticsFlag", "TextEncoderFlag", "UpsamplerFlag", "show_steps"]

CheckpointFlag = Annotated[
    Path, typer.Option(help="The single-file checkpoint, or a folder in the diffusers layout.", show_default=False)
]
TextEncoderFlag = Annotated[
    Path | None, typer.Option(help="The Gemma 3 folder; a diffusers folder has its own.", show_default=False)
]
UpsamplerFlag = Annotated[
    Path | None, typer.Option(help="The x2 spatial upsampler's file; likewise.", show_default=False)
]
SemanticsFlag = Annotated[Literal["R1", "R2", "R3"], typer.Option(help="Modulation rules, by generation.")]
LoraFlag = Annotated[
    list[str] | None,
    typer.Option(help="A LoRA to fuse, FILE:SCALE or FILE for scale 1; may be given again.", show_default=False),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON.")]


def show_steps(steps: "Generator[ExportStep]", stages: Sequence[str]) -> list[dict[str, Any]]:
    """Run an export with progress, notes and parity figures on stderr; returns the figures for JSON."""
    rows: list[dict[str, Any]] = []
    running: str | None = None
    # Closed by name, so that an interruption between two steps cleans up too.
    with closing(steps), reporter(stages) as progress:
        for step in steps:
            if running not in (None, step.description):
                progress.show(Progress(running, 1, 1))
            if step.note:
                typer.echo(step.note, err=True)
            for row in step.rows:
                sizes = " ".join(f"{name}={size}" for name, size in row.sizes.items())
                typer.echo(f"  {row.network}: {row.output} at {sizes}: {row.error:.2e} {row.unit}", err=True)
                rows.append(asdict(row))
            running = step.description if step.index < step.total else None
            if running is not None:
                progress.show(Progress(running, step.done, step.size))
    return rows
