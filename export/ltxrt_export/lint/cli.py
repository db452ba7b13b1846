# SPDX-License-Identifier: Apache-2.0
"""``ltxrt-export lint``: what TensorRT will not like about a bundle's graphs, without TensorRT."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ltxrt.errors import ExportError

if TYPE_CHECKING:
    from .findings import Finding

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

#: Nodes that a line names before it only counts them.
_NAMED = 3


@app.command()
def lint(
    bundle: Annotated[Path, typer.Argument(help="A bundle of ONNX networks.", show_default=False)],
    preset: Annotated[
        list[str] | None, typer.Option(help="Only the networks of this preset; may be given again.")
    ] = None,
    buckets: Annotated[
        Path | None, typer.Option(help="TOML file of sizes and lengths to check at; else those of ltxrt.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Count warnings as errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every finding as JSON.")] = False,
) -> None:
    """Check graphs against the rules of TensorRT's parser and of FP8; exit code 9 where a build would fail."""
    from ltxrt_export.engines.buckets import load_buckets

    from .linter import lint_bundle

    found = list(lint_bundle(bundle, load_buckets(buckets), preset))
    if as_json:
        typer.echo(json.dumps({"bundle": str(bundle), "findings": [entry.to_json() for entry in found]}, indent=2))
    else:
        for line in summary(found):
            typer.echo(line)
    counted = ("error", "warning") if strict else ("error",)
    failing = sum(entry.severity in counted for entry in found)
    if failing:
        raise ExportError(f"{bundle}: {failing} findings that keep TensorRT from building it as it should")


def summary(found: "list[Finding]") -> list[str]:
    """One line for each network and rule, the worst first: how often, what, why, where."""
    from .findings import RULES

    order = {"error": 0, "warning": 1, "note": 2}
    groups: dict[tuple[str, str], list[Finding]] = {}
    for entry in found:
        groups.setdefault((entry.network, entry.rule), []).append(entry)
    lines: list[str] = []
    for (network, rule), entries in sorted(groups.items(), key=lambda item: (order[item[1][0].severity], item[0])):
        nodes = ", ".join(entry.node for entry in entries[:_NAMED])
        more = f" and {len(entries) - _NAMED} more" if len(entries) > _NAMED else ""
        head = f"{entries[0].severity}: {network}: {rule} x {len(entries)}: {entries[0].message}"
        lines.append(f"{head}; {RULES[rule].reason} [{nodes}{more}]")
    return lines or ["nothing found"]
