# SPDX-License-Identifier: Apache-2.0
"""The estimate of the whole job: its arithmetic against figures worked out by hand, and what it never says."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def estimate(monkeypatch):
    """The module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("estimate")


def record(name, results, gpu=None):
    return {"benchmark": name, "machine": {"cpu": "a CPU", "cores": 2, "gpu": gpu}, "results": results}


def stage(runs=1, fp8=0, half=0, attention=0, least=0):
    kinds = {"fp8_flops": fp8, "half_flops": half, "attention_flops": attention, "convolution_flops": 0}
    return {"runs": runs, **kinds, "least_bytes": least, "unknown_nodes": 0}


def full_work(estimate):
    return json.loads((estimate.RESULTS / "full-work.json").read_text("utf-8"))


def blocks(fixed, per_block, counts, *, device="a GPU", width="published", clips=("121x1280x704", "121x768x512")):
    labels = [f"{clip} stage {number}" for clip in clips for number in (1, 2)]
    rows = {label: {str(n): {"median": fixed + n * per_block} for n in counts} for label in labels}
    ceilings = {"tflops": 500.0, "gb_per_second": 3000.0, "fp8_tflops": 1000.0}
    results = {"device": device, "width": width, "ceilings": ceilings, "steps": {"torch": {**rows, "2 blocks": "out"}}}
    return record("blocks", results, gpu=None if device == "cpu" else device)


def test_line_through_blocks_is_exact(estimate):
    fit = estimate.fitted({1: 0.75, 2: 1.0, 4: 1.5, 8: 2.5, 48: 12.5})
    assert (fit.fixed, fit.per_block) == (pytest.approx(0.5), pytest.approx(0.25))
    assert fit.worst == pytest.approx(0)
    assert fit.at(48) == pytest.approx(12.5)
    assert estimate.fitted({1: 1.0, 2: 2.0, 3: 4.0}).worst > 0.1


def test_counts_of_several_records_make_one_line(estimate):
    found = estimate.fits([blocks(0.5, 0.25, (1, 2)), blocks(0.5, 0.25, (8, 48))])
    assert found["a GPU", "published", "torch", "121x768x512 stage 2"].counts == (1, 2, 8, 48)
    assert estimate.fits([blocks(0.5, 0.25, (1,))]) == {}


def test_what_a_goal_requires(estimate):
    stages = [stage(fp8=1979 * 10**12), stage(half=4947 * 10**11, attention=4948 * 10**11), stage(least=96 * 10**11)]
    found = estimate.required(stages, 8.0)
    assert found["seconds_at_peak"] == pytest.approx(1 + 1 + 2)  # the third only moves bytes
    assert found["share_of_peak"] == pytest.approx(4 / 8)
    assert found["share_of_peak_less_host"] == pytest.approx(4 / 6.4)
    assert found["share_of_peak_in_16_bits"] == pytest.approx(5 / 8)
    assert found["tflops_sustained"] == pytest.approx(2968.5 / 8, abs=0.05)


def test_no_seconds_without_a_gpu(estimate):
    records = [blocks(0.5, 0.25, (1, 2), device="cpu"), record("pipeline", {"sides": {}})]
    found = estimate.estimate(full_work(estimate), records)
    assert found["gpu"] is None
    assert found["assumptions"]
    assert all(job["estimates"] == {} for job in found["jobs"].values())
    assert estimate.estimate(full_work(estimate), [])["jobs"]["121x1280x704"]["required"]["share_of_peak"] > 0


def test_narrow_blocks_give_no_seconds(estimate):
    found = estimate.estimate(full_work(estimate), [blocks(0.5, 0.25, (1, 2), width="narrow")])
    assert list(found["jobs"]["121x768x512"]["estimates"]) == ["preset"]
    lines = found["jobs"]["121x768x512"]["estimates"]["preset"]["stages"]
    assert lines["denoise_1"]["source"].startswith("bound")


