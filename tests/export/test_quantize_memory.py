# SPDX-License-Identifier: Apache-2.0
"""Which networks are loaded whole: the small ones first, never more than fits, and the container's limit counts."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltxrt_export.quantize import memory
from ltxrt_export.quantize.memory import SEGMENT_BYTES, free_memory_bytes, plan_memory

FULL = {"text_encoder": 50 * 10**9, "audio_encoder": 2 * 10**8, "denoiser": 76 * 10**9, "video_decoder": 10**9}


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 10**11)), st.integers(0, 10**12))
def test_what_is_whole_fits_and_is_smaller_than_what_is_not(sizes: dict[str, int], free: int) -> None:
    plan = plan_memory(sizes, free)
    assert {**plan.whole, **plan.parts} == sizes
    assert not plan.whole or 2 * sum(plan.whole.values()) + SEGMENT_BYTES < free
    assert max(plan.whole.values(), default=0) <= min(plan.parts.values(), default=10**12)


def test_the_full_model_on_a_machine_of_24_gb_and_on_a_large_one() -> None:
    small, large = plan_memory(FULL, 20 * 10**9), plan_memory(FULL, 10**12)
    assert list(small.parts) == ["text_encoder", "denoiser"]
    assert str(small) == (
        "calibration: a few layers at a time of text_encoder (50.0 GB in fp32), denoiser (76.0 GB in fp32), the rest"
        " whole, within 20.0 GB of memory"
    )
    assert list(large.whole) == list(FULL)
    assert str(large) == "calibration: every network whole, 127.2 GB in fp32, within 1000.0 GB of memory"


def test_free_memory_is_what_the_machine_has_left() -> None:
    assert 10**7 < free_memory_bytes() < 10**14


def test_a_container_may_have_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable:    8000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert free_memory_bytes() == 8_192_000
    for name, content in (
        ("memory.max", "5000000\n"),
        ("memory.current", "3000000\n"),
        ("memory.stat", "anon 2000000\ninactive_file 500000\nactive_file 400000\n"),
    ):
        (tmp_path / name).write_text(content)
    assert free_memory_bytes() == 2_500_000
    (tmp_path / "memory.current").write_text("9000000\n")
    assert free_memory_bytes() == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory_bytes() == 8_192_000


def test_where_nothing_tells_half_the_machine_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert free_memory_bytes() > 10**8
