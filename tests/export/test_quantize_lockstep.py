# SPDX-License-Identifier: Apache-2.0
"""Clips in lockstep: every network runs once for all that wait, and nobody is left waiting when something fails."""

import threading
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pytest

from ltxrt_export.quantize.lockstep import Ask, Round, in_lockstep

ORDER = ("text", "image", "denoiser")
Arrays = Mapping[str, np.ndarray]


def doubled(network: str, batches: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
    return [{"y": feeds["x"] * 2} for feeds in batches]


def clip(ask: Ask, *, steps: int = 2, start: int = 1, image: bool = False, results: list[int] | None = None) -> None:
    value = np.array([start])
    for network in ("text", *(("image",) if image else ()), *("denoiser",) * steps):
        value = ask(network, {"x": value})["y"]
    if results is not None:
        results.append(int(value[0]))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> object:
    before = threading.active_count()
    yield
    for thread in threading.enumerate()[before:]:
        thread.join(5)
    assert threading.active_count() == before


def test_who_needs_more_catches_up_before_the_others_go_on() -> None:
    clips = [clip, partial(clip, image=True), partial(clip, steps=3)]
    assert list(in_lockstep(clips, ORDER, doubled)) == [
        Round("text", 3),
        Round("image", 1),
        Round("denoiser", 3),
        Round("denoiser", 3),
        Round("denoiser", 1),
    ]


def test_every_clip_gets_its_own_outputs_and_feeds_come_in_the_order_of_the_clips() -> None:
    results: list[int] = []
    seen: list[list[int]] = []

    def run(network: str, batches: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        seen.append([int(feeds["x"][0]) for feeds in batches])
        return doubled(network, batches)

    list(in_lockstep([partial(clip, start=start, results=results) for start in (3, 1, 2)], ORDER, run))
    assert sorted(results) == [8, 16, 24]
    assert seen == [[3, 1, 2], [6, 2, 4], [12, 4, 8]]


def test_no_clip_and_a_clip_that_asks_for_nothing() -> None:
    assert list(in_lockstep([], ORDER, doubled)) == []
    assert list(in_lockstep([lambda ask: None, partial(clip, steps=1)], ORDER, doubled)) == [
        Round("text", 1),
        Round("denoiser", 1),
    ]


def test_everything_that_computes_runs_in_the_callers_thread() -> None:
    threads: set[int] = set()

    def run(network: str, batches: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        threads.add(threading.get_ident())
        return doubled(network, batches)

    list(in_lockstep([clip, clip], ORDER, run))
    assert threads == {threading.get_ident()}


def test_an_error_of_a_clip_is_the_callers_and_unwinds_the_others() -> None:
    unwound: list[bool] = []

    def broken(ask: Ask) -> None:
        ask("text", {"x": np.array([1])})
        raise ValueError("no such picture")

    def waiting(ask: Ask) -> None:
        try:
            clip(ask)
        finally:
            unwound.append(True)

    with pytest.raises(ValueError, match="no such picture"):
        list(in_lockstep([waiting, broken, waiting], ORDER, doubled))
    assert unwound == [True, True]


@pytest.mark.parametrize("error", [ValueError("not finite"), KeyboardInterrupt()])
def test_an_error_while_computing_unwinds_all(error: BaseException) -> None:
    def run(network: str, batches: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        if network == "denoiser":
            raise error
        return doubled(network, batches)

    with pytest.raises(type(error)):
        list(in_lockstep([clip, clip], ORDER, run))


def test_giving_up_between_rounds_unwinds_all() -> None:
    rounds = in_lockstep([clip, clip], ORDER, doubled)
    next(rounds)
    next(rounds)
    rounds.close()  # type: ignore[attr-defined]  # it is a generator
