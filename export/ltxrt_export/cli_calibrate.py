# SPDX-License-Identifier: Apache-2.0
"""``ltxrt-export calibrate`` and ``sensitivity``: the ranges that FP8 needs, and the layers that it hurts."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from ltxrt.cli_process import emit
from ltxrt.errors import OutputError

from .cli_steps import CheckpointFlag, JsonFlag, LoraFlag, SemanticsFlag, TextEncoderFlag, UpsamplerFlag, show_steps

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def calibrate(  # noqa: PLR0913  # one parameter per flag
    checkpoint: CheckpointFlag,
    out: Annotated[Path, typer.Option(help="The JSON file to write.", show_default=False)],
    text_encoder: TextEncoderFlag = None,
    upsampler: UpsamplerFlag = None,
    lora: LoraFlag = None,
    semantics: SemanticsFlag = "R3",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="cuda needs onnxruntime-gpu.")] = "cpu",
    memory: Annotated[
        float | None,
        typer.Option(min=0, help="GB of memory that networks may take; else what is free."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure the ranges of a model's activations, for export --precision presets --calibration."""
    from .exporter import ExportOptions, Sources, calibrate_model, calibration_stages
    from .lora import LoraFile
    from .networks.denoiser import Semantics
    from .quantize.calibrate import CalibrationOptions
    from .quantize.calibration import Calibration

    if out.is_dir() or (out.exists() and not overwrite):
        raise OutputError(f"{out}: exists already; choose another file, or --overwrite to replace a file")
    sources = Sources.open(checkpoint, text_encoder, upsampler, [LoraFile.parse(text) for text in lora or ()])
    calibrating = CalibrationOptions(memory_bytes=None if memory is None else int(memory * 1e9), device=device)
    options = ExportOptions(semantics=Semantics(semantics), check=False, calibrating=calibrating)
    show_steps(calibrate_model(sources, out, options), calibration_stages())
    made = Calibration.load(out)
    networks = {name: {"layers": len(r.layers), "near_fp16_limit": r.large} for name, r in made.networks.items()}
    for name, ranges in made.networks.items():
        if ranges.large:
            largest = max(ranges.large, key=ranges.large.__getitem__)
            line = f"{name}: {len(ranges.large)} tensors near the limit of FP16 or beyond, the largest {largest}"
            typer.echo(f"{line} ({ranges.large[largest]:g})", err=True)
    emit({"calibration": str(out), "clips": made.made_from.clips, "networks": networks} if as_json else [str(out)])


@app.command()
def sensitivity(
    bundle: Annotated[Path, typer.Argument(help="A bundle of fp32 networks.", show_default=False)],
    calibration: Annotated[Path, typer.Option(help="The calibration of its model.", show_default=False)],
    by: Annotated[Literal["layer", "block", "kind"], typer.Option(help="What is quantised together.")] = "layer",
    as_json: JsonFlag = False,
) -> None:
    """Quantise the denoiser one group of layers at a time, and list what each does to a sampling step, worst first.

    Relative to fp32, over steps of both stages. Under a recipe's name: how many of the layers it quantises.
    """
    from ltxrt.bundle import Bundle

    from .quantize.calibrate import fp32_entry
    from .quantize.calibration import Calibration
    from .quantize.sensitivity import SensitivityRow, record_feeds, table
    from .quantize.sensitivity import sensitivity as measured

    opened, ranges = Bundle.open(bundle), Calibration.load(calibration)
    ranges.check_model(opened.manifest.model)
    graph = opened.file(fp32_entry(opened, "denoiser").file)
    feeds = record_feeds(opened, next(iter(opened.manifest.presets)))
    rows: list[SensitivityRow] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measured(graph, ranges, feeds, by, Path(folder)):
            typer.echo(f"{row.group}: {row.error:.2e}", err=True)
            rows.append(row)
    rows.sort(key=lambda row: -row.error)
    emit({"bundle": str(bundle), "by": by, "rows": [asdict(row) for row in rows]} if as_json else [table(rows)])
