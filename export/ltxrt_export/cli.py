# SPDX-License-Identifier: Apache-2.0
"""``ltxrt-export``: checkpoints to bundles.

stdout carries only the result (the bundle's path, or JSON), stderr everything else. torch and all that needs it is
imported inside the commands, so that ``--help`` and usage errors are instant.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from ltxrt.cli_process import emit, main_app, run_app

from .cli_calibrate import app as calibrate_app
from .cli_download import download
from .cli_steps import CheckpointFlag, JsonFlag, LoraFlag, SemanticsFlag, TextEncoderFlag, UpsamplerFlag, show_steps
from .cli_verify import app as verify_app
from .engines.cli import app as engines_app
from .lint.cli import app as lint_app
from .tiny.train_cli import train_tiny

if TYPE_CHECKING:
    from .exporter import ExportOptions, Sources
    from .quantize.calibration import Calibration

__all__ = ["app", "main", "run"]

_EPILOG = """\b
Exit codes:
    0  done
    1  internal error
    2  the command line does not parse
    3  a preset or a GPU that is not there
    5  the bundle is missing, damaged or of another version
    6  a network does not run, or cannot be built, on this machine
    7  the result cannot be written, or does not fit on the disk
    9  the checkpoint is refused, a network misses its parity limit, or the linter found an error
  130  interrupted with Ctrl-C (143 by SIGTERM, 129 by SIGHUP)
"""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)

OutFlag = Annotated[Path, typer.Option("--out", help="Folder of the new bundle.", show_default=False)]
CheckFlag = Annotated[
    bool,
    typer.Option("--check/--no-check", help="Compare every graph with its torch class, lower precisions with fp32."),
]
OverwriteFlag = Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")]
PrecisionFlag = Annotated[
    Literal["fp32", "presets"], typer.Option(help="One set of fp32 networks, or what each preset asks for.")
]
BackendFlag = Annotated[
    Literal["gpu", "cpu"], typer.Option(help="What the presets' networks are for; a CPU takes FP16 for BF16.")
]
CalibrationFlag = Annotated[
    Path | None,
    typer.Option(help="Ranges for the presets' networks; else they are measured on the way.", show_default=False),
]
OtherLorasFlag = Annotated[
    bool, typer.Option("--other-loras", help="Take a calibration made with other LoRAs than --lora, or with none.")
]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an internal error.")] = False,
) -> None:
    """Turn an LTX-2.3 checkpoint into a bundle that ltxrt runs."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


app.command()(download)
app.command()(train_tiny)
app.add_typer(calibrate_app)
app.add_typer(engines_app)
app.add_typer(lint_app)
app.add_typer(verify_app)


@app.command()
def export(  # noqa: PLR0913  # one parameter per flag
    checkpoint: CheckpointFlag,
    out: OutFlag,
    text_encoder: TextEncoderFlag = None,
    upsampler: UpsamplerFlag = None,
    lora: LoraFlag = None,
    semantics: SemanticsFlag = "R3",
    precision: PrecisionFlag = "fp32",
    backend: BackendFlag = "gpu",
    calibration: CalibrationFlag = None,
    other_loras: OtherLorasFlag = False,
    check: CheckFlag = True,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Export every network of a model and check it against the class that it came from."""
    from .exporter import ExportOptions, Sources
    from .lora import LoraFile
    from .networks.denoiser import Semantics

    options = ExportOptions(
        semantics=Semantics(semantics),
        check=check,
        overwrite=overwrite,
        precisions=precision,
        backend=backend,
        calibration=_calibration(calibration, precision),
        other_loras=other_loras,
    )
    loras = [LoraFile.parse(text) for text in lora or ()]
    _export(Sources.open(checkpoint, text_encoder, upsampler, loras), out, options, as_json=as_json)


@app.command()
def tiny(  # noqa: PLR0913  # one parameter per flag
    out: OutFlag,
    random: Annotated[bool, typer.Option("--random", help="Random weights instead of the shipped ones.")] = False,
    precision: PrecisionFlag = "fp32",
    backend: BackendFlag = "cpu",
    calibration: CalibrationFlag = None,
    check: CheckFlag = True,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Export the tiny model: how the bundle that ships with ltxrt is made."""
    from .exporter import Sources
    from .tiny.write import write_tiny
    from .tiny_bundle import TINY_OPTIONS, shipped_tiny

    options = replace(
        TINY_OPTIONS,
        check=check,
        overwrite=overwrite,
        precisions=precision,
        backend=backend,
        calibration=_calibration(calibration, precision),
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = (write_tiny if random else shipped_tiny)(Path(folder))
        sources = Sources.open(paths.checkpoint, paths.text_encoder, paths.upsampler)
        _export(sources, out, options, as_json=as_json)


def _calibration(path: Path | None, precision: str) -> "Calibration | None":
    from .quantize.calibration import Calibration

    if path is None:
        return None
    if precision == "fp32":
        raise typer.BadParameter("fp32 networks need none: give --precision presets too", param_hint="--calibration")
    return Calibration.load(path)


def _export(sources: "Sources", out: Path, options: "ExportOptions", *, as_json: bool) -> None:
    """Export with progress on stderr; the bundle's path, or it and the parity figures as JSON, on stdout."""
    from .exporter import export_bundle, stages

    rows = show_steps(export_bundle(sources, out, options), stages(options))
    emit({"bundle": str(out), "parity": rows} if as_json else [str(out)])


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors of ltxrt's own become one line on stderr."""
    return run_app(app, "ltxrt-export", arguments)


def main() -> NoReturn:
    """Entry point of ``ltxrt-export``."""
    main_app(app, "ltxrt-export")
