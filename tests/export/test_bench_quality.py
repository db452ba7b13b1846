# SPDX-License-Identifier: Apache-2.0
"""The quality benchmark finds what is there: clips drawn as they should be meet every target, spoilt ones do not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltxrt_export.tiny import sound
from ltxrt_export.tiny.world import PARTS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
VOICES = 2


class Quality:
    """The benchmark's modules."""

    def __init__(self) -> None:
        from quality import drawing, pictures, report, speech, studio

        self.drawing, self.pictures, self.report, self.speech, self.studio = drawing, pictures, report, speech, studio


@pytest.fixture(scope="module")
def quality() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield Quality()


@pytest.fixture(scope="module")
def sounds() -> list[np.ndarray]:
    return [sound.speech(np.random.default_rng([50, index]), 5) for index in range(VOICES)]


@pytest.fixture(scope="module")
def spoilt(quality: Any) -> Callable[[Callable[[Any], Any]], Any]:
    """A camera that draws, after a function has changed the shot; the clip claims to be of the shot as it was."""

    class Spoilt:
        def __init__(self, change: Callable[[Any], Any]) -> None:
            self.change, self.drawn = change, quality.studio.DrawnStudio()

        def film(self, shot: Any) -> Any:
            return replace(self.drawn.film(self.change(shot)), shot=shot)

    return Spoilt


def missed(report: Any) -> set[str]:
    return {f"{figure.question}: {figure.name}" for figure in report.missed()}


@pytest.mark.slow
def test_drawn_clips_meet_every_target(quality: Any, sounds: list[np.ndarray]) -> None:
    report, camera = quality.report.Report(), quality.studio.DrawnStudio()
    shots = quality.speech.cast(sounds)
    samples = quality.speech.presets(camera, camera, shots[:1], report)
    quality.speech.frame_rates(camera, shots[:1], report)
    samples = [*samples, quality.speech.Sample.of(camera.film(shots[1]))]
    quality.speech.swapped(camera, shots, samples, report)
    quality.speech.silent(camera, 1, report)
    quality.pictures.first_frames(camera, sounds[:1], 33, report)
    quality.pictures.identity(camera, sounds[:1], report)
    quality.pictures.prompts(camera, sounds, 2, report)
    assert not missed(report)
    assert sum(figure.passed is True for figure in report.figures) > 30
    assert report.as_json()["passed"]
    assert not any("MISSED" in line for line in report.table())
    sheet = quality.drawing.sheet(report, "heading")
    assert sheet.height > 112 * len(report.strips)


def test_a_late_mouth_is_seen(quality: Any, sounds: list[np.ndarray], spoilt: Any) -> None:
    report = quality.report.Report()
    late = spoilt(lambda shot: replace(shot, sound=np.pad(shot.sound, (3 * 16000 // 24, 0))))
    quality.speech.presets(late, None, quality.speech.cast(sounds[:1]), report)
    lags = {figure.name: figure.value for figure in report.figures if figure.name.endswith("lag")}
    assert set(lags.values()) == {3.0}
    assert missed(report) == {f"lip sync at 24 fps: {name}" for name in lags}


def test_a_face_that_does_not_listen_is_seen(quality: Any, sounds: list[np.ndarray], spoilt: Any) -> None:
    report, deaf = quality.report.Report(), spoilt(lambda shot: replace(shot, sound=sounds[0]))
    shots = quality.speech.cast(sounds)
    quality.speech.swapped(deaf, shots, [quality.speech.Sample.of(deaf.film(shot)) for shot in shots], report)
    quality.speech.silent(deaf, 1, report)
    assert missed(report) == {
        "swapped sounds: before: own sound fits best",
        "swapped sounds: after: own sound fits best",
        *(f"silence: {preset}: mouth closed" for preset in ("low", "medium", "high", "maximum")),
    }


def test_other_colours_are_seen(quality: Any, sounds: list[np.ndarray], spoilt: Any) -> None:
    def turned(shot: Any) -> Any:
        names = dict(zip(PARTS, [*list(shot.names.values())[1:], shot.names["background"]], strict=True))
        scene = shot.scene and replace(shot.scene, background=shot.scene.skin, skin=shot.scene.background)
        return replace(shot, names=names, scene=scene)

    report, camera = quality.report.Report(), spoilt(turned)
    quality.pictures.prompts(camera, sounds, 1, report)
    quality.pictures.first_frames(camera, sounds[:1], 33, report)
    quality.pictures.identity(camera, sounds[:1], report)
    assert missed(report) == {
        "prompt obedience: of 1 prompts all right",
        "first frame: 128x128, strength 1: PSNR",
        "first frame: 192x192, strength 1: PSNR",
        "identity after 121 frames: strength 1: parts right",
        "identity after 121 frames: strength 0.7: parts right",
    }


def test_a_jump_between_chunks_is_seen(quality: Any) -> None:
    class Jumping(quality.studio.DrawnStudio):
        def film(self, shot: Any) -> Any:
            clip = super().film(shot)
            chunk = np.searchsorted(clip.borders, np.arange(shot.frames), "right")
            return replace(clip, frames=clip.frames + (chunk % 2).astype(np.uint8)[:, None, None])

    report = quality.report.Report()
    quality.speech.silent(Jumping(), 1, report)
    assert missed(report) == {"flicker between chunks: change across borders / elsewhere"}


def test_worse_precision_is_seen(quality: Any, sounds: list[np.ndarray], spoilt: Any) -> None:
    report, deaf = quality.report.Report(), spoilt(lambda shot: replace(shot, sound=sounds[1], seed=9))
    quality.speech.presets(quality.studio.DrawnStudio(), deaf, quality.speech.cast(sounds[:1]), report)
    assert missed(report) >= {f"lip sync lost in the other bundle: {name}" for name in ("low", "maximum")}


@pytest.mark.parametrize(
    ("bounds", "value", "target", "passed"),
    [
        ((None, None), 1.0, "", None),
        ((0.8, None), 0.8, ">= 0.8", True),
        ((0.8, None), 0.79, ">= 0.8", False),
        ((None, 1.5), 1.6, "<= 1.5", False),
        ((-1.0, 1.0), -1.0, "-1 to 1", True),
        ((-1.0, 1.0), 2.0, "-1 to 1", False),
        ((0.8, None), float("nan"), ">= 0.8", False),
    ],
)
def test_targets(
    quality: Any, bounds: tuple[float | None, float | None], value: float, target: str, passed: bool | None
) -> None:
    figure = quality.report.Figure("question", "name", value, "", *bounds)
    assert (figure.target, figure.passed) == (target, passed)
