# SPDX-License-Identifier: Apache-2.0
"""Text for people: columns, sizes, and the engine line."""

import pytest

from ltxrt.cli_report import columns, engine_line, error_json, size_text
from ltxrt.engine_store import Backend
from ltxrt.errors import EngineError, MediaError


def test_columns():
    assert list(columns([("a", "long", "x"), ("bbb", "s", "")], indent=1)) == [" a    long  x", " bbb  s"]
    assert list(columns([])) == []
    assert list(columns([("only",), ("one", "more")])) == ["only", "one   more"]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (16_000_000, "16.0 MB"), (46_149_000_000, "46.1 GB")],
)
def test_size_text(size, text):
    assert size_text(size) == text


def test_engine_line():
    cpu, fast = Backend("cpu", True, "runs everywhere"), Backend("gpu", False, "no GPU")
    assert engine_line(cpu, (fast, cpu)) == "engine: cpu (off: gpu: no GPU)"
    assert engine_line(cpu, (cpu,)) == "engine: cpu"


def test_error_json():
    media = MediaError("input_audio", "x", "is empty", "sound")
    assert error_json(media, "line", 4)["error"] == {
        "type": "MediaError",
        "message": "line",
        "exit_code": 4,
        "field": "input_audio",
        "allowed": "sound",
        "problem": "is empty",
    }
    assert set(error_json(EngineError("x"), "line", 6)["error"]) == {"type", "message", "exit_code"}
