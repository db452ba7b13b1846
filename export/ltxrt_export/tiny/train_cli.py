# SPDX-License-Identifier: Apache-2.0
"""``ltxrt-export train-tiny``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ltxrt.cli_process import resumable
from ltxrt.errors import ExportError

__all__ = ["train_tiny"]


def train_tiny(
    out: Annotated[Path, typer.Option("--out", help="Folder of checkpoints and result.", show_default=False)],
    minutes: Annotated[float, typer.Option(min=0.1, help="Wall time of the training steps.")] = 180.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in a folder that holds a run.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, clips and noise.")] = 0,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to train; never run on cuda yet.")
    ] = "auto",
) -> None:
    """Train the tiny model on clips that are drawn on the way, and write it in the published layout."""
    if not resume and (out / "checkpoints").exists():
        raise ExportError(f"{out}: holds a run already; allowed: a new folder, or --resume")
    import torch

    from .train.recipe import train_tiny as train
    from .train.recipe import trained_paths

    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ExportError("device: 'cuda' is not there; allowed here: auto, cpu")
    torch.set_default_device("cuda" if has_gpu and device != "cpu" else "cpu")
    with resumable(f"--resume goes on in {out}"):
        for progress in train(out, minutes, seed):
            figures = " ".join(f"{name}={value:.3g}" for name, value in progress.figures.items())
            line = f"{progress.phase} {progress.share:4.0%} step {progress.steps} loss {progress.loss:.4f} {figures}"
            typer.echo(line.rstrip(), err=True)
    typer.echo(str(trained_paths(out).checkpoint))
