# SPDX-License-Identifier: Apache-2.0
"""The README's tables, made from ``benchmarks/results/``.

    python benchmarks/report.py [--check]

Writes what stands between the two marks in the README; ``--check`` only says whether it is up to date. A figure that is
in no file is in no table: what has not run on a GPU says so.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS
from serving.report import serving

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- made by benchmarks/report.py -->\n", "<!-- end of what benchmarks/report.py made -->\n"

_SIDES = {"ltxrt": "ltxrt", "torch": "diffusers classes, torch eager", "torch-compile": "the same, torch.compile"}
_WITHOUT = {
    "nothing": "nothing",
    "late_allocation": "buffers planned when a network loads",
    "run_by_run_memory": "one block of memory a run, kept",
    "shared_arena": "an arena for every network",
    "brief_spinning": "idle threads sleep at once",
    "graph_fusion": "graphs run as exported",
    "decode_chunks": "the clip decoded in one piece",
    "text_encoder_runs": "prompt known to the cache",
}
_NETWORKS = ("text_encoder", "audio_encoder", "image_encoder", "denoiser", "upsampler", "video_decoder")


def main() -> int:
    """Write the tables, or check them; 1 if they are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = README.read_text("utf-8")
    wanted = with_tables(text, tables(RESULTS))
    if options.check:
        print("up to date" if text == wanted else "out of date: run python benchmarks/report.py")
        return int(text != wanted)
    README.write_text(wanted, "utf-8")
    return 0


def with_tables(text: str, made: str) -> str:
    """A page with what stands between its marks replaced.

    Raises:
        ValueError: The page has no marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README.name} lacks the marks {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + made + END + after


def tables(folder: Path) -> str:
    """Everything between the marks."""
    records = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_name.setdefault(record.get("benchmark", ""), []).append(record)
    lines: list[str] = []
    sections = {
        "pipeline": pipeline,
        "startup": startup,
        "serving": serving,
        "engines": engines,
        "kernels": kernels,
        "estimate": estimate,
    }
    for name, make in sections.items():
        for record in by_name.get(name, []):
            lines += [*make(record["results"]), "", origin(record), ""]
    if not any(record.get("machine", {}).get("gpu") for record in records):
        lines += ["On a GPU: not run yet. `benchmarks/gpu_visit.py` holds what one visit will measure.", ""]
    return "\n" + "\n".join(lines)


def origin(record: Mapping[str, Any]) -> str:
    """Where a table's figures are from."""
    if record["benchmark"] == "estimate":
        return f"`benchmarks/estimate.py`, {record['date']}; every assumption is in `benchmarks/results/estimate.json`."
    here, versions = record["machine"], record["versions"]
    used = ", ".join(f"{name} {versions[name]}" for name in ("onnxruntime", "torch", "diffusers") if versions.get(name))
    load = load_of(record["results"])
    noted = f", load average before {load:.2f}" if load is not None else ""
    return (
        f"`benchmarks/bench_{record['benchmark']}.py` on {here['gpu'] or here['cpu']}, {here['cores']} cores, "
        f"{record['date']}{noted}; {used}."
    )


