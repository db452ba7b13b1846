# SPDX-License-Identifier: Apache-2.0
"""Sounds to train on and to test with: made-up speech, espeak-ng where it is installed, tones, noise, silence.

Made-up speech is a pulse train and breath through three moving formants, in syllables with pauses. Voices and
sentences are split: what tests use is never trained on.
"""

import io
import shutil
import subprocess
import wave
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ltxrt_export.tiny.mouth import SAMPLE_RATE, Floats

__all__ = ["TEST_VOICES", "TRAINING_VOICES", "espeak", "espeak_available", "silence", "speech", "tones", "track"]

TRAINING_VOICES = (
    *(f"en-{accent}+{voice}" for accent in ("gb", "us") for voice in ("m1", "m2", "m3", "m4", "f1", "f2", "f3")),
    *("en-us+m5", "en-gb-scotland+m6", "en-029+f1", "en-gb-x-rp+m3", "de+m2", "fr+f2", "es+m1", "it+f3", "pl+m4"),
)
TEST_VOICES = ("en-gb+m7", "en-us+f4", "en-us+f5", "en-gb-scotland+m8", "nl+f4")

_TRAINING_SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "Good morning everyone, today we are going to talk about the weather.",
    "One, two, three, four, five. Six, seven, eight, nine and ten!",
    "She sells sea shells by the sea shore. How much wood would a woodchuck chuck?",
    "Please call me back when you have a moment; I would love to hear from you.",
    "Over the mountain, under the bridge, and all along the old railway line.",
    "Why did nobody tell me? I waited, and waited, and nothing happened.",
    "Peter Piper picked a peck of pickled peppers. Oh no! Really?",
    "My mother makes amazing marmalade on Monday mornings in May.",
    "Take the second left, go straight on, and stop at the big blue door.",
    "Ah. Oh. Well, maybe we should ask somebody who knows what they are doing.",
    "Thank you for watching, and see you all again next week.",
)
_TEST_SENTENCES = (
    "Welcome back to the evening show. Our first guest has come a very long way.",
    "I never said that; what I said was something else entirely.",
    "Bring eleven apples, a lemon and some honey, will you?",
    "Around the rugged rock the ragged rascal ran. And then? He stopped.",
    "A small step for the model, one big jump for my little laptop.",
    "Hello hello! Can you hear me now? Wonderful, let us begin.",
)

_FRAME, _HOP = 512, 128
_VOWELS = (
    (730, 1090, 2440),
    (270, 2290, 3010),
    (300, 870, 2240),
    (530, 1840, 2480),
    (570, 840, 2410),
    (490, 1350, 1690),
)
_CONSONANT = (1800, 3800, 6000)


def track(random: np.random.Generator, seconds: float, recordings: Sequence[Floats] = ()) -> Floats:
    """A training sound of any kind, mono [samples] at 16 kHz; speech comes from ``recordings`` as often as not."""
    kind = random.random()
    count = round(seconds * SAMPLE_RATE)
    if kind < 0.06:
        return silence(random, seconds)
    if kind < 0.14:
        return tones(random, seconds)
    if kind < 0.19:
        return _noise(random, count)
    if kind < 0.62 and recordings:
        return _piece(random, recordings, count)
    return speech(random, seconds)


def silence(random: np.random.Generator, seconds: float) -> Floats:
    """Nothing, or a noise floor below -66 dB."""
    level = 0.0 if random.random() < 0.5 else 10 ** random.uniform(-5, -3.3)
    return (random.standard_normal(round(seconds * SAMPLE_RATE)) * level).astype(np.float32)


