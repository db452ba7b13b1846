# SPDX-License-Identifier: Apache-2.0
"""What bench_serving.py found, for the README."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["serving"]


def serving(results: Mapping[str, Any]) -> Iterator[str]:
    """The parts that a record has, one after the other."""
    parts = {"throughput": _throughput, "load": _load, "soak": _soak}
    made = [list(make(results[name])) for name, make in parts.items() if name in results]
    for number, lines in enumerate(made):
        yield from [""] * bool(number)
        yield from lines


def _throughput(found: Mapping[str, Any]) -> Iterator[str]:
    turns, clips, health = found["turns"], found["clips_a_turn"], found["health_ms"]
    losses = [
        ours["seconds"] / other["seconds"] - 1 for ours, other in zip(turns["served"], turns["files"], strict=True)
    ]
    yield (
        f"Clips of {found['clip']['num_frames']} frames back to back, {len(turns['served'])} turns of {clips}"
        f" each; {found['loss']:+.1%} of time for `ltxrt serve` over `Pipeline.render`, which is what `ltxrt generate`"
        f" calls, the median over turns that gave {min(losses):+.1%} to {max(losses):+.1%}:"
    )
    yield ""
    yield "|  | seconds a clip, p50 | least | most | seconds of the CPU |"
    yield "|---|---:|---:|---:|---:|"
    labels = {
        "stream": "`Pipeline.generate`, a stream",
        "files": "`Pipeline.render`, a checked file",
        "served": "`ltxrt serve`, a checked file",
    }
    for side, label in labels.items():
        seconds = sorted(turn["seconds"] / clips for turn in turns[side])
        cpu = sorted(turn["cpu_seconds"] / clips for turn in turns[side])
        row = (_middle(seconds), seconds[0], seconds[-1], _middle(cpu))
        yield f"| {label} | {' | '.join(f'{value:.2f}' for value in row)} |"
    yield ""
    yield f"Milliseconds of `/health` meanwhile: {health['p50']:.0f} p50, {health['p99']:.0f} p99."


def _load(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Milliseconds under calls that come at random, {found['slots']} workers with scripted pipelines that take a"
        " fifth of a second; p50 and the worst:"
    )
    yield ""
    yield "| calls a second | calls | sync | queued | first fragment of a stream | `/health` | lost |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for rate in found["rates"]:
        spread = rate["latency_ms"]
        cells = [spread.get("sync"), spread.get("queue"), rate["first_fragment_ms"], rate["health_ms"]]
        row = [f"{cell['p50']:.0f}, {cell['max']:.0f}" if cell else "" for cell in cells]
        yield f"| {rate['rate']:g} | {rate['calls']} | {' | '.join(row)} | {len(rate['problems'])} |"


def _soak(found: Mapping[str, Any]) -> Iterator[str]:
    early, end = (found["server"][when]["server_rss_mb"] for when in ("early", "idle_at_the_end"))
    left = sum(len(found[name]) for name in ("folders_without_a_job", "incoming_left", "temporary_left"))
    yield (
        f"{sum(found['calls'].values()):,} calls of every kind, bad ones and broken connections among them, while"
        f" {found['killed_workers']} workers and the server itself were killed: {len(found['lost'])} jobs lost,"
        f" {len(found['wrong'])} in a wrong state, {left} files and {found['processes_left']} processes left; the"
        f" server's megabytes: {early:.0f} early, {end:.0f} at the end."
    )


def _middle(values: Sequence[float]) -> float:
    return values[len(values) // 2]
