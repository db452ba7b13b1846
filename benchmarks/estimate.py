# SPDX-License-Identifier: Apache-2.0
"""How long will a whole job of the 22B model take on a GPU, and what would the goals require of it?

    python benchmarks/estimate.py [FOLDER ...] [--out DIR]

Reads the records below the folders that a visit to a GPU left (default: ``benchmarks/results``) and the work of every
stage, ``full-work.json``, and writes ``estimate.json``. Each stage's seconds come from the best that is there:
``measured``; ``derived`` from measured blocks, a straight line over their number; or ``bound``, its FLOPs and bytes at
the measured ceilings times an efficiency. Every figure says which, and every assumption is in the record.

Without a record of a GPU there are no seconds: what is given then is the work, and the share of the published peaks
that the goals require. Records of CPUs and of narrow blocks never give seconds. Never run on a GPU yet.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, record

#: Seconds from the request to the last byte, on one H200, at preset high.
GOALS = {"121x1280x704": 3.8, "121x768x512": 1.6}
BLOCKS = 48
#: Where nothing is measured.
EFFICIENCY = 0.5
HOST_SHARE = 0.2
COPY_GB_PER_SECOND = 12.0
NETWORK_OF = {"denoise_1": "denoiser", "denoise_2": "denoiser", "upsample": "upsampler", "decode": "video_decoder"}
HOST_STAGES = ("copy_out", "mux")

Record = Mapping[str, Any]
Work = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Rates:
    """What a GPU does a second: ceilings that were measured, or peaks that were published."""

    half_tflops: float
    fp8_tflops: float
    gb_per_second: float

    def seconds(self, work: Work, *, fp8: bool = True) -> float:
        """Least time of a stage; ``fp8`` false takes 16-bit products throughout, with the bytes of the preset."""
        eight_bit, other = flops_by_type(work)
        products = eight_bit / (self.fp8_tflops if fp8 else self.half_tflops) + other / self.half_tflops
        return max(products / 1e12, work["least_bytes"] / (self.gb_per_second * 1e9))


#: NVIDIA, "H200 Tensor Core GPU" datasheet, SXM: 3958 TFLOPS FP8 and 1979 TFLOPS FP16 or BF16 with sparsity, half of
#: that dense; 4.8 TB/s. Published, not measured.
PEAKS = Rates(half_tflops=989.5, fp8_tflops=1979.0, gb_per_second=4800.0)
ASSUMPTIONS = (
    f"The published peaks are those of NVIDIA's H200 SXM datasheet, dense (half of the figures with sparsity): "
    f"{PEAKS.fp8_tflops:.0f} TFLOP/s in FP8, {PEAKS.half_tflops:.1f} in 16 bits, {PEAKS.gb_per_second:.0f} GB/s. "
    "Nothing sustains them: they bound what is possible.",
    "Work counts products, attention and convolutions, and neither norms nor activations, softmax, rotary embeddings.",
    "Bytes are weights, inputs and outputs, once a run, in the preset's types, nothing that lies between operators.",
    "Linear layers that the preset's recipe names are FP8; attention and all other networks are 16-bit.",
    "Networks are loaded, engines warm, and nothing waits in front; reading the audio and the image, planning, and "
    "checking the finished file take no time.",
    "One picture is encoded, at both sizes; the prompt is not in the prompt cache.",
    "Stages run one after the other: a clip of 121 frames decodes in two chunks, the second of 116 frames, so that "
    "hardly anything of decode, copy-out and encode overlaps.",
    f"Where a goal is said to be less the host, copy-out, H.264 and all else that is no network take {HOST_SHARE:.0%}.",
    "A step's time is linear in the DiT's blocks, fitted by least squares to all counts that were measured.",
    "Random weights take as long as trained ones.",
    "FP8 changes a step's time as it changes its bound at the measured ceilings: FP8 blocks are as efficient as the "
    "measured 16-bit ones, and quantising activations costs nothing.",
    "Where FP8's ceiling was not measured it is twice that of 16 bits, as published.",
    f"A network that was not measured reaches {EFFICIENCY:.0%} of its bound.",
    f"Frames are copied to the host at {COPY_GB_PER_SECOND:.0f} GB/s.",
    "H.264 takes time by pixels: the measured clip's preset and pictures are taken for those of this one.",
)


@dataclass(frozen=True, slots=True)
class Fit:
    """Seconds of a step over the number of blocks.

    Attributes:
        fixed: Without any block.
        per_block: Slope.
        worst: Largest deviation of a measurement from the line, relative.
        counts: Numbers of blocks.
    """

    fixed: float
    per_block: float
    worst: float
    counts: tuple[int, ...]

    def at(self, blocks: int) -> float:
        """Seconds of a step."""
        return self.fixed + blocks * self.per_block


@dataclass(frozen=True, slots=True)
class Line:
    """One stage: seconds, or None, and where they come from."""

    seconds: float | None
    source: str


def main() -> None:
    """Work out both goals and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[RESULTS], help="of records; searched below")
    parser.add_argument("--work", type=Path, default=RESULTS / "full-work.json", help="the work of every stage")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args()
    results = estimate(json.loads(options.work.read_text("utf-8")), read_records(options.folders))
    for clip, job in results["jobs"].items():
        print("\n".join(described(clip, job)))
    print(record("estimate", ("ltxrt",), results, options.out, of_machine=False))