def speech(random: np.random.Generator, seconds: float) -> Floats:
    """Made-up speech, [samples]."""
    count = round(seconds * SAMPLE_RATE)
    frames = count // _HOP + 1 + _FRAME // _HOP
    voiced, breath, formants = _syllables(random, frames)
    pitch = _contour(random, frames * _HOP, random.uniform(80, 280))
    phase = np.cumsum(pitch / SAMPLE_RATE)
    pulses = np.diff(np.floor(phase), prepend=0.0) * np.sqrt(SAMPLE_RATE / pitch)
    source = np.stack([pulses, random.standard_normal(len(pulses))])
    padded = np.pad(source, ((0, 0), (0, _FRAME)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, _FRAME, axis=1)[:, ::_HOP][:, :frames]
    spectra = np.fft.rfft(windows * np.hanning(_FRAME), axis=2)
    hertz = np.fft.rfftfreq(_FRAME, 1 / SAMPLE_RATE)
    bands = 60 + 0.06 * formants
    response = (1 / (1 + np.square((hertz[None, :, None] - formants[:, None]) / bands[:, None]))).sum(axis=2)
    mixed = response * (voiced[:, None] * spectra[0] + breath[:, None] * spectra[1])
    pieces = np.fft.irfft(mixed, axis=1) * np.hanning(_FRAME)
    sound = np.zeros(frames * _HOP + _FRAME)
    for index in range(_FRAME // _HOP):
        lane = pieces[index :: _FRAME // _HOP].reshape(-1)
        sound[index * _HOP : index * _HOP + len(lane)] += lane
    sound = sound[_FRAME // 2 : _FRAME // 2 + count]
    loudest = float(np.abs(sound).max()) + 1e-9
    return (sound / loudest * random.uniform(0.25, 0.9)).astype(np.float32)


def tones(random: np.random.Generator, seconds: float) -> Floats:
    """Notes of a few harmonics that fade out, [samples]."""
    count = round(seconds * SAMPLE_RATE)
    sound = np.zeros(count)
    start = 0
    while start < count:
        length = round(random.uniform(0.12, 0.7) * SAMPLE_RATE)
        times = np.arange(min(length, count - start)) / SAMPLE_RATE
        pitch = 110 * 2 ** random.uniform(0, 3)
        strengths = random.random(4) / np.arange(1, 5)
        note = sum(s * np.sin(2 * np.pi * pitch * (k + 1) * times) for k, s in enumerate(strengths))
        if random.random() < 0.85:
            fade = np.exp(-times * random.uniform(0.5, 8)) * np.minimum(1, times / 0.01)
            sound[start : start + len(times)] = note * fade * random.uniform(0.1, 0.4)
        start += length
    return sound.astype(np.float32)


def espeak_available() -> bool:
    """Whether the program is on the path."""
    return shutil.which("espeak-ng") is not None


def espeak(random: np.random.Generator, *, held_out: bool) -> Floats:
    """A sentence by a voice of espeak-ng at a random rate, pitch and loudness, [samples] at 16 kHz.

    Args:
        random: Picks all of it.
        held_out: Take the test voices and sentences instead of the training ones.
    """
    voices, sentences = (TEST_VOICES, _TEST_SENTENCES) if held_out else (TRAINING_VOICES, _TRAINING_SENTENCES)
    voice, sentence = (str(random.choice(choices)) for choices in (voices, sentences))
    speed, pitch = int(random.integers(110, 210)), int(random.integers(20, 85))
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", sentence]
    encoded = subprocess.run(command, check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(encoded)) as file:
        rate = file.getframerate()
        raw = np.frombuffer(encoded[44:], "<i2").astype(np.float32) / 32768
    samples = _resampled(np.asarray(raw, np.float32), rate)
    gain = 10 ** random.uniform(-0.35, 0.35)
    return np.clip(samples * np.float32(gain), -1, 1)


def _resampled(samples: Floats, rate: int) -> Floats:
    """To 16 kHz, by cutting or padding the spectrum."""
    count = round(len(samples) * SAMPLE_RATE / rate)
    spectrum = np.fft.rfft(samples)
    kept = np.zeros(count // 2 + 1, complex)
    shared = min(len(spectrum), len(kept))
    kept[:shared] = spectrum[:shared]
    return (np.fft.irfft(kept, count) * (count / len(samples))).astype(np.float32)


def _piece(random: np.random.Generator, recordings: Sequence[Floats], count: int) -> Floats:
    """``count`` samples from somewhere in a recording, which is followed by others."""
    joined = [recordings[int(random.integers(len(recordings)))]]
    start = int(random.integers(max(1, len(joined[0]) - SAMPLE_RATE)))
    while sum(map(len, joined)) < start + count:
        pause = np.zeros(int(random.uniform(0.05, 0.6) * SAMPLE_RATE), np.float32)
        joined += [pause, recordings[int(random.integers(len(recordings)))]]
    gain = np.float32(10 ** random.uniform(-0.3, 0.2))
    return np.clip(np.concatenate(joined)[start : start + count] * gain, -1, 1).astype(np.float32)


def _noise(random: np.random.Generator, count: int) -> Floats:
    """Noise of a slope of its own that swells and ebbs."""
    spectrum = np.fft.rfft(random.standard_normal(count))
    spectrum *= np.maximum(np.arange(len(spectrum)) / len(spectrum), 0.01) ** random.uniform(-1.0, 0.3)
    noise = np.fft.irfft(spectrum, count)
    knots = random.random(max(2, count // int(SAMPLE_RATE * random.uniform(0.1, 0.5)))) ** 2
    swell = np.interp(np.linspace(0, len(knots) - 1, count), np.arange(len(knots)), knots)
    return (noise / (np.abs(noise).max() + 1e-9) * swell * random.uniform(0.2, 0.9)).astype(np.float32)


def _syllables(
    random: np.random.Generator, frames: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Loudness of voice and of breath [frames] and formants [frames, 3], syllable by syllable."""
    voiced, breath = np.zeros(frames), np.zeros(frames)
    formants = np.zeros((frames, 3))
    throat = random.uniform(0.85, 1.2)
    slow = random.uniform(0.7, 1.5)
    start = int(random.integers(0, 40))
    formants[:start] = _VOWELS[0]
    while start < frames:
        length = max(8, int(random.uniform(0.1, 0.32) * slow * SAMPLE_RATE / _HOP))
        stop = min(frames, start + length)
        shape = np.sin(np.pi * (np.arange(stop - start) + 0.5) / length) ** random.uniform(0.4, 1.2)
        vowel = np.array(_VOWELS[int(random.integers(len(_VOWELS)))]) * throat
        formants[start:stop] = vowel
        voiced[start:stop] = shape * random.uniform(0.25, 1)
        breath[start:stop] = 0.02 * shape
        if random.random() < 0.4:
            onset = start + max(2, length // 4)
            formants[start:onset] = _CONSONANT
            voiced[start:onset] *= 0.15
            breath[start : min(onset, frames)] = random.uniform(0.03, 0.25)
        start = stop
        if random.random() < 0.18:
            pause = min(frames, start + int(random.uniform(0.08, 0.7) * SAMPLE_RATE / _HOP))
            formants[start:pause] = vowel
            start = pause
    kernel = np.hanning(9) / np.hanning(9).sum()
    smooth = [np.convolve(np.pad(line, 4, "edge"), kernel, "valid") for line in (voiced, breath, *formants.T)]
    voiced, breath, *lines = (np.asarray(line, np.float64) for line in smooth)
    return voiced, breath, np.maximum(np.stack(lines, axis=1), 150.0)


def _contour(random: np.random.Generator, count: int, pitch: float) -> NDArray[np.float64]:
    """Pitch in hertz that wanders by a few semitones, [count]."""
    knots = pitch * 2 ** (random.uniform(-4, 4, count // 4000 + 2) / 12)
    return np.interp(np.arange(count) / 4000, np.arange(len(knots)), knots)
