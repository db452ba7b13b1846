# SPDX-License-Identifier: Apache-2.0
"""``ltxrt-export``: checkpoints to bundles."""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ltxrt.errors import LtxrtError

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn an LTX-2.3 checkpoint into a bundle that ltxrt runs.",
    epilog="Exit codes: 0 done, 2 usage, 7 the bundle cannot be written, 9 the checkpoint is refused, 130 interrupted.",
)

Out = Annotated[Path, typer.Option("--out", help="Folder of the new bundle.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.callback()
def _root() -> None:
    """Commands are subcommands even while there are few of them."""


@app.command()
def export(  # noqa: PLR0913  # one parameter per flag
    checkpoint: Annotated[Path, typer.Option(help="The single-file checkpoint.", show_default=False)],
    text_encoder: Annotated[Path, typer.Option(help="The Gemma 3 folder.", show_default=False)],
    upsampler: Annotated[Path, typer.Option(help="The x2 spatial upsampler's file.", show_default=False)],
    out: Out,
    semantics: Annotated[str, typer.Option(help="Modulation rules: R1, R2 or R3.")] = "R3",
    check: Annotated[bool, typer.Option(help="Compare every graph with its torch class.")] = True,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Export every network of a model and check it against the class that it came from."""
    from .exporter import ExportOptions, Sources
    from .networks.denoiser import Semantics

    if semantics not in list(Semantics):
        raise typer.BadParameter(f"{semantics!r} is not R1, R2 or R3", param_hint="--semantics")
    options = ExportOptions(semantics=Semantics(semantics), check=check, overwrite=overwrite)
    _run(Sources.open(checkpoint, text_encoder, upsampler), out, options, as_json=as_json)


@app.command()
def tiny(out: Out, check: bool = True, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Write the tiny model and export it: how the bundle that ships with ltxrt is made."""
    from .exporter import ExportOptions, Sources
    from .tiny.config import AUTO_PIXELS, LICENCE
    from .tiny.write import write_tiny

    with tempfile.TemporaryDirectory() as folder:
        paths = write_tiny(Path(folder))
        options = ExportOptions(auto_pixels=AUTO_PIXELS, licence=LICENCE, check=check, overwrite=overwrite)
        _run(Sources.open(paths.checkpoint, paths.text_encoder, paths.upsampler), out, options, as_json=as_json)


def _run(sources: Any, out: Path, options: Any, *, as_json: bool) -> None:
    """Export with progress on stderr; the result on stdout."""
    from .exporter import export_bundle

    rows: list[dict[str, Any]] = []
    for step in export_bundle(sources, out, options):
        for row in step.rows:
            sizes = " ".join(f"{name}={size}" for name, size in row.sizes.items())
            typer.echo(f"  {row.output} at {sizes}: {row.error:.2e} {row.unit}", err=True)
            rows.append({**asdict(row), "passed": row.passed})
        if step.index < step.total:
            typer.echo(f"[{step.index + 1}/{step.total}] {step.description}", err=True)
    typer.echo(json.dumps({"bundle": str(out), "parity": rows}, indent=2) if as_json else str(out))


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    try:
        app(standalone_mode=True)
    except LtxrtError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
