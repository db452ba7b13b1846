# SPDX-License-Identifier: Apache-2.0
"""The clips that a calibration runs: prompts, sounds and first frames of many kinds, most of them drawn here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ltxrt.media import AudioTrack, bundled_speech, read_audio

__all__ = ["CLIPS", "IMAGES", "SOUNDS", "CalibrationClip"]

_RATE = 24_000
_SECONDS = 6


@dataclass(frozen=True, slots=True)
class CalibrationClip:
    """One clip.

    Attributes:
        prompt: Text.
        sound: Name in ``SOUNDS``.
        image: Name in ``IMAGES``; None is text and sound alone.
        strength: How firmly the first frame is held.
        portrait: Whether the canvas stands on its short side.
    """

    prompt: str
    sound: str
    image: str | None = None
    strength: float = 1.0
    portrait: bool = False

    def describe(self) -> str:
        """One line for the calibration's record."""
        picture = "no image" if self.image is None else f"{self.image} at {self.strength:g}"
        return f"{self.sound}, {picture}, {'portrait' if self.portrait else 'landscape'}: {self.prompt}"


def _time() -> NDArray[np.float64]:
    return np.arange(_RATE * _SECONDS) / _RATE


def _stereo(left: NDArray[np.floating], right: NDArray[np.floating] | None = None) -> AudioTrack:
    return AudioTrack(np.stack([left, left if right is None else right]).astype(np.float32), _RATE)


def _syllables() -> AudioTrack:
    """A voiced buzz through three vowels' formants, four syllables a second."""
    t, sound = _time(), np.zeros(_RATE * _SECONDS)
    pitch = 2 * np.pi * np.cumsum(120 + 20 * np.sin(2 * np.pi * 0.4 * t)) / _RATE
    for harmonic in range(1, 40):
        frequency = 120.0 * harmonic
        vowel = (t * 4).astype(int) % 3
        formants = np.array([[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240]])[vowel]
        gain = np.exp(-(((frequency - formants) / 120.0) ** 2)).sum(axis=1) + 0.02
        sound += gain * np.sin(harmonic * pitch)
    envelope = np.clip(np.sin(np.pi * (t * 4 % 1)) * 1.4, 0, 1)
    return _stereo(0.7 * sound * envelope / np.abs(sound).max())


def _chords() -> AudioTrack:
    """Full-scale stereo music: chords that change twice a second, a clap on every beat."""
    t = _time()
    roots = 220.0 * 2 ** (np.array([0, 5, 7, 3])[(t * 2).astype(int) % 4] / 12)
    phase = 2 * np.pi * np.cumsum(roots) / _RATE
    tones = [np.sin(phase * ratio) for ratio in (1.0, 1.25, 1.5, 2.0)]
    noise = np.random.Generator(np.random.Philox(key=1)).standard_normal(len(t))
    clap = noise * np.exp(-30 * (t * 2 % 1)) * 0.5
    left, right = tones[0] + tones[2] + clap, tones[1] + tones[3] + clap
    return _stereo(*(side / np.abs(side).max() for side in (left, right)))


def _whisper() -> AudioTrack:
    """Noise far below full scale, coming and going."""
    noise = np.random.Generator(np.random.Philox(key=2)).standard_normal(_RATE * _SECONDS)
    return _stereo(0.003 * noise * (np.sin(2 * np.pi * 0.7 * _time()) > 0))


def _silence() -> AudioTrack:
    return _stereo(np.zeros(_RATE * _SECONDS))


SOUNDS: Mapping[str, Callable[[], AudioTrack]] = {
    "speech": lambda: read_audio(bundled_speech()),
    "syllables": _syllables,
    "chords": _chords,
    "whisper": _whisper,
    "silence": _silence,
}


def _face() -> NDArray[np.uint8]:
    """A flat drawn face before a plain background."""
    y, x = np.mgrid[-1:1:256j, -1.5:1.5:384j]
    picture = np.full((256, 384, 3), (170, 60, 50), np.uint8)
    for centre, radii, colour in (
        ((0.0, 0.0), (0.75, 0.55), (90, 160, 90)),
        ((-0.2, -0.22), (0.09, 0.09), (250, 250, 250)),
        ((-0.2, 0.22), (0.09, 0.09), (250, 250, 250)),
        ((0.35, 0.0), (0.07, 0.25), (60, 10, 20)),
    ):
        inside = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1
        picture[inside] = colour
    return picture


def _gradient() -> NDArray[np.uint8]:
    """Every brightness and most colours, with a hard edge down the middle."""
    y, x = np.mgrid[0:255:256j, 0:255:256j]
    return np.stack([x, y, np.where(x < 128, 255.0, 0.0)], axis=-1).round().astype(np.uint8)


def _noise() -> NDArray[np.uint8]:
    generator = np.random.Generator(np.random.Philox(key=3))
    return generator.integers(0, 256, (192, 256, 3), np.uint8)


IMAGES: Mapping[str, Callable[[], NDArray[Any]]] = {"face": _face, "gradient": _gradient, "noise": _noise}

CLIPS: tuple[CalibrationClip, ...] = (
    CalibrationClip("A woman in a red coat talks to the camera, close up, warm evening light.", "speech"),
    CalibrationClip("A green-skinned face on a red background speaks.", "speech", "face"),
    CalibrationClip("A man sings a song on a dark stage, wide shot, hand-held camera.", "chords", "gradient", 0.7),
    CalibrationClip("A puppet reads the news.", "syllables", "face", portrait=True),
    CalibrationClip("Rain on a window at night, nobody in the picture, slow pan to the left.", "silence"),
    CalibrationClip(
        "An old teacher with a grey beard explains something slowly in front of a blackboard, then looks up, smiles and"
        " nods; the room is bright, dust floats in the light, children whisper in the background.",
        "syllables",
    ),
    CalibrationClip("A whisper.", "whisper", "noise", portrait=True),
    CalibrationClip("", "chords"),
)
