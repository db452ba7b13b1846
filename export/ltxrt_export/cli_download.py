# SPDX-License-Identifier: Apache-2.0
"""``ltxrt-export download``: the published weights, with their terms, sizes and progress in words."""

import json
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ltxrt.cli_process import resumable
from ltxrt.cli_progress import reporter
from ltxrt.errors import ExportError
from ltxrt.result import Progress

if TYPE_CHECKING:
    from .download import DownloadPlan
    from .hub import Hub

__all__ = ["download"]

_MEGABYTE = 1_000_000


def download(
    out: Annotated[Path, typer.Option("--out", help="Folder of the files.")] = Path("ltx-2.3"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be fetched, and fetch nothing.")] = False,
    token: Annotated[
        str | None, typer.Option(help="Access token of the hub; better in HF_TOKEN.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Accept the terms of the models without being asked.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON.")] = False,
) -> None:
    """Fetch the published LTX-2.3 weights: checkpoint, upsampler and text encoder, 71 GB in all.

    An interrupted download goes on where it stopped; every file's size and hash are compared with the hub's.
    """
    from .download import plan_download
    from .hub import Hub

    hub = Hub(token)
    plan = plan_download(out, hub)
    typer.echo(_listing(plan), err=True)
    if not dry_run:
        _accept(plan, yes=yes)
        _fetch(plan, hub)
    typer.echo(json.dumps(_result(plan, dry_run=dry_run), indent=2) if as_json else _summary(plan, dry_run=dry_run))


def _accept(plan: "DownloadPlan", *, yes: bool) -> None:
    """Show the terms before the first fetch, and ask for them unless that was done."""
    if plan.missing_bytes == 0:
        return
    for repository in plan.repositories:
        typer.echo(f"{repository.name}: {repository.terms}, {repository.terms_page}", err=True)
    if yes:
        typer.echo("accepted with --yes", err=True)
    elif not sys.stdin.isatty():
        raise ExportError("the terms above have to be accepted first: read them, then pass --yes")
    elif not typer.confirm("Do you accept these terms?", err=True):
        raise ExportError("the terms were not accepted, so nothing was fetched")


def _fetch(plan: "DownloadPlan", hub: "Hub") -> None:
    from .download import download as fetched

    names = [file.name for file in plan.files]
    kept = resumable("the same command goes on where it stopped")
    with kept, closing(fetched(plan, hub)) as steps, reporter(names) as progress:
        for step in steps:
            done, size = step.done // _MEGABYTE, max(1, step.file.bytes // _MEGABYTE)
            progress.show(Progress(step.file.name, min(done, size), size))


def _listing(plan: "DownloadPlan") -> str:
    """A table of the files, and what they take."""
    from .disk import free_bytes, gigabytes

    width = max(len(file.name) for file in plan.files)
    lines: list[str] = []
    for file in plan.files:
        present = plan.present_bytes(file)
        state = "" if not present else "  here" if plan.path(file).exists() else f"  {gigabytes(present)} here"
        lines.append(f"{file.name:<{width}}  {gigabytes(file.bytes):>9}{state}")
    counts = Counter(file.repository.name for file in plan.files)
    lines += [f"{count} files of {name}" for name, count in counts.items()]
    lines.append(
        f"to fetch: {gigabytes(plan.missing_bytes)} of {gigabytes(plan.total_bytes)};"
        f" free in {plan.folder}: {gigabytes(free_bytes(plan.folder))}"
    )
    return "\n".join(lines)


def _summary(plan: "DownloadPlan", *, dry_run: bool) -> str:
    """The folder, or after a dry run, what it would take."""
    from .disk import gigabytes

    return f"{gigabytes(plan.missing_bytes)} to fetch into {plan.folder}" if dry_run else str(plan.folder)


def _result(plan: "DownloadPlan", *, dry_run: bool) -> dict[str, Any]:
    from .disk import free_bytes
    from .download import source_paths

    checkpoint, text_encoder, upsampler = source_paths(plan)
    return {
        "folder": str(plan.folder),
        "dry_run": dry_run,
        "checkpoint": str(checkpoint),
        "text_encoder": str(text_encoder),
        "upsampler": str(upsampler),
        "total_bytes": plan.total_bytes,
        "missing_bytes": plan.missing_bytes,
        "free_bytes": free_bytes(plan.folder),
        "files": [
            {
                "repository": file.repository.name,
                "revision": file.revision,
                "name": file.name,
                "path": str(plan.path(file)),
                "bytes": file.bytes,
                "sha256": file.sha256,
                "git_sha1": file.git_sha1,
            }
            for file in plan.files
        ],
    }