def read_records(folders: Iterable[Path]) -> list[Record]:
    """Every record below some folders; other JSON is passed over."""
    paths = (path for folder in folders for path in sorted(folder.rglob("*.json")))
    found = (json.loads(path.read_text("utf-8")) for path in paths)
    return [content for content in found if isinstance(content, dict) and {"benchmark", "results"} <= content.keys()]


def estimate(work: Record, records: Sequence[Record]) -> dict[str, Any]:
    """All that is known of the goals: work, what they require, and seconds where a GPU was measured."""
    visit = Visit(records)
    jobs: dict[str, Any] = {}
    for clip, goal in GOALS.items():
        job = work["results"]["clips"][clip]
        jobs[clip] = {
            "goal_seconds": goal,
            "stages": {name: shown_work(stage) for name, stage in job["stages"].items()},
            "required": required(job["stages"].values(), goal),
            "estimates": {name: added_up(lines, goal) for name, lines in visit.estimates(clip, job).items()},
        }
        if encode := visit.encode_elsewhere(clip):
            jobs[clip]["encode_elsewhere"] = asdict(encode)
    return {
        "work": {"file": "full-work.json", **{key: work["results"][key] for key in ("preset", "prompt_tokens")}},
        "gpu": visit.gpu,
        "peaks": asdict(PEAKS),
        "jobs": jobs,
        "fits": {" ".join(key): asdict(fit) for key, fit in fits(records).items()},
        "assumptions": list(ASSUMPTIONS),
    }


def flops_by_type(work: Work) -> tuple[int, int]:
    """FP8, and all others."""
    return work["fp8_flops"], sum(work[f"{kind}_flops"] for kind in ("half", "attention", "convolution"))


def shown_work(stage: Work) -> dict[str, float | int]:
    """A stage in TFLOP and GB."""
    eight_bit, other = flops_by_type(stage)
    return {
        "runs": stage["runs"],
        "tflop": round((eight_bit + other) / 1e12, 3),
        "fp8_tflop": round(eight_bit / 1e12, 3),
        "least_gb": round(stage["least_bytes"] / 1e9, 3),
    }


def required(stages: Iterable[Work], goal_seconds: float) -> dict[str, float]:
    """What a goal asks of the GPU, with all of the time for it or with less."""
    stages = list(stages)
    flops = sum(sum(flops_by_type(stage)) for stage in stages)
    at_peak = sum(PEAKS.seconds(stage) for stage in stages)
    half_at_peak = sum(PEAKS.seconds(stage, fp8=False) for stage in stages)
    left = goal_seconds * (1 - HOST_SHARE)
    return {
        "tflop": round(flops / 1e12, 1),
        "fp8_tflop": round(sum(stage["fp8_flops"] for stage in stages) / 1e12, 1),
        "seconds_at_peak": round(at_peak, 3),
        "tflops_sustained": round(flops / goal_seconds / 1e12, 1),
        "share_of_peak": round(at_peak / goal_seconds, 4),
        "tflops_sustained_less_host": round(flops / left / 1e12, 1),
        "share_of_peak_less_host": round(at_peak / left, 4),
        "share_of_peak_in_16_bits": round(half_at_peak / goal_seconds, 4),
    }


def fits(records: Iterable[Record]) -> dict[tuple[str, str, str, str], Fit]:
    """A line for each device, width, backend and stage of which two numbers of blocks were measured."""
    points: dict[tuple[str, str, str, str], dict[int, float]] = {}
    for results in (entry["results"] for entry in records if entry["benchmark"] == "blocks"):
        where = results["device"], results.get("width", "unknown width")
        for backend, rows in results["steps"].items():
            for label, by_count in rows.items():
                if isinstance(by_count, Mapping):  # else it is why there is nothing
                    found = {int(count): timing["median"] for count, timing in by_count.items()}
                    points.setdefault((*where, backend, label), {}).update(found)
    return {key: fitted(by_count) for key, by_count in points.items() if len(by_count) > 1}


