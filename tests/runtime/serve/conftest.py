# SPDX-License-Identifier: Apache-2.0
"""A job layer with real worker processes on scripted pipelines, and sound to feed it."""

import wave
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def speech(tmp_path_factory):
    """Half a second of 16 kHz noise as a WAV file."""
    path = tmp_path_factory.mktemp("media") / "speech.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.random.default_rng(0).integers(-5000, 5000, 8_000, np.int16).tobytes())
    return path


@pytest.fixture
def scripted(monkeypatch):
    """Let worker processes import ``fake_worlds``; the factory's name."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return "fake_worlds:scripted"