def load_of(results: Mapping[str, Any]) -> float | None:
    """The load average that was noted, the highest where there are several."""
    found = [side["load_average_before"] for side in results.get("sides", {}).values()]
    found += results.get("load_average_before", [])[:1]
    return results.get("load_average", max(found, default=None))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown; all columns but the first are numbers."""
    yield f"| {' | '.join(heads)} |"
    yield f"|---|{'---:|' * (len(heads) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def pipeline(results: Mapping[str, Any]) -> Iterator[str]:
    """A clip by every side, then with one optimisation off at a time."""
    clip = results["clip"]
    yield (
        f"A clip of {clip['frames']} frames at {clip['resolution']}, tiny model, {results['threads']} threads, each "
        f"side in its own process, {clip['repeats']} runs after one that is not counted:"
    )
    yield ""
    heads = (
        "",
        "seconds, p50",
        "p90",
        "to the first fragment",
        "seconds a second of video",
        "peak memory, MB",
        "ready",
    )
    yield from table(heads, [side_row(_SIDES[name], side) for name, side in results["sides"].items()])
    for name, shares in results.get("ltxrt_over", {}).items():
        yield ""
        yield (
            f"Against {_SIDES[name]}, turn by turn: {shares['time']:.2f} of the time, "
            f"{shares['peak_memory']:.2f} of the memory, {shares['ready']:.2f} of the time to ready."
        )
    outside = results["sides"].get("ltxrt", {}).get("outside_backends_share")
    if outside:
        yield f"Outside engines and codecs: {outside['p50']:.1%} of the time."
    stages = results["sides"]
    names = list(stages["ltxrt"]["stages"]) if "ltxrt" in stages else []
    if names:
        yield ""
        yield "Seconds by stage:"
        yield ""
        shown = [name for name in names if name != "load"]
        rows = [
            (_SIDES[side], *(f"{found['stages'][name]['p50']:.3f}" for name in shown)) for side, found in stages.items()
        ]
        yield from table(("", *(name.replace("_", " ") for name in shown)), rows)
    if results.get("ltxrt_without"):
        yield ""
        yield "ltxrt with one thing changed at a time:"
        yield ""
        rows = [side_row(_WITHOUT[name], side) for name, side in results["ltxrt_without"].items()]
        yield from table(heads, rows)


def side_row(label: str, side: Mapping[str, Any]) -> list[str]:
    """One side's figures."""
    first = side.get("first_fragment_seconds")
    return [
        label,
        f"{side['wall_seconds']['p50']:.2f}",
        f"{side['wall_seconds']['p90']:.2f}",
        "" if first is None else f"{first['p50']:.2f}",
        f"{side['real_time_factor']['p50']:.2f}",
        f"{side['peak_rss_mb']:.0f}",
        f"{side['ready_seconds']:.2f}",
    ]


def startup(results: Mapping[str, Any]) -> Iterator[str]:
    """Time to ready."""
    yield "Seconds from an empty process until the first clip can begin:"
    yield ""
    rows = [
        ("`ltxrt generate`, networks loaded", results["generate"]["ready"]),
        ("a server's worker, every network run once", results["worker"]["ready"]),
    ]
    yield from table(("", "p50", "p90"), [(name, f"{s['p50']:.2f}", f"{s['p90']:.2f}") for name, s in rows])


def engines(results: Mapping[str, Any]) -> Iterator[str]:
    """Every network at its largest shape."""
    ceilings = results["ceilings"]
    yield (
        f"Every network alone on {results['engine']}, at the largest shape that was measured; measured ceilings of the "
        f"machine: {1000 * ceilings['tflops']:.0f} GFLOP/s, {ceilings['gb_per_second']:.0f} GB/s:"
    )
    yield ""
    rows: list[tuple[str, ...]] = []
    for name in _NETWORKS:
        if name in results["networks"]:
            row = max(results["networks"][name].values(), key=lambda found: found["flops"])
            figures = (f"{1e3 * row['median']:.1f}", f"{row['flops'] / 1e9:.1f}", f"{1000 * row['tflops']:.0f}")
            rows.append((name.replace("_", " "), row["clip"], *figures, f"{row['share_of_bound']:.0%}"))
    yield from table(("", "clip", "milliseconds", "GFLOP", "GFLOP/s", "of the ceiling"), rows)


def kernels(results: Mapping[str, Any]) -> Iterator[str]:
    """Every kernel and its share of a copy's speed."""
    yield f"Kernels; a copy reaches {results['copy']['gb_per_second']:.0f} GB/s:"
    yield ""
    rows = [
        (name, f"{1e6 * row['median']:.1f}", f"{row['gb_per_second']:.0f}", f"{row['share_of_copy']:.0%}")
        for name, row in results["kernels"].items()
    ]
    yield from table(("", "microseconds", "GB/s", "of a copy"), rows)


