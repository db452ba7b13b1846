# SPDX-License-Identifier: Apache-2.0
"""Plain progress lines, with a clock that we set (bars on a terminal: test_cli.py)."""

import io

from rich.console import Console

from ltxrt.cli_progress import Bar, Lines, reporter
from ltxrt.result import STAGES, Progress


def lines(events):
    """What ``Lines`` writes for (seconds, stage, step, steps)."""
    stream, now = io.StringIO(), [0.0]
    with Lines(stream, clock=lambda: now[0]) as shown:
        for seconds, *progress in events:
            now[0] = seconds
            shown.show(Progress(*progress))
    return stream.getvalue().splitlines()


def test_a_line_a_quarter_with_the_time_left():
    events = [(5, "load", 1, 1), *((5 + 2 * step, "denoise_1", step, 8) for step in range(1, 9))]
    assert lines(events) == [
        "load: 1/1, done in 5.0 s",
        "denoise 1: 2/8, 12 s left",
        "denoise 1: 4/8, 8 s left",
        "denoise 1: 6/8, 4 s left",
        "denoise 1: 8/8, done in 16.0 s",
    ]


def test_a_stage_that_has_only_begun_says_nothing():
    assert lines([(1, "load", 0, 1)]) == []


def test_uneven_steps_pass_several_quarters_at_once():
    assert lines([(3, "decode", 59, 118), (6, "decode", 118, 118)]) == [
        "decode: 59/118, 3 s left",
        "decode: 118/118, done in 6.0 s",
    ]


def test_files_that_are_not_terminals_get_lines(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(reporter(STAGES, io.StringIO()), Lines)


def test_the_next_stage_shows_before_its_first_step():
    stream = io.StringIO()
    with Bar(("load", "encode"), Console(file=stream, force_terminal=True, width=100)) as bar:
        bar.show(Progress("load", 1, 1))
    assert "load" in stream.getvalue()
    assert "encode" in stream.getvalue()
