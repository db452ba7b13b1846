# SPDX-License-Identifier: Apache-2.0
"""``ltxrt-export verify``: whether a bundle's networks are what the model's own classes are."""

import math
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ltxrt.bundle import Bundle, file_sha256
from ltxrt.cli_process import emit
from ltxrt.cli_progress import reporter
from ltxrt.errors import ExportError, shown
from ltxrt.manifest import NETWORK_NAMES
from ltxrt.result import Progress

from .cli_steps import JsonFlag, LoraFlag, TextEncoderFlag, UpsamplerFlag

if TYPE_CHECKING:
    from .exporter import Sources
    from .parity import ParityRow
    from .verify import NetworkReport

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_SEEDS = 2**31


@app.command()
def verify(  # noqa: PLR0913  # one parameter per flag
    bundle: Annotated[
        Path | None, typer.Argument(help="The bundle; without one, that of the package.", show_default=False)
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="The checkpoint that it was made from; the tiny model brings its own.", show_default=False),
    ] = None,
    text_encoder: TextEncoderFlag = None,
    upsampler: UpsamplerFlag = None,
    lora: LoraFlag = None,
    network: Annotated[
        list[str] | None, typer.Option(help="Only this network; may be given again.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the inputs; else a fresh one, which is shown.", min=0, show_default=False)
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Run every network of a bundle against the class that it came from; exit code 9 where one is off its limit."""
    names = _names(network)
    seed = secrets.randbelow(_SEEDS) if seed is None else seed
    typer.echo(f"inputs of seed {seed}; reading every file of the bundle", err=True)
    opened = Bundle.open(bundle, verify=True)
    with tempfile.TemporaryDirectory() as folder:
        sources = _sources(opened, (checkpoint, text_encoder, upsampler), lora or (), Path(folder))
        sources, changes = sources.with_changes(Path(folder))
        for _ in changes.write() if changes is not None else ():
            pass
        reports = list(_reports(opened, sources, names, seed))
    from .verify_engines import engines_not_run

    left_out = engines_not_run(opened, names)
    if as_json:
        emit(_json(opened, seed, reports, left_out))
    else:
        emit([*_table(reports), *(_engine_line(opened, key, reason) for key, reason in left_out.items())])
    failed = [report for report in reports if not report.passed]
    if failed:
        # Not raised: the result is on stdout already, and --json would add the error to it.
        named = ", ".join(f"{report.network} {_computes_in(report)}" for report in failed)
        typer.echo(f"error: {opened.path}: {named}: not what the torch class makes of the same inputs", err=True)
        raise typer.Exit(ExportError.exit_code)


def _names(network: Sequence[str] | None) -> list[str]:
    for name in network or ():
        if name not in NETWORK_NAMES:
            raise typer.BadParameter(f"{shown(name)} is no network; allowed: {', '.join(NETWORK_NAMES)}")
    return [name for name in NETWORK_NAMES if network is None or name in network]


def _sources(
    bundle: Bundle, paths: tuple[Path | None, Path | None, Path | None], loras: Sequence[str], folder: Path
) -> "Sources":
    """The model's files as given, or those of the tiny model; refused where the bundle was made from others."""
    from .exporter import Sources
    from .lora import LoraFile
    from .tiny_bundle import shipped_tiny

    checkpoint, text_encoder, upsampler = paths
    model = bundle.manifest.model
    if checkpoint is None:
        if model.checkpoint_sha256 != Bundle.open().manifest.model.checkpoint_sha256:
            raise ExportError(
                f"{bundle.path}: made from {model.name}; name its --checkpoint, --text-encoder and --upsampler"
            )
        tiny = shipped_tiny(folder / "tiny")
        checkpoint, text_encoder = tiny.checkpoint, text_encoder or tiny.text_encoder
        upsampler = upsampler or tiny.upsampler
    sources = Sources.open(checkpoint, text_encoder, upsampler, [LoraFile.parse(text) for text in loras])
    found = sources.checkpoint.sha256()
    if found != model.checkpoint_sha256:
        raise ExportError(
            f"{bundle.path}: made from {model.name} with sha256 {model.checkpoint_sha256[:12]}…;"
            f" {checkpoint} has {found[:12]}…"
        )
    _check_loras(bundle, sources)
    return sources


def _check_loras(bundle: Bundle, sources: "Sources") -> None:
    entries = bundle.manifest.model.loras
    made = [(entry.sha256, entry.scale) for entry in entries]
    given = [(file_sha256(lora.path), lora.scale) for lora in sources.loras]
    if made != given:
        needed = " ".join(f"--lora {entry.name}.safetensors:{entry.scale:g}" for entry in entries) or "no --lora"
        raise ExportError(f"{bundle.path}: made with other LoRAs than are given; allowed: {needed}")


def _reports(bundle: Bundle, sources: "Sources", names: Sequence[str], seed: int) -> "Iterator[NetworkReport]":
    """The finished variants, with progress on stderr."""
    from .verify import VerifyOptions, verify_bundle

    with reporter(names) as progress:
        for step in verify_bundle(bundle, sources, VerifyOptions(networks=names, seed=seed)):
            progress.show(Progress(step.network, step.done, step.total))
            if step.report is not None:
                yield step.report


def _table(reports: "Iterable[NetworkReport]") -> list[str]:
    """A line for each output of each variant: how often it was compared, and the worst of it."""
    header = ("network", "precision", "presets", "output", "runs", "error", "limit", "worst at", "")
    lines: list[tuple[str, ...]] = [header]
    for report in reports:
        for output in dict.fromkeys(row.output for row in report.rows):
            rows = [row for row in report.rows if row.output == output]
            # An error that is not a number is the worst there is.
            worst = max(rows, key=lambda row: (not row.passed, row.error))
            verdict = "ok" if all(row.passed for row in rows) else "FAIL"
            figures = str(len(rows)), f"{worst.error:.2e}", f"{worst.limit:g} {worst.unit}", _sizes(worst), verdict
            lines.append((report.network, _computes_in(report), ",".join(report.presets), output, *figures))
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _sizes(row: "ParityRow") -> str:
    return " ".join(f"{name}={size}" for name, size in row.sizes.items())


def _computes_in(report: "NetworkReport") -> str:
    return f"{report.precision} engine" if report.engine else report.precision


def _engine_line(bundle: Bundle, key: str, reason: str) -> str:
    entry = bundle.manifest.engines[key]
    return f"engine {key} of {entry.network} for {entry.key.gpu_name}: not run: {reason}"


def _json(bundle: Bundle, seed: int, reports: "Sequence[NetworkReport]", left_out: Mapping[str, str]) -> dict[str, Any]:
    return {
        "bundle": str(bundle.path),
        "seed": seed,
        "passed": all(report.passed for report in reports),
        "networks": [
            {
                "key": report.key,
                "network": report.network,
                "precision": report.precision,
                "engine": report.engine or None,
                "presets": list(report.presets),
                "passed": report.passed,
                "checks": [
                    # JSON has no infinity.
                    {**asdict(row), "error": row.error if math.isfinite(row.error) else None, "passed": row.passed}
                    for row in report.rows
                ],
            }
            for report in reports
        ],
        "engines_not_run": [
            {"key": key, "network": bundle.manifest.engines[key].network, "reason": reason}
            for key, reason in left_out.items()
        ],
    }
