# SPDX-License-Identifier: Apache-2.0
"""Seconds are added where they belong, on a clock that the test moves."""

import numpy as np
import pytest

from ltxrt import timing
from ltxrt.engine import TensorSpec, iterate, run_resident
from ltxrt.errors import EngineError
from ltxrt.timing import TimedEngine, Timings


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    return clock


class SlowEngine:
    """Takes 2 s to run, 3 s to capture and 5 s to replay."""

    name = "denoiser"
    inputs = (TensorSpec("x", "float32", (1,)),)
    outputs = (TensorSpec("y", "float32", (1,)),)

    def __init__(self, clock, broken=False):
        self.clock = clock
        self.broken = broken

    def run(self, feeds):
        self.clock.now += 2
        if self.broken:
            raise EngineError("broken")
        return {"y": feeds["x"]}

    def capture(self, feeds):
        self.clock.now += 3
        return SlowCapture(self.clock, dict(feeds))


class SlowCapture:
    def __init__(self, clock, inputs):
        self.clock = clock
        self.inputs = inputs
        self.outputs = {}

    def replay(self):
        self.clock.now += 5
        self.outputs = {"y": self.inputs["x"] + 1}


def test_stages_add_up_in_the_order_in_which_they_began(clock):
    timings = Timings()
    for name, seconds in (("plan", 1), ("decode", 2), ("mux", 3), ("decode", 4)):
        with timings.stage(name):
            clock.now += seconds
    clock.now += 10
    assert list(timings.stages.items()) == [("plan", 1), ("decode", 6), ("mux", 3)]
    assert timings.wall_seconds == 20


def test_a_stage_that_fails_is_counted_and_fails(clock):
    timings = Timings()

    def failing():
        with timings.stage("plan"):
            clock.now += 3
            raise KeyError("x")

    with pytest.raises(KeyError):
        failing()
    assert timings.stages == {"plan": 3}


def test_marks_keep_the_first_time_and_notes_the_last(clock):
    timings = Timings()
    for _ in range(3):
        clock.now += 1
        timings.mark("first")
        timings.note("last")
    assert timings.marks == {"first": 1, "last": 3}


def test_backend_seconds_add_up_by_name(clock):
    timings = Timings()
    timings.add_backend("x264", 1.5)
    timings.add_backend("x264", 2)
    with timings.backend_call("aac"):
        clock.now += 4
    assert timings.backend == {"x264": 3.5, "aac": 4}


def test_every_call_of_a_timed_engine_counts(clock):
    timings, slow = Timings(), SlowEngine(clock)
    timed = TimedEngine(slow, timings)
    assert (timed.name, timed.inputs, timed.outputs) == (slow.name, slow.inputs, slow.outputs)
    feeds = {"x": np.zeros(1, np.float32)}
    assert timed.run(feeds)["y"] is feeds["x"]
    assert timings.backend == {"denoiser": 2}
    capture = timed.capture(feeds)
    assert timings.backend == {"denoiser": 5}
    capture.inputs["x"][0] = 7
    capture.replay()
    capture.replay()
    assert timings.backend == {"denoiser": 15}
    assert capture.outputs["y"][0] == 8


def test_a_failed_call_counts_and_fails(clock):
    timings = Timings()
    with pytest.raises(EngineError, match="broken"):
        TimedEngine(SlowEngine(clock, broken=True), timings).run({})
    assert timings.backend == {"denoiser": 2}


class Looping:
    """A capture on a device: each step takes 4 s."""

    def __init__(self, clock):
        self.clock, self.inputs, self.outputs = clock, {}, {}

    def replay(self):
        raise AssertionError("a loop is not replayed step by step")

    def iterate(self, steps, carried):
        for step in steps:
            self.clock.now += 4
            yield step


class Resident(SlowEngine):
    def capture(self, feeds):
        return Looping(self.clock)

    def run_resident(self, feeds):
        self.clock.now += 6
        return {"y": "stays"}


def test_what_stays_on_a_device_counts_as_well(clock):
    timings = Timings()
    timed = TimedEngine(Resident(clock), timings)
    assert run_resident(timed, {}) == {"y": "stays"}
    assert timings.backend == {"denoiser": 6}
    for step in iterate(timed.capture({}), [{"x": 1}, {"x": 2}], {}):
        clock.now += 100  # the caller's own time
        assert step in ({"x": 1}, {"x": 2})
    assert timings.backend == {"denoiser": 14}


def test_a_plain_engine_behind_the_same_calls_counts_once(clock):
    timings = Timings()
    timed = TimedEngine(SlowEngine(clock), timings)
    run_resident(timed, {"x": np.zeros(1, np.float32)})
    assert timings.backend == {"denoiser": 2}