def test_job_from_measured_blocks(estimate):
    clip = {"clip": {"frames": 121, "resolution": "256x256"}, "sides": {"ltxrt": {"stages": {"mux": {"p50": 0.1}}}}}
    records = [blocks(0.5, 0.25, (1, 2, 4, 8, 48)), record("pipeline", clip, gpu="a GPU")]
    job = estimate.estimate(full_work(estimate), records)["jobs"]["121x1280x704"]
    measured, preset = job["estimates"]["torch, blocks as measured"], job["estimates"]["preset"]
    assert measured["stages"]["denoise_1"]["seconds"] == pytest.approx(8 * 12.5)
    assert measured["stages"]["denoise_2"]["seconds"] == pytest.approx(3 * 12.5)
    assert "1, 2, 4, 8, 48" in measured["stages"]["denoise_1"]["source"]
    assert measured["stages"]["mux"]["seconds"] == pytest.approx(0.1 * 1280 * 704 / 256**2)
    assert measured["total_seconds"] == pytest.approx(sum(line["seconds"] for line in measured["stages"].values()))
    # Two thirds of a step of stage 2 are FP8, at twice the ceiling.
    ratio = preset["stages"]["denoise_2"]["seconds"] / measured["stages"]["denoise_2"]["seconds"]
    work = job["stages"]["denoise_2"]
    assert ratio == pytest.approx(1 - work["fp8_tflop"] / work["tflop"] / 2, abs=1e-3)
    # All 269 TFLOP of the decoder are 16-bit.
    assert preset["stages"]["decode"]["seconds"] == pytest.approx(269.34 / 500 / estimate.EFFICIENCY, rel=1e-3)


def test_report_names_the_source_of_every_second(estimate):
    made = "\n".join(importlib.import_module("report").estimate(estimate.estimate(full_work(estimate), [])))
    assert "not run on a GPU" in made
    assert "| source |" not in made
    records = [blocks(0.5, 0.25, (1, 48))]
    made = "\n".join(importlib.import_module("report").estimate(estimate.estimate(full_work(estimate), records)))
    assert "on a GPU" in made
    assert "| denoise 1 | 100.000 | derived from measured blocks (torch, 1, 48 of them), 8 steps" in made
    assert "121x768x512, preset; the goal in seconds is 1.6:" in made
    assert " | without mux |" in made


def test_blocks_that_do_not_rise_give_no_seconds(estimate):
    jobs = estimate.estimate(full_work(estimate), [blocks(5.0, -0.25, (1, 2))])["jobs"]
    line = jobs["121x768x512"]["estimates"]["torch, blocks as measured"]["stages"]["denoise_1"]
    assert line == {"seconds": None, "source": "the times of 1, 2 blocks by torch do not rise"}


def test_whole_network_that_was_measured_is_taken(estimate):
    work = full_work(estimate)
    flops = work["results"]["clips"]["121x768x512"]["stages"]["upsample"]["convolution_flops"]
    rows = {
        "latent[1]": {"clip": "121x768x512", "median": 0.125, "flops": flops},
        "latent[2]": {"clip": "9x128x128", "median": 9.0, "flops": 10**9},
    }
    engines = record("engines", {"networks": {"upsampler": rows}}, gpu="a GPU")
    jobs = estimate.estimate(work, [engines])["jobs"]
    line = jobs["121x768x512"]["estimates"]["preset"]["stages"]["upsample"]
    assert line == {"seconds": 0.125, "source": "measured"}
    found = jobs["121x1280x704"]["estimates"]["preset"]
    assert found["stages"]["upsample"]["seconds"] is None
    assert found["total_seconds"] is None
    assert "upsample" in found["missing"]


def test_work_is_that_of_the_closed_form(estimate):
    for clip in full_work(estimate)["results"]["clips"].values():
        for number, runs in ((1, 8), (2, 3)):
            video, audio, text, wide, narrow = (
                clip["tokens"][f"stage {number}"],
                clip["tokens"]["audio"],
                1024,
                4096,
                2048,
            )
            block = video * (14 * wide**2 + 4 * wide * narrow + 96 * wide)
            block += audio * (18 * narrow**2 + 96 * narrow) + text * (2 * wide**2 + 2 * narrow**2)
            block += (
                2 * video * (video + text) * wide + 4 * video * audio * narrow + 2 * audio * (audio + text) * narrow
            )
            found = clip["stages"][f"denoise_{number}"]
            counted = found["fp8_flops"] + found["half_flops"] + found["attention_flops"]
            assert counted == pytest.approx(runs * 2 * 48 * block, rel=2e-3)
            assert found["unknown_nodes"] == 0


def test_committed_estimate_is_what_the_committed_work_gives(estimate):
    kept = json.loads((estimate.RESULTS / "estimate.json").read_text("utf-8"))["results"]
    made = json.loads(json.dumps(estimate.estimate(full_work(estimate), estimate.read_records([estimate.RESULTS]))))
    assert kept["assumptions"] == made["assumptions"], "run python benchmarks/estimate.py"
    for clip, job in made["jobs"].items():
        assert {key: kept["jobs"][clip][key] for key in ("stages", "required")} == {
            key: job[key] for key in ("stages", "required")
        }
