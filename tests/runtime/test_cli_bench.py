# SPDX-License-Identifier: Apache-2.0
"""``ltxrt bench`` reports what its runs took, and nothing of the one before them."""

import json
import re
from dataclasses import replace
from fractions import Fraction

import pytest

from ltxrt import cli, cli_bench
from ltxrt.cli_bench import BenchOptions, BenchReport, Spread, bench, run_bench
from ltxrt.errors import RequestError
from ltxrt.result import Progress, Result
from ltxrt.testing import fake_pipeline

RESULT = Result(
    seed=0,
    frames=24,
    frames_generated=25,
    width=128,
    height=128,
    rate=Fraction(24),
    video_quality="high",
    model="m",
    engine="e",
    image_strength=None,
    audio_samples=None,
    audio_rate=None,
    notes=(),
    stage_seconds={"encode": 0.5, "decode": 1.0},
    backend_seconds={"denoiser": 1.2, "media_encoders": 0.4},
    marks_seconds={"first_fragment": 1.5},
    wall_seconds=2.0,
)


@pytest.fixture
def fakes(monkeypatch):
    """Pipelines of fakes, and what each was opened with."""
    opened = []

    def open_fake(bundle, **options):
        opened.append((bundle, options))
        return fake_pipeline()

    monkeypatch.setattr(cli_bench.Pipeline, "open", open_fake)
    return opened


def test_spread_takes_nearest_ranks():
    assert Spread.of([5, 1, 4, 2, 3]) == Spread(3, 5)
    assert Spread.of(list(range(11))) == Spread(5, 9)
    assert Spread.of([7.00004]) == Spread(7.0, 7.0)


def test_report():
    slow = replace(RESULT, wall_seconds=4.0, stage_seconds={"encode": 1.5, "decode": 2.0})
    report = BenchReport(BenchOptions(repeats=3), 0.25, 5_000_000, slow, [RESULT, slow, RESULT])
    found = report.as_json()
    assert json.loads(json.dumps(found)) == found
    assert found["wall_seconds"] == {"p50": 2.0, "p90": 4.0}
    assert found["stages"]["encode"] == {"p50": 0.5, "p90": 1.5}
    assert found["real_time_factor"] == {"p50": 2.0, "p90": 4.0}
    assert found["outside_backends_share"]["p50"] == pytest.approx(0.2)
    assert found["first_run_seconds"] == 4.0
    assert found["clip"] == {"frames": 24, "width": 128, "height": 128, "frames_per_second": "24"}
    text = "\n".join(report.lines())
    assert re.search(r"^decode +1\.000 s  2\.000 s$", text, re.MULTILINE)
    assert "outside engines and codecs 20.0%" in text
    assert "most memory 5.0 MB" in text


def test_the_first_run_is_not_among_the_recorded_ones(fakes):
    steps, report = [], None
    running = bench(BenchOptions(frames=9, resolution="128x128", repeats=2, threads=3))
    while report is None:
        try:
            steps.append(next(running))
        except StopIteration as end:
            report = end.value
    assert steps == [Progress("run", number, 3) for number in (1, 2, 3)]
    assert len(report.runs) == 2
    assert report.first is not None
    assert report.first is not report.runs[0]
    assert report.opened_seconds > 0
    assert report.peak_memory_bytes > 10_000_000
    assert fakes == [(None, {"threads": 3, "prompt_cache": "off"})]


def test_a_clip_that_cannot_be_is_refused_before_anything_is_opened(fakes):
    with pytest.raises(RequestError, match="num_frames"):
        run_bench(BenchOptions(frames=3))
    assert not fakes


def test_command(fakes, capsys):
    arguments = ["bench", "--frames", "9", "--resolution", "128x128", "--repeats", "1"]
    assert cli.run([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["engine"] == "onnxruntime-cpu"
    assert "run: 2/2" in captured.err
    assert cli.run(arguments) == 0
    assert re.search(r"^wall +\d+\.\d{3} s", capsys.readouterr().out, re.MULTILINE)
    assert cli.run(["bench", "--repeats", "0"]) == 2