def estimate(results: Mapping[str, Any]) -> Iterator[str]:
    """The whole job of the 22B model: its work, what the goals require, and seconds where a GPU was measured."""
    jobs, peaks = results["jobs"], results["peaks"]
    run = f"on {results['gpu']}" if results["gpu"] else "not run on a GPU"
    yield f"Work of the whole job of the 22B model at preset {results['work']['preset']}, by stage; {run}:"
    yield ""
    heads = [head for clip in jobs for head in (f"{clip}, TFLOP", "of it FP8", "least GB")]
    stages = next(iter(jobs.values()))["stages"]
    rows = [
        (
            f"{name.replace('_', ' ')}, {runs(stage['runs'])}",
            *(figure for job in jobs.values() for figure in work(job["stages"][name])),
        )
        for name, stage in stages.items()
    ]
    sums = [figure for job in jobs.values() for figure in work(summed(job))]
    yield from table(("", *heads), [*rows, ("together", *sums)])
    yield ""
    yield (
        f"What the goals require of one H200, whose published peaks are {peaks['fp8_tflops']:.0f} TFLOP/s in FP8, "
        f"{peaks['half_tflops']:.0f} in 16 bits and {peaks['gb_per_second']:.0f} GB/s (NVIDIA's datasheet, dense; "
        "nothing here is measured):"
    )
    yield ""
    heads = ("", "goal, s", "TFLOP/s sustained", "share of the peaks", "if the host takes a fifth", "if all is 16-bit")
    rows = [(clip, *requirement(job)) for clip, job in jobs.items()]
    encodes = {clip: job["encode_elsewhere"] for clip, job in jobs.items() if job.get("encode_elsewhere")}
    if encodes and not results["gpu"]:
        heads = (*heads, "H.264 elsewhere, s")
        rows = [(*row, f"{encodes[row[0]]['seconds']:.1f}") for row in rows]
    yield from table(heads, rows)
    if encodes and not results["gpu"]:
        yield ""
        yield f"H.264 on the host comes on top; elsewhere is {next(iter(encodes.values()))['source']}."
    yield from estimates(jobs)


def requirement(job: Mapping[str, Any]) -> tuple[str, ...]:
    """What a goal asks for."""
    found = job["required"]
    shares = ("share_of_peak", "share_of_peak_less_host", "share_of_peak_in_16_bits")
    sustained = f"{found['tflops_sustained']:.0f}"
    return f"{job['goal_seconds']}", sustained, *(f"{found[share]:.0%}" for share in shares)


def estimates(jobs: Mapping[str, Any]) -> Iterator[str]:
    """Seconds of every stage and where they come from."""
    for clip, job in jobs.items():
        for name, found in job["estimates"].items():
            yield ""
            yield f"{clip}, {name}; the goal in seconds is {job['goal_seconds']}:"
            yield ""
            yield "| stage | seconds | source |"
            yield "|---|---:|---|"
            for stage, line in found["stages"].items():
                seconds = "" if line["seconds"] is None else f"{line['seconds']:.3f}"
                yield f"| {stage.replace('_', ' ')} | {seconds} | {line['source']} |"
            without = f"without {', '.join(found['missing'])}" if found["missing"] else ""
            yield f"| together | {found['known_seconds']:.3f} | {without} |"


def summed(job: Mapping[str, Any]) -> dict[str, float]:
    """The work of all stages."""
    return {key: sum(stage[key] for stage in job["stages"].values()) for key in ("tflop", "fp8_tflop", "least_gb")}


def work(stage: Mapping[str, Any]) -> tuple[str, str, str]:
    """A stage's TFLOP, those in FP8, and GB."""
    return f"{stage['tflop']:.1f}", f"{stage['fp8_tflop']:.1f}", f"{stage['least_gb']:.2f}"


def runs(count: int) -> str:
    """``1 run``, ``3 runs``."""
    return f"{count} run{'s' * (count > 1)}"


if __name__ == "__main__":
    sys.exit(main())