def fitted(seconds: Mapping[int, float]) -> Fit:
    """The straight line through steps by their number of blocks, two at least."""
    counts = tuple(sorted(seconds))
    measured = np.array([seconds[count] for count in counts])
    slope, fixed = np.polyfit(counts, measured, 1)
    worst = np.max(np.abs(fixed + slope * np.array(counts) - measured) / measured)
    return Fit(float(fixed), float(slope), round(float(worst), 4), counts)


class Visit:
    """What the records of one machine's GPU tell."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        names = [entry["machine"]["gpu"] for entry in records if entry.get("machine", {}).get("gpu")]
        self.gpu: str | None = names[0] if names else None
        self.on_gpu = [entry for entry in records if self.gpu and entry["machine"]["gpu"] == self.gpu]
        self.fits = {
            (backend, label): fit
            for (device, width, backend, label), fit in fits(self.on_gpu).items()
            if device != "cpu" and width == "published"
        }
        found = [entry["results"].get("ceilings") for entry in self.on_gpu]
        self.ceilings = next((rates_of(ceilings) for ceilings in found if ceilings), None)

    def estimates(self, clip: str, job: Mapping[str, Any]) -> dict[str, dict[str, Line]]:
        """Each backend as it was measured, then the preset; empty without a GPU."""
        if self.gpu is None:
            return {}
        backends = sorted({backend for backend, label in self.fits if label.startswith(f"{clip} ")})
        lines = {name: self.line(name, stage) for name, stage in job["stages"].items()}
        lines["copy_out"] = Line(
            job["frame_bytes"] / (COPY_GB_PER_SECOND * 1e9), f"bound: bytes at an assumed {COPY_GB_PER_SECOND:.0f} GB/s"
        )
        lines["mux"] = self.encode(clip)
        made = {
            f"{backend}, blocks as measured": {
                **lines,
                **{f"denoise_{n}": self.steps(backend, clip, n, job) for n in (1, 2)},
            }
            for backend in backends
        }
        return {**made, "preset": {**lines, **{f"denoise_{n}": self.preset_steps(clip, n, job) for n in (1, 2)}}}

    def steps(self, backend: str, clip: str, number: int, job: Mapping[str, Any]) -> Line:
        """A stage's steps from measured blocks."""
        fit = self.fits.get((backend, f"{clip} stage {number}"))
        if fit is None:
            return Line(None, f"no two numbers of blocks were measured by {backend}")
        runs = job["stages"][f"denoise_{number}"]["runs"]
        counts = ", ".join(map(str, fit.counts))
        if fit.per_block <= 0 or fit.at(BLOCKS) <= 0:
            return Line(None, f"the times of {counts} blocks by {backend} do not rise")
        deviation = f"; off the line by {fit.worst:.1%} at most" if len(fit.counts) > 2 else ""
        return Line(
            runs * fit.at(BLOCKS),
            f"derived from measured blocks ({backend}, {counts} of them{deviation}), {runs} steps",
        )

    def preset_steps(self, clip: str, number: int, job: Mapping[str, Any]) -> Line:
        """A stage's steps in FP8: from the fastest 16-bit blocks, or from the bound."""
        stage = job["stages"][f"denoise_{number}"]
        if whole := self.measured("denoiser", stage):
            return whole
        lines = [
            self.steps(backend, clip, number, job) for backend, label in self.fits if label == f"{clip} stage {number}"
        ]
        fastest = min((line for line in lines if line.seconds), key=lambda line: line.seconds or 0, default=None)
        if fastest is None or fastest.seconds is None or self.ceilings is None:
            return self.bound(stage)
        ratio = self.ceilings.seconds(stage) / self.ceilings.seconds(stage, fp8=False)
        return Line(fastest.seconds * ratio, f"{fastest.source}, times {ratio:.3f} for FP8 by its bound")

    def line(self, name: str, stage: Work) -> Line:
        """A stage of one network, or several runs of it."""
        return self.measured(NETWORK_OF.get(name, name), stage) or self.bound(stage)

    def bound(self, stage: Work) -> Line:
        """FLOPs and bytes at the ceilings, at the efficiency that is assumed."""
        if self.ceilings is None:
            return Line(None, "no ceilings were measured")
        return Line(self.ceilings.seconds(stage) / EFFICIENCY, f"bound: at the measured ceilings x {EFFICIENCY}")

    def measured(self, network: str, stage: Work) -> Line | None:
        """Runs of the whole network that ``bench_engines.py`` timed: those whose FLOPs are this stage's."""
        wanted = sum(flops_by_type(stage))
        for results in (entry["results"] for entry in self.on_gpu if entry["benchmark"] == "engines"):
            by_clip: dict[str, list[Mapping[str, Any]]] = {}
            for row in results["networks"].get(network, {}).values():
                by_clip.setdefault(row["clip"], []).append(row)
            for rows in [*by_clip.values(), *([row] for found in by_clip.values() for row in found)]:
                for runs in (1, stage["runs"]):
                    if abs(runs * sum(row["flops"] for row in rows) / wanted - 1) < 0.01:
                        return Line(runs * sum(row["median"] for row in rows), "measured")
        return None

    def encode(self, clip: str) -> Line:
        """H.264, AAC and MP4 on the host of the GPU, by pixels."""
        return next(encodes(self.on_gpu, clip), Line(None, "no clip was measured on this host"))

    def encode_elsewhere(self, clip: str) -> Line | None:
        """The same on a machine without a GPU, for an idea of it."""
        return next(encodes((entry for entry in self.records if entry not in self.on_gpu), clip), None)


def encodes(records: Iterable[Record], clip: str) -> Iterator[Line]:
    """Seconds of the stage ``mux`` of measured clips, by pixels."""
    for entry in records:
        side = entry["results"].get("sides", {}).get("ltxrt") if entry["benchmark"] == "pipeline" else None
        if side and "mux" in side["stages"]:
            made, here = entry["results"]["clip"], entry["machine"]
            measured = f"{made['frames']}x{made['resolution']}"
            ratio = pixels(clip) / pixels(measured)
            source = (
                f"derived from the measured encode of {measured} on {here['cores']} cores ({here['cpu']}), by pixels"
            )
            yield Line(side["stages"]["mux"]["p50"] * ratio, source)


def pixels(clip: str) -> int:
    """Of ``121x1280x704``, all frames together."""
    frames, width, height = map(int, clip.split("x"))
    return frames * width * height


def rates_of(ceilings: Mapping[str, float]) -> Rates:
    """Measured ceilings as ``roofline.py`` records them."""
    fp8 = ceilings.get("fp8_tflops") or 2 * ceilings["tflops"]
    return Rates(half_tflops=ceilings["tflops"], fp8_tflops=fp8, gb_per_second=ceilings["gb_per_second"])


def added_up(lines: Mapping[str, Line], goal: float) -> dict[str, Any]:
    """A job's lines and their sum; no sum where a line has no seconds."""
    missing = [name for name, line in lines.items() if line.seconds is None]
    known = sum(line.seconds or 0 for line in lines.values())
    total = None if missing else known
    return {
        "stages": {name: asdict(line) for name, line in lines.items()},
        "missing": missing,
        "known_seconds": known,
        "total_seconds": total,
        "over_goal": None if total is None else round(total / goal, 3),
    }


def described(clip: str, job: Mapping[str, Any]) -> Iterator[str]:
    """A job in lines."""
    needs = job["required"]
    yield f"{clip}: goal {job['goal_seconds']} s, {needs['tflop']:.0f} TFLOP, {needs['fp8_tflop']:.0f} of them in FP8"
    for name, stage in job["stages"].items():
        yield f"  {name:<14} {stage['runs']:>2} runs {stage['tflop']:>9.2f} TFLOP {stage['least_gb']:>8.2f} GB"
    yield (
        f"  the goal requires {needs['tflops_sustained']:.0f} TFLOP/s sustained, {needs['share_of_peak']:.0%} of the "
        f"published peaks ({needs['share_of_peak_less_host']:.0%} if the host takes {HOST_SHARE:.0%} of the time)"
    )
    if "encode_elsewhere" in job:
        yield f"  H.264 elsewhere: {job['encode_elsewhere']['seconds']:.2f} s, {job['encode_elsewhere']['source']}"
    if not job["estimates"]:
        yield "  seconds: none, since nothing was measured on a GPU"
    for name, found in job["estimates"].items():
        without = f" without {', '.join(found['missing'])}" if found["missing"] else ""
        yield f"  {name}: {found['known_seconds']:.2f} s{without}"
        for stage, line in found["stages"].items():
            seconds = "        -" if line["seconds"] is None else f"{line['seconds']:9.4f}"
            yield f"    {stage:<14} {seconds} s  {line['source']}"


if __name__ == "__main__":
    main()
